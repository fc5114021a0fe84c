"""What every test runs under: one thread a worker, the tiny preset, no network, an out folder of its own.

Set before torch is imported, and inherited by the workers of pytest-xdist, by the kernels of the notebooks and by every
command that a test starts.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import settings

os.environ.update(
    OMP_NUM_THREADS="1",  # two workers of two threads each on two cores run seven times slower (P41)
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    INSTRUCT_LLAMA_PRESET="tiny",
    HF_HUB_OFFLINE="1",  # a test that needs the network is a mistake
    INSTRUCT_LLAMA_OFFLINE="1",  # notebook 11 takes a stand-in for the real model
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("INSTRUCT_LLAMA_SEED", None)

settings.register_profile("instruct_llama", derandomize=True, deadline=None, database=None)
settings.load_profile("instruct_llama")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Also where something imported torch before this file was read."""
    import torch

    torch.set_num_threads(1)


def pytest_configure(config):
    """The workers share one out folder: notebooks train each prerequisite once, and nobody's own runs are touched."""
    if not hasattr(config, "workerinput"):  # the process that starts the workers
        os.environ["INSTRUCT_LLAMA_OUT"] = tempfile.mkdtemp(prefix="instruct-llama-tests-")
        # not what this machine's user has fetched from the hub before
        os.environ["HF_HOME"] = os.path.join(os.environ["INSTRUCT_LLAMA_OUT"], "hub")


def pytest_collection_modifyitems(items):
    """Every notebook is slow."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput") and "INSTRUCT_LLAMA_OUT" in os.environ:
        shutil.rmtree(os.environ.pop("INSTRUCT_LLAMA_OUT"), ignore_errors=True)


@pytest.fixture(scope="session")
def micro():
    """The pipeline's smallest settings, under the given folder: every stage takes a second or two."""
    from instruct_llama import presets

    loop = {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_batches": 1, "save_every": 2, "sample_every": 4}

    def make(out, **changes):
        settings = presets.get("tiny").replace(
            out=str(out), seed=1,
            **{f"model__{k}": v for k, v in {"dim": 32, "n_layers": 2, "ffn_dim": 48, "max_seq_len": 160}.items()},
            **{f"world__{k}": v for k, v in {"corpus_chars": 30_000, "demonstrations": 40, "comparisons": 16,
                                             "prompts": 16, "heldout": 12}.items()},
            tokenizer__vocab_size=480, tokenizer__max_chars=30_000, pretrain__seq_len=32, reward__normalise_samples=8,
            **{f"{stage}__loop__{k}": v for stage in ("pretrain", "sft", "qlora", "reward", "dpo")
               for k, v in loop.items()},
            **{f"ppo__{k}": v for k, v in {"iterations": 2, "rollouts_per_iteration": 4,
                                           "generation_batch_size": 4, "max_new_tokens": 8, "mini_batch_size": 2,
                                           "micro_batch_size": 2, "eval_every": 1, "eval_prompts": 4}.items()},
            evaluate__prompts=6, evaluate__max_new_tokens=8,
        )  # fmt: skip
        return settings.replace(**changes)

    return make


@pytest.fixture(scope="session")
def pipeline(micro, tmp_path_factory):
    """Settings whose out folder holds every stage, trained once a worker. Read it; write into a copy."""
    from instruct_llama import require

    settings = micro(tmp_path_factory.mktemp("pipeline") / "runs")
    for stage in ("pretrain", "sft", "sft-qlora", "reward", "ppo"):
        require(stage, settings)
    return settings
