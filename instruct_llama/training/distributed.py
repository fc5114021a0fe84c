"""Training with several processes under torchrun: records and weights are sharded, the training curve is the same.

Records: each micro-batch is split; gradients and logged figures are summed and divided by the global number of
targets. Weights: FSDP2 (arXiv:2304.11277) keeps 1/N of them in each process and gathers a block when it is computed.
With one process, everything here is a no-op.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..config import ParallelConfig, Settings, check

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------------ processes


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


@contextlib.contextmanager
def session(settings: Settings) -> Iterator[None]:
    """Inside, the processes that torchrun started form a process group; without torchrun, a no-op (P35).

    After an error the group is not destroyed: other processes may be waiting, and torchrun stops them.
    """
    if not under_torchrun():
        yield
        return
    _start(settings, int(os.environ["LOCAL_RANK"]))
    with contextlib.ExitStack() as stack:
        if not is_main():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    barrier()
    dist.destroy_process_group()


def _start(settings: Settings, local_rank: int) -> None:
    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    check(
        cuda or settings.device in ("auto", "cpu"),
        f"--device {settings.device} does not work under torchrun: use cuda, with one GPU for each process, or cpu.",
    )
    if cuda:
        n = torch.cuda.device_count()
        check(local_rank < n, f"There are {n} GPUs: start at most one process for each, --nproc-per-node {n}.")
        torch.cuda.set_device(local_rank)  # "cuda" now means this GPU
    timeout = timedelta(minutes=settings.parallel.timeout_minutes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)


def rank() -> int:
    """The number of this process, from 0; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the main process, which writes, prints and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes have called this."""
    broadcast_from_main(None)


# ---------------------------------------------------------------------------------------------------------- collectives


def broadcast_from_main(value: T) -> T:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_reduce_sum(figures: dict[str, float]) -> dict[str, float]:
    """Each figure summed over the processes, which must all give the same keys."""
    if world_size() == 1:
        return figures
    total = torch.tensor(list(figures.values()), dtype=torch.float64)  # (figures,)
    dist.all_reduce(total)
    return dict(zip(figures, total.tolist(), strict=True))


def all_gather_dict(mine: dict[int, T]) -> dict[int, T]:
    """The items of all processes, sorted by key; tensors must be on the CPU."""
    if world_size() == 1:
        return mine
    everyone = [mine] * world_size()
    dist.all_gather_object(everyone, mine)
    found = {number: item for items in everyone for number, item in items.items()}
    return {number: found[number] for number in sorted(found)}


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others, so that they find the files that it wrote."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


@contextlib.contextmanager
def held_by_main(lock: contextlib.AbstractContextManager) -> Iterator[None]:
    """Hold a lock for all processes; the main process acquires it."""
    with lock if is_main() else contextlib.nullcontext():
        barrier()
        yield


# -------------------------------------------------------------------------------------------------- sharding of records


def shard_rows(rows: Sequence[int]) -> tuple[list[int], int]:
    """This process's rows of a micro-batch, and the weight of their loss and figures: 1, or 0 if it has no rows.

    A process without rows computes on another's row with weight 0, because all processes must run forward and backward
    equally often: each gathers the others' weights.
    """
    mine = list(rows[rank() :: world_size()])
    return (mine, 1) if mine else (list(rows[:1]), 0)


def regroup_microbatches(group: Sequence[Sequence[int]]) -> list[list[int]]:
    """The micro-batches of an optimizer step, joined as far as needed to give every process a row in each.

    The rows of the step do not change. With one process, nothing is joined.
    """
    joined = -(-world_size() // max(map(len, group)))
    return [[row for rows in group[i : i + joined] for row in rows] for i in range(0, len(group), joined)]


def shard_iter(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """(index, item) of this process's items, every `world_size`-th, for work without communication."""
    return ((number, item) for number, item in enumerate(items) if number % world_size() == rank())


def tasks_for_rank(n: int) -> list[int]:
    """The numbers of this process's tasks out of n; each gets equally many, if necessary by repeating task 0."""
    rounds = -(-n // world_size())
    numbers = range(rank(), rounds * world_size(), world_size())
    return [number if number < n else 0 for number in numbers]


# -------------------------------------------------------------------------------------------------- sharding of weights


def shard(model: nn.Module, config: ParallelConfig, precision: str, device: torch.device) -> None:
    """Shard a model's weights, gradients and optimizer state over the processes, in place, block by block.

    Call it before the optimizer is made. Parameters become `DTensor`s with the same names. The 4-bit data of a frozen
    base are not parameters, and stay whole in every process.
    """
    if world_size() == 1:
        return
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    check(precision != "fp16", "fp16's loss scaling works in one process only: under torchrun, use precision bf16.")
    check(
        not config.gather_bf16 or precision == "bf16",
        f"parallel.gather_bf16 needs precision bf16, which rounds weights anyway, and precision is {precision}: "
        "set it to bf16, or leave gather_bf16 off.",
    )
    mesh = init_device_mesh(device.type, (world_size(),))
    offload = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else fsdp.OffloadPolicy()
    # RoPE tables stay fp32: angles rounded to bf16 are wrong by up to a few positions.
    half = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mixed = half if config.gather_bf16 else fsdp.MixedPrecisionPolicy()
    for block in getattr(model, "layers", ()):
        fsdp.fully_shard(
            block, mesh=mesh, offload_policy=offload, mp_policy=mixed, reshard_after_forward=config.reshard
        )  # fmt: skip
    root = _Root(model) if hasattr(model, "hidden") else model
    # `head` computes with the root's weights after `hidden`, so they are not resharded in between.
    fsdp.fully_shard(root, mesh=mesh, offload_policy=offload, reshard_after_forward=False)
    if root is not model:
        fsdp.register_fsdp_forward_method(root, "hidden")
        model.hidden = root.hidden
    vars(model)["sharded"] = root, config  # past `__setattr__`, so that the root is no submodule of its own
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)  # losses are divided by the global number of targets: sum
        unit.set_force_sum_reduction_for_comms(True)


class _Root(nn.Module):
    """FSDP's root around a model: its hooks must run around `hidden`, which is called with and without `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.hidden = model, model.hidden


def _sharded(model: nn.Module) -> tuple[nn.Module, ParallelConfig]:
    """FSDP's root around a sharded model, and the settings that it was sharded with."""
    return vars(model)["sharded"]


def _units(model: nn.Module) -> list[FSDPModule]:
    """The FSDP modules of a sharded model, the root first; each is gathered as a unit."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in _sharded(model)[0].modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """Inside, each process holds all the weights, and can run any number of forward passes without the others.

    For sampling and validation, without gradients, under the autocast of training. All processes must enter and leave
    together.
    """
    if world_size() == 1:
        yield
        return
    units = [unit for model in models for unit in _units(model)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for model in models:
            root, config = _sharded(model)
            for unit in _units(model):
                unit.reshard()
                unit.set_reshard_after_forward(config.reshard and unit is not root, recurse=False)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor; other tensors unchanged. All processes must call it together."""
    return getattr(tensor, "full_tensor", lambda: tensor)()
