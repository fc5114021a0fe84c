"""Prompts to episodes: the tokens an answer is made of, and everything PPO needs to know of each of them.

One rule keeps it right (P22): column t of `logprobs`, `values`, `rewards`, `mask` and `advantages` always speaks of the
t-th token of the answer. The network's output that decides that token sits one position earlier in the full sequence,
at the last prompt token for t = 0; `answer_outputs` is the only place that knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import PPOConfig
from ..data.batching import RankedBatch
from ..model.llama import Llama
from ..model.sampling import filter_logits, sample
from .losses import (
    answer_sum,
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked_mean,
    normalise_score,
    penalised_rewards,
    score_at_end,
    token_logprobs,
    whiten,
)


class SpecialTokens(Protocol):
    """What generation must know of a vocabulary: a `Tokenizer`, or the few ids of an enumerable language."""

    pad_id: int
    eos_id: int
    banned_ids: Sequence[int]  # never generated


@dataclass
class Episodes:
    """B prompts with one answer each; N is the longest answer, T the longest prompt with answer."""

    prompts: list[list[int]]  # token ids of each prompt
    tokens: Tensor  # (B, T) int64, prompt and answer, right-padded
    starts: Tensor  # (B,) int64, where each answer begins in tokens
    answers: Tensor  # (B, N) int64, the sampled ids themselves, never decoded and encoded again
    mask: Tensor  # (B, N) bool, True up to and including the end token
    ended: Tensor  # (B,) bool, whether the answer has its end token
    sampled_logprobs: Tensor  # (B, N) float32, as the sampler saw them; kept to check the recomputed ones
    logprobs: Tensor | None = None  # (B, N) float32, of the policy that sampled
    ref_logprobs: Tensor | None = None  # (B, N) float32, of the frozen reference
    values: Tensor | None = None  # (B, N) float32
    scores: Tensor | None = None  # (B,) float32, normalised and clipped, with the penalty for answers without end
    rewards: Tensor | None = None  # (B, N) float32, score at the last token minus the KL penalty at each
    advantages: Tensor | None = None  # (B, N) float32
    returns: Tensor | None = None  # (B, N) float32

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> Episodes:
        """The same episodes with their tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, tokens of each prompt with its answer."""
        return self.starts + self.mask.sum(1)

    def select(self, rows: Sequence[int]) -> Episodes:
        """Some of the episodes, without the padding that only longer ones need."""
        index = torch.as_tensor(rows, device=self.tokens.device)
        longest, n_answer = int(self.lengths[index].max()), int(self.mask[index].sum(1).max())
        changed = {name: value for name, value in vars(self).items() if name != "prompts"}
        for name, value in changed.items():
            if isinstance(value, Tensor):
                width = longest if name == "tokens" else n_answer
                changed[name] = value[index] if value.dim() == 1 else value[index, :width]
        return Episodes(prompts=[self.prompts[i] for i in rows], **changed)

    def parts(self, size: int) -> list[list[int]]:
        """Rows in groups of at most `size`, like lengths together: little padding, and the same sums in the end."""
        order = self.lengths.argsort(stable=True).tolist()
        return [order[i : i + size] for i in range(0, len(order), size)]

    def kl(self) -> Tensor:
        """(B,) measured KL of each answer from the reference, in nats (k1: unbiased, either sign)."""
        return answer_sum(kl_k1(self.logprobs, self.ref_logprobs), self.mask)


def prompt_room(context: int, config: PPOConfig) -> int:
    """Tokens that a prompt may have, so that `max_new_tokens` more fit into the context and into `seq_len`."""
    return min(config.seq_len or context, context) - config.max_new_tokens


def play(
    policy: Llama, prompts: list[list[int]], tokenizer: SpecialTokens, config: PPOConfig, generator: torch.Generator
) -> Episodes:
    """Sample one answer to each prompt."""
    parts = [
        sample(
            policy, prompts[i : i + config.rollout_batch], max_new_tokens=config.max_new_tokens,
            eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, temperature=config.temperature, top_k=config.top_k,
            top_p=config.top_p, generator=generator, banned=tokenizer.banned_ids,
        )
        for i in range(0, len(prompts), config.rollout_batch)
    ]  # fmt: skip
    width = max(part.tokens.shape[1] for part in parts)

    def join(field: str, pad: float) -> Tensor:
        rows = [getattr(part, field) for part in parts]
        return torch.cat([nn.functional.pad(row, (0, width - row.shape[1]), value=pad) for row in rows])

    answers, mask = join("tokens", tokenizer.pad_id), join("mask", False)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=answers.device)
    length = int((starts + mask.sum(1)).max())
    tokens = torch.full((len(prompts), length), tokenizer.pad_id, device=answers.device)  # (B, T)
    for row, prompt in enumerate(prompts):
        n = int(mask[row].sum())
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=answers.device)
        tokens[row, len(prompt) : len(prompt) + n] = answers[row, :n]
    ended = torch.cat([part.ended for part in parts])
    return Episodes(prompts, tokens, starts, answers, mask, ended, join("logprobs", 0.0))


def join(parts: Sequence[Episodes], pad_id: int) -> Episodes:
    """Episodes one after another, padded alike."""
    prompts, joined = [prompt for part in parts for prompt in part.prompts], {}
    for name, value in vars(parts[0]).items():
        if isinstance(value, Tensor):
            rows = [getattr(part, name) for part in parts]
            if value.dim() == 2:
                width, pad = max(row.shape[1] for row in rows), pad_id if name in ("tokens", "answers") else 0
                rows = [nn.functional.pad(row, (0, width - row.shape[1]), value=pad) for row in rows]
            joined[name] = torch.cat(rows)
    return Episodes(prompts, **joined)


def answer_outputs(x: Tensor, starts: Tensor, n: int) -> Tensor:
    """From outputs at every position, those that decide the n answer tokens: (B, T, …) -> (B, n, …)."""
    index = starts.to(x.device)[:, None] - 1 + torch.arange(n, device=x.device)  # (B, n)
    index = index.clamp(max=x.shape[1] - 1)  # past the end of a row: padding, masked by everyone
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def distribution(model: Llama, episodes: Episodes, config: PPOConfig, banned: Sequence[int]) -> Tensor:
    """Log-probabilities (B, N, V) of what the sampler drew from: same temperature, filters and bans (P23)."""
    hidden = answer_outputs(model.hidden(episodes.tokens), episodes.starts, episodes.answers.shape[1])  # (B, N, D)
    logits = model.head(hidden)  # (B, N, V)
    return filter_logits(logits, config.temperature, config.top_k, config.top_p, banned, sampled=episodes.answers)


def answer_logprobs(logprobs_full: Tensor, episodes: Episodes) -> Tensor:
    """Log-probability of each sampled token: (B, N, V) -> (B, N), 0 where mask is False."""
    safe = torch.where(
        episodes.mask, episodes.answers, logprobs_full.argmax(-1)
    )  # a pad is banned: -inf would give NaN
    return torch.where(episodes.mask, token_logprobs(logprobs_full, safe), 0.0)


def response_logprobs(
    model: nn.Module, rollouts: Episodes, config: PPOConfig, tokenizer: SpecialTokens
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities of the sampled tokens (B, N), and of the whole vocabulary at each of them (B, N, V)."""
    full = distribution(model, rollouts, config, tokenizer.banned_ids)  # (B, N, V)
    return answer_logprobs(full, rollouts), full


