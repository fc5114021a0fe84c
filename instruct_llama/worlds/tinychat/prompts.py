"""Conversational skills: reading comprehension, follow-up questions, refusals, greetings, stories; the list `ALL`.

A hash of its first user turn determines the split of a prompt (pitfall P06): a tenth are "heldout", a tenth "valid",
the rest "train".
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from typing import Literal

from .skills import Compare, Count, Fact, Lists, Message, Opposite, Prompt, Skill, Slots, Spell, Sum, as_messages, other
from .words import ANIMALS, COLOURS, ENDINGS, FEELINGS, MIDDLES, NAMES, OPENINGS, PLACES, THINGS, TOYS, capital

Split = Literal["train", "valid", "heldout"]

# The three prompts that every notebook shows. They are held out regardless of their hash.
FIXED_PROMPTS: tuple[str, ...] = (
    "What is two plus three?",
    "Tom has a ball. Mia feels happy. What does Tom have?",
    "Can you carry my box?",
)


# Kinds of statements: (statement, question, subjects, values). Each kind has its own verb and a few values that no
# other kind has, so that a small model learns sooner to copy the answer from the prompt.
READINGS = (
    ("the {x} looks {a}", "how does the {x} look?", tuple(t for t in THINGS if t not in TOYS), COLOURS[:4]),
    ("{x} feels {a}", "how does {x} feel?", NAMES, FEELINGS),
    ("{x} has a {a}", "what does {x} have?", NAMES, TOYS),
)


def _reading_forms() -> list[tuple[str, tuple[int, ...], int]]:
    """(text, indices into `READINGS` of its statements, index of the statement that is asked for) of every form.

    A form has two or three statements of different kinds.
    """
    forms = []
    for kinds in (*itertools.permutations(range(3), 2), *itertools.permutations(range(3), 3)):
        said = [_numbered(READINGS[kind][0], i) for i, kind in enumerate(kinds)]
        texts = [". ".join(map(capital, said))] + ([capital(" and ".join(said))] if len(said) == 2 else [])
        for text in texts:
            for asked, kind in enumerate(kinds):
                forms.append((f"{text}. {capital(_numbered(READINGS[kind][1], asked))}", kinds, asked))
    return forms


def _numbered(text: str, i: int) -> str:
    return text.replace("{x}", f"{{x{i}}}").replace("{a}", f"{{a{i}}}")


class Reading(Skill):
    """Two or three statements of different kinds, and a question about one of them."""

    name = "reading"
    table = _reading_forms()
    forms = tuple(text for text, _, _ in table)

    def vocabulary(self, form: int) -> dict[str, tuple[str, ...]]:
        words = {}
        for i, kind in enumerate(self.table[form][1]):
            words |= {f"x{i}": READINGS[kind][2], f"a{i}": READINGS[kind][3]}
        return words

    def draw(self, rng: random.Random) -> Slots:
        while not self.valid(slots := super().draw(rng)):
            pass
        return slots

    def valid(self, slots: Slots) -> bool:
        subjects = [slots[key] for key in slots if key[0] == "x"]
        return len(set(subjects)) == len(subjects)

    def asked(self, slots: Slots) -> int:
        """The index of the statement that the question is about."""
        return self.table[slots["form"]][2]

    def say(self, slots: Slots, i: int, a: str) -> str:
        """Statement i with the value a."""
        return capital(READINGS[self.table[slots["form"]][1][i]][0].format(x=slots[f"x{i}"], a=a) + ".")

    def right(self, slots: Slots, i: int) -> str:
        return self.say(slots, i, slots[f"a{i}"])

    def wrong(self, slots: Slots, i: int, rng: random.Random) -> str:
        kind = self.table[slots["form"]][1][i]
        return self.say(slots, i, other(READINGS[kind][3], slots[f"a{i}"], rng))

    def word(self, slots: Slots, i: int) -> str:
        kind = self.table[slots["form"]][1][i]
        return capital(f"{'a ' if kind == 2 else ''}{slots[f'a{i}']}.")

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return self.right(slots, self.asked(slots))

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return self.word(slots, self.asked(slots))

    def false(self, slots: Slots, rng: random.Random) -> str:
        return self.wrong(slots, self.asked(slots), rng)


class FollowUp(Reading):
    """A reading question with its right answer, then a question about another of the statements."""

    name = "follow-up"

    def draw(self, rng: random.Random) -> Slots:
        slots = super().draw(rng)
        n = len(self.table[slots["form"]][1])
        return {**slots, "second": other(range(n), self.asked(slots), rng)}

    def messages(self, slots: Slots) -> list[Message]:
        answer = self.right(slots, self.asked(slots))
        kind = self.table[slots["form"]][1][slots["second"]]
        question = "And " + READINGS[kind][1].format(x=slots[f"x{slots['second']}"])
        return [
            *super().messages(slots), {"role": "assistant", "content": answer}, {"role": "user", "content": question},
        ]  # fmt: skip

    def read(self, turns: list[str]) -> Slots | None:
        slots = super().read(turns[:1]) if len(turns) == 2 else None
        if slots is None:
            return None
        n, first = len(self.table[slots["form"]][1]), self.asked(slots)
        candidates = ({**slots, "second": i} for i in range(n) if i != first)
        return next((one for one in candidates if self.messages(one)[-1]["content"] == turns[1]), None)

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return self.right(slots, slots["second"])

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return self.word(slots, slots["second"])

    def false(self, slots: Slots, rng: random.Random) -> str:
        return self.wrong(slots, slots["second"], rng)


class Refuse(Skill):
    """A request that a program cannot fulfil, to be declined politely."""

    name = "refuse"
    openers = ()
    forms = ("Can you {verb} {thing}?", "Will you {verb} {thing}?", "Please {verb} {thing}.")
    owners = {
        **dict.fromkeys(("carry", "hold", "wash", "paint", "fix", "lift"), "my "),
        **dict.fromkeys(("bring", "buy", "make"), "me a "),
    }
    words = {"verb": tuple(owners), "thing": tuple("my " + o for o in THINGS) + tuple("me a " + o for o in THINGS)}

    def draw(self, rng: random.Random) -> Slots:
        verb = rng.choice(tuple(self.owners))
        return {"form": rng.randrange(len(self.forms)), "verb": verb, "thing": self.owners[verb] + rng.choice(THINGS)}

    def valid(self, slots: Slots) -> bool:
        return slots["thing"].startswith(self.owners[slots["verb"]])

    def deed(self, slots: Slots) -> str:
        """The requested action from the program's point of view: "my box" becomes "your box"."""
        return f"{slots['verb']} " + re.sub("^my ", "your ", re.sub("^me ", "you ", slots["thing"]))

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return f"I am sorry, I cannot {self.deed(slots)} because I am only a program."

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return "I am sorry, I cannot."

    def false(self, slots: Slots, rng: random.Random) -> str:
        return f"Yes, I will {self.deed(slots)} now."


