"""`make gpu`: every notebook on Stable Diffusion, on this machine's GPU.

    python -m notebooks.tools.gpu run [NAME ...]   the notebooks on the base that PERSRES_BASE names, or sd-1.4
    python -m notebooks.tools.gpu table FILE       a run's results.json into data/results and the README's table
    python -m notebooks.tools.gpu estimate         without a GPU: each notebook's minutes on a T4, by counting

`run` executes copies of the notebooks in build/BASE, one after the other, whatever fails. Saved outputs are Toybox's,
so a copy is compared only where an output holds on every base (`EVERY_BASE`); every other cell has to run. Left in that
folder: the executed notebooks, and results.json and results.md with the minutes, the peak of the GPU's memory, what
failed, and everything that the notebooks printed, their scores among it.

`estimate` runs every notebook on a narrow U-Net with random weights in SD 1.4's layout, counts the rows that go through
it in sampling and in training, and multiplies by what a row takes on a T4. It writes data/results/t4-estimate.json and
t4-estimate.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbformat import NotebookNode

from data.make import runs
from notebooks.tools import notebooks

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

T4 = {"sampling": 0.06, "training": 0.4}
"""Seconds a row of SD 1.4's U-Net takes on a T4 in half precision: 0.12 s for a guided picture's two rows, 1.6 s for a
training step of four. Assumed from what others report; no T4 was at hand."""

COUNT = """\
from diffusers import UNet2DConditionModel

from persres_lite import evaluation

evaluation.PAPER_JUDGES = tuple(str(HOME / "data" / name) for name in evaluation.JUDGES["toybox"])  # nothing is fetched
ROWS = {"sampling": 0, "training": 0}


def counted(forward):
    def call(self, sample, *args, **kwargs):
        result = forward(self, sample, *args, **kwargs)
        ROWS["training" if result[0].requires_grad else "sampling"] += len(sample)
        return result

    return call


UNet2DConditionModel.forward = counted(UNet2DConditionModel.forward)"""


def run(paths: list[Path], base: str, folder: Path, first: str = "", env: dict[str, str] | None = None) -> dict:
    """Run copies of notebooks on a base, in `folder`, and write what came of it there.

    Parameters
    ----------
    paths : list of path
        The notebooks.
    base : str
        A base's name, folder or hub id.
    folder : path
        Where the copies go; what an earlier run left of them is replaced.
    first : str
        Code to run after the set-up, if any.
    env : dict of str to str, optional
        Environment variables for the kernels, added to the present ones.

    Returns
    -------
    dict
        What results.json holds: base, machine, and by notebook its minutes, peak_gb, gpu_gb, number of cells, number
        of those whose output was compared, failed cells with the reason, and what was printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = os.pathsep.join(filter(None, (str(notebooks.ROOT), os.environ.get("PYTHONPATH"))))
    env = {"PERSRES_BASE": base, "PYTHONPATH": home, **(env or {})}
    results: dict[str, Any] = {"base": Path(base).name, "machine": runs.machine(), "notebooks": {}}
    for path in notebooks.counted(paths):
        book = notebooks.read(path)
        cells = [nbformat.v4.new_code_cell(runs.PEAK)]
        book.cells[3:3] = [nbformat.v4.new_code_cell(first)] if first else []
        start = time.perf_counter()
        done = runs.execute(nbformat.from_dict({**book, "cells": book.cells + cells}), folder, env, allow_errors=True)
        found = _result(book, done, EVERY_BASE.get(path.name[:2], ()))
        results["notebooks"][path.stem] = found | {"minutes": round((time.perf_counter() - start) / 60, 1)}
        nbformat.write(done, folder / path.name)
        runs.keep(folder / "results", results, report(results))  # after each: a run that is ended has left something
        said = f"{found['gpu_gb']} GB on the GPU, {found['peak_gb']} GB beside it"
        print("\n".join(f"  {cell}: {why}" for cell, why in found["failed"]) or f"  {said}", flush=True)
    return results


