"""Other people's checkpoints, in and out: Hugging Face, Meta, GGUF and PEFT."""

from .exports import export
from .imports import import_checkpoint

__all__ = ["export", "import_checkpoint"]
