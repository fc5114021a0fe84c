"""Run folders: weights as safetensors, settings as JSON, atomic writes, no file that could run code when read.

A run folder holds `model.safetensors` (or `adapter.safetensors` and a relative path to its base), `config.json`,
`tokenizer.model`, the logs, and `state/`, from which a run resumes. `load` opens any run folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .. import seeds
from ..config import LoRAConfig, ModelConfig, QuantConfig, RopeScaling, UserError, check
from ..data.files import atomic, digest
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.llama import Llama, ScalarLlama
from . import distributed, folders

M = TypeVar("M", bound=Llama)
State = dict[str, torch.Tensor]
DENSE = QuantConfig()  # no 4-bit quantisation


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in the main process."""
    if not distributed.is_main():
        return
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: State, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Tensors are moved to the CPU and made contiguous.

    All processes must call it: sharded tensors are gathered, and the main process writes them.
    """
    gathered = {}
    for key, value in tensors.items():
        value = distributed.full_tensor(value.detach())
        if distributed.is_main():
            gathered[key] = value.cpu().contiguous()
    if not distributed.is_main():
        return
    with atomic(path) as temporary:
        try:
            save_file(gathered, temporary, metadata)
        except SafetensorError as error:  # safetensors reports the operating system's error as text
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """An open safetensors file, to read tensor by tensor. Raises `UserError` for a missing or truncated file."""
    check(path.is_file(), f"There is no {path}: the run was not finished, or the folder is not a run folder.")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        what = f"{path} is truncated or not a safetensors file ({error})"
        raise UserError(f"{what}: train that stage again, or import it again.") from error


def read_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises `UserError` for a missing or truncated file."""
    with open_tensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})


