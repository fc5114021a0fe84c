"""PPO's four networks on a machine: adapters, devices, offloading, sharding, precision, in two memory layouts.

`FourModels` holds policy, value, reward and reference as separate networks. `SharedBase` holds one frozen base, dense
or 4-bit: policy, value and reward are LoRA adapters with their heads, and the reference is the base without adapters.
Both implement `rlhf.actors.Actors`: `with actors.use("policy") as model:` gives the network of a role.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import seeds
from ..config import LoRAConfig, OptimConfig, PPOConfig, UserError, check
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.llama import Llama, ScalarLlama
from ..model.sampling import SpecialTokens
from ..rlhf.actors import Role
from ..rlhf.rollout import Rollouts
from . import checkpoint, distributed
from .device import autocast
from .optim import NonFinite, freeze_first, make_optimizer, make_scaler, scaled_step


class _Actors(ABC):
    """What both layouts share: precision, processes, the optimizer. `rlhf.actors.Actors` documents the methods.

    Rollouts are stored on `device`, the policy's device.
    """

    def __init__(self, tokenizer: SpecialTokens, device: torch.device | str = "cpu", precision: str = "fp32"):
        self.tokenizer, self.device, self.precision = tokenizer, torch.device(device), precision
        self.reward_mean, self.reward_scale = 0.0, 1.0
        self.scaler = make_scaler(precision, self.device)

    @abstractmethod
    def role(self, role: Role) -> contextlib.AbstractContextManager[nn.Module]:
        """The network of a role, on the device where it computes."""

    @abstractmethod
    def parts(self, *roles: Role) -> list[nn.Module]:
        """The modules that hold the weights of some roles, each once; of all roles when none is named."""

    @abstractmethod
    def trainable(self, role: Role) -> dict[str, nn.Parameter]:
        """Named parameters that train for a role."""

    @property
    @abstractmethod
    def value_head(self) -> nn.Linear:
        """The head of the value model."""

    @property
    def processes(self) -> int:
        return distributed.world_size()

    @contextlib.contextmanager
    def use(self, role: Role, training: bool = False) -> Iterator[nn.Module]:
        """The network of a role under the training precision; unless it trains, its weights are unsharded."""
        gathered = contextlib.nullcontext() if training else distributed.unsharded(*self.parts(role))
        with self.role(role) as model, gathered, autocast(self.precision, self.device):
            yield model

    def optimizing(self, optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total: int, loss: float, where: str
    ) -> tuple[float, ...]:
        if not math.isfinite(loss):
            optimizer.zero_grad(set_to_none=True)
            raise NonFinite(f"The PPO loss is {loss} at {where}: lower the learning rate.")
        return scaled_step(self.scaler, optimizer, optim, step, total, where)

    def map(self, function: Callable[[int], Rollouts], n: int) -> list[Rollouts]:
        made = {}
        for number in distributed.tasks_for_rank(n):
            part = function(number)
            made[number] = part.to("cpu") if self.processes > 1 else part
        return list(distributed.all_gather_dict(made).values())

    def shard_rows(self, rows: Sequence[int]) -> tuple[list[int], int]:
        return distributed.shard_rows(rows)

    def reduce_sum(self, figures: dict[str, float]) -> dict[str, float]:
        return distributed.all_reduce_sum(figures)

    def make_optimizer(self, config: PPOConfig) -> torch.optim.Optimizer:
        """One AdamW over policy and value, each with its own learning rate."""
        rates: dict[Role, float] = {"policy": config.optim.lr, "value": config.value_lr}
        groups = [(list(self.trainable(role).values()), rate) for role, rate in rates.items()]
        return make_optimizer(groups, config.optim)

    def normalise_scores(self, mean: float, scale: float) -> None:
        """Normalise scores to (raw - mean) / scale; the value, a copy of the reward model, is rescaled alike."""
        self.reward_mean, self.reward_scale = mean, scale
        normalise_head(self.value_head, mean, scale)


class _OnOtherDevice(nn.Module):
    """A network on another device than the rollouts: moves its inputs there and its outputs back."""

    def __init__(self, model: Llama, place: torch.device, home: torch.device):
        super().__init__()
        self.model, self.place, self.home = model, place, home
        self.train(model.training)  # a new module counts as training

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.to(self.place)).to(self.home)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.model.hidden(tokens.to(self.place))  # stays on the network's device, for `head`

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden).to(self.home)


class FourModels(_Actors):
    """Policy and reference (`Llama`), value and reward (`ScalarLlama`), each with its own weights.

    Without `swap_to`, each network stays on its device. With it, a network moves to that device for the phases that
    need it, and back afterwards.
    """

    def __init__(
        self, policy: Llama, reference: Llama, value: ScalarLlama, reward: ScalarLlama,
        tokenizer: SpecialTokens, device: torch.device | str = "cpu", precision: str = "fp32",
        swap_to: torch.device | None = None,
    ):  # fmt: skip
        super().__init__(tokenizer, device, precision)
        self.models = {"policy": policy, "reference": reference, "value": value, "reward": reward}
        self.swap_to, self.here = swap_to, set[Role]()
        for role, model in self.models.items():
            model.eval()  # no dropout: log-probs of sampling and of training must agree
            model.requires_grad_(role in ("policy", "value"))

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[nn.Module]:
        """The network of `role`, moved to `swap_to` if that is set."""
        with self.on_device(role):
            model = self.models[role]
            place = next(model.parameters()).device
            # Offloaded shards are in main memory, but they are gathered on the device of the rollouts.
            elsewhere = place != self.device and self.processes == 1
            yield _OnOtherDevice(model, place, self.device) if elsewhere else model

    @contextlib.contextmanager
    def optimizing(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """With `swap_to`, AdamW's state, its step count included, moves with its weights."""

        def move(place: Callable[[Tensor], torch.device]) -> None:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        state[key] = value.to(place(parameter))

        with self.on_device("policy", "value"):
            if self.swap_to is not None:
                move(lambda parameter: parameter.device)
            try:
                yield
            finally:
                if self.swap_to is not None:
                    move(lambda _: torch.device("cpu"))

    @contextlib.contextmanager
    def on_device(self, *roles: Role) -> Iterator[None]:
        """Inside, these networks are on `swap_to`; afterwards, those that were moved are moved back."""
        coming: list[Role] = [role for role in roles if self.swap_to is not None and role not in self.here]
        waiting = {role: next(self.models[role].parameters()).device for role in coming}
        try:
            for role in coming:
                self.models[role].to(self.swap_to)
                self.here.add(role)
            yield
        finally:
            for role, place in waiting.items():
                self.models[role].to(place)
                self.here.discard(role)

    @property
    def context(self) -> int:
        """The maximum length of a prompt with its response, in tokens."""
        return self.models["policy"].config.max_seq_len

    @property
    def value_head(self) -> nn.Linear:
        return self.models["value"].value_head

    def parts(self, *roles: Role) -> list[nn.Module]:
        return [self.models[role] for role in roles or self.models]

    def trainable(self, role: Role) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.models[role].named_parameters() if p.requires_grad}

    def save(self, folder: Path, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
        """Write the policy as a full checkpoint."""
        checkpoint.save_full(folder, self.models["policy"], tokenizer, info)


class _ScalarView(nn.Module):
    """A scalar head over the shared base: behaves like a `ScalarLlama`, but owns only the head."""

    def __init__(self, base: Llama, head: nn.Linear):
        super().__init__()
        self.value_head = head
        self._base = [base]  # in a list, so that the base is not registered as a submodule of every head

    def forward(self, tokens: Tensor, *, segment_ids: Tensor | None = None) -> Tensor:
        hidden = self._base[0].hidden(tokens, segment_ids=segment_ids)  # (B, T, D)
        with torch.autocast(hidden.device.type, enabled=False):  # fp32 under autocast too, as `ScalarLlama.head`
            return self.value_head(hidden.float()).squeeze(-1)  # (B, T)


class SharedBase(_Actors):
    """One frozen base with the adapters `policy`, `value` and `reward`; the reward model must be an adapter.

    The reference is the base without adapters, or with the adapter `reference` if SFT trained one. `folder` holds the
    base.
    """

    def __init__(
        self, base: Llama, config: LoRAConfig, heads: dict[str, nn.Linear], generator: torch.Generator,
        tokenizer: SpecialTokens, device: torch.device | str = "cpu", precision: str = "fp32", folder: Path = Path(),
    ):  # fmt: skip
        super().__init__(tokenizer, device, precision)
        self.base, self.folder = base.eval(), folder
        for name in ("policy", "value"):
            if name not in lora.adapter_names(base):
                lora.add_adapter(base, name, config, generator)
        self.heads = {name: _ScalarView(base, head) for name, head in heads.items()}
        self.config = config
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.heads["reward"].requires_grad_(False)
        for role in ("policy", "value"):
            for parameter in self.trainable(role).values():
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[nn.Module]:
        """The base with the adapter of `role` active; for the reference, the SFT adapter or none."""
        with lora.adapter(self.base, role if role in lora.adapter_names(self.base) else None):
            yield self.heads.get(role, self.base)

    @property
    def context(self) -> int:
        """The maximum length of a prompt with its response, in tokens."""
        return self.base.config.max_seq_len

    @property
    def value_head(self) -> nn.Linear:
        return self.heads["value"].value_head

    def parts(self, *roles: Role) -> list[nn.Module]:
        return [self.base, *(head.value_head for name, head in self.heads.items() if not roles or name in roles)]

    def trainable(self, role: Role) -> dict[str, nn.Parameter]:
        named = {f"adapter.{i}": p for i, p in enumerate(lora.adapter_parameters(self.base, role))}
        head = self.heads["value"].value_head.named_parameters() if role == "value" else ()
        return named | {f"value_head.{name}": p for name, p in head}

    def save(self, folder: Path, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
        """Write the policy's adapter, with the path of its base."""
        info = {**info, "lora": vars(self.config)}
        checkpoint.save_adapter(folder, self.base, "policy", self.folder, tokenizer, info)


@torch.no_grad()
def normalise_head(head: nn.Linear, mean: float, scale: float) -> None:
    """Rescale a head of raw scores, in place, so that it gives (raw - mean) / scale; this adds a bias.

    The value starts as a copy of the reward model, and the rewards that it predicts are normalised.
    """
    head.weight.div_(scale)
    head.bias = nn.Parameter(torch.full((1,), -mean / scale, device=head.weight.device))


def four_models(
    sft: Path, reward: Path, tokenizer: SpecialTokens, device: torch.device, config: PPOConfig
) -> FourModels:  # fmt: skip
    """Policy and reference start from the SFT model, the value from the reward model (InstructGPT, appendix C.4)."""
    check(len(config.devices) in (0, 4), "ppo.devices must name four devices: of policy, reference, value and reward.")
    check(
        not (config.offload_inactive and config.devices),
        "ppo.offload_inactive and ppo.devices exclude each other: set only one.",
    )
    places = config.devices or 4 * (("cpu" if config.offload_inactive else device),)
    policy, reference = (checkpoint.load_full(sft, at)[0] for at in places[:2])
    value, scorer = (cast(ScalarLlama, checkpoint.load_full(reward, at, "scalar")[0]) for at in places[2:])
    swap_to = device if config.offload_inactive else None
    models = FourModels(policy, reference, value, scorer, tokenizer, device, config.precision, swap_to)
    freeze_first(policy, config.freeze_layers)
    return models


def shared_base(
    sft: Path, reward: Path, tokenizer: SpecialTokens, device: torch.device, config: PPOConfig, seed: int
) -> SharedBase:  # fmt: skip
    """One base for all four: a full SFT model, or the base of an SFT adapter.

    The reward run must be an adapter over the same base, with PPO's quantisation. The value starts from the reward
    adapter. If there is an SFT adapter, the policy starts from it, and the reference uses it.
    """
    folder, sft_adapter = checkpoint.base_of(sft)
    base_folder, reward_adapter = checkpoint.base_of(reward)
    if reward_adapter is None or base_folder.resolve() != folder.resolve():
        raise UserError(
            f"ppo.layout shared_base needs a reward adapter trained over {folder}, and {reward} is not one: "
            "train it with `reward --reward.lora.rank 8`."
        )
    quants = {reward_adapter[2], sft_adapter[2]} if sft_adapter else {reward_adapter[2]}
    check(
        quants == {config.quant},
        f"ppo.quant is {config.quant.kind}, but the adapters were trained over another kind of base "
        f"({', '.join(sorted(quant.kind for quant in quants))}): set sft.quant, reward.quant and ppo.quant alike.",
    )
    # The frozen base can have the dtype that the blocks compute in. Heads and adapters are fp32 (P08).
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    base, _ = checkpoint.load_full(folder, device, quant=config.quant, dtype=dtype)
    reward_lora, state, _ = reward_adapter
    head_weight = state.pop("value_head.weight")
    heads = {}
    for name in ("reward", "value"):
        lora.add_adapter(base, name, reward_lora, seeds.generator("cpu", seed, "adapter", name))
        lora.load_adapter(base, name, state)
        heads[name] = nn.Linear(base.config.dim, 1, bias=False).to(device)
        with torch.no_grad():
            heads[name].weight.copy_(head_weight)
    if sft_adapter:
        for name in ("reference", "policy"):
            lora.add_adapter(base, name, sft_adapter[0], seeds.generator("cpu", seed, "adapter", name))
            lora.load_adapter(base, name, sft_adapter[1])
    generator = seeds.generator("cpu", seed, "adapter", "policy")
    lora_config = sft_adapter[0] if sft_adapter else config.lora
    return SharedBase(base, lora_config, heads, generator, tokenizer, device, config.precision, folder)
