"""The report card: results of each stage on held-out prompts that no stage has seen, with 95 % intervals.

Held-out means held-out wording: no "heldout" prompt is used for training or validation, but some ask in other words
what was trained on. Four skills make up most prompts, so the mean over skills is reported too. Validation results are
listed apart, because they chose the weights. Real data has no third split: its card uses validation records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import seeds
from ..config import EvaluateConfig, PPOConfig, SamplingConfig, Settings, check
from ..data.batching import cut_prompt, dialog_batch, fit_comparison, fit_dialog, ranked_batch, row_length
from ..data.sources import HeldOut
from ..data.tokenizer import Tokenizer
from ..model.llama import Llama, ScalarLlama
from ..model.sampling import generate, generate_ids
from ..rlhf.losses import cross_entropy_sum, pair_differences, pair_wins
from ..rlhf.rollout import completion_scores, final_scores
from ..training import checkpoint, distributed
from ..training import folders as folders_
from ..worlds import tinychat
from ..worlds.tinychat.skills import Prompt
from .baselines import (
    as_prose,
    best_of,
    best_of_kl_bound,
    kind_accuracy,
    prose_responses,
    raw_scores,
    response_logprobs,
)
from .card_text import BEST_OF, TEMPERATURES, describe
from .expectations import EXPECTED, compare_with_expected
from .statistics import Estimate, accuracy_estimate, estimate, mean_of_groups, paired, ratio_estimate, win

__all__ = [
    "EXPECTED", "Estimate", "accuracy_estimate", "as_prose", "best_of", "best_of_kl_bound", "compare_with_expected",
    "data_card", "describe", "estimate", "kind_accuracy", "mean_over_skills", "paired", "perplexity",
    "prose_responses", "report_card", "reward_accuracy", "reward_model_scores", "sample_responses", "skill_means",
    "stage_folders", "true_reward", "true_rewards",
]  # fmt: skip


def sample_responses(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], config: EvaluateConfig, seed: int = 0,
    keys: Sequence[seeds.Key] = ("generate",),
) -> list[str]:  # fmt: skip
    """One response to each prompt, sampled by the settings of the report card; `keys` name the random stream."""
    return generate(
        model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed,
        batch_size=config.batch_size, keys=keys,
    )  # fmt: skip


def true_reward(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], config: EvaluateConfig, seed: int = 0
) -> tuple[Estimate, list[float]]:
    """The mean true reward of a model's sampled responses, and that of each response."""
    rewards = true_rewards(prompts, sample_responses(model, tokenizer, prompts, config, seed))
    return estimate(rewards), rewards


