"""A finished run is never lost: the same settings do nothing, others are refused, an overwritten one stays readable
until the new run has finished.
"""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
from test_cli import options
from test_faults import everything

import instruct_llama as il
from instruct_llama.__main__ import main, parse
from instruct_llama.config import UserError
from instruct_llama.convert import merge
from instruct_llama.pipeline import run as run_stage
from instruct_llama.training import checkpoint, folders, run_log

STAGES = ("pretrain", "sft", "sft-qlora", "reward", "ppo")


@pytest.fixture
def runs(pipeline, tmp_path, monkeypatch):
    """(out folder with a copy of the pipeline, options for it); the current folder is elsewhere."""
    shutil.copytree(pipeline.out, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs", ["--preset", "tiny", *options(pipeline.replace(out=str(tmp_path / "runs")))]


def status(args: list[str]) -> int:
    """The exit status, also where the option parser ends the program."""
    try:
        return main(args)
    except SystemExit as stop:
        return stop.code


def runs_of(out: Path) -> dict[str, dict[str, bytes]]:
    """Every file of every run folder, byte for byte."""
    return {stage: everything(out / stage) for stage in STAGES}


class Crash(Exception):
    """Stands for a killed process."""


def crash(record: dict[str, float]) -> None:
    raise Crash


# ---------------------------------------------------------------- refused options

REFUSED = {  # what is asked for -> the sentence
    ("pretrain", "--pretrain.seq-len", "512"): "pretrain.seq_len 512 exceeds the context of 160",
    ("ppo", "--ppo.kl-coef", "nan"): "ppo.kl_coef is nan",
    ("ppo", "--ppo.kl-coef", "-5"): "ppo.kl_coef is -5.0",
    ("ppo", "--ppo.kl-coef", "inf"): "ppo.kl_coef is inf",
    ("ppo", "--ppo.save-every", "0"): "ppo.save_every is 0; it must be at least 1",
    ("ppo", "--ppo.eval-every", "0"): "ppo.eval_every is 0",
    ("ppo", "--ppo.sample-every", "0"): "ppo.sample_every is 0",
    ("ppo", "--ppo.eval-prompts", "0"): "ppo.eval_prompts is 0",
    ("ppo", "--ppo.kl-horizon", "0"): "ppo.kl_horizon is 0",
    ("pretrain", "--model.max-seq-len", "8"): "pretrain.seq_len 32 exceeds the context of 8: lower it",
    ("sft", "--seed", "9" * 30): "--seed is 999",
    ("sft", "--sft.loop.save-every", "0"): "loop.save_every is 0",
    ("sft", "--sft.seq-len", "4"): "None of the",
}


@pytest.mark.parametrize("anew", [[], ["--overwrite"]])
@pytest.mark.parametrize("asked", REFUSED)
def test_p48_a_refused_option_leaves_the_finished_run_whole(runs, capsys, asked, anew):
    """Without --overwrite other settings are refused as such, unless no stage could take them."""
    out, args = runs
    before = everything(out)
    assert status([asked[0], *args, *asked[1:], *anew]) == 2
    said = capsys.readouterr().err
    assert REFUSED[asked] in said or (not anew and "holds a finished run of other settings" in said)
    assert {name: data for name, data in everything(out).items() if ".new" not in name} == before
    il.load(out / asked[0])


@pytest.mark.parametrize("stage, option", [
    ("pretrain", ["--pretrain.loop.steps", "5"]), ("sft", ["--sft.optim.lr", "0.5"]), ("sft", ["--seed", "2"]),
    ("reward", ["--reward.responses-per-prompt", "2"]), ("ppo", ["--ppo.kl-coef", "0.1"]),
])  # fmt: skip
def test_p48_other_settings_are_refused_and_named(runs, capsys, stage, option):
    out, args = runs
    before = everything(out)
    assert main([stage, *args, *option]) == 2
    said = capsys.readouterr().err
    name = option[0].strip("-").replace("-", "_")
    assert f"{stage} holds a finished run of other settings ({name} " in said and f"asked for {option[1]}" in said
    assert "--overwrite" in said and "\n" not in said.strip()
    assert everything(out) == before


def test_where_ppos_networks_are_kept_does_not_make_it_another_run(runs, capsys):
    out, args = runs
    before = everything(out)
    for more in (["--ppo.devices", "cpu", "cpu", "cpu", "cpu"], ["--ppo.offload-inactive"]):
        assert main(["ppo", *args, *more]) == 0
        assert "nothing to do" in capsys.readouterr().out and everything(out) == before


def test_a_run_written_beside_another_is_no_stage(runs):
    """Whole for a moment before the two are swapped, or for as long as a kill between leaves them there."""
    out, _ = runs
    for name in (".sft.new", ".sft.old"):
        shutil.copytree(out / "sft", out / name)
    assert il.evaluation.stage_folders(out) == [out / stage for stage in STAGES]


def test_an_export_among_the_runs_is_no_stage_and_a_damaged_run_is_named(runs):
    out, _ = runs
    il.convert.export("hf", out / "ppo", out / "ppo-hf")
    assert il.evaluation.stage_folders(out) == [out / stage for stage in STAGES]
    (out / "sft" / "config.json").write_text('{"kind": "lm",', encoding="utf-8")
    with pytest.raises(UserError, match="sft.config.json is damaged or from another program"):
        il.evaluation.stage_folders(out)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
@pytest.mark.parametrize("more", [[], ["--resume"], ["--device", "cpu"], ["--parallel.cpu-offload"]])
def test_p48_a_second_run_of_the_same_settings_does_nothing(runs, capsys, stage, more):
    out, args = runs
    before = everything(out)
    assert main([stage, *args, *more]) == 0
    said = capsys.readouterr().out
    assert f"{stage} holds a finished run of these settings: nothing to do" in said
    assert f"{stage} was finished before: step " in said
    assert everything(out) == before


def test_p48_settings_of_other_stages_do_not_make_it_another_run(runs, capsys):
    out, args = runs
    before = everything(out)
    more = ["--ppo.kl-coef", "0.1", "--reward.optim.lr", "1", "--pretrain.loop.steps", "9", "--evaluate.prompts", "3"]
    assert main(["sft", *args, *more]) == 0
    assert "nothing to do" in capsys.readouterr().out and everything(out) == before


def test_ppos_demonstrations_count_where_they_are_mixed_in(pipeline):
    asked = [pipeline.replace(ppo__ptx_coef=coef, sft__seq_len=length) for coef in (0.0, 0.1) for length in (64, 128)]
    without, same, short, long = (run_log.identity(settings, "ppo") for settings in asked)
    assert without == same and short != long != same


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", 0.5),
        ("top_k", 5),
        ("top_p", 0.5),
        ("max_new_tokens", 9),
        ("seq_len", 50),
        ("generation_batch_size", 3),
    ],
)
def test_how_ppo_samples_makes_it_another_reward_model(runs, pipeline, field, value):
    """Its comparisons and its normaliser are of responses that are sampled as PPO will sample them."""
    other = pipeline.replace(**{f"ppo__{field}": value})
    before, after = (run_log.identity(settings, "reward") for settings in (pipeline, other))
    assert before != after and after["ppo"][field] == value
    assert run_log.identity(pipeline, "sft") == run_log.identity(other, "sft")
    refused = rf"holds a finished run of other settings \(ppo.{field} .*, asked for {value}"
    with pytest.raises(UserError, match=refused):
        run_stage("reward", parse(["reward", *runs[1], f"--ppo.{field.replace('_', '-')}", str(value)]))


