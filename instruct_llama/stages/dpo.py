"""Preference optimisation without RL: DPO, IPO or KTO on the comparisons that a reward model would be trained on.

The losses are in `rlhf.preference`. The reference is the model that the run starts from: with adapters, the same model
with its adapter switched off; else its log-probabilities are computed once, before training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import seeds
from ..config import DPOConfig, Settings, check
from ..data.batching import epoch_order, fit_completions
from ..data.completions import Preference, PreferenceBatch, completion_row_length, preference_batch
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.llama import Llama
from ..model.sampling import eval_mode, generate
from ..rlhf.losses import response_mean, response_sum
from ..rlhf.preference import completion_logprobs, label_rewards, listed_mass, preference_loss, response_logprobs
from ..training import checkpoint, distributed, memory
from ..training.device import autocast, pick_device
from ..training.loop import TrainJob, fit, load_options, with_gradient_checkpointing
from ..training.optim import freeze_first
from ..training.run_log import RunLog, StageResult, Watch
from ..worlds import tinychat
from . import records, reward, sft
from .start import base_to_adapt, training_folder

REFERENCE = "reference"  # the name of the adapter that the run starts from, if there is one


def encode(tokenizer: Tokenizer, found: Sequence[Any], config: DPOConfig) -> list[Preference]:
    """Token ids of the comparisons, and of single labelled responses, that fit `dpo.seq_len`.

    Of K ranked responses the first K // 2 are desirable and the last K // 2 undesirable. Raises `UserError` when
    nothing fits, or when the loss needs pairs and there are none.
    """
    kept = []
    for record in found:
        fitted = fit_completions(tokenizer, record["prompt"], record["completions"], config.seq_len)
        if fitted is not None:
            k = len(record["completions"])
            ranked = [1] * (k // 2) + [0] * (k % 2) + [-1] * (k // 2)
            labels = record.get("labels", ranked)
            ranks = list(range(k)) if k > 1 else [0 if labels[0] > 0 else 1]
            kept.append(Preference(*fitted, ranks, labels))
    records.check_fitting(len(kept), len(found), "dpo", config.seq_len)
    paired = all(len(item.responses) > 1 for item in kept)
    check(paired or config.loss == "kto", f"dpo.loss {config.loss} needs pairs of responses, and these records hold "
          "single labelled ones: choose dpo.loss kto.")  # fmt: skip
    return kept


def with_mismatched(items: Sequence[Preference], seed: int) -> list[Preference]:
    """The items with a response to another prompt each, drawn once, for KTO's estimate of the KL."""
    check(len(items) > 1, "KTO needs at least two records, to pair a prompt with another one's response: give more.")
    order = [int(i) for i in epoch_order(len(items), seed, 0, "mismatched")]
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [replace(item, mismatched=items[following[i]].responses[0]) for i, item in enumerate(items)]


def prepare(base: Path, settings: Settings) -> tuple[Llama, Tokenizer]:
    """The model to train: all weights, all but the first layers, or an adapter (on a 4-bit base).

    If the base is itself an adapter run, the new adapter starts from that one, which stays as the reference.
    """
    config, device = settings.dpo, pick_device(settings.device)
    folder, started = base_to_adapt(base, "dpo", config.lora, config.quant)
    how = load_options(config.lora, config.quant, config.loop.precision)
    model, tokenizer = checkpoint.load_full(folder, device, **how)
    with_gradient_checkpointing(model, settings)
    for name in ([REFERENCE, "dpo"] if started else ["dpo"]) if config.lora.rank else []:
        lora.add_adapter(model, name, config.lora, seeds.generator("cpu", settings.seed, "adapter", name))
        if started:
            lora.load_adapter(model, name, started[1])
        for matrix in lora.adapter_parameters(model, name):
            matrix.requires_grad_(name != REFERENCE)
        lora.use_adapter(model, name)  # the last one is trained
    freeze_first(model, config.freeze_layers)
    return model, tokenizer


