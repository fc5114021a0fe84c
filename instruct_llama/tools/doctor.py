"""Checks that this machine can run the tutorial, with a cure for each failed check.

`python -m instruct_llama doctor` prints one line per check: ok, warn (works, but read the advice) or FAIL.
Probes collect facts, checks evaluate them. Packages outside the standard library are imported only by the probes that
need them, so a missing package is reported and causes no traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import Settings, UserError, project_folder
from ..training import memory
from ..training.memory import GB, memory_available
from .versions import compared_versions, missing_packages

PYTHON = ((3, 10), (3, 14))  # first supported and first unsupported release, as in pyproject.toml
TORCH = ((2, 6), (2, 14))
PLANNED = (10,)  # notebooks that are not written yet
INSTALL = "run `python -m pip install -e .` in the project folder"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str  # of the check
    ok: bool  # False: the check failed
    value: str  # what was found
    cure: str = ""  # what to do; with ok=True it is a warning

    def __str__(self) -> str:
        mark = "FAIL" if not self.ok else "warn" if self.cure else "ok"
        return f"{mark:4} {self.name}: {self.value}" + (f" — {self.cure}" if self.cure else "")


def run(settings: Settings) -> int:
    """Print every finding; returns the exit status, 1 when a check failed."""
    findings = examine(settings)
    print(*findings, sep="\n")
    print(f"\nMemory of each stage at preset {settings.preset}, on its device:", *memory.table(settings), sep="\n  ")
    failed = [finding.name for finding in findings if not finding.ok]
    if failed:
        print(f"\n{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}.")
        return 1
    start = f"sft --preset {settings.preset}" if settings.weights else "tour"
    print(f"\nPreset {settings.preset} can run here. Start with: python -m instruct_llama {start}")
    return 0


def examine(settings: Settings) -> list[Finding]:
    """The findings of all checks, in a fixed order; a check that raises gives a failed finding."""
    findings = []
    for name, check in CHECKS.items():
        try:
            ok, value, cure = check(settings)
        except ImportError as error:
            ok, value, cure = False, f"cannot be imported ({error})", INSTALL
        except UserError as error:
            ok, value, cure = False, "not usable", str(error)
        except Exception as error:  # no library error may stop the report
            ok, value, cure = False, f"{type(error).__name__}: {error}", f"{INSTALL}; if it stays, report it"
        findings.append(Finding(name, ok, value.partition("\n")[0], cure))
    return findings


# ---------------------------------------------------------------- probes: facts about this machine


def python_version() -> tuple[int, int, int]:
    """The version of the running Python."""
    return sys.version_info[:3]


def module_version(name: str) -> str:
    """The version of a module, as "2.13.0+cpu". Raises ImportError when it cannot be imported."""
    return str(importlib.import_module(name).__version__)


def threads_and_cores() -> tuple[int, int]:
    """The number of torch's threads, and of logical cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return importlib.import_module("torch").get_num_threads(), cores


def device_facts(wanted: str) -> tuple[str, str, bool]:
    """The device that `--device wanted` selects, its model name, and whether it computes in bf16.

    Raises UserError when it is not available.
    """
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {wanted} is not available here: leave --device out, or give --device cpu."
        ) from error
    if device.type == "cuda":
        return str(device), torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        bf16 = bool(((ones @ ones) == 8).all())
    except (RuntimeError, TypeError):
        bf16 = False
    return str(device), f"{platform.system()} {platform.machine()}", bf16


