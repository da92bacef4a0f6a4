"""Masks: made of an attention map by a rule, the paper's median or another; or drawn by hand, and read here.

Every rule is a pure function of maps (B, h, w), any positive values, and gives masks (B, h, w) in [0, 1]; none of them
waits for the device, so a mask costs a few small kernels. `RULES` is the table that the notebooks and the command line
read.

Positions are chosen by their rank, not by comparing numbers with a computed one: between two processors the last bit of
a median may differ, the number of positions never does. Of equal values those come first that stand first, row by row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

Rule = Callable[..., torch.Tensor]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What a mask may be stored as. Pillow knows forty more, among them one that starts a PostScript interpreter."""


def highest(maps: torch.Tensor, count: int) -> torch.Tensor:
    """1 at the `count` highest positions of each map (B, h, w), as far as they are above its least value."""
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(flat).scatter_(1, order[:, :count], 1)
    return (chosen * (flat > flat.amin(1, keepdim=True))).view_as(maps)


def median(maps: torch.Tensor) -> torch.Tensor:
    """1 above the map's median: the upper half of the positions, however small the object is (paper: M_i, "binarize").

    Without equal values this is `map > median`, the lower of the two middle values; of an odd number of positions the
    middle one stays outside. Equal values are told apart by their place, but for the least: a constant map gives 0.

    Parameters
    ----------
    maps : tensor (B, h, w)
        Attention maps A_{i,C}.
    """
    return highest(maps, maps[0].numel() // 2)


def quantile(maps: torch.Tensor, *, q: float = 0.75) -> torch.Tensor:
    """1 above the quantile `q` in [0, 1]: the share 1 - q of the positions, where the object's size is known.

    Without equal values this is `map > quantile(map, q)`; equal ones are told apart as for `median`.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"The quantile q is a share from 0 to 1, not {q}.")
    last = maps[0].numel() - 1
    return highest(maps, last - math.floor(q * last + 1e-6))  # 0.29 x 100 is 28.999999999999996


def threshold(maps: torch.Tensor, *, level: float = 0.5) -> torch.Tensor:
    """1 above `level` of the way from the map's least to its greatest value; a constant map gives 0."""
    flat = maps.flatten(1)
    least, greatest = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return (flat > least + level * (greatest - least)).to(maps.dtype).view_as(maps)


def otsu(maps: torch.Tensor) -> torch.Tensor:
    """1 above the cut that separates the values best: greatest variance between the two classes (Otsu 1979).

    Computed on the sorted values themselves, without a histogram, so there are no bins to choose. The cut is one of
    the values: equal ones stay together, and a constant map gives 0. Of cuts that are equally good to six digits the
    lowest counts.
    """
    flat = maps.flatten(1)
    values = flat.sort(dim=1).values  # (B, n)
    n = values.shape[1]
    below = torch.arange(1, n + 1, device=maps.device, dtype=values.dtype)  # a cut after the k-th value: k below it
    sums = values.cumsum(1)
    # between-class variance, w0 w1 (mu0 - mu1)^2 = (S n0/n - S0)^2 / (n0 n1) up to a constant
    spread = (sums[:, -1:] * below / n - sums).square() / (below * (n - below)).clamp(min=1)
    spread[:, -1] = 0  # nothing is above the last value
    best = (spread / spread.amax(1, keepdim=True)).round(decimals=6).argmax(1, keepdim=True)
    return (flat > values.gather(1, best)).to(maps.dtype).view_as(maps)


def soft(maps: torch.Tensor, *, sharpness: float = 4.0) -> torch.Tensor:
    """sigmoid(sharpness * (map - median) / std): the median rule without its edge, and it itself as sharpness grows.

    A constant map gives 1/2.
    """
    flat = maps.flatten(1)
    spread = flat.std(1, keepdim=True, correction=0).clamp(min=torch.finfo(flat.dtype).tiny)
    return torch.sigmoid(sharpness * (flat - flat.median(1, keepdim=True).values) / spread).view_as(maps)


#: All rules by name.
RULES: dict[str, Rule] = {"median": median, "otsu": otsu, "quantile": quantile, "soft": soft, "threshold": threshold}


def find_rule(rule: str | Rule, /, **options: Any) -> Rule:
    """The function of maps that `rule`, by name or as it is, makes with these options.

    Raises
    ------
    ValueError
        If there is no such rule.
    """
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(f"Unknown mask rule {rule!r}: choose one of {', '.join(RULES)}, or pass a function.")
    return partial(RULES[rule] if isinstance(rule, str) else rule, **options)


def make_mask(maps: torch.Tensor, rule: str | Rule = "median", /, **options: Any) -> torch.Tensor:
    """Masks in [0, 1] from attention maps.

    Parameters
    ----------
    maps : tensor (B, h, w) or (h, w)
        Several maps or one.
    rule : str or callable
        A rule of `RULES`, or a function of maps (B, h, w).
    **options
        Of the rule, for instance q=0.8 for 'quantile'.

    Returns
    -------
    tensor of the shape of `maps`
    """
    return find_rule(rule, **options)(maps.reshape(-1, *maps.shape[-2:])).view_as(maps)


def disc(shape: Sequence[int], share: float) -> torch.Tensor:
    """A round mask (h, w) in the middle, a control that looks at nothing: `share` of the positions, the nearest ones.

    Distances are compared as whole numbers, so it is the same everywhere.
    """
    y, x = (2 * torch.arange(side) - (side - 1) for side in shape)
    order = (y[:, None].square() + x.square()).flatten().argsort(stable=True)
    return torch.zeros(len(order)).scatter_(0, order[: round(share * len(order))], 1).view(*shape)


def resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Maps or masks (..., h, w) at another resolution: bilinear to a finer one, averages of areas to a coarser one."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    coarser = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    how = {"mode": "area"} if coarser else {"mode": "bilinear", "align_corners": False}
    return F.interpolate(maps.reshape(-1, 1, *maps.shape[-2:]), size, **how).view(*maps.shape[:-2], *size)


def average(maps: Sequence[torch.Tensor], size: Sequence[int] | None = None) -> torch.Tensor:
    """The mean of maps (..., h, w) of several blocks or steps, at `size` or else at the finest of their resolutions."""
    finest = size or max((each.shape[-2:] for each in maps), key=math.prod)
    return torch.stack([resize(each, finest) for each in maps]).mean(0)


def read_mask(mask: Any) -> torch.Tensor:
    """A mask that somebody drew, as a tensor (h, w) or (images, h, w) in [0, 1], 1 where the object is.

    Parameters
    ----------
    mask : path, PIL image, array or tensor, or a list of them
        A picture is white on black, with 8 or 16 bits, or a cut-out: then what is transparent is 0. Whole numbers are
        divided by the greatest of their kind, unless there is none but 0 and 1. Those of a list have one size.

    Raises
    ------
    ValueError
        If it cannot be told where the object is: colors, nothing that is white, numbers outside of [0, 1], NaN.
    """
    if isinstance(mask, (list, tuple)):
        return torch.stack([read_mask(each) for each in mask])
    if isinstance(mask, (str, os.PathLike)):
        with Image.open(mask, formats=FORMATS) as opened:
            mask = ImageOps.exif_transpose(opened)
    if isinstance(mask, Image.Image):
        mask = _gray(mask)
    mask = mask.detach() if isinstance(mask, torch.Tensor) else torch.from_numpy(np.array(mask))
    greatest = {torch.uint8: 255, torch.uint16: 65535, torch.int32: 65535}.get(mask.dtype, 1)
    values = mask.float()
    least, most = values.min().item(), values.max().item()
    if not 0 <= least <= most <= greatest or 1 < most < greatest / 2:  # NaN is no number between two
        raise ValueError(
            f"The mask has values from {least:g} to {most:g}, where white is {greatest}: paint the object white on "
            "black, or give numbers from 0 to 1."
        )
    return values if most <= 1 else values / greatest


def _gray(image: Image.Image) -> np.ndarray:
    """The numbers of a picture (h, w): its gray, or what of it is not transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        return np.array(image)
    *colors, alpha = np.array(image.convert("RGBA")).transpose(2, 0, 1).astype(int)
    if alpha.min() < 255:
        return alpha.astype(np.uint8)
    if np.ptp(colors, axis=0).max() > 64:  # JPEG turns gray into a little color
        raise ValueError("The mask has colors, so what the object is cannot be told: paint it white on black.")
    return np.array(image.convert("L"))
