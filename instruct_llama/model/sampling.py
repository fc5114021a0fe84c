"""Sampling: what the model's logits are turned into before a token is drawn, and the loop that draws with a KV cache.

`filter_logits` is the one definition of the distribution that is sampled from. PPO calls it again on the logits of its
own forward pass, so that the ratio of new to old probabilities starts at exactly 1 (P23).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import seeds
from ..config import check
from .llama import KVCache, Llama
from .lora import kept_dense

if TYPE_CHECKING:
    from ..data.tokenizer import Message, Tokenizer


def filter_logits(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned: Sequence[int] = (),
    sampled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities (..., V) float32 of the distribution that is sampled from, from logits (..., V).

    In this order: banned ids go; logits are divided by the temperature; all but the `top_k` likeliest go (0 keeps all);
    of what is left, the likeliest that together hold the mass `top_p` stay (arXiv:1904.09751, section 3.1), the first
    one always. What goes gets -inf, and the rest is renormalised. Temperature 0 puts everything on the likeliest token.

    `sampled` (...,) int64 are tokens that came out of this distribution, so top-k and top-p keep them. Computed again
    in bf16, logits differ a little, and a token at the filter's edge would become impossible after the fact.
    """
    logits = logits.float()  # (..., V)
    if banned:
        logits = logits.index_fill(-1, torch.tensor(banned, device=logits.device), -math.inf)
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)  # (..., 1)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        gone = torch.ones_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, False)
        if sampled is not None:
            gone.scatter_(-1, sampled.unsqueeze(-1), False)
        logits = logits.masked_fill(gone, -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (..., V) twice
        before = ordered.cumsum(-1) - ordered  # (..., V) the mass of the likelier tokens
        gone = (before >= top_p).scatter(-1, order, before >= top_p)  # (..., V) back in the vocabulary's order
        gone.scatter_(-1, order[..., :1] if sampled is None else torch.stack((order[..., 0], sampled), -1), False)
        logits = logits.masked_fill(gone, -math.inf)
    return logits.log_softmax(-1)


@dataclass
class Sampled:
    """Answers to B prompts; N is the length of the longest."""

    tokens: torch.Tensor  # (B, N) int64; the padding id after the end
    logprobs: torch.Tensor  # (B, N) float32, of each token under `filter_logits`; 0 after the end
    mask: torch.Tensor  # (B, N) bool; True up to and including the end token
    ended: torch.Tensor  # (B,) bool; False where the length limit came first


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside, the model's mode as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts with their ends aligned: tokens (B, T) and segments (B, T), 0 at padding; None where no row is padded."""
    width = max(len(prompt) for prompt in prompts)
    pads = [width - len(prompt) for prompt in prompts]
    tokens = [[pad_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    segments = [[0] * pad + [1] * (width - pad) for pad in pads]
    if not any(pads):
        return torch.tensor(tokens, device=device), None
    return torch.tensor(tokens, device=device), torch.tensor(segments, device=device)


def draw(logprobs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One token a row by inverse-CDF sampling: (R, V) log-probabilities -> (R, 1)."""
    cdf = logprobs.exp().cumsum(-1)  # (R, V) rising to 1; removed tokens have no width
    uniform = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]  # (R, 1)
    return torch.searchsorted(cdf, uniform, right=True)  # (R, 1)


def close_gaps(ended: torch.Tensor) -> torch.Tensor:
    """Which row goes where when rows leave a batch: (R,) bool -> (R',). The last rows fill the gaps; few move."""
    going = (~ended).nonzero()[:, 0]  # (R',)
    places = torch.arange(len(going), device=ended.device)  # (R',)
    places[ended[: len(going)]] = going[going >= len(going)]
    return places


def new_cache(model: Llama, batch_size: int, max_len: int) -> KVCache:
    """An empty cache on the model's device, in the dtype that it computes in just now."""
    weight = model.tok_embeddings.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return KVCache(model.config, batch_size, max_len, weight.device, dtype)


@torch.no_grad()
def decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    banned: tuple[int, ...] = (),
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The sampling loop. Each step yields, for the R rows still running:

    their places in `prompts` (R,), the drawn tokens (R,), their log-probabilities (R,), whether they end there (R,).
    A row that has ended leaves the model's batch. Raises `UserError` for prompts that do not fit the context.
    """
    limit, longest = model.config.max_seq_len, max(map(len, prompts), default=0)
    check(max_new_tokens > 0, f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    check(longest > 0 and min(map(len, prompts)) > 0, "Every prompt needs at least one token: give the text's start.")
    check(
        longest + max_new_tokens <= limit,
        f"A prompt of {longest} tokens and max_new_tokens {max_new_tokens} do not fit the context of {limit}: "
        "shorten one of them, or train with a larger model.max_seq_len.",
    )
    tokens, segments = left_pad(prompts, pad_id, model.tok_embeddings.weight.device)  # (B, T) twice
    cache = new_cache(model, len(prompts), longest + max_new_tokens - 1)  # the last token is never read
    rows = torch.arange(len(prompts), device=tokens.device)  # (R,)
    ends = torch.tensor(eos_id, device=tokens.device).reshape(-1)
    with evaluating(model), kept_dense(model):
        for _ in range(max_new_tokens):
            hidden = model.hidden(tokens, segments=segments, cache=cache)[:, -1]  # (R, D)
            logprobs = filter_logits(model.head(hidden), temperature, top_k, top_p, banned)  # (R, V)
            tokens = draw(logprobs, generator)  # (R, 1)
            ended = torch.isin(tokens[:, 0], ends)  # (R,)
            yield rows, tokens[:, 0], logprobs.gather(-1, tokens)[:, 0], ended
            if ended.any():
                kept = close_gaps(ended)  # (R',)
                rows, tokens = rows[kept], tokens[kept]
                cache.select(kept)
            if len(rows) == 0:
                return
            segments = None if segments is None else torch.ones_like(tokens)  # (R, 1)


def sample(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    banned: tuple[int, ...] = (),
) -> Sampled:
    """Draw one answer to each prompt, all in one batch; results stand in the order of the prompts.

    Prompts of different lengths are padded on the left, which changes no row's distribution. An answer ends with a
    token in `eos_id`, or after `max_new_tokens`. `banned` ids are never drawn, and count as impossible in the
    log-probabilities. Without a `generator` (on the model's device) torch's global one is used.
    Raises `UserError` for an empty prompt, or one that does not fit the context with its answer.
    """
    shape, device = (len(prompts), max_new_tokens), model.tok_embeddings.weight.device
    result = Sampled(
        tokens=torch.full(shape, pad_id, device=device),
        logprobs=torch.zeros(shape, device=device),
        mask=torch.zeros(shape, dtype=torch.bool, device=device),
        ended=torch.zeros(shape[0], dtype=torch.bool, device=device),
    )
    steps = decode(
        model, prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id, temperature=temperature,
        top_k=top_k, top_p=top_p, generator=generator, banned=banned,
    )  # fmt: skip
    for step, (rows, tokens, logprobs, ended) in enumerate(steps):
        result.tokens[rows, step] = tokens
        result.logprobs[rows, step] = logprobs
        result.mask[rows, step] = True
        result.ended[rows] = ended
    longest = step + 1
    return Sampled(result.tokens[:, :longest], result.logprobs[:, :longest], result.mask[:, :longest], result.ended)


def stream(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    banned: tuple[int, ...] = (),
) -> Iterator[int]:
    """Draw one answer and hand out its tokens as they come, without the end token; see `sample`."""
    steps = decode(
        model, [prompt], max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id, temperature=temperature,
        top_k=top_k, top_p=top_p, generator=generator, banned=banned,
    )  # fmt: skip
    for _, token, _, ended in steps:
        if not ended:
            yield int(token)


def generate_ids(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[Message]],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    keys: Sequence[seeds.Key] = ("generate",),
) -> list[list[int]]:
    """The sampled token ids of a response to each prompt, its end token last where it has one; see `generate`."""
    check(not isinstance(prompts, str), "generate takes a list of prompts: write [prompt] for one.")
    generator = seeds.generator(model.tok_embeddings.weight.device, seed, *keys)
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    answers = []
    for start in range(0, len(ids), batch_size):
        made = sample(
            model, ids[start : start + batch_size], max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator,
            banned=tokenizer.banned_ids,
        )  # fmt: skip
        answers += [row[kept].tolist() for row, kept in zip(made.tokens, made.mask, strict=True)]
    return answers


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[Message]],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    keys: Sequence[seeds.Key] = ("generate",),
) -> list[str]:
    """Answer prompts in text: a str is one user turn, a list of messages a dialog.

    The same seed, the same answers; other `keys`, other random numbers of that seed.
    """
    made = generate_ids(model, tokenizer, prompts, max_new_tokens, temperature, top_k, top_p, seed, batch_size, keys)
    return [tokenizer.decode(ids) for ids in made]