def test_data_given_for_one_stage_or_for_all_is_the_same(pipeline):
    a, b = pipeline.replace(data="x.jsonl"), pipeline.replace(sft__data="x.jsonl")
    assert run_log.identity(a, "sft") == run_log.identity(b, "sft") != run_log.identity(pipeline, "sft")


def test_a_finished_run_comes_back_with_its_history(pipeline):
    first = Path(pipeline.out) / "sft"
    result = run_stage("sft", pipeline, crash)
    assert (result.folder, result.steps, result.trained) == (first, 4, False)
    assert result.best == checkpoint.read_info(first)["best"] and result.best["loss"] > 0
    assert [record["step"] for record in result.history] == [1, 2, 3, 4] and result.samples


@pytest.mark.parametrize("info, said", [
    ({"settings": None}, "an earlier version did not note them"), ({"stage": "reward"}, "of the stage reward"),
    ({"stage": "import", "imported_from": "theirs"}, "imported from theirs"),
    ({"kind": None}, "its config.json is damaged, or not ours"),
])  # fmt: skip
def test_p48_what_is_not_known_to_be_the_same_run_is_refused(runs, capsys, info, said):
    out, args = runs
    changed = {**checkpoint.read_info(out / "sft"), **info}
    checkpoint.write_info(out / "sft", {key: value for key, value in changed.items() if value is not None})
    before = everything(out)
    assert main(["sft", *args]) == 2
    assert f"other settings ({said})" in capsys.readouterr().err and everything(out) == before
    assert main(["sft", *args, "--overwrite"]) == 0
    il.load(out / "sft")
    assert main(["sft", *args]) == 0 and "nothing to do" in capsys.readouterr().out


