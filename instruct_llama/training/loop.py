"""The one training loop: accumulation, clipping, schedule, precision, metrics, checkpoints, resume.

Randomness is a pure function of the seed and named keys (see `seeds`): the order of the records, dropout masks and
samples. So a resumed run equals an uninterrupted one without saved generators, and only `--seed` changes a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypedDict, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from .. import seeds
from ..config import LoopConfig, LoRAConfig, OptimConfig, QuantConfig, Settings
from ..data.batching import Batch, RankedBatch, epoch_order
from ..data.completions import PreferenceBatch
from ..model.llama import Llama
from . import distributed
from .device import autocast
from .optim import NonFinite, learning_rate, make_optimizer, make_scaler, restore_scaler, scaled_step
from .run_log import RunLog, StageResult, optimizer_tensors

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B", Batch, RankedBatch, PreferenceBatch)


class LoadOptions(TypedDict):
    """How `checkpoint.load` stores the weights that it reads."""

    quant: QuantConfig
    dtype: torch.dtype


def load_options(lora: LoRAConfig, quant: QuantConfig, precision: str) -> LoadOptions:
    """How to load a stage's weights: under adapters they are frozen, so 4 or 16 bits suffice; otherwise fp32 (P08)."""
    frozen = lora.rank > 0 and precision == "bf16"
    return {"quant": quant, "dtype": torch.bfloat16 if frozen else torch.float32}


def with_gradient_checkpointing(model: Llama, settings: Settings) -> Llama:
    """The model with --model.gradient-checkpointing as in these settings, whatever it was saved with."""
    model.config = replace(model.config, gradient_checkpointing=settings.model.gradient_checkpointing)
    return model


@dataclass
class TrainJob(Generic[M, B]):
    """A supervised stage, for `fit`. Losses are sums over targets; `fit` divides by the number of targets."""

    name: str  # the stage's command
    model: M
    optim: OptimConfig
    loop: LoopConfig
    n_items: int  # training records
    lengths: Sequence[int] | None  # tokens of each record, to sort a bucket of steps by; None: no sorting
    batch: Callable[[int, Sequence[int]], B]  # (epoch, indices) -> a batch
    # -> sum over targets, sums to log; these may include "loss", to log it without auxiliary losses
    loss: Callable[[M, B], tuple[torch.Tensor, dict[str, float]]]
    validate: Callable[[], dict[str, float]]  # metrics of the validation records, including "loss"
    sample: Callable[[], list[dict[str, Any]]]  # text samples
    save: Callable[[dict[str, float]], None]  # writes the run folder's weights, given the best metrics
    bucket_steps: int = 1  # optimizer steps whose records are sorted by length together; > 1 only for losses per record


def progress(name: str, total: int, start: int) -> tqdm:
    """A progress bar, shown only in the terminal of the main process."""
    return tqdm(total=total, initial=start, desc=name, disable=None if distributed.is_main() else True, leave=False)


def epoch_groups(stage: TrainJob[M, B], seed: int, epoch: int) -> list[list[list[int]]]:
    """An epoch as optimizer steps of micro-batches of record indices: every record once, at most one step incomplete.

    The records of `bucket_steps` steps are drawn at random and sorted by length to save padding; then the steps are
    shuffled. A loss per token needs 1: in steps of similar lengths, a token of a long response is divided by more
    tokens than one of a short response, so short responses would have too much weight.
    """
    order = [int(i) for i in epoch_order(stage.n_items, seed, epoch, stage.name)]
    size, epoch_steps = stage.loop.batch_size, []
    per_step = size * stage.loop.gradient_accumulation_steps
    for start in range(0, len(order), per_step * stage.bucket_steps):
        drawn = order[start : start + per_step * stage.bucket_steps]
        if stage.lengths is not None:
            drawn = sorted(drawn, key=stage.lengths.__getitem__)
        steps = [drawn[i : i + per_step] for i in range(0, len(drawn), per_step)]
        for i in epoch_order(len(steps), seed, epoch, stage.name, "steps", start):
            epoch_steps.append([steps[i][j : j + size] for j in range(0, len(steps[i]), size)])
    return epoch_steps


