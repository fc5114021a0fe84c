"""GGUF, the format of llama.cpp: one file with settings, vocabulary and weights, often quantised; in and out.

Read and written with the `gguf` package, an optional extra. Weights come in dequantised, to fp32, and go out in 16 or
32 bit. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checkpoint
from ..config import ModelConfig, RopeScaling, UserError, check
from ..data.batches import atomic
from ..data.tokenizer import Tokenizer
from ..model.llama import Llama, rotary_frequencies
from . import vocabulary
from .imports import Foreign
from .names import foreign_key, halves_to_neighbours, neighbours_to_halves, our_shapes, turns


def gguf_package() -> Any:
    """The `gguf` package. Raises `UserError` when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError('GGUF files need the package gguf: run `python -m pip install "gguf>=0.10"`.') from error
    return gguf


def read(path: Path) -> Foreign:
    """Open a `.gguf` file. Raises `UserError` when it is damaged, or no LLaMA."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:  # whatever a cut file breaks first
        raise UserError(f"{path} is not a whole GGUF file ({error}): fetch it again.") from error
    given = {tensor.name: tensor for tensor in reader.tensors}
    if _tied(given):
        given.pop("output.weight", None)
    config = model_config(fields, given, path)
    names = {foreign_key(key, "gguf"): key for key in our_shapes(config)}
    renamed = {names.get(name, name): tensor for name, tensor in given.items() if name != "rope_freqs.weight"}
    return Foreign(
        config=config,
        tensors={key: partial(_dense, tensor, config if turns(key) else None) for key, tensor in renamed.items()},
        shapes={key: tuple(int(n) for n in reversed(tensor.shape)) for key, tensor in renamed.items()},
        dtype=torch.float32,
        tokenizer=vocabulary.from_gguf(fields, path),
        notes=_kinds(given),
    )


def _tied(given: dict[str, Any]) -> bool:
    """Whether the output projection is the embedding once more, or not there at all."""
    output, embedding = given.get("output.weight"), given.get("token_embd.weight")
    return output is None or (embedding is not None and np.array_equal(output.data, embedding.data))


def _kinds(given: dict[str, Any]) -> tuple[str, ...]:
    kinds = sorted({tensor.tensor_type.name for tensor in given.values()} - {"F32", "F16", "BF16"})
    return (f"The weights were quantised ({', '.join(kinds)}) and are now fp32.",) if kinds else ()


def _dense(tensor: Any, turned: ModelConfig | None) -> torch.Tensor:
    """One weight in fp32, its rows in our order."""
    numbers = np.array(gguf_package().quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)  # a copy
    weight = torch.from_numpy(numbers).view(tuple(int(n) for n in reversed(tensor.shape)))
    return weight if turned is None else neighbours_to_halves(weight, turned)


def model_config(fields: dict[str, Any], given: dict[str, Any], path: Path) -> ModelConfig:
    """Our settings from a file's fields. Raises `UserError` for another architecture or a missing field."""
    kind = fields.get("general.architecture")
    check(kind == "llama", f"{path} holds the architecture {kind!r}, not 'llama': give another model.")
    try:
        field = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
        heads, dim = field["attention.head_count"], field["embedding_length"]
        width = field.get("attention.key_length", dim // heads)
        check(width * heads == dim, f"{path} has heads of another width than dim / heads: not supported here.")
        theta = _decimal(field.get("rope.freq_base", 10_000.0))
        return ModelConfig(
            vocab_size=int(given["token_embd.weight"].shape[1]), dim=dim, n_layers=field["block_count"], n_heads=heads,
            n_kv_heads=field.get("attention.head_count_kv", heads), ffn_dim=field["feed_forward_length"],
            max_seq_len=field["context_length"], rope_theta=theta,
            norm_eps=_decimal(field["attention.layer_norm_rms_epsilon"]),
            rope_scaling=_scaling(field, given, width, theta, path), tie_embeddings="output.weight" not in given,
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it is no LLaMA, or damaged.") from error


def _decimal(value: float) -> float:
    """A setting as people wrote it: the file keeps 1e-5 as the nearest 32-bit number."""
    return float(f"{value:.6g}")


def _scaling(field: dict[str, Any], given: dict[str, Any], width: int, theta: float, path: Path) -> RopeScaling:
    """Linear scaling stands in the fields; LLaMA 3's as a divisor for each frequency, whose largest is the factor."""
    if "rope_freqs.weight" in given:
        divisors = torch.from_numpy(np.array(given["rope_freqs.weight"].data)).float()  # (E/2,)
        scaling = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)
        shape = {"dim": width, "n_heads": 1, "n_kv_heads": 1, "rope_theta": theta}
        plain = rotary_frequencies(ModelConfig(**shape))
        ours = plain / rotary_frequencies(ModelConfig(**shape, rope_scaling=scaling))
        check(torch.allclose(ours, divisors, rtol=1e-3), f"{path} stretches positions in a way unknown here.")
        return scaling
    kind = field.get("rope.scaling.type", "none")
    check(kind in ("none", "linear"), f"{path} stretches positions by {kind!r}: not supported here.")
    return RopeScaling("linear", field["rope.scaling.factor"]) if kind == "linear" else RopeScaling()


def write(model: Llama, tokenizer: Tokenizer, path: Path) -> None:
    """Write a language model as GGUF: matrices in the model's dtype, vectors in fp32, as llama.cpp wants them."""
    gguf, config = gguf_package(), model.config
    kinds = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    with atomic(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_file_type(gguf.LlamaFileType[kinds[model.tok_embeddings.weight.dtype]])
        _settings(writer, config)
        vocabulary.to_gguf(tokenizer, writer, config.vocab_size)
        # A tied output is written too: llama.cpp of 2023 has no tying.
        for key, tensor in {**checkpoint.model_state(model), "output.weight": model.output.weight}.items():
            tensor = tensor.detach().cpu()
            tensor = halves_to_neighbours(tensor, config) if turns(key) else tensor
            _add(gguf, writer, foreign_key(key, "gguf"), tensor)
        if config.rope_scaling.kind == "llama3":
            stretched = rotary_frequencies(config)
            plain = rotary_frequencies(replace(config, rope_scaling=RopeScaling()))
            _add(gguf, writer, "rope_freqs.weight", plain / stretched)  # (E/2,)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _settings(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.dim // config.n_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.rope_scaling.kind == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", config.rope_scaling.factor)


def _add(gguf: Any, writer: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:  # numpy has no bf16: the same bytes
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
