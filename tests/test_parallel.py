"""Two processes train one process's curve: the same losses, every record once, files from one of them, and resume."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from instruct_llama.config import UserError
from instruct_llama.evaluation import report
from instruct_llama.pipeline import require
from instruct_llama.pipeline import run as run_stage
from instruct_llama.training import checkpoint, distributed, optim, run_log

pytestmark = pytest.mark.slow

LIMIT = 1e-4  # what two processes may differ from one, in any logged figure


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def member(rank: int, world: int, port: int, settings, pipe) -> None:
    """One of the processes: does what comes through the pipe until it closes, in one process group."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with distributed.session(settings):
        while (job := pipe.recv()) is not None:
            function, arguments = job
            try:
                pipe.send((True, function(*arguments)))
            except BaseException:  # told to the test, also Ctrl-C
                pipe.send((False, traceback.format_exc()))
    # Not through the interpreter's own end: PyTorch's caches of sharded tensors keep the process group alive, and a
    # gloo thread that lets go of a tensor while Python shuts down aborts the process (pytorch/pytorch#179291).
    os._exit(0)


class Group:
    """Processes that keep running from test to test: starting them takes longer than most tests."""

    def __init__(self, settings, world: int = 2):
        context, port = mp.get_context("spawn"), free_port()
        pairs = [context.Pipe() for _ in range(world)]
        self.pipes = [mine for mine, _ in pairs]
        self.processes = [
            context.Process(target=member, args=(rank, world, port, settings, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments, timeout: float = 120) -> list:
        """What the function returns in each process; fails with the first error."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(timeout):
                self.kill()
                pytest.fail(f"{function.__name__} hung; what came so far: {answers}")
            answers.append(pipe.recv())
        errors = [text for right, text in answers if not right]
        if errors:
            pytest.fail(errors[0])
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="module")
def two(micro, tmp_path_factory):
    group = Group(micro(tmp_path_factory.mktemp("group")))
    yield group
    group.close()


def run(stage: str, settings):
    return run_stage(stage, settings)


def curve(result) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "train/tokens_per_s"} for record in result.history]


def differences(one, other) -> dict[str, float]:
    """The largest difference of each figure between two runs that logged the same; of large figures, as a share."""
    found: dict[str, float] = {}
    for mine, theirs in zip(curve(one), curve(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            found[key] = max(found.get(key, 0.0), abs(mine[key] - theirs[key]) / max(1.0, abs(mine[key])))
    return found


def same_curve(one, other) -> None:
    apart = {key: value for key, value in differences(one, other).items() if not value <= LIMIT}
    assert not apart and one.best.keys() == other.best.keys()


def weights(folder: Path) -> checkpoint.State:
    return checkpoint.read_tensors(next(folder.glob("*.safetensors")))[0]


def one_and_two(two, stage: str, settings, tmp_path: Path):
    """The same stage alone and by two processes, in folders beside each other; they must agree."""
    alone = run(stage, settings.replace(out=str(tmp_path / "one")))
    together, other = two(run, stage, settings.replace(out=str(tmp_path / "two")))
    print(stage, {key: f"{value:.1e}" for key, value in differences(alone, together).items()})
    same_curve(alone, together)
    assert other.best == together.best and other.history == together.history
    mine, theirs = weights(alone.folder), weights(together.folder)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-5)
    return alone, together


def test_pretrain(two, micro, tmp_path):
    settings = micro(tmp_path, pretrain__loop__gradient_accumulation_steps=2, pretrain__loop__batch_size=3)
    alone, together = one_and_two(two, "pretrain", settings, tmp_path)
    assert alone.samples == together.samples


def beside(pipeline, tmp_path: Path, *stages: str):
    """The pipeline's settings, and folders for one and for two processes with copies of some of its runs."""
    for name in ("one", "two"):
        for stage in stages:
            shutil.copytree(Path(pipeline.out) / stage, tmp_path / name / stage)
    return pipeline


SFT = {  # 5 rows: a ragged deal, and with 40 records a ragged last batch
    "full": {"sft__loop__batch_size": 5, "sft__freeze_layers": 1, "sft__pack": True},
    "lora": {"sft__lora__rank": 2, "sft__train_embeddings": True, "sft__loop__batch_size": 3},
    "qlora": {"sft__lora__rank": 2, "sft__quant__kind": "nf4", "model__gradient_checkpointing": True},
    "lone": {"sft__loop__batch_size": 1},  # one process has nothing to do
}


@pytest.mark.parametrize("kind", SFT)
def test_sft(two, pipeline, tmp_path, kind):
    settings = beside(pipeline, tmp_path, "pretrain").replace(**SFT[kind])
    alone, together = one_and_two(two, "sft", settings, tmp_path)
    assert alone.samples == together.samples


@pytest.mark.parametrize("rank", [0, 2])
def test_reward(two, pipeline, tmp_path, rank):
    settings = beside(pipeline, tmp_path, "pretrain", "sft")
    settings = settings.replace(reward__lora__rank=rank, reward__loop__batch_size=3)
    alone, together = one_and_two(two, "reward", settings, tmp_path)
    norms = [checkpoint.read_info(result.folder)["reward"] for result in (alone, together)]
    assert norms[0] == pytest.approx(norms[1], abs=LIMIT)


DPO = {
    "full": {"dpo__loop__batch_size": 3},  # the reference's log-probabilities, in batches shared by the processes
    "qlora": {"dpo__lora__rank": 2, "dpo__quant__kind": "nf4", "dpo__loss": "ipo"},
    # its KL estimate is over both processes, and above 0 after steps of this size
    "kto": {"dpo__loss": "kto", "dpo__loop__batch_size": 4, "dpo__optim__lr": 5e-3, "dpo__loop__steps": 6},
}


@pytest.mark.parametrize("kind", DPO)
def test_dpo(two, pipeline, tmp_path, kind):
    settings = beside(pipeline, tmp_path, "pretrain", "sft").replace(**DPO[kind])
    alone, together = one_and_two(two, "dpo", settings, tmp_path)
    assert alone.samples == together.samples


PPO = {
    "four_models": {
        "ppo__rollouts_per_iteration": 5,
        "ppo__generation_batch_size": 2,
        "ppo__ptx_coef": 0.1,
        "ppo__mini_batch_size": 3,
    },
    "shared_base": {"ppo__layout": "shared_base", "ppo__quant__kind": "nf4", "ppo__lora__rank": 2},
}


@pytest.mark.parametrize("layout", PPO)
def test_ppo(two, pipeline, tmp_path, layout):
    settings = beside(pipeline, tmp_path, "pretrain", "sft", "reward").replace(**PPO[layout])
    if layout == "shared_base":
        require("reward-lora", settings.replace(out=str(tmp_path / "one")))
        shutil.copytree(tmp_path / "one" / "reward-lora", tmp_path / "two" / "reward-lora")
    alone, together = one_and_two(two, "ppo", settings, tmp_path)
    assert [r["response"] for r in alone.samples] == [r["response"] for r in together.samples]


# ---------------------------------------------------------------- resume


def interrupted(stage: str, settings, at: int) -> str:
    """Runs a stage until Ctrl-C reaches the main process at a step, and only that one; what is then said."""

    def watch(record: dict[str, float]) -> None:
        if record["step"] == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(run_log.Interrupted) as stopped:
        run_stage(stage, settings, watch)
    return str(stopped.value)


RESUMED = {
    "pretrain": {"pretrain__loop__steps": 6, "pretrain__loop__batch_size": 3, "pretrain__loop__save_every": 100},
    "sft": {"sft__lora__rank": 2, "sft__train_embeddings": True, "sft__loop__steps": 6},
    "dpo": {"dpo__loop__steps": 6},
    "ppo": {"ppo__iterations": 6, "ppo__kl_target": 0.1, "ppo__save_every": 100},
}


@pytest.mark.parametrize("stage", RESUMED)
def test_p32_a_run_goes_on_with_another_number_of_processes(two, pipeline, tmp_path, stage):
    settings = beside(pipeline, tmp_path, "pretrain", "sft", "reward").replace(**RESUMED[stage])
    if stage == "pretrain":
        shutil.rmtree(tmp_path / "one" / "pretrain")
        shutil.rmtree(tmp_path / "two" / "pretrain")
    unbroken = run(stage, settings.replace(out=str(tmp_path / "one")))
    broken, again = settings.replace(out=str(tmp_path / "two")), {"resume": True}
    state = tmp_path / "two" / unbroken.folder.name / "state"

    def states() -> set[str]:
        return {path.name for path in state.iterdir()} - {"tokens"}

    for text in two(interrupted, stage, broken, 2):
        assert f"{stage} --resume" in text
    assert states() == {"step-2"}
    assert "--resume" in interrupted(stage, broken.replace(**again), 4)
    assert states() == {"resume.safetensors"}
    together, _ = two(run, stage, broken.replace(**again))
    assert states() == {"step-6"} and together.steps == 6
    same_curve(unbroken, together)
    assert [r["step"] for r in together.history] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in together.samples] == [r["step"] for r in unbroken.samples]


def killed(settings, folder: Path) -> None:
    """The main process dies while a state is written; the others' parts are there."""
    log = run_log.RunLog(folder, settings, "sft")
    if not distributed.is_main():
        log.save_state(9, {"model/x": torch.ones(1000)}, {})
        return

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkey, pytest.raises(KeyboardInterrupt):
        monkey.setattr(Path, "rename", dies)
        log.save_state(9, {"model/x": torch.ones(1000)}, {})
    distributed.barrier()  # the one that the others wait at


def test_p33_a_kill_in_the_middle_of_a_save_leaves_the_last_state(two, micro, tmp_path):
    settings, folder = micro(tmp_path, resume=True), tmp_path / "toy"
    two(save_something, settings, folder, 3)
    two(killed, settings, folder)
    assert (folder / "state" / ".step-9").is_dir()
    for steps in (run_log.RunLog(folder, settings, "sft").start, *two(start_of, settings, folder)):
        assert steps == 3
    shutil.copytree(folder / "state" / "step-3", tmp_path / "step-3")
    two(save_something, settings, folder, 12)
    assert {path.name for path in (folder / "state").iterdir()} == {"step-12"}
    shutil.copytree(tmp_path / "step-3", folder / "state" / "step-3")  # a kill before the old one was removed
    assert run_log.RunLog(folder, settings, "sft").start == 12
    files = list((folder / "state" / "step-12").iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json"}  # nothing pickled (P05)


def save_something(settings, folder: Path, step: int) -> None:
    run_log.RunLog(folder, settings, "sft").save_state(step, {"model/x": torch.ones(1000)}, {})


def start_of(settings, folder: Path) -> int:
    return run_log.RunLog(folder, settings, "sft").start


# ---------------------------------------------------------------- who does what


def rows_of(world_rows: int) -> tuple[list[int], int]:
    return distributed.shard_rows(range(world_rows))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_p01_no_row_is_dealt_twice_or_lost(two, n):
    hands = two(rows_of, n)
    assert sorted(row for rows, counts in hands for row in rows * counts) == list(range(n))
    assert all(rows and counts in (0, 1) for rows, counts in hands)
    lengths = [len(rows) * counts for rows, counts in hands]
    assert max(lengths) - min(lengths) <= 1


def turns_of(n: int) -> list[int]:
    return distributed.tasks_for_rank(n)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_turns_cover_every_task_and_are_equally_many(two, n):
    mine, theirs = two(turns_of, n)
    assert {*mine, *theirs} == set(range(n)) and len(mine) == len(theirs)


def rows_learned(settings) -> list[int]:
    """The answers in each batch that this process learns from: pass by pass, those that count."""

    seen, real = [], distributed.shard_rows

    def deal(rows):
        mine, counts = real(rows)
        seen.append(len(mine) * counts)
        return mine, counts

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(distributed, "shard_rows", deal)
        run_stage("sft", settings)
    return seen


def test_p36_batches_of_one_keep_every_process_busy(two, pipeline, tmp_path):
    """A preset's batch of 1 row, accumulated: the rows of a step are shared out, not done by one process for all."""
    batch = {"sft__loop__batch_size": 1, "sft__loop__gradient_accumulation_steps": 5, "sft__loop__steps": 2}
    settings = beside(pipeline, tmp_path, "pretrain").replace(**batch)
    assert two(rows_learned, settings.replace(out=str(tmp_path / "two"))) == [[1, 1, 1] * 2, [1, 1, 0] * 2]
    assert rows_learned(settings.replace(out=str(tmp_path / "one"))) == [1] * 10


def passes_of(group: list[list[int]]) -> list[list[int]]:
    return distributed.regroup_microbatches(group)


def test_passes_by_hand(two):
    assert distributed.regroup_microbatches([[1], [2], [3]]) == [[1], [2], [3]]
    for found in two(passes_of, [[1], [2], [3]]):
        assert found == [[1, 2], [3]]
    for found in two(passes_of, [[5], [1, 2], [3, 4]]):  # a short one among batches of two
        assert found == [[5], [1, 2], [3, 4]]


def sets_built(folder: Path) -> int:
    """How often this process builds a public set that two of them want at once."""
    from instruct_llama import presets
    from instruct_llama.stages import records

    calls, real = [], records.public_sets.build

    def build(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(records, "project_folder", lambda: folder)
        monkey.setattr(records.public_sets, "build", build)
        found = [records.demonstrations(presets.get("tiny").replace(data="arithmetic")) for _ in range(2)]
    assert found[0] == found[1] and found[0][1]
    return len(calls)


def test_p35_a_public_set_is_built_by_the_main_process_only(two, tmp_path):
    assert two(sets_built, tmp_path) == [1, 0]


def windows_read(settings) -> list[tuple[int, ...]]:
    """The first tokens of every window that this process trains on in one epoch."""
    from instruct_llama.stages import pretrain

    seen, real = [], pretrain.language_model_loss

    def loss(model, batch):
        if model.training:
            seen.extend(tuple(row.tolist()) for row in batch.tokens)
        return real(model, batch)

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(pretrain, "language_model_loss", loss)
        run_stage("pretrain", settings)
    return seen


def test_p01_an_epoch_by_two_reads_every_window_once(two, micro, tmp_path):
    changes = {"pretrain__loop__steps": 0, "pretrain__loop__epochs": 1, "pretrain__loop__batch_size": 32,
               "pretrain__loop__eval_every": 1000, "pretrain__loop__save_every": 1000}  # fmt: skip
    settings = micro(tmp_path, **changes)
    alone = windows_read(settings.replace(out=str(tmp_path / "one")))
    mine, theirs = two(windows_read, settings.replace(out=str(tmp_path / "two")))
    # As wide as the widest row of a batch: compare what all rows have, without the padding.
    assert sorted(row[:8] for row in mine + theirs) == sorted(row[:8] for row in alone)
    assert abs(len(mine) - len(theirs)) <= len(alone) / 32 + 1


def writes(stage: str, settings) -> list[str]:
    """Everything under the out folder that this process opens for writing, renames or removes."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            seen.append(str(arguments[0]))
        elif event in ("os.rename", "os.remove", "os.rmdir"):
            seen.append(str(arguments[0]))

    sys.addaudithook(hook)
    run(stage, settings)
    return [name for name in seen if str(settings.out) in name]


def test_p35_only_the_main_process_writes(two, pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft", "reward")
    settings = settings.replace(out=str(tmp_path / "two"), overwrite=True)
    for stage in ("sft", "ppo"):
        mine, theirs = two(writes, stage, settings)
        for name in ("metrics.jsonl", "samples.jsonl", "config.json", "events.out", "tokenizer", ".step-"):
            assert any(name in path for path in mine), name
        # Its own part of each state, and nothing else.
        assert theirs and all(re.search(r"/state/\.step-\d+/shard-00002-[\w-]+\.safetensors$", path) for path in theirs)


def test_p35_the_environment_is_read_when_the_group_starts(micro, tmp_path, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)  # no MASTER_ADDR: not torchrun's
    with distributed.session(micro(tmp_path)):
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    other = distributed.session(micro(tmp_path, device="cuda:1"))
    with pytest.raises(UserError, match="--device cuda:1 does not work under torchrun"), other:
        pass


def ranks_and_prints() -> tuple[int, int, bool]:
    return distributed.rank(), distributed.world_size(), sys.stdout.name == os.devnull


def test_p35_the_main_process_alone_prints(two):
    assert two(ranks_and_prints) == [(0, 2, False), (1, 2, True)]


# ---------------------------------------------------------------- what goes wrong


def poisoned(settings) -> str:
    """One process meets a loss that is not a number; what this one then says."""
    from instruct_llama.stages import sft

    real = sft.language_model_loss

    def loss(model, batch):
        total, parts = real(model, batch)
        return total * (float("nan") if distributed.rank() == 1 else 1.0), parts

    with pytest.MonkeyPatch.context() as monkey, pytest.raises(optim.NonFinite) as stopped:
        monkey.setattr(sft, "language_model_loss", loss)
        run_stage("sft", settings)
    return str(stopped.value)


def test_p34_all_processes_stop_at_a_loss_that_is_not_finite_in_one(two, pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain").replace(out=str(tmp_path / "two"))
    texts = two(poisoned, settings)
    assert texts[0] == texts[1] and "loss is nan at step 1, records [" in texts[0]


# ---------------------------------------------------------------- options


def sharded(settings) -> tuple[float, float]:
    """The share of the model's weights that this process holds while it trains, and of the optimizer's state."""
    held = []
    real = optim.optimizer_step

    def step(optimizer, *rest):
        norm = real(optimizer, *rest)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        sizes = [(p.to_local().numel(), p.numel()) for p in weights]
        kept = [optimizer.state[p]["exp_avg"].to_local().numel() for p in weights]
        held.append((sum(a for a, _ in sizes) / sum(b for _, b in sizes), sum(kept) / sum(b for _, b in sizes)))
        return norm

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(optim, "optimizer_step", step)
        run("sft", settings)
    return held[-1]


def test_weights_and_optimizer_state_are_divided(two, pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain").replace(out=str(tmp_path / "two"))
    for weights_held, state_held in two(sharded, settings):
        assert 0.49 < weights_held < 0.51 and state_held == weights_held


OPTIONS = [
    {"parallel__reshard": False, "parallel__cpu_offload": True},
    {"model__gradient_checkpointing": True},
    {"parallel__gather_bf16": True, "sft__loop__precision": "bf16", "model__gradient_checkpointing": True},
    {"sft__loop__precision": "bf16", "sft__lora__rank": 2, "sft__train_embeddings": True},  # a bf16 base, fp32 adapters
]


@pytest.mark.parametrize("changes", OPTIONS)
def test_options_change_no_curve(two, pipeline, tmp_path, changes):
    settings = beside(pipeline, tmp_path, "pretrain").replace(**changes)
    alone = run("sft", settings.replace(out=str(tmp_path / "one")))
    together, _ = two(run, "sft", settings.replace(out=str(tmp_path / "two")))
    limit = 2e-3 if settings.sft.loop.precision == "bf16" else LIMIT
    found = differences(alone, together)
    print(changes, found["train/loss"], found["val/loss"], found["train/grad_norm"])
    assert max(found[key] for key in ("train/loss", "val/loss", "train/grad_norm")) < limit
    mine, theirs = weights(alone.folder), weights(together.folder)
    assert {key: value.dtype for key, value in mine.items()} == {key: value.dtype for key, value in theirs.items()}


REFUSED = [
    ({"sft__loop__precision": "fp16"}, "use precision bf16"),
    ({"parallel__gather_bf16": True}, "gather_bf16.*precision is fp32"),
    ({"sft__optim__kind": "adamw_8bit"}, "use adamw"),
]


def refused(settings) -> str:
    with pytest.raises(UserError) as error:
        run("sft", settings)
    return str(error.value)


@pytest.mark.parametrize("changes, text", REFUSED)
def test_what_several_processes_cannot_do_is_refused_by_name(two, pipeline, tmp_path, changes, text):
    settings = beside(pipeline, tmp_path, "pretrain").replace(out=str(tmp_path / "two"), **changes)
    assert all(re.search(text, said) for said in two(refused, settings))


# ---------------------------------------------------------------- evaluation, and the command itself


def test_the_report_card_of_two_is_that_of_one(two, pipeline, tmp_path):
    settings = beside(pipeline, tmp_path, "pretrain", "sft", "reward")
    alone = report.report_card(settings.replace(out=str(tmp_path / "one")))
    assert two(report.report_card, settings.replace(out=str(tmp_path / "two"))) == [alone, alone]
    assert (tmp_path / "one" / "report.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()


def options(settings) -> list[str]:
    """The micro settings as a command line would give them."""
    loop = settings.pretrain.loop
    given = {"seed": 1, "model.dim": 32, "model.ffn-dim": 48, "model.max-seq-len": 160, "world.corpus-chars": 30_000,
             "tokenizer.vocab-size": 480, "tokenizer.max-chars": 30_000, "pretrain.seq-len": 32}  # fmt: skip
    given |= {f"pretrain.loop.{k.replace('_', '-')}": getattr(loop, k)
              for k in ("steps", "batch_size", "eval_every", "eval_batches", "save_every", "sample_every")}  # fmt: skip
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def torchrun(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), "-m", "instruct_llama", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


def test_the_command_under_torchrun(micro, tmp_path):
    settings = micro(tmp_path / "one")
    alone = run("pretrain", settings)
    done = torchrun("pretrain", "--preset", "tiny", "--out", str(tmp_path / "two"), *options(settings))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pretrain finished in") == 1
    together = run_log.StageResult(tmp_path / "two" / "pretrain", alone.best, alone.steps, 0.0)
    assert max(differences(alone, together).values()) <= LIMIT
    failed = torchrun("sft", "--preset", "tiny", "--out", str(tmp_path / "two"), "--init", str(tmp_path / "nowhere"))
    assert failed.returncode != 0 and "is not a run folder" in failed.stderr
