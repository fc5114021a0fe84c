"""Read local files into records; the format is recognised by the content.

A file holds one kind of record:

| kind          | record                                                                                |
|---------------|---------------------------------------------------------------------------------------|
| `text`        | `{"text": paragraph}`                                                                 |
| `dialogs`     | `{"messages": [turns, the last one the assistant's]}`                                 |
| `comparisons` | `{"prompt": [turns, the last one the user's], "completions": [best, …, worst]}`       |
| `unpaired`    | `{"prompt": [turns, the last one the user's], "completion": str, "label": bool}`      |
| `prompts`     | `{"prompt": [turns, the last one the user's]}`                                        |

Its format is plain text, or JSON lines (or one JSON list) of

- our own records, whose prompt may be a str, or `{"prompt", "completion" or "response"}`;
- public preference pairs `{"chosen", "rejected"}`, as in Anthropic/hh-rlhf ("\\n\\nHuman: … \\n\\nAssistant: …") or as
  lists of messages;
- instructions `{"instruction", "input", "output"}` (Alpaca) or `{"instruction", "instances"}` (Self-Instruct).

Any of these may be gzipped. A bad record in our own formats is an error with its line number, since the user can fix
it. In the public formats it is dropped and counted by reason. `public_sets` builds named public sets of any size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ..config import UserError, check
from .files import atomic, lines, parsed
from .tokenizer import Message, dialog_problem

Kind = Literal["text", "dialogs", "comparisons", "unpaired", "prompts"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records that `read` returns for a file."""

    path: Path
    kind: Kind
    records: list[Record]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> how many records

    def __len__(self) -> int:
        return len(self.records)

    @property
    def report(self) -> dict[str, Any]:
        """The counts of kept and of dropped records, the latter by reason."""
        return {"file": str(self.path), "kind": self.kind, "kept": len(self.records), "dropped": dict(self.dropped)}

    def describe(self) -> str:
        """The report as one sentence."""
        kind = {"text": "paragraphs of text"}.get(self.kind, self.kind)
        sentence = f"{self.path}: {len(self.records):,} {kind}"
        return f"{sentence}; dropped {reasons(self.dropped)}." if self.dropped else f"{sentence}, none dropped."


@dataclass(frozen=True)
class HeldOut:
    """Validation records of real data, which no stage trains on; a kind that the data does not have is empty."""

    dialogs: Sequence[Any] = ()  # message lists that end with an assistant turn
    comparisons: Sequence[Any] = ()  # prompts with ranked completions, best first
    prompts: Sequence[Any] = ()  # message lists that end with a user turn


def read(path: str | Path) -> Records:
    """Read a local file. Raises UserError with the file, the line if there is one, and the cure."""
    path = Path(path)
    text = "\n".join(line for _, line in lines(path))
    check(bool(text.strip()), f"{path} is empty: give a file with text or records.")
    rows = _json_rows(path, text)
    if rows is None:
        return Records(path, "text", [{"text": paragraph} for paragraph in _paragraphs(text)])
    return _from_rows(path, rows)


class Bad(ValueError):
    """Raised for an unusable record; the message is the reason, with details in brackets."""

    @property
    def reason(self) -> str:
        """The reason without the details, for counting."""
        return str(self).split(" (")[0]


# ---------------------------------------------------------------- text to rows


def _json_rows(path: Path, text: str) -> list[tuple[str, Any]] | None:
    """Every JSON value with its position ("line 3"), or None for plain text."""
    if re.match(r"\s*\[\s*\{", text):
        with suppress(ValueError, RecursionError):  # if it does not parse, it may be plain text
            return [(f"record {number}", row) for number, row in enumerate(json.loads(text), 1)]
    if ".json" not in path.name.lower() and re.match(r'\s*\{\s*"', text) is None:
        return None
    numbered = enumerate(text.split("\n"), 1)  # not splitlines: a JSON string may hold U+2028
    return [(f"line {number}", parsed(path, number, line)) for number, line in numbered if line.strip()]


def _paragraphs(text: str, longest: int = 4000) -> Iterator[str]:
    """The paragraphs between blank lines; those longer than `longest` characters are cut, at a line end if possible."""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
        while len(paragraph) > longest:
            cut = paragraph.rfind("\n", 0, longest) + 1 or paragraph.rfind(" ", 0, longest) + 1 or longest
            yield paragraph[:cut]
            paragraph = paragraph[cut:]
        if paragraph.strip():
            yield paragraph


