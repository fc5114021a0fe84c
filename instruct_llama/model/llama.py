"""The LLaMA decoder, whole: RMSNorm, rotary positions, grouped-query attention, SwiGLU, KV cache, two kinds of head.

Sources: LLaMA (arXiv:2302.13971, section 2.2), LLaMA 2 (arXiv:2307.09288, section 2.2), LLaMA 3 (arXiv:2407.21783,
section 3.2), RMSNorm (arXiv:1910.07467), RoFormer's rotary positions (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245), SwiGLU (arXiv:2002.05202).

Shapes: B sequences, T positions, S positions that keys and values cover (those in the cache and the T new ones),
D model width, H query heads, G key/value heads, E = D / H width of a head, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from .. import seeds
from ..config import ModelConfig, UserError
from .lora import active_adapter, adapter

RopeTable = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (1 or B, 1, T, E/2)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias, as everywhere in LLaMA; `Llama.init_weights` fills the weights."""
    # nn.Linear's own initialisation would use the global generator. Under `torch.device("meta")` nothing is allocated.
    layer = skip_init(nn.Linear, inputs, outputs, bias=False, device=torch.get_default_device())
    return cast(nn.Linear, layer)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the width, then scales (arXiv:1910.07467, eq. 4), in fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))  # (D,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()  # (B, T, D)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)  # (B, T, D)
        return normed.to(x.dtype) * self.weight  # (B, T, D)


def rope_inv_freq(config: ModelConfig) -> torch.Tensor:
    """Angle in radians per position of each pair of dimensions, fastest first: (E/2,) float32.

    theta^(-2i/E) for pair i (arXiv:2104.09864, section 3.2.2), stretched for longer contexts: "linear" divides all by
    `factor` (arXiv:2306.15595); "llama3" divides those with less than `low_freq_factor` rotations within the original
    context, keeps those with more than `high_freq_factor`, and interpolates in between.
    """
    width = config.dim // config.n_heads
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float() / width  # (E/2,)
    frequencies = 1.0 / config.rope_theta**exponents  # (E/2,)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # (E/2,)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (E/2,) 1 keeps a frequency, 0 divides it
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor
    return frequencies


def apply_rope(x: torch.Tensor, rotation: RopeTable) -> torch.Tensor:
    """Rotate each pair (i, i + E/2) of a head by its angle: (B, H, T, E) -> the same shape.

    Scores of rotated queries and keys depend only on their distance (arXiv:2104.09864, eq. 16). The two halves of a
    head form the pairs, as in Hugging Face checkpoints; Meta's files pair neighbours (2i, 2i + 1) instead.
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)  # (B, H, T, E/2) twice
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # (B, H, T, E)
    return turned.to(x.dtype)


class KVCache:
    """Keys and values of all earlier positions, so that a new token needs a forward pass of one position.

    `length` of `max_len` positions are filled, the same number in every row. `segment_ids` says which of them belong
    together (0 is padding): left-padded rows of different lengths can be decoded in one batch.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device | str, dtype: torch.dtype
    ):
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.dim // config.n_heads)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, G, max_len, E)
        self.values = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, G, max_len, E)
        self.segment_ids = torch.ones(batch_size, max_len, device=device, dtype=torch.int64)  # (B, max_len)
        self.length = 0
        self.unpadded = True  # no segment ids were given so far: each row is one sequence without padding

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's new keys and values (B, G, T, E); returns all of them, (B, G, S, E)."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep only these rows (indices in their new order, or booleans (B,)): finished rows cost nothing more.

        Only rows that change their place are copied.
        """
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows  # (B',)
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for part in (self.keys, self.values):
            part[:, moved, :, : self.length] = part[:, rows[moved], :, : self.length]
        self.segment_ids[moved] = self.segment_ids[rows[moved]]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]  # (layers, B', G, max_len, E)
        self.segment_ids = self.segment_ids[: len(rows)]  # (B', max_len)


def attention_mask(segment_ids: torch.Tensor, key_segment_ids: torch.Tensor) -> torch.Tensor:
    """Segment-causal mask: segment ids (B, T) of the new tokens and (B, S) of all tokens -> (B, T, S) bool.

    A token attends to itself, to earlier tokens of its own segment, and to earlier tokens of the shared prefix (-1).
    The new tokens are the last T of the S.
    """
    new, total = segment_ids.shape[1], key_segment_ids.shape[1]
    earlier = torch.ones(new, total, dtype=torch.bool, device=key_segment_ids.device).tril(total - new)  # (T, S)
    key_segment_ids = key_segment_ids[:, None, :]  # (B, 1, S)
    return ((segment_ids[:, :, None] == key_segment_ids) | (key_segment_ids < 0)) & earlier  # (B, T, S)


class Attention(nn.Module):
    """Causal self-attention whose key/value heads are shared by groups of query heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.dropout = index, config.attn_dropout
        self.head_dim = config.dim // config.n_heads  # E
        self.wq = linear(config.dim, config.n_heads * self.head_dim)
        self.wk = linear(config.dim, config.n_kv_heads * self.head_dim)
        self.wv = linear(config.dim, config.n_kv_heads * self.head_dim)
        self.wo = linear(config.n_heads * self.head_dim, config.dim)

    def qkv(self, x: torch.Tensor, rotation: RopeTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries (B, H, T, E), rotated keys and unrotated values (B, G, T, E)."""
        q, k, v = (  # (B, T, heads * E) -> (B, heads, T, E)
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.wq, self.wk, self.wv)
        )
        return apply_rope(q, rotation), apply_rope(k, rotation), v

    def forward(
        self, x: torch.Tensor, rotation: RopeTable, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        q, k, v = self.qkv(x, rotation)  # (B, H, T, E), (B, G, T, E) twice
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, G, S, E) twice
            q = q.to(k.dtype)
        if mask is not None and q.is_cuda:  # the only CUDA kernel for groups with a mask stores all scores
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, E) twice
        mixed = F.scaled_dot_product_attention(  # softmax(q k^T / sqrt(E)) v
            q, k, v,
            attn_mask=mask,  # (B, 1, T, S); None: causal, or one new token that attends to everything
            is_causal=mask is None and q.shape[2] > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],  # query head h reads key/value head h // (H / G)
        )  # fmt: skip
        return self.wo(mixed.transpose(1, 2).flatten(2).to(x.dtype))  # (B, H, T, E) -> (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate = linear(config.dim, config.ffn_dim)
        self.w_up = linear(config.dim, config.ffn_dim)
        self.w_down = linear(config.ffn_dim, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))  # (B, T, F) -> (B, T, D)


class Block(nn.Module):
    """Pre-norm block: attention, then feed-forward; each reads the normalised residual stream and adds to it."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.dropout = config.resid_dropout
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, index)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: torch.Tensor, rotation: RopeTable, mask: torch.Tensor | None, cache: KVCache | None = None
    ) -> torch.Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), rotation, mask, cache))  # (B, T, D)
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))  # (B, T, D)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)


