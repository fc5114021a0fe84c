"""Converters from the rows of public data sets, in their published format, to our records.

Each converter reads one row and returns its records, or raises `Bad` with the reason for dropping it. A dialog with one
bad turn is dropped whole. `passages` and `situations` first regroup rows that hold part of a dialog, or several, into
rows of one dialog each.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import groupby
from typing import Any

from .sources import Bad, Record, checked, filled, from_instruction, from_ranked
from .tokenizer import Message

UNANSWERABLE = "The passage does not say."


def from_text(row: Record) -> list[Record]:
    """A story or a web page (TinyStories, arXiv:2305.07759; FineWeb-Edu, arXiv:2406.17557): its text."""
    text = filled(row, "text").strip()
    if row.get("cut"):
        raise Bad("the text is cut off at the end of the file")
    return [{"text": text}]


def from_dolly(row: Record) -> list[Record]:
    """Dolly: an instruction, a context that may be empty, and a response written by a person."""
    return from_instruction({**row, "input": row["context"], "output": row["response"]})


# ---------------------------------------------------------------- dialogs


def _alternating(said: Iterable[str]) -> list[Message]:
    """The texts as alternating user and assistant turns, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def passages(rows: Iterable[Any]) -> Iterator[Any]:
    """`{"context", "qas"}` rows of SQuAD 2.0 (arXiv:1806.03822), from one row per question or the nested file."""
    for context, group in groupby(rows, lambda row: row.get("context") if isinstance(row, dict) else None):
        if context is not None:
            yield {"context": context, "qas": list(group)}
            continue
        for row in group:
            articles = row.get("data") if isinstance(row, dict) else None
            for article in articles if isinstance(articles, list) else [row]:
                paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
                yield from paragraphs if isinstance(paragraphs, list) else [article]


def from_passage(row: Record) -> list[Record]:
    """One dialog about a passage, which is the system message, so that a shortened dialog keeps it.

    Questions that the passage does not answer get `UNANSWERABLE`.
    """
    if not isinstance(row["qas"], list) or not all(isinstance(qa, dict) for qa in row["qas"]):
        raise Bad("qas is not a list of questions")
    said = [text for qa in row["qas"] for text in (filled(qa, "question").strip(), _passage_answer(qa))]
    passage = filled(row, "context").strip()
    messages = checked([{"role": "system", "content": passage}, *_alternating(said)], last="assistant")
    return [{"messages": messages, "group": passage}]


def _passage_answer(qa: Record) -> str:
    """The first reference answer, or `UNANSWERABLE` if there is none."""
    given = qa.get("answers")
    if isinstance(given, list):  # the official file; the hub's rows hold {"text": [...]}
        given = {"text": [answer.get("text") if isinstance(answer, dict) else None for answer in given]}
    texts = given.get("text") if isinstance(given, dict) else None
    if not isinstance(texts, list):
        raise Bad("answers is not a list of texts")
    return filled({"output": texts[0]}, "output").strip() if texts else UNANSWERABLE


def situations(rows: Iterable[Any]) -> Iterator[Any]:
    """The dialogs of Commonsense-Dialogues' official files, which are objects `{"1": dialog, "2": dialog, …}`."""
    for row in rows:
        nested = isinstance(row, dict) and row and all(isinstance(value, dict) for value in row.values())
        yield from row.values() if nested else [row]


