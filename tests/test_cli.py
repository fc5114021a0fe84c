"""The command line: what it parses, that every command runs, and the names that others rely on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_tokenizer import json_tokenizer

import instruct_llama as il
from instruct_llama import convert, presets
from instruct_llama.__main__ import COMMANDS, leave, main, parse
from instruct_llama.config import SamplingConfig
from instruct_llama.data import sources
from instruct_llama.evaluation.exact import EnumerableTokens
from instruct_llama.seeds import derive

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings the same parser under its old name
    import tomli as tomllib


def options(settings, default=None, prefix: str = "--") -> list[str]:
    """The command-line options that turn the tiny preset into `settings`."""
    default, found = default or presets.get("tiny"), []
    for field in dataclasses.fields(settings):
        value, usual = getattr(settings, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += options(value, usual, name + ".")
        elif value != usual:
            found += [name, str(value)]
    return found


@pytest.fixture
def runs(pipeline, tmp_path, monkeypatch):
    """(out folder with a copy of the pipeline, options for it); the current folder is elsewhere."""
    shutil.copytree(pipeline.out, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs", ["--preset", "tiny", *options(pipeline.replace(out=str(tmp_path / "runs")))]


# ---------------------------------------------------------------- parsing


def test_options_set_any_field():
    settings = parse(["sft", "--preset", "laptop", "--ppo.kl-coef", "0.1", "--seed", "7", "--out", "there",
                      "--sft.pack", "--sft.lora.target-modules", "wq", "wv",
                      "--model.rope-scaling.kind", "linear"])  # fmt: skip
    expected = presets.get("laptop").replace(
        ppo__kl_coef=0.1, seed=7, out="there", sft__pack=True, sft__lora__target_modules=("wq", "wv"),
        model__rope_scaling__kind="linear",
    )  # fmt: skip
    assert settings == expected and settings.out_dir == Path("there")
    assert parse(["sft", "--preset=laptop"]) == presets.get("laptop")
    changed = parse(["sft", "--resume", "--init", "a", "--data", "b"])
    assert changed != parse(["sft"]) == changed.replace(resume=False, init=None, data=None)


def test_every_difference_can_be_said_on_the_command_line(pipeline):
    assert parse(["sft", "--preset", "tiny", *options(pipeline)]) == pipeline


def test_the_environment_names_preset_folder_and_seed(monkeypatch):
    monkeypatch.setenv("INSTRUCT_LLAMA_PRESET", "laptop")
    monkeypatch.setenv("INSTRUCT_LLAMA_OUT", "elsewhere")
    monkeypatch.setenv("INSTRUCT_LLAMA_SEED", "5")
    settings = parse(["sft"])
    assert (settings.preset, settings.out, settings.seed) == ("laptop", "elsewhere", 5)
    settings = parse(["sft", "--preset", "tiny", "--out", "here", "--seed", "6"])  # options come first
    assert (settings.preset, settings.out, settings.seed) == ("tiny", "here", 6)
    for name in ("PRESET", "OUT", "SEED"):
        monkeypatch.delenv(f"INSTRUCT_LLAMA_{name}")
    assert presets.get().preset == "laptop" and presets.get("tiny").out_dir.parts[-2:] == ("checkpoints", "tiny")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (command, _) in COMMANDS.items():  # a line each, also on a narrow terminal
        assert sum(f" {name} " in line and command.__doc__ in line for line in text.splitlines()) == 1, name
    assert "--preset" in text and all(name in text for name in presets.PRESETS)
    assert main([]) == 2 and capsys.readouterr().out == text


def test_commands_are_listed_where_the_output_is_ascii(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["--help"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_describes_it_and_its_options(name, capsys):
    assert main([name, "--preset", "tiny", "--help"]) == 0
    said = capsys.readouterr().out
    command, kind = COMMANDS[name]
    assert command.__doc__ in said and "--ppo.kl-coef" in said and "(default: tiny)" in said
    own = [field for field in dataclasses.fields(kind) if field.name not in vars(presets.get())]
    for field in own:
        option = f"--{field.name.replace('_', '-')}"
        assert (field.name.upper() if "Positional" in str(field.type) else option) in said


def test_positional_arguments_stand_anywhere_among_the_options():
    merge = parse(["merge", "--seed", "3", "a", "--into", "original", "b", "--preset=tiny", "--overwrite"])
    assert (merge.checkpoint, merge.target, merge.into) == (Path("a"), Path("b"), "original")
    assert (merge.preset, merge.seed, merge.overwrite) == ("tiny", 3, True)
    export = parse(["export", "a", "--to", "peft", "b"])
    assert (export.checkpoint, export.target, export.to) == (Path("a"), Path("b"), "peft")
    assert parse(["merge", "a"]).target is None and parse(["chat"]).checkpoint is None
    assert parse(["chat", "--top-k", "5", "a"]).checkpoint == Path("a")
    assert parse(["data", "--limit", "5", "dolly"]).name == "dolly"
    assert parse(["import", "--out", "there", "who/theirs-1b"]).source == "who/theirs-1b"


def test_the_console_script_is_the_same_command(monkeypatch, capsys):
    """As pip's script calls it: without arguments, so that it takes the process's own."""
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    script = importlib.metadata.EntryPoint("instruct-llama", scripts["instruct-llama"], "console_scripts").load()
    for words, status, said in ((["--help"], 0, "instruct-llama COMMAND"), ([], 2, "instruct-llama COMMAND")):
        monkeypatch.setattr("sys.argv", ["instruct-llama", *words])
        assert script() == status and said in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["instruct-llama", "nothing"])
    assert script() == 2 and "There is no command 'nothing'" in capsys.readouterr().err
    assert list(scripts) == ["instruct-llama"]


# ---------------------------------------------------------------- every command runs


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_a_stage_runs_and_says_what_it_reached(runs, stage, capsys):
    out, args = runs
    (out / stage / "config.json").unlink(missing_ok=True)  # the fixture has no DPO run
    assert main([stage, *args]) == 0
    assert f"{stage} finished in" in (said := capsys.readouterr().out) and str(out / stage) in said
    assert il.training.checkpoint.is_complete(out / stage)
    assert main([stage, *args, "--resume"]) == 0  # nothing left to do: the same run


def test_the_same_seed_gives_the_same_files_and_another_seed_others(runs):
    out, args = runs
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "2"])):
        assert main(["sft", *args, "--sft.name", name, "--init", str(out / "pretrain"), *more]) == 0
    a, b, c = ((out / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_init_and_data(runs, tmp_path):
    out, args = runs
    rows = [{"prompt": f"What is item {i}?", "response": f"It is number {i}."} for i in range(60)]
    for row in rows[::2]:  # far too long for the context: no example to learn from, and none to show
        row["prompt"] = "Read all this. " * 200 + row["prompt"]
    sources.write_jsonl(tmp_path / "mine.jsonl", rows)
    more = ["--init", str(out / "ppo"), "--data", str(tmp_path / "mine.jsonl"), "--sft.name", "mine"]
    assert main(["sft", *args, *more]) == 0
    assert il.training.checkpoint.is_complete(out / "mine")
    asked = [json.loads(line)["prompt"] for line in (out / "mine" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert asked and all("item" in str(prompt) and "Read" not in str(prompt) for prompt in asked)


def test_a_missing_prerequisite_is_trained_and_said(runs, capsys):
    out, args = runs
    shutil.rmtree(out / "pretrain")
    assert main(["sft", *args, "--sft.name", "again"]) == 0
    assert "pretrain is not in" in capsys.readouterr().out
    assert il.training.checkpoint.is_complete(out / "pretrain") and il.training.checkpoint.is_complete(out / "again")


def test_ppo_in_the_shared_layout(runs, capsys):
    out, args = runs
    assert main(["ppo", *args, "--ppo.layout", "shared_base", "--ppo.name", "shared", "--ppo.iterations", "1"]) == 0
    assert "reward-lora is not in" in capsys.readouterr().out
    assert (out / "shared" / "adapter.safetensors").is_file()
    il.load(out / "shared")


def test_data_tinychat_and_a_file(runs, tmp_path, capsys):
    _, args = runs
    assert main(["data", "tinychat", *args, "--out", str(tmp_path / "made")]) == 0
    kinds = {stem: sources.read(tmp_path / "made" / f"{stem}.jsonl").kind
             for stem in ("corpus", "demonstrations", "comparisons", "prompts")}  # fmt: skip
    assert list(kinds.values()) == ["text", "dialogs", "comparisons", "prompts"]
    text = tmp_path / "story.txt"
    text.write_text("Tom has a ball.\n\nThe ball looks red.\n", encoding="utf-8")
    assert main(["data", str(text), "--out", str(tmp_path / "mine")]) == 0
    assert "2 paragraphs of text, none dropped" in capsys.readouterr().out
    assert len(sources.read(tmp_path / "mine" / "story-text.jsonl")) == 2


def test_merge_writes_a_plain_checkpoint(runs, capsys):
    out, args = runs
    assert main(["merge", str(out / "sft-qlora"), *args]) == 0
    said = capsys.readouterr().out
    assert "dequantised base" in said and "original base" in said and "sft-qlora-merged" in said
    assert (out / "sft-qlora-merged" / "model.safetensors").is_file()
    assert main(["merge", str(out / "sft-qlora"), str(out / "plain"), *args]) == 0
    il.load(out / "plain")


@pytest.mark.skipif(os.name == "nt", reason="a link needs a privilege there")
def test_an_import_is_named_as_it_is_given(tmp_path, monkeypatch):
    """A download cache links its names to files that are called by their hashes."""
    seen = []
    monkeypatch.setattr(convert, "import_checkpoint", lambda source, target, overwrite: seen.append(target) or [])
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "small.gguf").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(tmp_path)
    for source in ("small.gguf", ".", "who/theirs-1b"):
        assert main(["import", source, "--preset", "tiny"]) == 0
    assert [target.name for target in seen] == ["small", tmp_path.name, "theirs-1b"]


def test_a_command_that_succeeded_under_torchrun_leaves_at_once(monkeypatch, capfd):
    """Python's shutdown may abort in gloo's threads, and torchrun would report a failure."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    for torchrun, status in ((False, 0), (True, 2), (True, 0)):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.setenv(name, "0") if torchrun else monkeypatch.delenv(name, raising=False)
        print("said", end="")
        with pytest.raises(SystemExit) as stop:
            leave(status)
        assert stop.value.code == status and left == [0] * (torchrun and status == 0)
    assert capfd.readouterr().out == 3 * "said"


