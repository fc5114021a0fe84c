"""Every setting of every stage, as frozen dataclasses.

One `Settings` object describes a whole run, from the vocabulary to PPO. It is frozen (P12):
`settings.replace(...)` returns a changed copy, so models with different settings can coexist in one kernel.
The command line is generated from these classes: `--ppo.kl-coef 0.1` sets `settings.ppo.kl_coef`.
The comments behind the fields are its help texts.

The letters in shape comments have one meaning everywhere:
B sequences in a batch, T positions in a sequence, V tokens in the vocabulary, H attention heads, D model width.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# the rest of the package imports all settings, and the error that wrong ones raise, from here
from .errors import UserError, check  # noqa: F401
from .model_config import PROJECTIONS, LoRAConfig, ModelConfig, QuantConfig, RopeScaling  # noqa: F401


def _check_name(stage: str, name: str) -> None:
    """Raise `UserError` unless the name is that of one folder: no path, not hidden, valid on every system."""
    plain = bool(name) and not name.startswith(".") and not set(name) & set('/\\:*?"<>|\0') and name == name.strip()
    check(plain, f"{stage}.name is {name!r}; give the name of one folder, such as {stage}-2.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning-rate schedule (linear warm-up, cosine decay) and gradient clipping."""

    lr: float = 1e-3  # peak learning rate
    min_lr_ratio: float = 0.1  # final learning rate as a fraction of lr
    warmup_steps: int = 20  # optimizer steps of linear warm-up
    weight_decay: float = 0.01  # decoupled weight decay, applied to matrices only
    beta1: float = 0.9  # decay rate of the first moment
    beta2: float = 0.95  # decay rate of the second moment
    eps: float = 1e-8  # added to the square root of the second moment
    grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping
    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"  # the last three use bitsandbytes


@dataclass(frozen=True)
class LoopConfig:
    """Length and batch size of a supervised stage, and how often it validates and saves."""

    steps: int = 0  # number of optimizer steps; 0: derived from `epochs`
    epochs: float = 1.0  # passes over the training records, used when steps is 0
    batch_size: int = 32  # sequences per forward pass, summed over all processes
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    eval_every: int = 50  # optimizer steps between validations; the best weights are kept
    eval_batches: int = 8  # batches per validation
    save_every: int = 200  # optimizer steps between saved states, which --resume continues from
    sample_every: int = 200  # optimizer steps between logged text samples
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # compute dtype of the blocks; weights, losses: fp32

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
    """The SentencePiece tokenizer that is trained before pretraining."""

    vocab_size: int = 512  # number of tokens, including the 256 bytes and the special tokens
    files: tuple[str, ...] = ()  # text or record files to train on; empty: the pretraining corpus
    max_chars: int = 2_000_000  # maximum number of characters to train on


@dataclass(frozen=True)
class WorldConfig:
    """How much data of the embedded world, tinychat, is generated."""

    corpus_chars: int = 2_000_000  # characters of text for pretraining
    demonstrations: int = 6_000  # dialogs for SFT
    comparisons: int = 4_000  # prompts with ranked responses, for the reward model
    prompts: int = 4_000  # number of prompts for PPO
    heldout: int = 512  # number of records for validation
    temperature: float = 0.15  # noise of the Bradley-Terry labeller that ranks responses, in true reward


