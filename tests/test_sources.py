"""Local files to records."""

from __future__ import annotations

import errno
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_llama.config import UserError
from instruct_llama.data.sources import as_comparisons, as_dialogs, as_prompts, as_texts, read, split, write_jsonl

SHARED = Path(__file__).parents[2] / "shared" / "data"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def hh(*turns: str) -> str:
    """Turns as anthropics/hh-rlhf writes them, the human first."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def pair(*prompt: str, chosen: str = "Yes.", rejected: str = "No.") -> dict[str, str]:
    return {"chosen": hh(*prompt, chosen), "rejected": hh(*prompt, rejected)}


def lines(path: Path, *rows: Any) -> Path:
    """A JSON-lines file, gzipped if its name says so."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "noname"])
def test_plain_text_becomes_paragraphs(tmp_path: Path, name: str) -> None:
    text = "ROMEO:\nAh!\n\n\nJULIET:\r\nOh \u2028 é!\n \n\nEnd\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    records = read(tmp_path / name)
    assert records.kind == "text"
    assert as_texts(records) == ["ROMEO:\nAh!", "JULIET:\nOh \u2028 é!", "End"]


def test_long_text_without_blank_lines_is_cut_and_keeps_every_character(tmp_path: Path) -> None:
    for text in ("a line of words\n" * 1000, "word " * 3000, "x" * 9000):
        (tmp_path / "a.txt").write_text(text)
        parts = as_texts(read(tmp_path / "a.txt"))
        assert "".join(parts) == text.rstrip("\n") and max(map(len, parts)) <= 4000
        assert len(parts) <= len(text) / 3000 + 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "named_anyhow"])
def test_hh_pairs_become_comparisons(tmp_path: Path, name: str) -> None:
    record = pair("Hi there", "Hello!", "Is it \n\nso?", chosen="Yes.", rejected="No.\n\nHumans err: so do I.")
    records = read(lines(tmp_path / name, record))
    prompt = [user("Hi there"), assistant("Hello!"), user("Is it \n\nso?")]
    assert as_comparisons(records) == [{"prompt": prompt, "completions": ["Yes.", "No.\n\nHumans err: so do I."]}]
    assert as_dialogs(records) == [{"messages": [*prompt, assistant("Yes.")]}]
    assert as_prompts(records) == [{"prompt": prompt}]
    assert as_texts(records) == ["Hi there\nHello!\nIs it \n\nso?\nYes."]


def test_pairs_of_message_lists_and_with_a_prompt_are_read_too(tmp_path: Path) -> None:
    as_lists = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    with_prompt = {"prompt": "a", "chosen": "b", "rejected": "c"}
    expected = [{"prompt": [user("a")], "completions": ["b", "c"]}]
    for row in (as_lists, with_prompt):
        assert as_comparisons(read(lines(tmp_path / "a.jsonl", row))) == expected


def test_our_own_shapes_are_read_as_they_stand(tmp_path: Path) -> None:
    talk = {"messages": [user("a"), assistant("b")], "kind": "ideal"}
    ranked = {"prompt": [user("a")], "completions": ["b", "c", "d"], "rewards": [1.0, 0.5, 0.0]}
    asked = {"prompt": [{"role": "system", "content": "s"}, user("a")]}
    for row, kind, serve in ((talk, "dialogs", as_dialogs), (ranked, "comparisons", as_comparisons)):
        records = read(lines(tmp_path / "a.jsonl", row, row))
        assert records.kind == kind and serve(records) == [row, row]
    assert as_prompts(read(lines(tmp_path / "a.jsonl", asked))) == [asked]
    assert as_texts(read(lines(tmp_path / "a.jsonl", asked))) == ["s\na"]
    assert as_texts(read(lines(tmp_path / "a.jsonl", {"text": "once\n\nmore"}))) == ["once\n\nmore"]


def test_a_str_prompt_is_one_user_turn(tmp_path: Path) -> None:
    for key in ("completion", "response"):
        records = read(lines(tmp_path / "a.jsonl", {"prompt": "a", key: "b"}))
        assert as_dialogs(records) == [{"messages": [user("a"), assistant("b")]}]
    assert as_prompts(read(lines(tmp_path / "a.jsonl", {"prompt": "a"}))) == [{"prompt": [user("a")]}]
    assert as_comparisons(read(lines(tmp_path / "a.jsonl", {"prompt": "a", "completions": ["b", "c"]}))) == [
        {"prompt": [user("a")], "completions": ["b", "c"]}
    ]


