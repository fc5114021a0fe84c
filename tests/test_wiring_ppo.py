"""The wiring of PPO and of the reward stage: every setting reaches the computation, every best is the best by its rule.

Formulas are tested elsewhere. Here small random networks run once, and hand-made numbers say what must come out: with
gamma unlike lambda, a mean unlike 0, a scale unlike 1, a temperature unlike 1 and filters on, nothing hides.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_ppo
import torch
from test_ppo import by_hand, four, gradients, judged, llama, logprobs_of, moved_on, scalar, seeded, setup_of, shared

from instruct_llama import presets
from instruct_llama.config import (
    LoRAConfig,
    OptimConfig,
    PPOConfig,
    QuantConfig,
    RewardConfig,
    SamplingConfig,
    UserError,
)
from instruct_llama.data.batching import dialog_batch, ranked_batch
from instruct_llama.evaluation import exact
from instruct_llama.model import lora
from instruct_llama.model.sampling import filter_logits
from instruct_llama.pipeline import run as run_stage
from instruct_llama.rlhf import losses as objectives
from instruct_llama.rlhf import ppo, rollout
from instruct_llama.stages import ppo as ppo_stage
from instruct_llama.stages import pretrain, sft
from instruct_llama.stages import reward as stage
from instruct_llama.stages.pretrain import language_model_loss
from instruct_llama.training import actors as layouts
from instruct_llama.training import checkpoint
from instruct_llama.training import optim as optim_
from instruct_llama.training.run_log import RunLog, read_jsonl

BOS, EOS, PAD, CPU, PROMPTS = test_ppo.BOS, test_ppo.EOS, test_ppo.PAD, test_ppo.CPU, test_ppo.PROMPTS
SHAPE, SMALL = test_ppo.SHAPE, test_ppo.SMALL
ODD = replace(SMALL, gamma=0.9, lam=0.6, temperature=1.3, top_k=5, top_p=0.8, score_clip=1.0, missing_eos_score=-0.7)


def of_role(found, role):
    return {name: gradient for (owner, name), gradient in found.items() if owner == role}


def assert_alike(found, expected, times=1.0):
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, times * expected[name], rtol=1e-3, atol=1e-6)


def largest(found):
    return max(float(gradient.abs().max()) for gradient in found.values())


# ------------------------------------------------------------------------------------------------ phases 2 to 4


def test_sampling_settings_reach_the_sampler(monkeypatch):
    asked, real = [], rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda *a, **k: asked.append((len(a[1]), a[2])) or real(*a, **k))
    ppo.generate_responses(*setup_of(config=ODD), PROMPTS, seeded(0))
    assert [rows for rows, _ in asked] == [4, 2]  # generation batches of 4
    for _, given in asked:
        assert given == SamplingConfig(max_new_tokens=5, temperature=1.3, top_k=5, top_p=0.8)


def test_the_reference_has_the_temperature_but_not_the_filters():
    setup = setup_of(four(), ODD)
    rollouts = judged(setup)
    for name, model, filters in (("ref_logprobs", "reference", {}), ("logprobs", "policy", {"top_k": 5, "top_p": 0.8})):
        for i, prompt in enumerate(rollouts.prompts):
            answer = rollouts.responses[i][rollouts.response_mask[i]]
            logits = setup.actors.models[model](torch.tensor([[*prompt, *answer.tolist()]]))[0, len(prompt) - 1 : -1]
            full = filter_logits(logits, 1.3, suppress_tokens=exact.EnumerableTokens().suppress_tokens, **filters)
            expected = full.gather(1, answer[:, None])[:, 0].detach()
            torch.testing.assert_close(
                getattr(rollouts, name)[i][rollouts.response_mask[i]], expected, rtol=1e-4, atol=1e-5
            )
    assert (
        float((rollouts.logprobs - rollouts.ref_logprobs)[rollouts.response_mask].min()) > 0.01
    )  # the filters' gain in mass


def test_scores_are_normalised_clipped_and_stated_where_there_is_no_end():
    setup = setup_of(four(), ODD)
    setup.actors.reward_mean, setup.actors.reward_scale = 0.4, 3.0
    rollouts = judged(setup, PROMPTS * 4)
    reward = setup.actors.models["reward"]
    expected = []
    for prompt, ids, keep, ended in zip(
        rollouts.prompts, rollouts.responses, rollouts.response_mask, rollouts.has_eos, strict=True
    ):
        raw = float(reward(torch.tensor([[*prompt, *ids[keep].tolist()]]))[0, -1])
        expected.append(max(-1.0, min(1.0, (raw - 0.4) / 3.0)) if ended else -0.7)
    normal = {score for score in expected if abs(score) < 1 and score != -0.7}
    assert normal and -0.7 in expected and {-1.0, 1.0} & set(expected)  # all three cases come up
    torch.testing.assert_close(rollouts.scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
def test_returns_come_from_the_advantages_before_whitening(whiten):
    rollouts = by_hand()
    rollouts.logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
    rollouts.ref_logprobs = torch.tensor([[-0.5, -1.0, -2.5], [-1.5, -1.25, 0.0]])
    rollouts.values = torch.tensor([[0.5, -0.25, 1.0], [2.0, 0.75, 0.0]])
    rollouts.scores = torch.tensor([3.0, -1.0])
    rollout.compute_advantages(rollouts, replace(SMALL, gamma=0.9, lam=0.6, whiten_advantages=whiten), kl_coef=0.4)
    rewards = torch.tensor([[0.2, 0.4, 0.2 + 3.0], [-0.2, -0.1 - 1.0, 0.0]])
    last = (3.2 - 1.0, -1.1 - 0.75)  # delta of each answer's last token
    one = (0.2 + 0.9 * -0.25 - 0.5, 0.4 + 0.9 * 1.0 + 0.25)
    middle = one[1] + 0.54 * last[0]  # gamma * lambda = 0.54
    advantages = [[one[0] + 0.54 * middle, middle, last[0]], [-0.2 + 0.9 * 0.75 - 2.0 + 0.54 * last[1], last[1], 0.0]]
    torch.testing.assert_close(rollouts.rewards, rewards)
    expected = torch.tensor(advantages)
    torch.testing.assert_close(rollouts.returns, torch.where(rollouts.response_mask, expected + rollouts.values, 0.0))
    if whiten:
        real = expected[rollouts.response_mask]
        expected = torch.where(rollouts.response_mask, (expected - real.mean()) / real.std(correction=0), 0.0)
    torch.testing.assert_close(rollouts.advantages, expected, rtol=1e-4, atol=1e-5)


def test_iterate_penalises_with_the_coefficient_it_is_given():
    for kl_coef in (0.0, 0.7):
        models = four()
        models.models["policy"] = llama(3)
        setup = setup_of(models)
        rollouts, _ = ppo.run_iteration(*setup, PROMPTS, setup.actors.make_optimizer(setup.config), kl_coef, 0, 0)
        total = objectives.response_sum(rollouts.rewards, rollouts.response_mask)
        torch.testing.assert_close(total, rollouts.scores - kl_coef * rollouts.kl(), rtol=1e-4, atol=1e-4)
        assert float(rollouts.kl().abs().max()) > 0.1


# ------------------------------------------------------------------------------------------------ phase 5


def test_value_coef_multiplies_the_gradient_of_the_value_and_of_nothing_else():
    found = {}
    for coefficient in (1.0, 7.0):
        setup = setup_of(config=replace(SMALL, vf_coef=coefficient))
        figures = ppo.minibatch_gradients(*setup, moved_on(setup), seed=0)
        found[coefficient] = gradients(setup)
        assert figures["loss"] == pytest.approx(figures["policy_loss"] + coefficient * figures["value_loss"])
    assert_alike(of_role(found[7.0], "value"), of_role(found[1.0], "value"), 7.0)
    assert_alike(of_role(found[7.0], "policy"), of_role(found[1.0], "policy"))


def test_entropy_coef_adds_the_gradient_of_the_entropy():
    found = {}
    for coefficient in (0.0, 3.0):
        setup = setup_of(config=replace(SMALL, entropy_coef=coefficient))
        rollouts = moved_on(setup)
        figures = ppo.minibatch_gradients(*setup, rollouts, seed=0)
        found[coefficient] = of_role(gradients(setup), "policy")
    assert figures["loss"] == pytest.approx(
        figures["policy_loss"] + 0.5 * figures["value_loss"] - 3.0 * figures["entropy"], rel=1e-5
    )
    full = logprobs_of(setup, rollouts)[1]
    (objectives.entropy_loss(full, rollouts.response_mask) / rollouts.response_mask.sum()).backward()
    entropy = {name: p.grad for name, p in setup.actors.trainable("policy").items()}
    assert_alike({name: found[3.0][name] - found[0.0][name] for name in entropy}, entropy, 3.0)
    assert largest(entropy) > 1e-3


DIALOGS = [([BOS, a, b, EOS], [False, False, True, True]) for a in range(3, 12) for b in range(3, 12)]


def test_ptx_coef_adds_the_gradient_of_the_demonstrations(monkeypatch):
    found, drawn = {}, []
    monkeypatch.setattr(ppo, "dialog_batch", lambda rows, pad: drawn.append(rows) or dialog_batch(rows, pad))
    for coefficient in (0.0, 5.0):
        setup = setup_of(config=replace(SMALL, ptx_coef=coefficient))
        figures = ppo.minibatch_gradients(*setup, moved_on(setup), seed=0, demonstrations=DIALOGS)
        found[coefficient] = of_role(gradients(setup), "policy")
    batch = dialog_batch(drawn[0], PAD)
    loss = language_model_loss(setup.actors.models["policy"], batch)[0] / batch.weight
    loss.backward()
    assert figures["ptx_loss"] == pytest.approx(float(loss.detach()), rel=1e-5) and len(drawn) == 1
    theirs = {name: p.grad for name, p in setup.actors.trainable("policy").items()}
    assert_alike({name: found[5.0][name] - found[0.0][name] for name in theirs}, theirs, 5.0)


def test_p42_every_mini_batch_has_demonstrations_of_its_own(monkeypatch):
    drawn = []
    monkeypatch.setattr(ppo, "dialog_batch", lambda rows, pad: drawn.append(rows) or dialog_batch(rows, pad))
    setup = setup_of(config=replace(SMALL, ptx_coef=1.0, num_ppo_epochs=2, mini_batch_size=2))
    optimizer = setup.actors.make_optimizer(setup.config)
    rollouts = judged(setup)
    for seed, iteration in ((1, 0), (1, 1), (2, 0), (1, 0)):
        ppo.update(*setup, rollouts, optimizer, seed, iteration, DIALOGS)
    batches = [tuple(map(str, rows)) for rows in drawn]
    assert [len(rows) for rows in drawn] == [2] * 24
    assert len(set(batches[:18])) == 18 and batches[18:] == batches[:6]
    assert len({row for rows in batches[:18] for row in rows}) > 18  # of 36 draws from 81


def test_clip_stops_the_policys_gradient_and_is_reported():
    for clip, stopped in ((0.2, True), (0.5, False)):
        setup = setup_of(config=replace(SMALL, cliprange=clip))
        rollouts = judged(setup)
        rollouts.logprobs = torch.where(
            rollouts.response_mask, rollouts.logprobs - float(np.log(1.3)), 0.0
        )  # the ratio is 1.3
        rollouts.advantages = rollouts.response_mask.float()
        figures = ppo.minibatch_gradients(*setup, rollouts, seed=0)
        assert (largest(of_role(gradients(setup), "policy")) < 1e-7) is stopped
        assert figures["clip_frac"] == float(stopped) and figures["ratio_abs_error"] == pytest.approx(0.3, abs=1e-4)
        assert figures["ratio"] == pytest.approx(1.3, abs=1e-4)
        assert figures["approx_kl"] == pytest.approx(0.3 - np.log(1.3), abs=1e-4)  # old to new; new to old: 0.032


def test_value_clip_stops_the_values_gradient():
    for clip, stopped in ((0.2, True), (0.5, False), (0.0, False)):
        setup = setup_of(config=replace(SMALL, cliprange_value=clip))
        rollouts = judged(setup)
        rollouts.returns = torch.where(rollouts.response_mask, rollouts.values + 1.0, 0.0)
        rollouts.values = torch.where(
            rollouts.response_mask, rollouts.values - 0.3, 0.0
        )  # it has moved by 0.3 towards it
        figures = ppo.minibatch_gradients(*setup, rollouts, seed=0)
        assert (largest(of_role(gradients(setup), "value")) < 1e-7) is stopped
        assert figures["value_loss"] == pytest.approx(0.5 * 1.1**2 if stopped else 0.5, rel=1e-3)


def test_p42_mini_batches_are_others_in_every_epoch_and_iteration(monkeypatch):
    seen, setup = [], setup_of(config=replace(SMALL, num_ppo_epochs=2, mini_batch_size=3))

    def gradients_of(actors, config, part, *at):
        seen.append(part.tokens[:, 1].tolist())
        return {"loss": 0.0, "ratio_abs_error": 0.0}

    monkeypatch.setattr(ppo, "minibatch_gradients", gradients_of)
    monkeypatch.setattr(layouts, "scaled_step", lambda *_: (0.0, 0.0))
    tokens = torch.tensor([[BOS, number] for number in range(24)])
    ones = torch.ones(24, 1, dtype=torch.bool)
    starts = torch.ones(24).long()
    rollouts = rollout.Rollouts([[BOS]] * 24, tokens, starts, tokens[:, 1:], ones, ones[:, 0], ones.float())
    for seed, iteration in ((1, 0), (1, 1), (2, 0), (1, 0)):
        ppo.update(*setup, rollouts, torch.optim.SGD([torch.zeros(1)]), seed, iteration)
    assert len(seen) == 4 * 16 and {len(rows) for rows in seen} == {3}  # 2 epochs of 8 mini-batches of 3
    epochs = [sum(seen[i : i + 8], []) for i in range(0, 64, 8)]
    assert all(sorted(rows) == list(range(24)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs[:6]}) == 6 and epochs[6:] == epochs[:2]


def test_micro_batch_bounds_every_forward_pass(monkeypatch):
    setup, rows = setup_of(config=replace(SMALL, micro_batch_size=2)), []
    rollouts = judged(setup)
    real = rollout.sampling_logprobs
    monkeypatch.setattr(rollout, "sampling_logprobs", lambda m, e, *rest: rows.append(len(e)) or real(m, e, *rest))
    ppo.minibatch_gradients(*setup, rollouts, seed=0)
    assert rows == [2, 2, 2]


def test_rollouts_prompts_are_drawn_and_each_comes_before_any_comes_again():
    prompts = [[BOS, i] for i in range(20)]
    drawn = [ppo.draw_prompts(prompts, replace(SMALL, rollouts_per_iteration=5), 1, i) for i in range(8)]
    assert [len(part) for part in drawn] == [5] * 8
    first, second = sum(drawn[:4], []), sum(drawn[4:], [])
    assert sorted(first) == sorted(second) == prompts and first != second
    assert drawn == [ppo.draw_prompts(prompts, replace(SMALL, rollouts_per_iteration=5), 1, i) for i in range(8)]
    assert drawn[0] != ppo.draw_prompts(prompts, replace(SMALL, rollouts_per_iteration=5), 2, 0)


# ------------------------------------------------------------------------------------------------ the optimizer


def test_each_network_has_its_rate_and_the_optimizer_its_settings():
    optim = OptimConfig(lr=0.003, min_lr_ratio=0.5, warmup_steps=2, weight_decay=0.25, beta1=0.5, beta2=0.75, eps=1e-3)
    setup = setup_of(config=replace(SMALL, optim=optim, value_lr=0.05, iterations=6))
    optimizer = setup.actors.make_optimizer(setup.config)
    for role, rate in (("policy", 0.003), ("value", 0.05)):
        mine = {id(p) for p in setup.actors.trainable(role).values()}
        groups = [group for group in optimizer.param_groups if {id(p) for p in group["params"]} <= mine]
        assert {id(p) for group in groups for p in group["params"]} == mine
        assert {group["peak"] for group in groups} == {rate}
        assert {(group["betas"], group["eps"]) for group in groups} == {((0.5, 0.75), 1e-3)}
        assert {group["weight_decay"] for group in groups} == {0.25, 0.0}
    rollouts = judged(setup)
    for iteration in range(6):
        ppo.update(*setup, rollouts, optimizer, 0, iteration)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(optim_.learning_rate(iteration, 6, optim, group["peak"]))


@pytest.mark.parametrize("still", ["policy", "value"])
def test_a_rate_of_0_leaves_a_network_as_it_was(still):
    rates = {"optim": OptimConfig(lr=0.0 if still == "policy" else 0.01, warmup_steps=0, weight_decay=0.0)}
    setup = setup_of(config=replace(SMALL, value_lr=0.0 if still == "value" else 0.01, **rates))
    networks = {role: list(setup.actors.trainable(role).values()) for role in ("policy", "value")}
    before = {role: [p.detach().clone() for p in found] for role, found in networks.items()}
    ppo.run_iteration(*setup, PROMPTS, setup.actors.make_optimizer(setup.config), 0.1, 0, 0)
    for role, old in before.items():
        same = [torch.equal(p, q) for p, q in zip(networks[role], old, strict=True)]
        assert all(same) if role == still else not any(same)


@pytest.mark.parametrize("layout", [four, shared])
def test_a_huge_gradient_of_the_value_does_not_shorten_the_policys_step(layout):
    """Each network is clipped by its own norm, and each norm is logged."""
    left, norms = {}, {}
    for factor in (1.0, 1e6):
        # with so large an eps, AdamW's step depends on the gradient's length
        optim = OptimConfig(lr=0.01, warmup_steps=0, weight_decay=0.0, eps=1.0, grad_clip=1e-3)
        setup = setup_of(layout(), replace(SMALL, vf_coef=factor, num_ppo_epochs=1, mini_batch_size=6, optim=optim))
        norms[factor] = ppo.update(*setup, judged(setup), setup.actors.make_optimizer(setup.config), 0, 0)
        left[factor] = {name: p.detach().clone() for name, p in setup.actors.trainable("policy").items()}
    for name, weight in left[1.0].items():
        assert torch.equal(weight, left[1e6][name]), name
    assert norms[1e6]["grad_norm"] == norms[1.0]["grad_norm"] > 1e-3
    assert norms[1e6]["value_grad_norm"] == pytest.approx(1e6 * norms[1.0]["value_grad_norm"], rel=1e-3)


def test_grad_clip_bounds_each_networks_gradient(monkeypatch):
    setup = setup_of(config=replace(SMALL, num_ppo_epochs=1, mini_batch_size=6, optim=OptimConfig(grad_clip=0.01)))
    optimizer, seen = setup.actors.make_optimizer(setup.config), {}

    def step():
        for role in ("policy", "value"):
            grads = [p.grad for p in setup.actors.trainable(role).values()]
            seen[role] = float(torch.nn.utils.get_total_norm(grads))

    monkeypatch.setattr(optimizer, "step", step)
    stats = ppo.update(*setup, judged(setup), optimizer, 0, 0)
    assert min(stats["grad_norm"], stats["value_grad_norm"]) > 0.02
    assert seen == pytest.approx({"policy": 0.01, "value": 0.01}, rel=1e-3)


# ------------------------------------------------------------------------------------------------ filters (A2)


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.6}])
def test_a_sampled_token_stays_possible_when_rounding_moves_it_over_the_filters_edge(filters):
    """Token 1 was kept when it was drawn; in the recomputed logits token 2 has overtaken it."""
    drawn_from, again = torch.tensor([2.0, 1.001, 1.0, -1.0]), torch.tensor([2.0, 1.0, 1.001, -1.0])
    sampled = torch.tensor(1)
    before = filter_logits(drawn_from, **filters)
    assert before[1] > -torch.inf and filter_logits(again, **filters)[1] == -torch.inf
    kept = filter_logits(again, **filters, sampled=sampled)
    assert float(kept.exp().sum()) == pytest.approx(1.0, abs=1e-6)  # renormalised
    assert kept[[0, 1, 2]].isfinite().all() and kept[3] == -torch.inf
    assert float(kept[1] - kept[0]) == pytest.approx(-1.0, abs=1e-5)
    assert torch.equal(filter_logits(drawn_from, **filters, sampled=sampled), before)  # nothing else changes a bit
    banned = filter_logits(again, **filters, suppress_tokens=(1,), sampled=sampled)
    assert banned[1] == -torch.inf  # padding is not brought back


def test_p23_training_keeps_a_sampled_token_that_the_filter_would_now_remove():
    """An update after rounding: finite log-probabilities, ratio and gradient."""
    setup = setup_of(config=replace(SMALL, top_k=2))
    rollouts = judged(setup)
    full = logprobs_of(setup, rollouts)[1]
    rollouts.responses[0, 0] = rollouts.tokens[0, int(rollouts.prompt_lengths[0])] = int(full[0, 0, 3:].argmin()) + 3
    assert full[0, 0, rollouts.responses[0, 0]] == -torch.inf
    figures = ppo.minibatch_gradients(*setup, rollouts, seed=0)
    assert all(np.isfinite(value) for value in figures.values())
    assert all(gradient.isfinite().all() for gradient in gradients(setup).values())


# ------------------------------------------------------------------------------------------------ the value's start


@pytest.mark.parametrize("layout", [four, shared])
def test_the_value_starts_in_the_unit_of_the_rewards(layout, monkeypatch):
    """`build` turns the raw head into (raw - mean) / scale; the reward model's own stays raw."""
    models, tokens = layout(), torch.tensor([[BOS, 4, 5, 6, EOS]])
    with torch.no_grad(), models.use("value") as model:
        raw = model(tokens).clone()
    with torch.no_grad(), models.use("reward") as model:
        raw_reward = model(tokens).clone()
    name = {four: "four_models", shared: "shared_base"}[layout]
    monkeypatch.setattr(ppo_stage, name, lambda *_: models)
    for thing in ("shape_of", "origin"):
        monkeypatch.setattr(checkpoint, thing, lambda *_: {})
    monkeypatch.setattr(ppo_stage.memory, "check_room", lambda *_: None)
    monkeypatch.setattr(ppo_stage.Tokenizer, "load", lambda *_: None)
    monkeypatch.setattr(ppo_stage.records, "check_vocabularies", lambda *_: None)
    monkeypatch.setattr(checkpoint, "read_info", lambda *_: {"reward": {"mean": 0.75, "scale": 0.25}})
    settings = presets.get("tiny").replace(ppo__layout=name, device="cpu")
    actors, *_ = ppo_stage.build(settings, [Path("sft"), Path("reward")])
    assert (actors.reward_mean, actors.reward_scale) == (0.75, 0.25)
    with torch.no_grad(), actors.use("value") as model:
        torch.testing.assert_close(model(tokens), (raw - 0.75) / 0.25)
    with torch.no_grad(), actors.use("reward") as model:
        assert torch.equal(model(tokens), raw_reward)
    trained = actors.trainable("value")
    assert {"value_head.weight", "value_head.bias"} <= set(trained)  # so a resumed run has them too
    assert all(p.requires_grad for p in trained.values())


