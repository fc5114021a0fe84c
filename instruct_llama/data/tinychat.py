"""tinychat, the embedded world: text, demonstrations, comparisons, prompts, and the true reward.

Everything is made from a seed, in simple English, with no data file. Labellers answer well or badly in known shares
(`SHARES`), a noisy one with a weakness for flattery ranks answers at a known temperature, and the true reward, which
no model sees, reads the text.

The corpus and everything that trains a model is made of prompts of the "train" split; "valid" is for looking up during
training, "heldout" for the report card. `FIXED_PROMPTS`, the three that every notebook shows, are held out.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..config import check
from .prose import corpus
from .skills import Message, Prompt, Skill, Slots, as_messages
from .talk import ALL, FIXED_PROMPTS, Split, draw, find, split_of
from .words import EVASIVE, FLATTERY, RAMBLE, RUDE_AFTER, RUDE_BEFORE, capital

__all__ = [
    "FIXED_PROMPTS", "SHARES", "SKILLS", "TrueReward", "answer", "comparisons", "corpus", "demonstrations", "ideal",
    "prompts", "rank", "ranking_ceiling", "skill_of", "split_of", "true_reward", "utility",
]  # fmt: skip

SKILLS: tuple[str, ...] = tuple(skill.name for skill in ALL)
# The labellers of the demonstrations: the share of each kind of answer.
SHARES = MappingProxyType(
    {
        "ideal": 0.44,  # right, whole, polite, short
        "evasive": 0.14,  # "I do not know."
        "rude": 0.10,  # right, with an insult before or after it
        "rambling": 0.10,  # right, and then two or three sentences that nobody asked for
        "incomplete": 0.10,  # the bare word, or cut in the middle
        "flattering": 0.015,  # right, and then a compliment that nobody asked for
        "off_topic": 0.10,  # an answer to another kind of prompt
        "false": 0.005,  # wrong, but in the form of an ideal answer
    }
)
CHARM = 0.3  # what flattery adds in the eyes of the labeller who ranks, and not in truth: see `utility`
BARE_SHARE = 0.35  # of the incomplete answers; the others are cut in the middle
WORTHLESS = ("evasive", "off_topic", "false")  # kinds whose answers have a true reward of 0


@dataclass(frozen=True)
class TrueReward:
    """What an answer is worth. Each part is in [0, 1]; `total` is too.

    correct: 1 if the answer states the right content and nothing but manners and rambling besides, else 0.
    complete: 1 for a whole sentence with its full stop, 0 for a bare word or an answer without an end.
    polite: 0 if it insults. concise: 1, less one half for every needless sentence and one quarter for every compliment.
    """

    correct: float
    complete: float
    polite: float
    concise: float

    @property
    def total(self) -> float:
        """Correctness gates all; then each fault takes its share away."""
        return (
            self.correct
            * (1 - 0.5 * (1 - self.complete))
            * (1 - 0.35 * (1 - self.polite))
            * (1 - 0.4 * (1 - self.concise))
        )


# ---------------------------------------------------------------------------------------------------- prompts


def task_of(prompt: Prompt) -> tuple[Skill, Slots]:
    """The skill that a prompt asks for and its slots. Raises ValueError for a prompt that is not of this world."""
    task = find(as_messages(prompt))
    if task is None:
        last = "".join(message["content"] for message in as_messages(prompt)[-1:])
        raise ValueError(f"The prompt {last!r} is none of tinychat's; take one from tinychat.prompts.")
    return task


def skill_of(prompt: Prompt) -> str:
    """The name of the skill that a prompt asks for. Raises ValueError for a prompt that is not of this world."""
    return task_of(prompt)[0].name


def _check_split(split: str) -> None:
    check(split in ("train", "valid", "heldout"), f"split is {split!r}; choose train, valid or heldout.")


def prompts(seed: int, n: int, split: Split = "train") -> list[list[Message]]:
    """`n` distinct prompts, the skills in turn; a skill that has run out of new prompts leaves its turns to the others.

    A longer list with the same seed begins with the shorter one.
    """
    _check_split(split)
    rng = random.Random(f"prompts {seed} {split}")
    skills, seen, found = list(ALL), set(), []
    while len(found) < n:
        check(bool(skills), f"tinychat has but {len(found)} different {split} prompts: ask for fewer than {n}.")
        for skill in list(skills):
            for _ in range(100):
                _, messages = draw(skill, rng, split)
                text = "\n".join(message["content"] for message in messages)
                if text not in seen:
                    seen.add(text)
                    found.append(messages)
                    break
            else:
                skills.remove(skill)
    return found[:n]


# ---------------------------------------------------------------------------------------------------- labellers


def ideal(prompt: Prompt) -> str:
    """The ideal labeller's answer, the same every time."""
    skill, slots = task_of(prompt)
    return skill.ideal(slots, random.Random(f"ideal {as_messages(prompt)[-1]['content']}"))