def test_instructions_become_dialogs(tmp_path: Path) -> None:
    alpaca = [
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
        {"instruction": "Say hi.", "output": " "},
    ]
    expected = [{"messages": [user("Add.\n\n2, 3"), assistant("5")]}, {"messages": [user("Say hi."), assistant("Hi")]}]
    records = read(lines(tmp_path / "a.jsonl", *alpaca))
    assert as_dialogs(records) == expected
    assert records.dropped == {"a response is empty": 1}
    (tmp_path / "list.json").write_text(json.dumps(alpaca, indent=2))
    assert as_dialogs(read(tmp_path / "list.json")) == expected
    seed = {
        "id": "x",
        "instruction": "Add.",
        "instances": [{"input": "2, 3", "output": "5"}],
        "is_classification": False,
    }
    assert as_dialogs(read(lines(tmp_path / "a.jsonl", seed))) == expected[:1]


def test_lines_may_hold_any_unicode_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n\n  \n{"text": "é"}'.encode())
    assert as_texts(read(tmp_path / "a.jsonl")) == ["a\u2028b\x85c", "é"]


# ---------------------------------------------------------------- P03: what is dropped, and counted


def test_p03_bad_pairs_are_dropped_whole_and_counted(tmp_path: Path) -> None:
    good = pair("Hi")
    twice = "\n\nHuman: Hi\n\nAssistant: Hello\n\nAssistant: Again\n\nHuman: Well\n\nAssistant: "
    rows = [
        good,
        {"chosen": twice + "a", "rejected": twice + "b"},
        {"chosen": hh("Hi", "Hello", "Bye"), "rejected": hh("Hi", "Hello", "Bye")},
        {"chosen": hh("Hi", "same"), "rejected": hh("Hi", "same")},
        {"chosen": hh("Hi", "a"), "rejected": hh("Ho", "b")},
        {"chosen": hh("Hi", "a"), "rejected": hh("Hi", "b", "c", "d")},
        pair("Hi", rejected=" "),
        pair("Hi", "", "well"),
        pair("", chosen="a"),
        {"chosen": "Hi there", "rejected": "Ho"},
        {"chosen": hh("Hi", "a")},
        {"chosen": 3, "rejected": hh("Hi", "a")},
        "text",
        good,
    ]
    records = read(lines(tmp_path / "a.jsonl", *rows))
    assert as_comparisons(records) == [{"prompt": [user("Hi")], "completions": ["Yes.", "No."]}] * 2
    assert records.report["kept"] == 2
    assert records.report["dropped"] == {
        "the turns do not alternate": 1,
        "the dialog does not end with an assistant turn": 1,
        "chosen equals rejected": 1,
        "the prompts differ": 2,
        "a response is empty": 2,
        "a turn is empty": 1,
        "there is text before the first turn": 1,
        "it lacks rejected": 1,
        "the turns are not a list of messages": 1,
        "it is not a JSON object": 1,
    }
    assert records.describe().startswith(
        f"{tmp_path / 'a.jsonl'}: 2 comparisons; dropped 2 because the prompts differ, "
    )


@pytest.mark.parametrize(
    "tail", ["\n\nHuman: Still me", "\n\nAssistant: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: "]
)
def test_p03_a_malformed_later_turn_never_leaves_its_first_half(tmp_path: Path, tail: str) -> None:
    bad = {"chosen": hh("Hi", "Hello") + tail, "rejected": hh("Hi", "Go away") + tail}
    records = read(lines(tmp_path / "a.jsonl", bad, pair("Good")))
    assert as_prompts(records) == [{"prompt": [user("Good")]}]
    assert sum(records.dropped.values()) == 1


def test_p03_a_file_without_one_good_record_is_refused_with_the_reasons(tmp_path: Path) -> None:
    same = pair("Hi", chosen="a", rejected="a")
    with pytest.raises(UserError, match=r"Every record of .*a\.jsonl was dropped: 2 because chosen equals rejected"):
        read(lines(tmp_path / "a.jsonl", same, same))


def test_p03_nothing_dropped_is_said_too(tmp_path: Path) -> None:
    records = read(lines(tmp_path / "a.jsonl", pair("Hi")))
    assert records.describe() == f"{tmp_path / 'a.jsonl'}: 1 comparisons, none dropped."
    assert len(records) == 1


