"""Worlds with a known ground truth: tinychat has a true reward, the enumerable language has a known optimal policy."""

from . import enumerable, tinychat

__all__ = ["enumerable", "tinychat"]
