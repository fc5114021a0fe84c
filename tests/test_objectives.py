"""The formulas of RLHF against hand-computed numbers, brute force, and exact gradients by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from instruct_llama.rlhf import losses as o

LN2 = math.log(2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged(*lengths: int, width: int | None = None) -> torch.Tensor:
    """A mask with that many True at the left of each row."""
    width = max(lengths) if width is None else width
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


# ---------------------------------------------------------------------------------------------------- means over masks


def test_masked_sums_and_means_by_hand():
    x, mask = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), ragged(2, 1, width=3)
    assert o.masked_sum(x, mask) == 7.0
    assert o.masked_mean(x, mask) == pytest.approx(7 / 3)
    assert o.response_sum(x, mask).tolist() == [3.0, 4.0]
    assert o.response_mean(x, mask).tolist() == [1.5, 4.0]
    assert o.response_mean(x, torch.zeros_like(mask)).tolist() == [0.0, 0.0]
    assert o.masked_mean(x, torch.zeros_like(mask)) == 0.0


def test_p28_whitening_is_over_masked_tokens_only():
    x, mask = torch.randn(5, 7, generator=seeded()) * 3 + 2, ragged(7, 1, 3, 5, 2)
    whitened = o.whiten(x.masked_fill(~mask, 1e6), mask)
    inside = whitened[mask]
    assert inside.mean() == pytest.approx(0, abs=1e-6) and inside.std(correction=0) == pytest.approx(1, abs=1e-5)
    assert torch.equal(whitened[~mask], torch.zeros(int((~mask).sum())))
    kept = o.whiten(x, mask, shift_mean=False)[mask]
    assert kept.mean() == pytest.approx(x[mask].mean().item(), abs=1e-5)
    assert kept.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_p28_one_token_does_not_divide_by_zero():
    one = torch.tensor([[3.0, torch.nan]])
    assert o.whiten(one, ragged(1, width=2)).tolist() == [[0.0, 0.0]]
    assert o.whiten(one, ragged(1, width=2), shift_mean=False).tolist() == [[3.0, 0.0]]
    assert o.whiten(torch.full((2, 2), 5.0), ragged(2, 1)).abs().max() == 0  # nothing differs: nothing to learn


# ------------------------------------------------------------------------------------------------------ language model


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]).log()
    targets = torch.tensor([[0, 1, 2]])
    total, count = o.cross_entropy_sum(logits, targets, torch.tensor([[True, True, False]]))
    assert total == pytest.approx(-math.log(0.5) - math.log(0.8)) and count == 2
    assert o.token_logprobs(logits, targets).exp()[0].tolist() == pytest.approx([0.5, 0.8, 0.6])
    assert o.correct_sum(logits, torch.tensor([[0, 0, 2]]), torch.tensor([[True, True, True]])) == 2
    total, count = o.cross_entropy_sum(logits, targets, torch.zeros(1, 3, dtype=torch.bool))
    assert total == 0 and count == 0


def test_p10_logits_of_half_precision_are_summed_in_float32():
    logits = (torch.randn(2, 3, 50, generator=seeded()) * 4).to(torch.bfloat16)
    targets, mask = torch.randint(50, (2, 3), generator=seeded()), ragged(3, 2)
    exact = -F.log_softmax(logits.double(), -1).gather(-1, targets[..., None])[..., 0]
    got = o.token_logprobs(logits, targets)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), -exact, atol=1e-5)
    total = o.cross_entropy_sum(logits, targets, mask)[0]
    assert total.dtype == torch.float32 and total.item() == pytest.approx(exact[mask].sum().item(), abs=1e-4)
    small = torch.tensor([[1e-3]])  # a ratio that bfloat16 rounds to 1
    assert o.log_ratio(torch.tensor([[-5.0]]) + small, torch.tensor([[-5.0]])).item() == pytest.approx(1e-3, rel=1e-3)


def test_p37_entropy_is_never_negative_and_bears_removed_tokens():
    logits = torch.tensor([[[0.0, 0.0, -torch.inf], [50.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]]])
    logits.requires_grad_()
    entropy = o.entropy(logits.log_softmax(-1))
    assert entropy[0].tolist() == pytest.approx([LN2, 0.0, 0.0], abs=1e-6)
    entropy.sum().backward()
    assert torch.isfinite(logits.grad).all()
    rounded = torch.tensor([[[1e-7, -30.0]]])  # log-probabilities that rounding put above 0
    assert o.entropy(rounded).item() >= 0
    for scale in (0.1, 1, 10, 100):
        assert (o.entropy((torch.randn(4, 5, 30, generator=seeded()) * scale).log_softmax(-1)) >= 0).all()


# -------------------------------------------------------------------------------------------------------- reward model


def test_p39_ranking_loss_at_the_extremes():
    assert o.ranking_loss(torch.zeros(2)).item() == torch.tensor(2.0).log().item()
    assert o.ranking_loss(torch.tensor([-500.0, 500.0])).item() == 1000.0
    assert o.ranking_loss(torch.tensor([500.0, -500.0])).item() == 0.0
    scores = torch.tensor([-500.0, 500.0], requires_grad=True)
    o.ranking_loss(scores).backward()
    assert scores.grad.tolist() == [-1.0, 1.0]
    alone = torch.zeros(1, requires_grad=True)
    o.ranking_loss(alone).backward()  # nothing to compare: no loss, no gradient
    assert o.ranking_loss(alone).item() == 0 and alone.grad.item() == 0


def test_p20_mean_over_all_pairs_of_a_prompt_then_over_prompts():
    scores = torch.tensor([0.3, 2.0, -1.0, 0.5, 1.5])
    prompt, rank = torch.tensor([7, 4, 7, 7, 4]), torch.tensor([1, 1, 2, 0, 0])  # two prompts, interleaved

    def cost(better: float, worse: float) -> float:
        return math.log1p(math.exp(worse - better))

    three = (cost(0.5, 0.3) + cost(0.5, -1.0) + cost(0.3, -1.0)) / 3
    assert o.ranking_loss(scores, prompt, rank).item() == pytest.approx((three + cost(1.5, 2.0)) / 2, abs=1e-6)
    assert o.pair_wins(o.pair_differences(scores, prompt, rank)[0]).mean().item() == pytest.approx(3 / 4)
    differences, weights = o.pair_differences(scores, prompt, rank)
    assert sorted(differences.tolist()) == pytest.approx(sorted([0.2, 1.5, 1.3, -0.5]))
    assert weights.sum().item() == pytest.approx(2)
    for k in (2, 3, 4, 9):
        assert len(o.pair_differences(torch.randn(k), torch.zeros(k), torch.arange(k))[0]) == k * (k - 1) // 2


def test_ties_in_rank_are_not_pairs_and_equal_scores_are_half_right():
    differences, weights = o.pair_differences(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), torch.tensor([0, 0, 1]))
    assert sorted(differences.tolist()) == [-2.0, -1.0] and weights.tolist() == [0.5, 0.5]
    assert o.pair_wins(torch.tensor([0.0, 2.0, -1.0])).tolist() == [0.5, 1.0, 0.0]


def test_pairs_weigh_the_same_under_autocast():
    """Weights of 1/3 in bfloat16 are off by a thousandth, and so were loss and accuracy."""
    scores, prompt = torch.randn(7, generator=seeded()), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    rank = torch.tensor([0, 1, 2, 3, 2, 1, 0])
    plain, loss = o.pair_differences(scores, prompt, rank)[1], o.ranking_loss(scores, prompt, rank)
    with torch.autocast("cpu", torch.bfloat16):
        weights = o.pair_differences(scores, prompt, rank)[1]
        assert weights.dtype == torch.float32 and torch.equal(weights, plain)
        assert torch.equal(o.ranking_loss(scores, prompt, rank), loss)


@given(st.permutations(range(7)))
def test_p19_ranking_loss_does_not_depend_on_the_order_of_the_batch(order):
    scores = torch.randn(7, generator=seeded())
    prompt, rank = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 0, 1, 1, 0])
    index = torch.tensor(order)
    shuffled = o.ranking_loss(scores[index], prompt[index], rank[index])
    assert shuffled.item() == pytest.approx(o.ranking_loss(scores, prompt, rank).item(), abs=1e-6)


def test_p19_the_score_is_read_at_the_end_token():
    scores, ends = torch.tensor([[1.0, 2.0, 3.0, 99.0], [4.0, 5.0, 99.0, 99.0]]), torch.tensor([2, 1])
    assert o.pool_last_token(scores, ends).tolist() == [3.0, 5.0]
    assert o.pool_last_token(F.pad(scores, (0, 9), value=-99.0), ends).tolist() == [3.0, 5.0]  # more padding
    assert o.pool_last_token(F.pad(scores, (6, 0), value=-99.0), ends + 6).tolist() == [3.0, 5.0]  # on the other side
    assert o.normalise_score(torch.tensor([3.0, 5.0]), 1.0, 2.0).tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------------------------ KL


def test_kl_estimators_by_hand():
    p, q = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert o.kl_k1(p, q).item() == pytest.approx(LN2)
    assert o.kl_k2(p, q).item() == pytest.approx(LN2**2 / 2)
    assert o.kl_k3(p, q).item() == pytest.approx(0.5 - 1 + LN2)
    assert o.kl_k1(q, p).item() == pytest.approx(-LN2)


def two_policies() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (9,) of all answers of two tokens out of three: of a policy with gradient, and a reference."""
    theta = torch.randn(3, generator=seeded(1)).requires_grad_()
    bias = torch.randn(3, 3, generator=seeded(2)).requires_grad_()
    first, second = theta.log_softmax(0), bias.log_softmax(1)
    ref = (2 * torch.randn(9, generator=seeded(3))).log_softmax(0)
    return (first[:, None] + second).flatten(), ref


