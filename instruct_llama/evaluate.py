"""What each stage achieved, on held-out prompts that no stage has seen, with 95 % intervals: the report card."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import checkpoint, parallel, seeds
from .config import EvaluateConfig, Settings, UserError, check
from .data import tinychat
from .data.batches import dialog_batch, fit_comparison, fit_dialog, fit_prompt, ranked_batch
from .data.tokenizer import Tokenizer
from .model.generate import generate
from .model.llama import Llama, ScalarLlama
from .rlhf.objectives import cross_entropy_sum, pair_differences
from .rlhf.rollout import answer_scores


@dataclass(frozen=True)
class Estimate:
    """A mean over n independent prompts with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean and 95 % interval by the bootstrap (Efron, 1979; 2,000 resamples, percentiles)."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise UserError("There is nothing to estimate from: give at least one held-out record.")
    resampled = seeds.numpy_generator(seed, "bootstrap").choice(x, (2000, len(x))).mean(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(x.mean()), float(low), float(high), len(x))


def accuracy_estimate(correct: float, n: int) -> Estimate:
    """A share of n with Wilson's 95 % interval (Wilson, 1927), right also near 0 and 1."""
    z, p = 1.959964, correct / n
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, float((centre - spread) / (1 + z * z / n)), float((centre + spread) / (1 + z * z / n)), n)


def answers(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], config: EvaluateConfig, seed: int = 0
) -> list[str]:
    """One answer to each prompt, as the report card asks for them."""
    return generate(
        model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed,
        batch_size=config.batch_size,
    )  # fmt: skip


