"""Which records each stage trains on, validates on and is judged on: read off what reaches the networks (P06).

The split of a prompt is a function of its text, so a row of token ids says itself where it comes from. Every row is
looked at on its way into a model's blocks, with gradients or without: no function's word is taken for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from instruct_llama.data import batching
from instruct_llama.data.tokenizer import Tokenizer
from instruct_llama.evaluation import baselines, report
from instruct_llama.model.llama import Llama
from instruct_llama.pipeline import run as run_stage
from instruct_llama.rlhf import ppo as algorithm
from instruct_llama.stages import ppo, records, reward
from instruct_llama.training import checkpoint
from instruct_llama.worlds import tinychat


class Seen:
    """Rows of ids by the phase in which a network read them."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer, self.phase, self.rows = tokenizer, "other", defaultdict(set)

    def read(self, tokens: torch.Tensor, scalar: bool) -> None:
        phase = "train" if torch.is_grad_enabled() and self.phase == "other" else self.phase
        self.rows[phase, "scalar" if scalar else "lm"] |= {tuple(row) for row in tokens.tolist()}

    @contextmanager
    def during(self, phase: str):
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def phased(self, phase: str, function):
        def call(*args, **kwargs):
            with self.during(phase):
                return function(*args, **kwargs)

        return call

    def prompts(self, phase: str) -> list[list[dict[str, str]]]:
        """The prompts that were read in a phase; rows without a chat frame (a token that follows) do not count."""
        rows = {row for (when, _), rows in self.rows.items() if when == phase for row in rows}
        return [messages for row in rows if (messages := prompt_of(self.tokenizer, row))]

    def splits(self, phase: str) -> set[str]:
        return {tinychat.split_of(prompt) for prompt in self.prompts(phase)}


def prompt_of(tokenizer: Tokenizer, row) -> list[dict[str, str]] | None:
    """The messages before the last answer of a row; what stands after that is an answer, or several."""
    roles = {tokenizer.system_id: "system", tokenizer.user_id: "user", tokenizer.assistant_id: "assistant"}
    places = [i for i, token in enumerate(row) if token in roles]
    if not places or row[places[-1]] != tokenizer.assistant_id:
        return None
    turns = [(roles[row[a]], tokenizer.decode(row[a + 1 : b])) for a, b in zip(places, places[1:], strict=False)]
    return [{"role": role, "content": text} for role, text in turns]


@pytest.fixture
def seen(monkeypatch):
    """What every network reads, from now on."""
    found, hidden = Seen(None), Llama.hidden

    def spy(self, tokens, *args, **kwargs):
        found.read(tokens, type(self) is not Llama)
        return hidden(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Llama, "hidden", spy)
    return found


def watched(module, seen: Seen, monkeypatch) -> None:
    """Validation and saving of a supervised stage are phases of their own."""
    fit = module.fit

    def watching(stage, log, settings):
        phases = {name: seen.phased(name, getattr(stage, name)) for name in ("validate", "sample", "save")}
        return fit(dataclasses.replace(stage, **phases), log, settings)

    monkeypatch.setattr(module, "fit", watching)


def copied(pipeline, tmp_path: Path, *stages: str, **changes):
    """Settings of a folder with some finished stages of the pipeline."""
    for stage in stages:
        shutil.copytree(Path(pipeline.out) / stage, tmp_path / "runs" / stage)
    return pipeline.replace(out=str(tmp_path / "runs"), **changes)


def test_the_splits_of_the_embedded_world_share_no_prompt():
    told = {split: {str(p) for p in tinychat.prompts(1, 300, split=split)} for split in ("train", "valid", "heldout")}
    assert all(not told[a] & told[b] for a, b in (("train", "valid"), ("train", "heldout"), ("valid", "heldout")))
    for split in told:
        records_ = tinychat.demonstrations(1, 60, split), tinychat.comparisons(1, 60, 0.15, split)
        prompts = [r["messages"][:-1] for r in records_[0]] + [r["prompt"] for r in records_[1]]
        assert {tinychat.split_of(prompt) for prompt in prompts} == {split}


