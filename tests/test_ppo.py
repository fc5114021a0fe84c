"""The PPO stage: the exact test on the enumerable language, each phase by hand, the two memory layouts, end to end."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from instruct_llama import presets
from instruct_llama.config import LoRAConfig, ModelConfig, OptimConfig, PPOConfig, SamplingConfig, UserError
from instruct_llama.data.batching import ranked_batch
from instruct_llama.evaluation import exact
from instruct_llama.model import lora
from instruct_llama.model.llama import Llama, ScalarLlama
from instruct_llama.pipeline import require, require_inputs
from instruct_llama.pipeline import run as run_stage
from instruct_llama.rlhf import losses, ppo, rollout
from instruct_llama.rlhf.rollout import Rollouts
from instruct_llama.stages import ppo as ppo_stage
from instruct_llama.stages import reward as stage
from instruct_llama.training import actors as layouts
from instruct_llama.training import checkpoint
from instruct_llama.worlds import enumerable

PAD, BOS, EOS = 0, 1, 2
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------- P00: against the closed form

ITERATIONS = {"fixed": 80, "variable": 40}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("language", [enumerable.fixed(), enumerable.variable()], ids=lambda language: language.name)
def test_p00_ppo_closes_98_percent_of_the_gap(language, seed):
    points = exact.train_table_policy(language, exact.config_for(language, ITERATIONS[language.name]), seed)
    assert points[0]["gap_closed"] == pytest.approx(0.0, abs=1e-5)
    assert points[-1]["gap_closed"] >= 0.98
    assert points[-1]["gap_closed"] <= 1 + 1e-5  # nothing is better than the best
    assert points[20]["gap_closed"] > 0.85  # what the short runs of the planted mistakes are to be compared with


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_p00_p42_small_generation_batches_close_the_gap_as_well(seed):
    """Batches that draw the same random numbers make 24 of 384 responses, 16 times: they close about half of it."""
    language = enumerable.variable()
    config = replace(exact.config_for(language, 40), rollouts_per_iteration=384, generation_batch_size=24)
    assert exact.train_table_policy(language, config, seed)[-1]["gap_closed"] >= 0.98


def test_p42_generation_batches_of_an_iteration_draw_different_numbers():
    config = replace(SMALL, rollouts_per_iteration=512, max_new_tokens=4)
    setups = [setup_of(config=replace(config, generation_batch_size=size, micro_batch_size=512)) for size in (512, 64)]
    whole, parts = (ppo.sample_rollouts(*setup, [[BOS, 3, 4]] * 512, seed=1, iteration=0) for setup in setups)
    distinct = [len({tuple(ids) for ids in rollouts.responses.tolist()}) for rollouts in (whole, parts)]
    assert distinct[0] > 150 and distinct[1] == pytest.approx(distinct[0], rel=0.15)
    again, other = (ppo.sample_rollouts(*setups[1], [[BOS, 3, 4]] * 512, seed=1, iteration=i) for i in (0, 1))
    assert torch.equal(again.responses, parts.responses) and not torch.equal(other.responses, parts.responses)


def _outputs_shifted_by_one(patch):
    real = rollout.gather_response_positions
    patch.setattr(rollout, "gather_response_positions", lambda x, starts, n: real(x, starts + 1, n))


def _score_read_at_the_first_token(patch):
    real = rollout.pool_last_token
    patch.setattr(rollout, "pool_last_token", lambda scores, ends: real(scores, torch.ones_like(ends)))


def _gae_without_the_next_value(patch):
    real = rollout.gae

    def gae(rewards, values, mask, gamma, lam):
        following = nn.functional.pad(torch.where(mask, values, 0.0)[:, 1:], (0, 1))  # (B, N)
        return real(rewards - gamma * following, values, mask, gamma, lam)

    patch.setattr(rollout, "gae", gae)


def _penalty(patch, change):
    """Rewards with another penalty in the place of k1: change(logprobs, ref_logprobs)."""
    real = rollout.penalised_rewards

    def rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
        return real(scores, ref_logprobs + change(logprobs, ref_logprobs), ref_logprobs, mask, kl_coef)

    patch.setattr(rollout, "penalised_rewards", rewards)


def _no_kl(patch):
    _penalty(patch, lambda logprobs, ref: torch.zeros_like(ref))


def _kl_clamped_at_zero(patch):
    _penalty(patch, lambda logprobs, ref: losses.kl_k1(logprobs, ref).clamp(min=0))


def _k2_as_penalty(patch):
    _penalty(patch, losses.kl_k2)


def _k3_as_penalty(patch):
    _penalty(patch, losses.kl_k3)


def _another_temperature(patch):
    real = rollout.sampling_logprobs

    def distribution(model, rollouts, sampling, suppress):
        return real(model, rollouts, replace(sampling, temperature=2.0), suppress)

    patch.setattr(rollout, "sampling_logprobs", distribution)


def _no_end_score_forgotten(patch):
    real = rollout.response_scores

    def score(model, rollouts, config, mean, scale):
        return real(model, replace(rollouts, has_eos=torch.ones_like(rollouts.has_eos)), config, mean, scale)

    patch.setattr(rollout, "response_scores", score)


def _kl_over_padding(patch):
    real = rollout.penalised_rewards

    def logprobs_of(logprobs_full, rollouts):  # a pad is read as another end token
        return losses.token_logprobs(logprobs_full, torch.where(rollouts.response_mask, rollouts.responses, EOS))

    def rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
        kl_of_padding = ((logprobs - ref_logprobs) * ~mask).sum(1)
        return real(scores - kl_coef * kl_of_padding, logprobs, ref_logprobs, mask, kl_coef)

    patch.setattr(rollout, "gather_logprobs", logprobs_of)
    patch.setattr(rollout, "penalised_rewards", rewards)


def _end_token_untrained(patch):
    real = rollout.gather_logprobs

    def logprobs_of(logprobs_full, rollouts):
        logprobs = real(logprobs_full, rollouts)
        return torch.where(rollouts.responses == EOS, logprobs.detach(), logprobs)

    patch.setattr(rollout, "gather_logprobs", logprobs_of)


# (mistake, language, iterations). The right code stands at 0.98 of the variable language after 15 iterations. Measured:
# outputs shifted by one 0.23, score at the first token 0.32, GAE 0.04, KL clamped at zero 0.86 (flat from 20 on).
MISTAKES = [
    (_outputs_shifted_by_one, "variable", 12),
    (_score_read_at_the_first_token, "fixed", 12),
    (_gae_without_the_next_value, "fixed", 12),
    (_no_kl, "fixed", 20),
    (_k2_as_penalty, "fixed", 20),
    (_k3_as_penalty, "fixed", 20),
    (_another_temperature, "variable", 30),
    (_kl_clamped_at_zero, "fixed", 30),
    (_no_end_score_forgotten, "variable", 12),
    (_kl_over_padding, "variable", 30),
    (_end_token_untrained, "variable", 30),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "name", "iterations"), MISTAKES, ids=[m[0].__name__[1:] for m in MISTAKES])
def test_p00_a_planted_mistake_does_not(mistake, name, iterations, monkeypatch):
    language = getattr(enumerable, name)()
    mistake(monkeypatch)
    points = exact.train_table_policy(language, exact.config_for(language, iterations), seed=0)
    assert points[-1]["gap_closed"] <= 0.92


# ---------------------------------------------------------------------------------------------------- small networks

SHAPE = ModelConfig(
    vocab_size=12, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=32, init_std=0.3
)
SMALL = PPOConfig(
    iterations=2, rollouts_per_iteration=6, generation_batch_size=4, max_new_tokens=5, num_ppo_epochs=2,
    mini_batch_size=3, micro_batch_size=2,
    optim=OptimConfig(lr=1e-2, warmup_steps=0, weight_decay=0.0), value_lr=1e-2,
)  # fmt: skip
PROMPTS = [[BOS, 3, 4], [BOS, 5], [BOS, 6, 7, 8], [BOS, 9], [BOS, 3], [BOS, 10, 11]]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def llama(seed=0, shape=SHAPE):
    return Llama(shape, generator=seeded(seed))


def scalar(seed, shape=SHAPE):
    model = ScalarLlama(shape, generator=seeded(seed))
    with torch.no_grad():
        model.value_head.weight.normal_(generator=seeded(seed))
    return model


def four(shape=SHAPE, tokenizer=None):
    """Policy and reference alike, as at the start of PPO."""
    models = llama(0, shape), llama(0, shape), scalar(1, shape), scalar(2, shape)
    return layouts.FourModels(*models, tokenizer or exact.EnumerableTokens())


def shared():
    base = llama(0)
    heads = {name: nn.Linear(SHAPE.dim, 1, bias=False) for name in ("reward", "value")}
    for i, name in enumerate(heads):
        lora.add_adapter(base, name, LoRAConfig(rank=2, alpha=4.0), seeded(i))
        with torch.no_grad():
            heads[name].weight.normal_(generator=seeded(5))
            for parameter in lora.adapter_parameters(base, name):
                parameter.normal_(std=0.1, generator=seeded(7))  # reward and value start alike
    return layouts.SharedBase(base, LoRAConfig(rank=2, alpha=4.0), heads, seeded(9), exact.EnumerableTokens())


class Setup(NamedTuple):
    """What every function of PPO takes first."""

    actors: layouts.FourModels | layouts.SharedBase
    config: PPOConfig


def setup_of(actors=None, config=SMALL):
    return Setup(actors or four(), config)


def logprobs_of(setup, rollouts):
    """What the policy gives the sampled tokens (B, N), and all tokens (B, N, V)."""
    policy = setup.actors.models["policy"]
    return rollout.response_logprobs(policy, rollouts, setup.config.sampling, setup.actors.tokenizer)


def judged(setup, prompts=PROMPTS, seed=0):
    """Phases 2 to 4."""
    rollouts = ppo.generate_responses(*setup, prompts, seeded(seed))
    ppo.score_rollouts(*setup, rollouts)
    rollout.compute_advantages(rollouts, setup.config, setup.config.kl_coef)
    return rollouts


def test_p19_answers_that_share_a_row_score_and_teach_as_each_alone():
    items = [
        [[BOS, 5, 3, 4, EOS], [BOS, 5, 3, EOS], [BOS, 5, 6, 6, 6, EOS]],
        [[BOS, 4, EOS], [BOS, 4, 4, 5, EOS]],
        [[BOS, 7, 7, 7, EOS], [3, EOS]],  # nothing shared
    ]
    together, apart = scalar(1), scalar(1)
    batch = ranked_batch(items, PAD)
    assert batch.tokens.shape == (3, 2 + 3 + 2 + 4)  # instead of seven rows of up to 6
    scores = rollout.completion_scores(together, batch)
    alone = torch.stack([apart(torch.tensor([ids]))[0, -1] for item in items for ids in item])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
    for found in (scores, alone):
        losses.ranking_loss(found, batch.prompt, batch.rank).backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def by_hand():
    """Two episodes of unequal prompts and answers: the first of three tokens, the second of two."""
    return Rollouts(
        prompts=[[BOS, 5, 5], [BOS]],
        tokens=torch.tensor([[BOS, 5, 5, 3, 4, EOS], [BOS, 3, EOS, PAD, PAD, PAD]]),
        prompt_lengths=torch.tensor([3, 1]),
        responses=torch.tensor([[3, 4, EOS], [3, EOS, PAD]]),
        response_mask=torch.tensor([[True, True, True], [True, True, False]]),
        has_eos=torch.tensor([True, True]),
        sampled_logprobs=torch.zeros(2, 3),
    )


class Table(nn.Module):
    """Outputs that stand in a table, row by row and position by position, whatever the tokens are."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def hidden(self, tokens, segment_ids=None, cache=None):
        return self.table

    def head(self, hidden):
        return hidden

    def forward(self, tokens):
        return self.table


