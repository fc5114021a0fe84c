"""PPO from human preferences, the algorithm: InstructGPT (arXiv:2203.02155, section 3.5) over PPO (arXiv:1707.06347).

One iteration is `run_iteration`, in this order:

1. `sample_rollouts`     the policy responds to prompts (`generate_responses`); then the log-probabilities of policy and
                         reference, the values, and the reward model's score of each response (`score_rollouts`)
2. `compute_advantages`  per-token rewards (score at the last token, minus the KL penalty at each), GAE, whitening; it
                         is in `rollout`, with all other functions of single responses
3. `update`              a few epochs of mini-batches: clipped policy loss, clipped value loss, one optimizer step each

The formulas are in `losses`: losses are sums over real tokens, metrics are means. Devices, adapters, precision and
processes are behind `Actors`. The tests run the same functions on a table policy whose optimum is known.

B rows, N the longest response, V the vocabulary. B is a micro-batch's inside the loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from .. import seeds
from ..config import PPOConfig
from ..data.batching import Dialog, dialog_batch, epoch_order
from . import losses, rollout
from .actors import Actors
from .rollout import Rollouts


def run_iteration(
    actors: Actors, config: PPOConfig, prompts: list[list[int]], optimizer: torch.optim.Optimizer, kl_coef: float,
    seed: int, iteration: int, demonstrations: Sequence[Dialog] = (),
) -> tuple[Rollouts, dict[str, float]]:  # fmt: skip
    """One iteration of PPO: its rollouts, and the update's metrics."""
    rollouts = sample_rollouts(actors, config, prompts, seed, iteration)
    rollout.compute_advantages(rollouts, config, kl_coef)  # fills in rewards, advantages and returns
    return rollouts, update(actors, config, rollouts, optimizer, seed, iteration, demonstrations)


# -------------------------------------------------------------------------------------------------------- 1. rollouts