def test_over_a_shared_base_reward_and_value_are_two_heads_and_two_adapters(monkeypatch):
    """A value that learnt would move the reward model with it."""
    source, config = llama(0), LoRAConfig(rank=2, alpha=4.0)
    lora.add_adapter(source, "reward", config, seeded(1))
    state = lora.adapter_state(source, "reward")
    state["value_head.weight"] = torch.randn(1, SHAPE.dim, generator=seeded(2))
    over = {Path("sft"): None, Path("reward"): (config, state, QuantConfig())}
    monkeypatch.setattr(checkpoint, "base_of", lambda folder: (Path("base"), over[folder]))
    monkeypatch.setattr(checkpoint, "load_full", lambda *_, **__: (llama(0), None))
    models = layouts.shared_base(*over, exact.EnumerableTokens(), CPU, replace(SMALL, lora=config), seed=1)
    weights = [models.heads[role].value_head.weight for role in ("reward", "value")]
    assert torch.equal(*weights) and weights[0] is not weights[1] and weights[0].data_ptr() != weights[1].data_ptr()
    tokens = torch.tensor([[BOS, 4, 5, 6]])

    def found(role):
        with torch.no_grad(), models.use(role) as model:
            return model(tokens).clone()

    before = found("reward"), found("value")
    setup = setup_of(models)
    ppo.run_iteration(*setup, PROMPTS, setup.actors.make_optimizer(setup.config), 0.1, 0, 0)
    assert torch.equal(found("reward"), before[0]) and not torch.allclose(found("value"), before[1], atol=1e-4)


