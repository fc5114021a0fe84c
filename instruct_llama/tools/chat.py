"""Chat with a checkpoint: a conversation in the terminal, or responses to a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import seeds
from ..config import SamplingConfig, UserError, check
from ..data import sources
from ..data.batching import fit_prompt
from ..data.tokenizer import Message, Tokenizer
from ..model.llama import Llama
from ..model.sampling import sample, stream


@dataclass(frozen=True, eq=False)
class ChatSession:
    """A model with its tokenizer, system message, sampling settings and seed."""

    model: Llama
    tokenizer: Tokenizer
    system: str  # system message of dialogs that have none; empty: that of the model's chat template, if any
    sampling: SamplingConfig
    seed: int

    @property
    def generator(self) -> torch.Generator:
        """A new generator with this seed, on the model's device."""
        return seeds.generator(self.model.tok_embeddings.weight.device, self.seed, "conversation")

    def encode(self, messages: list[Message]) -> list[int]:
        """The ids of a dialog as a prompt that leaves room for a response, without the oldest exchanges if needed.

        Raises `UserError` when the last turn alone is too long.
        """
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        context = self.model.config.max_seq_len
        ids = fit_prompt(self.tokenizer, messages, context - min(self.sampling.max_new_tokens, context // 4))
        check(ids is not None, f"That is longer than the model's context of {context} tokens: shorten it.")
        return ids

    def sampling_after(self, ids: list[int]) -> SamplingConfig:
        """The sampling settings, with max_new_tokens limited to the context that the prompt leaves."""
        room = self.model.config.max_seq_len - len(ids)
        return replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))


def text_pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """The text of a response, piece by piece; incomplete UTF-8 characters are held back."""
    seen, text = [], ""
    for i in ids:
        seen.append(i)
        now = tokenizer.decode(seen)
        if not now.endswith("\ufffd"):
            yield now[len(text) :]
            text = now
    yield tokenizer.decode(seen)[len(text) :]


def converse(chat: ChatSession) -> None:
    """A conversation in the terminal; an empty line or Ctrl-D ends it."""
    messages: list[Message] = []
    generator = chat.generator
    while line := _ask():
        messages.append({"role": "user", "content": line})
        try:
            ids = chat.encode(messages)
        except UserError as error:  # too long: the conversation continues without it
            print(error)
            messages.pop()
            continue
        answer = ""
        sampling, ends = chat.sampling_after(ids), chat.tokenizer.end_ids
        sampled = stream(chat.model, ids, sampling, chat.tokenizer, generator, ends)
        for piece in text_pieces(chat.tokenizer, sampled):
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
    """The prompts of a file: JSON records in the formats of `data`, or plain text with one prompt per line."""
    records = sources.read(path)
    if records.kind != "text":
        return [record["prompt"] for record in sources.as_prompts(records)]
    lines = [line for record in records.records for line in record["text"].splitlines() if line.strip()]
    return [[{"role": "user", "content": line.strip()}] for line in lines]


def answer_file(chat: ChatSession, path: Path, batch_size: int) -> None:
    """Respond to every prompt of a file; prints `{"prompt", "response"}` as JSON lines, in order."""
    check(batch_size > 0, f"--batch-size is {batch_size}; it must be at least 1.")
    prompts, generator = read_prompts(path), chat.generator
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        ids = [chat.encode(prompt) for prompt in part]
        sampling, tokenizer = chat.sampling_after(max(ids, key=len)), chat.tokenizer
        made = sample(chat.model, ids, sampling, tokenizer, generator, tokenizer.end_ids)
        for prompt, response in zip(part, made.ids(), strict=True):
            record = {"prompt": prompt, "response": tokenizer.decode(response)}
            print(json.dumps(record, ensure_ascii=False), flush=True)