# ------------------------------------------------------------------------------------------------ phases 2 to 4


def test_p22_every_quantity_of_a_token_stands_at_its_index():
    rollouts = by_hand()
    logits = torch.randn(2, 6, 7, generator=seeded(0))
    full = rollout.sampling_logprobs(Table(logits), rollouts, SamplingConfig(), suppress=())
    expected = logits.log_softmax(-1)
    # the token at position s of a row is decided by the output at position s - 1
    torch.testing.assert_close(full[0], expected[0, 2:5])
    torch.testing.assert_close(full[1, :2], expected[1, 0:2])
    logprobs = rollout.gather_logprobs(full, rollouts)
    by_index = [
        [expected[0, 2, 3], expected[0, 3, 4], expected[0, 4, EOS]],
        [expected[1, 0, 3], expected[1, 1, EOS], 0],
    ]
    torch.testing.assert_close(logprobs, torch.tensor(by_index))

    positions = torch.tensor([[0.0, 1, 2, 3, 4, 5], [100, 101, 102, 103, 104, 105]])
    values = rollout.response_values(Table(positions), rollouts)
    assert values[rollouts.response_mask].tolist() == [2, 3, 4, 100, 101]
    scores = rollout.response_scores(Table(positions), rollouts, PPOConfig(score_clip=0.0), mean=1.0, scale=2.0)
    assert scores.tolist() == [(5 - 1) / 2, (102 - 1) / 2]  # read at the end token itself

    rollouts.logprobs, rollouts.ref_logprobs = logprobs, logprobs - torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]])
    rollouts.values, rollouts.scores = torch.zeros(2, 3), torch.tensor([2.0, 5.0])
    rollout.compute_advantages(rollouts, PPOConfig(whiten_advantages=False, gamma=1.0, lam=1.0), kl_coef=1.0)
    torch.testing.assert_close(rollouts.rewards, torch.tensor([[-0.1, -0.2, 1.7], [-0.4, 4.5, 0.0]]))
    torch.testing.assert_close(rollouts.advantages, torch.tensor([[1.4, 1.5, 1.7], [4.1, 4.5, 0.0]]))