def test_p06_pretraining_validates_on_text_that_it_does_not_train_on(micro, tmp_path, seen, monkeypatch):
    module = importlib.import_module("instruct_llama.stages.pretrain")
    watched(module, seen, monkeypatch)
    settings = micro(tmp_path / "runs", pretrain__loop__steps=12)
    folder = run_stage(module.__name__.rpartition(".")[2], settings).folder
    files = {name: batching.open_tokens(folder / "state" / "tokens" / f"{name}.npy") for name in ("train", "valid")}
    for phase, mine, other in (("train", "train", "valid"), ("validate", "valid", "train")):
        rows = seen.rows[phase, "lm"]
        assert rows and all(holds(row, files[mine]) for row in rows), f"{phase} reads other text than {mine}.npy"
        assert sum(holds(row, files[other]) for row in rows) < len(rows), f"{phase} reads {other}.npy"
    train, valid = (set(texts) for texts in records.texts(settings))
    assert train and valid and not train & valid


def holds(row, text) -> bool:
    """Whether a row, without the zeros that pad it, is a piece of a text."""
    end = max((i for i, token in enumerate(row) if token), default=-1) + 1
    piece = torch.tensor(row[:end]).numpy().astype(text.dtype).tobytes()
    return piece in text.tobytes()


@pytest.mark.parametrize("name", ["sft", "sft-qlora"])
def test_p06_sft_trains_and_validates_on_demonstrations_of_their_own(pipeline, tmp_path, seen, monkeypatch, name):
    module = importlib.import_module("instruct_llama.stages.sft")
    watched(module, seen, monkeypatch)
    settings = copied(pipeline, tmp_path, "pretrain", sft__loop__steps=10, qlora__loop__steps=10)
    seen.tokenizer = Tokenizer.load(Path(pipeline.out) / "pretrain")
    run_stage(module.__name__.rpartition(".")[2], settings if name == "sft" else settings.replace(sft=settings.qlora))
    assert seen.splits("train") == {"train"} and seen.splits("validate") == {"valid"}
    assert seen.splits("sample") == {"heldout"}  # the three fixed prompts, which nothing is chosen by
    assert len(seen.prompts("train")) > 20 and seen.prompts("validate")


def test_p06_the_reward_model_trains_and_validates_on_prompts_of_their_own(pipeline, tmp_path, seen, monkeypatch):
    """Also the comparisons of SFT's own samples, and the responses that the normaliser is fitted on."""
    watched(reward, seen, monkeypatch)
    for function in ("sample_comparisons", "reference_responses"):
        monkeypatch.setattr(reward, function, seen.phased(function, getattr(reward, function)))
    made, real = [], reward.sample_comparisons
    monkeypatch.setattr(reward, "sample_comparisons", lambda *a, **k: made.extend(real(*a, **k)) or made)
    settings = copied(
        pipeline,
        tmp_path,
        "pretrain",
        "sft",
        reward__sample_share=0.5,
        reward__responses_per_prompt=3,
        reward__loop__steps=10,
    )
    seen.tokenizer = Tokenizer.load(Path(pipeline.out) / "pretrain")
    run_stage("reward", settings)
    assert seen.splits("train") == {"train"} and seen.splits("validate") == {"valid"}
    assert seen.splits("sample_comparisons") == {"train"} == seen.splits("reference_responses")
    assert seen.splits("save") == {"train"}  # the normaliser: responses of the reference policy to training prompts
    assert {tinychat.split_of(record["prompt"]) for record in made} <= {"train"}


