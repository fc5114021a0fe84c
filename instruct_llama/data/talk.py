"""The skills of talking: reading what was said, follow-up questions, refusals, greetings, stories; and the list of all.

A prompt belongs to a split by a hash of its first user turn (pitfall P06): one in ten to "heldout", one in ten to
"valid", the rest to "train".
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import Literal

from .skills import (
    Compare,
    Count,
    Fact,
    Lists,
    Message,
    Next,
    Opposite,
    Prompt,
    Skill,
    Slots,
    Spell,
    Sum,
    TakeAway,
    as_messages,
    other,
)
from .words import (
    ANIMALS,
    COLOURS,
    ENDINGS,
    FEELINGS,
    MIDDLES,
    NAMES,
    OPENINGS,
    PLACES,
    THINGS,
    capital,
)

Split = Literal["train", "valid", "heldout"]

# The three prompts that every notebook shows. They are held out, whatever their hash says.
FIXED_PROMPTS: tuple[str, ...] = (
    "What is two plus three?",
    "Tom has a ball. Mia has a kite. What does Mia have?",
    "Can you carry my box?",
)


# What can be read: how it is said, asked and answered, how it is asked again, and of what it may be said.
READINGS = (
    ("The {x} is {a}", "What colour is the {x}?", "The {x} is {a}.", "And the {x}?", THINGS, COLOURS),
    ("{x} is {a}", "How is {x}?", "{x} is {a}.", "And {x}?", NAMES, FEELINGS),
    ("{x} has a {a}", "What does {x} have?", "{x} has a {a}.", "And {x}?", NAMES, THINGS),
)


def _reading_forms() -> tuple[str, ...]:
    """Two statements and a question, twice, and three statements and a question, for each of `READINGS`."""
    forms = []
    for said, asked, *_ in READINGS:
        one, two, three = (said.replace("{x}", f"{{x{i}}}").replace("{a}", f"{{a{i}}}") for i in "123")
        joined = f"{one} and {two.replace('The', 'the')}"
        forms += [f"{text}. {asked}" for text in (f"{one}. {two}", joined, f"{one}. {two}. {three}")]
    return tuple(forms)


class Reading(Skill):
    name = "reading"
    forms = _reading_forms()

    def vocabulary(self, form: int) -> dict[str, tuple[str, ...]]:
        subjects, attributes = READINGS[form // 3][4:]
        numbers = "123" if form % 3 == 2 else "12"
        return {f"x{i}": subjects for i in numbers} | {f"a{i}": attributes for i in numbers} | {"x": subjects}

    def draw(self, rng: random.Random) -> Slots:
        form = rng.randrange(len(self.forms))
        subjects, attributes = READINGS[form // 3][4:]
        n = 3 if form % 3 == 2 else 2
        slots = {"form": form}
        for letter, words in (("x", subjects), ("a", attributes)):
            slots |= {f"{letter}{i + 1}": word for i, word in enumerate(rng.sample(words, n))}
        return self.asking(slots, rng.choice("123"[:n]))

    def asking(self, slots: Slots, who: str) -> Slots:
        """The slots with the question put about the subject "1", "2" or "3"."""
        return {**slots, "x": slots["x" + who], "a": slots["a" + who]}

    def valid(self, slots: Slots) -> bool:
        numbers = [key[1] for key in slots if key[0] == "x" and len(key) == 2]
        for who in numbers:
            if slots["x"] == slots["x" + who]:
                slots.update(self.asking(slots, who))  # fills in what is to be found
        return all(len({slots[letter + i] for i in numbers}) == len(numbers) for letter in "xa") and "a" in slots

    def others(self, slots: Slots) -> list[str]:
        """Which of the subjects the question is not about."""
        return [key[1] for key in slots if key[0] == "x" and len(key) == 2 and slots[key] != slots["x"]]

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return READINGS[slots["form"] // 3][2].format(**slots)

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(f"{'a ' if slots['form'] // 3 == 2 else ''}{slots['a']}.")

    def false(self, slots: Slots, rng: random.Random) -> str:
        return self.ideal({**slots, "a": slots["a" + rng.choice(self.others(slots))]}, rng)


class FollowUp(Reading):
    """A reading question with its right answer, and then the same question about someone or something else."""

    name = "follow-up"

    def draw(self, rng: random.Random) -> Slots:
        slots = super().draw(rng)
        return {**slots, "second": rng.choice(self.others(slots))}

    def second(self, slots: Slots) -> Slots:
        """The second question as a reading question."""
        return self.asking(slots, slots["second"])

    def messages(self, slots: Slots) -> list[Message]:
        first = super().messages(slots)
        answer = super().ideal(slots, random.Random(0))
        question = READINGS[slots["form"] // 3][3].format(**self.second(slots))
        return [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]

    def read(self, turns: list[str]) -> Slots | None:
        slots = super().read(turns[:1]) if len(turns) == 2 else None
        if slots is None:
            return None
        for slots["second"] in self.others(slots):
            if self.messages(slots)[-1]["content"] == turns[1]:
                return slots
        return None

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return super().ideal(self.second(slots), rng)

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return super().bare(self.second(slots), rng)

    def false(self, slots: Slots, rng: random.Random) -> str:
        wrong = rng.choice(self.others(self.second(slots)))
        return super().ideal({**self.second(slots), "a": slots["a" + wrong]}, rng)


class Refuse(Skill):
    """What a program cannot do: decline, and politely."""

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
        """What is asked, from the program's side: my box becomes your box."""
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
        """Three sentences (about 22 words): an opening, a middle and an ending."""
        lines = (rng.choice(part) for part in (OPENINGS, MIDDLES, ENDINGS))
        return " ".join(
            line.format(a=a, b=b, place=rng.choice(PLACES), feeling=rng.choice(FEELINGS)) for line in lines
        )

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
        """Whether the sentence is one of the templates, told about the two given things."""
        for template in templates:
            match = PATTERNS[template].fullmatch(sentence)
            if match:
                return (match["a"], match.groupdict().get("b", slots["b"])) == (slots["a"], slots["b"])
        return False

    def judge(self, slots: Slots, text: str) -> tuple[bool, bool]:
        """An opening, then different middles, then at most one ending: two to four sentences make it complete."""
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
    Sum(), TakeAway(), Opposite(), Count(), Reading(), Compare(), Lists(), Fact(), Spell(), Refuse(), FollowUp(),
    Story(), Greet(), Next(),
)  # fmt: skip
BY_NAME: dict[str, Skill] = {skill.name: skill for skill in ALL}


def find(prompt: Prompt) -> tuple[Skill, Slots] | None:
    """The skill that asks such a prompt, and its slots; None if no skill does. A system turn is passed over."""
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
    """The split of a prompt: a hash of its first user turn, so that a dialog goes where its opening goes."""
    first = next(message["content"] for message in as_messages(prompt) if message["role"] == "user")
    if first in FIXED_PROMPTS:
        return "heldout"
    bucket = int.from_bytes(hashlib.sha256(first.encode()).digest()[:8], "big") % 10
    return "heldout" if bucket == 0 else "valid" if bucket == 1 else "train"


def draw(skill: Skill, rng: random.Random, split: Split) -> tuple[Slots, list[Message]]:
    """The slots and the messages of a random prompt of a skill, in the split."""
    while True:
        slots = skill.draw(rng)
        messages = skill.messages(slots)
        if split_of(messages) == split:
            return slots, messages
