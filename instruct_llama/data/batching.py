"""Records to batches: token files, epoch order, padding, packing and loss masks.

Everything here is a pure function of its arguments. The order of epoch e depends on (seed, e) alone, so a resumed run
needs no saved random state: it recomputes the order and skips the records already used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from .. import seeds
from ..config import UserError, check
from .files import atomic

if TYPE_CHECKING:
    from .tokenizer import Message, Tokenizer

Dialog = tuple[list[int], list[bool]]  # token ids and loss mask

# ---------------------------------------------------------------- token files

_DTYPES = (np.dtype("<u2"), np.dtype("<u4"))  # for a vocabulary of at most 65,536, and for a larger one


def write_tokens(path: str | Path, ids: Iterable[Sequence[int] | int], vocab_size: int) -> int:
    """Write token ids (an array, or an iterable of documents or of single ids) as a .npy file; return their count.

    Ids take two bytes if the vocabulary allows it, else four. The file is written under a temporary name and then
    renamed, so it is never incomplete under its own name. Raises UserError for an id outside [0, V).
    """
    dtype = _DTYPES[vocab_size > 1 << 16]
    count = 0
    with atomic(path) as temporary, open(temporary, "wb") as file:
        _write_header(file, dtype, count)
        for document in [ids] if isinstance(ids, np.ndarray) else ids:
            tokens = np.atleast_1d(np.asarray(document, dtype=np.int64))
            bad = tokens[(tokens < 0) | (tokens >= vocab_size)].tolist()
            if bad:
                raise UserError(
                    f"Token id {bad[0]} is outside the vocabulary of {vocab_size}, so {path} was not written: "
                    "use the tokenizer that the model was trained with."
                )
            file.write(tokens.astype(dtype).tobytes())
            count += tokens.size
        file.seek(0)
        _write_header(file, dtype, count)  # same length as the first: numpy pads the header
    return count


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})


def open_tokens(path: str | Path, vocab_size: int | None = None) -> np.memmap:
    """Memory-map a token file, read-only: an array of uint16 or uint32, shape (count,).

    Raises UserError for a missing, invalid, truncated or empty file, and for ids outside the model's `vocab_size`
    if it is given.
    """
    path = Path(path)
    rebuild = f"delete the folder {path.parent} and run the stage again, which rebuilds it"
    check(path.is_file(), f"There is no token file {path}: {rebuild}.")
    try:
        tokens = np.load(path, mmap_mode="r")
    except OSError:  # no permission, a failing disk
        raise
    except Exception as error:  # numpy parses the header as Python: a damaged one may raise anything
        raise UserError(f"{path} is not a token file, or is truncated or damaged: {rebuild}.") from error
    ours = isinstance(tokens, np.memmap) and tokens.ndim == 1 and tokens.dtype in _DTYPES
    whole = ours and tokens.offset + tokens.nbytes == path.stat().st_size
    check(whole, f"{path} is damaged, or does not hold token ids: {rebuild}.")
    check(tokens.size > 0, f"{path} holds no tokens: give a text that is not empty, then {rebuild}.")
    if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
        raise UserError(f"{path} holds token id {largest}, but the vocabulary size is {vocab_size}: {rebuild}.")
    return tokens


# ---------------------------------------------------------------- orders


def epoch_order(n: int, seed: int, epoch: int, *keys: seeds.Key) -> np.ndarray:
    """A permutation of 0 … n-1 that depends on (n, seed, epoch, keys) alone. The keys name what is shuffled."""
    return seeds.numpy_generator(seed, "epoch", *keys, epoch).permutation(n)


def windows(text: np.ndarray, seq_len: int, ends: Sequence[int] = ()) -> np.ndarray:
    """Cut running text into windows of at most `seq_len` tokens: (N, 2) start and stop positions.

    The targets of a window are the tokens after its start, up to and including its stop. Without `ends`, the next
    window starts at that stop, so every token but the first is a target exactly once. With `ends`, the ids that end a
    paragraph, a window that cuts a paragraph is followed by one that starts with this paragraph. A paragraph without
    its beginning may be unpredictable, such as an answer without its question.
    """
    check(len(text) >= 2, f"A text of {len(text)} token has no next token to predict: give more text.")
    begins = np.concatenate(([0], np.flatnonzero(np.isin(text, ends)) + 1))  # where paragraphs begin
    starts, last = [0], len(text) - 1
    while (stop := starts[-1] + seq_len) < last:
        paragraph = int(begins[np.searchsorted(begins, stop, side="right") - 1])
        starts.append(paragraph if paragraph > starts[-1] else stop)
    return np.stack((starts, np.minimum(np.add(starts, seq_len), last)), axis=1)


def window_order(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows in an epoch."""
    return epoch_order(n_windows, seed, epoch, "windows")


