"""What is installed, the constraints that are written from it, and what the doctor says of another version."""

from __future__ import annotations

import importlib.metadata

import pytest

from instruct_llama.__main__ import main
from instruct_llama.config import Settings, UserError
from instruct_llama.tools import doctor, versions

NEEDS = {  # package: its requirements
    "instruct-llama": ["torch>=2.6", "Jinja2", 'peft[extra]>=1; extra == "test"', 'sphinx; extra == "docs"',
                       'tomli; python_version < "3"'],
    "torch": ["typing_extensions>=4"], "jinja2": None, "typing-extensions": ["torch"],
    "peft": ['with-extra; extra == "extra"', 'without-extra; extra == "other"', "torch"], "with-extra": [],
    "unrelated": [],
}  # fmt: skip
INSTALLED = {"instruct-llama": "0.1.0", "torch": "2.13.0+cpu", "jinja2": "3.1.6", "typing-extensions": "4.16.0.post1",
             "peft": "0.21.2", "with-extra": "1!2.0", "unrelated": "1.0"}  # fmt: skip
PINS = ["jinja2==3.1.6", "peft==0.21.2", "torch==2.13.0", "typing-extensions==4.16.0.post1", "with-extra==1!2.0"]


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """The versions of an environment that a test may change; the current folder is a checkout without constraints."""
    here = dict(INSTALLED)

    def version(name):
        if name not in here:
            raise importlib.metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(importlib.metadata, "requires", NEEDS.__getitem__)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(versions.platform, "python_version_tuple", lambda: ("3", "11", "7"))
    for folder in ("notebooks", "checkpoints"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return here


def test_what_the_requirements_reach_is_pinned_without_local_tags(packages):
    """Through extras and markers; neither what is installed for something else nor the project itself."""
    assert versions.pins() == PINS


def test_what_is_not_installed_cannot_be_pinned(packages):
    del packages["with-extra"]
    with pytest.raises(UserError, match=r'with-extra is not installed: run `python -m pip install -e "\.\[test\]"`'):
        versions.pins()


def test_the_doctor_writes_the_constraints_and_then_finds_everything_as_tested(packages, tmp_path, capsys):
    assert main(["doctor", "--write-constraints"]) == 0
    path = tmp_path / "constraints.txt"
    assert f"5 versions in {path}" in capsys.readouterr().out
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "doctor --write-constraints" in lines[0] and lines[1:] == ["# python==3.11", *PINS]
    assert all(line.startswith("#") for line in lines[:2])  # pip passes over them
    assert versions.compared_versions() == ("as tested", "")


def test_another_version_is_information_and_no_failure(packages, monkeypatch):
    versions.write_constraints()
    packages.update({"torch": "2.12.1+cu130", "peft": "0.22", "unrelated": "9"})
    del packages["with-extra"]  # installed without the tests
    monkeypatch.setattr(versions.platform, "python_version_tuple", lambda: ("3", "12", "0"))
    said, cure = versions.compared_versions()
    assert said == "python 3.12 (tested 3.11), peft 0.22 (tested 0.21.2), torch 2.12.1 (tested 2.13.0)"
    assert "python -m pip install -c constraints.txt -e ." in cure
    found = doctor.Finding("versions", *doctor.CHECKS["versions"](Settings()))
    assert found.ok and (found.value, found.cure) == (said, cure)


def test_many_differences_are_counted(packages):
    versions.write_constraints()
    packages.update({name: "7" for name in INSTALLED})
    versions_, _ = versions.compared_versions()
    assert versions_.count("(tested") == 5 and "more" not in versions_
    path = versions.project_folder() / "constraints.txt"
    path.write_text(path.read_text() + "unrelated==1.0\ninstruct-llama==1\n")
    assert versions.compared_versions()[0] == f"{versions_} and 2 more"


def test_without_constraints_nothing_is_compared(packages):
    said, cure = versions.compared_versions()
    assert "no constraints.txt" in said and "folder of the clone" in cure


def test_this_environment_can_be_pinned():
    pins = dict(line.split("==") for line in versions.pins())
    assert {"torch", "numpy", "pytest", "jupyterlab"} <= set(pins) and "pip" not in pins
    assert pins["torch"] == importlib.metadata.version("torch").split("+")[0]
