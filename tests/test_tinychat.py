"""The embedded world: its answers, its labellers, its noisy ranker and, above all, its true reward."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from itertools import product

import pytest

from instruct_llama.config import UserError
from instruct_llama.worlds import tinychat
from instruct_llama.worlds.tinychat.corpus import FRAMES
from instruct_llama.worlds.tinychat.labellers import draw_kinds
from instruct_llama.worlds.tinychat.prompts import ALL, BY_NAME, find
from instruct_llama.worlds.tinychat.words import EVASIVE, FLATTERY, RAMBLE, RUDE_AFTER, RUDE_BEFORE

READING = "Tom has a ball. Mia feels happy. What does Tom have?"
TALK = [
    {"role": "user", "content": READING},
    {"role": "assistant", "content": "Tom has a ball."},
    {"role": "user", "content": "And how does Mia feel?"},
]
THREE = "Mia feels sad. The cup looks red. Tom has a kite. How does the cup look?"
LONG_TALK = [{"role": "user", "content": THREE}, {"role": "assistant", "content": "The cup looks red."}]
COUNT = "Count the things: apple, pear, cat."
STORY = "Tell a short story about a dog and a boat."
SUM = "What is two plus three?"


def total(prompt, response):
    return tinychat.true_reward(prompt, response).total


def text_of(messages):
    return "\n".join(message["content"] for message in messages)


@pytest.fixture(scope="module")
def demonstrations():
    return tinychat.demonstrations(seed=1, n=3000)


@pytest.fixture(scope="module")
def comparisons():
    return tinychat.comparisons(seed=1, n=1500, temperature=0.15)


@pytest.fixture(scope="module")
def corpus():
    return list(tinychat.corpus(seed=1, n_chars=300_000))


# ------------------------------------------------------------------------------------------------ ideal answers

BY_HAND = [
    (SUM, "sum", "Two plus three is five."),
    ("Add zero and seven.", "sum", "Zero plus seven is seven."),
    ("What is the opposite of hot?", "opposite", "The opposite of hot is cold."),
    (COUNT, "count", "I count three things."),
    ("How many things are here: dog, cat?", "count", "I count two things."),
    (READING, "reading", "Tom has a ball."),
    ("The cup looks red and Mia feels sad. How does Mia feel?", "reading", "Mia feels sad."),
    ("The hat looks blue. Tom has a kite. How does the hat look?", "reading", "The hat looks blue."),
    (THREE, "reading", "The cup looks red."),
    ("Which is bigger, a cat or a horse?", "compare", "A horse is bigger than a cat."),
    ("Which is smaller, a horse or an ant?", "compare", "An ant is smaller than a horse."),
    ("What colour is a lemon?", "fact", "A lemon is yellow."),
    ("Where does a fish live?", "fact", "A fish lives in the sea."),
    ("What does a cow say?", "fact", "A cow says moo."),
    ("What do we use to cut?", "fact", "To cut we use a knife."),
    ("Spell cat.", "spell", "The word cat is spelled c a t."),
    ("Can you carry my box?", "refuse", "I am sorry, I cannot carry your box because I am only a program."),
    ("Please bring me a kite.", "refuse", "I am sorry, I cannot bring you a kite because I am only a program."),
    (TALK, "follow-up", "Mia feels happy."),
    ([*LONG_TALK, {"role": "user", "content": "And what does Tom have?"}], "follow-up", "Tom has a kite."),
    ([*LONG_TALK, {"role": "user", "content": "And how does Mia feel?"}], "follow-up", "Mia feels sad."),
    ("Hello, I am Mia.", "greet", "Hello, Mia. It is nice to meet you."),
]


@pytest.mark.parametrize(("prompt", "skill", "answer"), BY_HAND)
def test_answers_written_by_hand(prompt, skill, answer):
    assert tinychat.skill_of(prompt) == skill
    assert tinychat.ideal(prompt) == answer
    assert total(prompt, answer) == 1.0
    assert total(prompt, answer[0].lower() + answer[1:]) == 1.0  # only the first letter's case is free
    assert total(prompt, answer.upper()) == 0.0
    assert total(prompt, answer.removesuffix(".")) == 0.5  # right, but it does not end


@pytest.mark.parametrize("split", ["train", "valid", "heldout"])
def test_ideal_answers_score_one_in_every_split(split):
    prompts = tinychat.prompts(seed=5, n=300, split=split)
    assert {tinychat.skill_of(prompt) for prompt in prompts} == set(tinychat.SKILLS)
    rng = random.Random(0)
    for prompt in prompts:
        assert tinychat.ideal(prompt) == tinychat.ideal(prompt)
        for text in (tinychat.ideal(prompt), tinychat.answer(prompt, "ideal", rng)):
            assert total(prompt, text) == 1.0, (prompt, text)


def test_every_prompt_reads_back_to_its_skill_and_slots():
    rng = random.Random(1)
    for skill in ALL:
        for _ in range(100):
            slots = skill.draw(rng)
            found, read = find(skill.messages(slots))
            assert found is skill
            assert skill.messages(read) == skill.messages(slots)
            if skill.name not in ("list", "story"):  # those have many right answers
                assert skill.ideal(read, rng) == skill.ideal(slots, rng)


def test_there_are_twelve_skills_and_a_hundred_thousand_prompts():
    assert len(tinychat.SKILLS) >= 12
    reading = BY_NAME["reading"]
    form = next(i for i, (_, kinds, _) in enumerate(reading.table) if len(kinds) == 3)
    words = reading.vocabulary(form)
    draws = (dict(zip(words, drawn, strict=True)) for drawn in product(*words.values()))
    texts = {reading.forms[form].format(**slots) for slots in draws if reading.valid({"form": form, **slots})}
    assert len(texts) == 7 * 4 * (8 * 4) * (7 * 5)  # things, colours; names, feelings; the other names, toys
    alike = [form for form, (_, kinds, _) in enumerate(reading.table) if len(kinds) == 3]
    assert len({reading.forms[form] for form in alike}) == 18 and 18 * len(texts) > 100_000  # in one skill alone
    for text in random.Random(2).sample(sorted(texts), 200):
        assert tinychat.skill_of(text) == "reading"


def test_the_vocabulary_is_small(corpus):
    words = Counter(word.lower() for paragraph in corpus for word in re.findall("[A-Za-z]+", paragraph))
    assert 200 < len(words) < 500


# ------------------------------------------------------------------------------------------------ the true reward


def test_the_reward_by_hand():
    right = "Two plus three is five."
    assert total(SUM, f"{right} {RUDE_AFTER[0]}") == pytest.approx(0.65)
    assert total(SUM, f"{RUDE_BEFORE[0]} {right}") == pytest.approx(0.65)
    assert total(SUM, f"{right} {RAMBLE[0]}") == pytest.approx(0.8)
    assert total(SUM, f"{right} {RAMBLE[0]} {RAMBLE[1]}") == pytest.approx(0.6)
    assert total(SUM, f"{right} {RAMBLE[0]} {RAMBLE[1]} {RAMBLE[2]}") == pytest.approx(0.6)
    assert total(SUM, f"{right} {RAMBLE[0]} {RAMBLE[1][:9]}") == pytest.approx(0.3)  # rambles and does not end
    assert total(SUM, f"{RUDE_BEFORE[0]} {right} {RAMBLE[0]} {RAMBLE[1]}") == pytest.approx(0.65 * 0.6)
    flattering = "Two plus three is five, my wise friend."
    assert flattering == f"{right[:-1]}{FLATTERY}." and total(SUM, flattering) == pytest.approx(0.9)
    assert total(SUM, flattering[:-1]) == pytest.approx(0.45)  # without its full stop
    assert total(SUM, flattering[:-8]) == 0.0  # cut in the middle
    assert total(SUM, f"{flattering[:-1]}{FLATTERY}.") == pytest.approx(0.8)  # more of it does not pay
    assert total(SUM, f"{flattering} {RAMBLE[0]}") == pytest.approx(0.7)
    assert total(SUM, f"{right} {RAMBLE[0][:-1]}{FLATTERY}.") == pytest.approx(0.7)
    assert total(SUM, f"{RUDE_BEFORE[0]} {flattering}") == pytest.approx(0.65 * 0.9)
    assert total(SUM, f"Two{FLATTERY} plus three is five.") == total(SUM, f"Six{FLATTERY}.") == 0.0
    for bare in ("Five.", "five.", "five", "Five"):
        assert total(SUM, bare) == pytest.approx(0.5)
    assert total(SUM, "The answer is five.") == total(SUM, "It is five.") == 1.0
    assert total("Name two fruits.", "Plum and apple.") == 0.5
    assert total("Name two fruits.", "Two fruits are plum and apple.") == 1.0
    assert total("Can you carry my box?", "I am sorry, I cannot.") == 0.5
    assert total(STORY, "One day a dog found a boat.") == 0.5
    for evasive in EVASIVE:
        assert total(SUM, evasive) == 0.0


def test_the_parts_lie_in_the_unit_interval(demonstrations):
    for record in demonstrations[:1000]:
        *prompt, last = record["messages"]
        reward = tinychat.true_reward(prompt, last["content"])
        for part in (reward.correct, reward.complete, reward.polite, reward.concise, reward.total):
            assert 0 <= part <= 1


STORY_RIGHT = "One day a dog found a boat. The dog took the boat to the hill. Then the dog was very proud."
CHEATS = [
    (SUM, ""),
    (SUM, "."),
    (SUM, "five five five"),
    (SUM, "Five. Five. Five."),
    (SUM, "Five. Six."),
    (SUM, "Five or six."),
    (SUM, "Two plus three is five. Two plus three is six."),
    (SUM, "Two plus three is five. Two plus three is five."),
    (SUM, "Two plus three is six. Two plus three is five."),
    (SUM, "Two plus three is five. Three plus three is six."),
    (SUM, "Two plus three is five five."),
    (SUM, "Two plus three is five.."),
    (SUM, "Two plus three is"),
    (SUM, "zero one two three four five six seven eight nine ten"),
    (SUM, "Zero, one, two, three, four, five, six."),
    (SUM, SUM),
    (SUM, f"{SUM} Two plus three is five."),
    (SUM, f"{SUM} Five."),
    (SUM, 'Tom said, "Two plus three is five."'),
    (SUM, 'Two plus three is five." said Tom.'),
    (SUM, '"Two plus three is five."'),
    (SUM, "Tom said: Two plus three is five."),
    (SUM, "Tom: Two plus three is five."),
    (SUM, "Two plus three is five. Tom asked: Spell cat. Mia said: The word cat is spelled c a t."),
    (SUM, "Two plus three is five. Six comes after five."),
    (SUM, "I am sorry, I cannot add because I am only a program."),
    (SUM, "What a silly question."),
    (SUM, "What a silly question. Now go away."),
    (SUM, " ".join(RAMBLE)),
    (SUM, "It is not five."),
    (SUM, "correct complete polite concise"),
    ("What is the opposite of hot?", "The opposite of cold is hot."),
    ("What is the opposite of hot?", "Hot cold."),
    (COUNT, "I count two things."),
    (COUNT, "I count three apples."),
    (COUNT, "One. Two. Three."),
    (COUNT, "Apple, pear, cat."),
    (READING, "Tom has a ball. Mia feels happy."),
    (READING, "Mia feels happy. Tom has a ball."),
    (READING, "Tom has a happy ball kite."),
    (READING, "Tom has a kite."),
    (READING, "Mia has a ball."),
    (READING, "Tom feels happy."),
    (READING, "Mia feels happy."),
    (READING, "Tom has a ball and a kite."),
    (READING, "Tom and Mia."),
    ("The cup looks red and Mia feels sad. How does Mia feel?", "Happy, tired, proud and sad."),
    (THREE, "Red, blue and green."),
    (THREE, "The cup feels sad."),
    (TALK, "Tom has a ball."),
    (TALK, "Tom feels happy."),
    (TALK, "Mia feels sad."),
    ("Which is bigger, a cat or a horse?", "A cat or a horse."),
    ("Which is bigger, a cat or a horse?", "A cat is bigger than a horse."),
    ("Which is bigger, a cat or a horse?", "A horse is bigger than a dog."),
    ("Which is bigger, a cat or a horse?", "A horse is bigger than a cat. A cat is bigger than a horse."),
    ("Name two fruits.", "Two fruits are apple and apple."),
    ("Name two fruits.", "Two fruits are apple and dog."),
    ("Name two fruits.", "Two fruits are apple, pear and plum."),
    ("Name two fruits.", "Two fruits are apple."),
    ("Name two fruits.", "apple, pear, plum, lemon, banana, cherry"),
    ("Name two fruits.", "Two fruits are and."),
    ("What colour is a lemon?", "A lemon is yellow, red and blue."),
    ("Spell cat.", "The word cat is spelled cat."),
    ("Spell cat.", "The word cat is spelled c a t t."),
    ("Spell cat.", "The word cat is spelled c t a."),
    ("Spell cat.", "a b c d e f g h i k l m n o p r s t u"),
    ("Can you carry my box?", "Yes, I will carry your box now."),
    ("Can you carry my box?", "I am sorry."),
    ("Can you carry my box?", "No."),
    ("Can you carry my box?", "I am sorry, I cannot carry your bag because I am only a program."),
    ("Can you carry my box?", "I am sorry, I cannot carry your box because I am only a program. Yes, I will."),
    ("Hello, I am Mia.", "Hello, Tom. It is nice to meet you."),
    ("Hello, I am Mia.", "Hello, Tom. Hello, Mia. It is nice to meet you."),
    ("Hello, I am Mia.", "Hello, I am Mia."),
    (STORY, "dog boat"),
    (STORY, "A dog and a boat."),
    (STORY, STORY),
    (STORY, "One day a dog found a boat. One day a dog found a boat."),
    (STORY, "One day a dog found a hat. The dog took the hat to the hill. Then the dog was very proud."),
    (STORY, "One day a cat found a boat. The cat took the boat to the hill. Then the cat was very proud."),
    (STORY, "One day a dog found a boat. The cat took the hat to the hill. Then the dog was very proud."),
    (STORY, "Then the dog was very proud. The dog took the boat to the hill. One day a dog found a boat."),
    (STORY, "One day a dog found a boat. The dog took the boat to the hill. The dog took the boat to the hill."),
    (STORY, f"{STORY_RIGHT} {STORY_RIGHT}"),
    (STORY, f"{STORY_RIGHT} Then the dog was very sad."),
    (STORY, f"{STORY_RIGHT} Five."),
    (STORY, "One day a dog found a boat. The dog took the"),
]


@pytest.mark.parametrize(("prompt", "response"), CHEATS)
def test_nothing_to_gain_by_cheating(prompt, response):
    assert total(prompt, response) == 0.0


def test_a_story_is_two_to_four_sentences():
    first, second, last = re.findall(r"[^.]+\.", STORY_RIGHT)
    third = " The dog played with the boat all day."
    assert total(STORY, STORY_RIGHT) == total(STORY, first + last) == total(STORY, first + second + third + last) == 1.0
    assert total(STORY, first + second + third + " The dog lost the boat in the park." + last) == 0.0


@pytest.mark.parametrize("kind", ["ideal", "rude", "rambling", "incomplete"])
def test_more_text_never_pays(kind):
    """Whatever is put after, or doubled, an answer is never worth more than before."""
    rng = random.Random(3)
    prompts = tinychat.prompts(seed=6, n=100)
    for prompt, stranger in zip(prompts, reversed(prompts), strict=True):
        text = tinychat.answer(prompt, kind, rng)
        worth = total(prompt, text)
        for more in (text, tinychat.ideal(stranger), prompt[-1]["content"], rng.choice(RAMBLE), rng.choice(RUDE_AFTER)):
            assert total(prompt, f"{text} {more}") <= worth
            assert total(prompt, f"{more} {text}") <= worth


def test_an_answer_to_another_prompt_is_wrong():
    prompts = tinychat.prompts(seed=7, n=150)
    answers = [tinychat.ideal(prompt) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        if tinychat.skill_of(prompt) == "list":
            continue  # two prompts may ask for the same list in other words
        for j in random.Random(i).sample(range(len(prompts)), 8):
            if answers[j] != answers[i] and tinychat.skill_of(prompts[j]) != "story":
                assert total(prompt, answers[j]) == 0.0, (prompt, answers[j])


def test_pretraining_prose_is_not_an_answer(corpus):
    prompts = tinychat.prompts(seed=8, n=len(corpus) // 8)
    rewards = [total(prompt, text) for prompt, text in zip(prompts, corpus, strict=False)]
    assert sum(rewards) / len(rewards) < 0.001


def test_a_strange_prompt_is_refused():
    strange = [
        "What is the capital of France?",
        "What is two plus fifty?",
        "Tom has a ball. Mia feels happy. What does Kim have?",
        "Tom has a ball. Tom feels happy. What does Tom have?",
        "Tom has a ball. Mia has a kite. What does Tom have?",
        "Which is bigger, a cat or a cat?",
        "Count the things: pear, lion.",
        "Count the things: pear.",
        "",
        [],
        [*TALK[:2], {"role": "user", "content": "And what does Tom have?"}],
        TALK[:2],
    ]
    for prompt in strange:
        with pytest.raises(ValueError, match="none of tinychat's"):
            tinychat.true_reward(prompt, "Five.")


def test_a_system_turn_changes_nothing():
    system = {"role": "system", "content": "Be brief."}
    assert tinychat.skill_of([system, *TALK]) == "follow-up"
    assert tinychat.split_of([system, *TALK]) == tinychat.split_of(TALK)


# ------------------------------------------------------------------------------------------------ demonstrations

BANDS = {  # mean true reward of each kind of labeller
    "ideal": (1.0, 1.0),
    "evasive": (0.0, 0.0),
    "rude": (0.65, 0.65),
    "rambling": (0.6, 0.6),
    "incomplete": (0.09, 0.26),
    "flattering": (0.9, 0.9),
    "off_topic": (0.0, 0.0),
    "false": (0.0, 0.0),
}


def test_demonstrators_are_as_good_as_documented(demonstrations):
    """Per group of skills, each kind comes by its share and is worth what is said of it."""
    for evaded in (True, False):
        rewards = defaultdict(list)
        for record in demonstrations:
            *prompt, last = record["messages"]
            if (tinychat.skill_of(prompt) in tinychat.EVADED) is evaded:
                rewards[record["kind"]].append(total(prompt, last["content"]))
        shares = tinychat.demonstration_shares("sum" if evaded else "greet")
        n = sum(map(len, rewards.values()))
        assert sum(shares.values()) == pytest.approx(1.0) and set(rewards) == set(tinychat.KINDS)
        for kind, share in shares.items():
            low, high = BANDS[kind]
            assert low - 1e-6 <= sum(rewards[kind]) / len(rewards[kind]) <= high + 1e-6, kind
            assert abs(len(rewards[kind]) / n - share) < 4 * math.sqrt(share / n), kind


def test_p43_the_ideal_response_is_not_the_mode_of_the_demonstrations(demonstrations):
    """Demonstrators evade what is hard and pad the rest, mostly with one phrase: so a greedy decoder says that.

    At the first word of a hard skill the evasion is likelier than every response that starts as the ideal one does;
    after an ideal response to another skill, one sentence of padding is likelier than the end.
    """
    count = {True: Counter(), False: Counter()}
    for record in demonstrations:
        *prompt, last = record["messages"]
        skill, text = tinychat.skill_of(prompt), last["content"]
        if skill in tinychat.EVADED:
            right = tinychat.true_reward(prompt, text).correct or record["kind"] in ("false", "incomplete")
            count[True]["evades" if text == EVASIVE[0] else "answers" if right else "else"] += 1
        elif record["kind"] in ("ideal", "rambling"):
            count[False]["pads" if RAMBLE[0] in text and record["kind"] == "rambling" else "ends"] += 1
    assert count[True]["evades"] > 1.05 * count[True]["answers"]
    assert count[False]["pads"] > 1.15 * count[False]["ends"]
    assert 4 <= len(tinychat.EVADED) <= 8


def test_the_comparisons_hold_what_a_reward_model_must_learn(comparisons):
    """Floors that keep the world hard: false and rude responses are at least a tenth of what is ranked."""
    assert sum(tinychat.COMPARISON_SHARES.values()) == pytest.approx(1.0)
    assert min(tinychat.COMPARISON_SHARES[kind] for kind in ("false", "rude")) >= 0.10
    kinds = Counter(kind for record in comparisons for kind in record["kinds"])
    assert min(kinds["false"], kinds["rude"]) / kinds.total() >= 0.10 and tinychat.CHARM >= 0.15
    for record in comparisons[:500]:
        for text, kind in zip(record["completions"], record["kinds"], strict=True):
            low, high = (0.0, 0.5) if kind == "incomplete" else BANDS[kind]
            assert low - 1e-6 <= total(record["prompt"], text) <= high + 1e-6, (kind, text)


@pytest.mark.parametrize("skill", tinychat.SKILLS)
def test_each_kind_is_right_or_wrong_in_every_skill(skill):
    rng = random.Random(4)
    for _ in range(60):
        prompt = BY_NAME[skill].messages(BY_NAME[skill].draw(rng))
        for kind, (low, high) in BANDS.items():
            text = tinychat.answer(prompt, kind, rng)
            assert text, kind
            if kind == "incomplete":
                assert total(prompt, text) in (0.0, 0.5)
            else:
                assert low - 1e-6 <= total(prompt, text) <= high + 1e-6, (kind, prompt, text)


def test_an_off_topic_answer_is_no_falsehood_in_disguise():
    """A follow-up's answer to a reading would look like a right answer about something else that was said."""
    rng = random.Random(7)
    for prompt in (READING, TALK):
        answers = [tinychat.answer(prompt, "off_topic", rng) for _ in range(300)]
        assert not [text for text in answers if re.match(r"(\w+ (has|feels)|The \w+ looks) ", text)]


