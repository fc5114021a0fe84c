"""Low-rank adapters over dense or 4-bit linear layers, and their merge.

Sources: LoRA (arXiv:2106.09685, section 4.1), QLoRA (arXiv:2305.14314, section 3). An adapted layer computes
W x + (alpha / rank) B A x: W is frozen, A and B are trained. Adapters have names, and at most one is active, so that
one frozen base can serve as policy, value and reward model, and with no active adapter as the reference.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from ..config import PROJECTIONS, LoRAConfig, QuantConfig, check

if TYPE_CHECKING:
    from .llama import Llama


class QuantMatmul(torch.autograd.Function):
    """x W^T for a W stored in 4 bits: dequantised for the product, and again for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dequantize().to(x.dtype))  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        weight = ctx.layer.dequantize().to(grad.dtype)  # (out, in)
        return (grad @ weight).to(ctx.dtype), None  # (..., out) -> (..., in)


class QuantLinear(nn.Module):
    """A frozen linear layer stored in 4 bits (QLoRA, arXiv:2305.14314, section 3), quantised on the device it is on.

    Each weight is one of 16 numbers (NF4: quantiles of a normal; FP4: 4-bit floats) times the scale of its block;
    `double_quant` stores the scales in 8 bits too. The 4-bit data are neither parameters nor buffers: a change of dtype
    leaves them alone, and a state dict does not hold them: save the adapters, and quantise the base again (P17).
    Raises RuntimeError when moved to another device.
    """

    def __init__(self, dense: nn.Linear, config: QuantConfig):
        super().__init__()
        import bitsandbytes.functional as bnb  # takes seconds to import, so only where it is used

        self.dequantize_4bit = bnb.dequantize_4bit
        self.out_features, self.in_features = dense.weight.shape
        self.qweight, self.quant_state = bnb.quantize_4bit(
            # Flattened, because on the CPU bitsandbytes 0.50 silently dequantises a matrix with wrong scales
            # where a block ends inside a row.
            dense.weight.detach().float().flatten(),  # (out * in,)
            blocksize=config.block_size,
            compress_statistics=config.double_quant,
            quant_type=config.kind,
        )  # (out * in / 2, 1) uint8, two weights a byte; and the scales
        self.cached_dense: torch.Tensor | None = None  # the dequantised weights, inside `cache_dense_weights`

    def dequantize(self) -> torch.Tensor:
        """The weights this layer computes with: (out, in) float32."""
        if self.cached_dense is not None:
            return self.cached_dense
        return self.dequantize_4bit(self.qweight, self.quant_state).view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return QuantMatmul.apply(x, self)  # (..., in) -> (..., out)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        here, there = self.qweight.device, fn(torch.empty(0, device=self.qweight.device)).device
        if here != there:
            raise RuntimeError(
                f"A 4-bit layer cannot move from {here} to {there}: its data may be laid out for {here}. "
                f"Load the dense model on {there} and quantise it there."
            )
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quant_state.quant_type}"


class LoRALinear(nn.Module):
    """A linear layer with named low-rank adapters, of which at most one is active (arXiv:2106.09685, eq. 3)."""

    def __init__(self, base: nn.Linear | QuantLinear):
        super().__init__()
        self.base = base
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()  # name -> (rank, in), (out, rank), both fp32
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self.train(base.training)  # a new module is in training mode: dropout would be on in a model in eval mode

    def add(self, name: str, config: LoRAConfig, generator: torch.Generator) -> None:
        """Add an adapter: A from a uniform distribution, B zero, so that the output does not change yet."""
        device = (self.base.qweight if isinstance(self.base, QuantLinear) else self.base.weight).device
        a = torch.empty(config.rank, self.base.in_features)  # (rank, in)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A[name] = nn.Parameter(a.to(device))
        self.B[name] = nn.Parameter(torch.zeros(self.base.out_features, config.rank, device=device))  # (out, rank)
        self.configs[name] = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)  # (..., out)
        if self.active is None:
            return out
        config, a, b = self.configs[self.active], self.A[self.active], self.B[self.active]
        low = F.linear(F.dropout(x.to(a.dtype), config.dropout, self.training), a)  # (..., rank)
        return out + (F.linear(low, b) * (config.alpha / config.rank)).to(out.dtype)  # (..., out)

    def dense(self) -> torch.Tensor:
        """The base's weights as this layer computes with them: (out, in) float32."""
        return self.base.dequantize() if isinstance(self.base, QuantLinear) else self.base.weight.detach().float()