# ---------------------------------------------------------------- rows to records


def _from_rows(path: Path, rows: list[tuple[str, Any]]) -> Records:
    place, first = rows[0]
    keys = set(first) if isinstance(first, dict) else set()
    shape = next((shape for shape in _SHAPES if keys >= shape[0]), None)
    check(
        shape is not None,
        f"{path} {place} has the keys {sorted(keys)}, which match no known format: give records with messages, with "
        "prompt and completions, with chosen and rejected, with instruction and output, or with text.",
    )
    needed, kind, strict, convert = shape
    items: list[Record] = []
    dropped: Counter[str] = Counter()
    for place, row in rows:
        try:
            items += use(row, needed, convert)
        except Bad as bad:
            if strict:
                raise _refusal(path, place, bad) from bad
            dropped[bad.reason] += 1
    check(bool(items), f"Every record of {path} was dropped: {reasons(dropped)}. Fix the file or give another.")
    return Records(path, kind, items, dict(dropped.most_common()))


def use(row: Any, needed: Set[str], convert: Callable[[Record], list[Record]]) -> list[Record]:
    """The records of one row, which must be an object with the `needed` keys. Raises Bad with the reason if not."""
    if not isinstance(row, dict):
        raise Bad("it is not a JSON object")
    if missing := sorted(needed - set(row)):
        raise Bad(f"it lacks {' and '.join(missing)}")
    return convert(row)


def _refusal(path: Path, place: str, bad: Bad) -> UserError:
    return UserError(f"{path} {place} cannot be used, {bad}: fix or delete the record.")


def _from_text(row: Record) -> list[Record]:
    _either(row)
    filled(row, "text")
    return [row]


def _from_messages(row: Record) -> list[Record]:
    checked(row["messages"], last="assistant")
    return [row]


def from_ranked(row: Record) -> list[Record]:
    """A comparison: a prompt (a str or messages) with two or more completions, best first."""
    prompt, completions = _prompt(row), row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise Bad("completions is not a list of two or more texts")
    for number, text in enumerate(completions, 1):
        if not isinstance(text, str) or not text.strip():
            raise Bad(f"a response is empty (completion {number})")
        if text in completions[: number - 1]:
            raise Bad(f"two completions are equal (completion {number})")
    return [{**row, "prompt": prompt}]


def _from_answered(row: Record) -> list[Record]:
    response = filled(row, "completion" if "completion" in row else "response")
    return [{"messages": [*_prompt(row), {"role": "assistant", "content": response}]}]


def _from_unpaired(row: Record) -> list[Record]:
    """A response with a label, true for a desirable one (the unpaired preferences of KTO, arXiv:2402.01306)."""
    if not isinstance(row["label"], bool):
        raise Bad("label is not true or false")
    return [{"prompt": _prompt(row), "completion": filled(row, "completion"), "label": row["label"]}]


def _either(row: Record) -> None:
    """Raise Bad for a record that is both running text and a prompt: which one is meant cannot be told."""
    if "text" in row and "prompt" in row:
        raise Bad("it has both text and prompt (keep the one to train on)")


def _from_prompt(row: Record) -> list[Record]:
    _either(row)
    return [{**row, "prompt": _prompt(row)}]


def from_pair(row: Record) -> list[Record]:
    """A public preference pair: two dialogs that differ only in the last assistant turn (arXiv:2204.05862)."""
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Bad("the prompts differ")
    if chosen == rejected:
        raise Bad("chosen equals rejected")
    return [{"prompt": chosen[:-1], "completions": [chosen[-1]["content"], rejected[-1]["content"]]}]


def _side(row: Record, key: str) -> list[Message]:
    """One side of a preference pair as checked messages that end with an assistant turn."""
    value = row.get(key)
    if isinstance(value, str) and "prompt" in row:
        value = [*_prompt(row), {"role": "assistant", "content": value}]
    elif isinstance(value, str):
        before, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.lstrip("\n"))
        if before.strip():
            raise Bad("there is text before the first turn")
        roles = {"Human": "user", "Assistant": "assistant"}
        pairs = zip(turns[::2], turns[1::2], strict=True)
        value = [{"role": roles[who], "content": said.strip()} for who, said in pairs]
    return checked(value, last="assistant")


