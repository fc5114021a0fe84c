"""Stage 4, RLHF with PPO: train the SFT model as a policy against the reward model.

The algorithm is in `rlhf.ppo`. This module has its inputs, the loop over iterations with validation, logs and
checkpoints, and the adaptive KL coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import seeds
from ..config import PPOConfig, Settings, check
from ..data.batching import Dialog, fit_prompt
from ..data.tokenizer import Tokenizer
from ..rlhf import losses, ppo, rollout
from ..rlhf.rollout import Rollouts
from ..training import checkpoint, distributed, loop, memory, optim, run_log
from ..training.actors import FourModels, SharedBase, four_models, shared_base
from ..training.device import pick_device
from ..training.run_log import RunLog, StageResult, Watch
from ..worlds import tinychat
from . import records, sft
from .start import training_folder

Actors = FourModels | SharedBase


def response_texts(tokenizer: Tokenizer, rollouts: Rollouts) -> list[str]:
    """The responses as text, for logs and the true reward; training uses token ids only (P38)."""
    return [tokenizer.decode(ids) for ids in rollouts.response_ids()]


def true_rewards(tokenizer: Tokenizer, rollouts: Rollouts, prompts: Sequence[Any]) -> list[float]:
    """The true reward of each response, from the embedded world."""
    texts = response_texts(tokenizer, rollouts)
    return [tinychat.true_reward(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]


def iteration_metrics(
    actors: Actors, config: PPOConfig, rollouts: Rollouts, kl_coef: float, prompts: Sequence[Any] | None
) -> dict[str, float]:  # fmt: skip
    """The metrics of an iteration, with the true reward if `prompts` are of the embedded world."""
    metrics = rollout.rollout_metrics(rollouts, config, kl_coef)
    if prompts is not None:
        metrics["ppo/true_reward"] = float(np.mean(true_rewards(actors.tokenizer, rollouts, prompts)))
    return metrics


def rollout_records(
    tokenizer: Tokenizer, rollouts: Rollouts, n: int, prompts: Sequence[Any] | None
) -> list[dict[str, Any]]:
    """The first n rollouts token by token, for samples.jsonl and the rollout browser."""
    texts, made = response_texts(tokenizer, rollouts), []
    for i in range(min(n, len(rollouts))):
        keep = rollouts.response_mask[i]
        record = {
            "prompt": tokenizer.decode(rollouts.prompts[i]).strip(),
            "response": texts[i],
            "pieces": tokenizer.pieces(rollouts.responses[i][keep].tolist()),
            "score": float(rollouts.scores[i]),
            "kl": (rollouts.logprobs - rollouts.ref_logprobs)[i][keep].tolist(),
        }
        record |= {key: getattr(rollouts, key)[i][keep].tolist() for key in ("rewards", "values", "advantages")}
        if prompts is not None:
            record["true_reward"] = tinychat.true_reward(prompts[i], texts[i]).total
        made.append(record)
    return made


def evaluate_policy(
    actors: Actors, config: PPOConfig, prompts: list[list[int]], true_prompts: Any, kl_coef: float
) -> dict[str, float]:  # fmt: skip
    """Mean score, KL, objective and true reward of responses to held-out prompts, sampled from a fixed seed."""
    rollouts = ppo.generate_responses(actors, config, prompts, seeds.generator(actors.device, 0, "validation"))
    ppo.score_rollouts(actors, config, rollouts)
    kl = rollouts.kl()  # (B,)
    each = {"score": rollouts.scores, "kl": kl, "objective": rollouts.scores - kl_coef * kl}  # (B,) each
    figures = {key: float(value.mean()) for key, value in each.items()}
    figures["objective_stderr"] = _stderr(each["objective"])
    if true_prompts is not None:
        figures["true_reward"] = float(np.mean(true_rewards(actors.tokenizer, rollouts, true_prompts)))
    return distributed.broadcast_from_main(figures)


def is_better(figures: dict[str, float], best: dict[str, float], kl_coef: float, tolerance: float = 0.0) -> bool:
    """Whether a policy's objective exceeds the best one's minus `tolerance`, both at the current KL coefficient.

    Objectives at different coefficients are not comparable, and an adaptive coefficient changes.
    """
    worth = [found["score"] - kl_coef * found["kl"] for found in (figures, best) if found]
    return not best or worth[0] > worth[1] - tolerance


def build(settings: Settings, inputs: Sequence[Path]) -> tuple[Actors, list[Dialog], dict[str, Any]]:
    """The actors of the layout, loaded from `inputs`; demonstrations for the PTX loss; the fields of config.json."""
    config = settings.ppo
    shared = config.layout == "shared_base"
    # The first device is the policy's: it generates and trains there.
    device, *_ = map(pick_device, (config.devices if not shared else ()) or (settings.device,))
    check(
        distributed.world_size() == 1 or not (config.offload_inactive or config.devices),
        "ppo.offload_inactive and ppo.devices move whole networks of one process: under torchrun, use "
        "parallel.cpu_offload.",
    )
    start, reward = inputs
    memory.check_room(settings, "ppo", str(device), checkpoint.shape_of(start), distributed.world_size())
    records.check_vocabularies(start, reward)
    tokenizer = Tokenizer.load(start)
    if shared:
        actors = shared_base(start, reward, tokenizer, device, config, settings.seed)
    else:
        actors = four_models(start, reward, tokenizer, device, config)
    norm = checkpoint.read_info(reward)["reward"]
    actors.normalise_scores(norm["mean"], norm["scale"])
    mix = records.with_data(settings, settings.sft.data)
    ptx = sft.encode(tokenizer, records.demonstrations(mix)[0], mix.sft.seq_len) if config.ptx_coef else []
    info = {"stage": "ppo", "seed": settings.seed, "quant": vars(config.quant), **checkpoint.origin(start)}
    return actors, ptx, info


def fit_prompts(settings: Settings, actors: Actors) -> tuple[list[Any], list[list[int]], list[Any], list[list[int]]]:
    """Messages and token ids of the training prompts, then of the held-out ones, without those that are too long."""
    limit = settings.ppo.max_new_tokens
    room, found = rollout.max_prompt_length(actors.context, settings.ppo), []
    for prompts in records.prompts(settings):
        fitted = [(prompt, fit_prompt(actors.tokenizer, prompt, room)) for prompt in prompts]
        kept = [(prompt, ids) for prompt, ids in fitted if ids is not None]
        check(
            bool(kept),
            f"No prompt leaves room for ppo.max_new_tokens {limit} in a context of {room + limit} tokens: lower it.",
        )
        found += [[prompt for prompt, _ in kept], [ids for _, ids in kept]]
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------- run


def run(settings: Settings, inputs: Sequence[Path], watch: Watch | None = None) -> StageResult:
    """Train a policy with PPO; `inputs` are the folders of the model to start from and of the reward model."""
    folder = training_folder("ppo", settings)
    actors, demonstrations, info = build(settings, inputs)
    settings = records.with_data(settings, settings.ppo.data)
    batches = -(-settings.ppo.rollouts_per_iteration // settings.ppo.generation_batch_size)
    if batches < distributed.world_size():
        idle = f"{batches} batches of prompts for {distributed.world_size()} processes leave some idle"
        print(f"{idle}: lower --ppo.generation-batch-size or raise --ppo.rollouts-per-iteration.")
    return _loop(settings, actors, demonstrations, info, RunLog(folder, settings, "ppo", inputs, watch))


def _loop(
    settings: Settings, actors: Actors, demonstrations: list[Dialog], info: dict[str, Any], log: RunLog
) -> StageResult:  # fmt: skip
    config, seed = settings.ppo, settings.seed
    train, train_ids, valid, valid_ids = fit_prompts(settings, actors)
    for part in actors.parts():
        distributed.shard(part, settings.parallel, config.precision, actors.device)
    world = settings.data is None
    message_of = {tuple(ids): prompt for prompt, ids in zip(train, train_ids, strict=True)}
    trainable = {f"{role}/{n}": p for role in ("policy", "value") for n, p in actors.trainable(role).items()}
    optimizer, kl_coef, best, iteration = actors.make_optimizer(config), config.kl_coef, {}, log.start
    if log.saved:
        state = log.restore(trainable, optimizer)
        kl_coef, best = state["kl_coef"], state["best"]
        optim.restore_scaler(actors.scaler, state.get("scaler"))

    def save_state() -> None:
        tensors, rest = run_log.optimizer_tensors(optimizer)
        tensors |= {f"model/{name}": p for name, p in trainable.items()}
        scale = actors.scaler.state_dict()
        log.save_state(iteration, tensors, {"optimizer": rest, "kl_coef": kl_coef, "best": best, "scaler": scale})

    bar = loop.progress("ppo", config.iterations, iteration)
    with log.interruptible(save_state, "ppo"), bar:
        while iteration < config.iterations:
            drawn = ppo.draw_prompts(train_ids, config, seed, iteration)
            messages = [message_of[tuple(ids)] for ids in drawn] if world else None
            rollouts, stats = ppo.run_iteration(
                actors, config, drawn, optimizer, kl_coef, seed, iteration, demonstrations
            )
            metrics = distributed.broadcast_from_main(iteration_metrics(actors, config, rollouts, kl_coef, messages))
            metrics |= {f"ppo/{k}": v for k, v in stats.items()}
            kl_coef = losses.adaptive_kl(kl_coef, metrics["ppo/kl"], config.kl_target, config.kl_horizon)
            iteration += 1
            for alarm in losses.ppo_warnings(
                stats["first_ratio_abs_error"], metrics["ppo/kl"], _stderr(rollouts.kl()), stats["clip_frac"]
            ):
                bar.write(f"iteration {iteration}: {alarm}")
            if iteration % config.sample_every == 0:
                log.sample(iteration, rollout_records(actors.tokenizer, rollouts, 4, messages))
            if iteration % config.eval_every == 0 or iteration == config.iterations:
                true_prompts = valid[: config.eval_prompts] if world else None
                figures = evaluate_policy(actors, config, valid_ids[: config.eval_prompts], true_prompts, kl_coef)
                metrics |= {f"val/{key}": value for key, value in figures.items()}
                # The last policy, at the end of the learning rate schedule, is saved as the best one unless it is
                # worse by more than a standard error.
                tolerance = figures["objective_stderr"] if iteration == config.iterations else 0.0
                if is_better(figures, best, kl_coef, tolerance):
                    best = {"step": iteration, **figures}
                    actors.save(log.folder, actors.tokenizer, {**info, "best": best})
            log.log(iteration, metrics)
            if iteration % config.save_every == 0 or iteration == config.iterations:
                save_state()
            bar.set_postfix(score=f"{metrics['ppo/score']:.2f}", kl=f"{metrics['ppo/kl']:.2f}")
            bar.update()
    return log.finish(best, iteration)


def _stderr(x: torch.Tensor) -> float:
    return float(x.std(correction=0)) / max(1, len(x)) ** 0.5
