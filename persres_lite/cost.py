"""What a large base costs, said before it is spent: hours on a processor, and memory on a GPU.

The memory is a table, for pictures of each base's own size in half precision. What fits less is no reason to plan:
`persres_lite.personalize` begins with whole steps and goes on in smaller pieces when memory runs out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from persres_lite.bases import BASES, settings_of

LARGE = 256
"""Pixels: a base whose pictures are smaller than this is quick anywhere."""

MINUTES = 12.0
"""For a picture of 512 x 512 pixels in 50 steps on two cores: what `make bench` measures for a step of SD 1.4's U-Net
at 256 x 256, times the operations of the larger size; two runs of it gave 10 and 14. More cores are taken to be faster
in proportion."""

PICTURES = 12.5
"""Learning a concept by the paper's recipe takes as long as so many pictures: 600 passes there and back."""

GIB = 2**30


class Memory(NamedTuple):
    """What a base needs of an empty GPU in half precision; twice as much in fp32."""

    parameters: int  # of all its models, two bytes each
    sample: float  # GiB, a picture at a time
    train: float  # GiB, four pictures at once, as the recipe has it
    least: float  # GiB, one picture at a time with checkpointed gradients


#: Weights, activations, 15 % that an allocator holds beyond what is asked of it and half a GiB of CUDA itself. The
#: activations of a training step were counted from the layers, and measured for SD 1.4 (2.85 GiB where 2.42 were
#: counted, data/results/full-size.md) and for a narrower XL (3.86 for 3.58, data/results/sdxl-reduced.md).
NEEDS = {
    "sd-1.4": Memory(1_066_235_307, sample=3.2, train=6.1, least=3.1),
    "sd-2.1": Memory(1_289_952_427, sample=4.2, train=10.6, least=3.9),
    "sdxl": Memory(3_468_837_387, sample=11.4, train=30.1, least=8.7),
}
NEEDS["sd-1.5"] = NEEDS["sd-1.4"]


def without_gpu(base: str | os.PathLike) -> str | None:
    """Say in a sentence what a large base would cost on this machine's processor; None if there is nothing to say.

    Parameters
    ----------
    base : str or path
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
        return 8 * int(json.loads((Path(base) / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    try:
        return settings_of(os.fspath(base)).size
    except ValueError:
        return BASES["sd-1.4"].size


def room() -> float | None:
    """GiB that are free on the GPU for this process; None without one."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / GIB


def on_gpu(base: str | os.PathLike) -> str | None:
    """Say in a sentence what a large base needs of this machine's GPU, and how it will fit.

    Parameters
    ----------
    base : str or path
        A base's name, folder or hub id; nothing is loaded.

    Returns
    -------
    str or None
        None without a GPU, or if nothing is known of the base.
    """
    free, need = room(), NEEDS.get(os.fspath(base))
    if free is None or need is None:
        return None
    how = f"down to {need.least} GiB in smaller pieces" if need.train > free else "as it is"
    said = (
        f"GPU memory in half precision: {need.sample} GiB to sample, {need.train} GiB to train, {how}; {free:.1f} GiB "
        "are free."
    )
    if max(need.sample, need.least) > free:
        said += " That may not fit: close what else uses the GPU, or choose a smaller base."
    return said


def _about(minutes: float) -> str:
    if minutes < 90:
        return f"about {max(1, round(minutes))} minutes" if minutes >= 1.5 else "about a minute"
    return f"about {round(minutes / 30) / 2:g} hours"
