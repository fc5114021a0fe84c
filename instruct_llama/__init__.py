"""InstructLLaMA: from random weights to a model that follows instructions and has learnt from human preferences."""

import logging

from . import config, convert, data, evaluation, model, pipeline, presets, rlhf, seeds, stages, training, worlds
from .config import Settings, UserError
from .model.sampling import generate
from .pipeline import require, run
from .training.checkpoint import load

__version__ = "0.1.0"
__all__ = [
    "Settings", "UserError", "config", "convert", "data", "evaluation", "generate", "load", "model", "pipeline",
    "presets", "require", "rlhf", "run", "seeds", "stages", "training", "worlds",
]  # fmt: skip

# On some CPUs bitsandbytes warns that it could fetch faster kernels from a hub. Nothing here wants them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
