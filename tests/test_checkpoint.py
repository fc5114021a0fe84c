"""Run folders: what goes in comes out, the tree can be moved, nothing runs on reading, and a stage is trained once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch

from instruct_llama.config import LoRAConfig, ModelConfig, QuantConfig, RopeScaling, UserError
from instruct_llama.convert import merge
from instruct_llama.data import files
from instruct_llama.data.tokenizer import Tokenizer
from instruct_llama.model import lora
from instruct_llama.model.llama import Llama, ScalarLlama
from instruct_llama.pipeline import require
from instruct_llama.training import checkpoint


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Tom has a red ball. What is two plus three?"] * 50, 300)


def config(tokenizer: Tokenizer, **changes) -> ModelConfig:
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "max_seq_len": 64, **changes}
    return ModelConfig(vocab_size=tokenizer.vocab_size, **shape)


def randomise(model: torch.nn.Module) -> None:
    """No tensor may be zero by its start: a head or an adapter that is lost on the way would not show."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora" in name or "value_head" in name or parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(i)))


def probe(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(model.config.vocab_size, (2, 12), generator=generator(7))
    with torch.no_grad():
        return model.eval()(tokens)


def save(kind: str, root: Path, tokenizer: Tokenizer) -> tuple[Path, torch.Tensor]:
    """A run folder of a kind under `root` (its base beside it), and the logits or scores of the saved model."""
    scalar = kind.startswith("scalar")
    shape = config(tokenizer, tie_embeddings=kind != "untied")
    model = (ScalarLlama if kind == "scalar" else Llama)(shape, generator=generator())
    randomise(model)
    if kind in ("full", "untied", "scalar"):
        checkpoint.save_full(root / kind, model, tokenizer, {"stage": "sft"})
        return root / kind, probe(model)
    checkpoint.save_full(root / "deep" / "base", model, tokenizer, {"stage": "pretrain"})
    quant = QuantConfig(kind="nf4" if "qlora" in kind else "none")
    adapters = LoRAConfig(rank=4, target_modules=("wq", "wv", "w_up"))
    if scalar:
        model = checkpoint.scalar_from(model)
    lora.quantize(model, quant)
    lora.add_adapter(model, "mine", adapters, generator(1))
    lora.use_adapter(model, "mine")
    if scalar:
        model.value_head.weight.requires_grad_(True)
    if "embeddings" in kind:
        model.tok_embeddings.requires_grad_(True)
    randomise(model)
    info = {"stage": "sft", "lora": vars(adapters), "quant": vars(quant)}
    checkpoint.save_adapter(root / "runs" / kind, model, "mine", root / "deep" / "base", tokenizer, info)
    return root / "runs" / kind, probe(model)


KINDS = ["full", "untied", "lora", "lora-embeddings", "qlora", "scalar", "scalar-lora", "scalar-qlora"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_and_the_tree_can_be_moved(tmp_path, tokenizer, kind, monkeypatch):
    folder, expected = save(kind, tmp_path / "here", tokenizer)
    shutil.move(tmp_path / "here", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "elsewhere" / folder.relative_to(tmp_path / "here"),
                 Path("elsewhere") / folder.relative_to(tmp_path / "here")):  # fmt: skip
        model, loaded = checkpoint.load(path)
        assert torch.equal(probe(model), expected) and not model.training
        assert isinstance(model, ScalarLlama) == kind.startswith("scalar")
        assert loaded.encode("Tom has a ball.") == tokenizer.encode("Tom has a ball.")
    assert str(tmp_path) not in (path / "config.json").read_text(encoding="utf-8")
    weights = "adapter" if "lora" in kind else "model"
    assert {f.name for f in path.iterdir()} == {f"{weights}.safetensors", "config.json", "tokenizer.model"}


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path, tokenizer):
    folder, _ = save("full", tmp_path, tokenizer)
    assert "output.weight" not in checkpoint.read_tensors(folder / "model.safetensors")[0]
    model, _ = checkpoint.load(folder)
    assert model.output.weight is model.tok_embeddings.weight


def test_the_rope_scaling_comes_back_as_it_was(tmp_path, tokenizer):
    shape = config(tokenizer, rope_scaling=RopeScaling(kind="llama3", factor=4.0), rope_theta=5e5)
    model = Llama(shape, generator=generator())
    checkpoint.save_full(tmp_path / "run", model, tokenizer, {})
    assert checkpoint.load(tmp_path / "run")[0].config == shape


def test_stages_of_the_pipeline_load(pipeline):
    for stage, kind in (("pretrain", Llama), ("sft-qlora", Llama), ("reward", ScalarLlama), ("ppo", Llama)):
        folder = Path(pipeline.out) / stage
        model, _ = checkpoint.load(folder)
        assert type(model) is kind
        names = {path.name for path in folder.iterdir()}
        weights = "adapter.safetensors" if stage == "sft-qlora" else "model.safetensors"
        assert {weights, "config.json", "tokenizer.model", "metrics.jsonl", "samples.jsonl", "state"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
    norm = checkpoint.read_info(Path(pipeline.out) / "reward")["reward"]
    assert norm["scale"] > 0 and isinstance(norm["mean"], float)


def test_the_pipelines_tree_can_be_moved(pipeline, tmp_path):
    moved = shutil.copytree(pipeline.out, tmp_path / "moved")
    before, after = (checkpoint.load(root / "sft-qlora")[0] for root in (Path(pipeline.out), moved))
    assert torch.equal(probe(before), probe(after))
    for stage in ("pretrain", "sft", "sft-qlora", "reward"):
        assert str(Path(pipeline.out)) not in (moved / stage / "config.json").read_text(encoding="utf-8"), stage


# ---------------------------------------------------------------- nothing runs on reading


def test_p05_no_file_of_a_run_is_a_pickle(pipeline):
    for path in Path(pipeline.out).rglob("*"):
        if path.is_file() and not path.name.startswith("events.out"):
            assert path.suffix in (".json", ".jsonl", ".safetensors", ".model", ".npy", ".txt", ".lock"), path
            if path.suffix == ".safetensors":
                checkpoint.read_tensors(path)
            else:
                assert not path.read_bytes().startswith((b"\x80", b"PK")), f"{path} is a pickle or a torch archive"


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
@pytest.mark.parametrize("dump", [lambda bomb, path: path.write_bytes(pickle.dumps(bomb)), torch.save])
def test_p05_a_planted_pickle_is_refused_by_name_and_runs_nothing(tmp_path, tokenizer, name, dump):
    folder, _ = save("full", tmp_path, tokenizer)
    dump(Bomb(tmp_path / "exploded"), folder / name)
    with pytest.raises(UserError, match=name):
        checkpoint.load(folder)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- damaged or foreign folders


def rewrite(path: Path, change) -> None:
    tensors, metadata = checkpoint.read_tensors(path)
    change(tensors)
    checkpoint.write_tensors(path, tensors, metadata)


def reshape_and_rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.scale"] = tensors.pop("norm.weight")
    tensors["layers.0.attention.wq.weight"] = torch.zeros(3, 5)


def test_p18_every_missing_unexpected_and_misshapen_key_is_named(tmp_path, tokenizer):
    folder, _ = save("full", tmp_path, tokenizer)
    rewrite(folder / "model.safetensors", reshape_and_rename)
    with pytest.raises(UserError) as error:
        checkpoint.load(folder)
    for part in ("model.safetensors", "norm.weight is missing", "norm.scale is unexpected",
                 "layers.0.attention.wq.weight is (3, 5) and should be (64, 64)"):  # fmt: skip
        assert part in str(error.value)


def test_p18_a_refused_state_changes_no_weight(tokenizer):
    model = Llama(config(tokenizer), generator=generator())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in checkpoint.model_state(model).items()}
    reshape_and_rename(state)
    with pytest.raises(UserError):
        checkpoint.load_state(model, state, "a test")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "kind, lose",
    [("lora", "any"), ("scalar-lora", "value_head.weight"), ("lora-embeddings", "tok_embeddings.weight")],
)
def test_p18_adapters_are_checked_too(tmp_path, tokenizer, kind, lose):
    folder, _ = save(kind, tmp_path, tokenizer)
    path = folder / "adapter.safetensors"
    key = next(k for k in checkpoint.read_tensors(path)[0] if lose in ("any", k))
    rewrite(path, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match="missing"):
        checkpoint.load(folder)


