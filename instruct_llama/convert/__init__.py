"""Other people's checkpoints, in and out: Hugging Face, Meta, GGUF and PEFT."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .. import checkpoint
from ..config import Settings, UserError, project_folder, shown
from .exports import export
from .imports import import_checkpoint
from .merge import merge_run

__all__ = ["export", "import_checkpoint", "merge_run", "real_model"]


def real_model(settings: Settings, real: bool = True) -> Path:
    """SmolLM2-135M-Instruct for notebook 11, imported into checkpoints/smollm2 the first time it is asked for.

    Not `real`, or where it cannot be fetched or `INSTRUCT_LLAMA_OFFLINE` is set: a stand-in, this preset's pretrained
    model sent through a Hugging Face folder and back, so that the same code runs. Which of the two it is, is said.
    """
    folder = project_folder() / "checkpoints" / "smollm2"
    if real and checkpoint.is_complete(folder):
        return folder
    try:
        if not real:
            raise UserError("the real model was not asked for.")
        if os.environ.get("INSTRUCT_LLAMA_OFFLINE"):
            raise UserError("INSTRUCT_LLAMA_OFFLINE is set.")
        with checkpoint.stage_lock(folder):
            print(*import_checkpoint("smollm2", folder, overwrite=True), sep="\n")
        return folder
    except UserError as error:
        print(f"No SmolLM2 here ({error})")
    stand_in = settings.out_dir / "stand-in"
    with checkpoint.stage_lock(stand_in), tempfile.TemporaryDirectory() as scratch:
        if not checkpoint.is_complete(stand_in):
            export("hf", checkpoint.require("pretrain", settings), Path(scratch))
            import_checkpoint(scratch, stand_in, overwrite=True)
    print(f"Its stand-in is the small model before SFT, exported and imported again: {shown(stand_in)}")
    return stand_in