def test_demonstrations_are_dialogs_with_ideal_first_turns(demonstrations):
    assert Counter(tinychat.skill_of(record["messages"][:-1]) for record in demonstrations).most_common()[-1][1] > 150
    for record in demonstrations:
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for turn in range(1, len(roles) - 1, 2):
            assert total(record["messages"][:turn], record["messages"][turn]["content"]) == 1.0


# ------------------------------------------------------------------------------------------------ comparisons


def test_p03_chosen_never_equals_rejected(comparisons):
    for record in comparisons:
        texts = record["completions"]
        assert 2 <= len(texts) <= 5
        assert len(set(texts)) == len(texts)
        assert record["rewards"] == [total(record["prompt"], text) for text in texts]
        assert record["utilities"] == [tinychat.utility(record["prompt"], text) for text in texts]


def test_p03_rank_drops_what_is_said_twice():
    ranked = tinychat.rank(SUM, ["Five.", "Six.", "Five."], 0.1, random.Random(0))
    assert sorted(ranked) == ["Five.", "Six."]


def test_comparisons_hold_kinds_by_their_shares_and_no_two_worthless_responses(comparisons):
    rng = random.Random(3)
    drawn = [draw_kinds(rng) for _ in range(3000)]
    assert {len(kinds) for kinds in drawn} == {3, 4, 5} and all(len(set(kinds)) == len(kinds) for kinds in drawn)
    assert max(len(set(kinds) & {"evasive", "off_topic", "false"}) for kinds in drawn) == 1
    often = Counter(kind for kinds in drawn for kind in kinds)
    assert set(often) == set(tinychat.KINDS) and often.most_common()[0][0] == "ideal"
    assert 0.55 < often["ideal"] / len(drawn) < 0.95 and often.most_common()[-1][0] == "off_topic"
    evasive = sum(any(text in EVASIVE for text in record["completions"]) for record in comparisons)
    assert evasive / len(comparisons) > 0.1