def draw_prompts(prompts: Sequence[list[int]], config: PPOConfig, seed: int, iteration: int) -> list[list[int]]:
    """The prompts of an iteration, a function of (seed, iteration); each comes once before any comes again."""
    n, start = len(prompts), iteration * config.rollouts_per_iteration
    end = start + config.rollouts_per_iteration
    epochs = range(start // n, -(-end // n))  # the passes over the prompts that this iteration falls into
    order = np.concatenate([epoch_order(n, seed, epoch, "prompts") for epoch in epochs])
    return [prompts[i] for i in order[start - epochs[0] * n : end - epochs[0] * n]]


def sample_rollouts(
    actors: Actors, config: PPOConfig, prompts: list[list[int]], seed: int, iteration: int
) -> Rollouts:  # fmt: skip
    """One scored response to each prompt, in batches of `generation_batch_size`, each with a separate random stream."""
    size = config.generation_batch_size

    def batch(number: int) -> Rollouts:
        generator = seeds.generator(actors.device, seed, "rollout", iteration, number)
        rollouts = generate_responses(actors, config, prompts[number * size : (number + 1) * size], generator)
        score_rollouts(actors, config, rollouts)
        return rollouts

    parts = actors.map(batch, math.ceil(len(prompts) / size))  # processes share them, and each gets all
    return rollout.join(parts, actors.tokenizer.pad_id).to(actors.device)


@torch.no_grad()
def generate_responses(
    actors: Actors, config: PPOConfig, prompts: list[list[int]], generator: torch.Generator
) -> Rollouts:  # fmt: skip
    """The policy's responses, with log-probabilities recomputed exactly as in the update: the first ratio is 1."""
    size, sampling, special = config.micro_batch_size, config.sampling, actors.tokenizer
    with actors.use("policy") as policy:
        rollouts = rollout.sample_responses(policy, prompts, sampling, special, generator, config.generation_batch_size)
        rollouts.logprobs = rollout.by_micro_batch(
            rollouts, size, lambda part: rollout.response_logprobs(policy, part, sampling, special)[0]
        )
    return rollouts


@torch.no_grad()
def score_rollouts(actors: Actors, config: PPOConfig, rollouts: Rollouts) -> None:
    """Fill in the reference's log-probabilities (B, N), the values (B, N) and the normalised scores (B,)."""
    size, special = config.micro_batch_size, actors.tokenizer
    unfiltered = replace(config.sampling, top_k=0, top_p=1.0)  # the policy's temperature, but not its filters
    with actors.use("reference") as reference:
        rollouts.ref_logprobs = rollout.by_micro_batch(
            rollouts, size, lambda part: rollout.response_logprobs(reference, part, unfiltered, special)[0]
        )
    with actors.use("value") as value:
        rollouts.values = rollout.by_micro_batch(rollouts, size, lambda part: rollout.response_values(value, part))
    with actors.use("reward") as reward:
        mean, scale = actors.reward_mean, actors.reward_scale
        rollouts.scores = rollout.by_micro_batch(
            rollouts, size, lambda part: rollout.response_scores(reward, part, config, mean, scale)
        )


# ---------------------------------------------------------------------------------------------------------- 3. update


def update(
    actors: Actors, config: PPOConfig, rollouts: Rollouts, optimizer: torch.optim.Optimizer, seed: int,
    iteration: int, demonstrations: Sequence[Dialog] = (),
) -> dict[str, float]:  # fmt: skip
    """`num_ppo_epochs` passes over the rollouts in mini-batches, an optimizer step each; the mean of their metrics."""
    stats: list[dict[str, float]] = []
    with actors.optimizing(optimizer):  # moves policy, value model and AdamW's state to their device
        for rows in _mini_batches(len(rollouts), config, seed, iteration):
            part, number = rollouts.select(rows), len(stats)
            metrics = minibatch_gradients(actors, config, part, seed, iteration, number, demonstrations)
            where = f"iteration {iteration + 1}, rollouts {rows}"
            # raises for a loss or gradient that is not finite; clips each network's gradient, steps, zeroes
            norms = actors.step(optimizer, config.optim, iteration, config.iterations, metrics["loss"], where)
            metrics["grad_norm"], metrics["value_grad_norm"] = norms
            stats.append(metrics)
    mean = {key: float(np.mean([metrics[key] for metrics in stats])) for key in stats[0]}
    return {**mean, "first_ratio_abs_error": stats[0]["ratio_abs_error"]}


def _mini_batches(n: int, config: PPOConfig, seed: int, iteration: int) -> Iterator[list[int]]:
    """The rows of each mini-batch: in every epoch a new order, cut into near-equal parts, so no small one remains."""
    for epoch in range(config.num_ppo_epochs):
        order = epoch_order(n, seed, epoch, "minibatch", iteration)
        for rows in np.array_split(order, max(1, round(n / config.mini_batch_size))):
            yield rows.tolist()


def minibatch_gradients(
    actors: Actors, config: PPOConfig, rollouts: Rollouts, seed: int, iteration: int = 0, number: int = 0,
    demonstrations: Sequence[Dialog] = (),
) -> dict[str, float]:  # fmt: skip
    """Accumulate a mini-batch's gradients into `.grad`; its losses and metrics, each a mean over its real tokens.

    The gradient does not depend on how it is cut into micro-batches. `number` counts the iteration's mini-batches.
    """
    tokens = int(rollouts.response_mask.sum())  # of all processes
    sampling, special, sums = config.sampling, actors.tokenizer, dict[str, float]()
    for rows in rollouts.micro_batches(max(config.micro_batch_size, actors.processes)):  # a row for each process
        mine, weight = actors.shard_rows(rows)  # weight 0: a process without rows computes another's
        part = rollouts.select(mine)
        old, mask = part.logprobs, part.response_mask  # (B, N) each
        with actors.use("policy", training=True) as policy:
            logprobs, full = rollout.response_logprobs(policy, part, sampling, special)  # (B, N), (B, N, V)
            policy_loss = losses.policy_loss(logprobs, old, part.advantages, mask, config.cliprange)
            entropy_loss = losses.entropy_loss(full, mask)
            actors.backward(weight * (policy_loss + config.entropy_coef * entropy_loss) / tokens)
        with actors.use("value", training=True) as value:
            values = rollout.response_values(value, part)  # (B, N)
            value_loss = losses.value_loss(values, part.values, part.returns, mask, config.cliprange_value)
            actors.backward(weight * config.vf_coef * value_loss / tokens)
        logprobs, share = logprobs.detach(), weight * int(mask.sum()) / tokens  # of the mini-batch's tokens
        totals = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": -entropy_loss}
        means = {
            "ratio": losses.mean_ratio(logprobs, old, mask),
            "ratio_abs_error": losses.ratio_abs_error(logprobs, old, mask),
            "approx_kl": losses.approx_kl(logprobs, old, mask),
            "clip_frac": losses.clip_frac(logprobs, old, mask, config.cliprange),
        }
        figures = {key: weight * float(total.detach()) / tokens for key, total in totals.items()}
        figures |= {key: float(mean) * share for key, mean in means.items()}
        sums = {key: sums.get(key, 0.0) + value for key, value in figures.items()}
    metrics = actors.reduce_sum(sums)
    if config.ptx_coef > 0:
        generator = seeds.numpy_generator(seed, "ptx", iteration, number)
        metrics["ptx_loss"] = _demonstration_gradients(actors, config, demonstrations, generator)
    value_term, entropy_term = config.vf_coef * metrics["value_loss"], config.entropy_coef * metrics["entropy"]
    return {**metrics, "loss": metrics["policy_loss"] + value_term - entropy_term}


def _demonstration_gradients(
    actors: Actors, config: PPOConfig, demonstrations: Sequence[Dialog], generator: np.random.Generator
) -> float:  # fmt: skip
    """Accumulate the gradient of the pretraining mix (InstructGPT, equation 2); its loss, without `ptx_coef`."""
    rows = generator.choice(len(demonstrations), min(config.mini_batch_size, len(demonstrations)), replace=False)
    mine, weight = actors.shard_rows(rows.tolist())
    batch = dialog_batch([demonstrations[i] for i in mine], actors.tokenizer.pad_id).to(actors.device)
    n_targets = actors.reduce_sum({"targets": weight * batch.weight})["targets"]
    with actors.use("policy", training=True) as policy:
        logits = policy(batch.tokens, segment_ids=batch.segment_ids)  # (B, T, V)
        loss, _ = losses.cross_entropy_sum(logits, batch.targets, batch.loss_mask)
        actors.backward(weight * config.ptx_coef * loss / n_targets)
    return actors.reduce_sum({"loss": weight * float(loss.detach()) / n_targets})["loss"]
