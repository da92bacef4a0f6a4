"""The first cell of every notebook, run for real: alone in an empty folder, and in a clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from notebooks.tools import notebooks
from persres_lite import cost
from persres_lite.cli import commands, main
from persres_lite.course import start as notebook
from tests.tiny import tiny_pipeline

ROOT = notebooks.ROOT
CELL = notebooks.first_cell(notebooks.public_address())


def run_cell(source: str, folder: Path, python: str = sys.executable, **env: str) -> subprocess.CompletedProcess:
    """Run a cell as a kernel would: its working directory is `folder`, and nothing else is on the path."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PERSRES_BASE", "VIRTUAL_ENV")
    }
    kept |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "advice.detachedHead", "GIT_CONFIG_VALUE_0": "false"}
    return subprocess.run(
        [python, "-c", source],
        cwd=folder,
        env=kept | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A bare clone of this project, standing for its public address."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and the tests of a clone")
    folder = tmp_path_factory.mktemp("public") / "persres-lite.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(folder)], check=True)
    return folder.as_uri()


@pytest.fixture(scope="module")
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


FETCHING = CELL[: CELL.index("from persres_lite.course.start")]
"""The cell up to where it begins to import, which takes many seconds."""


def test_alone_in_an_empty_folder_it_fetches_the_project_and_installs_nothing(bare, fresh, tmp_path):
    python, site = fresh
    before = {path.name for path in site.iterdir()}
    after = (
        "\nimport persres_lite\n"
        "fetched = here / 'persres-lite'\n"
        "print('from', Path(persres_lite.__file__).is_relative_to(fetched), HOME == fetched)"
    )
    env = {"PERSRES_REPOSITORY": bare, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = run_cell(CELL + after, tmp_path, python, **env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found, where = done.stdout.splitlines()  # one line says what it found
    assert found.startswith("Base: toybox. Device: ") and where == "from True True"
    assert {path.name for path in site.iterdir()} - {"__pycache__"} == before - {"__pycache__"}
    again = run_cell(FETCHING, tmp_path, python, PERSRES_REPOSITORY="file:///nowhere")
    assert again.returncode == 0, again.stderr  # found, not fetched again


def test_in_a_clone_it_fetches_and_installs_nothing_and_its_first_line_is_the_switch(tmp_path, monkeypatch, capsys):
    done = run_cell(FETCHING, ROOT / "notebooks", PERSRES_REPOSITORY="file:///nowhere", PATH=str(tmp_path))
    assert done.returncode == 0 and done.stderr == ""
    monkeypatch.setenv("PERSRES_BASE", "toybox")
    exec(CELL.replace("BASE = None", 'BASE = "sd-1.4"'), {})
    assert "Base: sd-1.4. Device: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["persres-lite", "persres-lite.half"])
def test_half_a_clone_of_an_interrupted_run_is_fetched_again(name, bare, fresh, tmp_path):
    (tmp_path / name / ".git").mkdir(parents=True)
    done = run_cell(FETCHING, tmp_path, fresh[0], PERSRES_REPOSITORY=bare)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["persres-lite"]
    assert (tmp_path / "persres-lite" / "persres_lite" / "method.py").exists()


@pytest.mark.parametrize("without", ["an answer", "git"])
def test_what_cannot_be_fetched_is_said_in_one_sentence(without, fresh, tmp_path):
    env = {"PATH": str(tmp_path)} if without == "git" else {}
    done = run_cell(CELL, tmp_path, fresh[0], PERSRES_REPOSITORY=(tmp_path / "nothing").as_uri(), **env)
    assert done.returncode != 0
    assert "RuntimeError: Could not fetch file://" in done.stderr and "is git installed" in done.stderr


def test_what_the_session_had_set_is_undone_and_toybox_computes_in_one_thread(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    threads = torch.get_num_threads()
    try:
        torch.set_default_device("meta")
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        notebook.start("toybox")
        assert torch.get_num_threads() == 2, "as the user has it"
        monkeypatch.delenv("OMP_NUM_THREADS")
        notebook.start("toybox")
        assert torch.get_num_threads() == 1 and torch.zeros(1).device.type == "cpu"
        assert not logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    finally:
        torch.set_default_device(None)
        torch.set_num_threads(threads)
        logging.enable_progress_bar()


def wanted(*lines):
    return [Requirement(line) for line in lines]


def test_requirements_are_missing_only_if_absent_or_too_old():
    lines = ("torch>=99", "numpy>=99", "ipywidgets<1", "pillow>=1", "pillow>=9999", "no-such-package>=1")
    assert notebook.missing_requirements(wanted(*lines)) == wanted("pillow>=9999", "no-such-package>=1")
    assert notebook.missing_requirements(notebook.project_requirements()) == []


WANTED = wanted("torch>=2.4", "diffusers>=99", "transformers>=5.6", "accelerate>=1.0", "pillow>=1", "no-such-package")


def test_one_pip_command_names_all_that_belong_together_and_keeps_what_a_running_colab_needs(monkeypatch, capsys):
    calls = []

    def pip(command):
        assert capsys.readouterr().out, "what is installed is said before"
        calls.append((command[command.index("--constraint") + 2 :], Path(command[6]).read_text()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(notebook.subprocess, "run", pip)
    missing = notebook.missing_requirements(WANTED)
    monkeypatch.setattr(notebook, "_installed", fake_versions(diffusers="0.30", peft="0.20", torch="2.6.0"))
    notebook.install(WANTED, missing)
    notebook.install(WANTED, wanted("no-such-package"))
    together, alone = calls
    assert together[0] == ["diffusers>=99", "transformers>=5.6", "accelerate>=1.0", "no-such-package", "peft"]
    assert together[1] == "torch==2.6.0\n"
    assert alone[0] == ["no-such-package"], "nothing that is not needed"
    monkeypatch.setattr(notebook.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(notebook.NotReady, match="could not install no-such-package"):
        notebook.install(WANTED, wanted("no-such-package"))


def fake_versions(**versions: str):
    return lambda names: {name: versions[name] for name in names if name in versions}


def test_a_version_in_memory_that_does_not_serve_asks_for_a_restart(monkeypatch):
    notebook.refuse_stale(notebook.project_requirements(), installed_now=True)
    old = types.ModuleType("old")
    old.__version__ = "0.30.0"
    monkeypatch.setitem(sys.modules, "tqdm", old)
    with pytest.raises(notebook.NotReady, match=r"tqdm 0.30.0 is still in memory, and \S+ is installed now: restart"):
        notebook.refuse_stale(wanted("tqdm>=4.60"))
    notebook.refuse_stale(wanted("tqdm>=0.1"))  # it serves
    with pytest.raises(notebook.NotReady, match="restart the session"):
        notebook.refuse_stale(wanted("tqdm>=0.1"), installed_now=True)  # other parts would come from the new version
    with pytest.raises(notebook.NotReady, match=r"torch \S+ is installed here, and torch>=99 is needed: update it"):
        notebook.refuse_stale(wanted("torch>=99"))


def test_the_line_names_the_versions_in_memory(monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", "0.39.0.in.memory")
    assert ", diffusers 0.39.0.in.memory, transformers " in notebook.describe("toybox")


def test_in_a_notebook_one_sentence_is_shown_and_no_trace():
    from IPython.core.interactiveshell import InteractiveShell

    shell, shown = InteractiveShell(), []
    shell._showtraceback = lambda kind, error, lines: shown.append(lines)
    shell.run_cell("from persres_lite.course.start import NotReady\nraise NotReady('Do this.')")
    assert shown == [["Do this."]]


def test_what_is_missing_in_a_clone_is_said_and_not_installed(monkeypatch):
    monkeypatch.setattr(notebook, "project_requirements", lambda: wanted("no-such-package>=1"))
    monkeypatch.setattr(notebook, "install", lambda *_: pytest.fail("nothing may be installed in a clone"))
    with pytest.raises(notebook.NotReady, match='run `make lab`.*: pip install "no-such-package>=1"$'):
        notebook.start()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_the_cost_of_stable_diffusion_without_a_gpu_is_said(no_gpu, monkeypatch, capsys):
    notebook.start("sd-1.4")
    line, cost = capsys.readouterr().out.splitlines()
    assert line.startswith("Base: sd-1.4. Device: cpu. ")
    assert cost.startswith("There is no GPU here. On 2 cores, a picture of 512 x 512 pixels takes about 12 minutes and")
    assert "learning a concept about 2.5 hours;" in cost and "Runtime" not in cost
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    notebook.start("sd-1.4")
    assert capsys.readouterr().out.endswith("Choose one under Runtime > Change runtime type.\n")
    notebook.start("toybox")
    assert capsys.readouterr().out.count("\n") == 1


def test_how_large_a_base_is_is_known_before_it_is_loaded(no_gpu, monkeypatch, tmp_path):
    sizes = {"toybox": 128, "sd-1.5": 512, "sd-2.1": 768, "sdxl": 1024, "some/one": 512}
    assert {base: cost.picture_size(base) for base in sizes} == sizes
    tiny_pipeline("sd1").save_pretrained(tmp_path)
    assert cost.picture_size(tmp_path) < cost.LARGE and cost.without_gpu(tmp_path) is None
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": 96}')
    assert "768 x 768" in cost.without_gpu(tmp_path)
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert cost.picture_size(tmp_path) == 512, "what is wrong with it is said when it is loaded"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cost.without_gpu("sd-1.4") is None


def test_the_command_says_it_before_anything_is_fetched(no_gpu, monkeypatch, capsys):
    def load(*_):
        assert "There is no GPU here." in capsys.readouterr().err
        raise OSError("no network")

    monkeypatch.setattr(commands, "load_base", load)
    assert main(["personalize", "plum-cat", "--base", "sd-1.4", "--out", "x.safetensors"]) == 1
