"""`make gpu`: every notebook on Stable Diffusion, on this machine's GPU, checked by nbval.

    python -m notebooks.tools.gpu run [NAME ...]   the notebooks on the base that PERSRES_BASE names, or sd-1.4
    python -m notebooks.tools.gpu table FILE       a run's results.json into data/results and the README's table
    python -m notebooks.tools.gpu estimate         without a GPU: each notebook's minutes on a T4, by counting

`run` writes copies of the notebooks into build/BASE and runs them there, one after the other, whatever fails. Saved
outputs are Toybox's, so a copy is compared only where an output holds on every base (`EVERY_BASE`); every other cell
has to run. Left in that folder: the executed notebooks, and results.json and results.md with the minutes, the peak of
the GPU's memory, what failed, and everything that the notebooks printed, their scores among it.

`estimate` runs every notebook on a narrow U-Net with random weights in SD 1.4's layout, counts the rows that go through
it in sampling and in training, and multiplies by what a row takes on a T4. It writes data/results/t4-estimate.json and
t4-estimate.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from data.make import runs
from notebooks.tools import notebooks
from persres_lite.support.files import whole_file

CHECKED = "nbval-check-output"

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

CELL_SECONDS = 3600
"""What one cell may take: a training at full size is a few minutes on a slow card."""

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

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def copy_for(notebook: NotebookNode, number: str, first: str = "") -> NotebookNode:
    """A copy to run on another base: tags of outputs that are Toybox's are gone, and a last cell measures memory.

    Parameters
    ----------
    number : str
        The notebook's, "05": which of its outputs hold on every base is in `EVERY_BASE`.
    first : str
        Code to run after the set-up, if any.
    """
    result = nbformat.from_dict(notebook)
    for cell in result.cells:
        tags = cell.metadata.get("tags", [])
        if CHECKED in tags and cell.get("id") not in EVERY_BASE.get(number, ()):
            cell.metadata["tags"] = [tag for tag in tags if tag != CHECKED]
    if first:
        result.cells.insert(3, nbformat.v4.new_code_cell(first))
    result.cells.append(nbformat.v4.new_code_cell(runs.PEAK))
    result.metadata.pop("persres", None)
    return result


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
        See `copy_for`.
    env : dict of str to str, optional
        Environment variables for the kernels, added to the present ones.

    Returns
    -------
    dict
        What results.json holds: base, machine, and by notebook its minutes, peak_gb, gpu_gb, number of cells, failed
        cells with the reason, and what was printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = os.pathsep.join(filter(None, (str(notebooks.ROOT), os.environ.get("PYTHONPATH"))))
    kernel = {**os.environ, "PERSRES_BASE": base, "TQDM_DISABLE": "1", "PYTHONPATH": home, **(env or {})}
    results: dict[str, Any] = {"base": Path(base).name, "machine": runs.machine(), "notebooks": {}}
    for position, path in enumerate(paths, start=1):
        print(f"[{position}/{len(paths)}] {path.stem}", flush=True)
        copy = folder / path.name
        nbformat.write(copy_for(notebooks.read(path), path.name[:2], first), copy)
        options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_SECONDS}", "--color=no"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "data.make.kept", *options]
        done = subprocess.run(
            [*command, f"--rootdir={folder}", "-c", os.devnull, "-p", "no:cacheprovider", str(copy)],
            cwd=folder,
            env=kernel,
            capture_output=True,
            text=True,
        )
        results["notebooks"][path.stem] = found = _result(copy, done)
        print("\n".join(f"  {cell}: {why}" for cell, why in found["failed"]) or f"  {_measured(found)}", flush=True)
        _write(folder, results)  # after each, so that a run that is ended has left something
    return results


def _result(copy: Path, done: subprocess.CompletedProcess) -> dict[str, Any]:
    """What a copy that nbval has run says; the measuring cell is taken out of it."""
    book = notebooks.read(copy)
    kept = book.metadata.get("persres", {})
    failed = [[cell, ANSI.sub("", why)] for cell, why in kept.get("failed", [])]
    if done.returncode and not failed:
        said = (done.stdout + done.stderr).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        failed = [["pytest", said[0]]]
    last = book.cells.pop()
    numbers = re.findall(r"\d+", _printed(last))
    peak, gpu = (int(number) for number in numbers) if len(numbers) == 2 else (0, 0)
    runs.tidy(book)
    nbformat.write(book, copy)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    return {
        "minutes": round(kept.get("seconds", 0) / 60, 1),
        "peak_gb": round(peak / 1e9, 1),
        "gpu_gb": round(gpu / 1e9, 1),
        "cells": len(code),
        "compared": sum(CHECKED in cell.metadata.get("tags", []) for cell in code),
        "failed": failed,
        "printed": {cell.get("id", ""): text for cell in code if (text := _printed(cell))},
    }


def _printed(cell: NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")


def _measured(found: dict[str, Any]) -> str:
    return f"{found['minutes']} minutes, {found['gpu_gb']} GB on the GPU, {found['peak_gb']} GB beside it"


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# The notebooks on {results['base']}", "", f"Run by `make gpu` on {results['machine']}.", ""]
    lines += ["| notebook | minutes | GPU | other memory | cells run | outputs compared | failed |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, found in results["notebooks"].items():
        numbers = (found["minutes"], f"{found['gpu_gb']} GB", f"{found['peak_gb']} GB", found["cells"])
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {found['compared']} | {len(found['failed'])} |")
    for name, found in results["notebooks"].items():
        lines += ["", f"## {name}", "", *(f"- **failed**, cell {cell}: {why}" for cell, why in found["failed"])]
        lines += ["", "```text", *(text.rstrip() for text in found["printed"].values()), "```"]
    return "\n".join(lines) + "\n"


def _write(folder: Path, results: dict[str, Any]) -> None:
    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", report(results))):
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def take_over(file: Path, root: Path) -> None:
    """Put a run's results into the project's data, without what was printed, and its GPU column into the README.

    Raises
    ------
    ValueError
        If it was no run on a GPU, or one in which something failed.
    """
    results = json.loads(file.read_text(encoding="utf-8"))
    bad = [name for name, found in results["notebooks"].items() if found["failed"] or not found["gpu_gb"]]
    if bad or not results["notebooks"]:
        why = "are from no whole run on a GPU" + (f" ({', '.join(bad)})" if bad else "")
        raise ValueError(f"The results in {file} {why}: mend that, and run make gpu again.")
    for found in results["notebooks"].values():
        del found["printed"]
    notebooks.write(root / runs.GPU_RESULTS, json.dumps(results, indent=1) + "\n")
    for path, text in notebooks.table_file(root).items():
        notebooks.write(path, text)


def estimate(paths: list[Path], folder: Path) -> dict[str, dict[str, float]]:
    """What the notebooks would take on a T4: by notebook the rows of sampling and training, and the minutes.

    Parameters
    ----------
    paths : list of path
        The notebooks.
    folder : path
        For the base with random weights.
    """
    import torch

    from data.make.full_size import random_pipeline

    narrow = random_pipeline(32, torch.device("cpu"), torch.float32)
    narrow.unet.register_to_config(sample_size=8)  # small pictures: rows are what counts
    narrow.save_pretrained(folder / "sd-1.4-shaped")
    environment = {"PERSRES_BASE": str(folder / "sd-1.4-shaped"), "HF_HUB_OFFLINE": "1"}
    found = {}
    for position, path in enumerate(paths, start=1):
        print(f"[{position}/{len(paths)}] {path.stem}", flush=True)
        book = notebooks.read(path)
        book.cells.insert(3, nbformat.v4.new_code_cell(COUNT))
        book.cells.append(nbformat.v4.new_code_cell("import json\nprint(json.dumps(ROWS))"))
        rows = json.loads(_printed(runs.execute(book, path.parent, env=environment, timeout=CELL_SECONDS).cells[-1]))
        minutes = sum(T4[kind] * count for kind, count in rows.items()) / 60
        found[path.stem] = {**rows, "minutes": round(minutes, 1)}
    return found


def estimate_table(found: dict[str, dict[str, float]]) -> str:
    """What `estimate` found, as Markdown."""
    lines = ["# The notebooks on a T4, counted", ""]
    lines += ["By `python -m notebooks.tools.gpu estimate`; not measured.", ""]
    lines += ["| notebook | rows in sampling | rows in training | minutes |", "|---|---|---|---|"]
    for name, row in found.items():
        lines.append(f"| {name} | {row['sampling']:,} | {row['training']:,} | {row['minutes']} |")
    lines += ["", "A row is one picture in one call of the U-Net, and the seconds it takes are those of `T4` in"]
    lines += ["`notebooks/tools/gpu.py`: " + ", ".join(f"{kind} {seconds}" for kind, seconds in T4.items()) + "."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "estimate"])
    parser.add_argument("names", nargs="*", help="run: only these notebooks (00 05); table: the file results.json")
    options = parser.parse_args(arguments)
    if options.command == "table":
        for name in options.names:
            take_over(Path(name), notebooks.ROOT)
        return 0
    if options.command == "estimate":
        with tempfile.TemporaryDirectory() as place:
            found = estimate(notebooks.notebook_paths(notebooks.ROOT, options.names), Path(place))
        notebooks.write(notebooks.ROOT / "data/results/t4-estimate.json", json.dumps(found, indent=1) + "\n")
        notebooks.write(notebooks.ROOT / "data/results/t4-estimate.md", estimate_table(found))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a GPU that torch can use, and there is none here; make test runs on any machine.")
        return 1
    base = os.environ.get("PERSRES_BASE") or "sd-1.4"
    folder = notebooks.ROOT / "build" / Path(base).name
    results = run(notebooks.notebook_paths(notebooks.ROOT, options.names), base, folder)
    failed = [name for name, found in results["notebooks"].items() if found["failed"]]
    print(f"Written to {folder}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
