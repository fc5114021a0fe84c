"""Stage 1, pretraining: predict the next token of running text, from random weights.

The text becomes one long array of token ids; a training example is a window of it (LLaMA, arXiv:2302.13971, section 2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import seeds
from ..config import SamplingConfig, Settings, check, to_json
from ..data import sources
from ..data.batching import Batch, open_tokens, window_batch, window_order, windows, write_tokens
from ..data.tokenizer import Tokenizer
from ..model.llama import Llama
from ..model.sampling import sample
from ..rlhf.losses import correct_sum, cross_entropy_sum
from ..training import checkpoint, distributed, memory
from ..training.device import autocast, pick_device
from ..training.loop import TrainJob, fit
from ..training.run_log import RunLog, StageResult, Watch
from . import records
from .start import training_folder


def language_model_loss(model: Llama, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy in nats and number of correct argmax predictions, both summed over the batch's targets."""
    logits = model(batch.tokens, segment_ids=batch.segment_ids)  # (B, T, V)
    loss, _ = cross_entropy_sum(logits, batch.targets, batch.loss_mask)
    return loss, {"accuracy": float(correct_sum(logits.detach(), batch.targets, batch.loss_mask))}


def language_model_metrics(model: Llama, batches: Iterable[Batch], precision: str = "fp32") -> dict[str, float]:
    """Token-weighted loss (nats), accuracy and perplexity over batches."""
    device = next(model.parameters()).device
    loss = accuracy = weight = 0.0
    found = {}
    for number, batch in distributed.shard_iter(batches):
        with torch.no_grad(), autocast(precision, device):
            total, parts = language_model_loss(model, batch.to(device))
        found[number] = float(total), parts["accuracy"], batch.weight
    for total, right, targets in distributed.all_gather_dict(found).values():
        loss, accuracy, weight = loss + total, accuracy + right, weight + targets
    mean = loss / max(1.0, weight)
    return {"loss": mean, "accuracy": accuracy / max(1.0, weight), "perplexity": math.exp(min(mean, 50.0))}


def build_tokens(settings: Settings, folder: Path) -> tuple[Tokenizer, np.memmap, np.memmap]:
    """The tokenizer and the token arrays (training, held out), which are reused if texts and settings are unchanged."""
    train, valid = records.texts(settings)
    with distributed.main_first():
        stamp = f"{_digest(chain(train, [''], valid))} {settings.init}\n{to_json(settings.tokenizer)}"
        stamp_file, files = folder / "made_from.txt", [folder / "train.npy", folder / "valid.npy"]
        there = all(file.is_file() for file in (stamp_file, *files))
        if not (there and stamp_file.read_text(encoding="utf-8") == stamp):
            stamp_file.unlink(missing_ok=True)  # a rebuild that is killed must not pass as the old files
            tokenizer = Tokenizer.load(settings.init) if settings.init else train_tokenizer(settings, train)
            tokenizer.save(folder)
            # A file's texts are documents, each with its end token; tinychat's are paragraphs, eight per document.
            newline, size = tokenizer.encode("\n")[-1], 1 if settings.data else 8
            for file, texts in zip(files, (train, valid), strict=True):
                bar = tqdm(texts, desc=f"{file.stem} tokens", unit=" texts", disable=None, leave=False)
                ends = {True: tokenizer.eos_id, False: newline}
                ids = ([*tokenizer.encode(text), ends[number % size == 0]] for number, text in enumerate(bar, 1))
                write_tokens(file, ids, tokenizer.vocab_size)
            checkpoint.write_text(stamp_file, stamp)
    tokenizer = Tokenizer.load(folder)
    return tokenizer, *(open_tokens(file, tokenizer.vocab_size) for file in files)


def _digest(texts: Iterable[str]) -> str:
    """SHA-256 of the texts, streamed, since they may not fit in memory."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update(b"\0" * (number > 0) + text.encode("utf-8", "replace"))
    return digest.hexdigest()


def train_tokenizer(settings: Settings, corpus: Iterable[str]) -> Tokenizer:
    """A SentencePiece tokenizer, trained on `--tokenizer.files` if given, else on the corpus."""
    if files := settings.tokenizer.files:
        corpus = (text for file in files for text in sources.stream_texts(file))
    return Tokenizer.train(corpus, settings.tokenizer.vocab_size, settings.tokenizer.max_chars)


def run(settings: Settings, inputs: Sequence[Path], watch: Watch | None = None) -> StageResult:
    """Pretrain from random weights, or continue from `settings.init`, which is then the first of `inputs`."""
    config, folder = settings.pretrain, training_folder("pretrain", settings)
    device, settings = pick_device(settings.device), records.with_data(settings, config.data)
    shape = checkpoint.shape_of(Path(settings.init)) if settings.init else None
    context = (shape or settings.model).max_seq_len
    check(config.seq_len <= context, f"pretrain.seq_len {config.seq_len} exceeds the context of {context}: lower it.")
    memory.check_room(settings, "pretrain", str(device), shape, distributed.world_size())
    log = RunLog(folder, settings, "pretrain", inputs, watch)
    model = checkpoint.load_full(settings.init, device)[0] if settings.init else None
    tokenizer, train, valid = build_tokens(settings, folder / "state" / "tokens")
    if model is None:
        shape = settings.replace(model__vocab_size=tokenizer.vocab_size).model
        model = Llama(shape, generator=seeds.generator("cpu", settings.seed, "init")).to(device)
    ends, size = (tokenizer.eos_id, tokenizer.encode("\n")[-1]), config.loop.batch_size
    spans, valid_spans = windows(train, config.seq_len, ends), windows(valid, config.seq_len, ends)  # (N, 2) each
    orders = {}  # epoch -> the windows' order; only the current epoch is kept

    def batch(epoch: int, indices: Sequence[int]) -> Batch:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = window_order(len(spans), settings.seed, epoch)
        return window_batch(train, spans[orders[epoch][list(indices)]])

    def validate() -> dict[str, float]:
        some = np.sort(window_order(len(valid_spans), 0, 0)[: config.loop.eval_batches * size])
        batches = (window_batch(valid, valid_spans[some[i : i + size]]) for i in range(0, len(some), size))
        return language_model_metrics(model, batches, config.loop.precision)

    def sample_texts() -> list[dict[str, Any]]:
        generator = seeds.generator(device, settings.seed, "pretrain_samples")
        starts_with = [tokenizer.encode(text[:40]) for text in ("Tom has", "What is", "The boy asked:")]
        made = sample(model, starts_with, SamplingConfig(48, temperature=0.8), tokenizer, generator)
        return [{"text": tokenizer.decode([*p, *ids])} for p, ids in zip(starts_with, made.ids(), strict=True)]

    def save(best: dict[str, float]) -> None:
        checkpoint.save_full(folder, model, tokenizer, {"stage": "pretrain", "seed": settings.seed, "best": best})

    stage = TrainJob(
        "pretrain", model, config.optim, config.loop, len(spans), None, batch, language_model_loss, validate,
        sample_texts, save,
    )  # fmt: skip
    return fit(stage, log, settings)
