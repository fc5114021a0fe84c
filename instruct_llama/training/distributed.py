"""Several processes as one: under torchrun, every stage divides its records and its weights, and trains the same curve.

Records: each micro-batch is dealt out, gradients and logged figures are summed, and divided by the global number of
targets. Weights: FSDP2 (arXiv:2304.11277) keeps 1/N of them in each process and gathers a block when it is computed.
Alone, everything here does nothing: a world of one is the same code without this page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..config import ParallelConfig, Settings, check

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------- the processes


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


@contextlib.contextmanager
def session(settings: Settings) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; without torchrun, nothing happens (P35).

    An error leaves without taking leave of the others, who may be waiting: torchrun stops them.
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
        f"--device {settings.device} under torchrun: say cuda, of which each process takes its own, or cpu.",
    )
    if cuda:
        n = torch.cuda.device_count()
        check(local_rank < n, f"There are {n} GPUs here: start at most one process for each, --nproc-per-node {n}.")
        torch.cuda.set_device(local_rank)  # from now on, "cuda" means this one
    waits = timedelta(minutes=settings.parallel.timeout_minutes)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=waits)


def rank() -> int:
    """Which of the processes this is, from 0; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the one process that writes, prints and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    broadcast_from_main(None)


# ------------------------------------------------------------------------------------------------- what they agree upon


def broadcast_from_main(value: T) -> T:
    """The main process's value, for decisions that all must take alike."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_reduce_sum(figures: dict[str, float]) -> dict[str, float]:
    """Each figure summed over the processes; all give the same keys."""
    if world_size() == 1:
        return figures
    total = torch.tensor(list(figures.values()), dtype=torch.float64)  # (figures,)
    dist.all_reduce(total)
    return dict(zip(figures, total.tolist(), strict=True))


def all_gather_dict(mine: dict[int, T]) -> dict[int, T]:
    """What every process found, by number, in order; tensors must be on the CPU."""
    if world_size() == 1:
        return mine
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    found = {number: thing for theirs in everyone for number, thing in theirs.items()}
    return {number: found[number] for number in sorted(found)}


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs what is inside, then the others: they find the files that it wrote."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


@contextlib.contextmanager
def held_by_main(lock: contextlib.AbstractContextManager) -> Iterator[None]:
    """A lock that the main process takes for all of them."""
    with lock if is_main() else contextlib.nullcontext():
        barrier()
        yield


# ----------------------------------------------------------------------------------------------------- who takes what


def shard_rows(rows: Sequence[int]) -> tuple[list[int], int]:
    """This process's rows of a micro-batch, and 1: no row twice, none lost.

    A process without rows gets one all the same, and 0 to multiply its loss and figures by: every process must run
    forward and backward equally often, for each gathers the others' weights.
    """
    mine = list(rows[rank() :: world_size()])
    return (mine, 1) if mine else (list(rows[:1]), 0)


def regroup_microbatches(group: Sequence[Sequence[int]]) -> list[list[int]]:
    """The micro-batches of an optimizer step, joined as far as is needed to give every process a row in each.

    The rows of a step stay together, so the step is the same one; alone, nothing is joined.
    """
    joined = -(-world_size() // max(map(len, group)))
    return [[row for rows in group[i : i + joined] for row in rows] for i in range(0, len(group), joined)]


def shard_iter(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """(number, item) of every world-th item, for work in which nobody waits for anybody."""
    return ((number, item) for number, item in enumerate(items) if number % world_size() == rank())


def tasks_for_rank(n: int) -> list[int]:
    """Which of n tasks this process does, equally many for each: what is left over is task 0 once more."""
    rounds = -(-n // world_size())
    numbers = range(rank(), rounds * world_size(), world_size())
    return [number if number < n else 0 for number in numbers]


# ---------------------------------------------------------------------------------------------------------- the weights


def shard(model: nn.Module, config: ParallelConfig, precision: str, device: torch.device) -> None:
    """Divide a model's weights, gradients and optimizer state among the processes, in place: each block by itself.

    Call it before the optimizer is made. Parameters become `DTensor`s under their old names. What is no parameter, the
    4-bit data of a frozen base, stays whole in every process.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    check(precision != "fp16", "fp16 scales its gradients in one process only: under torchrun, take precision bf16.")
    check(
        not config.gather_bf16 or precision == "bf16",
        f"parallel.gather_bf16 gathers what precision bf16 would round anyway, and precision is {precision}: "
        "set it to bf16, or leave gather_bf16 off.",
    )
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world_size(),))}
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # Rotations come in as fp32 and stay so: bf16 angles are as wrong as a few positions.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in getattr(model, "layers", ()):
        mixed = {"mp_policy": half} if config.gather_bf16 else {}
        fully_shard(block, **options, **mixed, reshard_after_forward=config.reshard)
    root = _Root(model) if hasattr(model, "hidden") else model
    fully_shard(root, **options, reshard_after_forward=False)  # `head` computes with its weights after `hidden`
    if root is not model:
        register_fsdp_forward_method(root, "hidden")
        model.hidden = root.hidden
    model.divided = [root, config]  # in a list, so that the root is no submodule of its own
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)  # losses are divided by the global number of targets: gradients add up
        unit.set_force_sum_reduction_for_comms(True)


class _Root(nn.Module):
    """FSDP's root around a model: its hooks go around `hidden`, which is called within `forward` and without it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.hidden = model, model.hidden


def _units(model: nn.Module) -> list[FSDPModule]:
    """The parts that are gathered as one each, the root first."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.divided[0].modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """Inside, each process holds all the weights: it may compute without the others, as often as it likes.

    For sampling and validation, without gradients, under the autocast of training. Every process enters and leaves it
    together with the others.
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
            root, config = model.divided
            for unit in _units(model):
                unit.reshard()
                unit.set_reshard_after_forward(config.reshard and unit is not root, recurse=False)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a divided tensor, in every process; a plain one as it is. Every process asks at the same time."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
