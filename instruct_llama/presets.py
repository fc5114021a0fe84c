"""Presets: the settings of every stage for CI (`tiny`), a laptop, one GPU, and LLaMA 2 7B."""

from __future__ import annotations

import dataclasses
import difflib
import os

from . import config as c
from .config import ModelConfig, Settings, UserError


def _smollm2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, theta: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=49_152, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, ffn_dim=ffn_dim,
        max_seq_len=8192, rope_theta=theta,
    )  # fmt: skip


def _llama2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, context: int = 4096) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, ffn_dim=ffn_dim,
        max_seq_len=context, tie_embeddings=False,
    )  # fmt: skip


def _llama3(
    dim: int, n_layers: int, n_heads: int, ffn_dim: int, factor: float, tied: bool, context: int = 131_072
) -> ModelConfig:
    scaling = c.RopeScaling("llama3", factor, 1.0, 4.0, 8192) if factor else c.RopeScaling()
    return ModelConfig(
        vocab_size=128_256, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=8, ffn_dim=ffn_dim,
        max_seq_len=context, rope_theta=500_000.0, rope_scaling=scaling, tie_embeddings=tied,
    )  # fmt: skip


# Published shapes, from each model's config.json; tests compare the parameter counts with the published ones (P13).
MODEL_SHAPES = {
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536, 100_000.0),  # arXiv:2502.02737
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, 130_000.0),
    "tinyllama-1.1b": _llama2(2048, 22, 32, 4, 5632, context=2048),  # arXiv:2401.02385
    "llama2-7b": _llama2(4096, 32, 32, 32, 11_008),  # arXiv:2307.09288
    "llama2-13b": _llama2(5120, 40, 40, 40, 13_824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28_672),
    "llama3-8b": _llama3(4096, 32, 32, 14_336, 0.0, False, context=8192),  # arXiv:2407.21783
    "llama3.1-8b": _llama3(4096, 32, 32, 14_336, 8.0, False),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, True),
}

WEIGHTS = {"smollm2": "smollm2-135m", "meta-llama/Llama-2-7b-hf": "llama2-7b"}  # a preset's `weights` -> their shape

LAPTOP = Settings(
    preset="laptop",
    model=c.ModelConfig(dim=96, n_layers=6, n_heads=4, n_kv_heads=2, ffn_dim=264, max_seq_len=256, init_std=0.12),
    tokenizer=c.TokenizerConfig(vocab_size=640),
    world=c.WorldConfig(corpus_chars=4_000_000, demonstrations=20_000, comparisons=36_000, prompts=4_000, heldout=512),
    pretrain=c.PretrainConfig(
        seq_len=96, optim=c.OptimConfig(lr=4e-3, warmup_steps=50),
        loop=c.LoopConfig(steps=1800, batch_size=18, eval_every=300),
    ),
    sft=c.SFTConfig(loop=c.LoopConfig(batch_size=8, gradient_accumulation_steps=2, eval_batches=16, eval_every=200)),
    reward=c.RewardConfig(
        sample_share=0.05, responses_per_prompt=4, token_coef=1.0, lm_coef=0.3, bucket_steps=4,
        optim=c.OptimConfig(lr=1.2e-3, min_lr_ratio=0.02, weight_decay=0.2),
        loop=c.LoopConfig(epochs=1, batch_size=8, eval_batches=48, eval_every=1500),
    ),
    qlora=c.SFTConfig(
        lora=c.LoRAConfig(rank=16, alpha=32.0), train_embeddings=True, quant=c.QuantConfig(kind="nf4"),
        optim=c.OptimConfig(lr=3e-3),
        loop=c.LoopConfig(epochs=0.65, batch_size=8, gradient_accumulation_steps=2, eval_batches=16, eval_every=200),
    ),
    dpo=c.DPOConfig(
        beta=0.3, bucket_steps=4, eval_prompts=256, optim=c.OptimConfig(lr=3e-4, weight_decay=0.0),
        loop=c.LoopConfig(steps=400, batch_size=16, eval_batches=16, eval_every=200),
    ),
    ppo=c.PPOConfig(
        iterations=40, rollouts_per_iteration=256, generation_batch_size=256, num_ppo_epochs=1, mini_batch_size=64,
        micro_batch_size=64, kl_coef=0.24, cliprange_value=0.5, value_lr=2e-3, eval_every=20, eval_prompts=256,
        # Adam's epsilon as in "The 37 Implementation Details of Proximal Policy Optimization" (Huang et al., 2022)
        optim=c.OptimConfig(lr=6e-4, min_lr_ratio=0.3, warmup_steps=5, weight_decay=0.0, beta2=0.99, eps=1e-5),
    ),
)  # fmt: skip

