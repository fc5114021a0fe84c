"""The report card: intervals against hand-computed and textbook figures, the table, the file that others read."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from instruct_llama import presets
from instruct_llama.config import EvaluateConfig, SamplingConfig, UserError
from instruct_llama.data import sources
from instruct_llama.evaluation import baselines
from instruct_llama.evaluation import report as evaluate
from instruct_llama.evaluation.report import (
    Estimate,
    accuracy_estimate,
    compare_with_expected,
    describe,
    estimate,
    paired,
)
from instruct_llama.evaluation.statistics import mean_of_groups, ratio_estimate
from instruct_llama.model import sampling as sampler
from instruct_llama.model.sampling import SampledTokens, generate, generate_ids, sample
from instruct_llama.rlhf.rollout import Rollouts
from instruct_llama.training import checkpoint
from instruct_llama.worlds import tinychat
from instruct_llama.worlds.tinychat.corpus import FRAMES


def test_the_bootstrap_agrees_with_the_normal_interval():
    x = np.random.default_rng(3).random(400)
    found = estimate(x)
    half = 1.96 * x.std() / math.sqrt(400)
    assert found.mean == pytest.approx(x.mean()) and found.n == 400
    assert found.low == pytest.approx(x.mean() - half, abs=0.004)
    assert found.high == pytest.approx(x.mean() + half, abs=0.004)


def test_the_bootstrap_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    found = [estimate(rng.random(60), seed=i) for i in range(300)]
    assert 0.91 <= np.mean([e.low <= 0.5 <= e.high for e in found]) <= 0.985


def test_the_bootstrap_is_a_function_of_its_seed_and_keeps_its_bounds():
    x = [0.0] * 9 + [1.0]
    assert estimate(x) == estimate(x) and estimate(x).low == 0.0 and estimate(x).high <= 1.0
    assert estimate([0.25]) == Estimate(0.25, 0.25, 0.25, 1)
    with pytest.raises(UserError, match="nothing to estimate"):
        estimate([])


@pytest.mark.parametrize(
    "right, n, low, high",  # Wilson (1927): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_by_hand(right, n, low, high):
    found = accuracy_estimate(right, n)
    assert (found.mean, found.n) == (right / n, n)
    assert found.low == pytest.approx(low, abs=5e-5) and found.high == pytest.approx(high, abs=5e-5)


def test_an_estimate_prints_its_interval():
    assert str(Estimate(0.5211, 0.5, 0.5449, 512)) == "0.521 [0.500, 0.545]"
    assert Estimate(0.25, -0.125, 0.5, 9).signed() == "+0.250 [-0.125, +0.500]"


def test_paired_differences_do_not_count_what_both_models_find_hard():
    """Two models that differ by 0.1 at every prompt, easy or hard: no doubt is left, though both means vary much."""
    theirs = [0.0, 0.9] * 50
    ours = [value + 0.1 for value in theirs]
    found = paired(ours, theirs)
    assert (found.mean, found.n) == (pytest.approx(0.1), 100)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert estimate(ours).low < estimate(theirs).high  # unpaired intervals overlap
    assert paired(theirs, ours).mean == pytest.approx(-0.1)
    with pytest.raises(UserError, match="3 values and 2 to pair them with"):
        paired([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_mean_over_groups_counts_each_group_once():
    found = mean_of_groups({"many": [1.0] * 9, "one": [0.0]})
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 10)
    rng = np.random.default_rng(5)
    a, b = rng.random(400), rng.random(25)
    found = mean_of_groups({"a": a, "b": b})
    half = 1.96 * math.sqrt(a.var() / 400 + b.var() / 25) / 2  # the groups' errors are independent
    assert found.mean == pytest.approx((a.mean() + b.mean()) / 2)
    assert found.low == pytest.approx(found.mean - half, abs=0.01)
    assert found.high == pytest.approx(found.mean + half, abs=0.01)
    for empty in ({}, {"a": [1.0], "b": []}):
        with pytest.raises(UserError, match="nothing to estimate"):
            mean_of_groups(empty)


def test_a_share_of_pairs_is_as_sure_as_its_comparisons_are_many():
    """All pairs of a comparison right or all wrong, half of each: 200 values of 0 or 1, however many pairs each has."""
    for pairs in (1, 3, 10):
        found = ratio_estimate([0.0, pairs] * 100, [pairs] * 200)
        assert (found.mean, found.n) == (0.5, 200)
        assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), abs=0.015)
    assert ratio_estimate([3.0, 0.5], [3, 1]).mean == 3.5 / 4  # a pair weighs the same, whatever its comparison
    assert ratio_estimate([1.0, 0.0], [1, 1], seed=1) == ratio_estimate([1.0, 0.0], [1, 1], seed=1)
    with pytest.raises(UserError, match="nothing to estimate"):
        ratio_estimate([], [])


def test_rewards_by_skill():
    prompts = tinychat.prompts(3, 30, split="heldout")
    hard = tinychat.skill_of(prompts[0])
    rewards = [0.0 if tinychat.skill_of(prompt) == hard else 1.0 for prompt in prompts]
    means = evaluate.skill_means(prompts, rewards)
    assert list(means) == [skill for skill in tinychat.SKILLS if skill in means]
    assert {skill: one.mean for skill, one in means.items()} == {skill: float(skill != hard) for skill in means}
    assert means[hard].n == rewards.count(0.0) and sum(one.n for one in means.values()) == 30
    assert evaluate.mean_over_skills(prompts, rewards).mean == pytest.approx(1 - 1 / len(means))


def test_check_off_says_whether_a_figure_is_as_expected(capsys):
    laptop = presets.get("laptop")
    compare_with_expected(laptop, "sft", {"true_reward": 0.5, "loss": 1.25})
    compare_with_expected(laptop, "ppo", {"true_reward": 0.5})
    compare_with_expected(presets.get("tiny"), "ppo", {"true_reward": 0.5})
    fair, none, low, tiny = capsys.readouterr().out.splitlines()
    assert "0.500   expected 0.35 to 0.60: as expected" in fair and "no expectation" in none
    assert "expected 0.90 to 1.00: NOT as expected: see What can go wrong" in low
    assert "preset tiny: no expectation" in tiny


# ---------------------------------------------------------------- judging


class Oracle(torch.nn.Module):
    """A reward model that knows the true reward of every sequence, up to a sign."""

    def __init__(self, tokenizer, sign: float):
        super().__init__()
        self.tokenizer, self.sign, self.dummy = tokenizer, sign, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        return self.sign * (segment_ids[:, :, None] == segment_ids[:, None]).sum(-1).float()  # longer is better


def test_reward_accuracy_counts_pairs_and_halves_ties(pipeline):
    _, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    prompt = [{"role": "user", "content": "Tell me."}]
    texts = ["yes, it is a very long answer", "a ball", "a"]
    longer = {"prompt": prompt, "completions": texts, "utilities": [1.0, 0.5, 0.0]}
    other = [{"role": "user", "content": "Tell me more."}]
    tie = {"prompt": other, "completions": ["a b", "b a"], "utilities": [1.0, 0.0]}
    found, ceiling = evaluate.reward_accuracy(Oracle(tokenizer, 1.0), tokenizer, [longer, tie], 0.15)
    assert (found.mean, found.n) == (3.5 / 4, 2)  # 4 pairs of 2 comparisons
    assert (found.low, found.high) == (0.5, 1.0)  # of prompts drawn anew: both the tie, both the other
    expected = [1 / (1 + math.exp(-gap / 0.15)) for gap in (0.5, 1.0, 0.5, 1.0)]
    assert ceiling == pytest.approx(np.mean(expected), abs=1e-6)
    worst, _ = evaluate.reward_accuracy(Oracle(tokenizer, -1.0), tokenizer, [longer, tie], 0.15)
    assert worst.mean == 0.5 / 4
    unknown, ceiling = evaluate.reward_accuracy(Oracle(tokenizer, 1.0), tokenizer, [{**tie, "utilities": None}], 0.15)
    assert unknown.n == 1 and math.isnan(ceiling)
    too_long = {"prompt": prompt, "completions": ["word " * 400, "a"], "utilities": [1.0, 0.0]}
    kept, _ = evaluate.reward_accuracy(Oracle(tokenizer, 1.0), tokenizer, [too_long, tie], 0.15)
    assert kept.n == 1
    with pytest.raises(UserError, match="None of the 1 comparisons fits"):
        evaluate.reward_accuracy(Oracle(tokenizer, 1.0), tokenizer, [too_long], 0.15)


def test_the_interval_of_reward_accuracy_is_over_prompts(pipeline):
    """Comparisons of one prompt succeed and fail together: however many, they are as sure as their prompts."""
    _, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    right, wrong = ["it is a ball", "a"], ["a", "it is a ball"]
    asked = {"one": [right] * 6, "two": [wrong] * 3, "three": [right, wrong, [*right[:1], "it is", "a"]]}
    comparisons = [{"prompt": prompt, "completions": texts} for prompt, mine in asked.items() for texts in mine]
    found, _ = evaluate.reward_accuracy(Oracle(tokenizer, 1.0), tokenizer, comparisons, 0.15, batch_size=4)
    assert (found.mean, found.n) == ((6 + 0 + 4) / (6 + 3 + 5), 12)
    assert (found.low, found.high) == (0.0, 1.0)  # of prompts drawn anew: each of them three times


def test_the_models_own_comparisons_have_a_ceiling_too(pipeline, monkeypatch):
    """They come with the rewards and utilities of their ranked order, as the labellers' do."""
    from instruct_llama.stages import reward

    _, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    prompts = tinychat.prompts(1, 5, split="train")
    texts = [text for p in prompts for text in (tinychat.ideal(p), "I do not know.", f"{tinychat.ideal(p)} Silly.")]

    def play(policy, encoded, *rest):
        ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        width = max(map(len, ids))
        answers = torch.tensor([one + [0] * (width - len(one)) for one in ids])
        mask = torch.tensor([[True] * len(one) + [False] * (width - len(one)) for one in ids])
        lengths, has_eos = torch.zeros(len(ids), dtype=torch.int64), torch.ones(len(ids), dtype=torch.bool)
        return Rollouts([[] for _ in ids], answers, lengths, answers, mask, has_eos, torch.zeros(mask.shape))

    monkeypatch.setattr(reward.rollout, "sample_responses", play)
    model = torch.nn.Linear(1, 1)
    config = replace(pipeline.reward, responses_per_prompt=3)
    own = reward.sample_comparisons(model, tokenizer, prompts, config, pipeline.world.temperature, 1, pipeline.ppo)
    assert [record["prompt"] for record in own] == prompts
    for record in own:
        asked, ranked = record["prompt"], record["completions"]
        assert len(ranked) == 3
        assert record["utilities"] == [tinychat.utility(asked, text) for text in ranked]
        assert record["rewards"] == [tinychat.true_reward(asked, text).total for text in ranked]
    _, ceiling = evaluate.reward_accuracy(Oracle(tokenizer, 1.0), tokenizer, own, pipeline.world.temperature)
    utilities = [record["utilities"] for record in own]
    assert ceiling == tinychat.ranking_ceiling(utilities, pipeline.world.temperature) > 0.5


