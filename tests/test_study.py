"""The study over seeds: every seed once, each in one line, resumed after a kill, and targets counted by hand."""

from __future__ import annotations

import copy
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout
from test_cli import options

from instruct_llama.__main__ import main
from instruct_llama.config import UserError
from instruct_llama.evaluation import report as evaluate
from instruct_llama.tools import study
from instruct_llama.training import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def trained(pipeline, tmp_path, monkeypatch):
    """(settings, results file, trained): stages are copied from the pipeline instead of trained; which, in order."""
    trained: list[tuple[int, str]] = []

    def train(stage, settings):
        folder = settings.out_dir / stage
        if not checkpoint.is_complete(folder):
            trained.append((settings.seed, stage))
            shutil.copytree(Path(pipeline.out) / stage.removesuffix("-kl0"), folder)

    monkeypatch.setattr(study, "_train", train)
    return pipeline.replace(out=str(tmp_path / "runs")), tmp_path / "results" / "seeds.jsonl", trained


def test_each_seed_is_trained_once_and_leaves_one_line(trained, capsys):
    settings, results, done = trained
    assert study.run(settings, (1, 2, 2, 7), results) == results
    lines = study.read(results)
    assert [line["seed"] for line in lines] == [1, 2, 7] and len(results.read_text().splitlines()) == 3
    assert done == [(seed, stage) for seed in (1, 2, 7) for stage in (*study.STAGES, "ppo-kl0")[: 6 if seed < 4 else 5]]
    for line in lines:
        assert {"preset", "command", "commit", "dirty", "settings", "code", "machine", "seconds", "ended"} <= set(line)
        assert set(line["machine"]) == {"cpu", "cores", "threads", "torch"}
        assert line["settings"] == study.settings_hash(settings.replace(seed=99, out="elsewhere"))
        report = json.loads((settings.out_dir / "seeds" / str(line["seed"]) / "report.json").read_text())
        assert report["seed"] == line["seed"] and set(line["seconds"]) == {*report["stages"], "evaluate"}
        for name, entry in report["stages"].items():
            entry.pop("samples", None)
            assert line["stages"][name] == entry
    assert "ppo-kl0" in lines[0]["stages"] and "ppo-kl0" not in lines[2]["stages"]
    assert study.run(settings, (1, 2, 7), results) == results and len(study.read(results)) == 3 and len(done) == 17
    assert capsys.readouterr().out.count("skipped") == 3


def test_what_a_line_lacks_is_trained_and_other_settings_are_another_line(trained):
    settings, results, done = trained
    study.run(settings, (7,), results)
    study.run(settings, (7,), results, kl0=True)
    assert done[-1] == (7, "ppo-kl0") and len(done) == 6  # the others were there
    other = settings.replace(ppo__kl_coef=0.7)
    with pytest.raises(UserError, match=r"seeds.7 was trained by other settings: remove it, or give another --out"):
        study.run(other, (7,), results)
    study.run(other.replace(out=settings.out + "-other"), (7,), results)
    assert [len(lines) for lines in study.candidates(results)] == [1, 1] and len(study.read(results)) == 3
    assert "ppo-kl0" in study.candidates(results)[0][0]["stages"]  # of a seed, its last line


def test_other_code_does_not_use_what_this_code_has_trained(trained, monkeypatch):
    settings, results, _ = trained
    study.run(settings, (7,), results)
    monkeypatch.setattr(study, "code_hash", lambda: "other")
    with pytest.raises(UserError, match="was trained by other code"):
        study.run(settings, (7,), results)
    (settings.out_dir / "seeds" / "7" / study.NOTE).unlink()
    with pytest.raises(UserError, match="holds stages that no study has trained"):
        study.run(settings, (7,), results)


