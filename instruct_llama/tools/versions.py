"""Comparison of the installed package versions with the required and the tested ones.

`constraints.txt` lists the versions of an environment that passed the tests; pip reads it with `-c`. This module
imports only the standard library, so that the doctor can report missing packages.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re

from ..config import check, project_folder

CONSTRAINTS = "constraints.txt"
_PROJECT = "instruct-llama"
_SHOWN = 5  # maximum number of differences listed


def missing_packages() -> list[str]:
    """The runtime dependencies that are not installed. Raises PackageNotFoundError if the project is not."""
    needed = [line for line in importlib.metadata.requires(_PROJECT) or [] if "extra ==" not in line]
    names = [re.match(r"[\w.-]+", line).group() for line in needed]
    return [name for name in names if not any(importlib.metadata.distributions(name=name))]


def installed(name: str) -> str | None:
    """The version of a package or of "python", without a local build tag ("2.13.0"); None if not installed."""
    if name == "python":
        return ".".join(platform.python_version_tuple()[:2])
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def pins() -> list[str]:
    """All direct and indirect requirements of `.[test]` on this machine, as "name==version", sorted by name.

    Raises UserError for one that is not installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    reached = [(_PROJECT, ""), (_PROJECT, "test")]  # (package, extra)
    for name, extra in reached:  # it grows during the loop
        cure = 'run `python -m pip install -e ".[test]"` in the project folder, then the tests, then this again'
        check(installed(name) is not None, f"{name} is not installed: {cure}.")
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                pairs = ((canonicalize_name(need.name), wanted) for wanted in ("", *sorted(need.extras)))
                reached += [pair for pair in pairs if pair not in reached]
    return [f"{name}=={installed(name)}" for name in sorted({name for name, _ in reached} - {_PROJECT})]


def write_constraints() -> int:
    """Write the installed versions to constraints.txt of this checkout; returns the exit status."""
    command, lines, path = "python -m instruct_llama doctor --write-constraints", pins(), project_folder() / CONSTRAINTS
    head = [f"# The versions that the tests ran with, written by `{command}`, on", f"# python=={installed('python')}"]
    path.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    print(f"{len(lines)} versions in {path}")
    return 0


def compared_versions() -> tuple[str, str]:
    """The packages whose version differs from constraints.txt, and what to do if that causes problems."""
    path = project_folder() / CONSTRAINTS
    if not path.is_file():
        return f"there is no {CONSTRAINTS} to compare with", "run this inside the folder of the clone, where it is"
    tested = re.findall(r"^(?:# )?([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), flags=re.M)
    here = {name: installed(name) for name, _ in tested}  # test requirements may be missing
    other = [f"{name} {here[name]} (tested {version})" for name, version in tested if here[name] not in (None, version)]
    if not other:
        return "as tested", ""
    more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
    return ", ".join(other[:_SHOWN]) + more, f"if something breaks, run `python -m pip install -c {CONSTRAINTS} -e .`"
