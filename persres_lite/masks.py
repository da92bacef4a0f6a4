"""Rules that make a mask of an attention map: the paper's median, and the alternatives.

Every rule is a pure function of maps (B, h, w), any positive values, and gives masks (B, h, w) in [0, 1]; none of them
waits for the device, so a mask costs a few small kernels. `RULES` is the table that the notebooks and the command line
read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Rule = Callable[..., torch.Tensor]


def median(maps: torch.Tensor, *, inclusive: bool = False) -> torch.Tensor:
    """1 above the map's median: half of the positions, however small the object is (paper: M_i, "binarize").

    Parameters
    ----------
    maps : tensor (B, h, w)
        Attention maps A_{i,C}.
    inclusive : bool
        The paper does not say `>` or `>=`. With `>` (default) exactly half of an even number of distinct values is
        chosen, and nothing of a constant map; with `>=` one position more, and all of a constant map.
    """
    flat = maps.flatten(1)
    middle = flat.median(dim=1, keepdim=True).values  # the lower of the two middle values
    return (flat >= middle if inclusive else flat > middle).to(maps.dtype).view_as(maps)


def quantile(maps: torch.Tensor, *, q: float = 0.75) -> torch.Tensor:
    """1 above the quantile `q` in [0, 1]: the share 1 - q of the positions, where the object's size is known."""
    flat = maps.flatten(1)
    return (flat > flat.quantile(q, dim=1, keepdim=True)).to(maps.dtype).view_as(maps)


def threshold(maps: torch.Tensor, *, level: float = 0.5) -> torch.Tensor:
    """1 above `level` of the way from the map's least to its greatest value; a constant map gives 0."""
    flat = maps.flatten(1)
    least, greatest = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return (flat > least + level * (greatest - least)).to(maps.dtype).view_as(maps)


def otsu(maps: torch.Tensor) -> torch.Tensor:
    """1 above the cut that separates the values best: greatest variance between the two classes (Otsu 1979).

    Computed on the sorted values themselves, without a histogram, so there are no bins to choose. A constant map
    gives 0.
    """
    flat = maps.flatten(1)
    values = flat.sort(dim=1).values  # (B, n)
    n = values.shape[1]
    below = torch.arange(1, n + 1, device=maps.device, dtype=values.dtype)  # a cut after the k-th value: k below it
    sums = values.cumsum(1)
    # between-class variance, w0 w1 (mu0 - mu1)^2 = (S n0/n - S0)^2 / (n0 n1) up to a constant
    spread = (sums[:, -1:] * below / n - sums).square() / (below * (n - below)).clamp(min=1)
    cut = values.gather(1, spread[:, :-1].argmax(1, keepdim=True)) if n > 1 else values
    return (flat > cut).to(maps.dtype).view_as(maps)


def soft(maps: torch.Tensor, *, sharpness: float = 4.0) -> torch.Tensor:
    """sigmoid(sharpness * (map - median) / std): the median rule without its edge, and it itself as sharpness grows.

    A constant map gives 1/2.
    """
    flat = maps.flatten(1)
    spread = flat.std(1, keepdim=True, correction=0).clamp(min=torch.finfo(flat.dtype).tiny)
    return torch.sigmoid(sharpness * (flat - flat.median(1, keepdim=True).values) / spread).view_as(maps)


#: All rules by name.
RULES: dict[str, Rule] = {"median": median, "otsu": otsu, "quantile": quantile, "soft": soft, "threshold": threshold}

#: What the rules' options may be.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "inclusive": (lambda value: value in (True, False), "true or false"),
    "q": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "level": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "sharpness": (lambda value: 0 < value < math.inf, "a number above 0"),
}


def find_rule(rule: str | Rule, /, **options: Any) -> Rule:
    """The function of maps that `rule`, by name or as it is, makes with these options.

    Raises
    ------
    ValueError
        If there is no such rule, if it has no such option, or if an option's value is out of its range.
    """
    if not callable(rule):
        if rule not in RULES:
            raise ValueError(f"Unknown mask rule {rule!r}: choose one of {', '.join(RULES)}, or pass a function.")
        name, rule = rule, RULES[rule]
        known = [key for key in inspect.signature(rule).parameters if key != "maps"]
        for unknown in (option for option in options if option not in known):
            raise ValueError(f"The mask rule {name!r} has no option {unknown!r}: it has {', '.join(known) or 'none'}.")
        for option, value in options.items():
            fits, wanted = RANGES.get(option, (lambda _: True, ""))
            if isinstance(value, str) or not fits(value):
                raise ValueError(f"The option {option} of the mask rule {name!r} must be {wanted}, not {value!r}.")
    return partial(rule, **options)


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

    Raises
    ------
    ValueError
        If there is no such rule or option, or if `maps` has other than 2 or 3 dimensions.
    """
    if maps.ndim not in (2, 3):
        raise ValueError(f"Expected one map (h, w) or several (B, h, w), got the shape {tuple(maps.shape)}.")
    masks = find_rule(rule, **options)(maps if maps.ndim == 3 else maps[None])
    return masks if maps.ndim == 3 else masks[0]


def resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Maps (B, h, w) at another resolution: bilinear to a finer one, averages of areas to a coarser one."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if size[0] < maps.shape[-2] or size[1] < maps.shape[-1]:
        return F.interpolate(maps[:, None], size, mode="area")[:, 0]
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def read_mask(mask: Any) -> torch.Tensor:
    """A mask drawn by hand as a tensor (h, w) or (images, h, w) in [0, 1].

    Parameters
    ----------
    mask : PIL image, array or tensor
        Pictures are read as gray; pictures and bytes are divided by 255, truth values are 0 and 1.

    Raises
    ------
    ValueError
        If it has other than 2 or 3 dimensions, or values outside [0, 1].
    """
    if hasattr(mask, "convert"):  # a PIL image
        mask = np.array(mask.convert("L"))
    mask = torch.as_tensor(mask)
    values = mask.float() / 255 if mask.dtype == torch.uint8 else mask.float()
    if values.ndim not in (2, 3):
        raise ValueError(f"Expected a mask (h, w) or (images, h, w), got the shape {tuple(values.shape)}.")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("A mask must lie between 0 and 1 (bytes between 0 and 255).")
    return values


def average(maps: Sequence[torch.Tensor], size: Sequence[int] | None = None) -> torch.Tensor:
    """The mean of maps (B, h, w) of several blocks or steps, at `size` or else at the finest of their resolutions.

    Raises
    ------
    ValueError
        If there is no map to average.
    """
    if not maps:
        raise ValueError("There is no map to average.")
    finest = size or max((tuple(each.shape[-2:]) for each in maps), key=lambda shape: shape[0] * shape[1])
    return torch.stack([resize(each, finest) for each in maps]).mean(0)


def refine(maps: torch.Tensor, affinity: torch.Tensor, times: int = 1) -> torch.Tensor:
    """Spread maps (B, h, w) along self-attention: A <- P A, `times` over, P (B, hw, hw) with rows that sum to 1.

    Positions that attend to each other come to agree, so a map that found an ear fills the cat. During sampling
    `refine=` of `localized` and `record_attention` does the same with the fused kernel, without ever holding P.
    """
    flat = maps.flatten(1).unsqueeze(2)  # (B, hw, 1)
    for _ in range(times):
        flat = affinity @ flat
    return flat.view_as(maps)
