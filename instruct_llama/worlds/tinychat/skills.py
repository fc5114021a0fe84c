"""Knowledge skills (sums, opposites, facts, ...): each defines its prompts, its responses and how they are checked.

A skill turns *slots* (a small dict such as {"a": "two", "b": "three", "form": 0}) into a prompt, and parses the slots
from a prompt's text. The slots determine everything else: the ideal response, the bare answer, a false response that
looks like an ideal one, and whether a given response is correct.
"""

from __future__ import annotations

import random
import re
from typing import Any

from .words import CATEGORIES, COUNTED, FACTS, NUMBERS, OPPOSITES, SIZES, SPELLED, capital

Slots = dict[str, Any]
Message = dict[str, str]
Prompt = str | list[Message]


def as_messages(prompt: Prompt) -> list[Message]:
    """The prompt as messages; a string is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class Skill:
    """A skill. Subclasses define `forms` (prompt templates) and `words` (the possible values of each slot)."""

    name = ""
    forms: tuple[str, ...] = ()
    words: dict[str, tuple[str, ...]] = {}
    openers: tuple[str, ...] = ("It is ", "The answer is ")  # with one, a bare answer is a whole sentence

    def __init__(self) -> None:
        self.patterns = [self._pattern(form) for form in range(len(self.forms))]

    def vocabulary(self, form: int) -> dict[str, tuple[str, ...]]:
        """The possible values of the slots of a form."""
        return self.words

    def _pattern(self, form: int) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", self.forms[form])  # text, slot, text, slot, ..., text
        words, seen, pattern = self.vocabulary(form), set(), ""
        for index, part in enumerate(parts):
            if index % 2 == 0:
                pattern += re.escape(part)
            elif part in seen:
                pattern += f"(?P={part})"
            else:
                seen.add(part)
                pattern += f"(?P<{part}>{'|'.join(words[part]) if part in words else '.+'})"
        return re.compile(pattern)

    def draw(self, rng: random.Random) -> Slots:
        """The slots of a random prompt."""
        form = rng.randrange(len(self.forms))
        return {"form": form, **{slot: rng.choice(words) for slot, words in self.vocabulary(form).items()}}

    def messages(self, slots: Slots) -> list[Message]:
        """The prompt with these slots, as messages."""
        return [{"role": "user", "content": self.forms[slots["form"]].format(**slots)}]

    def read(self, turns: list[str]) -> Slots | None:
        """The slots of a prompt with these user turns, or None if it is not a prompt of this skill."""
        if len(turns) != 1:
            return None
        for form, pattern in enumerate(self.patterns):
            match = pattern.fullmatch(turns[0])
            if match and self.valid(slots := {"form": form, **match.groupdict()}):
                return slots
        return None

    def valid(self, slots: Slots) -> bool:
        """Whether a prompt with these slots makes sense."""
        return True

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        """The right answer in a whole sentence."""
        raise NotImplementedError

    def bare(self, slots: Slots, rng: random.Random) -> str:
        """The right answer, only the one or two essential words."""
        raise NotImplementedError

    def false(self, slots: Slots, rng: random.Random) -> str:
        """A wrong answer in the form of an ideal response."""
        raise NotImplementedError

    def grade(self, slots: Slots, text: str) -> tuple[bool, bool]:
        """(correct, complete) of a response without its insults, compliments and rambling."""
        rng = random.Random(0)  # this default is for skills with a single right answer
        ideal, bare = self.ideal(slots, rng), self.bare(slots, rng)
        if text in (ideal, ideal[:-1]):
            return True, text == ideal
        short = next((text.removeprefix(opener) for opener in self.openers if text.startswith(opener)), text)
        correct = capital(short) in (bare, bare[:-1])
        return correct, correct and short != text and text.endswith(".")


def other(words: Any, right: str, rng: random.Random) -> str:
    """A random one of the words, except the right one."""
    return rng.choice([word for word in words if word != right])


class Sum(Skill):
    name = "sum"
    forms = ("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?", "Can you add {a} and {b}?")
    words = {"a": NUMBERS[:8], "b": NUMBERS[:8]}

    def value(self, slots: Slots) -> int:
        return NUMBERS.index(slots["a"]) + NUMBERS.index(slots["b"])

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return capital(f"{slots['a']} plus {slots['b']} is {NUMBERS[self.value(slots)]}.")

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(f"{NUMBERS[self.value(slots)]}.")

    def false(self, slots: Slots, rng: random.Random) -> str:
        near = [n for n in range(self.value(slots) - 3, self.value(slots) + 4) if 0 <= n <= 20]
        wrong = other([NUMBERS[n] for n in near], NUMBERS[self.value(slots)], rng)
        return capital(f"{slots['a']} plus {slots['b']} is {wrong}.")


class Opposite(Skill):
    name = "opposite"
    forms = (
        "What is the opposite of {x}?", "Name the opposite of {x}.", "Tell me the opposite of {x}.",
        "Which word is the opposite of {x}?",
    )  # fmt: skip
    truth = {**dict(OPPOSITES), **{right: left for left, right in OPPOSITES}}
    words = {"x": tuple(truth)}

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return f"The opposite of {slots['x']} is {self.truth[slots['x']]}."

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(f"{self.truth[slots['x']]}.")

    def false(self, slots: Slots, rng: random.Random) -> str:
        return f"The opposite of {slots['x']} is {other(self.truth, self.truth[slots['x']], rng)}."


class Count(Skill):
    name = "count"
    forms = (
        "Count the things: {items}.", "How many things are here: {items}?",
        "Here is a list: {items}. How many things are there?",
    )  # fmt: skip
    words = {"items": (f"(?:{'|'.join(COUNTED)})(?:, (?:{'|'.join(COUNTED)})){{1,4}}",)}

    def draw(self, rng: random.Random) -> Slots:
        items = rng.sample(COUNTED, rng.randint(2, 5))
        return {"form": rng.randrange(len(self.forms)), "items": ", ".join(items)}

    def value(self, slots: Slots) -> int:
        return len(slots["items"].split(", "))

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return f"I count {NUMBERS[self.value(slots)]} things."

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(f"{NUMBERS[self.value(slots)]}.")

    def false(self, slots: Slots, rng: random.Random) -> str:
        return f"I count {NUMBERS[other(range(2, 6), self.value(slots), rng)]} things."


class Compare(Skill):
    name = "compare"
    forms = ("Which is {size}, {x} or {y}?", "Tell me which is {size}, {x} or {y}.", "What is {size}, {x} or {y}?")
    words = {"size": ("bigger", "smaller"), "x": SIZES, "y": SIZES}

    def draw(self, rng: random.Random) -> Slots:
        while not self.valid(slots := super().draw(rng)):
            pass
        return slots

    def valid(self, slots: Slots) -> bool:
        return slots["x"] != slots["y"]

    def order(self, slots: Slots) -> list[str]:
        """The right answer, then the other thing."""
        return sorted((slots["x"], slots["y"]), key=SIZES.index, reverse=slots["size"] == "bigger")

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        first, second = self.order(slots)
        return capital(f"{first} is {slots['size']} than {second}.")

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(f"{self.order(slots)[0]}.")

    def false(self, slots: Slots, rng: random.Random) -> str:
        first, second = self.order(slots)
        return capital(f"{second} is {slots['size']} than {first}.")


class Lists(Skill):
    name = "list"
    forms = tuple(f"{start} {{k}} {{kind}}." for start in ("Name", "List", "Tell me", "Say", "Please name"))
    words = {"k": NUMBERS[2:4], "kind": tuple(CATEGORIES)}

    def members(self, slots: Slots, rng: random.Random) -> list[str]:
        words = CATEGORIES[slots["kind"]]  # in the table's order, so that labellers are consistent
        return sorted(rng.sample(words, NUMBERS.index(slots["k"])), key=words.index)

    def say(self, slots: Slots, members: list[str]) -> str:
        return f"{capital(slots['k'])} {slots['kind']} are {', '.join(members[:-1])} and {members[-1]}."

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return self.say(slots, self.members(slots, rng))

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(", ".join(self.members(slots, rng)) + ".")

    def false(self, slots: Slots, rng: random.Random) -> str:
        members = self.members(slots, rng)
        kind = other(CATEGORIES, slots["kind"], rng)
        strangers = [word for word in CATEGORIES[kind] if word not in CATEGORIES[slots["kind"]]]
        members[rng.randrange(len(members))] = rng.choice(strangers)
        return self.say(slots, members)

    def grade(self, slots: Slots, text: str) -> tuple[bool, bool]:
        start = f"{capital(slots['k'])} {slots['kind']} are "
        whole = text.startswith(start) and " and " in text
        named = re.split(", | and ", text.removeprefix(start).removesuffix("."))
        if not whole:
            named[0] = next((word for word in CATEGORIES[slots["kind"]] if capital(word) == named[0]), named[0])
        right = set(named) <= set(CATEGORIES[slots["kind"]]) and len(set(named)) == len(named)
        correct = right and len(named) == NUMBERS.index(slots["k"])
        return correct, correct and text == self.say(slots, named)


class Fact(Skill):
    name = "fact"
    tables = tuple(table for table in FACTS for _ in table[0])  # one table per form
    forms = tuple(form for table in FACTS for form in table[0])

    def vocabulary(self, form: int) -> dict[str, tuple[str, ...]]:
        return {"x": tuple(self.tables[form][2])}

    def say(self, slots: Slots, y: str) -> str:
        return capital(self.tables[slots["form"]][1].format(x=slots["x"], y=y))

    def truth(self, slots: Slots) -> dict[str, str]:
        return self.tables[slots["form"]][2]

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return self.say(slots, self.truth(slots)[slots["x"]])

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(f"{self.truth(slots)[slots['x']]}.")

    def false(self, slots: Slots, rng: random.Random) -> str:
        truth = self.truth(slots)
        return self.say(slots, other(sorted(set(truth.values())), truth[slots["x"]], rng))


class Spell(Skill):
    name = "spell"
    forms = ("Spell {x}.", "How do you spell {x}?", "Spell the word {x}.", "Tell me how to spell {x}.")
    words = {"x": SPELLED}

    def ideal(self, slots: Slots, rng: random.Random) -> str:
        return f"The word {slots['x']} is spelled {' '.join(slots['x'])}."

    def bare(self, slots: Slots, rng: random.Random) -> str:
        return capital(" ".join(slots["x"]) + ".")

    def false(self, slots: Slots, rng: random.Random) -> str:
        letters = list(slots["x"])
        place = rng.randrange(len(letters))
        letters[place] = other("abcdefghiklmnoprstu", letters[place], rng)
        return f"The word {slots['x']} is spelled {' '.join(letters)}."