def true_rewards(prompts: Sequence[Prompt], texts: Iterable[str]) -> list[float]:
    """The true reward of each text as a response to its prompt."""
    return [tinychat.true_reward(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]


def _by_skill(prompts: Sequence[Prompt], rewards: Sequence[float]) -> dict[str, list[float]]:
    """The rewards of each skill's prompts, in the order of `tinychat.SKILLS`; skills without prompts are omitted."""
    found: dict[str, list[float]] = {skill: [] for skill in tinychat.SKILLS}
    for prompt, reward in zip(prompts, rewards, strict=True):
        found[tinychat.skill_of(prompt)].append(reward)
    return {skill: values for skill, values in found.items() if values}


def skill_means(prompts: Sequence[Prompt], rewards: Sequence[float]) -> dict[str, Estimate]:
    """The mean reward over each skill's prompts."""
    return {skill: estimate(values) for skill, values in _by_skill(prompts, rewards).items()}


def mean_over_skills(prompts: Sequence[Prompt], rewards: Sequence[float]) -> Estimate:
    """The mean of the skill means: every skill has the same weight, whatever its number of prompts."""
    return mean_of_groups(_by_skill(prompts, rewards))


@torch.no_grad()
def reward_accuracy(
    model: ScalarLlama, tokenizer: Tokenizer, comparisons: Sequence[Any], temperature: float, max_len: int = 256,
    batch_size: int = 64,
) -> tuple[Estimate, float]:  # fmt: skip
    """Share of held-out pairs that the reward model ranks as the noisy labeller did, and its ceiling.

    Comparisons longer than `max_len` tokens are omitted. The ceiling is NaN when the utilities are unknown. Pairs of a
    prompt are dependent, so the bootstrap resamples prompts; n counts comparisons. Raises `UserError` if none fits.
    """
    fitted = [(fit_comparison(tokenizer, c["prompt"], c["completions"], max_len), c) for c in comparisons]
    fitted = [(ids, c) for ids, c in fitted if ids is not None]
    check(bool(fitted), f"None of the {len(comparisons)} comparisons fits {max_len} tokens: allow more.")
    fitted.sort(key=lambda pair: row_length(pair[0]))  # reduces padding
    sums, device = {}, next(model.parameters()).device  # prompt -> [pairs ranked correctly, pairs]
    for start in range(0, len(fitted), batch_size):
        batch = ranked_batch([ids for ids, _ in fitted[start : start + batch_size]], tokenizer.pad_id).to(device)
        scores, batch = completion_scores(model, batch).cpu(), batch.to("cpu")  # (N,)
        for number in range(batch.weight):
            mine = batch.prompt == number  # (N,)
            differences, _ = pair_differences(scores[mine], batch.prompt[mine], batch.rank[mine])
            found = sums.setdefault(str(fitted[start + number][1]["prompt"]), [0.0, 0.0])
            found[0] += float(pair_wins(differences).sum())
            found[1] += len(differences)
    known = [c["utilities"] for _, c in fitted if c.get("utilities")]
    ceiling = tinychat.ranking_ceiling(known, temperature) if known else float("nan")
    return replace(ratio_estimate(*zip(*sums.values(), strict=True)), n=len(fitted)), ceiling


def stage_folders(out: Path) -> list[Path]:
    """The finished run folders under `out`: stages in pipeline order, then others by name.

    Hidden folders are excluded (a replacement run is written to `.sft.new` first), and so are exports.
    """
    order = list(folders_.STAGE_OF)
    for new in out.glob(".*.new"):  # after a kill it may be the only copy
        checkpoint.folders.recover_for_reading(checkpoint.folders.final_path(new))
    shown = (f.parent for f in sorted(out.glob("*/config.json")) if not f.parent.name.startswith("."))
    found = [f for f in shown if not checkpoint.folders.is_foreign(f) and checkpoint.is_complete(f)]
    return sorted(found, key=lambda f: (order.index(f.name) if f.name in order else len(order), f.name))


# ------------------------------------------------------------------------------------------ the embedded world's card

TUNED = ("dpo", "ppo")  # stages whose policy is compared with SFT by score and KL
Values = dict[str, list[float]]  # figure -> its value for each prompt


def report_card(settings: Settings, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Evaluate every finished stage under `settings.out_dir`, write report.json, return its content.

    Every model responds to the same prompts at temperature 1 and at 0; `evaluate.temperature` is not used. Stages are
    sharded over processes, so each stage is evaluated by one process.
    """
    folders = {folder.name: folder for folder in stage_folders(settings.out_dir)}
    check(bool(folders), f"There is no finished stage in {settings.out_dir}: train one first, or give another --out.")
    prompts = tinychat.prompts(settings.seed, settings.evaluate.prompts, split="heldout")
    evaluated: dict[int, tuple[dict[str, Any], Values]] = {}
    for number, name in distributed.shard_iter(folders):
        scalar = checkpoint.read_info(folders[name])["kind"] == "scalar"
        evaluate = _evaluate_reward_model if scalar else _evaluate_policy
        evaluated[number] = evaluate(name, folders, prompts, settings, device)
    found = dict(zip(folders, distributed.all_gather_dict(evaluated).values(), strict=True))
    ppo = [name for name, folder in folders.items() if checkpoint.read_info(folder).get("stage") == "ppo"]
    compared = _differences({name: values for name, (_, values) in found.items()}, ppo)
    stages = {name: entry | compared[name] for name, (entry, _) in found.items()}
    report = {"stages": stages, "preset": settings.preset, "seed": settings.seed}
    checkpoint.write_text(settings.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _evaluate_reward_model(
    name: str, folders: Mapping[str, Path], prompts: Sequence[Prompt], settings: Settings, device: str | torch.device
) -> tuple[dict[str, Any], Values]:
    """A reward model's entry: its pair accuracy, and its accuracy per kind of faulty response."""
    model, tokenizer = checkpoint.load(folders[name], device)
    config, temperature = settings.evaluate, settings.world.temperature
    comparisons = tinychat.comparisons(settings.seed, config.comparisons, temperature, split="heldout")
    accuracy, ceiling = reward_accuracy(model, tokenizer, comparisons, temperature, model.config.max_seq_len)
    kinds = kind_accuracy(model, tokenizer, prompts, settings.seed, config.batch_size)
    best = checkpoint.read_info(folders[name]).get("best", {})
    return {"best": best, "accuracy": asdict(accuracy), "ceiling": ceiling, "kinds": kinds}, {}


def _evaluate_policy(
    name: str, folders: Mapping[str, Path], prompts: Sequence[Prompt], settings: Settings, device: str | torch.device
) -> tuple[dict[str, Any], Values]:
    """A language model's entry, and its values per prompt, for paired differences to other stages."""
    info, (model, tokenizer) = checkpoint.read_info(folders[name]), checkpoint.load(folders[name], device)
    config, seed, values = settings.evaluate, settings.seed, {}
    entry: dict[str, Any] = {"best": info.get("best", {})}
    ppo_settings = _trained_ppo_settings(info, settings.ppo)
    longest = max(config.max_new_tokens, ppo_settings["max_new_tokens"] if info.get("stage") in TUNED else 0)
    for suffix, temperature in TEMPERATURES.items():
        streams = [("generate",), *(("generate", n) for n in range(1, config.responses if temperature > 0 else 1))]
        sampling = SamplingConfig(longest, temperature)
        draws = [generate_ids(model, tokenizer, prompts, sampling, seed, config.batch_size, keys) for keys in streams]
        texts = [[tokenizer.decode(ids[: config.max_new_tokens]) for ids in draw] for draw in draws]
        each = zip(*(true_rewards(prompts, draw) for draw in texts), strict=True)
        values[f"true_reward{suffix}"] = rewards = [sum(mine) / len(mine) for mine in each]
        entry[f"true_reward{suffix}"] = asdict(estimate(rewards))
        entry[f"true_reward{suffix}_by_skill"] = asdict(mean_over_skills(prompts, rewards))
        if info.get("stage") == "pretrain":
            prose = prose_responses(model, tokenizer, prompts, replace(config, temperature=temperature), seed)
            entry[f"as_prose{suffix}"] = asdict(estimate(true_rewards(prompts, prose)))
        if info.get("stage") in TUNED:
            responses = [ids[: ppo_settings["max_new_tokens"]] for ids in draws[0]]
            values |= _scores_and_kl(model, info, responses, suffix, folders, prompts, ppo_settings, device)
    entry["skills"] = {skill: one.mean for skill, one in skill_means(prompts, values["true_reward"]).items()}
    entry |= {key: asdict(estimate(values[key])) for key in ("score", "score_greedy", "kl") if key in values}
    if info.get("stage") == "sft":
        dialogs = [r["messages"] for r in tinychat.demonstrations(seed, config.prompts, split="heldout")]
        value, tokens = perplexity(model, tokenizer, dialogs, settings.sft.seq_len)
        entry["perplexity"] = {"value": value, "tokens": tokens}
    if name == "sft" and "reward" in folders:
        reward_model, _ = checkpoint.load(folders["reward"], device)
        texts = best_of(model, tokenizer, reward_model, prompts, BEST_OF, config, seed)
        found = estimate(true_rewards(prompts, texts))
        entry[f"best_of_{BEST_OF}"] = {**asdict(found), "kl_bound": best_of_kl_bound(BEST_OF)}
    shown = sample_responses(
        model, tokenizer, tinychat.FIXED_PROMPTS, replace(config, temperature=1.0), seed, keys=("shown_answers",)
    )
    entry["samples"] = [{"prompt": p, "response": a} for p, a in zip(tinychat.FIXED_PROMPTS, shown, strict=True)]
    return entry, values


def _trained_ppo_settings(info: Mapping[str, Any], asked: PPOConfig) -> dict[str, Any]:
    """The PPO settings that a run was trained with; `asked` fills in what its config.json lacks."""
    return {**asdict(asked), **info.get("settings", {}).get("ppo", {})}


def _began_with_sft(info: Mapping[str, Any], folders: Mapping[str, Path]) -> bool:
    """Whether a run started from the SFT run in the same folder, which is then its KL reference."""
    start = info.get("settings", {}).get("init")
    same = "sft" in folders and (not start or Path(start).resolve() == folders["sft"].resolve())
    return same and not checkpoint.changed_inputs(info, checkpoint.fingerprints([folders["sft"]]))


def _scores_and_kl(
    policy: Llama, info: Mapping[str, Any], sampled: Sequence[list[int]], suffix: str, folders: Mapping[str, Path],
    prompts: Sequence[Prompt], ppo_settings: Mapping[str, Any], device: str | torch.device,
) -> Values:  # fmt: skip
    """Normalised scores of responses that a DPO or PPO policy sampled, and at temperature 1 their KL to SFT.

    The scores are as in PPO training: same reward model, and normalised, clipped and replaced by `ppo_settings`. The
    KL is k1, in nats per response. Each is omitted when its weights have changed since the run read them.
    """
    values, reward = {}, "reward-lora" if "adapter" in info and "reward-lora" in folders else "reward"
    if reward in folders and not checkpoint.changed_inputs(info, checkpoint.fingerprints([folders[reward]])):
        model, tokenizer = checkpoint.load(folders[reward], device)
        norm = checkpoint.read_info(folders[reward])["reward"]
        items = [[[*tokenizer.encode_prompt(p), *r]] for p, r in zip(prompts, sampled, strict=True)]
        raw = torch.tensor([score for (score,) in raw_scores(model, tokenizer.pad_id, items)])  # (B,)
        ended = torch.tensor([response[-1] == tokenizer.eos_id for response in sampled])  # (B,)
        rules = ppo_settings["score_clip"], ppo_settings["missing_eos_score"]
        values[f"score{suffix}"] = final_scores(raw, ended, norm["mean"], norm["scale"], *rules).tolist()
    if _began_with_sft(info, folders) and not suffix:
        reference, tokenizer = checkpoint.load(folders["sft"], device)
        ours, theirs = (response_logprobs(model, tokenizer, prompts, sampled) for model in (policy, reference))
        values["kl"] = [a - b for a, b in zip(ours, theirs, strict=True)]
    return values


def _differences(values: Mapping[str, Values], ppo: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every stage's paired differences to SFT, and those of other PPO runs to `ppo`, over the same prompts."""
    found: dict[str, dict[str, Any]] = {name: {} for name in values}
    for name, mine in values.items():
        rivals = [] if name in ("pretrain", "sft") else ["sft", *(["ppo"] if name in ppo and name != "ppo" else [])]
        for rival in (rival for rival in rivals if mine and rival in values):
            figures = {"true_reward": "minus", "score": "score_minus"} if rival == "ppo" else {"true_reward": "minus"}
            for figure, what in figures.items():
                for suffix in TEMPERATURES:
                    pair = [one.get(figure + suffix) for one in (mine, values[rival])]
                    if all(pair):
                        found[name][f"{what}_{rival}{suffix}"] = asdict(paired(*pair))
    return found


# ---------------------------------------------------------------------------------------------- the card of real data


@torch.no_grad()
def perplexity(model: Llama, tokenizer: Tokenizer, dialogs: Sequence[Any], max_len: int) -> tuple[float, int]:
    """Perplexity of the dialogs' responses, and their number of tokens; dialogs that do not fit are omitted."""
    fitted = [fit_dialog(tokenizer, dialog, max_len) for dialog in dialogs]
    fitted, loss, tokens = [dialog for dialog in fitted if dialog is not None], 0.0, 0
    check(bool(fitted), f"None of the {len(dialogs)} held-out dialogs fits {max_len} tokens: allow more.")
    device = next(model.parameters()).device
    for start in range(0, len(fitted), 8):
        batch = dialog_batch(fitted[start : start + 8], tokenizer.pad_id).to(device)
        loss += float(cross_entropy_sum(model(batch.tokens), batch.targets, batch.loss_mask)[0])
        tokens += batch.weight
    return math.exp(min(loss / tokens, 50.0)), tokens


def reward_model_scores(
    reward_model: ScalarLlama, tokenizer: Tokenizer, prompts: Sequence[Any], answered: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Raw reward-model scores of several models' responses, one list per model, in the order of the prompts.

    A prompt whose responses do not fit the reward model's context is omitted from every list.
    """
    longest = reward_model.config.max_seq_len
    fitted = [fit_comparison(tokenizer, p, texts, longest) for p, *texts in zip(prompts, *answered, strict=True)]
    items = [ids for ids in fitted if ids is not None]
    check(bool(items), f"No prompt with its responses fits the reward model's {longest} tokens: use shorter ones.")
    raw = raw_scores(reward_model, tokenizer.pad_id, items, len(answered))
    return [list(scores) for scores in zip(*raw, strict=True)]


def data_card(settings: Settings, heldout: HeldOut, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Evaluate every finished stage on real data, without true reward; write report.json, return its content.

    Language models: perplexity of validation responses, and how often the run's reward model prefers their responses to
    those of the first stage. Reward models: pair accuracy on validation comparisons. Validation chose the weights of
    each stage, so these figures are optimistic.
    """
    folders, config, stages = stage_folders(settings.out_dir), settings.evaluate, {}
    check(bool(folders), f"There is no finished stage in {settings.out_dir}: train one first, or give another --out.")
    longest, said = settings.sft.seq_len, {}
    prompts = _asked(folders, heldout.prompts, settings)
    reward_model = None
    for folder in folders:
        info, (model, tokenizer) = checkpoint.read_info(folder), checkpoint.load_for_inference(folder, device)
        entry: dict[str, Any] = {"best": info.get("best", {})}
        if info["kind"] == "scalar":
            reward_model = (model, tokenizer)
            if heldout.comparisons:
                some = heldout.comparisons[: config.comparisons]
                size = max(1, config.batch_size // 2)  # a comparison has two responses
                found, _ = reward_accuracy(model, tokenizer, some, 1.0, settings.reward.seq_len, size)
                entry["accuracy"] = asdict(found)
        else:
            if heldout.dialogs:
                value, tokens = perplexity(model, tokenizer, heldout.dialogs[: config.prompts], longest)
                entry["perplexity"] = {"value": value, "tokens": tokens}
            said[folder.name] = sample_responses(model, tokenizer, prompts, config, settings.seed) if prompts else []
            shown = zip(prompts[:3], said[folder.name][:3], strict=True)
            entry["samples"] = [{"prompt": p, "response": a} for p, a in shown]
        stages[folder.name] = entry
        del model  # frees memory before the next one is loaded
    if reward_model and prompts:
        scores = dict(zip(said, reward_model_scores(*reward_model, prompts, list(said.values())), strict=True))
        first = next(iter(said))
        for name, mine in scores.items():
            wins = [win(a, b) for a, b in zip(mine, scores[first], strict=True)]
            stages[name] |= {"score": asdict(estimate(mine)), "win_rate": asdict(estimate(wins)), "against": first}
    report = {"stages": stages, "preset": settings.preset, "seed": settings.seed}
    checkpoint.write_text(settings.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _asked(folders: Sequence[Path], prompts: Sequence[Any], settings: Settings) -> list[Any]:
    """The first prompts, cut as in training so that they fit every model's context with room for a response."""
    config, tokenizer = settings.evaluate, Tokenizer.load(folders[0])
    context = min(checkpoint.shape_of(folder).max_seq_len for folder in folders)
    room = min(settings.sft.seq_len, context - config.max_new_tokens)
    cut = [cut_prompt(tokenizer, prompt, room) for prompt in list(prompts)[: config.prompts]]
    return [messages for messages, _ in (found for found in cut if found is not None)]
