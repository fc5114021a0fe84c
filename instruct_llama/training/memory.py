"""Estimates of the memory that a stage needs, from its settings alone: for `doctor`, and before a stage loads weights.

The estimates add up this package's tensors: weights, gradients and AdamW's moments by their number, activations by
what autograd saves in one block (the coefficients are exact; a test counts them), logits by the vocabulary. They do
not include the allocator's fragmentation.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .. import presets
from ..config import LoRAConfig, ModelConfig, QuantConfig, Settings, UserError

Stage = Literal["pretrain", "sft", "qlora", "reward", "dpo", "ppo"]
STAGES: tuple[Stage, ...] = ("pretrain", "sft", "qlora", "reward", "dpo", "ppo")
GB = 1e9
CUDA_CONTEXT = 0.6 * GB  # of CUDA and its libraries on a GPU, before the first tensor


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """The sum of all parts, in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.parts.items() if size >= 5e6)
        return f"{self.total / GB:.2f} GB ({parts})"


# ---------------------------------------------------------------- counts


def projection_count(model: ModelConfig) -> int:
    """The number of weights in the seven projections of all blocks, which can be quantised to 4 bits."""
    kv_dim = model.dim * model.n_kv_heads // model.n_heads
    return model.n_layers * (2 * model.dim * model.dim + 2 * model.dim * kv_dim + 3 * model.dim * model.ffn_dim)


def parameter_count(model: ModelConfig) -> int:
    """The number of weights of the language model."""
    tables = model.vocab_size * model.dim * (1 if model.tie_embeddings else 2)
    return tables + projection_count(model) + (2 * model.n_layers + 1) * model.dim  # the last: norms


def adapter_count(model: ModelConfig, lora: LoRAConfig) -> int:
    """The number of weights of one adapter over all blocks."""
    kv_dim = model.dim * model.n_kv_heads // model.n_heads
    shapes = {
        "wq": (model.dim, model.dim), "wk": (model.dim, kv_dim), "wv": (model.dim, kv_dim),
        "wo": (model.dim, model.dim), "w_gate": (model.dim, model.ffn_dim), "w_up": (model.dim, model.ffn_dim),
        "w_down": (model.ffn_dim, model.dim),
    }  # fmt: skip
    return model.n_layers * lora.rank * sum(sum(shapes[name]) for name in lora.target_modules)


# ---------------------------------------------------------------- parts, in bytes


def base_bytes(model: ModelConfig, lora: LoRAConfig, quant: QuantConfig, precision: str) -> float:
    """The weights as stored: fp32 if they train, 16 or 4 bits if they are frozen under adapters."""
    width = 2 if lora.rank and precision == "bf16" else 4
    projections, rest = projection_count(model), parameter_count(model) - projection_count(model)
    if quant.kind == "none":
        return width * (projections + rest)
    scales = 1 / quant.block_size + 4 / (256 * quant.block_size) if quant.double_quant else 4 / quant.block_size
    return projections * (0.5 + scales) + width * rest


def trained_bytes(count: float, kind: str) -> float:
    """Gradients (fp32) and AdamW's two moments (fp32, or 8 bits each) of `count` trained weights."""
    return count * (4 + (2 if "8bit" in kind else 8))


def block_bytes(model: ModelConfig, lora: LoRAConfig, precision: str) -> float:
    """What autograd saves in one block for each token: the inputs of products, norms, SwiGLU and attention.

    Frozen weights have no gradient that needs their inputs, so with adapters two copies of the width fewer are saved.
    """
    kv_dim = model.dim * model.n_kv_heads // model.n_heads
    wide, size = (36, 4) if precision == "fp32" else (32, 2)
    wide -= 8 if lora.rank else 0
    low = size * len(lora.target_modules) * lora.rank
    return wide * model.dim + 4 * size * model.ffn_dim + 2 * size * kv_dim + 8 + 4 * model.n_heads + low