@pytest.mark.parametrize(
    "change", [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 4}, {"top_p": 0.7, "temperature": 1.3}]
)
def test_p23_training_recomputes_the_distribution_that_was_sampled_from(change):
    setup = setup_of(config=replace(SMALL, **change))
    rollouts = judged(setup)
    torch.testing.assert_close(rollouts.logprobs, rollouts.sampled_logprobs, rtol=0, atol=1e-5)
    assert rollout.rollout_metrics(rollouts, setup.config, 0.1)["ppo/sampling_gap"] < 1e-5
    # and the reference, which nobody samples from, has the same temperature but no filter: all finite
    assert torch.isfinite(rollouts.ref_logprobs).all()


@pytest.mark.parametrize("layout", [four, shared])
def test_p24_before_the_first_update_ratio_is_one_and_kl_is_zero(layout):
    setup = setup_of(layout())
    rollouts = judged(setup)
    assert rollouts.kl().abs().max() < 1e-5
    figures = ppo.minibatch_gradients(*setup, rollouts, seed=0)
    assert figures["ratio_abs_error"] < 1e-5
    assert figures["clip_frac"] == 0
    stats = ppo.update(*setup, rollouts, setup.actors.make_optimizer(setup.config), seed=0, iteration=0)
    assert stats["first_ratio_abs_error"] < 1e-5
    assert stats["ratio_abs_error"] > 1e-4  # the mean over all mini-batches: later ones have moved


