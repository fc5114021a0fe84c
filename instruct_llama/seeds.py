"""Named random streams: every generator of the package is a function of the run's seed and of keys.

`generator(device, seed, "rollout", iteration, batch)` is the generator of one generation batch. Equal keys give equal
numbers, also in a resumed run; different keys give different numbers. The first key names the purpose:
"init", "adapter", "epoch", "dropout", "rollout", "ptx", "sft_samples", "reference_responses", "labeller" … Only one
place in the code draws from each stream.
When code is renamed, its keys stay, so that results do not change.
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
    """A 64-bit seed from the run's seed and the keys; the only place that combines seeds (P42).

    It is a hash, because sums and shifts collide: `seed + batch` equals the next seed's first batch. torch's CPU
    generator uses only the low 32 bits of its seed, so `seed + (batch << 40)` equals `seed`; any 32 bits of a hash do.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in (seed, *keys):
        kind, text = ("s", key) if isinstance(key, str) else ("i", str(int(key)))
        digest.update(f"{kind}{len(text.encode())}:{text}".encode())  # the length tells ("a", "b") from ("ab",)
    return int.from_bytes(digest.digest(), "little")


def generator(device: torch.device | str, seed: int, *keys: Key) -> torch.Generator:
    """A torch generator on the device, seeded by the keys."""
    return torch.Generator(device).manual_seed(derive(seed, *keys))


def python_random(seed: int, *keys: Key) -> random.Random:
    """A generator of the standard library, seeded by the keys."""
    return random.Random(derive(seed, *keys))


def numpy_generator(seed: int, *keys: Key) -> np.random.Generator:
    """A NumPy generator, seeded by the keys."""
    return np.random.default_rng(derive(seed, *keys))


@contextlib.contextmanager
def forked(device: torch.device, seed: int, *keys: Key) -> Iterator[None]:
    """A context that seeds torch's global generators by the keys, for dropout, which takes no generator.

    On exit it restores the generators of the CPU and of a CUDA `device`. `torch.manual_seed` seeds all devices: those
    of other GPUs and of MPS are not restored.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, *keys))
        yield