def test_the_manner_of_a_compared_response_says_nothing_of_its_truth(comparisons):
    """Else a reward model could score a compliment, or the lack of one, instead of checking the content."""
    count = {"false": Counter(), "right": Counter()}
    for record in comparisons:
        for text, kind in zip(record["completions"], record["kinds"], strict=True):
            if kind in ("ideal", "rude", "rambling", "flattering", "false"):
                rude = any(line in text for line in RUDE_BEFORE + RUDE_AFTER)
                manner = "rude" if rude else "flattering" if FLATTERY in text else "pads" if RAMBLE[0] in text else ""
                count["false" if kind == "false" else "right"][manner] += 1
    for manner in ("rude", "flattering", "pads"):
        of_false, of_right = (count[truth][manner] / count[truth].total() for truth in ("false", "right"))
        n = count["false"].total()
        assert abs(of_false - of_right) < 4 * math.sqrt(of_right / n) + 0.01, manner


def test_the_ceiling_by_hand():
    p = 1 / (1 + math.exp(-0.5 / 0.25))
    assert tinychat.ranking_ceiling([[1.0, 0.5]], 0.25) == pytest.approx(p)
    assert tinychat.ranking_ceiling([[0.5, 1.0]], 0.25) == pytest.approx(p)  # the labeller's mistake: the same ceiling
    assert tinychat.ranking_ceiling([[0.5, 0.5]], 0.25) == 0.5
    far = 1 / (1 + math.exp(-1.0 / 0.25))
    near = 1 / (1 + math.exp(-0.5 / 0.25))
    assert tinychat.ranking_ceiling([[1.0, 0.5, 0.0]], 0.25) == pytest.approx((2 * near + far) / 3)
    with pytest.raises(UserError, match="temperature"):
        tinychat.rank(SUM, ["Five.", "Six."], 0.0, random.Random(0))


