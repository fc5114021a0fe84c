"""Talking to a checkpoint: a conversation in the terminal, or a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import seeds
from ..config import UserError, check
from ..data import sources
from ..data.batching import fit_prompt
from ..data.tokenizer import Message, Tokenizer
from ..model.llama import Llama
from ..model.sampling import sample, stream


@dataclass(frozen=True, eq=False)
class Talker:
    """A model with everything that decides how it answers."""

    model: Llama
    tokenizer: Tokenizer
    system: str  # said before every dialog that has no system message; empty: nothing, or the model's own
    max_new_tokens: int
    seed: int
    sampling: dict[str, Any]  # temperature, top_k, top_p

    @property
    def generator(self) -> torch.Generator:
        """A fresh one of this seed, on the model's device."""
        return seeds.generator(self.model.tok_embeddings.weight.device, self.seed, "conversation")

    @property
    def options(self) -> dict[str, Any]:
        """What the samplers want to know. An answer stops at every token that ends one."""
        tokenizer = self.tokenizer
        banned = tuple(i for i in tokenizer.banned_ids if i not in tokenizer.end_ids)
        return {"eos_id": tokenizer.end_ids, "pad_id": tokenizer.pad_id, "banned": banned, **self.sampling}

    def encode(self, messages: list[Message]) -> list[int]:
        """A dialog as a prompt that leaves room for an answer; the oldest exchanges go first.

        Raises `UserError` when the last turn alone is too long.
        """
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        context = self.model.config.max_seq_len
        ids = fit_prompt(self.tokenizer, messages, context - min(self.max_new_tokens, context // 4))
        check(ids is not None, f"That is longer than the model's context of {context} tokens: say less.")
        return ids

    def room(self, ids: list[int]) -> int:
        """Tokens that an answer to this prompt may have."""
        return min(self.max_new_tokens, self.model.config.max_seq_len - len(ids))


def pieces_of(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """An answer's text as it grows; a character whose bytes are not all there waits for the rest."""
    seen, text = [], ""
    for i in ids:
        seen.append(i)
        now = tokenizer.decode(seen)
        if not now.endswith("\ufffd"):
            yield now[len(text) :]
            text = now
    yield tokenizer.decode(seen)[len(text) :]


def converse(talker: Talker) -> None:
    """A conversation in the terminal; an empty line or Ctrl-D ends it."""
    messages: list[Message] = []
    generator = talker.generator
    while line := _ask():
        messages.append({"role": "user", "content": line})
        try:
            ids = talker.encode(messages)
        except UserError as error:  # said too much: the conversation goes on without it
            print(error)
            messages.pop()
            continue
        answer = ""
        drawn = stream(talker.model, ids, max_new_tokens=talker.room(ids), generator=generator, **talker.options)
        for piece in pieces_of(talker.tokenizer, drawn):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer or "…"})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def read_prompts(path: Path) -> list[list[Message]]:
    """Prompts from a file: JSON records as `data` reads them, or plain text with a prompt in each line."""
    records = sources.read(path)
    if records.kind != "text":
        return [record["prompt"] for record in sources.as_prompts(records)]
    lines = [line for record in records.records for line in record["text"].splitlines() if line.strip()]
    return [[{"role": "user", "content": line.strip()}] for line in lines]


def answer_file(talker: Talker, path: Path, batch_size: int) -> None:
    """Answer every prompt of a file; prints `{"prompt", "response"}` as JSON lines, in order."""
    check(batch_size > 0, f"--batch-size is {batch_size}; it must be at least 1.")
    prompts, generator = read_prompts(path), talker.generator
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        ids = [talker.encode(prompt) for prompt in part]
        made = sample(
            talker.model, ids, max_new_tokens=talker.room(max(ids, key=len)), generator=generator, **talker.options
        )
        for prompt, row, kept in zip(part, made.tokens, made.mask, strict=True):
            record = {"prompt": prompt, "response": talker.tokenizer.decode(row[kept].tolist())}
            print(json.dumps(record, ensure_ascii=False), flush=True)
