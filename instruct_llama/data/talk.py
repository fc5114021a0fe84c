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
)  # fmt: skip

Split = Literal["train", "valid", "heldout"]

# The three prompts that every notebook shows. They are held out, whatever their hash says.
FIXED_PROMPTS: tuple[str, ...] = (
    "What is two plus three?",
    "Tom has a red ball. Mia has a blue kite. What does Mia have?",
    "Can you carry my box?",
)


class Reading(Skill):
    name = "reading"
    forms = (
        "{n1} has a {c1} {t1}. {n2} has a {c2} {t2}. What does {n} have?",
        "{n1} has a {c1} {t1}. {n2} has a {c2} {t2}. Who has the {c} {t}?",
        "{n1} has a {c1} {t1}. {n2} has a {c2} {t2}. What colour is the {t}?",
        "{n1} has a {c1} {t1} and {n2} has a {c2} {t2}. What does {n} have?",
        "{n1} has a {c1} {t1} and {n2} has a {c2} {t2}. Who has the {c} {t}?",
        "{n1} has a {c1} {t1} and {n2} has a {c2} {t2}. What colour is the {t}?",
    )
    words = {slot: {"n": NAMES, "c": COLOURS, "t": THINGS}[slot[0]]
             for slot in ("n1", "c1", "t1", "n2", "c2", "t2", "n", "c", "t")}  # fmt: skip

    def draw(self, rng):
        slots = {"form": rng.randrange(len(self.forms))}
        for letter, words in (("n", NAMES), ("c", COLOURS), ("t", THINGS)):
            slots[letter + "1"], slots[letter + "2"] = rng.sample(words, 2)
        return self.asking(slots, rng.choice("12"))

    def asking(self, slots: Slots, who: str) -> Slots:
        """The slots with the question put about person "1" or "2"."""
        return {**slots, **{letter: slots[letter + who] for letter in "nct"}}

    def valid(self, slots):
        for who in "12":  # fills in what the question leaves to be found
            if all(slots[letter] == slots[letter + who] for letter in "nct" if letter in slots):
                slots.update(self.asking(slots, who))
                return all(slots[letter + "1"] != slots[letter + "2"] for letter in "nct")
        return False

    def say(self, slots: Slots, n: str, c: str, t: str) -> str:
        return (f"{n} has a {c} {t}.", f"{n} has the {c} {t}.", f"The {t} is {c}.")[slots["form"] % 3]

    def ideal(self, slots, rng):
        return self.say(slots, slots["n"], slots["c"], slots["t"])

    def bare(self, slots, rng):
        return capital((f"a {slots['c']} {slots['t']}.", f"{slots['n']}.", f"{slots['c']}.")[slots["form"] % 3])

    def false(self, slots, rng):
        n, c, t = slots["n"], slots["c"], slots["t"]
        n_other = slots["n2"] if n == slots["n1"] else slots["n1"]
        c_other, t_other = (slots["c2"], slots["t2"]) if c == slots["c1"] else (slots["c1"], slots["t1"])
        if slots["form"] % 3 == 0:
            c, t = rng.choice(((c_other, t_other), (c_other, t), (c, t_other)))
        return self.say(slots, n_other if slots["form"] % 3 == 1 else n, c_other if slots["form"] % 3 == 2 else c, t)


class FollowUp(Reading):
    """A reading question with its right answer, and then a second question about the same two people."""

    name = "follow-up"
    seconds = ("What colour is it?", "And what does {n} have?", "And who has the {c} {t}?")

    def draw(self, rng):
        return {**super().draw(rng), "form": rng.choice((0, 3)), "second": rng.randrange(3)}

    def second(self, slots: Slots) -> Slots:
        """The second question as a reading question: of the same person for "it", of the other one for "And"."""
        it_is_first = slots["n"] == slots["n1"]
        who = "1" if it_is_first == (slots["second"] == 0) else "2"
        return self.asking({**slots, "form": (2, 0, 1)[slots["second"]]}, who)

    def messages(self, slots):
        first = super().messages(slots)
        answer = super().say(slots, slots["n"], slots["c"], slots["t"])
        question = self.seconds[slots["second"]].format(**self.second(slots))
        return [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]

    def read(self, turns):
        slots = super().read(turns[:1]) if len(turns) == 2 else None
        if slots is None or slots["form"] not in (0, 3):
            return None
        for second in range(3):
            slots["second"] = second
            if self.messages(slots)[-1]["content"] == turns[1]:
                return slots
        return None

    def ideal(self, slots, rng):
        return super().ideal(self.second(slots), rng)

    def bare(self, slots, rng):
        return super().bare(self.second(slots), rng)

    def false(self, slots, rng):
        return super().false(self.second(slots), rng)


class Refuse(Skill):
    """What a program cannot do: decline, and politely."""

    name = "refuse"
    openers = ()
    forms = ("Can you {verb} {thing}?", "Will you {verb} {thing}?", "Please {verb} {thing}.")
    objects = tuple(f"{colour}{thing}" for colour in ("", *(colour + " " for colour in COLOURS)) for thing in THINGS)
    owners = {
        **dict.fromkeys(("carry", "hold", "wash", "paint", "fix", "lift"), "my "),
        **dict.fromkeys(("bring", "buy", "make"), "me a "),
    }
    words = {"verb": tuple(owners), "thing": tuple("my " + o for o in objects) + tuple("me a " + o for o in objects)}

    def draw(self, rng):
        verb = rng.choice(tuple(self.owners))
        name = rng.choice(THINGS) if rng.random() < 0.5 else rng.choice(self.objects)
        return {"form": rng.randrange(len(self.forms)), "verb": verb, "thing": self.owners[verb] + name}

    def valid(self, slots):
        return slots["thing"].startswith(self.owners[slots["verb"]])

    def deed(self, slots: Slots) -> str:
        """What is asked, from the program's side: my box becomes your box."""
        return f"{slots['verb']} " + re.sub("^my ", "your ", re.sub("^me ", "you ", slots["thing"]))

    def ideal(self, slots, rng):
        return f"I am sorry, I cannot {self.deed(slots)} because I am only a program."

    def bare(self, slots, rng):
        return "I am sorry, I cannot."

    def false(self, slots, rng):
        return f"Yes, I will {self.deed(slots)} now."


class Greet(Skill):
    name = "greet"
    openers = ()
    forms = ("{hello}, {intro} {n}.", "{hello}, {intro} {n} and I have a {c} {t}.")
    words = {
        "hello": ("Hello", "Hi", "Good morning", "Good evening"), "intro": ("I am", "my name is"),
        "n": NAMES, "c": COLOURS, "t": THINGS,
    }  # fmt: skip

    def ideal(self, slots, rng):
        return f"Hello, {slots['n']}. It is nice to meet you."

    def bare(self, slots, rng):
        return f"Hello, {slots['n']}."

    def false(self, slots, rng):
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

    def ideal(self, slots, rng):
        return self.tell(slots["a"], slots["b"], rng)

    def bare(self, slots, rng):
        return self.ideal(slots, rng).split(". ")[0] + "."

    def false(self, slots, rng):
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

    def judge(self, slots, text):
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
