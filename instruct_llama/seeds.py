"""Random streams by name: every generator of the package is a function of the run's seed and of keys.

`generator(device, seed, "rollout", iteration, batch)` draws the numbers of one generation batch. Other keys give other
numbers, the same keys the same ones, on any machine and in a resumed run. The first key says what the numbers are for:
"init", "adapter", "epoch", "dropout", "rollout", "ptx", "sft_samples", "reference_responses", "labeller" … One place
in the code draws from a stream, no other.
Keys do not change when something is renamed, so that a renaming changes no figure.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

Key = str | int


def derive(seed: int, *keys: Key) -> int:
    """64 bits that depend on the seed and on every key: the only place where seeds are mixed.

    A hash, because sums and shifts collide: `seed + batch` is the next seed's first batch, and torch's CPU generator
    keeps only the low 32 bits of its seed, so that `seed + (batch << 40)` is `seed` again. Of a hash, any 32 bits do.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in (seed, *keys):
        kind, text = ("s", key) if isinstance(key, str) else ("i", str(int(key)))
        digest.update(f"{kind}{len(text.encode())}:{text}".encode())  # with its length: ("a", "b") is not ("ab",)
    return int.from_bytes(digest.digest(), "little")


def generator(device: torch.device | str, seed: int, *keys: Key) -> torch.Generator:
    """A torch generator on the device."""
    return torch.Generator(device).manual_seed(derive(seed, *keys))


def python_random(seed: int, *keys: Key) -> random.Random:
    """A generator of the standard library."""
    return random.Random(derive(seed, *keys))


def numpy_generator(seed: int, *keys: Key) -> np.random.Generator:
    """A NumPy generator."""
    return np.random.default_rng(derive(seed, *keys))


@contextlib.contextmanager
def forked(device: torch.device, seed: int, *keys: Key) -> Iterator[None]:
    """Inside, torch's global generators are a function of the keys: for dropout, which takes no generator.

    Outside, those of the CPU and of a CUDA `device` are as they were. `torch.manual_seed` seeds those of every device,
    and the ones of other GPUs and of MPS stay as the keys left them.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, *keys))
        yield
