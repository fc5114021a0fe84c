"""The formulas of RLHF as pure functions: tensors in, tensors out, no model inside.

Three conventions hold for all of them.

* **Masks say what is real.** `mask` is bool, True at the tokens that count: for an answer, every token up to and
  including its end token. What a (B, T) input holds elsewhere, even NaN, reaches neither a value nor a gradient.
* **Losses are sums.** A function called `..._loss` or `..._sum` adds over the masked tokens. The caller divides by
  the number of tokens in the whole minibatch, so that splitting it into micro-batches changes nothing. (The one
  exception is `ranking_loss`, a mean over prompts.) Metrics, like `clip_frac`, are means over the masked tokens.
* **Everything is computed in float32**, whatever comes in. In bfloat16 the rounding of the logits is as large as the
  difference between two policies that PPO learns from.

Position t of `logprobs`, `values`, `rewards`, `mask` and `advantages` always speaks of the same token, the t-th of the
answer. Log-probabilities and KL are in nats. B sequences, T positions, V tokens in the vocabulary, N answers, P pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- means over masks


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) where mask (B, T) is True: a scalar. What x holds elsewhere, even NaN, is never touched."""
    return torch.where(mask, x.float(), 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) where mask (B, T) is True: a scalar; 0 if mask is True nowhere."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def response_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) over each answer's own tokens: (B,). Of `kl_k1` it gives the KL of each answer, in nats."""
    return torch.where(mask, x.float(), 0.0).sum(dim=1)


def response_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) over each answer's own tokens: (B,); 0 for an answer without tokens."""
    return response_sum(x, mask) / mask.sum(dim=1).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x (B, T) scaled to deviation 1 over the masked tokens and, with `shift_mean`, moved to mean 0; 0 elsewhere.

    The deviation is the population's (divided by n), so one token alone becomes 0 and not 0/0.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x.float() - mean).square(), mask)
    whitened = (x.float() - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)  # (B, T)


# ------------------------------------------------------------------------------------------------------ language model


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each token: logits (B, T, V) and targets (B, T) int64 give (B, T) float32.

    Also takes log-probabilities in place of logits, -inf for tokens that cannot be sampled included.
    """
    return logits.float().log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (B, T)


def cross_entropy_sum(logits: Tensor, targets: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the targets: (sum over the masked tokens in nats, their number).

    logits (B, T, V), targets (B, T) int64 already shifted (targets[t] follows tokens[t]), loss_mask (B, T) bool.
    Divide the sum by the number of tokens in the whole accumulated batch, never by the padded size.
    """
    kept = targets.masked_fill(~loss_mask, -100)  # (B, T)
    total = F.cross_entropy(logits.float().flatten(0, 1), kept.flatten(), ignore_index=-100, reduction="sum")
    return total, loss_mask.sum()


def correct_sum(logits: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
    """How many masked targets (B, T) are the likeliest token of logits (B, T, V): a scalar. For token accuracy."""
    return masked_sum(logits.argmax(dim=-1) == targets, loss_mask)


def entropy(logprobs_full: Tensor) -> Tensor:
    """Entropy -sum p log p of normalised log-probabilities (B, T, V): (B, T), in nats, never negative.

    -inf (a token that cannot be sampled) adds 0, in the value and in the gradient.
    """
    logprobs = logprobs_full.float()
    plogp = logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)  # (B, T, V)
    return (-plogp.sum(dim=-1)).clamp(min=0.0)  # (B, T); rounding alone could make it -1e-8


# -------------------------------------------------------------------------------------------------------- reward model


def pool_last_token(scores: Tensor, ends: Tensor) -> Tensor:
    """The score of each sequence, read at its end token: scores (N, T) and ends (N,), the index of it, give (N,)."""
    return scores.float().gather(1, ends.unsqueeze(1)).squeeze(1)


