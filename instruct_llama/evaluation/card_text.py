"""The report card as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .statistics import Estimate

TEMPERATURES = {"": 1.0, "_greedy": 0.0}  # suffix of a figure's name -> sampling temperature
BEST_OF = 16  # responses per prompt that the best-of-n baseline chooses from


def describe(report: Mapping[str, Any]) -> str:
    """The report card as text: true rewards, baselines, accuracy of the reward model, sample responses."""
    stages: Mapping[str, Any] = report["stages"]
    policies = {name: entry for name, entry in stages.items() if "true_reward" in entry}
    world = any("true_reward" in entry or "ceiling" in entry for entry in stages.values())  # else real data
    evaluated_on = "held-out prompts" if world else "validation records"
    lines = [f"Report card, preset {report['preset']}, seed {report['seed']} ({evaluated_on}, 95 % intervals)"]
    if policies:
        n = next(iter(policies.values()))["true_reward"]["n"]
        lines.append(f"True reward on {n} prompts in held-out wording; some ask what was trained on in other words.")
        lines += ["", *_reward_table(policies)]
    lines += ["", *(f"{name}: {line}" for name, entry in stages.items() for line in _what_else(entry))]
    for name, entry in stages.items():
        if "kinds" in entry:
            lines += ["", f"{name}: share of prompts on which the ideal response scores above a faulty one"]
            lines += [
                f"  {kind:<12}{_shown(one):<24}ceiling {one['ceiling']:.3f}" for kind, one in entry["kinds"].items()
            ]
    for name, entry in stages.items():
        if "samples" in entry:
            lines += ["", f"{name} responses:"]
            lines += [f"  {_last_turn(item)}\n    {item['response'].strip()[:160]!r}" for item in entry["samples"]]
    return "\n".join(lines)


def _reward_table(policies: Mapping[str, Any]) -> list[str]:
    """Two lines per policy: mean over prompts with the difference to SFT, and mean over skills."""
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
    """An estimate of the report as text; a dash for None."""
    if figures is None:
        return "-"
    one = Estimate(*(figures[key] for key in ("mean", "low", "high", "n")))
    return one.signed() if signed else str(one)


def _what_else(entry: Mapping[str, Any]) -> list[str]:
    """A stage's other figures, one line each; validation figures are named as such."""
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
        lines.append(f"KL from SFT {_shown(entry['kl'])} nats per response")
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
    return lines or ([] if "true_reward" in entry else ["no data to evaluate it on"])


def _last_turn(item: Mapping[str, Any]) -> str:
    """A prompt in one line; for a dialog, its last turn."""
    prompt = item["prompt"]
    return prompt if isinstance(prompt, str) else " ".join(prompt[-1]["content"].split())[:160]