def test_p24_dropout_is_off():
    shape = replace(SHAPE, embed_dropout=0.3, attn_dropout=0.3, resid_dropout=0.3)
    setup = setup_of(four(shape))
    assert ppo.minibatch_gradients(*setup, judged(setup), seed=0)["ratio_abs_error"] < 1e-5


def always(token):
    """A policy that says one token for ever."""
    logits = torch.full((SHAPE.vocab_size,), -30.0)
    logits[token] = 30.0

    class Always(Llama):
        def head(self, hidden):
            return logits.expand(*hidden.shape[:-1], -1) + 0 * super().head(hidden)

    return Always(SHAPE, generator=seeded(0))


def test_p25_an_empty_answer_is_kept_scored_and_trained():
    models = four()
    models.models["policy"] = always(EOS)
    setup = setup_of(models, replace(SMALL, score_clip=0.0))
    rollouts = judged(setup)
    assert len(rollouts) == len(PROMPTS)
    assert rollouts.responses.tolist() == [[EOS]] * len(PROMPTS)
    assert rollouts.response_mask.all() and rollouts.has_eos.all()
    raw = [models.models["reward"](torch.tensor([[*prompt, EOS]]))[0, -1] for prompt in PROMPTS]
    torch.testing.assert_close(rollouts.scores, torch.stack(raw), rtol=0, atol=1e-5)


def test_p25_the_end_token_is_an_action_like_any_other():
    setup = setup_of(config=replace(SMALL, vf_coef=0.0))
    rollouts = by_hand()
    rollouts.logprobs, _ = (x.detach() for x in logprobs_of(setup, rollouts))
    rollouts.values = rollouts.returns = torch.zeros(2, 3)
    rollouts.advantages = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])  # only the first answer's end counts
    ppo.minibatch_gradients(*setup, rollouts, seed=0)
    grads = [p.grad for p in setup.actors.trainable("policy").values()]
    assert max(float(grad.abs().max()) for grad in grads) > 1e-4


def test_p25_an_answer_without_end_gets_its_stated_score_and_the_limit_holds():
    models = four()
    models.models["policy"] = always(5)
    setup = setup_of(models, replace(SMALL, missing_eos_score=-1.25))
    setup.actors.reward_mean, setup.actors.reward_scale = 3.0, 0.5
    rollouts = judged(setup)
    assert rollouts.responses.tolist() == [[5] * SMALL.max_new_tokens] * len(PROMPTS)
    assert not rollouts.has_eos.any()
    assert rollouts.scores.tolist() == [-1.25] * len(PROMPTS)  # neither normalised nor the reward model's
    assert rollout.rollout_metrics(rollouts, setup.config, 0.0)["ppo/eos_rate"] == 0


def test_p31_rows_that_have_ended_cost_nothing_more(monkeypatch):
    language, rows = enumerable.variable(), []
    policy, real = enumerable.reference(language), enumerable.PrefixTable.hidden

    def counted(self, tokens, **rest):
        rows.append(len(tokens))
        return real(self, tokens, **rest)

    monkeypatch.setattr(enumerable.PrefixTable, "hidden", counted)
    config = replace(SMALL, max_new_tokens=language.max_new_tokens, generation_batch_size=300)
    rollouts = rollout.sample_responses(policy, [language.prompt] * 300, config.sampling, language, seeded(0), 300)
    assert rows == rollouts.response_mask.sum(0).tolist()  # a forward pass of as many rows as tokens were drawn
    assert rows[0] == 300 and rows[-1] < rows[0]


class NoText(exact.EnumerableTokens):
    """An alphabet without text: whoever encodes or decodes in training fails."""

    def decode(self, ids):
        raise AssertionError("training decoded an answer")

    encode = encode_prompt = pieces = decode


