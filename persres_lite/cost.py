"""What Stable Diffusion costs without a GPU, so that it is said before hours are spent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from persres_lite.bases import BASES, settings_of

LARGE = 256
"""Pixels: a base whose pictures are smaller than this is quick anywhere."""

MINUTES = 12.0
"""For a picture of 512 x 512 pixels in 50 steps on two cores: what `make bench` measures for a step of SD 1.4's U-Net
at 256 x 256, times the operations of the larger size. More cores are taken to be faster in proportion."""

PICTURES = 12.5
"""Learning a concept by the paper's recipe takes as long as so many pictures: 600 passes there and back."""


def without_gpu(base: str | os.PathLike) -> str | None:
    """Say in a sentence what a large base would cost on this machine's processor; None if there is nothing to say.

    Parameters
    ----------
    base : str or os.PathLike
        A base's name, folder or hub id; nothing is loaded.

    Returns
    -------
    str or None
        None if torch has a GPU, or the base is a small one.
    """
    size = picture_size(base)
    if size < LARGE or torch.cuda.is_available() or torch.backends.mps.is_available():
        return None
    cores = os.cpu_count() or 1
    minutes = MINUTES * (size / 512) ** 2.5 * 2 / cores
    return (
        f"There is no GPU here. On {cores} core{'s' * (cores > 1)}, a picture of {size} x {size} pixels takes "
        f"{_about(minutes)} and learning a concept {_about(PICTURES * minutes)}; Toybox needs no GPU."
    )


def picture_size(base: str | os.PathLike) -> int:
    """Side of a base's pictures in pixels, as far as that is known before it is loaded: otherwise SD 1.4's."""
    try:  # what is wrong with a folder is said by the one who loads it
        side = json.loads((Path(base) / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
        return 8 * int(side)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    try:
        return settings_of(os.fspath(base)).size
    except ValueError:
        return BASES["sd-1.4"].size


def _about(minutes: float) -> str:
    if minutes < 90:
        return f"about {max(1, round(minutes))} minutes" if minutes >= 1.5 else "about a minute"
    return f"about {round(minutes / 30) / 2:g} hours"
