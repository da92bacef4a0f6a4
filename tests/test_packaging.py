"""What stands in two places is equal, and nothing in the project belongs to one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
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

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

EARLIER_COLAB = {"torch": "2.6.0", "numpy": "2.0.2", "ipywidgets": "7.7.1"}
"""What a Colab session had loaded from the spring of 2025 on; an installation must be content with it, too."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*groups: list[str]) -> dict[str, SpecifierSet]:
    return {canonical(one.name): one.specifier for group in groups for one in map(Requirement, group)}


def pins(python: str) -> dict[str, Version]:
    """The constraints file as pip reads it under `python`, "3.11" say."""
    pinned = {}
    for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.9"}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            assert canonical(requirement.name) not in pinned, f"{line}: pinned twice for Python {python}"
            pinned[canonical(requirement.name)] = Version(specifier.version)
    return pinned


# ------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python):
    pinned = pins(python)
    for name, allowed in requirements(PROJECT["dependencies"], *EXTRAS.values()).items():
        assert name in pinned, f"{name} has no pin in tests/constraints.txt"
        assert pinned[name] in allowed, f"{name} {pinned[name]} is outside of {allowed}"


def colab() -> dict[str, Version]:
    """What Colab has, by tests/colab-versions.txt."""
    lines = (ROOT / "tests" / "colab-versions.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): Version(version) for name, version in pairs}


def test_requirements_are_ranges_that_leave_colabs_own_packages_alone():
    allowed = requirements(PROJECT["dependencies"])
    for name, specifiers in allowed.items():
        assert specifiers and not any(one.operator in ("==", "===", "~=") for one in specifiers), name
    for name, version in EARLIER_COLAB.items():
        assert Version(version) in allowed[name]
        assert not any("<" in one.operator for one in allowed[name]), f"a later {name} must do as well"
    for name in allowed.keys() - {"tqdm"}:  # which the others bring
        assert colab()[name] in allowed[name], f"on Colab {name} would be replaced"
    assert colab()["peft"] in requirements(EXTRAS["dev"])["peft"]
    assert re.search(r"had installed on \d+ \w+ 20\d\d", (ROOT / "tests" / "colab-versions.txt").read_text())


def test_colabs_versions_are_tried_by_one_command_and_in_the_workflow():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["colab"]
    assert workflow["steps"][-1] == {"run": "make colab"}
    planned = make("-n", "colab", f"PYTHON={sys.executable}").stdout
    assert f" torch=={colab()['torch']} " in planned and "-r build/colab/versions.txt" in planned
    assert " torch==9.9 " in make("-n", "colab", "TORCH=9.9").stdout
    (module,) = re.findall(r"-m (persres_lite[\w.]+)", planned)
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert "make" not in planned and "constraints" not in planned, "apart from .venv"


def test_supported_pythons():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(python in supported for python in PYTHONS) and "3.9" not in supported
    named = [line.rsplit(" ", 1)[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert tuple(named) == PYTHONS
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert tuple(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == PYTHONS


def test_the_conda_environment_has_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(one for one in environment["dependencies"] if str(one).startswith("python=")).removeprefix("python=")
    assert python in PYTHONS
    (listed,) = [one["pip"] for one in environment["dependencies"] if isinstance(one, dict)]
    options = [line for line in listed if line.startswith("-")]
    assert options == ["--constraint tests/constraints.txt", "--editable .[notebooks,dev]"]
    found = {canonical(one.name): str(one.specifier) for one in map(Requirement, sorted(set(listed) - set(options)))}
    direct = requirements(PROJECT["dependencies"], *EXTRAS.values())
    assert found == {name: f"=={pins(python)[name]}" for name in direct}


def test_the_installed_versions_are_the_pins():
    """Under `make`, where they are installed from the pins, the tests would else speak of other versions."""
    from importlib.metadata import version

    if not (ROOT / ".venv").samefile(sys.prefix) if (ROOT / ".venv").exists() else True:
        pytest.skip("not run by make, so the versions are the reader's own")
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    for name in requirements(PROJECT["dependencies"], *EXTRAS.values()):
        assert Version(version(name).split("+")[0]) == pinned[name], name


# ------------------------------------------------------------------------------------------------------- commands


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line.strip() for line in script.read_text().splitlines()]
    assert "set -euo pipefail" in lines and lines[-1] == "make test"
    assert "make test" in (ROOT / "README.md").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": ".ci/run"}


def test_gpu_runners_use_stable_diffusion():
    job = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())["jobs"]["notebooks"]
    assert job["env"] == {"PERSRES_BASE": "sd-1.4"} and "gpu" in job["runs-on"]


def test_one_failure_hides_no_other(tmp_path):
    """The notebooks run also when a test has failed, and the whole has then failed."""
    for name in ("Makefile", "pyproject.toml", "tests/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    for tool in ("ruff", "mypy", "python"):
        (tools / tool).write_text(
            f'#!/bin/sh\necho "{tool} $*" >>ran\ncase "{tool} $*" in *"$BREAKS"*) exit 3;; esac\n'
        )
        (tools / tool).chmod(0o755)
    order = [
        "ruff check .",
        "mypy ",
        "python -m pytest -x",
        "python -m pytest --nbval-lax --nbval-current-env notebooks",
    ]
    for breaks in ("nothing", *order):
        (tmp_path / "ran").unlink(missing_ok=True)
        done = make("test", "ARGS=-x", folder=tmp_path, BREAKS=breaks)
        ran = (tmp_path / "ran").read_text().splitlines()
        assert [line for line in ran if line in order] == order, breaks
        assert (done.returncode == 0) == (breaks == "nothing"), breaks
        assert breaks == "nothing" or f".venv/bin/{breaks.strip()}" in done.stderr, "named at the end"


def make(*arguments: str, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=clean | env, capture_output=True, text=True)


def test_make_lists_its_commands():
    listed = make("help").stdout
    assert make().stdout == listed
    for command in ("demo", "test", "lab", "notebooks", "gpu", "bench", "pretrain", "results", "colab", "help"):
        assert re.search(rf"^make {command} +\S", listed, re.MULTILINE), command


@pytest.mark.parametrize("command", ["demo", "test", "lab", "notebooks", "gpu", "bench", "pretrain", "results"])
def test_every_command_sets_up_what_it_needs(command, tmp_path):
    for name in ("Makefile", "pyproject.toml", "tests/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    planned = make("-n", command, f"PYTHON={sys.executable}", folder=tmp_path).stdout
    assert "-m venv .venv" in planned and "--constraint tests/constraints.txt" in planned
    for module in re.findall(r"-m (persres_lite[\w.]+)", planned):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    assert "-m venv" not in make("-n", command, folder=tmp_path).stdout, "only once"
    later = (tmp_path / ".venv" / ".ready").stat().st_mtime + 5
    os.utime(tmp_path / "tests" / "constraints.txt", (later, later))
    assert "-m venv" in make("-n", command, folder=tmp_path).stdout, "again when a pin has changed"


@pytest.mark.parametrize(
    "python, sentence",
    [
        ("exit 1", "persres-lite needs Python 3.10 to 3.13, and .*old is .*install one, or name one"),
        ('case "$2" in *venv*) exit 1;; esac', "old has no venv module .*apt install python3-venv"),
    ],
)
def test_set_up_says_what_is_wrong_with_the_interpreter(tmp_path, python, sentence):
    for name in ("Makefile", "pyproject.toml", "tests/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "old").write_text(f"#!/bin/sh\n{python}\n")
    (tmp_path / "old").chmod(0o755)
    result = make("demo", f"PYTHON={tmp_path / 'old'}", folder=tmp_path)
    assert result.returncode and re.search(sentence, result.stderr)
    assert not (tmp_path / ".venv").exists()


# ---------------------------------------------------------------------------------------------------- what is kept


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_only_what_tools_demand_is_at_the_top():
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    files = {
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "Makefile",
        "pyproject.toml",
        "environment.yml",
        ".gitignore",
        ".gitattributes",
    }
    folders = {"persres_lite", "notebooks", "data", "tests", ".ci", ".github"}
    assert top <= files | folders, f"these belong elsewhere: {sorted(top - files - folders)}"


def test_no_file_names_a_place_of_one_machine_or_a_package_host():
    home = r"(?:/home|/Users|/root|/work|/opt|/tmp|/mnt)/\w"
    host = "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("npmjs", "org"),
            ("debian", "org"),
            ("download", "pytorch", "org"),
        )
    )
    pattern = re.compile(rf"(?<![\w.}}/]){home}|{host}")
    found = []
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".jpg", ".png", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := pattern.search(line[:20_000]):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found


def test_what_runs_leave_behind_is_ignored():
    left = [".venv/x", "build/demo.png", "cache/x.npy", "checkpoints/x.safetensors", "outputs/x.png", "x.egg-info/y"]
    checked = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True)
    if checked.returncode > 1:
        pytest.skip("not a git checkout")
    assert checked.stdout.split() == left


def test_every_table_says_what_makes_it_and_make_results_does():
    """All but the bench's, for which a machine has to be idle, and the one of notebooks on a real GPU."""
    recipe = subprocess.run(["make", "-n", "results", "READY="], cwd=ROOT, capture_output=True, text=True).stdout
    made = {line.split("python -m ")[1].strip() for line in recipe.splitlines() if "python -m persres_lite" in line}
    tables = [path for path in (ROOT / "data" / "results").glob("*.md") if path.stem not in ("bench", "gpu")]
    assert tables
    for path in tables:
        says = re.search(r"`python -m (persres_lite\.maintain\.[^`]+)`", path.read_text(encoding="utf-8"))
        assert says and says[1] in made, path.name


def test_data_stay_small():
    assert sum(path.stat().st_size for path in tracked() if path.is_relative_to(ROOT / "data")) < 60e6


def test_the_license_is_the_one_that_is_declared():
    text = (ROOT / "LICENSE").read_text()
    declared = [line for line in PROJECT["classifiers"] if line.startswith("License")]
    assert declared == ["License :: OSI Approved :: MIT License"]
    assert text.startswith("MIT License") and "persres-lite contributors" in text


def test_colabs_setuptools_can_read_the_project():
    """Older than 77, it takes `license` as a table only, which newer ones will refuse; and knows no `license-files`."""
    assert not {"license", "license-files"} & PROJECT.keys()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert colab()["setuptools"] in requirements(build["requires"])["setuptools"]


def test_nothing_reads_pickles():
    for path in (ROOT / "persres_lite").rglob("*.py"):
        unsafe = r"\btorch\.load\((?!.*weights_only=True)|\bimport pickle|allow_pickle=True"
        assert not re.search(unsafe, path.read_text()), path


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert settings == {"version": {"attr": "persres_lite.__version__"}}
    written = [
        path for path in (ROOT / "persres_lite").rglob("*.py") if re.search(r"^__version__ =", path.read_text(), re.M)
    ]
    assert [path.relative_to(ROOT).as_posix() for path in written] == ["persres_lite/__init__.py"]
    newest = re.search(r"^## ([\d.]+)", (ROOT / ".github/CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == persres_lite.__version__


def test_the_citation_file_and_the_readme_cite_the_same_works():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cited.keys()
    bibtex = re.search(r"```bibtex\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (paper,) = cited["references"]
    assert " and ".join(author["family-names"] for author in paper["authors"]) in bibtex
    assert f"{paper['start']}--{paper['end']}" in bibtex
    same = [cited["title"], cited["repository-code"], paper["title"], paper["collection-title"], str(paper["year"])]
    assert all(words in bibtex for words in same)
    assert cited["license"] == "MIT" and cited["repository-code"] == PROJECT["urls"]["Repository"]


def test_the_issue_form_is_one_that_is_shown():
    """A form without a description, or with a field that lacks its label, is left out in silence."""
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert forms
    for form in map(yaml.safe_load, (path.read_text() for path in forms)):
        assert form["name"] and form["description"] and any(field["type"] != "markdown" for field in form["body"])
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_names_of_files_in_the_guides(name):
    text = (ROOT / ".github" / name).read_text()
    for target in links.targets(text):
        assert (ROOT / ".github" / target).exists(), target
    for path in re.findall(r"`((?:tests|persres_lite)/[\w./]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_the_guide_names_every_command_of_the_notebooks_tools():
    text = (ROOT / ".github/CONTRIBUTING.md").read_text()
    for command in re.findall(r"^python -m notebooks.tools.notebooks (\w+)", notebooks.__doc__, re.MULTILINE):
        assert re.search(rf"\*\*`{command}\b", text), command


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, without a network, by the build backend that is installed."""
    pytest.importorskip("setuptools", minversion="64")
    copy = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "persres_lite" or len(relative.parts) == 1:
            (copy / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy / relative)
    code = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, "dist"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_product_and_nothing_else(wheel):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in tracked() if path.is_relative_to(ROOT / "persres_lite")}
    assert inside == {name for name in package if not name.startswith("data/make/")}
    assert any(name.startswith("data/make/") for name in package)


def test_the_wheel_has_the_packages_version(wheel):
    assert f"persres_lite-{persres_lite.__version__}-" in wheel.filename
