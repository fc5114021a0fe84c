"""One optimizer step: learning-rate schedule, AdamW over one network or several, clipping, fp16's loss scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config import OptimConfig, UserError, check
from . import distributed


class NonFinite(UserError):
    """A loss or gradient that is not a number; the optimizer has not stepped on it."""


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


def make_optimizer(groups: Sequence[tuple[list[nn.Parameter], float]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over networks, each (parameters, peak rate); weight decay on matrices only (LLaMA, section 2.3)."""
    check(
        optim.kind == "adamw" or distributed.world_size() == 1,
        f"optim.kind {optim.kind} cannot divide its state among processes: under torchrun, take adamw.",
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
    shorten the policy's step. Raises `NonFinite` without touching a weight when a gradient is not finite (P34); `where`
    says what was read.
    """
    networks = [[] for _ in range(count_networks(optimizer))]
    for group in optimizer.param_groups:
        networks[group["network"]] += group["params"]
    grads = ([p.grad for p in parameters if p.grad is not None] for parameters in networks)
    norms = [distributed.full_tensor(nn.utils.get_total_norm(mine)) for mine in grads]
    if not all(torch.isfinite(norm) for norm in norms):
        optimizer.zero_grad(set_to_none=True)
        raise NonFinite(f"The gradient is not finite at {where}: lower the learning rate or look at those records.")
    for parameters, norm in zip(networks, norms, strict=True) if optim.grad_clip > 0 else ():
        nn.utils.clip_grads_with_norm_(parameters, optim.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, optim, group["peak"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return tuple(float(norm) for norm in norms)


def count_networks(optimizer: torch.optim.Optimizer) -> int:
    """How many networks the optimizer steps, each with a gradient norm of its own."""
    return 1 + max(group["network"] for group in optimizer.param_groups)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What scales fp16's losses on a GPU, where small gradients would become 0; one that does nothing elsewhere."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")


def restore_scaler(scaler: torch.amp.GradScaler, saved: dict[str, Any] | None) -> None:
    """Give a scaler its saved state; there is none where the run was begun without one, on a CPU."""
    if saved:
        scaler.load_state_dict(saved)


def scaled_step(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total: int,
    where: str,
) -> tuple[float, ...]:  # fmt: skip
    """`optimizer_step` after scaled losses. Where the scale was too large for fp16: no step, half the scale, norms 0.

    That is no fault: the scale grows until it happens. Gradients that are not finite at scale 1 are one.
    """
    scaler.unscale_(optimizer)
    try:
        norms = optimizer_step(optimizer, optim, step, total, where)
    except NonFinite:
        if scaler.get_scale() <= 1:  # without fp16 always
            raise
        norms = (0.0,) * count_networks(optimizer)
    scaler.update()
    return norms