def test_an_adapter_is_not_put_over_other_weights(tmp_path, tokenizer):
    folder, _ = save("lora", tmp_path, tokenizer)
    base = tmp_path / "deep" / "base"
    before = (base / "model.safetensors").read_bytes()
    rewrite(base / "model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1e-3))  # trained again
    with pytest.raises(
        UserError, match="have changed since the adapter in .*lora was trained: train the adapter again"
    ):
        checkpoint.load(folder)
    (base / "model.safetensors").write_bytes(before)
    checkpoint.load(folder)


def test_a_fingerprint_sees_every_weight(tmp_path, tokenizer):
    """Larger than 1 MiB: the first tensors alone do not tell two checkpoints apart."""
    model = Llama(config(tokenizer, dim=96, n_layers=3, ffn_dim=256), generator=generator())
    checkpoint.save_full(tmp_path / "base", model, tokenizer, {"stage": "pretrain"})
    path = tmp_path / "base" / "model.safetensors"
    assert path.stat().st_size > 2**20
    seen = [checkpoint.fingerprint(tmp_path / "base")]
    assert seen == [hashlib.sha256(path.read_bytes()).hexdigest()]
    for keys in (("layers.2.attention.wq.weight", "norm.weight"), ("norm.weight",), ("layers.0.attention.wo.weight",)):
        rewrite(path, lambda tensors, keys=keys: [tensors[key].flatten()[-1:].add_(1e-6) for key in keys])
        seen.append(checkpoint.fingerprint(tmp_path / "base"))
    assert len(set(seen)) == 4


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path, monkeypatch):
    path, reads, real = tmp_path / "weights", [], files._sha256
    monkeypatch.setattr(files, "_sha256", lambda path: reads.append(path) or real(path))
    path.write_bytes(b"one")
    seen = [files.digest(path), files.digest(path)]  # just written: the next change might bear the same time
    assert len(reads) == 2
    path.write_bytes(b"two")
    seen.append(files.digest(path))
    assert seen == [hashlib.sha256(text).hexdigest() for text in (b"one", b"one", b"two")]
    old = path.stat().st_mtime_ns - 10**10
    os.utime(path, ns=(old, old))
    assert files.digest(path) == files.digest(path) == seen[2] and len(reads) == 4  # read once more, then remembered
    path.write_bytes(b"six")
    os.utime(path, ns=(old + 1, old + 1))
    assert files.digest(path) == hashlib.sha256(b"six").hexdigest()