def four_bit_error(device: str) -> float:
    """Relative error of normal weights after an NF4 round trip on the device; about 0.09 for a working library."""
    import torch
    from bitsandbytes import functional

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return float((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())


def adam_8bit_step(device: str) -> float:
    """The mean change of a weight in a first 8-bit Adam step with lr 1e-3, which should equal lr."""
    import torch
    from bitsandbytes.optim import Adam8bit

    weight = torch.nn.Parameter(torch.zeros(64, 128, device=device))  # below 4,096 elements the moments stay 32-bit
    weight.grad = torch.ones_like(weight)
    Adam8bit([weight], lr=1e-3).step()
    return float(weight.detach().abs().mean())


def free_disk(folder: Path) -> tuple[int, bool]:
    """Free bytes on the disk of `folder` (or of its nearest existing parent), and whether it is writable."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder.is_dir() and os.access(folder, os.W_OK)


def tinychat_sample(seed: int) -> str:
    """A prompt of tinychat, after its response has been scored once by the true reward."""
    from ..worlds import tinychat

    *prompt, answer = next(iter(tinychat.demonstrations(seed, 1)))["messages"]
    tinychat.true_reward(prompt, answer["content"])
    return prompt[-1]["content"]


def data_file(path: str) -> str:
    """A sentence that describes a file of records or a public data set. Raises UserError for an unreadable file."""
    from ..data import public_sets, sources

    if path in public_sets.SETS:
        built = (project_folder() / "data" / f"{path}.jsonl").is_file()
        return f"{path} is in data/." if built else f"{path} will be built by the stage that needs it."
    return sources.read(path).describe()


def notebook_numbers() -> list[int]:
    """Numbers of the notebooks of this checkout."""
    return sorted(int(path.name[:2]) for path in (project_folder() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


# ---------------------------------------------------------------- checks: (ok, value, cure)

Verdict = tuple[bool, str, str]


def _verdict(ok: bool, value: str, cure: str) -> Verdict:
    return ok, value, "" if ok else cure


def _check_python(settings: Settings) -> Verdict:
    version = python_version()
    cure = "make an environment with Python 3.10 to 3.13 (environment.yml makes one)"
    return _verdict(PYTHON[0] <= version[:2] < PYTHON[1], ".".join(map(str, version)), cure)


def _check_packages(settings: Settings) -> Verdict:
    try:
        missing = missing_packages()
    except importlib.metadata.PackageNotFoundError:
        return False, "instruct_llama itself is not installed, so notebooks cannot import it", INSTALL
    return _verdict(not missing, f"missing {', '.join(missing)}" if missing else "all installed", INSTALL)


def _check_torch(settings: Settings) -> Verdict:
    version = module_version("torch")
    low, high = (".".join(map(str, bound)) for bound in TORCH)
    ok = TORCH[0] <= tuple(int(part) for part in version.split(".")[:2]) < TORCH[1]
    return _verdict(ok, version, f'run `python -m pip install "torch>={low},<{high}"`')


def _check_threads(settings: Settings) -> Verdict:
    threads, cores = threads_and_cores()
    value = f"{threads} on {cores} cores"
    if threads > cores:
        return True, value, f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other down"
    return True, value, "unset OMP_NUM_THREADS to use all cores" if threads == 1 < cores else ""


def _check_device(settings: Settings) -> Verdict:
    device, model, bf16 = device_facts(settings.device)
    stages = (settings.pretrain.loop, settings.sft.loop, settings.qlora.loop, settings.reward.loop, settings.ppo)
    ok = bf16 or all(stage.precision != "bf16" for stage in stages)
    cure = "this device does not support bf16: set precision to fp16 or fp32"
    return _verdict(ok, f"{device} ({model}), bf16 {'yes' if bf16 else 'no'}", cure)


def _check_4bit(settings: Settings) -> Verdict:
    device, *_ = device_facts(settings.device)
    error = four_bit_error(device)
    cure = "the 4-bit round trip gives wrong weights: run `python -m pip install -U bitsandbytes`, or give --device cpu"
    return _verdict(error < 0.15, f"NF4 round trip on {device}, relative error {error:.3f}", cure)


def _check_8bit(settings: Settings) -> Verdict:
    device, *_ = device_facts(settings.device)
    stages = (settings.pretrain, settings.sft, settings.qlora, settings.reward, settings.ppo)
    needed = any("8bit" in stage.optim.kind for stage in stages)
    try:
        moved = adam_8bit_step(device)
        works, value = abs(moved - 1e-3) < 1e-4, f"a step of lr 0.001 on {device} moved the weights by {moved:.4f}"
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        works, value = False, f"does not run on {device}: {error}"
    return works or not needed, value, "" if works else "keep optim.kind at adamw; the 8-bit kinds only save memory"


def _check_memory(settings: Settings) -> Verdict:
    device, *_ = device_facts(settings.device)
    base = memory.CUDA_CONTEXT if device.startswith("cuda") else 1.5 * GB  # CUDA; Python, torch and a notebook's kernel
    needs = {stage: memory.estimate(settings, stage).total for stage in memory.needed_stages(settings)}
    largest = max(needs, key=needs.__getitem__)
    needed = needs[largest] + base
    available = memory_available(device)
    value = f"{available / GB:.1f} GB available, about {needed / GB:.1f} GB needed by {largest} at {settings.preset}"
    return _verdict(available >= needed, value, "close other programs, or choose a smaller preset: --preset tiny")


def _check_disk(settings: Settings) -> Verdict:
    folder = settings.out_dir
    needed = memory.disk_bytes(settings) + 0.3 * GB  # for notebooks and their pages
    free, writable = free_disk(folder.absolute())
    if not writable:
        return False, f"{folder} is not writable", "choose another folder with --out DIR"
    value = f"{free / GB:.1f} GB free for {folder}, about {needed / GB:.1f} GB needed"
    return _verdict(free >= needed, value, "free some space, or choose another disk with --out DIR")


def _check_data(settings: Settings) -> Verdict:
    name = settings.data or settings.sft.data
    value = data_file(name) if name else f"tinychat asks: {tinychat_sample(settings.seed)}"
    return True, value, ""


def _check_notebooks(settings: Settings) -> Verdict:
    numbers = notebook_numbers()
    gaps = [f"{number:02}" for number in range(max(numbers, default=0)) if number not in (*numbers, *PLANNED)]
    if gaps:
        return False, f"{', '.join(gaps)} missing", "restore them with `git checkout -- notebooks`"
    return _verdict(bool(numbers), f"{len(numbers)} found", "run this inside the folder of the clone, where they are")


def _check_jupyter(settings: Settings) -> Verdict:
    module_version("ipykernel")  # nbclient is slow to import, and checked by "packages"
    return True, f"JupyterLab {module_version('jupyterlab')}, ipywidgets {module_version('ipywidgets')}", ""


CHECKS: dict[str, Callable[[Settings], Verdict]] = {
    "python": _check_python,
    "packages": _check_packages,
    "versions": lambda settings: (True, *compared_versions()),
    "torch": _check_torch,
    "threads": _check_threads,
    "device": _check_device,
    "bitsandbytes 4-bit": _check_4bit,
    "bitsandbytes 8-bit Adam": _check_8bit,
    "sentencepiece": lambda settings: (True, module_version("sentencepiece"), ""),
    "memory": _check_memory,
    "disk": _check_disk,
    "data": _check_data,
    "notebooks": _check_notebooks,
    "jupyter": _check_jupyter,
}
