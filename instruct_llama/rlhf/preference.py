"""Preference optimisation without RL: DPO, IPO and KTO, losses of log-ratios between a policy and its reference.

The log-ratio of a response is log policy(y|x) - log reference(y|x), summed over its tokens. Times beta it is the
implicit reward: the reward whose optimum under a KL penalty of weight beta is this policy, up to a term that depends
on the prompt alone and cancels within a pair (Rafailov et al., arXiv:2305.18290, equations 4 to 6). DPO is therefore
the reward model's ranking loss on implicit rewards.

P prompts, N responses, L tokens of the longest response, V vocabulary. Losses are sums over prompts, in which each
prompt has weight 1 for any number of responses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DPOConfig, check
from ..data.completions import CompletionBatch, PreferenceBatch
from ..model.llama import Llama
from .losses import pair_weights, pair_wins, ranked_pairs, response_mean, response_sum, token_logprobs

ReduceSum = Callable[[dict[str, float]], dict[str, float]]


def completion_logprobs(model: Llama, batch: CompletionBatch) -> Tensor:
    """Log-probability of each response token: (N, L) float32, 0 outside the mask."""
    hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids)  # (P, T, D)
    mask = batch.response_mask
    logits = model.head(hidden[batch.prompt[:, None], batch.predict_at][mask])  # (tokens, V)
    logprobs = torch.zeros(mask.shape, device=mask.device)  # (N, L)
    return logprobs.masked_scatter(mask, token_logprobs(logits, batch.responses[mask]))


def response_logprobs(model: Llama, batch: CompletionBatch, average: bool = False) -> Tensor:
    """Log-probability of each response in nats, or with `average` its mean per token: (N,) float32."""
    reduce = response_mean if average else response_sum
    return reduce(completion_logprobs(model, batch), batch.response_mask)


# ------------------------------------------------------------------------------------------------------------- losses


def dpo_loss(margins: Tensor, weights: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * margin), summed over the pairs with their weights: a scalar.

    margins (P,): log-ratio of the better response - that of the worse; weights (P,). arXiv:2305.18290, equation 7.
    `label_smoothing` is the assumed share of pairs whose label is wrong; their loss is that of the reversed pair
    ("conservative DPO", E. Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    right, wrong = F.logsigmoid(beta * margins.float()), F.logsigmoid(-beta * margins.float())  # (P,) each
    return -(weights * ((1 - label_smoothing) * right + label_smoothing * wrong)).sum()


def ipo_loss(margins: Tensor, weights: Tensor, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2, summed over the pairs with their weights: a scalar; arguments as in `dpo_loss`.

    The margin has a finite target, so that labels that always agree do not push it to infinity, as they do with DPO.
    Azar et al., arXiv:2310.12036, equation 17, where beta is called tau.
    """
    return (weights * (margins.float() - 1 / (2 * beta)).square()).sum()


def kto_loss(
    log_ratios: Tensor, label: Tensor, weights: Tensor, kl: float, beta: float, desirable: float, undesirable: float
) -> Tensor:  # fmt: skip
    """1 - sigmoid(+-beta (log-ratio - kl)), + for desirable responses, summed with their weights: a scalar.

    log_ratios, label and weights (N,); kl is the reference point: see `kto_kl`. The loss of
    desirable responses is multiplied by `desirable`, that of the others by `undesirable`; label 0 counts nothing.
    Ethayarajh et al., arXiv:2402.01306, equation 8.
    """
    value = torch.sigmoid(label * beta * (log_ratios.float() - kl))  # (N,)
    coef = torch.where(label > 0, desirable, undesirable) * (label != 0)  # (N,)
    return (weights * coef * (1 - value)).sum()


def kto_kl(log_ratios: Tensor, reduce_sum: ReduceSum = lambda figures: figures) -> float:
    """KTO's reference point: the mean log-ratio of responses to other prompts (N,), at least 0; no gradient.

    It stands for the KL of the policy to the reference (arXiv:2402.01306, section 4.1).
    """
    sums = reduce_sum({"total": float(log_ratios.detach().sum()), "n": float(len(log_ratios))})
    return max(0.0, sums["total"] / max(1.0, sums["n"]))


