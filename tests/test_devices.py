"""The whole pipeline on a pretend GPU: no tensor is left behind on the CPU, and no figure differs from the CPU's.

No machine of ours has a GPU, and `auto` takes one where there is one: without these tests, the first to run that path
would be a reader. `pretend_gpu` says what it sees and what it cannot.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pretend_gpu import Ops, pretend_gpu

from instruct_llama import Settings, UserError, presets
from instruct_llama.__main__ import main
from instruct_llama.data import sources
from instruct_llama.evaluation import report as evaluate
from instruct_llama.model import lora
from instruct_llama.model.sampling import generate
from instruct_llama.pipeline import require
from instruct_llama.pipeline import run as run_stage
from instruct_llama.stages import dpo, ppo, pretrain, reward, sft
from instruct_llama.tools import doctor
from instruct_llama.training import checkpoint, memory, optim, run_log
from instruct_llama.training.folders import STAGE_OF

pytestmark = pytest.mark.slow

NF4 = {"quant__kind": "nf4", "lora__rank": 4}


def on(stage: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a stage as `Settings.replace` wants them."""
    return {f"{stage}__{name}": value for name, value in options.items()}


@pytest.fixture
def gpu():
    """A machine with two GPUs, and the ops that they do."""
    with pretend_gpu() as ops:
        yield ops


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory) -> Settings:
    """Every stage, trained on the CPU."""
    settings = micro(tmp_path_factory.mktemp("trained") / "cpu", device="cpu")
    for stage in STAGE_OF:
        require(stage, settings)
    return settings


Run = Callable[..., tuple[list[dict[str, float]], Ops]]


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """`run(stage, device, **changes)` trains one stage anew over the trained ones: its metrics, and the ops it did.

    With `resume=True` it goes on with the run that was stopped.
    """

    def made(
        stage: ModuleType, device: str, folder: str = "", stop_at: int = 0, **changes: Any
    ) -> tuple[list[dict[str, float]], Ops | None]:
        out = tmp_path / (folder or device.replace(":", "-"))
        if not out.exists():
            shutil.copytree(trained.out, out)

        def watch(record: dict[str, float]) -> None:
            if record["step"] == stop_at:
                raise KeyboardInterrupt

        settings = trained.replace(out=str(out), device=device, overwrite=not changes.get("resume"), **changes)
        with pretend_gpu() if device != "cpu" else contextlib.nullcontext() as ops:
            try:
                history = run_stage(stage.__name__.rpartition(".")[2], settings, watch).history
            except run_log.Interrupted:
                history = []
        return [{k: v for k, v in record.items() if "per_s" not in k} for record in history], ops

    return made


# ------------------------------------------------------------------------------------------ the pretence is a good one


def mixed(do: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[], Any]:
    return lambda: do(torch.ones(3, 3, device="cuda"), torch.ones(3, 3))