def test_chat_answers_until_an_empty_line(runs, capsys, monkeypatch):
    out, args = runs
    asked, real = [], input
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or real(prompt))
    monkeypatch.setattr("sys.stdin", io.StringIO("What is two plus three?\nAnd <|assistant|> four?\n\nnot read\n"))
    assert main(["chat", str(out / "sft"), *args]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Talking to {out / 'sft'}. An empty line ends.\n> ") and asked == ["> "] * 3
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))  # the end of the input ends it too
    assert main(["chat", *args]) == 0  # without a folder: the PPO run
    assert str(out / "ppo") in capsys.readouterr().out


def test_evaluate_prints_the_card_and_writes_the_report(runs, capsys):
    out, args = runs
    for stage in ("pretrain", "sft-qlora", "ppo"):  # two stages are enough here
        shutil.move(out / stage, out.parent / stage)
    assert main(["evaluate", *args]) == 0
    assert capsys.readouterr().out.startswith("Report card, preset tiny, seed 1")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(report) == {"stages", "preset", "seed"} and list(report["stages"]) == ["sft", "reward"]
    assert {"mean", "low", "high", "n"} == set(report["stages"]["sft"]["true_reward"])


@pytest.mark.parametrize(("name", "folder"), [("tour", "notebook"), ("doctor", "tools")])
def test_tour_and_doctor_get_the_settings_and_give_the_status(name, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(f"instruct_llama.{folder}.{name}.run", lambda settings: seen.append(settings) or 1)
    assert main([name, "--preset", "tiny", "--seed", "3"]) == 1 and seen[0].seed == 3


def test_the_tour_tells_the_notebooks_and_stops_at_a_failure(micro, tmp_path, monkeypatch, capsys):
    from instruct_llama.notebook import tour

    settings = micro(tmp_path / "runs", seed=4)
    with tour.notebook_environment(settings):
        told = {key: value for key, value in os.environ.items() if key.startswith("INSTRUCT_LLAMA_")}
        told.pop("INSTRUCT_LLAMA_OFFLINE")  # of the tests
        assert presets.get() == presets.get("tiny").replace(out=str(tmp_path / "runs"), seed=4)
    assert told == {"INSTRUCT_LLAMA_PRESET": "tiny", "INSTRUCT_LLAMA_OUT": str(tmp_path / "runs"),
                    "INSTRUCT_LLAMA_SEED": "4", "INSTRUCT_LLAMA_STATIC": "1", "INSTRUCT_LLAMA_REAL": ""}  # fmt: skip
    assert "INSTRUCT_LLAMA_SEED" not in os.environ
    error = tour.nbclient.exceptions.CellExecutionError("Traceback: boom", "ValueError", "boom")

    def fail(path, bar):
        raise error

    monkeypatch.setattr(tour, "execute", fail)
    monkeypatch.setattr(tour, "notebooks", lambda: [Path("00_start_here.ipynb")])
    assert tour.run(settings) == 1
    assert "00_start_here.ipynb failed" in capsys.readouterr().out


# ---------------------------------------------------------------- the contract's Python names


def test_the_contracts_names(pipeline):
    assert il.presets.get("tiny").preset == "tiny"
    model, tokenizer = il.load(str(Path(pipeline.out) / "sft-qlora"))
    logits = model(torch.tensor([[1, 5, 9], [2, 6, 7]]))
    assert logits.shape == (2, 3, tokenizer.vocab_size) and logits.dtype == torch.float32
    texts = il.generate(model, tokenizer, ["What is two plus three?"], max_new_tokens=4, temperature=0.0)
    assert len(texts) == 1 and isinstance(texts[0], str)
    reward = il.worlds.tinychat.true_reward("What is two plus three?", "Two plus three is five.")
    assert 0 <= reward.total <= 1 and {"correct", "complete", "polite", "concise"} <= set(vars(reward))
    for name in ("ranking_loss", "gae", "policy_loss", "value_loss"):
        assert callable(getattr(il.rlhf.losses, name))
    assert list(inspect.signature(il.rlhf.losses.ranking_loss).parameters)[0] == "scores"
    assert il.require("sft", pipeline) == Path(pipeline.out) / "sft"


# ---------------------------------------------------------------- other people's weights, data by stage


def test_weights_stand_in_for_pretraining(runs, tmp_path, capsys):
    """--weights FOLDER: what pretraining would have written is imported, and every stage starts from it."""
    out, args = runs
    convert.export("hf", out / "pretrain", tmp_path / "theirs")
    shutil.rmtree(out / "pretrain")
    assert main(["sft", *args, "--weights", str(tmp_path / "theirs"), "--sft.name", "again"]) == 0
    said = capsys.readouterr().out
    assert f"importing {tmp_path / 'theirs'}" in said and "parameters (f32)" in said
    info = il.training.checkpoint.read_info(out / "pretrain")
    assert info["stage"] == "import" and info["imported_from"] == "theirs"
    assert il.training.checkpoint.read_info(out / "again")["imported_from"] == "theirs"  # handed on
    other = ["--model.n-layers", "3"]  # a preset's shape says nothing about imported weights
    assert main(["sft", *args, *other, "--weights", "x", "--sft.name", "third", "--sft.loop.steps", "1"]) == 0
    assert "asked for" not in capsys.readouterr().out


def test_each_stage_has_data_of_its_own_and_data_goes_first(runs, tmp_path):
    out, args = runs
    dialogs = [{"prompt": f"What is item {i}?", "response": f"It is number {i}."} for i in range(80)]
    pairs = [{"prompt": f"What is thing {i}?", "completions": [f"It is number {i}.", "No."]} for i in range(80)]
    for name, rows in (("dialogs", dialogs), ("pairs", pairs)):
        sources.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    usual = ["--sft.data", str(tmp_path / "dialogs.jsonl"), "--reward.data", str(tmp_path / "pairs.jsonl"),
             "--ppo.data", str(tmp_path / "pairs.jsonl")]  # fmt: skip
    for stage, word in (("sft", "item"), ("reward", "thing"), ("ppo", "thing")):
        (out / stage / "config.json").unlink(missing_ok=True)
        assert main([stage, *args, *usual]) == 0
        shown = (out / stage / "samples.jsonl").read_text("utf-8")
        assert word in shown and ("thing" if word == "item" else "item") not in shown
    given = ["--data", str(tmp_path / "pairs.jsonl"), "--sft.name", "given"]
    assert main(["sft", *args, *usual, *given]) == 0
    assert "thing" in (out / "given" / "samples.jsonl").read_text("utf-8")


def test_ppos_prompts_leave_room_for_their_answers(runs, capsys):
    out, args = runs
    short = [*args, "--ppo.name", "short", "--ppo.iterations", "1"]
    assert main(["ppo", *short, "--ppo.seq-len", "40"]) == 0
    rollouts = [json.loads(line) for line in (out / "short" / "samples.jsonl").read_text("utf-8").splitlines()]
    _, tokenizer = il.load(out / "short")
    assert all(len(tokenizer.encode(e["prompt"])) + len(e["pieces"]) <= 40 for e in rollouts)
    assert main(["ppo", *short, "--ppo.seq-len", "10", "--overwrite"]) == 2
    assert "No prompt leaves room for ppo.max_new_tokens 8 in a context of 10" in capsys.readouterr().err


def test_chat_answers_a_file_of_prompts(runs, tmp_path, capsys):
    out, args = runs
    (tmp_path / "asked.txt").write_text("What is two plus three?\n\nName a colour.\n", encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
                        {"role": "user", "content": "Who are you?"}]}]  # fmt: skip
    sources.write_jsonl(tmp_path / "asked.jsonl", rows)
    for name, count in (("asked.txt", 2), ("asked.jsonl", 1)):
        words = ["chat", "--prompts", str(tmp_path / name), "--max-new-tokens", "6", "--batch-size", "1"]
        assert main([*words, str(out / "sft"), *args]) == 0
        made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(made) == count and all(set(row) == {"prompt", "response"} for row in made)
    assert made[0]["prompt"] == rows[0]["prompt"]
    assert main(["chat", "--prompts", str(tmp_path / "none.txt"), str(out / "sft"), *args]) == 2


