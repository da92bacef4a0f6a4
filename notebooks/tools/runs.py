"""Notebooks in fresh kernels: run, tidied, measured."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from data.make.shared import ROOT, machine

FIGURES = ("image/png", "image/jpeg")
MAX_BYTES = 3_000_000
"""GitHub shows larger notebooks slowly."""

TIME_LINE = "**Time and memory:**"

PEAK = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom data.make.shared import peaks\nprint(*peaks())"
"""The last cell of a notebook that is measured."""

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGETS_PLACE = "[a widget: run the notebook to move its sliders; a still picture of it stands beside it]"
BAR = re.compile(r"\d+%\|.*\| *\d+/\d+")


def execute(
    notebook: NotebookNode, folder: Path, env: dict[str, str] | None = None, allow_errors: bool = False
) -> NotebookNode:
    """Run a copy of `notebook` in a fresh kernel whose working directory is `folder`, and return the copy with its
    outputs.

    Parameters
    ----------
    env : dict of str to str, optional
        Environment variables for the kernel, added to the present ones. Progress bars are off: they are noise in a
        saved file.
    allow_errors : bool
        Whether to go on after a cell that fails.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails; it names the cell.
    KeyboardInterrupt
        If this process is told to end, by SIGINT or SIGTERM: nbclient itself would say that the kernel has died.
    """
    result = nbformat.from_dict(notebook)
    for cell in code_cells(result):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(result, timeout=3600, startup_timeout=600, kernel_name="python3", record_timing=False)
    client.allow_errors, client.resources = allow_errors, {"metadata": {"path": str(folder)}}
    try:
        client.execute(env={**os.environ, "TQDM_DISABLE": "1", **(env or {})})
    except AssertionError:  # it closes the kernel when a signal comes, and then finds none to close
        raise KeyboardInterrupt("the run was ended by a signal") from None
    return result


def run(
    notebook: NotebookNode, folder: Path, env: dict[str, str] | None = None, allow_errors: bool = False
) -> NotebookNode:
    """`execute`, with outputs tidied, and time and peak memory in the copy's ``metadata.persres``."""
    source = nbformat.from_dict(notebook)
    source.cells.append(nbformat.v4.new_code_cell(PEAK))
    started = time.perf_counter()
    done = execute(source, folder, env, allow_errors)
    seconds = time.perf_counter() - started
    peak, gpu = map(int, printed(done.cells.pop()).split())
    tidy(done)
    measured = {"seconds": round(seconds), "peak_gb": round(peak / 1e9, 1), "machine": machine()}
    done.metadata["persres"] = measured | ({"gpu_gb": round(gpu / 1e9, 1)} if gpu else {})
    return done


def run_for_saving(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """`run`, with the measurements written into the opening.

    Raises
    ------
    ValueError
        If a figure is neither PNG nor JPEG, or if the file would be larger than `MAX_BYTES`.
    """
    done = run(notebook, folder)
    line = f"{TIME_LINE} {time_and_memory(done)}."
    for cell in done.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(rf"{re.escape(TIME_LINE)}.*", lambda _: line, cell.source)
    refuse(done)
    return done


def tidy(notebook: NotebookNode) -> None:
    """Make outputs fit for GitHub: no widget state, no progress bars, streams joined."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                # Of each line, what a terminal would show: that after the last carriage return.
                output.text = "\n".join(line.rstrip("\r").split("\r")[-1] for line in output.text.split("\n"))
                if output.name == "stderr" and not BAR.sub("", output.text).strip():
                    continue
                if kept and kept[-1].get("name") == output.name:
                    kept[-1].text += output.text
                    continue
            elif WIDGET in output.get("data", {}):
                output.data = NotebookNode({"text/plain": WIDGETS_PLACE})
            kept.append(output)
        cell.outputs = kept


def refuse(notebook: NotebookNode) -> None:
    """Raise ValueError if a saved figure is neither PNG nor JPEG or the file is too large."""
    for number, cell in enumerate(notebook.cells):
        for kind in (kind for output in cell.get("outputs", []) for kind in output.get("data", {})):
            if kind.startswith("image/") and kind not in FIGURES:
                raise ValueError(f"cell {number} shows {kind}, but only PNG and JPEG are kept: use course.figures")
    sizes = [len(str(cell.get("outputs", ""))) for cell in notebook.cells]
    size, largest = len(nbformat.writes(notebook).encode()), max(sizes)
    if size > MAX_BYTES:
        most = f"the largest output ({largest:,}) is that of cell {sizes.index(largest)}"
        raise ValueError(f"{size:,} bytes, more than {MAX_BYTES:,}: {most}")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode, stream: str = "stdout") -> str:
    """What a cell has printed, joined: a busy kernel sends it in parts."""
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name") == stream)


def time_and_memory(notebook: NotebookNode) -> str:
    """In words, what `run` measured: ``0.4 minutes, 1.2 GB, on 2 cores of an AMD EPYC``."""
    measured = notebook.metadata["persres"]
    gpu = f" and {measured['gpu_gb']} GB on the GPU" if "gpu_gb" in measured else ""
    return f"{measured['seconds'] / 60:.1f} minutes, {measured['peak_gb']} GB{gpu}, on {measured['machine']}"
