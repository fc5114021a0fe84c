"""Hugging Face folders and hub names: `config.json`, safetensors and `tokenizer.json`, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..config import ModelConfig, RopeScaling, UserError, check
from ..data.tokenizer import Tokenizer
from .names import Foreign, foreign_key, our_shapes

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json",
         "tokenizer.model"]  # fmt: skip


class Unreachable(UserError):
    """The hub cannot be reached, and the files are not in its local cache."""

    def __init__(self, name: str, reason: str):
        self.reason = reason
        super().__init__(
            f"{name} cannot be downloaded, the hub does not answer ({reason}): try again with a network, or give a "
            "folder with its files."
        )


def fetch(name: str) -> Path:
    """The folder of a hub repository, from the hub or its local cache. Raises `UserError` when there is none."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, etag_timeout=10))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its licence on its page, then `hf auth login`, or give a folder with its files."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"The hub has no repository {name!r}, or it is private: check the name, or `hf auth login`."
        ) from error
    except OSError as error:  # no network, or offline mode
        raise Unreachable(name, (str(error) or type(error).__name__).splitlines()[0]) from error


def read(folder: Path) -> Foreign:
    """Open a folder. Raises `UserError` that names what is missing, truncated or of another architecture."""
    config = model_config(_json(folder / "config.json"), folder)
    slices, dtypes = _open(folder)
    if config.tie_embeddings:  # some files contain the tied output too
        slices.pop("lm_head.weight", None)
    names = {foreign_key(key, "hf"): key for key in our_shapes(config)}
    ignored = [name for name in slices if name.endswith("rotary_emb.inv_freq")]  # recomputed from the settings
    renamed = {names.get(name, name): place for name, place in slices.items() if name not in ignored}
    return Foreign(
        config=config,
        tensors={key: read_one for key, (read_one, _) in renamed.items()},
        shapes={key: shape for key, (_, shape) in renamed.items()},
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        tokenizer=Tokenizer.load(folder),
    )


def _open(folder: Path) -> tuple[dict[str, tuple[Callable[[], torch.Tensor], tuple[int, ...]]], set[torch.dtype]]:
    """(reader, shape) of every tensor in the folder's safetensors files, and the set of their dtypes."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_json(index)["weight_map"].values()))
        missing = [name for name in files if not (folder / name).is_file()]
        check(not missing, f"{folder} lacks {', '.join(missing)}, of {len(files)} files: download them again.")
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        check(bool(files), f"{folder} has no .safetensors file: download those of the repository, not its .bin files.")
    found, dtypes = {}, set()
    for name in files:
        try:
            opened = safe_open(folder / name, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is truncated or damaged ({error}): download it again.") from error
        for key in opened.keys():
            part = opened.get_slice(key)
            dtype = _DTYPES.get(part.get_dtype())
            check(dtype is not None, f"{key} in {name} is {part.get_dtype()}: give the model's 16 or 32 bit files.")
            dtypes.add(dtype)
            found[key] = (partial(opened.get_tensor, key), tuple(part.get_shape()))
    return found, dtypes


def _json(path: Path) -> dict[str, Any]:
    check(path.is_file(), f"{path.parent} has no {path.name}: give a folder written by `transformers`.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): download it again.") from error


def model_config(raw: dict[str, Any], folder: Path) -> ModelConfig:
    """Our `ModelConfig` from a `config.json`. Raises `UserError` for any architecture other than our LLaMA."""
    heads, dim = raw.get("num_attention_heads", 0), raw.get("hidden_size", 0)
    foreign = {
        "model_type": (raw.get("model_type"), "llama"),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(raw.get("attention_bias")), False),
        "mlp_bias": (bool(raw.get("mlp_bias")), False),
        "head_dim": (raw.get("head_dim") or dim // max(1, heads), dim // max(1, heads)),
        "quantization_config": (raw.get("quantization_config"), None),
    }
    wrong = [f"{key} is {has!r}" for key, (has, wanted) in foreign.items() if has != wanted]
    check(not wrong, f"{folder} is not a LLaMA as this project builds it ({'; '.join(wrong)}): give another model.")
    try:
        return ModelConfig(
            vocab_size=raw["vocab_size"], dim=raw["hidden_size"], n_layers=raw["num_hidden_layers"], n_heads=heads,
            n_kv_heads=raw.get("num_key_value_heads") or heads, ffn_dim=raw["intermediate_size"],
            max_seq_len=raw.get("max_position_embeddings", 2048), norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)), **_rope(raw, folder),
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"config.json in {folder} lacks {error}: download it again.") from error


def _rope(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """RoPE settings, as written by transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    check(kind in ("default", "linear", "llama3"), f"{folder} has RoPE scaling {kind!r}: give another model.")
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": RopeScaling("linear", rope["factor"])}
    return {
        "rope_theta": theta,
        "rope_scaling": RopeScaling(
            "llama3", rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        ),
    }  # fmt: skip


def config_json(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of a `config.json` that `transformers` 4 and 5 can read."""
    scaling, rope = config.rope_scaling, None
    if scaling.kind == "linear":
        rope = {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    elif scaling.kind == "llama3":
        rope = {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.dim // config.n_heads,
        "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_scaling": rope, "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False, "mlp_bias": False, "initializer_range": config.init_std, "torch_dtype": dtype,
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id,
    }  # fmt: skip
