"""A folder that takes another one's place as a whole: it is written beside it, and the old one stays readable.

The new `sft` is written as `.sft.new` in the same parent, where relative paths in it hold already. When it is whole,
two renames put it in its place; a kill between the two is repaired by whoever opens the folder next.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from . import parallel
from .config import check


def beside(folder: Path) -> Path:
    """Where the folder that will replace `folder` is written."""
    folder = folder.absolute()  # "." has no name
    return folder.with_name(f".{folder.name}.new")


def is_beside(folder: Path) -> bool:
    """Whether a folder is one that will replace another."""
    return folder.name.startswith(".") and folder.name.endswith(".new")


def final(folder: Path) -> Path:
    """The folder that `beside` was asked for; any other folder as it is."""
    return folder.with_name(folder.name[1:-4]) if is_beside(folder) else folder


def _old(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.old")


def _is_whole(folder: Path) -> bool:
    """Whether everything of a run folder is written: its config.json, the last file, says so."""
    with contextlib.suppress(OSError, ValueError):
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(info, dict) and bool(info.get("complete"))
    return False


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def swap(folder: Path) -> None:
    """Put what was written beside a folder in its place. One process at a time."""
    old = _old(folder)
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        beside(folder).rename(folder)
    except FileNotFoundError:  # a reader, who takes no lock, has put it there already: before the rename above or after
        if not folder.exists() and old.exists():
            old.rename(folder)
    remove(old)


def settle(folder: Path) -> None:
    """Finish a `swap` that a kill cut short, or undo it where the new folder is not known to be whole.

    One process at a time: the one that holds the lock.
    """
    if _is_whole(beside(folder)):
        swap(folder)
    elif folder.exists():
        remove(_old(folder))
    elif _old(folder).exists():
        _old(folder).rename(folder)


def find(folder: Path) -> None:
    """For readers, without the lock: where a kill or another process left no folder, put the new one there."""
    if not folder.exists() and _is_whole(beside(folder)):
        with contextlib.suppress(OSError):  # the other process was quicker
            beside(folder).rename(folder)


def check_target(target: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Raise `UserError` unless a folder may be written at `target`: nothing is there, or a checkpoint to overwrite.

    What is read (`sources`) is never overwritten.
    """
    place = target.resolve()
    for source in (path.resolve() for path in sources):
        check(place != source and place not in source.parents, f"{target} would overwrite {source}, which is read for "
              "it: give another target.")  # fmt: skip
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    parts = ("config.json", "adapter_config.json", "model.safetensors", "state")  # the last two: of a run that stopped
    known = any((target / name).exists() for name in parts)
    check(known, f"{target} exists and is no checkpoint, so it is not replaced: give another target.")
    check(overwrite, f"{target} holds a checkpoint already: give another target, or --overwrite to replace it.")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Where to write the folder that becomes `target` when the block ends without an error."""
    settle(target)
    new = beside(target)
    remove(new)
    try:
        yield new
    except BaseException:
        remove(new)
        raise
    swap(target)


@contextlib.contextmanager
def stage_lock(folder: Path) -> Iterator[None]:
    """One process at a time, or one group of them, trains into a run folder; a killed one's lock is freed."""
    folder = final(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock", is_singleton=True)  # singleton: re-entrant
    with parallel.held_by_main(lock):
        if parallel.is_main():
            settle(folder)
        parallel.barrier()
        yield
