"""The tour: what the notebooks are told, what is recorded, and pages that need no network."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from instruct_llama.__main__ import Tour, main, parse
from instruct_llama.notebook import tour

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CODE = """import os, sys
print("real:", os.environ.get("INSTRUCT_LLAMA_REAL") == "1")
print("aside", file=sys.stderr)
print("and more")"""


def notebook(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return new_notebook(cells=list(cells))


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A small notebook in place of the project's, and a report that is not looked at; returns its path."""
    path = tmp_path / "here" / "00_first.ipynb"
    path.parent.mkdir()
    text = new_markdown_cell("A loss, $-\\log \\sigma(x)$, in *nats*.")
    nbformat.write(notebook(text, new_code_cell(CODE)), path, split_lines=False)
    monkeypatch.setattr(tour, "notebooks", lambda: [path])
    monkeypatch.setattr(tour.evaluate, "report_card", lambda settings: {})
    monkeypatch.setattr(tour.evaluate, "describe", lambda report: "the card")
    return path


def run(tmp_path: Path, *more: str) -> int:
    return main(["tour", "--preset", "tiny", "--out", str(tmp_path / "out"), *more])


def printed(path: Path) -> str:
    outputs = nbformat.read(path, as_version=4).cells[1].outputs
    return "".join(output["text"] for output in outputs if output["name"] == "stdout")


def test_without_options_the_notebooks_stay_as_they_are(told, tmp_path, capsys):
    before = told.read_bytes()
    assert run(tmp_path) == 0 and "the card" in capsys.readouterr().out
    assert told.read_bytes() == before
    made = tmp_path / "out" / "notebooks" / told.name
    assert printed(made) == "real: False\nand more\n" and made.with_suffix(".html").is_file()


def test_record_writes_the_outputs_back_the_same_each_time(told, tmp_path):
    recorded = []
    for _ in range(2):
        assert run(tmp_path, "--record", "--real") == 0
        recorded.append(told.read_bytes())
    assert recorded[0] == recorded[1] and printed(told) == "real: True\nand more\n"
    text = told.read_text(encoding="utf-8")
    assert '"execution"' not in text and "widgets" not in text
    assert '"source": "import os, sys\\n' in text  # one string to a cell, as in the project's notebooks
    assert "INSTRUCT_LLAMA_REAL" not in os.environ


def test_without_real_the_environments_own_does_not_count(told, tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCT_LLAMA_REAL", "1")
    assert run(tmp_path) == 0
    assert printed(tmp_path / "out" / "notebooks" / told.name) == "real: False\nand more\n"
    assert os.environ["INSTRUCT_LLAMA_REAL"] == "1"


def test_a_tour_that_fails_records_nothing(told, tmp_path, monkeypatch, capsys):
    before, last = told.read_bytes(), told.with_name("01_second.ipynb")

    def execute(path: Path, bar: object) -> nbformat.NotebookNode:
        if path == last:
            raise tour.nbclient.exceptions.CellExecutionError("Traceback: boom", "ValueError", "boom")
        return notebook(new_code_cell("executed"))

    monkeypatch.setattr(tour, "notebooks", lambda: [told, last])
    monkeypatch.setattr(tour, "execute", execute)
    assert run(tmp_path, "--record") == 1 and "01_second.ipynb failed" in capsys.readouterr().out
    assert told.read_bytes() == before


def test_a_tour_refuses_settings_of_which_the_notebooks_know_nothing(told, tmp_path, capsys):
    for more, said in (
        (["--sft.optim.lr", "1", "--device", "cpu", "--seed", "2"], "know nothing of --device, --sft.optim.lr: leave"),
        (["--resume"], "know nothing of --resume"),
        (["--overwrite"], f"to train them anew, give another --out, or remove them from {tmp_path / 'out'}"),
    ):
        assert run(tmp_path, *more) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, "--seed", "2", "--real") == 0


def test_what_is_recorded_comes_from_one_run_from_nothing(told, tmp_path, pipeline, capsys):
    shutil.copytree(Path(pipeline.out) / "sft", tmp_path / "out" / "sft")
    before = told.read_bytes()
    assert run(tmp_path, "--record") == 2
    assert f"{tmp_path / 'out'} holds finished stages (sft)" in (said := capsys.readouterr().err)
    assert "take another --out, or remove them" in said and told.read_bytes() == before
    assert run(tmp_path) == 0  # they are used again


def test_the_tours_own_options_are_no_settings_of_a_run():
    settings = parse(["sft", "--preset", "tiny"])
    assert parse(["tour", "--preset", "tiny", "--record", "--real"]) == Tour(**vars(settings), record=True, real=True)
    assert not {"record", "real"} & set(vars(settings))


# ---------------------------------------------------------------- pages


def page_of(cells: list[nbformat.NotebookNode], path: Path) -> str:
    tour.write_page(notebook(*cells), path)
    return path.read_text(encoding="utf-8")


def test_a_page_needs_no_network_and_no_script(tmp_path):
    kept = new_output("display_data", {"text/html": '<script>var mine = "$5 and $6";</script>', "text/plain": "x"})
    page = page_of([new_markdown_cell("$$x^2$$"), new_code_cell("x", outputs=[kept])], tmp_path / "page.html")
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*https?:", page)
    assert not re.findall(r"(?:import|url)\s*\(?\s*[\"']?https?:", page)
    assert re.findall(r"<script[^>]*>", page) == ["<script>"] and '"$5 and $6"' in page  # an output's own


def test_formulas_are_drawn_by_the_browser(tmp_path):
    text = "A $\\frac{a}{b}$ in `$code$`, \\$5:\n\n$$\\beta\\log Z \\le \\max_i x_i$$\n\n```\n$x$\n```\n"
    page = page_of([new_markdown_cell(text)], tmp_path / "page.html")
    assert page.count("<math") == 2 and page.count('display="block"') == 1
    assert "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>" in page
    assert "$code$" in page and "$x$" in page and "\\frac" not in page
    assert 'rspace="0.167em">log</mo><mi>Z</mi>' in page and 'rspace="0.167em">max</mo><mi>i</mi>' in page


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem[:2])
def test_every_formula_of_the_notebooks_is_understood(path):
    """No command is left as text."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.DOTALL)
            for block, inline in re.findall(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)\$", text, re.DOTALL):
                made = tour.formula(block or inline, "block" if block else "inline")
                assert made.startswith("<math") and "\\" not in made, block or inline