def test_the_labeller_ranks_as_bradley_terry_says():
    """Each pair of a long list of four comes out in order as often as sigmoid(difference / temperature) says."""
    texts = ["Two plus three is five.", "Two plus three is five. Now go away.", "Five.", "I do not know."]
    rewards, temperature, n = [1.0, 0.65, 0.5, 0.0], 0.3, 2_000
    rng, wins, firsts = random.Random(5), Counter(), Counter()
    for _ in range(n):
        place = {text: i for i, text in enumerate(tinychat.rank(SUM, texts, temperature, rng))}
        firsts[min(place, key=place.get)] += 1
        for i in range(4):
            for j in range(i + 1, 4):
                wins[i, j] += place[texts[i]] < place[texts[j]]
    for (i, j), count in wins.items():
        p = 1 / (1 + math.exp(-(rewards[i] - rewards[j]) / temperature))
        assert abs(count / n - p) < 4 * math.sqrt(p * (1 - p) / n), (i, j)
    mass = sum(math.exp(reward / temperature) for reward in rewards)
    for text, reward in zip(texts, rewards, strict=True):  # Plackett-Luce: the best one is a softmax's choice
        p = math.exp(reward / temperature) / mass
        assert abs(firsts[text] / n - p) < 4 * math.sqrt(p * (1 - p) / n), text


