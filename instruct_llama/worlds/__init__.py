"""Worlds whose truth is known: tinychat, with its true reward, and the enumerable language, with its best policy."""

from . import enumerable, tinychat

__all__ = ["enumerable", "tinychat"]