TINY = Settings(
    preset="tiny",
    model=c.ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=176, max_seq_len=256),
    tokenizer=c.TokenizerConfig(vocab_size=512, max_chars=150_000),
    world=c.WorldConfig(corpus_chars=150_000, demonstrations=300, comparisons=150, prompts=100, heldout=64),
    pretrain=c.PretrainConfig(
        seq_len=64, optim=c.OptimConfig(lr=3e-3, warmup_steps=5),
        loop=c.LoopConfig(steps=40, batch_size=16, eval_every=20, eval_batches=2, save_every=20, sample_every=40),
    ),
    sft=c.SFTConfig(
        loop=c.LoopConfig(steps=16, batch_size=16, eval_every=8, eval_batches=2, save_every=8, sample_every=16),
    ),
    qlora=c.SFTConfig(
        lora=c.LoRAConfig(rank=4, alpha=8.0), train_embeddings=True, quant=c.QuantConfig(kind="nf4"),
        optim=c.OptimConfig(lr=3e-3),
        loop=c.LoopConfig(steps=10, batch_size=16, eval_every=5, eval_batches=2, save_every=5, sample_every=10),
    ),
    reward=c.RewardConfig(
        normalise_samples=32, token_coef=1.0, lm_coef=0.3,
        loop=c.LoopConfig(steps=10, batch_size=8, eval_every=5, eval_batches=2, save_every=5, sample_every=10),
    ),
    dpo=c.DPOConfig(
        loop=c.LoopConfig(steps=10, batch_size=8, eval_every=5, eval_batches=2, save_every=5, sample_every=10),
    ),
    ppo=c.PPOConfig(
        iterations=3, exact_iterations=4, rollouts_per_iteration=16, generation_batch_size=16, max_new_tokens=16,
        num_ppo_epochs=2, mini_batch_size=8, micro_batch_size=8, save_every=1, eval_every=2, eval_prompts=16,
    ),
    evaluate=c.EvaluateConfig(prompts=32, comparisons=64, max_new_tokens=24, batch_size=32),
)  # fmt: skip

# One GPU with at least 8 GB; a larger one allows larger batches and less accumulation.
# `pretrain` trains about 120 M parameters from scratch; all other stages start from `weights`.
GPU = Settings(
    preset="gpu", weights="smollm2",
    model=dataclasses.replace(MODEL_SHAPES["smollm2-135m"], vocab_size=16_384, max_seq_len=2048, rope_theta=10_000.0),
    tokenizer=c.TokenizerConfig(vocab_size=16_384, max_chars=50_000_000),
    pretrain=c.PretrainConfig(
        data="tinystories", seq_len=512, optim=c.OptimConfig(lr=1e-3, warmup_steps=200, weight_decay=0.1),
        loop=c.LoopConfig(steps=20_000, batch_size=8, gradient_accumulation_steps=8,
                          eval_every=500, eval_batches=64, save_every=1000,
                          sample_every=1000, precision="bf16"),
    ),
    sft=c.SFTConfig(
        data="hh-rlhf", seq_len=512, optim=c.OptimConfig(lr=2e-5, warmup_steps=50),
        loop=c.LoopConfig(epochs=1, batch_size=4, gradient_accumulation_steps=8,
                          eval_every=200, eval_batches=32, precision="bf16"),
    ),
    qlora=c.SFTConfig(
        data="hh-rlhf", seq_len=512, lora=c.LoRAConfig(rank=16, alpha=32.0), quant=c.QuantConfig(kind="nf4"),
        optim=c.OptimConfig(lr=5e-4, warmup_steps=50),
        loop=c.LoopConfig(epochs=1, batch_size=4, gradient_accumulation_steps=8,
                          eval_every=200, eval_batches=32, precision="bf16"),
    ),
    reward=c.RewardConfig(
        data="hh-rlhf", seq_len=512, optim=c.OptimConfig(lr=2e-5, warmup_steps=50),
        loop=c.LoopConfig(epochs=1, batch_size=4, gradient_accumulation_steps=16,
                          eval_every=100, eval_batches=64, precision="bf16"),
    ),
    dpo=c.DPOConfig(
        data="hh-rlhf", seq_len=512, optim=c.OptimConfig(lr=5e-6, warmup_steps=50, weight_decay=0.0),
        loop=c.LoopConfig(epochs=1, batch_size=2, gradient_accumulation_steps=16,
                          eval_every=100, eval_batches=64, precision="bf16"),
    ),
    ppo=c.PPOConfig(
        data="hh-rlhf", iterations=200, rollouts_per_iteration=128, generation_batch_size=32, max_new_tokens=128,
        seq_len=512, num_ppo_epochs=1, mini_batch_size=32, micro_batch_size=2, kl_coef=0.05, value_lr=1e-5,
        optim=c.OptimConfig(lr=2e-6, min_lr_ratio=0.1, weight_decay=0.0), eval_every=20, eval_prompts=128,
        precision="bf16",
    ),
    evaluate=c.EvaluateConfig(prompts=256, max_new_tokens=128, batch_size=64),
)  # fmt: skip