def test_true_reward_is_the_mean_over_the_models_own_answers(pipeline, monkeypatch):
    prompts = tinychat.prompts(1, 4, split="heldout")
    said = "I do not know."
    monkeypatch.setattr(evaluate, "generate", lambda *args, **kwargs: [said] * len(prompts))
    found, each = evaluate.true_reward(None, None, prompts, pipeline.evaluate)
    assert each == [tinychat.true_reward(prompt, said).total for prompt in prompts]
    assert found.mean == pytest.approx(np.mean(each)) and found.n == 4


# ---------------------------------------------------------------- baselines


def test_a_prompt_as_prose_is_what_the_corpus_tells_up_to_the_answer():
    turns = [{"role": "user", "content": "Where is Tom?"}, {"role": "assistant", "content": "Tom is here."},
             {"role": "user", "content": "And Mia?"}]  # fmt: skip
    told = FRAMES[1].format(q="Where is Tom?", a="Tom is here.") + " " + FRAMES[1].format(q="And Mia?", a="Mia too.")
    assert told == evaluate.as_prose(turns) + " Mia too."
    assert evaluate.as_prose("Where is Tom?") == "The child asked: Where is Tom? The teacher said:"


def test_asked_as_prose_a_model_goes_on_from_the_prompt(pipeline):
    """Greedy, against a loop by hand without batches, padding or cache; sampled, a function of the seed."""
    model, tokenizer = checkpoint.load(Path(pipeline.out) / "pretrain")
    prompts = tinychat.prompts(1, 5, split="heldout")
    ends = (tokenizer.encode("\n")[-1], tokenizer.eos_id)
    config = replace(pipeline.evaluate, temperature=0.0, max_new_tokens=12, batch_size=2)
    expected = []
    for prompt in prompts:
        ids = tokenizer.encode(evaluate.as_prose(prompt))
        start = len(ids)
        while len(ids) < start + 12 and (len(ids) == start or ids[-1] not in ends):
            logits = model(torch.tensor([ids]))[0, -1].detach()
            logits[list(tokenizer.suppress_tokens)] = -math.inf
            ids = [*ids, int(logits.argmax())]
        expected.append(tokenizer.decode(ids[start:]).rstrip())
    assert evaluate.prose_responses(model, tokenizer, prompts, config) == expected
    config = replace(config, temperature=1.0)
    drawn = [evaluate.prose_responses(model, tokenizer, prompts, config, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_as_prose_ends_with_the_document_the_line_or_the_turn(pipeline, monkeypatch):
    model, tokenizer = checkpoint.load(Path(pipeline.out) / "pretrain")
    said, asked = ("It is red.\n", "It is red. The child asked: Who?", "It is red"), {}

    def scripted(model, starts, sampling, special, generator, eos_ids):
        asked.update(sampling=sampling, special=special, eos_ids=eos_ids, starts=starts)
        ids = [tokenizer.encode(text) for text in said]
        width = max(map(len, ids))
        tokens = torch.tensor([one + [tokenizer.pad_id] * (width - len(one)) for one in ids])
        mask = tokens != tokenizer.pad_id
        return SampledTokens(tokens, torch.zeros(mask.shape), mask, torch.zeros(len(mask), dtype=torch.bool))

    monkeypatch.setattr(sampler, "sample", scripted)
    prompts = ["What looks red?"] * 3
    found = evaluate.prose_responses(model, tokenizer, prompts, replace(pipeline.evaluate, temperature=0.5))
    assert found == ["It is red.", "It is red.", "It is red"]
    assert set(asked["eos_ids"]) == {tokenizer.eos_id, tokenizer.encode("\n")[-1]} and asked["special"] is tokenizer
    assert asked["starts"] == [tokenizer.encode(evaluate.as_prose(prompt)) for prompt in prompts]
    assert asked["sampling"] == SamplingConfig(pipeline.evaluate.max_new_tokens, 0.5)


def test_sampled_ids_are_those_of_the_texts(pipeline):
    model, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    prompts = tinychat.prompts(1, 5, split="heldout")
    ids = generate_ids(model, tokenizer, prompts, SamplingConfig(8), seed=3, batch_size=2)
    assert [tokenizer.decode(one) for one in ids] == generate(model, tokenizer, prompts, 8, seed=3, batch_size=2)
    assert all(1 <= len(one) <= 8 for one in ids)


def test_p38_log_probabilities_of_sampled_ids_are_the_samplers(pipeline):
    model, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    prompts = tinychat.prompts(1, 7, split="heldout")
    encoded, generator = [tokenizer.encode_prompt(p) for p in prompts], torch.Generator().manual_seed(0)
    made = sample(model, encoded, SamplingConfig(9), tokenizer, generator)
    ids = [row[kept].tolist() for row, kept in zip(made.tokens, made.mask, strict=True)]
    ids[2] = [*ids[2][:3], tokenizer.eos_id]  # of another length
    found = baselines.response_logprobs(model, tokenizer, prompts, ids, batch_size=3)
    expected = made.logprobs.sum(1).tolist()
    assert found[:2] + found[3:] == pytest.approx(expected[:2] + expected[3:], abs=1e-3)
    logits = model(torch.tensor([[*tokenizer.encode_prompt(prompts[2]), *ids[2]]])).detach()[0, -5:-1]
    logits[:, list(tokenizer.suppress_tokens)] = -math.inf
    assert found[2] == pytest.approx(float(logits.log_softmax(-1)[range(4), ids[2]].sum()), abs=1e-3)


def test_scores_do_not_depend_on_the_batch(pipeline):
    model, tokenizer = checkpoint.load(Path(pipeline.out) / "reward")
    torch.nn.init.normal_(model.value_head.weight)
    starts = [tokenizer.encode_prompt(prompt) for prompt in tinychat.prompts(1, 4, split="heldout")]
    texts = [["No."], ["Yes, it is.", "I do not know."], ["No.", "Yes.", "No."], ["A red ball."]]
    items = [[[*ids, *tokenizer.encode(text), tokenizer.eos_id] for text in some]
             for ids, some in zip(starts, texts, strict=True)]  # fmt: skip
    expected = [[float(model(torch.tensor([ids])).detach()[0, -1]) for ids in some] for some in items]
    for size in (1, 4, 64):
        found = baselines.raw_scores(model, tokenizer.pad_id, items, size)
        assert [len(some) for some in found] == [1, 2, 3, 1]
        assert sum(found, []) == pytest.approx(sum(expected, []), abs=1e-4)


def test_best_of_n_keeps_the_response_that_the_reward_model_likes_best(pipeline, monkeypatch):
    _, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    said = lambda *texts: [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]  # noqa: E731
    endless = tokenizer.encode("this one would win by its length but it has no end")
    sampled = [
        *said("a", "a ball", "a"),  # the longest is the best in this reward model's eyes
        endless, *said("b", "b"),  # what has no end never wins over what has one
        endless, endless[:3], endless[:2],  # no end at all: the first
        *said("cat ball", "ball cat", "a"),  # equal scores: the first
    ]  # fmt: skip
    asked = {}
    monkeypatch.setattr(baselines, "generate_ids", lambda m, t, prompts, *a, **k: asked.update(
        prompts=prompts, arguments=(*a, *k.items())) or sampled)  # fmt: skip
    prompts = [[{"role": "user", "content": f"Say {i}."}] for i in range(4)]
    config = replace(pipeline.evaluate, temperature=0.0, batch_size=5)
    best = evaluate.best_of(None, tokenizer, Oracle(tokenizer, 1.0), prompts, 3, config, seed=4)
    assert best == ["a ball", "b", tokenizer.decode(endless), "cat ball"]
    assert asked["prompts"] == [prompt for prompt in prompts for _ in range(3)]
    assert asked["arguments"] == (SamplingConfig(config.max_new_tokens), 4, 5, ("keys", ("best_of",)))  # temperature 1
    worst = evaluate.best_of(None, tokenizer, Oracle(tokenizer, -1.0), prompts, 3, config)
    assert worst == ["a", "b", tokenizer.decode(endless), "a"]
    with pytest.raises(UserError, match="at least 1"):
        evaluate.best_of(None, tokenizer, None, prompts, 0, config)


def test_the_best_of_one_is_a_sample(pipeline):
    model, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    judge, _ = checkpoint.load(Path(pipeline.out) / "reward")
    prompts, config = tinychat.prompts(1, 4, split="heldout"), pipeline.evaluate
    expected = evaluate.sample_responses(model, tokenizer, prompts, config, seed=2, keys=("best_of",))
    assert evaluate.best_of(model, tokenizer, judge, prompts, 1, config, seed=2) == expected
    assert evaluate.sample_responses(model, tokenizer, prompts, config, seed=2) != expected  # numbers of its own


@pytest.mark.parametrize("n, nats", [(1, 0.0), (2, 0.1931), (16, 1.8351)])  # arXiv:2401.01879: log n - (n - 1) / n
def test_the_kl_bound_of_best_of_n(n, nats):
    assert evaluate.best_of_kl_bound(n) == pytest.approx(nats, abs=5e-5)


def test_kinds_are_judged_by_who_stands_above_the_ideal(pipeline, monkeypatch):
    """A reward model that is the labeller's utility reaches every ceiling; its opposite what is left."""
    _, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    prompts, seen = tinychat.prompts(2, 24, split="heldout"), []
    sign = 1.0

    def scores(model, pad_id, items, batch_size):
        found = []
        for prompt, group in zip(prompts, items, strict=True):
            start = tokenizer.encode_prompt(prompt)
            assert all(ids[: len(start)] == start and ids[-1] == tokenizer.eos_id for ids in group)
            texts = [tokenizer.decode(ids[len(start) :]) for ids in group]
            seen.append(texts)
            found.append([sign * tinychat.utility(prompt, text) for text in texts])
        return found

    monkeypatch.setattr(baselines, "raw_scores", scores)
    found = evaluate.kind_accuracy(None, tokenizer, prompts, seed=1)
    kinds = list(tinychat.KINDS)
    assert list(found) == kinds[1:] and all(one["mean"] == one["ceiling"] for one in found.values())
    assert found["flattering"]["ceiling"] == 0.0 and found["false"]["ceiling"] == found["rude"]["ceiling"] == 1.0
    for kind in ("rude", "flattering", "rambling"):
        texts_of = ((texts[0].removesuffix("."), texts[kinds.index(kind)]) for texts in seen)  # flattery: before it
        assert all(ideal in text for ideal, text in texts_of), "not the words of the ideal response"
    assert asdict(accuracy_estimate(24, 24)).items() <= found["false"].items()
    sign = -1.0
    wrong = evaluate.kind_accuracy(None, tokenizer, prompts, seed=1)
    assert {kind: one["mean"] for kind, one in wrong.items()} == {k: 1 - one["ceiling"] for k, one in found.items()}
    sign = 0.0  # nothing but ties
    assert {one["mean"] for one in evaluate.kind_accuracy(None, tokenizer, prompts, seed=1).values()} == {0.5}
    first = [texts[1:] for texts in seen[:24]]
    evaluate.kind_accuracy(None, tokenizer, prompts, seed=5)
    assert [texts[1:] for texts in seen[-24:]] != first


# ---------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def report(pipeline, tmp_path_factory):
    """(report, settings) of a copy of the pipeline, with an unfinished stage beside the finished ones."""
    out = tmp_path_factory.mktemp("report") / "runs"
    shutil.copytree(pipeline.out, out)
    checkpoint.write_info(out / "unfinished", {"kind": "lm", "model": {}})
    settings = pipeline.replace(out=str(out))
    return evaluate.report_card(settings), settings


def assert_contract(made, ppo_runs):
    """DESIGN section 7: every figure with mean, low, high, n, and none at a stage that it does not belong to."""
    estimates = {
        "true_reward", "true_reward_greedy", "true_reward_by_skill", "true_reward_greedy_by_skill", "as_prose",
        "as_prose_greedy", "best_of_16", "minus_sft", "minus_sft_greedy", "minus_ppo", "minus_ppo_greedy", "score",
        "score_greedy", "kl", "score_minus_ppo", "score_minus_ppo_greedy", "accuracy",
    }  # fmt: skip
    policy = {"true_reward", "true_reward_greedy", "true_reward_by_skill", "true_reward_greedy_by_skill"}
    against, scored = {"minus_sft", "minus_sft_greedy"}, {"score", "score_greedy", "kl"}
    expected = {
        "pretrain": policy | {"as_prose", "as_prose_greedy"}, "sft": policy | {"best_of_16"},
        "sft-qlora": policy | against, "reward": {"accuracy"}, "ppo": policy | against | scored,
        "ppo-kl0": policy | against | scored
        | {"minus_ppo", "minus_ppo_greedy", "score_minus_ppo", "score_minus_ppo_greedy"},
    }  # fmt: skip
    assert [name for name in made["stages"] if name.startswith("ppo")] == ppo_runs
    for name, entry in made["stages"].items():
        assert estimates & set(entry) == expected[name], name
        for key in expected[name]:
            extra = {"kl_bound"} if key == "best_of_16" else set()
            assert set(entry[key]) == {"mean", "low", "high", "n"} | extra
            assert entry[key]["low"] <= entry[key]["mean"] <= entry[key]["high"]
        if name != "reward":
            assert list(entry["skills"]) == [skill for skill in tinychat.SKILLS if skill in entry["skills"]]
    assert set(made["stages"]["reward"]["kinds"]) == set(tinychat.KINDS) - {"ideal"}
    assert {"perplexity"} & set(made["stages"]["sft"]) and {"perplexity"} & set(made["stages"]["sft-qlora"])


def test_the_report_has_the_contracts_shape(report):
    made, settings = report
    assert json.loads((settings.out_dir / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(made))
    assert (made["preset"], made["seed"]) == ("tiny", 1)
    assert list(made["stages"]) == ["pretrain", "sft", "sft-qlora", "reward", "ppo"]
    for name in ("pretrain", "sft", "sft-qlora", "ppo"):
        figures = made["stages"][name]["true_reward"]
        assert set(figures) == {"mean", "low", "high", "n"} and figures["n"] == settings.evaluate.prompts
        assert 0 <= figures["low"] <= figures["mean"] <= figures["high"] <= 1
        assert [a["prompt"] for a in made["stages"][name]["samples"]] == list(tinychat.FIXED_PROMPTS)
    assert_contract(made, ppo_runs=["ppo"])
    accuracy = made["stages"]["reward"]["accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1
    assert 0.5 < made["stages"]["reward"]["ceiling"] <= 1 and accuracy["n"] >= settings.evaluate.comparisons


def test_the_report_reads_as_one_table_and_sample_answers(report):
    made, _ = report
    text = describe(made)
    lines = text.splitlines()
    assert lines[0] == "Report card, preset tiny, seed 1 (held-out prompts, 95 % intervals)"
    assert lines[1].startswith("True reward on 6 prompts in held-out wording") and "in other words" in lines[1]
    policies = [name for name, entry in made["stages"].items() if "true_reward" in entry]
    table = lines[5 : 5 + 2 * len(policies)]
    assert [line.split()[0] for line in table[::2]] == policies
    assert all(line.startswith("  mean over skills") for line in table[1::2])
    assert [line.count("[") for line in table[::2]] == [2, 2, 4, 4]  # pretrain and sft are not compared with SFT
    assert re.search(r"^pretrain: asked as prose \d.* greedy \d", text, re.M)
    assert re.search(r"^sft: best of 16 by the reward model \d.*KL at most 1.84 nats", text, re.M)
    assert re.search(r"^sft: perplexity of held-out demonstrations \d", text, re.M)
    assert re.search(r"^ppo: KL from SFT -?\d.* nats per response", text, re.M)
    assert re.search(r"^ppo: reward-model score -?\d.* greedy -?\d", text, re.M)
    assert re.search(r"^ppo: validation, which chose these weights: score -?\d.*KL -?\d", text, re.M)
    assert re.search(r"^reward: pair accuracy \d.* ceiling \d", text, re.M)
    assert re.search(r"^  false +\d.*\] +ceiling \d", text, re.M)
    assert all(len(line) <= 120 for line in lines[: lines.index("pretrain responses:")])
    assert all(prompt in text for prompt in tinychat.FIXED_PROMPTS)


LONGEST = 40  # no scripted response is longer


def played(folder, **settings):
    """Note in a finished PPO run that it was trained by these ppo settings."""
    info = checkpoint.read_info(folder)
    info["settings"]["ppo"] |= settings
    checkpoint.write_info(folder, info)


@pytest.fixture
def scripted(pipeline, tmp_path, monkeypatch):
    """A copy of the pipeline with a second PPO run, whose models answer by script: (settings, said, temperatures).

    `said[stage, temperature]` is a function of the number of a prompt: True for the ideal response.
    """
    shutil.copytree(pipeline.out, tmp_path / "runs")
    shutil.copytree(tmp_path / "runs" / "ppo", tmp_path / "runs" / "ppo-kl0")
    said, temperatures, load = {}, [], checkpoint.load

    def loaded(folder, *args, **kwargs):
        model, tokenizer = load(folder, *args, **kwargs)
        model.stage = Path(folder).name
        return model, tokenizer

    def ids(model, tokenizer, prompts, sampling, seed, batch_size, keys):
        temperature = sampling.temperature
        temperatures.append(temperature)
        right = said.get((model.stage, temperature, keys), said[model.stage, temperature])
        texts = [tinychat.ideal(p) if right(i) else "I do not know." for i, p in enumerate(prompts)]
        return [[*tokenizer.encode(text), *[tokenizer.eos_id] * (i != 1)] for i, text in enumerate(texts)]

    monkeypatch.setattr(checkpoint, "load", loaded)
    monkeypatch.setattr(evaluate, "generate_ids", ids)
    settings = pipeline.replace(out=str(tmp_path / "runs"), evaluate__prompts=8, evaluate__temperature=0.3,
                                evaluate__max_new_tokens=LONGEST)  # fmt: skip
    for name in ("ppo", "ppo-kl0"):
        played(tmp_path / "runs" / name, max_new_tokens=LONGEST)
    for stage in ("pretrain", "sft", "sft-qlora", "ppo", "ppo-kl0"):
        said[stage, 1.0], said[stage, 0.0] = (lambda i: i < 2), (lambda i: i < 4)
    said["ppo", 1.0], said["ppo", 0.0] = (lambda i: i < 6), (lambda i: True)
    return settings, said, temperatures


def test_a_prompts_true_reward_is_the_mean_over_its_responses_at_temperature_1(scripted):
    settings, said, temperatures = scripted
    said["sft", 1.0, ("generate",)], said["sft", 1.0, ("generate", 1)] = (lambda i: i < 4), (lambda i: i < 2)
    said["ppo", 1.0, ("generate", 1)], scores = (lambda i: i < 1), []
    for responses, mean in ((1, 4 / 8), (2, (4 + 2) / 16), (3, (4 + 2 + 2) / 24)):
        temperatures.clear()
        stages = evaluate.report_card(settings.replace(evaluate__responses=responses))["stages"]
        found = stages["sft"]["true_reward"]
        assert found["mean"] == pytest.approx(mean) and found["n"] == 8
        assert stages["sft"]["true_reward_greedy"]["mean"] == pytest.approx(4 / 8)
        assert temperatures.count(1.0) == responses * temperatures.count(0.0)
        scores.append((stages["ppo"]["score"]["mean"], stages["ppo"]["kl"]["mean"]))
    assert scores[1:] == [scores[0]] * 2  # of the first responses alone
    with pytest.raises(UserError, match="evaluate.responses must be at least 1"):
        EvaluateConfig(responses=0)


def test_the_report_compares_each_stage_with_what_it_came_from(scripted):
    """Rewards are 1 or 0 by script: 2 of 8 for SFT, 6 of 8 for PPO, 2 of 8 for PPO without its penalty; greedy more."""
    settings, _, temperatures = scripted
    made = evaluate.report_card(settings)
    assert_contract(made, ppo_runs=["ppo", "ppo-kl0"])
    stages, mean = made["stages"], lambda stage, key: made["stages"][stage][key]["mean"]
    assert set(temperatures) == {1.0, 0.0}, "evaluate.temperature has changed the report"
    for stage in ("pretrain", "sft", "sft-qlora", "ppo-kl0"):
        assert (mean(stage, "true_reward"), mean(stage, "true_reward_greedy")) == (0.25, 0.5)
    assert (mean("ppo", "true_reward"), mean("ppo", "true_reward_greedy")) == (0.75, 1.0)
    assert (mean("ppo", "minus_sft"), mean("ppo", "minus_sft_greedy")) == (0.5, 0.5)
    assert stages["ppo"]["minus_sft"] == asdict(paired([1.0] * 6 + [0.0] * 2, [1.0] * 2 + [0.0] * 6))
    assert stages["sft-qlora"]["minus_sft"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 8}  # the same at each prompt
    assert (mean("ppo-kl0", "minus_sft"), mean("ppo-kl0", "minus_ppo"), mean("ppo-kl0", "minus_ppo_greedy")) == (
        0.0, -0.5, -0.5)  # fmt: skip
    prompts = tinychat.prompts(settings.seed, 8, split="heldout")
    by_skill = evaluate.mean_over_skills(prompts, [1.0] * 6 + [0.0] * 2)
    assert stages["ppo"]["true_reward_by_skill"] == asdict(by_skill)
    assert stages["ppo"]["true_reward_greedy_by_skill"]["mean"] == pytest.approx(1.0)
    by_skill = evaluate.skill_means(prompts, [1.0] * 6 + [0.0] * 2)
    assert stages["ppo"]["skills"] == {skill: one.mean for skill, one in by_skill.items()}


def test_a_run_is_compared_with_ppo_by_its_stage_whatever_its_name(scripted):
    settings, said, _ = scripted
    (settings.out_dir / "ppo-kl0").rename(settings.out_dir / "mine")
    shutil.copytree(settings.out_dir / "sft", settings.out_dir / "ppo-like")
    for name, like in (("mine", "ppo-kl0"), ("ppo-like", "sft")):
        said[name, 1.0], said[name, 0.0] = said[like, 1.0], said[like, 0.0]
    stages = evaluate.report_card(settings)["stages"]
    assert stages["mine"]["minus_ppo"]["mean"] == -0.5 and "score_minus_ppo" in stages["mine"]
    assert {name for name, entry in stages.items() if "minus_ppo" in entry} == {"mine"}


def test_scores_and_kl_of_the_report_are_of_held_out_prompts(scripted):
    """A11: by hand, one response at a time; the second has no end token, and gets the score for that."""
    settings, _, _ = scripted
    folders = {name: settings.out_dir / name for name in ("sft", "ppo", "reward")}
    models = {name: checkpoint.load(folder)[0] for name, folder in folders.items()}
    torch.nn.init.normal_(models["reward"].value_head.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # a policy that is not SFT's
        models["ppo"].output.weight += 0.05 * torch.randn(480, 32, generator=torch.Generator().manual_seed(1))
    tokenizer = checkpoint.load(folders["sft"])[1]
    for name in ("ppo", "reward"):
        info = checkpoint.read_info(folders[name])
        info.pop("inputs")  # the weights that they note are about to change
        norm = {"reward": {"mean": 0.25, "scale": 2.0}} if name == "reward" else {}
        checkpoint.save_full(folders[name], models[name], tokenizer, {**info, **norm})
    raws, kls = [], []
    for i, prompt in enumerate(tinychat.prompts(settings.seed, 8, split="heldout")):
        start = tokenizer.encode_prompt(prompt)
        answer = tokenizer.encode(tinychat.ideal(prompt) if i < 6 else "I do not know.") + [tokenizer.eos_id] * (i != 1)
        tokens = torch.tensor([[*start, *answer]])
        raws.append(float(models["reward"](tokens).detach()[0, -1]))
        sums = []
        for name in ("ppo", "sft"):
            logits = models[name](tokens).detach()[0, len(start) - 1 : -1]
            logits[:, list(tokenizer.suppress_tokens)] = -math.inf
            sums.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
        kls.append(sums[0] - sums[1])
    scores = [(raw - 0.25) / 2.0 for raw in raws]
    limit = float(np.median(np.abs(scores)))  # half of them are clipped
    scores = [max(-limit, min(limit, score)) if i != 1 else -4.0 for i, score in enumerate(scores)]
    played(folders["ppo"], score_clip=limit, missing_eos_score=-4.0)  # the run's own, whatever is given now
    made = evaluate.report_card(settings.replace(ppo__score_clip=1e-3, ppo__missing_eos_score=9.0))
    entry = made["stages"]["ppo"]
    assert entry["best"] == checkpoint.read_info(folders["ppo"])["best"] and "score" in entry["best"]
    assert entry["score"] == pytest.approx(asdict(estimate(scores)), abs=1e-4)
    assert entry["kl"] == pytest.approx(asdict(estimate(kls)), abs=1e-3) and abs(entry["kl"]["mean"]) > 0.01
    assert {"mean", "low", "high", "n"} == set(entry["score_greedy"])


def test_scores_are_of_responses_as_long_as_the_runs_own(scripted, monkeypatch):
    """PPO was trained with responses of 3 tokens: the score is of their first 3, the true reward of the whole."""
    settings, _, _ = scripted
    folder, seen = settings.out_dir / "ppo", []
    played(folder, max_new_tokens=3)
    monkeypatch.setattr(evaluate, "raw_scores", lambda m, pad, items: seen.append(items) or [[0.0]] * len(items))
    shutil.rmtree(settings.out_dir / "ppo-kl0")
    stages = evaluate.report_card(settings.replace(ppo__max_new_tokens=60))["stages"]
    tokenizer = checkpoint.load(folder)[1]
    starts = [tokenizer.encode_prompt(p) for p in tinychat.prompts(settings.seed, 8, split="heldout")]
    assert len(seen) == 2 and all(
        len(ids) - len(start) <= 3 for items in seen for start, (ids,) in zip(starts, items, strict=True)
    )
    assert stages["ppo"]["true_reward"]["mean"] == 0.75
    asked, real = [], evaluate.generate_ids
    monkeypatch.setattr(
        evaluate, "generate_ids", lambda *a, **k: asked.append((a[0].stage, a[3].max_new_tokens)) or real(*a, **k)
    )
    played(folder, max_new_tokens=60)
    evaluate.report_card(settings)
    most = settings.evaluate.max_new_tokens
    assert set(asked) == {
        ("pretrain", most), ("sft", most), ("sft-qlora", most), ("ppo", 60)}  # fmt: skip


def test_a_run_that_began_elsewhere_has_no_kl_from_sft(scripted):
    settings, _, _ = scripted
    folder, found = settings.out_dir / "ppo", []
    shutil.rmtree(settings.out_dir / "ppo-kl0")
    for start in (None, str(settings.out_dir / "sft"), str(settings.out_dir / "pretrain")):
        info = checkpoint.read_info(folder)
        info["settings"]["init"] = start
        checkpoint.write_info(folder, info)
        made = evaluate.report_card(settings)
        found.append("kl" in made["stages"]["ppo"])
        assert "score" in made["stages"]["ppo"] and ("ppo: KL from SFT" in describe(made)) is found[-1]
    assert found == [True, True, False]


@pytest.mark.parametrize("replaced", ["sft", "reward"])
def test_a_run_whose_inputs_were_replaced_has_no_figure_that_rests_on_them(scripted, replaced):
    settings, _, _ = scripted
    folder = settings.out_dir / "ppo"
    shutil.rmtree(settings.out_dir / "ppo-kl0")
    info = checkpoint.read_info(folder)
    assert info["inputs"] == {name: checkpoint.fingerprint(settings.out_dir / name) for name in ("sft", "reward")}
    checkpoint.write_info(folder, {**info, "inputs": {**info["inputs"], replaced: "of others"}})
    entry = evaluate.report_card(settings)["stages"]["ppo"]
    assert ("kl" in entry, "score" in entry, "score_greedy" in entry) == (
        replaced != "sft", replaced != "reward", replaced != "reward")  # fmt: skip
    assert "minus_sft" in entry


def test_the_shown_answers_have_random_numbers_of_their_own(report):
    made, settings = report
    model, tokenizer = checkpoint.load(settings.out_dir / "sft")
    config = replace(settings.evaluate, temperature=1.0)
    with_keys = evaluate.sample_responses(
        model, tokenizer, tinychat.FIXED_PROMPTS, config, settings.seed, keys=("shown_answers",)
    )
    assert [a["response"] for a in made["stages"]["sft"]["samples"]] == with_keys
    assert evaluate.sample_responses(model, tokenizer, tinychat.FIXED_PROMPTS, config, settings.seed) != with_keys


def test_sfts_perplexity_is_of_held_out_demonstrations(report):
    """A11: not of the validation demonstrations, which chose the checkpoint."""
    made, settings = report
    for stage in ("sft", "sft-qlora"):
        model, tokenizer = checkpoint.load(settings.out_dir / stage)
        dialogs = [r["messages"] for r in tinychat.demonstrations(settings.seed, 6, split="heldout")]
        value, tokens = evaluate.perplexity(model, tokenizer, dialogs, settings.sft.seq_len)
        assert made["stages"][stage]["perplexity"] == {"value": value, "tokens": tokens}
        assert made["stages"][stage]["best"]["perplexity"] != value
    assert "perplexity" not in made["stages"]["pretrain"]  # its own is of validation text


def test_the_report_asks_the_pretrained_model_as_prose(report):
    made, settings = report
    model, tokenizer = checkpoint.load(settings.out_dir / "pretrain")
    prompts = tinychat.prompts(settings.seed, 6, split="heldout")
    for key, temperature in (("as_prose", 1.0), ("as_prose_greedy", 0.0)):
        config = replace(settings.evaluate, temperature=temperature)
        texts = evaluate.prose_responses(model, tokenizer, prompts, config, settings.seed)
        assert made["stages"]["pretrain"][key] == asdict(estimate(evaluate.true_rewards(prompts, texts)))


def test_best_of_sixteen_is_of_sft_by_the_reward_model_of_the_same_folder(scripted, monkeypatch):
    settings, _, _ = scripted
    asked = []

    def best_of(policy, tokenizer, reward_model, prompts, n, config, seed):
        asked.append((policy.stage, reward_model.stage, len(prompts), n, seed))
        return [tinychat.ideal(p) if i < 7 else "No." for i, p in enumerate(prompts)]

    monkeypatch.setattr(evaluate, "best_of", best_of)
    stages = evaluate.report_card(settings)["stages"]
    assert asked == [("sft", "reward", 8, 16, settings.seed)]
    assert stages["sft"]["best_of_16"]["mean"] == 7 / 8
    assert stages["sft"]["best_of_16"]["kl_bound"] == pytest.approx(math.log(16) - 15 / 16)
    shutil.rmtree(settings.out_dir / "reward")
    without = evaluate.report_card(settings)["stages"]
    assert "best_of_16" not in without["sft"] and "score" not in without["ppo"] and "kl" in without["ppo"]
    shutil.rmtree(settings.out_dir / "sft")
    without = evaluate.report_card(settings)["stages"]
    assert not {"minus_sft", "kl"} & set(without["ppo"]) and "minus_ppo" in without["ppo-kl0"]


def test_p06_the_report_uses_held_out_prompts_only(report, monkeypatch):
    _, settings = report
    asked = []
    real = tinychat.prompts

    def prompts(*args, split="train"):
        asked.append(split)
        return real(*args, split)

    monkeypatch.setattr(evaluate.tinychat, "prompts", prompts)
    monkeypatch.setattr(evaluate, "stage_folders", lambda out: [out / "pretrain"])
    evaluate.report_card(settings.replace(evaluate__prompts=2))
    assert asked == ["heldout"]


def test_nothing_to_report_is_said(micro, tmp_path):
    with pytest.raises(UserError, match="no finished stage in .*--out"):
        evaluate.report_card(micro(tmp_path))


# ---------------------------------------------------------------- real data, which have no true reward


@pytest.fixture(scope="module")
def on_data(pipeline, tmp_path_factory):
    """A run folder's card on a file of comparisons, through the command line; the folder has no true reward in it."""
    from test_cli import options

    from instruct_llama.__main__ import main
    from instruct_llama.data import sources

    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(pipeline.out, folder / "runs")
    rows = [{"prompt": f"What is item {i}?", "completions": [f"It is number {i}.", "No."]} for i in range(150)]
    sources.write_jsonl(folder / "mine.jsonl", rows)
    settings = pipeline.replace(out=str(folder / "runs"), data=str(folder / "mine.jsonl"))
    assert main(["evaluate", "--preset", "tiny", *options(settings)]) == 0
    return settings, json.loads((folder / "runs" / "report.json").read_text(encoding="utf-8"))


def test_the_card_of_real_data_holds_what_can_be_known(on_data):
    settings, report = on_data
    assert list(report["stages"]) == ["pretrain", "sft", "sft-qlora", "reward", "ppo"]
    for name, entry in report["stages"].items():
        assert "true_reward" not in entry
        if name == "reward":
            assert entry["accuracy"]["n"] == len(evaluate_records(settings).comparisons)
            continue
        assert entry["perplexity"]["value"] > 1 and entry["perplexity"]["tokens"] > 0
        assert entry["against"] == "pretrain" and 0 <= entry["win_rate"]["mean"] <= 1
        assert len(entry["samples"]) == 3
    same = report["stages"]["pretrain"]["win_rate"]  # against itself: a draw each time
    assert (same["mean"], same["low"], same["high"]) == (0.5, 0.5, 0.5)
    text = describe(report)
    assert text.startswith("Report card, preset tiny, seed 1 (validation records, 95 % intervals)")
    for figure in ("pair accuracy", "preferred to pretrain", "perplexity", "reward-model score"):  # they chose weights
        lines = [line for line in text.splitlines() if f": {figure}" in line]
        assert lines and all("validation" in line for line in lines), figure
    assert "held-out" not in text


def evaluate_records(settings):
    from instruct_llama.stages import records

    return records.heldout(settings)


def test_p06_the_card_is_made_of_held_out_records(on_data):
    from instruct_llama.stages import records

    settings, _ = on_data
    held = evaluate_records(settings)
    train, valid = records.comparisons(settings)
    assert held.comparisons == valid and valid and not [r for r in train if r in held.comparisons]
    assert held.prompts == [r["prompt"] for r in valid]


def test_a_win_is_an_answer_that_the_judge_prefers_to_the_first_stages(pipeline, tmp_path, monkeypatch):
    """The judge is replaced by one that likes later stages better, and the second prompt's answers all the same."""
    shutil.copytree(pipeline.out, tmp_path / "runs")
    rated = lambda *a: [[float(i), 0.5] for i in range(len(a[-1]))]  # noqa: E731
    monkeypatch.setattr(evaluate, "reward_model_scores", rated)
    prompt = [{"role": "user", "content": "What is item 3?"}]
    pairs = [{"prompt": prompt, "completions": ["It is 3.", "No."]}] * 9
    held = sources.HeldOut(comparisons=pairs, prompts=[prompt] * 2)
    settings = pipeline.replace(out=str(tmp_path / "runs"), evaluate__comparisons=4)
    stages = evaluate.data_card(settings, held)["stages"]
    rates = {name: entry["win_rate"]["mean"] for name, entry in stages.items() if "win_rate" in entry}
    assert rates == {"pretrain": 0.5, "sft": 0.75, "sft-qlora": 0.75, "ppo": 0.75}
    assert stages["ppo"]["score"]["mean"] == (3.0 + 0.5) / 2
    assert stages["reward"]["accuracy"]["n"] == 4  # evaluate.comparisons, a pair each


def test_a_long_dialog_is_asked_as_training_cuts_it(pipeline, tmp_path, monkeypatch):
    """Its oldest exchanges go, until the last turn and an answer fit the context; a last turn too long is left out."""
    shutil.copytree(pipeline.out, tmp_path / "runs")
    ask = lambda text: {"role": "user", "content": text}  # noqa: E731
    short, answer = [ask("What is item 3?")], {"role": "assistant", "content": "It is number 3."}
    long = [*(ask("What is item 1?"), answer) * 30, ask("What is item 2?")]
    settings = pipeline.replace(out=str(tmp_path / "runs"))
    tokenizer = checkpoint.load(settings.out_dir / "sft")[1]
    context, room = settings.model.max_seq_len, settings.evaluate.max_new_tokens
    assert len(tokenizer.encode_prompt(long)) > context
    hopeless = [ask("word " * context)]
    asked, real = [], evaluate.sample_responses
    monkeypatch.setattr(evaluate, "sample_responses", lambda m, t, prompts, *rest: asked.append(prompts) or real(
        m, t, prompts, *rest))  # fmt: skip
    stages = evaluate.data_card(settings, sources.HeldOut(prompts=[short, hopeless, long]))["stages"]
    assert len(asked) == 4 and all(prompts == asked[0] for prompts in asked) and len(asked[0]) == 2
    kept = asked[0][1]
    assert asked[0][0] == short and 1 < len(kept) < len(long) and kept == long[-len(kept) :]
    limit = min(settings.sft.seq_len, context - room)
    assert len(tokenizer.encode_prompt(kept)) <= limit < len(tokenizer.encode_prompt(long[-len(kept) - 2 :]))
    assert stages["ppo"]["score"]["n"] == 2


def test_p06_each_stages_own_data_give_their_held_out_records(pipeline, tmp_path):
    """Without --data, comparisons come from what the reward stage trains on, and so on: not all from SFT's."""
    from instruct_llama.data import sources
    from instruct_llama.stages import records

    ask = lambda word, i: [{"role": "user", "content": f"What is {word} {i}?"}]  # noqa: E731
    rows = {
        "dialogs": [{"messages": [*ask("item", i), {"role": "assistant", "content": "It."}]} for i in range(150)],
        "pairs": [{"prompt": ask("thing", i), "completions": ["It.", "No."]} for i in range(150)],
        "prompts": [{"prompt": ask("number", i)} for i in range(150)],
    }
    for name, some in rows.items():
        sources.write_jsonl(tmp_path / f"{name}.jsonl", some)
    path = {name: str(tmp_path / f"{name}.jsonl") for name in rows}
    settings = pipeline.replace(sft__data=path["dialogs"], reward__data=path["pairs"], ppo__data=path["prompts"])
    held = records.heldout(settings)
    for found, word in (
        ([dialog[0] for dialog in held.dialogs], "item"), ([c["prompt"][0] for c in held.comparisons], "thing"),
        ([prompt[0] for prompt in held.prompts], "number"),
    ):  # fmt: skip
        assert found and all(f"What is {word}" in turn["content"] for turn in found)


def test_perplexity_is_what_pretraining_measures(pipeline):
    from instruct_llama.data.batching import dialog_batch, fit_dialog
    from instruct_llama.stages.pretrain import language_model_metrics

    model, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    dialogs = [r["messages"] for r in tinychat.demonstrations(1, 20, split="valid")]
    value, tokens = evaluate.perplexity(model, tokenizer, dialogs, 100)
    fitted = [fit for dialog in dialogs if (fit := fit_dialog(tokenizer, dialog, 100))]
    wanted = language_model_metrics(model, [dialog_batch(fitted, tokenizer.pad_id)])
    assert value == pytest.approx(wanted["perplexity"], rel=1e-5) and tokens == sum(sum(mask) for _, mask in fitted)
    with pytest.raises(UserError, match="None of the 20 held-out dialogs fits 3 tokens"):
        evaluate.perplexity(model, tokenizer, dialogs, 3)


def test_the_judge_scores_each_models_answers_in_the_prompts_order(pipeline):
    judge, tokenizer = checkpoint.load(Path(pipeline.out) / "reward")
    torch.nn.init.normal_(judge.value_head.weight)
    prompts = [[{"role": "user", "content": f"What is item {i}?"}] for i in range(3)]
    answered = [[f"It is {i}." for i in range(3)], ["No."] * 3]
    scores = evaluate.reward_model_scores(judge, tokenizer, prompts, answered)
    for mine, texts in zip(scores, answered, strict=True):
        for prompt, text, score in zip(prompts, texts, mine, strict=True):
            ids = [*tokenizer.encode_prompt(prompt), *tokenizer.encode(text), tokenizer.eos_id]
            assert score == pytest.approx(float(judge(torch.tensor([ids]))[0, -1]), abs=1e-4)