def test_p38_sampled_ids_are_what_is_trained_on(monkeypatch):
    setup, seen = setup_of(four(tokenizer=NoText())), []
    real = ppo.minibatch_gradients
    monkeypatch.setattr(ppo, "minibatch_gradients", lambda a, c, e, *at: seen.append(e) or real(a, c, e, *at))
    sampled, draw = [], rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda *a, **k: sampled.append(draw(*a, **k)) or sampled[-1])
    ppo.run_iteration(*setup, PROMPTS, setup.actors.make_optimizer(setup.config), 0.1, seed=0, iteration=0)
    drawn = [ids[keep].tolist() for part in sampled for ids, keep in zip(part.tokens, part.mask, strict=True)]
    wanted = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, drawn, strict=True)}
    assert len(seen) == 4
    for rollouts in seen:
        for i, prompt in enumerate(rollouts.prompts):
            answer = wanted[tuple(prompt)]
            assert rollouts.responses[i][rollouts.response_mask[i]].tolist() == answer
            row = rollouts.tokens[i].tolist()
            assert row[: len(prompt) + len(answer)] == [*prompt, *answer]
            assert set(row[len(prompt) + len(answer) :]) <= {PAD}


def test_p36_a_rollout_of_two_and_an_answer_of_one_token():
    for n in (1, 2):
        setup = setup_of(
            config=replace(SMALL, rollouts_per_iteration=n, max_new_tokens=1, mini_batch_size=32, micro_batch_size=32)
        )
        optimizer = setup.actors.make_optimizer(setup.config)
        rollouts, stats = ppo.run_iteration(*setup, PROMPTS[:n], optimizer, 0.1, seed=0, iteration=0)
        assert rollouts.responses.shape == (n, 1)
        figures = {**rollout.rollout_metrics(rollouts, setup.config, 0.1), **stats}
        assert all(math.isfinite(value) for value in figures.values())
        assert all(torch.isfinite(p).all() for p in setup.actors.trainable("policy").values())


def test_p36_the_standard_error_of_one_answer_is_a_number():
    assert ppo_stage._stderr(torch.tensor([3.0])) == 0.0
    assert ppo_stage._stderr(torch.tensor([1.0, 3.0])) == pytest.approx(1 / math.sqrt(2))


def test_all_prompts_come_up_before_any_comes_up_again():
    config = replace(SMALL, rollouts_per_iteration=4)
    drawn = [prompt for i in range(3) for prompt in ppo.draw_prompts(PROMPTS, config, seed=3, iteration=i)]
    assert len(drawn) == 12
    for epoch in (drawn[:6], drawn[6:]):
        assert sorted(epoch) == sorted(PROMPTS)
    assert ppo.draw_prompts(PROMPTS, config, 3, 2) == drawn[8:]  # a function of seed and iteration


# ------------------------------------------------------------------------------------------------ phase 5, the update


def gradients(setup):
    found = {}
    for role in ("policy", "value"):
        for name, parameter in setup.actors.trainable(role).items():
            found[role, name] = parameter.grad.clone()
            parameter.grad = None
    return found


def moved_on(setup):
    """Judged episodes of a policy that has since moved, so that ratios, clips and value clips all play a part."""
    rollouts = judged(setup)
    assert len(set(rollouts.response_mask.sum(1).tolist())) > 1  # unequal lengths, or a mean of means would look right
    rollouts.logprobs = torch.where(rollouts.response_mask, rollouts.logprobs - 0.1, 0.0)
    return rollouts


def test_p27_parts_hold_every_episode_once_without_padding_and_change_nothing():
    setup = setup_of()
    rollouts = judged(setup)
    parts = rollouts.micro_batches(2)
    assert sorted(row for rows in parts for row in rows) == list(range(len(rollouts)))
    lengths = [rollouts.lengths[row].item() for rows in parts for row in rows]
    assert lengths == sorted(lengths) and max(map(len, parts)) == 2
    for rows in parts:
        part = rollouts.select(rows)
        assert part.tokens.shape[1] == int(part.lengths.max()) and part.response_mask.shape[1] == int(
            part.response_mask.sum(1).max()
        )
        for name in ("logprobs", "ref_logprobs", "values", "advantages"):
            whole, cut = getattr(rollouts, name)[rows], getattr(part, name)
            assert torch.equal(whole[rollouts.response_mask[rows]], cut[part.response_mask])
        with setup.actors.use("policy"):
            again = logprobs_of(setup, part)[0]
        assert torch.allclose(again[part.response_mask], part.logprobs[part.response_mask], atol=1e-5)


