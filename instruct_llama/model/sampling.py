"""Sampling: from the model's logits to the distribution of the next token, and the loop that samples with a KV cache.

`filter_logits` is the one definition of the distribution that is sampled from. PPO calls it again on the logits of its
own forward pass, so that the ratio of new to old probabilities starts at exactly 1 (P23).

B prompts, R rows that are still running, T positions, N tokens of the longest response, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from .. import seeds
from ..config import SamplingConfig, check
from .llama import KVCache, Llama
from .lora import cache_dense_weights

if TYPE_CHECKING:
    from ..data.tokenizer import Message, Tokenizer


def filter_logits(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    suppress_tokens: Sequence[int] = (),
    sampled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities (..., V) float32 of the distribution that is sampled from, from logits (..., V).

    In this order: `suppress_tokens` get probability 0; logits are divided by the temperature; only the `top_k`
    likeliest tokens stay (0 keeps all); of these, the likeliest whose probabilities add up to `top_p` stay
    (arXiv:1904.09751, section 3.1), the likeliest one always. Tokens that do not stay get -inf, and the rest is
    renormalised. Temperature 0 gives probability 1 to the likeliest token.

    `sampled` (...,) int64 are tokens that were sampled from this distribution: top-k and top-p keep them. Logits
    recomputed in bf16 differ a little, and a token at the edge of the filter would get probability 0.
    """
    logits = logits.float()  # (..., V)
    if suppress_tokens:
        logits = logits.index_fill(-1, torch.tensor(suppress_tokens, device=logits.device), -math.inf)
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)  # (..., 1)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        removed = torch.ones_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, False)
        if sampled is not None:
            removed.scatter_(-1, sampled.unsqueeze(-1), False)
        logits = logits.masked_fill(removed, -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (..., V) twice
        before = ordered.cumsum(-1) - ordered  # (..., V) the mass of the likelier tokens
        removed = (before >= top_p).scatter(-1, order, before >= top_p)  # (..., V) back in the vocabulary's order
        removed.scatter_(-1, order[..., :1] if sampled is None else torch.stack((order[..., 0], sampled), -1), False)
        logits = logits.masked_fill(removed, -math.inf)
    return logits.log_softmax(-1)


class SpecialTokens(Protocol):
    """What sampling must know of a vocabulary: a `Tokenizer`, or the few ids of an enumerable language."""

    pad_id: int
    eos_id: int

    @property
    def suppress_tokens(self) -> Sequence[int]:
        """Tokens that are never sampled."""
        ...


@dataclass
class SampledTokens:
    """Responses to B prompts; N is the length of the longest."""

    tokens: torch.Tensor  # (B, N) int64; the padding id after the end
    logprobs: torch.Tensor  # (B, N) float32, of each token under `filter_logits`; 0 after the end
    mask: torch.Tensor  # (B, N) bool; True up to and including the end token
    has_eos: torch.Tensor  # (B,) bool; False where the length limit came first

    def ids(self) -> list[list[int]]:
        """Each response's token ids, without padding."""
        return [row[mask].tolist() for row, mask in zip(self.tokens, self.mask, strict=True)]


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside the block; afterwards the model's mode is as it was before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts padded on the left: tokens (B, T) and segment ids (B, T), 0 at padding; None where no row is padded."""
    width = max(len(prompt) for prompt in prompts)
    pads = [width - len(prompt) for prompt in prompts]
    tokens = [[pad_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    segment_ids = [[0] * pad + [1] * (width - pad) for pad in pads]
    return torch.tensor(tokens, device=device), torch.tensor(segment_ids, device=device) if any(pads) else None


def sample_token(logprobs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One token a row by inverse-CDF sampling: (R, V) log-probabilities -> (R, 1)."""
    cdf = logprobs.exp().cumsum(-1)  # (R, V) rising to 1; a token of probability 0 has no width
    uniform = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]  # (R, 1)
    return torch.searchsorted(cdf, uniform, right=True)  # (R, 1)


def compact_rows(finished: torch.Tensor) -> torch.Tensor:
    """Which row moves where when finished rows (R,) bool leave a batch: indices (R',) of the rows that stay.

    The last running rows take the places of finished ones, so that few rows of the cache have to be copied.
    """
    running = (~finished).nonzero()[:, 0]  # (R',)
    rows = torch.arange(len(running), device=finished.device)  # (R',)
    rows[finished[: len(running)]] = running[running >= len(running)]
    return rows


def new_cache(model: Llama, batch_size: int, max_len: int) -> KVCache:
    """An empty cache on the model's device, in the dtype of the current autocast context."""
    weight = model.tok_embeddings.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return KVCache(model.config, batch_size, max_len, weight.device, dtype)


@torch.no_grad()
def sampling_steps(
    model: Llama, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, special: SpecialTokens,
    generator: torch.Generator | None = None, eos_ids: Sequence[int] = (),
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """The sampling loop. Each step yields, for the R rows still running:

    their places in `prompts` (R,), the sampled tokens (R,), their log-probabilities (R,), whether they end there (R,).
    A row that has ended leaves the model's batch. Arguments and errors as `sample`'s.
    """
    limit, longest = model.config.max_seq_len, max(map(len, prompts), default=0)
    check(longest > 0 and min(map(len, prompts)) > 0, "Every prompt needs at least one token: give the text's start.")
    check(
        longest + sampling.max_new_tokens <= limit,
        f"A prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} do not fit the context of {limit}: "
        "shorten one of them, or train with a larger model.max_seq_len.",
    )
    ends = list(eos_ids) or [special.eos_id]
    suppress = [i for i in special.suppress_tokens if i not in ends]
    filters = sampling.temperature, sampling.top_k, sampling.top_p, suppress
    tokens, segment_ids = left_pad(prompts, special.pad_id, model.tok_embeddings.weight.device)  # (B, T) twice
    cache = new_cache(model, len(prompts), longest + sampling.max_new_tokens - 1)  # the last token is never read
    rows = torch.arange(len(prompts), device=tokens.device)  # (R,)
    end_ids = torch.tensor(ends, device=tokens.device)
    with eval_mode(model), cache_dense_weights(model):
        for _ in range(sampling.max_new_tokens):
            hidden = model.hidden(tokens, segment_ids=segment_ids, cache=cache)[:, -1]  # (R, D)
            logprobs = filter_logits(model.head(hidden), *filters)  # (R, V)
            tokens = sample_token(logprobs, generator)  # (R, 1)
            finished = torch.isin(tokens[:, 0], end_ids)  # (R,)
            yield rows, tokens[:, 0], logprobs.gather(-1, tokens)[:, 0], finished
            if finished.any():
                kept = compact_rows(finished)  # (R',)
                rows, tokens = rows[kept], tokens[kept]
                cache.select_rows(kept)
            if len(rows) == 0:
                return
            segment_ids = None if segment_ids is None else torch.ones_like(tokens)  # (R, 1)


def sample(
    model: Llama, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, special: SpecialTokens,
    generator: torch.Generator | None = None, eos_ids: Sequence[int] = (),
) -> SampledTokens:  # fmt: skip
    """Sample one response to each prompt, all in one batch; results are in the order of the prompts.

    Prompts of different lengths are padded on the left, which changes no row's distribution. A response ends with the
    end token of `special`, or with one of `eos_ids` where those are given, or after `max_new_tokens`. Without a
    `generator` (on the model's device) torch's global one is used.
    Raises `UserError` for an empty prompt, or one that does not fit the context with its response.
    """
    shape, device = (len(prompts), sampling.max_new_tokens), model.tok_embeddings.weight.device
    tokens = torch.full(shape, special.pad_id, device=device)
    logprobs, mask = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.bool, device=device)
    has_eos = torch.zeros(shape[0], dtype=torch.bool, device=device)
    longest = 0
    for rows, sampled, its_logprobs, finished in sampling_steps(model, prompts, sampling, special, generator, eos_ids):
        tokens[rows, longest], logprobs[rows, longest], mask[rows, longest] = sampled, its_logprobs, True
        has_eos[rows] = finished
        longest += 1
    return SampledTokens(tokens[:, :longest], logprobs[:, :longest], mask[:, :longest], has_eos)


def sample_ids(
    model: Llama, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, special: SpecialTokens,
    generator: torch.Generator, batch_size: int, eos_ids: Sequence[int] = (),
) -> list[list[int]]:  # fmt: skip
    """The token ids of a response to each prompt, `batch_size` prompts at a time; arguments as `sample`'s."""
    starts = range(0, len(prompts), batch_size)
    parts = (sample(model, prompts[i : i + batch_size], sampling, special, generator, eos_ids) for i in starts)
    return [response for part in parts for response in part.ids()]


def stream(
    model: Llama, prompt: Sequence[int], sampling: SamplingConfig, special: SpecialTokens,
    generator: torch.Generator | None = None, eos_ids: Sequence[int] = (),
) -> Iterator[int]:  # fmt: skip
    """Sample one response and yield its tokens as they come, without the end token; arguments as `sample`'s."""
    for _, token, _, finished in sampling_steps(model, [prompt], sampling, special, generator, eos_ids):
        if not finished:
            yield int(token)


def generate_ids(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[str | list[Message]], sampling: SamplingConfig,
    seed: int = 0, batch_size: int = 128, keys: Sequence[seeds.Key] = ("generate",),
) -> list[list[int]]:  # fmt: skip
    """The sampled token ids of a response to each prompt, its end token last where it has one; see `generate`."""
    check(not isinstance(prompts, str), "generate takes a list of prompts: write [prompt] for one.")
    generator = seeds.generator(model.tok_embeddings.weight.device, seed, *keys)
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    return sample_ids(model, encoded, sampling, tokenizer, generator, batch_size)


def generate(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[str | list[Message]], max_new_tokens: int = 64,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, batch_size: int = 128,
    keys: Sequence[seeds.Key] = ("generate",),
) -> list[str]:  # fmt: skip
    """A response in text to each prompt: a str is one user turn, a list of messages a dialog.

    The same seed gives the same responses; other `keys` give other random numbers of that seed.
    """
    sampling = SamplingConfig(max_new_tokens, temperature, top_k, top_p)
    return [tokenizer.decode(ids) for ids in generate_ids(model, tokenizer, prompts, sampling, seed, batch_size, keys)]