# ------------------------------------------------------------------------------------------------ the loop


def looped(monkeypatch, tmp_path, candidates, coefficients=None, **changes):
    """`ppo._loop` over small networks; each validation finds the next of `candidates`, (score, KL, standard error).

    Returns the iterations whose policy was saved, and what the loop handed on.
    """
    settings = presets.get("tiny").replace(data="a file", device="cpu", out=str(tmp_path))
    usual = {"iterations": len(candidates), "eval_every": 1, "sample_every": 99, "save_every": 99}
    config = replace(SMALL, **{**usual, **changes})
    settings = replace(settings, ppo=config)
    setup, saved, seen = setup_of(config=config), [], {"kl_coef": [], "evaluated": [], "adapted": [], "drawn": []}
    found = iter(candidates)
    monkeypatch.setattr(ppo_stage, "fit_prompts", lambda *_: (PROMPTS, PROMPTS, [], [[BOS, 3]] * 9))
    monkeypatch.setattr(
        setup.actors,
        "save",
        lambda folder, tokenizer, info: (
            saved.append(info["best"]["step"]),
            checkpoint.write_info(folder, {"kind": "lm", "model": {}}),
        ),
    )
    real_iterate, real_adapt = ppo.run_iteration, objectives.adaptive_kl

    def iterate(actors, config, prompts, optimizer, kl_coef, seed, iteration, demonstrations):
        seen["kl_coef"].append(kl_coef)
        seen["drawn"].append(prompts)
        return real_iterate(actors, config, prompts, optimizer, kl_coef, seed, iteration, demonstrations)

    def evaluate(actors, config, prompts, true_prompts, kl_coef):
        score, kl, error = next(found)
        seen["evaluated"].append((len(prompts), kl_coef))
        return {"score": score, "kl": kl, "objective": score - kl_coef * kl, "objective_stderr": error}

    def adapt(*given):
        seen["adapted"].append(given)
        return coefficients[len(seen["adapted"]) - 1] if coefficients else real_adapt(*given)

    monkeypatch.setattr(ppo, "run_iteration", iterate)
    monkeypatch.setattr(ppo_stage, "evaluate_policy", evaluate)
    monkeypatch.setattr(objectives, "adaptive_kl", adapt)
    folder = tmp_path / "ppo"
    folder.mkdir()
    ppo_stage._loop(settings, setup.actors, [], {}, RunLog(folder, settings, "ppo"))
    return saved, seen