def test_p29_kl_estimators_are_unbiased_as_stated():
    logprobs, ref = two_policies()
    true = (logprobs.exp() * (logprobs - ref)).sum().item()
    mean = {k: (logprobs.exp() * getattr(o, k)(logprobs, ref)).sum().item() for k in ("kl_k1", "kl_k2", "kl_k3")}
    assert mean["kl_k1"] == pytest.approx(true, abs=1e-6)
    assert mean["kl_k3"] == pytest.approx(true, abs=1e-6)
    assert abs(mean["kl_k2"] - true) > 0.01
    assert (o.kl_k1(logprobs, ref) < 0).any()  # signed
    assert (o.kl_k3(logprobs, ref) >= 0).all() and (o.kl_k2(logprobs, ref) >= 0).all()


def answer_policy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table's parameters, and the token log-probabilities (27, 3) of every answer under it and under a reference."""
    answers = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)
    previous = torch.cat([torch.full((27, 1), 3), answers[:, :-1]], dim=1)
    parameters = torch.randn(4, 3, generator=seeded(5)).requires_grad_()
    ref = torch.randn(4, 3, generator=seeded(6))
    pick = lambda table: table.log_softmax(-1)[previous, answers]  # noqa: E731
    return parameters, pick(parameters), pick(ref)