@pytest.mark.parametrize("kind, name", [("full", "model"), ("qlora", "adapter")])
@pytest.mark.parametrize("keep", [0.6, 0.0])
def test_a_truncated_weight_file_is_named(tmp_path, tokenizer, kind, name, keep):
    folder, _ = save(kind, tmp_path, tokenizer)
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=rf"{name}\.safetensors is truncated.*train that stage again"):
        checkpoint.load(folder)


def test_a_missing_part_is_named(tmp_path, tokenizer):
    folder, _ = save("lora", tmp_path, tokenizer)
    with pytest.raises(UserError, match="is not a run folder"):
        checkpoint.load(tmp_path / "nowhere")
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(UserError, match="adapter.safetensors"):
        checkpoint.load(folder)
    shutil.rmtree(tmp_path / "deep")
    with pytest.raises(UserError, match="base is not a run folder"):
        checkpoint.load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "lm"}', '{"kind": "lm", "model": {"dim": 8, "colour": 3}}',
                                  '{"kind": "lm", "model": 3}'])  # fmt: skip
def test_a_damaged_config_is_named(tmp_path, tokenizer, text):
    folder, _ = save("full", tmp_path, tokenizer)
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoint.load(folder)


# ---------------------------------------------------------------- require


def fake_stage(monkeypatch, out: Path, seconds: float):
    """Puts a stage in place of SFT that takes `seconds` and notes each run."""

    def run(settings) -> None:
        assert settings.resume and settings.init is None and not settings.overwrite
        with open(out / "runs.txt", "a", encoding="utf-8") as file:
            file.write("run\n")
        time.sleep(seconds)
        checkpoint.write_info(Path(settings.out) / "sft", {"kind": "lm", "model": {}, "complete": True})

    monkeypatch.setattr("instruct_llama.pipeline.run", lambda stage, settings: run(settings))