@pytest.mark.parametrize(
    ("candidates", "coefficients", "kept"),
    [
        ([(1.0, 0.0, 0.0), (1.5, 10.0, 0.0), (0.5, 0.0, 0.0)], None, [1]),  # by score less 0.1 KL, not by score
        ([(1.0, 0.0, 0.0), (1.5, 1.0, 0.0), (0.5, 0.0, 0.0)], None, [1, 2]),
        # The first is better under its own coefficient (1.9 to 1.4), the second when both pay today's (1.0 to 1.4).
        ([(2.0, 1.0, 0.0), (1.5, 0.1, 0.0), (0.0, 0.0, 0.0)], [0.1, 1.0, 1.0], [1, 2]),
        # And the other way round: 1.0 was its objective when the KL was dear, today it is worth 1.9.
        ([(2.0, 1.0, 0.0), (1.5, 0.1, 0.0), (0.0, 0.0, 0.0)], [1.0, 0.1, 0.1], [1]),
        ([(1.0, 0.0, 0.5), (0.9, 0.0, 0.5), (0.8, 0.0, 0.3)], None, [1, 3]),  # in doubt the last, and only the last
        ([(1.0, 0.0, 0.5), (0.9, 0.0, 0.5), (0.8, 0.0, 0.1)], None, [1]),
    ],
)
def test_the_best_policy_is_the_best_by_score_less_todays_kl_penalty(
    monkeypatch, tmp_path, candidates, coefficients, kept
):
    saved, _ = looped(monkeypatch, tmp_path, candidates, coefficients, kl_coef=0.1)
    assert saved == kept


