"""Learning from human preferences: the formulas, and the rollouts they are applied to."""

from . import losses

__all__ = ["losses"]
