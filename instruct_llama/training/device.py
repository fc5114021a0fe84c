"""The device and the precision of a run."""

from __future__ import annotations

import contextlib

import torch

from ..config import UserError


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` prefers CUDA, then Apple's MPS, then the CPU. Raises `UserError` if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here ({str(error).splitlines()[0]}); try cpu.") from error


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Sets the compute dtype of the blocks. Weights, logits, log-probs and losses stay fp32 (P08, P10)."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