def test_the_loop_hands_its_settings_on(monkeypatch, tmp_path):
    _, seen = looped(
        monkeypatch, tmp_path, [(1.0, 0.0, 0.0)] * 3, iterations=5, eval_every=2, eval_prompts=7, kl_coef=0.3,
        kl_target=0.01, kl_horizon=2, rollouts_per_iteration=4,
    )  # fmt: skip
    assert [n for n, _ in seen["evaluated"]] == [7] * 3  # after 2, 4 and the last
    assert len(seen["kl_coef"]) == 5 and [len(prompts) for prompts in seen["drawn"]] == [4] * 5
    assert seen["kl_coef"][0] == 0.3 and len(set(seen["kl_coef"])) > 1
    logged = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    for i, (coefficient, kl, target, horizon) in enumerate(seen["adapted"]):
        assert (coefficient, kl, target, horizon) == (seen["kl_coef"][i], logged[i]["ppo/kl"], 0.01, 2)
        error = max(-1.0, min(1.0, (kl - 0.01) / 0.01))
        following = seen["kl_coef"][i + 1] if i < 4 else seen["evaluated"][-1][1]
        assert following == pytest.approx(coefficient * np.exp(error / 2))


def test_p42_validation_samples_from_a_stream_of_its_own(monkeypatch):
    """Not with the numbers of the run of seed 0, whose first rollouts would be validated as they were trained."""
    first, real = [], ppo.generate_responses

    def generate(actors, config, prompts, generator):
        first.append(generator.get_state())
        return real(actors, config, prompts, generator)

    monkeypatch.setattr(ppo, "generate_responses", generate)
    setup = setup_of()
    ppo.sample_rollouts(*setup, PROMPTS, seed=0, iteration=0)
    for _ in range(2):
        ppo_stage.evaluate_policy(*setup, PROMPTS, None, 0.1)
    *rollouts, one, again = first
    assert torch.equal(one, again) and not any(torch.equal(one, state) for state in rollouts)


