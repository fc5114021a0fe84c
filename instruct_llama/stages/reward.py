"""Stage 3, reward modelling: train a language model with a scalar head on ranked completions.

As in InstructGPT (arXiv:2203.02155, section 3.5), one forward pass gives all K(K-1)/2 pairs of a prompt's completions.
They also share one row: the prompt is read once, and each completion attends to it and to itself. Comparisons of SFT
samples bring the training data closer to PPO's responses. Two auxiliary losses, off by default, help a small model:
see `reward_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import seeds
from ..config import PPOConfig, QuantConfig, RewardConfig, Settings, check
from ..data.batching import RankedBatch, fit_comparison, fit_prompt, ranked_batch, row_length
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.llama import Llama, ScalarLlama
from ..rlhf import rollout
from ..rlhf.losses import (
    pair_differences,
    pair_wins,
    pool_last_token,
    ranked_pairs,
    ranking_loss,
    response_mean,
    token_logprobs,
)
from ..rlhf.rollout import Rollouts, completion_scores
from ..training import checkpoint, distributed, memory
from ..training.device import autocast, pick_device
from ..training.loop import TrainJob, fit, load_options, with_gradient_checkpointing
from ..training.optim import freeze_first
from ..training.run_log import RunLog, StageResult, Watch
from ..worlds import tinychat
from . import records
from .start import base_to_adapt, training_folder

Ranked = list[list[int]]  # token ids of a prompt with each completion, best first


def reward_loss(
    model: ScalarLlama, batch: RankedBatch, config: RewardConfig
) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """The training loss summed over prompts, and the metrics to log, summed over prompts.

    The loss is the ranking loss of the scores at the end tokens plus two auxiliary losses: `token_coef` times
    `token_loss` and `lm_coef` times `lm_loss`. The auxiliary losses do not change how a response is scored. The logged
    "loss" excludes them, so it is comparable with the validation loss.
    """
    hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids)  # (P, T, D)
    per_token = model.head(hidden)  # (P, T)
    scores = pool_last_token(per_token[batch.prompt], batch.last_positions)  # (N,)
    loss = ranking_loss(scores, batch.prompt, batch.rank) * batch.weight
    differences, weights = pair_differences(scores.detach(), batch.prompt, batch.rank)
    logged = {"accuracy": float((weights * pair_wins(differences)).sum()), "loss": float(loss.detach())}
    if config.token_coef > 0:
        extra = token_loss(per_token, batch)
        loss, logged["token_loss"] = loss + config.token_coef * extra, float(extra.detach())
    if config.lm_coef > 0:
        extra = lm_loss(model, hidden, batch)
        loss, logged["lm_loss"] = loss + config.lm_coef * extra, float(extra.detach())
    return loss, logged


def token_loss(per_token: torch.Tensor, batch: RankedBatch) -> torch.Tensor:
    """Ranking loss, summed over prompts, of the mean of per_token (P, T) over each completion's own tokens: a scalar.

    The shared prefix is excluded. Every own token gets a gradient, also the one that makes a completion wrong. A
    verifier trained to predict a value at every token does better than one at the last token only (Cobbe et al.,
    arXiv:2110.14168, section 4.3).
    """
    own = batch.segment_ids[batch.prompt] == batch.rank[:, None] + 1  # (N, T)
    return ranking_loss(response_mean(per_token[batch.prompt], own), batch.prompt, batch.rank) * batch.weight


def lm_loss(model: ScalarLlama, hidden: torch.Tensor, batch: RankedBatch) -> torch.Tensor:
    """Mean negative log-likelihood per token of each best completion, summed over prompts: a scalar, in nats.

    hidden (P, T, D). The completion's first own token is not counted. The loss regularises the hidden states, so that
    they still generate text (Yang et al., arXiv:2406.10216, section 3.2). The logits come from the token embeddings,
    which must be tied: `run` checks it.
    """
    best = (batch.segment_ids[:, 1:] == 1) & (batch.segment_ids[:, :-1] == 1)  # (P, T-1)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden[:, :-1][best].float() @ model.tok_embeddings.weight.float().T  # (tokens of best answers, V)
    surprise = torch.zeros(best.shape, device=hidden.device)  # (P, T-1)
    surprise[best] = -token_logprobs(logits, batch.tokens[:, 1:][best])
    return response_mean(surprise, best).sum()


def reward_metrics(model: ScalarLlama, batches: Sequence[RankedBatch], precision: str = "fp32") -> dict[str, float]:
    """Loss per prompt, pair accuracy, and mean and standard deviation of chosen and rejected scores."""
    device = next(model.parameters()).device
    chosen, rejected, loss, prompts = [], [], 0.0, 0
    for batch in batches:
        batch = batch.to(device)
        with torch.no_grad(), autocast(precision, device):
            scores = completion_scores(model, batch)  # (N,)
        loss += float(ranking_loss(scores, batch.prompt, batch.rank)) * batch.weight
        prompts += batch.weight
        better, worse = ranked_pairs(batch.prompt, batch.rank)  # (P,) each
        chosen.append(scores[better])
        rejected.append(scores[worse])
    good, bad = torch.cat(chosen), torch.cat(rejected)
    return {
        "loss": loss / max(1, prompts),
        "accuracy": float(pair_wins(good - bad).mean()),
        "pairs": float(len(good)),
        "chosen_mean": float(good.mean()),
        "chosen_std": float(good.std(correction=0)),
        "rejected_mean": float(bad.mean()),
        "rejected_std": float(bad.std(correction=0)),
        "gap": float((good - bad).mean()),
    }


def sample_comparisons(
    policy: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], config: RewardConfig, temperature: float, seed: int,
    ppo: PPOConfig,
) -> list[dict[str, Any]]:  # fmt: skip
    """Responses of the SFT model, ranked by the noisy labeller, without duplicates or responses without an end token.

    They are sampled with PPO's settings `ppo`; `temperature` is the labeller's.
    """
    generator = seeds.generator(next(policy.parameters()).device, seed, "sft_samples")
    labeller, made = seeds.python_random(seed, "labeller"), []
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts for _ in range(config.responses_per_prompt)]
    rollouts = rollout.sample_responses(policy, encoded, ppo.sampling, tokenizer, generator, ppo.generation_batch_size)
    texts = [tokenizer.decode(ids) for ids in rollouts.response_ids()]
    for i, prompt in enumerate(prompts):
        mine = range(i * config.responses_per_prompt, (i + 1) * config.responses_per_prompt)
        answers = list(dict.fromkeys(texts[j] for j in mine if rollouts.has_eos[j]))
        if len(answers) >= 2:
            ranked = tinychat.rank(prompt, answers, temperature, labeller)
            rewards = [tinychat.true_reward(prompt, text).total for text in ranked]
            utilities = [tinychat.utility(prompt, text) for text in ranked]
            made.append({"prompt": prompt, "completions": ranked, "rewards": rewards, "utilities": utilities})
    return made


def encode(tokenizer: Tokenizer, comparisons: Sequence[Any], seq_len: int) -> list[Ranked]:
    """Token ids of the comparisons that fit. Raises `UserError` when none does."""
    fitted = [fit_comparison(tokenizer, c["prompt"], c["completions"], seq_len) for c in comparisons]
    kept = [item for item in fitted if item is not None]
    records.check_fitting(len(kept), len(fitted), "reward", seq_len)
    return kept


def reference_responses(
    policy: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], config: RewardConfig, seed: int, ppo: PPOConfig
) -> Rollouts:
    """The reference policy's responses to the first prompts, sampled as in PPO, to fit the score normaliser on."""
    generator = seeds.generator(next(policy.parameters()).device, seed, "reference_responses")
    room = rollout.max_prompt_length(policy.config.max_seq_len, ppo)
    encoded = [fit_prompt(tokenizer, prompt, room) for prompt in prompts]
    encoded = [ids for ids in encoded if ids is not None][: config.normalise_samples]
    check(bool(encoded), f"No prompt leaves room for ppo.max_new_tokens {ppo.max_new_tokens}: lower it.")
    return rollout.sample_responses(policy, encoded, ppo.sampling, tokenizer, generator, ppo.generation_batch_size)


