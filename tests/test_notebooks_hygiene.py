"""The rules of every notebook: how it opens and closes, how long its cells are, and what it never does."""

from __future__ import annotations

import ast
import base64
import copy
import json
import re
import statistics
from pathlib import Path

import pytest

from instruct_llama import presets

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
NAMES = {path.name for path in PATHS}
CLOSING = ("What can go wrong", "Exercises", "Questions", "Saved")
FIRST_ON_THE_MAP = "[00 start here](00_start_here.ipynb)"


def cells(notebook: dict, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def headings(notebook: dict) -> list[str]:
    text = "\n\n".join(cells(notebook, "markdown"))
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return [match.group(1).strip() for match in re.finditer(r"^#{1,4} (.+)$", text, flags=re.M)]


def trees(notebook: dict) -> list[ast.Module]:
    return [ast.parse(source) for source in cells(notebook, "code")]


# Each rule takes a notebook and returns what breaks it: an empty list is a pass.


def opening(notebook: dict, name: str) -> list[str]:
    text = cells(notebook, "markdown")[:2]
    code = cells(notebook, "code")[0]
    title = rf"# {name[:2]} · .+\n\n\S.+[.!?]$"
    wrong = [] if re.fullmatch(title, text[0].strip()) else ["the first cell is not title and one sentence"]
    if [cell["cell_type"] for cell in notebook["cells"][:3]] != ["markdown", "markdown", "code"]:
        wrong.append("it does not open with title, map and setup")
    if len([line for line in code.splitlines() if line.strip()]) > 8 or "presets.get(" not in code:
        wrong.append("the setup cell is over 8 lines, or takes no preset")
    if not ("| preset |" in text[1] and "`tiny`" in text[1] and "`laptop`" in text[1]):
        wrong.append("the table of presets is missing")
    if "You will be able to" not in text[1]:
        wrong.append("what you will be able to do is missing")
    return wrong


def the_map(notebook: dict, name: str) -> list[str]:
    line = cells(notebook, "markdown")[1].splitlines()[0]
    wrong = [] if re.search(rf"\*\*{name[:2]}[^*]*you are here\*\*", line) else ["no 'you are here' on the map"]
    linked = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", line)
    return wrong + [f"the map lacks {n}" for n in sorted(NAMES - {name} - set(linked))]


def links(notebook: dict, name: str) -> list[str]:
    targets = [t for text in cells(notebook, "markdown") for t in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [t.split("#")[0] for t in targets if not t.startswith(("http://", "https://", "#", "attachment:"))]
    return [f"there is no {target}" for target in local if target and not (FOLDER / target).exists()]


def closing(notebook: dict, name: str) -> list[str]:
    have = headings(notebook)
    wrong = [f"there is no section {title}" for title in CLOSING if title not in have]
    text = "\n".join(cells(notebook, "markdown"))
    if text.count("<details>") < 3 or text.count("<details>") != text.count("</details>"):
        wrong.append("fewer than three folded answers, or one that is not closed")
    if not any("compare_with_expected(" in code for code in cells(notebook, "code")):
        wrong.append("the figures are not compared with their expected range")
    following = sorted(n for n in NAMES if n > name)
    if following and following[0] not in cells(notebook, "markdown")[-1]:
        wrong.append("the last cell does not lead to the next notebook")
    return wrong


def code_cell_sizes(notebook: dict, name: str) -> list[str]:
    sizes = [len([line for line in source.splitlines() if line.strip()]) for source in cells(notebook, "code")]
    wrong = [f"code cell {i} has {n} lines" for i, n in enumerate(sizes, 1) if n > 30 or n == 0]
    median = statistics.median(sizes)
    return wrong + ([f"the median of the code cells is {median} lines"] if median > 8 else [])


def words(notebook: dict, name: str) -> list[str]:
    count = sum(len(text.split()) for text in cells(notebook, "markdown"))
    return [] if 1_500 <= count <= 3_000 else [f"it has {count:,} words, not 1,500 to 3,000"]


def ideas_are_short(notebook: dict, name: str) -> list[str]:
    found = [p for text in cells(notebook, "markdown") for p in text.split("\n\n") if p.startswith("**Idea")]
    return [f"an idea of {len(p.split())} words: {p[:40]}" for p in found if len(p.split()) > 80]


def ideas_are_labelled(notebook: dict, name: str) -> list[str]:
    """Every notebook marks its ideas, and all mark them alike."""
    label, text = "**Idea.**", "\n\n".join(cells(notebook, "markdown"))
    wrong = [found for found in re.findall(r"^[*#_ ]*Idea\b[^\w\s]*", text, flags=re.M) if found.strip() != label]
    return wrong + ([f"{text.count(label)} paragraphs begin with {label}"] if text.count(label) < 4 else [])


def no_shell_or_install(notebook: dict, name: str) -> list[str]:
    bad = re.compile(r"^\s*[!%]|get_ipython|os\.system|subprocess|pip\.main", re.M)
    return [match.group().strip() for source in cells(notebook, "code") for match in bad.finditer(source)]


def no_remote_images(notebook: dict, name: str) -> list[str]:
    image = re.compile(r"!\[[^\]]*\]\(\s*(?:https?:)?//[^)]*\)|<img[^>]+src\s*=\s*[\"']?(?:https?:)?//[^>]*>")
    text = "\n".join([*cells(notebook, "markdown"), *cells(notebook, "code"), json.dumps(outputs(notebook))])
    return image.findall(text)


def outputs(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def no_stars_or_dead_code(notebook: dict, name: str) -> list[str]:
    wrong = []
    for tree in trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                wrong.append(f"from {node.module} import *")
            if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Constant) and not node.test.value:
                wrong.append(f"if {node.test.value}")
    return wrong


def every_cell_runs(notebook: dict, name: str) -> list[str]:
    tags = [set(cell["metadata"].get("tags", [])) for cell in notebook["cells"]]
    raised = [output.get("ename") for output in outputs(notebook) if output["output_type"] == "error"]
    return [str(found) for found in tags if found & {"skip-execution", "raises-exception"}] + raised


def no_widget_state(notebook: dict, name: str) -> list[str]:
    views = [o for o in outputs(notebook) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    state = ["widget state in the metadata"] if "widgets" in notebook["metadata"] else []
    return state + ["a widget view"] * len(views)


def no_times(notebook: dict, name: str) -> list[str]:
    return ["a cell carries its execution times" for cell in notebook["cells"] if "execution" in cell["metadata"]]


def no_absolute_paths(notebook: dict, name: str) -> list[str]:
    path = re.compile(r"(?<![\w.:/<])(?:/(?:home|root|Users|work|tmp|mnt|opt|usr|var|content)/\w+|[A-Z]:\\\\?\w+)")
    printed = [json.dumps({k: v for k, v in o.get("data", o).items() if k != "image/png"}) for o in outputs(notebook)]
    return path.findall("\n".join([*cells(notebook, "markdown"), *cells(notebook, "code"), *printed]))


def small_pictures(notebook: dict, name: str) -> list[str]:
    pictures = [o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    sizes = [len(base64.b64decode("".join(p))) for p in pictures]
    return [f"a picture of {n // 1024} kB" for n in sizes if n > 200 * 1024]


def nothing_left_to_fill_in(notebook: dict, name: str) -> list[str]:
    executed = any(cell.get("execution_count") for cell in notebook["cells"])
    return re.findall(r"\{\{[^}]*\}\}", "\n".join(cells(notebook, "markdown"))) if executed else []


def one_code_for_every_preset(notebook: dict, name: str) -> list[str]:
    return [s for s in cells(notebook, "code") if re.search(r"\bif\b.*settings\.preset\b", s)]


def asserts(notebook: dict, name: str) -> list[str]:
    count = sum(isinstance(node, ast.Assert) for tree in trees(notebook) for node in ast.walk(tree))
    return [] if count >= 2 else [f"only {count} assert: what is built is also proved"]


def settings_exist(notebook: dict, name: str) -> list[str]:
    """Settings by keyword (`sft__lora__rank`) and by option (`--sft.lora.rank`), in text and code: exercises too."""
    text, groups = "\n".join(cells(notebook, "markdown") + cells(notebook, "code")), "|".join(vars(presets.get("tiny")))
    found = re.findall(rf"\b(?:{groups})(?:__\w+)+", text) + re.findall(rf"--((?:{groups})(?:\.[\w-]+)+)", text)
    wrong = []
    for setting in found:
        owner = presets.get("tiny")
        for part in setting.replace("__", ".").replace("-", "_").split("."):
            owner = getattr(owner, part, None)
        wrong += [f"there is no setting {setting}"] if owner is None else []
    return wrong


RULES = [opening, the_map, links, closing, code_cell_sizes, words, ideas_are_short, ideas_are_labelled,
         no_shell_or_install, no_remote_images, no_stars_or_dead_code, every_cell_runs, no_widget_state, no_times,
         no_absolute_paths, small_pictures, nothing_left_to_fill_in, one_code_for_every_preset, asserts,
         settings_exist]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_notebook_keeps_the_rule(path, rule):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert rule(notebook, path.name) == []


def test_the_notebooks_are_numbered_without_gaps():
    planned = {10}  # beyond PPO: not written yet
    numbers = [i for i in range(len(PATHS) + len(planned)) if i not in planned]
    assert [path.name[:2] for path in PATHS] == [f"{i:02}" for i in numbers] and len(PATHS) >= 10
    assert {path.name for path in FOLDER.glob("*.ipynb")} == NAMES


# ---------------------------------------------------------------- the rules catch what they are for


def code_cell(source: str, **more) -> dict:
    return {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None, **more}


def text_cell(source: str) -> dict:
    return {"cell_type": "markdown", "source": source, "metadata": {}}


def with_cell(cell: dict, at: int = 5):
    return lambda notebook: notebook["cells"].insert(at, cell)


def edit(at: int, old: str, new: str):
    def change(notebook: dict) -> None:
        source = "".join(notebook["cells"][at]["source"])
        assert old in source
        notebook["cells"][at]["source"] = source.replace(old, new)

    return change


def all_text(old: str, new: str):
    def change(notebook: dict) -> None:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = "".join(cell["source"]).replace(old, new)

    return change


def shown(data: dict) -> dict:
    return code_cell("x", outputs=[{"output_type": "display_data", "data": data, "metadata": {}}])


PLANTED = [
    (opening, edit(2, "print", "a = 1\nb = 2\nc = 3\nd = 4\ne = 5\nf = 6\nprint")),
    (opening, edit(1, "You will be able to", "You will do")),
    (opening, with_cell(text_cell("A second introduction."), at=1)),
    (the_map, edit(1, "you are here", "here")),
    (the_map, edit(1, FIRST_ON_THE_MAP, "")),
    (links, with_cell(text_cell("See [that](99_nowhere.ipynb)."))),
    (closing, all_text("## Exercises", "## More")),
    (closing, all_text("<details>", "")),
    (code_cell_sizes, with_cell(code_cell("x = 1\n" * 31))),
    (code_cell_sizes, with_cell(code_cell(""))),
    (words, with_cell(text_cell("word " * 3_000))),
    (ideas_are_short, with_cell(text_cell("**Idea.** " + "word " * 80))),
    (ideas_are_labelled, with_cell(text_cell("**Idea:** a model predicts."))),
    (ideas_are_labelled, all_text("**Idea.**", "")),
    (no_shell_or_install, with_cell(code_cell("!pip install torch"))),
    (no_shell_or_install, with_cell(code_cell("x = 1\n%matplotlib inline"))),
    (no_remote_images, with_cell(text_cell("![x](https://example.com/x.png)"))),
    (no_remote_images, with_cell(text_cell('<img width="3" src="http://example.com/x.png">'))),
    (no_stars_or_dead_code, with_cell(code_cell("from torch import *"))),
    (no_stars_or_dead_code, with_cell(code_cell("if False:\n    x = 1"))),
    (every_cell_runs, with_cell(code_cell("x", metadata={"tags": ["skip-execution"]}))),
    (every_cell_runs, with_cell(code_cell("x", outputs=[{"output_type": "error", "ename": "NameError"}]))),
    (no_widget_state, with_cell(shown({"application/vnd.jupyter.widget-view+json": {}}))),
    (no_widget_state, lambda notebook: notebook["metadata"].update(widgets={})),
    (no_times, with_cell(code_cell("x", metadata={"execution": {"iopub.execute_input": "2020"}}))),
    (no_absolute_paths, with_cell(code_cell('open("/ho' + 'me/me/x")'))),
    (no_absolute_paths, with_cell(shown({"text/plain": "saved in /" + "tmp/runs/sft"}))),
    (no_absolute_paths, with_cell(shown({"text/plain": "C:\\Users\\me"}))),
    (small_pictures, with_cell(shown({"image/png": base64.b64encode(bytes(300_000)).decode()}))),
    (nothing_left_to_fill_in, with_cell(text_cell("{{minutes}}"))),
    (settings_exist, with_cell(text_cell("Set `sft__lora__targets` to one projection."))),
    (settings_exist, with_cell(text_cell("Run `python -m instruct_llama ppo --ppo.value-clip 0`."))),
    (settings_exist, with_cell(code_cell("settings.replace(ppo__minibatch=8)"))),
    (one_code_for_every_preset, with_cell(code_cell('if settings.preset == "tiny":\n    x = 1'))),
]


@pytest.mark.parametrize("rule, plant", PLANTED, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(PLANTED)])
def test_the_rules_catch_planted_mistakes(rule, plant):
    path = FOLDER / "03_pretrain.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    broken = copy.deepcopy(notebook)
    plant(broken)
    for one in (notebook, broken):
        one["cells"][2]["execution_count"] = 1
    found = rule(broken, path.name)
    assert found and found != rule(notebook, path.name)
