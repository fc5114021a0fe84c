"""Import of Meta's files: `consolidated.NN.pth` (one per model-parallel rank), `params.json`, `tokenizer.model`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig, RopeScaling, UserError, check
from ..data.tokenizer import JsonTokenizer, Tokenizer
from .names import Foreign, foreign_key, neighbours_to_halves, our_shapes, turns

State = dict[str, torch.Tensor]


def read(folder: Path) -> Foreign:
    """Open a folder in Meta's format. Raises `UserError` that names what is missing or damaged."""
    files = sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    missing = sorted(set(expected) - {file.name for file in files})
    check(not missing, f"{folder} lacks {', '.join(missing)}: download the model again.")
    shards = [_load(file) for file in files]
    params = _params(folder)
    tokenizer = _tokenizer(folder)
    config = model_config(params, shards, tokenizer.vocab_size)
    names = {foreign_key(key, "meta"): key for key in our_shapes(config)}
    left_out = {"rope.freqs", "output.weight"} if config.tie_embeddings else {"rope.freqs"}  # recomputed
    present = [name for name in shards[0] if name not in left_out]
    split = {name: split_dim(name, shards[0][name], config) for name in present}
    tensors, shapes = {}, {}
    for name in present:
        key = names.get(name, name)
        absent = [file.name for file, shard in zip(files, shards, strict=True) if name not in shard]
        check(not absent, f"{name} is missing in {', '.join(absent)}: download the model again.")
        tensors[key] = partial(_joined, shards, name, split[name], config if turns(key) else None)
        shapes[key] = _shape(shards, name, split[name])
    notes = (f"The files do not state the context length: {config.max_seq_len} tokens are assumed.",)
    return Foreign(config, tensors, shapes, shards[0][present[0]].dtype, tokenizer, notes)


def _load(file: Path) -> State:
    """The tensors of a `.pth` file, memory-mapped. Raises `UserError` for a pickle that would run code (P05)."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # the old format cannot be mapped
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, a broken zip archive, a short file …
        why = "it holds more than tensors" if "nsupported" in str(error) or "GLOBAL" in str(error) else "it is damaged"
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} was not read, {why} ({first}): download it again from Meta.") from error
    tensors = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    check(tensors, f"{file} is not a dictionary of tensors: give Meta's consolidated.NN.pth.")
    return state


def split_dim(name: str, part: torch.Tensor, config: ModelConfig) -> int | None:
    """The dimension along which a weight is sharded; None when it is replicated.

    Projections into the residual stream are sharded by columns, others by rows. LLaMA 1 and 2 shard the embedding by
    width, LLaMA 3 by vocabulary.
    """
    if part.dim() == 1:
        return None
    if name == "tok_embeddings.weight":
        return 0 if part.shape[1] == config.dim else 1
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def _shape(shards: list[State], name: str, dim: int | None) -> tuple[int, ...]:
    shape = list(shards[0][name].shape)
    if dim is not None:
        shape[dim] = sum(shard[name].shape[dim] for shard in shards)
    return tuple(shape)


def _joined(shards: list[State], name: str, dim: int | None, turned: ModelConfig | None) -> torch.Tensor:
    """A weight joined from all shards, with the rows of wq and wk in our order."""
    weight = shards[0][name] if dim is None else torch.cat([shard[name] for shard in shards], dim)
    return weight if turned is None else neighbours_to_halves(weight, turned)


def _params(folder: Path) -> dict[str, Any]:
    path = folder / "params.json"
    check(path.is_file(), f"{folder} has no params.json: copy it from Meta's download.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): download it again.") from error


def model_config(params: dict[str, Any], shards: list[State], vocab_size: int) -> ModelConfig:
    """Our `ModelConfig` from `params.json`; what that lacks is derived from the weights.

    LLaMA 3.1 and 3.2 state that RoPE is scaled, but not the factor: it is 8, and 32 in the small models of 3.2, which
    tie their embeddings (`config.json` on the hub).
    """
    try:
        dim, heads = params["dim"], params["n_heads"]
        first = "layers.0.feed_forward.w1.weight"
        ffn_dim = sum(shard[first].shape[0] for shard in shards)
        theta, scaled = params.get("rope_theta", 10_000.0), bool(params.get("use_scaled_rope"))
        factor = params.get("rope_scaling_factor") or (32.0 if dim <= 3072 else 8.0)
        return ModelConfig(
            vocab_size=params["vocab_size"] if params.get("vocab_size", -1) > 0 else vocab_size, dim=dim,
            n_layers=params["n_layers"], n_heads=heads, n_kv_heads=params.get("n_kv_heads") or heads, ffn_dim=ffn_dim,
            max_seq_len=131_072 if scaled else 8192 if theta > 10_000 else 4096, rope_theta=theta,
            rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, 8192) if scaled else RopeScaling(),
            norm_eps=params["norm_eps"], tie_embeddings=_tied(shards),
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"params.json or the first .pth file lacks {error}: download the model again.") from error


def _tied(shards: list[State]) -> bool:
    """Whether the output projection equals the embedding, as in LLaMA 3.2's files, or is absent."""
    pairs = [(shard.get("output.weight"), shard.get("tok_embeddings.weight")) for shard in shards]
    return all(out is None or (table is not None and torch.equal(out, table)) for out, table in pairs)


def _tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer.json`, else of LLaMA 2's `tokenizer.model`. Raises `UserError` for LLaMA 3's."""
    if (folder / JsonTokenizer.file_name).is_file():
        return JsonTokenizer.from_file(folder / JsonTokenizer.file_name)
    path = folder / Tokenizer.file_name
    if path.is_file() and path.read_bytes()[:5] == b"IQ== ":  # a tiktoken file: "!" in base 64, a space, its rank
        raise UserError(
            f"{path} is LLaMA 3's, which is not read: put the tokenizer.json of the Hugging Face repository beside it."
        )
    return Tokenizer.from_file(path)