# One GPU with at least 24 GB, or several under torchrun. Every stage trains adapters over one 4-bit base (settings of
# QLoRA, arXiv:2305.14314, appendix B.2); the four networks of PPO share that base.
_ADAPTER = c.LoRAConfig(rank=64, alpha=16.0, dropout=0.1)
_NF4 = c.QuantConfig(kind="nf4")
_QLORA = c.SFTConfig(
    name="sft", data="hh-rlhf", seq_len=512, lora=_ADAPTER, quant=_NF4,
    optim=c.OptimConfig(lr=2e-4, min_lr_ratio=1.0, warmup_steps=50, weight_decay=0.0, beta2=0.999, grad_clip=0.3),
    loop=c.LoopConfig(epochs=1, batch_size=1, gradient_accumulation_steps=16,
                      eval_every=200, eval_batches=64, precision="bf16"),
)  # fmt: skip
LLAMA2_7B = Settings(
    preset="llama2_7b", weights="meta-llama/Llama-2-7b-hf",
    model=dataclasses.replace(MODEL_SHAPES["llama2-7b"], gradient_checkpointing=True),
    tokenizer=c.TokenizerConfig(vocab_size=32_000),
    pretrain=c.PretrainConfig(
        data="fineweb-edu", seq_len=2048, optim=c.OptimConfig(lr=1e-4, warmup_steps=100),
        loop=c.LoopConfig(steps=10_000, batch_size=1, gradient_accumulation_steps=64, eval_every=200, precision="bf16"),
    ),
    sft=_QLORA, qlora=dataclasses.replace(_QLORA, name="sft-qlora"),
    reward=c.RewardConfig(
        data="hh-rlhf", seq_len=512, lora=_ADAPTER, quant=_NF4, optim=c.OptimConfig(lr=1e-4, warmup_steps=50),
        loop=c.LoopConfig(epochs=1, batch_size=2, gradient_accumulation_steps=16,
                          eval_every=100, eval_batches=64, precision="bf16"),
    ),
    dpo=c.DPOConfig(
        name="dpo", data="hh-rlhf", seq_len=512, lora=_ADAPTER, quant=_NF4,
        optim=c.OptimConfig(lr=5e-5, warmup_steps=50, weight_decay=0.0),
        loop=c.LoopConfig(epochs=1, batch_size=1, gradient_accumulation_steps=32,
                          eval_every=100, eval_batches=64, precision="bf16"),
    ),
    ppo=c.PPOConfig(
        layout="shared_base", data="hh-rlhf", iterations=100, rollouts_per_iteration=64, generation_batch_size=16,
        max_new_tokens=128, seq_len=512, num_ppo_epochs=1, mini_batch_size=16, micro_batch_size=2, kl_coef=0.05,
        lora=_ADAPTER, quant=_NF4, optim=c.OptimConfig(lr=1e-5, min_lr_ratio=0.1, weight_decay=0.0), value_lr=5e-5,
        eval_every=10, eval_prompts=64, precision="bf16",
    ),
    evaluate=c.EvaluateConfig(prompts=256, max_new_tokens=128, batch_size=16),
)  # fmt: skip

PRESETS = {settings.preset: settings for settings in (TINY, LAPTOP, GPU, LLAMA2_7B)}


def default_name() -> str:
    """`INSTRUCT_LLAMA_PRESET` when it is set, else "laptop", which runs on any machine."""
    return os.environ.get("INSTRUCT_LLAMA_PRESET") or "laptop"


def get(name: str | None = None) -> Settings:
    """The settings of a preset, by default of `default_name()`.

    `INSTRUCT_LLAMA_OUT` and `INSTRUCT_LLAMA_SEED`, when set, replace the folder of runs and the seed: `tour` passes
    them to the notebooks this way. Raises `UserError` for an unknown preset or a seed that is no whole number.
    """
    name = name or default_name()
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(PRESETS)}."
        raise UserError(f"There is no preset {name!r}: {hint}")
    settings = PRESETS[name].replace(out=os.environ.get("INSTRUCT_LLAMA_OUT", ""))
    seed = os.environ.get("INSTRUCT_LLAMA_SEED", "")
    if seed and not seed.isdigit():
        raise UserError(f"INSTRUCT_LLAMA_SEED is {seed!r}; set it to a whole number, 1 for example.")
    return settings.replace(seed=int(seed)) if seed else settings