def test_p06_ppo_plays_training_prompts_and_chooses_by_validation_prompts(pipeline, tmp_path, seen, monkeypatch):
    settings = copied(pipeline, tmp_path, "pretrain", "sft", "reward", ppo__ptx_coef=0.5, ppo__iterations=3)
    seen.tokenizer = Tokenizer.load(Path(pipeline.out) / "sft")
    monkeypatch.setattr(algorithm, "run_iteration", seen.phased("iterate", algorithm.run_iteration))
    monkeypatch.setattr(algorithm, "_demonstration_gradients", seen.phased("ptx", algorithm._demonstration_gradients))
    monkeypatch.setattr(ppo, "evaluate_policy", seen.phased("validate", ppo.evaluate_policy))
    run_stage("ppo", settings)
    assert seen.splits("iterate") == {"train"} == seen.splits("ptx") and seen.splits("validate") == {"valid"}
    for phase in ("iterate", "validate"):
        assert {kind for when, kind in seen.rows if when == phase} == {"lm", "scalar"}  # policy and reward model
    assert seen.splits("other") <= {"train"} and seen.splits("train") == set()  # nothing is read outside


def test_p06_the_report_card_asks_held_out_prompts_whatever_it_measures(pipeline, tmp_path, seen, monkeypatch):
    """Policies, best of n, KL and scores, the perplexity, the reward model's pairs and kinds, and prompts as prose."""
    settings = copied(pipeline, tmp_path, "pretrain", "sft", "sft-qlora", "reward", "ppo")
    seen.tokenizer = Tokenizer.load(settings.out_dir / "sft")
    told, as_prose = [], baselines.as_prose
    monkeypatch.setattr(baselines, "as_prose", lambda prompt: told.append(prompt) or as_prose(prompt))
    parts = ("generate_ids", "reward_accuracy", "kind_accuracy", "perplexity", "best_of", "response_logprobs",
             "raw_scores", "sample_responses")  # fmt: skip
    for part in parts:
        monkeypatch.setattr(report, part, seen.phased(part, getattr(report, part)))
    report.report_card(settings)
    assert {part: seen.splits(part) for part in parts} == {part: {"heldout"} for part in parts}
    assert seen.splits("other") == set() and {tinychat.split_of(prompt) for prompt in told} == {"heldout"}


def test_p06_what_is_drawn_differs_from_split_to_split_of_a_file(pipeline, tmp_path):
    """Real data: a prompt of a file is on one side only, for dialogs, comparisons and prompts alike."""
    from instruct_llama.data import sources

    rows = [{"prompt": f"What is item {i}?", "completions": [f"It is {i}.", "No."]} for i in range(200)]
    sources.write_jsonl(tmp_path / "mine.jsonl", rows)
    settings = pipeline.replace(data=str(tmp_path / "mine.jsonl"))
    sides = []
    for read, prompt in (
        (records.demonstrations, lambda r: r[:-1]), (records.comparisons, lambda r: r["prompt"]),
        (records.prompts, lambda r: r),
    ):  # fmt: skip
        train, valid = ({str(prompt(record)) for record in side} for side in read(settings))
        assert train and valid and not train & valid
        sides.append((train, valid))
    assert sides[0] == sides[1] == sides[2]


def test_the_spy_sees_what_it_is_asked_about(pipeline, seen):
    """The tests above can fail: a row tells its prompt, with and without gradients, and its split."""
    model, tokenizer = checkpoint.load(Path(pipeline.out) / "sft")
    seen.tokenizer = tokenizer
    by_split = {split: tinychat.prompts(1, 12, split=split)[-1] for split in ("train", "valid", "heldout")}
    for split, prompt in by_split.items():
        with seen.during(split), torch.no_grad():
            model(torch.tensor([[*tokenizer.encode_prompt(prompt), *tokenizer.encode("No."), 0, 0]]))
        assert seen.prompts(split) == [prompt] and seen.splits(split) == {split}
    model(torch.tensor([tokenizer.encode_prompt(by_split["valid"])]))
    assert seen.splits("train") == {"train", "valid"} and seen.splits("other") == set()
