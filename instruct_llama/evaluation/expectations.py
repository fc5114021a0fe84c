"""The results expected of the laptop preset at any seed, and their comparison with those of a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..config import Settings

EXPECTED: Mapping[str, tuple[float, float]] = MappingProxyType(
    {  # figure -> (lowest, highest)
        "start/demonstrations": (0.47, 0.58),
        "tokens/characters_per_token": (2.8, 3.6),
        "tokens/ranking_ceiling": (0.88, 0.94),
        "untrained/loss_over_ln_V": (0.98, 1.02),
        "untrained/true_reward": (0.0, 0.01),
        "pretrain/true_reward": (0.0, 0.05),
        "sft/true_reward": (0.35, 0.60),
        "sft/true_reward_greedy": (0.0, 0.72),
        "sft-qlora/true_reward": (0.27, 0.68),
        "sft-qlora/minus_sft": (-0.08, 0.08),
        "reward/below_ceiling": (-0.03, 0.03),
        "ppo/true_reward": (0.90, 1.0),
        "ppo/true_reward_greedy": (0.93, 1.0),
        "scale-up/loss_ratio": (0.2, 0.9),
        "scale-up/reward_loss": (0.2, 0.69),
    }
)


def compare_with_expected(settings: Settings, stage: str, figures: Mapping[str, float]) -> None:
    """Print a stage's figures beside their expected ranges, which exist for the laptop preset only."""
    for name, value in figures.items():
        expected = EXPECTED.get(f"{stage}/{name}")
        if settings.preset != "laptop" or expected is None:
            print(f"{name:<24}{value:>8.3f}   preset {settings.preset}: no expectation")
        else:
            verdict = "as expected" if expected[0] <= value <= expected[1] else "NOT as expected: see What can go wrong"
            print(f"{name:<24}{value:>8.3f}   expected {expected[0]:.2f} to {expected[1]:.2f}: {verdict}")
