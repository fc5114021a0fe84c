"""The one training loop: accumulation, clipping, schedule, precision, metrics, checkpoints, resume.

Randomness is a pure function of (seed, step): the order of the records, the dropout masks, the samples. So a resumed
run needs no saved generators to equal the unbroken one, and `--seed` alone changes a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .. import checkpoint
from ..config import LoopConfig, LoRAConfig, OptimConfig, QuantConfig, Settings, UserError, shown
from ..data.batches import epoch_order
from ..model.llama import Llama

Watch = Callable[[dict[str, float]], None]


class NonFinite(UserError):
    """A loss or gradient that is not a number; the optimizer has not stepped on it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or the notebook's stop button, after the state was saved."""


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind."""

    folder: Path  # the run folder
    best: dict[str, float]  # the metrics of the validation whose weights were kept
    steps: int  # optimizer steps (PPO: iterations) done in all
    seconds: float  # wall-clock time of this call

    @property
    def history(self) -> list[dict[str, float]]:
        """metrics.jsonl as a list of records."""
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """samples.jsonl as a list of records."""
        return read_jsonl(self.folder / "samples.jsonl")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a log; a last line cut by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises `UserError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here ({str(error).splitlines()[0]}); try cpu.") from error


@contextlib.contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generator is a function of (seed, step); outside, it is as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + step)
        yield


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Compute dtype of the blocks. Weights stay fp32, and so do logits, log-probs and losses (P08, P10)."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def learning_rate(step: int, total: int, optim: OptimConfig, peak: float | None = None) -> float:
    """Linear warm-up, then half a cosine down to `min_lr_ratio` of the peak; steps count from 0."""
    peak = optim.lr if peak is None else peak
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def freeze_first(model: nn.Module, n_layers: int) -> None:
    """Stop the embeddings and the first `n_layers` blocks from training; 0 freezes nothing."""
    if n_layers > 0:
        for module in (model.tok_embeddings, *model.layers[:n_layers]):
            module.requires_grad_(False)


def frozen_as(lora: LoRAConfig, quant: QuantConfig, precision: str) -> dict[str, Any]:
    """How weights are read: those under adapters stay frozen, so 4 or 16 bits will do; what trains is fp32 (P08)."""
    frozen = lora.rank > 0 and precision == "bf16"
    return {"quant": quant, "dtype": torch.bfloat16 if frozen else torch.float32}


def recomputing(model: Llama, settings: Settings) -> Llama:
    """The model with --model.gradient-checkpointing as these settings have it, whatever it was saved with."""
    model.config = replace(model.config, gradient_checkpointing=settings.model.gradient_checkpointing)
    return model


def make_optimizer(groups: Sequence[tuple[list[nn.Parameter], float]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over (parameters, peak learning rate) groups; weight decay on matrices only (LLaMA, section 2.3)."""
    split = []
    for parameters, peak in groups:
        trainable = [p for p in parameters if p.requires_grad]
        if any(p.dtype != torch.float32 for p in trainable):
            raise TypeError("trainable parameters must be fp32: in bf16, small updates round away (P08)")
        matrices, vectors = [p for p in trainable if p.dim() >= 2], [p for p in trainable if p.dim() < 2]
        split.append({"params": matrices, "weight_decay": optim.weight_decay, "peak": peak, "lr": peak})
        split.append({"params": vectors, "weight_decay": 0.0, "peak": peak, "lr": peak})
    split = [group for group in split if group["params"]]
    options = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.kind == "adamw":
        return torch.optim.AdamW(split, **options, fused=True)
    import bitsandbytes as bnb  # takes seconds to import, so only where it is used

    kind = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}[optim.kind]
    return getattr(bnb.optim, kind)(split, **options)


