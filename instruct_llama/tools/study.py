"""The study over seeds: runs the whole pipeline per seed, stores one line of results each, and checks targets.

Finished seeds are skipped, and interrupted ones resume. Several commands with different seeds can run in parallel and
append to one file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .. import pipeline
from ..config import Settings, check, project_folder, shown, to_json
from ..evaluation import report as evaluate
from ..stages import ppo, pretrain, reward, sft  # noqa: F401  early: later the code could have changed
from ..training import checkpoint, distributed
from ..training.device import pick_device
from ..training.run_log import read_jsonl

STAGES = ("pretrain", "sft", "sft-qlora", "reward", "ppo")
WITHOUT_PENALTY = "ppo-kl0"  # PPO with kl_coef 0
SEEDS_WITHOUT_PENALTY = (1, 2, 3)  # seeds that also train WITHOUT_PENALTY
NOTE = "study.json"  # in a seed's folder: hashes of settings and code, seconds per stage
Line = dict[str, Any]  # the results of one seed
Figures = Mapping[str, Any]  # the report card's stages


# ------------------------------------------------------------------------------------------------------------- the run


def run(settings: Settings, seeds: Sequence[int], results: Path | None = None, kl0: bool = False) -> Path:
    """Train and evaluate every seed that is not in the results yet, append a line for each; returns their file.

    Run folders are under `seeds/<seed>/` of the out folder. Seeds 1 to 3, or all with `kl0`, also train PPO without its
    KL penalty. Raises `UserError` for a seed's folder that was trained by other settings or code.
    """
    check(
        distributed.world_size() == 1,
        "A study runs in one process: start several with different --seeds to share the work.",
    )
    results = results or project_folder() / "notebooks" / "results" / "seeds.jsonl"
    check(bool(seeds), "A study needs at least one seed: --seeds 1 2 3.")
    git_state()  # cached now: the checkout may change while the study runs
    todo = []
    for seed in dict.fromkeys(seeds):
        mine = settings.replace(seed=seed, out=str(settings.out_dir / "seeds" / str(seed)))
        stages = [*STAGES, WITHOUT_PENALTY] if kl0 or seed in SEEDS_WITHOUT_PENALTY else [*STAGES]
        if _holds(results, mine, stages):
            print(f"seed {seed} is in {shown(results)}, by the same settings and code: skipped.")
        else:
            _check_note(mine)
            todo.append((mine, stages))
    for mine, stages in todo:
        line = run_seed(mine, stages)
        if not append(results, line, unless=lambda mine=mine, stages=stages: _holds(results, mine, stages)):
            print(f"seed {mine.seed} has been added to {shown(results)} by another process meanwhile.")
    return results


def run_seed(settings: Settings, stages: Sequence[str]) -> Line:
    """Train the missing stages of one seed, evaluate it, and return its line; one process at a time."""
    settings.out_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.out_dir / ".study.lock"):
        return _run_seed(settings, stages)


def _run_seed(settings: Settings, stages: Sequence[str]) -> Line:
    note = _note(settings) or {**_made_by(settings), "seconds": {}, "resumed": []}
    write_note = lambda: checkpoint.write_text(settings.out_dir / NOTE, json.dumps(note, indent=2) + "\n")  # noqa: E731
    write_note()
    for stage in stages:
        if stage in note["seconds"]:
            continue
        if (settings.out_dir / stage / "state").is_dir() and stage not in note["resumed"]:
            note["resumed"].append(stage)  # its seconds cover the resumed part only
            write_note()
        clock = time.perf_counter()
        _train(stage, settings)
        note["seconds"][stage] = round(time.perf_counter() - clock, 1)
        write_note()
    clock = time.perf_counter()
    report = evaluate.report_card(settings, pick_device(settings.device))
    note["seconds"]["evaluate"] = round(time.perf_counter() - clock, 1)
    figures = {
        name: {key: value for key, value in entry.items() if key != "samples"}
        for name, entry in report["stages"].items()
    }
    return {
        "study": "seeds", "seed": settings.seed, "preset": settings.preset, **note,
        "command": " ".join(["python -m instruct_llama", *sys.argv[1:]]), **git_state(), "machine": machine(),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"), "stages": figures,
    }  # fmt: skip


def _train(stage: str, settings: Settings) -> None:
    """Train a stage or resume it; does nothing when it has finished."""
    if stage != WITHOUT_PENALTY:
        pipeline.require(stage, settings)
    elif not checkpoint.is_complete(settings.out_dir / stage):
        pipeline.run("ppo", settings.replace(ppo__kl_coef=0.0, ppo__name=WITHOUT_PENALTY, resume=True))


# ------------------------------------------------------------------------------------------------- provenance of a line


def settings_hash(settings: Settings) -> str:
    """A hash of the settings, without seed, folder, device and parallelism."""
    same = settings.replace(seed=0, out="", device="auto", resume=False, overwrite=False, parallel=Settings().parallel)
    return hashlib.sha256(to_json(same).encode()).hexdigest()[:16]


@functools.cache
def code_hash() -> str:
    """A hash of this package's source files, which also covers uncommitted changes.

    Cached, because files that change while a study runs are not the code that it runs.
    """
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


@functools.cache
def git_state() -> dict[str, Any]:
    """The commit of this package, and whether it has uncommitted changes; the commit is empty without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(commit and git("status", "--porcelain", "--", "."))}