GOOD_TALK = {"messages": [user("a"), assistant("b")]}
GOOD_RANKED = {"prompt": "a", "completions": ["b", "c"]}
STRICT = [
    (GOOD_TALK, {"messages": [user("a"), assistant(" ")]}, r"a response is empty \(turn 2\)"),
    (GOOD_TALK, {"messages": [user(""), assistant("b")]}, r"a turn is empty \(turn 1\)"),
    (GOOD_TALK, {"messages": [user("a"), user("b"), assistant("c")]}, "do not alternate .turn 2 is user"),
    (GOOD_TALK, {"messages": [user("a")]}, "does not end with an assistant turn"),
    (GOOD_TALK, {"messages": [{"role": "bot", "content": "x"}]}, "turn 1: 'bot'"),
    (GOOD_TALK, {"messages": ["hello"]}, "turn 1"),
    (GOOD_TALK, {"messages": "hello"}, "not a list of messages"),
    (GOOD_TALK, {"messages": []}, "no user turn"),
    (GOOD_TALK, {"talk": []}, "it lacks messages"),
    (GOOD_TALK, [1], "not a JSON object"),
    (GOOD_RANKED, {"prompt": "a", "completions": ["b", "b"]}, r"two completions are equal \(completion 2\)"),
    (GOOD_RANKED, {"prompt": "a", "completions": ["b", ""]}, r"a response is empty \(completion 2\)"),
    (GOOD_RANKED, {"prompt": "a", "completions": ["b"]}, "two or more"),
    (
        GOOD_RANKED,
        {"prompt": [user("a"), assistant("b")], "completions": ["b", "c"]},
        "prompt ends with an assistant turn",
    ),
    ({"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}, "a response is empty"),
    ({"prompt": "a", "response": "b"}, {"prompt": " ", "response": "b"}, "prompt is empty"),
    ({"prompt": "a"}, {"prompt": 3}, "not a list of messages"),
    ({"text": "a"}, {"text": ""}, "text is empty"),
]


@pytest.mark.parametrize(("good", "bad", "reason"), STRICT)
def test_p03_in_our_own_shapes_a_bad_record_is_named_by_its_line(
    tmp_path: Path, good: dict, bad: Any, reason: str
) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl line 3 cannot be used, .*{reason}.*: fix or delete the record"):
        read(lines(tmp_path / "a.jsonl", good, good, bad, good))


# ---------------------------------------------------------------- files that cannot be read


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*none\.jsonl"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read .Permission denied.: check"):
        read(tmp_path / "a.txt")


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    for content in (b"", b"\n \n", gzip.compress(b"")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.txt is empty"):
            read(tmp_path / "a.txt")


def test_p05_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(pair("Hi")).encode() * 100)
    damaged = whole[:20] + bytes([whole[20] ^ 255]) + whole[21:]
    for content in (whole[:-9], whole[:30], whole[:2], damaged):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz is a truncated or damaged gzip file"):
            read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("junk", ["{broken", '{"messages": [', "hello", '{"a": 1} {"b": 2}', "[" * 100_000])
def test_p05_invalid_json_is_named_by_its_line(tmp_path: Path, junk: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD_TALK)}\n\n{junk}\n{json.dumps(GOOD_TALK)}\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 3 is not valid JSON .*fix or delete the line"):
        read(tmp_path / "a.jsonl")


def test_p05_a_json_file_with_a_broken_first_line_is_not_taken_for_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("junk\n")
    (tmp_path / "b").write_text('{"messages": [')
    for name in ("a.jsonl", "b"):
        with pytest.raises(UserError, match=rf"{name} line 1 is not valid JSON"):
            read(tmp_path / name)


def test_text_may_begin_with_a_bracket(tmp_path: Path) -> None:
    for text in ("[Enter Romeo]\nAh!", "{ a brace", "[{not json"):
        (tmp_path / "a.txt").write_text(text)
        assert as_texts(read(tmp_path / "a.txt")) == [text]


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("bomb-went-off"),))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.pkl", "a.jsonl.gz"])
def test_p05_binary_files_are_refused_and_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(_Bomb()), pickle.dumps({"text": "x"}, 0) + b"\0", b"\x00\x01\x02", bytes(range(256))):
        Path(name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(UserError, match=rf"{name}.*(not UTF-8|binary file)"):
            read(name)
    assert not Path("bomb-went-off").exists()


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"a\.txt line 3 is not UTF-8"):
        read(tmp_path / "a.txt")


def test_an_unknown_shape_lists_its_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl line 1 has the keys \['answer', 'question'\].*give records with"):
        read(lines(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}))


def test_a_kind_that_cannot_serve_names_the_file_and_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    text, talks = read(tmp_path / "a.txt"), read(lines(tmp_path / "talks.jsonl", GOOD_TALK))
    for serve, wanted in ((as_dialogs, "dialogs"), (as_comparisons, "comparisons"), (as_prompts, "prompts")):
        with pytest.raises(UserError, match=rf"a\.txt holds text: give a file of {wanted}, such as"):
            serve(text)
    with pytest.raises(UserError, match=r"talks\.jsonl holds dialogs: give a file of comparisons"):
        as_comparisons(talks)
    with pytest.raises(UserError, match="holds prompts: give a file of dialogs"):
        as_dialogs(read(lines(tmp_path / "asked.jsonl", {"prompt": "a"})))