def optimizer_step(optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total: int, where: str) -> float:
    """Set the learning rates, check, clip, step and clear; returns the gradient norm before clipping.

    Raises `NonFinite` without touching a weight when the gradient is not finite (P34); `where` says what was read.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise NonFinite(f"The gradient is not finite at {where}: lower the learning rate or look at those records.")
    if optim.grad_clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, optim.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, optim, group["peak"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


class RunLog:
    """The logs and the resumable state of one run folder."""

    def __init__(self, folder: Path, settings: Settings, watch: Watch | None = None):
        self.folder, self.watch, self.started = folder, watch, time.perf_counter()
        self.state_path = folder / "state" / "resume.safetensors"
        self.identity = json.dumps({**asdict(settings), "resume": None, "out": None, "device": None}, sort_keys=True)
        self.saved: tuple[checkpoint.State, dict[str, Any]] | None = None
        if settings.resume and self.state_path.is_file():
            self.saved = self._read_state()
        self.start = self.saved[1]["step"] if self.saved else 0
        self.stops = 0  # how often Ctrl-C was pressed

    def _begin(self) -> None:
        """Open the logs. Not before training starts, so that bad input leaves an earlier run in the folder whole."""
        start = self.start
        for name in ("metrics.jsonl", "samples.jsonl"):  # drop what a killed run logged after its last save
            kept = [r for r in read_jsonl(self.folder / name) if r["step"] <= start] if start else []
            checkpoint.write_text(self.folder / name, "".join(json.dumps(r) + "\n" for r in kept))
        if not start:
            for stale in (*self.folder.glob("events.out.*"), self.folder / "config.json", self.state_path):
                stale.unlink(missing_ok=True)
        self.board = SummaryWriter(str(self.folder), purge_step=start + 1 if start else None)

    def _read_state(self) -> tuple[checkpoint.State, dict[str, Any]]:
        tensors, metadata = checkpoint.read_tensors(self.state_path)
        if metadata["identity"] != self.identity:
            raise UserError(
                f"--resume: {self.folder} was started with other settings; use the same ones, or start anew without it."
            )
        return tensors, json.loads(metadata["state"])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same scalars to TensorBoard, and to whoever watches; the end of a step."""
        record = {"step": step, **metrics}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in metrics.items():
            self.board.add_scalar(key, value, step)
        if self.watch:
            self.watch(record)
        if self.stops:
            raise KeyboardInterrupt

    def sample(self, step: int, records: list[dict[str, Any]]) -> None:
        """Text samples with their scores, to samples.jsonl and TensorBoard."""
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)
        text = "\n\n".join(f"**{r.get('prompt', '')}**\n\n{r.get('response', r.get('text', ''))}" for r in records[:4])
        self.board.add_text("samples", text, step)

    def save_state(self, step: int, tensors: checkpoint.State, state: dict[str, Any]) -> None:
        """Everything resume needs, in one file, in one rename (P32, P33)."""
        metadata = {"identity": self.identity, "state": json.dumps({"step": step, **state})}
        checkpoint.write_tensors(self.state_path, tensors, metadata)

    def finish(self, best: dict[str, float], steps: int) -> StageResult:
        """Mark the run folder complete."""
        self.board.close()
        info = checkpoint.read_info(self.folder)
        checkpoint.write_info(self.folder, {**info, "complete": True, "best": best})
        return StageResult(self.folder, best, steps, time.perf_counter() - self.started)

    @contextlib.contextmanager
    def interruptible(self, save: Callable[[], None], command: str) -> Iterator[None]:
        """On Ctrl-C or the stop button: finish the step, save, say how to go on, and leave the kernel usable.

        Only the state between two steps can be gone on from (P32). Pressed again, it stops at once, without saving.
        """
        self._begin()
        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, self._stop) if here else None
        try:
            yield
        except KeyboardInterrupt:
            if self.stops < 2:
                save()
            self.board.close()
            raise Interrupted(
                f"Stopped; the state is in {shown(self.state_path)}. Go on with: python -m instruct_llama {command} "
                "--resume (same options), or settings.replace(resume=True) in a notebook."
            ) from None
        finally:
            if here:
                signal.signal(signal.SIGINT, before)

    def _stop(self, *_: object) -> None:
        self.stops += 1
        if self.stops > 1:
            raise KeyboardInterrupt
        print("\nStopping after this step; once more stops at once, back to the last save.", file=sys.stderr)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[checkpoint.State, dict[str, Any]]:
    """An optimizer's state as flat tensors and the JSON-able rest."""
    tensors, rest = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        wrapped = [value for value in state.values() if isinstance(value, dict)]  # bitsandbytes' maps and scales
        shared = {key: value.clone() for group in wrapped for key, value in group.items()}  # one map for all weights
        for key, value in ({k: v for k, v in state.items() if not isinstance(v, dict)} | shared).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                rest[f"{index}/{key}"] = value
    return tensors, rest


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: checkpoint.State, rest: dict[str, Any]) -> None:
    """Inverse of `optimizer_tensors`, into an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *((f"optimizer/{key}", value) for key, value in rest.items())):
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass
class Supervised:
    """What a supervised stage gives to `fit`. Losses are sums over targets; `fit` divides by their number."""

    name: str  # the command that runs it
    model: nn.Module
    optim: OptimConfig
    loop: LoopConfig
    n_items: int  # training records
    lengths: Sequence[int] | None  # tokens of each record, so that like goes with like; None: keep the order
    batch: Callable[[int, Sequence[int]], Any]  # (epoch, indices) -> a batch with .weight and .to(device)
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, float]]]  # -> sum over targets, sums to log
    validate: Callable[[], dict[str, float]]  # metrics of the held-out records, "loss" among them
    sample: Callable[[], list[dict[str, Any]]]  # text samples
    save: Callable[[dict[str, float]], None]  # writes the run folder's weights, given the best metrics


def epoch_groups(stage: Supervised, seed: int, epoch: int) -> list[list[list[int]]]:
    """An epoch as optimizer steps of micro-batches of record indices; every record once, the last group incomplete."""
    order = [int(i) for i in epoch_order(stage.n_items, seed, epoch)]
    size = stage.loop.batch_size
    if stage.lengths is not None:  # sort by length within a window of 16 batches: less padding, still random
        window = 16 * size
        order = [
            i
            for w in range(0, len(order), window)
            for i in sorted(order[w : w + window], key=stage.lengths.__getitem__)
        ]
    micro = [order[i : i + size] for i in range(0, len(order), size)]
    micro = [micro[int(i)] for i in epoch_order(len(micro), seed + 1, epoch)]
    return [micro[i : i + stage.loop.accumulate] for i in range(0, len(micro), stage.loop.accumulate)]


def total_steps(stage: Supervised) -> int:
    """Optimizer steps of the whole run."""
    micro = -(-stage.n_items // stage.loop.batch_size)
    per_epoch = -(-micro // stage.loop.accumulate)
    return stage.loop.steps or max(1, round(per_epoch * stage.loop.epochs))


def fit(stage: Supervised, log: RunLog, settings: Settings) -> StageResult:
    """Train, validate, keep the best, log, save, resume."""
    device = next(stage.model.parameters()).device
    trainable = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer([(list(trainable.values()), stage.optim.lr)], stage.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=stage.loop.precision == "fp16" and device.type == "cuda")
    total, best, step = total_steps(stage), {}, log.start
    if log.saved:
        tensors, state = log.saved
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(tensors[f"model/{name}"])
        restore_optimizer(optimizer, tensors, state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        best = state["best"]

    def save_state() -> None:
        tensors, rest = optimizer_tensors(optimizer)
        tensors |= {f"model/{name}": p for name, p in trainable.items()}
        log.save_state(step, tensors, {"optimizer": rest, "scaler": scaler.state_dict(), "best": best})

    def look_up() -> dict[str, float]:
        nonlocal best
        stage.model.eval()
        with torch.no_grad():
            metrics = stage.validate()
            if step % stage.loop.sample_every == 0 or step == total:
                log.sample(step, stage.sample())
        stage.model.train()
        # So few records cannot tell losses 1 % apart; then the last weights, annealed to the end, are the surer ones.
        if not best or metrics["loss"] < best["loss"] * (1.01 if step == total else 1.0):
            best = {"step": step, **metrics}
            stage.save(best)
        return {f"val/{key}": value for key, value in metrics.items()}

    bar = tqdm(total=total, initial=step, desc=stage.name, disable=None, leave=False)
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


def _steps_from(stage: Supervised, seed: int, start: int, total: int) -> Iterator[tuple[int, list[list[int]]]]:
    """(epoch, group) of every optimizer step from `start` on: the data position is the step number."""
    per_epoch, step = len(epoch_groups(stage, seed, 0)), start
    while step < total:
        epoch = step // per_epoch
        for group in epoch_groups(stage, seed, epoch)[step % per_epoch :][: total - step]:
            yield epoch, group
            step += 1


def _train_group(
    stage: Supervised, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, seed: int, epoch: int,
    group: list[list[int]], step: int, total: int, device: torch.device,
) -> tuple[dict[str, float], int]:  # fmt: skip
    """One optimizer step over a group of micro-batches, normalised by the group's real targets (P07, P09)."""
    batches = [stage.batch(epoch, indices).to(device) for indices in group]
    weight = max(1, sum(batch.weight for batch in batches))
    sums: dict[str, float] = {}
    with seeded(seed, step, device):
        for batch, indices in zip(batches, group, strict=True):
            with autocast(stage.loop.precision, device):
                loss, parts = stage.loss(stage.model, batch)
            if not torch.isfinite(loss):
                optimizer.zero_grad(set_to_none=True)
                raise NonFinite(f"The loss is {loss.item()} at step {step + 1}, records {indices}: look at them.")
            scaler.scale(loss / weight).backward()
            for key, value in {"loss": float(loss.detach()), **parts}.items():
                sums[key] = sums.get(key, 0.0) + value
    scaler.unscale_(optimizer)
    where = f"step {step + 1}, records {[i for indices in group for i in indices]}"
    norm = optimizer_step(optimizer, stage.optim, step, total, where)
    scaler.update()
    metrics = {f"train/{key}": value / weight for key, value in sums.items()}
    metrics |= {"train/lr": learning_rate(step, total, stage.optim), "train/grad_norm": norm}
    return metrics, sum(batch.tokens.numel() for batch in batches)
