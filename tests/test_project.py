"""The house rules of the project, read off its files: layout, packaging, import directions, sizes, forbidden calls.

Nothing is executed here but git and ruff: the rules are checked on syntax trees, so each failure names file and line.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from instruct_llama.tools import doctor

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings the same parser under its old name
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "instruct_llama"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

TOP_LEVEL = {
    "README.md", "CONTRIBUTING.md", "environment.yml", "pyproject.toml", "constraints.txt", "LICENSE", "notebooks",
    ".pre-commit-config.yaml", "instruct_llama", "data", "checkpoints", "tests", ".ci", ".github", ".gitignore",
}  # fmt: skip
SECOND_LINE = 'python -m pip install -e ".[test]" && python -m pytest -n 2'


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    name = path.relative_to(ROOT).as_posix()
    return f"{name}:{node.lineno}" if node is not None else name


def git(*args: str) -> list[str]:
    """Lines that git prints about this checkout; skips the test where there is none (a downloaded archive)."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    return done.stdout.splitlines()


def report(what: str, offenders: list[str]) -> None:
    """Offenders that are not failures, in pytest's summary."""
    if offenders:
        warnings.warn(f"{what}: {'; '.join(offenders)}", stacklevel=2)


# ---------------------------------------------------------------- layout and packaging


def test_the_top_level_has_the_parts_of_the_house_and_no_others():
    tracked = {line.split("/")[0] for line in git("ls-files")}
    assert tracked <= TOP_LEVEL, f"not part of the house: {sorted(tracked - TOP_LEVEL)}"
    assert all((ROOT / name).exists() for name in TOP_LEVEL - {"README.md", "notebooks"})


def test_git_ignores_what_the_builders_write_and_keeps_the_readmes():
    written = ["data/tinychat.jsonl", "checkpoints/tiny/sft/model.safetensors", "notebooks/.ipynb_checkpoints/a.ipynb"]
    kept = ["data/README.md", "checkpoints/README.md", "instruct_llama/data/sources.py", "tests/test_project.py"]
    assert git("check-ignore", "--no-index", *written, *kept) == written


def test_every_folder_of_the_package_is_a_package():
    folders = {path.parent for path in MODULES}
    assert [place(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_conda_environment_installs_the_project_itself():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    items = [line.strip().removeprefix("- ") for line in lines if line.strip().startswith("- ")]
    assert items == ["conda-forge", "python=3.11", "pip", "pip:", "-e .[test]"]  # nothing is listed twice
    assert "name: instruct-llama" in lines
    assert PROJECT["requires-python"] == ">=3.10,<3.14"


def test_the_doctor_wants_what_pyproject_wants():
    def bounds(low_high: tuple[tuple[int, ...], ...]) -> str:
        low, high = (".".join(map(str, version)) for version in low_high)
        return f">={low},<{high}"

    assert PROJECT["requires-python"] == bounds(doctor.PYTHON)
    assert f"torch{bounds(doctor.TORCH)}" in PROJECT["dependencies"]


def test_the_constraints_hold_every_requirement_in_a_version_that_it_allows():
    first, python, *lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "doctor --write-constraints" in first and re.fullmatch(r"# python==3\.1\d", python)
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted(pins) and all(re.fullmatch(r"[a-z0-9-]+", name) for name in pins)
    assert all(re.fullmatch(r"[\w.!]+", version) for version in pins.values())  # no +cpu, no address
    assert "instruct-llama" not in pins and "pip" not in pins
    for need in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]):
        assert need.specifier.contains(pins[canonicalize_name(need.name)], prereleases=True), need


def test_ci_runs_exactly_the_readmes_second_line_in_a_fresh_environment():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert commands[-1] == SECOND_LINE
    assert commands[0] == "set -euo pipefail"
    assert any(line.startswith("python3 -m venv") for line in commands)
    assert os.name == "nt" or os.access(script, os.X_OK)
    readme = ROOT / "README.md"
    assert not readme.exists() or SECOND_LINE in readme.read_text(encoding="utf-8")


