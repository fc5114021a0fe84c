"""Stage dependencies: run a stage with its inputs, and train the inputs that are missing."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from . import convert
from .config import RewardConfig, Settings, UserError, check, project_folder, shown
from .stages import dpo, ppo, pretrain, reward, sft, start
from .training import checkpoint, distributed, folders
from .training.folders import STAGE_OF
from .training.run_log import StageResult, Watch

RUN: dict[str, Callable[[Settings, Sequence[Path], Watch | None], StageResult]] = {
    "pretrain": pretrain.run, "sft": sft.run, "reward": reward.run, "dpo": dpo.run, "ppo": ppo.run,
}  # fmt: skip


def required_folders(stage: str, settings: Settings) -> list[str]:
    """The names of the run folders that a stage reads; the one that it starts from is first."""
    if stage == "reward":
        return ["sft"] if settings.reward.init_from == "sft" else [settings.reward.init_from, "sft"]
    reward = "reward" if settings.ppo.layout == "four_models" else "reward-lora"
    return {"pretrain": [], "sft": ["pretrain"], "dpo": ["sft"], "ppo": ["sft", reward]}[stage]


def for_shared_base(settings: Settings) -> RewardConfig:
    """The reward settings for PPO's shared base: LoRA adapters, with the base quantized as in PPO."""
    lora_config = settings.reward.lora if settings.reward.lora.rank else settings.ppo.lora
    return dataclasses.replace(settings.reward, lora=lora_config, quant=settings.ppo.quant)


def settings_of(folder: str, settings: Settings) -> Settings:
    """The settings to train the run folder of a prerequisite with."""
    stage = STAGE_OF[folder]
    if folder == "sft-qlora":
        settings = settings.replace(sft=settings.qlora)
    if folder == "reward-lora":
        settings = settings.replace(reward=for_shared_base(settings))
    return settings.replace(init=None, resume=True, overwrite=False, **{f"{stage}__name": folder})


def input_folders(stage: str, settings: Settings) -> list[Path]:
    """The folders of a stage's inputs, trained or not; `settings.init`, if given, replaces the one it starts from."""
    read = [settings.out_dir / name for name in required_folders(stage, settings)]
    return [Path(settings.init), *read[1:]] if settings.init else read


def require_inputs(stage: str, settings: Settings) -> list[Path]:
    """The finished run folders that a stage reads; missing ones are trained first."""
    given = [Path(settings.init)] if settings.init else []
    return given + [require(name, settings) for name in required_folders(stage, settings)[len(given) :]]


def run(stage: str, settings: Settings, watch: Watch | None = None) -> StageResult:
    """Train a stage and its missing prerequisites; do nothing if a finished run has the same settings and inputs.

    `stage` is a key of `RUN`. Raises `UserError` if a finished run with other settings or inputs exists
    and `overwrite` is not set.
    """
    check(stage in RUN, f"There is no stage {stage!r}: choose from {', '.join(RUN)}.")
    folder, read = start.run_folder(stage, settings), input_folders(stage, settings)
    start.check_name(stage, folder)
    start.check_inputs(stage, folder, read)
    with folders.stage_lock(folder):
        if distributed.broadcast_from_main(start.is_done(stage, folder, settings, read)):
            print(f"{shown(folder)} holds a finished run of these settings: nothing to do. "
                  f"--overwrite (or settings.replace(overwrite=True)) retrains it.")  # fmt: skip
            info = checkpoint.read_info(folder)
            return StageResult(folder, info["best"], info["steps"], seconds=0.0, trained=False)
        return RUN[stage](settings, require_inputs(stage, settings), watch)


def require(folder: str, settings: Settings) -> Path:
    """The finished run folder of a stage, trained first at the same preset if it is missing.

    Safe to call from several processes: one trains under a lock, the others wait and use the result. The processes of
    torchrun train together.
    An interrupted run is resumed. A finished run is reused, and settings that differ are printed.
    """
    check(folder in STAGE_OF, f"There is no stage {folder!r}: choose from {', '.join(STAGE_OF)}.")
    path = settings.out_dir / folder
    if distributed.broadcast_from_main(checkpoint.is_complete(path)):
        _say_what_differs(path, settings)
        return path
    with folders.stage_lock(path):
        if not distributed.broadcast_from_main(checkpoint.is_complete(path)):
            if folder == "pretrain" and settings.weights:
                return _imported(settings.weights, path)
            print(f"{folder} is not in {shown(settings.out_dir)} yet: training it at preset {settings.preset}.")
            run(STAGE_OF[folder], settings_of(folder, settings))
    return path


def _imported(weights: str, folder: Path) -> Path:
    """The pretraining folder, filled with imported published weights."""
    if distributed.is_main():
        begun = any((folder / name).exists() for name in ("state", "config.json"))
        check(not begun, f"{shown(folder)} holds an interrupted pretraining: finish it with `pretrain --resume`, or "
              f"remove it to start from {weights}.")  # fmt: skip
        print(f"Nothing is pretrained in {shown(folder.parent)}: importing {weights}.")
        print(*convert.import_checkpoint(weights, folder), sep="\n")
    distributed.barrier()
    return folder


def _say_what_differs(folder: Path, settings: Settings) -> None:
    info, asked = checkpoint.read_info(folder), {"seed": settings.seed, **dataclasses.asdict(settings.model)}
    made = {"seed": info.get("seed", settings.seed), **info["model"]}
    if "imported_from" in info:  # the weights determine the model's shape, not the preset
        asked = {"seed": settings.seed}
    other = [f"{k} {made[k]} (asked for: {v})" for k, v in asked.items() if k != "vocab_size" and made.get(k, v) != v]
    if other:
        print(f"{shown(folder)} is reused as trained, with {', '.join(other)}; give another --out to train a new one.")


def real_model(settings: Settings, real: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct for notebook 11, imported into checkpoints/smollm2 on first use.

    If `real` is false, `INSTRUCT_LLAMA_OFFLINE` is set or the download fails, it is the folder of a stand-in: this
    preset's pretrained model, exported to Hugging Face format and imported again, so that the same code runs. The
    choice is printed.
    """
    folder = project_folder() / "checkpoints" / "smollm2"
    if real and checkpoint.is_complete(folder):
        return folder
    try:
        if not real:
            raise UserError("the real model was not asked for.")
        if os.environ.get("INSTRUCT_LLAMA_OFFLINE"):
            raise UserError("INSTRUCT_LLAMA_OFFLINE is set.")
        with folders.stage_lock(folder):
            print(*convert.import_checkpoint("smollm2", folder, overwrite=True), sep="\n")
        return folder
    except UserError as error:
        print(f"SmolLM2 is not available ({error})")
    stand_in = settings.out_dir / "stand-in"
    with folders.stage_lock(stand_in), tempfile.TemporaryDirectory() as scratch:
        if not checkpoint.is_complete(stand_in):
            convert.export("hf", require("pretrain", settings), Path(scratch))
            convert.import_checkpoint(scratch, stand_in, overwrite=True)
    print(f"The stand-in is the small model before SFT, exported and imported again: {shown(stand_in)}")
    return stand_in
