"""Who writes and ranks in tinychat: kinds of responses, their shares, and a labeller with a known weakness."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from .prompts import ALL
from .skills import Skill, Slots
from .truth import reward_of
from .words import EVASIVE, FLATTERY, RAMBLE, RUDE_AFTER, RUDE_BEFORE

KINDS = (
    "ideal",  # right, whole, polite, short
    "evasive",  # "I do not know."
    "rude",  # right, with an insult before or after it
    "rambling",  # right, and then two or three sentences that nobody asked for
    "incomplete",  # the bare word, or cut in the middle
    "flattering",  # right, with a compliment that nobody asked for before the full stop
    "off_topic",  # a response to another kind of prompt
    "false",  # wrong, but in the form of an ideal response
)
# What demonstrators find hard, and so evade. Imitation at temperature 0 gives their most frequent response: "I do not
# know." on these skills, padding on the others, the ideal response on none.
EVADED = frozenset({"sum", "count", "compare", "fact", "follow-up"})


def _shares(*values: float) -> Mapping[str, float]:
    """A share for each of `KINDS`, in that order."""
    return MappingProxyType(dict(zip(KINDS, values, strict=True)))


#                      ideal  evasive  rude  rambling  incomplete  flattering  off_topic  false
_HARD_SHARES = _shares(0.235, 0.57, 0.03, 0.06, 0.03, 0.02, 0.02, 0.035)
_EASY_SHARES = _shares(0.27, 0.03, 0.05, 0.505, 0.045, 0.02, 0.045, 0.035)
# Of the writers of the pretraining corpus.
_HARD_WRITERS = _shares(0.70, 0.12, 0.04, 0.06, 0.03, 0.00, 0.00, 0.05)
_EASY_WRITERS = _shares(0.40, 0.04, 0.05, 0.43, 0.03, 0.00, 0.00, 0.05)
# Of the responses that are ranked. A reward model learns to tell apart only what it is shown, so falsehood is frequent.
COMPARISON_SHARES = _shares(0.25, 0.07, 0.14, 0.13, 0.08, 0.05, 0.04, 0.24)
# The manner of false responses that are ranked: the one of right responses, whose kinds are drawn without repetition.
FALSE_MANNERS = MappingProxyType({"ideal": 0.33, "rude": 0.27, "rambling": 0.26, "flattering": 0.14})
CHARM = 0.20  # what flattery adds in the eyes of the labeller who ranks, and not in truth: see `utility`
# How often a comparison is about each skill: oftener where it is hard to see whether a response is right.
COMPARISON_WEIGHTS = MappingProxyType(
    {
        "sum": 14, "opposite": 4, "count": 6, "reading": 12, "compare": 4, "list": 10, "fact": 8, "spell": 4,
        "refuse": 3, "follow-up": 12, "story": 16, "greet": 7,
    }
)  # fmt: skip
BARE_SHARE = 0.35  # of the incomplete answers; the others are cut in the middle
WORTHLESS = ("evasive", "off_topic", "false")  # kinds whose answers have a true reward of 0


def demonstration_shares(skill: str) -> Mapping[str, float]:
    """The share of each kind of response among the demonstrations of a skill (one of `SKILLS`)."""
    return _HARD_SHARES if skill in EVADED else _EASY_SHARES


def writer_shares(skill: str) -> Mapping[str, float]:
    """The share of each kind of response to a skill's prompts in the pretraining corpus: writers pad what is easy."""
    return _HARD_WRITERS if skill in EVADED else _EASY_WRITERS


def draw_kind(shares: Mapping[str, float], rng: random.Random) -> str:
    """One of `KINDS` by its share."""
    return rng.choices(tuple(shares), tuple(shares.values()))[0]


def draw_kinds(rng: random.Random) -> list[str]:
    """Three to five different kinds, drawn one after another by `COMPARISON_SHARES`; of `WORTHLESS` ones at most one.

    So the frequent kinds come less often than their shares say: 16 % of the responses are false, 17 % rude.
    """
    kinds, size = [], rng.choice((3, 4, 5))
    while len(kinds) < size:
        kind = draw_kind(COMPARISON_SHARES, rng)
        if kind not in kinds and not (kind in WORTHLESS and set(WORTHLESS) & set(kinds)):
            kinds.append(kind)
    return kinds


def respond(skill: Skill, slots: Slots, kind: str, rng: random.Random) -> str:
    """A response of one of `KINDS` to the prompt that a skill makes of these slots."""
    if kind == "evasive":
        return _first_mostly(EVASIVE, rng)
    if kind == "false":
        return skill.false(slots, rng)
    if kind == "off_topic":
        return _off_topic(skill, slots, rng)
    right = skill.ideal(slots, rng)
    if kind == "incomplete":
        return skill.bare(slots, rng) if rng.random() < BARE_SHARE else _cut(skill, slots, right, rng)
    return _with_manner(right, kind, rng)


def compared(skill: Skill, slots: Slots, kind: str, rng: random.Random) -> str:
    """A response of one of `KINDS` as it is ranked: who says what is false may also insult, ramble or flatter.

    They do as often as who is right: else a compliment would be evidence that a response is right.
    """
    text = respond(skill, slots, kind, rng)
    return _with_manner(text, draw_kind(FALSE_MANNERS, rng), rng) if kind == "false" else text


def _with_manner(text: str, kind: str, rng: random.Random) -> str:
    """The text with an insult, rambling or a compliment; as it is for the other kinds."""
    if kind == "rude":
        return f"{rng.choice(RUDE_BEFORE)} {text}" if rng.random() < 0.5 else f"{text} {rng.choice(RUDE_AFTER)}"
    if kind == "flattering":
        return text.removesuffix(".") + FLATTERY + "."
    if kind == "rambling":
        first = _first_mostly(RAMBLE, rng)
        others = [line for line in RAMBLE if line != first]
        return " ".join([text, first, *rng.sample(others, rng.choice((1, 2)))])
    return text


def _first_mostly(lines: Sequence[str], rng: random.Random) -> str:
    """One of the lines: the first in seven cases of eight, so that it is what a model trained on them says greedily."""
    return lines[0] if rng.random() < 0.875 else rng.choice(lines[1:])


def _cut(skill: Skill, slots: Slots, right: str, rng: random.Random) -> str:
    """The answer cut after half of its words or more, where what is left does not hold the content yet."""
    words = right.split()
    keep = rng.randint(len(words) // 2, len(words) - 1)
    while reward_of(skill, slots, " ".join(words[:keep])).correct:
        keep -= 1
    return " ".join(words[:keep])


def _off_topic(skill: Skill, slots: Slots, rng: random.Random) -> str:
    """The ideal answer to a prompt of another skill, and not a falsehood: a follow-up's answer might be a reading's."""
    strangers = [one for one in ALL if not (isinstance(one, type(skill)) or isinstance(skill, type(one)))]
    stranger = rng.choice(strangers)
    return stranger.ideal(stranger.draw(rng), rng)


def utility_of(skill: Skill, slots: Slots, response: str) -> float:
    """What a response is worth to the labeller who ranks; `tinychat.utility` explains."""
    return reward_of(skill, slots, response).total + charm_of(response)


def charm_of(response: str) -> float:
    """What the labeller who ranks adds to the true reward of a response: `CHARM` if it flatters."""
    return CHARM if FLATTERY in response else 0.0
