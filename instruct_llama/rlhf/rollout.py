"""Rollouts: prompts with sampled responses, and the quantities that PPO computes for each of their tokens.

Alignment (P22): column t of `logprobs`, `values`, `rewards`, `response_mask` and `advantages` refers to the t-th token
of the response. The network's output that predicts that token is one position earlier in the full sequence: for t = 0
at the last prompt token. `gather_response_positions` is the only function that shifts.

B rollouts (b of a micro-batch), N tokens of the longest response, T of the longest prompt with response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..config import PPOConfig, SamplingConfig
from ..data.batching import RankedBatch
from ..model.llama import Llama
from ..model.sampling import SpecialTokens, filter_logits, sample
from .losses import (
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked_mean,
    normalise_score,
    penalised_rewards,
    pool_last_token,
    response_sum,
    token_logprobs,
    whiten,
)

LATER = cast(Tensor, None)  # filled in by `ppo.generate_responses`, `ppo.score_rollouts` and `compute_advantages`


@dataclass
class Rollouts:
    """B prompts with one response each, and what is computed of them."""

    prompts: list[list[int]]  # token ids of each prompt
    tokens: Tensor  # (B, T) int64, prompt and response, right-padded
    prompt_lengths: Tensor  # (B,) int64, which is also where each response starts in `tokens`
    responses: Tensor  # (B, N) int64, the sampled ids themselves, never decoded and encoded again
    response_mask: Tensor  # (B, N) bool, True up to and including the end token
    has_eos: Tensor  # (B,) bool, whether the response has its end token
    sampled_logprobs: Tensor  # (B, N) float32, as the sampler computed them; to check the recomputed ones
    logprobs: Tensor = LATER  # (B, N) float32, of the policy that sampled
    ref_logprobs: Tensor = LATER  # (B, N) float32, of the frozen reference
    values: Tensor = LATER  # (B, N) float32
    scores: Tensor = LATER  # (B,) float32, normalised and clipped; `missing_eos_score` without end token
    rewards: Tensor = LATER  # (B, N) float32, score at the last token minus the KL penalty at each
    advantages: Tensor = LATER  # (B, N) float32
    returns: Tensor = LATER  # (B, N) float32

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> Rollouts:
        """The same rollouts with their tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, tokens of each prompt with its response."""
        return self.prompt_lengths + self.response_mask.sum(1)

    def select(self, rows: Sequence[int]) -> Rollouts:
        """Some of the rollouts, without the padding that only longer ones need."""
        index = torch.as_tensor(rows, device=self.tokens.device)
        width, response_width = int(self.lengths[index].max()), int(self.response_mask[index].sum(1).max())
        changed = {name: value for name, value in vars(self).items() if name != "prompts"}
        for name, value in changed.items():
            if isinstance(value, Tensor):
                columns = width if name == "tokens" else response_width
                changed[name] = value[index] if value.dim() == 1 else value[index, :columns]
        return Rollouts(prompts=[self.prompts[i] for i in rows], **changed)

    def response_ids(self) -> list[list[int]]:
        """Each response's token ids, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.responses, self.response_mask, strict=True)]

    def micro_batches(self, size: int) -> list[list[int]]:
        """Rows in groups of at most `size`, similar lengths together, which saves padding."""
        order = self.lengths.argsort(stable=True).tolist()
        return [order[i : i + size] for i in range(0, len(order), size)]

    def kl(self) -> Tensor:
        """(B,) KL of each response to the reference in nats, by the k1 estimator: unbiased, of either sign."""
        return response_sum(kl_k1(self.logprobs, self.ref_logprobs), self.response_mask)


def max_prompt_length(context: int, config: PPOConfig) -> int:
    """Tokens that a prompt may have, so that `max_new_tokens` more fit into the context and into `seq_len`."""
    return min(config.seq_len or context, context) - config.max_new_tokens


def sample_responses(
    policy: Llama, prompts: list[list[int]], sampling: SamplingConfig, special: SpecialTokens,
    generator: torch.Generator, batch_size: int,
) -> Rollouts:  # fmt: skip
    """One sampled response to each prompt, `batch_size` prompts at a time."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        sampled = sample(policy, part, sampling, special, generator)
        rows = [[*prompt, *response] for prompt, response in zip(part, sampled.ids(), strict=True)]
        width, device = max(map(len, rows)), sampled.tokens.device
        tokens = torch.tensor([row + [special.pad_id] * (width - len(row)) for row in rows], device=device)  # (b, T)
        lengths = torch.tensor([len(prompt) for prompt in part], device=device)  # (b,)
        parts.append(Rollouts(part, tokens, lengths, sampled.tokens, sampled.mask, sampled.has_eos, sampled.logprobs))
    return join(parts, special.pad_id)


def join(parts: Sequence[Rollouts], pad_id: int) -> Rollouts:
    """Several rollouts as one, padded to the longest."""
    prompts, joined = [prompt for part in parts for prompt in part.prompts], {}
    for name, value in vars(parts[0]).items():
        if isinstance(value, Tensor):
            rows = [getattr(part, name) for part in parts]
            if value.dim() == 2:
                width, pad = max(row.shape[1] for row in rows), pad_id if name in ("tokens", "responses") else 0
                rows = [nn.functional.pad(row, (0, width - row.shape[1]), value=pad) for row in rows]
            joined[name] = torch.cat(rows)
    return Rollouts(prompts, **joined)


def gather_response_positions(x: Tensor, prompt_lengths: Tensor, n: int) -> Tensor:
    """Of outputs at every position, those that predict the n response tokens: (B, T, …) -> (B, n, …)."""
    index = prompt_lengths.to(x.device)[:, None] - 1 + torch.arange(n, device=x.device)  # (B, n)
    index = index.clamp(max=x.shape[1] - 1)  # beyond the end of a row: padding, which the masks leave out
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def sampling_logprobs(model: Llama, rollouts: Rollouts, sampling: SamplingConfig, suppress: Sequence[int]) -> Tensor:
    """Log-probabilities (B, N, V) of the distribution that the sampler used: same temperature and filters (P23)."""
    hidden = gather_response_positions(
        model.hidden(rollouts.tokens), rollouts.prompt_lengths, rollouts.responses.shape[1]
    )  # (B, N, D)
    filters = sampling.temperature, sampling.top_k, sampling.top_p, suppress
    return filter_logits(model.head(hidden), *filters, sampled=rollouts.responses)  # (B, N, V)


def gather_logprobs(logprobs_full: Tensor, rollouts: Rollouts) -> Tensor:
    """Log-probability of each sampled token: (B, N, V) -> (B, N), 0 where `response_mask` is False."""
    # the padding id is suppressed: its -inf would become NaN in the backward pass
    targets = torch.where(rollouts.response_mask, rollouts.responses, logprobs_full.argmax(-1))
    return torch.where(rollouts.response_mask, token_logprobs(logprobs_full, targets), 0.0)


def response_logprobs(
    model: Llama, rollouts: Rollouts, sampling: SamplingConfig, special: SpecialTokens
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens (B, N), and of the whole vocabulary at each of them (B, N, V)."""
    full = sampling_logprobs(model, rollouts, sampling, special.suppress_tokens)  # (B, N, V)
    return gather_logprobs(full, rollouts), full


