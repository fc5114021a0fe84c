"""The whole story in one command: execute every notebook in order, keep an HTML page of each, grade the result."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbclient
import nbformat
from nbconvert import HTMLExporter
from tqdm import tqdm

from . import evaluate
from .config import Settings, UserError, project_folder


def notebooks() -> list[Path]:
    """The numbered notebooks, in order."""
    found = sorted((project_folder() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UserError(f"There are no notebooks under {project_folder()}: run this inside a clone of the project.")
    return found


@contextlib.contextmanager
def told(settings: Settings) -> Iterator[None]:
    """The environment through which notebooks learn preset, folder and seed; restored afterwards."""
    wanted = {
        "INSTRUCT_LLAMA_PRESET": settings.preset,
        "INSTRUCT_LLAMA_OUT": str(settings.out_dir.resolve()),
        "INSTRUCT_LLAMA_SEED": str(settings.seed),
        "INSTRUCT_LLAMA_STATIC": "1",  # static figures, no widget state in the saved notebooks
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def execute(path: Path, bar: tqdm) -> nbformat.NotebookNode:
    """Run one notebook in a fresh kernel; the bar moves with its cells. Raises `CellExecutionError` if one fails."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, startup_timeout=300, resources={"metadata": {"path": str(path.parent)}},
        record_timing=False, extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_executed=lambda **_: bar.update(1 / len(notebook.cells)),
    )  # fmt: skip
    try:
        client.execute()
    finally:  # a failed notebook is kept too: its traceback is what one wants to see
        notebook.metadata.pop("widgets", None)
    return notebook


def write_page(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write an executed notebook as one HTML page."""
    path.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")


def run(settings: Settings) -> int:
    """Execute all notebooks; returns 0, or 1 as soon as a cell fails."""
    out, paths, pages, started = settings.out_dir, notebooks(), [], time.perf_counter()
    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)  # notebook 09 writes it anew
    layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
    with told(settings), tqdm(total=len(paths), bar_format=layout) as bar, ThreadPoolExecutor(1) as aside:
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
            pages.append(aside.submit(write_page, notebook, folder / f"{path.stem}.html"))  # while the next one starts
            bar.write(f"{path.stem}: {time.perf_counter() - clock:.0f} s")
    for page in pages:
        page.result()  # raises what went wrong in writing it
    written = out / "report.json"
    report = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else evaluate.report_card(settings)
    print("\n" + evaluate.describe(report))
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. Read the pages: {folder}/*.html")
    return 0
