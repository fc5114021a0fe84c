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


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput") and "INSTRUCT_LLAMA_OUT" in os.environ:
        shutil.rmtree(os.environ.pop("INSTRUCT_LLAMA_OUT"), ignore_errors=True)
