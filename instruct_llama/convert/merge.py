"""Merging the adapter of a LoRA run into its base model, and measuring how exact the result is (P16)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import torch

from .. import seeds
from ..config import UserError, check, shown
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.llama import Llama
from ..training import checkpoint, folders

Into = Literal["dequantised", "original"]


@torch.no_grad()
def merged(source: Path, into: Into = "dequantised") -> tuple[Llama, Tokenizer, list[str]]:
    """The merged model of a LoRA run, its tokenizer, and lines that say how exact each way of merging is.

    The adapter was trained over the dequantised base, so that is the default. Merging it into the original weights of
    a 4-bit run gives another model. Both differences are measured on a probe batch and reported (P16).
    Raises `UserError` for a full checkpoint.
    """
    info = checkpoint.read_info(source)
    check("adapter" in info, f"{source} is a full checkpoint: there is no adapter to merge.")
    # keeps 16-bit weights in 16 bits: two dense copies of 7 B take 27 GB
    dtype = checkpoint.stored_dtype(source / info["base"])
    model, tokenizer = checkpoint.load(source, dtype=dtype)
    probe = torch.randint(tokenizer.vocab_size, (4, 64), generator=seeds.generator("cpu", 0, "probe"))
    trained, lines, chosen = model(probe), [], None
    for kind in ("dequantised", "original"):
        original = checkpoint.load(source / info["base"], dtype=dtype)[0] if kind == "original" else None
        made = lora.merge(model, info["adapter"], into=kind, original=original, dtype=dtype)
        error = (made(probe) - trained).norm() / trained.norm()
        lines.append(f"merged into the {kind} base: {100 * float(error):.3f} % relative difference on a probe batch")
        chosen = made if kind == into else chosen
        del made, original
    return chosen, tokenizer, lines


def merge_run(source: Path, target: Path, into: Into = "dequantised", overwrite: bool = False) -> list[str]:
    """Merge a LoRA run into a plain checkpoint at `target`; returns lines that say how exact it is. See `merged`.

    Raises `UserError` when `target` exists, unless it was merged from the same run or is a checkpoint to `overwrite`.
    """
    info = checkpoint.read_info(source)
    origin = os.path.relpath(source, target)
    again = False
    with contextlib.suppress(UserError):  # no run folder
        again = checkpoint.read_info(target).get("merged_from") == origin
    folders.check_target(target, overwrite or again, checkpoint.read_folders(source))
    model, tokenizer, lines = merged(source, into)
    parts = ("base", "fingerprint", "adapter", "modules_to_save", "lora", "quant", "model", "kind", "settings")
    kept = {key: value for key, value in info.items() if key not in parts}
    with folders.replacing(target) as new:
        checkpoint.save_full(new, model, tokenizer, {**kept, "merged_from": origin})
    return [*lines, f"saved in {shown(target)} ({into})"]