def pair_differences(scores: Tensor, prompt: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Every (better, worse) pair of answers to one prompt: (score of better - score of worse, weight), each (P,).

    scores (N,), prompt (N,) which prompt an answer belongs to, rank (N,) 0 = best. Equal ranks are not a pair.
    A pair weighs 1 / (number of pairs of its prompt), so each prompt weighs 1 however many answers it has.
    """
    scores = scores.float()
    same = prompt[:, None] == prompt[None, :]  # (N, N)
    better = same & (rank[:, None] < rank[None, :])  # (N, N): row is better than column
    pairs_of_prompt = (same * better.sum(dim=1)).sum(dim=1)  # (N,) no matrix product: autocast would round it
    winner, loser = better.nonzero(as_tuple=True)  # (P,), (P,)
    return scores[winner] - scores[loser], 1.0 / pairs_of_prompt[winner]


def ranking_loss(scores: Tensor, prompt: Tensor | None = None, rank: Tensor | None = None) -> Tensor:
    """-log sigmoid(better - worse), averaged over the K(K-1)/2 pairs of each prompt, then over prompts: a scalar.

    scores (N,), prompt (N,), rank (N,) as in `pair_differences`; without prompt they all answer one prompt, without
    rank the best comes first. Two equal scores cost ln 2; a margin of -1000 costs 1000, because log sigmoid is computed
    as such. Prompts without a pair do not count. InstructGPT, arXiv:2203.02155, section 3.5, equation 1.
    """
    prompt = torch.zeros(len(scores), dtype=torch.long, device=scores.device) if prompt is None else prompt
    rank = torch.arange(len(scores), device=scores.device) if rank is None else rank
    differences, weights = pair_differences(scores, prompt, rank)
    return -(weights * F.logsigmoid(differences)).sum() / weights.sum().clamp(min=1e-8)


def pair_wins(differences: Tensor) -> Tensor:
    """Of `pair_differences` (P,): 1 where the better response scores higher, one half where both score alike: (P,).

    Their mean is the accuracy of a reward model, weighted by prompt or not.
    """
    return (differences > 0).float() + 0.5 * (differences == 0).float()


def normalise_score(score: Tensor, mean: float | Tensor, scale: float | Tensor) -> Tensor:
    """(score - mean) / scale, with the mean and deviation that were fitted once on answers of the reference policy."""
    return (score.float() - mean) / scale


# ------------------------------------------------------------------------------------------------------------------ KL


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, limit: float = 20.0) -> Tensor:
    """log(p / p_old) of each token (B, T), clamped to +-limit so that its exponential stays finite."""
    return (logprobs.float() - old_logprobs.float()).clamp(-limit, limit)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k1 = log p - log ref of each sampled token (B, T): unbiased for the KL, of either sign.

    The penalty in PPO's reward is this one: its score-function gradient is the KL's own; that of k2 or k3 is not.
    J. Schulman, "Approximating KL Divergence", 2020.
    """
    return logprobs.float() - ref_logprobs.float()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k2 = (log p - log ref)^2 / 2 of each token (B, T): never negative, biased. For logs or losses."""
    return 0.5 * kl_k1(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 = ref/p - 1 - log(ref/p) of each token (B, T): unbiased, never negative, low variance. For logs."""
    ratio = log_ratio(ref_logprobs, logprobs)
    return torch.expm1(ratio) - ratio


def adaptive_kl(kl_coef: float, measured_kl: float, target: float, horizon: int) -> float:
    """The next KL coefficient: grows while the measured KL (nats per answer) is above its target, shrinks while below.

    kl_coef * exp(error / horizon), error = (measured - target) / target kept within +-1, so a full error changes the
    coefficient e-fold in `horizon` iterations. Ziegler et al., arXiv:1909.08593, section 2.2, is the same proportional
    controller with error within +-0.2 and a gain of 0.1: about five times more patient, for longer runs.
    A target of 0 leaves the coefficient alone.
    """
    if target == 0:
        return kl_coef
    error = (measured_kl - target) / target
    return kl_coef * math.exp(max(-1.0, min(1.0, error)) / horizon)


# ----------------------------------------------------------------------------------------------------------------- PPO


def penalised_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """What PPO maximises, spread over the tokens of each answer: (B, T), 0 outside mask, no gradient.

    Every token pays kl_coef * k1; the last token (the end token, or the last one kept of an answer cut off) also earns
    the answer's score. scores (B,); logprobs, ref_logprobs, mask (B, T). The penalty is signed: where the policy is
    less sure than the reference it is a refund. Ziegler et al., arXiv:1909.08593, equation 2; InstructGPT, equation 2.
    """
    penalty = kl_coef * kl_k1(logprobs, ref_logprobs)  # (B, T)
    is_last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)  # (B, T): no masked token follows
    rewards = torch.where(mask, -penalty, 0.0) + torch.where(is_last, scores.float()[:, None], 0.0)
    return rewards.detach()


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns), each (B, T), 0 outside mask, no gradient.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; the return is A_t + V_t. rewards, values
    and mask are (B, T). The value after an answer's last token is 0, or bootstrap (B,) if given. We give none: an
    answer cut off by the length limit already got its stated score at its last token, and there it ends.
    Schulman et al., arXiv:1506.02438, equation 16.
    """
    rewards, values = rewards.detach().float(), values.detach().float()
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap.detach().float()  # (B,)
    next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantage = delta + gamma * lam * next_advantage  # (B,)
        real = mask[:, t]
        advantages[:, t] = torch.where(real, advantage, 0.0)
        next_value = torch.where(real, values[:, t], next_value)
        next_advantage = torch.where(real, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """-min(ratio A, clamp(ratio, 1-clip, 1+clip) A), summed over the masked tokens: a scalar.

    All (B, T). The gradient stops where the ratio has already moved by `cliprange` in the advantage's direction.
    PPO, arXiv:1707.06347, equation 7.
    """
    ratio = torch.where(mask, log_ratio(logprobs, old_logprobs), 0.0).exp()  # (B, T)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)
    return -masked_sum(gain, mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float) -> Tensor:
    """(value - return)^2 / 2, summed over the masked tokens: a scalar. All (B, T).

    With clip > 0 the larger of this and the same for the value kept within +-clip of its old estimate: a value
    that has already moved by `cliprange` towards the return stops there. clip = 0 turns that off.
    """
    values, old_values, returns = (torch.where(mask, x.float(), 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()  # (B, T)
    if cliprange_value > 0:
        near_old = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        error = torch.maximum(error, (near_old - returns).square())
    return 0.5 * error.sum()


def entropy_loss(logprobs_full: Tensor, mask: Tensor) -> Tensor:
    """Minus the entropy, summed over the masked tokens: a scalar to add with a small weight. (B, T, V), (B, T)."""
    return -entropy(logprobs_full.masked_fill(~mask.unsqueeze(-1), 0.0)).sum()  # log 1 at padding: entropy 0


# ------------------------------------------------------------------------------------------------- what to watch in PPO


def clip_frac(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Share of the masked tokens whose ratio lies outside 1 +- clip: a scalar in [0, 1]."""
    return masked_mean((log_ratio(logprobs, old_logprobs).exp() - 1).abs() > cliprange, mask)


