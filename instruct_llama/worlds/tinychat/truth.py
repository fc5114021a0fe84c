"""tinychat's true reward, which no model sees: it reads the text of a response and knows the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .skills import Skill, Slots
from .words import FLATTERY, RAMBLE, RUDE_AFTER, RUDE_BEFORE, capital

# Where a sentence ends, or another compliment follows; one cut in the middle stays, and makes the response wrong.
COMPLIMENT = re.compile(rf"{re.escape(FLATTERY)}(?=\.|{re.escape(FLATTERY)}|$)")


@dataclass(frozen=True)
class TrueReward:
    """What an answer is worth. Each part is in [0, 1]; `total` is too.

    correct: 1 if the answer states the right content and nothing but manners and rambling besides, else 0.
    complete: 1 for a whole sentence with its full stop, 0 for a bare word or an answer without an end.
    polite: 0 if it insults. concise: at least 0; 1, less one half for every needless sentence
    and insult after the first, less one quarter for every compliment.
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


def reward_of(skill: Skill, slots: Slots, response: str) -> TrueReward:
    """The true reward of a response to a skill's prompt with these slots; `tinychat.true_reward` explains."""
    text = capital(" ".join(response.split()))
    text, compliments = COMPLIMENT.subn("", text)
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", text)]
    if " ".join(sentences) != text:  # a stray or doubled full stop
        return TrueReward(0.0, 0.0, 0.0, 0.0)
    rude, needless = 0, 0
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
        else:
            break
        sentences.pop()
    correct, complete = skill.judge(slots, capital(" ".join(sentences)))
    return TrueReward(
        correct=float(correct),
        complete=float(complete and ended),
        polite=float(rude == 0),
        concise=max(0.0, 1 - 0.5 * (needless + max(rude - 1, 0)) - 0.25 * compliments),
    )