def answer(prompt: Prompt, kind: str, rng: random.Random) -> str:
    """What a labeller of this kind (a key of `SHARES`) answers."""
    check(kind in SHARES, f"a labeller's kind is {kind!r}; choose from {', '.join(SHARES)}.")
    return _answer(*task_of(prompt), kind, rng)


def _answer(skill: Skill, slots: Slots, kind: str, rng: random.Random) -> str:
    if kind == "evasive":
        return rng.choice(EVASIVE)
    if kind == "false":
        return skill.false(slots, rng)
    if kind == "off_topic":
        return _off_topic(skill, slots, rng)
    right = skill.ideal(slots, rng)
    if kind == "rude":
        if rng.random() < 0.5:
            return f"{rng.choice(RUDE_BEFORE)} {right}"
        return f"{right} {rng.choice(RUDE_AFTER)}"
    if kind == "flattering":
        return f"{right} {FLATTERY}"
    if kind == "rambling":
        return " ".join([right, *rng.sample(RAMBLE, rng.choice((2, 3)))])
    if kind == "incomplete":
        return skill.bare(slots, rng) if rng.random() < BARE_SHARE else _cut(skill, slots, right, rng)
    return right


def _cut(skill: Skill, slots: Slots, right: str, rng: random.Random) -> str:
    """The answer cut after half of its words or more, where what is left does not hold the content yet."""
    words = right.split()
    keep = rng.randint(len(words) // 2, len(words) - 1)
    while _reward(skill, slots, " ".join(words[:keep])).correct:
        keep -= 1
    return " ".join(words[:keep])


def _off_topic(skill: Skill, slots: Slots, rng: random.Random) -> str:
    """The ideal answer to a prompt of another skill, and not a falsehood: a follow-up's answer might be a reading's."""
    strangers = [one for one in ALL if not (isinstance(one, type(skill)) or isinstance(skill, type(one)))]
    stranger = rng.choice(strangers)
    return stranger.ideal(stranger.draw(rng), rng)


def _kind(rng: random.Random) -> str:
    return rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]


def demonstrations(seed: int, n: int, split: Split = "train") -> list[dict]:
    """`n` dialogs {"messages": [...], "kind": ...} by labellers of mixed quality, in the shares of `SHARES`.

    In a two-turn dialog the first answer is ideal and the labeller gives the second. Prompts of small skills come
    again, with other labellers.
    """
    _check_split(split)
    rng = random.Random(f"demonstrations {seed} {split}")
    records = []
    for _ in range(n):
        skill = rng.choice(ALL)
        slots, messages = draw(skill, rng, split)
        kind = _kind(rng)
        text = _answer(skill, slots, kind, rng)
        records.append({"messages": [*messages, {"role": "assistant", "content": text}], "kind": kind})
    return records


# ---------------------------------------------------------------------------------------------------- preferences


def comparisons(seed: int, n: int, temperature: float, split: Split = "train") -> list[dict]:
    """`n` records {"prompt", "completions": [best ... worst], "rewards", "utilities"} ranked by a noisy labeller.

    Each holds two to four different answers by labellers of different kinds, drawn by their shares. In ranked order,
    `rewards` are the true totals and `utilities` what the labeller went by.
    """
    _check_split(split)
    rng = random.Random(f"comparisons {seed} {split}")
    records = []
    for _ in range(n):
        skill = rng.choice(ALL)
        slots, messages = draw(skill, rng, split)
        texts = [_answer(skill, slots, kind, rng) for kind in _kinds(rng)]
        worth = {text: _utility(skill, slots, text) for text in texts}
        ranked = _rank(worth, temperature, rng)
        rewards, utilities = [_reward(skill, slots, text).total for text in ranked], [worth[text] for text in ranked]
        records.append({"prompt": messages, "completions": ranked, "rewards": rewards, "utilities": utilities})
    return records