def test_chat_tells_the_model_the_system_message_and_how_to_sample(runs, tmp_path, monkeypatch, capsys):
    out, args = runs
    seen = []

    def stream(model, prompt, sampling, special, generator, eos_ids):
        seen.append((prompt, {"sampling": sampling, "special": special, "generator": generator, "eos_ids": eos_ids}))
        return iter(())

    monkeypatch.setattr("instruct_llama.tools.chat.stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain\n\n"))
    options = ["--system", "Be kind.", "--temperature", "0.3", "--top-k", "5", "--top-p", "0.9"]
    assert main(["chat", str(out / "sft"), *options, "--max-new-tokens", "7", *args]) == 0
    _, tokenizer = il.load(out / "sft")
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}
    answer = {"role": "assistant", "content": "…"}  # it said nothing
    assert seen[0][0] == tokenizer.encode_prompt([system, user])
    assert seen[1][0] == tokenizer.encode_prompt([system, user, answer, {"role": "user", "content": "Again"}])
    assert seen[0][1]["sampling"] == SamplingConfig(max_new_tokens=7, temperature=0.3, top_k=5, top_p=0.9)
    assert tokenizer.eos_id in seen[0][1]["eos_ids"] and tokenizer.pad_id in seen[0][1]["special"].suppress_tokens
    generators = [options["generator"] for _, options in seen]
    assert generators[0].initial_seed() == derive(1, "conversation")  # --seed of `args`
    assert generators[1] is generators[0]  # a turn goes on with the numbers where the last one stopped


