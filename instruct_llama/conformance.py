"""Tests an RLHF loss against the exact gradient and the known optimum of J = E[r] - beta KL(policy || reference).

Published mistakes in RLHF updates are in how a formula, a mask and a sampler meet: a KL term in the wrong place, an
average that makes short responses count more, an end token outside the mask. Training curves rarely show them. Here
every response can be enumerated, so that the expected gradient of a loss is a sum and not an estimate.

This file needs torch alone. Copy it beside your code, or use it as `python -m instruct_llama conformance`:

    python conformance.py                 # the table of published variants
    python conformance.py my_loss.py      # your loss, and the mistakes that this test would have seen in it

`my_loss.py` defines `loss(rollouts)`, and may define where its KL term is and how it samples:

    KL = "reward"         # "reward": subtracted from the score; "loss": a term of the loss; "none"
    GROUP_SIZE = 1        # responses to the same prompt in a batch
    STEPS = 1             # optimizer steps on the same responses; above 1 the loss needs its ratio to the old policy

    def loss(rollouts):   # REINFORCE with the KL in the reward
        kl = ((rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask).sum(dim=1)
        reward = rollouts.scores - rollouts.beta * kl
        return -(reward.detach() * (rollouts.logprobs * rollouts.mask).sum(dim=1)).mean()

The language has 2 prompts, 3 letters and the end token E. A response has at most 3 tokens; 13 of the 40 end with E, the
others are truncated. The policy is a table of logits. Batches of one and of two responses to a prompt are enumerated,
larger ones are sampled. Everything is in float64.

B responses in a batch, N = 3 tokens, V = 4 tokens in the vocabulary, A = 40 responses, R = 13 prefixes, P = 2 prompts,
M batches.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

V, N, P = 4, 3, 2
END = V - 1
BETA = 0.5
TRUNCATED = 2.0  # what a response without an end token loses of its score
EXACT = 1 - 1e-6  # cosine from which a gradient counts as exact: all sums are in float64
SAMPLED = 8192  # groups of more than two responses, per gradient


@dataclass(frozen=True)
class Rollouts:
    """What a loss may use: a batch of B responses, `GROUP_SIZE` to each prompt, those of a prompt side by side.

    After the end token the log-probabilities repeat that of the end token: finite, and wrong to count.
    """

    logprobs: Tensor  # (B, N) log-probabilities of the tokens under the policy that is trained: differentiable
    old_logprobs: Tensor  # (B, N) under the policy that sampled them
    ref_logprobs: Tensor  # (B, N) under the reference
    tokens: Tensor  # (B, N) int64: 0 to 2 the letters, 3 the end token, which is repeated as padding
    mask: Tensor  # (B, N) bool: True up to and including the end token
    scores: Tensor  # (B,) r(y)
    values: Tensor  # (B, N) exact value before each token: what a perfect critic says (with the KL, if in the reward)
    group: Tensor  # (B,) int64: index of the prompt in the batch
    all_logprobs: Tensor  # (B, N, V) of every possible token under the policy that is trained: differentiable
    all_ref_logprobs: Tensor  # (B, N, V) under the reference
    beta: float


Loss = Callable[[Rollouts], Tensor]  # a batch -> a scalar, to be minimised


@dataclass(frozen=True)
class Variant:
    """A loss and how it is used."""

    name: str
    loss: Loss
    source: str  # the paper or thread it is from
    expected: str = ""  # the verdict that theory gives
    kl: str = "reward"  # where its KL term is: "reward", "loss" or "none"
    group_size: int = 1
    steps: int = 1  # optimizer steps on the same responses
    sampler: str = "policy"  # who samples: the "policy", or the "reference" for a fixed set of comparisons


# -------------------------------------------------------------------------------------------------------- the language


def _language(seed: int = 0) -> SimpleNamespace:
    """All responses, their scores and the reference's logits."""
    words = [word for n in range(N + 1) for word in itertools.product(range(END), repeat=n)]
    prefixes = [word for word in words if len(word) < N]  # R
    responses = [(*word, END) if len(word) < N else word for word in words]  # A
    padded = [(*y, *[END] * (N - len(y))) for y in responses]
    row = {prefix: i for i, prefix in enumerate(prefixes)}
    # after the end token, the row that the end token was sampled from
    rows = [[row[y[: min(t, len(y) - 1)]] for t in range(N)] for y in responses]
    mask = torch.tensor([[t < len(y) for t in range(N)] for y in responses])
    ended = torch.tensor([y[-1] == END for y in responses])
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(P, len(prefixes), V, generator=generator, dtype=torch.float64)
    scores = torch.randn(P, len(responses), generator=generator, dtype=torch.float64)
    scores = scores - TRUNCATED * ~ended + torch.tensor([[0.0], [2.0]])  # the second prompt is an easy one
    begins = torch.tensor([[y[: len(p)] == p for y in responses] for p in prefixes])  # (R, A): y continues the prefix
    return SimpleNamespace(
        tokens=torch.tensor(padded), rows=torch.tensor(rows), mask=mask, ended=ended, begins=begins.double(),
        reference=reference, scores=scores,
    )  # fmt: skip