def test_p29_the_penalty_in_the_reward_has_the_gradient_of_the_kl():
    parameters, logprobs, ref = answer_policy()
    gather_logprobs, mask = logprobs.sum(1), torch.ones_like(logprobs, dtype=torch.bool)
    kl = (gather_logprobs.exp() * (gather_logprobs - ref.sum(1))).sum()
    (exact,) = torch.autograd.grad(0.7 * kl, parameters, retain_graph=True)

    def score_function_gradient(rewards: torch.Tensor) -> torch.Tensor:
        surrogate = -(gather_logprobs.exp().detach() * rewards.sum(1) * gather_logprobs).sum()
        return torch.autograd.grad(surrogate, parameters, retain_graph=True)[0]

    ours = o.penalised_rewards(torch.zeros(27), logprobs, ref, mask, 0.7)
    assert not ours.requires_grad
    assert torch.allclose(score_function_gradient(ours), exact, atol=1e-6)
    clamped = -0.7 * (logprobs - ref).clamp(min=0).detach()
    k2, k3 = -0.7 * o.kl_k2(logprobs, ref).detach(), -0.7 * o.kl_k3(logprobs, ref).detach()
    for wrong in (k2, k3, clamped):
        assert (score_function_gradient(wrong) - exact).norm() > 0.1 * exact.norm()