# ---------------------------------------------------------------- batches


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with their next-token targets.

    Targets are already shifted: `targets[b, t]` is the token after `tokens[b, t]`, and `loss_mask[b, t]` tells
    whether the loss counts it. Normalise a loss by the sum of `weight` over all batches of an optimizer step.
    """

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    loss_mask: torch.Tensor  # (B, T) bool
    segment_ids: torch.Tensor | None = None  # (B, T) int64: packed dialogs of a row; None: one sequence per row

    @property
    def weight(self) -> int:
        """The number of targets that the loss counts."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            loss_mask=self.loss_mask.to(device),
            segment_ids=None if self.segment_ids is None else self.segment_ids.to(device),
        )


def window_batch(text: np.ndarray, spans: np.ndarray) -> Batch:
    """A batch of windows, given as (B, 2) positions from `windows`: tokens (B, T), padded to the longest window."""
    width = int((spans[:, 1] - spans[:, 0]).max())
    rows = np.zeros((len(spans), width + 1), dtype=np.int64)  # (B, T+1)
    real = np.zeros((len(spans), width), dtype=bool)  # (B, T)
    for row, (start, stop) in enumerate(spans):
        rows[row, : stop - start + 1] = text[start : stop + 1]
        real[row, : stop - start] = True
    tokens = torch.from_numpy(rows)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.from_numpy(real))


def dialog_batch(
    dialogs: Sequence[tuple[Sequence[int], Sequence[bool]]], pad_id: int, pack_len: int | None = None
) -> Batch:
    """Tokenised dialogs (ids, loss mask) as one batch, right-padded to its longest row.

    With `pack_len`, several dialogs share a row of at most that many positions. `segment_ids` numbers them from 1
    (0 is padding), and no dialog attends to or predicts another.
    """
    lengths = [len(ids) - 1 for ids, _ in dialogs]  # the last token is only ever a target
    rows = [[i] for i in range(len(dialogs))] if pack_len is None else pack(lengths, pack_len)
    width = max(sum(lengths[i] for i in row) for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)  # (B, T)
    targets = tokens.clone()  # (B, T)
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)  # (B, T)
    segment_ids = torch.zeros(len(rows), width, dtype=torch.int64)  # (B, T)
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            ids, mask = dialogs[i]
            here = slice(start, start + lengths[i])
            tokens[r, here] = torch.tensor(ids[:-1], dtype=torch.int64)
            targets[r, here] = torch.tensor(ids[1:], dtype=torch.int64)
            loss_mask[r, here] = torch.tensor(mask[1:], dtype=torch.bool)
            segment_ids[r, here] = segment
            start = here.stop
    return Batch(tokens, targets, loss_mask, segment_ids if pack_len is not None else None)


