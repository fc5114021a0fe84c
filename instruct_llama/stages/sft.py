"""Stage 2, supervised fine-tuning on demonstrations: full fine-tuning, LoRA, or LoRA on a 4-bit base (QLoRA).

The loss is that of pretraining; the mask counts only the assistant's tokens and their end tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import seeds
from ..config import Settings, UserError
from ..data.batching import Batch, Dialog, dialog_batch, fit_dialog
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.llama import Llama
from ..model.sampling import generate
from ..training import checkpoint, distributed, memory
from ..training.device import pick_device
from ..training.loop import TrainJob, fit, load_options, with_gradient_checkpointing
from ..training.optim import freeze_first
from ..training.run_log import RunLog, StageResult, Watch
from ..worlds import tinychat
from . import records
from .pretrain import language_model_loss, language_model_metrics
from .start import training_folder


def encode(tokenizer: Tokenizer, dialogs: Sequence[Any], seq_len: int) -> list[Dialog]:
    """Token ids and masks of the dialogs that fit. Raises `UserError` when none does."""
    fitted = [fit_dialog(tokenizer, messages, seq_len) for messages in dialogs]
    kept = [dialog for dialog in fitted if dialog is not None]
    if not kept:
        raise UserError(f"None of the {len(fitted)} dialogs fits seq_len {seq_len}: raise it, for example double it.")
    if len(kept) < len(fitted):
        print(f"{len(fitted) - len(kept)} of {len(fitted)} dialogs are longer than seq_len {seq_len} and were dropped.")
    return kept


def prepare(model: Llama, settings: Settings) -> Llama:
    """Set up what is trained: all weights, all but the first layers, or adapters (on a 4-bit base)."""
    config = settings.sft
    if not lora.is_quantized(model):  # else its weights were quantized on loading
        lora.quantize(model, config.quant)
    if config.lora.rank:
        lora.add_adapter(model, "sft", config.lora, seeds.generator("cpu", settings.seed, "adapter", "sft"))
        lora.use_adapter(model, "sft")
        for module in (model.tok_embeddings, model.output) if config.train_embeddings else ():
            module.float().requires_grad_(True)
    freeze_first(model, config.freeze_layers)
    return model


def prompts_to_show(settings: Settings, tokenizer: Tokenizer, room: int) -> list[Any]:
    """Three held-out prompts for the text samples; of a file, the first three of at most `room` tokens."""
    if not settings.data:
        return list(tinychat.FIXED_PROMPTS)
    fitting = (p for p in records.prompts(settings)[1] if len(tokenizer.encode_prompt(p)) <= room)
    return list(itertools.islice(fitting, 3))


def run(settings: Settings, inputs: Sequence[Path], watch: Watch | None = None) -> StageResult:
    """Fine-tune the model in the first of `inputs`."""
    config = settings.sft
    folder = training_folder("sft", settings)
    (base,) = inputs
    device, settings = pick_device(settings.device), records.with_data(settings, config.data)
    memory.check_room(settings, "sft", str(device), checkpoint.shape_of(base), distributed.world_size())
    log = RunLog(folder, settings, "sft", inputs, watch)
    how = load_options(config.lora, config.quant, config.loop.precision)
    model, tokenizer = checkpoint.load_full(base, device, **how)
    model = prepare(with_gradient_checkpointing(model, settings), settings)
    train, valid = (encode(tokenizer, dialogs, config.seq_len) for dialogs in records.demonstrations(settings))
    size, pack_len = config.loop.batch_size, config.seq_len if config.pack else None
    valid = valid[: config.loop.eval_batches * size]
    shown = prompts_to_show(settings, tokenizer, room=model.config.max_seq_len - 48)

    def batch(epoch: int, indices: Sequence[int]) -> Batch:
        return dialog_batch([train[i] for i in indices], tokenizer.pad_id, pack_len)

    def validate() -> dict[str, float]:
        batches = (dialog_batch(valid[i : i + size], tokenizer.pad_id) for i in range(0, len(valid), size))
        return language_model_metrics(model, batches, config.loop.precision)

    def sample_answers() -> list[dict[str, Any]]:
        answers = generate(model, tokenizer, shown, max_new_tokens=48, seed=settings.seed, keys=("sft_texts",))
        return [{"prompt": p, "response": a} for p, a in zip(shown, answers, strict=True)]

    def save(best: dict[str, float]) -> None:
        info = {"stage": "sft", "seed": settings.seed, "best": best, **checkpoint.origin(base)}
        if config.lora.rank:
            lora_info = {"lora": vars(config.lora), "quant": vars(config.quant)}
            checkpoint.save_adapter(folder, model, "sft", base, tokenizer, {**info, **lora_info})
        else:
            checkpoint.save_full(folder, model, tokenizer, info)

    lengths = [len(ids) for ids, _ in train]
    stage = TrainJob(
        "sft", model, config.optim, config.loop, len(train), lengths, batch, language_model_loss, validate,
        sample_answers, save,
    )  # fmt: skip
    return fit(stage, log, settings)
