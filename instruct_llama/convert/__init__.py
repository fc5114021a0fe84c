"""Other people's checkpoints, in and out: Hugging Face, Meta, GGUF and PEFT; and merging."""

from .exports import export
from .imports import import_checkpoint
from .merge import merge_run

__all__ = ["export", "import_checkpoint", "merge_run"]