def load_state(model: torch.nn.Module, state: State, source: str) -> None:
    """Copy tensors into a model, strictly; the error names every missing, unexpected or misshapen key (P18)."""
    own = model_state(model)
    if "output.weight" not in own:  # tied to tok_embeddings.weight: saved once
        state = {key: value for key, value in state.items() if key != "output.weight"}
    problems = lora.state_dict_mismatches({k: v.shape for k, v in own.items()}, {k: v.shape for k, v in state.items()})
    check(not problems, f"{source} does not fit this model: {'; '.join(problems)}. Use the settings of its run.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def model_state(model: torch.nn.Module) -> State:
    """The tensors of a full checkpoint: the state dict, with tied weights once."""
    state = dict(model.state_dict())
    if isinstance(model, Llama) and not isinstance(model, ScalarLlama) and model.config.tie_embeddings:
        state.pop("output.weight", None)
    return state


def save_full(folder: Path, model: Llama, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
    """Write a full model's run folder; `info` is added to config.json (stage, settings, …)."""
    write_tensors(folder / "model.safetensors", model_state(model))
    _save_rest(folder, model, tokenizer, info)


def save_adapter(folder: Path, model: Llama, name: str, base: Path, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
    """Write one adapter, the other trained weights (a scalar head, embeddings), and the relative path of its base."""
    extra = {key: p for key, p in lora.base_parameters(model).items() if p.requires_grad}
    write_tensors(folder / "adapter.safetensors", lora.adapter_state(model, name) | extra)
    relative = os.path.relpath(base.resolve(), folder.resolve())
    parts = {"base": relative, "fingerprint": fingerprint(base), "adapter": name, "modules_to_save": list(extra)}
    _save_rest(folder, model, tokenizer, {**info, **parts})


def fingerprint(folder: Path) -> str:
    """SHA-256 of a full checkpoint's weights: of the whole file, so no changed weight is missed."""
    return digest(folder / "model.safetensors")


def _save_rest(folder: Path, model: Llama, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
    if distributed.is_main():
        tokenizer.save(folder)
    kind = "scalar" if isinstance(model, ScalarLlama) else "lm"
    write_info(folder, {"format": 1, "kind": kind, "model": dataclasses.asdict(model.config), **info})


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Write config.json."""
    write_text(folder / "config.json", json.dumps(info, indent=2) + "\n")


def read_info(folder: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises `UserError` naming the folder if it is missing, damaged or foreign."""
    path = Path(folder) / "config.json"
    folders.recover_for_reading(path.parent)
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder (no config.json): give the folder of a stage, such as …/sft.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        _ = info["kind"], info["model"]  # both must be there
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or from another program ({error}): train that stage again.") from error
    return info


def fingerprints(folders: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each run folder's own weights, by folder name; folders without weights are left out."""
    files = (folder / name for folder in folders for name in ("model.safetensors", "adapter.safetensors"))
    return {path.parent.name: digest(path) for path in files if path.is_file()}


def changed_inputs(info: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """The inputs whose weights are known to differ from those recorded in `info`, as text; empty if there are none."""
    other = ", ".join(name for name, weights in now.items() if info.get("inputs", {}).get(name, weights) != weights)
    return f"inputs ({other}: trained again since)" if other else ""


def model_config(info: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` in a config.json. Raises `UserError` when its fields do not fit."""
    try:
        fields = dict(info["model"])
        return ModelConfig(**{**fields, "rope_scaling": RopeScaling(**fields["rope_scaling"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"The model in config.json is damaged or foreign ({error}): train that stage again.") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a full checkpoint's weights."""
    with open_tensors(folder / "model.safetensors") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def origin(folder: Path) -> dict[str, str]:
    """Where a run's first weights were imported from, for config.json; empty if they were pretrained here."""
    info = read_info(folder)
    return {"imported_from": info["imported_from"]} if "imported_from" in info else {}


def shape_of(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a run folder, without reading its weights."""
    return model_config(read_info(folder))


def load(
    folder: str | Path, device: str | torch.device = "cpu", *, quant: QuantConfig = DENSE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Llama, Tokenizer]:  # fmt: skip
    """Open any run folder, adapters included.

    Returns the model in eval mode (a `Llama`, or a `ScalarLlama` for a reward model) and its tokenizer. `quant`
    quantises the projections of a full checkpoint as they are read. `dtype` is for frozen weights: weights to be
    trained must be float32 (P08). Raises `UserError` naming the file if it is missing, damaged or of another shape.
    """
    folder = Path(folder)
    info = read_info(folder)
    tokenizer = Tokenizer.load(folder)
    if "adapter" in info:
        return _load_adapter(folder, info, device, dtype).eval(), tokenizer
    kind = ScalarLlama if info["kind"] == "scalar" else Llama
    return read_model(kind, info, folder / "model.safetensors", device, quant, dtype).eval(), tokenizer


def load_for_inference(folder: Path, device: str | torch.device) -> tuple[Llama, Tokenizer]:
    """Open any run folder for generation or scoring; on a GPU, weights stored in 16 bits stay in 16 bits."""
    stored = stored_dtype(folder / read_info(folder).get("base", ""))
    return load(folder, device, dtype=torch.float32 if torch.device(device).type == "cpu" else stored)


def read_model(
    kind: type[M], info: dict[str, Any], path: Path, device: str | torch.device, quant: QuantConfig,
    dtype: torch.dtype,
) -> M:  # fmt: skip
    """A model read from a file onto the device, tensor by tensor, so that main memory never holds all of it.

    A `ScalarLlama` can be read from a language model's file: its head then starts at zero, and `output` is skipped.
    """
    with torch.device("meta"):  # shapes without memory
        model = kind(model_config(info))
    with open_tensors(path) as file:
        given = {key: file.get_slice(key).get_shape() for key in file.keys()}
        own = {key: tensor.shape for key, tensor in model_state(model).items()}
        if "output.weight" not in own:  # tied, or a scalar model
            given.pop("output.weight", None)
        fresh = [key for key in own if key == "value_head.weight" and info["kind"] == "lm"]
        problems = lora.state_dict_mismatches({key: shape for key, shape in own.items() if key not in fresh}, given)
        check(not problems, f"{path} does not fit this model: {'; '.join(problems)}. Use the settings of its run.")
        for key in own:
            value = torch.zeros(own[key]) if key in fresh else file.get_tensor(key)
            layer, _, name = key.rpartition(".")
            module = model.get_submodule(layer)
            setattr(module, name, nn.Parameter(value.to(device, dtype, copy=True)))  # a copy: the file is mapped
            if layer.rpartition(".")[2] in lora.PROJECTIONS and quant.kind != "none":
                model.set_submodule(layer, lora.QuantLinear(cast(nn.Linear, module), quant))
    if "output.weight" not in own and kind is Llama:
        model.output.weight = model.tok_embeddings.weight
    return model


def check_kind(folder: Path, kind: Literal["lm", "scalar"]) -> dict[str, Any]:
    """The config.json of a run folder. Raises `UserError` when its model is of another kind."""
    info, wanted = read_info(folder), {"lm": "a language model", "scalar": "a reward model"}
    check(info["kind"] == kind, f"{folder} is {wanted[info['kind']]}, and this needs {wanted[kind]}: give one.")
    return info


def load_full(
    folder: str | Path, device: str | torch.device, kind: Literal["lm", "scalar"] = "lm", *,
    quant: QuantConfig = DENSE, dtype: torch.dtype = torch.float32,
) -> tuple[Llama, Tokenizer]:  # fmt: skip
    """Open a full checkpoint of a kind, to train it further; options as in `load`.

    Raises `UserError` for another kind and for adapters.
    """
    info = check_kind(Path(folder), kind)
    check(
        "adapter" not in info,
        f"{folder} holds an adapter, and a stage starts from full weights: first `python -m instruct_llama merge "
        f"{folder} {folder}-merged`, then give --init {folder}-merged.",
    )
    return load(folder, device, quant=quant, dtype=dtype)


def load_scalar(
    folder: Path, device: str | torch.device, quant: QuantConfig = DENSE, dtype: torch.dtype = torch.float32
) -> ScalarLlama:
    """A scalar model with the trunk of a full checkpoint and a head at zero (a scalar model's head is kept)."""
    return read_model(ScalarLlama, read_info(folder), folder / "model.safetensors", device, quant, dtype)


def read_folders(folder: Path) -> list[Path]:
    """The folders that loading a run folder reads: itself, and the base of its adapter."""
    info = read_info(folder)
    return [folder, folder / info["base"]] if "base" in info else [folder]


def base_of(folder: Path) -> tuple[Path, tuple[LoRAConfig, State, QuantConfig] | None]:
    """A run folder's full checkpoint, and its adapter (config, tensors, quantisation) if it holds one.

    For loading the adapters of several stages over one base. Raises `UserError` for an adapter with trained embeddings:
    one base cannot hold those of several adapters.
    """
    info = read_info(folder)
    if "adapter" not in info:
        return folder, None
    check(
        not info["modules_to_save"] or info["kind"] == "scalar",
        f"{folder} has trained embeddings besides its adapter, which a shared base cannot hold: train it without "
        f"--sft.train-embeddings, or merge it first: `python -m instruct_llama merge {folder}`.",
    )
    return folder / info["base"], (*read_adapter(folder, info), QuantConfig(**info["quant"]))


def read_adapter(folder: Path, info: dict[str, Any]) -> tuple[LoRAConfig, State]:
    """An adapter's config and tensors. Raises `UserError` if its base has changed since the adapter was trained."""
    base = folder / info["base"]
    check(
        info.get("fingerprint") == fingerprint(base),
        f"The weights in {base} have changed since the adapter in {folder} was trained: "
        "train the adapter again, or remove its folder.",
    )
    config = LoRAConfig(**{**info["lora"], "target_modules": tuple(info["lora"]["target_modules"])})
    return config, read_tensors(folder / "adapter.safetensors")[0]


def _load_adapter(folder: Path, info: dict[str, Any], device: str | torch.device, dtype: torch.dtype) -> Llama:
    base, kind = folder / info["base"], ScalarLlama if info["kind"] == "scalar" else Llama
    base_info = read_info(base)
    config, state = read_adapter(folder, info)
    quant = QuantConfig(**info["quant"])
    model = read_model(kind, base_info, base / "model.safetensors", device, quant, dtype)
    lora.add_adapter(model, info["adapter"], config, seeds.generator("cpu", 0, "adapter"))
    lora.load_adapter(model, info["adapter"], state, info["modules_to_save"])
    lora.use_adapter(model, info["adapter"])
    return model


def scalar_from(model: Llama) -> ScalarLlama:
    """A scalar model with a copy of another model's trunk and a new head (a scalar model's head is copied)."""
    scalar = ScalarLlama(model.config).to(next(model.parameters()).device)
    trunk = {key: value for key, value in model.state_dict().items() if not key.startswith("output.")}
    own = scalar.state_dict()
    load_state(scalar, {**{key: own[key] for key in own if key not in trunk}, **trunk}, "the trunk")
    return scalar


def is_complete(folder: Path) -> bool:
    """Whether a stage has finished in this folder, and the folder is not still to replace another."""
    done = (folder / "config.json").is_file() and bool(read_info(folder).get("complete"))
    return done and not folders.is_replacement(folder)
