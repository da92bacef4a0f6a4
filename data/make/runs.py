"""Run a notebook in a fresh kernel, measure it, and tidy what is saved."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("image/png", "image/jpeg")
MAX_BYTES = 1_000_000
"""GitHub shows larger notebooks slowly or not at all."""

TIME_LINE = "**Time and memory:**"

PEAK = """\
import re, sys
try:
    with open("/proc/self/status") as _file:
        _peak = int(re.search(r"VmHWM:\\s+(\\d+)", _file.read()).group(1)) * 1024
except FileNotFoundError:
    import resource
    _peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
_gpu = 0
if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
    _gpu = sys.modules["torch"].cuda.max_memory_allocated()
print(_peak, _gpu)"""

GPU_RESULTS = Path("data/results/gpu.json")
"""What `make gpu` measured, once someone has taken it over."""

_TAGGED_WIDGET = "[a widget: run the notebook to move its sliders; a still picture of it stands beside it]"


def execute(
    notebook: NotebookNode,
    folder: Path,
    env: dict[str, str] | None = None,
    timeout: int = 1800,
    on_cell: Callable[[int, int], None] | None = None,
) -> NotebookNode:
    """Run a copy of `notebook` in a fresh kernel whose working directory is `folder`, and return the copy with its
    outputs.

    Parameters
    ----------
    env : dict of str to str, optional
        Environment variables for the kernel, added to the present ones. Progress bars are off: they are noise in a
        saved file.
    timeout : int
        Seconds that one cell may take.
    on_cell : callable, optional
        Called with (number, count) before each cell.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails; it names the cell.
    """
    result = nbformat.from_dict(notebook)
    for cell in result.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(result, timeout=timeout, kernel_name="python3", record_timing=False)
    client.resources = {"metadata": {"path": str(folder)}}
    if on_cell:
        client.on_cell_start = lambda cell, cell_index: on_cell(cell_index + 1, len(result.cells))
    client.execute(env={**os.environ, "TQDM_DISABLE": "1", **(env or {})})
    return result


def run(notebook: NotebookNode, folder: Path, on_cell: Callable[[int, int], None] | None = None) -> NotebookNode:
    """Run a notebook for saving: outputs tidied, time and peak memory measured and written into its opening.

    Raises
    ------
    ValueError
        If a figure is neither PNG nor JPEG, or if the file would be larger than `MAX_BYTES`.
    """
    source = nbformat.from_dict(notebook)
    source.cells.append(nbformat.v4.new_code_cell(PEAK))
    started = time.perf_counter()
    done = execute(source, folder, on_cell=on_cell)
    seconds = time.perf_counter() - started
    said = "".join(output.get("text", "") for output in done.cells.pop().outputs)  # a busy kernel sends it in parts
    peak, gpu = (int(word) for word in said.split())
    tidy(done)
    done.metadata["persres"] = {
        "seconds": round(seconds),
        "peak_gb": round(peak / 1e9, 1),
        **({"gpu_gb": round(gpu / 1e9, 1)} if gpu else {}),
        "machine": machine(),
    }
    for cell in done.cells:
        if cell.cell_type == "markdown" and TIME_LINE in cell.source:
            cell.source = re.sub(
                rf"{re.escape(TIME_LINE)}.*", lambda _: f"{TIME_LINE} {time_and_memory(done)}.", cell.source
            )
    refuse(done)
    return done


def tidy(notebook: NotebookNode) -> None:
    """Make outputs fit for GitHub: no widget state, no progress bars, streams joined."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = _last_states(output.text)
                if output.name == "stderr" and not _without_bars(output.text):
                    continue
                if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                    kept[-1].text += output.text
                    continue
            elif "data" in output and "application/vnd.jupyter.widget-view+json" in output.data:
                if "it/s" in output.data.get("text/plain", "") or "%|" in output.data.get("text/plain", ""):
                    continue
                output.data = NotebookNode({"text/plain": _TAGGED_WIDGET})
            kept.append(output)
        cell.outputs = kept


