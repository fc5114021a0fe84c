"""Export of our checkpoints as a Hugging Face folder, a PEFT adapter with its base, or a GGUF file.

Weights are exported exactly, so other libraries compute the same logits; only GGUF rounds them to the chosen type.
Adapters are merged first, except for PEFT.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import QuantConfig, check, shown
from ..data.tokenizer import JsonTokenizer, Tokenizer
from ..model import lora
from ..model.llama import Llama
from ..training import checkpoint, folders
from . import gguf_files, huggingface, merge, vocabulary
from .names import foreign, foreign_key

Target = Literal["hf", "peft", "gguf"]
Into = Literal["dequantised", "original"]


def export(
    to: Target, source: Path, target: Path, into: Into = "dequantised", overwrite: bool = False,
    quant: gguf_files.Quant = "auto",
) -> list[str]:  # fmt: skip
    """Write a checkpoint in another project's format; returns lines that say what was written and how to load it.

    `into` is the base that an adapter is merged into (P16), `quant` the weight type of a GGUF file. Raises `UserError`
    for a reward model, when the format does not fit the checkpoint or `quant` the format, and when `target` exists,
    unless it is a checkpoint to `overwrite`.
    """
    check(to == "gguf" or quant == "auto", "--quant is for GGUF files: leave it out, or export with --to gguf.")
    info = checkpoint.read_info(source)
    check(info["kind"] == "lm", f"{source} is a reward model, which cannot be exported: give a language model.")
    if to == "gguf":
        _check_file(target, overwrite)
    else:
        folders.check_target(target, overwrite, checkpoint.read_folders(source))
    if to == "peft":
        return export_peft(source, info, target)
    lines: list[str] = []
    if "adapter" in info:
        model, tokenizer, lines = merge.merged(source, into)
    else:
        model, tokenizer = checkpoint.load(source, dtype=checkpoint.stored_dtype(source))
    if to == "gguf":
        kind = gguf_files.write(model, tokenizer, target, quant)
        return [*lines, f"saved in {shown(target)} ({kind}): run it with llama.cpp, `llama-cli -m {shown(target)}`"]
    with folders.replacing(target) as new:
        write_folder(model, tokenizer, new)
    loads = f'`AutoModelForCausalLM.from_pretrained("{shown(target)}")`'
    return [*lines, f"saved in {shown(target)}: load it with {loads}, or serve it with `vllm serve {shown(target)}`"]


def _check_file(target: Path, overwrite: bool) -> None:
    check(not target.is_dir(), f"{target} is a folder, and GGUF is one file: give a name such as {target}.gguf.")
    free = not target.exists() or (overwrite and target.suffix == ".gguf")
    cure = "--overwrite to replace it" if target.suffix == ".gguf" else "one that ends in .gguf"
    check(free, f"{target} exists already: give another target, or {cure}.")


def write_folder(model: Llama, tokenizer: Tokenizer, target: Path) -> None:
    """Write a folder in the layout of `transformers`: weights, settings, tokenizer and chat template."""
    state = checkpoint.model_state(model)
    renamed = {foreign_key(key, "hf"): value for key, value in state.items()}
    checkpoint.write_tensors(target / "model.safetensors", renamed, {"format": "pt"})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    _write_json(target / "config.json", huggingface.config_json(model.config, tokenizer, dtype))
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.end_ids), "pad_token_id": tokenizer.pad_id}
    _write_json(target / "generation_config.json", ends)
    tokenizer.save(target)  # tokenizer.model, or tokenizer.json
    if not isinstance(tokenizer, JsonTokenizer):
        checkpoint.write_text(target / JsonTokenizer.file_name, vocabulary.to_json(tokenizer))
    names = {i: name for name, i in tokenizer.specials.items()}
    config = {
        **getattr(tokenizer, "config", {}),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": tokenizer.chat_template,
        "chat_format": tokenizer.chat.name,
        "model_max_length": model.config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        **{f"{n}_token": names[getattr(tokenizer, f"{n}_id")] for n in ("bos", "eos", "pad", "unk")},
    }
    _write_json(target / JsonTokenizer.config_name, config)


def export_peft(source: Path, info: dict[str, Any], target: Path) -> list[str]:
    """Write a PEFT adapter folder, with the base model that it was trained over in its subfolder `base`.

    For QLoRA the base holds the dequantised weights: over the original ones the adapter gives another model (P16).
    """
    check("adapter" in info, f"{source} has no adapter: export it with --to hf.")
    config, state = checkpoint.read_adapter(source, info)
    layers = {path.rpartition(".")[0] for path in state if path not in info["modules_to_save"]}
    renamed = {}
    for path in sorted(layers):
        for side in "AB":
            name = f"base_model.model.{foreign(path, 'hf')}.lora_{side}.weight"
            renamed[name] = state[f"{path}.{side}"]
    base = target / "base"
    dtype = checkpoint.stored_dtype(source / info["base"])
    original, tokenizer = checkpoint.load(source / info["base"], dtype=dtype)
    beside = {key: state[key] for key in info["modules_to_save"]}
    if original.config.tie_embeddings and "tok_embeddings.weight" in beside:  # PEFT unties what it trains
        beside["output.weight"] = beside["tok_embeddings.weight"].clone()
    renamed |= {f"base_model.model.{foreign_key(key, 'hf')}": tensor for key, tensor in beside.items()}
    quant = QuantConfig(**info["quant"])
    for _, layer in lora.projections(original) if quant.kind != "none" else ():
        layer.weight = torch.nn.Parameter(lora.QuantLinear(layer, quant).dequantize().to(dtype))
    with folders.replacing(target) as new:
        write_folder(original, tokenizer, new / "base")
        checkpoint.write_tensors(new / "adapter_model.safetensors", renamed, {"format": "pt"})
        _write_json(new / "adapter_config.json", _peft_config(config, list(beside), base))
    return [
        f"saved in {shown(target)}, over the base in {shown(base)}: "
        f'`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{shown(base)}"), "{shown(target)}")`'
    ]


def _peft_config(config: Any, beside: list[str], base: Path) -> dict[str, Any]:
    saved = [foreign(key.rpartition(".")[0], "hf").rpartition(".")[2] for key in beside]
    targets = [foreign(f"layers.0.{path}", "hf").rpartition(".")[2] for path in _paths(config.target_modules)]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": sorted(targets),
        "modules_to_save": saved or None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip


def _paths(targets: tuple[str, ...]) -> list[str]:
    """Module paths of the projections within a layer: "wq" -> "attention.wq"."""
    return [f"{'feed_forward' if name.startswith('w_') else 'attention'}.{name}" for name in targets]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    checkpoint.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
