"""Settings of the model, its adapters and its 4-bit base, as frozen dataclasses. `config` has those of the stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import check


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, for contexts longer than those of pretraining."""

    kind: Literal["none", "linear", "llama3"] = "none"  # linear: scale all frequencies; llama3: only the low ones
    factor: float = 8.0  # the context becomes this many times longer
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_seq_len / this are scaled by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_max_seq_len / this are unchanged
    original_max_seq_len: int = 8192  # llama3: context length of pretraining, in tokens


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LLaMA decoder (LLaMA 2, arXiv:2307.09288; LLaMA 3, arXiv:2407.21783)."""

    vocab_size: int = 512  # V, number of tokens in the vocabulary
    dim: int = 128  # D, width of the residual stream
    n_layers: int = 2  # number of decoder blocks
    n_heads: int = 4  # H, number of query heads
    n_kv_heads: int = 2  # number of key-value heads; n_heads: multi-head attention; 1: multi-query
    ffn_dim: int = 352  # hidden width of the SwiGLU feed-forward
    max_seq_len: int = 256  # longest context, in tokens
    rope_theta: float = 10_000.0  # base of the rotary frequencies (RoPE theta)
    rope_scaling: RopeScaling = RopeScaling()  # scaling of the rotary frequencies for longer contexts
    norm_eps: float = 1e-5  # epsilon of RMSNorm
    init_std: float = 0.02  # deviation of the initial weights; about 1/sqrt(dim) helps narrow models
    tie_embeddings: bool = True  # the output projection shares the embedding weights
    embed_dropout: float = 0.0  # dropout on the token embeddings
    attn_dropout: float = 0.0  # dropout on the attention weights
    resid_dropout: float = 0.0  # dropout on the outputs of attention and feed-forward
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: saves memory, costs time

    def __post_init__(self) -> None:
        check(self.dim % self.n_heads == 0, f"model.dim {self.dim} must be a multiple of model.n_heads {self.n_heads}.")
        check((self.dim // self.n_heads) % 2 == 0, "model.dim / model.n_heads must be even, for rotary pairs.")
        check(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_heads {self.n_heads} must be a multiple of model.n_kv_heads {self.n_kv_heads}.",
        )
        for name in ("vocab_size", "n_layers", "ffn_dim", "max_seq_len"):
            check(getattr(self, name) >= 1, f"model.{name} must be at least 1.")


PROJECTIONS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")  # the linear layers of a block


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): W x + (alpha / rank) B A x."""

    rank: int = 8  # rank r of the adapter matrices A and B; 0: no adapters
    alpha: float = 16.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # dropout on the input of the adapter
    target_modules: tuple[str, ...] = PROJECTIONS  # adapted projections

    def __post_init__(self) -> None:
        check(self.rank >= 0, f"lora.rank is {self.rank}; it must be at least 1, or 0 for no adapters.")
        wrong = [name for name in self.target_modules if name not in PROJECTIONS]
        check(not wrong, f"lora.target_modules names {wrong}; choose from {', '.join(PROJECTIONS)}.")


@dataclass(frozen=True)
class QuantConfig:
    """4-bit quantisation of the frozen base model (QLoRA, arXiv:2305.14314)."""

    kind: Literal["none", "nf4", "fp4"] = "none"  # 4-bit data type; none: no quantisation
    block_size: int = 64  # number of weights that share one scale
    double_quant: bool = True  # quantise the scales too (double quantisation)