@contextmanager
def as_reference(model: Llama) -> Iterator[Llama]:
    """Inside, a model with adapters is the reference: without its trained adapter, without gradients or dropout."""
    name = REFERENCE if REFERENCE in lora.adapter_names(model) else None
    with lora.adapter(model, name), eval_mode(model), torch.no_grad():
        yield model


@torch.no_grad()
def reference_logprobs(
    model: Llama, items: Sequence[Preference], pad_id: int, config: DPOConfig
) -> list[Tensor]:  # fmt: skip
    """The log-probabilities of each item's responses under the model as it is: a tensor (responses,) an item."""
    device, size = next(model.parameters()).device, config.loop.batch_size
    order = sorted(range(len(items)), key=lambda i: completion_row_length(items[i].completions))  # reduces padding
    found: dict[int, list[Tensor]] = {}
    starts = range(0, len(order), size)
    with eval_mode(model):
        for number, start in distributed.shard_iter(starts):
            batch = preference_batch([items[i] for i in order[start : start + size]], pad_id)
            logprobs = response_logprobs(model, batch.to(device), config.average_logprobs).cpu()  # (N,)
            found[number] = list(logprobs.split(batch.prompt.bincount().tolist()))
    parts = [part for parts in distributed.all_gather_dict(found).values() for part in parts]
    return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]


@torch.no_grad()
def preference_metrics(
    model: Llama, batches: Sequence[PreferenceBatch], config: DPOConfig
) -> dict[str, float]:  # fmt: skip
    """Loss, implicit rewards and log-probabilities per prompt; of comparisons, where the probability mass is."""
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    labelled: dict[str, list[float]] = {}
    for batch in batches:
        batch = with_reference(model, batch.to(device), config)
        each = completion_logprobs(model, batch)  # (N, L)
        whole = response_sum(each, batch.response_mask)  # (N,)
        logprobs = response_mean(each, batch.response_mask) if config.average_logprobs else whole  # (N,)
        loss, parts = preference_loss(logprobs, batch, config)
        parts["loss"] = float(loss)
        if "rewards/accuracies" in parts:
            parts |= listed_mass(whole, batch)
        else:
            for key, (total, n) in label_rewards(logprobs - batch.ref_logprobs, batch, config.beta).items():
                labelled[key] = [a + b for a, b in zip(labelled.get(key, [0.0, 0.0]), (total, n), strict=True)]
        sums = {key: sums.get(key, 0.0) + value for key, value in parts.items()}
    prompts = max(1, sum(batch.weight for batch in batches))
    means = {key: total / max(1.0, n) for key, (total, n) in labelled.items()}
    return {key: value / prompts for key, value in sums.items()} | means


@dataclass(frozen=True)
class PreferenceData:
    """The items of both splits, and their reference log-probabilities where those were computed before training."""

    items: dict[str, list[Preference]]  # "train" and "valid"
    ref_logprobs: dict[str, list[Tensor]]  # by split, a tensor (responses,) an item; empty with adapters
    pad_id: int

    def batch(self, split: str, indices: Sequence[int]) -> PreferenceBatch:
        """A batch of the items with these indices."""
        batch = preference_batch([self.items[split][i] for i in indices], self.pad_id)
        known = [self.ref_logprobs[split][i] for i in indices] if self.ref_logprobs else []
        return replace(batch, ref_logprobs=torch.cat(known)) if known else batch


def load_data(settings: Settings, model: Llama, tokenizer: Tokenizer) -> PreferenceData:
    """The comparisons of a file, or those that the reward model is trained on; `model` has not been trained yet."""
    config, pad_id = settings.dpo, tokenizer.pad_id
    with as_reference(model):
        found = (
            records.preferences(settings) if settings.data else reward.comparison_records(settings, model, tokenizer)
        )
    items = {name: encode(tokenizer, part, config) for name, part in zip(("train", "valid"), found, strict=True)}
    loop = config.loop
    items["valid"] = items["valid"][: loop.eval_batches * loop.batch_size]
    if loop.steps:  # records that the run does not reach need no reference log-probabilities
        items["train"] = items["train"][: loop.steps * loop.batch_size * loop.gradient_accumulation_steps]
    if config.loss == "kto":
        items = {name: with_mismatched(part, settings.seed) for name, part in items.items()}
    known = {}
    if not config.lora.rank:
        known = {name: reference_logprobs(model, part, pad_id, config) for name, part in items.items()}
    return PreferenceData(items, known, pad_id)