def test_p29_penalised_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -9.0, -9.0], [-3.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -1.0, 0.0], [-1.5, 0.0, 0.0], [-3.0, -1.0, -1.0]])
    rewards = o.penalised_rewards(torch.tensor([10.0, 20.0, 30.0]), logprobs, ref, ragged(2, 1, 3), 0.5)
    assert rewards.tolist() == [[-0.5, 10.5, 0.0], [19.75, 0.0, 0.0], [0.0, 0.0, 30.0]]


@pytest.mark.parametrize(("start", "exponent"), [(0.005, 1.0), (1.0, 0.5), (5.0, 1.0)])
def test_p29_the_adaptive_controller_reaches_its_target_in_tens_of_iterations(start, exponent):
    """A policy whose KL follows the coefficient with a lag: KL -> (1 / coefficient)^exponent."""
    coefficient, kl, target = start, 0.0, 6.0
    for _ in range(60):
        kl += 0.3 * (min(60.0, coefficient**-exponent) - kl)
        coefficient = o.adaptive_kl(coefficient, kl, target, horizon=10)
    last = []
    for _ in range(40):
        kl += 0.3 * (min(60.0, coefficient**-exponent) - kl)
        coefficient = o.adaptive_kl(coefficient, kl, target, horizon=10)
        last.append(kl)
    assert max(abs(kl - target) for kl in last) < 0.25 * target


def test_adaptive_kl_by_hand():
    assert o.adaptive_kl(0.2, 6.0, 6.0, 10) == 0.2
    assert o.adaptive_kl(0.2, 12.0, 6.0, 10) == pytest.approx(0.2 * math.exp(0.1))
    assert o.adaptive_kl(0.2, 600.0, 6.0, 10) == pytest.approx(0.2 * math.exp(0.1))
    assert o.adaptive_kl(0.2, 3.0, 6.0, 10) == pytest.approx(0.2 * math.exp(-0.05))
    assert o.adaptive_kl(0.2, 99.0, 0.0, 10) == 0.2


# ----------------------------------------------------------------------------------------------------------------- GAE