# ------------------------------------------------------------------------------------------------ the reward stage


class Letters(exact.EnumerableTokens):
    """An alphabet that writes ids as letters, and has every prompt as it is."""

    def encode_prompt(self, prompt):
        return prompt

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def sampled(monkeypatch):
    """What the sampler is asked for, and the first numbers of its generator."""
    asked, real = [], rollout.sample

    def sample(policy, prompts, sampling, special, generator):
        state = generator.get_state()
        first = float(torch.rand((), generator=generator))
        generator.set_state(state)
        asked.append({"sampling": sampling, "rows": len(prompts), "first": first})
        return real(policy, prompts, sampling, special, generator)

    monkeypatch.setattr(rollout, "sample", sample)
    monkeypatch.setattr(stage, "fit_prompt", lambda tokenizer, ids, room: ids if len(ids) <= room else None)
    return asked


RANKED = [
    [[BOS, 5, 3, 4, EOS], [BOS, 5, 6, 6, 6, EOS], [BOS, 5, 7, EOS]],  # best first, all go on from BOS 5
    [[BOS, 4, 5, 3, EOS], [BOS, 4, EOS]],
]


def ranking_gradients(config, items=RANKED):
    model = scalar(2)
    loss, logged = stage.reward_loss(model, ranked_batch(items, PAD), config)
    loss.backward()
    return loss.detach(), logged, {name: p.grad for name, p in model.named_parameters()}


def test_each_loss_of_the_reward_model_reaches_the_gradient_by_its_weight():
    """The whole loss is ranking + token_coef * token + lm_coef * lm, in value and in gradient."""
    plain, logged, gradient = ranking_gradients(RewardConfig())
    assert set(logged) == {"accuracy", "loss"} and logged["loss"] == pytest.approx(float(plain))
    batch = ranked_batch(RANKED, PAD)
    for setting, name in (("token_coef", "token_loss"), ("lm_coef", "lm_loss")):
        model = scalar(2)
        hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids)
        extra = stage.token_loss(model.head(hidden), batch)
        if name == "lm_loss":
            extra = stage.lm_loss(model, hidden, batch)
        extra.backward()
        alone_loss = float(extra.detach())
        alone = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
        for weight in (0.5, 2.0):
            loss, logged, found = ranking_gradients(RewardConfig(**{setting: weight}))
            assert float(loss) == pytest.approx(float(plain) + weight * alone_loss, rel=1e-5)
            assert logged["loss"] == pytest.approx(float(plain)) and logged[name] == pytest.approx(alone_loss)
            for key in found:
                torch.testing.assert_close(found[key], gradient[key] + weight * alone[key], rtol=1e-3, atol=1e-5)


def test_the_token_loss_ranks_the_mean_over_each_answers_own_tokens():
    """By hand: (1 + 2 + 3) / 3 = 2 above (4 - 2 - 2 + 0) / 4 = 0 above (-1 - 1) / 2 = -1; padding counts nothing."""
    batch = ranked_batch(RANKED[:1], PAD)
    assert batch.segment_ids.tolist() == [[-1, -1, 1, 1, 1, 2, 2, 2, 2, 3, 3]]
    per_token = torch.tensor([[9.0, 9, 1, 2, 3, 4, -2, -2, 0, -1, -1]])
    expected = sum(np.log1p(np.exp(-gap)) for gap in (2, 3, 1)) / 3
    assert float(stage.token_loss(per_token, batch)) == pytest.approx(expected, abs=1e-6)
    both = ranked_batch([RANKED[0], RANKED[1]], PAD)
    flat = torch.zeros(both.tokens.shape)
    assert float(stage.token_loss(flat, both)) == pytest.approx(2 * np.log(2), abs=1e-6)  # a sum over prompts


