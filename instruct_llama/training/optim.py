"""One optimizer step: learning-rate schedule, AdamW over one or more networks, clipping, fp16's loss scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..config import OptimConfig, UserError, check
from ..model.llama import Llama
from . import distributed


class NonFinite(UserError):
    """A loss or gradient is not finite; the optimizer has not stepped."""


def learning_rate(step: int, total: int, optim: OptimConfig, peak: float | None = None) -> float:
    """The rate at a step (from 0): linear warm-up, then half a cosine down to `min_lr_ratio` of the peak."""
    peak = optim.lr if peak is None else peak
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def freeze_first(model: Llama, n_layers: int) -> None:
    """Freeze the embeddings and the first `n_layers` blocks; 0 freezes nothing."""
    if n_layers > 0:
        for module in (model.tok_embeddings, *model.layers[:n_layers]):
            module.requires_grad_(False)


def make_optimizer(groups: Sequence[tuple[list[nn.Parameter], float]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over networks, each (parameters, peak rate); weight decay on matrices only (LLaMA, section 2.3)."""
    check(
        optim.kind == "adamw" or distributed.world_size() == 1,
        f"optim.kind {optim.kind} cannot shard its state over processes: under torchrun, use adamw.",
    )
    split = []
    for network, (parameters, peak) in enumerate(groups):
        trainable = [p for p in parameters if p.requires_grad]
        if any(p.dtype != torch.float32 for p in trainable):
            raise TypeError("trainable parameters must be fp32: in bf16, small updates round away (P08)")
        matrices, vectors = [p for p in trainable if p.dim() >= 2], [p for p in trainable if p.dim() < 2]
        common = {"peak": peak, "lr": peak, "network": network}
        split.append({"params": matrices, "weight_decay": optim.weight_decay, **common})
        split.append({"params": vectors, "weight_decay": 0.0, **common})
    split = [group for group in split if group["params"]]
    options = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.kind == "adamw":
        return torch.optim.AdamW(split, **options, fused=True)
    import bitsandbytes as bnb  # takes seconds to import, so only where it is used

    kind = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}[optim.kind]
    return getattr(bnb.optim, kind)(split, **options)


def optimizer_step(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total: int, where: str
) -> tuple[float, ...]:  # fmt: skip
    """Set the learning rates, check, clip, step and clear; returns each network's gradient norm before clipping.

    Each of the networks given to `make_optimizer` is clipped by its own norm: a large gradient of PPO's value must not
    shorten the policy's step. Raises `NonFinite` without changing a weight if a gradient is not finite (P34); `where`
    names the step and records in the error.
    """
    networks = [[] for _ in range(count_networks(optimizer))]
    for group in optimizer.param_groups:
        networks[group["network"]] += group["params"]
    grads = ([p.grad for p in parameters if p.grad is not None] for parameters in networks)
    norms = [distributed.full_tensor(nn.utils.get_total_norm(mine)) for mine in grads]
    if not all(torch.isfinite(norm) for norm in norms):
        optimizer.zero_grad(set_to_none=True)
        raise NonFinite(f"The gradient is not finite at {where}: lower the learning rate or inspect those records.")
    for parameters, norm in zip(networks, norms, strict=True) if optim.grad_clip > 0 else ():
        nn.utils.clip_grads_with_norm_(parameters, optim.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, optim, group["peak"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return tuple(float(norm) for norm in norms)


def count_networks(optimizer: torch.optim.Optimizer) -> int:
    """The number of networks in the optimizer, each with its own gradient norm."""
    return 1 + max(group["network"] for group in optimizer.param_groups)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler: for fp16 on a GPU, where small gradients would underflow to 0; otherwise disabled."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")


def restore_scaler(scaler: torch.amp.GradScaler, saved: dict[str, float] | None) -> None:
    """Load a scaler's saved state; it is empty if the run was started on a CPU, without scaling."""
    if saved:
        scaler.load_state_dict(saved)


def scaled_step(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total: int,
    where: str,
) -> tuple[float, ...]:  # fmt: skip
    """`optimizer_step` with scaled losses. If the scale was too large for fp16: no step, half the scale, norms 0.

    That is expected: the scale grows until it overflows. Gradients that are not finite at scale 1 are an error.
    """
    scaler.unscale_(optimizer)
    try:
        norms = optimizer_step(optimizer, optim, step, total, where)
    except NonFinite:
        if scaler.get_scale() <= 1:  # always so without fp16
            raise
        norms = (0.0,) * count_networks(optimizer)
    scaler.update()
    return norms