def mean_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean of the ratio p / p_old over the masked tokens: a scalar, near 1 for every policy: see `ratio_abs_error`."""
    return masked_mean(log_ratio(logprobs, old_logprobs).exp(), mask)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL of the old policy to the new one per token, by k3 on the old one's samples: a scalar in nats, not below 0."""
    return masked_mean(kl_k3(old_logprobs, logprobs), mask)


def ratio_abs_error(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean of |ratio - 1| over the masked tokens: a scalar, 0 before the first update.

    Watch this and not the mean ratio, whose expectation is 1 under any two policies: sum_a old(a) new(a)/old(a) = 1.
    """
    return masked_mean((log_ratio(logprobs, old_logprobs).exp() - 1).abs(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return) over the masked tokens: a scalar.

    1 is a perfect value model, 0 no better than a constant, negative worse. 0 if all returns are equal.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    total = variance(returns.float())
    unexplained = variance(returns.float() - values.float())
    return torch.where(total > 1e-12, 1 - unexplained / total.clamp(min=1e-12), 0.0)


def ppo_warnings(first_ratio_error: float, kl: float, kl_stderr: float, clip_frac: float) -> list[str]:
    """What is probably broken, judged by one iteration's figures: a list of sentences, empty if all is well.

    first_ratio_error: `ratio_abs_error` of the first mini-batch, before any update. kl and kl_stderr: mean k1 per
    response and its standard error, in nats. clip_frac: over the whole update.
    """
    alarms = []
    if not first_ratio_error <= 0.05:
        alarms.append(
            f"Before the first update the ratio is off 1 by {first_ratio_error:.3f}: training does not recompute the "
            "log-probabilities of sampling. Compare temperature, top-k, top-p, dropout, precision and alignment by one."
        )
    if kl < -3 * kl_stderr - 1e-3:
        alarms.append(
            f"The KL is {kl:.3f} nats, {-kl / max(kl_stderr, 1e-9):.1f} standard errors below 0, which no true KL is: "
            "policy and reference differ in temperature or alignment, or padding is counted."
        )
    if clip_frac > 0.5:
        alarms.append(
            f"{clip_frac:.0%} of the tokens are clipped: steps are too large. "
            "Lower the learning rate or the number of epochs, or make the mini-batches larger."
        )
    return alarms
