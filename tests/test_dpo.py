"""DPO, IPO and KTO: their formulas by hand, the shared prompt row, the reference, and that each setting arrives."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from instruct_llama import convert
from instruct_llama.config import DPOConfig, LoRAConfig, ModelConfig, UserError
from instruct_llama.data import sources
from instruct_llama.data.completions import Preference, completion_batch, completion_row_length, preference_batch
from instruct_llama.data.tokenizer import Tokenizer
from instruct_llama.evaluation import report
from instruct_llama.model.llama import Llama
from instruct_llama.pipeline import required_folders
from instruct_llama.pipeline import run as run_stage
from instruct_llama.rlhf import preference
from instruct_llama.rlhf.losses import ranking_loss, response_mean, response_sum, token_logprobs
from instruct_llama.stages import dpo
from instruct_llama.training import checkpoint
from instruct_llama.worlds import enumerable, tinychat

PAD = 0


def micro_model(**changes) -> Llama:
    shape = ModelConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=64, init_std=0.3
    )
    return Llama(replace(shape, **changes), generator=torch.Generator().manual_seed(3)).eval()


ITEMS = [([5, 6, 7], [[8, 9, 1], [10, 1], [8, 11, 12, 1]]), ([20], [[21, 22, 23, 24, 1], [1]])]


# ------------------------------------------------------------------------------------------------- formulas by hand


def test_dpo_loss_by_hand():
    margins, weights = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.5, 0.5])
    expected = math.log(2) + 0.5 * math.log(1 + math.exp(-1.0)) + 0.5 * math.log(1 + math.exp(0.5))
    assert float(preference.dpo_loss(margins, weights, 0.5)) == pytest.approx(expected, rel=1e-6)
    flipped = math.log(2) + 0.5 * math.log(1 + math.exp(1.0)) + 0.5 * math.log(1 + math.exp(-0.5))
    smooth = 0.8 * expected + 0.2 * flipped
    assert float(preference.dpo_loss(margins, weights, 0.5, 0.2)) == pytest.approx(smooth, rel=1e-6)
    assert float(preference.dpo_loss(torch.tensor([-1e4]), torch.ones(1), 1.0)) == pytest.approx(1e4)  # no overflow


def test_dpo_is_the_ranking_loss_of_implicit_rewards():
    ratios, prompt, rank = torch.randn(7), torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 1, 0, 0, 1])
    winner, loser = ((0, 0, 1, 4, 5), (1, 2, 2, 3, 6))
    margins = ratios[list(winner)] - ratios[list(loser)]
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 1.0])
    ours = preference.dpo_loss(margins, weights, 0.3) / 3
    assert float(ours) == pytest.approx(float(ranking_loss(0.3 * ratios, prompt, rank)), rel=1e-6)


def test_ipo_loss_by_hand():
    loss = preference.ipo_loss(torch.tensor([5.0, 2.0]), torch.tensor([1.0, 0.5]), 0.1)
    assert float(loss) == pytest.approx(0.5 * 9)  # the target is 1 / (2 * 0.1) = 5


def test_kto_loss_by_hand():
    ratios, label = torch.tensor([1.0, -0.5, 3.0]), torch.tensor([1, -1, 0])
    loss = preference.kto_loss(ratios, label, torch.tensor([0.5, 0.5, 1.0]), 0.2, 2.0, 1.5, 0.5)
    good, bad = 1 - 1 / (1 + math.exp(-2.0 * 0.8)), 1 - 1 / (1 + math.exp(-2.0 * 0.7))
    assert float(loss) == pytest.approx(0.5 * 1.5 * good + 0.5 * 0.5 * bad, rel=1e-6)
    assert preference.kto_kl(torch.tensor([0.5, 1.5])) == 1.0
    assert preference.kto_kl(torch.tensor([-0.5, 0.1])) == 0.0  # a KL is not negative
    assert preference.kto_kl(torch.tensor([1.0]), lambda sums: {"total": 3.0, "n": 2.0}) == 1.5  # of all processes


def test_each_prompt_has_weight_one():
    weights = preference.label_weights(torch.tensor([0, 0, 0, 1, 2]), torch.tensor([1, -1, 0, -1, 0]))
    assert weights.tolist() == [0.5, 0.5, 0.0, 1.0, 0.0]
    three = Preference([3], [[4, 1], [5, 1], [6, 1]], [0, 1, 2], [1, 0, -1])
    batch = preference_batch([three, Preference([3], [[4, 1], [7, 1]], [0, 1], [1, -1])], PAD)
    _, _, pairs = preference.comparable_pairs(batch)
    assert pairs.tolist() == pytest.approx([1 / 3] * 3 + [1.0])


def batch_with_reference(mismatched: bool = False) -> tuple[torch.Tensor, preference.PreferenceBatch]:
    items = [
        Preference([3], [[4, 1], [5, 1]], [0, 1], [1, -1], [9, 1] if mismatched else None),
        Preference([3], [[6, 1], [7, 1]], [1, 0], [-1, 1], [8, 1] if mismatched else None),
    ]
    batch = preference_batch(items, PAD)
    n = len(batch.rank)
    return torch.linspace(-3, -1, n), replace(batch, ref_logprobs=torch.linspace(-2, -2.5, n))


def test_the_loss_that_is_named_is_computed():
    logprobs, batch = batch_with_reference(mismatched=True)  # rows 2 and 5 are mismatched
    ratios = (logprobs - batch.ref_logprobs).tolist()
    margins = torch.tensor([ratios[0] - ratios[1], ratios[4] - ratios[3]])
    ones = torch.ones(2)
    for changes, expected in (
        ({"loss": "dpo"}, preference.dpo_loss(margins, ones, 0.1)),
        ({"loss": "dpo", "beta": 0.7}, preference.dpo_loss(margins, ones, 0.7)),
        ({"loss": "dpo", "label_smoothing": 0.1}, preference.dpo_loss(margins, ones, 0.1, 0.1)),
        ({"loss": "ipo", "beta": 0.2}, preference.ipo_loss(margins, ones, 0.2)),
    ):
        loss, metrics = preference.preference_loss(logprobs, batch, DPOConfig(**changes))
        assert float(loss) == pytest.approx(float(expected), rel=1e-6), changes
        assert "kto_kl" not in metrics
    labels, half = torch.tensor([1, -1, -1, 1]), torch.full((4,), 0.5)
    own = torch.tensor([ratios[i] for i in (0, 1, 3, 4)])
    kl = max(0.0, (ratios[2] + ratios[5]) / 2)
    assert kl > 0
    for good, bad in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0)):
        config = DPOConfig(loss="kto", desirable_weight=good, undesirable_weight=bad)
        loss, metrics = preference.preference_loss(logprobs, batch, config)
        expected = preference.kto_loss(own, labels, half, kl, 0.1, good, bad)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6) and metrics["kto_kl"] == pytest.approx(2 * kl)


def test_the_metrics_by_hand():
    logprobs, batch = batch_with_reference()
    ratios = logprobs - batch.ref_logprobs
    _, metrics = preference.preference_loss(logprobs, batch, DPOConfig(beta=0.5))
    expected = {
        "rewards/chosen": 0.5 * (ratios[0] + ratios[3]),
        "rewards/rejected": 0.5 * (ratios[1] + ratios[2]),
        "rewards/margins": 0.5 * (ratios[0] + ratios[3] - ratios[1] - ratios[2]),
        "rewards/accuracies": 1.0,  # the second prompt's pair is ranked rightly, the first one's not
        "logps/chosen": logprobs[0] + logprobs[3],
        "logps/rejected": logprobs[1] + logprobs[2],
    }
    assert metrics == {key: pytest.approx(float(value), rel=1e-5) for key, value in expected.items()}
    mass = preference.listed_mass(logprobs, batch)
    p = logprobs.exp()
    assert mass["probability/chosen"] == pytest.approx(float(p[0] + p[3]))
    assert mass["probability/rejected"] == pytest.approx(float(p[1] + p[2]))
    assert sum(mass.values()) == pytest.approx(2.0)
    four = preference_batch([Preference([3], [[i, 1] for i in (4, 5, 6, 7)], [0, 1, 2, 3], [1, 1, -1, -1])], PAD)
    mass = preference.listed_mass(torch.tensor([0.1, 0.2, 0.3, 0.15]).log(), four)  # only one is the best
    assert list(mass.values()) == pytest.approx([0.1, 0.65, 0.25])


# ---------------------------------------------------------------------------- where a loss leads, known in closed form


def converged(language: enumerable.Language, loss, steps: int = 600) -> tuple[enumerable.PrefixTable, torch.Tensor]:
    """A table policy at the minimum of the exact loss over all pairs of two responses of the reference, labelled by
    Bradley-Terry with the language's scores; and the reference's log-probability of each response."""
    policy = enumerable.reference(language)
    ref = enumerable.response_logprobs(language, policy).sum(1).detach()  # (A,)
    weights = ref.exp()[:, None] * ref.exp() * torch.sigmoid(language.scores[:, None] - language.scores)  # (A, A)
    optimizer = torch.optim.LBFGS(
        policy.parameters(), max_iter=steps, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratios = enumerable.response_logprobs(language, policy).sum(1) - ref
        total = loss((ratios[:, None] - ratios).flatten(), weights.flatten(), language.beta)
        total.backward()
        return total

    optimizer.step(closure)
    return policy, ref


SEEDS = [45, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))]


@pytest.mark.parametrize("seed", SEEDS)
def test_p00_dpo_over_exact_pairs_reaches_the_optimal_policy(seed):
    language = enumerable.variable(seed)
    policy, _ = converged(language, preference.dpo_loss)
    assert enumerable.gap_closed(language, policy) > 0.98


@pytest.mark.slow
def test_p00_a_planted_mistake_in_dpo_does_not():
    language = enumerable.variable()
    for wrong in (
        lambda margins, weights, beta: preference.dpo_loss(margins, weights, 2 * beta),
        lambda margins, weights, beta: preference.dpo_loss(margins, weights, beta, 0.1),  # the labels are not wrong
        lambda margins, weights, beta: preference.dpo_loss(-margins, weights, beta),
    ):
        assert enumerable.gap_closed(language, converged(language, wrong, 200)[0]) < 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_ipo_over_exact_pairs_lands_where_its_theory_says(seed):
    """Not at the optimum of J, but at ref(y) exp(p(y) / beta), p(y) the chance to win against the reference
    (arXiv:2310.12036, equation 7 with the identity for psi)."""
    language = enumerable.variable(seed)
    policy, ref = converged(language, preference.ipo_loss, 150)
    wins = torch.sigmoid(language.scores[:, None] - language.scores) @ ref.exp()  # (A,)
    theory = (ref + wins / language.beta).log_softmax(0)
    with torch.no_grad():
        found = enumerable.response_logprobs(language, policy).sum(1)
    assert float((theory.exp() * (theory - found)).sum()) < 1e-4  # KL of the two
    assert enumerable.gap_closed(language, policy) < 0.3  # with scores of this size it moves less than J asks


# ---------------------------------------------------------------------------------------------- one row for a prompt


def test_a_row_by_hand():
    batch = completion_batch(ITEMS, PAD)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10, 8, 11, 12], [20, 21, 22, 23, 24, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[-1, -1, -1, 1, 1, 2, 3, 3, 3], [-1, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.prompt.tolist() == [0, 0, 0, 1, 1] and batch.weight == 2
    assert batch.responses[:3, :4].tolist() == [[8, 9, 1, 0], [10, 1, 0, 0], [8, 11, 12, 1]]
    assert batch.response_mask.sum(1).tolist() == [3, 2, 4, 5, 1]
    # the prompt's last position predicts a response's first token; the response's own positions the following ones
    assert batch.predict_at[0, :3].tolist() == [2, 3, 4] and batch.predict_at[1, :2].tolist() == [2, 5]
    assert batch.predict_at[2, :4].tolist() == [2, 6, 7, 8] and batch.predict_at[4, :1].tolist() == [0]
    assert [completion_row_length(item) for item in ITEMS] == [9, 5]


def plain(model: Llama, prompt: list[int], response: list[int], dtype=torch.float32) -> torch.Tensor:
    """Hidden states that predict the response's tokens, from a row of its own: (L, D)."""
    return model.hidden(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]