def test_the_lm_loss_is_the_surprise_of_each_prompts_best_answer_and_of_no_other():
    model, batch = scalar(2), ranked_batch(RANKED, PAD)
    policy = llama(0)
    policy.load_state_dict({k: v for k, v in model.state_dict().items() if k != "value_head.weight"}, strict=False)
    policy.output.weight = policy.tok_embeddings.weight
    expected = 0.0
    for best, common in ((RANKED[0][0], 2), (RANKED[1][0], 2)):
        logprobs = policy(torch.tensor([best]))[0].log_softmax(-1)
        told = range(common + 1, len(best))  # the first of its own tokens follows what all answers share
        expected -= sum(float(logprobs[t - 1, best[t]]) for t in told) / len(told)
    found = stage.lm_loss(model, model.hidden(batch.tokens, segment_ids=batch.segment_ids), batch)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_the_reward_stage_trains_and_logs_by_its_own_weights_of_the_auxiliary_losses(pipeline, tmp_path, monkeypatch):
    real, asked = stage.reward_loss, []
    monkeypatch.setattr(stage, "reward_loss", lambda model, batch, config: asked.append(config) or real(
        model, batch, config))  # fmt: skip
    settings = pipeline.replace(
        out=str(tmp_path), init=str(pipeline.out_dir / "sft"), reward__token_coef=0.7, reward__lm_coef=0.0,
        reward__loop=replace(pipeline.reward.loop, steps=1),
    )  # fmt: skip
    (record,) = run_stage("reward", settings).history
    assert set(asked) == {settings.reward}
    assert "train/token_loss" in record and "train/lm_loss" not in record


def test_p27_only_the_reward_stage_sorts_the_records_of_several_steps(pipeline, tmp_path, monkeypatch):
    """A comparison counts as one whatever its length; a demonstration counts by its tokens, and must not be sorted."""
    asked = {}

    def fit(job, log, settings):
        asked[job.name] = job.bucket_steps
        raise InterruptedError

    for one in (stage, sft, pretrain):
        monkeypatch.setattr(one, "fit", fit)
        settings = pipeline.replace(out=str(tmp_path / one.__name__), reward__bucket_steps=3)
        init = str(pipeline.out_dir / "sft") if one is stage else str(pipeline.out_dir / "pretrain")
        with pytest.raises(InterruptedError):
            run_stage(one.__name__.rpartition(".")[2], settings if one is pretrain else settings.replace(init=init))
    assert asked == {"reward": 3, "sft": 1, "pretrain": 1}
    with pytest.raises(UserError, match="bucket_steps must be at least 1"):
        RewardConfig(bucket_steps=0)


def test_the_lm_loss_needs_tied_embeddings(pipeline, tmp_path, monkeypatch):
    untied = replace(pipeline.model, tie_embeddings=False)
    monkeypatch.setattr(stage.checkpoint, "shape_of", lambda _: untied)
    with pytest.raises(UserError, match="set reward.lm_coef to 0"):
        init = str(pipeline.out_dir / "sft")
        run_stage("reward", pipeline.replace(out=str(tmp_path), init=init, reward__lm_coef=0.1))
    with pytest.raises(UserError, match="must not be negative"):
        RewardConfig(token_coef=-1.0)


