"""Every setting of every stage, as frozen dataclasses.

One `Settings` object describes a whole run, from the vocabulary to PPO. It is frozen: change it with
`settings.replace(...)`, which makes a new one, so two models with different settings live in one kernel.
The command line is generated from these classes: `--ppo.kl-coef 0.1` sets `settings.ppo.kl_coef`.

The letters in shape comments mean one thing everywhere:
B sequences in a batch, T positions in a sequence, V tokens in the vocabulary, H attention heads, D model width.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class UserError(Exception):
    """Something the user can put right: one sentence that names the file, line or option, and the cure."""


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def _check_name(stage: str, name: str) -> None:
    """A run's name is one folder in the out folder: it leads nowhere else, and is not hidden."""
    plain = bool(name) and not name.startswith(".") and not set(name) & set('/\\:*?"<>|\0') and name == name.strip()
    check(plain, f"{stage}.name is {name!r}; give the name of one folder, such as {stage}-2.")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length a model was pretrained on."""

    kind: Literal["none", "linear", "llama3"] = "none"  # linear: all positions; llama3: only the slow frequencies
    factor: float = 8.0  # how many times longer the context becomes
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_seq_len / this are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_max_seq_len / this are left alone
    original_max_seq_len: int = 8192  # llama3: the context of pretraining, in tokens


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LLaMA decoder (LLaMA 2, arXiv:2307.09288; LLaMA 3, arXiv:2407.21783)."""

    vocab_size: int = 512  # V, tokens in the vocabulary
    dim: int = 128  # D, width of the residual stream
    n_layers: int = 2  # decoder blocks
    n_heads: int = 4  # H, query heads
    n_kv_heads: int = 2  # key/value heads; n_heads means multi-head, 1 means multi-query
    ffn_dim: int = 352  # hidden width of the SwiGLU feed-forward
    max_seq_len: int = 256  # longest context, in tokens
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling = RopeScaling()  # stretching of the rotary frequencies
    norm_eps: float = 1e-5  # RMSNorm's epsilon
    init_std: float = 0.02  # deviation of the random weights; narrow models learn to copy sooner with about 1/sqrt(dim)
    tie_embeddings: bool = True  # output projection shares the embedding's weights
    embed_dropout: float = 0.0  # dropout on the token embeddings
    attn_dropout: float = 0.0  # dropout on the attention weights
    resid_dropout: float = 0.0  # dropout on what each block adds to the residual stream
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        check(self.dim % self.n_heads == 0, f"model.dim {self.dim} must be a multiple of model.n_heads {self.n_heads}.")
        check((self.dim // self.n_heads) % 2 == 0, "model.dim / model.n_heads must be even, for rotary pairs.")
        check(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_heads {self.n_heads} must be a multiple of model.n_kv_heads {self.n_kv_heads}.",
        )
        for name in ("vocab_size", "n_layers", "ffn_dim", "max_seq_len"):
            check(getattr(self, name) >= 1, f"model.{name} must be at least 1.")


PROJECTIONS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")  # the linear layers of a block


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): W x + (alpha / rank) B A x."""

    rank: int = 8  # rows of A, columns of B; 0 means no adapters
    alpha: float = 16.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # dropout on the adapter's input
    target_modules: tuple[str, ...] = PROJECTIONS  # which projections get one

    def __post_init__(self) -> None:
        check(self.rank >= 0, f"lora.rank is {self.rank}; it must be at least 1, or 0 for no adapters.")
        wrong = [name for name in self.target_modules if name not in PROJECTIONS]
        check(not wrong, f"lora.target_modules names {wrong}; choose from {', '.join(PROJECTIONS)}.")


@dataclass(frozen=True)
class QuantConfig:
    """4-bit storage of a frozen base (QLoRA, arXiv:2305.14314)."""

    kind: Literal["none", "nf4", "fp4"] = "none"  # the codebook; none keeps the base dense
    block_size: int = 64  # weights that share one scale
    double_quant: bool = True  # quantise the scales as well


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule (linear warm-up, cosine decay) and clipping."""

    lr: float = 1e-3  # peak learning rate
    min_lr_ratio: float = 0.1  # the cosine ends at lr times this
    warmup_steps: int = 20  # optimizer steps of linear warm-up
    weight_decay: float = 0.01  # decoupled, on matrices only
    beta1: float = 0.9  # decay of the mean of the gradient
    beta2: float = 0.95  # decay of the mean of its square
    eps: float = 1e-8  # added to the root of the second moment
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"  # all but adamw: bitsandbytes


@dataclass(frozen=True)
class LoopConfig:
    """How long a supervised stage trains and how often it looks up."""

    steps: int = 0  # optimizer steps; 0 means: as many as `epochs` needs
    epochs: float = 1.0  # passes over the training records, used when steps is 0
    batch_size: int = 32  # sequences in one forward pass, of all processes together
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    eval_every: int = 50  # optimizer steps between validations; the best one is kept
    eval_batches: int = 8  # batches of held-out records per validation
    save_every: int = 200  # optimizer steps between resumable saves
    sample_every: int = 200  # optimizer steps between text samples
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # compute dtype of the blocks; weights and losses stay fp32

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "eval_every",
            "eval_batches",
            "save_every",
            "sample_every",
        ):
            check(getattr(self, name) >= 1, f"loop.{name} is {getattr(self, name)}; it must be at least 1.")
        check(self.steps >= 0 and self.epochs > 0, "loop.steps must not be negative and loop.epochs must be positive.")


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece vocabulary that is trained before pretraining."""

    vocab_size: int = 512  # pieces wanted, the 256 bytes and the special tokens included
    files: tuple[str, ...] = ()  # text or record files to train on; none means the pretraining corpus
    max_chars: int = 2_000_000  # characters of the corpus that training reads


@dataclass(frozen=True)
class WorldConfig:
    """How much of the embedded world, tinychat, is made."""

    corpus_chars: int = 2_000_000  # characters of running text for pretraining
    demonstrations: int = 6_000  # prompts with labellers' answers, for SFT
    comparisons: int = 4_000  # prompts with ranked answers, for the reward model
    prompts: int = 4_000  # prompts for PPO
    heldout: int = 512  # held-out records for validation
    temperature: float = 0.15  # of the Bradley-Terry labeller who ranks answers, in units of true reward


@dataclass(frozen=True)
class PretrainConfig:
    """Next-token prediction on running text."""

    name: str = "pretrain"  # folder of the run, under out
    data: str = ""  # public set or file of texts, where --data gives none; empty: tinychat
    seq_len: int = 128  # T, the most tokens of one window
    optim: OptimConfig = OptimConfig(lr=3e-3)
    loop: LoopConfig = LoopConfig(steps=600, batch_size=32, eval_every=100)

    def __post_init__(self) -> None:
        _check_name("pretrain", self.name)


@dataclass(frozen=True)
class SFTConfig:
    """TrainJob fine-tuning on demonstrations; with `lora`, of adapters only; with `quant`, over a 4-bit base."""

    name: str = ""  # folder of the run; empty: sft, sft-lora or sft-qlora, by what is trained
    data: str = ""  # public set or file of dialogs, where --data gives none; empty: tinychat
    seq_len: int = 128  # longest dialog, in tokens
    pack: bool = False  # several dialogs to a row, attention kept inside each
    freeze_layers: int = 0  # the first N blocks and the embeddings stay as they were
    lora: LoRAConfig = LoRAConfig(rank=0)  # adapters instead of full weights
    train_embeddings: bool = False  # beside adapters, embeddings and output train too: chat markers are new to the base
    quant: QuantConfig = QuantConfig()  # 4-bit base under the adapters
    optim: OptimConfig = OptimConfig(lr=1e-3)
    loop: LoopConfig = LoopConfig(epochs=2, batch_size=32)

    def __post_init__(self) -> None:
        _check_name("sft", self.run_name)
        check(
            self.quant.kind == "none" or self.lora.rank > 0,
            "sft.quant needs adapters to train, since a 4-bit base is frozen: set sft.lora.rank, 8 for example.",
        )

    @property
    def run_name(self) -> str:
        kind = "sft" if self.lora.rank == 0 else "sft-lora" if self.quant.kind == "none" else "sft-qlora"
        return self.name or kind


@dataclass(frozen=True)
class RewardConfig:
    """Reward model: a scalar head trained on ranked answers; two auxiliary losses help small networks."""

    name: str = ""  # folder of the run; empty: reward, or reward-lora with adapters
    data: str = ""  # public set or file of comparisons, where --data gives none; empty: tinychat
    init_from: Literal["sft", "pretrain"] = "sft"  # which stage's weights it starts from
    seq_len: int = 160  # longest prompt with answer, in tokens
    freeze_layers: int = 0  # the first N blocks and the embeddings stay as they were
    lora: LoRAConfig = LoRAConfig(rank=0)  # adapters and the head only; what PPO's shared_base layout needs
    quant: QuantConfig = QuantConfig()  # 4-bit base under the adapters
    sample_share: float = 0.5  # share of the comparisons whose answers are sampled from the SFT model itself
    responses_per_prompt: int = 3  # K, answers per sampled comparison
    normalise_samples: int = 256  # reference answers on which the score's mean and scale are fitted
    token_coef: float = 0.0  # weight of the ranking loss of the head's mean over an answer's own tokens
    lm_coef: float = 0.0  # weight of the language-model loss on the best answer of each comparison
    bucket_steps: int = 1  # optimizer steps whose comparisons are sorted by length together: more means less padding
    optim: OptimConfig = OptimConfig(lr=5e-4)
    loop: LoopConfig = LoopConfig(epochs=1, batch_size=32)

    def __post_init__(self) -> None:
        _check_name("reward", self.run_name)
        check(min(self.token_coef, self.lm_coef) >= 0, "reward.token_coef and reward.lm_coef must not be negative.")
        check(self.bucket_steps >= 1, "reward.bucket_steps must be at least 1: each step's comparisons by themselves.")

    @property
    def run_name(self) -> str:
        return self.name or ("reward" if self.lora.rank == 0 else "reward-lora")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled from a model: see `model.sampling.filter_logits`."""

    max_new_tokens: int = 64  # longest response, in tokens, end token included
    temperature: float = 1.0  # logits are divided by this; 0 takes the likeliest token each time
    top_k: int = 0  # sample among the k likeliest tokens; 0 means all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this mass; 1 means all

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        check(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative.")


@dataclass(frozen=True)
class PPOConfig:
    """PPO from human preferences (InstructGPT, arXiv:2203.02155; PPO, arXiv:1707.06347)."""

    name: str = "ppo"  # folder of the run, under out
    data: str = ""  # public set or file of prompts, where --data gives none; empty: tinychat
    layout: Literal["four_models", "shared_base"] = "four_models"  # four networks, or one base with adapters
    iterations: int = 40  # rollout and update rounds
    exact_iterations: int = 40  # rounds on the enumerable language that opens notebook 07
    rollouts_per_iteration: int = 128  # episodes (answers) per iteration
    generation_batch_size: int = 128  # episodes generated at once; processes share an iteration's batches
    max_new_tokens: int = 48  # longest answer, in tokens
    seq_len: int = 0  # longest prompt with its answer, in tokens; 0 means all of the model's context
    temperature: float = 1.0  # of the behaviour policy
    top_k: int = 0  # sample among the k likeliest tokens; 0 means all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this mass; 1 means all
    num_ppo_epochs: int = 4  # passes over the episodes of an iteration
    mini_batch_size: int = 32  # episodes per optimizer step
    micro_batch_size: int = 32  # episodes per forward pass, of all processes together
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda
    cliprange: float = 0.2  # the policy ratio is clipped to 1 +- this
    cliprange_value: float = 0.2  # the value may move by this from its old estimate; 0 turns it off
    vf_coef: float = 0.5  # weight of the value loss
    entropy_coef: float = 0.0  # weight of the entropy bonus
    ptx_coef: float = 0.0  # weight of the language-model loss on demonstrations mixed in
    kl_coef: float = 0.05  # beta, weight of the per-token KL penalty
    kl_target: float = 0.0  # nats per answer for the adaptive controller; 0 keeps kl_coef fixed
    kl_horizon: int = 10  # iterations over which the adaptive controller corrects a full error
    whiten_advantages: bool = True  # advantages to mean 0 and deviation 1 over the batch's real tokens
    score_clip: float = 5.0  # normalised scores are clipped to +- this; 0 turns it off
    missing_eos_score: float = -3.0  # score of an answer that never ends, in place of the reward model's
    freeze_layers: int = 0  # the first N blocks and the embeddings of the policy stay as they were
    offload_inactive: bool = False  # four_models: those that a phase does not need wait in main memory
    devices: tuple[str, ...] = ()  # four_models: of policy, reference, value and reward, each its own; empty: one
    lora: LoRAConfig = LoRAConfig()  # shared_base: the adapters of policy and value
    quant: QuantConfig = QuantConfig()  # shared_base: 4-bit storage of the base
    optim: OptimConfig = OptimConfig(lr=3e-4, min_lr_ratio=1.0, warmup_steps=5, weight_decay=0.0)
    value_lr: float = 1e-3  # peak learning rate of the value model
    sample_every: int = 1  # iterations between logged episodes
    save_every: int = 10  # iterations between resumable saves
    eval_every: int = 10  # iterations between evaluations on held-out prompts
    eval_prompts: int = 128  # held-out prompts per evaluation
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # compute dtype of the blocks; log-probs stay fp32

    def __post_init__(self) -> None:
        _check_name("ppo", self.name)
        for name in (
            "iterations", "rollouts_per_iteration", "generation_batch_size", "max_new_tokens", "num_ppo_epochs",
            "mini_batch_size", "micro_batch_size", "sample_every", "save_every", "eval_every", "eval_prompts",
            "kl_horizon",
        ):  # fmt: skip
            check(getattr(self, name) >= 1, f"ppo.{name} is {getattr(self, name)}; it must be at least 1.")
        check(0 <= self.kl_coef < math.inf, f"ppo.kl_coef is {self.kl_coef}; it must be a number from 0 up.")
        check(self.temperature > 0, "ppo.temperature must be positive: a greedy policy has no log-probabilities.")
        check(0 < self.top_p <= 1, "ppo.top_p must lie in (0, 1].")

    @property
    def sampling(self) -> SamplingConfig:
        """How the policy samples its rollouts."""
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class EvaluateConfig:
    """The report card."""

    prompts: int = 512  # held-out prompts per stage
    responses: int = 2  # responses to each prompt at temperature 1: a prompt's true reward is their mean
    comparisons: int = 2000  # held-out comparisons that judge the reward model
    max_new_tokens: int = 48  # longest answer, in tokens
    temperature: float = 1.0  # of answers to real data; the card of the embedded world takes both 1 and 0
    batch_size: int = 256  # prompts answered at once

    def __post_init__(self) -> None:
        check(self.responses >= 1, "evaluate.responses must be at least 1.")


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes under torchrun divide a model among them; alone, a process takes no notice of it."""

    reshard: bool = True  # let go of a block's weights between its forward and its backward: less memory, more traffic
    gather_bf16: bool = False  # with precision bf16, gather the blocks' weights as bf16: half the traffic
    cpu_offload: bool = False  # weights, gradients and optimizer state wait in main memory
    timeout_minutes: int = 60  # how long processes wait for one that does not come; building data counts too

    def __post_init__(self) -> None:
        check(self.timeout_minutes >= 1, "parallel.timeout_minutes must be at least 1.")


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. `presets.get(name)` makes one."""

    preset: str = "laptop"  # which preset these settings started from
    out: str = ""  # folder of the runs; empty: checkpoints/<preset>
    seed: int = 1  # the only source of randomness
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes the best there is
    weights: str = ""  # what stands in for pretraining: smollm2, a hub name, a folder or a .gguf; empty: pretraining
    init: str | None = None  # start the stage from this checkpoint instead of the previous stage's
    data: str | None = None  # train on this file or public set instead of the stage's own
    resume: bool = False  # go on where an interrupted run of this stage stopped
    overwrite: bool = False  # replace what is finished in the folder, once the new run has finished
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    world: WorldConfig = WorldConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    qlora: SFTConfig = SFTConfig(lora=LoRAConfig(), quant=QuantConfig(kind="nf4"))  # the SFT of notebook 05
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, f"--seed is {self.seed}; it must not be negative, and must be below 2**63.")

    @property
    def out_dir(self) -> Path:
        """Folder of all run folders."""
        return Path(self.out) if self.out else project_folder() / "checkpoints" / self.preset

    def summary(self) -> str:
        """One line for the top of a notebook."""
        shape = self.model
        return (
            f"preset {self.preset}, seed {self.seed}: {shape.n_layers} layers, dim {shape.dim}, {shape.n_heads} heads "
            f"({shape.n_kv_heads} for keys and values), {self.tokenizer.vocab_size} pieces"
        )

    def replace(self, **changes: Any) -> Settings:
        """A copy with changes; dotted fields as double underscores: `replace(ppo__kl_coef=0.0, seed=2)`."""
        nested: dict[str, dict[str, Any]] = {}
        flat: dict[str, Any] = {}
        for key, value in changes.items():
            group, _, rest = key.partition("__")
            if rest:
                nested.setdefault(group, {})[rest] = value
            else:
                flat[key] = value
        for group, inner in nested.items():
            flat[group] = _replace_nested(flat.get(group, getattr(self, group)), inner)
        return dataclasses.replace(self, **flat)


def _replace_nested(config: Any, changes: dict[str, Any]) -> Any:
    flat = {key: value for key, value in changes.items() if "__" not in key}
    for key, value in changes.items():
        group, _, rest = key.partition("__")
        if rest:
            flat[group] = _replace_nested(flat.get(group, getattr(config, group)), {rest: value})
    return dataclasses.replace(config, **flat)


def project_folder() -> Path:
    """The checkout that the current folder lies in (so a notebook finds it too), else the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "checkpoints").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def shown(path: Path) -> str:
    """A path as people want to read it: from the project's folder on, where it lies inside."""
    path, project = path.resolve(), project_folder().resolve()
    return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)


def to_json(config: Any) -> str:
    """A config as indented JSON, the same bytes for the same settings."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)