@torch.no_grad()
def fit_normaliser(model: ScalarLlama, rollouts: Rollouts, size: int = 256) -> dict[str, float]:
    """Mean and standard deviation of the raw scores of the reference responses (P21), computed `size` at a time.

    Responses without an end token are excluded, since PPO gives them a fixed score; if none has one, all are included.
    """
    counted = rollouts.has_eos if bool(rollouts.has_eos.any()) else torch.ones_like(rollouts.has_eos)  # (B,)
    rows = counted.nonzero()[:, 0].tolist()
    parts = [rollouts.select(rows[i : i + size]) for i in range(0, len(rows), size)]
    scores = torch.cat([rollout.end_token_scores(model, part) for part in parts])  # (B,)
    return {"mean": float(scores.mean()), "scale": max(1e-3, float(scores.std(correction=0)))}


def prepare(base: Path, settings: Settings) -> ScalarLlama:
    """A model with a scalar head on the base's hidden states; with LoRA, only the adapter and the head are trained.

    If the base is itself an adapter run, the new adapter uses the same base weights and is initialised from that one.
    """
    config, device = settings.reward, pick_device(settings.device)
    folder, started = base_to_adapt(base, "reward", config.lora, config.quant)
    model = checkpoint.load_scalar(folder, device, **load_options(config.lora, config.quant, config.loop.precision))
    with_gradient_checkpointing(model, settings)
    if config.lora.rank:
        lora.add_adapter(model, "reward", config.lora, seeds.generator("cpu", settings.seed, "adapter", "reward"))
        lora.use_adapter(model, "reward")
        model.value_head.float().weight.requires_grad_(True)
    if started:
        lora.load_adapter(model, "reward", started[1])
    freeze_first(model, config.freeze_layers)
    return model