class LastToken(torch.nn.Linear):
    """Scores each position by its token id, so that a completion's score is its last id."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, tokens, *, segment_ids):
        return tokens.float()


def test_the_reward_models_metrics_by_hand():
    """Pairs (5, 3) of one prompt; (4, 6), (4, 4), (6, 4) of another: right, wrong, equal, right."""
    batches = [ranked_batch([[[1, 2, 5], [1, 2, 3]]], 0), ranked_batch([[[1, 4], [1, 6], [1, 4]]], 0)]
    right, wrong, equal = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), math.log(2)
    assert stage.reward_metrics(LastToken(), batches) == pytest.approx({
        "loss": (right + (wrong + equal + right) / 3) / 2, "accuracy": 2.5 / 4, "pairs": 4.0, "gap": 0.5,
        "chosen_mean": 4.75, "chosen_std": 0.6875**0.5, "rejected_mean": 4.25, "rejected_std": 1.1875**0.5,
    })  # fmt: skip


@pytest.mark.parametrize(("start", "wanted"), [("pretrain", ["pretrain", "sft"]), ("sft", ["sft", "sft"])])
def test_the_reward_model_starts_where_it_is_told_and_is_compared_by_the_sft_model(
    pipeline, tmp_path, monkeypatch, start, wanted
):  # fmt: skip
    """Whatever it starts from: the responses that are sampled are those of the model that PPO will train."""
    read, real = [], stage.checkpoint.load

    def prepare(base, settings):
        read.insert(0, base.name)
        raise InterruptedError

    monkeypatch.setattr(stage.checkpoint, "load", lambda folder, *a, **k: read.append(folder.name) or real(
        folder, *a, **k))  # fmt: skip
    monkeypatch.setattr(stage, "prepare", prepare)
    settings = pipeline.replace(out=str(tmp_path), reward__init_from=start)
    with pytest.raises(InterruptedError):
        stage.run(settings, [Path(pipeline.out) / name for name in dict.fromkeys([start, "sft"])])
    assert read == wanted


PLAY = PPOConfig(max_new_tokens=6, generation_batch_size=10, temperature=1.4, top_k=7, top_p=0.85)


def test_the_normaliser_is_fitted_on_responses_sampled_as_ppo_samples(sampled):
    config = RewardConfig(normalise_samples=24)
    prompts = [[BOS] * n for n in (1, 2, 3, 26, 27)] * 6  # with 6 more tokens, 26 fill the context of 32
    rollouts = stage.reference_responses(llama(0), Letters(), prompts, config, 1, PLAY)
    assert len(rollouts) == 24 and max(map(len, rollouts.prompts)) == 26
    assert [given["rows"] for given in sampled] == [10, 10, 4]
    for given in sampled:
        assert given["sampling"] == SamplingConfig(max_new_tokens=6, temperature=1.4, top_k=7, top_p=0.85)
    shorter = stage.reference_responses(llama(0), Letters(), prompts, config, 1, replace(PLAY, seq_len=9))
    assert max(map(len, shorter.prompts)) == 3


def test_comparisons_are_sampled_as_ppo_samples_and_ranked_by_a_labeller_of_their_own(sampled, monkeypatch):
    orders = []
    monkeypatch.setattr(stage.tinychat, "rank", lambda prompt, texts, temperature, rng: orders.append(
        (temperature, rng.random())) or texts)  # fmt: skip
    monkeypatch.setattr(stage.tinychat, "true_reward", lambda *_: SimpleNamespace(total=0.0))  # of no question
    monkeypatch.setattr(stage.tinychat, "utility", lambda *_: 0.0)
    config = RewardConfig(responses_per_prompt=4)
    for seed in (1, 2, 1):
        stage.sample_comparisons(llama(0), Letters(), [[BOS, 3], [BOS, 4]] * 4, config, 0.15, seed, PLAY)
    assert [given["rows"] for given in sampled] == [10, 10, 10, 2] * 3  # 4 responses to each of 8 prompts
    assert {given["sampling"] for given in sampled} == {SamplingConfig(6, 1.4, 7, 0.85)}
    assert {temperature for temperature, _ in orders} == {0.15}  # the labeller's, not the policy's
    third = len(orders) // 3
    assert len({draw for _, draw in orders}) > third  # the labeller of another seed draws other numbers
    assert sampled[0]["first"] == sampled[8]["first"] != sampled[4]["first"]
    stage.reference_responses(llama(0), Letters(), [[BOS, 3]] * 8, config, 1, PLAY)
    assert sampled[-1]["first"] != sampled[0]["first"]  # two uses of one seed


def test_the_reward_stage_hands_ppos_settings_to_both_of_its_samplers(pipeline, tmp_path, monkeypatch):
    played, real = [], stage.rollout.sample_responses
    monkeypatch.setattr(stage.rollout, "sample_responses", lambda p, ids, how, tok, g, size: played.append(
        (how, size)) or real(p, ids, how, tok, g, size))  # fmt: skip
    settings = pipeline.replace(
        out=str(tmp_path),
        init=str(pipeline.out_dir / "sft"),
        ppo__top_p=0.8,
        ppo__temperature=1.3,
        ppo__generation_batch_size=3,
    )
    run_stage("reward", settings)
    # its own comparisons, and the reference responses of the normaliser
    assert played == 2 * [(settings.ppo.sampling, settings.ppo.generation_batch_size)]


def test_the_reward_stage_hands_the_worlds_temperature_to_the_labeller_of_its_own_samples(
    pipeline, tmp_path, monkeypatch
):  # fmt: skip
    asked, real = [], stage.sample_comparisons
    monkeypatch.setattr(stage, "sample_comparisons", lambda *given: asked.append(given) or real(*given))
    settings = pipeline.replace(
        out=str(tmp_path), init=str(pipeline.out_dir / "sft"), world__temperature=0.4, reward__sample_share=0.5,
        reward__loop=replace(pipeline.reward.loop, steps=1),
    )  # fmt: skip
    run_stage("reward", settings)
    ((_, _, prompts, config, temperature, seed, play),) = asked
    assert (config, temperature, seed, play) == (settings.reward, 0.4, settings.seed, settings.ppo)
    assert len(prompts) == round(settings.world.comparisons * 0.5)  # the share that is sampled


def test_the_normaliser_ignores_answers_without_end_unless_none_ends():
    model, rollouts = scalar(3), by_hand()
    raw = [float(model(rollouts.tokens[i : i + 1])[0, n - 1]) for i, n in enumerate((6, 3))]
    for ended, counted in (((True, True), raw), ((True, False), raw[:1]), ((False, False), raw)):
        norm = stage.fit_normaliser(model, replace(rollouts, has_eos=torch.tensor(ended)), size=1)
        assert norm["mean"] == pytest.approx(float(np.mean(counted)), abs=1e-5)
        assert norm["scale"] == pytest.approx(max(1e-3, float(np.std(counted))), abs=1e-5)


def test_the_saved_normaliser_is_that_of_the_saved_weights(pipeline, tmp_path, monkeypatch):
    """Fitted anew at every save: one of the first save would not fit the later, better weights."""
    losses, fits, kept = iter((3.0, 2.0, 1.0)), [], []
    real_metrics, real_fit, real_answers = stage.reward_metrics, stage.fit_normaliser, stage.reference_responses
    monkeypatch.setattr(stage, "reward_metrics", lambda *a: real_metrics(*a) | {"loss": next(losses)})
    monkeypatch.setattr(stage, "fit_normaliser", lambda *a: fits.append(real_fit(*a)) or fits[-1])
    monkeypatch.setattr(stage, "reference_responses", lambda *a: kept.append((a[-1], real_answers(*a))) or kept[-1][1])
    loop = replace(pipeline.reward.loop, steps=3, eval_every=1)
    settings = pipeline.replace(
        out=str(tmp_path), init=str(Path(pipeline.out) / "sft"), reward__loop=loop, reward__sample_share=0.0,
        reward__optim=OptimConfig(lr=0.02, warmup_steps=0),
    )  # fmt: skip
    folder = run_stage("reward", settings).folder
    ((play, responses),) = kept
    assert play == settings.ppo and len(fits) == 3
    saved, model = checkpoint.read_info(folder)["reward"], checkpoint.load(folder)[0]
    again = real_fit(model, responses)
    assert saved == pytest.approx(again, rel=1e-4)
    assert abs(fits[0]["mean"] - saved["mean"]) > 0.1 * saved["scale"]  # so the first one would have been wrong
