"""The enumerable language: its optimum is one, its tables sample as they say, PPO's formulas climb to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from instruct_llama.config import ModelConfig, SamplingConfig
from instruct_llama.evaluation.exact import EnumerableTokens
from instruct_llama.model.llama import KVCache, Llama
from instruct_llama.model.sampling import sample
from instruct_llama.rlhf import losses as o
from instruct_llama.worlds import enumerable
from instruct_llama.worlds.enumerable import BOS, EOS, PAD, Language, PrefixTable

LANGUAGES = {"fixed": enumerable.fixed(), "variable": enumerable.variable()}
BOTH = pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_policy(language: Language, seed: int = 0) -> PrefixTable:
    return PrefixTable(language, torch.randn(language.reference_logits.shape, generator=seeded(seed)))


# ------------------------------------------------------------------------------------------------------- the language


def optimal_policy(language):
    """pi* as a model: the next token's probability after a prefix is the mass of the answers that go on that way."""
    policy = enumerable.PrefixTable(language)
    mass = torch.zeros(language.n_unended, language.vocab_size)
    row = {prefix: i for i, prefix in enumerate(language.prefixes)}
    best = enumerable.optimal_logprobs(language).exp()
    for answer, mask, p in zip(language.responses.tolist(), language.response_mask, best, strict=True):
        for t in range(int(mask.sum())):
            mass[row[tuple(answer[:t])], answer[t]] += p
    with torch.no_grad():
        policy.tok_embeddings.weight.copy_(mass.log().clamp(min=-50.0))
    return policy


def test_every_answer_is_listed_once():
    fixed, variable = LANGUAGES["fixed"], LANGUAGES["variable"]
    assert len(fixed.responses) == 6**4 and fixed.has_eos.all() and (fixed.response_mask.sum(1) == 5).all()
    assert len(variable.responses) == 1 + 5 + 25 + 125 + 625 and int(variable.has_eos.sum()) == 156
    for language in LANGUAGES.values():
        assert len({tuple(answer) for answer in language.responses.tolist()}) == len(language.responses)
        assert torch.equal(language.response_mask, language.responses != PAD)
        ends = language.responses.gather(1, language.response_mask.sum(1, keepdim=True) - 1)[:, 0]
        assert torch.equal(ends == EOS, language.has_eos)
        assert (language.scores[~language.has_eos] == language.missing_eos_score).all()
    assert variable.decode([BOS, 3, 4, 7, EOS]) == "abe" and variable.pieces([3, EOS, PAD]) == ["a", "</s>", "<pad>"]


@BOTH
def test_the_reward_model_agrees_with_the_scores(language):
    prompts = torch.full_like(language.responses[:, :1], BOS)
    scores = enumerable.reward_model(language)(torch.cat([prompts, language.responses], 1))  # (A, 1 + N)
    at_end = o.pool_last_token(scores, language.response_mask.sum(1))
    assert torch.equal(at_end[language.has_eos], language.scores[language.has_eos])


@BOTH
def test_the_same_seed_makes_the_same_language(language):
    again = getattr(enumerable, language.name)()
    assert torch.equal(again.scores, language.scores) and torch.equal(again.reference_logits, language.reference_logits)
    assert not torch.equal(getattr(enumerable, language.name)(99).scores, language.scores)


# -------------------------------------------------------------------------------------------------------- the optimum


@BOTH
def test_probabilities_add_up_to_one(language):
    for policy in (enumerable.reference(language), random_policy(language), optimal_policy(language)):
        total = enumerable.response_logprobs(language, policy).sum(1).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-5)


@BOTH
def test_the_best_policy_reaches_the_best_objective(language):
    best = optimal_policy(language)
    logprobs = enumerable.response_logprobs(language, best).sum(1)
    assert torch.allclose(logprobs, enumerable.optimal_logprobs(language), atol=1e-4)
    worth = enumerable.evaluate(language, best)
    assert worth.objective.item() == pytest.approx(enumerable.best_objective(language), abs=1e-5)
    assert worth.objective.item() == pytest.approx(worth.score.item() - language.beta * worth.kl.item(), abs=1e-6)
    assert enumerable.gap_closed(language, best) == pytest.approx(1, abs=1e-5)
    assert enumerable.gap_closed(language, enumerable.reference(language)) == 0


@BOTH
def test_no_policy_does_better(language):
    best = optimal_policy(language).tok_embeddings.weight.detach()
    for seed in range(5):
        noise = torch.randn(best.shape, generator=seeded(seed))
        assert enumerable.gap_closed(language, PrefixTable(language, best + 0.1 * noise)) < 1
        assert enumerable.gap_closed(language, random_policy(language, seed)) < 1


