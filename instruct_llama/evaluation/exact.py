"""PPO on the enumerable language, where the optimal policy is known, with the stage's own functions.

It tests the whole PPO code (P00) and gives the first picture of notebook 07.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import OptimConfig, PPOConfig
from ..rlhf import ppo
from ..training.actors import FourModels
from ..worlds import enumerable


@dataclass(frozen=True)
class EnumerableTokens:
    """The special ids of an enumerable language, under the names of a tokenizer."""

    pad_id: int = enumerable.PAD
    eos_id: int = enumerable.EOS
    suppress_tokens: tuple[int, ...] = (enumerable.PAD, enumerable.BOS)


def config_for(language: enumerable.Language, iterations: int = 150) -> PPOConfig:
    """PPO settings for a table: many short rollouts, large steps, scores neither normalised nor clipped."""
    return PPOConfig(
        iterations=iterations, rollouts_per_iteration=512, generation_batch_size=512, mini_batch_size=128,
        micro_batch_size=512, num_ppo_epochs=4, max_new_tokens=language.max_new_tokens, kl_coef=language.beta,
        score_clip=0.0, missing_eos_score=language.missing_eos_score, cliprange_value=0.0, value_lr=0.1,
        optim=OptimConfig(lr=0.05, min_lr_ratio=0.05, warmup_steps=0, weight_decay=0.0, grad_clip=0.0),
    )  # fmt: skip


def train_table_policy(
    language: enumerable.Language,
    config: PPOConfig,
    seed: int = 0,
    watch: Callable[[int, enumerable.PrefixTable], None] | None = None,
) -> list[dict[str, float]]:
    """Train a table policy with PPO; returns its exact J, score, KL and share of the gap closed per iteration.

    The gap is J* of the optimal policy minus J of the reference.
    """
    policy, reference = enumerable.reference(language), enumerable.reference(language)
    value = enumerable.PrefixTable(language, scalar=True)
    actors = FourModels(policy, reference, value, enumerable.reward_model(language), EnumerableTokens())
    optimizer, points = actors.make_optimizer(config), []
    for iteration in range(config.iterations + 1):
        with torch.no_grad():
            exact = enumerable.evaluate(language, policy)
        figures = {name: float(getattr(exact, name)) for name in ("objective", "score", "kl")}
        points.append({"iteration": iteration, **figures, "gap_closed": enumerable.gap_closed(language, policy)})
        if watch:
            watch(iteration, policy)
        if iteration < config.iterations:
            prompts = [language.prompt] * config.rollouts_per_iteration
            ppo.run_iteration(actors, config, prompts, optimizer, config.kl_coef, seed, iteration)
    return points