LANGUAGE = _language()


def token_logprobs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (P, R, V) -> log-probabilities of each token (P, A, N), and of every possible one (P, A, N, V)."""
    every = logits.log_softmax(dim=-1)[:, LANGUAGE.rows]  # (P, A, N, V)
    return every.gather(-1, LANGUAGE.tokens.expand(P, -1, -1).unsqueeze(-1)).squeeze(-1), every


def response_logprobs(logits: Tensor) -> Tensor:
    """log pi(y) of every response: logits (P, R, V) -> (P, A)."""
    return (token_logprobs(logits)[0] * LANGUAGE.mask).sum(dim=-1)


def objective_parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E[r], KL(policy || reference), KL(reference || policy), each the mean over prompts: differentiable scalars."""
    logprobs, ref = response_logprobs(logits), response_logprobs(LANGUAGE.reference)
    kl = (logprobs.exp() * (logprobs - ref)).sum() / P
    return (logprobs.exp() * LANGUAGE.scores).sum() / P, kl, (ref.exp() * (ref - logprobs)).sum() / P


def objective(logits: Tensor, beta: float = BETA) -> Tensor:
    """J = E[r] - beta KL(policy || reference), a differentiable scalar."""
    score, kl, _ = objective_parts(logits)
    return score - beta * kl


def best_objective(beta: float = BETA) -> float:
    """J* = beta log sum_y ref(y) exp(r(y) / beta), the mean over prompts (arXiv:1909.08593, section 2)."""
    tilted = response_logprobs(LANGUAGE.reference) + LANGUAGE.scores / beta  # (P, A)
    return beta * tilted.logsumexp(dim=1).mean().item()


def gap_closed(logits: Tensor) -> float:
    """(J - J of the reference) / (J* - J of the reference)."""
    start = objective(LANGUAGE.reference).item()
    return (objective(logits).item() - start) / (best_objective() - start)


def _values(old: Tensor, beta: float) -> Tensor:
    """The expected score, minus the KL penalty still to come, before each token: (P, A, N)."""
    k1 = (token_logprobs(old)[0] - token_logprobs(LANGUAGE.reference)[0]) * LANGUAGE.mask  # (P, A, N)
    to_go = LANGUAGE.scores.unsqueeze(-1) - beta * k1.flip(-1).cumsum(-1).flip(-1)  # (P, A, N)
    probability, depth = response_logprobs(old).exp(), _depth()
    mass = torch.einsum("ra,pa->pr", LANGUAGE.begins, probability)
    value = torch.einsum("ra,pa,par->pr", LANGUAGE.begins, probability, to_go[:, :, depth]) / mass  # (P, R)
    return value[:, LANGUAGE.rows]


def _depth() -> Tensor:
    """The number of letters in each prefix: (R,)."""
    return torch.tensor([n for n in range(N) for _ in range(END**n)])


# -------------------------------------------------------------------------------------------------- expected gradients


@dataclass(frozen=True)
class Mistake:
    """A mistake in what a loss is given: in the rollouts, or in how they were sampled."""

    name: str
    rollouts: Callable[[Rollouts], Rollouts] = lambda rollouts: rollouts
    sampling: Callable[[Tensor], Tensor] = lambda logits: logits  # (P, R, V): changes the sampler alone


def _late(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], dim=-1)


def _without_last(mask: Tensor) -> Tensor:
    return mask & torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], dim=-1)


MISTAKES = (
    Mistake("the end token is not in the mask", lambda r: replace(r, mask=_without_last(r.mask))),
    Mistake("padding is in the mask", lambda r: replace(r, mask=torch.ones_like(r.mask))),
    Mistake("log-probabilities are one token late", lambda r: replace(r, logprobs=_late(r.logprobs))),
    Mistake("the reference's log-probabilities are one token late",
            lambda r: replace(r, ref_logprobs=_late(r.ref_logprobs))),
    Mistake("the reference is the old policy", lambda r: replace(r, ref_logprobs=r.old_logprobs)),
    Mistake("the log-ratio to the reference has the wrong sign",
            lambda r: replace(r, ref_logprobs=2 * r.old_logprobs - r.ref_logprobs)),
    Mistake("a truncated response is scored as a complete one",
            lambda r: replace(r, scores=r.scores + TRUNCATED * (r.tokens[..., -1] != END))),
    Mistake("scores belong to the next response", lambda r: replace(r, scores=torch.roll(r.scores, 1, dims=-1))),
    Mistake("sampled at temperature 0.7, trained at 1", sampling=lambda logits: logits / 0.7),
    Mistake("sampled among the 3 likeliest of 4 tokens, trained on all",
            sampling=lambda logits: logits.masked_fill(logits == logits.amin(-1, keepdim=True), -30.0)),
)  # fmt: skip


