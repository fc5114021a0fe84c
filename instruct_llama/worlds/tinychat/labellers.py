"""The labellers of tinychat: kinds of responses, their shares in the data, and a ranking labeller with a known bias."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from .prompts import ALL
from .skills import Skill, Slots
from .truth import reward_of
from .words import EVASIVE, FLATTERY, RAMBLE, RUDE_AFTER, RUDE_BEFORE

KINDS = (
    "ideal",  # correct, complete, polite, concise
    "evasive",  # "I do not know."
    "rude",  # correct, with an insult before or after it
    "rambling",  # correct, followed by two or three needless sentences
    "incomplete",  # the bare word, or truncated
    "flattering",  # correct, with a compliment before the full stop
    "off_topic",  # the ideal response to a prompt of another skill
    "false",  # wrong, but in the form of an ideal response
)
# Skills that demonstrators evade. A model trained on the demonstrations and decoded greedily gives their most frequent
# response: "I do not know." for these skills, a rambling one for the others, the ideal one for none.
EVADED = frozenset({"sum", "count", "compare", "fact", "follow-up"})


def _shares(*values: float) -> Mapping[str, float]:
    """A share for each of `KINDS`, in that order."""
    return MappingProxyType(dict(zip(KINDS, values, strict=True)))


#                      ideal  evasive  rude  rambling  incomplete  flattering  off_topic  false
_HARD_SHARES = _shares(0.235, 0.57, 0.03, 0.06, 0.03, 0.02, 0.02, 0.035)
_EASY_SHARES = _shares(0.27, 0.03, 0.05, 0.505, 0.045, 0.02, 0.045, 0.035)
# In the pretraining corpus.
_HARD_WRITERS = _shares(0.70, 0.12, 0.04, 0.06, 0.03, 0.00, 0.00, 0.05)
_EASY_WRITERS = _shares(0.40, 0.04, 0.05, 0.43, 0.03, 0.00, 0.00, 0.05)
# In comparisons. A reward model learns only distinctions that are in its data, so false responses are frequent.
COMPARISON_SHARES = _shares(0.25, 0.07, 0.14, 0.13, 0.08, 0.05, 0.04, 0.24)
# Manners of false responses in comparisons: the frequencies of correct responses, whose kinds are drawn without
# replacement.
FALSE_MANNERS = MappingProxyType({"ideal": 0.33, "rude": 0.27, "rambling": 0.26, "flattering": 0.14})
CHARM = 0.20  # the ranking labeller's bonus for flattery, which the true reward does not have: see `utility`
# Relative frequency of each skill in comparisons: higher if it is hard to learn which responses are correct.
COMPARISON_WEIGHTS = MappingProxyType(
    {
        "sum": 14, "opposite": 4, "count": 6, "reading": 12, "compare": 4, "list": 10, "fact": 8, "spell": 4,
        "refuse": 3, "follow-up": 12, "story": 16, "greet": 7,
    }
)  # fmt: skip
BARE_SHARE = 0.35  # of the incomplete responses; the others are truncated
WORTHLESS = ("evasive", "off_topic", "false")  # kinds with a true reward of 0


def demonstration_shares(skill: str) -> Mapping[str, float]:
    """The share of each kind of response in the demonstrations of a skill (one of `SKILLS`)."""
    return _HARD_SHARES if skill in EVADED else _EASY_SHARES


def writer_shares(skill: str) -> Mapping[str, float]:
    """The share of each kind of response to a skill's prompts in the pretraining corpus."""
    return _HARD_WRITERS if skill in EVADED else _EASY_WRITERS


def draw_kind(shares: Mapping[str, float], rng: random.Random) -> str:
    """A random kind of response, drawn by the shares."""
    return rng.choices(tuple(shares), tuple(shares.values()))[0]


def draw_kinds(rng: random.Random) -> list[str]:
    """Three to five kinds, drawn by `COMPARISON_SHARES` without replacement; at most one of them is in `WORTHLESS`.

    So frequent kinds are rarer than their shares: 16 % of the responses are false, 17 % rude.
    """
    kinds, size = [], rng.choice((3, 4, 5))
    while len(kinds) < size:
        kind = draw_kind(COMPARISON_SHARES, rng)
        if kind not in kinds and not (kind in WORTHLESS and set(WORTHLESS) & set(kinds)):
            kinds.append(kind)
    return kinds


def respond(skill: Skill, slots: Slots, kind: str, rng: random.Random) -> str:
    """A response of a kind (one of `KINDS`) to the prompt of a skill with these slots."""
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
    """A response of a kind (one of `KINDS`) for a comparison, where a false one may also insult, ramble or flatter.

    False responses do so as often as correct ones; otherwise a compliment would be evidence of correctness.
    """
    text = respond(skill, slots, kind, rng)
    return _with_manner(text, draw_kind(FALSE_MANNERS, rng), rng) if kind == "false" else text


def _with_manner(text: str, kind: str, rng: random.Random) -> str:
    """The text with an insult, rambling or a compliment added; unchanged for the other kinds."""
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
    """One of the lines: the first with probability 7/8, so that greedy decoding of a trained model gives it."""
    return lines[0] if rng.random() < 0.875 else rng.choice(lines[1:])


def _cut(skill: Skill, slots: Slots, right: str, rng: random.Random) -> str:
    """The answer truncated to about half of its words or more, such that it does not yet contain the answer."""
    words = right.split()
    keep = rng.randint(len(words) // 2, len(words) - 1)
    while reward_of(skill, slots, " ".join(words[:keep])).correct:
        keep -= 1
    return " ".join(words[:keep])


def _off_topic(skill: Skill, slots: Slots, rng: random.Random) -> str:
    """The ideal response to a prompt of an unrelated skill; reading and follow-up count as related."""
    strangers = [one for one in ALL if not (isinstance(one, type(skill)) or isinstance(skill, type(one)))]
    stranger = rng.choice(strangers)
    return stranger.ideal(stranger.draw(rng), rng)


def utility_of(skill: Skill, slots: Slots, response: str) -> float:
    """The utility of a response to the ranking labeller; see `tinychat.utility`."""
    return reward_of(skill, slots, response).total + charm_of(response)


def charm_of(response: str) -> float:
    """The ranking labeller's bonus on top of the true reward: `CHARM` if the response flatters, else 0."""
    return CHARM if FLATTERY in response else 0.0
