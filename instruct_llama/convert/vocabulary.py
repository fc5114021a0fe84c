"""Conversion of vocabularies between SentencePiece, `tokenizer.json` and GGUF.

`sentencepiece_model_pb2` needs the package protobuf, a dependency of TensorBoard.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ..config import check
from ..data.tokenizer import JsonTokenizer, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types, equal in both formats
# Pre-tokenizers behind llama.cpp's names of BPE vocabularies, from the models' own `tokenizer.json`.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


_SPLITS: dict[str, Callable[[], list[Any]]] = {
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "llama-bpe": lambda: [
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def from_gguf(fields: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file; a `tokenizer.json` beside the file takes precedence."""
    beside = path.with_name(JsonTokenizer.file_name)
    if beside.is_file():
        return JsonTokenizer.from_file(beside)
    field = {key.removeprefix("tokenizer."): value for key, value in fields.items() if key.startswith("tokenizer.")}
    # Unused rows after the last token are dropped, except those named as end or padding token.
    named = {value for key, value in field.items() if key.endswith("_token_id")}
    kinds = enumerate(field.get("ggml.token_type", []))
    size = max((i + 1 for i, kind in kinds if kind != UNUSED or i in named), default=None)
    field |= {key: field[key][:size] for key in ("ggml.tokens", "ggml.scores", "ggml.token_type") if key in field}
    kind = field.get("ggml.model")
    if kind == "llama":
        return Tokenizer(_sentencepiece(field))
    known = kind == "gpt2" and field.get("ggml.pre") in _SPLITS
    check(
        known,
        f"{path} has an unknown vocabulary, {kind!r} with {field.get('ggml.pre')!r}: put the model's tokenizer.json "
        "beside the file.",
    )
    tokens = field["ggml.tokens"]
    special = {
        f"{name}_token": tokens[field[f"ggml.{long}_token_id"]]
        for name, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"ggml.{long}_token_id" in field
    }
    config = {**special, "chat_template": field.get("chat_template")}
    return JsonTokenizer(_byte_level(field), {key: value for key, value in config.items() if value is not None})


def _byte_level(field: dict[str, Any]) -> str:
    """A `tokenizer.json` from a GGUF file's tokens and merges."""
    tokens, merges = field["ggml.tokens"], [tuple(merge.split(" ")) for merge in field["ggml.merges"]]
    ignore = field["ggml.pre"] == "llama-bpe"  # whole words are tokens even without a path of merges
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[field["ggml.pre"]]())
    inner.decoder = decoders.ByteLevel()
    kinds = field["ggml.token_type"]
    inner.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    inner.add_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED])
    return inner.to_str()


def _sentencepiece(field: dict[str, Any]) -> bytes:
    """A SentencePiece model from a GGUF file's pieces, scores and types."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    pieces = zip(field["ggml.tokens"], field["ggml.scores"], field["ggml.token_type"], strict=True)
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = 2, True, len(proto.pieces)  # 2: BPE
    for name in ("bos", "eos", "unknown", "padding"):
        if (index := field.get(f"ggml.{name}_token_id")) is not None:
            short = {"unknown": "unk", "padding": "pad"}.get(name, name)
            setattr(spec, f"{short}_id", index)
            setattr(spec, f"{short}_piece", proto.pieces[index].piece)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(field.get("ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def _pieces(tokenizer: Tokenizer) -> Any:
    """A SentencePiece model as a parsed protobuf message."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)


def to_gguf(tokenizer: Tokenizer, writer: Any, rows: int) -> None:
    """Write the vocabulary to a GGUF writer, padded to the `rows` of the embedding.

    Raises `UserError` for a `tokenizer.json` whose pre-tokenizer llama.cpp does not know.
    """
    spare = [f"[PAD{i}]" for i in range(tokenizer.vocab_size, rows)]
    unused = [UNUSED] * len(spare)
    if isinstance(tokenizer, JsonTokenizer):
        parsed = json.loads(tokenizer.text)
        split = json.dumps(parsed["pre_tokenizer"], sort_keys=True)
        known = {_as_json(pre_tokenizers.Sequence(make())): name for name, make in _SPLITS.items()}
        known |= {_as_json(make()[0]): name for name, make in _SPLITS.items() if len(make()) == 1}
        check(split in known, "llama.cpp does not know this tokenizer.json's pre-tokenizer: export --to hf.")
        tokens = tokenizer.pieces_as_stored()
        added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in parsed["added_tokens"]}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parsed["model"]["merges"]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(known[split])
        writer.add_token_list(tokens + spare)
        writer.add_token_types([added.get(i, NORMAL) for i in range(len(tokens))] + unused)
        writer.add_token_merges(merges)
    else:
        pieces = _pieces(tokenizer).pieces
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece.piece for piece in pieces] + spare)
        writer.add_token_scores([piece.score for piece in pieces] + [0.0] * len(spare))
        # After a user-defined piece llama.cpp starts a new text, with a leading space; SentencePiece does not. A piece
        # of one character, such as our line break, is matched as a normal piece too.
        single = {piece.piece: NORMAL for piece in pieces if piece.type == USER_DEFINED and len(piece.piece) == 1}
        writer.add_token_types([single.get(piece.piece, piece.type) for piece in pieces] + unused)
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)  # the chat format adds its own
    writer.add_chat_template(tokenizer.chat_template)


def _as_json(part: Any) -> str:
    return json.dumps(json.loads(part.__getstate__()), sort_keys=True)


def to_json(tokenizer: Tokenizer) -> str:
    """A SentencePiece model as `tokenizer.json`; both encode text between special tokens identically."""
    pieces = _pieces(tokenizer).pieces
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, _merges(pieces, vocab), unk_token=pieces[tokenizer.unk_id].piece, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in tokenizer.specials])
    return inner.to_str()


def _merges(pieces: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The BPE merges: every split of a piece into two pieces, in order of decreasing score."""
    found = []
    for piece in pieces:
        if piece.type == NORMAL:
            cuts = ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
            whole = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
            found += [(-piece.score, vocab[left], vocab[right], left, right) for left, right in whole]
    return [(left, right) for *_, left, right in sorted(found, key=lambda merge: merge[:3])]