def _batch_losses(variant: Variant, rollouts: Rollouts) -> Tensor:
    """The loss of each batch: rollouts with fields (M, B, …) -> (M,). One call for all if the loss can be vmapped."""
    names = [name for name in rollouts.__dataclass_fields__ if name != "beta"]
    fields = tuple(getattr(rollouts, name) for name in names)

    def loss(*batch: Tensor) -> Tensor:
        return variant.loss(Rollouts(**dict(zip(names, batch, strict=True)), beta=rollouts.beta))

    try:
        values = torch.func.vmap(loss)(*fields)
    except RuntimeError:  # it indexes with a mask, or reads a number out of a tensor: one batch at a time
        values = torch.stack([loss(*(field[m] for field in fields)) for m in range(len(rollouts.scores))])
    if values.shape != rollouts.scores.shape[:1]:
        raise ValueError(f"{variant.name}: a loss is one number per batch, not of shape {tuple(values.shape[1:])}.")
    return values


def expected_loss(
    variant: Variant, logits: Tensor, old: Tensor, chosen: Tensor, weights: Tensor, beta: float = BETA,
    mistake: Mistake | None = None,
) -> Tensor:  # fmt: skip
    """sum_m weights[m] loss(batch m), a scalar; its gradient for `logits` (P, R, V) is the loss's expected gradient.

    old (P, R, V) sampled the responses; chosen (M, B) int64 are indices into all P A responses (prompt-major), weights
    (M,) their probabilities, see `groups`.
    """

    def pick(x: Tensor) -> Tensor:  # (P, A, …) -> (M, B, …)
        return x.flatten(0, 1)[chosen]

    logprobs, every = token_logprobs(logits)
    ref_logprobs, every_ref = token_logprobs(LANGUAGE.reference)
    prompt = chosen // len(LANGUAGE.tokens)  # (M, B)
    rollouts = Rollouts(
        logprobs=pick(logprobs), old_logprobs=pick(token_logprobs(old)[0]), ref_logprobs=pick(ref_logprobs),
        tokens=pick(LANGUAGE.tokens.expand(P, -1, -1)), mask=pick(LANGUAGE.mask.expand(P, -1, -1)),
        scores=pick(LANGUAGE.scores), values=pick(_values(old, beta if variant.kl == "reward" else 0.0)),
        group=(prompt != prompt[:, :1]).long(), all_logprobs=pick(every), all_ref_logprobs=pick(every_ref), beta=beta,
    )  # fmt: skip
    return (weights * _batch_losses(variant, mistake.rollouts(rollouts) if mistake else rollouts)).sum()