def test_require_trains_once_and_only_what_is_not_complete(monkeypatch, micro, tmp_path, capsys):
    fake_stage(monkeypatch, tmp_path, 0)
    settings = micro(tmp_path, init="ignored", resume=False, overwrite=True)  # they are of the stage that asks
    checkpoint.write_info(tmp_path / "sft", {"kind": "lm", "model": {}})  # begun, not finished
    assert require("sft", settings) == tmp_path / "sft"
    assert "sft is not in" in capsys.readouterr().out
    assert require("sft", settings) == tmp_path / "sft"
    assert (tmp_path / "runs.txt").read_text(encoding="utf-8") == "run\n" and capsys.readouterr().out == ""
    info = {"kind": "lm", "seed": 1, "model": dataclasses.asdict(settings.model), "complete": True}
    checkpoint.write_info(tmp_path / "sft", info)
    require("sft", settings)
    assert capsys.readouterr().out == ""  # the same seed and shape: nothing to say
    require("sft", settings.replace(seed=2, model__dim=64))
    said = capsys.readouterr().out
    assert "sft is reused as trained" in said and "seed 1 (asked for: 2)" in said and "--out" in said
    assert f"dim {settings.model.dim} (asked for: 64)" in said
    with pytest.raises(UserError, match="no stage 'stf': choose from pretrain, sft"):
        require("stf", settings)


@pytest.mark.parametrize("left", ["state", "config.json"])
def test_weights_do_not_take_the_place_of_an_interrupted_pretraining(monkeypatch, micro, tmp_path, left):
    """Its state and its best weights would be gone with the folder."""
    nothing = lambda *_: pytest.fail("nothing may be imported")  # noqa: E731
    monkeypatch.setattr("instruct_llama.convert.import_checkpoint", nothing)
    folder = tmp_path / "pretrain"
    if left == "state":
        checkpoint.write_tensors(folder / "state" / "resume.safetensors", {"x": torch.zeros(1)})
    else:  # its best weights so far
        checkpoint.write_info(folder, {"kind": "lm", "model": {}})
    with pytest.raises(UserError, match="interrupted pretraining: finish it with `pretrain --resume`, or remove it"):
        require("pretrain", micro(tmp_path, weights="theirs"))
    assert (folder / left).exists()


@pytest.mark.parametrize("stage, change", [
    ("sft", {"sft__lora__rank": 2}), ("sft-qlora", {"qlora__name": "mine"}), ("reward", {"reward__lora__rank": 2}),
])  # fmt: skip
def test_require_trains_into_the_folder_that_it_returns(pipeline, tmp_path, stage, change):
    """Whatever name the stage's own settings give to its run."""
    for there in ("pretrain", "sft"):
        if there != stage:
            shutil.copytree(Path(pipeline.out) / there, tmp_path / there)
    settings = pipeline.replace(out=str(tmp_path), **change)
    assert checkpoint.is_complete(require(stage, settings))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"pretrain", "sft", stage}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_require_trains_once_from_several_processes(monkeypatch, micro, tmp_path):
    fake_stage(monkeypatch, tmp_path, 0.5)
    settings = micro(tmp_path)
    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                require("sft", settings)
                status = 0 if checkpoint.is_complete(tmp_path / "sft") else 2
            finally:
                os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert (tmp_path / "runs.txt").read_text(encoding="utf-8") == "run\n"


