"""Every command and code block of the README.

The programs that it names are called here with the README's own arguments. What `make` and conda start is run only by
`make rehearse`, in a fresh clone and small: conda, which is rarely at hand, is replaced by a function of the same
arguments; JupyterLab, which does not end by itself and has tests of its own, and mypy, which takes a minute, by scripts
that say with what they were called.
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
INLINE = [" ".join(each.split()) for each in re.findall(r"`(make [a-z][^`]*)`", README)]

SMALL = {
    "make demo": {"ARGS": "--steps 2"},
    "make test": {"ARGS": "--quiet tests/test_size.py", "NOTEBOOKS": "small.ipynb", "WORKERS": ""},
}
"""What makes a command small, by its beginning."""

CONDA = """
conda() {
  if [ "$1 $2 $3" = "env create -f" ]; then made=$(sed -n 's/^name: //p' "$4")
  elif [ "$1" = activate ] && [ "$2" = "$made" ]; then export PATH="$PWD/.venv/bin:$PATH"
  else echo "conda does not know: $*" >&2; return 1; fi
}
"""

needs_make = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("git", "make", "bash")) or not (ROOT / ".git").exists(),
    reason="needs git, make and bash, and the tests of a clone",
)


def in_a_clone(test):
    return pytest.mark.slow(needs_make(test))


def line(beginning: str) -> str:
    (found,) = [each for each in LINES if each.startswith(beginning)]
    return found


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """The environment of a user, in which the public address is a bare clone here."""
    public = tmp_path_factory.mktemp("readme") / "public"
    subprocess.run(["git", "clone", "--quiet", "--bare", "--depth", "1", ROOT.as_uri(), str(public)], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PERSRES"))}
    address = {"GIT_CONFIG_KEY_0": f"url.{public.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": notebooks.public_address()}
    return {**clean, **address, "GIT_CONFIG_COUNT": "1", "HF_HUB_OFFLINE": "1"}


def run(command: str, folder: Path, env: dict[str, str], **more: str) -> subprocess.CompletedProcess:
    small = next((extra for beginning, extra in SMALL.items() if command.startswith(beginning)), {})
    env = {**env, **small, **more}
    done = subprocess.run(["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory, env):
    """What the README's first line leaves, with this Python's packages as its `.venv`."""
    folder = tmp_path_factory.mktemp("home")
    place = run(f"{line('git clone ')} && pwd", folder, env).stdout.split()[-1]
    clone = Path(place)
    venv = clone / ".venv"
    (venv / "bin").mkdir(parents=True)
    for each in Path(sys.prefix).iterdir():
        if each.name not in ("bin", ".ready"):
            (venv / each.name).symlink_to(each)
    for each in (Path(sys.prefix) / "bin").iterdir():
        if each.name not in ("persres-lite", "jupyter", "mypy"):
            (venv / "bin" / each.name).symlink_to(each)
    # Scripts name the Python that they were installed for; in this folder that would be another project's.
    command = f'PYTHONPATH={clone} exec {venv}/bin/python -m persres_lite "$@"'
    said = {"jupyter": 'echo "on ${PERSRES_BASE:-toybox}: $*"', "mypy": "echo types"}
    for name, does in {"persres-lite": command, **said}.items():
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (venv / "bin" / name).chmod(0o755)
    (venv / ".ready").touch()
    cell = nbformat.v4.new_code_cell("print(1 + 1)", metadata={"tags": ["nbval-check-output"]}, execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", text="2\n")]
    spec = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=spec), clone / "small.ipynb")
    return clone


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


@needs_make
def test_the_list_of_commands():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"make {command.split()[1]} " in listed for command in INLINE)


@in_a_clone
def test_the_two_commands(clone, env):
    assert "LAG" in run(line("make demo"), clone, env).stdout
    assert Image.open(clone / "build" / "demo.png").width > 400
    said = run(line("make test"), clone, env).stdout
    assert "ruff check ." in said and "\ntypes\n" in said
    assert len(re.findall(r"\d+ passed", said)) == 2, "the tests and the notebooks"


@in_a_clone
def test_the_notebooks_on_another_base(clone, env):
    assert "on sd-1.4: lab " in run(line("PERSRES_BASE=sd-1.4 make lab"), clone, env).stdout


@in_a_clone
def test_conda_to_the_end(clone, env):
    """The environment is not made, since that is gigabytes: test_packaging compares its versions with those tested."""
    (block,) = [text for language, text in BLOCKS if language == "bash" and text.startswith("conda")]
    assert "on toybox: lab" in run(CONDA + block, clone, env).stdout
    made = "\n".join(block.splitlines()[:2])
    for command in re.findall(r"\(with conda, the command is `(.*?)` alone;\nin a clone [^`]*`(.*?)`\)", README)[0]:
        assert run(f"{CONDA}{made}\n{command} --version", clone, env).stdout.startswith("persres-lite ")


@in_a_clone
@pytest.mark.parametrize(
    "command", [each for each in dict.fromkeys(INLINE) if each.split()[1] in ("bench", "pretrain", "results")]
)
def test_long_commands_are_understood(clone, env, command):
    """What takes hours is only asked whether it knows its options; its work has tests of its own."""
    planned = run(command.replace("make", "make -n", 1), clone, env).stdout.splitlines()
    assert "usage: " in run(f"{planned[0]} --help", clone, env).stdout


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