def groups(variant: Variant, old: Tensor, mistake: Mistake | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Batches of one group each, (M, B) indices, and their weights (M,), which add up to 1.

    Groups of one and two: all of them, with their probabilities. Larger ones: `SAMPLED` of them, from the seed.
    """
    sampler = LANGUAGE.reference if variant.sampler == "reference" else mistake.sampling(old) if mistake else old
    if variant.group_size > 2:
        chosen = sampled_batches(sampler, variant.group_size, SAMPLED // P, seed).view(-1, variant.group_size)
        return chosen, torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
    probability, n = response_logprobs(sampler).exp().flatten(), len(LANGUAGE.tokens)  # (P A,)
    one = torch.cartesian_prod(*[torch.arange(n)] * variant.group_size).view(-1, variant.group_size)
    chosen = torch.cat([one + prompt * n for prompt in range(P)])  # (M, B)
    return chosen, probability[chosen].prod(dim=1) / P


def sampled_batches(old: Tensor, group_size: int, n: int, seed: int) -> Tensor:
    """n batches of `group_size` responses to each of the P prompts: (n, P * group_size) indices."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(response_logprobs(old).exp(), n * group_size, True, generator=generator)
    draws = draws.view(P, n, group_size) + torch.arange(P).view(P, 1, 1) * len(LANGUAGE.tokens)
    return draws.transpose(0, 1).reshape(n, P * group_size)


def gradient(scalar: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The gradient of scalar(logits): (P R V,); zeros if it does not depend on them."""
    logits = logits.detach().clone().requires_grad_()
    value = scalar(logits)
    if not value.requires_grad:
        return torch.zeros_like(logits).flatten()
    return torch.autograd.grad(value, logits)[0].flatten()


def expected_gradient(
    variant: Variant, logits: Tensor, old: Tensor, beta: float = BETA, mistake: Mistake | None = None, seed: int = 0
) -> Tensor:
    """The direction in which a loss moves the policy, expected over batches of one group: (P R V,)."""
    chosen, weights = groups(variant, old, mistake, seed)
    return -gradient(lambda x: expected_loss(variant, x, old, chosen, weights, beta, mistake), logits)


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two vectors; nan if one is zero."""
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms > 1e-12 else math.nan


# ------------------------------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class Report:
    """What was measured of a loss. Cosines and force are the lowest over `policies()`; nan where there is none."""

    variant: Variant
    cosine: float  # of the expected gradient with the gradient of J
    reward_cosine: float  # of its part that the score causes, with the gradient of E[r]
    kl_cosine: float  # of its part that beta causes, with the gradient of -KL(policy || reference)
    kl_reverse_cosine: float  # the same with -KL(reference || policy)
    kl_force: float  # effective beta / beta: 1 is right, 0 no force, negative pushes away from the reference
    kl_force_high: float  # the highest of it
    cosine_error: float  # standard error of `cosine`: 0 if all groups were enumerated
    batch_cosine: float  # of the gradient with that of J, in batches of 2 prompts with 8 responses each: sampled
    batch_cosine_error: float  # its standard error
    gap_closed: float  # the share of the gap to J* after ascent along the expected gradient
    score: float  # E[r] after it
    kl: float  # KL(policy || reference) after it, in nats
    verdict: str = ""


def policies() -> list[Tensor]:
    """Three policies near the reference, none of them special: each (P, R, V)."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, *LANGUAGE.reference.shape, generator=generator, dtype=torch.float64)
    return list(LANGUAGE.reference + 0.7 * noise)


def gradient_parts(variant: Variant, logits: Tensor) -> tuple[float, float, float, float, float]:
    """cosine, reward_cosine, kl_cosine, kl_reverse_cosine and kl_force at a policy that samples its own responses."""
    of_score, of_kl, of_reverse = (gradient(lambda x, i=i: objective_parts(x)[i], logits) for i in range(3))
    whole = expected_gradient(variant, logits, logits)
    score_part = expected_gradient(variant, logits, logits, beta=0.0)
    kl_part = whole - score_part
    unit = (score_part @ of_score / of_score.square().sum()).item()  # a loss may have any positive scale
    force = -(kl_part @ of_kl / of_kl.square().sum()).item() / BETA / unit if abs(unit) > 1e-12 else math.nan
    return (
        cosine(whole, of_score - BETA * of_kl), cosine(score_part, of_score), cosine(kl_part, -of_kl),
        cosine(kl_part, -of_reverse), force,
    )  # fmt: skip


def sampled_cosine(variant: Variant, chosen: Tensor, logits: Tensor, parts: int = 16) -> tuple[float, float]:
    """The cosine with the gradient of J over sampled batches (M, B), and its standard error by the jackknife."""
    exact = gradient(objective, logits)
    weights = torch.full((len(chosen) // parts,), 1 / len(chosen), dtype=torch.float64)
    found = torch.stack(
        [
            -gradient(lambda x, part=part: expected_loss(variant, x, logits, part, weights), logits)
            for part in chosen.chunk(parts)
        ]
    )  # (parts, P R V)
    without = torch.tensor([cosine(found.sum(0) - part, exact) for part in found], dtype=torch.float64)
    error = ((parts - 1) * (without - without.mean()).square().mean()).sqrt().item()
    return parts * cosine(found.sum(0), exact) - (parts - 1) * without.mean().item(), error  # without the noise's bias


def ascend(variant: Variant, rollouts: int = 300, lr: float = 0.15) -> Tensor:
    """The policy (P, R, V) that Adam reaches along the expected gradient, from the reference on."""
    logits = LANGUAGE.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    for iteration in range(rollouts):
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / rollouts)
        old = logits.detach().clone()
        for _ in range(variant.steps):
            logits.grad = -expected_gradient(variant, logits, old, seed=iteration).view_as(logits)
            optimizer.step()
    return logits.detach()


def verdict(report: Report) -> str:
    """What the measures say about a loss, in a few words."""
    margin = 3 * report.cosine_error
    if report.cosine + margin > EXACT:
        return "gradient of J"
    if report.cosine - margin < -EXACT:
        return "gradient of -J: the sign is wrong"
    if report.gap_closed >= 0.98:
        return "another gradient, the optimum of J"
    if report.variant.sampler == "reference":  # fixed responses: no gradient of a score that is sampled
        return "another optimum"
    faults = []
    if not report.reward_cosine + margin > EXACT:
        faults.append("score term biased")
    if report.variant.kl == "none":
        faults.append("no KL term")
    elif max(abs(report.kl_force), abs(report.kl_force_high)) < 1e-6:
        faults.append("KL term without force")
    elif report.kl_force_high < 0:
        faults.append("KL term pushes away from the reference")
    elif report.kl_reverse_cosine + margin > EXACT:
        faults.append("KL term is KL(reference || policy)")
    elif not report.kl_cosine + margin > EXACT:
        faults.append("KL term biased")
    elif abs(report.kl_force - 1) > 0.01:
        faults.append(f"KL term has {report.kl_force:.2f} times its weight")
    return ", ".join(faults)


def measure(variant: Variant) -> Report:
    """All measures of one loss.

    Raises ValueError if the loss is not a number per batch, or its gradient is zero or not finite.
    """
    parts = torch.tensor([gradient_parts(variant, at) for at in policies()], dtype=torch.float64)
    at, error, in_batch = policies()[0], 0.0, (math.nan, math.nan)
    if math.isnan(parts[0, 0]):
        raise ValueError(f"{variant.name}: the expected gradient is zero or not finite. Does the loss use `logprobs`?")
    if variant.group_size > 2:
        parts[0, 0], error = sampled_cosine(variant, groups(variant, at)[0], at)
    if variant.sampler == "policy":
        in_batch = sampled_cosine(variant, sampled_batches(at, 8, 2048, seed=0), at)
    low, reached = parts.amin(dim=0).tolist(), ascend(variant)
    score, kl, _ = (x.item() for x in objective_parts(reached))
    report = Report(variant, *low, parts[:, 4].max().item(), error, *in_batch, gap_closed(reached), score, kl)
    return replace(report, verdict=verdict(report))


def seen_mistakes(variant: Variant) -> dict[str, str]:
    """For each of `MISTAKES`: "seen", "not seen", or "no effect" on the expected gradient of this loss.

    A mistake is seen if it turns the gradient by an angle whose cosine is below 0.999, at one of `policies()`.
    """
    found = {}
    for mistake in MISTAKES:
        turned = [
            cosine(expected_gradient(variant, at, at), expected_gradient(variant, at, at, mistake=mistake))
            for at in policies()
        ]
        found[mistake.name] = "no effect" if min(turned) > EXACT else "not seen" if min(turned) > 0.999 else "seen"
    return found


# ------------------------------------------------------------------------------------------------- published variants


def k1(r: Rollouts) -> Tensor:
    """log(policy / reference) of each token: (B, N). J. Schulman, "Approximating KL Divergence", 2020."""
    return r.logprobs - r.ref_logprobs


def k2(log_ratio: Tensor) -> Tensor:
    """Half the square of `k1`."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """ref/p - 1 - log(ref/p), from `k1`."""
    return torch.expm1(-log_ratio) + log_ratio


def total(x: Tensor, r: Rollouts) -> Tensor:
    """The sum over the tokens of each response: (B, N) -> (B,)."""
    return (x * r.mask).sum(dim=1)


def mean(x: Tensor, r: Rollouts) -> Tensor:
    """The mean over the tokens of each response: (B, N) -> (B,)."""
    return total(x, r) / r.mask.sum(dim=1)


def to_go(x: Tensor, r: Rollouts) -> Tensor:
    """The sum from each token to the end: (B, N) -> (B, N)."""
    return (x * r.mask).flip(1).cumsum(dim=1).flip(1)


def group_mean(x: Tensor, r: Rollouts) -> Tensor:
    """The mean over the responses to the same prompt: (B,) -> (B,)."""
    same = (r.group[:, None] == r.group).to(x.dtype)  # (B, B)
    return same @ x / same.sum(dim=1)


def group_std(x: Tensor, r: Rollouts) -> Tensor:
    """The standard deviation over the responses to the same prompt, with n - 1: (B,) -> (B,)."""
    n = (r.group[:, None] == r.group).sum(dim=1)
    return ((group_mean(x.square(), r) - group_mean(x, r).square()).clamp(min=0) * n / (n - 1)).sqrt()


def leave_one_out(x: Tensor, r: Rollouts) -> Tensor:
    """x minus the mean of the other responses to the same prompt: (B,) -> (B,)."""
    n = (r.group[:, None] == r.group).sum(dim=1)
    return (x - group_mean(x, r)) * n / (n - 1)


def clipped(r: Rollouts, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """PPO's loss of each token (arXiv:1707.06347, equation 7): advantages (B, N) or (B, 1) -> (B, N)."""
    ratio = (r.logprobs - r.old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def reinforce(reward: Tensor, r: Rollouts) -> Tensor:
    """The score-function loss: reward (B,) of whole responses -> a scalar."""
    return -(reward.detach() * total(r.logprobs, r)).mean()


def reward_with(penalty: Callable[[Tensor], Tensor]) -> Loss:
    """REINFORCE on score - beta * penalty, the penalty a function of `k1` per token."""
    return lambda r: reinforce(r.scores - r.beta * total(penalty(k1(r)), r), r)


def loss_with(term: Callable[[Rollouts], Tensor]) -> Loss:
    """REINFORCE on the score, and beta times a term per response (B,) added to the loss."""
    return lambda r: reinforce(r.scores, r) + r.beta * term(r).mean()


def ppo(r: Rollouts, reduce: Callable[[Tensor, Rollouts], Tensor] = total, lam: float = 0.95) -> Tensor:
    """PPO with a perfect critic: per-token rewards, GAE with gamma = 1."""
    last = r.mask & ~torch.cat([r.mask[:, 1:], torch.zeros_like(r.mask[:, :1])], dim=1)
    rewards = last * r.scores[:, None] - r.beta * (r.old_logprobs - r.ref_logprobs)
    following = torch.cat([r.values[:, 1:], torch.zeros_like(r.values[:, :1])], dim=1) * ~last
    delta = (rewards + following - r.values) * r.mask
    advantages = sum(lam**n * torch.cat([delta[:, n:], torch.zeros_like(delta[:, :n])], dim=1) for n in range(N))
    return reduce(clipped(r, advantages), r).mean()


def undetached(r: Rollouts) -> Tensor:
    """REINFORCE whose reward is not detached from the gradient."""
    return -((r.scores - r.beta * total(k1(r), r)) * total(r.logprobs, r)).mean()


def without_future(r: Rollouts) -> Tensor:
    """Each token gets the score and the penalty of that token alone."""
    return -total((r.scores[:, None] - r.beta * k1(r)).detach() * r.logprobs, r).mean()


def rloo(r: Rollouts) -> Tensor:
    """Leave-one-out baseline, the KL in the reward."""
    return reinforce(leave_one_out(r.scores - r.beta * total(k1(r).detach(), r), r), r)


def grpo(r: Rollouts) -> Tensor:
    """Group mean and std, mean over the tokens of each response, k3 in the loss."""
    advantages = (r.scores - group_mean(r.scores, r)) / (group_std(r.scores, r) + 1e-4)
    return mean(clipped(r, advantages[:, None]) + r.beta * k3(k1(r)), r).mean()


def dr_grpo(r: Rollouts) -> Tensor:
    """Group mean alone, a sum over tokens, no KL."""
    return total(clipped(r, (r.scores - group_mean(r.scores, r))[:, None]), r).mean()


def dr_grpo_kl(r: Rollouts) -> Tensor:
    """The same with the KL in the reward."""
    reward = r.scores - r.beta * total(r.old_logprobs - r.ref_logprobs, r)
    return total(clipped(r, (reward - group_mean(reward, r))[:, None]), r).mean()


def dapo(r: Rollouts) -> Tensor:
    """Group mean and std, mean over all tokens of the batch, the upper clip higher, no KL."""
    advantages = (r.scores - group_mean(r.scores, r)) / (group_std(r.scores, r) + 1e-4)
    return total(clipped(r, advantages[:, None], 0.2, 0.28), r).sum() / r.mask.sum()


def gspo(r: Rollouts) -> Tensor:
    """One ratio per response, the geometric mean of those of its tokens, no KL."""
    advantages = (r.scores - group_mean(r.scores, r)) / (group_std(r.scores, r) + 1e-4)
    ratio = mean(r.logprobs - r.old_logprobs, r).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages).mean()


def cispo(r: Rollouts) -> Tensor:
    """The clipped ratio as a constant weight of REINFORCE: every token keeps a gradient. No KL."""
    advantages = (r.scores - group_mean(r.scores, r)) / (group_std(r.scores, r) + 1e-4)
    weight = (r.logprobs - r.old_logprobs).exp().clamp(max=1.28).detach()
    return -total(weight * advantages[:, None] * r.logprobs, r).sum() / r.mask.sum()


def reinforce_pp(r: Rollouts) -> Tensor:
    """The KL in the reward of each token, rewards to go, normalised over the batch."""
    reward = r.scores[:, None] - r.beta * to_go(r.old_logprobs - r.ref_logprobs, r)  # (B, N)
    centre = (reward * r.mask).sum() / r.mask.sum()
    std = (((reward - centre).square() * r.mask).sum() / r.mask.sum()).sqrt()
    return total(clipped(r, (reward - centre) / (std + 1e-8)), r).sum() / r.mask.sum()


def unbiased_estimate(r: Rollouts) -> Tensor:
    """The ratio to the old policy times k3, of each token."""
    return total((r.logprobs - r.old_logprobs).exp() * k3(k1(r)), r)


def full_kl(r: Rollouts) -> Tensor:
    """KL(policy || reference) of each next token, summed over the vocabulary."""
    return total((r.all_logprobs.exp() * (r.all_logprobs - r.all_ref_logprobs)).sum(dim=-1), r)


def contrastive(r: Rollouts) -> Tensor:
    """Half the square of (difference of scores - beta * difference of log-ratios), over pairs."""
    regret = (r.scores - r.beta * total(k1(r), r)).view(-1, 2)
    return 0.5 * (regret[:, 0] - regret[:, 1]).square().mean()


def preference(r: Rollouts) -> tuple[Tensor, Tensor]:
    """For each pair: P(first preferred) by Bradley-Terry, and the difference of the log-ratios to the reference."""
    scores, ratio = r.scores.view(-1, 2), total(k1(r), r).view(-1, 2)
    return torch.sigmoid(scores[:, 0] - scores[:, 1]), ratio[:, 0] - ratio[:, 1]


def dpo(r: Rollouts) -> Tensor:
    """Cross-entropy of beta times the difference of log-ratios with the preference."""
    p, difference = preference(r)
    sigmoid = torch.nn.functional.logsigmoid
    return (-p * sigmoid(r.beta * difference) - (1 - p) * sigmoid(-r.beta * difference)).mean()


def ipo(r: Rollouts) -> Tensor:
    """Squared distance of the difference of log-ratios from 1 / (2 beta), in the direction of the preference."""
    p, difference = preference(r)
    target = 1 / (2 * r.beta) if r.beta else 0.0
    return (p * (difference - target).square() + (1 - p) * (-difference - target).square()).mean()


def best_of_two(r: Rollouts) -> Tensor:
    """Cross-entropy on the response of a pair with the higher score."""
    chosen = torch.nn.functional.one_hot(r.scores.view(-1, 2).argmax(dim=1), 2)
    return -(chosen * total(r.logprobs, r).view(-1, 2)).sum(dim=1).mean()


GRADIENT, OPTIMUM = "gradient of J", "another gradient, the optimum of J"
BIASED_KL, NEITHER = "KL term biased", "score term biased, no KL term"

VARIANTS = (
    Variant("REINFORCE, k1 in the reward", reward_with(lambda d: d), "arXiv:1909.08593, eq. 2", GRADIENT),
    Variant("PPO, sum over tokens", ppo, "arXiv:1707.06347, eq. 7; arXiv:2203.02155", GRADIENT, steps=4),
    Variant("PPO, mean over each response", lambda r: ppo(r, mean), "arXiv:2503.20783",
            OPTIMUM, steps=4),
    Variant("RLOO", rloo, "arXiv:2402.14740", GRADIENT, group_size=2),
    Variant("GRPO", grpo, "arXiv:2402.03300, eq. 3", "score term biased, KL term biased", "loss", 2, 4),
    Variant("Dr. GRPO", dr_grpo, "arXiv:2503.20783", "no KL term", "none", 2, 4),
    Variant("Dr. GRPO, k1 in the reward", dr_grpo_kl, "arXiv:2503.20783; arXiv:2510.01555", GRADIENT, "reward", 2, 4),
    Variant("DAPO", dapo, "arXiv:2503.14476", NEITHER, "none", 2, 4),
    Variant("GSPO", gspo, "arXiv:2507.18071", NEITHER, "none", 2, 4),
    Variant("CISPO", cispo, "arXiv:2506.13585", NEITHER, "none", 2, 4),
    Variant("REINFORCE++", reinforce_pp, "arXiv:2501.03262", "score term biased, KL term biased", "reward", 2, 4),
    Variant("contrastive policy gradient", contrastive, "arXiv:2406.19185", GRADIENT, "loss", 2),
    Variant("k1 in the loss", loss_with(lambda r: total(k1(r), r)), "allenai/open-instruct#534",
            "KL term without force", "loss"),
    Variant("k2 of the response in the loss", loss_with(lambda r: k2(total(k1(r), r))), "arXiv:2510.01555", GRADIENT,
            "loss"),
    Variant("k2 of each token in the loss", loss_with(lambda r: total(k2(k1(r)), r)), "arXiv:2510.01555", BIASED_KL,
            "loss"),
    Variant("k3 of the response in the loss", loss_with(lambda r: k3(total(k1(r), r))), "arXiv:2506.09477",
            "KL term is KL(reference || policy)", "loss"),
    Variant("k3 of each token in the loss", loss_with(lambda r: total(k3(k1(r)), r)), "arXiv:2402.03300, eq. 4",
            BIASED_KL, "loss"),
    Variant("ratio times k3 in the loss", loss_with(unbiased_estimate), "verl-project/verl#2953", BIASED_KL, "loss"),
    Variant("KL over the vocabulary in the loss", loss_with(full_kl), "arXiv:2510.01555", BIASED_KL, "loss"),
    Variant("k2 in the reward", reward_with(k2), "verl, kl_penalty=mse", BIASED_KL),
    Variant("k3 in the reward", reward_with(k3), "huggingface/trl#3240; arXiv:2512.21852", BIASED_KL),
    Variant("|k1| in the reward", reward_with(torch.abs), "verl, kl_penalty=abs", BIASED_KL),
    Variant("reversed log-ratio in the reward", reward_with(torch.neg), "Unakar/Logic-RL#58",
            "KL term pushes away from the reference"),
    Variant("k1 in the reward, not detached", undetached, "commonly written", BIASED_KL),
    Variant("k1 in the reward of its own token alone", without_future, "commonly written", BIASED_KL),
    Variant("k1 in the reward and k2 in the loss", lambda r: reward_with(lambda d: d)(r) + r.beta * k2(
            total(k1(r), r)).mean(), "commonly written", "KL term has 2.00 times its weight"),
    Variant("the better of two, cross-entropy", best_of_two, "arXiv:2304.06767", NEITHER, "none", 2),
    Variant("DPO, pairs of the reference", dpo, "arXiv:2305.18290, eq. 7", OPTIMUM, "loss", 2, sampler="reference"),
    Variant("IPO, pairs of the reference", ipo, "arXiv:2310.12036, eq. 17", "another optimum", "loss", 2,
            sampler="reference"),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- command line


def frontier(n: int = 60) -> list[tuple[float, float]]:
    """(KL, E[r]) of the best policies for n values of beta: no policy has a higher score at the same KL."""
    points, ref = [], response_logprobs(LANGUAGE.reference)
    for beta in torch.logspace(2, -1.5, n).tolist():
        best = (ref + LANGUAGE.scores / beta).log_softmax(dim=1)  # (P, A)
        kl = (best.exp() * (best - ref)).sum() / P
        points.append((kl.item(), ((best.exp() * LANGUAGE.scores).sum() / P).item()))
    return points


def table(reports: Sequence[Report]) -> str:
    """The measures as lines of text."""
    lines = [
        f"{'loss':40} {'cosine':>8} {'KL force':>8} {'gap':>6}  {'cosine, batch of 16':>20}  verdict",
        *(
            f"{r.variant.name:40} {r.cosine:8.4f} {r.kl_force:8.2f} {r.gap_closed:6.1%}  "
            f"{r.batch_cosine:10.3f} +- {3 * r.batch_cosine_error:.3f}  {r.verdict}"
            for r in reports
        ),
    ]
    return "\n".join(lines)


def as_json(reports: Sequence[Report]) -> str:
    """The measures as JSON, one object per loss; nan becomes null."""
    rows = []
    for report in reports:
        numbers = {name: None if x != x else x for name, x in vars(report).items() if name != "variant"}
        v = report.variant
        rows.append({"name": v.name, "source": v.source, "kl": v.kl, "group_size": v.group_size, **numbers})
    return json.dumps(rows, indent=1) + "\n"


def load(path: str) -> Variant:
    """The loss in a Python file, which also may set KL, GROUP_SIZE and STEPS.

    Raises ValueError if it has none, or one of these is not a possible value.
    """
    spec = importlib.util.spec_from_file_location("conformance_adapter", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}.") from None
    loss, kl = getattr(module, "loss", None), getattr(module, "KL", "reward")
    size, steps = getattr(module, "GROUP_SIZE", 1), getattr(module, "STEPS", 1)
    if not callable(loss):
        raise ValueError(f"{path} defines no function loss(rollouts).")
    if kl not in ("reward", "loss", "none"):
        raise ValueError(f'{path}: KL is {kl!r}, and must be "reward", "loss" or "none".')
    if not all(isinstance(n, int) and n >= 1 for n in (size, steps)):
        raise ValueError(f"{path}: GROUP_SIZE {size!r} and STEPS {steps!r} must be whole numbers from 1 on.")
    return Variant(path, loss, path, kl=kl, group_size=size, steps=steps)


def main(arguments: Sequence[str]) -> int:
    """Test the loss in a file, or every published variant; the exit status."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0 if arguments[0].startswith("-") else 2
    try:
        if arguments:
            print(describe(measure(load(arguments[0]))))
        else:
            print(table([measure(variant) for variant in VARIANTS]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def describe(r: Report) -> str:
    """The measures of one loss, in words, and the mistakes that the test would have seen in it."""
    sampled = f" +- {3 * r.cosine_error:.4f}, sampled" if r.cosine_error else ", exact"
    return "\n".join([
        table([r]), "",
        f"cosine of the expected gradient with the gradient of J: {r.cosine:.6f}{sampled}",
        f"  of its score part with the gradient of E[r]:          {r.reward_cosine:.6f}",
        f"  of its KL part with that of -KL(policy || reference): {r.kl_cosine:.6f}",
        f"  of its KL part with that of -KL(reference || policy): {r.kl_reverse_cosine:.6f}",
        f"weight of the KL over beta: {r.kl_force:.4f} to {r.kl_force_high:.4f}",
        f"share of the gap to J* that it closes: {r.gap_closed:.2%}, at E[r] {r.score:.3f} and KL {r.kl:.3f} nats",
        "", "Mistakes in what the loss is given, and whether its gradient shows them:",
        *(f"  {seen:10} {name}" for name, seen in seen_mistakes(r.variant).items()),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
