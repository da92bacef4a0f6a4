"""The first cell of every notebook, run for real: alone in an empty folder, and in a clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from persres_lite.course import start as notebook
from persres_lite.maintain import notebooks
from tests.notebook_example import example

ROOT = notebooks.ROOT
CELL = notebooks.first_cell(notebooks.public_address())


def first_code_cell() -> str:
    """That of the first committed notebook; of the example while there is none."""
    paths = notebooks.notebook_paths()
    made = notebooks.read(paths[0]) if paths else example()
    return next(cell.source for cell in made.cells if cell.cell_type == "code")


def run_cell(source: str, folder: Path, python: str = sys.executable, **env: str) -> subprocess.CompletedProcess:
    """Run a cell as a kernel would: its working directory is `folder`, and nothing else is on the path."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PERSRES_BASE", "VIRTUAL_ENV")
    }
    return subprocess.run(
        [python, "-c", source], cwd=folder, env=kept | env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A bare clone of this project, standing for its public address."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and the tests of a clone")
    folder = tmp_path_factory.mktemp("public") / "persres-lite.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(folder)], check=True)
    return folder.as_uri()


@pytest.fixture
def fresh(tmp_path_factory):
    """A fresh environment that has everything but this project: returns its Python and its site-packages folder."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip())
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "persres" not in package.name:  # links: what is there is neither copied nor changed
            (site / package.name).symlink_to(package)
    return str(python), site


def test_alone_in_an_empty_folder_it_fetches_and_installs_the_project(bare, fresh, tmp_path):
    python, site = fresh
    before = {path.name for path in site.iterdir()}
    after = (
        "\nimport persres_lite\n"
        "fetched = here / 'persres-lite'\n"
        "print('from', Path(persres_lite.__file__).is_relative_to(fetched), HOME == fetched)"
    )
    # Without an index pip can install nothing but the project: whatever else the cell wanted would be an error.
    env = {"PERSRES_REPOSITORY": bare, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = run_cell(first_code_cell() + after, tmp_path, python, **env)
    assert done.returncode == 0, done.stderr
    assert "Base: toybox. Device: " in done.stdout and "from True True" in done.stdout
    added = {path.name for path in site.iterdir()} - before
    assert all("persres" in name or name == "__pycache__" for name in added), added
    assert before <= {path.name for path in site.iterdir()}
    if "could not be installed" not in done.stdout:
        assert any(name.startswith("persres_lite-") and name.endswith(".dist-info") for name in added)
    again = run_cell(first_code_cell(), tmp_path, python, PERSRES_REPOSITORY="file:///nowhere", PERSRES_BASE="sd-1.4")
    assert again.returncode == 0, again.stderr  # found, not fetched again
    assert "Base: sd-1.4." in again.stdout


def test_in_a_clone_it_fetches_and_installs_nothing_and_its_first_line_is_the_switch(tmp_path):
    switched = CELL.replace("BASE = None", 'BASE = "sd-1.4"')
    env = {"PERSRES_REPOSITORY": "file:///nowhere", "PERSRES_BASE": "toybox", "PATH": str(tmp_path)}
    done = run_cell(switched, ROOT / "notebooks", **env)
    assert done.returncode == 0 and done.stderr == ""
    assert "Base: sd-1.4. Device: " in done.stdout


def test_an_address_that_does_not_answer_is_said_in_one_sentence(fresh, tmp_path):
    done = run_cell(CELL, tmp_path, fresh[0], PERSRES_REPOSITORY=(tmp_path / "nothing").as_uri())
    assert done.returncode != 0
    assert "RuntimeError: Could not fetch file://" in done.stderr and "is there a network" in done.stderr


def test_requirements_are_missing_only_if_absent_or_too_old():
    wanted = [
        "torch>=99",
        "numpy>=99",
        "ipywidgets<1",
        "pillow>=1",
        "pillow>=9999",
        "no-such-package>=1",
        "old; python_version<'3'",
    ]
    assert notebook.missing_requirements(wanted) == ["pillow>=9999", "no-such-package>=1"]
    assert notebook.missing_requirements(notebook.project_requirements(ROOT)) == []


def test_installing_pins_what_a_running_colab_must_keep(monkeypatch, tmp_path):
    calls = []

    def pip(command):
        calls.append(command[4:])  # after python -m pip install
        if "--constraint" in command:
            calls[-1] = [*command[4:], Path(command[command.index("--constraint") + 1]).read_text()]
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(notebook.subprocess, "run", pip)
    notebook.install(tmp_path, ["peft>=0.17"])
    first, second = calls
    assert "peft>=0.17" in first
    assert [line.split("==")[0] for line in first[-1].splitlines()] == ["torch", "numpy", "ipywidgets"]
    assert "--no-deps" in second and second[-2:] == ["--editable", str(tmp_path)]


def test_what_is_missing_in_a_clone_is_said_and_not_installed(monkeypatch):
    monkeypatch.setattr(notebook, "project_requirements", lambda home: ["no-such-package>=1"])
    monkeypatch.setattr(notebook, "install", lambda home, missing: pytest.fail("nothing may be installed in a clone"))
    with pytest.raises(RuntimeError, match="no-such-package>=1. Run `make lab`"):
        notebook.start()


def test_a_failing_pip_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(notebook.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RuntimeError, match="could not install peft"):
        notebook.install(tmp_path, ["peft"])