def _result(book: NotebookNode, done: NotebookNode, compared: tuple[str, ...]) -> dict[str, Any]:
    """What a run gave beside what was saved; the measuring cell is taken out of it."""
    peak, gpu = map(int, runs.printed(done.cells.pop()).split() or (0, 0))
    runs.tidy(done)
    done.metadata.pop("persres", None)
    failed = []
    for saved, cell in zip(runs.code_cells(book), runs.code_cells(done), strict=True):
        for output in cell.outputs:
            if output.output_type == "error":
                failed.append([cell.id, f"{output.ename}: {output.evalue}"])
        if cell.id in compared and runs.printed(cell) != runs.printed(saved):
            failed.append([cell.id, "its output is another one than was saved"])
    cells = runs.code_cells(done)
    return {
        "peak_gb": round(peak / 1e9, 1),
        "gpu_gb": round(gpu / 1e9, 1),
        "cells": len(cells),
        "compared": sum(cell.id in compared for cell in cells),
        "failed": failed,
        "printed": {cell.id: text for cell in cells if (text := runs.printed(cell))},
    }


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows, told = [], []
    for name, found in results["notebooks"].items():
        memory = [f"{found['gpu_gb']} GB", f"{found['peak_gb']} GB"]
        rows.append([name, found["minutes"], *memory, found["cells"], found["compared"], len(found["failed"])])
        told += ["", f"## {name}", "", *(f"- **failed**, cell {cell}: {why}" for cell, why in found["failed"])]
        told += ["", "```text", *(text.rstrip() for text in found["printed"].values()), "```"]
    heads = ["notebook", "minutes", "GPU", "other memory", "cells run", "outputs compared", "failed"]
    title = f"# The notebooks on {results['base']}\n\nRun by `make gpu` on {results['machine']}."
    return "\n".join([title, "", runs.markdown(heads, rows), *told, ""])


def take_over(file: Path, root: Path) -> None:
    """Put a run's results into the project's data, without what was printed, and its GPU column into the README.

    Raises
    ------
    ValueError
        If it was no run on a GPU, or one in which something failed.
    """
    results = json.loads(file.read_text(encoding="utf-8"))
    bad = [name for name, found in results["notebooks"].items() if found["failed"] or not found["gpu_gb"]]
    if bad:
        why = f"are from no whole run on a GPU ({', '.join(bad)})"
        raise ValueError(f"The results in {file} {why}: mend that, and run make gpu again.")
    for found in results["notebooks"].values():
        del found["printed"]
    notebooks.write({root / runs.GPU_RESULTS: json.dumps(results, indent=1) + "\n"}, root)
    notebooks.write(notebooks.table_file(root), root)


def estimate(paths: list[Path], folder: Path) -> dict[str, dict[str, float]]:
    """What the notebooks would take on a T4: by notebook the rows of sampling and training, and the minutes.

    Parameters
    ----------
    paths : list of path
        The notebooks.
    folder : path
        For the base with random weights.
    """
    from data.make.bench_runs import random_pipeline

    narrow = random_pipeline(32, torch.device("cpu"), torch.float32)
    narrow.unet.register_to_config(sample_size=8)  # small pictures: rows are what counts
    narrow.save_pretrained(folder / "sd-1.4-shaped")
    env = {"PERSRES_BASE": str(folder / "sd-1.4-shaped"), "HF_HUB_OFFLINE": "1"}
    found = {}
    for path in notebooks.counted(paths):
        book = notebooks.read(path)
        book.cells.insert(3, nbformat.v4.new_code_cell(COUNT))
        book.cells.append(nbformat.v4.new_code_cell("import json\nprint(json.dumps(ROWS))"))
        rows = json.loads(runs.printed(runs.execute(book, path.parent, env).cells[-1]))
        found[path.stem] = rows | {"minutes": round(sum(T4[kind] * count for kind, count in rows.items()) / 60, 1)}
    return found


def estimate_table(found: dict[str, dict[str, float]]) -> str:
    """What `estimate` found, as Markdown."""
    rows = [[name, f"{row['sampling']:,}", f"{row['training']:,}", row["minutes"]] for name, row in found.items()]
    counted = runs.markdown(["notebook", "rows in sampling", "rows in training", "minutes"], rows)
    seconds = ", ".join(f"{kind} {value}" for kind, value in T4.items())
    return (
        "# The notebooks on a T4, counted\n\nBy `python -m notebooks.tools.gpu estimate`; not measured.\n\n"
        f"{counted}\n\nA row is one picture in one call of the U-Net, and the seconds it takes are those of `T4` in\n"
        f"`notebooks/tools/gpu.py`: {seconds}.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "estimate"])
    parser.add_argument("names", nargs="*", help="run: only these notebooks (00 05); table: the file results.json")
    options = parser.parse_args(arguments)
    if options.command == "table":
        take_over(Path(options.names[0]), notebooks.ROOT)
        return 0
    paths = notebooks.notebook_paths(notebooks.ROOT, options.names)
    if options.command == "estimate":
        with tempfile.TemporaryDirectory() as place:
            found = estimate(paths, Path(place))
        runs.keep(notebooks.ROOT / "data/results/t4-estimate", found, estimate_table(found))
        return 0
    if not torch.cuda.is_available():
        print("make gpu needs a GPU that torch can use, and there is none here; make test runs on any machine.")
        return 1
    base = os.environ.get("PERSRES_BASE") or "sd-1.4"
    folder = notebooks.ROOT / "build" / re.sub(r"[^\w.-]+", "-", Path(base).name)
    results = run(paths, base, folder)
    failed = [name for name, found in results["notebooks"].items() if found["failed"]]
    print(f"Written to {folder}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