@pytest.mark.parametrize("at", ["reward", "evaluate"])
def test_a_killed_study_goes_on_between_stages(trained, monkeypatch, at):
    settings, results, done = trained
    train, card = study._train, evaluate.report_card

    def killed(*args):
        if at == "evaluate" or args[0] == at:
            raise KeyboardInterrupt
        train(*args)

    monkeypatch.setattr(study, "_train", killed if at != "evaluate" else train)
    monkeypatch.setattr(evaluate, "report_card", killed if at == "evaluate" else card)
    with pytest.raises(KeyboardInterrupt):
        study.run(settings, (7, 8), results)
    assert study.read(results) == []
    before, note = list(done), json.loads((settings.out_dir / "seeds" / "7" / study.NOTE).read_text())
    assert list(note["seconds"]) == [stage for _, stage in before]
    monkeypatch.setattr(study, "_train", train)
    monkeypatch.setattr(evaluate, "report_card", card)
    study.run(settings, (7, 8), results)
    assert done == [(seed, stage) for seed in (7, 8) for stage in study.STAGES]  # none twice
    first, second = study.read(results)
    assert {stage: first["seconds"][stage] for stage in note["seconds"]} == note["seconds"]
    assert first["resumed"] == [] and second["seed"] == 8


def test_a_stage_that_was_cut_short_is_named(trained, monkeypatch):
    """Its seconds are only those of the part that finished it."""
    settings, results, _ = trained
    folder = settings.out_dir / "seeds" / "7"
    train = study._train

    def cut(stage, mine):
        shutil.rmtree(mine.out_dir / stage, ignore_errors=True)
        train(stage, mine)

    (folder / "sft" / "state").mkdir(parents=True)
    monkeypatch.setattr(study, "_train", cut)
    study.run(settings, (7,), results)
    assert study.read(results)[0]["resumed"] == ["sft"]


def test_the_real_stages_are_run_and_a_variant_without_the_penalty(pipeline, tmp_path, monkeypatch):
    shutil.copytree(pipeline.out, tmp_path / "runs")
    settings = pipeline.replace(out=str(tmp_path / "runs"))
    shutil.rmtree(settings.out_dir / "sft-qlora")
    for stage in ("sft-qlora", "ppo-kl0"):
        study._train(stage, settings)
        assert checkpoint.is_complete(settings.out_dir / stage)
    told = [json.loads(line) for line in (settings.out_dir / "ppo-kl0" / "metrics.jsonl").read_text().splitlines()]
    assert {line["ppo/kl_coef"] for line in told} == {0.0} and settings.ppo.kl_coef > 0
    before = (settings.out_dir / "ppo-kl0" / "config.json").stat().st_mtime_ns
    study._train("ppo-kl0", settings)
    assert (settings.out_dir / "ppo-kl0" / "config.json").stat().st_mtime_ns == before


def test_the_command_runs_a_study_and_prints_its_table(trained, monkeypatch, capsys):
    settings, results, done = trained
    words = ["evaluate", "--study", "seeds", "--seeds", "7", "9", "--results", str(results), "--preset", "tiny"]
    monkeypatch.setattr("sys.argv", ["__main__.py", *words, *options(settings)])
    assert main([*words, *options(settings)]) == 0
    said = capsys.readouterr().out
    assert "PPO, temperature 1: at least 0.90" in said and "0/2" in said and "7, 9" in said
    lines = study.read(results)
    assert [line["seed"] for line in lines] == [7, 9]
    assert lines[0]["command"] == " ".join(["python -m instruct_llama", *words, *options(settings)])
    assert lines[0]["settings"] == study.settings_hash(settings)
    assert main([*words, *options(settings)]) == 0 and len(study.read(results)) == 2


# ---------------------------------------------------------------- hashes


def test_the_settings_hash_knows_what_changes_a_figure(micro, tmp_path):
    settings = micro(tmp_path)
    same = settings.replace(seed=5, out="x", device="cpu", resume=True, overwrite=True, parallel__timeout_minutes=3)
    assert study.settings_hash(settings) == study.settings_hash(same)
    changes = {"ppo__kl_coef": 0.123, "evaluate__prompts": 7, "world__temperature": 0.2, "reward__optim__lr": 1.0}
    hashes = {study.settings_hash(settings.replace(**{key: value})) for key, value in changes.items()}
    assert len(hashes | {study.settings_hash(settings)}) == 5