Projection: TypeAlias = nn.Linear | QuantLinear | LoRALinear


@contextlib.contextmanager
def cache_dense_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model on the CPU dequantises its 4-bit weights once, not for every token that it samples.

    On a GPU nothing changes, since 4 bits are there to save its memory.
    """
    quantised = (layer for layer in model.modules() if isinstance(layer, QuantLinear))
    layers = [layer for layer in quantised if layer.qweight.device.type == "cpu"]
    for layer in layers:
        layer.cached_dense = layer.dequantize()
    try:
        yield
    finally:
        for layer in layers:
            layer.cached_dense = None


def state_dict_mismatches(own: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]) -> list[str]:
    """A clause for every key that is missing, unexpected or of another shape, from the shapes by name (P18)."""
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is unexpected" for key in given if key not in own]
    return problems + [
        f"{key} is {tuple(given[key])} and should be {tuple(own[key])}"
        for key in own
        if key in given and tuple(given[key]) != tuple(own[key])
    ]


def projections(model: nn.Module) -> list[tuple[str, Projection]]:
    """(path, layer) of the blocks' seven projections, dense, 4-bit or with adapters; never embeddings or heads."""
    named = cast(Iterable[tuple[str, Projection]], model.named_modules())
    return [(path, layer) for path, layer in named if path.rpartition(".")[2] in PROJECTIONS]


def adapted_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """(path, layer) of the layers that have adapters."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALinear)]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, in the order they were added."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.configs))


def layers_with_adapter(model: nn.Module, name: str) -> list[tuple[str, LoRALinear]]:
    """(path, layer) of the layers that have the adapter `name`. Raises `UserError` when none has."""
    found = [(path, layer) for path, layer in adapted_layers(model) if name in layer.configs]
    known = ", ".join(adapter_names(model)) or "none"
    check(bool(found), f"The model has no adapter {name!r}; it has {known}: add_adapter makes one.")
    return found


def quantize(model: nn.Module, config: QuantConfig) -> None:
    """Store the blocks' seven projections in 4 bits, in place, on the device they are on; kind "none" does nothing.

    Raises `UserError` for a model that is quantised or has adapters already.
    """
    if config.kind == "none":
        return
    for path, layer in projections(model):
        check(type(layer) is nn.Linear, f"{path} is a {type(layer).__name__}: quantise a dense model, then adapt it.")
        model.set_submodule(path, QuantLinear(cast(nn.Linear, layer), config))


def is_quantized(model: nn.Module) -> bool:
    """Whether the projections are in 4 bits already."""
    return any(isinstance(layer, QuantLinear) for _, layer in projections(model))


def add_adapter(model: nn.Module, name: str, config: LoRAConfig, generator: torch.Generator) -> None:
    """Give the projections in `config.target_modules` a new adapter, and freeze all other parameters.

    In place; the new adapter is not active yet, other adapters do not change. To train a head as well, the caller
    unfreezes it afterwards. Raises `UserError` for an existing name, or rank 0.
    """
    check(config.rank > 0, f"The adapter {name!r} has rank 0, which means none: set lora.rank, 8 for example.")
    check(name not in adapter_names(model), f"There is an adapter {name!r} already: choose another name.")
    for path, layer in projections(model):
        if path.rpartition(".")[2] in config.target_modules:
            if not isinstance(layer, LoRALinear):
                model.set_submodule(path, layer := LoRALinear(layer))
            layer.add(name, config, generator)
    for parameter in base_parameters(model).values():
        parameter.requires_grad_(False)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters that are not part of an adapter, by name."""
    adapters = {id(p) for _, layer in adapted_layers(model) for p in (*layer.A.values(), *layer.B.values())}
    return {name: p for name, p in model.named_parameters() if id(p) not in adapters}


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active; None is the base model. Raises `UserError` for an unknown name."""
    if name is not None:
        layers_with_adapter(model, name)
    for _, layer in adapted_layers(model):
        layer.active = name if name in layer.configs else None


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that is active, or None."""
    return next((layer.active for _, layer in adapted_layers(model) if layer.active is not None), None)