def test_p27_gradients_do_not_depend_on_the_micro_batches():
    config = replace(SMALL, entropy_coef=0.01)
    setup = setup_of(config=config)
    rollouts = moved_on(setup)
    setup = setup._replace(config=replace(config, micro_batch_size=len(PROMPTS)))
    figures = ppo.minibatch_gradients(*setup, rollouts, seed=0)
    whole = gradients(setup)
    for size in (1, 2, 4, 5):
        setup = setup._replace(config=replace(config, micro_batch_size=size))
        parts = ppo.minibatch_gradients(*setup, rollouts, seed=0)
        for key, gradient in gradients(setup).items():
            torch.testing.assert_close(gradient, whole[key], rtol=1e-4, atol=1e-6)
        for key, value in figures.items():
            assert parts[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(("n", "minibatch", "sizes"), [(6, 3, [3, 3]), (5, 4, [5]), (6, 4, [3, 3]), (2, 8, [2])])
def test_p27_a_ragged_tail_takes_no_full_step(n, minibatch, sizes, monkeypatch):
    setup = setup_of(config=replace(SMALL, mini_batch_size=minibatch, num_ppo_epochs=2))
    rollouts, seen = judged(setup, PROMPTS[:n]), []
    real = ppo.minibatch_gradients
    monkeypatch.setattr(ppo, "minibatch_gradients", lambda a, c, e, *at: seen.append(e.prompts) or real(a, c, e, *at))
    ppo.update(*setup, rollouts, setup.actors.make_optimizer(setup.config), seed=0, iteration=0)
    assert [len(part) for part in seen] == sizes * 2
    for epoch in (seen[: len(sizes)], seen[len(sizes) :]):
        assert sorted(prompt for part in epoch for prompt in part) == sorted(PROMPTS[:n])  # each once an epoch


def test_p40_a_policy_far_from_the_old_one_stays_finite_and_is_told():
    setup = setup_of()
    rollouts = judged(setup)
    rollouts.logprobs = torch.where(rollouts.response_mask, rollouts.logprobs - 500.0, 0.0)
    figures = ppo.minibatch_gradients(*setup, rollouts, seed=0)
    assert math.isfinite(figures["loss"]) and math.isfinite(figures["ratio_abs_error"])
    assert all(torch.isfinite(gradient).all() for gradient in gradients(setup).values())
    stats = ppo.update(*setup, rollouts, setup.actors.make_optimizer(setup.config), seed=0, iteration=0)
    alarms = losses.ppo_warnings(stats["first_ratio_abs_error"], 0.0, 0.1, stats["clip_frac"])
    assert "Compare temperature" in alarms[0] and "clipped" in alarms[1]


def test_p40_the_first_ratio_is_the_first_mini_batches():
    setup = setup_of()
    rollouts = judged(setup)
    rollouts.logprobs = torch.where(rollouts.response_mask, rollouts.logprobs - math.log(1.5), 0.0)
    stats = ppo.update(*setup, rollouts, setup.actors.make_optimizer(setup.config), seed=0, iteration=0)
    assert stats["first_ratio_abs_error"] == pytest.approx(0.5, abs=1e-4)
    assert abs(stats["ratio_abs_error"] - 0.5) > 1e-3  # the mean over all of them is another figure


# ------------------------------------------------------------------------------------------------ phase 7, the curves


def test_p29_p30_score_and_penalised_reward_are_two_curves_and_the_kl_is_signed():
    setup, rollouts = setup_of(config=replace(SMALL, score_clip=2.0)), by_hand()
    rollouts.logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
    rollouts.ref_logprobs = torch.tensor([[-0.5, -1.0, -2.5], [-1.5, -1.25, -7.0]])  # k1 of each answer: -2, 0.75
    rollouts.values = torch.zeros(2, 3)
    rollouts.scores = torch.tensor([2.0, -0.5])
    rollout.compute_advantages(rollouts, setup.config, kl_coef=0.4)
    figures = rollout.rollout_metrics(rollouts, setup.config, 0.4)
    assert figures["ppo/score"] == pytest.approx(0.75)
    assert figures["ppo/kl"] == pytest.approx((-2 + 0.75) / 2)  # below 0: an estimate may be, and is not clamped
    assert figures["ppo/rlhf_reward"] == pytest.approx(0.75 + 0.4 * 0.625)  # a refund
    k3 = [math.expm1(r) - r for r in (0.5, 1.0, 0.5, -0.5, -0.25)]
    assert figures["ppo/kl_k3"] == pytest.approx(sum(k3) / 2, rel=1e-5)
    assert figures["ppo/kl_coef"] == 0.4
    assert figures["ppo/response_length"] == 2.5
    assert figures["ppo/eos_rate"] == 1
    assert figures["ppo/score_clipped"] == 0.5  # one of two sits at the bound
    assert "ppo/true_reward" not in figures


# ---------------------------------------------------------------------------------------------------- the two layouts


@pytest.mark.parametrize("layout", [four, shared])
def test_both_layouts_give_the_same_interface(layout):
    models, tokens = layout(), torch.tensor([[BOS, 4, 5, 6], [BOS, 7, 8, PAD]])
    for role in ("policy", "reference"):
        with models.use(role) as model:
            assert model(tokens).shape == (2, 4, SHAPE.vocab_size)
            torch.testing.assert_close(model.head(model.hidden(tokens)), model(tokens))
    for role in ("value", "reward"):
        with models.use(role) as model:
            assert model(tokens).shape == (2, 4)
    for role in ("policy", "value"):
        named = models.trainable(role)
        assert named and all(p.requires_grad for p in named.values())
    ids = [{id(p) for p in models.trainable(role).values()} for role in ("policy", "value")]
    assert not ids[0] & ids[1]


def outputs(models, tokens):
    found = {}
    with torch.no_grad():
        for role in ("policy", "reference", "value", "reward"):
            with models.use(role) as model:
                found[role] = model(tokens).clone()
    return found


@pytest.mark.parametrize("layout", [four, shared])
def test_an_update_moves_policy_and_value_and_nothing_else(layout):
    models, tokens = layout(), torch.tensor([[BOS, 4, 5, 6]])
    setup, before = setup_of(models), outputs(models, tokens)
    started = {(role, name): p.detach().clone() for role in ("policy", "value")
               for name, p in models.trainable(role).items()}  # fmt: skip
    assert ("value", "value_head.weight") in started
    ppo.run_iteration(*setup, PROMPTS, setup.actors.make_optimizer(setup.config), 0.1, seed=0, iteration=0)
    for (role, name), old in started.items():  # each of them: half of a network that learns still moves its outputs
        assert not torch.equal(models.trainable(role)[name], old), (role, name)
    after = outputs(models, tokens)
    for role in ("reference", "reward"):
        assert torch.equal(after[role], before[role]), role
    for role in ("policy", "value"):
        assert not torch.allclose(after[role], before[role], atol=1e-4), role


def test_p15_the_shared_base_is_bit_identical_after_an_update():
    plain = llama(0)
    tokens = torch.tensor([[BOS, 4, 5, 6]])
    models = shared()
    setup = setup_of(models)
    ppo.run_iteration(*setup, PROMPTS, setup.actors.make_optimizer(setup.config), 0.1, seed=0, iteration=0)
    with torch.no_grad(), models.use("reference") as reference:
        assert torch.equal(reference(tokens), plain(tokens))
    names = dict(models.base.named_parameters())
    for name, parameter in plain.named_parameters():
        inside = names.get(name, names.get(name.replace(".weight", ".base.weight")))
        assert torch.equal(inside, parameter), name
        assert inside.grad is None and not inside.requires_grad


def test_adapters_do_not_leak_from_role_to_role():
    models, tokens = shared(), torch.tensor([[BOS, 4, 5, 6]])
    before = outputs(models, tokens)
    torch.testing.assert_close(before["policy"], before["reference"])  # a fresh adapter changes nothing (P14)
    torch.testing.assert_close(before["value"], before["reward"])  # the value starts from the reward
    with torch.no_grad():
        for parameter in models.trainable("policy").values():
            parameter.add_(0.2)
    with models.use("policy"):
        with models.use("reference") as model:
            torch.testing.assert_close(model(tokens), before["reference"], rtol=0, atol=0)
        assert lora.active_adapter(models.base) == "policy"  # and back again
    assert lora.active_adapter(models.base) is None
    after = outputs(models, tokens)
    assert not torch.allclose(after["policy"], before["policy"], atol=1e-3)
    for role in ("reference", "value", "reward"):
        assert torch.equal(after[role], before[role]), role


def test_both_layouts_play_the_same_first_episodes():
    one, other = judged(setup_of(four())), judged(setup_of(shared()))
    assert torch.equal(one.responses, other.responses)
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.ref_logprobs, other.ref_logprobs, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """The smallest settings that go through every stage."""
    loop = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_batches": 1}
    changes = {f"{stage}__loop__{key}": value for stage in ("pretrain", "sft", "reward") for key, value in loop.items()}
    world = {"corpus_chars": 30_000, "demonstrations": 20, "comparisons": 12, "prompts": 12, "heldout": 6}
    return presets.get("tiny").replace(
        out=str(tmp_path_factory.mktemp("runs")), device="cpu", model__dim=16, model__n_layers=1, model__ffn_dim=24,
        tokenizer__max_chars=30_000, reward__normalise_samples=8, reward__lora=LoRAConfig(rank=2, alpha=4.0),
        ppo__layout="shared_base", ppo__lora=LoRAConfig(rank=2, alpha=4.0), ppo__iterations=2,
        ppo__rollouts_per_iteration=4,
        ppo__max_new_tokens=4, ppo__mini_batch_size=4, ppo__eval_prompts=3, ppo__eval_every=1,
        **{f"world__{key}": value for key, value in world.items()}, **changes,
    )  # fmt: skip


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_shared_base_end_to_end(micro):
    reward = require("reward-lora", micro)
    base = micro.out_dir / "sft" / "model.safetensors"
    before = digest(base)
    norm = json.loads((reward / "config.json").read_text())["reward"]
    assert norm["scale"] > 0 and math.isfinite(norm["mean"])
    actors, *_ = ppo_stage.build(micro, require_inputs("ppo", micro))
    assert (actors.reward_mean, actors.reward_scale) == (norm["mean"], norm["scale"])  # P21: fitted once, saved, read

    # steps that can be measured
    result = run_stage("ppo", micro.replace(ppo__optim__lr=0.03, ppo__optim__warmup_steps=0))
    assert digest(base) == before
    assert (result.folder / "adapter.safetensors").is_file()
    assert not (result.folder / "model.safetensors").exists()
    policy, tokenizer = checkpoint.load(result.folder)
    assert lora.active_adapter(policy) == "policy"
    assert result.steps == 2 and len(result.history) == 2
    for record in result.history:  # P30: three curves
        score, penalised = record["ppo/score"], record["ppo/rlhf_reward"]
        assert penalised == pytest.approx(score - record["ppo/kl_coef"] * record["ppo/kl"], abs=1e-5)
        assert 0 <= record["ppo/true_reward"] <= 1
        assert record["ppo/sampling_gap"] < 1e-4
        assert record["ppo/first_ratio_abs_error"] < 1e-4
    assert result.history[0]["ppo/kl"] == pytest.approx(0.0, abs=1e-5)  # P24, over a trained base
    assert result.history[0]["ppo/kl_k3"] == pytest.approx(0.0, abs=1e-9)  # never negative, 0 for one policy only
    assert result.history[1]["ppo/kl_k3"] > 1e-4
    logged = [sum(record["kl"]) for record in result.samples if record["step"] == 2]  # of each episode, token by token
    assert result.history[1]["ppo/kl"] == pytest.approx(sum(logged) / len(logged), abs=1e-5)


def test_p21_the_normaliser_is_fitted_on_the_reference_policys_answers(micro, monkeypatch):
    policy, model = llama(0), scalar(3)
    prompts, config = PROMPTS * 6, replace(micro.reward, normalise_samples=36, seq_len=20)
    monkeypatch.setattr(stage, "fit_prompt", lambda tokenizer, ids, room: ids)
    played = []
    real = rollout.sample_responses
    monkeypatch.setattr(rollout, "sample_responses", lambda *a: played.append((a[0], real(*a))) or played[-1][1])
    play = replace(SMALL, max_new_tokens=12)  # so short that some answers do not end
    responses = stage.reference_responses(policy, exact.EnumerableTokens(), prompts, config, 0, play)
    norm = stage.fit_normaliser(model, responses)
    ((who, rollouts),) = played
    assert who is policy and len(rollouts) == 36
    with torch.no_grad():
        raw = torch.stack(
            [
                model(torch.tensor([[*prompt, *ids[keep].tolist()]]))[0, -1]
                for prompt, ids, keep in zip(rollouts.prompts, rollouts.responses, rollouts.response_mask, strict=True)
            ]
        )
    ended = raw[rollouts.has_eos]  # the others never show the reward model's score
    assert 0 < len(ended) < len(raw)
    assert norm["mean"] == pytest.approx(float(ended.mean()), abs=1e-5)
    assert norm["scale"] == pytest.approx(float(ended.std(correction=0)), abs=1e-5)
    play = replace(SMALL, score_clip=0.0, missing_eos_score=0.0)
    scores = rollout.response_scores(model, rollouts, play, norm["mean"], norm["scale"])[rollouts.has_eos]
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


def test_p21_the_normaliser_does_not_drift_with_the_policy():
    setup = setup_of()
    setup.actors.reward_mean, setup.actors.reward_scale = 0.7, 2.0
    optimizer = setup.actors.make_optimizer(setup.config)
    for iteration in range(2):
        rollouts, _ = ppo.run_iteration(*setup, PROMPTS, optimizer, 0.1, seed=0, iteration=iteration)
        raw = rollout.response_scores(setup.actors.models["reward"], rollouts, replace(SMALL, score_clip=0.0), 0.0, 1.0)
        expected = torch.where(rollouts.has_eos, (raw - 0.7) / 2.0, SMALL.missing_eos_score)
        torch.testing.assert_close(rollouts.scores, expected.detach(), rtol=0, atol=1e-5)
    assert (setup.actors.reward_mean, setup.actors.reward_scale) == (0.7, 2.0)


def test_shared_base_refuses_a_reward_model_that_is_no_adapter(micro):
    sft, reward = require("sft", micro), require("reward-lora", micro)
    with pytest.raises(UserError, match="needs a reward adapter"):
        layouts.shared_base(sft, sft, exact.EnumerableTokens(), CPU, micro.ppo, 0)
    assert isinstance(layouts.shared_base(sft, reward, exact.EnumerableTokens(), CPU, micro.ppo, 0), layouts.SharedBase)
    tensors, metadata = checkpoint.read_tensors(sft / "model.safetensors")
    checkpoint.write_tensors(sft / "model.safetensors", {k: t + 1e-3 for k, t in tensors.items()}, metadata)
    with pytest.raises(UserError, match="have changed since the adapter in .*reward-lora was trained"):
        layouts.shared_base(sft, reward, exact.EnumerableTokens(), CPU, micro.ppo, 0)


def test_scores_at_the_bound_are_clipped():
    model, rollouts = Table(torch.full((2, 6), 50.0)), by_hand()
    assert rollout.response_scores(model, rollouts, replace(SMALL, score_clip=5.0), 0.0, 1.0).tolist() == [5.0, 5.0]
    assert rollout.response_scores(model, rollouts, replace(SMALL, score_clip=0.0), 0.0, 1.0).tolist() == [50.0, 50.0]