def from_situation(row: Record) -> list[Record]:
    """A dialog of Commonsense-Dialogues (arXiv:2109.06427) between a person (user) and a friend (assistant).

    The situation is the system message. It is also the split group, since several dialogs share one situation. A last
    user turn without a response is removed: it has no training target. A dialog with a turn that is empty or not a
    text, even that last one, is dropped.
    """
    turns = row["turns"]
    if not isinstance(turns, list):
        raise Bad("turns is not a list of texts")
    said = [filled({"turn": turn}, "turn").strip() for turn in turns]
    situation = filled(row, "context").strip()
    about = f"You are talking with {filled(row, 'speaker').strip()}, a friend. {situation}"
    answered = _alternating(said[: len(said) // 2 * 2])
    messages = checked([{"role": "system", "content": about}, *answered], last="assistant")
    return [{"messages": messages, "group": situation}]


# ---------------------------------------------------------------- comparisons


def from_votes(row: Record, most: int = 8) -> list[Record]:
    """A Stack Exchange question with its 2 to 8 best answers, best first by votes (arXiv:2112.00861, section 4.1).

    Answers with equal scores cannot be ranked, so only the first of each score is kept.
    """
    answers = row["answers"]
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        raise Bad("answers is not a list of objects")
    by_score: dict[int, str] = {}
    for one in answers:
        if not isinstance(one.get("pm_score"), int):
            raise Bad("pm_score is not a number")
        by_score.setdefault(one["pm_score"], filled(one, "text"))
    if len(by_score) < 2:
        raise Bad("fewer than two answers differ in score")
    best = [plain(by_score[score]) for score in sorted(by_score, reverse=True)[:most]]
    return from_ranked({"prompt": plain(filled(row, "question")), "completions": best})


def plain(html: str) -> str:
    """The text of HTML: a blank line between paragraphs, one line per list item, code unchanged."""
    page = _Page()
    page.feed(html)
    page.close()
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", "".join(page.parts))).strip()


class _Page(HTMLParser):
    """Collects the text of HTML; outside <pre>, a run of white space becomes one space."""

    BREAKS = {
        **dict.fromkeys(("p", "pre", "blockquote", "ul", "ol", "hr", "h1", "h2", "h3", "h4", "table", "div"), "\n\n"),
        "li": "\n- ", "br": "\n", "tr": "\n", "td": " ", "th": " ",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.in_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append(self.BREAKS.get(tag, ""))
        self.in_pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self.parts.append("\n\n" if self.BREAKS.get(tag) == "\n\n" else "")
        self.in_pre = max(0, self.in_pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.in_pre:
            data = re.sub(r"\s+", " ", data)
            before = next((part for part in reversed(self.parts) if part), "\n")
            data = data.lstrip() if before[-1].isspace() else data
        self.parts.append(data)


# ---------------------------------------------------------------- generated sums

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SIGNS = {"+": "plus", "-": "minus", "×": "times"}


def in_words(number: int) -> str:
    """A number from 0 to 199 in words."""
    if number >= 100:
        return "one hundred" + (f" and {in_words(number - 100)}" if number > 100 else "")
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def sums(seed: int) -> Iterator[Record]:
    """Every sum and difference of 0 to 99 and every product up to 12 times 12 once, shuffled, in digits or words.

    Each appears once, because 2 + 3 and 3 + 2 on both sides of the split would leak the answer.
    """
    pairs = [(a, b) for a in range(100) for b in range(a + 1)]
    todo = [(a, sign, b) for sign in _SIGNS for a, b in pairs if sign != "×" or a <= 12]
    rng = random.Random(f"sums {seed}")
    rng.shuffle(todo)
    for a, sign, b in todo:
        a, b = (b, a) if sign != "-" and rng.random() < 0.5 else (a, b)
        yield {"a": a, "sign": sign, "b": b, "words": rng.random() < 0.5}


def from_sum(row: Record) -> list[Record]:
    """A sum as a dialog of question and answer, both in digits or both in words."""
    a, sign, b = row["a"], row["sign"], row["b"]
    result = {"+": a + b, "-": a - b, "×": a * b}[sign]
    if row["words"]:
        task = f"{in_words(a)} {_SIGNS[sign]} {in_words(b)}"
        said = [f"What is {task}?", f"{task.capitalize()} is {in_words(result)}."]
    else:
        said = [f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {result}"]
    return [{"messages": _alternating(said)}]
