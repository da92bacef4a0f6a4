"""What all makers share: notebooks run and tidied, memory and machine in words, tables, and files written whole."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from persres_lite.support.files import whole_file

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("image/png", "image/jpeg")
MAX_BYTES = 1_000_000
"""GitHub shows larger notebooks slowly or not at all."""

TIME_LINE = "**Time and memory:**"

PEAK = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom data.make.runs import peaks\nprint(*peaks())"
"""The last cell of a notebook that is measured."""

GPU_RESULTS = Path("data/results/gpu.json")
"""What `make gpu` measured, once someone has taken it over."""

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGETS_PLACE = "[a widget: run the notebook to move its sliders; a still picture of it stands beside it]"
BAR = re.compile(r"\d+%\|.*\| *\d+/\d+")


def execute(
    notebook: NotebookNode,
    folder: Path,
    env: dict[str, str] | None = None,
    timeout: int = 3600,
    on_cell: Callable[[int, int], None] | None = None,
    allow_errors: bool = False,
) -> NotebookNode:
    """Run a copy of `notebook` in a fresh kernel whose working directory is `folder`, and return the copy with its
    outputs.

    Parameters
    ----------
    env : dict of str to str, optional
        Environment variables for the kernel, added to the present ones. Progress bars are off: they are noise in a
        saved file. On Toybox it computes in one thread, unless the environment says otherwise.
    timeout : int
        Seconds that one cell may take.
    on_cell : callable, optional
        Called with (number, count) before each cell.
    allow_errors : bool
        Whether to go on after a cell that fails.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails; it names the cell.
    """
    result = nbformat.from_dict(notebook)
    for cell in code_cells(result):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(result, timeout=timeout, kernel_name="python3", record_timing=False)
    client.allow_errors, client.resources = allow_errors, {"metadata": {"path": str(folder)}}
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
    peak, gpu = map(int, printed(done.cells.pop()).split())
    tidy(done)
    measured = {"seconds": round(seconds), "peak_gb": round(peak / 1e9, 1), "machine": machine()}
    done.metadata["persres"] = measured | ({"gpu_gb": round(gpu / 1e9, 1)} if gpu else {})
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
                if re.search(r"it/s|%\|", output.data.get("text/plain", "")):
                    continue
                output.data = NotebookNode({"text/plain": WIDGETS_PLACE})
            kept.append(output)
        cell.outputs = kept


def refuse(notebook: NotebookNode) -> None:
    """Raise ValueError if a saved figure is neither PNG nor JPEG or the file is too large."""
    sizes = {}
    for number, cell in enumerate(notebook.cells):
        sizes[number] = len(str(cell.get("outputs", "")))
        for kind in (kind for output in cell.get("outputs", []) for kind in output.get("data", {})):
            if kind.startswith("image/") and kind not in FIGURES:
                raise ValueError(f"cell {number} shows {kind}, but only PNG and JPEG are kept: use course.figures")
    size, worst = len(nbformat.writes(notebook).encode()), max(sizes, key=lambda number: sizes[number])
    if size > MAX_BYTES:
        most = f"the largest output ({sizes[worst]:,}) is that of cell {worst}"
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


def table(notebooks: list[tuple[Path, NotebookNode]], gpu: dict[str, Any] | None = None) -> str:
    """The README's table: a row for each notebook, from its title, its aim and its measurements.

    Parameters
    ----------
    gpu : dict, optional
        The results of `make gpu` (`notebooks.tools.gpu.run`), for one more column.
    """
    rows, machines = [], {}
    for path, notebook in notebooks:
        title, aim = opening(notebook)
        row = [f"[{title}](notebooks/{path.name})", aim, "not run", "not run"]
        if measured := notebook.metadata.get("persres"):
            row[2:] = [f"{measured['seconds'] / 60:.1f}", f"{measured['peak_gb']} GB"]
            machines[measured["machine"]] = True
        if gpu:
            there = gpu["notebooks"].get(path.stem)
            row.append(f"{there['minutes']} minutes, {there['gpu_gb']} GB" if there else "not run")
        rows.append(row)
    heads = ["notebook", "idea", "minutes", "memory", *([f"{gpu['base']} on a GPU"] if gpu else [])]
    where = [*machines, *([f"the last column on {gpu['machine']}"] if gpu else [])]
    said = f"\n\nMeasured on {'; '.join(where)}, from start to end in a fresh kernel." if where else ""
    return markdown(heads, rows) + said


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
    return f"{text.split(begin)[0]}{begin}\n{new}\n{end}{text.split(end)[1]}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [" | ".join(map(str, row)) for row in (heads, *rows)]
    return "\n".join(f"| {line} |" for line in lines).replace("\n", f"\n|{'---|' * len(heads)}\n", 1)


def keep(path: Path, results: Any, text: str) -> None:
    """Write results as ``path.json`` and, as a text, ``path.md``, each whole or not at all."""
    for ending, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text)):
        with whole_file(path.with_name(path.name + ending)) as temporary:
            temporary.write_text(content, encoding="utf-8")


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """The machine in words: cores and processor, and the GPU if torch sees one."""
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    words = f"{os.cpu_count()} cores of {found[1].strip() if found else platform.processor() or platform.machine()}"
    import torch

    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


def reset_peak() -> float:
    """Forget the peak of memory so far, where the system allows it (Linux), and return what it is now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or one that forbids it: then loading counts if it needed more than the steps
        pass
    return resident_peak()


def resident_peak() -> float:
    """The most memory that the process has had since the last `reset_peak`, in bytes."""
    if found := re.search(r"VmHWM:\s+(\d+) kB", _read("/proc/self/status")):
        return 1024.0 * int(found[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


def peaks() -> tuple[int, int]:
    """The most bytes that this process has had in memory, and on a GPU if it has used one."""
    torch = sys.modules.get("torch")
    return int(resident_peak()), torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