def label_weights(prompt: Tensor, label: Tensor) -> Tensor:
    """(N,) 1 / the number of labelled responses to the same prompt; 0 for label 0."""
    labelled = (label != 0).float()  # (N,)
    counts = torch.zeros(int(prompt.max()) + 1, device=prompt.device).index_add(0, prompt, labelled)  # (P,)
    return labelled / counts[prompt].clamp(min=1)


def preference_loss(
    logprobs: Tensor, batch: PreferenceBatch, config: DPOConfig, reduce_sum: ReduceSum = lambda figures: figures
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """The loss that `config.loss` names, summed over prompts, and its metrics, summed over prompts.

    logprobs (N,) of the batch's responses under the policy. The batch must have `ref_logprobs`. `reduce_sum` adds
    figures over processes: KTO's reference point is that of the whole micro-batch.
    """
    check(batch.ref_logprobs is not None, "A preference loss needs the reference's log-probabilities: fill them in.")
    log_ratios = logprobs - cast(Tensor, batch.ref_logprobs)  # (N,)
    better, worse, weights = comparable_pairs(batch)  # (pairs,) each
    metrics = pair_metrics(logprobs.detach(), log_ratios.detach(), better, worse, weights, config.beta)
    if config.loss == "kto":
        kl = kto_kl(log_ratios[batch.mismatched], reduce_sum)
        each = label_weights(batch.prompt, batch.label)  # (N,)
        coefs = config.desirable_weight, config.undesirable_weight
        loss = kto_loss(log_ratios, batch.label, each, kl, config.beta, *coefs)
        return loss, {**metrics, "kto_kl": kl * batch.weight}
    margins = log_ratios[better] - log_ratios[worse]  # (pairs,)
    if config.loss == "ipo":
        return ipo_loss(margins, weights, config.beta), metrics
    return dpo_loss(margins, weights, config.beta, config.label_smoothing), metrics


def comparable_pairs(batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the better and of the worse response of every pair, and its weight, each (pairs,).

    A pair has weight 1 / (number of pairs of its prompt). Mismatched responses form no pair.
    """
    own = (~batch.mismatched).nonzero()[:, 0]  # (n,)
    better, worse = (own[index] for index in ranked_pairs(batch.prompt[own], batch.rank[own]))
    return better, worse, pair_weights(batch.prompt[better])


def pair_metrics(
    logprobs: Tensor, log_ratios: Tensor, better: Tensor, worse: Tensor, weights: Tensor, beta: float
) -> dict[str, float]:  # fmt: skip
    """What TRL's users watch, by TRL's names, summed over prompts; empty without a pair.

    logprobs and log_ratios (N,); better, worse and weights as from `comparable_pairs`. `rewards` are implicit rewards.
    """
    if not len(better):
        return {}
    figures = {
        "rewards/chosen": beta * log_ratios[better],
        "rewards/rejected": beta * log_ratios[worse],
        "rewards/margins": beta * (log_ratios[better] - log_ratios[worse]),
        "rewards/accuracies": pair_wins(log_ratios[better] - log_ratios[worse]),
        "logps/chosen": logprobs[better],
        "logps/rejected": logprobs[worse],
    }  # (pairs,) each
    return {key: float((weights * values).sum()) for key, values in figures.items()}


def label_rewards(log_ratios: Tensor, batch: PreferenceBatch, beta: float) -> dict[str, tuple[float, int]]:
    """Implicit rewards from log_ratios (N,): (sum, number) over the desirable and over the undesirable responses."""
    kinds = {"rewards/chosen": batch.label > 0, "rewards/rejected": batch.label < 0}  # (N,) each
    return {name: (beta * float(log_ratios[kind].sum()), int(kind.sum())) for name, kind in kinds.items()}


def listed_mass(logprobs: Tensor, batch: PreferenceBatch) -> dict[str, float]:
    """Where the policy's probability is: on the best response, on the other listed ones, elsewhere; sums over prompts.

    logprobs (N,), each the sum over a response's tokens. A loss of pairs only asks that the chosen response gains on
    the rejected one: both can lose probability to responses that nobody listed.
    """
    p = logprobs.exp() * ~batch.mismatched  # (N,)
    chosen, listed = float(p[batch.rank == 0].sum()), float(p.sum())
    return {
        "probability/chosen": chosen,
        "probability/rejected": listed - chosen,
        "probability/elsewhere": batch.weight - listed,
    }