def by_micro_batch(rollouts: Rollouts, size: int, compute: Callable[[Rollouts], Tensor]) -> Tensor:
    """What `compute` returns for all rollouts, (B,) or (B, N), from micro-batches of at most `size`."""
    width, computed, order = rollouts.response_mask.shape[1], [], []
    for rows in rollouts.micro_batches(size):
        part = compute(rollouts.select(rows))  # (b,) or (b, n)
        computed.append(nn.functional.pad(part, (0, width - part.shape[1])) if part.dim() == 2 else part)
        order += rows
    return torch.cat(computed)[torch.tensor(order, device=rollouts.tokens.device).argsort()]


def response_values(model: Llama, rollouts: Rollouts) -> Tensor:
    """Value of the state in which each response token is chosen: (B, N)."""
    per_token = model(rollouts.tokens)  # (B, T)
    return gather_response_positions(per_token, rollouts.prompt_lengths, rollouts.responses.shape[1]).float()


def end_token_scores(model: Llama, rollouts: Rollouts) -> Tensor:
    """(B,) the reward model's raw score of each response, read at its last token."""
    return pool_last_token(model(rollouts.tokens), rollouts.lengths - 1)  # (B,)


def response_scores(model: Llama, rollouts: Rollouts, config: PPOConfig, mean: float, scale: float) -> Tensor:
    """(B,) the scores that PPO uses, from the reward model's raw score at the end token: see `final_scores`."""
    raw = end_token_scores(model, rollouts)  # (B,)
    return final_scores(raw, rollouts.has_eos, mean, scale, config.score_clip, config.missing_eos_score)


def final_scores(
    raw: Tensor, has_eos: Tensor, mean: float, scale: float, score_clip: float, missing_eos_score: float
) -> Tensor:  # fmt: skip
    """(B,) raw scores normalised and clipped to +-score_clip; `missing_eos_score` where a response has no end token."""
    scores = normalise_score(raw, mean, scale)
    scores = scores.clamp(-score_clip, score_clip) if score_clip > 0 else scores
    return torch.where(has_eos, scores, missing_eos_score)


def completion_scores(model: Llama, batch: RankedBatch) -> Tensor:
    """(N,) raw reward-model scores of ranked completions, each at its end token."""
    per_token = model(batch.tokens, segment_ids=batch.segment_ids)  # (P, T)
    return pool_last_token(per_token[batch.prompt], batch.last_positions)  # (N,)


def compute_advantages(rollouts: Rollouts, config: PPOConfig, kl_coef: float) -> None:
    """Fill in the KL-penalised rewards, then advantages and returns by GAE; whiten the advantages over real tokens."""
    mask = rollouts.response_mask
    rollouts.rewards = penalised_rewards(rollouts.scores, rollouts.logprobs, rollouts.ref_logprobs, mask, kl_coef)
    rollouts.advantages, rollouts.returns = gae(rollouts.rewards, rollouts.values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        rollouts.advantages = whiten(rollouts.advantages, mask)


def rollout_metrics(rollouts: Rollouts, config: PPOConfig, kl_coef: float) -> dict[str, float]:
    """The metrics of an iteration's rollouts; CONTRIBUTING.md says what each one means."""
    mask, limit = rollouts.response_mask, config.score_clip  # (B, N)
    figures = {
        "ppo/score": rollouts.scores.mean(),
        "ppo/rlhf_reward": response_sum(rollouts.rewards, mask).mean(),
        "ppo/kl": rollouts.kl().mean(),
        "ppo/kl_k3": response_sum(kl_k3(rollouts.logprobs, rollouts.ref_logprobs), mask).mean(),
        "ppo/kl_coef": kl_coef,
        "ppo/response_length": mask.sum(1).float().mean(),
        "ppo/eos_rate": rollouts.has_eos.float().mean(),
        "ppo/score_clipped": (rollouts.scores.abs() >= limit).float().mean() if limit > 0 else 0.0,
        "ppo/explained_variance": explained_variance(rollouts.values, rollouts.returns, mask),
        "ppo/sampling_gap": masked_mean((rollouts.logprobs - rollouts.sampled_logprobs).abs(), mask),
    }
    return {key: float(value) for key, value in figures.items()}