REFUSED = {
    "sum": (mixed(lambda here, there: here + there), "at least two devices, cpu and cuda:0"),
    "product": (mixed(lambda here, there: here @ there), "at least two devices"),
    "in place": (mixed(lambda here, there: there.add_(here)), "at least two devices"),
    "joined": (mixed(lambda here, there: torch.cat([here, there])), "at least two devices"),
    "two gpus": (lambda: torch.ones(2, device="cuda:0") * torch.ones(2, device="cuda:1"), "cuda:0 and cuda:1"),
    "gpu scalar": (mixed(lambda here, there: there * here.sum()), "at least two devices"),
    "gpu index": (mixed(lambda here, there: there[here[0].long()]), "indices should be either on cpu"),
    "embedding": (mixed(lambda here, there: torch.embedding(here, there[0].long())), "at least two devices"),
    "no such index": (mixed(lambda here, _: here[torch.tensor([3])]), "device-side assert"),
    "view": (mixed(lambda here, there: here[0, 1:].t() + there[0, 1:]), "at least two devices"),
    "gradient": (mixed(lambda here, there: here.requires_grad_().sum().backward() or here.grad + there), "two devices"),
    "numpy": (mixed(lambda here, _: here.numpy()), "can't convert cuda:0 device type tensor to numpy"),
    "asarray": (mixed(lambda here, _: np.asarray(here)), "can't convert cuda:0 device type tensor to numpy"),
    "cpu generator": (mixed(lambda here, _: here.normal_(generator=torch.Generator())), "Expected a 'cuda' device"),
    "gpu generator": (lambda: torch.rand(2, generator=torch.Generator("cuda")), "Expected a 'cpu' device"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_pretend_gpu_refuses_what_cuda_refuses(gpu, what):
    do, sentence = REFUSED[what]
    with pytest.raises((RuntimeError, TypeError), match=sentence):
        do()


def test_the_pretend_gpu_allows_what_cuda_allows(gpu):
    here, there = torch.arange(6.0, device="cuda").view(2, 3), torch.ones(2, 3)
    assert (here * torch.tensor(2.0)).device == torch.device("cuda", 0)  # a CPU scalar
    assert here[torch.tensor([1])].tolist() == [[3, 4, 5]]  # a CPU index
    there[0] = here[1]  # a copy
    assert there.device.type == "cpu" and there[0].tolist() == here[1].cpu().numpy().tolist() == [3, 4, 5]
    assert here.sum().item() == 15 and here.to("cuda") is here and here.to("cuda:1").device.index == 1
    view = here.t()[1]
    view += 1
    assert here.tolist() == [[0, 2, 2], [3, 5, 5]] and view.is_cuda
    for made in (torch.zeros_like(here), here.new_ones(2), here.clone(), torch.rand(2, device="cuda"), here.exp()):
        assert made.is_cuda
    assert not torch.zeros_like(here, device="cpu").is_cuda


def test_a_network_moves_whole_and_learns_there(gpu):
    """Its parameters stay the objects that the optimizer knows, and a tied weight stays one, as on a real device."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before, weight = list(model.parameters()), model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.to("cuda").parameters(), lr=0.1, fused=True)
    model(torch.ones(2, 4, device="cuda")).square().sum().backward()
    optimizer.step()
    after = list(model.parameters())
    assert all(new is old and new.is_cuda and new.grad.is_cuda for old, new in zip(before, after, strict=True))
    assert model[2].weight is model[0].weight and gpu.places("_fused_adamw_") == {"cuda:0"}
    assert (model.cpu()[0].weight - weight).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------------- the stages

STAGES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "pretrain": (pretrain, {}),
    "pretrain, dropout": (pretrain, {"model__resid_dropout": 0.1, "model__attn_dropout": 0.1}),
    "sft": (sft, {}),
    "sft, bf16": (sft, on("sft", {"loop__precision": "bf16", "freeze_layers": 1})),
    "sft, packed and recomputed": (
        sft,
        {"model__gradient_checkpointing": True} | on("sft", {"pack": True, "loop__gradient_accumulation_steps": 2}),
    ),
    "sft, 8-bit Adam": (sft, {"sft__optim__kind": "adamw_8bit"}),
    "lora": (sft, on("sft", {"lora__rank": 4, "lora__dropout": 0.1})),
    "qlora": (sft, on("sft", {**NF4, "train_embeddings": True})),
    "qlora, bf16, recomputed": (
        sft, {"model__gradient_checkpointing": True} | on("sft", {**NF4, "loop__precision": "bf16"}),
    ),
    "reward": (reward, {}),
    "reward, adapter over 4 bits, bf16": (
        # at a small rate all scores stay near 0, and which of a pair is higher hangs on bf16's rounding
        reward, on("reward", {**NF4, "loop__precision": "bf16", "optim__lr": 1e-2}),
    ),
    "dpo": (dpo, {}),
    "kto, adapter over 4 bits": (dpo, on("dpo", {**NF4, "loss": "kto"})),
    "ppo, bf16": (ppo, {"ppo__precision": "bf16"}),
    "ppo, swapped": (ppo, {"ppo__offload_inactive": True}),
    "ppo, all options": (
        ppo, on("ppo", {"ptx_coef": 0.5, "top_k": 20, "top_p": 0.9, "entropy_coef": 0.01, "kl_target": 1.0,
                        "generation_batch_size": 2, "freeze_layers": 1}),
    ),
}  # fmt: skip


def close(history: list[dict[str, float]], name: str) -> list[Any]:
    """A history to compare with. Where a mask is, gradients of shared heads are added up in another order on a GPU."""
    return [pytest.approx(record, abs=1e-3 if "bf16" in name else 1e-6) for record in history]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_on_the_gpu_and_learns_the_same(run, name):
    stage, changes = STAGES[name]
    there, ops = run(stage, "auto", **changes)
    assert there == close(run(stage, "cpu", **changes)[0], name) != []
    assert ops.places("embedding") == {"cuda:0"}  # every forward pass, those of sampling and judging too
    assert ops.places("_fused_adamw_") | ops.places("optimizer_update_8bit_blockwise") <= {"cuda:0"}


def test_ppo_over_4_bits_shares_one_base_on_the_gpu(run):
    changes = {"ppo__layout": "shared_base", "ppo__precision": "bf16", "ppo__quant__kind": "nf4"}
    histories = []
    for device in ("cpu", "cuda"):
        options = {"reward__name": "reward-lora"} | on("reward", {**NF4, "loop__precision": "bf16"})
        run(reward, device, **options)
        history, ops = run(ppo, device, **changes)
        histories.append(history)
    # values have deviation 1, so that bf16's rounding of the hidden states shows in them, in the third digit
    assert histories[0] == [pytest.approx(record, rel=1e-2, abs=1e-3) for record in histories[1]] != []
    assert ops.places("dequantize_4bit") == ops.places("_fused_adamw_") == {"cuda:0"}


@pytest.mark.parametrize(
    "devices",
    [
        ("cuda:0", "cuda:0", "cpu", "cpu"),
        ("cuda:1", "cuda:0", "cuda:0", "cuda:0"),
        ("cpu", "cuda:0", "cuda:1", "cuda:1"),
    ],
    ids=" ".join,
)
def test_ppos_networks_may_live_apart(run, devices):
    """Also where the policy is not on the device of --device."""
    there, ops = run(ppo, "cuda", ppo__devices=devices)
    assert there == run(ppo, "cpu")[0] != []
    assert ops.places("embedding") == set(devices)
    assert ops.places("_fused_adamw_") == {devices[0], devices[2]}


@pytest.mark.parametrize("name", ["sft, 8-bit Adam", "qlora", "ppo, swapped"])
def test_a_stopped_stage_goes_on_on_the_gpu(run, name):
    """Also one whose weights wait in main memory when the optimizer's state is read."""
    stage, changes = STAGES[name]
    run(stage, "cuda", stop_at=1, **changes)
    assert run(stage, "cuda", resume=True, **changes)[0] == run(stage, "cpu", **changes)[0] != []


# ---------------------------------------------------------------------------------------------------------------- fp16


def scaled(monkeypatch, scale: float) -> None:
    """The first scale of fp16's losses."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


FP16 = {sft: {"sft__loop__precision": "fp16"}, ppo: {"ppo__precision": "fp16"}}


@pytest.mark.parametrize("stage", FP16)
def test_fp16_finds_its_scale(run, monkeypatch, stage):
    """A scale that overflows is halved, and the step left out: so it must be, for it doubles as long as it can."""
    scaled(monkeypatch, 2.0 ** {sft: 24, ppo: 20}[stage])
    history, _ = run(stage, "cuda", sft__loop__steps=8, ppo__num_ppo_epochs=1, ppo__iterations=4, **FP16[stage])
    norms = [record.get("train/grad_norm", record.get("ppo/grad_norm")) for record in history]
    assert norms[0] == 0 < norms[-1] and sorted(norms, key=bool) == norms


def test_fp16_does_not_hide_a_gradient_that_is_not_finite(run, monkeypatch):
    scaled(monkeypatch, 1.0)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: grads[0].new_tensor(math.nan))
    with pytest.raises(optim.NonFinite, match="gradient is not finite at step 1"):
        run(sft, "cuda", **FP16[sft])


@pytest.mark.parametrize("stage", FP16)
def test_fp16_begun_on_a_cpu_goes_on_on_the_gpu(run, stage):
    """The CPU scales no losses, so its state holds no scale; the GPU's does."""
    options = {"sft__loop__steps": 3, "ppo__iterations": 3, **FP16[stage]}
    run(stage, "cpu", "places", stop_at=1, **options)
    run(stage, "cuda", "places", stop_at=2, resume=True, **options)
    assert len(run(stage, "cuda", "places", resume=True, **options)[0]) == 3


# ------------------------------------------------------------------------------------------------------ using the runs


@pytest.mark.parametrize("stage", STAGE_OF)
def test_every_run_opens_on_the_gpu(trained, gpu, stage):
    model, tokenizer = checkpoint.load(trained.out_dir / stage, "cuda")
    layers = [layer for _, layer in lora.projections(model) for layer in layer.modules()]
    packed = [layer.qweight for layer in layers if isinstance(layer, lora.QuantLinear)]
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *packed))
    assert bool(packed) == (stage == "sft-qlora")
    tokens = torch.tensor([tokenizer.encode("Tom has a red ball.")])
    here = checkpoint.load(trained.out_dir / stage)[0]
    assert torch.equal(model(tokens.to("cuda")).cpu(), here(tokens))
    if stage not in ("reward", "reward-lora"):
        prompts = ["What is two plus three?", "Say no."]
        assert generate(model, tokenizer, prompts, 8, top_p=0.9) == generate(here, tokenizer, prompts, 8, top_p=0.9)