class Llama(nn.Module):
    """A decoder with a language-model head: token ids -> logits of the next token.

    Weights are fp32, drawn from normal(0, init_std); those that write to the residual stream are divided by
    sqrt(2 * n_layers), as in GPT-2. Without a `generator` the seed is 0.
    Mixed precision is the caller's `torch.autocast`; logits are fp32 under autocast too.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        # skip_init for an embedding would import the compiler, which takes two seconds.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.inv_freq = rope_inv_freq(config)  # no buffer: casting the model to bf16 must not round it
        self.init_weights(generator or seeds.generator("cpu", 0, "init"))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)  # the norms' scales
            else:
                residual = name.endswith(("wo.weight", "w_down.weight"))
                shrink = math.sqrt(2 * self.config.n_layers) if residual else 1.0
                weight.normal_(0.0, self.config.init_std / shrink, generator=generator)

    def forward(
        self, tokens: torch.Tensor, *, segment_ids: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Logits of each position's next token: tokens (B, T) int64 -> (B, T, V) float32. See `hidden`."""
        return self.head(self.hidden(tokens, segment_ids=segment_ids, cache=cache))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) float32 from hidden states (..., D); fp32 also under autocast: bf16 loses PPO's ratios."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.output.weight.float())  # (..., V)

    def hidden(
        self, tokens: torch.Tensor, *, segment_ids: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """The residual stream after the last norm: tokens (B, T) int64 -> (B, T, D).

        `segment_ids` (B, T) int64 says which tokens of a row belong together: a token attends to earlier tokens of its
        own segment only, and its position counts from 0 inside it. Padding is segment 0, on either side. Several texts
        in one row are 1, 2, 3, …; -1 is a prefix that all of them see, as several responses to one prompt do.
        None: each row is one sequence. Right padding then needs no segment ids, since no real token attends to what
        comes after it. `cache` holds the earlier tokens of the same rows, and these are appended to it.
        Raises `UserError` for rows beyond max_seq_len or ids beyond the vocabulary.
        """
        x = F.dropout(self.embed(tokens), self.config.embed_dropout, self.training)  # (B, T, D)
        rotation, mask = self.rope_and_mask(tokens, segment_ids, cache)
        for layer in cast(Sequence[Block], self.layers):
            if self.config.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpointed_block(layer, x, rotation, mask)  # (B, T, D)
            else:
                x = layer(x, rotation, mask, cache)  # (B, T, D)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)  # (B, T, D)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        size = self.config.vocab_size
        with contextlib.suppress(IndexError):
            # On a GPU a wrong id is a fatal error or an invalid read, so ids are checked before.
            if tokens.device.type not in ("cuda", "mps") or ((tokens >= 0) & (tokens < size)).all():
                return self.tok_embeddings(tokens)  # (B, T, D)
        raise UserError(
            f"Token ids run from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary: the model's "
            f"vocabulary has {size}, so use the tokenizer that the model was trained with."
        )

    def rope_and_mask(
        self, tokens: torch.Tensor, segment_ids: torch.Tensor | None, cache: KVCache | None
    ) -> tuple[RopeTable, torch.Tensor | None]:
        """The rotation of each position, and the attention mask (B, 1, T, S), or None where none is needed."""
        start = 0 if cache is None else cache.length
        end, device = start + tokens.shape[1], tokens.device
        if cache is not None and segment_ids is not None:
            cache.segment_ids[:, start:end], cache.unpadded = segment_ids, False
        if segment_ids is None and end > self.config.max_seq_len:
            raise UserError(
                f"A row of {end} tokens is longer than the context, model.max_seq_len {self.config.max_seq_len}: "
                "shorten the text, or train a model with a longer context."
            )
        if cache is None:
            key_segment_ids = segment_ids  # (B, S)
        else:  # rows without padding need no mask, for a first read and for one new token
            needless = cache.unpadded and (start == 0 or end - start == 1)
            key_segment_ids = None if needless else cache.segment_ids[:, :end]  # (B, S)
        if key_segment_ids is None:
            positions, mask = torch.arange(start, end, device=device)[None], None  # (1, T)
        else:
            visible = attention_mask(key_segment_ids[:, start:], key_segment_ids)  # (B, T, S)
            positions = visible.sum(-1) - 1  # (B, T) how many of its own segment came before
            mask = visible[:, None]  # (B, 1, T, S)
        angles = positions[:, None, :, None] * self.inv_freq.to(device)  # (1 or B, 1, T, E/2)
        return (angles.cos(), angles.sin()), mask


def checkpointed_block(layer: Block, x: torch.Tensor, rotation: RopeTable, mask: torch.Tensor | None) -> torch.Tensor:
    """Run a block, save only its input, and run it again in the backward pass (arXiv:1604.06174)."""
    same_adapter = adapter(layer, active_adapter(layer))  # the backward pass may run under another active adapter
    contexts = (contextlib.nullcontext(), same_adapter)
    return checkpoint(layer, x, rotation, mask, use_reentrant=False, context_fn=lambda: contexts)


class ScalarLlama(Llama):
    """A decoder with one number per position in place of logits: reward and value models.

    The head starts at zero: a new value model predicts 0, and a new reward model gives every response the same score.
    It has no bias, which would cancel out between two responses; PPO adds one to its value model.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None):
        super().__init__(config, generator=generator)
        del self.output
        self.value_head = linear(config.dim, 1)
        nn.init.zeros_(self.value_head.weight)

    def forward(
        self, tokens: torch.Tensor, *, segment_ids: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """One number per position: tokens (B, T) int64 -> (B, T) float32."""
        return self.head(self.hidden(tokens, segment_ids=segment_ids, cache=cache))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scalars (...,) float32 from hidden states (..., D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.value_head
            return F.linear(hidden.float(), head.weight.float(), head.bias).squeeze(-1)  # (...,)


@torch.no_grad()
def attention_weights(
    model: Llama, tokens: torch.Tensor, *, segment_ids: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Attention weights of every head: tokens (B, T) -> per layer (B, H, T, T), rows summing to 1.

    The forward pass never stores them: `scaled_dot_product_attention` computes its output from q, k and v directly.
    """
    segment_ids = torch.ones_like(tokens) if segment_ids is None else segment_ids
    rotation, mask = model.rope_and_mask(tokens, segment_ids, None)
    assert mask is not None  # (B, 1, T, T), since there are segment ids
    x, weights = model.embed(tokens), []  # (B, T, D)
    for layer in cast(Sequence[Block], model.layers):
        q, k, _ = layer.attention.qkv(layer.attention_norm(x), rotation)  # (B, H, T, E), (B, G, T, E)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, E)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        weights.append(scores.float().masked_fill(~mask, -math.inf).softmax(-1))  # (B, H, T, T)
        x = layer(x, rotation, mask)  # (B, T, D)
    return weights
