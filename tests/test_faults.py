"""Bad input: one clear sentence that names what is wrong and the cure, a non-zero exit, and nothing lost."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_cli import options

from instruct_llama import presets
from instruct_llama.__main__ import main
from instruct_llama.data import sources
from instruct_llama.data.tokenizer import Tokenizer
from instruct_llama.training import checkpoint, run_log


@pytest.fixture
def runs(pipeline, tmp_path, monkeypatch):
    """(out folder with a copy of the pipeline, options for it); the current folder is elsewhere."""
    shutil.copytree(pipeline.out, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs", ["--preset", "tiny", *options(pipeline.replace(out=str(tmp_path / "runs")))]


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail: its one sentence, in which every given part stands."""

    def run(args: list[str], *parts: str, status: int = 2) -> str:
        capsys.readouterr()
        code = main(args)
        said = capsys.readouterr().err.strip()
        assert code == status and "Traceback" not in said
        for part in parts:
            assert part in said, f"{part!r} is not in {said!r}"
        return said

    return run


def unfinish(folder: Path) -> None:
    """The run folder as it is just before a run finishes."""
    checkpoint.write_info(folder, {**checkpoint.read_info(folder), "complete": False})


def everything(folder: Path) -> dict[str, bytes]:
    """Every file but the locks, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


# ---------------------------------------------------------------- asked wrongly


def test_unknown_names(fails):
    assert "\n" not in fails(["sing"], "no command 'sing'", "choose from pretrain, sft")
    assert "\n" not in fails(["sft", "--preset", "laptpo"], "no preset 'laptpo'", "did you mean laptop?")
    fails(["sft", "--preset", "gigantic"], "no preset 'gigantic'", "choose from tiny, laptop")
    fails(["sft", "--preset"], "Missing value for argument '--preset'")
    fails(["sft", "pretrain"], "Unrecognized options: pretrain", "sft --help")
    fails(["sft", "--sft.colour", "red"], "--sft.colour")
    fails(["sft", "--ppo.klcoef", "1"], "--ppo.kl-coef")
    fails(["sft", "--seed", "one"], "--seed", "int")


@pytest.mark.parametrize("args, part", [
    (["--model.dim", "30"], "model.dim 30 must be a multiple of model.n_heads"),
    (["--sft.loop.batch-size", "0"], "loop.batch_size is 0; it must be at least 1"),
    (["--sft.quant.kind", "nf4"], "set sft.lora.rank"),
    (["--ppo.top-p", "2"], "ppo.top_p must lie in (0, 1]"),
    (["--ppo.temperature", "0"], "ppo.temperature must be positive"),
    (["--seed", "-1"], "--seed"),
])  # fmt: skip
def test_a_value_that_cannot_be(fails, tmp_path, args, part):
    fails(["sft", "--preset", "tiny", "--out", str(tmp_path), *args], part)
    assert not list(tmp_path.iterdir())


def test_environment_variables(fails, monkeypatch):
    monkeypatch.setenv("INSTRUCT_LLAMA_SEED", "first")
    fails(["evaluate"], "INSTRUCT_LLAMA_SEED", "whole number")
    monkeypatch.setenv("INSTRUCT_LLAMA_PRESET", "tini")
    fails(["evaluate"], "did you mean tiny?")


def test_words_that_are_missing_or_too_many(fails, tmp_path):
    fails(["data"], "Missing from python -m instruct_llama data:", "NAME", "tinychat, a public set")
    fails(["data", "dolly", "tinychat"], "Unrecognized options: tinychat", "data --help")
    fails(["merge"], "Missing from python -m instruct_llama merge:", "CHECKPOINT", "the run folder of a LoRA stage")
    fails(["merge", "a", "b", "c"], "Unrecognized options: c", "merge --help")
    fails(["export", "a"], "Missing from python -m instruct_llama export:", "TARGET", "the folder or GGUF file")
    assert "TARGET" in fails(["export"], "Missing from python -m instruct_llama export:", "CHECKPOINT")
    fails(["import"], "Missing from python -m instruct_llama import:", "SOURCE", "smollm2")
    fails(["chat", "a", "b"], "Unrecognized options: b", "chat --help")


def test_a_device_that_is_not_there(fails, runs):
    out, args = runs
    before = everything(out)
    fails(["sft", *args, "--overwrite", "--device", "warp"], "--device warp is not available here", "try cpu")
    assert everything(out) == before


# ---------------------------------------------------------------- files that cannot be used

GOOD = {"prompt": "What is a ball?", "completions": ["A ball is round.", "No."]}


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def turns(*roles_and_texts) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in roles_and_texts]}


BAD_FILES = {  # name: (stage, file name, content, what the sentence says)
    "missing": ("pretrain", "x.txt", None, ("There is no file", "x.txt")),
    "empty": ("pretrain", "x.txt", "", ("x.txt is empty",)),
    "truncated gzip": ("pretrain", "x.txt.gz", gzip.compress(b"A text. " * 999)[:40], ("truncated", "x.txt.gz")),
    "binary": ("pretrain", "x.txt", b"\x00\x01\x02", ("binary file",)),
    "invalid JSON": ("reward", "x.jsonl", lines(GOOD, GOOD, '{"prompt": '), ("x.jsonl line 3", "not valid JSON")),
    "empty response": (
        "sft", "x.jsonl", lines({"prompt": "A?", "response": " "}), ("x.jsonl line 1", "response is empty"),
    ),
    "no alternation": (
        "sft", "x.jsonl", lines(turns(("user", "A?"), ("user", "B?"), ("assistant", "C."))), ("line 1", "user"),
    ),
    "chosen equals rejected": (
        "reward", "x.jsonl", lines({"chosen": "\n\nHuman: A?\n\nAssistant: B.",
                                    "rejected": "\n\nHuman: A?\n\nAssistant: B."}), ("chosen equals rejected",),
    ),
    "text and prompt": ("ppo", "x.jsonl", lines({"text": "A.", "prompt": "B?"}), ("line 1", "both text and prompt")),
    "text, then both": (
        "pretrain", "x.jsonl", lines({"text": "A."}, {"text": "A.", "prompt": "B?"}), ("line 2", "text and prompt"),
    ),
    "two equal completions": ("reward", "x.jsonl", lines({"prompt": "A?", "completions": ["B.", "B."]}), ("line 1",)),
    "wrong kind": ("reward", "x.txt", "Plain text.", ("x.txt holds text", "comparisons")),
    "no known shape": ("sft", "x.jsonl", lines({"question": "A?"}), ("['question']", "no known format")),
    "too few": ("sft", "x.jsonl", lines({"prompt": "A?", "response": "B."}), ("1 usable records", "give more")),
    "too long": (
        "sft", "x.jsonl", lines(*({"prompt": f"{i} word " * 400, "response": "B."} for i in range(60))), ("seq_len",),
    ),
    "prompts too long": ("ppo", "x.jsonl", lines(*({"prompt": f"{i} word " * 400} for i in range(60))),
                         ("No prompt leaves room", "max_new_tokens")),
    "comparisons too long": (
        "reward", "x.jsonl", lines(*({**GOOD, "prompt": f"{i} word " * 400} for i in range(60))), ("reward.seq_len",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_a_bad_file_stops_the_stage_and_the_last_run_stays_whole(fails, runs, tmp_path, name):
    stage, file_name, content, parts = BAD_FILES[name]
    out, args = runs
    path = tmp_path / file_name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = everything(out / stage)
    fails([stage, *args, "--overwrite", "--data", str(path)], *parts)
    assert everything(out / stage) == before
    if name not in ("too few", "wrong kind", "too long", "prompts too long", "comparisons too long"):
        fails(["data", str(path), "--out", str(tmp_path / "made")], *(p for p in parts if "holds" not in p))
        assert not (tmp_path / "made").exists()


def test_an_unknown_data_set_is_a_missing_file(fails):
    fails(["data", "tinychta"], "There is no file tinychta")


# ---------------------------------------------------------------- checkpoints that cannot be used


def test_a_folder_that_is_no_checkpoint(fails, runs, tmp_path):
    out, args = runs
    before = everything(out)
    for command in (["sft", "--init", "nowhere"], ["ppo", "--init", "nowhere"]):
        anew = [command[0], *args, "--overwrite", *command[1:]]
        fails(anew, "nowhere is not a run folder", "give the folder of a stage")
    fails(["chat", "nowhere", *args], "nowhere is not a run folder")
    fails(["merge", str(out / "sft"), *args], "no adapter to merge")
    fails(["chat", str(out / "reward"), *args], "is a reward model and cannot talk")
    fails(["evaluate", *args, "--out", str(tmp_path / "empty")], "no finished stage", "--out")
    assert everything(out) == before


def test_a_stage_starts_from_full_weights_of_the_right_kind(fails, runs):
    out, args = runs
    assert main(["sft", *args, "--sft.lora.rank", "2"]) == 0
    before = everything(out)
    for stage in ("pretrain", "sft", "reward", "dpo", "ppo"):
        for more in ([], ["--sft.lora.rank", "2"]):  # its own folder as its own base would be a circle
            into_itself = (stage == "sft" and more) or stage == "pretrain"  # the adapter's own base
            said = ["would overwrite"] if into_itself else ["holds an adapter", "sft-lora-merged"]
            fails([stage, *args, "--overwrite", *more, "--init", str(out / "sft-lora")], *said)
        said = ["would overwrite"] if stage == "reward" else ["is a reward model", "needs a language model: give one"]
        fails([stage, *args, "--overwrite", "--init", str(out / "reward")], *said)
    assert everything(out) == before


def test_a_truncated_checkpoint(fails, runs):
    out, args = runs
    path = out / "sft" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    before = everything(out)
    fails(["chat", str(out / "sft"), *args], "model.safetensors is truncated")
    fails(["sft", *args, "--init", str(out / "sft"), "--sft.name", "again"], "model.safetensors is truncated")
    fails(["ppo", *args, "--overwrite"], "model.safetensors is truncated")
    assert everything(out) == before


def test_a_checkpoint_of_another_shape(fails, runs):
    out, args = runs
    info = checkpoint.read_info(out / "pretrain")
    checkpoint.write_info(out / "pretrain", {**info, "model": {**info["model"], "ffn_dim": 40}})
    before = everything(out / "sft")
    anew = ["sft", *args, "--overwrite"]
    fails(anew, "pretrain", "w_gate.weight is (48, 32) and should be (40, 32)", "does not fit this model")
    assert everything(out / "sft") == before


def test_a_token_id_outside_the_vocabulary(fails, runs):
    out, args = runs
    texts = [" ".join(chr(97 + i % 26) * (2 + i % 5) for i in range(start, start + 60)) for start in range(40)]
    Tokenizer.train(texts, 510).save(out / "pretrain")  # another tokenizer, larger than the model
    before = everything(out / "sft")
    fails(["sft", *args, "--overwrite"], "outside the vocabulary", "480")
    assert everything(out / "sft") == before and checkpoint.is_complete(out / "sft")


def test_a_question_longer_than_the_context(runs, monkeypatch, capsys):
    """The conversation says so and goes on without it."""
    out, args = runs
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 500 + "\nHello\n\n"))
    assert main(["chat", str(out / "sft"), *args]) == 0
    said = capsys.readouterr().out
    assert "longer than the model's context of 160 tokens: shorten it." in said and said.count("> ") == 3


def test_resume_with_other_settings(fails, runs):
    out, args = runs
    before = everything(out)
    fails(["sft", *args, "--resume", "--sft.optim.lr", "0.5"], "--resume", "other settings", "retrain with")
    assert everything(out) == before


def test_resume_from_a_damaged_state(fails, runs):
    out, args = runs
    path = out / "sft" / "state" / "resume.safetensors"
    unfinish(out / "sft")
    path.write_bytes(path.read_bytes()[:200])
    before = everything(out)
    fails(["sft", *args, "--resume"], "resume.safetensors is truncated")
    assert everything(out) == before


# ---------------------------------------------------------------- a full disk, a place that cannot be written, Ctrl-C


def test_a_full_disk_keeps_the_last_save_and_the_run_goes_on_from_it(fails, runs, monkeypatch):
    out, args = runs
    again = ["sft", *args, "--sft.name", "again"]
    real, saves = checkpoint.save_file, []

    def full(tensors, path, metadata=None) -> None:
        if "resume.safetensors" in str(path):
            saves.append(path)
        if len(saves) == 2:  # the second save, at step 4: half of it fits
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    fails(again, "The disk is full", "resume.safetensors", "--resume")
    monkeypatch.setattr(checkpoint, "save_file", real)
    _, metadata = checkpoint.read_tensors(out / "again" / "state" / "resume.safetensors")
    assert json.loads(metadata["state"])["step"] == 2
    assert not list(out.rglob("*.tmp")) and not checkpoint.is_complete(out / "again")
    assert main([*again, "--resume"]) == 0
    logged = [run_log.read_jsonl(out / name / "metrics.jsonl") for name in ("sft", "again")]
    assert [r["train/loss"] for r in logged[0]] == [r["train/loss"] for r in logged[1]]


def test_a_full_disk_while_logging(fails, runs, monkeypatch):
    out, args = runs

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(run_log.RunLog, "log", full)
    fails(["sft", *args, "--sft.name", "again"], "No space left on device", "metrics.jsonl", "--out", "--resume")


def test_a_full_disk_while_writing_records(fails, tmp_path, monkeypatch):
    def full(_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "story-text.jsonl").write_text("the old one", encoding="utf-8")
    (tmp_path / "story.txt").write_text("A story.", encoding="utf-8")
    monkeypatch.setattr(os, "fsync", full)
    fails(["data", str(tmp_path / "story.txt"), "--out", str(tmp_path)], "The disk is full", "story-text.jsonl")
    assert (tmp_path / "story-text.jsonl").read_text(encoding="utf-8") == "the old one"


def test_an_out_folder_that_is_a_file(fails, runs, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    fails(["sft", *runs[1], "--out", str(tmp_path / "taken")], "taken", "--out")
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_ctrl_c_saves_and_says_how_to_go_on(fails, runs, monkeypatch):
    out, args = runs
    real = run_log.RunLog.log

    def interrupted(self, step, metrics) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        real(self, step, metrics)

    monkeypatch.setattr(run_log.RunLog, "log", interrupted)
    again = ["sft", *args, "--sft.name", "again"]
    fails(again, "Stopped; the state is in", "python -m instruct_llama sft --resume", status=130)
    monkeypatch.setattr(run_log.RunLog, "log", real)
    assert main([*again, "--resume"]) == 0 and checkpoint.is_complete(out / "again")


def test_ctrl_c_elsewhere_is_no_traceback(fails, runs, monkeypatch):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "write_jsonl", interrupted)
    fails(["data", "tinychat", *runs[1]], "Stopped.", status=130)


def test_p34_weights_that_are_not_finite_stop_the_stage(fails, runs):
    out, args = runs
    path = out / "pretrain" / "model.safetensors"
    tensors, metadata = checkpoint.read_tensors(path)
    tensors["norm.weight"] = torch.full_like(tensors["norm.weight"], float("inf"))
    checkpoint.write_tensors(path, tensors, metadata)
    fails(["sft", *args, "--sft.name", "again"], "at step 1, records [")
    assert not checkpoint.is_complete(out / "again")
    assert presets.get("tiny").sft.name == ""