@dataclass(frozen=True)
class PretrainConfig:
    """Next-token prediction on plain text."""

    name: str = "pretrain"  # folder of the run, under out
    data: str = ""  # public data set or file of texts; --data overrides it; empty: tinychat
    seq_len: int = 128  # T, maximum tokens per training window
    optim: OptimConfig = OptimConfig(lr=3e-3)
    loop: LoopConfig = LoopConfig(steps=600, batch_size=32, eval_every=100)

    def __post_init__(self) -> None:
        _check_name("pretrain", self.name)


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations; `lora` trains adapters only, `quant` over a 4-bit base."""

    name: str = ""  # folder of the run, under out; empty: sft, sft-lora or sft-qlora
    data: str = ""  # public data set or file of dialogs; --data overrides it; empty: tinychat
    seq_len: int = 128  # maximum length of a dialog, in tokens
    pack: bool = False  # pack several dialogs into one row; attention does not cross dialogs
    freeze_layers: int = 0  # freeze the first N blocks and the embeddings
    lora: LoRAConfig = LoRAConfig(rank=0)  # train adapters instead of all weights
    train_embeddings: bool = False  # with adapters: also train embedding and output, for new chat tokens
    quant: QuantConfig = QuantConfig()  # 4-bit quantisation of the base under the adapters
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
    """Reward model: a scalar head trained on ranked responses, with two optional auxiliary losses."""

    name: str = ""  # folder of the run, under out; empty: reward, or reward-lora with adapters
    data: str = ""  # public data set or file of comparisons; --data overrides it; empty: tinychat
    init_from: Literal["sft", "pretrain"] = "sft"  # stage whose weights initialise the reward model
    seq_len: int = 160  # maximum length of prompt plus response, in tokens
    freeze_layers: int = 0  # freeze the first N blocks and the embeddings
    lora: LoRAConfig = LoRAConfig(rank=0)  # train adapters and head only; required by ppo.layout shared_base
    quant: QuantConfig = QuantConfig()  # 4-bit quantisation of the base under the adapters
    sample_share: float = 0.5  # fraction of comparisons whose responses are sampled from the SFT model
    responses_per_prompt: int = 3  # K, responses per sampled comparison
    normalise_samples: int = 256  # reference responses on which the mean and scale of the score are fitted
    token_coef: float = 0.0  # weight of the ranking loss on the head's mean over response tokens
    lm_coef: float = 0.0  # weight of the language-model loss on the best response of each comparison
    bucket_steps: int = 1  # sort the comparisons of this many optimizer steps by length: reduces padding
    optim: OptimConfig = OptimConfig(lr=5e-4)
    loop: LoopConfig = LoopConfig(epochs=1, batch_size=32)

    def __post_init__(self) -> None:
        _check_name("reward", self.run_name)
        check(min(self.token_coef, self.lm_coef) >= 0, "reward.token_coef and reward.lm_coef must not be negative.")
        check(self.bucket_steps >= 1, "reward.bucket_steps must be at least 1 (sorting within one step).")

    @property
    def run_name(self) -> str:
        return self.name or ("reward" if self.lora.rank == 0 else "reward-lora")


@dataclass(frozen=True)
class DPOConfig:
    """Preference optimisation without RL: DPO (arXiv:2305.18290), IPO (arXiv:2310.12036), KTO (arXiv:2402.01306)."""

    name: str = ""  # folder of the run, under out; empty: dpo, ipo or kto, with adapters dpo-lora and so on
    data: str = ""  # public data set or file of comparisons; --data overrides it; empty: the reward model's
    loss: Literal["dpo", "ipo", "kto"] = "dpo"  # kto also takes records with one labelled response
    beta: float = 0.1  # weight of the KL penalty that the loss implies
    label_smoothing: float = 0.0  # dpo: assumed share of comparisons whose label is wrong
    average_logprobs: bool = False  # use a response's mean log-probability per token, not the sum (TRL's ipo)
    desirable_weight: float = 1.0  # kto: weight of the loss of desirable responses
    undesirable_weight: float = 1.0  # kto: weight of the loss of undesirable responses
    seq_len: int = 160  # maximum length of prompt plus response, in tokens
    freeze_layers: int = 0  # freeze the first N blocks and the embeddings
    lora: LoRAConfig = LoRAConfig(rank=0)  # train adapters; the reference is then the model without them
    quant: QuantConfig = QuantConfig()  # 4-bit quantisation of the base under the adapters
    bucket_steps: int = 1  # sort the comparisons of this many optimizer steps by length: reduces padding
    eval_prompts: int = 128  # tinychat: prompts whose sampled responses get their true reward at each validation
    optim: OptimConfig = OptimConfig(lr=1e-4)
    loop: LoopConfig = LoopConfig(epochs=1, batch_size=32)

    def __post_init__(self) -> None:
        _check_name("dpo", self.run_name)
        check(0 < self.beta < math.inf, f"dpo.beta is {self.beta}; it must be a positive number.")
        check(
            0 <= self.label_smoothing < 0.5, "dpo.label_smoothing must lie in [0, 0.5): half of the labels say nothing."
        )
        check(self.label_smoothing == 0 or self.loss == "dpo", "dpo.label_smoothing is read by dpo.loss dpo alone.")
        check(min(self.desirable_weight, self.undesirable_weight) >= 0, "dpo's KTO weights must not be negative.")
        check(self.bucket_steps >= 1, "dpo.bucket_steps must be at least 1 (sorting within one step).")
        check(self.eval_prompts >= 1, "dpo.eval_prompts must be at least 1.")
        check(
            self.quant.kind == "none" or self.lora.rank > 0,
            "dpo.quant needs adapters to train, since a 4-bit base is frozen: set dpo.lora.rank, 8 for example.",
        )

    @property
    def run_name(self) -> str:
        kind = "" if self.lora.rank == 0 else "-lora" if self.quant.kind == "none" else "-qlora"
        return self.name or self.loss + kind


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled from a model: see `model.sampling.filter_logits`."""

    max_new_tokens: int = 64  # maximum length of a response, in tokens, including the end token
    temperature: float = 1.0  # sampling temperature; 0: greedy decoding
    top_k: int = 0  # sample from the k most likely tokens; 0: no limit
    top_p: float = 1.0  # sample from the most likely tokens with this total probability; 1: all

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        check(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative.")


@dataclass(frozen=True)
class PPOConfig:
    """PPO against a reward model (InstructGPT, arXiv:2203.02155; PPO, arXiv:1707.06347)."""

    name: str = "ppo"  # folder of the run, under out
    data: str = ""  # public data set or file of prompts; --data overrides it; empty: tinychat
    layout: Literal["four_models", "shared_base"] = "four_models"  # four networks; or adapters on one base
    iterations: int = 40  # number of iterations: sample rollouts, then update
    exact_iterations: int = 40  # PPO iterations on the enumerable language of notebook 07
    rollouts_per_iteration: int = 128  # rollouts (sampled responses) per iteration
    generation_batch_size: int = 128  # rollouts generated at once; batches are sharded over processes
    max_new_tokens: int = 48  # maximum length of a response, in tokens
    seq_len: int = 0  # maximum length of prompt plus response, in tokens; 0: the model's context length
    temperature: float = 1.0  # sampling temperature of the rollouts; must be positive
    top_k: int = 0  # sample from the k most likely tokens; 0: no limit
    top_p: float = 1.0  # sample from the most likely tokens with this total probability; 1: all
    num_ppo_epochs: int = 4  # passes over the rollouts of an iteration
    mini_batch_size: int = 32  # rollouts per optimizer step
    micro_batch_size: int = 32  # rollouts per forward pass, summed over all processes
    gamma: float = 1.0  # discount factor
    lam: float = 0.95  # lambda of GAE
    cliprange: float = 0.2  # the policy ratio is clipped to 1 +- cliprange
    cliprange_value: float = 0.2  # the value is clipped to its old estimate +- this; 0: no clipping
    vf_coef: float = 0.5  # weight of the value loss
    entropy_coef: float = 0.0  # weight of the entropy bonus
    ptx_coef: float = 0.0  # weight of the language-model loss on demonstrations (PPO-ptx)
    kl_coef: float = 0.05  # beta, weight of the per-token KL penalty
    kl_target: float = 0.0  # target of the adaptive KL controller, in nats per response; 0: kl_coef is fixed
    kl_horizon: int = 10  # horizon of the adaptive KL controller, in iterations
    whiten_advantages: bool = True  # whiten the advantages (mean 0, deviation 1) over response tokens
    score_clip: float = 5.0  # normalised scores are clipped to +- this; 0: no clipping
    missing_eos_score: float = -3.0  # replaces the score of a response without an end token
    freeze_layers: int = 0  # freeze the first N blocks and the embeddings of the policy
    offload_inactive: bool = False  # four_models: move networks that a phase does not use to CPU memory
    devices: tuple[str, ...] = ()  # four_models: devices of policy, reference, value, reward; empty: one for all
    lora: LoRAConfig = LoRAConfig()  # shared_base: adapters of policy and value model
    quant: QuantConfig = QuantConfig()  # shared_base: 4-bit quantisation of the base
    optim: OptimConfig = OptimConfig(lr=3e-4, min_lr_ratio=1.0, warmup_steps=5, weight_decay=0.0)
    value_lr: float = 1e-3  # peak learning rate of the value model
    sample_every: int = 1  # iterations between logged rollouts
    save_every: int = 10  # iterations between saved states, which --resume continues from
    eval_every: int = 10  # iterations between validations
    eval_prompts: int = 128  # prompts per validation
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # compute dtype of the blocks; log-probabilities: fp32

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
    """The report card of all stages."""

    prompts: int = 512  # held-out prompts per stage
    responses: int = 2  # responses per prompt at temperature 1; their true rewards are averaged
    comparisons: int = 2000  # held-out comparisons for the accuracy of the reward model
    max_new_tokens: int = 48  # maximum length of a response, in tokens
    temperature: float = 1.0  # sampling temperature on real data; tinychat is always evaluated at both 1 and 0
    batch_size: int = 256  # prompts per generation batch

    def __post_init__(self) -> None:
        check(self.responses >= 1, "evaluate.responses must be at least 1.")


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun processes shard a model; without effect in a single process."""

    reshard: bool = True  # free gathered weights after the forward pass: saves memory, adds communication
    gather_bf16: bool = False  # with precision bf16: gather weights in bf16, which halves communication
    cpu_offload: bool = False  # keep weights, gradients and optimizer state in CPU memory
    timeout_minutes: int = 60  # timeout of collective operations, which includes building the data

    def __post_init__(self) -> None:
        check(self.timeout_minutes >= 1, "parallel.timeout_minutes must be at least 1.")


@dataclass(frozen=True)
class Settings:
    """All settings of a run. `presets.get(name)` returns those of a preset."""

    preset: str = "laptop"  # preset that these settings are based on
    out: str = ""  # folder of all run folders; empty: checkpoints/<preset>
    seed: int = 1  # random seed of the whole run
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto: the best available one
    weights: str = ""  # pretrained weights: smollm2, a hub name, a folder or a .gguf; empty: our pretraining
    init: str | None = None  # start from this checkpoint instead of that of the previous stage
    data: str | None = None  # train on this file or public data set instead of the one in the settings
    resume: bool = False  # continue an interrupted run of this stage
    overwrite: bool = False  # replace a finished run, once the new run has finished
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    world: WorldConfig = WorldConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    qlora: SFTConfig = SFTConfig(lora=LoRAConfig(), quant=QuantConfig(kind="nf4"))  # the SFT of notebook 05
    reward: RewardConfig = RewardConfig()
    dpo: DPOConfig = DPOConfig()
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
        """One line that describes preset, seed and model, for the top of a notebook."""
        shape = self.model
        return (
            f"preset {self.preset}, seed {self.seed}: {shape.n_layers} layers, dim {shape.dim}, {shape.n_heads} heads "
            f"({shape.n_kv_heads} for keys and values), {self.tokenizer.vocab_size} pieces"
        )

    def replace(self, **changes: Any) -> Settings:
        """A changed copy; double underscores stand for dots: `replace(ppo__kl_coef=0.0, seed=2)`."""
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
    """The checkout that contains the current folder (notebooks run in a subfolder), else the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "checkpoints").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def shown(path: Path) -> str:
    """A path for messages: relative to the project folder when inside it, else absolute."""
    path, project = path.resolve(), project_folder().resolve()
    return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)


def to_json(config: Any) -> str:
    """A config as indented JSON; equal settings give equal bytes."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)