def test_attention_with_a_mask_has_a_head_for_each_query_on_the_gpu(trained, gpu, monkeypatch):
    """CUDA's kernels take a mask or grouped heads, not both: given both, it writes out all (B, H, T, S) scores."""
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, *, attn_mask, enable_gqa, **options):
        calls.append((attn_mask is not None, enable_gqa))
        return real(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model, _ = checkpoint.load(trained.out_dir / "sft", "cuda")
    tokens = torch.tensor([[1, 2, 3]], device="cuda")
    (
        model(tokens),
        model(tokens, segment_ids=torch.ones_like(tokens)),
        model.cpu()(tokens.cpu(), segment_ids=tokens.cpu()),
    )
    assert set(calls) == {(False, True), (True, False), (True, True)}  # grouped; not grouped; grouped on the CPU


def test_an_id_beyond_the_vocabulary_is_found_before_the_gpu_stumbles(trained, gpu):
    """A device-side assert would leave the notebook's kernel without a GPU, and name no cause."""
    model, _ = checkpoint.load(trained.out_dir / "sft", "cuda")
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(UserError, match="outside the vocabulary"):
            model(torch.tensor([[1, wrong]], device="cuda"))


def test_the_report_card_is_judged_on_the_gpu(trained, gpu):
    report = evaluate.report_card(trained, "cuda")
    assert gpu.places("embedding") == {"cuda:0"}
    assert evaluate.report_card(trained) == report


def test_the_data_card_is_judged_on_the_gpu(trained, gpu):
    prompt = [{"role": "user", "content": "What is two plus three?"}]
    dialog = [*prompt, {"role": "assistant", "content": "It is five."}]
    pair = {"prompt": prompt, "completions": ["It is five.", "No."]}
    heldout = sources.HeldOut([dialog], [pair], [prompt, prompt])
    report = evaluate.data_card(trained, heldout, "cuda")
    assert gpu.places("embedding") == {"cuda:0"}
    assert evaluate.data_card(trained, heldout) == report


def test_the_commands_take_the_gpu(trained, gpu, tmp_path, monkeypatch, capsys):
    """`evaluate` and `chat`, in the terminal and with a file, without --device."""
    monkeypatch.setattr(evaluate, "report_card", lambda settings, device: {"preset": "", "seed": 0, "stages": {
        str(device): {"best": {}}}})  # fmt: skip
    assert main(["evaluate", "--out", trained.out]) == 0
    assert "cuda:0" in capsys.readouterr().out
    lines = iter(["Hello.", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    folder, prompts = str(trained.out_dir / "sft-qlora"), tmp_path / "prompts.txt"
    prompts.write_text("What is two plus three?\nSay no.\n")
    assert main(["chat", folder, "--max-new-tokens", "8"]) == 0
    assert main(["chat", folder, "--max-new-tokens", "8", "--prompts", str(prompts)]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]) == 2
    assert gpu.places("embedding") == {"cuda:0"}


# ----------------------------------------------------------------------------------------------------- before training


def test_the_doctor_examines_the_gpu(gpu):
    found = {finding.name: finding for finding in doctor.examine(presets.get("tiny"))}
    assert found["device"].value == "cuda:0 (pretend GPU), bf16 yes"
    for name in ("bitsandbytes 4-bit", "bitsandbytes 8-bit Adam", "memory"):
        assert found[name].ok, found[name]
    assert "24.0 GB available" in found["memory"].value
    assert {"cuda:0"} == gpu.places("quantize_4bit") == gpu.places("optimizer_update_8bit_blockwise")


def test_the_doctor_does_not_count_an_imitated_bf16(gpu, monkeypatch):
    """CUDA says yes where it only imitates bfloat16, slowly, as on a T4."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert doctor.device_facts("cuda") == ("cuda:0", "pretend GPU", False)


def test_memory_that_torch_holds_for_itself_is_free(gpu, monkeypatch):
    """Else the second stage of a process would be refused for what the first one left in the allocator's hands."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * 10**9)
    assert memory.memory_available("cuda:0") == 6 * 10**9


def test_networks_that_live_elsewhere_need_no_room_here():
    """What is told of ppo is the device of the policy."""
    settings = presets.get("gpu")

    def needed(*devices: str) -> dict[str, float]:
        return memory.estimate(settings.replace(ppo__devices=devices), "ppo").parts

    weights = memory.base_bytes(presets.MODEL_SHAPES["smollm2-135m"], settings.sft.lora, settings.sft.quant, "fp32")
    assert needed() == needed(*4 * ("cuda:1",))
    assert needed()["weights"] == 4 * weights and needed("cuda:0", "cuda:0", "cpu", "cpu")["weights"] == 2 * weights
    parts = needed("cuda:0", "cuda:1", "cuda:1", "cuda:1")
    assert parts["weights"] == weights
    assert parts["gradients and optimizer"] == needed()["gradients and optimizer"] / 2