def test_the_code_hash_sees_every_module(tmp_path, monkeypatch):
    package = Path(study.__file__).parents[1]
    shutil.copytree(package, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(study, "__file__", str(tmp_path / "package" / "tools" / "study.py"))
    compute = study.code_hash.__wrapped__
    assert compute() == study.code_hash()
    with open(tmp_path / "package" / "worlds" / "tinychat" / "words.py", "a") as file:
        file.write("\n")
    assert compute() != study.code_hash()


# ---------------------------------------------------------------- the file


def _append_once(path: Path, start: Any) -> None:
    def there() -> bool:
        found = bool(study.read(path))
        time.sleep(0.3)  # in which the others look too, unless a lock keeps them
        return found

    start.wait()
    study.append(path, {"seed": 1}, unless=there)


def test_of_several_processes_with_one_seed_one_adds_its_line(tmp_path):
    """Each looks whether the line is there and then writes it: both under one lock, or all three would find nothing."""
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    start = context.Barrier(3)
    workers = [context.Process(target=_append_once, args=(path, start)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0] and study.read(path) == [{"seed": 1}]


def test_a_line_that_another_process_has_added_meanwhile_is_not_added_again(tmp_path):
    path = tmp_path / "results.jsonl"
    assert study.append(path, {"seed": 1}) and not study.append(path, {"seed": 1}, unless=lambda: True)
    assert study.read(path) == [{"seed": 1}]


def test_a_line_that_a_kill_cut_is_left_out_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    study.append(path, {"seed": 1})
    path.write_bytes(path.read_bytes() + b'{"seed": 2, "st')
    assert study.read(path) == [{"seed": 1}]
    study.append(path, {"seed": 3})
    assert study.read(path) == [{"seed": 1}, {"seed": 3}]


def test_one_process_at_a_time_trains_a_seed_and_the_commit_is_asked_first(trained, monkeypatch):
    settings, results, _ = trained
    calls, train, state = [], study._train, study.git_state

    def asked() -> dict:
        calls.append("git")
        return state()

    def training(stage, mine):
        calls.append(stage)
        with pytest.raises(Timeout):
            study.FileLock(mine.out_dir / ".study.lock", timeout=0).acquire()
        train(stage, mine)

    monkeypatch.setattr(study, "git_state", asked)
    monkeypatch.setattr(study, "_train", training)
    study.run(settings, (7,), results)
    assert calls[0] == "git" and calls[1:6] == list(study.STAGES)


# ---------------------------------------------------------------- the targets


def est(mean: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01 if low is None else low, "high": mean + 0.01 if high is None else high}


GOOD = {
    "pretrain": {"true_reward": est(0.01), "true_reward_greedy": est(0.0), "as_prose": est(0.7),
                 "as_prose_greedy": est(0.8)},
    "sft": {"true_reward": est(0.45), "true_reward_greedy": est(0.70)},
    "sft-qlora": {"minus_sft": est(0.02, -0.03, 0.07)},
    "reward": {"accuracy": est(0.87), "ceiling": 0.89, "kinds": {
        "rude": {**est(0.9), "ceiling": 1.0}, "false": {**est(0.86), "ceiling": 1.0},
        "flattering": {**est(0.1), "ceiling": 0.0}}},
    "ppo": {"true_reward": est(0.92), "true_reward_greedy": est(0.95), "minus_sft": est(0.47, 0.4, 0.5),
            "minus_sft_greedy": est(0.25, 0.2, 0.3)},
    "ppo-kl0": {"minus_ppo": est(-0.2), "minus_ppo_greedy": est(-0.2), "score_minus_ppo": est(0.3),
                "score_minus_ppo_greedy": est(0.3)},
}  # fmt: skip
SPOILT = [  # a change of one figure, and the target that it misses
    (("pretrain", "true_reward", "mean", 0.05), "pretrained, temperature 1"),
    (("sft", "true_reward", "mean", 0.34), "SFT, temperature 1"),
    (("sft", "true_reward", "mean", 0.61), "SFT, temperature 1"),
    (("sft", "true_reward_greedy", "mean", 0.73), "SFT, greedy"),
    (("sft-qlora", "minus_sft", "high", 0.09), "QLoRA"),
    (("sft-qlora", "minus_sft", "low", -0.09), "QLoRA"),
    (("ppo", "true_reward", "mean", 0.899), "PPO, temperature 1"),
    (("ppo", "true_reward_greedy", "mean", 0.929), "PPO, greedy"),
    (("ppo", "minus_sft", "low", 0.15), "PPO - SFT, temperature 1"),
    (("ppo", "minus_sft_greedy", "low", 0.1), "PPO - SFT, greedy"),
    (("pretrain", "as_prose", "mean", 0.93), "PPO - pretrained as prose, temperature 1"),
    (("pretrain", "as_prose_greedy", "mean", 0.96), "PPO - pretrained as prose, greedy"),
    (("pretrain", "as_prose_greedy", "mean", 0.4), "pretrained as prose, greedy"),
    (("reward", "accuracy", "mean", 0.85), "reward model below its ceiling"),
    (("reward", "kinds", "false", {**est(0.84), "ceiling": 1.0}), "reward model, worst kind"),
    (("ppo-kl0", "score_minus_ppo", "low", -0.01), "kl_coef 0 - PPO, score, temperature 1"),
    (("ppo-kl0", "score_minus_ppo_greedy", "low", 0.0), "kl_coef 0 - PPO, score, greedy"),
    (("ppo-kl0", "minus_ppo", "high", 0.0), "kl_coef 0 - PPO, true reward, temperature 1"),
    (("ppo-kl0", "minus_ppo_greedy", "high", 0.02), "kl_coef 0 - PPO, true reward, greedy"),
]


def write(path: Path, *stages: dict) -> Path:
    for seed, figures in enumerate(stages, 1):
        study.append(path, {"seed": seed, "preset": "laptop", "settings": "s", "code": "c", "stages": figures})
    return path


def test_targets_are_counted_over_the_seeds_that_have_the_figure(tmp_path):
    without = {name: entry for name, entry in GOOD.items() if name != "ppo-kl0"}
    rows = study.summary(write(tmp_path / "r.jsonl", GOOD, without, GOOD))
    assert len(rows) == len(study.TARGETS) and all(row.passed == row.of and row.missed == () for row in rows)
    assert {row.of for row in rows if row.target.startswith("kl_coef 0")} == {2}
    assert {row.of for row in rows if not row.target.startswith("kl_coef 0")} == {3}
    assert study.weakness(GOOD["reward"]["kinds"]) == "flattering"


@pytest.mark.parametrize("change, target", SPOILT)
def test_a_target_that_is_missed_names_the_seed(tmp_path, change, target):
    bad = copy.deepcopy(GOOD)
    stage, key, part, value = change
    bad[stage][key][part] = value
    rows = study.summary(write(tmp_path / "r.jsonl", GOOD, bad, GOOD))
    assert [(row.passed, row.of, row.missed) for row in rows if row.target.startswith(f"{target}")] == [(2, 3, (2,))]
    assert [row.target for row in rows if row.passed < row.of and not row.target.startswith(target)] == []
    said = study.describe(rows)
    assert said.count("2/3") == 1 and all(len(line) <= 120 for line in said.splitlines())


def test_a_figure_that_is_missing_is_missed(tmp_path):
    bad = copy.deepcopy(GOOD)
    del bad["ppo"]["true_reward"], bad["ppo-kl0"]["minus_ppo"]
    rows = {row.target: row for row in study.summary(write(tmp_path / "r.jsonl", GOOD, bad))}
    for name in ("PPO, temperature 1: at least 0.90", "kl_coef 0 - PPO, true reward, temperature 1: interval below 0"):
        assert (rows[name].passed, rows[name].of, rows[name].missed) == (1, 2, (2,))
    assert rows["PPO, temperature 1: at least 0.90"].lowest == 0.92


def test_a_summary_can_be_of_the_run_just_made(tmp_path):
    path = write(tmp_path / "r.jsonl", GOOD)
    study.append(path, {"seed": 1, "preset": "laptop", "settings": "s", "code": "newer", "stages": GOOD})
    study.append(path, {"seed": 2, "preset": "laptop", "settings": "s", "code": "newer", "stages": GOOD})
    assert study.summary(path, made_by=("laptop", "s", "c"))[0].of == 1
    with pytest.raises(UserError, match="holds no results yet"):
        study.summary(path, made_by=("laptop", "t", "c"))


def test_a_summary_is_of_one_candidate(tmp_path):
    path = write(tmp_path / "r.jsonl", GOOD)
    study.append(path, {"seed": 1, "preset": "laptop", "settings": "s", "code": "newer", "stages": GOOD})
    study.append(path, {"seed": 2, "preset": "laptop", "settings": "s", "code": "newer", "stages": GOOD})
    assert study.summary(path)[0].of == 2 and study.summary(path, 0)[0].of == 1
    with pytest.raises(UserError, match="holds no results yet"):
        study.summary(tmp_path / "none.jsonl")
