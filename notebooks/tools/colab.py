"""`make colab`: the notebooks as they run on Colab, with the versions that Colab has.

    build/colab/bin/python -m notebooks.tools.colab [NAME ...]

Each notebook is put alone into an empty folder, and its first cell fetches the project from a local address that stands
for the public one and has what is committed here. Tried as well: the command without an installation, setuptools on
pyproject.toml, and the tests that depend most on the libraries. Nothing of it may install or change a package, and no
notebook may complain.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from nbformat import NotebookNode

from notebooks.tools import notebooks, runs

LIBRARIES = ("bases", "training", "localize", "lora", "evaluation")
"""Whose tests show what the libraries do for us."""


def installed() -> set[tuple[str, str]]:
    """Name and version of every package here."""
    return {(found.metadata["Name"], found.version) for found in distributions()}


def complaints(notebook: NotebookNode) -> list[str]:
    """What a run said that it should not: more or less than one line in the first cell, or anything on stderr."""
    code = runs.code_cells(notebook)
    said = "".join(output.get("text", f"<{output.output_type}>") for output in code[0].outputs)
    one = re.fullmatch(r"Base: toybox\. Device: \w+\. Python [^\n]+\.\n", said)
    stderr = {number: runs.printed(cell, "stderr").strip() for number, cell in enumerate(code, start=1)}
    found = [f"code cell {number} complains: {text}" for number, text in stderr.items() if text]
    return found if one else [f"the first cell says {said!r}", *found]


def alone(path: Path, address: str) -> list[str]:
    """Run one notebook alone in an empty folder; returns its complaints."""
    with tempfile.TemporaryDirectory() as folder:
        done = runs.execute(notebooks.read(path), Path(folder), env={"PERSRES_REPOSITORY": address})
        fetched = (Path(folder) / "persres-lite").exists()
    return complaints(done) + ([] if fetched else ["the project was not fetched"])


def without_installing(address: str) -> list[str]:
    """The command from a clone, and what setuptools reads of the project; returns what failed."""
    read = "import os; os.mkdir('x'); import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel('x')"
    tried = {"the command": ["-m", "persres_lite", "--version"], "setuptools": ["-c", read]}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", address, folder], check=True)
        for what, arguments in tried.items():
            done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
            found += [f"{what}: {done.stderr.strip()}"] if done.returncode else []
    return found


def main(names: list[str] | None = None) -> int:
    """Run everything and print what is wrong; returns the exit code."""
    for variable in ("PYTHONPATH", "PERSRES_BASE"):
        os.environ.pop(variable, None)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # old kernels warn of their own debugger
    before = installed()
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "persres-lite.git"
        source = ["--depth", "1", notebooks.ROOT.as_uri(), str(bare)]
        subprocess.run(["git", "clone", "--quiet", "--bare", *source], check=True)
        problems = without_installing(bare.as_uri())
        for path in notebooks.counted(notebooks.notebook_paths(names=names)):
            problems += [f"{path.name}: {complaint}" for complaint in alone(path, bare.as_uri())]
    # diffusers 0.39 refuses even a LoRA file on disk if it is told that there is no network.
    tests = [sys.executable, "-m", "pytest", "--quiet", *(f"tests/test_{name}.py" for name in LIBRARIES)]
    failed = subprocess.run(tests, cwd=notebooks.ROOT, env={**os.environ, "HF_HUB_OFFLINE": "0"}).returncode
    problems += ["the tests of what depends on the libraries failed"] if failed else []
    problems += [f"{name} was changed" for name, _ in sorted(before ^ installed())]
    print("\n".join(problems) or "all well: nothing was installed, and nothing complained")
    return min(1, len(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
