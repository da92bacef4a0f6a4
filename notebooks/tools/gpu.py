"""`make gpu`: every notebook on Stable Diffusion, on this machine's GPU.

    python -m notebooks.tools.gpu [NAME ...]    the notebooks on the base that PERSRES_BASE names, or sd-1.4

Copies of the notebooks are executed in build/BASE, one after the other, whatever fails. Saved outputs are Toybox's, so
a copy is compared only where an output holds on every base (`EVERY_BASE`); every other cell has to run. Left in that
folder: the executed notebooks, and results.json with the minutes, the peak of the GPU's memory, and what failed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbformat import NotebookNode

from data.make.shared import ROOT, machine
from notebooks.tools import notebooks, runs
from persres_lite.support.files import whole_file

EVERY_BASE: dict[str, tuple[str, ...]] = {
    "00": ("c18",),
    "01": ("c56",),
    "02": ("c21", "c26", "c32", "c36"),
    "03": ("c44",),
    "07": ("c17", "c24", "c31"),
}
"""By notebook, the cells (by id) whose checked output is the same on every base and in every precision: identities to
the last bit, and counts. The other checked outputs are Toybox's numbers, comparisons that a base may decide the other
way, or equal within a rounding that was measured in fp32."""


def run(paths: list[Path], base: str, folder: Path) -> dict[str, Any]:
    """Run copies of notebooks on a base, in `folder`, and write what came of it there.

    Parameters
    ----------
    paths : list of path
        The notebooks.
    base : str
        A base's name, folder or hub id.
    folder : path
        Where the copies go; what an earlier run left of them is replaced.

    Returns
    -------
    dict
        What results.json holds: base, machine, and by notebook its minutes, gpu_gb, and failed cells with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    results: dict[str, Any] = {"base": Path(base).name, "machine": machine(), "notebooks": {}}
    for path in notebooks.counted(paths):
        book = notebooks.read(path)
        done = runs.run(book, folder, {"PERSRES_BASE": base, "PYTHONPATH": home}, allow_errors=True)
        measured, failed = done.metadata.pop("persres"), failures(book, done, EVERY_BASE.get(path.name[:2], ()))
        found = {"minutes": round(measured["seconds"] / 60, 1), "gpu_gb": measured.get("gpu_gb", 0), "failed": failed}
        results["notebooks"][path.stem] = found
        nbformat.write(done, folder / path.name)
        with whole_file(folder / "results.json") as unfinished:  # after each: a run that is ended has left something
            unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print("\n".join(f"  {cell}: {why}" for cell, why in failed) or f"  {found['gpu_gb']} GB on the GPU", flush=True)
    return results


def failures(saved: NotebookNode, done: NotebookNode, compared: tuple[str, ...]) -> list[tuple[str, str]]:
    """The cells that ended in an error, and those of `compared` that print something else than was saved."""
    failed, before = [], {cell.id: runs.printed(cell) for cell in runs.code_cells(saved)}
    for cell in runs.code_cells(done):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        failed += [(cell.id, f"{error.ename}: {error.evalue}") for error in errors]
        if cell.id in compared and runs.printed(cell) != before[cell.id]:
            failed.append((cell.id, "its output is another one than was saved"))
    return failed


def main(names: list[str] | None = None) -> int:
    """Run the notebooks whose names begin so, or all; return the exit code."""
    if not torch.cuda.is_available():
        print("make gpu needs a GPU that torch can use, and there is none here; make test runs on any machine.")
        return 1
    base = os.environ.get("PERSRES_BASE") or "sd-1.4"
    folder = ROOT / "build" / re.sub(r"[^\w.-]+", "-", Path(base).name)
    results = run(notebooks.notebook_paths(ROOT, names), base, folder)
    failed = [name for name, found in results["notebooks"].items() if found["failed"]]
    print(f"Written to {folder}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return min(1, len(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
