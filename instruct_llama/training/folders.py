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
from typing import Any

from filelock import FileLock

from ..config import check
from . import distributed

STAGE_OF = {  # run folder -> the stage that trains it, in the order of the pipeline
    "pretrain": "pretrain", "sft": "sft", "sft-qlora": "sft", "reward": "reward", "reward-lora": "reward", "ppo": "ppo",
}  # fmt: skip


def replacement_path(folder: Path) -> Path:
    """Where the folder that will replace `folder` is written."""
    folder = folder.absolute()  # "." has no name
    return folder.with_name(f".{folder.name}.new")


def is_replacement(folder: Path) -> bool:
    """Whether a folder is one that will replace another."""
    return folder.name.startswith(".") and folder.name.endswith(".new")


def final_path(folder: Path) -> Path:
    """The folder that `beside` was asked for; any other folder as it is."""
    return folder.with_name(folder.name[1:-4]) if is_replacement(folder) else folder


def _old(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.old")


def _info(folder: Path) -> dict[str, Any]:
    """What a folder's config.json holds; nothing where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return info if isinstance(info, dict) else {}
    return {}


def is_foreign(folder: Path) -> bool:
    """Whether a folder's config.json is another program's; a damaged one may be ours."""
    info = _info(folder)
    return bool(info) and "kind" not in info


def _is_whole(folder: Path) -> bool:
    """Whether everything of a run folder is written: its config.json, the last file, says so."""
    return bool(_info(folder).get("complete"))


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path) -> None:
    """Put what was written beside a folder in its place. One process at a time."""
    old = _old(folder)
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        replacement_path(folder).rename(folder)
    except FileNotFoundError:  # a reader, who takes no lock, has put it there already: before the rename above or after
        if not folder.exists() and old.exists():
            old.rename(folder)
    remove(old)


def recover(folder: Path) -> None:
    """Finish a `replace_folder` that a kill cut short, or undo it where the new folder is not known to be whole.

    One process at a time: the one that holds the lock.
    """
    if _is_whole(replacement_path(folder)):
        replace_folder(folder)
    elif folder.exists():
        remove(_old(folder))
    elif _old(folder).exists():
        _old(folder).rename(folder)


def recover_for_reading(folder: Path) -> None:
    """For readers, without the lock: where a kill or another process left no folder, put the new one there."""
    if not folder.exists() and _is_whole(replacement_path(folder)):
        with contextlib.suppress(OSError):  # the other process was quicker
            replacement_path(folder).rename(folder)


def check_target(target: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Raise `UserError` unless a folder may be written at `target`: nothing is there, or a checkpoint to overwrite.

    What is read (`sources`) is never overwritten, nor is a folder that holds more than a checkpoint does.
    """
    place = target.resolve()
    for source in (path.resolve() for path in sources):
        check(place != source and place not in source.parents, f"{target} would overwrite {source}, which is read for "
              "it: give another target.")  # fmt: skip
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    weights = ("model*.safetensors", "adapter*.safetensors", "state/**/*.safetensors")  # the last: of a stopped run
    known = {"kind", "model_type"} & _info(target).keys() or any(any(target.glob(name)) for name in weights)
    more = [path for path in target.glob("*") if path.is_dir() and path.name not in ("state", "base")]
    check(bool(known) and not more, f"{target} exists and is no checkpoint, or holds other things too, so it is not "
          "replaced: give another target.")  # fmt: skip
    check(overwrite, f"{target} holds a checkpoint already: give another target, or --overwrite to replace it.")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Where to write the folder that becomes `target` when the block ends without an error."""
    recover(target)
    new = replacement_path(target)
    remove(new)
    try:
        yield new
    except BaseException:
        remove(new)
        raise
    replace_folder(target)


@contextlib.contextmanager
def stage_lock(folder: Path) -> Iterator[None]:
    """One process at a time, or one group of them, trains into a run folder; a killed one's lock is freed."""
    folder = final_path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock", is_singleton=True)  # singleton: re-entrant
    with distributed.held_by_main(lock):
        if distributed.is_main():
            recover(folder)
        distributed.barrier()
        yield