class adapter:
    """`with adapter(model, name):` makes one adapter active inside, and restores the previous one afterwards."""

    def __init__(self, model: nn.Module, name: str | None):
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.before = active_adapter(self.model)
        use_adapter(self.model, self.name)

    def __exit__(self, *error: object) -> None:
        use_adapter(self.model, self.before)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The trainable matrices of one adapter."""
    return [matrix for _, layer in layers_with_adapter(model, name) for matrix in (layer.A[name], layer.B[name])]


def adapter_state(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """One adapter as {"layers.0.attention.wq.A": (rank, in), "….B": (out, rank), …}, without its name."""
    return {
        f"{path}.{side}": getattr(layer, side)[name].detach()
        for path, layer in layers_with_adapter(model, name)
        for side in "AB"
    }


@torch.no_grad()
def load_adapter(
    model: nn.Module, name: str, state: dict[str, torch.Tensor], modules_to_save: Collection[str] = ()
) -> None:
    """Copy a saved adapter into the adapter `name`, and the parameters in `modules_to_save` into the model's.

    Raises `UserError` that lists every missing, unexpected and wrongly shaped key, and then copies nothing (P18).
    """
    own = adapter_state(model, name) | {key: p for key, p in base_parameters(model).items() if key in modules_to_save}
    problems = state_dict_mismatches({k: v.shape for k, v in own.items()}, {k: v.shape for k, v in state.items()})
    check(not problems, f"The adapter does not fit {name!r}: {'; '.join(problems)}. Use the settings of its run.")
    for key, tensor in own.items():
        tensor.copy_(state[key])


def lora_delta(a: torch.Tensor, b: torch.Tensor, alpha: float, rank: int) -> torch.Tensor:
    """What an adapter adds to the weights: (alpha / rank) B A; a (rank, in), b (out, rank) -> (out, in)."""
    return (alpha / rank) * (b @ a)


@torch.no_grad()
def merge(
    model: Llama,
    name: str,
    *,
    into: Literal["dequantised", "original"] = "dequantised",
    original: Llama | None = None,
    dtype: torch.dtype = torch.float32,
) -> Llama:
    """A new dense model of the same class, in `dtype`, with the adapter's weights added; the given one stays as it is.

    "dequantised" adds them to the weights that the adapter was trained over, and changes no logit but by rounding.
    "original" adds them to the `original` dense weights: another model than the trained one where the base is in
    4 bits (P16). Raises `UserError` for an unknown adapter, or when `original` is missing or not dense.
    """
    layers_with_adapter(model, name)
    check((into == "original") == (original is not None), 'merge needs `original` for into="original", and only then.')
    weights = cast(dict[str, nn.Linear], dict(projections(original)) if original is not None else {})
    check(all(type(layer) is nn.Linear for layer in weights.values()), "The `original` of merge must be a dense model.")
    merged = copy.deepcopy(model)
    for path, layer in projections(merged):
        layer = layer if isinstance(layer, LoRALinear) else LoRALinear(layer)
        weight = weights[path].weight.float().clone() if weights else layer.dense().clone()  # (out, in)
        if name in layer.configs:
            config = layer.configs[name]
            weight += lora_delta(layer.A[name], layer.B[name], config.alpha, config.rank)
        dense = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False)
        dense.weight = nn.Parameter(weight.to(dtype))
        merged.set_submodule(path, dense)
    return merged.to(dtype).requires_grad_(True).train(model.training)
