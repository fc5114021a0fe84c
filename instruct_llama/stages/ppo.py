"""Stage 4, PPO from human preferences: the loop of InstructGPT (arXiv:2203.02155, section 3.5) in numbered phases.

Each iteration 1 draws prompts, 2 answers them, 3 judges the answers, 4 turns judgements into advantages, 5 updates
policy and value, 6 adapts the KL coefficient, 7 reports. Formulas: `rlhf.objectives`; episodes: `rlhf.rollout`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import checkpoint, memory, parallel, seeds
from ..config import PPOConfig, Settings, check
from ..data import tinychat
from ..data.batches import dialog_batch, epoch_order, fit_prompt
from ..data.tokenizer import Tokenizer
from ..rlhf import layouts, objectives, rollout
from ..rlhf.rollout import Episodes
from . import records, sft, trainer
from .pretrain import language_model_loss
from .start import stage_run, training_folder
from .trainer import RunLog, StageResult, Watch, autocast, make_optimizer, pick_device, scaled_step


@dataclass
class Player:
    """What every phase needs: the networks, the vocabulary, the settings."""

    models: layouts.FourModels | layouts.SharedBase
    tokenizer: Tokenizer
    config: PPOConfig
    reward_mean: float
    reward_scale: float
    device: torch.device
    ptx: list[sft.Dialog]  # demonstrations for the pretraining mix; empty without it

    def __post_init__(self) -> None:
        self.scaler = trainer.make_scaler(self.config.precision, self.device)


# ------------------------------------------------------------------------------------------------------------- phases


def draw_prompts(prompts: Sequence[list[int]], config: PPOConfig, seed: int, iteration: int) -> list[list[int]]:
    """Phase 1: the prompts of an iteration, a function of (seed, iteration); all come up before any comes up again."""
    start, drawn = iteration * config.rollouts, []
    for position in range(start, start + config.rollouts):
        epoch, index = divmod(position, len(prompts))
        if not drawn or index == 0:
            order = epoch_order(len(prompts), seed, epoch, "prompts")
        drawn.append(prompts[order[index]])
    return drawn


@torch.no_grad()
def answer(player: Player, prompts: list[list[int]], generator: torch.Generator) -> Episodes:
    """Phase 2: the policy answers; its log-probs are then computed as training will compute them."""
    config = player.config
    with _computing(player, "policy") as policy:
        episodes = rollout.play(policy, prompts, player.tokenizer, config, generator)
        _by_parts(episodes, config, "logprobs", lambda part: _logprobs(policy, part, player)[0])
    return episodes


@torch.no_grad()
def judge(player: Player, episodes: Episodes) -> None:
    """Phase 3: reference log-probs, values and scores, each from its own network."""
    config = player.config
    unfiltered = replace(config, top_k=0, top_p=1.0)  # what the policy may not say, the reference still may
    with _computing(player, "reference") as model:
        part_logprobs = lambda part: _logprobs(model, part, player, unfiltered)[0]  # noqa: E731
        _by_parts(episodes, config, "ref_logprobs", part_logprobs)
    with _computing(player, "value") as model:
        values = lambda part: rollout.answer_values(model, part.to(_device_of(model, player)))  # noqa: E731
        _by_parts(episodes, config, "values", values)
    with _computing(player, "reward") as model:
        mean, scale, at = player.reward_mean, player.reward_scale, _device_of(model, player)
        _by_parts(episodes, config, "scores", lambda part: rollout.score(model, part.to(at), config, mean, scale))


def collect(player: Player, prompts: list[list[int]], seed: int, iteration: int) -> Episodes:
    """Phases 2 and 3, batch by batch, each from its own generator: it does not matter which process takes which."""
    size, made = player.config.rollout_batch, {}
    for number in parallel.turns(-(-len(prompts) // size)):
        generator = seeds.generator(player.device, seed, "rollout", iteration, number)
        episodes = answer(player, prompts[number * size : (number + 1) * size], generator)
        judge(player, episodes)
        made[number] = episodes.to("cpu") if parallel.world() > 1 else episodes
    return rollout.join(list(parallel.merged(made).values()), player.tokenizer.pad_id).to(player.device)


def update(
    player: Player, episodes: Episodes, optimizer: torch.optim.Optimizer, seed: int, iteration: int
) -> dict[str, float]:
    """Phase 5: several epochs of token-weighted mini-batches of clipped policy and value steps."""
    config, stats = player.config, []
    n_minibatches = max(1, round(len(episodes) / config.minibatch))
    orders = [epoch_order(len(episodes), seed, epoch, "minibatch", iteration) for epoch in range(config.epochs)]
    with player.models.present("policy", "value"), _moments(player, optimizer):
        # near-equal parts: no small tail takes a full-size step
        for rows in (part for order in orders for part in np.array_split(order, n_minibatches)):
            where = f"iteration {iteration + 1}, episodes {rows.tolist()}"
            figures = minibatch_gradients(player, episodes.select(rows.tolist()), seed, iteration, len(stats))
            if not np.isfinite(figures["loss"]):
                optimizer.zero_grad(set_to_none=True)
                raise trainer.NonFinite(f"The PPO loss is {figures['loss']} at {where}: lower the learning rate.")
            step = config.optim, iteration, config.iterations, where
            figures["grad_norm"], figures["value_grad_norm"] = scaled_step(player.scaler, optimizer, *step)
            stats.append(figures)
    mean = {key: float(np.mean([figures[key] for figures in stats])) for key in stats[0]}
    return {**mean, "first_ratio": stats[0]["ratio"]}


@contextlib.contextmanager
def _moments(player: Player, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """With ppo.swap, AdamW's state (the count of steps too) is with its weights here, and waits in main memory else."""

    def move(place: Callable[[nn.Parameter], torch.device]) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = value.to(place(parameter))

    if player.config.swap:
        move(lambda parameter: parameter.device)
    try:
        yield
    finally:
        if player.config.swap:
            move(lambda _: torch.device("cpu"))


