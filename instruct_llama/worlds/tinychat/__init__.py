"""tinychat, the embedded world: text, demonstrations, comparisons, prompts, and the true reward.

Everything is generated from a seed, in simple English, without data files. Demonstrators give each kind of response
with a known probability (`demonstration_shares`). Their most frequent response is not the ideal one: they evade hard
questions and pad easy ones. A noisy labeller with a bias for flattery ranks responses of known kinds
(`COMPARISON_SHARES`) at a known temperature. The true reward, which no model sees, is computed from the text.

The corpus and all training data use prompts of the "train" split; "valid" is for validation during training, "heldout"
for the report card. `FIXED_PROMPTS`, the three that every notebook shows, are held out.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from ... import seeds
from ...config import check
from .corpus import corpus
from .labellers import (
    CHARM,
    COMPARISON_SHARES,
    COMPARISON_WEIGHTS,
    EVADED,
    KINDS,
    charm_of,
    compared,
    demonstration_shares,
    draw_kind,
    draw_kinds,
    respond,
    utility_of,
    writer_shares,
)  # fmt: skip
from .prompts import ALL, FIXED_PROMPTS, Split, draw, find, split_of
from .skills import Message, Prompt, Skill, Slots, as_messages
from .truth import TrueReward, reward_of

__all__ = [
    "CHARM", "COMPARISON_SHARES", "EVADED", "FIXED_PROMPTS", "KINDS", "SKILLS", "TrueReward", "answer", "comparisons",
    "corpus", "demonstration_shares", "demonstrations", "ideal", "prompts", "rank", "ranking_ceiling", "skill_of",
    "split_of", "true_reward", "utility", "writer_shares",
]  # fmt: skip

SKILLS: tuple[str, ...] = tuple(skill.name for skill in ALL)

# ---------------------------------------------------------------------------------------------------- prompts


def task_of(prompt: Prompt) -> tuple[Skill, Slots]:
    """The skill that a prompt asks for, and its slots. Raises ValueError for a prompt that is not of this world."""
    task = find(as_messages(prompt))
    if task is None:
        last = "".join(message["content"] for message in as_messages(prompt)[-1:])
        raise ValueError(f"The prompt {last!r} is none of tinychat's: use one from tinychat.prompts.")
    return task


def skill_of(prompt: Prompt) -> str:
    """The name of the skill that a prompt asks for. Raises ValueError for a prompt that is not of this world."""
    return task_of(prompt)[0].name


def _check_split(split: str) -> None:
    check(split in ("train", "valid", "heldout"), f"split is {split!r}: choose train, valid or heldout.")


def prompts(seed: int, n: int, split: Split = "train") -> list[list[Message]]:
    """`n` distinct prompts that cycle through the skills; a skill without new prompts is left out from then on.

    A longer list with the same seed begins with the shorter one.
    """
    _check_split(split)
    rng = seeds.python_random(seed, "prompts", split)
    skills, seen, found = list(ALL), set(), []
    while len(found) < n:
        check(bool(skills), f"tinychat has only {len(found)} different {split} prompts: ask for fewer than {n}.")
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
    """The ideal response to a prompt; deterministic."""
    skill, slots = task_of(prompt)
    return skill.ideal(slots, seeds.python_random(0, "ideal", as_messages(prompt)[-1]["content"]))


def answer(prompt: Prompt, kind: str, rng: random.Random) -> str:
    """A response of the given kind (one of `KINDS`)."""
    check(kind in KINDS, f"the kind of response is {kind!r}: choose from {', '.join(KINDS)}.")
    return respond(*task_of(prompt), kind, rng)


def demonstrations(seed: int, n: int, split: Split = "train") -> list[dict]:
    """`n` dialogs {"messages": [...], "kind": ...} by demonstrators, with kinds drawn by `demonstration_shares`.

    In a two-turn dialog the first response is ideal and the demonstrator gives the second. Prompts of skills with few
    prompts repeat, with other responses.
    """
    _check_split(split)
    rng = seeds.python_random(seed, "demonstrations", split)
    records = []
    for _ in range(n):
        skill = rng.choice(ALL)
        slots, messages = draw(skill, rng, split)
        kind = draw_kind(demonstration_shares(skill.name), rng)
        text = respond(skill, slots, kind, rng)
        records.append({"messages": [*messages, {"role": "assistant", "content": text}], "kind": kind})
    return records


# ---------------------------------------------------------------------------------------------------- preferences


def comparisons(seed: int, n: int, temperature: float, split: Split = "train") -> list[dict]:
    """`n` records {"prompt", "completions": [best ... worst], "kinds", "rewards", "utilities"} by a noisy labeller.

    Each has three to five different responses of different kinds, drawn by `COMPARISON_SHARES`, to a prompt of a skill
    drawn by `COMPARISON_WEIGHTS`. `kinds`, `rewards` (the true totals) and `utilities` (the labeller's) are in the
    order of `completions`.
    """
    _check_split(split)
    rng = seeds.python_random(seed, "comparisons", split)
    weights, records = [COMPARISON_WEIGHTS[skill.name] for skill in ALL], []
    for _ in range(n):
        skill = rng.choices(ALL, weights)[0]
        slots, messages = draw(skill, rng, split)
        kind_of = {compared(skill, slots, kind, rng): kind for kind in draw_kinds(rng)}
        totals = {text: reward_of(skill, slots, text).total for text in kind_of}
        utilities = {text: total + charm_of(text) for text, total in totals.items()}
        ranked = _rank(utilities, temperature, rng)
        records.append(
            {
                "prompt": messages,
                "completions": ranked,
                "kinds": [kind_of[text] for text in ranked],
                "rewards": [totals[text] for text in ranked],
                "utilities": [utilities[text] for text in ranked],
            }
        )
    return records


def utility(prompt: Prompt, response: str) -> float:
    """The utility of a response to the ranking labeller: its true reward, plus `CHARM` if it flatters.

    Human preference data favours sycophantic responses, and reward models learn this (Sharma et al., arXiv:2310.13548).
    """
    return utility_of(*task_of(prompt), response)


def rank(prompt: Prompt, completions: Sequence[str], temperature: float, rng: random.Random) -> list[str]:
    """The distinct completions as a noisy labeller ranks them, best first.

    The ranking is a Plackett-Luce sample with logits utility / temperature, drawn by adding Gumbel noise. For any two
    completions this is Bradley-Terry: P(first before second) = sigmoid((u1 - u2) / temperature).
    """
    check(temperature > 0, f"the labeller's temperature is {temperature}: it must be positive.")
    return _rank({text: utility(prompt, text) for text in completions}, temperature, rng)


def _rank(worth: dict[str, float], temperature: float, rng: random.Random) -> list[str]:
    noisy = {text: value / temperature - math.log(-math.log(rng.random() or 0.5)) for text, value in worth.items()}
    return sorted(noisy, key=noisy.__getitem__, reverse=True)


def ranking_ceiling(utilities: Sequence[Sequence[float]], temperature: float) -> float:
    """The highest expected pair accuracy of any reward model on rankings by `rank`, given the labeller's noise.

    `utilities` has one list per comparison. The result is the mean, over all pairs within a list, of max(p, 1 - p) with
    p = sigmoid(difference / temperature): 1/2 for two responses of equal utility.
    """
    gaps = [abs(one - two) for ranked in utilities for one, two in itertools.combinations(ranked, 2)]
    return sum(1 / (1 + math.exp(-gap / temperature)) for gap in gaps) / len(gaps)


# ---------------------------------------------------------------------------------------------------- true reward


def true_reward(prompt: Prompt, response: str) -> TrueReward:
    """The true reward of a response, from its text alone. Raises ValueError for a prompt that is not of this world.

    The response must state an answer that the skill accepts. Besides it, only this world's insults, rambling and,
    before a full stop, flattery are allowed, and each lowers the reward. Any other text (a second claim, a quotation,
    the prompt, further prose) makes the response incorrect: nothing is gained by saying more.
    """
    return reward_of(*task_of(prompt), response)