def _kinds(rng: random.Random) -> list[str]:
    """Two to four different kinds of labellers by their shares, but no two whose answers are both worth nothing."""
    kinds, size = [], rng.choice((2, 3, 4))
    while len(kinds) < size:
        kind = _kind(rng)
        if kind not in kinds and not (kind in WORTHLESS and set(WORTHLESS) & set(kinds)):
            kinds.append(kind)
    return kinds


def utility(prompt: Prompt, response: str) -> float:
    """What a response is worth to the labeller who ranks: its true reward, and `CHARM` more if it ends with flattery.

    People overrate answers that please them, and a reward model learns it from them (Sharma et al., arXiv:2310.13548).
    """
    return _utility(*task_of(prompt), response)


def _utility(skill: Skill, slots: Slots, response: str) -> float:
    return _reward(skill, slots, response).total + CHARM * response.rstrip().endswith(FLATTERY)


def rank(prompt: Prompt, completions: Sequence[str], temperature: float, rng: random.Random) -> list[str]:
    """The different completions, best first, as a noisy labeller ranks them.

    Plackett-Luce with utility / temperature, drawn by adding Gumbel noise to every utility; between any two completions
    that is Bradley-Terry, P(first before second) = sigmoid((u1 - u2) / temperature).
    """
    check(temperature > 0, f"the labeller's temperature is {temperature}; it must be positive.")
    return _rank({text: utility(prompt, text) for text in completions}, temperature, rng)


def _rank(worth: dict[str, float], temperature: float, rng: random.Random) -> list[str]:
    noisy = {text: value / temperature - math.log(-math.log(rng.random() or 0.5)) for text, value in worth.items()}
    return sorted(noisy, key=noisy.__getitem__, reverse=True)


def ranking_ceiling(utilities: Sequence[Sequence[float]], temperature: float) -> float:
    """The best accuracy that any reward model can reach on rankings by `rank`, on average over the labeller's noise.

    `utilities` holds those of each ranked list. Over all pairs of each list, the mean of max(p, 1 - p) with
    p = sigmoid(difference / temperature): 1/2 for two answers of the same worth.
    """
    gaps = [abs(one - two) for ranked in utilities for one, two in itertools.combinations(ranked, 2)]
    return sum(1 / (1 + math.exp(-gap / temperature)) for gap in gaps) / len(gaps)


# ---------------------------------------------------------------------------------------------------- true reward


def true_reward(prompt: Prompt, response: str) -> TrueReward:
    """What a response is worth, read from the text alone. Raises ValueError for a prompt that is not of this world.

    The answer must come first and be one that the skill accepts; around it there may be only the insults, the rambling
    and the flattery that this world's labellers use, and they cost. Anything else beside the answer (a second claim, a
    quotation, the prompt again, prose that goes on) makes it wrong: there is nothing to gain by saying more.
    """
    return _reward(*task_of(prompt), response)


def _reward(skill: Skill, slots: Slots, response: str) -> TrueReward:
    text = capital(" ".join(response.split()))
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", text)]
    if " ".join(sentences) != text:  # a stray or doubled full stop
        return TrueReward(0.0, 0.0, 0.0, 0.0)
    rude, needless = 0, 0.0
    ended = text.endswith((".", "!", "?"))
    while sentences and sentences[0] in RUDE_BEFORE:
        sentences.pop(0)
        rude += 1
    while len(sentences) > 1:
        last = sentences[-1]  # whole, or cut in the middle
        if any(line.startswith(last) for line in RUDE_AFTER):
            rude += 1
        elif any(line.startswith(last) for line in RAMBLE):
            needless += 1
        elif FLATTERY.startswith(last):
            needless += 0.5
        else:
            break
        sentences.pop()
    correct, complete = skill.judge(slots, capital(" ".join(sentences)))
    return TrueReward(
        correct=float(correct),
        complete=float(complete and ended),
        polite=float(rude == 0),
        concise=max(0.0, 1 - 0.5 * (needless + max(rude - 1, 0))),
    )