# ---------------------------------------------------------------- overwriting


def test_p48_overwrite_trains_anew_and_the_old_run_stays_readable(pipeline, runs):
    out, _ = runs
    settings = pipeline.replace(out=str(out), overwrite=True, sft__optim__lr=0.01, sft__lora__rank=2, sft__name="sft")
    before, seen = everything(out / "sft"), []

    def watch(record: dict[str, float]) -> None:
        il.load(out / "sft")
        seen.append(everything(out / "sft") == before)

    result = run_stage("sft", settings, watch)
    assert seen == [True] * 4 and result.folder == out / "sft" and result.trained
    info = checkpoint.read_info(out / "sft")
    assert info["settings"]["sft"]["optim"]["lr"] == 0.01 and info["base"] == "../pretrain"
    assert not {"model.safetensors"} & everything(out / "sft").keys()
    assert [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert sum(path.name.startswith("events.out") for path in result.folder.iterdir()) == 1
    il.load(out / "sft")
    assert {path.name for path in out.iterdir() if path.suffix != ".lock"} == set(STAGES)


@pytest.mark.parametrize("stop", ["crash", "first Ctrl-C", "full disk"])
def test_p48_a_run_that_stops_early_leaves_the_old_one(pipeline, runs, stop, monkeypatch):
    out, _ = runs
    settings, before = pipeline.replace(out=str(out), overwrite=True, seed=2), everything(out / "sft")

    def watch(record: dict[str, float]) -> None:
        if stop == "crash":
            raise Crash
        if stop == "first Ctrl-C":
            raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise UserError("The disk is full")

    if stop == "full disk":
        monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises((Crash, KeyboardInterrupt, UserError)):
        run_stage("sft", settings, watch)
    assert everything(out / "sft") == before and il.require("sft", settings) == out / "sft"
    il.load(out / "sft")
    assert il.evaluation.stage_folders(out) == [out / stage for stage in STAGES]


@pytest.mark.parametrize("more", [{}, {"overwrite": True}])
def test_p48_an_interrupted_overwriting_run_goes_on(pipeline, runs, more):
    out, _ = runs
    settings = pipeline.replace(out=str(out), seed=2)
    whole = run_stage("sft", settings.replace(sft__name="whole", init=None))

    def stop(record: dict[str, float]) -> None:
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    before = everything(out / "sft")
    with pytest.raises(run_log.Interrupted):
        run_stage("sft", settings.replace(overwrite=True), stop)
    with pytest.raises(UserError, match="--resume: .*started with other settings"):
        run_stage("sft", settings.replace(resume=True, sft__optim__lr=0.5))
    assert everything(out / "sft") == before
    steps = []
    result = run_stage("sft", settings.replace(resume=True, **more), lambda record: steps.append(record["step"]))
    assert steps == [4] and [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert (out / "sft/model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert not folders.replacement_path(out / "sft").exists()


def test_p48_resume_goes_on_with_an_overwriting_run_only_from_a_saved_state(pipeline, runs):
    """A run that died before its first save leaves a folder beside, from which nothing can go on."""
    out, _ = runs
    settings, before = pipeline.replace(out=str(out)), everything(out / "sft")
    with pytest.raises(Crash):
        run_stage("sft", settings.replace(overwrite=True, seed=2), crash)
    assert folders.replacement_path(out / "sft").is_dir()
    with pytest.raises(UserError, match="--resume: .*holds a finished run of other settings"):
        run_stage("sft", settings.replace(resume=True, sft__optim__lr=0.5))
    assert everything(out / "sft") == before


def test_ppo_does_not_go_on_with_another_reward_model(pipeline, runs):
    out, _ = runs
    settings = pipeline.replace(out=str(out), ppo__name="mine")

    def stop(record: dict[str, float]) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(run_log.Interrupted):
        run_stage("ppo", settings, stop)
    shutil.copytree(out / "reward", out / "before")
    run_stage("reward", settings.replace(overwrite=True, reward__optim__lr=0.01))
    state = everything(out / "mine")
    with pytest.raises(UserError, match="--resume: .*mine was started with other inputs .reward: trained again since"):
        run_stage("ppo", settings.replace(resume=True))
    assert everything(out / "mine") == state
    shutil.rmtree(out / "reward")
    (out / "before").rename(out / "reward")
    assert run_stage("ppo", settings.replace(resume=True)).steps == 2


def test_a_finished_run_of_replaced_inputs_is_refused_and_they_are_named(runs, capsys):
    out, args = runs
    assert main(["sft", *args, "--overwrite", "--sft.optim.lr", "0.01"]) == 0
    before = runs_of(out)
    for stage in ("reward", "ppo"):
        assert main([stage, *args]) == 2
        said = capsys.readouterr().err
        assert f"{stage} holds a finished run of other inputs (sft: trained again since)" in said
        assert "--overwrite" in said and "\n" not in said.strip()
    assert runs_of(out) == before
    assert main(["reward", *args, "--overwrite"]) == 0 and main(["ppo", *args]) == 2
    assert "other inputs (sft, reward: trained again since)" in capsys.readouterr().err
    assert main(["ppo", *args, "--overwrite"]) == 0 and main(["ppo", *args]) == 0
    assert "nothing to do" in capsys.readouterr().out
    info = checkpoint.read_info(out / "ppo")
    checkpoint.write_info(out / "ppo", {key: value for key, value in info.items() if key != "inputs"})
    shutil.rmtree(out / "sft")  # nor does a run refuse that noted none, or whose inputs are gone
    assert main(["ppo", *args]) == 0


def test_overwriting_one_stage_trains_no_other(runs, capsys):
    out, args = runs
    before = runs_of(out)
    assert main(["ppo", *args, "--overwrite", "--ppo.iterations", "1"]) == 0
    after = runs_of(out)
    assert before.pop("ppo") != after.pop("ppo") and before == after


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("function", ["rename", "remove"])
def test_p48_a_kill_while_the_new_run_takes_its_place(runs, function, nth, monkeypatch):
    """At any of the renames and removals: a reader finds the old run or the new one, the next command the new one."""
    out, _ = runs
    folder, old = out / "sft", everything(out / "sft")
    shutil.copytree(out / "reward", folders.replacement_path(folder))  # a finished run, told apart by what it is
    new = everything(out / "reward")
    child = os.fork()
    if child == 0:
        calls = itertools.count()
        place = Path if function == "rename" else folders
        real = getattr(place, function)

        def killed(*args: object) -> object:
            if next(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(place, function, killed)
        folders.replace_folder(folder)
        os._exit(0)
    os.waitpid(child, 0)
    shown = [path for path in out.iterdir() if path.name == ".sft.old"]
    assert folder in il.evaluation.stage_folders(out) and not {*shown} & {*il.evaluation.stage_folders(out)}
    checkpoint.load(folder)
    assert everything(folder) in (old, new)
    with folders.stage_lock(folder):
        assert everything(folder) == new
    assert not folders.replacement_path(folder).exists() and not (out / ".sft.old").exists()


def test_p48_a_reader_before_the_first_rename_does_not_lose_the_new_run(runs, monkeypatch):
    """It puts the new run in its place just before `replace_folder` looks there."""
    out, _ = runs
    folder, new = out / "sft", everything(out / "reward")
    (out / "sft").rename(folders.replacement_path(folder))
    shutil.rmtree(folders.replacement_path(folder))
    shutil.copytree(out / "reward", folders.replacement_path(folder))
    remove = folders.remove

    def removed(path: Path) -> None:
        remove(path)
        folders.recover_for_reading(folder)

    monkeypatch.setattr(folders, "remove", removed)
    folders.replace_folder(folder)
    assert everything(folder) == new


def test_the_folder_beside_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folders.replacement_path(Path(".")) == tmp_path.parent / f".{tmp_path.name}.new"


def test_a_swap_that_a_kill_cut_is_undone_where_the_new_folder_is_not_whole(tmp_path):
    (tmp_path / ".x.old").mkdir()
    (tmp_path / ".x.new").mkdir()
    (tmp_path / ".x.old" / "file").write_text("mine", encoding="utf-8")
    folders.recover(tmp_path / "x")
    assert (tmp_path / "x" / "file").read_text(encoding="utf-8") == "mine" and not (tmp_path / ".x.old").exists()


# ---------------------------------------------------------------- a stage into what it reads (B2)

CIRCLES = {
    "sft into its start": (["sft", "--init", "sft"], "sft would overwrite"),
    "by another spelling": (["sft", "--init", "reward/../sft"], "sft would overwrite"),
    "adapters onto their base": (["sft", "--sft.lora.rank", "4", "--sft.name", "pretrain"], "folder of the stage"),
    "adapters onto their base, by init": (
        ["sft", "--sft.lora.rank", "4", "--init", "sft", "--sft.name", "sft"], "sft would overwrite",
    ),
    "ppo onto its start": (["ppo", "--ppo.name", "sft"], "sft is the folder of the stage sft"),
    "ppo onto its start, by init": (["ppo", "--ppo.name", "mine", "--init", "mine"], "ppo would overwrite"),
    "ppo onto the reward model": (["ppo", "--ppo.name", "reward"], "reward is the folder of the stage reward"),
    "onto the base of the start": (
        ["reward", "--reward.name", "base", "--init", "adapter"], "reward would overwrite runs/base",
    ),
    "no name": (["ppo", "--ppo.name", ""], "ppo.name is ''"),
    "up": (["ppo", "--ppo.name", ".."], "ppo.name is '..'"),
    "here": (["pretrain", "--pretrain.name", "."], "pretrain.name is '.'"),
    "nested": (["sft", "--sft.name", "a/b"], "sft.name is 'a/b'"),
    "absolute": (["reward", "--reward.name", "/x/y"], "reward.name is '/x/y'"),
    "hidden": (["ppo", "--ppo.name", ".ppo.new"], "ppo.name is '.ppo.new'"),
}  # fmt: skip


@pytest.mark.parametrize("anew", [[], ["--overwrite"]])
@pytest.mark.parametrize("case", CIRCLES)
def test_p48_a_stage_does_not_write_over_what_it_reads(runs, capsys, case, anew):
    out, args = runs
    shutil.copytree(out / "sft", out / "mine")
    shutil.copytree(out / "pretrain", out / "base")
    shutil.copytree(out / "sft-qlora", out / "adapter")
    checkpoint.write_info(out / "adapter", {**checkpoint.read_info(out / "adapter"), "base": "../base"})
    checkpoint.write_info(out, {"kind": "lm", "model": {}})
    (stage, *more), said = CIRCLES[case]
    before = everything(out)
    if "--init" in more:
        more[more.index("--init") + 1] = str(out / more[more.index("--init") + 1])
    assert status([stage, *args, *more, *anew]) == 2
    assert said in capsys.readouterr().err
    assert everything(out) == before


def test_every_stage_notes_the_weights_that_it_read(pipeline):
    """Else a run whose input was trained again is taken for one of today's."""
    read = {"pretrain": [], "sft": ["pretrain"], "sft-qlora": ["pretrain"], "reward": ["sft"], "ppo": ["sft", "reward"]}
    for stage, names in read.items():
        noted = checkpoint.read_info(pipeline.out_dir / stage)["inputs"]
        assert noted == checkpoint.fingerprints(pipeline.out_dir / name for name in names), stage
        assert len(noted) == len(names)


def test_the_names_that_stages_have(pipeline):
    assert pipeline.replace(sft__name="sft-qlora").sft.run_name == "sft-qlora"
    assert pipeline.replace(reward__name="reward-lora").reward.run_name == "reward-lora"
    assert list(inspect.signature(run_stage).parameters) == ["stage", "settings", "watch"]


# ---------------------------------------------------------------- merge, export, import onto what is there (B3)

ONTO = {  # what is asked for -> the sentence without --overwrite, and with it; empty: it is done
    "hf onto a run": ("export --to hf sft reward", "holds a checkpoint already", ""),
    "hf onto its source": ("export --to hf sft sft", "would overwrite", "would overwrite"),
    "hf onto its base": ("export --to hf sft-qlora pretrain", "would overwrite", "would overwrite"),
    "hf onto the parent of its source": ("export --to hf sft .", "would overwrite", "would overwrite"),
    "peft onto a run": ("export --to peft sft-qlora ppo", "holds a checkpoint already", ""),
    "peft onto its base": ("export --to peft sft-qlora pretrain", "would overwrite", "would overwrite"),
    "gguf onto a file": ("export --to gguf sft notes.txt", "notes.txt exists already", "one that ends in .gguf"),
    "gguf onto another": ("export --to gguf sft mine.gguf", "mine.gguf exists already", ""),
    "gguf onto a run": ("export --to gguf sft sft", "is a folder", "is a folder"),
    "merge onto a run": ("merge sft-qlora sft", "holds a checkpoint already", ""),
    "merge onto its base": ("merge sft-qlora pretrain", "would overwrite", "would overwrite"),
    "merge onto itself": ("merge sft-qlora sft-qlora", "would overwrite", "would overwrite"),
    "onto other things": ("merge sft-qlora things", "is not a checkpoint", "is not a checkpoint"),
    "onto a project": ("export --to hf sft project", "is not a checkpoint", "is not a checkpoint"),
    "onto a project with a checkpoint": ("export --to hf sft lab", "is not a checkpoint", "is not a checkpoint"),
    "onto a run that stopped": ("export --to hf sft stopped", "holds a checkpoint already", ""),
    "import onto a run": ("import theirs --out sft", "holds a checkpoint already", ""),
    "import onto its source": ("import theirs --out theirs", "would overwrite", "would overwrite"),
    "import onto its file's folder": ("import theirs/model.gguf --out theirs", "would overwrite", "would overwrite"),
}  # fmt: skip


@pytest.mark.parametrize("anew", [[], ["--overwrite"]])
@pytest.mark.parametrize("case", ONTO)
def test_p48_what_is_there_is_not_overwritten_unasked(runs, capsys, monkeypatch, case, anew):
    out, _ = runs
    il.convert.export("hf", out / "pretrain", out / "theirs")
    (out / "theirs" / "model.gguf").write_bytes(b"theirs")
    for name in ("notes.txt", "mine.gguf", "things/mine.txt", "project/config.json", "project/state/x", "lab/src/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"mine": 1}', encoding="utf-8")
    shutil.copy(out / "sft" / "model.safetensors", out / "lab")
    shutil.copytree(out / "sft" / "state", out / "stopped" / "state")
    monkeypatch.chdir(out)
    command, refused, refused_anew = ONTO[case]
    before, words = everything(out), command.split()
    said = refused_anew if anew else refused
    assert status([*words, *anew]) == (2 if said else 0)
    assert said in capsys.readouterr().err
    if said:
        assert everything(out) == before
    else:
        target = words[-1]
        kept = {name: data for name, data in everything(out).items() if not name.startswith(target)}
        assert kept == {name: data for name, data in before.items() if not name.startswith(target)}
        assert everything(out) != before
        if words[0] != "export":
            il.load(out / target)
    assert not list(out.glob(".*.new")) and not list(out.glob(".*.old"))


def test_a_merge_may_be_made_again_from_the_same_run(runs):
    out, _ = runs
    for _ in range(2):
        merge.merge_run(out / "sft-qlora", out / "merged")
    assert "settings" not in checkpoint.read_info(out / "merged")
    shutil.copytree(out / "sft-qlora", out / "other")
    with pytest.raises(UserError, match="holds a checkpoint already"):
        merge.merge_run(out / "other", out / "merged")


def test_a_merge_onto_a_foreign_folder_can_overwrite_it(runs):
    out, _ = runs
    il.convert.export("hf", out / "sft", out / "theirs")
    with pytest.raises(UserError, match="holds a checkpoint already"):
        merge.merge_run(out / "sft-qlora", out / "theirs")
    merge.merge_run(out / "sft-qlora", out / "theirs", overwrite=True)
    il.load(out / "theirs")


def test_a_conversion_that_fails_leaves_what_was_there(runs, monkeypatch):
    out, _ = runs
    before = everything(out)

    def full(*_: object) -> None:
        raise UserError("The disk is full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    for convert in (lambda: merge.merge_run(out / "sft-qlora", out / "sft", overwrite=True),
                    lambda: il.convert.export("hf", out / "sft", out / "ppo", overwrite=True),
                    lambda: il.convert.export("peft", out / "sft-qlora", out / "ppo", overwrite=True)):  # fmt: skip
        with pytest.raises(UserError, match="full"):
            convert()
    assert everything(out) == before and not list(out.glob(".*.new"))


# ---------------------------------------------------------------- policy and reward model (B4)


@pytest.mark.parametrize("layout", ["four_models", "shared_base"])
def test_ppo_refuses_a_reward_model_of_another_vocabulary(runs, capsys, layout):
    out, args = runs
    name = "reward" if layout == "four_models" else "reward-lora"
    if name == "reward-lora":
        shutil.copytree(out / "reward", out / name)
    text = [" ".join(chr(97 + i % 26) * (2 + i % 5) for i in range(start, start + 60)) for start in range(40)]
    il.training.checkpoint.Tokenizer.train(text, 480).save(out / name)
    before = everything(out / "ppo")
    assert main(["ppo", *args, "--overwrite", "--ppo.layout", layout]) == 2
    assert f"The vocabularies of runs/sft and runs/{name} differ" in capsys.readouterr().err.replace(str(out), "runs")
    assert everything(out / "ppo") == before


def test_p48_an_exported_adapter_is_not_trained_over(pipeline, tmp_path):
    """It has no config.json of ours, and its weights would be removed with those of an unfinished run."""
    folder = tmp_path / "my-peft"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match="holds a finished run of other settings"):
        init = str(pipeline.out_dir / "pretrain")
        run_stage("sft", pipeline.replace(out=str(tmp_path), sft__name="my-peft", init=init))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
