"""The report card: intervals against hand-computed and textbook figures, the table, the file that others read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from instruct_llama import checkpoint, evaluate, presets
from instruct_llama.config import UserError
from instruct_llama.data import tinychat
from instruct_llama.evaluate import Estimate, accuracy_estimate, check_off, describe, estimate


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


def test_check_off_says_whether_a_figure_is_as_expected(capsys):
    laptop = presets.get("laptop")
    check_off(laptop, "sft", {"true_reward": 0.5, "loss": 1.25})
    check_off(laptop, "ppo", {"true_reward": 0.5})
    check_off(presets.get("tiny"), "ppo", {"true_reward": 0.5})
    fair, none, low, tiny = capsys.readouterr().out.splitlines()
    assert "0.500   expected 0.35 to 0.65: as expected" in fair and "no expectation" in none
    assert "expected 0.90 to 1.00: NOT as expected: see What can go wrong" in low
    assert "preset tiny: no expectation" in tiny


# ---------------------------------------------------------------- judging


class Oracle(torch.nn.Module):
    """A reward model that knows the true reward of every sequence, up to a sign."""

    def __init__(self, tokenizer, sign: float):
        super().__init__()
        self.tokenizer, self.sign, self.dummy = tokenizer, sign, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return self.sign * (segments[:, :, None] == segments[:, None]).sum(-1).float()  # longer is better


def test_reward_accuracy_counts_pairs_and_halves_ties(pipeline):
    _, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    prompt = [{"role": "user", "content": "Tell me."}]
    texts = ["yes, it is a very long answer", "a ball", "a"]
    longer = {"prompt": prompt, "completions": texts, "utilities": [1.0, 0.5, 0.0]}
    tie = {"prompt": prompt, "completions": ["a b", "b a"], "utilities": [1.0, 0.0]}
    found, ceiling = evaluate.reward_accuracy(Oracle(tokenizer, 1.0), tokenizer, [longer, tie], 0.15)
    assert (found.mean, found.n) == (3.5 / 4, 4)
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


def test_true_reward_is_the_mean_over_the_models_own_answers(pipeline, monkeypatch):
    prompts = tinychat.prompts(1, 4, split="heldout")
    said = "I do not know."
    monkeypatch.setattr(evaluate, "generate", lambda *args, **kwargs: [said] * len(prompts))
    found, each = evaluate.true_reward(None, None, prompts, pipeline.evaluate)
    assert each == [tinychat.true_reward(prompt, said).total for prompt in prompts]
    assert found.mean == pytest.approx(np.mean(each)) and found.n == 4


# ---------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def report(pipeline, tmp_path_factory):
    """(report, settings) of a copy of the pipeline, with an unfinished stage beside the finished ones."""
    out = tmp_path_factory.mktemp("report") / "runs"
    shutil.copytree(pipeline.out, out)
    checkpoint.write_info(out / "unfinished", {"kind": "lm", "model": {}})
    settings = pipeline.replace(out=str(out))
    return evaluate.report_card(settings), settings


def test_the_report_has_the_contracts_shape(report):
    made, settings = report
    assert json.loads((settings.out_dir / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(made))
    assert (made["preset"], made["seed"]) == ("tiny", 1)
    assert list(made["stages"]) == ["pretrain", "sft", "sft-qlora", "reward", "ppo"]
    for name in ("pretrain", "sft", "sft-qlora", "ppo"):
        figures = made["stages"][name]["true_reward"]
        assert set(figures) == {"mean", "low", "high", "n"} and figures["n"] == settings.evaluate.prompts
        assert 0 <= figures["low"] <= figures["mean"] <= figures["high"] <= 1
        assert [a["prompt"] for a in made["stages"][name]["answers"]] == list(tinychat.FIXED_PROMPTS)
    accuracy = made["stages"]["reward"]["accuracy"]
    assert 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1
    assert 0.5 < made["stages"]["reward"]["ceiling"] <= 1 and accuracy["n"] >= settings.evaluate.comparisons


def test_the_report_reads_as_one_table_and_sample_answers(report):
    made, _ = report
    text = describe(made)
    lines = text.splitlines()
    assert lines[0] == "Report card, preset tiny, seed 1 (held-out prompts, 95 % intervals)"
    rows = {line.split()[0]: line for line in lines[4:9]}
    assert list(rows) == list(made["stages"])
    assert "pair accuracy" in rows["reward"] and "ceiling" in rows["reward"]
    assert "nats" in rows["ppo"] and "held-out perplexity" in rows["sft"]
    assert all(len(line) <= 120 for line in lines[:9]) and all(prompt in text for prompt in tinychat.FIXED_PROMPTS)


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
        assert len(entry["answers"]) == 3
    same = report["stages"]["pretrain"]["win_rate"]  # against itself: a draw each time
    assert (same["mean"], same["low"], same["high"]) == (0.5, 0.5, 0.5)
    assert "preferred to pretrain" in describe(report) and "held-out perplexity" in describe(report)


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
    monkeypatch.setattr(evaluate, "judged", rated)
    prompt = [{"role": "user", "content": "What is item 3?"}]
    pairs = [{"prompt": prompt, "completions": ["It is 3.", "No."]}] * 9
    held = evaluate.HeldOut(comparisons=pairs, prompts=[prompt] * 2)
    settings = pipeline.replace(out=str(tmp_path / "runs"), evaluate__comparisons=4)
    stages = evaluate.data_card(settings, held)["stages"]
    rates = {name: entry["win_rate"]["mean"] for name, entry in stages.items() if "win_rate" in entry}
    assert rates == {"pretrain": 0.5, "sft": 0.75, "sft-qlora": 0.75, "ppo": 0.75}
    assert stages["ppo"]["score"]["mean"] == (3.0 + 0.5) / 2
    assert stages["reward"]["accuracy"]["n"] == 4  # evaluate.comparisons, a pair each


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
    from instruct_llama.data.batches import dialog_batch, fit_dialog
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
    torch.nn.init.normal_(judge.scalar_head.weight)
    prompts = [[{"role": "user", "content": f"What is item {i}?"}] for i in range(3)]
    answered = [[f"It is {i}." for i in range(3)], ["No."] * 3]
    scores = evaluate.judged(judge, tokenizer, prompts, answered)
    for mine, texts in zip(scores, answered, strict=True):
        for prompt, text, score in zip(prompts, texts, mine, strict=True):
            ids = [*tokenizer.encode_prompt(prompt), *tokenizer.encode(text), tokenizer.eos_id]
            assert score == pytest.approx(float(judge(torch.tensor([ids]))[0, -1]), abs=1e-4)
