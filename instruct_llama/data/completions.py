"""Several responses to one prompt as one row, with the positions that predict each response's tokens.

The prompt is read once: it is the prefix that all of its responses see, and each response sees the prompt and itself
(see `Llama.hidden`). The log-probabilities equal those of one row per response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Completions = tuple[list[int], list[list[int]]]  # token ids of a prompt and of each response to it


@dataclass(frozen=True, eq=False)
class CompletionBatch:
    """N responses to P prompts, one row per prompt; L is the number of tokens of the longest response."""

    tokens: Tensor  # (P, T) int64: the prompt, then every response to it but its last token; right-padded
    segment_ids: Tensor  # (P, T) int64: -1 the prompt, 1, 2, … the responses, 0 padding
    prompt: Tensor  # (N,) int64: index of the response's prompt, which is its row
    predict_at: Tensor  # (N, L) int64: the position in the row whose output predicts each response token
    responses: Tensor  # (N, L) int64: the response tokens, right-padded
    response_mask: Tensor  # (N, L) bool: True for real tokens, the end token included

    @property
    def weight(self) -> int:
        """The number of prompts: each counts the same, whatever its number of responses."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> CompletionBatch:
        """The same batch on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)})


def completion_batch(items: Sequence[Completions], pad_id: int) -> CompletionBatch:
    """Prompts with their responses, all as token ids, as one batch with one row per prompt."""
    width = max(completion_row_length(item) for item in items)
    longest = max(len(response) for _, responses in items for response in responses)
    n = sum(len(responses) for _, responses in items)
    tokens = torch.full((len(items), width), pad_id, dtype=torch.int64)  # (P, T)
    segment_ids = torch.zeros_like(tokens)  # (P, T)
    padded = torch.full((n, longest), pad_id, dtype=torch.int64)  # (N, L)
    predict_at, mask, rows = torch.zeros_like(padded), torch.zeros(n, longest, dtype=torch.bool), []
    for row, (prompt, responses) in enumerate(items):
        at = len(prompt)
        tokens[row, :at], segment_ids[row, :at] = torch.tensor(prompt, dtype=torch.int64), -1
        for segment, response in enumerate(responses, 1):
            number, inputs = len(rows), response[:-1]  # the last token is only a target
            here = slice(at, at + len(inputs))
            tokens[row, here], segment_ids[row, here] = torch.tensor(inputs, dtype=torch.int64), segment
            padded[number, : len(response)] = torch.tensor(response, dtype=torch.int64)
            mask[number, : len(response)] = True
            # the prompt's last position predicts the first token, each response token the next one
            predict_at[number, : len(response)] = torch.tensor([len(prompt) - 1, *range(here.start, here.stop)])
            at = here.stop
            rows.append(row)
    return CompletionBatch(tokens, segment_ids, torch.tensor(rows), predict_at, padded, mask)


def completion_row_length(item: Completions) -> int:
    """The number of positions of a prompt with its responses in one row."""
    prompt, responses = item
    return len(prompt) + sum(len(response) - 1 for response in responses)


@dataclass(frozen=True)
class Preference:
    """A prompt with responses of known quality, as token ids."""

    prompt: list[int]
    responses: list[list[int]]  # each with its end token
    ranks: list[int]  # of each response, 0 is the best
    labels: list[int]  # of each response: 1 desirable, -1 undesirable, 0 neither
    mismatched: list[int] | None = None  # the response to another prompt, for KTO's KL estimate

    @property
    def completions(self) -> Completions:
        """The prompt and all its responses, the mismatched one last."""
        return self.prompt, [*self.responses, *([self.mismatched] if self.mismatched else [])]


@dataclass(frozen=True, eq=False)
class PreferenceBatch(CompletionBatch):
    """Responses with what is known of their quality."""

    rank: Tensor  # (N,) int64: 0 is the best response to its prompt; equal ranks form no pair; -1: mismatched
    label: Tensor  # (N,) int64: 1 desirable, -1 undesirable, 0 neither
    mismatched: Tensor  # (N,) bool: a response to another prompt
    ref_logprobs: Tensor | None = None  # (N,) float32: of each response under the reference; None: not computed yet


def preference_batch(items: Sequence[Preference], pad_id: int) -> PreferenceBatch:
    """Preferences as one batch with one row per prompt."""
    batch = completion_batch([item.completions for item in items], pad_id)
    ranks, labels = [], []
    for item in items:
        other = [] if item.mismatched is None else [-1]
        ranks += [*item.ranks, *other]
        labels += [*item.labels, *(0 for _ in other)]
    rank = torch.tensor(ranks)
    return PreferenceBatch(**vars(batch), rank=rank, label=torch.tensor(labels), mismatched=rank < 0)