# ---------------------------------------------------------------- merge


def read_errors(lines: list[str]) -> list[float]:
    return [float(line.split(": ")[1].split(" %")[0]) for line in lines[:2]]


def test_p15_merge_is_out_of_place_and_exact(tmp_path, tokenizer):
    folder, expected = save("lora", tmp_path, tokenizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    lines = merge.merge_run(folder, tmp_path / "merged")
    assert {path: path.read_bytes() for path in before} == before
    model, _ = checkpoint.load(tmp_path / "merged")
    assert torch.allclose(probe(model), expected, atol=2e-5)
    assert max(read_errors(lines)) < 0.001  # per cent: without 4 bits, both ways are the same
    info = checkpoint.read_info(tmp_path / "merged")
    assert "base" not in info and "adapter" not in info and (tmp_path / "merged" / info["merged_from"]).is_dir()


def test_p16_merging_into_the_dequantised_base_is_what_was_trained(tmp_path, tokenizer):
    folder, expected = save("qlora", tmp_path, tokenizer)
    lines = merge.merge_run(folder, tmp_path / "merged")
    assert ["dequantised" in lines[0], "original" in lines[1]] == [True, True]
    exact, other = read_errors(lines)
    assert exact < 0.01 and other > 1.0  # per cent
    assert torch.allclose(probe(checkpoint.load(tmp_path / "merged")[0]), expected, atol=2e-5)
    merge.merge_run(folder, tmp_path / "other", into="original")
    difference = (probe(checkpoint.load(tmp_path / "other")[0]) - expected).norm() / expected.norm()
    assert float(difference) > 0.01


def test_p16_a_shared_base_takes_no_adapter_with_embeddings_of_its_own(tmp_path, tokenizer):
    """One base has one embedding: PPO over it would silently play another model. A reward model's head is its own."""
    folder, _ = save("lora-embeddings", tmp_path / "a", tokenizer)
    with pytest.raises(UserError, match="trained embeddings besides its adapter.*merge it first"):
        checkpoint.base_of(folder)
    folder, _ = save("scalar-lora", tmp_path / "b", tokenizer)
    base, (config, state, quant) = checkpoint.base_of(folder)
    assert base.resolve() == (tmp_path / "b" / "deep" / "base").resolve() and quant == checkpoint.DENSE
    assert config.rank == 4 and "value_head.weight" in state


def test_a_model_does_not_live_in_its_file(tmp_path, tokenizer):
    """Weights are copied out of the mapped file: what is written there later changes no model that is loaded."""
    folder, before = save("full", tmp_path, tokenizer)
    model, _ = checkpoint.load(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    assert torch.equal(probe(model), before)


def test_merge_of_a_full_checkpoint_is_refused(tmp_path, tokenizer):
    folder, _ = save("full", tmp_path, tokenizer)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge.merge_run(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------- writes


def test_p33_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.write_tensors(path, {"a": torch.ones(3)})
    with pytest.raises(AttributeError):
        checkpoint.write_tensors(path, {"a": "no tensor"})
    checkpoint.write_text(tmp_path / "x.json", json.dumps([1]))
    with pytest.raises(UnicodeEncodeError):
        checkpoint.write_text(tmp_path / "x.json", "\ud800")
    assert torch.equal(checkpoint.read_tensors(path)[0]["a"], torch.ones(3))
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == "[1]"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.json", "x.safetensors"]