def test_the_best_objective_by_hand():
    """The sum over answers written out in plain Python, from the reference's logits alone."""
    language, total = LANGUAGES["variable"], 0.0
    row = {prefix: i for i, prefix in enumerate(language.prefixes)}
    choices = (EOS, *range(3, 8))
    for word in itertools.product(choices, repeat=4):
        answer = word[: word.index(EOS) + 1] if EOS in word else word
        if word[len(answer) :] != (EOS,) * (4 - len(answer)):
            continue  # another spelling of the same answer
        probability = 1.0
        for t, token in enumerate(answer):
            logits = language.reference_logits[row[answer[:t]]]
            probability *= (logits[token].exp() / logits[list(choices)].exp().sum()).item()
        reward = language.reward_table[row[answer]].item() if answer[-1] == EOS else language.missing_eos_score
        total += probability * math.exp(reward / language.beta)
    assert enumerable.best_objective(language) == pytest.approx(language.beta * math.log(total), abs=1e-4)


@BOTH
def test_a_llama_can_be_judged_too(language):
    shape = ModelConfig(language.vocab_size, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=32, max_seq_len=8)
    policy = Llama(shape, generator=seeded())
    worth = enumerable.evaluate(language, policy)
    assert worth.kl > 0 and worth.objective < enumerable.best_objective(language)
    assert enumerable.gap_closed(language, policy, ref=policy) == 0


# --------------------------------------------------------------------------------------------------------- the tables