# ---------------------------------------------------------------- P06: splits

texts = st.lists(st.text(min_size=1, max_size=20), max_size=40)


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.floats(0, 0.99))
def test_p06_a_record_keeps_its_side_when_the_data_grows(old: list[str], new: list[str], fraction: float) -> None:
    train, heldout = split(old, fraction)
    assert sorted(train + heldout) == sorted(old)
    grown_train, grown_heldout = split([*new, *old], fraction)
    assert set(train) <= set(grown_train) and set(heldout) <= set(grown_heldout)
    assert not {text.casefold() for text in grown_train} & {text.casefold() for text in grown_heldout}


def test_p06_no_prompt_on_both_sides_in_any_form(tmp_path: Path) -> None:
    questions = [f"Question {i}?" for i in range(200)]
    dialogs = [{"messages": [user(q), assistant(a)]} for q in questions for a in ("one", "two", "three")]
    longer = [{"messages": [user(q), assistant("one"), user("More?"), assistant(q)]} for q in questions]
    spaced = [{"messages": [user(f"  {q.upper()} "), assistant("one")]} for q in questions]
    train, heldout = split([*dialogs, *longer, *spaced], 0.3)

    def firsts(records: list[dict]) -> set[str]:
        return {record["messages"][0]["content"].strip().casefold() for record in records}

    assert not firsts(train) & firsts(heldout)
    assert firsts(train) | firsts(heldout) == {q.casefold() for q in questions}
    comparisons = [
        {"prompt": [{"role": "system", "content": "s"}, user(q)], "completions": ["a", "b"]} for q in questions
    ]
    held_prompts = {record["prompt"][1]["content"].casefold() for record in split(comparisons, 0.3)[1]}
    assert held_prompts == firsts(heldout)
    assert {prompt[0]["content"].casefold() for prompt in split([[user(q)] for q in questions], 0.3)[1]} == held_prompts


def test_p06_the_fraction_is_kept_and_the_order_too() -> None:
    train, heldout = split([{"text": f"paragraph {i}"} for i in range(5000)], 0.1)
    assert 0.08 < len(heldout) / 5000 < 0.12
    numbers = [int(record["text"].split()[1]) for record in heldout]
    assert numbers == sorted(numbers)
    assert split(["a", "b"], 0.0) == (["a", "b"], [])
    with pytest.raises(UserError, match="must be in"):
        split(["a"], 1.0)


def test_p06_records_of_a_file_split_as_records(tmp_path: Path) -> None:
    records = read(lines(tmp_path / "a.jsonl", *(pair(f"Q {i}") for i in range(50))))
    train, heldout = split(records, 0.3)
    assert (train.kind, train.path) == (records.kind, records.path)
    assert as_prompts(heldout) == split(as_prompts(records), 0.3)[1] != []
    assert len(train) + len(heldout) == 50


# ---------------------------------------------------------------- writing


def test_p05_written_records_read_back(tmp_path: Path) -> None:
    rows = [{"messages": [user("a\u2028é\n"), assistant("b")], "kind": "ideal"}] * 3
    assert write_jsonl(tmp_path / "new" / "a.jsonl", iter(rows)) == 3
    assert read(tmp_path / "new" / "a.jsonl").records == rows
    write_jsonl(tmp_path / "b.jsonl", [{"text": "half \ud800 pair"}])
    assert as_texts(read(tmp_path / "b.jsonl")) == ["half ? pair"]


def test_p05_writing_is_atomic(tmp_path: Path) -> None:
    def broken():
        yield {"text": "new"}
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "a.jsonl", broken())
    assert as_texts(read(tmp_path / "a.jsonl")) == ["old"]
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- real files, where they are

HH_DROPPED = {"a response is empty": 4, "the turns do not alternate": 4}
REAL = [
    ("hh-rlhf-harmless-base-sample.jsonl.gz", "comparisons", 1492, HH_DROPPED),
    ("tinyshakespeare.txt.gz", "text", 7222, {}),
    ("self-instruct-seed-tasks.jsonl", "dialogs", 175, {}),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
@pytest.mark.parametrize(("name", "kind", "kept", "dropped"), REAL)
def test_real_files_are_read(name: str, kind: str, kept: int, dropped: dict[str, int]) -> None:
    records = read(SHARED / name)
    assert (records.kind, len(records), records.dropped) == (kind, kept, dropped)
    assert as_texts(records)
