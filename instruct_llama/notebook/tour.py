"""The tour: execute all notebooks in order, save each as an HTML page, and print the report card."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import latex2mathml.converter
import nbclient
import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from tqdm import tqdm

from ..config import Settings, UserError, check, project_folder, shown
from ..data.files import atomic
from ..evaluation import report as evaluate


def notebooks() -> list[Path]:
    """The numbered notebooks, in order."""
    found = sorted((project_folder() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UserError(f"There are no notebooks under {project_folder()}: run this inside a clone of the project.")
    return found


@contextlib.contextmanager
def notebook_environment(settings: Settings) -> Iterator[None]:
    """A context with the environment variables that pass preset, folder, seed and --real to the notebooks."""
    wanted = {
        "INSTRUCT_LLAMA_PRESET": settings.preset,
        "INSTRUCT_LLAMA_OUT": str(settings.out_dir.resolve()),
        "INSTRUCT_LLAMA_SEED": str(settings.seed),
        "INSTRUCT_LLAMA_STATIC": "1",  # static figures, no widget state in the saved notebooks
        "INSTRUCT_LLAMA_REAL": "1" if getattr(settings, "real", False) else "",  # `Tour` settings only
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def execute(path: Path, bar: tqdm) -> nbformat.NotebookNode:
    """Run one notebook in a fresh kernel, with progress per cell. Raises `CellExecutionError` if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, startup_timeout=300, resources={"metadata": {"path": str(path.parent)}},
        record_timing=False, coalesce_streams=True, extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_executed=lambda **_: bar.update(1 / len(notebook.cells)),
    )  # fmt: skip
    try:
        client.execute()
    finally:  # also when a cell fails
        notebook.metadata.pop("widgets", None)
    return notebook


# Brackets grow only in fonts with a MathML table; these are the common ones.
_FONTS = '<style>math {font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", "STIX Math", math}</style>'


def formula(latex: str, display: Literal["inline", "block"] = "inline") -> str:
    """A LaTeX formula as MathML, which browsers render without JavaScript."""
    made = latex2mathml.converter.convert(latex, display=display)
    spaced = r'<mo form="prefix" lspace="0.167em" rspace="0.167em">\2</mo>'  # TeX's spacing of log, max and others
    return re.sub(r"<m([io])>([a-z]{2,})</m\1>", spaced, made)


class _Renderer(IPythonRenderer):
    """Renders Markdown as HTML, with formulas as MathML."""

    def inline_math(self, body: str) -> str:
        return formula(body)

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def write_page(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write an executed notebook as one HTML page that needs no network and no other file."""
    exporter = HTMLExporter()
    exporter.register_filter("markdown2html", lambda text: MarkdownWithMath(_Renderer(escape=False)).render(text))
    page, _ = exporter.from_notebook_node(notebook)
    head, end, body = page.partition("</head>")
    head = re.sub(r"<script\b.*?</script>", "", head, flags=re.DOTALL)  # MathJax and require.js need the network
    path.write_text(head + _FONTS + end + body, encoding="utf-8")


def run(settings: Settings) -> int:
    """Execute all notebooks; returns 0, or 1 as soon as a cell fails.

    The command line's `Tour` settings add `real`, and `record`, which saves the outputs into the notebooks themselves
    once all have run.
    """
    out, paths, pages, started = settings.out_dir, notebooks(), [], time.perf_counter()
    executed, record = {}, getattr(settings, "record", False)
    there = [folder.name for folder in evaluate.stage_folders(out)] if record else []
    check(not there, f"{shown(out)} holds finished stages ({', '.join(there)}), but --record needs an "
          "empty folder: take another --out, or remove them.")  # fmt: skip
    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)  # notebook 09 writes a new one
    layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
    with (
        notebook_environment(settings),
        tqdm(total=len(paths), bar_format=layout) as bar,
        ThreadPoolExecutor(1) as aside,
    ):
        for path in paths:
            bar.set_description(path.stem)
            clock, at = time.perf_counter(), bar.n
            try:
                notebook = execute(path, bar)
            except nbclient.exceptions.CellExecutionError as error:
                bar.close()
                print(f"{path.name} failed:\n{error}\nOpen it in JupyterLab and run it from the top.")
                return 1
            bar.update(round(at) + 1 - bar.n)
            nbformat.write(notebook, folder / path.name)
            executed[path] = notebook
            pages.append(aside.submit(write_page, notebook, folder / f"{path.stem}.html"))  # beside the next notebook
            bar.write(f"{path.stem}: {time.perf_counter() - clock:.0f} s")
    for page in pages:
        page.result()  # raises the error, if writing failed
    if record:
        for path, notebook in executed.items():
            with atomic(path) as temporary:
                nbformat.write(notebook, temporary, split_lines=False)  # cell text as one string
    written = out / "report.json"
    report = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else evaluate.report_card(settings)
    print("\n" + evaluate.describe(report))
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. Read the pages: {folder}/*.html")
    return 0
