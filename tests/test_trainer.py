"""The training loop: what a step counts, what a save holds, what stops a run, and a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from instruct_llama import presets
from instruct_llama.config import LoopConfig, ModelConfig, OptimConfig, UserError
from instruct_llama.data.batching import Batch, dialog_batch, epoch_order
from instruct_llama.evaluation import exact
from instruct_llama.model.llama import Llama
from instruct_llama.pipeline import run as run_stage
from instruct_llama.rlhf import ppo as algorithm
from instruct_llama.stages import pretrain, records, sft
from instruct_llama.stages.pretrain import language_model_loss
from instruct_llama.training import actors, checkpoint, run_log
from instruct_llama.training import loop as trainer
from instruct_llama.training.loop import TrainJob, fit
from instruct_llama.training.optim import NonFinite, freeze_first, learning_rate, make_optimizer, optimizer_step
from instruct_llama.training.run_log import Interrupted, RunLog, optimizer_tensors, restore_optimizer
from instruct_llama.worlds import enumerable

SHAPE = ModelConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=64)
LENGTHS = (3, 9, 5, 6, 12)
DIALOGS = [([(7 * i + 3 * t) % 32 for t in range(n)], [t > 1 for t in range(n)]) for i, n in enumerate(LENGTHS)]
PAD = 31


def llama() -> Llama:
    return Llama(SHAPE, generator=torch.Generator().manual_seed(0))


def dialogs_of(indices) -> Batch:
    return dialog_batch([DIALOGS[i] for i in indices], PAD)


def train(folder: Path, items=range(5), make=dialogs_of, optim=None, loss=language_model_loss, held_out=(), **loop):
    """`fit` over some of DIALOGS with a small model: (result, model). `held_out` losses come in turn, then 1.0."""
    model, items = llama(), list(items)
    loop = LoopConfig(**{"eval_every": 100, "save_every": 100, "sample_every": 100, **loop})

    def save(best: dict[str, float]) -> None:
        checkpoint.write_info(folder, {"kind": "lm", "model": {}})

    losses = itertools.chain(held_out, itertools.repeat(1.0))
    stage = TrainJob(
        "toy", model, optim or OptimConfig(), loop, len(items), None,
        lambda epoch, rows: make([items[i] for i in rows]), loss, lambda: {"loss": next(losses)}, lambda: [], save,
    )  # fmt: skip
    settings = presets.get("tiny")
    return fit(stage, RunLog(folder, settings, "sft"), settings), model


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    "held_out, kept",
    [
        ((3.0, 2.0, 1.0), 3),
        ((3.0, 2.0, 2.5), 2),  # it got worse: the best
        ((3.0, 2.0, 2.01), 3),  # too close to tell: the last
        ((2.0, 2.01, 2.5), 1),  # that holds for the last only
    ],
)
def test_the_best_weights_are_kept_and_of_two_alike_the_last(tmp_path, held_out, kept):
    result, _ = train(tmp_path / "toy", held_out=held_out, steps=3, eval_every=1)
    assert result.best == {"step": kept, "loss": held_out[kept - 1]}


# ---------------------------------------------------------------- what a step counts

SGD_LIKE = OptimConfig(lr=1e-2, warmup_steps=0, eps=1e-3)  # a large eps: Adam's first step then shows the gradient


def padded_three_times(indices) -> Batch:
    batch = dialogs_of(indices)
    extra = 2 * batch.tokens.shape[1]

    def wider(x: torch.Tensor, value: int) -> torch.Tensor:
        return nn.functional.pad(x, (0, extra), value=value)

    return Batch(wider(batch.tokens, 5), wider(batch.targets, 6), wider(batch.loss_mask, False))


def test_p07_a_step_is_independent_of_padding(tmp_path):
    plain, a = train(tmp_path / "a", optim=SGD_LIKE, steps=2, batch_size=5)
    padded, b = train(tmp_path / "b", optim=SGD_LIKE, steps=2, batch_size=5, make=padded_three_times)
    for one, other in zip(plain.history, padded.history, strict=True):
        for key in ("train/loss", "train/accuracy", "train/grad_norm"):
            assert one[key] == pytest.approx(other[key], abs=1e-5)
    assert largest_difference(a, b) < 1e-5


def test_p07_the_loss_is_a_mean_over_real_targets(tmp_path):
    result, _ = train(tmp_path, optim=SGD_LIKE, steps=1, batch_size=2, gradient_accumulation_steps=3)
    model, total, count = llama(), 0.0, 0
    for dialog in DIALOGS:
        ids, mask = dialog
        logprobs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]  # (T, V)
        for t in range(len(ids) - 1):
            if mask[t + 1]:
                total, count = total - logprobs[t, ids[t + 1]].item(), count + 1
    assert count == sum(n - 2 for n in LENGTHS)
    assert result.history[0]["train/loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])  # 5 records: the last micro-batch is incomplete, of 1 or 2
def test_p09_accumulation_equals_one_big_batch(tmp_path, size):
    small, a = train(
        tmp_path / "a", optim=SGD_LIKE, epochs=2, batch_size=size, gradient_accumulation_steps=-(-5 // size)
    )
    large, b = train(tmp_path / "b", optim=SGD_LIKE, epochs=2, batch_size=5)
    assert small.steps == large.steps == 2
    for one, other in zip(small.history, large.history, strict=True):
        for key in ("train/loss", "train/accuracy", "train/grad_norm"):
            assert one[key] == pytest.approx(other[key], abs=1e-5)
    assert largest_difference(a, b) < 1e-5


def test_p09_the_last_group_is_incomplete_and_its_step_is_whole(tmp_path):
    """Three micro-batches in groups of two: the second group has one, and divides by its own targets alone."""
    lone, a = train(
        tmp_path / "a", items=[0, 0, 0], optim=SGD_LIKE, epochs=1, batch_size=1, gradient_accumulation_steps=2
    )
    single, b = train(tmp_path / "b", items=[0], optim=SGD_LIKE, epochs=2, batch_size=1)
    assert lone.steps == 2 and largest_difference(a, b) < 1e-6
    for key in ("train/loss", "train/grad_norm"):  # Adam hides the size of a gradient, its norm does not
        assert lone.history[1][key] == pytest.approx(single.history[1][key], abs=1e-5)


def test_p09_schedules_count_optimizer_steps(tmp_path):
    optim = OptimConfig(lr=1e-2, warmup_steps=2)
    result, _ = train(tmp_path, optim=optim, epochs=3, batch_size=1, gradient_accumulation_steps=2)
    assert result.steps == 9  # three epochs of five micro-batches in groups of two
    assert [r["train/lr"] for r in result.history] == [learning_rate(step, 9, optim) for step in range(9)]


@pytest.mark.parametrize("bucket_steps", [1, 2])
@pytest.mark.parametrize("lengths", [None, [5, 1, 4, 2, 3, 9, 8]])
def test_every_record_comes_once_an_epoch(lengths, bucket_steps):
    loop = LoopConfig(batch_size=2, gradient_accumulation_steps=3)
    stage = types.SimpleNamespace(name="sft", n_items=7, lengths=lengths, loop=loop, bucket_steps=bucket_steps)
    orders = [trainer.epoch_groups(stage, 1, epoch) for epoch in range(3)]
    for groups in orders:
        flat = list(itertools.chain.from_iterable(itertools.chain.from_iterable(groups)))
        sizes = [len(group) for group in groups]  # with two steps to a bucket, chance says which comes first
        assert sorted(flat) == list(range(7)) and (sizes if bucket_steps == 1 else sorted(sizes)[::-1]) == [3, 1]
    assert orders[0] != orders[1] and orders[1] == trainer.epoch_groups(stage, 1, 1)


def test_a_bucket_holds_like_lengths_in_a_step_and_puts_its_steps_in_random_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 640).tolist()
    loop = LoopConfig(batch_size=4)
    padded = {}
    for buckets in (1, 8):
        stage = types.SimpleNamespace(name="reward", n_items=640, lengths=lengths, loop=loop, bucket_steps=buckets)
        groups = trainer.epoch_groups(stage, 1, 0)
        steps = [[lengths[i] for i in sum(group, [])] for group in groups]
        padded[buckets] = sum(len(step) * max(step) for step in steps) / sum(lengths)
        rises = sum(max(one) < max(two) for one, two in itertools.pairwise(steps)) / (len(steps) - 1)
        assert 0.3 < rises < 0.7  # 0.5 where chance orders the steps; 7 in 8 where a bucket stays sorted
    orders = {tuple(np.argsort([max(step) for step in steps[i : i + 8]])) for i in range(0, len(steps), 8)}
    assert len(orders) > 10  # of 20 buckets, each in an order of its own
    draw = epoch_order(640, 1, 0, "reward")[:32]
    stage = types.SimpleNamespace(name="reward", n_items=640, lengths=lengths, loop=loop, bucket_steps=8)
    first = sum(sum(trainer.epoch_groups(stage, 1, 0)[:8], []), [])
    assert sorted(first) == sorted(draw) and padded[8] < 1.2 < 1.4 < padded[1]  # each bucket is a random draw


def test_p27_a_step_is_a_random_draw_whatever_the_lengths():
    """Steps of like length would count a long response's tokens for less than a short one's (each step divides by its
    own tokens), and a model would learn short responses more often than they come. Micro-batches may be alike."""
    lengths = [10] * 500 + [40] * 500
    loop = LoopConfig(batch_size=5, gradient_accumulation_steps=4)
    stage = types.SimpleNamespace(name="sft", n_items=1000, lengths=lengths, loop=loop, bucket_steps=1)
    groups = trainer.epoch_groups(stage, 1, 0)
    long_share = [sum(lengths[i] == 40 for micro in group for i in micro) / 20 for group in groups]
    weight = sum(share * 40 / (share * 40 + (1 - share) * 10) for share in long_share) / len(groups)
    assert weight == pytest.approx(0.8, abs=0.02)  # of the tokens, four in five are a long response's
    mixed = sum(len({lengths[i] for i in micro}) == 2 for group in groups for micro in group)
    assert mixed <= len(groups)  # at most one micro-batch of a step holds both lengths
    assert len({tuple(sorted(sum(group, []))) for group in groups}) == len(groups)


def test_learning_rate_by_hand():
    optim = OptimConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.1)
    steps = [learning_rate(step, 6, optim) for step in range(8)]
    assert steps[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert steps[3] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * 2**-0.5))  # a quarter of the way: cos(pi / 4)
    assert steps[4:] == pytest.approx([0.55, 0.1 + 0.9 * (0.5 - 0.5 * 2**-0.5), 0.1, 0.1])
    assert learning_rate(0, 6, optim, peak=4.0) == pytest.approx(2.0)
    assert learning_rate(0, 1, OptimConfig(lr=1.0, warmup_steps=0)) == pytest.approx(1.0)


# ---------------------------------------------------------------- the optimizer


def test_p08_trainable_parameters_must_be_fp32():
    model = llama().bfloat16()
    with pytest.raises(TypeError, match="fp32"):
        make_optimizer([(list(model.parameters()), 1e-3)], OptimConfig())


def test_p08_training_in_bf16_moves_fp32_weights_that_bf16_could_not_hold(tmp_path):
    optim = OptimConfig(lr=1e-5, warmup_steps=0)
    _, model = train(tmp_path, optim=optim, steps=1, batch_size=5, precision="bf16")
    before = llama()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    weight, start = model.layers[0].feed_forward.w_up.weight, before.layers[0].feed_forward.w_up.weight
    moved = (weight - start).abs()  # Adam's first step is as large as the learning rate, everywhere
    assert float(((moved > 0.8e-5) & (moved < 1.2e-5)).float().mean()) > 0.9
    assert float((weight.bfloat16() != start.bfloat16()).float().mean()) < 0.5


def test_weight_decay_is_on_matrices_only():
    model = llama()
    groups = make_optimizer([(list(model.parameters()), 1e-3)], OptimConfig(weight_decay=0.3)).param_groups
    assert {group["weight_decay"]: {p.dim() for p in group["params"]} for group in groups} == {0.3: {2}, 0.0: {1}}


def test_the_gradient_is_clipped_and_the_norm_before_it_returned():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer([([weight], 1.0)], OptimConfig(lr=1.0, weight_decay=0.0))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    for clip in (1.0, 0.0):
        weight.grad = torch.full((2, 2), 3.0)
        assert optimizer_step(optimizer, OptimConfig(grad_clip=clip), 0, 10, "here") == pytest.approx((6.0,))
    assert float(seen[0].norm()) == pytest.approx(1.0, abs=1e-4) and torch.equal(seen[1], torch.full((2, 2), 3.0))
    assert weight.grad is None


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_takes_a_step_and_resumes(kind, tmp_path):
    def fresh() -> tuple[list[nn.Parameter], torch.optim.Optimizer, OptimConfig]:
        start = torch.linspace(-1, 1, 64 * 128).view(64, 128)  # 8 bits start at 4,096 weights
        weights = [nn.Parameter(start.clone()), nn.Parameter(-start), nn.Parameter(torch.ones(8))]
        optim = OptimConfig(kind=kind, lr=1e-2, warmup_steps=0)
        return weights, make_optimizer([(weights, optim.lr)], optim), optim

    def step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, optim: OptimConfig, number: int) -> None:
        for weight in weights:
            weight.grad = torch.sin(torch.arange(weight.numel()) * (number + 1.0)).view_as(weight)
        optimizer_step(optimizer, optim, number, 10, "here")

    weights, optimizer, optim = fresh()
    start = weights[0].detach().clone()
    step(weights, optimizer, optim, 0)
    assert 0.009 < (weights[0] - start).abs().median().item() < 0.011  # Adam's first step is as large as lr
    tensors, rest = optimizer_tensors(optimizer)
    checkpoint.write_tensors(tmp_path / "state.safetensors", tensors)
    tensors, rest = checkpoint.read_tensors(tmp_path / "state.safetensors")[0], json.loads(json.dumps(rest))

    others, resumed, _ = fresh()
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    restore_optimizer(resumed, tensors, rest)
    step(weights, optimizer, optim, 1)
    step(others, resumed, optim, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_freeze_first():
    model = llama()
    freeze_first(model, 0)
    assert all(p.requires_grad for p in model.parameters())
    freeze_first(model, 1)
    frozen = {name.split(".")[0] + name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"tok_embeddingsweight", "layers0"}
    optimizer = make_optimizer([(list(model.parameters()), 1e-3)], OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 9 + 1  # the second block, the last norm


@pytest.mark.parametrize("tied", [True, False])
def test_p14_beside_an_adapter_only_what_is_asked_for_trains(tied):
    """Named extras: the embeddings, whose chat markers the base has never seen, and the output layer."""
    for asked in (False, True):
        changes = {"sft__lora__rank": 2, "sft__train_embeddings": asked}
        model = Llama(dataclasses.replace(SHAPE, tie_embeddings=tied))
        model = sft.prepare(model, presets.get("tiny").replace(**changes))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        extras = {name for name in trained if ".A." not in name and ".B." not in name}
        wanted = {"tok_embeddings.weight"} if tied else {"tok_embeddings.weight", "output.weight"}
        assert extras == (wanted if asked else set()) and trained > extras


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_p12_presets_are_frozen_and_independent(name):
    settings = presets.get(name)
    for part in (settings, settings.model, settings.sft.loop, settings.ppo.optim, settings.qlora.lora):
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, 7)
    before = dataclasses.asdict(settings)
    changed = settings.replace(
        model__dim=64, model__n_heads=4, model__n_kv_heads=2, sft__loop__steps=3, ppo__kl_coef=0.0
    )
    Llama(changed.replace(model__n_layers=1, model__ffn_dim=32).model)
    assert dataclasses.asdict(settings) == before == dataclasses.asdict(presets.get(name))
    assert (changed.sft.loop.steps, changed.qlora.loop.steps) == (3, settings.qlora.loop.steps)
    json.dumps(before)  # nothing in it but numbers, texts, tuples: no shared list or object

    def leaves(value):
        return [x for v in value.values() for x in leaves(v)] if isinstance(value, dict) else [value]

    assert not any(isinstance(leaf, list | set) for leaf in leaves(before))


# ---------------------------------------------------------------- resume


def comparable(result) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in record.items() if k != "train/tokens_per_s"} for record in result.history]


class Crash(Exception):
    """Stands for a killed process: nothing is saved on the way out."""


def press_ctrl_c(at: int):
    def watch(record: dict[str, float]) -> None:
        if record["step"] == at:
            signal.raise_signal(signal.SIGINT)

    return watch


def crash(at: int):
    def watch(record: dict[str, float]) -> None:
        if record["step"] == at:
            raise Crash

    return watch


def resumed_equals_unbroken(stage: str, settings, stop, error: type[BaseException]) -> None:
    whole = run_stage(stage, settings.replace(**{f"{stage}__name": "unbroken"}))
    broken = settings.replace(**{f"{stage}__name": "broken"})
    with pytest.raises(error):
        run_stage(stage, broken, stop)
    folder = Path(settings.out) / "broken"
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 99, "train/lo')  # a line that a kill cut
    result = run_stage(stage, broken.replace(resume=True))
    assert comparable(result) == comparable(whole) and result.best == whole.best
    assert result.samples == whole.samples
    tensors = [checkpoint.read_tensors(next(f.glob("*.safetensors")))[0] for f in (whole.folder, folder)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert not list(folder.rglob("*.tmp"))


def beside(pipeline, tmp_path: Path, *stages: str):
    """The pipeline's settings, with copies of some of its run folders in a folder of the test's own."""
    for stage in stages:
        shutil.copytree(Path(pipeline.out) / stage, tmp_path / stage)
    return pipeline.replace(out=str(tmp_path))


def test_p32_resume_equals_the_unbroken_run_pretrain(micro, tmp_path):
    settings = micro(
        tmp_path, model__resid_dropout=0.1, pretrain__loop__steps=5, pretrain__loop__gradient_accumulation_steps=2
    )
    resumed_equals_unbroken("pretrain", settings, press_ctrl_c(3), Interrupted)


def test_p32_resume_equals_the_unbroken_run_sft(pipeline, tmp_path):
    changes = {"sft__lora__rank": 2, "sft__lora__dropout": 0.2, "sft__loop__steps": 5, "sft__pack": True,
               "sft__train_embeddings": True}  # fmt: skip
    settings = beside(pipeline, tmp_path, "pretrain").replace(**changes)
    resumed_equals_unbroken("sft", settings, crash(3), Crash)


@pytest.mark.parametrize("changes", [{}, {"dpo__lora__rank": 2, "dpo__lora__dropout": 0.2, "dpo__loss": "kto"}])
def test_p32_resume_equals_the_unbroken_run_dpo(pipeline, tmp_path, changes):
    settings = beside(pipeline, tmp_path, "pretrain", "sft").replace(dpo__loop__steps=5, **changes)
    resumed_equals_unbroken("dpo", settings, crash(3), Crash)


@pytest.mark.parametrize("stop, error", [(press_ctrl_c(2), Interrupted), (crash(3), Crash)])
def test_p32_resume_equals_the_unbroken_run_ppo(pipeline, tmp_path, stop, error):
    changes = {"ppo__iterations": 4, "ppo__kl_target": 0.1, "ppo__save_every": 2, "ppo__ptx_coef": 0.1}
    settings = beside(pipeline, tmp_path, "pretrain", "sft", "reward").replace(**changes)
    resumed_equals_unbroken("ppo", settings, stop, error)


def test_p32_ctrl_c_in_the_middle_of_a_step_or_of_validation(pipeline, tmp_path, monkeypatch):
    """The step is finished first: half a step can be neither repeated nor gone on from."""
    settings = beside(pipeline, tmp_path, "pretrain").replace(sft__loop__steps=4, sft__name="whole")
    whole = run_stage("sft", settings)
    for name, function, call in (("step", "language_model_loss", 3), ("validation", "language_model_metrics", 1)):
        calls, real = itertools.count(1), getattr(sft, function)

        def interrupted(*args, calls=calls, real=real, call=call):
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return real(*args)

        monkeypatch.setattr(sft, function, interrupted)
        broken = settings.replace(sft__name=name)
        with pytest.raises(Interrupted):
            run_stage("sft", broken)
        monkeypatch.setattr(sft, function, real)
        result = run_stage("sft", broken.replace(resume=True))
        assert comparable(result) == comparable(whole), name


def test_ctrl_c_says_how_to_go_on_and_leaves_the_kernel_usable(pipeline, tmp_path, capsys):
    settings = beside(pipeline, tmp_path, "pretrain")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"sft --resume .same options.*resume=True.* in a notebook"):
        run_stage("sft", settings, press_ctrl_c(1))
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Stopping after this step" in capsys.readouterr().err
    assert not checkpoint.is_complete(tmp_path / "sft")
    state, metadata = checkpoint.read_tensors(tmp_path / "sft" / "state" / "resume.safetensors")
    assert json.loads(metadata["state"])["step"] == 1 and any(key.startswith("optimizer/") for key in state)


def test_ctrl_c_twice_stops_at_once_and_the_last_save_stands(pipeline, tmp_path):
    def twice(record: dict[str, float]) -> None:
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one did not stop it")

    settings = beside(pipeline, tmp_path, "pretrain")
    with pytest.raises(Interrupted):
        run_stage("sft", settings, twice)
    _, metadata = checkpoint.read_tensors(tmp_path / "sft" / "state" / "resume.safetensors")
    assert json.loads(metadata["state"])["step"] == 2


def test_p32_other_settings_do_not_resume(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft")
    with pytest.raises(UserError, match="--resume.*other settings.*retrain"):
        run_stage("sft", settings.replace(resume=True, sft__optim__lr=0.5))
    assert checkpoint.is_complete(tmp_path / "sft")


# ---------------------------------------------------------------- writes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_p33_a_kill_in_the_middle_of_a_write_leaves_the_last_good_state(pipeline, tmp_path, moment):
    folder = shutil.copytree(Path(pipeline.out) / "sft", tmp_path / "sft")
    (pretrain_folder := tmp_path / "pretrain").symlink_to(Path(pipeline.out) / "pretrain")
    log = RunLog(folder, pipeline.replace(resume=True), "sft")
    old = checkpoint.read_tensors(log.state_path)
    child = os.fork()
    if child == 0:  # killed once half of the file is written, or just before it gets its name
        setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        log.save_state(99, {"model/x": torch.ones(1000)}, {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    new = checkpoint.read_tensors(log.state_path)
    assert new[1] == old[1] and all(torch.equal(new[0][key], old[0][key]) for key in old[0])
    assert RunLog(folder, pipeline.replace(resume=True), "sft").start == 4 and pretrain_folder.exists()
    checkpoint.load(folder)


# ---------------------------------------------------------------- what is not finite


def poisoned(value: str, record: int):
    """The language-model loss, with a loss or a gradient that is not finite where the batch holds a record."""

    def loss(model: Llama, batch: Batch):
        total, parts = language_model_loss(model, batch)
        ids = torch.tensor(DIALOGS[record][0][:3])
        if any(torch.equal(row[:3], ids) for row in batch.tokens):
            zero = model.tok_embeddings.weight.sum() * 0
            total = total + (float("nan") * zero if value == "loss" else zero.abs().sqrt())  # sqrt'(0) is infinite
        return total, parts

    return loss


@pytest.mark.parametrize("value", ["loss", "gradient"])
def test_p34_what_is_not_finite_stops_with_step_and_records(tmp_path, value):
    items, bad = range(5), 3
    stage = types.SimpleNamespace(name="toy", n_items=5, lengths=None, loop=LoopConfig(batch_size=1), bucket_steps=1)
    epoch = trainer.epoch_groups(stage, 1, 0)
    at = [group[0][0] for group in epoch].index(bad)
    options = {"optim": SGD_LIKE, "batch_size": 1}
    with pytest.raises(NonFinite, match=rf"{value} is .*at step {at + 1}, records \[{bad}\]"):
        train(tmp_path / "bad", items, loss=poisoned(value, bad), epochs=1, **options)
    metrics = run_log.read_jsonl(tmp_path / "bad" / "metrics.jsonl")
    assert [r["step"] for r in metrics] == list(range(1, at + 1))


def test_p34_the_optimizer_is_untouched():
    model = llama()
    optim = OptimConfig(warmup_steps=0)
    optimizer = make_optimizer([(list(model.parameters()), 1e-2)], optim)
    language_model_loss(model, dialogs_of([0]))[0].backward()
    optimizer_step(optimizer, optim, 0, 10, "step 1")
    weights = [p.detach().clone() for p in model.parameters()]
    before = {k: v.clone() for k, v in optimizer_tensors(optimizer)[0].items()}
    language_model_loss(model, dialogs_of([1]))[0].backward()
    model.norm.weight.grad[0] = float("inf")
    with pytest.raises(NonFinite, match=r"gradient is not finite at step 2, records \[1\]"):
        optimizer_step(optimizer, optim, 1, 10, "step 2, records [1]")
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    after = optimizer_tensors(optimizer)[0]
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in model.parameters())


def test_p34_ppo_stops_before_its_optimizer_steps(monkeypatch):
    monkeypatch.setattr(algorithm, "minibatch_gradients", lambda *_: {"loss": float("nan"), "ratio_abs_error": 0.0})
    monkeypatch.setattr(actors, "scaled_step", lambda *_: pytest.fail("it stepped"))
    config = dataclasses.replace(presets.get("tiny").ppo, mini_batch_size=2, num_ppo_epochs=1)
    rollouts = type("Four", (), {"__len__": lambda self: 4, "select": lambda self, rows: None})()
    table = enumerable.reward_model(enumerable.fixed())
    networks = actors.FourModels(table, table, table, table, exact.EnumerableTokens())
    cleared = types.SimpleNamespace(zero_grad=lambda set_to_none: None)
    with pytest.raises(NonFinite, match=r"nan at iteration 3, rollouts \["):
        algorithm.update(networks, config, rollouts, cleared, 1, 2)


# ---------------------------------------------------------------- logs


@pytest.mark.parametrize("stage", ["pretrain", "sft-qlora", "reward", "ppo"])
def test_the_keys_of_the_metrics_are_the_tensorboard_tags(pipeline, stage):
    folder = Path(pipeline.out) / stage
    events = EventAccumulator(str(folder)).Reload()
    records = run_log.read_jsonl(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert set(events.Tags()["scalars"]) == {key for record in records for key in record} - {"step"}
    for key in set(records[-1]) - {"step"}:
        logged = [(r["step"], r[key]) for r in records if key in r]
        assert [(e.step, pytest.approx(e.value, rel=1e-5, abs=1e-6)) for e in events.Scalars(key)] == logged
    assert "samples/text_summary" in events.Tags()["tensors"]
    assert run_log.read_jsonl(folder / "samples.jsonl")


def test_the_stages_log_what_the_contract_names(pipeline):
    def keys(stage: str) -> set[str]:
        return set(run_log.read_jsonl(Path(pipeline.out) / stage / "metrics.jsonl")[-1])

    common = {"step", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "val/loss", "val/accuracy"}
    assert common | {"val/perplexity", "train/accuracy"} <= keys("sft")
    assert common | {"val/gap", "val/chosen_mean", "val/chosen_std", "val/rejected_mean"} <= keys("reward")
    named = "score rlhf_reward true_reward kl kl_k3 response_length entropy clip_frac explained_variance ratio kl_coef"
    named += " eos_rate approx_kl ratio_abs_error first_ratio_abs_error"
    assert {f"ppo/{name}" for name in named.split()} | {"val/true_reward"} <= keys("ppo")


def test_a_stage_that_starts_anew_forgets_the_run_that_did_not_finish(pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft")
    checkpoint.write_info(tmp_path / "sft", {**checkpoint.read_info(tmp_path / "sft"), "complete": False})
    with pytest.raises(Crash):
        run_stage("sft", settings, crash(1))
    assert [r["step"] for r in run_log.read_jsonl(tmp_path / "sft" / "metrics.jsonl")] == [1]
    assert not checkpoint.is_complete(tmp_path / "sft")
    assert RunLog(tmp_path / "sft", settings.replace(resume=True), "sft").start == 0


def test_eight_paragraphs_make_a_document_and_new_text_new_tokens(micro, tmp_path):
    micro = micro(tmp_path)
    texts, _ = records.texts(micro)
    tokenizer, train, _ = pretrain.build_tokens(micro, tmp_path)
    ends = np.flatnonzero(np.asarray(train) == tokenizer.eos_id)
    assert len(ends) == len(texts) // 8 > 0
    assert tokenizer.decode(train[: ends[0]].tolist()) == "\n ".join(texts[:8])
    before = np.array(train)
    _, again, _ = pretrain.build_tokens(micro, tmp_path)
    assert np.array_equal(before, again)
    _, other, _ = pretrain.build_tokens(micro.replace(seed=micro.seed + 1), tmp_path)
    assert not np.array_equal(before[:1000], np.array(other)[:1000])


def test_token_files_that_are_gone_are_made_again_and_damaged_ones_are_named(micro, tmp_path):
    micro, folder = micro(tmp_path), tmp_path / "tokens"
    before = np.array(pretrain.build_tokens(micro, folder)[1])
    (folder / "train.npy").unlink()
    assert np.array_equal(before, pretrain.build_tokens(micro, folder)[1])
    (folder / "valid.npy").write_bytes(b"")
    with pytest.raises(UserError, match="valid.npy .* delete the folder .*tokens and run the stage again"):
        pretrain.build_tokens(micro, folder)
    shutil.rmtree(folder)
    assert np.array_equal(before, pretrain.build_tokens(micro, folder)[1])


def test_a_rebuild_of_the_tokens_that_was_killed_does_not_pass_as_the_old_files(micro, tmp_path, monkeypatch):
    first, folder, write = micro(tmp_path), tmp_path / "tokens", pretrain.write_tokens
    before = np.array(pretrain.build_tokens(first, folder)[1])

    def killed(path, ids, vocab_size):
        if path.name == "valid.npy":
            raise Crash
        return write(path, ids, vocab_size)

    monkeypatch.setattr(pretrain, "write_tokens", killed)
    with pytest.raises(Crash):
        pretrain.build_tokens(first.replace(seed=2), folder)
    monkeypatch.setattr(pretrain, "write_tokens", write)
    assert np.array_equal(before, pretrain.build_tokens(first, folder)[1])