def by_micro_batch(rollouts: Episodes, config: PPOConfig, compute: Callable[[Episodes], Tensor]) -> Tensor:
    """What `compute` gives for all rollouts, (B,) or (B, N), from micro-batches of similar lengths."""
    width, made, order = rollouts.mask.shape[1], [], []
    for rows in rollouts.parts(config.micro_batch):
        part = compute(rollouts.select(rows))  # (b,) or (b, n)
        made.append(nn.functional.pad(part, (0, width - part.shape[1])) if part.dim() == 2 else part)
        order += rows
    return torch.cat(made)[torch.tensor(order, device=rollouts.tokens.device).argsort()]


def answer_values(model: nn.Module, episodes: Episodes) -> Tensor:
    """Value of the state each answer token is chosen in: (B, N)."""
    return answer_outputs(model(episodes.tokens), episodes.starts, episodes.answers.shape[1]).float()


def score(model: nn.Module, episodes: Episodes, config: PPOConfig, mean: float, scale: float) -> Tensor:
    """(B,) normalised reward-model scores, read at the end token; an answer without one gets `no_end_score`."""
    raw = score_at_end(model(episodes.tokens), episodes.lengths - 1)  # (B,)
    return final_scores(raw, episodes.ended, mean, scale, config.score_clip, config.no_end_score)


def final_scores(
    raw: Tensor, ended: Tensor, mean: float, scale: float, score_clip: float, no_end_score: float
) -> Tensor:  # fmt: skip
    """(B,) what PPO goes by: raw scores (B,) normalised, clipped to +-score_clip, and replaced unless ended (B,)."""
    scores = normalise_score(raw, mean, scale)
    scores = scores.clamp(-score_clip, score_clip) if score_clip > 0 else scores
    return torch.where(ended, scores, no_end_score)


def answer_scores(model: nn.Module, batch: RankedBatch) -> Tensor:
    """(N,) raw reward-model scores of ranked completions, each read at its own end token."""
    per_token = model(batch.tokens, segments=batch.segments)  # (P, T)
    return score_at_end(per_token[batch.prompt], batch.ends)  # (N,)


def compute_advantages(episodes: Episodes, config: PPOConfig, kl_coef: float) -> None:
    """Fill in KL-penalised rewards, then advantages and returns by GAE, then whiten over the batch's real tokens."""
    episodes.rewards = penalised_rewards(
        episodes.scores, episodes.logprobs, episodes.ref_logprobs, episodes.mask, kl_coef
    )
    episodes.advantages, episodes.returns = gae(
        episodes.rewards, episodes.values, episodes.mask, config.gamma, config.lam
    )
    if config.whiten:
        episodes.advantages = whiten(episodes.advantages, episodes.mask)


def rollout_metrics(rollouts: Episodes, config: PPOConfig, kl_coef: float) -> dict[str, float]:
    """The curves of an iteration's rollouts. The reward model's score and the penalised reward are two of them."""
    mask, kl = rollouts.mask, rollouts.kl()  # (B, N), (B,)
    k3 = answer_sum(kl_k3(rollouts.logprobs, rollouts.ref_logprobs), mask)  # (B,)
    limit = config.score_clip
    figures = {
        "ppo/score": rollouts.scores.mean(),
        "ppo/penalised": answer_sum(rollouts.rewards, mask).mean(),
        "ppo/kl": kl.mean(),
        "ppo/kl_k3": k3.mean(),
        "ppo/kl_coef": kl_coef,
        "ppo/length": mask.sum(1).float().mean(),
        "ppo/ended": rollouts.ended.float().mean(),
        "ppo/score_clipped": (rollouts.scores.abs() >= limit).float().mean() if limit > 0 else 0.0,
        "ppo/explained_variance": explained_variance(rollouts.values, rollouts.returns, mask),
        "ppo/sampling_gap": masked_mean((rollouts.logprobs - rollouts.sampled_logprobs).abs(), mask),
    }
    return {key: float(value) for key, value in figures.items()}
