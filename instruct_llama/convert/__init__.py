"""Import and export of checkpoints (Hugging Face, Meta, GGUF, PEFT), and merging of adapters."""

from .exports import export
from .imports import import_checkpoint
from .merge import merge_run

__all__ = ["export", "import_checkpoint", "merge_run"]
