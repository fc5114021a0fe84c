"""Decide whether a stage has to train, from what its folder holds, and check that it overwrites no other run.

A finished run with the same settings is reused, one with other settings is an error. `--overwrite` retrains in a
separate folder: the old run stays unchanged until the new one has finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import LoRAConfig, QuantConfig, Settings, UserError, check, shown
from ..training import checkpoint, distributed, folders
from ..training.run_log import identity, saved_states


def run_folder(stage: str, settings: Settings) -> Path:
    """The folder of a stage's finished run."""
    config = getattr(settings, stage)
    return settings.out_dir / getattr(config, "run_name", config.name)


def training_folder(stage: str, settings: Settings) -> Path:
    """The folder that a stage writes to while it trains: its run folder, or a hidden one if that holds a checkpoint."""
    folder = run_folder(stage, settings)
    return folders.replacement_path(folder) if distributed.broadcast_from_main(holds_other(folder)) else folder


def holds_other(folder: Path) -> bool:
    """Whether a folder holds a finished run, or a checkpoint of another tool."""
    if (folder / "adapter_config.json").is_file():  # an exported PEFT adapter
        return True
    try:
        return (folder / "config.json").is_file() and checkpoint.is_complete(folder)
    except UserError:
        return True


def is_done(stage: str, folder: Path, settings: Settings, read: Sequence[Path]) -> bool:
    """Whether the folder holds a finished run with these settings and the inputs `read`.

    Raises `UserError` for a finished run with other ones, unless `--overwrite` is set or an interrupted one is resumed.
    """
    if settings.overwrite or not holds_other(folder):
        return False
    if other := what_differs(stage, folder, settings):
        other = f"settings ({other})"
    else:
        other = checkpoint.changed_inputs(checkpoint.read_info(folder), checkpoint.fingerprints(read))
    if not other:
        return True
    if settings.resume and saved_states(folders.replacement_path(folder)):  # an interrupted --overwrite is resumed
        return False
    raise UserError(
        f"{'--resume: ' * settings.resume}{shown(folder)} holds a finished run of other {other}: give "
        f"those, choose another --out or --{stage}.name, or retrain with --overwrite."
    )


def what_differs(stage: str, folder: Path, settings: Settings) -> str:
    """The differences between a finished run's settings and the given ones, as text; empty if there are none."""
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
    """Nested settings as a flat dict with dotted names."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        made |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return made


def check_name(stage: str, folder: Path) -> None:
    """Raise `UserError` if a stage's folder has the name of another stage's folder."""
    owner = folders.STAGE_OF.get(folder.name, stage)
    check(owner == stage, f"{folder.name} is the folder of the stage {owner}, which {stage} would overwrite: "
          f"choose another --{stage}.name.")  # fmt: skip


def check_inputs(stage: str, folder: Path, read: Sequence[Path]) -> None:
    """Raise `UserError` if a stage would overwrite one of its inputs, or the base of an adapter among them."""
    bases = (base for path in read if (path / "config.json").is_file() for base in checkpoint.read_folders(path))
    for path in (*read, *bases):
        check(
            path.resolve() != folder.resolve(),
            f"{stage} would overwrite {shown(path)}, which it reads: choose another --{stage}.name or --init.",
        )


def base_to_adapt(
    start: Path, stage: str, lora: LoRAConfig, quant: QuantConfig
) -> tuple[Path, tuple[LoRAConfig, checkpoint.State, QuantConfig] | None]:
    """The full checkpoint of the language model that a stage starts from, and its adapter: see `checkpoint.base_of`.

    Raises `UserError` for a reward model, and for an adapter of other settings than the stage's `lora` and `quant`.
    """
    checkpoint.check_kind(start, "lm")
    folder, adapter = checkpoint.base_of(start)
    check(
        adapter is None or (adapter[0], adapter[2]) == (lora, quant),
        f"{start} holds an adapter: train with the same {stage}.lora and {stage}.quant, or first "
        f"`python -m instruct_llama merge {start} {start}-merged`.",
    )
    return folder, adapter
