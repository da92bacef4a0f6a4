"""Every command and code block of the README.

The programs that it names are called here with the README's own arguments. What `make` starts is run by `make rehearse`
alone, in a fresh clone and small, without mypy, which takes a minute. Conda and JupyterLab have tests of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from notebooks.tools import notebooks
from persres_lite import cli, load_concept
from persres_lite.bases import BASES

ROOT = notebooks.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]


def line(beginning: str) -> str:
    (found,) = [each for each in LINES if each.startswith(beginning)]
    return found


# ------------------------------------------------------------------------------------------------ commands


RUN_BELOW = (
    "git clone ",
    "make demo",
    "make test",
    "conda env create ",
    "conda activate ",
    "jupyter lab",
    ".venv/bin/persres-lite personalize photos/ --class cat ",
    ".venv/bin/persres-lite compare mine.safetensors ",
    ".venv/bin/persres-lite personalize photos/ --class dog ",
    ".venv/bin/persres-lite compare rex.safetensors ",
    "PERSRES_BASE=sd-1.4 make lab",
    ".venv/bin/python -m notebooks.tools.notebooks student",
    ".venv/bin/python -m notebooks.tools.notebooks answers",
    ".venv/bin/python -m notebooks.tools.notebooks slides",
)


def test_every_line_and_block_is_run_below():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "py", "bibtex"}
    assert sorted(line(beginning) for beginning in RUN_BELOW) == sorted(LINES)


@pytest.fixture
def two_steps(monkeypatch):
    """Sampling on Toybox in two steps, so that a command ends soon."""
    monkeypatch.setitem(BASES["toybox"].sampling, "num_inference_steps", 2)


def test_ones_own_photographs(tmp_path, monkeypatch, capsys, two_steps):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, image in enumerate(load_concept("plum-cat").images):
        exif = Image.Exif()
        exif[0x0112] = 6  # as a telephone held upright writes it
        photograph = image.resize((800, 600), Image.Resampling.BICUBIC).rotate(90, expand=True)
        photograph.save(f"photos/IMG_{number:04d}.JPG", exif=exif)
    for what, more in (("personalize photos/ --class cat", ["--steps", "2"]), ("compare mine.safetensors", [])):
        _, *arguments = shlex.split(line(f".venv/bin/persres-lite {what} "))
        assert cli.main([*arguments, *more]) == 0
    said = capsys.readouterr().out
    assert "mine.safetensors" in said and "1 rows" in said and Image.open("mine.png").width > 400


def test_on_stable_diffusion_it_is_the_same_command():
    for what, here, there in (
        ("personalize photos/ --class cat", "class cat", "class dog --base sd-1.4"),
        ("compare mine.", "mine", "rex"),
    ):
        other = line(f".venv/bin/persres-lite {what}").replace(here, there).replace("mine", "rex")
        assert other in LINES


def test_what_a_lecturer_makes(tmp_path, monkeypatch):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    for word, made in {"student": "student", "answers": "answers.md", "slides": "slides.html"}.items():
        _, _, module, *arguments = shlex.split(
            line(f".venv/bin/python -m notebooks.tools.notebooks {word}"), comments=True
        )
        assert module == notebooks.__name__ and notebooks.main(arguments) == 0
        assert (tmp_path / "build" / made).exists()


@pytest.mark.slow
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("git", "make", "bash")) or not (ROOT / ".git").exists(),
    reason="needs git, make and bash, and the tests of a clone",
)
def test_the_two_commands_in_a_fresh_clone(tmp_path):
    """The public address is a bare clone here, and `.venv` has this Python's packages."""
    public, place = tmp_path / "public", tmp_path / "persres-lite"
    subprocess.run(["git", "clone", "--quiet", "--bare", "--depth", "1", ROOT.as_uri(), str(public)], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PERSRES"))}
    address = {"GIT_CONFIG_KEY_0": f"url.{public.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": notebooks.public_address()}

    def run(command: str, folder: Path, **small: str) -> str:
        env = {**clean, **address, "GIT_CONFIG_COUNT": "1", **small}
        done = subprocess.run(["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    assert run(f"{line('git clone ')} && pwd", tmp_path).split()[-1] == str(place)
    binaries = place / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for each in (*Path(sys.prefix).iterdir(), *(Path(sys.prefix) / "bin").iterdir()):
        if each.name not in ("bin", "mypy", ".ready"):
            (place / ".venv" / each.relative_to(sys.prefix)).symlink_to(each)
    (binaries / "mypy").write_text("#!/bin/sh\necho types\n")
    (binaries / "mypy").chmod(0o755)
    (place / ".venv" / ".ready").touch()
    cell = nbformat.v4.new_code_cell("print(1 + 1)", metadata={"tags": ["nbval-check-output"]}, execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", text="2\n")]
    spec = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=spec), place / "small.ipynb")

    assert "LAG" in run(line("make demo"), place, ARGS="--steps 2")
    assert Image.open(place / "build" / "demo.png").width > 400
    said = run(line("make test"), place, ARGS="--quiet tests/test_size.py", NOTEBOOKS="small.ipynb", WORKERS="")
    assert "ruff check ." in said and "\ntypes\n" in said
    assert len(re.findall(r"\d+ passed", said)) == 2, "the tests and the notebooks"


def test_conda_makes_the_environment_that_is_activated():
    """It is not made here, since that is gigabytes: test_packaging compares its versions with those tested."""
    file, name = line("conda env create -f ").split()[-1], line("conda activate ").split()[-1]
    assert f"name: {name}\n" in (ROOT / file).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ code


def test_the_python_block(monkeypatch, two_steps):
    (code,) = [text for language, text in BLOCKS if language == "python"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(BASES["toybox"].recipe, "steps", 2)
    found: dict = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["lag"].masks and str(found["concept"]) == "sks cat"
    assert len(found["residuals"].losses) == 2


def test_the_excerpt_is_of_the_page():
    (code,) = [text for language, text in BLOCKS if language == "py"]
    page = (ROOT / "persres_lite" / "method.py").read_text(encoding="utf-8").splitlines()
    indent = "            "
    assert all(f"{indent}{each}" in page for each in code.splitlines())


def test_the_entry_to_cite_is_the_papers():
    (text,) = [text for language, text in BLOCKS if language == "bibtex"]
    (body,) = re.findall(r"^@inproceedings\{\w+,\n(.*?)^\}$", text, re.MULTILINE | re.DOTALL)
    fields = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", body, re.MULTILINE))
    assert len(fields) == len(body.splitlines()) and {"title", "author", "year"} <= fields.keys()
