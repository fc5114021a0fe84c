"""Token files, orders, padding, packing and masks."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from instruct_llama.config import UserError
from instruct_llama.data.batching import (
    Batch,
    dialog_batch,
    epoch_order,
    fit_comparison,
    fit_dialog,
    fit_prompt,
    open_tokens,
    pack,
    ranked_batch,
    window_batch,
    window_order,
    windows,
    write_tokens,
)
from instruct_llama.data.files import atomic
from instruct_llama.data.tokenizer import Tokenizer

PAD = 0
VOCAB = 50

# ---------------------------------------------------------------- token files


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(512, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (128_256, "uint32")]
)
def test_p02_the_file_says_its_dtype_and_keeps_every_id(tmp_path: Path, vocab: int, dtype: str) -> None:
    path = tmp_path / "train.npy"
    ids = [0, 1, 255, 256, vocab - 1]
    assert write_tokens(path, [ids, [], ids[:2]], vocab) == 7
    tokens = open_tokens(path, vocab)
    assert tokens.dtype == dtype
    assert tokens.tolist() == [*ids, 0, 1]
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert np.array_equal(np.load(path), tokens)  # for any program that reads numpy's format


def test_p02_the_header_has_room_for_any_count(tmp_path: Path) -> None:
    """It is written before the count is known, and again in its place: the ids that follow stay as they are."""
    for count in (1, 9, 10, 99_999, 100_000):
        ids = np.arange(count) % 500
        write_tokens(tmp_path / "x.npy", iter(ids), 500)
        assert np.array_equal(open_tokens(tmp_path / "x.npy"), ids)


def test_p02_ids_may_come_as_an_array_or_one_by_one(tmp_path: Path) -> None:
    for ids in (np.array([3, 1, 2]), iter([3, 1, 2]), [[3], [1, 2]]):
        write_tokens(tmp_path / "x", ids, 10)
        assert open_tokens(tmp_path / "x").tolist() == [3, 1, 2]


def test_p02_truncated_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    write_tokens(path, [[1, 2, 3]], 10)
    whole = path.read_bytes()
    cases = [
        (whole[:-1], "truncated or damaged"),
        (whole + b"\0", "damaged"),
        (whole[:20], "truncated"),
        (b"", "not a token file"),
        (np.arange(100, dtype=np.uint16).tobytes(), "not a token file"),
        (pickle.dumps([1, 2]), "not a token file"),
        (b"PK\3\4" + whole, "not a token file"),
        (whole.replace(b"{", b"("), "not a token file"),
        (whole[:6] + b"\x09" + whole[7:], "not a token file"),
    ]
    for content, sentence in cases:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"train\.npy.*{sentence}.*delete the folder .* run the stage again"):
            open_tokens(path)
    for array in (np.ones(3), np.ones((3, 1), np.uint16), np.ones(3, ">u2"), np.uint16(1)):
        np.save(path, array)
        with pytest.raises(UserError, match=r"train\.npy .* does not hold token ids"):
            open_tokens(path)
    with pytest.raises(UserError, match=r"no token file .*none\.npy"):
        open_tokens(tmp_path / "none.npy")
    write_tokens(path, [], 10)
    with pytest.raises(UserError, match=r"train\.npy holds no tokens"):
        open_tokens(path)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), min_size=1, max_size=5))
def test_p02_a_damaged_header_is_a_user_error(tmp_path_factory, changes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    write_tokens(path, [range(300)], 300)
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[place] = byte
    path.write_bytes(content)
    try:
        assert len(open_tokens(path)) == 300  # the change did not matter
    except UserError as error:
        assert "damaged.npy" in str(error) and "run the stage again" in str(error)


def test_p02_a_file_of_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x", [[1, 512, 3]], 600)
    assert open_tokens(tmp_path / "x", 513).tolist() == [1, 512, 3]
    with pytest.raises(UserError, match="token id 512, but the vocabulary size is 512"):
        open_tokens(tmp_path / "x", 512)


@pytest.mark.parametrize("bad", [-1, 10, 70_000])
def test_p02_ids_outside_the_vocabulary_are_not_written(tmp_path: Path, bad: int) -> None:
    with pytest.raises(UserError, match=rf"Token id {bad} is outside the vocabulary of 10"):
        write_tokens(tmp_path / "x", [[1, bad]], 10)
    assert list(tmp_path.iterdir()) == []


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.npy"
    write_tokens(path, [[1]], 10)

    def broken():
        yield [2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, broken(), 10)
    assert open_tokens(path).tolist() == [1]
    assert [file.name for file in path.parent.iterdir()] == ["x.npy"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(UserError, match="disk is full"):
        with atomic(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "x").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- orders


PARAGRAPH_END = 0


def paragraphs(n_tokens: int, longest: int) -> np.ndarray:
    """A text whose ids count from 1, with an end mark after every few of them."""
    rng, text = np.random.default_rng(n_tokens), np.arange(1, n_tokens + 1, dtype=np.uint16)
    place = -1
    while (place := place + int(rng.integers(1, longest + 1))) < n_tokens:
        text[place] = PARAGRAPH_END
    return text


@pytest.mark.parametrize(("n_tokens", "seq_len"), [(2, 1), (2, 8), (9, 8), (10, 8), (1000, 7), (1025, 128), (513, 512)])
@pytest.mark.parametrize("ends", [(), (PARAGRAPH_END,)])
def test_p01_an_epoch_has_every_token_once_as_target(n_tokens: int, seq_len: int, ends: tuple) -> None:
    """But the beginnings of cut paragraphs, where paragraphs are told apart: those it has twice."""
    marked = paragraphs(n_tokens, longest=12)
    spans, places = windows(marked, seq_len, ends), np.arange(n_tokens, dtype=np.uint16)
    assert (spans[:, 1] - spans[:, 0]).max() <= seq_len
    batch = window_batch(places, spans[window_order(len(spans), seed=3, epoch=1)])
    assert torch.equal(batch.targets[batch.loss_mask], batch.tokens[batch.loss_mask] + 1)
    targets = batch.targets[batch.loss_mask].tolist()
    overlaps = zip(spans[1:, 0].tolist(), spans[:-1, 1].tolist(), strict=True)
    again = [place for start, stop in overlaps for place in range(start + 1, stop + 1)]
    assert sorted(targets) == sorted([*range(1, n_tokens), *again])
    assert len(set(again)) == len(again)
    assert ends or not again


def test_p01_windows_without_paragraphs_lie_end_to_end() -> None:
    assert windows(np.arange(23), 5).tolist() == [[0, 5], [5, 10], [10, 15], [15, 20], [20, 22]]


def test_windows_start_with_the_paragraph_that_the_last_cut_went_through() -> None:
    """Paragraphs of 3, 2, 4, 9 and 2 tokens in windows of 6; the nine do not fit and are read in two parts."""
    text = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0])
    assert windows(text, 6, ends=(0,)).tolist() == [[0, 6], [5, 11], [9, 15], [15, 19]]
    assert windows(text, 6, ends=(7, 0)).tolist() == windows(text, 6, ends=(0,)).tolist()
    batch = window_batch(text, windows(text, 6, ends=(0,))[2:])
    assert batch.tokens.shape == (2, 6) and batch.loss_mask.sum(dim=1).tolist() == [6, 4]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(1, 12))
def test_every_paragraph_that_fits_is_whole_in_a_window(ids: list[int], seq_len: int) -> None:
    spans = windows(np.array(ids), seq_len, ends=(0,)).tolist()
    begins = [0, *(i + 1 for i, token in enumerate(ids[:-1]) if token == 0)]
    for begin, after in zip(begins, [*begins[1:], len(ids)], strict=True):
        if after - 1 - begin < seq_len and begin > 0:  # room for its end as well
            assert any(start <= begin and after - 1 <= stop for start, stop in spans), (begin, spans)


def test_p01_windows_change_order_between_epochs_but_not_between_calls() -> None:
    first = window_order(1_000, seed=1, epoch=0)
    assert np.array_equal(first, window_order(1_000, seed=1, epoch=0))
    assert not np.array_equal(first, window_order(1_000, seed=1, epoch=1))
    assert not np.array_equal(first, window_order(1_000, seed=2, epoch=0))
    assert not np.array_equal(first, np.sort(first))


def test_p01_one_token_predicts_nothing() -> None:
    with pytest.raises(UserError, match="give more text"):
        windows(np.zeros(1), 8)


def test_epoch_order_is_a_pure_permutation() -> None:
    np.random.seed(0)
    order = epoch_order(100, seed=1, epoch=2)
    np.random.seed(1)
    assert np.array_equal(order, epoch_order(100, seed=1, epoch=2))
    assert sorted(order.tolist()) == list(range(100))
    assert not np.array_equal(order, epoch_order(100, seed=2, epoch=1))
    assert epoch_order(0, 1, 1).tolist() == []


# ---------------------------------------------------------------- padding and packing

dialog = st.lists(st.tuples(st.integers(1, VOCAB - 1), st.booleans()), min_size=2, max_size=12).map(
    lambda pairs: ([token for token, _ in pairs], [counts for _, counts in pairs])
)


def _pairs(batch: Batch) -> list[tuple[int, int]]:
    """(token, its target) wherever the target counts, sorted: what a batch teaches."""
    return sorted(zip(batch.tokens[batch.loss_mask].tolist(), batch.targets[batch.loss_mask].tolist(), strict=True))


def test_dialog_batch_by_hand() -> None:
    batch = dialog_batch([([5, 6, 7, 8], [False, False, True, True]), ([5, 9], [False, True])], PAD)
    assert batch.tokens.tolist() == [[5, 6, 7], [5, PAD, PAD]]
    assert batch.targets.tolist() == [[6, 7, 8], [9, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.segment_ids is None
    assert batch.weight == 3
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_packed_batch_by_hand() -> None:
    dialogs = [([5, 6], [False, True]), ([5, 6, 7, 8], [False, False, True, True]), ([5, 9, 4], [False, True, True])]
    batch = dialog_batch(dialogs, PAD, pack_len=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 5], [5, 9, PAD, PAD]]
    assert batch.targets.tolist() == [[6, 7, 8, 6], [9, 4, PAD, PAD]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 1, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, True], [True, True, False, False]]


@settings(max_examples=60, deadline=None)
@given(st.lists(dialog, min_size=1, max_size=8), st.none() | st.integers(11, 30))
def test_p07_padding_and_packing_keep_every_target_and_add_none(dialogs: list, pack_len: int | None) -> None:
    batch = dialog_batch(dialogs, PAD, pack_len)
    assert batch.weight == sum(sum(mask[1:]) for _, mask in dialogs)
    assert _pairs(batch) == sorted(
        (ids[i], ids[i + 1]) for ids, mask in dialogs for i in range(len(ids) - 1) if mask[i + 1]
    )
    assert not batch.loss_mask[batch.tokens == PAD].any()
    assert batch.tokens.shape == batch.targets.shape == batch.loss_mask.shape
    if pack_len is not None:
        assert batch.tokens.shape[1] <= pack_len
        assert torch.equal(batch.segment_ids == 0, batch.tokens == PAD)
        real = batch.segment_ids > 0
        found = []  # every dialog stands whole, in order, under a segment number of its own
        for row in range(len(real)):
            for segment in batch.segment_ids[row][real[row]].unique().tolist():
                found.append(batch.tokens[row][batch.segment_ids[row] == segment].tolist())
        assert sorted(found) == sorted(ids[:-1] for ids, _ in dialogs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_p07_packing_puts_every_item_in_one_row_that_holds_it(lengths: list[int], pack_len: int) -> None:
    rows = pack(lengths, pack_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= pack_len for row in rows)
    assert rows == pack(lengths, pack_len)
    used = [sum(lengths[i] for i in row) for row in rows]
    assert sum(fill <= pack_len / 2 for fill in used) <= 1  # first fit never leaves two rows half empty


def test_packing_by_hand() -> None:
    assert pack([2, 5, 3, 5, 4], 8) == [[1, 2], [3, 0], [4]]
    with pytest.raises(UserError, match="9 positions does not fit a packed row of 8"):
        pack([9], 8)


def _mean_loss(batches: list[Batch], table: torch.Tensor) -> float:
    """Loss of a bigram model over accumulated batches, normalised by weight as the trainer does."""
    total = 0.0
    for batch in batches:
        nll = F.cross_entropy(table[batch.tokens].flatten(0, 1), batch.targets.flatten(), reduction="none")
        total += float(nll[batch.loss_mask.flatten()].sum())
    return total / sum(batch.weight for batch in batches)


def test_p07_loss_is_independent_of_padding_batching_and_packing() -> None:
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = np.random.default_rng(0)
    dialogs = [
        (draw.integers(1, VOCAB, n).tolist(), [False] * (n // 2) + [True] * (n - n // 2)) for n in (4, 9, 2, 30, 7)
    ]
    together = _mean_loss([dialog_batch(dialogs, PAD)], table)
    alone = _mean_loss([dialog_batch([one], PAD) for one in dialogs], table)
    ragged = _mean_loss([dialog_batch(dialogs[:4], PAD), dialog_batch(dialogs[4:], PAD)], table)
    packed = _mean_loss([dialog_batch(dialogs, PAD, pack_len=32)], table)
    other_pad = _mean_loss([dialog_batch(dialogs, pad_id=VOCAB - 1)], table)
    assert alone == pytest.approx(together, rel=1e-12)
    assert ragged == pytest.approx(together, rel=1e-12)
    assert packed == pytest.approx(together, rel=1e-12)
    assert other_pad == pytest.approx(together, rel=1e-12)


def test_p07_the_short_last_window_counts_its_real_targets_only() -> None:
    batch = window_batch(np.arange(10, 16, dtype=np.uint16), np.array([[0, 4], [4, 5]]))
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [14, 15, 0, 0]]
    assert batch.targets.tolist() == [[11, 12, 13, 14], [15, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert batch.weight == 5


def test_batches_move_whole() -> None:
    batch = dialog_batch([([1, 2], [False, True])], PAD, pack_len=4).to("meta")
    assert {batch.tokens.device.type, batch.targets.device.type, batch.segment_ids.device.type} == {"meta"}
    ranked = ranked_batch([[[1, 2], [1, 3]]], PAD).to("meta")
    assert {ranked.tokens.device.type, ranked.last_positions.device.type, ranked.rank.device.type} == {"meta"}


def test_ranked_batch_by_hand() -> None:
    batch = ranked_batch([[[1, 2, 3], [1, 2]], [[1, 4, 5, 6], [1, 4, 0], [1, 4, 7, 8, 9]], [[3, 4, 5]]], PAD)
    assert batch.tokens.tolist() == [
        [1, 2, 3, 2, 0, 0, 0, 0],  # the last token of the shortest is never part of what they share
        [1, 4, 5, 6, 0, 7, 8, 9],
        [3, 4, 5, 0, 0, 0, 0, 0],
    ]
    assert batch.segment_ids.tolist() == [
        [-1, 1, 1, 2, 0, 0, 0, 0],
        [-1, -1, 1, 1, 2, 3, 3, 3],
        [-1, -1, 1, 0, 0, 0, 0, 0],
    ]
    assert batch.last_positions.tolist() == [2, 3, 3, 4, 7, 2]
    assert batch.prompt.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.rank.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.weight == 3


# ---------------------------------------------------------------- fitting the context


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat. how many cats? two cats. be kind and say it in few words."], 290)


def _talk(n: int, system: bool = False) -> list[dict[str, str]]:
    """A dialog of n exchanges of about equal length."""
    messages = [{"role": "system", "content": "be kind"}] if system else []
    for i in range(n):
        messages += [
            {"role": "user", "content": f"how many cats? {i}"},
            {"role": "assistant", "content": f"{i} two cats."},
        ]
    return messages


@pytest.mark.parametrize("system", [False, True])
def test_p04_a_long_dialog_loses_its_oldest_exchanges(tokenizer: Tokenizer, system: bool) -> None:
    talk = _talk(4, system)
    head = talk[: int(system)]
    for kept in (4, 3, 2, 1):
        expected = tokenizer.encode_dialog([*head, *talk[len(talk) - 2 * kept :]])
        assert fit_dialog(tokenizer, talk, len(expected[0])) == expected
        longer = len(tokenizer.encode_dialog([*head, *talk[len(talk) - 2 * kept - 2 :]])[0]) if kept < 4 else 10**6
        assert fit_dialog(tokenizer, talk, longer - 1) == expected
    assert fit_dialog(tokenizer, talk, len(expected[0]) - 1) is None
    assert len(talk) == 8 + system  # the record itself is not touched


@pytest.mark.parametrize("system", [False, True])
def test_p04_a_long_prompt_loses_its_oldest_exchanges(tokenizer: Tokenizer, system: bool) -> None:
    prompt = _talk(3, system)[:-1]
    last = [*prompt[: int(system)], prompt[-1]]
    whole, shortest = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(last)
    assert fit_prompt(tokenizer, prompt, len(whole)) == whole
    cut = fit_prompt(tokenizer, prompt, len(whole) - 1)
    assert cut == tokenizer.encode_prompt([*prompt[: int(system)], *prompt[int(system) + 2 :]])
    assert fit_prompt(tokenizer, prompt, len(shortest)) == shortest
    assert fit_prompt(tokenizer, prompt, len(shortest) - 1) is None
    assert fit_prompt(tokenizer, "two cats", 100) == tokenizer.encode_prompt("two cats")


def test_p04_all_completions_of_a_prompt_share_one_cut(tokenizer: Tokenizer) -> None:
    prompt = _talk(3)[:-1]
    short, long = "two.", "two cats sat on the mat, and on the mat sat two cats."
    room = len(tokenizer.encode_prompt(prompt)) + len(tokenizer.encode(short)) + 1
    fitted = fit_comparison(tokenizer, prompt, [short, long], room)
    answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in (short, long)]
    heads = [ids[: len(ids) - len(answer)] for ids, answer in zip(fitted, answers, strict=True)]
    assert heads[0] == heads[1] != tokenizer.encode_prompt(prompt)
    assert [ids[len(heads[0]) :] for ids in fitted] == answers
    assert max(map(len, fitted)) <= room
    last = [prompt[-1], {"role": "assistant", "content": long}]
    assert fit_comparison(tokenizer, prompt, [short, long], 10**6)[1] == tokenizer.encode_dialog([*prompt, last[1]])[0]
    assert fit_comparison(tokenizer, prompt, [short, long], len(tokenizer.encode_dialog(last)[0]) - 1) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.booleans(), st.integers(1, 120))
def test_p04_what_fits_keeps_the_last_answer_whole(tokenizer: Tokenizer, n: int, system: bool, room: int) -> None:
    talk = _talk(n, system)
    fitted = fit_dialog(tokenizer, talk, room)
    if fitted is None:
        assert len(tokenizer.encode_dialog([*talk[: int(system)], *talk[-2:]])[0]) > room
    else:
        ids, mask = fitted
        assert len(ids) == len(mask) <= room
        answer = [*tokenizer.encode(talk[-1]["content"]), tokenizer.eos_id]
        assert ids[-len(answer) :] == answer and all(mask[-len(answer) :])
        answered = tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts])
        assert " ".join(turn["content"] for turn in talk if turn["role"] == "assistant").endswith(answered)


def test_p37_padding_and_end_are_told_apart(tokenizer: Tokenizer) -> None:
    talks = [tokenizer.encode_dialog(_talk(n)) for n in (1, 3)]
    batch = dialog_batch(talks, tokenizer.pad_id)
    ends = batch.targets == tokenizer.eos_id
    assert int(ends.sum()) == 4 and batch.loss_mask[ends].all()
    assert not batch.loss_mask[batch.targets == tokenizer.pad_id].any()
    ranked = ranked_batch([[ids for ids, _ in talks]], tokenizer.pad_id)
    assert (ranked.tokens[ranked.prompt, ranked.last_positions] == tokenizer.eos_id).all()