def with_reference(model: Llama, batch: PreferenceBatch, config: DPOConfig) -> PreferenceBatch:
    """The batch with the reference's log-probabilities, computed now unless it has them."""
    if batch.ref_logprobs is not None:
        return batch
    with as_reference(model):
        return replace(batch, ref_logprobs=response_logprobs(model, batch, config.average_logprobs))


def run(settings: Settings, inputs: Sequence[Path], watch: Watch | None = None) -> StageResult:
    """Train the model in the first of `inputs` on comparisons."""
    config, seed = settings.dpo, settings.seed
    folder, device = training_folder("dpo", settings), pick_device(settings.device)
    (base,) = inputs
    settings = records.with_data(settings, config.data)
    memory.check_room(settings, "dpo", str(device), checkpoint.shape_of(base), distributed.world_size())
    log = RunLog(folder, settings, "dpo", inputs, watch)
    model, tokenizer = prepare(base, settings)
    with autocast(config.loop.precision, device):
        data = load_data(settings, model, tokenizer)
    size, n_valid = config.loop.batch_size, len(data.items["valid"])
    batches = [data.batch("valid", range(i, min(i + size, n_valid))) for i in range(0, n_valid, size)]
    asked = records.prompts(settings)[1][: config.eval_prompts] if not settings.data else []
    shown = sft.prompts_to_show(settings, tokenizer, room=model.config.max_seq_len - 48)

    def loss(model: Llama, batch: PreferenceBatch) -> tuple[Tensor, dict[str, float]]:
        batch = with_reference(model, batch, config)
        logprobs = response_logprobs(model, batch, config.average_logprobs)  # (N,)
        return preference_loss(logprobs, batch, config, distributed.all_reduce_sum)

    def validate() -> dict[str, float]:
        metrics = preference_metrics(model, batches, config)
        return metrics | sampled_reward(model, tokenizer, asked, settings.ppo.max_new_tokens)

    def sample_responses() -> list[dict[str, Any]]:
        texts = generate(model, tokenizer, shown, max_new_tokens=48, seed=seed, keys=("dpo_texts",))
        return [{"prompt": p, "response": a} for p, a in zip(shown, texts, strict=True)]

    def save(best: dict[str, float]) -> None:
        info = {"stage": "dpo", "seed": seed, "best": best, **checkpoint.origin(base)}
        if config.lora.rank:
            info |= {"lora": vars(config.lora), "quant": vars(config.quant)}
            checkpoint.save_adapter(folder, model, "dpo", checkpoint.base_of(base)[0], tokenizer, info)
        else:
            checkpoint.save_full(folder, model, tokenizer, info)

    train = data.items["train"]
    lengths = [completion_row_length(item.completions) for item in train]
    stage = TrainJob(
        "dpo", model, config.optim, config.loop, len(train), lengths,
        lambda epoch, indices: data.batch("train", indices), loss, validate, sample_responses, save,
        config.bucket_steps,
    )  # fmt: skip
    return fit(stage, log, settings)


def sampled_reward(model: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], max_new_tokens: int) -> dict[str, float]:
    """The mean true reward of a response to each prompt at temperature 1, from a fixed seed; empty without prompts."""
    if not prompts:
        return {}
    texts = generate(model, tokenizer, prompts, max_new_tokens, temperature=1.0, keys=("dpo_validation",))
    rewards = [tinychat.true_reward(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]
    return {"true_reward": float(np.mean(rewards))}
