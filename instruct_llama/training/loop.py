"""The one training loop: accumulation, clipping, schedule, precision, metrics, checkpoints, resume.

Randomness is a pure function of the seed and named keys (see `seeds`): the order of the records, the dropout masks, the
samples. So a resumed run needs no saved generators to equal the unbroken one, and `--seed` alone changes a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import seeds
from ..config import LoopConfig, LoRAConfig, OptimConfig, QuantConfig, Settings
from ..data.batching import epoch_order
from ..model.llama import Llama
from . import distributed
from .device import autocast
from .optim import NonFinite, learning_rate, make_optimizer, make_scaler, restore_scaler, scaled_step
from .run_log import RunLog, StageResult, optimizer_tensors


def load_options(lora: LoRAConfig, quant: QuantConfig, precision: str) -> dict[str, Any]:
    """How weights are read: those under adapters stay frozen, so 4 or 16 bits will do; what trains is fp32 (P08)."""
    frozen = lora.rank > 0 and precision == "bf16"
    return {"quant": quant, "dtype": torch.bfloat16 if frozen else torch.float32}


def with_gradient_checkpointing(model: Llama, settings: Settings) -> Llama:
    """The model with --model.gradient-checkpointing as these settings have it, whatever it was saved with."""
    model.config = replace(model.config, gradient_checkpointing=settings.model.gradient_checkpointing)
    return model


@dataclass
class TrainJob:
    """What a supervised stage gives to `fit`. Losses are sums over targets; `fit` divides by their number."""

    name: str  # the command that runs it
    model: nn.Module
    optim: OptimConfig
    loop: LoopConfig
    n_items: int  # training records
    lengths: Sequence[int] | None  # tokens of each record, to sort each bucket of steps by; None: keep the order
    batch: Callable[[int, Sequence[int]], Any]  # (epoch, indices) -> a batch with .weight and .to(device)
    # -> sum over targets, sums to log: "loss" among them where auxiliary losses are to be left out of the logged one
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, float]]]
    validate: Callable[[], dict[str, float]]  # metrics of the held-out records, "loss" among them
    sample: Callable[[], list[dict[str, Any]]]  # text samples
    save: Callable[[dict[str, float]], None]  # writes the run folder's weights, given the best metrics
    bucket_steps: int = 1  # steps whose records are sorted by length together; more only where a record counts as one


def progress(name: str, total: int, start: int) -> tqdm:
    """A progress bar in the main process's terminal, nowhere else."""
    return tqdm(total=total, initial=start, desc=name, disable=None if distributed.is_main() else True, leave=False)


def epoch_groups(stage: TrainJob, seed: int, epoch: int) -> list[list[list[int]]]:
    """An epoch as optimizer steps of micro-batches of record indices: every record once, one step incomplete.

    The records of `bucket_steps` steps are a random draw, sorted by length to save padding; the steps then come in
    random order. A loss per token needs 1: steps of like length would divide long responses by more tokens than short
    ones, and the model would learn the short ones more often than they come.
    """
    order = [int(i) for i in epoch_order(stage.n_items, seed, epoch, stage.name)]
    size, per_step, epoch_steps = (
        stage.loop.batch_size,
        stage.loop.batch_size * stage.loop.gradient_accumulation_steps,
        [],
    )
    for start in range(0, len(order), per_step * stage.bucket_steps):
        drawn = order[start : start + per_step * stage.bucket_steps]
        if stage.lengths is not None:
            drawn = sorted(drawn, key=stage.lengths.__getitem__)
        steps = [drawn[i : i + per_step] for i in range(0, len(drawn), per_step)]
        for i in epoch_order(len(steps), seed, epoch, stage.name, "steps", start):
            epoch_steps.append([steps[i][j : j + size] for j in range(0, len(steps[i]), size)])
    return epoch_steps


def total_steps(stage: TrainJob) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = -(-stage.n_items // (stage.loop.batch_size * stage.loop.gradient_accumulation_steps))
    return stage.loop.steps or max(1, round(per_epoch * stage.loop.epochs))


def fit(stage: TrainJob, log: RunLog, settings: Settings) -> StageResult:
    """Train, validate, keep the best, log, save, resume."""
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

    def look_up() -> dict[str, float]:
        nonlocal best
        stage.model.eval()
        with torch.no_grad(), distributed.unsharded(stage.model), autocast(stage.loop.precision, device):
            metrics = distributed.broadcast_from_main(stage.validate())
            if step % stage.loop.sample_every == 0 or step == total:
                log.sample(step, stage.sample())
        stage.model.train()
        # So few records cannot tell losses 1 % apart; then the last weights, annealed to the end, are the surer ones.
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
                metrics |= look_up()
            log.log(step, metrics)
            if step % stage.loop.save_every == 0 or step == total:
                save_state()
            bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", tokens_per_s=f"{metrics['train/tokens_per_s']:,.0f}")
            bar.update()
    return log.finish(best, step)


def _steps_from(stage: TrainJob, seed: int, start: int, total: int) -> Iterator[tuple[int, list[list[int]]]]:
    """(epoch, group) of every optimizer step from `start` on: the data position is the step number."""
    per_epoch, step = len(epoch_groups(stage, seed, 0)), start
    while step < total:
        epoch = step // per_epoch
        for group in epoch_groups(stage, seed, epoch)[step % per_epoch :][: total - step]:
            yield epoch, group
            step += 1


def _train_group(
    stage: TrainJob, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, seed: int, epoch: int,
    group: list[list[int]], step: int, total: int, device: torch.device,
) -> tuple[dict[str, float], int]:  # fmt: skip
    """One optimizer step over a group of micro-batches, normalised by the group's real targets (P07, P09)."""
    group, batches = (
        distributed.regroup_microbatches(group),
        [],
    )  # this process's share of each micro-batch, and whether it has one
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
    with seeds.forked(device, seed, "dropout", stage.name, step, distributed.rank()):  # each process masks its own rows
        for (batch, counts), indices in zip(batches, group, strict=True):
            with autocast(stage.loop.precision, device):
                loss, parts = stage.loss(stage.model, batch)
            figures = {"loss": float(loss.detach()), **parts}
            figures = distributed.all_reduce_sum({key: counts * value for key, value in figures.items()})
            for key, value in figures.items():  # auxiliary losses are among them
                if not math.isfinite(value):
                    optimizer.zero_grad(set_to_none=True)
                    raise NonFinite(f"The {key} is {value} at step {step + 1}, records {indices}: look at them.")
            scaler.scale(counts * loss / weight).backward()
            for key, value in figures.items():
                sums[key] = sums.get(key, 0.0) + value
    where = f"step {step + 1}, records {[i for indices in group for i in indices]}"
    (norm,) = scaled_step(scaler, optimizer, stage.optim, step, total, where)
    metrics = {f"train/{key}": value / weight for key, value in sums.items()}
    metrics |= {"train/lr": learning_rate(step, total, stage.optim), "train/grad_norm": norm}
    return metrics, whole["tokens"]