def test_chat_forgets_the_oldest_exchange_when_the_context_is_full(runs, monkeypatch):
    from instruct_llama.tools.chat import ChatSession

    out, _ = runs
    model, tokenizer = il.load(out / "sft")
    talker = ChatSession(model, tokenizer, "Be kind.", SamplingConfig(8, 0.0), 0)
    messages = []
    for i in range(12):
        messages += [{"role": "user", "content": f"Question {i} " * 4}, {"role": "assistant", "content": "Yes."}]
    ids = talker.encode(messages[:-1])
    assert len(ids) + 8 <= model.config.max_seq_len
    text = tokenizer.decode(ids)
    assert "Be kind." in text and "Question 11" in text and "Question 0 " not in text


def test_chat_remembers_what_it_answered(runs, monkeypatch, capsys):
    from instruct_llama.tools.chat import ChatSession, converse

    out, _ = runs
    model, tokenizer = il.load(out / "sft")
    seen, said = [], tokenizer.encode("The dog is red.")
    monkeypatch.setattr("instruct_llama.tools.chat.stream", lambda _, ids, *__: seen.append(ids) or iter(said))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd the cat?\n\n"))
    converse(ChatSession(model, tokenizer, "", SamplingConfig(8), 0))
    turns = [("user", "Hello"), ("assistant", "The dog is red."), ("user", "And the cat?")]
    assert seen[1] == tokenizer.encode_prompt([{"role": role, "content": content} for role, content in turns])
    assert capsys.readouterr().out.count("The dog is red.\n") == 2