def minibatch_gradients(
    player: Player, episodes: Episodes, seed: int, iteration: int = 0, number: int = 0
) -> dict[str, float]:
    """Gradients of one mini-batch, its losses divided by its real tokens, however it is cut into micro-batches.

    (seed, iteration, number) is its place in the run, from which the demonstrations of the pretraining mix are drawn.
    """
    config = player.config
    tokens = int(episodes.mask.sum())
    sums = dict.fromkeys(("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "ratio"), 0.0)
    for rows in episodes.parts(max(config.micro_batch, parallel.world())):  # a row for every process
        mine, counts = parallel.deal(rows)
        part = episodes.select(mine)
        share = counts * int(part.mask.sum()) / tokens
        with autocast(config.precision, player.device):
            with player.models.role("policy") as policy:
                logprobs, logprobs_full = _logprobs(policy, part, player)  # (B, N), (B, N, V)
                policy_loss = objectives.policy_loss(logprobs, part.logprobs, part.advantages, part.mask, config.clip)
                entropy_loss = objectives.entropy_loss(logprobs_full, part.mask)
                loss = counts * (policy_loss + config.entropy_coef * entropy_loss) / tokens
                player.scaler.scale(loss).backward()
            with player.models.role("value") as model:
                there = part.to(_device_of(model, player))
                values = rollout.answer_values(model, there)  # (B, N)
                value_loss = objectives.value_loss(values, there.values, there.returns, there.mask, config.value_clip)
                player.scaler.scale(counts * config.value_coef * value_loss / tokens).backward()
        ratio = objectives.ratio_error(logprobs.detach(), part.logprobs, part.mask)
        clipped = objectives.clip_fraction(logprobs.detach(), part.logprobs, part.mask, config.clip)
        sums["policy_loss"] += counts * float(policy_loss.detach()) / tokens
        sums["value_loss"] += counts * float(value_loss.detach()) / tokens
        sums["entropy"] += counts * -float(entropy_loss.detach()) / tokens
        sums["ratio"] += float(ratio) * share
        sums["clip_fraction"] += float(clipped) * share
    sums = parallel.summed(sums)
    if config.ptx_coef > 0:
        sums["ptx_loss"] = _ptx_gradients(player, seeds.numpy_generator(seed, "ptx", iteration, number))
    sums["loss"] = sums["policy_loss"] + config.value_coef * sums["value_loss"] - config.entropy_coef * sums["entropy"]
    return sums


def _ptx_gradients(player: Player, generator: np.random.Generator) -> float:
    """The pretraining mix (InstructGPT, equation 2): a language-model loss on demonstrations beside PPO's."""
    rows = generator.choice(len(player.ptx), min(player.config.minibatch, len(player.ptx)), replace=False)
    mine, counts = parallel.deal(rows.tolist())
    batch = dialog_batch([player.ptx[i] for i in mine], player.tokenizer.pad_id).to(player.device)
    weight = parallel.summed({"weight": counts * batch.weight})["weight"]
    with player.models.role("policy") as policy, autocast(player.config.precision, player.device):
        loss, _ = language_model_loss(policy, batch)
        player.scaler.scale(counts * player.config.ptx_coef * loss / weight).backward()
    return parallel.summed({"loss": counts * float(loss.detach()) / weight})["loss"]


def iterate(
    player: Player, prompts: list[list[int]], optimizer: torch.optim.Optimizer, kl_coef: float, seed: int,
    iteration: int,
) -> tuple[Episodes, dict[str, float]]:  # fmt: skip
    """Phases 2 to 5 of one iteration: the episodes, and the update's figures."""
    episodes = collect(player, prompts, seed, iteration)
    rollout.credit(episodes, player.config, kl_coef)  # phase 4
    return episodes, update(player, episodes, optimizer, seed, iteration)


def make_player_optimizer(player: Player) -> torch.optim.Optimizer:
    """One AdamW over policy and value, each with its own learning rate."""
    config, models = player.config, player.models
    rates = (("policy", config.optim.lr), ("value", config.value_lr))
    return make_optimizer([(list(models.trainable(role).values()), rate) for role, rate in rates], config.optim)


def report(player: Player, episodes: Episodes, kl_coef: float, true_prompts: Sequence[Any] | None) -> dict[str, float]:
    """Phase 7: the curves to watch. Reward-model score, penalised reward and true reward are three different ones."""
    mask, kl = episodes.mask, episodes.kl()  # (B, N), (B,)
    k3 = objectives.answer_sum(objectives.kl_k3(episodes.logprobs, episodes.ref_logprobs), mask)
    limit = player.config.score_clip
    figures = {
        "ppo/score": episodes.scores.mean(),
        "ppo/penalised": objectives.answer_sum(episodes.rewards, mask).mean(),
        "ppo/kl": kl.mean(),
        "ppo/kl_k3": k3.mean(),
        "ppo/kl_coef": kl_coef,
        "ppo/length": mask.sum(1).float().mean(),
        "ppo/ended": episodes.ended.float().mean(),
        "ppo/score_clipped": (episodes.scores.abs() >= limit).float().mean() if limit > 0 else 0.0,
        "ppo/explained_variance": objectives.explained_variance(episodes.values, episodes.returns, mask),
        "ppo/sampling_gap": objectives.masked_mean((episodes.logprobs - episodes.sampled_logprobs).abs(), mask),
    }
    if true_prompts is not None:
        figures["ppo/true_reward"] = float(np.mean(true_rewards(player.tokenizer, episodes, true_prompts)))
    return {key: float(value) for key, value in figures.items()}


# ------------------------------------------------------------------------------------------------------------ helpers


@contextlib.contextmanager
def _computing(player: Player, role: layouts.Role) -> Iterator[nn.Module]:
    """The network that plays a role, all of it in this process, in the precision of training."""
    with player.models.role(role) as model, parallel.whole(*player.models.parts(role)):
        with autocast(player.config.precision, player.device):
            yield model


def _logprobs(
    model: nn.Module, episodes: Episodes, player: Player, config: PPOConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    episodes = episodes.to(_device_of(model, player))
    full = rollout.distribution(model, episodes, config or player.config, player.tokenizer.banned_ids)  # (B, N, V)
    return rollout.answer_logprobs(full, episodes), full


def _device_of(model: nn.Module, player: Player) -> torch.device:
    """Where a network computes; divided weights may wait elsewhere."""
    return player.device if parallel.world() > 1 else next(model.parameters()).device


def _by_parts(episodes: Episodes, config: PPOConfig, field: str, compute: Any) -> None:
    """Fill a field of the episodes, (B,) or (B, N), micro-batch by micro-batch."""
    made, order = [], []
    for rows in episodes.parts(config.micro_batch):
        part = compute(episodes.select(rows)).to(episodes.tokens.device)
        spare = episodes.mask.shape[1] - part.shape[-1] if part.dim() == 2 else 0
        made.append(nn.functional.pad(part, (0, spare)))
        order += rows
    setattr(episodes, field, torch.cat(made)[torch.tensor(order, device=episodes.tokens.device).argsort()])


def answer_texts(tokenizer: Tokenizer, episodes: Episodes) -> list[str]:
    """The answers as text, for people and for the true reward; training never sees these (P38)."""
    return [tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(episodes.answers, episodes.mask, strict=True)]


def true_rewards(tokenizer: Tokenizer, episodes: Episodes, prompts: Sequence[Any]) -> list[float]:
    """The embedded world's true reward of each answer."""
    texts = answer_texts(tokenizer, episodes)
    return [tinychat.true_reward(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]


def episode_records(player: Player, episodes: Episodes, n: int, prompts: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The first n episodes token by token, for samples.jsonl and the rollout browser."""
    texts, made = answer_texts(player.tokenizer, episodes), []
    for i in range(min(n, len(episodes))):
        keep = episodes.mask[i]
        record = {
            "prompt": player.tokenizer.decode(episodes.prompts[i]).strip(),
            "response": texts[i],
            "pieces": player.tokenizer.pieces(episodes.answers[i][keep].tolist()),
            "score": float(episodes.scores[i]),
            "kl": (episodes.logprobs - episodes.ref_logprobs)[i][keep].tolist(),
        }
        record |= {key: getattr(episodes, key)[i][keep].tolist() for key in ("rewards", "values", "advantages")}
        if prompts is not None:
            record["true_reward"] = tinychat.true_reward(prompts[i], texts[i]).total
        made.append(record)
    return made


def evaluate_policy(player: Player, prompts: list[list[int]], true_prompts: Any, kl_coef: float) -> dict[str, float]:
    """Score, KL, objective and true reward on held-out prompts, from a fixed seed."""
    episodes = answer(player, prompts, seeds.generator(player.device, 0, "validation"))
    judge(player, episodes)
    kl = episodes.kl()  # (B,)
    each = {"score": episodes.scores, "kl": kl, "objective": episodes.scores - kl_coef * kl}  # (B,) each
    figures = {key: float(value.mean()) for key, value in each.items()}
    figures["objective_stderr"] = _stderr(each["objective"])
    if true_prompts is not None:
        figures["true_reward"] = float(np.mean(true_rewards(player.tokenizer, episodes, true_prompts)))
    return parallel.from_main(figures)


def is_better(figures: dict[str, float], best: dict[str, float], kl_coef: float, doubt: float = 0.0) -> bool:
    """Whether a policy's objective exceeds the best one's, less `doubt`, both at today's KL coefficient.

    An adaptive coefficient moves, and objectives under different coefficients do not compare.
    """
    worth = [found["score"] - kl_coef * found["kl"] for found in (figures, best) if found]
    return not best or worth[0] > worth[1] - doubt


def build(settings: Settings) -> tuple[Player, dict[str, Any]]:
    """Load the networks that the layout asks for, training what is missing first."""
    config = settings.ppo
    shared = config.layout == "shared_base"
    # The first of the places is the policy's: there it plays its episodes, and learns from them.
    device, *_ = map(pick_device, (config.devices if not shared else ()) or (settings.device,))
    check(
        parallel.world() == 1 or not (config.swap or config.devices),
        "ppo.swap and ppo.devices move whole networks of one process: under torchrun, take parallel.cpu_offload.",
    )
    start = Path(settings.init) if settings.init else checkpoint.require("sft", settings)
    reward = checkpoint.require("reward-lora" if shared else "reward", settings)
    memory.check_room(settings, "ppo", str(device), checkpoint.shape_of(start), parallel.world())
    records.check_vocabularies(start, reward)
    if shared:
        models = layouts.shared_base(start, reward, device, config, settings.seed)
    else:
        models = layouts.four_models(start, reward, device, config)
    norm = checkpoint.read_info(reward)["reward"]
    with models.role("value") as value:
        layouts.normalise_head(value.scalar_head, norm["mean"], norm["scale"])
    tokenizer = Tokenizer.load(start)
    mix = records.with_data(settings, settings.sft.data)
    ptx = sft.encode(tokenizer, records.demonstrations(mix)[0], mix.sft.seq_len) if config.ptx_coef else []
    player = Player(models, tokenizer, config, norm["mean"], norm["scale"], device, ptx)
    info = {"stage": "ppo", "seed": settings.seed, "quant": vars(config.quant), **checkpoint.origin(start)}
    return player, info


def fit_prompts(settings: Settings, player: Player) -> tuple[list[Any], list[list[int]], list[Any], list[list[int]]]:
    """(messages, token ids) of the training and of the held-out prompts, without those too long for the context."""
    with player.models.role("policy") as policy:
        context = policy.config.max_seq_len
    room = rollout.prompt_room(context, player.config)
    found = []
    for prompts in records.prompts(settings):
        fitted = [(prompt, fit_prompt(player.tokenizer, prompt, room)) for prompt in prompts]
        kept = [(prompt, ids) for prompt, ids in fitted if ids is not None]
        check(
            bool(kept),
            f"No prompt leaves room for ppo.max_new_tokens {player.config.max_new_tokens} in a context of "
            f"{room + player.config.max_new_tokens} tokens: lower it.",
        )
        found += [[prompt for prompt, _ in kept], [ids for _, ids in kept]]
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------- run


@stage_run("ppo")
def run(settings: Settings, watch: Watch | None = None) -> StageResult:
    """PPO from `settings.init` (an SFT run), else from the SFT and reward model of the same preset."""
    folder = training_folder("ppo", settings)
    player, info = build(settings)
    settings = records.with_data(settings, settings.ppo.data)
    batches = -(-settings.ppo.rollouts // settings.ppo.rollout_batch)
    if batches < parallel.world():
        idle = f"{batches} batches of prompts for {parallel.world()} processes leave some idle"
        print(f"{idle}: lower --ppo.rollout-batch or raise --ppo.rollouts.")
    with checkpoint.stage_lock(folder):
        return _loop(settings, player, info, RunLog(folder, settings, "ppo", watch))


def _loop(settings: Settings, player: Player, info: dict[str, Any], log: RunLog) -> StageResult:
    config, seed = settings.ppo, settings.seed
    train, train_ids, valid, valid_ids = fit_prompts(settings, player)
    for part in player.models.parts():
        parallel.shard(part, settings.parallel, config.precision, player.device)
    world = settings.data is None
    message_of = {tuple(ids): prompt for prompt, ids in zip(train, train_ids, strict=True)}
    trainable = {f"{role}/{n}": p for role in ("policy", "value") for n, p in player.models.trainable(role).items()}
    optimizer, kl_coef, best, iteration = make_player_optimizer(player), config.kl_coef, {}, log.start
    if log.saved:
        state = log.restore(trainable, optimizer)
        kl_coef, best = state["kl_coef"], state["best"]
        trainer.restore_scaler(player.scaler, state.get("scaler"))

    def save_state() -> None:
        tensors, rest = trainer.optimizer_tensors(optimizer)
        tensors |= {f"model/{name}": p for name, p in trainable.items()}
        scale = player.scaler.state_dict()
        log.save_state(iteration, tensors, {"optimizer": rest, "kl_coef": kl_coef, "best": best, "scaler": scale})

    bar = trainer.progress("ppo", config.iterations, iteration)
    with log.interruptible(save_state, "ppo"), bar:
        while iteration < config.iterations:
            drawn = draw_prompts(train_ids, config, seed, iteration)
            messages = [message_of[tuple(ids)] for ids in drawn] if world else None
            episodes, stats = iterate(player, drawn, optimizer, kl_coef, seed, iteration)
            metrics = parallel.from_main(report(player, episodes, kl_coef, messages))
            metrics |= {f"ppo/{k}": v for k, v in stats.items()}
            kl_coef = objectives.adaptive_kl(kl_coef, metrics["ppo/kl"], config.kl_target, config.kl_horizon)
            iteration += 1
            for alarm in objectives.ppo_alarm(
                stats["first_ratio"], metrics["ppo/kl"], _stderr(episodes.kl()), stats["clip_fraction"]
            ):
                bar.write(f"iteration {iteration}: {alarm}")
            if iteration % config.sample_every == 0:
                log.sample(iteration, episode_records(player, episodes, 4, messages))
            if iteration % config.eval_every == 0 or iteration == config.iterations:
                true_prompts = valid[: config.eval_prompts] if world else None
                figures = evaluate_policy(player, valid_ids[: config.eval_prompts], true_prompts, kl_coef)
                metrics |= {f"val/{key}": value for key, value in figures.items()}
                # The last policy, its learning rate spent, is kept where these prompts cannot tell it from the best.
                doubt = figures["objective_stderr"] if iteration == config.iterations else 0.0
                if is_better(figures, best, kl_coef, doubt):
                    best = {"step": iteration, **figures}
                    player.models.save(log.folder, player.tokenizer, {**info, "best": best})
            log.log(iteration, metrics)
            if iteration % config.save_every == 0 or iteration == config.iterations:
                save_state()
            bar.set_postfix(score=f"{metrics['ppo/score']:.2f}", kl=f"{metrics['ppo/kl']:.2f}")
            bar.update()
    return log.finish(best, iteration)


def _stderr(x: torch.Tensor) -> float:
    return float(x.std(correction=0)) / max(1, len(x)) ** 0.5
