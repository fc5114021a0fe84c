"""Estimates with 95 % intervals: means, paired differences, means over groups, shares and ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import seeds
from ..config import UserError, check

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over n independent prompts, or a share of the pairs of n comparisons, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """The estimate as text with signs, for a difference."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean and 95 % interval by the bootstrap (Efron, 1979; 2,000 resamples, percentiles)."""
    return mean_of_groups({"all": values}, seed)


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of ours - theirs over the same prompts, with its 95 % bootstrap interval over prompts."""
    check(
        len(ours) == len(theirs),
        f"There are {len(ours)} values and {len(theirs)} to pair them with: evaluate both models on the same prompts.",
    )
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)], seed)


def mean_of_groups(groups: Mapping[str, Sequence[float]], seed: int = 0) -> Estimate:
    """Mean of the group means, equally weighted, with a bootstrap interval from resampling within each group."""
    if not groups or not all(len(values) for values in groups.values()):
        raise UserError("There is nothing to estimate from: give at least one held-out record.")
    rng, mean, resampled = seeds.numpy_generator(seed, "bootstrap"), 0.0, np.zeros(RESAMPLES)
    for values in groups.values():
        x = np.asarray(values, dtype=np.float64)  # (n,)
        mean += float(x.mean()) / len(groups)
        resampled += rng.choice(x, (RESAMPLES, len(x))).mean(1) / len(groups)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(mean, float(low), float(high), sum(map(len, groups.values())))


def ratio_estimate(parts: Sequence[float], wholes: Sequence[float], seed: int = 0) -> Estimate:
    """sum(parts) / sum(wholes), with its 95 % bootstrap interval over groups; each group has one part and one whole.

    For shares whose items are dependent within a group, such as pairs of responses to one prompt.
    """
    check(sum(wholes) > 0, "There is nothing to estimate from: give at least one held-out record.")
    x, y = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)  # (n,)
    rows = seeds.numpy_generator(seed, "ratio_bootstrap").integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.percentile(x[rows].sum(1) / y[rows].sum(1), [2.5, 97.5])
    return Estimate(float(x.sum() / y.sum()), float(low), float(high), len(x))


def accuracy_estimate(correct: float, n: int) -> Estimate:
    """A share of n with Wilson's 95 % interval (Wilson, 1927), which is accurate near 0 and 1 too."""
    z, p = 1.959964, correct / n
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, float((centre - spread) / (1 + z * z / n)), float((centre + spread) / (1 + z * z / n)), n)


def win(ours: float, theirs: float) -> float:
    """1 when ours is higher, 0 when theirs is, one half when they are equal."""
    return 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