def machine() -> dict[str, Any]:
    """CPU, cores, threads and torch version of this machine."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    threads = torch.get_num_threads()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def _made_by(settings: Settings) -> dict[str, str]:
    return {"settings": settings_hash(settings), "code": code_hash()}


def _note(settings: Settings) -> Line | None:
    path = settings.out_dir / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _check_note(settings: Settings) -> None:
    """Raise `UserError` unless the folder's stages were trained by the same settings and code."""
    folder, note, wanted = settings.out_dir, _note(settings), _made_by(settings)
    check(
        note is not None or not evaluate.stage_folders(folder),
        f"{shown(folder)} holds stages that no study has trained: remove it, or give another --out.",
    )
    other = [key for key in wanted if note is not None and note.get(key) != wanted[key]]
    check(not other, f"{shown(folder)} was trained by other {' and '.join(other)}: remove it, or give another --out.")


# --------------------------------------------------------------------------------------------------------- the results


def read(path: Path) -> list[Line]:
    """The lines of a results file, in order; empty without a file. A line truncated by a kill is skipped."""
    return read_jsonl(path)


def append(path: Path, line: Line, unless: Callable[[], bool] = lambda: False) -> bool:
    """Append a line in one write, under a lock, except when `unless()` holds; returns whether it was added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if unless():
            return False
        with open(path, "ab+") as file:
            cut = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"  # by a kill
            file.write((b"\n" if cut else b"") + (json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    return True


def _holds(path: Path, settings: Settings, stages: Sequence[str]) -> bool:
    wanted = {"seed": settings.seed, "preset": settings.preset, **_made_by(settings)}
    return any(wanted.items() <= line.items() and set(stages) <= set(line["stages"]) for line in read(path))


def candidates(path: Path) -> list[list[Line]]:
    """The lines grouped by (preset, settings, code), in order of appearance; the last line of each seed."""
    found: dict[tuple, dict[int, Line]] = {}
    for line in read(path):
        found.setdefault((line["preset"], line["settings"], line["code"]), {})[line["seed"]] = line
    return [[lines[seed] for seed in sorted(lines)] for lines in found.values()]


# --------------------------------------------------------------------------------------------------------- the targets


@dataclass(frozen=True)
class Target:
    """A figure of the report card and the range it should lie in, for every seed."""

    name: str  # figure and range, for display
    value: Callable[[Figures], float]  # raises KeyError when the report lacks it
    low: float = -float("inf")
    high: float = float("inf")
    strict: bool = False  # exclude the ends of the range


def weakness(kinds: Figures) -> str:
    """The kind of fault that the labellers overrate: the one with the lowest ceiling."""
    return min(kinds, key=lambda kind: kinds[kind]["ceiling"])


def _worst_kind(stages: Figures) -> float:
    kinds = stages["reward"]["kinds"]
    return min(one["mean"] for kind, one in kinds.items() if kind != weakness(kinds))


def _figure(stage: str, key: str, part: str = "mean") -> Callable[[Figures], float]:
    return lambda stages: stages[stage][key][part]


def _widest(stages: Figures) -> float:
    one = stages["sft-qlora"]["minus_sft"]
    return max(abs(one["low"]), abs(one["high"]))


def _targets() -> Iterator[Target]:
    yield Target("pretrained, temperature 1: below 0.05", _figure("pretrain", "true_reward"), high=0.05, strict=True)
    yield Target("SFT, temperature 1: 0.35 to 0.60", _figure("sft", "true_reward"), 0.35, 0.60)
    yield Target("SFT, greedy: at most 0.72", _figure("sft", "true_reward_greedy"), high=0.72)
    yield Target("QLoRA SFT - SFT, temperature 1: interval inside +-0.08", _widest, high=0.08)
    yield Target("PPO, temperature 1: at least 0.90", _figure("ppo", "true_reward"), 0.90)
    yield Target("PPO, greedy: at least 0.93", _figure("ppo", "true_reward_greedy"), 0.93)
    for suffix, name in (("", "temperature 1"), ("_greedy", "greedy")):
        low = _figure("ppo", f"minus_sft{suffix}", "low")
        yield Target(f"PPO - SFT, {name}: interval above +0.15", low, 0.15, strict=True)
    for suffix, name in (("", "temperature 1"), ("_greedy", "greedy")):
        ours, theirs = _figure("ppo", f"true_reward{suffix}"), _figure("pretrain", f"as_prose{suffix}")
        gap = lambda stages, ours=ours, theirs=theirs: ours(stages) - theirs(stages)  # noqa: E731
        yield Target(f"PPO - pretrained as prose, {name}: above 0", gap, 0.0, strict=True)
    yield Target("pretrained as prose, greedy: at least 0.5", _figure("pretrain", "as_prose_greedy"), 0.5)
    below = lambda stages: stages["reward"]["ceiling"] - stages["reward"]["accuracy"]["mean"]  # noqa: E731
    yield Target("reward model below its ceiling: at most 0.03", below, high=0.03)
    yield Target("reward model, worst kind but the weakness: at least 0.85", _worst_kind, 0.85)
    for suffix, name in (("", "temperature 1"), ("_greedy", "greedy")):
        score = _figure(WITHOUT_PENALTY, f"score_minus_ppo{suffix}", "low")
        yield Target(f"kl_coef 0 - PPO, score, {name}: interval above 0", score, 0.0, strict=True)
        worth = _figure(WITHOUT_PENALTY, f"minus_ppo{suffix}", "high")
        yield Target(f"kl_coef 0 - PPO, true reward, {name}: interval below 0", worth, high=0.0, strict=True)


TARGETS = tuple(_targets())


@dataclass(frozen=True)
class Row:
    """How many seeds met one target; a missing figure counts as NaN and as missed."""

    target: str
    passed: int
    of: int
    lowest: float
    highest: float
    missed: tuple[int, ...]  # seeds that missed the target


def made_by(settings: Settings) -> tuple[str, str, str]:
    """The provenance of lines made by these settings and this code: preset, settings hash, code hash."""
    return settings.preset, settings_hash(settings), code_hash()


def summary(path: Path, candidate: int = -1, made_by: tuple[str, str, str] | None = None) -> list[Row]:
    """A row for each target, over the seeds of one candidate in a results file.

    The candidate is chosen by index (default: the newest) or by the `made_by` of its lines.
    """
    found = candidates(path)
    if made_by is not None:
        found = [lines for lines in found if tuple(lines[0][key] for key in ("preset", "settings", "code")) == made_by]
    check(bool(found), f"{path} holds no results yet: python -m instruct_llama evaluate --study seeds.")
    return [row for row in (_row(target, found[candidate]) for target in TARGETS) if row.of]


def _row(target: Target, lines: Sequence[Line]) -> Row:
    values = {}
    for line in lines:
        try:
            values[line["seed"]] = target.value(line["stages"])
        except KeyError:  # only PPO without the penalty is optional
            if WITHOUT_PENALTY in line["stages"] or not target.name.startswith("kl_coef 0"):
                values[line["seed"]] = float("nan")  # in no range, so missed
    missed = tuple(seed for seed, value in values.items() if not _met(target, value))
    known = [value for value in values.values() if value == value]
    ends = (min(known), max(known)) if known else (float("nan"), float("nan"))
    return Row(target.name, len(values) - len(missed), len(values), *ends, missed)


def _met(target: Target, value: float) -> bool:
    return target.low < value < target.high if target.strict else target.low <= value <= target.high


def describe(rows: Sequence[Row]) -> str:
    """The rows of `summary` as a table."""
    wide = max(len(row.target) for row in rows) + 2
    lines = [f"{'target':<{wide}}{'met':>7}{'lowest':>9}{'highest':>9}   missed by seed", "-" * (wide + 42)]
    for row in rows:
        met, missed = f"{row.passed}/{row.of}", ", ".join(map(str, row.missed))
        lines.append(f"{row.target:<{wide}}{met:>7}{row.lowest:>9.3f}{row.highest:>9.3f}   {missed}".rstrip())
    return "\n".join(lines)