def comparison_records(settings: Settings, policy: Llama, tokenizer: Tokenizer) -> tuple[list[Any], list[Any]]:
    """Training and held-out comparisons; of tinychat, a share of the training ones is sampled from the SFT model."""
    config, temperature = settings.reward, settings.world.temperature
    train, valid = records.comparisons(settings)
    if not settings.data and config.sample_share > 0:
        n_sampled = round(len(train) * config.sample_share)
        # a separate random stream; some of its training prompts are PPO's too
        prompts = tinychat.prompts(seeds.derive(settings.seed, "sft_sample_prompts"), n_sampled, split="train")
        own = sample_comparisons(policy, tokenizer, prompts, config, temperature, settings.seed, settings.ppo)
        own = distributed.broadcast_from_main(own)  # the same records in all processes, despite rounding on their GPUs
        train = [*train[: len(train) - n_sampled], *own]
    return train, valid


def run(settings: Settings, inputs: Sequence[Path], watch: Watch | None = None) -> StageResult:
    """Train a reward model from the first of `inputs`; the last is the SFT model that PPO will start from."""
    config = settings.reward
    folder, device = training_folder("reward", settings), pick_device(settings.device)
    base, sft = inputs[0], inputs[-1]  # the model to start from, and the model whose responses are ranked
    settings = records.with_data(settings, config.data)
    check(
        config.lm_coef == 0 or checkpoint.shape_of(base).tie_embeddings,
        f"{base} has an untied output layer, which a reward model drops: set reward.lm_coef to 0.",
    )
    memory.check_room(settings, "reward", str(device), checkpoint.shape_of(base), distributed.world_size())
    log = RunLog(folder, settings, "reward", inputs, watch)
    how = load_options(config.lora, config.quant, config.loop.precision)
    checkpoint.check_kind(sft, "lm")
    quant = QuantConfig() if "adapter" in checkpoint.read_info(sft) else config.quant  # an adapter run stores its own
    policy, tokenizer = checkpoint.load(sft, device, quant=quant, dtype=how["dtype"])
    with autocast(config.loop.precision, device):
        found = comparison_records(settings, policy, tokenizer)
        train, valid = (encode(tokenizer, part, config.seq_len) for part in found)
        prompts = records.prompts(settings)[0]
        reference = reference_responses(policy, tokenizer, prompts, config, settings.seed, settings.ppo)
    del policy  # frees its memory for training
    model, size = prepare(base, settings), config.loop.batch_size
    valid = valid[: config.loop.eval_batches * size]
    valid_batches = [ranked_batch(valid[i : i + size], tokenizer.pad_id) for i in range(0, len(valid), size)]

    def batch(epoch: int, indices: Sequence[int]) -> RankedBatch:
        return ranked_batch([train[i] for i in indices], tokenizer.pad_id)

    def sample_scores() -> list[dict[str, Any]]:
        item = ranked_batch(valid[:3], tokenizer.pad_id).to(device)
        scores = completion_scores(model, item).tolist()
        ids = [sequence for ranked in valid[:3] for sequence in ranked]
        return [
            {"text": tokenizer.decode(i), "score": s, "rank": int(r)}
            for i, s, r in zip(ids, scores, item.rank, strict=True)
        ]

    def save(best: dict[str, float]) -> None:
        with distributed.unsharded(model), autocast(config.loop.precision, device):
            norm = fit_normaliser(model, reference, 16 * size)
        info = {"stage": "reward", "seed": settings.seed, "best": best, "reward": norm, **checkpoint.origin(base)}
        if config.lora.rank:
            lora_info = {"lora": vars(config.lora), "quant": vars(config.quant)}
            under, _ = checkpoint.base_of(base)
            checkpoint.save_adapter(folder, model, "reward", under, tokenizer, {**info, **lora_info})
        else:
            checkpoint.save_full(folder, model, tokenizer, info)

    stage = TrainJob(
        "reward", model, config.optim, config.loop, len(train), [row_length(item) for item in train], batch,
        lambda model, batch: reward_loss(model, batch, config),
        lambda: reward_metrics(model, valid_batches, config.loop.precision), sample_scores, save,
        config.bucket_steps,
    )  # fmt: skip
    return fit(stage, log, settings)