def test_the_workflow_runs_the_same_line_on_every_python_that_is_supported():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ +- run: (.+)$", text, flags=re.M) == [SECOND_LINE]
    (listed,) = re.findall(r"^ +python: \[(.+)\]$", text, flags=re.M)
    supported = SpecifierSet(PROJECT["requires-python"])
    assert listed == ", ".join(f'"3.{minor}"' for minor in range(30) if f"3.{minor}" in supported)


DECLARED_AS = {  # import name -> the requirement that brings it, where the two differ
    "IPython": "ipywidgets", "jupyter_client": "nbclient", "nbformat": "nbclient", "traitlets": "nbclient",
    "_pytest": "pytest", "xdist": "pytest-xdist", "tomli": "pytest", "jinja2": "nbconvert", "httpx": "huggingface_hub",
}  # fmt: skip


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line).group() for line in requirements}


def third_party(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a module that is neither the standard library's nor ours, also inside functions."""
    for node in ast.walk(tree(path)):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [node.module]
        ours = {"instruct_llama", "tests", "tomllib", *(test.stem for test in TESTS)}
        for name in {name.split(".")[0] for name in found} - sys.stdlib_module_names - ours:
            yield node, DECLARED_AS.get(name, name)


def test_what_is_imported_is_declared():
    runtime = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["gguf"])
    testing = runtime | names(PROJECT["optional-dependencies"]["test"])
    wrong = [f"{place(p, node)} {name}" for p in MODULES for node, name in third_party(p) if name not in runtime]
    wrong += [f"{place(p, node)} {name}" for p in TESTS for node, name in third_party(p) if name not in testing]
    assert wrong == []