def activation_bytes(model: ModelConfig, lora: LoRAConfig, precision: str, tokens: int) -> float:
    """Saved activations of a forward pass; gradient checkpointing saves each block's input and all of one block."""
    block = block_bytes(model, lora, precision) * tokens
    casts = 2 * projection_count(model) if precision != "fp32" and not lora.rank else 0  # autocast's 16-bit copies
    if model.gradient_checkpointing:
        return block + model.n_layers * 4 * model.dim * tokens + casts / model.n_layers
    return model.n_layers * block + casts


def working_bytes(model: ModelConfig, quant: QuantConfig) -> float:
    """The largest 4-bit matrix while it is dequantised, in fp32 and once more for the product."""
    return 0.0 if quant.kind == "none" else 8.0 * model.dim * model.ffn_dim


def logit_bytes(model: ModelConfig, tokens: int, copies: int) -> float:
    """fp32 logits and tensors of their size: log-probabilities, gradients."""
    return 4.0 * copies * model.vocab_size * tokens


def cache_bytes(model: ModelConfig, precision: str, tokens: int) -> float:
    """The KV cache of all layers while responses are sampled."""
    kv_dim = model.dim * model.n_kv_heads // model.n_heads
    return 2.0 * (4 if precision == "fp32" else 2) * model.n_layers * kv_dim * tokens


def generation_bytes(settings: Settings, precision: str) -> float:
    """Generating a batch of PPO's responses: the KV cache, and the logits of one step."""
    model, config = settings.model, settings.ppo
    length = min(config.seq_len or model.max_seq_len, model.max_seq_len)
    cache = cache_bytes(model, precision, length * config.generation_batch_size)
    return cache + logit_bytes(model, config.generation_batch_size, 4)


# ---------------------------------------------------------------- stages


def estimate(settings: Settings, stage: Stage, processes: int = 1) -> MemoryEstimate:
    """The memory that a stage needs on its device, in bytes by part.

    Over several `processes`, gradients and moments (FSDP2) and the rows of a batch are sharded, at least one row each.
    Weights are gathered for sampling and validation, and each process generates whole batches.
    """
    settings = with_start_shape(settings, stage)
    return _ppo(settings, processes) if stage == "ppo" else _supervised(settings, stage, processes)


def needed_stages(settings: Settings) -> list[Stage]:
    """The stages of a preset; one that starts from imported weights has no pretraining."""
    return [stage for stage in STAGES if not (stage == "pretrain" and settings.weights)]


def with_start_shape(settings: Settings, stage: Stage) -> Settings:
    """The settings with the shape of the stage's model, which known weights determine."""
    if stage == "pretrain" or settings.weights not in presets.WEIGHTS:
        return settings
    shape = presets.MODEL_SHAPES[presets.WEIGHTS[settings.weights]]
    recompute = settings.model.gradient_checkpointing
    return settings.replace(model=replace(shape, gradient_checkpointing=recompute))


def disk_bytes(settings: Settings) -> float:
    """Bytes of a preset's run folders: weights, states to resume from (two during a write), files of the hub."""
    total = 0.0
    for stage in needed_stages(settings):
        shaped = with_start_shape(settings, stage)
        total += 28 * _trained(shaped, stage)
    return total + (8 * parameter_count(with_start_shape(settings, "sft").model) if settings.weights else 0)


def _trained(settings: Settings, stage: Stage) -> int:
    """The number of weights that a stage trains; for PPO, those of policy and value."""
    model = settings.model
    if stage == "ppo":
        if settings.ppo.layout == "shared_base":
            return 2 * adapter_count(model, settings.ppo.lora)
        return _unfrozen(model, settings.ppo.freeze_layers) + parameter_count(model)
    config = settings.qlora if stage == "qlora" else getattr(settings, stage)
    lora = getattr(config, "lora", LoRAConfig(rank=0))
    beside = parameter_count(model) - projection_count(model) if getattr(config, "train_embeddings", False) else 0
    return adapter_count(model, lora) + beside if lora.rank else _unfrozen(model, getattr(config, "freeze_layers", 0))


