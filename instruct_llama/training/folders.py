"""Replacing a run folder as a whole: the new folder is written next to the old one, which stays readable.

The new `sft` is written as `.sft.new` in the same parent, so relative paths in it are valid already. When it is
complete, two renames put it in place; after a kill between the two, the next process to open the folder repairs it.
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
    "pretrain": "pretrain", "sft": "sft", "sft-qlora": "sft", "reward": "reward", "reward-lora": "reward", "dpo": "dpo",
    "ipo": "dpo", "kto": "dpo", "ppo": "ppo",
}  # fmt: skip


def replacement_path(folder: Path) -> Path:
    """The path at which the replacement of `folder` is written."""
    folder = folder.absolute()  # "." has no name
    return folder.with_name(f".{folder.name}.new")


def is_replacement(folder: Path) -> bool:
    """Whether a path is one from `replacement_path`."""
    return folder.name.startswith(".") and folder.name.endswith(".new")


def final_path(folder: Path) -> Path:
    """The folder that a replacement is for; any other folder unchanged."""
    return folder.with_name(folder.name[1:-4]) if is_replacement(folder) else folder


def _old(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.old")


def _info(folder: Path) -> dict[str, Any]:
    """A folder's config.json; empty if it is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return info if isinstance(info, dict) else {}
    return {}


def is_foreign(folder: Path) -> bool:
    """Whether a folder's config.json is from another program; a damaged one is not counted as foreign."""
    info = _info(folder)
    return bool(info) and "kind" not in info


def _is_whole(folder: Path) -> bool:
    """Whether a run folder is complete, which its last file, config.json, records."""
    return bool(_info(folder).get("complete"))


def remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path) -> None:
    """Put the replacement of a folder in its place. Only one process at a time may call this."""
    old = _old(folder)
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        replacement_path(folder).rename(folder)
    except FileNotFoundError:  # a reader, which takes no lock, moved it first: before or after the rename above
        if not folder.exists() and old.exists():
            old.rename(folder)
    remove(old)


def recover(folder: Path) -> None:
    """Finish a `replace_folder` that was killed, or undo it if the new folder is not known to be complete.

    Only the process that holds the lock may call this.
    """
    if _is_whole(replacement_path(folder)):
        replace_folder(folder)
    elif folder.exists():
        remove(_old(folder))
    elif _old(folder).exists():
        _old(folder).rename(folder)


def recover_for_reading(folder: Path) -> None:
    """For readers, without the lock: if the folder is missing and its replacement complete, put that in place."""
    if not folder.exists() and _is_whole(replacement_path(folder)):
        with contextlib.suppress(OSError):  # another process moved it first
            replacement_path(folder).rename(folder)


def check_target(target: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """Raise `UserError` unless a folder may be written at `target`: it is free, or a checkpoint to overwrite.

    Inputs (`sources`) are never overwritten, nor is a folder that holds more than a checkpoint.
    """
    place = target.resolve()
    for source in (path.resolve() for path in sources):
        check(place != source and place not in source.parents, f"{target} would overwrite {source}, one of its inputs: "
              "give another target.")  # fmt: skip
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    weights = ("model*.safetensors", "adapter*.safetensors", "state/**/*.safetensors")  # the last: of a stopped run
    known = {"kind", "model_type"} & _info(target).keys() or any(any(target.glob(name)) for name in weights)
    more = [path for path in target.glob("*") if path.is_dir() and path.name not in ("state", "base")]
    check(bool(known) and not more, f"{target} exists and is not a checkpoint, or holds other files too, so it is "
          "not replaced: give another target.")  # fmt: skip
    check(overwrite, f"{target} holds a checkpoint already: give another target, or --overwrite to replace it.")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The path to write a new folder to; it becomes `target` when the block ends without an error."""
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
    """Only one run, of one process or one group, can write a run folder; a kill frees the lock."""
    folder = final_path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock", is_singleton=True)  # singleton: re-entrant
    with distributed.held_by_main(lock):
        if distributed.is_main():
            recover(folder)
        distributed.barrier()
        yield
