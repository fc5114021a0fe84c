"""The running text that a model of the embedded world is pretrained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import MappingProxyType

from .talk import BY_NAME, draw
from .words import (
    ANIMALS,
    COLOURS,
    DAYS,
    EVASIVE,
    MONTHS,
    NAMES,
    NUMBERS,
    PLACES,
    RAMBLE,
    RUDE_AFTER,
    RUDE_BEFORE,
    THINGS,
    capital,
)

# How often a conversation is about each skill. The hard ones come oftener.
CORPUS_WEIGHTS = MappingProxyType(
    {
        "sum": 10, "take-away": 10, "opposite": 6, "count": 11, "reading": 15, "compare": 8, "list": 4, "fact": 7,
        "spell": 4, "refuse": 4, "follow-up": 11, "story": 5, "greet": 4, "next": 8,
    }
)  # fmt: skip
# How a conversation is told. Without quotation marks, so that a word is the same token here and in a chat; the speakers
# have no names, so that a name is worth copying.
FRAMES = (
    "The boy asked: {q} The girl said: {a}",
    "The child asked: {q} The teacher said: {a}",
    "Question: {q} Answer: {a}",
)


def corpus(seed: int, n_chars: int) -> Iterator[str]:
    """Running English for pretraining, a short paragraph at a time, until `n_chars` characters have been given.

    Three quarters are conversations told as prose, which carry the skills of the "train" prompts; the rest is stories,
    descriptions, facts, series and a little small talk. There is no chat template: text gives language, not manners.
    """
    rng = random.Random(f"corpus {seed}")
    writers = (_conversation, _story, _description, _statements, _series, _small_talk)
    given = 0
    while given < n_chars:
        paragraph = rng.choices(writers, (76, 5, 6, 6, 4, 3))[0](rng)
        given += len(paragraph) + 1
        yield paragraph


def _conversation(rng: random.Random) -> str:
    skill = BY_NAME[rng.choices(tuple(CORPUS_WEIGHTS), tuple(CORPUS_WEIGHTS.values()))[0]]
    slots, messages = draw(skill, rng, "train")
    turns = [message["content"] for message in messages] + [skill.ideal(slots, rng)]
    frame = rng.choice(FRAMES)
    return " ".join(frame.format(q=q, a=a) for q, a in zip(turns[::2], turns[1::2], strict=True))


def _story(rng: random.Random) -> str:
    return BY_NAME["story"].tell(rng.choice(ANIMALS), rng.choice(THINGS), rng)


def _description(rng: random.Random) -> str:
    n, c, t, place = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(THINGS), rng.choice(PLACES)
    lines = [f"{n} has a {t}.", f"The {t} is {c}.", f"{n} took the {t} to the {place}.", *rng.sample(RAMBLE, 2)]
    return " ".join(lines[: rng.randint(3, 5)])


def _statements(rng: random.Random) -> str:
    skills = [BY_NAME[name] for name in ("sum", "take-away", "opposite", "compare", "list", "fact", "spell", "next")]
    return " ".join(skill.ideal(skill.draw(rng), rng) for skill in rng.sample(skills, 3))


def _series(rng: random.Random) -> str:
    series = rng.choice((NUMBERS, NUMBERS, DAYS, MONTHS))
    start = rng.randrange(len(series) - 4)
    return capital(", ".join(series[start : start + rng.randint(4, 10)])) + "."


def _small_talk(rng: random.Random) -> str:
    return f"The boy said: {rng.choice(EVASIVE)} The girl said: {rng.choice(RUDE_BEFORE + RUDE_AFTER + RAMBLE)}"
