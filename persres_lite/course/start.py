"""What the first cell of every notebook calls: it looks at what is installed, and says which base and device are used.

Nothing beyond the standard library and packaging is imported until the requirements are known to be there, because in a
session that somebody else has set up (Colab's, say) this module runs before they are. The package itself is never
installed: the first cell has put its folder on ``sys.path``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from packaging.requirements import Requirement

from persres_lite.support.paths import data_dir

HOME = Path(__file__).resolve().parents[2]

KEPT = ("torch", "numpy", "ipywidgets")
"""Packages that a running Colab has already loaded or that match its front end: replacing one breaks the session."""

TOGETHER = ("diffusers", "transformers", "accelerate", "safetensors", "peft")
"""Packages that share others: pip must choose their versions in one go, or it takes one that does not go with the
rest."""

SHARED = ("huggingface_hub", "tokenizers")
"""What they share."""


class NotReady(RuntimeError):
    """The notebook cannot go on here; what to do is one sentence, and a notebook shows that alone, without a trace."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [str(self)]


def start(base: str | None = None) -> tuple[Path, str]:
    """Make the notebook ready and print one line: base, device, versions.

    Where everything fits, nothing is installed. In a copy that the first cell has fetched, one pip command installs
    what is missing or too old, and a line before it says so.

    Parameters
    ----------
    base : str, optional
        Name of the frozen model. None takes the environment variable ``PERSRES_BASE``, and without it ``"toybox"``.

    Returns
    -------
    tuple[Path, str]
        The project's folder (its data lie below it), and the base's name.

    Raises
    ------
    FileNotFoundError
        If the project's data are not beside the package.
    NotReady
        If requirements are missing in a clone, where nothing may be installed without being asked; if pip fails; if the
        session must be restarted, because it has loaded a version that is too old.
    """
    data_dir()  # raises if the package was installed without its checkout
    requirements = project_requirements()
    if missing := missing_requirements(requirements):
        if HOME != (Path.cwd() / "persres-lite").resolve():  # where the first cell fetches it to
            raise NotReady(f"Missing here; run `make lab` in the project's folder, or: {_line(missing)}")
        install(requirements, missing)
    refuse_stale(requirements, installed_now=bool(missing))
    base = base or os.environ.get("PERSRES_BASE") or "toybox"
    print(describe(base))
    without_bars()
    if base == "toybox":
        if "OMP_NUM_THREADS" not in os.environ:  # a second thread gains nothing on so small a model
            importlib.import_module("torch").set_num_threads(1)
        return HOME, base
    from persres_lite.cost import on_gpu, without_gpu  # the registry is only needed here

    slow = without_gpu(base)
    if said := slow or on_gpu(base):
        print(said + (" Choose one under Runtime > Change runtime type." if slow and on_colab() else ""))
    return HOME, base


def describe(base: str) -> str:
    """One line that names the base, the device that torch finds, and the versions in memory that matter."""
    import torch

    torch.set_default_device(None)  # of somebody else's cell: here every tensor says where it lies
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = Path(base).name if Path(base).is_dir() else base  # a folder's full path says nothing to other readers
    versions = ", ".join(f"{package} {_version(package)}" for package in ("torch", "diffusers", "transformers"))
    return f"Base: {name}. Device: {device}. Python {platform.python_version()}, {versions}."


def without_bars() -> None:
    """Let transformers draw no bars while it reads weights, which takes no time; those of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()


def on_colab() -> bool:
    """Whether this session is one of Colab's."""
    return "google.colab" in sys.modules


def project_requirements() -> list[Requirement]:
    """The requirements for running the project that its ``pyproject.toml`` names."""
    # Python 3.10 has no tomllib, but its pip carries the same parser.
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    with open(HOME / "pyproject.toml", "rb") as file:
        return [Requirement(text) for text in tomllib.load(file)["project"]["dependencies"]]


def missing_requirements(requirements: list[Requirement]) -> list[Requirement]:
    """Those requirements that the environment does not meet.

    A package of `KEPT` counts as met in any version: it is installed when absent, and never replaced.
    """
    there = _installed(each.name for each in requirements)

    def met(wanted: Requirement) -> bool:
        return wanted.name in there and (wanted.name in KEPT or _serves(wanted, there[wanted.name]))

    return [each for each in requirements if not met(each)]


def install(requirements: list[Requirement], missing: list[Requirement]) -> None:
    """Install what is missing by one pip command, and leave the packages of `KEPT` as they are.

    If one of `TOGETHER` is missing, all of them are named (peft only where it is installed), so that those which are
    there already, or what they share, are not left in versions that do not go with the new one.

    Raises
    ------
    NotReady
        If pip fails.
    """
    named = missing
    if any(each.name in TOGETHER for each in missing):
        named = [each for each in requirements if each in missing or each.name in TOGETHER]
        named += [Requirement(name) for name in _installed(TOGETHER) if name not in {each.name for each in named}]
    unfit = " and ".join(f"{name} {version}" for name, version in _installed(each.name for each in missing).items())
    why = f"{unfit} will not do" if unfit else "some packages are missing"
    print(f"In this session {why}, so what belongs together is installed once: {_line(named)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.txt"
        kept.write_text("".join(f"{name}=={version}\n" for name, version in _installed(KEPT).items()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(kept), *map(str, named)]
        if subprocess.run(command).returncode:
            listed = ", ".join(map(str, missing))
            raise NotReady(f"pip could not install {listed}: is there a network? Its message stands above.")
    importlib.invalidate_caches()


def refuse_stale(requirements: list[Requirement], installed_now: bool = False) -> None:
    """Stop if the session has loaded a version that does not serve, or one of `KEPT` does not.

    Parameters
    ----------
    requirements : list of Requirement
        As the project names them.
    installed_now : bool
        Whether pip has just run: then a loaded version must also be the one on disk, because these packages load their
        parts only when they are needed, and the parts would come from another version.

    Raises
    ------
    NotReady
        If there is one.
    """
    on_disk = _installed([*(each.name for each in requirements), *SHARED])
    for wanted in (*requirements, *map(Requirement, SHARED)):
        name, there = wanted.name, on_disk.get(wanted.name)
        used = _loaded(name) or there
        if used is None or (_serves(wanted, used) and (used == there or not installed_now)):
            continue
        if used == there:  # one of KEPT, which this cell does not replace: a restart would not help
            raise NotReady(f"{name} {used} is installed here, and {wanted} is needed: update it.")
        raise NotReady(
            f"{name} {used} is still in memory, and {there} is installed now: restart the session (on Colab: "
            "Runtime > Restart session) and run this cell again."
        )


def _serves(wanted: Requirement, version: str) -> bool:
    return wanted.specifier.contains(version, prereleases=True)


def _line(requirements: list[Requirement]) -> str:
    return "pip install " + " ".join(f'"{each}"' for each in requirements)


def _version(package: str) -> str:
    """Of the package in memory, or of the one on disk, which is what an import would load."""
    return _loaded(package) or importlib.metadata.version(package)


def _loaded(package: str) -> str | None:
    return getattr(sys.modules.get({"pillow": "PIL"}.get(package, package)), "__version__", None)


def _installed(names: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
