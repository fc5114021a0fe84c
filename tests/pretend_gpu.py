"""A pretend GPU: it computes on the CPU and is as strict about devices as CUDA, so that its mistakes show without one.

A tensor's device is a note on its storage, so views, in-place ops, `p.data = …` and kernels that take a bare pointer
(bitsandbytes) need no help: underneath, everything is a plain CPU tensor, and every figure equals the CPU's.
Two modes keep the notes. The function mode stands between Python and torch: it answers `.device`, moves tensors, makes
them where they are asked for, and refuses what CUDA refuses. The dispatch mode sees every op, autograd's and the
optimizer's too: it checks that the tensors are together, and notes where the results are.

Not seen: what a kernel itself does on a GPU (rounding, missing dtypes), streams, memory, speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import bitsandbytes  # noqa: F401 - before torch.cuda claims to be there, or it looks for its CUDA library
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, aten, Tensor = torch.device("cpu"), torch.ops.aten, torch.Tensor
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
            aten._unsafe_index.Tensor}  # fmt: skip
STRICT = {aten.cat.default, aten.stack.default, aten._fused_adamw_.default}  # here CUDA lets no CPU scalar in


def place_of(tensor: Tensor) -> torch.device | None:
    """Where a tensor pretends to be; None for one that C++ made on its own account, which fits everywhere."""
    if tensor.device.type != "cpu":
        return tensor.device
    return getattr(tensor.untyped_storage(), "place", CPU)


def put(found: Any, place: torch.device | None, only_new: bool = False) -> Any:
    """Note where tensors are; `only_new`: those of which it is not known yet."""
    for tensor in tensors_in(found):
        storage = tensor.untyped_storage()
        if not only_new or getattr(storage, "place", None) is None:
            storage.place = place
    return found


def leaves(found: Any) -> list[Any]:
    """What lies in nested tuples, lists and dicts."""
    if isinstance(found, dict):
        found = list(found.values())
    return [leaf for inner in found for leaf in leaves(inner)] if isinstance(found, list | tuple) else [found]


def tensors_in(found: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(found) if isinstance(leaf, Tensor)]


def indexed(device: torch.device | str | int) -> torch.device:
    """cuda means cuda:0, as it does when a tensor is asked."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def place_of_op(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> torch.device | None:
    """Where an op computes. Raises as CUDA does when its tensors are in several places."""
    if func is aten.copy_.default:
        return place_of(args[0])
    if func in INDEXING:  # indices may come from the CPU
        here = place_of(args[0])
        for index in args[1]:
            if index is not None and place_of(index) not in (here, CPU, None):
                raise RuntimeError(f"indices should be either on cpu or on the device of the indexed tensor ({here})")
        tensors = tensors_in((args[0], args[2:]))
    scalars = [] if func in STRICT else [t for t in tensors if t.dim() == 0 and place_of(t) == CPU]
    places = {place_of(tensor) for tensor in tensors if not any(tensor is scalar for scalar in scalars)} - {None}
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, places)))}! ({func})"
        )
    return next(iter(places), CPU if scalars else None)