def test_the_sources_are_python_3_10():
    for path in (*MODULES, *TESTS):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_ruff_finds_nothing():
    folders = ["instruct_llama", "tests", *(["notebooks"] if list(ROOT.glob("notebooks/*.ipynb")) else [])]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words", [("ruff", "format", "--no-cache", "--check", "instruct_llama", "tests"), ("basedpyright",)]
)
def test_the_other_hooks_of_pre_commit_find_nothing(words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_runs_what_the_tests_run():
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks == ["ruff check", "ruff format --check", "basedpyright"]


# ---------------------------------------------------------------- import directions

# Imports run downwards, from a later tier to an earlier one. Inside a tier, files may import each other.
TIERS = (
    {"errors", "model_config", "config", "presets", "seeds", "conformance"},
    {"data", "worlds", "model"},
    {"rlhf"},  # tensors and models in, tensors out
    {"training", "convert", "evaluation"},
    {"stages"},
    {"pipeline"},  # the one place that knows which stage needs which
    {"notebook", "tools"},
    {"__main__", "__init__"},
)
TIER = {part: number for number, parts in enumerate(TIERS) for part in parts}


def part(path: Path) -> str:
    """The layer a file belongs to: its folder in the package, or its own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every layer of the package that a file imports, however it spells it; names for type hints alone do not count."""
    here = ("instruct_llama", *path.relative_to(PACKAGE).with_suffix("").parts)
    hints = [node for node in tree(path).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {inner for node in hints for inner in ast.walk(node)}
    for node in (node for node in ast.walk(tree(path)) if node not in skipped):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            targets = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.Constant) and re.match(r"instruct_llama\.\w+[\w.]*$", str(node.value)):
            targets = [tuple(str(node.value).split("."))]  # importlib.import_module("instruct_llama.stages…")
        for target in targets:
            if target[0] == "instruct_llama" and len(target) > 1:
                yield node, target[1]


def test_imports_point_one_way():
    assert {part(path) for path in MODULES} == set(TIER)
    wrong = [
        f"{place(path, node)} imports {target}"
        for path in MODULES
        for node, target in imported_parts(path)
        if TIER.get(target, -1) > TIER[part(path)]
    ]
    assert wrong == []


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """The package's modules that a file imports, also inside functions; names for type hints alone do not count."""
    here = ("instruct_llama", *path.relative_to(PACKAGE).with_suffix("").parts)
    hints = [node for node in tree(path).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {inner for node in hints for inner in ast.walk(node)}
    found = set()
    for node in (node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node not in skipped):
        base = ".".join([*(here[: -node.level] if node.level else ()), *([node.module] if node.module else [])])
        found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return found & known - {module_name(path)}


def test_no_import_goes_in_circles():
    """A package that hands on what its modules define is no part of a circle: only the modules themselves count."""
    names = {module_name(path): path for path in MODULES if path.name != "__init__.py"}
    edges = {name: imported_modules(path, set(names)) for name, path in names.items()}
    while True:
        free = {name for name, targets in edges.items() if not targets & edges.keys()}
        if not free:
            break
        edges = {name: targets for name, targets in edges.items() if name not in free}
    assert sorted(edges) == []  # each of these imports another of them


def test_no_module_is_imported_by_a_string():
    named = re.compile(r"instruct_llama\.\w+[\w.]*$|\.\w[\w.]*$")
    wrong = [
        place(path, node)
        for path in MODULES
        for name, node in calls(path)
        if name.endswith(("import_module", "__import__")) and named.match(ast.unparse(node.args[0]).strip("f'\""))
    ]
    assert wrong == []


# ---------------------------------------------------------------- sizes


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef) -> int:
    """Lines of a function, its docstring apart."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def statements(path: Path) -> int:
    """Statements on the syntax tree: how a file is broken into lines, and what is documented, does not count."""
    return sum(
        isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.walk(tree(path))
    )


def test_the_package_is_thin():
    sizes = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    report("modules over 350 lines", [f"{name} {n}" for name, n in sizes.items() if n > 350])
    # by contract a single file, so that it can be copied: the language, the measures, the published variants
    assert sizes.pop("instruct_llama/conformance.py") < 780
    assert {name: n for name, n in sizes.items() if n > 440} == {}
    core = [path for path in MODULES if part(path) in ("model", "data", "rlhf") or path.match("training/loop.py")]
    # measured, and 5 % more
    assert sum(map(statements, core)) < 2_180, "the core: model, data, rlhf and the training loop"
    assert sum(map(statements, MODULES)) < 8_385


def test_the_algorithm_of_ppo_fits_on_three_screens():
    assert len((PACKAGE / "rlhf" / "ppo.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_functions_are_short():
    sizes = {f"{place(path, f)} {f.name}": length(f) for path in MODULES for f in functions(path)}
    report("functions over 40 lines", [f"{name} {n}" for name, n in sizes.items() if n > 40])
    assert {name: n for name, n in sizes.items() if n > 60} == {}


def test_public_names_are_documented():
    missing = [place(path) for path in MODULES if path.stat().st_size and not ast.get_docstring(tree(path))]
    for path in MODULES:
        for node in tree(path).body:
            kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            inherits = isinstance(node, ast.ClassDef) and node.bases  # its base says what it is
            if isinstance(node, kinds) and not inherits and node.name[0] != "_" and not ast.get_docstring(node):
                missing.append(f"{place(path, node)} {node.name}")
    assert missing == []


# ---------------------------------------------------------------- forbidden calls


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its function's name as written, "torch.load" for example."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def code_that_reading_could_run(path: Path) -> Iterator[str]:
    """P05: pickle in any guise, and text that becomes code."""
    for node in ast.walk(tree(path)):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        if {name.split(".")[0] for name in imported} & PICKLERS:
            yield f"{place(path, node)} imports a pickler"
    for name, call in calls(path):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in ("torch.save", "eval", "exec"):
            yield f"{place(path, call)} {name}"
        if name == "torch.load" and options.get("weights_only") != "True":
            yield f"{place(path, call)} torch.load without weights_only=True"
        if options.get("allow_pickle", "False") != "False" or options.get("trust_remote_code", "False") != "False":
            yield f"{place(path, call)} {name} allows code"


def loose_loading(path: Path) -> Iterator[str]:
    """P18: a state dict that is loaded without naming what does not fit."""
    for name, call in calls(path):
        strict = [keyword.value for keyword in call.keywords if keyword.arg == "strict"]
        if name.split(".")[-1] == "load_state_dict":
            strict += call.args[1:2]
        if name != "zip" and any(ast.unparse(value) == "False" for value in strict):
            yield f"{place(path, call)} {name} with strict=False"


def environment_at_import(path: Path) -> Iterator[str]:
    """P35: os.environ and os.getenv outside function bodies, where they are read before the process group starts."""
    todo: list[ast.AST] = [tree(path)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).split(".")[-1] in ("environ", "getenv"):
            yield f"{place(path, node)} {ast.unparse(node)}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.Lambda):
            todo += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        else:
            todo += ast.iter_child_nodes(node)


RULES = {
    "p05_reading_files_runs_no_code": code_that_reading_could_run,
    "p18_loading_is_strict": loose_loading,
    "p35_nothing_reads_the_environment_at_import": environment_at_import,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_package_keeps_the_rule(rule):
    assert [offence for path in MODULES for offence in rule(path)] == []


PLANTED = [
    (code_that_reading_could_run, "import pickle", True),
    (code_that_reading_could_run, "from dill import load", True),
    (code_that_reading_could_run, "torch.load(path)", True),
    (code_that_reading_could_run, "torch.load(path, weights_only=False)", True),
    (code_that_reading_could_run, "torch.load(path, weights_only=True)", False),
    (code_that_reading_could_run, "torch.save(state, path)", True),
    (code_that_reading_could_run, "np.load(path, allow_pickle=True)", True),
    (code_that_reading_could_run, "np.load(path, allow_pickle=False)", False),
    (code_that_reading_could_run, "exec(text)", True),
    (code_that_reading_could_run, "model.eval()", False),
    (loose_loading, "model.load_state_dict(state, strict=False)", True),
    (loose_loading, "model.load_state_dict(state, False)", True),
    (loose_loading, "model.load_state_dict(state)", False),
    (loose_loading, "zip(a, b, strict=False)", False),
    (environment_at_import, "RANK = int(os.environ.get('RANK', 0))", True),
    (environment_at_import, "from os import getenv\nRANK = getenv('RANK')", True),
    (environment_at_import, "def f(rank=os.environ['RANK']): pass", True),
    (environment_at_import, "class A:\n    rank = os.environ['RANK']", True),
    (environment_at_import, "if True:\n    os.environ['X'] = '1'", True),
    (environment_at_import, "def f():\n    return os.environ['RANK']", False),
    (environment_at_import, "class A:\n    def f(self):\n        return os.getenv('RANK')", False),
]


@pytest.mark.parametrize("rule, source, caught", PLANTED)
def test_p05_p18_p35_the_rules_catch_planted_mistakes(rule, source, caught, monkeypatch):
    monkeypatch.setitem(globals(), "tree", lambda path: ast.parse(source))
    assert bool(list(rule(PACKAGE / "planted.py"))) is caught


# A path of one machine; the brackets keep this line from finding itself.
MACHINE_PATH = re.compile(r"""(?:^|[\s"'(=`])/(?:[w]ork|[o]pt|[r]oot|[h]ome|[U]sers|[t]mp)/\w""")


def test_no_file_names_a_path_of_one_machine():
    pages = ["README.md", "CONTRIBUTING.md", "pyproject.toml", "environment.yml", "constraints.txt", ".ci/run"]
    pages += ["data/README.md", "checkpoints/README.md", "tests/README.md", ".github/workflows/tests.yml"]
    found = []
    for path in [*(ROOT / page for page in pages), *MODULES, *TESTS, *ROOT.glob("notebooks/*.ipynb")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
            found += [f"{place(path)}:{number} {match.group().strip()}" for match in MACHINE_PATH.finditer(line)]
    assert found == []


# ---------------------------------------------------------------- the guide for contributors


GUIDE = ROOT / "CONTRIBUTING.md"


def defined(path: Path) -> set[str]:
    """What a module defines by name: functions, classes and assignments, and those of a class as `Class.name`."""

    def names_in(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from names_in(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(names_in(tree(path).body))


def named_files(text: str) -> Iterator[tuple[str, Path, str]]:
    """(code, file, name) for each `path.py` and `path.py:name` in backticks; short paths begin in the package."""
    for code in re.findall(r"`([\w./-]+\.(?:py|md|yml|ipynb)(?::[\w.]+)?)`", text):
        path, _, name = code.partition(":")
        here = ROOT / path
        yield code, here if here.is_file() else PACKAGE / path, name


def named_but_missing(text: str) -> list[str]:
    found = (item for item in named_files(text) if "NN_" not in item[0])  # a notebook that is still to be written
    return [code for code, path, name in found if not path.is_file() or (name and name not in defined(path))]


def test_every_file_and_name_in_the_guide_exists_and_its_map_has_every_module():
    text = GUIDE.read_text(encoding="utf-8")
    assert named_but_missing(text) == []
    on_the_map = {path for _, path, _ in named_files("".join(re.findall(r"^\| `.+?\|", text, flags=re.M)))}
    assert [place(path) for path in MODULES if path.name != "__init__.py" and path not in on_the_map] == []


@pytest.mark.parametrize("code", ["rlhf/gone.py", "rlhf/losses.py:gone", "rlhf/rollout.py:gone.kl", "tests/gone.md"])
def test_a_name_that_is_gone_is_found_in_the_guide(code):
    right = "`rlhf/losses.py:gae`, `seeds.py`, `tests/README.md`, `config.py:Settings.seed`, `seeds.py:Key`"
    assert named_but_missing(right) == [] and named_but_missing(f"{right} `{code}`") == [code]


# ---------------------------------------------------------------- the list of pitfalls


PITFALLS = ROOT / "tests" / "README.md"


def pitfalls(name: str) -> set[str]:
    """The numbers of pitfalls in a test's name, or in the id of one of its cases."""
    return set(re.findall(r"(?:^|(?<=_))p(\d\d)(?=_)", name))


def test_the_list_of_pitfalls_agrees_with_the_tests():
    """Every number that a test or a comment cites has an entry, and an entry names all tests with its number."""
    page = PITFALLS.read_text(encoding="utf-8")
    _, *parts = re.split(r"^### P(\d\d) ", page, flags=re.MULTILINE)
    numbers, entries = parts[::2], parts[1::2]
    assert len(set(numbers)) == len(numbers), "a number has two entries"
    listed = {n: set(re.findall(r"`(\w+\.py::[^`]+)`", entry)) for n, entry in zip(numbers, entries, strict=True)}

    tests = ((path, f.name) for path in TESTS for f in functions(path) if f.name.startswith("test_"))
    there = {f"{path.name}::{name}": pitfalls(name) for path, name in tests}
    there |= {f"test_project.py::test_the_package_keeps_the_rule[{rule}]": pitfalls(rule) for rule in RULES}
    sources = [path.read_text(encoding="utf-8") for path in (*MODULES, *TESTS, *ROOT.glob("notebooks/*.py"))]
    cited = set(re.findall(r"\bP(\d\d)\b", "\n".join([page, *sources]))).union(*there.values())

    assert sorted(cited - set(listed)) == [], "cited, but without an entry"
    assert sorted(set().union(*listed.values()) - set(there)) == [], "listed, but there is no such test"
    missing = [f"P{n} {name}" for name, mine in there.items() for n in mine if name not in listed[n]]
    assert missing == [], "not listed in tests/README.md"
    foreign = [f"P{n} {name}" for n, names in listed.items() for name in names if there[name] and n not in there[name]]
    assert foreign == [], "listed under a number that the name does not have"
    assert set(re.findall(r"`(?:tests/)?(\w+\.py)", page)) <= {path.name for path in TESTS}


# ---------------------------------------------------------------- how the tests themselves run


def test_p41_a_test_and_what_it_starts_compute_with_one_thread():
    import torch

    assert torch.get_num_threads() == 1
    command = "import torch; print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_tests_run_at_tiny_and_touch_nobodys_runs():
    from instruct_llama import presets

    settings = presets.get()
    assert settings.preset == "tiny"
    assert not settings.out_dir.resolve().is_relative_to(ROOT)
