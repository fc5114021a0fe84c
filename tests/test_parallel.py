"""Two processes train one process's curve: the same losses, every record once, files from one of them, and resume."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from instruct_llama import checkpoint, parallel

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
    with parallel.session(settings):
        while (job := pipe.recv()) is not None:
            function, arguments = job
            try:
                pipe.send((True, function(*arguments)))
            except BaseException:  # told to the test, also Ctrl-C
                pipe.send((False, traceback.format_exc()))


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
    return importlib.import_module(f"instruct_llama.stages.{stage}").run(settings)


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
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-3)
    return alone, together


def test_pretrain(two, micro, tmp_path):
    settings = micro(tmp_path, pretrain__loop__accumulate=2, pretrain__loop__batch_size=3)
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
    settings = beside(pipeline, tmp_path, "pretrain", "sft").replace(reward__lora__rank=rank, reward__loop__batch_size=3)
    alone, together = one_and_two(two, "reward", settings, tmp_path)
    norms = [checkpoint.read_info(result.folder)["reward"] for result in (alone, together)]
    assert norms[0] == pytest.approx(norms[1], abs=LIMIT)


PPO = {
    "four_models": {"ppo__rollouts": 5, "ppo__rollout_batch": 2, "ppo__ptx_coef": 0.1, "ppo__minibatch": 3},
    "shared_base": {"ppo__layout": "shared_base", "ppo__quant__kind": "nf4", "ppo__lora__rank": 2},
}


@pytest.mark.parametrize("layout", PPO)
def test_ppo(two, pipeline, tmp_path, layout):
    settings = beside(pipeline, tmp_path, "pretrain", "sft", "reward").replace(**PPO[layout])
    if layout == "shared_base":
        checkpoint.require("reward-lora", settings.replace(out=str(tmp_path / "one")))
        shutil.copytree(tmp_path / "one" / "reward-lora", tmp_path / "two" / "reward-lora")
    alone, together = one_and_two(two, "ppo", settings, tmp_path)
    assert [r["response"] for r in alone.samples] == [r["response"] for r in together.samples]
