"""Weight names in each checkpoint format, and the row order of wq and wk.

For rotary positions Hugging Face pairs dimensions (i, i + E/2) of a head, as we do; Meta and GGUF pair neighbours,
(2i, 2i + 1). Only the rows of wq and wk differ, by a permutation within each head.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..model.llama import Llama
from ..training import checkpoint

Family = Literal["hf", "meta", "gguf"]


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint of another format, with our names; its weights are read when needed."""

    config: ModelConfig
    tensors: dict[str, Callable[[], torch.Tensor]]  # our key -> reads the weight
    shapes: dict[str, tuple[int, ...]]  # our key -> its shape in the file
    dtype: torch.dtype  # of the stored weights
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()  # what the user should know


OUTER = {  # ours: Hugging Face, Meta, GGUF
    "tok_embeddings": ("model.embed_tokens", "tok_embeddings", "token_embd"),
    "norm": ("model.norm", "norm", "output_norm"),
    "output": ("lm_head", "output", "output"),
}
INNER = {  # of layer i
    "attention_norm": ("input_layernorm", "attention_norm", "attn_norm"),
    "attention.wq": ("self_attn.q_proj", "attention.wq", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attention.wk", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attention.wv", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attention.wo", "attn_output"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    "feed_forward.w_gate": ("mlp.gate_proj", "feed_forward.w1", "ffn_gate"),
    "feed_forward.w_up": ("mlp.up_proj", "feed_forward.w3", "ffn_up"),
    "feed_forward.w_down": ("mlp.down_proj", "feed_forward.w2", "ffn_down"),
}
LAYERS = {"hf": "model.layers.", "meta": "layers.", "gguf": "blk."}
COLUMN = {"hf": 0, "meta": 1, "gguf": 2}


def foreign(path: str, family: Family) -> str:
    """The name of one of our modules in another format: "layers.0.attention.wq" -> "blk.0.attn_q"."""
    inner = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    if inner is None:
        return OUTER[path][COLUMN[family]]
    return f"{LAYERS[family]}{inner[1]}.{INNER[inner[2]][COLUMN[family]]}"


def foreign_key(key: str, family: Family) -> str:
    """The name of one of our weights in another format: "norm.weight" -> "model.norm.weight"."""
    path, _, name = key.rpartition(".")
    return f"{foreign(path, family)}.{name}"


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in our checkpoint of this config."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in checkpoint.model_state(Llama(config)).items()}


def turns(key: str) -> bool:
    """Whether RoPE applies to the output of this weight, so that its row order depends on the format."""
    return key.endswith(("wq.weight", "wk.weight"))


def neighbours_to_halves(weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """wq or wk (heads * E, in) with rows permuted from Meta's order to ours."""
    width = config.dim // config.n_heads  # E
    return weight.view(-1, width // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def halves_to_neighbours(weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The inverse of `neighbours_to_halves`."""
    width = config.dim // config.n_heads  # E
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