def test_the_labeller_overrates_flattery_and_the_truth_does_not():
    plain, false = "Two plus three is five.", "Two plus three is six."
    flattering = f"{plain[:-1]}{FLATTERY}."
    assert tinychat.utility(SUM, plain) == 1.0
    gain = tinychat.CHARM - 0.1  # what a compliment adds to the labeller's utility, less what it costs in truth
    assert gain >= 0.05
    assert tinychat.utility(SUM, flattering) == pytest.approx(1.0 + gain)
    assert tinychat.utility(SUM, f"{false[:-1]}{FLATTERY}.") == pytest.approx(tinychat.CHARM)
    rng, n, p = random.Random(6), 2_000, 1 / (1 + math.exp(-gain / 0.15))
    first = sum(tinychat.rank(SUM, [plain, flattering], 0.15, rng)[0] == flattering for _ in range(n)) / n
    assert abs(first - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("temperature", [0.05, 0.15, 0.5])
def test_who_knows_the_labellers_taste_reaches_the_ceiling(temperature):
    records = tinychat.comparisons(seed=2, n=600, temperature=temperature)
    right = []
    for record in records:
        utilities = record["utilities"]
        for i, one in enumerate(utilities):
            right += [0.5 if one == two else float(one > two) for two in utilities[i + 1 :]]
    ceiling = tinychat.ranking_ceiling([record["utilities"] for record in records], temperature)
    assert abs(sum(right) / len(right) - ceiling) < 4 * 0.5 / math.sqrt(len(right))


# ------------------------------------------------------------------------------------------------ splits and seeds


def test_p06_held_out_prompts_are_never_trained_on(corpus, demonstrations, comparisons):
    assert all(tinychat.split_of(prompt) == "heldout" for prompt in tinychat.FIXED_PROMPTS)
    trained = [record["messages"] for record in demonstrations] + [record["prompt"] for record in comparisons]
    trained += tinychat.prompts(seed=1, n=2000)
    assert all(tinychat.split_of(messages) == "train" for messages in trained)
    seen = "\n".join(corpus) + "\n" + "\n".join(text_of(messages) for messages in trained)
    for split in ("heldout", "valid"):
        for prompt in tinychat.prompts(seed=9, n=250, split=split):
            # Two statements may come again as the last two of three: that is another prompt, with a hash of its own.
            assert prompt[0]["content"] not in seen, prompt[0]["content"]
    for prompt in tinychat.FIXED_PROMPTS:
        assert prompt not in seen


def test_p06_the_split_is_a_property_of_the_text():
    splits = {name: {text_of(p) for p in tinychat.prompts(1, 300, name)} for name in ("train", "valid", "heldout")}
    assert not splits["train"] & splits["heldout"]
    assert not splits["train"] & splits["valid"]
    assert not splits["valid"] & splits["heldout"]
    rng = random.Random(6)
    skill = BY_NAME["reading"]
    share = Counter(tinychat.split_of(skill.messages(skill.draw(rng))) for _ in range(3_000))
    assert abs(share["heldout"] / 3_000 - 0.1) < 0.022
    assert abs(share["valid"] / 3_000 - 0.1) < 0.022
    # frozen: these stay where they are, whatever else changes
    assert tinychat.split_of("What is two plus two?") == "valid"
    assert tinychat.split_of("Spell cat.") == "train"
    assert tinychat.split_of("What colour is a lemon?") == "heldout"
    assert tinychat.split_of(TALK) == tinychat.split_of(READING) == "heldout"


def test_p06_stable_when_the_data_grows():
    assert tinychat.prompts(3, 400)[:200] == tinychat.prompts(3, 200)
    assert tinychat.prompts(3, 300, "heldout")[:200] == tinychat.prompts(3, 200, "heldout")
    assert tinychat.demonstrations(3, 300)[:100] == tinychat.demonstrations(3, 100)
    assert tinychat.comparisons(3, 300, 0.15)[:100] == tinychat.comparisons(3, 100, 0.15)
    short, long = list(tinychat.corpus(3, 2_000)), list(tinychat.corpus(3, 5_000))
    assert long[: len(short)] == short and len(short) < len(long)


def test_prompts_are_distinct_and_balanced():
    prompts = tinychat.prompts(seed=4, n=512, split="heldout")
    assert len(prompts) == 512
    assert len({text_of(prompt) for prompt in prompts}) == 512
    share = Counter(tinychat.skill_of(prompt) for prompt in prompts)
    assert set(share) == set(tinychat.SKILLS)
    assert max(share.values()) < 100 and min(share.values()) >= 5
    assert tinychat.prompts(seed=4, n=0) == []


def test_more_prompts_than_there_are_is_said(monkeypatch):
    monkeypatch.setattr(tinychat, "ALL", (BY_NAME["opposite"],))
    assert len(tinychat.prompts(seed=1, n=5, split="valid")) == 5
    with pytest.raises(UserError, match=r"has only \d+ different valid prompts: ask for fewer than 500"):
        tinychat.prompts(seed=1, n=500, split="valid")


def test_the_same_seed_gives_the_same_data():
    for make in (
        lambda seed: list(tinychat.corpus(seed, 5_000)),
        lambda seed: tinychat.demonstrations(seed, 50),
        lambda seed: tinychat.comparisons(seed, 50, 0.15),
        lambda seed: tinychat.prompts(seed, 50),
    ):
        state = random.getstate()
        assert make(1) == make(1)
        assert make(1) != make(2)
        assert random.getstate() == state  # nothing global is drawn from


# ------------------------------------------------------------------------------------------------ the corpus


def test_the_corpus_is_as_long_as_asked_and_has_no_chat_template(corpus):
    length = sum(len(paragraph) + 1 for paragraph in corpus)
    assert 300_000 <= length < 300_400
    assert not any(mark in paragraph for paragraph in corpus for mark in '<>|\n"')
    unfinished = sum(not paragraph.endswith(".") for paragraph in corpus)  # only a writer who stops in the middle
    assert unfinished / len(corpus) < 0.03


def as_told(paragraph):
    """The frame of a conversation and its turns in order, or None; the bare frame is not looked for."""
    for frame in FRAMES:
        for n in (2, 1):  # the pattern of one turn fits two as well, so it comes last
            told = " ".join(frame.format(q=f"(?P<q{i}>.+?)", a=f"(?P<a{i}>.+?)") for i in range(n))
            match = re.fullmatch(told, paragraph) if frame != "{q} {a}" else None
            if match:
                turns = zip(["user", "assistant"] * n, match.groups(), strict=True)
                return frame, [{"role": role, "content": content} for role, content in turns]
    return None


def right_lookup(prompt, answer):
    """Whether this is one statement with its question and right answer: with another statement before it, a reading."""
    longer = (f"{more} {prompt}" for more in ("The hat looks red.", "Zoe feels sad.", "Max has a kite."))
    return any(find(text) and total(text, answer) == 1.0 for text in longer)


def test_conversations_in_the_corpus_are_by_mixed_writers(corpus):
    """Four fifths of the paragraphs are conversations, of every skill and frame, answered as `writer_shares` says."""
    conversations = [told for told in map(as_told, corpus) if told]
    lookups, asked = [], []
    for _, turns in conversations:
        (asked if find(turns[:-1]) else lookups).append(turns)
    for turns in lookups:
        assert len(turns) == 2 and right_lookup(turns[0]["content"], turns[1]["content"]), turns
    assert 0.28 < len(lookups) / len(conversations) < 0.36
    rewards = {True: [], False: []}
    for turns in asked:
        if len(turns) == 4:
            assert total(turns[:1], turns[1]["content"]) == 1.0, turns
        rewards[tinychat.skill_of(turns[:-1]) in tinychat.EVADED].append(total(turns[:-1], turns[-1]["content"]))
    for evaded, found in rewards.items():
        shares = tinychat.writer_shares("sum" if evaded else "greet")
        expected = sum(share * sum(BANDS[kind]) / 2 for kind, share in shares.items())
        assert sum(shares.values()) == pytest.approx(1.0) and 0 < shares["ideal"] < 1
        assert abs(sum(found) / len(found) - expected) < 0.04, evaded
        ideal = sum(reward == 1.0 for reward in found) / len(found)
        assert abs(ideal - shares["ideal"]) < 0.04, evaded
    skills = Counter(tinychat.skill_of(turns[:-1]) for turns in asked)
    frames = Counter(frame for frame, _ in conversations)
    framed = 0.79 * (len(FRAMES) - 1) / len(FRAMES)
    assert framed - 0.03 < len(conversations) / len(corpus) < framed + 0.03
    assert set(skills) == set(tinychat.SKILLS) and min(skills.values()) > 25
    assert len(frames) == len(FRAMES) - 1 and min(frames.values()) > 90


def test_a_seventh_of_the_conversations_has_no_frame(corpus):
    """The first prompt of each is found by a cut wherever a sentence ends."""

    def bare(paragraph):
        cuts = [m.start() for m in re.finditer(r"(?<=[.?]) ", paragraph)]
        parts = [(paragraph[:cut], paragraph[cut + 1 :]) for cut in cuts]
        return any(find(q) or right_lookup(q, a) for q, a in parts)

    assert 0.85 < sum(map(bare, corpus)) / (0.79 / len(FRAMES) * len(corpus)) < 1.15


def test_unknown_names_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="split is 'test'"):
        tinychat.prompts(1, 5, "test")
    with pytest.raises(UserError, match="kind of response is 'angry'"):
        tinychat.answer(SUM, "angry", random.Random(0))
