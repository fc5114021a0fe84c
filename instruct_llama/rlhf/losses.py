"""The formulas of RLHF as pure functions: tensors in, tensors out, no model inside.

Three conventions hold for all of them.

* **Masks select the real tokens.** `mask` is bool: True at every token of a response up to and including its end
  token. Entries of a (B, T) input outside the mask, even NaN, affect neither a value nor a gradient.
* **Losses are sums.** A function called `..._loss` or `..._sum` adds over the masked tokens. The caller divides by
  the number of tokens in the whole mini-batch, so that splitting it into micro-batches changes nothing. (The only
  exception is `ranking_loss`, a mean over prompts.) Metrics, like `clip_frac`, are means over the masked tokens.
* **Everything is computed in float32**, whatever the input dtype. In bfloat16 the rounding error of the logits is as
  large as the difference between two policies that PPO learns from.

Position t of `logprobs`, `values`, `rewards`, `mask` and `advantages` always refers to the t-th token of the response.
Log-probabilities and KL are in nats. B sequences, T positions, V tokens in the vocabulary, N responses, P pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- means over masks


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) where mask (B, T) is True: a scalar. Entries outside the mask, even NaN, are ignored."""
    return torch.where(mask, x.float(), 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) where mask (B, T) is True: a scalar; 0 for an empty mask."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def response_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) over each response's tokens: (B,). Applied to `kl_k1`: the KL of each response, in nats."""
    return torch.where(mask, x.float(), 0.0).sum(dim=1)


def response_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) over each response's tokens: (B,); 0 for a response without tokens."""
    return response_sum(x, mask) / mask.sum(dim=1).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x (B, T) with standard deviation 1 over the masked tokens and, with `shift_mean`, mean 0; 0 elsewhere.

    The variance divides by n, not n - 1, so that a single token becomes 0 and not 0/0.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x.float() - mean).square(), mask)
    whitened = (x.float() - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)  # (B, T)


# ------------------------------------------------------------------------------------------------------ language model


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each token: logits (B, T, V) and targets (B, T) int64 give (B, T) float32.

    Log-probabilities may replace the logits, including -inf for tokens that cannot be sampled.
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
    """Number of masked targets (B, T) that are the argmax of logits (B, T, V): a scalar. For token accuracy."""
    return masked_sum(logits.argmax(dim=-1) == targets, loss_mask)


def entropy(logprobs_full: Tensor) -> Tensor:
    """Entropy -sum p log p of normalised log-probabilities (B, T, V): (B, T), in nats, non-negative.

    -inf (a token that cannot be sampled) contributes 0 to the value and to the gradient.
    """
    logprobs = logprobs_full.float()
    plogp = logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)  # (B, T, V)
    return (-plogp.sum(dim=-1)).clamp(min=0.0)  # (B, T); rounding could give -1e-8


# -------------------------------------------------------------------------------------------------------- reward model


def pool_last_token(scores: Tensor, ends: Tensor) -> Tensor:
    """The score at each sequence's end token: scores (N, T) and end positions `ends` (N,) give (N,)."""
    return scores.float().gather(1, ends.unsqueeze(1)).squeeze(1)


