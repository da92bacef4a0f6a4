"""Where the shipped data are: models, concepts and results stand beside the package in the project's checkout."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir() -> Path:
    """The project's data folder: Toybox, its judges, the concepts, the results of long runs.

    It belongs to the checkout, not to the installed package (it is larger than everything else together): a clone,
    and an editable install of one, find it by themselves. The environment variable ``PERSRES_DATA`` names another.

    Raises
    ------
    FileNotFoundError
        If the package was installed without its checkout.
    """
    folder = Path(os.environ.get("PERSRES_DATA") or Path(__file__).resolve().parents[2] / "data").expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The shipped models and pictures are not at {folder}: work in a clone of the project "
            "(pip install -e . there), set PERSRES_DATA to the data folder of one, or take another base, as sd-1.4."
        )
    return folder