def test_a_turn_that_is_too_long_is_forgotten_and_the_conversation_goes_on(runs, monkeypatch, capsys):
    from instruct_llama.tools.chat import ChatSession, converse

    out, _ = runs
    model, tokenizer = il.load(out / "sft")
    seen = []
    monkeypatch.setattr("instruct_llama.tools.chat.stream", lambda _, prompt, *__: seen.append(prompt) or iter(()))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'word ' * 400}\nHello\n\n"))
    converse(ChatSession(model, tokenizer, "", SamplingConfig(8), 0))
    assert seen == [tokenizer.encode_prompt("Hello")]
    assert f"longer than the model's context of {model.config.max_seq_len} tokens" in capsys.readouterr().out


def test_prompts_of_a_file_are_asked_whole_and_each_batch_draws_anew(runs, tmp_path, monkeypatch, capsys):
    """All turns of a dialog, its own system message before --system; the longest prompt decides a batch's room."""
    from instruct_llama.tools import chat

    out, _ = runs
    model, tokenizer = il.load(out / "sft")
    user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
    own = {"role": "system", "content": "Be brief."}
    long = {"role": "user", "content": "word " * 30}
    dialogs = [[user, answer, long], [own, user], [user]]
    sources.write_jsonl(tmp_path / "asked.jsonl", [{"prompt": dialog} for dialog in dialogs])
    seen, real = [], chat.sample

    def sample(model, ids, sampling, special, generator, eos_ids):
        seen.append((ids, generator))
        return real(model, ids, sampling, special, generator, eos_ids)

    monkeypatch.setattr(chat, "sample", sample)
    limit = model.config.max_seq_len
    talker = chat.ChatSession(model, tokenizer, "Be kind.", SamplingConfig(limit), 3)
    chat.answer_file(talker, tmp_path / "asked.jsonl", 2)
    kind = {"role": "system", "content": "Be kind."}
    wanted = [tokenizer.encode_prompt(d if d[0] == own else [kind, *d]) for d in dialogs]
    assert [ids for part, _ in seen for ids in part] == wanted and len(wanted[0]) > len(wanted[1])
    assert [len(part) for part, _ in seen] == [2, 1] and seen[0][1] is seen[1][1]
    assert seen[0][1].initial_seed() == derive(3, "conversation")
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == dialogs


