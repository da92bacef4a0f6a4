"""What the first cell of every notebook calls: it completes a fetched copy, and says which base and device are used.

Nothing beyond the standard library is imported until the requirements are known to be there, because on Colab this
module runs before they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from persres_lite.support.paths import data_dir

HOME = Path(__file__).resolve().parents[2]

KEPT = ("torch", "numpy", "ipywidgets")
"""Packages that a running Colab has already loaded or that match its front end: replacing one breaks the session."""


def start(base: str | None = None) -> tuple[Path, str]:
    """Make the notebook ready and print one line: base, device, versions.

    Parameters
    ----------
    base
        Name of the frozen model. None takes the environment variable ``PERSRES_BASE``, and without it ``"toybox"``.

    Returns
    -------
    tuple[Path, str]
        The project's folder (its data lie below it), and the base's name.

    Raises
    ------
    FileNotFoundError
        If the project's data are not beside the package.
    RuntimeError
        If requirements are missing in a clone, where nothing may be installed without being asked.
    """
    data_dir()  # raises if the package was installed without its checkout
    missing = missing_requirements(project_requirements(HOME))
    if _was_fetched(HOME) and (missing or not _installed(("persres-lite",))):
        install(HOME, missing)
    elif missing:
        raise RuntimeError(
            f"Missing here: {', '.join(missing)}. Run `make lab` in the project's folder, or `pip install -e .`."
        )
    base = base or os.environ.get("PERSRES_BASE") or "toybox"
    print(describe(base))
    return HOME, base


def describe(base: str) -> str:
    """One line that names the base, the device that torch finds, and the versions that matter."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = Path(base).name if Path(base).is_dir() else base  # a folder's full path says nothing to other readers
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", "diffusers", "transformers")
    )
    return f"Base: {name}. Device: {device}. Python {platform.python_version()}, {versions}."


def project_requirements(home: Path) -> list[str]:
    """The requirements for running the project that its ``pyproject.toml`` names."""
    # Python 3.10 has no tomllib, but its pip carries the same parser.
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    with open(home / "pyproject.toml", "rb") as file:
        return list(tomllib.load(file)["project"]["dependencies"])


def missing_requirements(requirements: list[str]) -> list[str]:
    """Those requirements that the environment does not meet.

    A package of `KEPT` counts as met in any version: it is installed when absent, and never replaced.
    """
    from packaging.requirements import Requirement

    missing = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if requirement.name.lower() not in KEPT and not requirement.specifier.contains(version, prereleases=True):
            missing.append(text)
    return missing


def install(home: Path, missing: list[str]) -> None:
    """Install the missing requirements and then the project, leaving the packages of `KEPT` as they are.

    The project comes without its dependencies and editable, so that its data stay beside it. An editable installation
    is seen only after a restart of the kernel (colabtools #1171): the first cell has put the folder on ``sys.path``
    already.

    Raises
    ------
    RuntimeError
        If pip fails to install a requirement.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "kept.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in _installed(KEPT).items()))
        if missing and not _pip("--constraint", str(constraints), *missing):
            raise RuntimeError(
                f"pip could not install {', '.join(missing)}: is there a network? Its message stands above."
            )
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    if not _pip("--no-deps", *isolation, "--editable", str(home)):
        print("The command persres-lite could not be installed; the notebooks do not need it.")
    importlib.invalidate_caches()


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _pip(*arguments: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments]).returncode == 0


def _was_fetched(home: Path) -> bool:
    """Whether the first cell fetched this copy: it then lies in ``persres-lite`` below the notebook's own folder."""
    return home == (Path.cwd() / "persres-lite").resolve()