def pack(lengths: Sequence[int], pack_len: int) -> list[list[int]]:
    """Pack items into rows of at most `pack_len` positions by first-fit decreasing; equal lengths keep their order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        check(
            lengths[i] <= pack_len,
            f"A sequence of {lengths[i]} positions does not fit a packed row of {pack_len}: raise seq_len.",
        )
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            rows.append([i])
            room.append(pack_len - lengths[i])
        else:
            rows[row].append(i)
            room[row] -= lengths[i]
    return rows


@dataclass(frozen=True, eq=False)
class RankedBatch:
    """The N completions of P prompts, one row per prompt: the shared prefix once, then the rest of each completion."""

    tokens: torch.Tensor  # (P, T) int64: the shared prefix, then the rest of every completion; right-padded
    segment_ids: torch.Tensor  # (P, T) int64: -1 the shared prefix, 1, 2, … the completions, 0 padding
    last_positions: torch.Tensor  # (N,) int64: position in its row of a completion's last token, which gets the score
    prompt: torch.Tensor  # (N,) int64: index of the prompt, which is the row
    rank: torch.Tensor  # (N,) int64: 0 is the best completion of its prompt

    @property
    def weight(self) -> int:
        """The number of prompts: the ranking loss is a mean over the pairs of one prompt, then over prompts."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> RankedBatch:
        return RankedBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def ranked_batch(items: Sequence[Sequence[Sequence[int]]], pad_id: int) -> RankedBatch:
    """Ranked sequences (prompt with completion, best first) as one batch with one row per prompt."""
    tokens = torch.full((len(items), max(row_length(item) for item in items)), pad_id, dtype=torch.int64)  # (P, T)
    segment_ids = torch.zeros_like(tokens)  # (P, T)
    ends, prompts, ranks = [], [], []
    for row, item in enumerate(items):
        start = at = common_length(item)
        tokens[row, :start], segment_ids[row, :start] = torch.tensor(item[0][:start], dtype=torch.int64), -1
        for rank, ids in enumerate(item):
            here = slice(at, at + len(ids) - start)
            tokens[row, here], segment_ids[row, here] = torch.tensor(ids[start:], dtype=torch.int64), rank + 1
            at = here.stop
            ends.append(at - 1)
            prompts.append(row)
            ranks.append(rank)
    return RankedBatch(tokens, segment_ids, torch.tensor(ends), torch.tensor(prompts), torch.tensor(ranks))


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """The length of the longest common prefix, which never includes the last token of the shortest sequence."""
    longest = min(len(ids) for ids in sequences) - 1
    return next((t for t in range(longest) if len({ids[t] for ids in sequences}) > 1), longest)


def row_length(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens of the sequences, with their shared prefix counted once."""
    return sum(len(ids) for ids in sequences) - (len(sequences) - 1) * common_length(sequences)


# ---------------------------------------------------------------- fitting the context


def _shorter(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without the oldest exchange (a user and an assistant turn); None if no other exchange is left."""
    first = 1 if messages[0]["role"] == "system" else 0
    kept = [*messages[:first], *messages[first + 2 :]]
    return kept if len(kept) > first else None


def fit_dialog(tokenizer: Tokenizer, messages: Sequence[Message], max_len: int) -> tuple[list[int], list[bool]] | None:
    """Ids and loss mask of a dialog in at most `max_len` tokens; the oldest whole exchanges are dropped to fit.

    None if even the last exchange is too long. The system message is kept.
    """
    kept: list[Message] | None = list(messages)
    while kept is not None:
        ids, mask = tokenizer.encode_dialog(kept)
        if len(ids) <= max_len:
            return ids, mask
        kept = _shorter(kept)
    return None


def cut_prompt(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], max_len: int
) -> tuple[list[Message], list[int]] | None:
    """A prompt's messages and its at most `max_len` ids; the oldest exchanges are dropped to fit.

    None if the last turn alone is too long.
    """
    kept: list[Message] | None = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    while kept is not None:
        ids = tokenizer.encode_prompt(kept)
        if len(ids) <= max_len:
            return kept, ids
        kept = _shorter(kept)
    return None


def fit_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Message], max_len: int) -> list[int] | None:
    """The ids of `cut_prompt`: a prompt in at most `max_len` tokens, or None if its last turn is too long."""
    fitted = cut_prompt(tokenizer, prompt, max_len)
    return fitted[1] if fitted else None


def fit_completions(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], completions: Sequence[str], max_len: int
) -> tuple[list[int], list[list[int]]] | None:
    """Ids of a prompt, and of each completion with its end token; the prompt is cut until the longest one fits.

    None if even the prompt's last turn is too long for that.
    """
    responses = [[*tokenizer.encode(tokenizer.chat.closed(text)), tokenizer.eos_id] for text in completions]
    ids = fit_prompt(tokenizer, prompt, max_len - max(len(response) for response in responses))
    return None if ids is None else (ids, responses)


def fit_comparison(
    tokenizer: Tokenizer, prompt: Sequence[Message], completions: Sequence[str], max_len: int
) -> list[list[int]] | None:
    """`fit_completions` with each completion joined to the prompt."""
    fitted = fit_completions(tokenizer, prompt, completions, max_len)
    return fitted and [fitted[0] + response for response in fitted[1]]