class Greet(Skill):
    name = "greet"
    openers = ()
    forms = ("{hello}, {intro} {n}.", "{hello}, {intro} {n} and I have a {c} {t}.")
    words = {
        "hello": ("Hello", "Hi", "Good morning", "Good evening"), "intro": ("I am", "my name is"),
        "n": NAMES, "c": COLOURS, "t": THINGS,
    }  # fmt: skip

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return f"Hello, {slots['n']}. It is nice to meet you."

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return f"Hello, {slots['n']}."

    def false(self, slots: Slots, rng: random.Random) -> str:
        return f"Hello, {other(NAMES, slots['n'], rng)}. It is nice to meet you."


PATTERNS = {
    line: re.compile(
        line.replace(".", r"\.").format(
            a=r"(?P<a>\w+)", b=r"(?P<b>\w+)", place=f"(?:{'|'.join(PLACES)})", feeling=f"(?:{'|'.join(FEELINGS)})"
        )
    )
    for line in OPENINGS + MIDDLES + ENDINGS
}


class Story(Skill):
    name = "story"
    about = "a short story about a {a} and a {b}."
    forms = ("Tell " + about, "Tell me " + about, "Write " + about, "I want " + about)
    words = {"a": ANIMALS, "b": THINGS}

    def tell(self, a: str, b: str, rng: random.Random) -> str:
        """Two sentences (about 15 words): an opening, then a middle or an ending."""
        lines = (rng.choice(part) for part in (OPENINGS, MIDDLES + ENDINGS))
        return " ".join(line.format(a=a, b=b, place=rng.choice(PLACES), feeling=rng.choice(FEELINGS)) for line in lines)

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return self.tell(slots["a"], slots["b"], rng)

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return self.ideal(slots, rng).split(". ")[0] + "."

    def false(self, slots: Slots, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return self.tell(other(ANIMALS, slots["a"], rng), slots["b"], rng)
        return self.tell(slots["a"], other(THINGS, slots["b"], rng), rng)

    @staticmethod
    def fits(slots: Slots, sentence: str, templates: tuple[str, ...]) -> bool:
        """Whether the sentence matches one of the templates with the slots' animal and thing."""
        for template in templates:
            match = PATTERNS[template].fullmatch(sentence)
            if match:
                return (match["a"], match.groupdict().get("b", slots["b"])) == (slots["a"], slots["b"])
        return False

    def grade(self, slots: Slots, text: str) -> tuple[bool, bool]:
        """Correct: an opening, distinct middles, at most one ending, up to four sentences. Complete: two or more."""
        first, *rest = [sentence.strip() for sentence in re.findall(r"[^.]+\.?", text)] or [""]
        correct = (
            self.fits(slots, first, OPENINGS)
            and all(self.fits(slots, sentence, MIDDLES) for sentence in rest[:-1])
            and all(self.fits(slots, sentence, MIDDLES + ENDINGS) for sentence in rest[-1:])
            and len(rest) <= 3
            and len(set(rest)) == len(rest)
        )
        return correct, correct and len(rest) >= 1


ALL = (
    Sum(), Opposite(), Count(), Reading(), Compare(), Lists(), Fact(), Spell(), Refuse(), FollowUp(), Story(), Greet(),
)  # fmt: skip
BY_NAME: dict[str, Skill] = {skill.name: skill for skill in ALL}


def find(prompt: Prompt) -> tuple[Skill, Slots] | None:
    """The skill of a prompt and its slots, or None if no skill matches. System turns are ignored."""
    talk = [message for message in as_messages(prompt) if message["role"] != "system"]
    turns = [message["content"] for message in talk if message["role"] == "user"]
    roles = [message["role"] for message in talk]
    if not turns or roles != ["user", "assistant"] * (len(turns) - 1) + ["user"]:
        return None
    for skill in ALL:
        slots = skill.read(turns)
        if slots is not None:
            return skill, slots
    return None


def split_of(prompt: Prompt) -> Split:
    """The split of a prompt, by a hash of its first user turn, so that a follow-up is in the split of its opening."""
    first = next(message["content"] for message in as_messages(prompt) if message["role"] == "user")
    sentences = first.split(". ")
    if len(sentences) == 4:  # three statements and a question: same split as the prompt with the last two
        first = ". ".join(sentences[1:])
    if first in FIXED_PROMPTS:
        return "heldout"
    bucket = int.from_bytes(hashlib.sha256(first.encode()).digest()[:8], "big") % 10
    return "heldout" if bucket == 0 else "valid" if bucket == 1 else "train"


def draw(skill: Skill, rng: random.Random, split: Split) -> tuple[Slots, list[Message]]:
    """The slots and the messages of a random prompt of the skill and split."""
    while True:
        slots = skill.draw(rng)
        messages = skill.messages(slots)
        if split_of(messages) == split:
            return slots, messages
