"""What stands in two places is equal, and nothing in the project belongs to one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import persres_lite
from notebooks.tools import links, notebooks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = notebooks.ROOT
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}

EARLIER_COLAB = {"torch": "2.6.0", "numpy": "2.0.2", "ipywidgets": "7.7.1"}
"""What a Colab session had loaded from the spring of 2025 on; an installation must be content with it, too."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*groups: list[str]) -> dict[str, SpecifierSet]:
    return {canonical(one.name): one.specifier for group in groups for one in map(Requirement, group)}


def pins(file: str, python: str = "3.13") -> dict[str, Version]:
    """A list of exact versions as pip reads it under `python`."""
    pinned: dict[str, Version] = {}
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    for line in (ROOT / "tests" / file).read_text().splitlines():
        requirement = Requirement(line) if line and not line.startswith("#") else None
        if requirement and (requirement.marker is None or requirement.marker.evaluate(environment)):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and canonical(requirement.name) not in pinned, line
            pinned[canonical(requirement.name)] = Version(specifier.version)
    return pinned


DIRECT = requirements(PROJECT["dependencies"], *EXTRAS.values())
COLAB = pins("colab-versions.txt")

# ------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python):
    pinned = pins("constraints.txt", python)
    assert not {name for name, allowed in DIRECT.items() if name not in pinned or pinned[name] not in allowed}


def test_requirements_are_ranges_that_leave_colabs_own_packages_alone():
    allowed = requirements(PROJECT["dependencies"])
    for name, specifiers in allowed.items():
        assert specifiers and not any(one.operator in ("==", "===", "~=") for one in specifiers), name
    for name, earlier in EARLIER_COLAB.items():
        assert Version(earlier) in allowed[name]
        assert not any("<" in one.operator for one in allowed[name]), f"a later {name} must do as well"
    for name in allowed.keys() - {"tqdm"}:  # which the others bring
        assert COLAB[name] in allowed[name], f"on Colab {name} would be replaced"
    assert COLAB["peft"] in DIRECT["peft"]
    # Colab's setuptools, older than 77, takes `license` as a table only, which newer ones will refuse.
    assert not {"license", "license-files"} & PROJECT.keys()
    assert COLAB["setuptools"] in requirements(SETTINGS["build-system"]["requires"])["setuptools"]


