"""One table of settings for every machine: a preset's name is all that changes between CI, a laptop and a GPU."""

from __future__ import annotations

import difflib
import os

from . import config as c
from .config import Settings, UserError

LAPTOP = Settings(
    preset="laptop",
    model=c.ModelConfig(dim=128, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=352, max_seq_len=256, init_std=0.12),
    tokenizer=c.TokenizerConfig(vocab_size=640),
    world=c.WorldConfig(corpus_chars=4_000_000, demonstrations=16_000, comparisons=15_000, prompts=4_000, heldout=512),
    pretrain=c.PretrainConfig(
        seq_len=96, optim=c.OptimConfig(lr=4e-3, warmup_steps=50),
        loop=c.LoopConfig(steps=1800, batch_size=11, eval_every=300),
    ),
    sft=c.SFTConfig(loop=c.LoopConfig(batch_size=16, eval_every=200)),
    reward=c.RewardConfig(
        sample_share=0.1, answers=4, optim=c.OptimConfig(lr=6e-4),
        loop=c.LoopConfig(batch_size=16, eval_batches=16, eval_every=200),
    ),
    qlora=c.SFTConfig(
        lora=c.LoRAConfig(rank=16, alpha=32.0), train_embeddings=True, quant=c.QuantConfig(kind="nf4"),
        optim=c.OptimConfig(lr=3e-3), loop=c.LoopConfig(batch_size=16, eval_every=200),
    ),
    ppo=c.PPOConfig(
        iterations=18, rollouts=256, rollout_batch=256, epochs=1, minibatch=32, kl_coef=0.3, value_clip=0.5,
        value_lr=2e-3, eval_every=9, eval_prompts=512,
        optim=c.OptimConfig(lr=7e-4, min_lr_ratio=0.02, warmup_steps=5, weight_decay=0.0),
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
        normalise_samples=32,
        loop=c.LoopConfig(steps=10, batch_size=8, eval_every=5, eval_batches=2, save_every=5, sample_every=10),
    ),
    ppo=c.PPOConfig(
        iterations=3, exact_iterations=4, rollouts=16, rollout_batch=16, max_new_tokens=16, epochs=2, minibatch=8,
        micro_batch=8, save_every=1, eval_every=2, eval_prompts=16,
    ),
    evaluate=c.EvaluateConfig(prompts=32, comparisons=64, max_new_tokens=24, batch_size=32),
)  # fmt: skip

PRESETS = {settings.preset: settings for settings in (TINY, LAPTOP)}


def default_name() -> str:
    """`INSTRUCT_LLAMA_PRESET` when it is set, else what the hardware allows; the laptop preset runs everywhere."""
    return os.environ.get("INSTRUCT_LLAMA_PRESET") or "laptop"


def get(name: str | None = None) -> Settings:
    """Every stage's settings for a preset; without a name, of the default one.

    The folder of runs and the seed also come from the environment where `INSTRUCT_LLAMA_OUT` and
    `INSTRUCT_LLAMA_SEED` are set: that is how `tour` tells the notebooks.
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
