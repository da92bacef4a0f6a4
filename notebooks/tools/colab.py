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

from data.make import runs
from notebooks.tools import notebooks

LIBRARIES = ("bases", "training", "localize", "lora", "evaluation")
"""Whose tests show what the libraries do for us."""


def installed() -> dict[str, str]:
    """Name and version of every package here."""
    return {found.metadata["Name"].lower().replace("_", "-"): found.version for found in distributions()}


def listed(root: Path = notebooks.ROOT) -> dict[str, str]:
    """Name and version of every package in the list of Colab's."""
    text = (root / "tests" / "colab-versions.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def complaints(notebook: NotebookNode) -> list[str]:
    """What a run said that it should not: more or less than one line in the first cell, or anything on stderr."""
    found, code = [], runs.code_cells(notebook)
    said = "".join(output.get("text", f"<{output.output_type}>") for output in code[0].outputs)
    if not re.fullmatch(r"Base: toybox\. Device: \w+\. Python [^\n]+\.\n", said):
        found.append(f"the first cell says {said!r}")
    stderr = {number: runs.printed(cell, "stderr").strip() for number, cell in enumerate(code, start=1)}
    return found + [f"code cell {number} complains: {text}" for number, text in stderr.items() if text]


def alone(path: Path, address: str) -> list[str]:
    """Run one notebook alone in an empty folder; returns its complaints."""
    with tempfile.TemporaryDirectory() as folder:
        done = runs.execute(notebooks.read(path), Path(folder), env={"PERSRES_REPOSITORY": address})
        left = sorted(each.name for each in Path(folder).iterdir())
    return complaints(done) + ([] if "persres-lite" in left else [f"the project was not fetched: {left}"])


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
    pairs = [(name, before.get(name), wanted) for name, wanted in listed().items()]
    others = [f"{name} {found} for {wanted}" for name, found, wanted in pairs if found != wanted]
    print("Versions as on Colab" + (f", but {', '.join(others)}." if others else "."), flush=True)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "persres-lite.git"
        subprocess.run(["git", "clone", "--quiet", "--bare", str(notebooks.ROOT), str(bare)], check=True)
        problems += without_installing(bare.as_uri())
        for path in notebooks.counted(notebooks.notebook_paths(names=names)):
            problems += [f"{path.name}: {complaint}" for complaint in alone(path, bare.as_uri())]
    for name in LIBRARIES:
        # diffusers 0.39 refuses even a LoRA file on disk if it is told that there is no network.
        env = {**os.environ, "HF_HUB_OFFLINE": "0" if name == "lora" else "1"}
        tests = [sys.executable, "-m", "pytest", "--quiet", f"tests/test_{name}.py"]
        problems += (
            [f"the tests of {name} failed"] if subprocess.run(tests, cwd=notebooks.ROOT, env=env).returncode else []
        )
    problems += [f"{name} was changed" for name, _ in sorted(set(before.items()) ^ set(installed().items()))]
    print("\n".join(problems) or "all well: nothing was installed, and nothing complained")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