def ranked_pairs(prompt: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse response of every pair of responses to one prompt, each (P,).

    prompt (N,) the prompt's index, rank (N,) 0 = best. Equal ranks form no pair.
    """
    better = (prompt[:, None] == prompt) & (rank[:, None] < rank)  # (N, N): row is better than column
    winner, loser = better.nonzero(as_tuple=True)  # (P,), (P,)
    return winner, loser


def pair_differences(scores: Tensor, prompt: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Of every pair in `ranked_pairs`: (score of better - score of worse, weight), each (P,); scores (N,).

    A pair has weight 1 / (number of pairs of its prompt), so each prompt has weight 1 for any number of responses.
    """
    winner, loser = ranked_pairs(prompt, rank)
    return scores.float()[winner] - scores.float()[loser], pair_weights(prompt[winner])


def pair_weights(prompt: Tensor) -> Tensor:
    """1 / the number of pairs of the same prompt: prompt (P,), the prompt's index of each pair, gives (P,)."""
    return 1.0 / (prompt[:, None] == prompt).sum(dim=1)


def ranking_loss(scores: Tensor, prompt: Tensor | None = None, rank: Tensor | None = None) -> Tensor:
    """-log sigmoid(better - worse), averaged over the K(K-1)/2 pairs of each prompt, then over prompts: a scalar.

    scores (N,), prompt (N,), rank (N,) as in `pair_differences`. Without prompt all belong to one prompt; without rank
    they are sorted, best first. Equal scores give a loss of ln 2; a margin of -1000 gives 1000, since `logsigmoid` does
    not overflow. Prompts without a pair are ignored. InstructGPT, arXiv:2203.02155, section 3.5, equation 1.
    """
    prompt = torch.zeros(len(scores), dtype=torch.long, device=scores.device) if prompt is None else prompt
    rank = torch.arange(len(scores), device=scores.device) if rank is None else rank
    differences, weights = pair_differences(scores, prompt, rank)
    return -(weights * F.logsigmoid(differences)).sum() / weights.sum().clamp(min=1e-8)


def pair_wins(differences: Tensor) -> Tensor:
    """From `pair_differences` (P,): 1 where the better response scores higher, 0.5 for equal scores, else 0: (P,).

    Their mean, optionally weighted by prompt, is the accuracy of a reward model.
    """
    return (differences > 0).float() + 0.5 * (differences == 0).float()


def normalise_score(score: Tensor, mean: float | Tensor, scale: float | Tensor) -> Tensor:
    """(score - mean) / scale, the mean and standard deviation of scores of the reference policy's responses."""
    return (score.float() - mean) / scale


# ------------------------------------------------------------------------------------------------------------------ KL


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, limit: float = 20.0) -> Tensor:
    """log(p / p_old) of each token (B, T), clamped to +-limit so that its exponential stays finite."""
    return (logprobs.float() - old_logprobs.float()).clamp(-limit, limit)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k1 = log p - log ref of each sampled token (B, T): unbiased for the KL, may be negative.

    PPO's KL penalty uses k1: its score-function gradient is the gradient of the KL; that of k2 or k3 is not.
    J. Schulman, "Approximating KL Divergence", 2020.
    """
    return logprobs.float() - ref_logprobs.float()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k2 = (log p - log ref)^2 / 2 of each token (B, T): non-negative, biased. For logs or losses."""
    return 0.5 * kl_k1(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 = ref/p - 1 - log(ref/p) of each token (B, T): unbiased, non-negative, low variance. For logs."""
    ratio = log_ratio(ref_logprobs, logprobs)
    return torch.expm1(ratio) - ratio


def adaptive_kl(kl_coef: float, measured_kl: float, target: float, horizon: int) -> float:
    """The next KL coefficient: larger when the measured KL (nats per response) exceeds its target, else smaller.

    kl_coef * exp(error / horizon), error = (measured - target) / target clamped to +-1: an error of 1 multiplies the
    coefficient by e in `horizon` iterations. Ziegler et al., arXiv:1909.08593, section 2.2, use the same proportional
    controller with the error clamped to +-0.2 and a gain of 0.1: about five times slower, for longer runs.
    A target of 0 keeps the coefficient constant.
    """
    if target == 0:
        return kl_coef
    error = (measured_kl - target) / target
    return kl_coef * math.exp(max(-1.0, min(1.0, error)) / horizon)


# ----------------------------------------------------------------------------------------------------------------- PPO


def penalised_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """PPO's reward of each response token: (B, T), 0 outside mask, no gradient.

    Every token gets -kl_coef * k1; the last token (the end token, or the last token of a truncated response) also gets
    the response's score. scores (B,); logprobs, ref_logprobs, mask (B, T). The penalty is negative where
    p < ref. Ziegler et al., arXiv:1909.08593, equation 2; InstructGPT, equation 2.
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
    and mask are (B, T). The value after a response's last token is 0, or bootstrap (B,) if given. PPO here passes none:
    a response truncated by the length limit gets its score at its last token and counts as finished there.
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

    All (B, T). The gradient is 0 where the ratio has already moved by `cliprange` in the advantage's direction.
    PPO, arXiv:1707.06347, equation 7.
    """
    ratio = torch.where(mask, log_ratio(logprobs, old_logprobs), 0.0).exp()  # (B, T)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)
    return -masked_sum(gain, mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float) -> Tensor:
    """(value - return)^2 / 2, summed over the masked tokens: a scalar. All (B, T).

    With `cliprange_value` > 0, the maximum of this and the loss of the value clipped to +-`cliprange_value` of its old
    estimate: the gradient is 0 for a value that has already moved that far towards the return. 0 turns clipping off.
    """
    values, old_values, returns = (torch.where(mask, x.float(), 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()  # (B, T)
    if cliprange_value > 0:
        near_old = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        error = torch.maximum(error, (near_old - returns).square())
    return 0.5 * error.sum()


def entropy_loss(logprobs_full: Tensor, mask: Tensor) -> Tensor:
    """Minus the entropy, summed over the masked tokens: a scalar. Inputs (B, T, V) and (B, T)."""
    return -entropy(logprobs_full.masked_fill(~mask.unsqueeze(-1), 0.0)).sum()  # log 1 at padding: entropy 0


# ------------------------------------------------------------------------------------------------- what to watch in PPO


def clip_frac(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Fraction of the masked tokens whose ratio lies outside 1 +- cliprange: a scalar in [0, 1]."""
    return masked_mean((log_ratio(logprobs, old_logprobs).exp() - 1).abs() > cliprange, mask)


def mean_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean of the ratio p / p_old over the masked tokens: a scalar, near 1 for every policy: see `ratio_abs_error`."""
    return masked_mean(log_ratio(logprobs, old_logprobs).exp(), mask)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL of the old policy to the new one per token, by k3 on the old one's samples: a scalar in nats, non-negative."""
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
    """Warnings about probable errors, from one iteration's metrics: a list of sentences, empty if there are none.

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
