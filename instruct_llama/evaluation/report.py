"""What each stage achieved, on held-out prompts that no stage has seen, with 95 % intervals: the report card.

Held-out means held-out wording: no prompt of the "heldout" split is trained on or validated on, but what some of them
ask was trained on in other words. Four skills give most of the prompts, so the mean over skills stands beside the mean
over prompts. The figures of validation, which chose the weights that were kept, are not part of it. Real data hold out
no third part: their card is of validation, and says so.
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
)  # fmt: skip
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
    """One answer to each prompt, as the report card asks for them; `keys` name the random numbers."""
    return generate(
        model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed,
        batch_size=config.batch_size, keys=keys,
    )  # fmt: skip


def true_reward(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], config: EvaluateConfig, seed: int = 0
) -> tuple[Estimate, list[float]]:
    """Mean true reward of a model's own answers, and each one."""
    rewards = true_rewards(prompts, sample_responses(model, tokenizer, prompts, config, seed))
    return estimate(rewards), rewards


def true_rewards(prompts: Sequence[Prompt], texts: Iterable[str]) -> list[float]:
    """The true reward of each text as a response to its prompt."""
    return [tinychat.true_reward(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]


def _by_skill(prompts: Sequence[Prompt], rewards: Sequence[float]) -> dict[str, list[float]]:
    """The rewards at each skill's prompts, in the order of `tinychat.SKILLS`; a skill without prompts is left out."""
    found: dict[str, list[float]] = {skill: [] for skill in tinychat.SKILLS}
    for prompt, reward in zip(prompts, rewards, strict=True):
        found[tinychat.skill_of(prompt)].append(reward)
    return {skill: values for skill, values in found.items() if values}


def skill_means(prompts: Sequence[Prompt], rewards: Sequence[float]) -> dict[str, Estimate]:
    """The mean reward at each skill's prompts."""
    return {skill: estimate(values) for skill, values in _by_skill(prompts, rewards).items()}


def mean_over_skills(prompts: Sequence[Prompt], rewards: Sequence[float]) -> Estimate:
    """The mean of the skills' means: each skill counts the same, however many prompts it has."""
    return mean_of_groups(_by_skill(prompts, rewards))


@torch.no_grad()
def reward_accuracy(
    model: ScalarLlama, tokenizer: Tokenizer, comparisons: Sequence[Any], temperature: float, max_len: int = 256,
    batch_size: int = 64,
) -> tuple[Estimate, float]:  # fmt: skip
    """Share of held-out pairs that the reward model ranks as the noisy labeller did, and the best share reachable.

    Comparisons longer than `max_len` tokens are left out; the ceiling is not a number where the labeller's utilities
    are unknown. Pairs share responses and comparisons share prompts, so the interval is over prompts; n is the number
    of comparisons. Raises `UserError` when none is left.
    """
    fitted = [(fit_comparison(tokenizer, c["prompt"], c["completions"], max_len), c) for c in comparisons]
    fitted = [(ids, c) for ids, c in fitted if ids is not None]
    check(bool(fitted), f"None of the {len(comparisons)} comparisons fits {max_len} tokens: allow more.")
    fitted.sort(key=lambda pair: row_length(pair[0]))  # to save padding
    sums, device = {}, next(model.parameters()).device  # of each prompt: its pairs that are ranked right, its pairs
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
    """The finished run folders under `out`, in the order of the pipeline, others after them by name.

    Hidden ones are none: a run that replaces another is written beside it, as `.sft.new`. Exports are none either.
    """
    order = list(folders_.STAGE_OF)
    for new in out.glob(".*.new"):  # a kill may have left no other
        checkpoint.folders.recover_for_reading(checkpoint.folders.final_path(new))
    shown = (f.parent for f in sorted(out.glob("*/config.json")) if not f.parent.name.startswith("."))
    found = [f for f in shown if not checkpoint.folders.is_foreign(f) and checkpoint.is_complete(f)]
    return sorted(found, key=lambda f: (order.index(f.name) if f.name in order else len(order), f.name))


# ------------------------------------------------------------------------------------------ the embedded world's card

TEMPERATURES = {"": 1.0, "_greedy": 0.0}  # what a figure's name ends with, and the temperature it was sampled at
BEST_OF = 16
Values = dict[str, list[float]]  # figure -> its value at each prompt


def report_card(settings: Settings, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Judge every finished stage under `settings.out_dir`, write report.json, return its content.

    Every model answers the same prompts at temperature 1 and at 0, whatever `evaluate.temperature` says. Several
    processes take a stage each in turn, so each stage is judged as by one process alone.
    """
    folders = {folder.name: folder for folder in stage_folders(settings.out_dir)}
    check(bool(folders), f"There is no finished stage in {settings.out_dir}: train one first, or give another --out.")
    prompts = tinychat.prompts(settings.seed, settings.evaluate.prompts, split="heldout")
    judged_here: dict[int, tuple[dict[str, Any], Values]] = {}
    for number, name in distributed.shard_iter(folders):
        scalar = checkpoint.read_info(folders[name])["kind"] == "scalar"
        judge = _judge_reward_model if scalar else _judge_policy
        judged_here[number] = judge(name, folders, prompts, settings, device)
    found = dict(zip(folders, distributed.all_gather_dict(judged_here).values(), strict=True))
    ppo = [name for name, folder in folders.items() if checkpoint.read_info(folder).get("stage") == "ppo"]
    compared = _differences({name: values for name, (_, values) in found.items()}, ppo)
    stages = {name: entry | compared[name] for name, (entry, _) in found.items()}
    report = {"stages": stages, "preset": settings.preset, "seed": settings.seed}
    checkpoint.write_text(settings.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _judge_reward_model(
    name: str, folders: Mapping[str, Path], prompts: Sequence[Prompt], settings: Settings, device: str | torch.device
) -> tuple[dict[str, Any], Values]:
    """A reward model's entry: pairs ordered as the noisy labeller did, and the ideal response against every fault."""
    model, tokenizer = checkpoint.load(folders[name], device)
    config, temperature = settings.evaluate, settings.world.temperature
    comparisons = tinychat.comparisons(settings.seed, config.comparisons, temperature, split="heldout")
    accuracy, ceiling = reward_accuracy(model, tokenizer, comparisons, temperature, model.config.max_seq_len)
    kinds = kind_accuracy(model, tokenizer, prompts, settings.seed, config.batch_size)
    best = checkpoint.read_info(folders[name]).get("best", {})
    return {"best": best, "accuracy": asdict(accuracy), "ceiling": ceiling, "kinds": kinds}, {}


def _judge_policy(
    name: str, folders: Mapping[str, Path], prompts: Sequence[Prompt], settings: Settings, device: str | torch.device
) -> tuple[dict[str, Any], Values]:
    """A language model's entry, and its values prompt by prompt, to be paired with those of other stages."""
    info, (model, tokenizer) = checkpoint.read_info(folders[name]), checkpoint.load(folders[name], device)
    config, seed, values = settings.evaluate, settings.seed, {}
    entry: dict[str, Any] = {"best": info.get("best", {})}
    ppo_settings = _trained_ppo_settings(info, settings.ppo)
    longest = max(config.max_new_tokens, ppo_settings["max_new_tokens"] if info.get("stage") == "ppo" else 0)
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
            told = prose_responses(model, tokenizer, prompts, replace(config, temperature=temperature), seed)
            entry[f"as_prose{suffix}"] = asdict(estimate(true_rewards(prompts, told)))
        if info.get("stage") == "ppo":
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
    """The ppo settings that a run was trained by; those `asked` for where its config.json holds none."""
    return {**asdict(asked), **info.get("settings", {}).get("ppo", {})}


def _began_with_sft(info: Mapping[str, Any], folders: Mapping[str, Path]) -> bool:
    """Whether a PPO run began with the SFT run of the same folder, which then is what its penalty measured from."""
    start = info.get("settings", {}).get("init")
    same = "sft" in folders and (not start or Path(start).resolve() == folders["sft"].resolve())
    return same and not checkpoint.changed_inputs(info, checkpoint.fingerprints([folders["sft"]]))


def _scores_and_kl(
    policy: Llama, info: Mapping[str, Any], sampled: Sequence[list[int]], suffix: str, folders: Mapping[str, Path],
    prompts: Sequence[Prompt], ppo_settings: Mapping[str, Any], device: str | torch.device,
) -> Values:  # fmt: skip
    """What PPO goes by, of responses that its policy sampled: normalised scores, and at temperature 1 the KL from SFT.

    The scores are of the reward model that PPO was trained with, normalised, clipped and replaced as PPO did it, by its
    settings `ppo_settings`; the KL is k1, in nats a response. Neither is given of weights that the run did not read.
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
    """Of every stage, its paired differences to SFT, and of other PPO runs those to `ppo`, over the same prompts."""
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
    """e to the mean loss of the dialogs' answers, and their number of tokens; dialogs that do not fit are left out."""
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
    judge: ScalarLlama, tokenizer: Tokenizer, prompts: Sequence[Any], answered: Sequence[Sequence[str]]
) -> list[list[float]]:
    """The reward model's raw score of each answer: answers of several models, in the prompts' order, to as many lists.

    A prompt whose answers do not fit the reward model's context is left out of every list.
    """
    longest = judge.config.max_seq_len
    fitted = [fit_comparison(tokenizer, p, texts, longest) for p, *texts in zip(prompts, *answered, strict=True)]
    items = [ids for ids in fitted if ids is not None]
    check(bool(items), f"No prompt with its answers fits the reward model's {longest} tokens: ask shorter ones.")
    return [list(scores) for scores in zip(*raw_scores(judge, tokenizer.pad_id, items, len(answered)), strict=True)]


def data_card(settings: Settings, heldout: HeldOut, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Judge every finished stage on real data, which have no true reward; write report.json, return its content.

    Language models: perplexity of validation answers, and how often the run's own reward model prefers their answers to
    the first stage's. Reward models: the share of validation pairs that they order as people did. Validation chose the
    weights that each stage kept, so these figures flatter it.
    """
    folders, config, stages = stage_folders(settings.out_dir), settings.evaluate, {}
    check(bool(folders), f"There is no finished stage in {settings.out_dir}: train one first, or give another --out.")
    longest, said = settings.sft.seq_len, {}
    prompts = _asked(folders, heldout.prompts, settings)
    judge = None
    for folder in folders:
        info, (model, tokenizer) = checkpoint.read_info(folder), checkpoint.load_for_inference(folder, device)
        entry: dict[str, Any] = {"best": info.get("best", {})}
        if info["kind"] == "scalar":
            judge = (model, tokenizer)
            if heldout.comparisons:
                some = heldout.comparisons[: config.comparisons]
                size = max(1, config.batch_size // 2)  # a row holds two answers
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
        del model  # before the next one comes
    if judge and prompts:
        scores = dict(zip(said, reward_model_scores(*judge, prompts, list(said.values())), strict=True))
        first = next(iter(said))
        for name, mine in scores.items():
            wins = [win(a, b) for a, b in zip(mine, scores[first], strict=True)]
            stages[name] |= {"score": asdict(estimate(mine)), "win_rate": asdict(estimate(wins)), "against": first}
    report = {"stages": stages, "preset": settings.preset, "seed": settings.seed}
    checkpoint.write_text(settings.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _asked(folders: Sequence[Path], prompts: Sequence[Any], settings: Settings) -> list[Any]:
    """The first prompts as every model can be asked them: cut as in training, with room for an answer."""
    config, tokenizer = settings.evaluate, Tokenizer.load(folders[0])
    context = min(checkpoint.shape_of(folder).max_seq_len for folder in folders)
    room = min(settings.sft.seq_len, context - config.max_new_tokens)
    cut = [cut_prompt(tokenizer, prompt, room) for prompt in list(prompts)[: config.prompts]]
    return [messages for messages, _ in (found for found in cut if found is not None)]


def describe(report: Mapping[str, Any]) -> str:
    """The report card as text: true rewards, what they are compared with, what the reward model knows, some answers."""
    stages: Mapping[str, Any] = report["stages"]
    policies = {name: entry for name, entry in stages.items() if "true_reward" in entry}
    world = any("true_reward" in entry or "ceiling" in entry for entry in stages.values())  # else real data
    judged_on = "held-out prompts" if world else "validation records"
    lines = [f"Report card, preset {report['preset']}, seed {report['seed']} ({judged_on}, 95 % intervals)"]
    if policies:
        n = next(iter(policies.values()))["true_reward"]["n"]
        lines.append(f"True reward on {n} prompts in held-out wording; some ask what was trained on in other words.")
        lines += ["", *_reward_table(policies)]
    lines += ["", *(f"{name}: {line}" for name, entry in stages.items() for line in _what_else(entry))]
    for name, entry in stages.items():
        if "kinds" in entry:
            lines += ["", f"{name}: at how many prompts the ideal response scores above a faulty one"]
            lines += [
                f"  {kind:<12}{_shown(one):<24}ceiling {one['ceiling']:.3f}" for kind, one in entry["kinds"].items()
            ]
    for name, entry in stages.items():
        if "samples" in entry:
            lines += ["", f"{name} answers:"]
            lines += [f"  {_last_turn(item)}\n    {item['response'].strip()[:160]!r}" for item in entry["samples"]]
    return "\n".join(lines)


def _reward_table(policies: Mapping[str, Any]) -> list[str]:
    """A line for every policy with its mean over prompts and its difference to SFT; under it, the mean over skills."""
    wide = max(18, *map(len, policies)) + 2
    heads = ("temperature 1", "greedy", "minus SFT", "minus SFT, greedy")
    lines = [f"{'stage':<{wide}}" + "".join(f"{head:<25}" for head in heads).rstrip(), "-" * (wide + 98)]
    for name, entry in policies.items():
        cells = [_shown(entry.get(key)) for key in ("true_reward", "true_reward_greedy")]
        cells += [_shown(entry.get(key), signed=True) for key in ("minus_sft", "minus_sft_greedy")]
        lines.append((f"{name:<{wide}}" + "".join(f"{cell:<25}" for cell in cells)).rstrip())
        cells = [_shown(entry.get(f"true_reward{suffix}_by_skill")) for suffix in TEMPERATURES]
        lines.append((f"{'  mean over skills':<{wide}}" + "".join(f"{cell:<25}" for cell in cells)).rstrip())
    return lines


def _shown(figures: Mapping[str, float] | None, signed: bool = False) -> str:
    """An estimate of the report as text; a dash where there is none."""
    if figures is None:
        return "-"
    one = Estimate(*(figures[key] for key in ("mean", "low", "high", "n")))
    return one.signed() if signed else str(one)


def _what_else(entry: Mapping[str, Any]) -> list[str]:
    """What the report says of a stage beside its true reward, a line each; figures of validation are named as such."""
    best, lines = entry["best"], []
    if "as_prose" in entry:
        lines.append(f"asked as prose {_shown(entry['as_prose'])}, greedy {_shown(entry['as_prose_greedy'])}")
    if f"best_of_{BEST_OF}" in entry:
        bound = f"KL at most {entry[f'best_of_{BEST_OF}']['kl_bound']:.2f} nats"
        lines.append(f"best of {BEST_OF} by the reward model {_shown(entry[f'best_of_{BEST_OF}'])}, {bound}")
    if "perplexity" in entry:
        kept = "held-out demonstrations" if "true_reward" in entry else "validation dialogs"
        lines.append(f"perplexity of {kept} {entry['perplexity']['value']:.2f}")
    if "score" in entry:
        greedy = f", greedy {_shown(entry['score_greedy'])}" if "score_greedy" in entry else ""
        where = " on validation prompts" if "true_reward" not in entry else ""
        lines.append(f"reward-model score {_shown(entry['score'])}{greedy}{where}")
    if "kl" in entry:
        lines.append(f"KL from SFT {_shown(entry['kl'])} nats a response")
    if "minus_ppo" in entry:
        pair = (_shown(entry[key], signed=True) for key in ("minus_ppo", "minus_ppo_greedy"))
        lines.append("true reward minus that of ppo {}, greedy {}".format(*pair))
    if "score_minus_ppo" in entry:
        pair = (_shown(entry[key], signed=True) for key in ("score_minus_ppo", "score_minus_ppo_greedy"))
        lines.append("score minus that of ppo {}, greedy {}".format(*pair))
    if "accuracy" in entry:
        ceiling = f", ceiling {entry['ceiling']:.3f}" if "ceiling" in entry else " on validation comparisons"
        lines.append(f"pair accuracy {_shown(entry['accuracy'])}{ceiling}")
    if "win_rate" in entry:
        lines.append(f"preferred to {entry['against']} {_shown(entry['win_rate'])} on validation prompts")
    shown = {key: best[key] for key in ("score", "kl", "perplexity", "accuracy") if key in best}
    if shown:
        chosen = ", ".join(f"{'KL' if key == 'kl' else key} {value:.2f}" for key, value in shown.items())
        lines.append(f"validation, which chose these weights: {chosen}")
    return lines or ([] if "true_reward" in entry else ["there was nothing to measure it on"])


def _last_turn(item: Mapping[str, Any]) -> str:
    """A prompt in one line: of a dialog, its last turn."""
    prompt = item["prompt"]
    return prompt if isinstance(prompt, str) else " ".join(prompt[-1]["content"].split())[:160]