def _supervised(settings: Settings, stage: Stage, processes: int) -> MemoryEstimate:
    config = settings.qlora if stage == "qlora" else getattr(settings, stage)
    none, dense = LoRAConfig(rank=0), QuantConfig()
    lora, quant = getattr(config, "lora", none), getattr(config, "quant", dense)
    model, loop = settings.model, config.loop
    tokens = -(-loop.batch_size // processes) * config.seq_len
    trained, scalar = _trained(settings, stage), stage == "reward"
    ranked = stage in ("reward", "dpo")
    rows = 2 if ranked else 1  # the responses of a comparison share their prompt: about two responses a row
    training = {
        "gradients and optimizer": trained_bytes(trained, config.optim.kind) / processes,
        "activations": activation_bytes(model, lora, loop.precision, tokens * rows),
        "logits": 0.0 if scalar and settings.reward.lm_coef == 0 else logit_bytes(model, tokens, 3),
    }
    if ranked:  # before training, the SFT model generates responses as in PPO
        generation = generation_bytes(settings, loop.precision)
        training = {"generation": generation} if generation > sum(training.values()) else training
    return MemoryEstimate({
        "weights": base_bytes(model, lora, quant, loop.precision) + 4 * trained * bool(lora.rank), **training,
        "working space": working_bytes(model, quant),
    })  # fmt: skip


def _unfrozen(model: ModelConfig, layers: int) -> int:
    """The number of trained weights when the embeddings and the first `layers` blocks are frozen."""
    if layers == 0:
        return parameter_count(model)
    rest = projection_count(model) * (model.n_layers - layers) // model.n_layers
    output = 0 if model.tie_embeddings else model.vocab_size * model.dim  # untied: these still train
    return rest + output + (2 * (model.n_layers - layers) + 1) * model.dim


def _ppo(settings: Settings, processes: int) -> MemoryEstimate:
    """The networks, and the larger of generation (KV cache, logits of a step) and training (activations, logits)."""
    model, config = settings.model, settings.ppo
    shared = config.layout == "shared_base"
    lora = config.lora if shared else LoRAConfig(rank=0)
    quant = config.quant if shared else QuantConfig()
    length = min(config.seq_len or model.max_seq_len, model.max_seq_len)
    adapters = adapter_count(model, lora)
    places = config.devices if len(config.devices) == 4 and not shared else 4 * ("",)
    beside = [place == places[0] for place in places]  # which of the four are on the policy's device
    trained = _trained(settings, "ppo") - (0 if beside[2] else parameter_count(model))
    # The other networks are in main memory, or on other devices.
    present = 2 if config.offload_inactive and not shared else sum(beside)
    base = base_bytes(model, lora, quant, config.precision)
    generation = generation_bytes(settings, config.precision)
    rows = -(-config.micro_batch_size // processes)
    training = activation_bytes(model, lora, config.precision, rows * length)
    training += logit_bytes(model, rows * config.max_new_tokens, 6)
    return MemoryEstimate({
        "weights": base + 4 * 4 * adapters if shared else present * base,
        "gradients and optimizer": trained_bytes(trained, config.optim.kind) / processes,
        "generation" if generation > training else "training": max(generation, training),
        "working space": working_bytes(model, quant),
    })  # fmt: skip


# ---------------------------------------------------------------- comparison with the memory available


def memory_available(device: str = "cpu") -> int:
    """Free bytes of a CUDA device; otherwise the main memory that a new process can use without swapping.

    On a GPU, torch's cache of freed tensors counts as free: an earlier stage of this process leaves gigabytes of it.
    """
    if device.startswith("cuda"):
        cuda = importlib.import_module("torch").cuda
        return cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device)
    import psutil  # here, so that the doctor can start without it and report it

    return psutil.virtual_memory().available


def options_for(stage: Stage) -> str:
    """The prefix of a stage's command-line options."""
    return "sft" if stage == "qlora" else stage


def cheaper_settings(settings: Settings, stage: Stage) -> Iterator[tuple[Settings, str]]:
    """Settings that need less and less memory, each with the command-line options for them, mildest first."""
    name = options_for(stage)
    options: list[str] = []

    def change(option: str, **changes: object) -> tuple[Settings, str]:
        nonlocal settings
        settings = settings.replace(**changes)
        options.append(option)
        return settings, " ".join(options)

    field = "qlora" if stage == "qlora" else name
    if not settings.model.gradient_checkpointing:
        yield change("--model.gradient-checkpointing", model__gradient_checkpointing=True)
    if stage == "ppo":
        config = settings.ppo
        if config.layout == "four_models":
            yield change("--ppo.layout shared_base", ppo__layout="shared_base")
        if config.quant.kind == "none":
            yield change("--ppo.quant.kind nf4", ppo__quant__kind="nf4")
        if config.micro_batch_size > 1 or config.generation_batch_size > 8:
            small = min(8, config.generation_batch_size)
            yield change(
                f"--ppo.micro-batch-size 1 --ppo.generation-batch-size {small}",
                ppo__micro_batch_size=1,
                ppo__generation_batch_size=small,
            )
        return
    config = settings.qlora if stage == "qlora" else getattr(settings, stage)
    loop = config.loop
    if loop.batch_size > 1:
        accumulate = loop.batch_size * loop.gradient_accumulation_steps
        yield change(
            f"--{name}.loop.batch-size 1 --{name}.loop.gradient-accumulation-steps {accumulate}",
            **{f"{field}__loop__batch_size": 1, f"{field}__loop__gradient_accumulation_steps": accumulate},
        )
    if stage != "pretrain" and config.lora.rank == 0:
        yield change(f"--{name}.lora.rank 8", **{f"{field}__lora__rank": 8})
    if stage != "pretrain" and config.quant.kind == "none":
        yield change(f"--{name}.quant.kind nf4", **{f"{field}__quant__kind": "nf4"})
    if stage in ("reward", "dpo") and settings.ppo.generation_batch_size > 8:
        yield change("--ppo.generation-batch-size 8", ppo__generation_batch_size=8)
    for length in (512, 256, 128):
        if config.seq_len > length:
            yield change(f"--{name}.seq-len {length}", **{f"{field}__seq_len": length})


def check_room(
    settings: Settings, stage: Stage, device: str, model: ModelConfig | None = None, processes: int = 1
) -> None:
    """Print what a stage needs. Raises `UserError` before anything is loaded if a GPU has less, with what would fit.

    `model` is the shape of the checkpoint that the stage starts from. On a CPU, which may swap, it only prints.
    """
    if model is not None:  # a known shape takes precedence over the preset's weights
        recompute = settings.model.gradient_checkpointing
        settings = settings.replace(model=replace(model, gradient_checkpointing=recompute), weights="")
    needed, free = estimate(settings, stage, processes), memory_available(device)
    context = CUDA_CONTEXT if device.startswith("cuda") else 0.0
    if needed.total > GB:  # smaller stages fit everywhere
        print(f"{stage} needs about {needed}; {free / GB:.1f} GB are free on {device}.")
    if needed.total + context <= free:
        return
    milder = (
        (estimate(other, stage, processes).total, options) for other, options in cheaper_settings(settings, stage)
    )
    cure = next((options for total, options in milder if total + context <= free), "")
    advice = f"these settings would fit: {cure}" if cure else "no setting makes it fit; choose a smaller model"
    message = f"{stage} needs {needed.total / GB:.1f} GB and {device} has {free / GB:.1f} GB free: {advice}."
    if device.startswith("cuda"):
        raise UserError(message)
    print(message)


def table(settings: Settings) -> list[str]:
    """One line for each stage: what it needs with these settings."""
    return [f"{stage:<9} {estimate(settings, stage)}" for stage in STAGES]
