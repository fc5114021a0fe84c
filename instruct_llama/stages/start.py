"""Whether a stage trains at all: what its folder holds already, and whose folder it must not be.

A finished run of the same settings is taken as it is, one of other settings is refused, and `--overwrite` trains anew
beside it: the old run stays as it is until the new one has finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Settings, UserError, check, shown
from ..training import checkpoint, distributed, folders
from ..training.run_log import identity, saved_states


def run_folder(stage: str, settings: Settings) -> Path:
    """Where a finished run of a stage lies."""
    config = getattr(settings, stage)
    return settings.out_dir / getattr(config, "run_name", config.name)


def training_folder(stage: str, settings: Settings) -> Path:
    """Where a stage writes while it trains: its run folder, or beside it where that one holds something finished."""
    folder = run_folder(stage, settings)
    return folders.replacement_path(folder) if distributed.broadcast_from_main(holds_other(folder)) else folder


def holds_other(folder: Path) -> bool:
    """Whether a folder holds a finished run, or a checkpoint that is none of ours."""
    if (folder / "adapter_config.json").is_file():  # an exported PEFT adapter
        return True
    try:
        return (folder / "config.json").is_file() and checkpoint.is_complete(folder)
    except UserError:
        return True


def is_done(stage: str, folder: Path, settings: Settings, read: Sequence[Path]) -> bool:
    """Whether a finished run of these settings and of the inputs `read` lies in the folder.

    Raises `UserError` for one of other settings or inputs, unless it is to be overwritten or was begun to be.
    """
    if settings.overwrite or not holds_other(folder):
        return False
    if other := what_differs(stage, folder, settings):
        other = f"settings ({other})"
    else:
        other = checkpoint.changed_inputs(checkpoint.read_info(folder), checkpoint.fingerprints(read))
    if not other:
        return True
    if settings.resume and saved_states(folders.replacement_path(folder)):  # an interrupted --overwrite goes on
        return False
    raise UserError(
        f"{'--resume: ' * settings.resume}{shown(folder)} holds a finished run of other {other}: give "
        f"those, choose another --out or --{stage}.name, or start anew with --overwrite."
    )


def what_differs(stage: str, folder: Path, settings: Settings) -> str:
    """How a finished run's settings are not the given ones, in words; empty where they are the same."""
    try:
        info = checkpoint.read_info(folder)
    except UserError:
        return "its config.json is damaged, or not ours"
    if "imported_from" in info and info.get("stage") == "import":
        return f"imported from {info['imported_from']}"
    if info.get("stage") != stage:
        return f"of the stage {info.get('stage')}"
    if "settings" not in info:
        return "an earlier version did not note them"
    made, asked = flatten(info["settings"]), flatten(identity(settings, stage))
    found = [key for key in sorted(made.keys() | asked.keys()) if made.get(key) != asked.get(key)]
    words = [f"{key} {made.get(key)}, asked for {asked.get(key)}" for key in found[:3]]
    return "; ".join(words + [f"and {len(found) - 3} more"] * (len(found) > 3))


def flatten(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        made |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return made


def check_name(stage: str, folder: Path) -> None:
    """Raise `UserError` where a stage is named after another one's folder, which that one fills."""
    owner = folders.STAGE_OF.get(folder.name, stage)
    check(owner == stage, f"{folder.name} is the folder of the stage {owner}, which {stage} would overwrite: "
          f"choose another --{stage}.name.")  # fmt: skip


def check_inputs(stage: str, folder: Path, read: Sequence[Path]) -> None:
    """Raise `UserError` where a stage would write over what it reads: its start, or the base under an adapter there."""
    bases = (base for path in read if (path / "config.json").is_file() for base in checkpoint.read_folders(path))
    for path in (*read, *bases):
        check(
            path.resolve() != folder.resolve(),
            f"{stage} would overwrite {shown(path)}, from which it starts: choose another --{stage}.name or --init.",
        )
