"""PPO from human preferences, the algorithm: InstructGPT (arXiv:2203.02155, section 3.5) over PPO (arXiv:1707.06347).

One iteration is `run_iteration`, in this order:

1. `sample_rollouts`     the policy responds to prompts (`generate_responses`); then the log-probabilities of policy and
                         reference, the values, and the reward model's score of each response (`score_rollouts`)
2. `compute_advantages`  per-token rewards (score at the last token, minus the KL penalty at each), GAE, whitening; it
                         is in `rollout`, with everything else that is about single responses
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
from .rollout import Episodes


def run_iteration(
    actors: Actors, config: PPOConfig, prompts: list[list[int]], optimizer: torch.optim.Optimizer, kl_coef: float,
    seed: int, iteration: int, demonstrations: Sequence[Dialog] = (),
) -> tuple[Episodes, dict[str, float]]:  # fmt: skip
    """One iteration of PPO: its rollouts, and the update's metrics."""
    rollouts = sample_rollouts(actors, config, prompts, seed, iteration)
    rollout.compute_advantages(rollouts, config, kl_coef)  # fills in rewards, advantages and returns
    return rollouts, update(actors, config, rollouts, optimizer, seed, iteration, demonstrations)


# -------------------------------------------------------------------------------------------------------- 1. rollouts


def draw_prompts(prompts: Sequence[list[int]], config: PPOConfig, seed: int, iteration: int) -> list[list[int]]:
    """The prompts of an iteration, a function of (seed, iteration); each comes once before any comes again."""
    start, drawn = iteration * config.rollouts, []
    for position in range(start, start + config.rollouts):
        epoch, index = divmod(position, len(prompts))
        if not drawn or index == 0:  # the first prompt of this iteration, or of a new pass
            order = epoch_order(len(prompts), seed, epoch, "prompts")
        drawn.append(prompts[order[index]])
    return drawn


def sample_rollouts(
    actors: Actors, config: PPOConfig, prompts: list[list[int]], seed: int, iteration: int
) -> Episodes:  # fmt: skip
    """One scored response to each prompt, in batches of `rollout_batch`, each with a random stream of its own."""
    size = config.rollout_batch

    def batch(number: int) -> Episodes:
        generator = seeds.generator(actors.device, seed, "rollout", iteration, number)
        rollouts = generate_responses(actors, config, prompts[number * size : (number + 1) * size], generator)
        score_rollouts(actors, config, rollouts)
        return rollouts

    parts = actors.map(batch, math.ceil(len(prompts) / size))  # processes share them, and each gets all
    return rollout.join(parts, actors.tokenizer.pad_id).to(actors.device)


@torch.no_grad()
def generate_responses(
    actors: Actors, config: PPOConfig, prompts: list[list[int]], generator: torch.Generator
) -> Episodes:  # fmt: skip
    """The policy's responses. Their log-probabilities are computed again as the update will: the first ratio is 1."""
    with actors.use("policy") as policy:
        rollouts = rollout.play(policy, prompts, actors.tokenizer, config, generator)
        rollouts.logprobs = rollout.by_micro_batch(
            rollouts, config, lambda part: rollout.response_logprobs(policy, part, config, actors.tokenizer)[0]
        )
    return rollouts


@torch.no_grad()
def score_rollouts(actors: Actors, config: PPOConfig, rollouts: Episodes) -> None:
    """Fill in the reference's log-probabilities (B, N), the values (B, N) and the normalised scores (B,)."""
    unfiltered = replace(config, top_k=0, top_p=1.0)  # the policy's temperature, but not its filters
    with actors.use("reference") as reference:
        rollouts.ref_logprobs = rollout.by_micro_batch(
            rollouts, config, lambda part: rollout.response_logprobs(reference, part, unfiltered, actors.tokenizer)[0]
        )
    with actors.use("value") as value:
        rollouts.values = rollout.by_micro_batch(rollouts, config, lambda part: rollout.answer_values(value, part))
    with actors.use("reward") as reward:
        mean, scale = actors.reward_mean, actors.reward_scale
        rollouts.scores = rollout.by_micro_batch(
            rollouts, config, lambda part: rollout.score(reward, part, config, mean, scale)
        )


# ---------------------------------------------------------------------------------------------------------- 3. update


