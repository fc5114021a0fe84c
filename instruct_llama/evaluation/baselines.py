"""Baselines for a policy, and the reward model's accuracy on responses of known kinds.

The baselines: the pretrained model prompted with prose as in its corpus, and best-of-n sampling by the reward model.
Also here: reward-model scores and log-probabilities of responses, for the scores and the KL of a policy's samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import torch

from .. import seeds
from ..config import EvaluateConfig, SamplingConfig, check
from ..data.batching import dialog_batch, ranked_batch
from ..data.tokenizer import Tokenizer
from ..model.llama import Llama, ScalarLlama
from ..model.sampling import filter_logits, generate_ids, sample_ids
from ..rlhf.losses import response_sum, token_logprobs
from ..rlhf.rollout import completion_scores
from ..worlds import tinychat
from ..worlds.tinychat.corpus import FRAMES
from ..worlds.tinychat.skills import Prompt, as_messages
from .statistics import accuracy_estimate, win

PROSE_FRAME = FRAMES[1]  # prompt format for a model that has never seen a chat


def as_prose(prompt: Prompt) -> str:
    """A prompt as prose, in the format of conversations in the corpus, up to where the response starts."""
    turns = [turn["content"] for turn in as_messages(prompt)] + [""]
    lines = [PROSE_FRAME.format(q=q, a=a) for q, a in zip(turns[::2], turns[1::2], strict=True)]
    return " ".join(lines).rstrip()


def prose_responses(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: EvaluateConfig, seed: int = 0
) -> list[str]:
    """A pretrained model's response to each prompt given as prose, up to the end of the document, line or turn.

    Where the model continues with a next question, the response ends before it.
    """
    generator = seeds.generator(model.tok_embeddings.weight.device, seed, "prose")
    ends, starts = (tokenizer.eos_id, tokenizer.encode("\n")[-1]), [tokenizer.encode(as_prose(p)) for p in prompts]
    sampling = SamplingConfig(config.max_new_tokens, config.temperature)
    sampled = sample_ids(model, starts, sampling, tokenizer, generator, config.batch_size, ends)
    texts = [tokenizer.decode(ids) for ids in sampled]
    next_turn = PROSE_FRAME.partition("{q}")[0].strip()
    return [text.partition(next_turn)[0].rstrip() for text in texts]


@torch.no_grad()
def raw_scores(
    reward_model: ScalarLlama, pad_id: int, items: Sequence[Sequence[Sequence[int]]], batch_size: int = 64
) -> list[list[float]]:
    """The raw reward-model score of every sequence, read at its last token (P19).

    `items` holds for each prompt its ids followed by those of each of its responses. About `batch_size` sequences are
    scored per forward pass.
    """
    most = max((len(sequences) for sequences in items), default=1)
    prompts, device, found = max(1, batch_size // most), next(reward_model.parameters()).device, []
    for start in range(0, len(items), prompts):
        part = items[start : start + prompts]
        scores = iter(completion_scores(reward_model, ranked_batch(part, pad_id).to(device)).tolist())
        found += [[next(scores) for _ in sequences] for sequences in part]
    return found


@torch.no_grad()
def response_logprobs(
    policy: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]],
    batch_size: int = 64,
) -> list[float]:  # fmt: skip
    """Log-probability in nats of each response's token ids at temperature 1, summed over its tokens."""
    asked = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    rows = [([*p, *r], [False] * len(p) + [True] * len(r)) for p, r in zip(asked, responses, strict=True)]
    device, found = next(policy.parameters()).device, []
    for start in range(0, len(rows), batch_size):
        batch = dialog_batch(rows[start : start + batch_size], tokenizer.pad_id).to(device)
        logprobs = filter_logits(policy(batch.tokens), suppress_tokens=tokenizer.suppress_tokens)  # (B, T, V)
        targets = torch.where(batch.loss_mask, batch.targets, tokenizer.eos_id)  # not a pad: its -inf * 0 is NaN
        found += response_sum(token_logprobs(logprobs, targets), batch.loss_mask).tolist()
    return found


def best_of(
    policy: Llama, tokenizer: Tokenizer, reward_model: ScalarLlama, prompts: Sequence[Prompt], n: int,
    config: EvaluateConfig, seed: int = 0,
) -> list[str]:  # fmt: skip
    """For each prompt, the best of n responses sampled at temperature 1, by reward-model score.

    A response without an end token has no score: one is returned only where no response has an end token.
    """
    check(n >= 1, f"best_of takes the best of {n} responses: ask for at least 1.")
    repeated, sampling = [prompt for prompt in prompts for _ in range(n)], SamplingConfig(config.max_new_tokens)
    sampled = generate_ids(policy, tokenizer, repeated, sampling, seed, config.batch_size, keys=("best_of",))
    groups = [sampled[i : i + n] for i in range(0, len(sampled), n)]
    # Equal responses are scored once; order is kept, so the first sampled one wins a tie.
    ended = [list(dict.fromkeys(tuple(ids) for ids in group if ids[-1] == tokenizer.eos_id)) for group in groups]
    scored = [i for i, responses in enumerate(ended) if responses]
    items = [[(*tokenizer.encode_prompt(prompts[i]), *response) for response in ended[i]] for i in scored]
    chosen = [group[0] for group in groups]
    for i, scores in zip(scored, raw_scores(reward_model, tokenizer.pad_id, items, config.batch_size), strict=True):
        chosen[i] = ended[i][scores.index(max(scores))]
    return [tokenizer.decode(ids) for ids in chosen]


def best_of_kl_bound(n: int) -> float:
    """An upper bound, in nats, on the KL divergence of best-of-n from the policy it samples (arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n


def kind_accuracy(
    reward_model: ScalarLlama, tokenizer: Tokenizer, prompts: Sequence[Prompt], seed: int = 0, batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """For each faulty kind of response, the share of prompts on which the ideal response scores higher (P45).

    {kind: {mean, low, high, n, ceiling}}, with Wilson's interval; equal scores count one half. The ceiling is the share
    of a model that equals the labeller's utility. All kinds of a prompt are drawn with equal random numbers, so a rude
    response contains the words of the ideal one and differs in its kind only.
    """
    faulty, items, utilities = tinychat.KINDS[1:], [], []
    for number, prompt in enumerate(prompts):
        texts = [tinychat.answer(prompt, kind, seeds.python_random(seed, "kinds", number)) for kind in tinychat.KINDS]
        utilities.append([tinychat.utility(prompt, text) for text in texts])
        endings = [[*tokenizer.encode(tokenizer.chat.closed(text)), tokenizer.eos_id] for text in texts]
        items.append([[*tokenizer.encode_prompt(prompt), *ending] for ending in endings])
    scores, found = raw_scores(reward_model, tokenizer.pad_id, items, batch_size), {}
    for column, kind in enumerate(faulty, 1):
        share, best = (
            sum(win(row[0], row[column]) for row in table) / len(prompts) for table in (scores, utilities)
        )  # fmt: skip
        found[kind] = {**asdict(accuracy_estimate(share * len(prompts), len(prompts))), "ceiling": best}
    return found