def brute_force_gae(rewards, values, length, gamma, lam, after):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, in plain Python."""
    values = [*values[:length], after]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length)) for t in range(length)]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
def test_p26_gae_equals_brute_force_at_unequal_lengths(lengths, gamma, lam, seed, bootstrapped):
    mask = ragged(*lengths, width=7)
    rewards, values = (torch.randn(mask.shape, generator=seeded(seed + i)) for i in (0, 100))
    after = torch.randn(len(lengths), generator=seeded(seed)) if bootstrapped else None
    advantages, returns = o.gae(
        rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan), mask, gamma, lam, after
    )
    assert torch.equal(advantages[~mask], torch.zeros(int((~mask).sum()))) and torch.isfinite(returns).all()
    for i, n in enumerate(lengths):
        end = after[i].item() if bootstrapped else 0.0
        expected = brute_force_gae(rewards[i].tolist(), values[i].tolist(), n, gamma, lam, end)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-5)
        assert torch.allclose(returns[i, :n], advantages[i, :n] + values[i, :n], atol=1e-6)


def test_p26_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[0.5, 0.25, 50.0]])
    advantages, returns = o.gae(rewards, values, ragged(2, width=3), gamma=0.5, lam=0.5)
    # delta_1 = 2 - 0.25 = 1.75; delta_0 = 1 + 0.5 * 0.25 - 0.5 = 0.625; A_0 = 0.625 + 0.25 * 1.75 = 1.0625
    assert advantages.tolist() == [[1.0625, 1.75, 0.0]] and returns.tolist() == [[1.5625, 2.0, 0.0]]
    advantages, _ = o.gae(rewards, values, ragged(2, width=3), 0.5, 0.5, bootstrap=torch.tensor([4.0]))
    assert advantages.tolist() == [[1.0625 + 0.25 * 2.0, 3.75, 0.0]]  # cut off: half of 4 is still to come


def test_p36_a_rollout_of_one_answer_of_one_token():
    mask, value = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[0.25]])
    rewards = o.penalised_rewards(torch.tensor([2.0]), torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), mask, 1.0)
    advantages, returns = o.gae(rewards, value, mask, 1.0, 0.95)
    assert advantages.item() == 1.25 and returns.item() == 1.5
    assert o.explained_variance(value, returns, mask) == 0.0
    assert torch.isfinite(o.policy_loss(torch.tensor([[-1.0]]), torch.tensor([[-1.0]]), advantages, mask, 0.2))


# ----------------------------------------------------------------------------------------------------------------- PPO


def test_policy_loss_by_hand():
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
    advantages, mask = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), ragged(4)
    # clipped to 1.2 * 2; the worse of -3 and -2.4; the worse of 1 and 1.6; clipped to -0.8 * 2
    assert o.policy_loss(new, old, advantages, mask, 0.2).item() == pytest.approx(-(2.4 - 3.0 + 1.0 - 1.6))
    assert o.clip_frac(new, old, mask, 0.2) == 1.0 and o.clip_frac(new, old, mask, 0.6) == 0.0
    assert o.ratio_abs_error(new, old, mask).item() == pytest.approx(0.5)
    assert o.mean_ratio(new, old, mask).item() == pytest.approx(1.0)
    # k3 of old to new: ratio - 1 - log ratio, the mean over ratios of 1.5 and 0.5
    assert o.approx_kl(new, old, mask).item() == pytest.approx((0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 2)


def test_policy_loss_at_ratio_1_has_the_policy_gradient():
    parameters, logprobs, _ = answer_policy()
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    probability = logprobs.sum(1).exp().detach()
    advantages = torch.randn(27, 1, generator=seeded(8)).expand(-1, 3)
    expected_reward = (logprobs.sum(1).exp() * advantages[:, 0]).sum()
    (exact,) = torch.autograd.grad(expected_reward, parameters, retain_graph=True)
    loss = o.policy_loss(logprobs, logprobs.detach(), advantages * probability[:, None], mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, parameters)
    assert torch.allclose(-gradient, exact, atol=1e-6)


def test_policy_loss_stops_where_the_clip_says():
    new = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    o.policy_loss(new, torch.zeros(1, 4), torch.tensor([[2.0, -2.0, 2.0, -2.0]]), ragged(4), 0.2).backward()
    assert new.grad[0].tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0])


def test_p40_the_log_ratio_is_clamped_before_exp():
    new, old = torch.tensor([[0.0, -500.0]], requires_grad=True), torch.tensor([[-500.0, 0.0]])
    loss = o.policy_loss(new, old, torch.tensor([[-1.0, 1.0]]), ragged(2), 0.2)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()
    assert torch.isfinite(o.kl_k3(old, new)).all()
    assert o.log_ratio(new, old).tolist() == [[20.0, -20.0]]
    assert o.log_ratio(new, old, limit=3.0).tolist() == [[3.0, -3.0]]


def test_p40_the_alarm_says_which_cause_to_look_for():
    assert o.ppo_warnings(1e-6, 0.0, 0.0, 0.0) == []
    assert o.ppo_warnings(1e-6, -0.2, 0.1, 0.3) == []
    (ratio,) = o.ppo_warnings(0.4, 1.0, 0.1, 0.1)
    assert "temperature" in ratio
    (negative,) = o.ppo_warnings(0.0, -1.0, 0.1, 0.1)
    assert "below 0" in negative and "10.0 standard errors" in negative
    (clipped,) = o.ppo_warnings(0.0, 1.0, 0.1, 0.6)
    assert "learning rate" in clipped
    assert len(o.ppo_warnings(math.nan, -9.0, 0.1, 0.9)) == 3


def test_p40_the_mean_ratio_would_miss_another_temperature():
    """What the alarm reads must move when sampling and training disagree; the mean ratio's expectation stays 1."""
    logits = torch.randn(6, generator=seeded())
    drawn = logits.softmax(0).multinomial(20_000, replacement=True, generator=seeded())[None]  # (1, T)
    old, new = logits.log_softmax(0)[drawn], (logits / 1.5).log_softmax(0)[drawn]
    mask = torch.ones_like(drawn, dtype=torch.bool)
    assert o.mean_ratio(new, old, mask).item() == pytest.approx(1, abs=0.01)
    kl = (logits.softmax(0) * (logits.log_softmax(0) - (logits / 1.5).log_softmax(0))).sum().item()  # old to new
    assert o.approx_kl(new, old, mask).item() == pytest.approx(kl, abs=0.01) and kl > 0.03
    error = o.ratio_abs_error(new, old, mask).item()
    assert error > 0.2 and o.ppo_warnings(error, 0.0, 0.0, 0.0)


