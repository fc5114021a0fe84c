"""InstructLLaMA: from random weights to a model that follows instructions and has learnt from human preferences."""

import logging

from . import checkpoint, config, data, evaluate, model, presets, rlhf, seeds, stages
from .checkpoint import load, require
from .config import Settings, UserError
from .model.generate import generate

__version__ = "0.1.0"
__all__ = [
    "Settings", "UserError", "checkpoint", "config", "data", "evaluate", "generate", "load", "model", "presets",
    "require", "rlhf", "seeds", "stages",
]  # fmt: skip

# On some CPUs bitsandbytes warns that it could fetch faster kernels from a hub. Nothing here wants them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