def test_a_character_of_several_bytes_is_shown_whole():
    from instruct_llama.tools.chat import text_pieces

    class Bytes:
        """A tokenizer whose ids are bytes."""

        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    shown = list(text_pieces(Bytes(), iter("é日!".encode())))
    assert shown == ["é", "日", "!", ""] and "\ufffd" not in "".join(shown)
    cut = "é".encode()[:1]
    assert list(text_pieces(Bytes(), iter(cut))) == ["\ufffd"]  # the end came before the rest of it


def test_p25_chat_stops_at_every_token_that_ends_an_answer(runs, tmp_path):
    from instruct_llama.model.sampling import stream
    from instruct_llama.tools.chat import ChatSession

    out, _ = runs
    model, tokenizer = il.load(out / "sft")
    other = tokenizer.encode("the")[0]
    tokenizer.end_ids = (tokenizer.eos_id, other)  # as <|im_end|> and <|endoftext|>
    talker = ChatSession(model, tokenizer, "", SamplingConfig(8, 0.0), 0)
    with torch.no_grad():  # a model that says nothing but `other`
        model.norm.weight.zero_()
        model.tok_embeddings.weight.zero_()
    ids = talker.encode([{"role": "user", "content": "Hello"}])
    tokens = EnumerableTokens(0, tokenizer.eos_id, tuple(i for i in range(tokenizer.vocab_size) if i != other))
    assert list(stream(model, ids, talker.sampling, tokens, eos_ids=tokenizer.end_ids)) == []
    chatml = json_tokenizer(tmp_path, "chatml")  # whose other end is a special token, and so suppressed elsewhere
    assert len(chatml.end_ids) == 2 and set(chatml.end_ids) & set(chatml.suppress_tokens)
    assert set(chatml.special_ids) == {*chatml.suppress_tokens, *chatml.end_ids}
    for end in tokenizer.end_ids:  # an end token can be sampled, whatever is suppressed
        tokens = EnumerableTokens(0, tokenizer.eos_id, tuple(range(tokenizer.vocab_size)))
        assert list(stream(model, ids, talker.sampling, tokens, eos_ids=(end,))) == []