def refuse(notebook: NotebookNode) -> None:
    """Raise ValueError if a saved figure is neither PNG nor JPEG or the file is too large."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            other = [kind for kind in output.get("data", {}) if kind.startswith("image/") and kind not in FIGURES]
            if other:
                raise ValueError(
                    f"cell {number} shows {other[0]}, but only PNG and JPEG figures are kept: use course.figures"
                )
    size = len(nbformat.writes(notebook).encode())
    if size > MAX_BYTES:
        sizes = {number: len(str(cell.get("outputs", ""))) for number, cell in enumerate(notebook.cells)}
        worst = max(sizes, key=lambda number: sizes[number])
        raise ValueError(
            f"{size:,} bytes, more than {MAX_BYTES:,}: the largest output ({sizes[worst]:,}) is that of cell {worst}"
        )


def time_and_memory(notebook: NotebookNode) -> str:
    """In words, what `run` measured: ``0.4 minutes, 1.2 GB, on 2 cores of an AMD EPYC``."""
    measured = notebook.metadata["persres"]
    gpu = f" and {measured['gpu_gb']} GB on the GPU" if "gpu_gb" in measured else ""
    return f"{measured['seconds'] / 60:.1f} minutes, {measured['peak_gb']} GB{gpu}, on {measured['machine']}"


def table(notebooks: list[tuple[Path, NotebookNode]], gpu: dict[str, Any] | None = None) -> str:
    """The README's table: a row for each notebook, from its title, its aim and its measurements.

    Parameters
    ----------
    gpu : dict, optional
        The results of `make gpu` (`notebooks.tools.gpu.run`), for one more column.
    """
    rows = ["| notebook | idea | minutes | memory |", "|---|---|---|---|"]
    if gpu:
        rows = [f"{rows[0]} {gpu['base']} on a GPU |", f"{rows[1]}---|"]
    machines = []
    for path, notebook in notebooks:
        title, aim = opening(notebook)
        measured = notebook.metadata.get("persres")
        minutes, memory = (
            (f"{measured['seconds'] / 60:.1f}", f"{measured['peak_gb']} GB") if measured else ("not run", "not run")
        )
        machines += [measured["machine"]] if measured else []
        rows.append(f"| [{title}](notebooks/{path.name}) | {aim} | {minutes} | {memory} |")
        if gpu:
            there = gpu["notebooks"].get(path.stem)
            rows[-1] += f" {there['minutes']} minutes, {there['gpu_gb']} GB |" if there else " not run |"
    if machines:
        where = [*dict.fromkeys(machines), *([f"the last column on {gpu['machine']}"] if gpu else [])]
        rows += ["", f"Measured on {'; '.join(where)}, from start to end in a fresh kernel."]
    return "\n".join(rows)


def opening(notebook: NotebookNode) -> tuple[str, str]:
    """Title and aim of a notebook: its first heading, and the sentence after ``**Aim:**``.

    Raises
    ------
    ValueError
        If one of them is missing.
    """
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    aim = re.search(r"^\*\*Aim:\*\* (.+)$", text, re.MULTILINE)
    if title is None or aim is None:
        raise ValueError("a notebook opens with a line '# NN · Title' and a line '**Aim:** one sentence'")
    return title.group(1).strip(), aim.group(1).strip()


def between(text: str, name: str, new: str) -> str:
    """`text` with what stands between the two marks called `name` replaced.

    Raises
    ------
    ValueError
        If there is not one mark of each kind.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"there must be one line {begin} and one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """The machine in words: cores and processor, and the GPU if torch sees one."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = match.group(1).strip() if match else processor
    words = f"{os.cpu_count()} cores of {processor}"
    import torch

    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


def _last_states(text: str) -> str:
    """What a terminal would show: of each line only what follows the last carriage return."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def _without_bars(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not re.search(r"\d+%\|.*\| *\d+/\d+", line)).strip()