def test_p22_a_shared_prompt_gives_the_hidden_states_and_logprobs_of_separate_rows():
    double = micro_model().double()
    batch = completion_batch(ITEMS, PAD)
    hidden = double.hidden(batch.tokens, segment_ids=batch.segment_ids)
    shared = hidden[batch.prompt[:, None], batch.predict_at]  # (N, L, D)
    flat = [(prompt, response) for prompt, responses in ITEMS for response in responses]
    for n, (prompt, response) in enumerate(flat):
        assert float((shared[n, : len(response)] - plain(double, prompt, response)).abs().max()) < 1e-10
    single = micro_model()
    logprobs = preference.completion_logprobs(single, batch)
    for n, (prompt, response) in enumerate(flat):
        logits = single.head(plain(single, prompt, response))
        expected = token_logprobs(logits, torch.tensor(response))
        assert float((logprobs[n, : len(response)] - expected).abs().max()) < 1e-5
        assert not logprobs[n, len(response) :].any()
    sums = preference.response_logprobs(single, batch)
    means = preference.response_logprobs(single, batch, average=True)
    torch.testing.assert_close(sums, response_sum(logprobs, batch.response_mask))
    torch.testing.assert_close(means, response_mean(logprobs, batch.response_mask))


def test_the_gradient_is_that_of_separate_rows():
    model, batch = micro_model(), completion_batch(ITEMS, PAD)
    coefs = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0])
    (coefs * preference.response_logprobs(model, batch)).sum().backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    flat = [(prompt, response) for prompt, responses in ITEMS for response in responses]
    for coef, (prompt, response) in zip(coefs, flat, strict=True):
        logits = model.head(plain(model, prompt, response))
        (coef * token_logprobs(logits, torch.tensor(response)).sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(shared[name], p.grad, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- what it reads


def test_ranks_and_labels(pipeline):
    tokenizer, prompt = Tokenizer.load(pipeline.out_dir / "sft"), [{"role": "user", "content": "What is two?"}]
    records = [{"prompt": prompt, "completions": [f"It is {word}." for word in "abcde"[:k]]} for k in (2, 3, 5)]
    two, three, five = dpo.encode(tokenizer, records, DPOConfig())
    assert two.labels == [1, -1] and three.labels == [1, 0, -1] and five.labels == [1, 1, 0, -1, -1]
    assert five.ranks == [0, 1, 2, 3, 4] and two.prompt == tokenizer.encode_prompt(prompt)
    assert all(response[-1] == tokenizer.eos_id for response in five.responses)
    longer = [*records, {"prompt": "a " * 300, "completions": ["b", "c"]}]
    assert len(dpo.encode(tokenizer, longer, DPOConfig())) == 3
    with pytest.raises(UserError, match="dpo.seq_len 4"):
        dpo.encode(tokenizer, records, DPOConfig(seq_len=4))
    single = [{"prompt": prompt, "completions": ["Yes."], "labels": [label]} for label in (1, -1)]
    good, bad = dpo.encode(tokenizer, single, DPOConfig(loss="kto"))
    assert (good.ranks, bad.ranks) == ([0], [1])
    for loss in ("dpo", "ipo"):
        with pytest.raises(UserError, match=f"dpo.loss {loss} needs pairs.*choose dpo.loss kto"):
            dpo.encode(tokenizer, single, DPOConfig(loss=loss))


def test_mismatched_responses_are_those_of_other_prompts():
    items = [Preference([i], [[100 + i, 1]], [0], [1]) for i in range(9)]
    for seed in (1, 2):
        made = dpo.with_mismatched(items, seed)
        others = [item.mismatched[0] - 100 for item in made]
        assert sorted(others) == list(range(9)) and all(i != other for i, other in enumerate(others))
    assert dpo.with_mismatched(items, 1) == dpo.with_mismatched(items, 1) != dpo.with_mismatched(items, 2)
    with pytest.raises(UserError, match="at least two records"):
        dpo.with_mismatched(items[:1], 1)
    batch = preference_batch(dpo.with_mismatched(items[:2], 1), PAD)
    assert batch.mismatched.tolist() == [False, True] * 2 and batch.label.tolist() == [1, 0, 1, 0]


def unpaired(n: int = 60) -> list[dict]:
    return [{"prompt": f"What is item {i}?", "completion": f"It is {i}.", "label": i % 3 > 0} for i in range(n)]


def test_unpaired_records(tmp_path):
    sources.write_jsonl(tmp_path / "x.jsonl", unpaired(3))
    read = sources.read(tmp_path / "x.jsonl")
    assert read.kind == "unpaired" and [r["labels"] for r in sources.as_preferences(read)] == [[-1], [1], [1]]
    assert [d["messages"][-1]["content"] for d in sources.as_dialogs(read)] == ["It is 1.", "It is 2."]
    assert len(sources.as_prompts(read)) == 3
    with pytest.raises(UserError, match="holds unpaired: give a file of comparisons"):
        sources.as_comparisons(read)
    sources.write_jsonl(tmp_path / "bad.jsonl", [*unpaired(1), {**unpaired(1)[0], "label": "yes"}])
    with pytest.raises(UserError, match="bad.jsonl line 2 .*label is not true or false"):
        sources.read(tmp_path / "bad.jsonl")


# ----------------------------------------------------------------------------------------------------------- the runs


def beside(pipeline, tmp_path: Path, *stages: str):
    for stage in stages:
        shutil.copytree(Path(pipeline.out) / stage, tmp_path / stage)
    return pipeline.replace(out=str(tmp_path))


def weights(folder: Path) -> checkpoint.State:
    return checkpoint.read_tensors(next(folder.glob("*.safetensors")))[0]


KINDS = {
    "dpo": {}, "ipo": {"dpo__loss": "ipo"}, "kto": {"dpo__loss": "kto"}, "dpo-lora": {"dpo__lora__rank": 2},
    "kto-qlora": {"dpo__loss": "kto", "dpo__lora__rank": 2, "dpo__quant__kind": "nf4"},
}  # fmt: skip
PAIRED = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
MASS = {"probability/chosen", "probability/rejected", "probability/elsewhere"}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_trains_and_logs(pipeline, tmp_path, name):
    settings = beside(pipeline, tmp_path, "pretrain", "sft").replace(**KINDS[name])
    result = run_stage("dpo", settings)
    assert result.folder == tmp_path / name and checkpoint.is_complete(result.folder)
    last = result.history[-1]
    kl = {"kto_kl"} if settings.dpo.loss == "kto" else set()
    assert {k[6:] for k in last if k.startswith("train/")} >= PAIRED | kl | {"loss", "lr", "grad_norm"}
    assert {k[4:] for k in last if k.startswith("val/")} == PAIRED | MASS | kl | {"loss", "true_reward"}
    assert sum(last[f"val/{key}"] for key in MASS) == pytest.approx(1.0)
    guide = Path(__file__).parents[1].joinpath("CONTRIBUTING.md").read_text(encoding="utf-8")
    guide = guide.partition("## What the curves of DPO, IPO and KTO mean")[2].partition("\n## ")[0]
    explained = {key.partition("/")[2] for key in re.findall(r"`((?:train|val)/[\w/]+)`", guide)}
    logged = {key.partition("/")[2] for key in last if "/" in key}
    assert logged - {"lr", "grad_norm", "tokens_per_s"} <= explained
    first = result.history[0]
    assert first["train/rewards/margins"] == pytest.approx(0, abs=1e-4)  # the policy is the reference at first
    untrained = {"dpo": math.log(2), "ipo": (1 / 0.2) ** 2, "kto": 0.5}[settings.dpo.loss]
    assert first["train/loss"] == pytest.approx(untrained, rel=1e-4)
    model, tokenizer = checkpoint.load(result.folder)
    assert checkpoint.read_info(result.folder)["stage"] == "dpo" and len(result.samples) > 0
    assert checkpoint.read_info(result.folder)["best"] == result.best  # with the metrics that it was chosen by
    best = next(record for record in result.history if record["step"] == result.best["step"])
    assert result.best["loss"] == best["val/loss"]
    assert model(torch.tensor([tokenizer.encode_prompt("What is two?")])).isfinite().all()


@pytest.mark.slow
def test_the_report_card_compares_it_with_sft(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft", "reward")
    start = run_stage("dpo", settings.replace(dpo__optim__lr=0.0, dpo__optim__weight_decay=0.0)).folder
    entry = report.report_card(settings)["stages"]["dpo"]
    assert {"true_reward", "true_reward_greedy", "minus_sft", "minus_sft_greedy", "score", "kl"} <= entry.keys()
    assert entry["kl"]["mean"] == pytest.approx(0, abs=1e-5) and entry["minus_sft"]["mean"] == 0  # nothing was trained
    shutil.rmtree(start)
    run_stage("dpo", settings.replace(dpo__optim__lr=0.01))
    assert abs(report.report_card(settings)["stages"]["dpo"]["kl"]["mean"]) > 1e-3


def test_the_reference_is_the_start_with_adapters_and_without(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft")
    start, tokenizer = checkpoint.load(tmp_path / "sft")
    records = tinychat.comparisons(1, 6, 0.15)
    items = dpo.encode(tokenizer, records, settings.dpo)
    batch = preference_batch(items, tokenizer.pad_id)
    with torch.no_grad():
        expected = preference.response_logprobs(start, batch)
    computed = dpo.reference_logprobs(start, items, tokenizer.pad_id, settings.dpo)
    assert [len(part) for part in computed] == [len(item.responses) for item in items]
    torch.testing.assert_close(torch.cat(computed), expected, rtol=1e-4, atol=1e-4)  # in the items' order
    adapted, _ = dpo.prepare(tmp_path / "sft", settings.replace(dpo__lora__rank=2))
    for p in adapted.parameters():
        if p.requires_grad:  # as after training
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    adapted.train()
    found = dpo.with_reference(adapted, batch, settings.dpo)
    torch.testing.assert_close(found.ref_logprobs, expected, rtol=1e-4, atol=1e-4)
    assert adapted.training and not found.ref_logprobs.requires_grad
    policy = preference.response_logprobs(adapted, batch)
    assert float((policy - expected).abs().max()) > 0.1 and policy.requires_grad
    assert dpo.with_reference(adapted, found, settings.dpo) is found  # computed once


def test_validation_reads_averages_where_the_loss_does_and_whole_probabilities_for_the_mass(pipeline):
    model, tokenizer = checkpoint.load(pipeline.out_dir / "sft")
    items = dpo.encode(tokenizer, tinychat.comparisons(1, 4, 0.15), pipeline.dpo)
    batch = preference_batch(items, tokenizer.pad_id)
    batch = replace(batch, ref_logprobs=torch.linspace(-1, 1, len(batch.rank)))
    for average in (False, True):
        config = replace(pipeline.dpo, average_logprobs=average)
        with torch.no_grad():
            logprobs, whole = (preference.response_logprobs(model, batch, mean) for mean in (average, False))
            loss, metrics = preference.preference_loss(logprobs, batch, config)
        expected = metrics | {"loss": float(loss)} | preference.listed_mass(whole, batch)
        found = dpo.preference_metrics(model, [batch], config)
        assert found == {key: pytest.approx(value / batch.weight, rel=1e-5) for key, value in expected.items()}


def test_a_run_from_an_adapter_has_that_adapter_as_its_reference(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain").replace(
        sft__lora=LoRAConfig(rank=2), dpo__lora=LoRAConfig(rank=2)
    )
    start = run_stage("sft", settings).folder
    taught, tokenizer = checkpoint.load(start)
    settings = settings.replace(init=str(start), dpo__optim__lr=0.05)
    model, _ = dpo.prepare(start, settings)
    items = dpo.encode(tokenizer, tinychat.comparisons(1, 4, 0.15), settings.dpo)
    batch = preference_batch(items, tokenizer.pad_id)
    with torch.no_grad():
        expected = preference.response_logprobs(taught, batch)
        torch.testing.assert_close(preference.response_logprobs(model, batch), expected, rtol=1e-4, atol=1e-4)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1
    torch.testing.assert_close(
        dpo.with_reference(model, batch, settings.dpo).ref_logprobs, expected, rtol=1e-4, atol=1e-4
    )
    result = run_stage("dpo", settings)
    assert result.history[0]["train/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert checkpoint.read_info(result.folder)["base"] == "../pretrain"  # over the same base
    with pytest.raises(UserError, match="train with the same dpo.lora"):
        run_stage("dpo", settings.replace(dpo__lora__rank=4, overwrite=True))


SETTINGS = [  # each changes what is trained
    {"dpo__beta": 0.5}, {"dpo__label_smoothing": 0.2}, {"dpo__average_logprobs": True}, {"dpo__loss": "ipo"},
    {"dpo__freeze_layers": 1}, {"dpo__loop__batch_size": 2}, {"dpo__optim__lr": 0.01}, {"reward__sample_share": 0.0},
    {"seed": 2}, {"dpo__seq_len": 40}, {"world__temperature": 2.0},
]  # fmt: skip


@pytest.mark.slow
def test_each_setting_reaches_the_weights(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft").replace(dpo__name="x")
    plain = weights(run_stage("dpo", settings).folder)
    for changes in SETTINGS:
        other = weights(run_stage("dpo", settings.replace(**changes, overwrite=True)).folder)
        assert any(not torch.equal(plain[key], other[key]) for key in plain), changes
        with pytest.raises(UserError, match="finished run of other settings"):
            run_stage("dpo", settings)  # each is part of what identifies a run
    kto = settings.replace(dpo__loss="kto", overwrite=True)
    plain = weights(run_stage("dpo", kto).folder)
    for changes in ({"dpo__desirable_weight": 2.0}, {"dpo__undesirable_weight": 2.0}):
        other = weights(run_stage("dpo", kto.replace(**changes)).folder)
        assert any(not torch.equal(plain[key], other[key]) for key in plain), changes


@pytest.mark.slow
def test_more_steps_raise_the_margin_and_lower_the_loss(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft")
    settings = settings.replace(dpo__loop__steps=30, dpo__optim__lr=3e-3, dpo__loop__eval_every=30)
    for loss in ("dpo", "ipo", "kto"):
        history = run_stage("dpo", settings.replace(dpo__loss=loss)).history
        early, late = history[0], history[-1]
        assert late["train/rewards/margins"] > early["train/rewards/margins"] + 0.05, loss
        assert late["train/loss"] < early["train/loss"], loss


def test_validation_and_training_records_stay_apart(pipeline, tmp_path, monkeypatch):
    settings, seen, asked = beside(pipeline, tmp_path, "pretrain", "sft"), [], []
    encode, generate = dpo.encode, dpo.generate

    def noted(tokenizer, found, config):
        seen.append([record["prompt"] for record in found])
        return encode(tokenizer, found, config)

    def asks(model, tokenizer, prompts, *args, **kwargs):
        asked.append(list(prompts))
        return generate(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(dpo, "encode", noted)
    monkeypatch.setattr(dpo, "generate", asks)
    metrics, rows = dpo.preference_metrics, []

    def reads(model, batches, config):
        rows.extend(
            tuple(row[ids < 0].tolist()) for b in batches for row, ids in zip(b.tokens, b.segment_ids, strict=True)
        )
        return metrics(model, batches, config)

    monkeypatch.setattr(dpo, "preference_metrics", reads)
    run_stage("dpo", settings.replace(dpo__eval_prompts=5))
    tokenizer = Tokenizer.load(tmp_path / "sft")
    assert rows and set(rows) <= {tuple(tokenizer.encode_prompt(prompt)) for prompt in seen[1]}  # validation's records
    for prompts, split in zip(seen, ("train", "valid"), strict=True):
        assert len(prompts) > 1 and {tinychat.split_of(prompt) for prompt in prompts} == {split}
    sampled = [prompts for prompts in asked if prompts != list(tinychat.FIXED_PROMPTS)]
    assert sampled and all(len(prompts) == 5 for prompts in sampled)
    assert {tinychat.split_of(prompt) for prompts in sampled for prompt in prompts} == {"valid"}


def test_unpaired_records_train_kto(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft")
    sources.write_jsonl(tmp_path / "mine.jsonl", unpaired(80))
    settings = settings.replace(data=str(tmp_path / "mine.jsonl"), dpo__loss="kto")
    result = run_stage("dpo", settings)
    last = result.history[-1]
    assert {k[4:] for k in last if k.startswith("val/")} == {"loss", "kto_kl", "rewards/chosen", "rewards/rejected"}
    with pytest.raises(UserError, match="needs pairs of responses"):
        run_stage("dpo", settings.replace(dpo__loss="ipo"))
    assert not (tmp_path / "ipo" / "config.json").exists()


BAD = [
    ({"beta": 0.0}, "dpo.beta"), ({"beta": math.nan}, "dpo.beta"), ({"beta": math.inf}, "dpo.beta"),
    ({"label_smoothing": 0.5}, "dpo.label_smoothing"), ({"label_smoothing": -0.1}, "dpo.label_smoothing"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "dpo.label_smoothing"), ({"desirable_weight": -1.0}, "KTO weights"),
    ({"bucket_steps": 0}, "dpo.bucket_steps"), ({"eval_prompts": 0}, "dpo.eval_prompts"), ({"name": "a/b"}, "dpo.name"),
]  # fmt: skip


@pytest.mark.parametrize("changes, named", BAD)
def test_bad_settings_are_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        DPOConfig(**changes)


def test_a_4_bit_base_needs_adapters(pipeline):
    with pytest.raises(UserError, match="dpo.quant needs adapters"):
        pipeline.replace(dpo__quant__kind="nf4")


def test_where_it_stands_in_the_pipeline(pipeline):
    assert required_folders("dpo", pipeline) == ["sft"]


# ------------------------------------------------------------------------------------------------- TRL as the oracle

ORACLE = """
import json, sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
policy, reference, job, out = sys.argv[1:]
job = json.load(open(job))
tokenizer = AutoTokenizer.from_pretrained(policy)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (policy, reference)]
found = {}
common = dict(output_dir=out + ".d", report_to="none", use_cpu=True, beta=job["beta"], bf16=False,
              gradient_checkpointing=False, per_device_train_batch_size=2)
rows = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
tensors = {k: torch.tensor(v) for k, v in job["pairs"].items()}
for loss in ("sigmoid", "ipo"):
    trainer = DPOTrainer(model=models[0], ref_model=models[1], args=DPOConfig(loss_type=loss, **common),
                         train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    found[loss] = float(trainer._compute_loss(trainer.model.eval(), dict(tensors), False))
rows = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]}
tensors = {k: torch.tensor(v) for k, v in job["labelled"].items()}
trainer = KTOTrainer(model=models[0], ref_model=models[1], train_dataset=Dataset.from_dict(rows),
                     args=KTOConfig(desirable_weight=job["weights"][0], undesirable_weight=job["weights"][1], **common),
                     processing_class=tokenizer)
found["kto"] = float(trainer._compute_loss(trainer.model.eval(), dict(tensors), False))
json.dump(found, open(out, "w"))
"""


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, list[list[int]]]:
    """Prompts with responses as TRL's tensors, one row each, right-padded."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    made: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, response in rows:
        fill = [0] * (width - len(prompt) - len(response))
        made["input_ids"].append([*prompt, *response, *fill])
        made["attention_mask"].append([1] * (len(prompt) + len(response)) + fill)
        made["completion_mask"].append([0] * len(prompt) + [1] * len(response) + fill)
    return made


@pytest.mark.skipif("INSTRUCT_LLAMA_TRL" not in os.environ, reason="INSTRUCT_LLAMA_TRL names no Python that has TRL")
def test_the_losses_are_those_of_trl(pipeline, tmp_path):
    folders = [Path(pipeline.out) / name for name in ("sft", "pretrain")]  # the policy, and another as reference
    for folder in folders:
        convert.export("hf", folder, tmp_path / folder.name)
    (policy, tokenizer), (other, _) = map(checkpoint.load, folders)
    config = replace(pipeline.dpo, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    pairs = [{**c, "completions": c["completions"][:2]} for c in tinychat.comparisons(1, 4, 0.15)]
    items = dpo.encode(tokenizer, pairs, config)
    flat = [(item.prompt, item.responses[i]) for i in (0, 1) for item in items]  # the chosen ones, then the others
    single = [Preference(p, [r], [n % 2], [1 - 2 * (n % 2)]) for n, (p, r) in enumerate(flat)]
    single = dpo.with_mismatched(single, 1)
    labelled = padded(flat) | {"label": [item.labels[0] == 1 for item in single]}
    labelled |= {f"KL_{k}": v for k, v in padded([(item.prompt, item.mismatched) for item in single]).items()}
    job = {"beta": 0.3, "weights": [1.5, 0.5], "pairs": padded(flat), "labelled": labelled}
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "oracle.py").write_text(ORACLE)
    args = ["sft", "pretrain", "job.json", "found.json"]
    python, env = os.environ["INSTRUCT_LLAMA_TRL"], {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, "oracle.py", *args], cwd=tmp_path, env=env, check=True, timeout=600)
    theirs = json.loads((tmp_path / "found.json").read_text())

    def ours(items: list[Preference], **changes) -> float:
        changed, batch = replace(config, **changes), preference_batch(items, tokenizer.pad_id)
        with torch.no_grad():
            mine, reference = (
                preference.response_logprobs(m, batch, changed.average_logprobs) for m in (policy, other)
            )
        loss, _ = preference.preference_loss(mine, replace(batch, ref_logprobs=reference), changed)
        return float(loss) / batch.weight

    assert ours(items) == pytest.approx(theirs["sigmoid"], rel=1e-6, abs=1e-6)
    assert ours(items, loss="ipo", average_logprobs=True) == pytest.approx(theirs["ipo"], rel=1e-6, abs=1e-6)
    assert ours(single, loss="kto") == pytest.approx(theirs["kto"], rel=1e-6, abs=1e-6)
