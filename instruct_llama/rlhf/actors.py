"""The interface between the algorithms of `rlhf` and the networks and devices that they run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..config import OptimConfig
from ..model.llama import Llama
from ..model.sampling import SpecialTokens
from .rollout import Rollouts

Role = Literal["policy", "reference", "value", "reward"]


class Actors(Protocol):
    """The four networks, as PPO needs them. `training.actors` has two implementations."""

    tokenizer: SpecialTokens
    device: torch.device  # where rollouts are stored
    reward_mean: float  # of the raw scores of the reference's responses: scores are normalised by these two
    reward_scale: float
    processes: int  # the world size; 1 without torchrun

    def use(self, role: Role, training: bool = False) -> AbstractContextManager[Llama]:
        """The network of a role, ready to compute; with `training`, ready for a backward pass too."""
        ...

    def optimizing(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Inside, policy, value model and the optimizer's state are on the device where they train."""
        ...

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, scaled where fp16 needs it."""
        ...

    def step(
        self, optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total: int, loss: float, where: str
    ) -> tuple[float, ...]:
        """Clip each network's gradient, step, zero; returns the norms before clipping.
        Raises `UserError` if a norm or the loss is not finite."""
        ...

    def map(self, function: Callable[[int], Rollouts], n: int) -> list[Rollouts]:
        """[function(0), …, function(n - 1)]; several processes share the calls, and each gets the whole list."""
        ...

    def shard_rows(self, rows: Sequence[int]) -> tuple[list[int], int]:
        """This process's rows of a micro-batch, and the weight of their loss: 1, or 0 for a process without rows."""
        ...

    def reduce_sum(self, figures: dict[str, float]) -> dict[str, float]:
        """Each figure summed over the processes."""
        ...
