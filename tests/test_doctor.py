"""The doctor: a healthy machine passes, and every fault it knows is named with its cure."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import json
import sys
import types
from pathlib import Path

import psutil
import pytest

from instruct_llama import presets
from instruct_llama.config import LoopConfig, ModelConfig, OptimConfig, Settings, UserError
from instruct_llama.tools import doctor
from instruct_llama.training import memory

HEALTHY = {  # every probe, as a machine without faults answers it
    "python_version": (3, 11, 7),
    "module_version": "2.13.0+cpu",
    "missing_packages": [],
    "compared_versions": ("as tested", ""),
    "threads_and_cores": (2, 2),
    "device_facts": ("cpu", "Linux x86_64", True),
    "four_bit_error": 0.092,
    "adam_8bit_step": 0.001,
    "memory_available": 16 * 10**9,
    "free_disk": (10 * 10**9, True),
    "tinychat_sample": "What is two plus three?",
    "data_file": "mine.jsonl: 3 dialogs, none dropped.",
    "notebook_numbers": list(range(10)),
}
REAL_DATA_FILE = doctor.data_file


@pytest.fixture
def probes(monkeypatch):
    """Replaces probes: a value is what the probe answers, an exception is what it raises."""

    def replace(**answers):
        for name, answer in answers.items():
            assert hasattr(doctor, name)
            monkeypatch.setattr(doctor, name, _probe(answer))

    replace(**HEALTHY)
    return replace


def _probe(answer):
    def probe(*args):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return probe


def finding(name, settings=None):
    return {found.name: found for found in doctor.examine(settings or Settings())}[name]


def test_a_healthy_machine_passes_every_check(probes, capsys):
    assert doctor.run(Settings()) == 0
    *lines, empty, last = capsys.readouterr().out.splitlines()
    lines, table = lines[: len(doctor.CHECKS)], lines[len(doctor.CHECKS) + 1 :]
    assert table[0] == "Memory of each stage at preset laptop, on its device:"
    assert [line.split()[0] for line in table[1:]] == list(memory.STAGES) and all("GB" in line for line in table[1:])
    assert all(line.startswith("ok   ") and "—" not in line for line in lines)
    assert lines[0] == "ok   python: 3.11.7"
    assert (empty, last) == ("", "Preset laptop can run here. Start with: python -m instruct_llama tour")


@pytest.mark.parametrize("preset", ["gpu", "llama2_7b"])
def test_a_preset_for_real_weights_passes_on_the_card_that_it_is_for(probes, preset, capsys):
    """Nobody pretrains 7 B on it: the weights come from elsewhere, and their shape is what the estimates are of."""
    probes(memory_available={"gpu": 8, "llama2_7b": 24}[preset] * 10**9, free_disk=(90 * 10**9, True),
           device_facts=("cuda", "a GPU", True))  # fmt: skip
    assert doctor.run(presets.get(preset)) == 0
    said = capsys.readouterr().out
    assert f"Start with: python -m instruct_llama sft --preset {preset}" in said and "needed by pretrain" not in said
    probes(memory_available=6 * 10**9)
    assert doctor.run(presets.get(preset)) == 1


def test_a_failure_gives_exit_status_1_and_the_other_checks_still_run(probes, capsys):
    probes(four_bit_error=0.9, python_version=(3, 9, 1))
    assert doctor.run(Settings()) == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(doctor.CHECKS) + 2 + len(memory.STAGES) + 2
    assert out.splitlines()[-1] == f"2 of {len(doctor.CHECKS)} checks failed: python, bitsandbytes 4-bit."


def test_a_finding_is_frozen_and_prints_its_mark():
    found = doctor.Finding("disk", False, "0.1 GB free", "free some space")
    assert str(found) == "FAIL disk: 0.1 GB free — free some space"
    assert str(dataclasses.replace(found, ok=True)) == "warn disk: 0.1 GB free — free some space"
    assert str(dataclasses.replace(found, ok=True, cure="")) == "ok   disk: 0.1 GB free"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.ok = True


FAULTS = [  # check, probe, its answer, what the value says, what the cure says
    ("python", "python_version", (3, 9, 18), "3.9.18", "Python 3.10 to 3.13"),
    ("python", "python_version", (3, 14, 0), "3.14.0", "environment.yml"),
    ("packages", "missing_packages", ["peft", "tyro"], "missing peft, tyro", "python -m pip install -e ."),
    (
        "packages",
        "missing_packages",
        importlib.metadata.PackageNotFoundError("instruct_llama"),
        "itself is not installed",
        "python -m pip install -e .",
    ),
    ("torch", "module_version", "2.5.1", "2.5.1", 'python -m pip install "torch>=2.6,<2.14"'),
    ("torch", "module_version", "2.14.0", "2.14.0", 'python -m pip install "torch>=2.6,<2.14"'),
    (
        "torch",
        "module_version",
        ImportError("No module named 'torch'"),
        "No module named",
        "python -m pip install -e .",
    ),
    ("device", "device_facts", UserError("--device cuda is not available here: …"), "not usable", "--device cuda"),
    ("bitsandbytes 4-bit", "four_bit_error", 0.5, "relative error 0.500", "pip install -U bitsandbytes"),
    ("bitsandbytes 4-bit", "four_bit_error", float("nan"), "relative error nan", "--device cpu"),
    ("bitsandbytes 4-bit", "four_bit_error", ImportError("no kernel"), "no kernel", "python -m pip install -e ."),
    ("sentencepiece", "module_version", ImportError("broken"), "broken", "python -m pip install -e ."),
    ("memory", "memory_available", 10**9, "1.0 GB available", "--preset tiny"),
    ("disk", "free_disk", (10**8, True), "0.1 GB free", "--out DIR"),
    ("disk", "free_disk", (10**12, False), "is not writable", "--out DIR"),
    ("data", "tinychat_sample", ValueError("no words\nat all"), "ValueError: no words", "python -m pip install -e ."),
    ("notebooks", "notebook_numbers", [], "0 found", "folder of the clone"),
    ("notebooks", "notebook_numbers", [0, 1, 2, 4, 6], "03, 05 missing", "git checkout -- notebooks"),
    ("jupyter", "module_version", ImportError("No module named 'jupyterlab'"), "jupyterlab", "python -m pip install"),
]


@pytest.mark.parametrize("check, probe, answer, value, cure", FAULTS)
def test_a_fault_is_named_with_its_cure(probes, check, probe, answer, value, cure):
    probes(**{probe: answer})
    found = finding(check)
    assert not found.ok
    assert value in found.value
    assert cure in found.cure


WARNINGS = [
    ("versions", "compared_versions", ("numpy 3.0 (tested 2.4.6)", "pip install -c"), "numpy 3.0", "pip install -c"),
    ("threads", "threads_and_cores", (1, 8), "1 on 8 cores", "unset OMP_NUM_THREADS"),
    ("threads", "threads_and_cores", (4, 2), "4 on 2 cores", "OMP_NUM_THREADS=2"),
    ("bitsandbytes 8-bit Adam", "adam_8bit_step", 0.0, "moved the weights by 0.0000", "keep optim.kind at adamw"),
    ("bitsandbytes 8-bit Adam", "adam_8bit_step", RuntimeError("no op"), "does not run on cpu: no op", "adamw"),
]


@pytest.mark.parametrize("check, probe, answer, value, cure", WARNINGS)
def test_a_warning_passes_and_says_what_to_do(probes, check, probe, answer, value, cure):
    probes(**{probe: answer})
    found = finding(check)
    assert found.ok
    assert value in found.value
    assert cure in found.cure
    assert doctor.run(Settings()) == 0


def test_one_core_with_one_thread_is_no_warning(probes):
    probes(threads_and_cores=(1, 1))
    assert finding("threads").cure == ""


def test_8bit_adam_fails_only_where_a_stage_asks_for_it(probes):
    probes(adam_8bit_step=RuntimeError("no op"))
    settings = Settings().replace(qlora__optim=OptimConfig(kind="paged_adamw_8bit"))
    assert not finding("bitsandbytes 8-bit Adam", settings).ok


def test_bf16_fails_only_where_a_stage_asks_for_it(probes):
    probes(device_facts=("cuda:0", "Tesla T4", False))
    assert finding("device").ok
    assert finding("device").value == "cuda:0 (Tesla T4), bf16 no"
    for changes in ({"ppo__precision": "bf16"}, {"sft__loop": LoopConfig(precision="bf16")}):
        found = finding("device", Settings().replace(**changes))
        assert not found.ok
        assert "fp16 or fp32" in found.cure


def test_a_preset_that_is_too_large_for_the_memory_fails(probes):
    seven_billion = ModelConfig(
        vocab_size=32_000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11_008, tie_embeddings=False
    )
    assert finding("memory").ok
    assert not finding("memory", Settings(preset="seven_billion", model=seven_billion)).ok
    assert "seven_billion" in finding("memory", Settings(preset="seven_billion", model=seven_billion)).value


def test_the_parameter_count_is_the_published_one():
    llama2_7b = ModelConfig(
        vocab_size=32_000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11_008, tie_embeddings=False
    )
    assert memory.parameter_count(llama2_7b) == 6_738_415_616
    llama3_8b = dataclasses.replace(llama2_7b, vocab_size=128_256, n_kv_heads=8, ffn_dim=14_336)
    assert memory.parameter_count(llama3_8b) == 8_030_261_248


def test_the_data_file_is_read_where_one_is_given(probes):
    assert finding("data").value == "tinychat asks: What is two plus three?"
    assert finding("data", Settings(data="mine.jsonl")).value == "mine.jsonl: 3 dialogs, none dropped."


def test_an_unreadable_data_file_fails_with_the_readers_sentence(probes, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "data_file", REAL_DATA_FILE)
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "hi"}\n{oh\n')
    found = finding("data", Settings(data=str(path)))
    assert not found.ok
    assert "mine.jsonl line 2" in found.cure
    path.write_text(json.dumps({"prompt": "hi"}) + "\n")
    assert finding("data", Settings(data=str(path))).ok


# ---------------------------------------------------------------- the probes themselves, on this machine


def test_the_probes_find_this_machine_fit(tmp_path):
    assert doctor.python_version() == sys.version_info[:3]
    threads, cores = doctor.threads_and_cores()
    assert threads == 1 and cores >= 1
    assert doctor.device_facts("cpu")[0] == "cpu"
    assert 0.05 < doctor.four_bit_error("cpu") < 0.15
    assert doctor.adam_8bit_step("cpu") == pytest.approx(1e-3, rel=0.01)
    assert 10**8 < doctor.memory_available() < 10**14
    free, writable = doctor.free_disk(tmp_path / "not" / "yet" / "there")
    assert free > 0 and writable
    assert doctor.tinychat_sample(1) == doctor.tinychat_sample(1) != ""


def test_a_device_that_is_not_there_is_a_user_error():
    with pytest.raises(UserError, match="--device cuda:99 is not available"):
        doctor.device_facts("cuda:99")


def test_an_out_folder_that_is_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert doctor.free_disk(tmp_path / "file")[1] is False


def test_free_memory_is_what_a_new_process_can_have(monkeypatch):
    """Not what is unused: a system fills that with files that it can drop."""
    said = types.SimpleNamespace(total=9 * 10**9, available=5 * 10**9, free=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: said)
    assert memory.memory_available() == 5 * 10**9
    assert finding("memory").value.startswith("5.0 GB available")
    monkeypatch.setitem(sys.modules, "psutil", None)  # as if it were not installed
    found = finding("memory")
    assert not found.ok and "psutil" in found.value and found.cure == doctor.INSTALL


def test_notebooks_are_counted_in_the_checkout(tmp_path, monkeypatch):
    for folder in ("notebooks", "checkpoints"):
        (tmp_path / folder).mkdir()
    for name in ("00_start_here.ipynb", "02_build_llama.ipynb", "scratch.ipynb"):
        (tmp_path / "notebooks" / name).touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert doctor.notebook_numbers() == [0, 2]


def test_missing_packages_reads_the_projects_own_list(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["pytest>=8", "surely-not-there<2", 'other-extra; extra == "test"'],
    )
    assert doctor.missing_packages() == ["surely-not-there"]


def test_nothing_outside_the_standard_library_is_imported_with_the_module():
    modules = (doctor, memory)
    for node in (node for module in modules for node in ast.parse(Path(module.__file__).read_text("utf-8")).body):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in sys.stdlib_module_names
