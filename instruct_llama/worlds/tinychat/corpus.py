"""The pretraining corpus of the embedded world."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import MappingProxyType

from ... import seeds
from . import words
from .labellers import draw_kind, respond, writer_shares
from .prompts import BY_NAME, READINGS, draw
from .words import RAMBLE, RUDE_AFTER, RUDE_BEFORE, capital

# Relative frequency of each skill in conversations. Hard skills are more frequent.
CORPUS_WEIGHTS = MappingProxyType(
    {
        "sum": 14, "opposite": 8, "count": 11, "reading": 7, "compare": 12, "list": 4, "fact": 8, "spell": 4,
        "refuse": 9, "follow-up": 9, "story": 10, "greet": 4,
    }
)  # fmt: skip
# Formats of a conversation. There are many, so that answering generalises to a new one, the chat template. They have no
# quotation marks, so that words are the same tokens as in a chat. Speakers have no names, so that every name in the
# text is one to copy.
FRAMES = (
    "The boy asked: {q} The girl said: {a}",
    "The child asked: {q} The teacher said: {a}",
    "Question: {q} Answer: {a}",
    "She asked: {q} He said: {a}",
    "Q: {q} A: {a}",
    "- {q} - {a}",
    "{q} {a}",
)


def corpus(seed: int, n_chars: int) -> Iterator[str]:
    """Yield short paragraphs of English for pretraining until they have at least `n_chars` characters in all.

    Four fifths are conversations in prose with prompts of the "train" split, almost a third of them about a single
    statement. The rest is stories, descriptions, facts, series and small talk. The kinds of responses follow
    `writer_shares`, so not all are ideal. There is no chat template: pretraining teaches language, not the chat format.
    """
    rng = seeds.python_random(seed, "corpus")
    writers = (_conversation, _lookup, _story, _description, _statements, _series, _small_talk)
    given = 0
    while given < n_chars:
        paragraph = rng.choices(writers, (56, 24, 2, 4, 6, 4, 4))[0](rng)
        given += len(paragraph) + 1
        yield paragraph


def _conversation(rng: random.Random) -> str:
    skill = BY_NAME[rng.choices(tuple(CORPUS_WEIGHTS), tuple(CORPUS_WEIGHTS.values()))[0]]
    slots, messages = draw(skill, rng, "train")
    response = respond(skill, slots, draw_kind(writer_shares(skill.name), rng), rng)
    turns = [message["content"] for message in messages] + [response]
    frame = rng.choice(FRAMES)
    return " ".join(frame.format(q=q, a=a) for q, a in zip(turns[::2], turns[1::2], strict=True))


def _lookup(rng: random.Random) -> str:
    """One statement and its question, the easiest case of copying an answer from the prompt.

    With two or three statements a small model takes long to learn copying, and with some seeds never does. Without
    these paragraphs (and with windows that cut paragraphs), seed 3 of the laptop preset still guessed colours after
    1,800 steps; with two thirds of their present number, it had learnt them by step 1,500.
    """
    said, asked, subjects, values = rng.choice(READINGS)
    x = rng.choice(subjects)
    statement = capital(said.format(x=x, a=rng.choice(values))) + "."
    return rng.choice(FRAMES).format(q=f"{statement} {capital(asked.format(x=x))}", a=statement)


def _story(rng: random.Random) -> str:
    return BY_NAME["story"].tell(rng.choice(words.ANIMALS), rng.choice(words.THINGS), rng)


def _description(rng: random.Random) -> str:
    n, c, t, place = map(rng.choice, (words.NAMES, words.COLOURS, words.THINGS, words.PLACES))
    lines = [f"{n} has a {t}.", f"The {t} looks {c}.", f"{n} took the {t} to the {place}.", *rng.sample(RAMBLE, 2)]
    return " ".join(lines[: rng.randint(3, 5)])


def _statements(rng: random.Random) -> str:
    skills = [BY_NAME[name] for name in ("sum", "opposite", "compare", "list", "fact", "spell")]
    return " ".join(skill.ideal(skill.draw(rng), rng) for skill in rng.sample(skills, 3))


def _series(rng: random.Random) -> str:
    series = rng.choice((words.NUMBERS, words.NUMBERS, words.DAYS, words.MONTHS))
    start = rng.randrange(len(series) - 4)
    return capital(", ".join(series[start : start + rng.randint(4, 10)])) + "."


def _small_talk(rng: random.Random) -> str:
    return f"The boy said: {rng.choice(words.EVASIVE)} The girl said: {rng.choice(RUDE_BEFORE + RUDE_AFTER + RAMBLE)}"