def test_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 2.0, 7.0]]), torch.tensor([[0.0, 2.0, 7.0]])
    returns = torch.tensor([[1.0, 0.0, 0.0]])
    mask = ragged(2, width=3)
    assert o.value_loss(values, old, returns, mask, cliprange_value=0.0).item() == pytest.approx(0.5 * (0 + 4))
    # the first value moved by 1 from its old estimate: with clip 0.2 it is held at 0.2, 0.8 short of its return
    assert o.value_loss(values, old, returns, mask, cliprange_value=0.2).item() == pytest.approx(0.5 * (0.64 + 4))


def test_entropy_loss_by_hand():
    logprobs = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    assert o.entropy_loss(logprobs, ragged(1, width=2)).item() == pytest.approx(-LN2)


def test_explained_variance_by_hand():
    returns, mask = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]]), ragged(2, 1, width=3)
    assert o.explained_variance(returns, returns, mask) == 1.0
    assert o.explained_variance(torch.full((2, 3), 3.0), returns, mask) == pytest.approx(0, abs=1e-6)
    assert o.explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-5)
    assert o.explained_variance(torch.zeros(2, 3), torch.ones(2, 3), mask) == 0.0


# ----------------------------------------------------------------------------- padding and splitting change nothing

N_TOKENS = 5


def episode(lengths: tuple[int, ...], pad: int, filling: float, seed: int) -> dict[str, torch.Tensor]:
    """Random answers of those lengths with `pad` more columns; outside the mask everything is `filling`."""
    n, width = len(lengths), N_TOKENS + pad
    mask = ragged(*lengths, width=width)
    made = {"mask": mask}
    for i, name in enumerate(("logprobs", "old", "ref", "advantages", "values", "old_values", "returns")):
        real = torch.randn(n, N_TOKENS, generator=seeded(seed * 10 + i)) * 0.3
        made[name] = F.pad(real, (0, pad)).masked_fill(~mask, filling)
    full = F.pad(torch.randn(n, N_TOKENS, 4, generator=seeded(seed)), (0, 0, 0, pad)).log_softmax(-1)
    made["full"] = full.masked_fill(~mask[..., None], filling)
    made["scores"] = torch.randn(n, generator=seeded(seed))
    return made


METRICS = {
    "masked_sum": lambda e: o.masked_sum(e["values"], e["mask"]),
    "masked_mean": lambda e: o.masked_mean(e["values"], e["mask"]),
    "kl": lambda e: o.response_sum(o.kl_k1(e["logprobs"], e["ref"]), e["mask"]),
    "kl_k2": lambda e: o.masked_mean(o.kl_k2(e["logprobs"], e["ref"]), e["mask"]),
    "kl_k3": lambda e: o.masked_mean(o.kl_k3(e["logprobs"], e["ref"]), e["mask"]),
    "rewards": lambda e: o.penalised_rewards(e["scores"], e["logprobs"], e["ref"], e["mask"], 0.3)[:, :N_TOKENS],
    "advantages": lambda e: o.gae(e["advantages"], e["values"], e["mask"], 0.9, 0.8)[0][:, :N_TOKENS],
    "returns": lambda e: o.gae(e["advantages"], e["values"], e["mask"], 0.9, 0.8)[1][:, :N_TOKENS],
    "whiten": lambda e: o.whiten(e["advantages"], e["mask"])[:, :N_TOKENS],
    "policy_loss": lambda e: o.policy_loss(e["logprobs"], e["old"], e["advantages"], e["mask"], 0.2),
    "value_loss": lambda e: o.value_loss(e["values"], e["old_values"], e["returns"], e["mask"], 0.2),
    "value_loss_unclipped": lambda e: o.value_loss(e["values"], e["old_values"], e["returns"], e["mask"], 0.0),
    "entropy_loss": lambda e: o.entropy_loss(e["full"], e["mask"]),
    "clip_frac": lambda e: o.clip_frac(e["logprobs"], e["old"], e["mask"], 0.2),
    "mean_ratio": lambda e: o.mean_ratio(e["logprobs"], e["old"], e["mask"]),
    "approx_kl": lambda e: o.approx_kl(e["logprobs"], e["old"], e["mask"]),
    "ratio_abs_error": lambda e: o.ratio_abs_error(e["logprobs"], e["old"], e["mask"]),
    "explained_variance": lambda e: o.explained_variance(e["values"], e["returns"], e["mask"]),
}
LENGTHS = st.lists(st.integers(1, N_TOKENS), min_size=1, max_size=4).map(tuple)