class Ops(TorchDispatchMode):
    """Every op: are its tensors together, and where is the result? `places` tells afterwards where an op was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()  # (op, device)

    def places(self, op: str) -> set[str]:
        """The devices that an op has computed on: `places("embedding")`."""
        return {place for name, place in self.seen if name == op}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            place = place_of_op(func, args, tensors_in((args, kwargs)))
            self.seen.add((func.overloadpacket.__name__, str(place)))
            try:
                return put(func(*args, **kwargs), place, only_new=True)
            except IndexError as error:
                if place is not None and place.type == "cuda":  # which no later op survives
                    raise RuntimeError("CUDA error: device-side assert triggered") from error
                raise


class Move(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.home, ctx.dtype = place_of(x), x.dtype
        return put(x.to(dtype, copy=True), place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return put(grad.to(ctx.dtype, copy=True), ctx.home), None, None


def to(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (place_of(args[0]), args[0].dtype, *args[1:])
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    dtype, place = dtype or x.dtype, place_of(x) if device is None else indexed(device)
    if place.type not in ("cpu", "cuda"):
        return x.to(place, dtype, copy=copy)
    return x.to(dtype, copy=copy) if place == place_of(x) else Move.apply(x, place, dtype)


def to_numpy(read: Callable[..., Any]) -> Callable[..., Any]:
    def checked(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if place_of(x).type == "cuda":
            raise TypeError(f"can't convert {place_of(x)} device type tensor to numpy. Use Tensor.cpu() to copy first.")
        return read(x, *args, **kwargs)

    return checked


def as_tensor(read: Callable[..., Any]) -> Callable[..., Any]:
    def made(data: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, Tensor):
            return to(data, device, dtype)
        return put(read(data, dtype=dtype, **kwargs), indexed(device or CPU))

    return made


ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda x, *_: place_of(x) or CPU,
    Tensor.is_cuda.__get__: lambda x, *_: place_of(x) is not None and place_of(x).type == "cuda",
    Tensor.is_cpu.__get__: lambda x, *_: place_of(x) in (CPU, None),
    Tensor.get_device: lambda x: -1 if place_of(x) in (CPU, None) else place_of(x).index,
    Tensor.to: to,
    Tensor.cpu: lambda x, **_: to(x, CPU),
    Tensor.cuda: lambda x, device="cuda", **_: to(x, indexed(device)),
    Tensor.numpy: to_numpy(Tensor.numpy),
    Tensor.__array__: to_numpy(Tensor.__array__),
    Tensor.__deepcopy__: lambda x, memo: put(Tensor.__deepcopy__(x, memo), place_of(x)),
    torch.as_tensor: as_tensor(torch.as_tensor),
    torch.asarray: as_tensor(torch.asarray),
}


class Calls(TorchFunctionMode):
    """Every call from Python: torch itself never hears of CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in ANSWERS:
            return ANSWERS[func](*args, **kwargs)
        given = tensors_in((args, kwargs))
        wanted = None if kwargs.get("device") is None else indexed(kwargs["device"])
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = CPU
        if wanted is None and not given:
            wanted = CPU
        for generator in (*args, *kwargs.values()):
            if isinstance(generator, torch._C.Generator):
                expected = (wanted or place_of(given[0])).type
                if expected != "meta" and generator.device.type != expected:
                    raise RuntimeError(
                        f"Expected a '{expected}' device type for generator but found '{generator.device.type}'"
                    )
        made = func(*args, **kwargs)
        if wanted is not None and wanted.type in ("cpu", "cuda"):
            return put(made, wanted)
        return put(made, place_of(given[0])) if func is Tensor.new_tensor else made


class Generator(torch.Generator):
    """One that draws what the CPU's draws, and knows which device it was made for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = indexed(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class Autocast(torch.autocast):
    """Autocast is real, and it is the CPU's: its lists of ops are the CPU's too."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def for_cpu(read: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: read(*("cpu" if arg == "cuda" else arg for arg in args))


def answered(run: Callable[..., Any]) -> Callable[..., Any]:
    """Inside a call the modes are off; but autograd's calls run our Python: 4-bit layers, blocks computed again."""

    def answering(*args: Any, **kwargs: Any) -> Any:
        with Calls():
            return run(*args, **kwargs)

    return answering


def grouped(lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """torch._C's, which asks for the device beyond the reach of modes."""
    groups: dict[Any, Any] = {}
    for index, tensor in enumerate(lists[0]):
        columns, indices = groups.setdefault((tensor.device, tensor.dtype), ([[] for _ in lists], []))
        for column, values in zip(columns, lists, strict=True):
            if values:
                column.append(values[index])
        indices.append(index)
    return groups


def patches() -> Iterable[tuple[Any, str, Any]]:
    """What a build without CUDA refuses."""
    cuda = torch.cuda
    for name, value in {
        "is_available": True, "device_count": 2, "is_initialized": True, "synchronize": None,
        "empty_cache": None, "get_device_name": "pretend GPU", "is_bf16_supported": True, "memory_reserved": 0,
        "memory_allocated": 0, "mem_get_info": (24 * 10**9, 24 * 10**9), "_exchange_device": 0,
        "_maybe_exchange_device": 0, "get_device_capability": (9, 0),
    }.items():  # fmt: skip
        yield cuda, name, lambda *args, value=value, **kwargs: value
    yield cuda, "_initialized", True
    yield cuda, "default_generators", (Generator("cuda:0"), Generator("cuda:1"))
    yield torch, "Generator", Generator
    yield torch, "autocast", Autocast
    yield torch.amp, "autocast", Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield torch, name, for_cpu(getattr(torch, name))
    yield torch.autograd, "_engine_run_backward", answered(torch.autograd._engine_run_backward)
    hooks = torch.autograd.graph.saved_tensors_hooks
    init = hooks.__init__
    yield hooks, "__init__", lambda self, pack, unpack: init(self, answered(pack), answered(unpack))
    yield torch._C, "_group_tensors_by_device_and_dtype", grouped
    yield torch._C, "_cuda_getDevice", lambda: 0


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Ops]:
    """Inside, there are two GPUs, cuda:0 and cuda:1, and every op is watched."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in patches():
            patch.setattr(owner, name, value, raising=False)
        with Calls(), Ops() as ops:
            yield ops