def test_supported_pythons_are_named_alike_everywhere():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(python in supported for python in PYTHONS) and "3.9" not in supported
    named = [line.rsplit(" ", 1)[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert tuple(named) == tuple(WORKFLOWS["tests"]["jobs"]["test"]["strategy"]["matrix"]["python"]) == PYTHONS
    makefile = (ROOT / "Makefile").read_text()
    ends = [tuple(map(int, python.split("."))) for python in (PYTHONS[0], PYTHONS[-1])]
    assert f"{ends[0]} <= sys.version_info[:2] <= {ends[1]}" in makefile
    assert f"needs Python {PYTHONS[0]} to {PYTHONS[-1]}" in makefile and all(
        f"python{each}" in makefile for each in PYTHONS
    )


def test_the_conda_environment_has_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(one for one in environment if str(one).startswith("python=")).removeprefix("python=")
    (listed,) = [one["pip"] for one in environment if isinstance(one, dict)]
    options = {"--constraint tests/constraints.txt", "--editable .[notebooks,dev]"}
    found = {canonical(one.name): str(one.specifier) for one in map(Requirement, set(listed) - options)}
    assert options < set(listed)
    assert found == {name: f"=={pins('constraints.txt', python)[name]}" for name in DIRECT}


def test_the_installed_versions_are_the_pins():
    """Under `make`, where they are installed from the pins, the tests would else speak of other versions."""
    if not (ROOT / ".venv").exists() or not (ROOT / ".venv").samefile(sys.prefix):
        pytest.skip("not run by make, so the versions are the reader's own")
    pinned = pins("constraints.txt", f"{sys.version_info.major}.{sys.version_info.minor}")
    assert not {name for name in DIRECT if Version(version(name).split("+")[0]) != pinned[name]}


# ------------------------------------------------------------------------------------------------------- commands


def test_ci_runs_the_readmes_commands():
    script = ROOT / ".ci" / "run"
    lines = [line.strip() for line in script.read_text().splitlines()]
    assert os.access(script, os.X_OK) and "set -euo pipefail" in lines and lines[-1] == "make test"
    assert "make test" in (ROOT / "README.md").read_text()
    last = {name: job["steps"][-1] for name, job in WORKFLOWS["tests"]["jobs"].items()}
    assert last == {"test": {"run": ".ci/run"}, "colab": {"run": "make colab"}, "rehearse": {"run": "make rehearse"}}


def make(*arguments: str, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=folder, env=clean | env, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path):
    """A folder with what `make` reads of the project, and nothing set up."""
    for name in ("Makefile", "pyproject.toml", "tests/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


@pytest.mark.parametrize(
    "breaks", ["nothing", "ruff check", "mypy", "--dist loadfile -x", "--dist loadscope --nbval-lax"]
)
def test_one_failure_hides_no_other_and_every_process_has_one_thread(project, breaks):
    """The notebooks run also when a test has failed, and the whole has then failed."""
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / ".ready").touch()
    for tool in ("ruff", "mypy", "python"):
        script = f'#!/bin/sh\necho "{tool} $* $OMP_NUM_THREADS" >>ran\ncase "{tool} $*" in *"$BREAKS"*) exit 3;; esac\n'
        (project / ".venv" / "bin" / tool).write_text(script)
        (project / ".venv" / "bin" / tool).chmod(0o755)
    done = make("test", "ARGS=-x", folder=project, BREAKS=breaks, OMP_NUM_THREADS="1")
    ran = (project / "ran").read_text().splitlines()
    assert len(ran) == 5 and all(line.endswith(" 1") for line in ran)
    assert done.returncode == 0 if breaks == "nothing" else done.returncode and breaks in done.stderr, (
        "named at the end"
    )


COMMANDS = ("demo", "test", "rehearse", "lab", "notebooks", "gpu", "bench", "pretrain", "results", "size")


def test_every_command_is_listed_and_runs_what_is_there():
    listed = make("help").stdout
    named = re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert all(re.search(rf"^make {command} +\S", listed, re.MULTILINE) for command in (*COMMANDS, *named))
    planned = make("-n", *COMMANDS, "READY=").stdout
    for module in re.findall(r"-m ((?:data|notebooks)\.[\w.]+)", planned):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("command", ["demo", "test"])
def test_every_command_sets_up_once_and_again_when_a_pin_has_changed(command, project):
    planned = make("-n", command, folder=project).stdout
    assert "-m venv .venv" in planned and "--constraint tests/constraints.txt" in planned
    (project / ".venv").mkdir()
    (project / ".venv" / ".ready").touch()
    assert "-m venv" not in make("-n", command, folder=project).stdout
    later = (project / ".venv" / ".ready").stat().st_mtime + 5
    os.utime(project / "tests" / "constraints.txt", (later, later))
    assert "-m venv" in make("-n", command, folder=project).stdout


def test_colabs_versions_are_tried_apart_from_everything():
    planned = make("-n", "colab").stdout
    assert f" torch=={COLAB['torch']} " in planned and "-r build/colab/versions.txt" in planned
    assert " torch==9.9 " in make("-n", "colab", "TORCH=9.9").stdout
    assert "-m notebooks.tools.colab" in planned and "make" not in planned and "constraints" not in planned


@pytest.mark.parametrize(
    "python, sentence",
    [
        ("exit 1", "needs Python 3.10 to 3.14, and .*old is .*install one, or name one"),
        ('case "$2" in *venv*) exit 1;; esac', "old has no venv module .*apt install python3-venv"),
    ],
)
def test_set_up_says_what_is_wrong_with_the_interpreter_before_anything_is_made(project, python, sentence):
    (project / "old").write_text(f"#!/bin/sh\n{python}\n")
    (project / "old").chmod(0o755)
    result = make("demo", f"PYTHON={project / 'old'}", folder=project)
    assert result.returncode and re.search(sentence, result.stderr)
    assert not (project / ".venv").exists()


# ---------------------------------------------------------------------------------------------------- what is kept


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_only_what_tools_demand_is_at_the_top_and_data_stay_small(tracked):
    files = {"README.md", "LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", "environment.yml", ".gitignore"}
    folders = {"persres_lite", "notebooks", "data", "tests", ".ci", ".github"}
    top = {path.relative_to(ROOT).parts[0] for path in tracked}
    assert top <= files | folders, f"these belong elsewhere: {sorted(top - files - folders)}"
    assert sum(path.stat().st_size for path in tracked if path.is_relative_to(ROOT / "data")) < 80e6


def test_no_file_names_a_place_of_one_machine_or_a_package_host(tracked):
    hosts = (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("debian", "org"),
        ("download", "pytorch", "org"),
    )
    host = "|".join(re.escape(".".join(parts)) for parts in hosts)
    pattern = re.compile(rf"(?<![\w.}}/])(?:/home|/Users|/root|/work|/opt|/tmp|/mnt)/\w|{host}")
    texts = [path for path in tracked if path != Path(__file__) and path.suffix not in (".jpg", ".png", ".safetensors")]
    lines = ((path, line) for path in texts for line in path.read_text(encoding="utf-8").splitlines())
    assert not [(path.name, match[0]) for path, line in lines if (match := pattern.search(line[:20_000]))]


def test_every_table_says_what_makes_it_and_make_results_does():
    """All but the bench's, for which a machine has to be idle, and those that an earlier edition's programs made."""
    made = set(re.findall(r"python -m (.+)", make("-n", "results", "READY=").stdout))
    for path in (ROOT / "data" / "results").glob("*.md"):
        (says,) = re.findall(
            r"`python -m ((?:data\.make|persres_lite\.maintain)\.[^`]+)`", path.read_text(encoding="utf-8")
        )
        assert says.startswith(("data.make.bench", "persres_lite.maintain.")) or says in made, path.name


def test_nothing_reads_pickles():
    unsafe = r"\btorch\.load\((?!.*weights_only=True)|\bimport pickle|allow_pickle=True"
    assert not [path for path in (ROOT / "persres_lite").rglob("*.py") if re.search(unsafe, path.read_text())]


def test_the_version_stands_in_one_place_and_the_license_is_the_declared_one():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert SETTINGS["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "persres_lite.__version__"}}
    newest = re.search(r"^## ([\d.]+)", (ROOT / ".github/CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == persres_lite.__version__
    declared = [line for line in PROJECT["classifiers"] if line.startswith("License")]
    assert declared == ["License :: OSI Approved :: MIT License"]
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_citation_file_and_the_readme_cite_the_same_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cited.keys()
    (entry,) = re.findall(r"```bibtex\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (paper,) = cited["references"]
    same = [paper["title"], paper["collection-title"], str(paper["year"]), f"{paper['start']}--{paper['end']}"]
    assert all(words in entry for words in [*same, " and ".join(each["family-names"] for each in paper["authors"])])
    assert cited["license"] == "MIT" and cited["repository-code"] == PROJECT["urls"]["Repository"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_names_of_files_in_the_guides(name):
    text = (ROOT / ".github" / name).read_text()
    named = re.findall(r"`((?:tests|persres_lite|data|notebooks)/[\w./]+\.\w+)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]
    assert not [target for target in links.targets(text) if not (ROOT / ".github" / target).exists()]


def test_the_guide_names_every_command_of_the_notebooks_tools():
    text = (ROOT / ".github/CONTRIBUTING.md").read_text()
    commands = set(notebooks.COMMANDS) - {"check"}
    assert commands == {command for command in commands if re.search(rf"\*\*`{command}\b", text)}


def test_the_wheel_holds_the_package_and_nothing_else(tracked, tmp_path):
    """Built from a copy, without a network, by the build backend that is installed."""
    pytest.importorskip("setuptools", minversion="64")
    for path in tracked:
        relative = path.relative_to(ROOT)
        if (
            relative.parts[0] in ("persres_lite", "data", "notebooks")
            and path.suffix == ".py"
            or len(relative.parts) == 1
        ):
            (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / relative)
    code = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (tmp_path / "dist").glob(f"persres_lite-{persres_lite.__version__}-*.whl")
    inside = {name for name in zipfile.ZipFile(built).namelist() if ".dist-info/" not in name}
    assert inside == {p.relative_to(ROOT).as_posix() for p in tracked if p.is_relative_to(ROOT / "persres_lite")}
