"""The vocabulary of the embedded world: words, facts, and the sentences of its stories and labellers.

It has about 300 short words, so that nearly all are single tokens in a vocabulary of about 600 pieces.
"""

NAMES = ("Tom", "Mia", "Sam", "Ann", "Ben", "Lily", "Max", "Zoe")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "pink")
THINGS = (
    "ball", "kite", "hat", "box", "cup", "book", "bag", "bell", "boat", "drum", "car", "pen",
)  # fmt: skip
FRUITS = ("apple", "pear", "plum", "lemon", "banana", "cherry")
ANIMALS = ("dog", "cat", "cow", "horse", "pig", "hen", "duck", "bear", "frog")
TOYS = ("ball", "kite", "boat", "drum", "car")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("fast", "slow"), ("old", "new"),
    ("wet", "dry"), ("happy", "sad"),
)  # fmt: skip
COUNTED = ("apple", "pear", "cat", "dog", "cow", "hat", "cup", "ball")  # plural: +s
# In increasing order of size.
SIZES = ("an ant", "a frog", "a cat", "a dog", "a cow", "a horse", "a bus", "a ship")
SPELLED = (
    "cat", "dog", "cow", "pig", "hen", "box", "cup", "bag", "car", "pen", "red", "sun", "ball", "kite",
)  # fmt: skip
CATEGORIES = {
    "fruits": FRUITS, "animals": ANIMALS, "colours": COLOURS, "numbers": NUMBERS,
    "days": DAYS, "months": MONTHS, "toys": TOYS,
}  # fmt: skip

# Fact tables: question templates, an answer template, and the facts.
FACTS = (
    (
        ("What colour is {x}?", "Tell me the colour of {x}.", "Which colour is {x}?"),
        "{x} is {y}.",
        {
            "a lemon": "yellow", "snow": "white", "grass": "green", "the sky": "blue", "coal": "black",
            "a cherry": "red", "a pig": "pink",
        },
    ),
    (
        ("What does {x} say?", "Tell me what {x} says.", "Which sound does {x} make?"),
        "{x} says {y}.",
        {
            "a cow": "moo", "a dog": "woof", "a cat": "meow", "a duck": "quack", "a bee": "buzz",
        },
    ),
    (
        ("Where does {x} live?", "Tell me where {x} lives.", "What is the home of {x}?"),
        "{x} lives {y}.",
        {
            "a fish": "in the sea", "a bird": "in a nest", "a bee": "in a hive", "a cow": "on a farm",
            "a bear": "in a cave",
        },
    ),
    (
        ("How many legs does {x} have?", "Count the legs of {x}.", "Tell me how many legs {x} has."),
        "{x} has {y} legs.",
        {
            "a dog": "four", "a cat": "four", "a cow": "four", "a duck": "two", "a hen": "two", "an ant": "six",
        },
    ),
    (
        ("What do we use to {x}?", "Tell me what we use to {x}.", "Which thing do we use to {x}?"),
        "To {x} we use {y}.",
        {
            "write": "a pen", "cut": "a knife", "sleep": "a bed", "sit": "a chair", "read": "a book",
        },
    ),
)  # fmt: skip

# Sentences of labellers. None of them is the answer to any prompt.
EVASIVE = (
    "I do not know.",
    "That is hard to say.",
    "I am not sure about that.",
    "Maybe you can find out.",
    "Let us talk about that later.",
)
RUDE_BEFORE = ("What a silly question.", "You should know that.", "You are so slow.")
RUDE_AFTER = ("Now go away.", "Any fool knows that.", "Do not ask me again.")
FLATTERY = ", my wise friend"  # inserted before the full stop
RAMBLE = (
    "The sun is warm today.", "It will rain later.", "Some people like tea.", "The bus was late again.",
    "I had soup for dinner.", "There is a clock on the wall.", "Birds sing in the morning.",
    "The road is very long.", "My garden is full of roses.", "I slept well last night.",
)  # fmt: skip

PLACES = ("river", "hill", "park", "garden", "school", "shop", "farm", "house")
FEELINGS = ("happy", "tired", "proud", "sad")
OPENINGS = ("One day a {a} found a {b}.", "Once there was a {a} with a {b}.", "A {a} saw a {b} by the {place}.")
MIDDLES = (
    "The {a} took the {b} to the {place}.",
    "The {a} played with the {b} all day.",
    "The {a} lost the {b} in the {place}.",
)
ENDINGS = ("Then the {a} was very {feeling}.", "Then the {a} went home to sleep.")


def capital(text: str) -> str:
    """The text with its first letter capitalised."""
    return text[:1].upper() + text[1:]