def true_reward(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Any], config: EvaluateConfig, seed: int = 0
) -> tuple[Estimate, list[float]]:
    """Mean true reward of a model's own answers, and each one."""
    texts = answers(model, tokenizer, prompts, config, seed)
    rewards = [tinychat.true_reward(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]
    return estimate(rewards), rewards


@torch.no_grad()
def reward_accuracy(
    model: ScalarLlama, tokenizer: Tokenizer, comparisons: Sequence[Any], temperature: float, max_len: int = 256,
    batch_size: int = 64,
) -> tuple[Estimate, float]:  # fmt: skip
    """Share of held-out pairs that the reward model ranks as the noisy labeller did, and the best share reachable.

    Comparisons longer than `max_len` tokens are left out; the ceiling is not a number where the labeller's utilities
    are unknown. Raises `UserError` when none is left.
    """
    fitted = [(fit_comparison(tokenizer, c["prompt"], c["completions"], max_len), c) for c in comparisons]
    fitted = [(ids, c) for ids, c in fitted if ids is not None]
    if not fitted:
        raise UserError(f"None of the {len(comparisons)} comparisons fits {max_len} tokens: allow more.")
    right, pairs, device = 0.0, 0, next(model.parameters()).device
    for start in range(0, len(fitted), batch_size):
        batch = ranked_batch([ids for ids, _ in fitted[start : start + batch_size]], tokenizer.pad_id).to(device)
        scores = answer_scores(model, batch)  # (N,)
        differences, _ = pair_differences(scores, batch.prompt, batch.rank)
        right += float((differences > 0).sum() + 0.5 * (differences == 0).sum())
        pairs += len(differences)
    known = [c["utilities"] for _, c in fitted if c.get("utilities")]
    ceiling = tinychat.ranking_ceiling(known, temperature) if known else float("nan")
    return accuracy_estimate(right, pairs), ceiling


def stage_folders(out: Path) -> list[Path]:
    """The finished run folders under `out`, in the order of the pipeline, others after them by name."""
    order = list(checkpoint.STAGES)
    found = [f.parent for f in sorted(out.glob("*/config.json")) if checkpoint.is_complete(f.parent)]
    return sorted(found, key=lambda f: (order.index(f.name) if f.name in order else len(order), f.name))


def report_card(settings: Settings, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Judge every finished stage under `settings.out_dir`, write report.json, return its content.

    Several processes take a stage each in turn, so each stage is judged as by one process alone.
    """
    folders = stage_folders(settings.out_dir)
    if not folders:
        raise UserError(f"There is no finished stage in {settings.out_dir}: train one first, or give another --out.")
    config, temperature = settings.evaluate, settings.world.temperature
    prompts = tinychat.prompts(settings.seed, config.prompts, split="heldout")
    comparisons = tinychat.comparisons(settings.seed, config.comparisons, temperature, split="heldout")
    stages: dict[int, tuple[str, Any]] = {}
    for number, folder in parallel.dealt(folders):
        info = checkpoint.read_info(folder)
        model, tokenizer = checkpoint.load(folder, device)
        entry: dict[str, Any] = {"best": info.get("best", {})}
        if info["kind"] == "scalar":
            accuracy, ceiling = reward_accuracy(model, tokenizer, comparisons, temperature, model.config.max_seq_len)
            entry |= {"accuracy": asdict(accuracy), "ceiling": ceiling}
        else:
            estimate_, _ = true_reward(model, tokenizer, prompts, config, settings.seed)
            samples = answers(model, tokenizer, tinychat.FIXED_PROMPTS, config, settings.seed)
            entry |= {"true_reward": asdict(estimate_)}
            entry["answers"] = [
                {"prompt": p, "response": a} for p, a in zip(tinychat.FIXED_PROMPTS, samples, strict=True)
            ]
        stages[number] = folder.name, entry
    report = {"stages": dict(parallel.merged(stages).values()), "preset": settings.preset, "seed": settings.seed}
    checkpoint.write_text(settings.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    return report


@dataclass(frozen=True)
class HeldOut:
    """Records of real data that no stage has trained on; a part that the data do not have is empty."""

    dialogs: Sequence[Any] = ()  # message lists, an answer last
    comparisons: Sequence[Any] = ()  # prompts with ranked completions, best first
    prompts: Sequence[Any] = ()  # message lists, a user turn last


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


@torch.no_grad()
def judged(
    judge: ScalarLlama, tokenizer: Tokenizer, prompts: Sequence[Any], answered: Sequence[Sequence[str]]
) -> list[list[float]]:
    """The judge's raw score of each answer: answers of several models, in the prompts' order, to as many lists."""
    scores: list[list[float]] = [[] for _ in answered]
    for prompt, *texts in zip(prompts, *answered, strict=True):
        ids = fit_comparison(tokenizer, prompt, texts, judge.config.max_seq_len)
        check(ids is not None, "A prompt with its answers is longer than the judge's context: ask shorter ones.")
        batch = ranked_batch([ids], tokenizer.pad_id).to(next(judge.parameters()).device)
        for mine, score in zip(scores, answer_scores(judge, batch).tolist(), strict=True):
            mine.append(score)
    return scores


def data_card(settings: Settings, heldout: HeldOut, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Judge every finished stage on real data, which have no true reward; write report.json, return its content.

    Language models: perplexity of held-out answers, and how often the run's own reward model prefers their answers to
    the first stage's. Reward models: the share of held-out pairs that they order as people did.
    """
    folders, config, stages = stage_folders(settings.out_dir), settings.evaluate, {}
    check(bool(folders), f"There is no finished stage in {settings.out_dir}: train one first, or give another --out.")
    longest, prompts = settings.sft.seq_len, list(heldout.prompts)[: config.prompts]
    said: dict[str, list[str]] = {}
    judge = None
    for folder in folders:
        info, (model, tokenizer) = checkpoint.read_info(folder), checkpoint.load_as_kept(folder, device)
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
            prompts = [p for p in prompts if fit_prompt(tokenizer, p, longest)]
            said[folder.name] = answers(model, tokenizer, prompts, config, settings.seed) if prompts else []
            shown = zip(prompts[:3], said[folder.name][:3], strict=True)
            entry["answers"] = [{"prompt": p, "response": a} for p, a in shown]
        stages[folder.name] = entry
        del model  # before the next one comes
    if judge and prompts:
        scores = dict(zip(said, judged(*judge, prompts, list(said.values())), strict=True))
        first = next(iter(said))
        for name, mine in scores.items():
            wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(mine, scores[first], strict=True)]
            stages[name] |= {"score": asdict(estimate(mine)), "win_rate": asdict(estimate(wins)), "against": first}
    report = {"stages": stages, "preset": settings.preset, "seed": settings.seed}
    checkpoint.write_text(settings.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def describe(report: dict[str, Any]) -> str:
    """The report card as text: one table, then sample answers."""
    lines = [f"Report card, preset {report['preset']}, seed {report['seed']} (held-out prompts, 95 % intervals)", ""]
    wide = max(map(len, report["stages"])) + 2
    lines += [f"{'stage':<{wide}}{'true reward':<26}{'what else':<40}", "-" * 80]
    for name, entry in report["stages"].items():
        reward = str(Estimate(**entry["true_reward"])) if "true_reward" in entry else "-"
        lines.append(f"{name:<{wide}}{reward:<26}{_what_else(entry):<40}".rstrip())
    for name, entry in report["stages"].items():
        if "answers" in entry:
            lines += ["", f"{name} answers:"]
            lines += [f"  {_asked(item)}\n    {item['response'].strip()[:160]!r}" for item in entry["answers"]]
    return "\n".join(lines)


def _asked(item: dict[str, Any]) -> str:
    """A prompt in one line: of a dialog, its last turn."""
    prompt = item["prompt"]
    return prompt if isinstance(prompt, str) else " ".join(prompt[-1]["content"].split())[:160]


EXPECTED = {  # what the laptop preset should show, for any seed: figure -> (lowest, highest)
    "start/demonstrations": (0.50, 0.62),
    "tokens/characters_per_token": (2.8, 3.6),
    "tokens/ranking_ceiling": (0.88, 0.94),
    "untrained/loss_over_ln_V": (0.98, 1.02),
    "untrained/true_reward": (0.0, 0.01),
    "pretrain/true_reward": (0.0, 0.05),
    "sft/true_reward": (0.35, 0.65),
    "sft-qlora/true_reward": (0.35, 0.65),
    "reward/below_ceiling": (-0.03, 0.03),
    "ppo/true_reward": (0.90, 1.0),
    "scale-up/loss_ratio": (0.2, 0.9),
    "scale-up/reward_loss": (0.2, 0.69),
}


def check_off(settings: Settings, stage: str, figures: dict[str, float]) -> None:
    """Print a stage's figures beside their expected range; only the laptop preset is expected to reach anything."""
    for name, value in figures.items():
        expected = EXPECTED.get(f"{stage}/{name}")
        if settings.preset != "laptop" or expected is None:
            print(f"{name:<24}{value:>8.3f}   preset {settings.preset}: no expectation")
        else:
            verdict = "as expected" if expected[0] <= value <= expected[1] else "NOT as expected: see What can go wrong"
            print(f"{name:<24}{value:>8.3f}   expected {expected[0]:.2f} to {expected[1]:.2f}: {verdict}")


def _what_else(entry: dict[str, Any]) -> str:
    best = entry["best"]
    if "accuracy" in entry:
        ceiling = f", ceiling {entry['ceiling']:.3f}" if "ceiling" in entry else ""
        return f"pair accuracy {Estimate(**entry['accuracy'])}{ceiling}"
    if "win_rate" in entry or "perplexity" in entry:
        said = [f"held-out perplexity {entry['perplexity']['value']:.2f}"] if "perplexity" in entry else []
        if "win_rate" in entry:
            said.append(f"preferred to {entry['against']} {Estimate(**entry['win_rate'])}")
        return ", ".join(said)
    if "kl" in best:
        return f"reward-model score {best['score']:.2f}, KL {best['kl']:.2f} nats"
    return f"held-out perplexity {best['perplexity']:.2f}" if "perplexity" in best else ""