def from_instruction(row: Record) -> list[Record]:
    """An instruction of Alpaca or Self-Instruct: its input, if there is one, follows the instruction in the prompt."""
    instances = row.get("instances", [row])
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise Bad("instances is not a list of objects")
    records = []
    for one in instances:
        instruction, given = filled(row, "instruction"), one.get("input") or ""
        prompt = f"{instruction}\n\n{given}" if given else instruction
        response = {"role": "assistant", "content": filled(one, "output")}
        records.append({"messages": [{"role": "user", "content": prompt}, response]})
    return records


def filled(row: Record, key: str) -> str:
    """The text under a key. Raises Bad if it is no text or empty."""
    value = row.get(key)
    if not isinstance(value, str):
        raise Bad(f"{key} is not a text")
    if not value.strip():
        raise Bad("a response is empty" if key in ("completion", "response", "output") else f"{key} is empty")
    return value


def _prompt(row: Record) -> list[Message]:
    """The prompt as checked messages; a str is one user turn."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": filled(row, "prompt")}]
    return checked(prompt, last="user")


def checked(messages: Any, last: str) -> list[Message]:
    """The messages. Raises Bad unless they alternate, end with a turn of role `last`, and none is empty."""
    if not isinstance(messages, list):
        raise Bad("the turns are not a list of messages")
    if problem := dialog_problem(messages):
        raise Bad(problem)
    for number, message in enumerate(messages, 1):
        if not message["content"].strip():
            what = "a response is empty" if message["role"] == "assistant" else "a turn is empty"
            raise Bad(f"{what} (turn {number})")
    if messages[-1]["role"] != last:
        what = "dialog does not end" if last == "assistant" else "prompt ends"
        raise Bad(f"the {what} with an assistant turn")
    return messages


# keys that identify a format, kind of its records, whether a bad record is an error, converter of one row
_SHAPES = (
    ({"chosen", "rejected"}, "comparisons", False, from_pair),
    ({"instruction", "output"}, "dialogs", False, from_instruction),
    ({"instruction", "instances"}, "dialogs", False, from_instruction),
    ({"messages"}, "dialogs", True, _from_messages),
    ({"prompt", "completions"}, "comparisons", True, from_ranked),
    ({"prompt", "completion", "label"}, "unpaired", True, _from_unpaired),
    ({"prompt", "completion"}, "dialogs", True, _from_answered),
    ({"prompt", "response"}, "dialogs", True, _from_answered),
    ({"prompt"}, "prompts", True, _from_prompt),
    ({"text"}, "text", True, _from_text),
)


def reasons(dropped: dict[str, int]) -> str:
    """The dropped counts by reason, as text."""
    return ", ".join(f"{count:,} because {reason}" for reason, count in dropped.items())


# ---------------------------------------------------------------- records for a stage


def as_texts(records: Records) -> list[str]:
    """Running text for the tokenizer and pretraining; a comparison gives its prompt and best completion."""
    if records.kind == "text":
        return [record["text"] for record in records.records]
    if records.kind == "prompts":
        return ["\n".join(turn["content"] for turn in record["prompt"]) for record in records.records]
    return ["\n".join(turn["content"] for turn in dialog["messages"]) for dialog in as_dialogs(records)]


def stream_texts(path: str | Path) -> Iterator[str]:
    """`as_texts(read(path))` as an iterator; JSON lines of text are streamed, so the file may be of any size."""
    path = Path(path)
    numbered = ((number, line) for number, line in lines(path) if line.strip())
    number, first = next(numbered, (0, ""))
    if not _holds_text(first):
        yield from as_texts(read(path))
        return
    for at, line in chain([(number, first)], numbered):
        try:
            yield from (record["text"] for record in use(parsed(path, at, line), {"text"}, _from_text))
        except Bad as bad:
            raise _refusal(path, f"line {at}", bad) from bad


def _holds_text(line: str) -> bool:
    """Whether the line is a record of kind `text`."""
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        return isinstance(row, dict) and next((kind for keys, kind, *_ in _SHAPES if set(row) >= keys), "") == "text"
    return False


def as_dialogs(records: Records) -> list[Record]:
    """`{"messages"}` records for SFT; of a comparison its best completion, of labelled responses the desirable ones."""
    if records.kind == "unpaired":
        good = [record for record in records.records if record["label"]]
        check(bool(good), f"{records.path} holds no response whose label is true: give some.")
        return [
            {"messages": [*record["prompt"], {"role": "assistant", "content": record["completion"]}]} for record in good
        ]
    if records.kind == "comparisons":
        return [
            {"messages": [*record["prompt"], {"role": "assistant", "content": record["completions"][0]}]}
            for record in records.records
        ]
    _must_be(records, ("dialogs",), 'dialogs, such as {"messages": […]} or {"prompt": …, "response": …}')
    return records.records


def as_comparisons(records: Records) -> list[Record]:
    """`{"prompt", "completions"}` records for the reward model, the best completion first."""
    wanted = 'comparisons, such as {"prompt": …, "completions": [best, …, worst]} or {"chosen": …, "rejected": …}'
    _must_be(records, ("comparisons",), wanted)
    return records.records


def as_preferences(records: Records) -> list[Record]:
    """`{"prompt", "completions"}` records for DPO, IPO and KTO; a single labelled response also has "labels"."""
    if records.kind == "unpaired":
        return [
            _grouped(r, {"prompt": r["prompt"], "completions": [r["completion"]], "labels": [1 if r["label"] else -1]})
            for r in records.records
        ]
    wanted = 'comparisons, such as {"prompt": …, "completions": [best, …, worst]}, or {"prompt", "completion", "label"}'
    _must_be(records, ("comparisons",), wanted)
    return records.records


def as_prompts(records: Records) -> list[Record]:
    """`{"prompt"}` records for PPO, each a list of messages that ends with a user turn; responses are removed."""
    if records.kind == "dialogs":
        return [_grouped(record, {"prompt": record["messages"][:-1]}) for record in records.records]
    _must_be(records, ("prompts", "comparisons", "unpaired"), 'prompts, such as {"prompt": …}, dialogs or comparisons')
    return [{"prompt": record["prompt"]} for record in records.records]


def _grouped(record: Record, made: Record) -> Record:
    """`made` with the group of the record that it was made from, if there is one."""
    return {**made, "group": record["group"]} if "group" in record else made


def _must_be(records: Records, kinds: Sequence[str], wanted: str) -> None:
    check(records.kind in kinds, f"{records.path} holds {records.kind}: give a file of {wanted}.")


# ---------------------------------------------------------------- splitting and writing


def split(records: Any, heldout_fraction: float) -> tuple[Any, Any]:
    """The training and the held-out part of `Records`, or of a list of records, texts or prompts, in the given order.

    The part depends only on a record's `group`, else its text, else its first user turn. So no prompt is in both
    parts, not even as the start of a longer dialog; a record stays in its part when the data grows; and a file's
    dialogs, comparisons and prompts are split alike.
    """
    if isinstance(records, Records):
        train, heldout = split(records.records, heldout_fraction)
        return replace(records, records=train), replace(records, records=heldout)
    train, heldout = [], []
    for record in records:
        (heldout if is_heldout(record, heldout_fraction) else train).append(record)
    return train, heldout


def is_heldout(record: Any, heldout_fraction: float) -> bool:
    """Whether a record, text or prompt is held out, which depends on its content alone."""
    check(0 <= heldout_fraction < 1, f"The held-out fraction {heldout_fraction} must be in [0, 1).")
    digest = hashlib.sha256(_content(record).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < heldout_fraction  # uniform in [0, 1)


def _content(record: Any) -> str:
    """The text that determines a record's part, normalised so that copies that differ in case or spacing agree."""
    if isinstance(record, dict):
        keys = ("text", "messages", "prompt")
        record = str(record["group"]) if "group" in record else next(record[key] for key in keys if key in record)
    if not isinstance(record, str):
        record = next(turn["content"] for turn in record if turn["role"] == "user")
    return " ".join(record.casefold().split())


def write_jsonl(path: str | Path, records: Iterator[Record] | Sequence[Record]) -> int:
    """Write records as JSON lines, atomically; return their count."""
    count = 0
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            count += 1
    return count
