"""Import and export of GGUF, the format of llama.cpp: one file with settings, vocabulary and weights.

It needs the `gguf` package, an optional extra. Imported weights are dequantised to fp32; exported ones have 16 bits by
default, or 32 or 8. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..config import ModelConfig, RopeScaling, UserError, check
from ..data.files import atomic
from ..data.tokenizer import Tokenizer
from ..model.llama import Llama, rope_inv_freq
from ..training import checkpoint
from . import vocabulary
from .names import Foreign, foreign_key, halves_to_neighbours, neighbours_to_halves, our_shapes, turns

Quant = Literal["auto", "f32", "f16", "bf16", "q8_0"]


def gguf_package() -> Any:
    """The `gguf` package. Raises `UserError` when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError('GGUF files need the package gguf: run `python -m pip install "gguf>=0.10"`.') from error
    return gguf


def read(path: Path) -> Foreign:
    """Open a `.gguf` file. Raises `UserError` when it is damaged or not a LLaMA."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:  # of a truncated file
        raise UserError(f"{path} is not a whole GGUF file ({error}): download it again.") from error
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
    """Whether the output projection equals the embedding, or is absent."""
    output, embedding = given.get("output.weight"), given.get("token_embd.weight")
    return output is None or (embedding is not None and np.array_equal(output.data, embedding.data))


def _kinds(given: dict[str, Any]) -> tuple[str, ...]:
    kinds = sorted({tensor.tensor_type.name for tensor in given.values()} - {"F32", "F16", "BF16"})
    return (f"The weights were quantised ({', '.join(kinds)}) and are now fp32.",) if kinds else ()


def _dense(tensor: Any, turned: ModelConfig | None) -> torch.Tensor:
    """One weight, dequantised to fp32, with its rows in our order."""
    numbers = np.array(gguf_package().quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)  # a copy
    weight = torch.from_numpy(numbers).view(tuple(int(n) for n in reversed(tensor.shape)))
    return weight if turned is None else neighbours_to_halves(weight, turned)


def model_config(fields: dict[str, Any], given: dict[str, Any], path: Path) -> ModelConfig:
    """Our `ModelConfig` from a file's fields. Raises `UserError` for another architecture or a missing field."""
    kind = fields.get("general.architecture")
    check(kind == "llama", f"{path} holds the architecture {kind!r}, not 'llama': give another model.")
    try:
        field = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
        heads, dim = field["attention.head_count"], field["embedding_length"]
        width = field.get("attention.key_length", dim // heads)
        check(width * heads == dim, f"{path} has a head width other than dim / heads: give another model.")
        theta = _decimal(field.get("rope.freq_base", 10_000.0))
        return ModelConfig(
            vocab_size=int(given["token_embd.weight"].shape[1]), dim=dim, n_layers=field["block_count"], n_heads=heads,
            n_kv_heads=field.get("attention.head_count_kv", heads), ffn_dim=field["feed_forward_length"],
            max_seq_len=field["context_length"], rope_theta=theta,
            norm_eps=_decimal(field["attention.layer_norm_rms_epsilon"]),
            rope_scaling=_scaling(field, given, width, theta, path), tie_embeddings="output.weight" not in given,
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it is damaged or not a LLaMA; give another file.") from error


def _decimal(value: float) -> float:
    """A setting rounded to 6 digits: the file stores 1e-5 as the nearest 32-bit number."""
    return float(f"{value:.6g}")


def _scaling(field: dict[str, Any], given: dict[str, Any], width: int, theta: float, path: Path) -> RopeScaling:
    """RoPE scaling: linear from the fields, LLaMA 3's from the divisors of the frequencies (largest = factor)."""
    if "rope_freqs.weight" in given:
        divisors = torch.from_numpy(np.array(given["rope_freqs.weight"].data)).float()  # (E/2,)
        scaling = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)
        shape = {"dim": width, "n_heads": 1, "n_kv_heads": 1, "rope_theta": theta}
        plain = rope_inv_freq(ModelConfig(**shape))
        ours = plain / rope_inv_freq(ModelConfig(**shape, rope_scaling=scaling))
        check(torch.allclose(ours, divisors, rtol=1e-3), f"{path} has unknown RoPE scaling: give another model.")
        return scaling
    kind = field.get("rope.scaling.type", "none")
    check(kind in ("none", "linear"), f"{path} has RoPE scaling {kind!r}: give another model.")
    return RopeScaling("linear", field["rope.scaling.factor"]) if kind == "linear" else RopeScaling()


def write(model: Llama, tokenizer: Tokenizer, path: Path, quant: Quant = "auto") -> str:
    """Write a language model as GGUF; returns the type of its matrices. Vectors are fp32, as llama.cpp requires.

    "auto" is 16 bits: bf16 weights stay bf16, others become f16. "q8_0" is 8 bits with a scale per 32 weights.
    Raises `UserError` for a weight outside the range of f16.
    """
    gguf, config = gguf_package(), model.config
    # bf16 stays exact, as in llama.cpp's own converter: f16 cannot represent magnitudes below 6e-8 or above 65504. For
    # fp32, f16 keeps 11 of 24 significant bits and bf16 only 8, and weights are almost always within f16's range.
    sixteen = "bf16" if model.tok_embeddings.weight.dtype == torch.bfloat16 else "f16"
    kind = sixteen if quant == "auto" else quant
    with atomic(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _settings(writer, config)
        vocabulary.to_gguf(tokenizer, writer, config.vocab_size)
        for key, tensor in checkpoint.model_state(model).items():  # a tied output is omitted: token_embd serves as both
            tensor = tensor.detach().cpu()
            tensor = halves_to_neighbours(tensor, config) if turns(key) else tensor
            _add(writer, foreign_key(key, "gguf"), tensor, kind, sixteen)
        if config.rope_scaling.kind == "llama3":
            stretched = rope_inv_freq(config)
            plain = rope_inv_freq(replace(config, rope_scaling=RopeScaling()))
            _add(writer, "rope_freqs.weight", plain / stretched)  # (E/2,)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return kind


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


def _add(writer: Any, name: str, tensor: torch.Tensor, *kinds: str) -> None:
    """Write a matrix as the first of `kinds` whose block size divides its row length, a vector as fp32."""
    gguf = gguf_package()
    choices = [gguf.GGMLQuantizationType[kind.upper()] for kind in (kinds if tensor.dim() > 1 else ("f32",))]
    kind = next(kind for kind in choices if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0)
    check(
        kind.name != "F16" or float(tensor.abs().max()) <= torch.finfo(torch.float16).max,
        f"{name} has values over 65504, too large for f16: export with --quant bf16 or --quant f32.",
    )
    writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