def update(
    actors: Actors, config: PPOConfig, rollouts: Episodes, optimizer: torch.optim.Optimizer, seed: int,
    iteration: int, demonstrations: Sequence[Dialog] = (),
) -> dict[str, float]:  # fmt: skip
    """`epochs` passes over the rollouts in mini-batches, an optimizer step each; the mean of their metrics."""
    stats: list[dict[str, float]] = []
    with actors.optimizing(optimizer):  # brings policy, value and AdamW's state to where they train
        for rows in _mini_batches(len(rollouts), config, seed, iteration):
            part, number = rollouts.select(rows), len(stats)
            metrics = minibatch_gradients(actors, config, part, seed, iteration, number, demonstrations)
            where = f"iteration {iteration + 1}, episodes {rows}"
            # refuses a loss or gradient that is not finite; else clips each network's gradient, steps, and clears it
            norms = actors.step(optimizer, config.optim, iteration, config.iterations, metrics["loss"], where)
            metrics["grad_norm"], metrics["value_grad_norm"] = norms
            stats.append(metrics)
    mean = {key: float(np.mean([metrics[key] for metrics in stats])) for key in stats[0]}
    return {**mean, "first_ratio": stats[0]["ratio"]}


def _mini_batches(n: int, config: PPOConfig, seed: int, iteration: int) -> Iterator[list[int]]:
    """The rows of each mini-batch: in every epoch a new order, cut into near-equal parts, so no small one remains."""
    for epoch in range(config.epochs):
        order = epoch_order(n, seed, epoch, "minibatch", iteration)
        for rows in np.array_split(order, max(1, round(n / config.minibatch))):
            yield rows.tolist()


def minibatch_gradients(
    actors: Actors, config: PPOConfig, rollouts: Episodes, seed: int, iteration: int = 0, number: int = 0,
    demonstrations: Sequence[Dialog] = (),
) -> dict[str, float]:  # fmt: skip
    """Accumulate a mini-batch's gradients into `.grad`; its losses and metrics, each a mean over its real tokens.

    The gradient does not depend on how it is cut into micro-batches. `number` counts the iteration's mini-batches.
    """
    tokens = int(rollouts.mask.sum())  # of all processes
    sums = dict.fromkeys(("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "ratio"), 0.0)
    for rows in rollouts.parts(max(config.micro_batch, actors.processes)):  # at least a row for each process
        mine, weight = actors.shard_rows(rows)  # weight 0 where a process has no row and computes along with another's
        part = rollouts.select(mine)
        with actors.use("policy", training=True) as policy:
            logprobs, full = rollout.response_logprobs(policy, part, config, actors.tokenizer)  # (B, N), (B, N, V)
            policy_loss = losses.policy_loss(logprobs, part.logprobs, part.advantages, part.mask, config.clip)
            entropy_loss = losses.entropy_loss(full, part.mask)
            actors.backward(weight * (policy_loss + config.entropy_coef * entropy_loss) / tokens)
        with actors.use("value", training=True) as value:
            values = rollout.answer_values(value, part)  # (B, N)
            value_loss = losses.value_loss(values, part.values, part.returns, part.mask, config.value_clip)
            actors.backward(weight * config.value_coef * value_loss / tokens)
        logprobs = logprobs.detach()
        share = weight * int(part.mask.sum()) / tokens  # of the mini-batch's tokens
        sums["policy_loss"] += weight * float(policy_loss.detach()) / tokens
        sums["value_loss"] += weight * float(value_loss.detach()) / tokens
        sums["entropy"] += weight * -float(entropy_loss.detach()) / tokens
        sums["ratio"] += float(losses.ratio_error(logprobs, part.logprobs, part.mask)) * share
        clipped = losses.clip_fraction(logprobs, part.logprobs, part.mask, config.clip)
        sums["clip_fraction"] += float(clipped) * share
    sums = actors.reduce_sum(sums)
    if config.ptx_coef > 0:
        generator = seeds.numpy_generator(seed, "ptx", iteration, number)
        sums["ptx_loss"] = _demonstration_gradients(actors, config, demonstrations, generator)
    sums["loss"] = sums["policy_loss"] + config.value_coef * sums["value_loss"] - config.entropy_coef * sums["entropy"]
    return sums


def _demonstration_gradients(
    actors: Actors, config: PPOConfig, demonstrations: Sequence[Dialog], generator: np.random.Generator
) -> float:  # fmt: skip
    """Accumulate the gradient of the pretraining mix (InstructGPT, equation 2); its loss, without `ptx_coef`."""
    rows = generator.choice(len(demonstrations), min(config.minibatch, len(demonstrations)), replace=False)
    mine, weight = actors.shard_rows(rows.tolist())
    batch = dialog_batch([demonstrations[i] for i in mine], actors.tokenizer.pad_id).to(actors.device)
    n_targets = actors.reduce_sum({"targets": weight * batch.weight})["targets"]
    with actors.use("policy", training=True) as policy:
        logits = policy(batch.tokens, segments=batch.segments)  # (B, T, V)
        loss, _ = losses.cross_entropy_sum(logits, batch.targets, batch.loss_mask)
        actors.backward(weight * config.ptx_coef * loss / n_targets)
    return actors.reduce_sum({"loss": weight * float(loss.detach()) / n_targets})["loss"]