@pytest.mark.parametrize("name", METRICS)
@given(LENGTHS, st.integers(0, 10), st.sampled_from([0.0, -7.0, 1e9, -torch.inf, torch.nan]), st.integers(0, 9))
def test_p37_every_metric_is_padding_invariant(name, lengths, pad, filling, seed):
    plain = METRICS[name](episode(lengths, 0, 0.0, seed))
    padded = METRICS[name](episode(lengths, pad, filling, seed))
    assert torch.isfinite(padded).all()
    assert torch.allclose(plain, padded, atol=1e-5)


@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "value_loss_unclipped", "entropy_loss", "masked_sum"])
def test_p37_no_gradient_reaches_or_leaves_the_padding(name):
    made = episode((2, 4), 3, torch.nan, 1)
    learned = "full" if name == "entropy_loss" else "logprobs" if name == "policy_loss" else "values"
    made[learned].requires_grad_()
    METRICS[name](made).backward()
    gradient = made[learned].grad
    assert torch.isfinite(gradient).all() and (gradient[~made["mask"]] == 0).all() and gradient.abs().sum() > 0


@given(LENGTHS, st.integers(0, 12), st.integers(0, 5))
def test_p07_loss_is_independent_of_padding(lengths, pad, seed):
    width = N_TOKENS + pad
    mask = ragged(*lengths, width=width)
    logits = torch.randn(len(lengths), N_TOKENS, 6, generator=seeded(seed))
    targets = torch.randint(6, (len(lengths), N_TOKENS), generator=seeded(seed))
    total, count = o.cross_entropy_sum(logits, targets, mask[:, :N_TOKENS])
    padded = o.cross_entropy_sum(F.pad(logits, (0, 0, 0, pad), value=3.0), F.pad(targets, (0, pad), value=5), mask)
    assert padded[0].item() == pytest.approx(total.item(), abs=1e-4) and padded[1] == count == sum(lengths)
    alone = [o.cross_entropy_sum(logits[i : i + 1, :n], targets[i : i + 1, :n], mask[i : i + 1, :n])
             for i, n in enumerate(lengths)]  # fmt: skip
    assert sum(part[0].item() for part in alone) == pytest.approx(total.item(), abs=1e-4)
    assert sum(int(part[1]) for part in alone) == count


@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "entropy_loss"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_p27_micro_batches_add_up_to_the_minibatch(name, size):
    made = episode((5, 1, 2, 4, 3), 0, 0.0, 2)
    parts = [{key: value[i : i + size] for key, value in made.items()} for i in range(0, 5, size)]
    assert sum(METRICS[name](part) for part in parts).item() == pytest.approx(METRICS[name](made).item(), abs=1e-5)


def test_p22_alignment_on_a_hand_made_episode():
    """Score on the last token only, penalty where the log-probs differ, advantage where the value was wrong."""
    logprobs, ref = torch.tensor([[-1.0, -2.0, -1.0, 0.0]]), torch.tensor([[-1.0, -1.0, -1.0, 0.0]])
    mask = ragged(3, width=4)
    rewards = o.penalised_rewards(torch.tensor([1.0]), logprobs, ref, mask, 1.0)
    assert rewards.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    right_values = torch.tensor([[2.0, 2.0, 1.0, 0.0]])  # what is still to come at each token
    assert o.gae(rewards, right_values, mask, 1.0, 0.5)[0].abs().max() == 0
    wrong_at_1 = right_values + torch.tensor([[0.0, 0.5, 0.0, 0.0]])
    assert o.gae(rewards, wrong_at_1, mask, 1.0, 0.0)[0].tolist() == [[0.5, -0.5, 0.0, 0.0]]