@BOTH
def test_p38_sampling_through_the_cache_agrees_with_enumeration(language):
    policy = random_policy(language)
    sampling = SamplingConfig(language.max_new_tokens)
    made = sample(policy, [language.prompt] * 4000, sampling, EnumerableTokens(), seeded())
    row = {tuple(answer): i for i, answer in enumerate(language.responses.tolist())}
    index = torch.tensor([row[tuple(answer)] for answer in made.tokens.tolist()])  # every sample is an answer
    exact = enumerable.response_logprobs(language, policy).detach()
    assert torch.allclose(made.logprobs, exact[index], atol=1e-5)
    assert torch.equal(made.mask, language.response_mask[index]) and torch.equal(made.has_eos, language.has_eos[index])
    share, p = index.bincount(minlength=len(exact)) / 4000, exact.sum(1).exp()
    assert ((share - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


@BOTH
def test_p37_left_padding_never_changes_a_row(language):
    tokens = torch.cat([torch.full_like(language.responses[:, :1], BOS), language.responses], 1)
    junk = torch.randint(0, language.vocab_size, (len(tokens), 3), generator=seeded())
    for table in (random_policy(language), enumerable.reward_model(language)):
        assert torch.equal(table(torch.cat([junk, tokens], 1))[:, 3:], table(tokens))


def test_a_cache_changes_nothing_and_forgets_ended_rows():
    language, policy = LANGUAGES["variable"], random_policy(LANGUAGES["variable"])
    tokens = torch.cat([torch.full((6, 1), BOS), language.responses[[160, 200, 300, 400, 500, 600], :3]], 1)
    cache = KVCache(policy.config, 6, 4, "cpu", torch.float32)
    whole, rows = policy(tokens), torch.arange(6)
    for t in range(4):
        assert torch.equal(policy(tokens[rows, t : t + 1], cache=cache)[:, 0], whole[rows, t])
        kept = torch.arange(len(rows)) != 0
        rows = rows[kept]
        cache.select_rows(kept)


# --------------------------------------------------- PPO's formulas on all answers at once: no sampling, no noise (P00)


def states(language: Language) -> Tensor:
    """(A, N) which prefix each token of each answer was chosen after."""
    row = {prefix: i for i, prefix in enumerate(language.prefixes)}
    return torch.tensor([[row.get(tuple(a[:t]), 0) for t in range(len(a))] for a in language.responses.tolist()])


def expected_values(language: Language, where: Tensor, p: Tensor, rewards: Tensor) -> Tensor:
    """(A, N) the exact value of each state: what is still to come, averaged over the answers that pass through it."""
    to_come = rewards.flip(1).cumsum(1).flip(1)
    weights = p[:, None] * language.response_mask  # (A, N)
    total, mass = (
        torch.zeros(len(language.prefixes)).index_add(0, where.flatten(), x.flatten())
        for x in (weights * to_come, weights)
    )
    return (total / mass.clamp(min=1e-12))[where]


def gae_without_the_next_value(rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] - values[:, t] + gamma * lam * running, running)
        advantages[:, t] = torch.where(mask[:, t], running, 0.0)
    return advantages, advantages + values


def score_first(scores, logprobs, ref, mask, beta):
    rewards = o.penalised_rewards(torch.zeros_like(scores), logprobs, ref, mask, beta)
    rewards[:, 0] += scores
    return rewards


def with_penalty(estimator: Callable) -> Callable:
    """Rewards whose penalty is another function of the log-probs than k1."""

    def rewards(scores, logprobs, ref, mask, beta):
        return o.penalised_rewards(scores, estimator(logprobs, ref), torch.zeros_like(ref), mask, beta)

    return rewards


def penalty_over_padding(scores, logprobs, ref, mask, beta):
    """An answer is charged for the end token's KL once more for every padding after it."""
    n = mask.sum(1)
    end_kl = (logprobs - ref).gather(1, (n - 1)[:, None])[:, 0]
    return o.penalised_rewards(scores - beta * (mask.shape[1] - n) * end_kl, logprobs, ref, mask, beta)


def climb(
    language: Language,
    rewards_of: Callable = o.penalised_rewards,
    gae: Callable = o.gae,
    temperature: float = 1.0,
    trained: Tensor | None = None,
    scores: Tensor | None = None,
) -> float:
    """Gradient steps on PPO's loss over all answers, weighted by their probability; returns the gap closed."""
    policy, ref, where = enumerable.reference(language), enumerable.reference(language), states(language)
    scores = language.scores if scores is None else scores
    mask = language.response_mask if trained is None else trained
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    tempered = lambda model: enumerable.response_logprobs(  # noqa: E731
        language, lambda tokens: model(tokens) / temperature
    )
    for _ in range(90):
        logprobs = tempered(policy)
        p = enumerable.response_logprobs(language, policy).detach().sum(1).exp()  # (A,)
        rewards = rewards_of(scores, logprobs.detach(), tempered(ref).detach(), mask, language.beta)
        values = expected_values(language, where, p, rewards)
        advantages, _ = gae(rewards, values, mask, 1.0, 0.95)
        loss = o.policy_loss(logprobs, logprobs.detach(), advantages * p[:, None], mask, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return enumerable.gap_closed(language, policy)


def forgotten(language: Language) -> Tensor:
    """The reward table's own scores, also of answers that were cut off."""
    where = [language.prefixes.index(tuple(i for i in answer if i != PAD)) for answer in language.responses.tolist()]
    return language.reward_table[where]


@BOTH
def test_exact_gradient_ascent_reaches_the_best_objective(language):
    policy = enumerable.reference(language)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    for _ in range(90):
        optimizer.zero_grad()
        (-enumerable.evaluate(language, policy).objective).backward()
        optimizer.step()
    assert enumerable.gap_closed(language, policy) > 0.99


@BOTH
def test_p00_the_formulas_together_have_the_gradient_of_the_objective(language):
    """Score, penalty, GAE with any baseline, and the clipped loss at ratio 1: exactly the gradient of J."""
    policy, ref = random_policy(language), enumerable.reference(language)
    weight = policy.tok_embeddings.weight
    (exact,) = torch.autograd.grad(enumerable.evaluate(language, policy).objective, weight)
    logprobs, ref_logprobs = (enumerable.response_logprobs(language, model) for model in (policy, ref))
    p, mask = logprobs.detach().sum(1).exp()[:, None], language.response_mask
    rewards = o.penalised_rewards(language.scores, logprobs, ref_logprobs, mask, language.beta)
    baseline = torch.randn(len(language.prefixes), generator=seeded())[states(language)]
    advantages, _ = o.gae(rewards, baseline, mask, 1.0, 1.0)
    (ours,) = torch.autograd.grad(o.policy_loss(logprobs, logprobs.detach(), advantages * p, mask, 0.2), weight)
    assert torch.allclose(-ours, exact, atol=1e-5)


@BOTH
def test_p00_the_right_formulas_climb_to_the_optimum(language):
    assert climb(language) > 0.98


MISTAKES = {
    "score on the first token": ("fixed", {"rewards_of": score_first}),
    "GAE without the next value": ("fixed", {"gae": gae_without_the_next_value}),
    "no KL": ("fixed", {"rewards_of": with_penalty(lambda p, q: torch.zeros_like(p))}),
    "KL clamped at zero": ("fixed", {"rewards_of": with_penalty(lambda p, q: (p - q).clamp(min=0))}),
    "k2 as penalty": ("fixed", {"rewards_of": with_penalty(o.kl_k2)}),
    "k3 as penalty": ("fixed", {"rewards_of": with_penalty(o.kl_k3)}),
    "log-probs at another temperature": ("variable", {"temperature": 1.6}),
    "KL over padding": ("variable", {"rewards_of": penalty_over_padding}),
    "end token not in the mask": ("variable", {"trained": "without the end"}),
    "penalty for no end forgotten": ("variable", {"scores": "forgotten"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_p00_each_mistake_is_seen_in_one_of_the_languages(mistake):
    name, changes = MISTAKES[mistake]
    language = LANGUAGES[name]
    if "trained" in changes:
        changes = {"trained": language.response_mask & (language.responses != EOS)}
    if "scores" in changes:
        changes = {"scores": forgotten(language)}
    closed = climb(language, **changes)
    assert closed < 0.92, f"{mistake} still closes {closed:.1%} of the gap"
    print(f"{mistake}: {closed:.1%}")