def total_steps(stage: TrainJob[M, B]) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = -(-stage.n_items // (stage.loop.batch_size * stage.loop.gradient_accumulation_steps))
    return stage.loop.steps or max(1, round(per_epoch * stage.loop.epochs))


def fit(stage: TrainJob[M, B], log: RunLog, settings: Settings) -> StageResult:
    """Train a stage: validate, keep the best weights, log, save states, resume."""
    device = next(stage.model.parameters()).device
    distributed.shard(stage.model, settings.parallel, stage.loop.precision, device)
    trainable = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer([(list(trainable.values()), stage.optim.lr)], stage.optim)
    scaler = make_scaler(stage.loop.precision, device)
    total, best, step = total_steps(stage), {}, log.start
    if log.saved:
        state = log.restore(trainable, optimizer)
        restore_scaler(scaler, state["scaler"])
        best = state["best"]

    def save_state() -> None:
        tensors, rest = optimizer_tensors(optimizer)
        tensors |= {f"model/{name}": p for name, p in trainable.items()}
        log.save_state(step, tensors, {"optimizer": rest, "scaler": scaler.state_dict(), "best": best})

    def validate() -> dict[str, float]:
        nonlocal best
        stage.model.eval()
        with torch.no_grad(), distributed.unsharded(stage.model), autocast(stage.loop.precision, device):
            metrics = distributed.broadcast_from_main(stage.validate())
            if step % stage.loop.sample_every == 0 or step == total:
                log.sample(step, stage.sample())
        stage.model.train()
        # So few records cannot tell losses 1 % apart. Then the last weights, fully annealed, are the safer choice.
        if not best or metrics["loss"] < best["loss"] * (1.01 if step == total else 1.0):
            best = {"step": step, **metrics}
            stage.save(best)
        return {f"val/{key}": value for key, value in metrics.items()}

    bar = progress(stage.name, total, step)
    stage.model.train()
    with log.interruptible(save_state, stage.name), bar:
        for epoch, group in _steps_from(stage, settings.seed, step, total):
            clock = time.perf_counter()
            metrics, tokens = _train_group(stage, optimizer, scaler, settings.seed, epoch, group, step, total, device)
            step += 1
            metrics["train/tokens_per_s"] = tokens / (time.perf_counter() - clock)
            if step % stage.loop.eval_every == 0 or step == total:
                metrics |= validate()
            log.log(step, metrics)
            if step % stage.loop.save_every == 0 or step == total:
                save_state()
            bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", tokens_per_s=f"{metrics['train/tokens_per_s']:,.0f}")
            bar.update()
    return log.finish(best, step)


def _steps_from(stage: TrainJob[M, B], seed: int, start: int, total: int) -> Iterator[tuple[int, list[list[int]]]]:
    """(epoch, group) of every optimizer step from `start` on; the step number determines the position in the data."""
    per_epoch, step = len(epoch_groups(stage, seed, 0)), start
    while step < total:
        epoch = step // per_epoch
        for group in epoch_groups(stage, seed, epoch)[step % per_epoch :][: total - step]:
            yield epoch, group
            step += 1


def _train_group(
    stage: TrainJob[M, B], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, seed: int, epoch: int,
    group: list[list[int]], step: int, total: int, device: torch.device,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """One optimizer step over a group of micro-batches, normalised by its number of targets (P07, P09)."""
    group = distributed.regroup_microbatches(group)
    batches = []  # this process's share of each micro-batch, and its weight: 0 without rows
    for indices in group:
        mine, counts = distributed.shard_rows(indices)
        batches.append((stage.batch(epoch, mine).to(device), counts))
    whole = distributed.all_reduce_sum(
        {
            "weight": sum(counts * batch.weight for batch, counts in batches),
            "tokens": sum(counts * batch.tokens.numel() for batch, counts in batches),
        }
    )
    weight, sums = max(1, whole["weight"]), {}
    with seeds.forked(device, seed, "dropout", stage.name, step, distributed.rank()):  # other masks in each process
        for (batch, counts), indices in zip(batches, group, strict=True):
            with autocast(stage.loop.precision, device):
                loss, parts = stage.loss(stage.model, batch)
            figures = {"loss": float(loss.detach()), **parts}
            figures = distributed.all_reduce_sum({key: counts * value for key, value in figures.items()})
            for key, value in figures.items():  # including auxiliary losses
                if not math.isfinite(value):
                    optimizer.zero_grad(set_to_none=True)
                    raise NonFinite(f"The {key} is {value} at step {step + 1}, records {indices}: inspect them.")
            scaler.scale(counts * loss / weight).backward()
            for key, value in figures.items():
                sums[key] = sums.get(key, 0.0) + value
    where = f"step {step + 1}, records {[i for indices in group for i in indices]}"
    (norm,) = scaled_step(scaler, optimizer, stage.optim, step, total, where)
    metrics = {f"train/{key}": value / weight for key, value in sums.items()}
    metrics |= {"train/lr": learning_rate(step, total, stage.optim), "train/grad_norm": norm}
    return metrics, whole["tokens"]
