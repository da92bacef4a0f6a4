"""What the explorers show, as still figures: for readers on GitHub, and for the printed page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from persres_lite.course.figures.pictures import grid, heat_picture, outlines
from persres_lite.course.figures.style import Shown
from persres_lite.masks import RULES, make_mask


def map_table(
    record: Any, picture: Image.Image, word: str, steps: Sequence[int] | None = None, caption: str | None = None
) -> Shown:
    """Where a word looked: a row for each step, a column for each block, the mean of all blocks last.

    Each picture has its own scale, because blocks differ far more in strength than in place.

    Parameters
    ----------
    record : AttentionRecord
        From `record_attention`, or anything with its ``.steps``, ``.blocks`` and ``.map(word, step=, block=)``.
    steps : list, optional
        Four of them by default, from first to last. The blocks are the first, the middle and the last one.
    """
    steps, blocks = steps or spread(record.steps, 4), spread(record.blocks, 3)
    table = [
        [heat_picture(picture, record.map(word, step=step, block=block)) for block in [*blocks, None]] for step in steps
    ]
    columns = [*(short_name(block) for block in blocks), "all blocks"]
    return grid(table, rows=[f"step {step}" for step in steps], columns=columns, caption=caption)


def mask_table(picture: Image.Image, attention: torch.Tensor, truth: Any = None, caption: str | None = None) -> Shown:
    """One map, and the mask that each rule makes of it, with the share of the picture that it takes.

    Parameters
    ----------
    attention : tensor (h, w)
        The map.
    truth : picture or tensor (h, w), optional
        The true mask, outlined in white.
    """
    masks = {rule: make_mask(attention, rule) for rule in RULES}
    titles = [f"{rule}: {mask.float().mean():.0%}" for rule, mask in masks.items()]
    return outlines(picture, list(masks.values()), titles, truth=truth, columns=3, caption=caption)


def scale_table(pictures: Mapping[float, Mapping[str, Image.Image]], caption: str | None = None) -> Shown:
    """Pictures from one noise: a column for each scale of the residual, a row for each way of sampling.

    Parameters
    ----------
    pictures : dict of float to dict of str to picture
        By scale, then by name: ``{0.0: {"residual": …, "LAG": …}, 1.0: …}``.
    """
    scales = sorted(pictures)
    names = list(dict.fromkeys(name for row in pictures.values() for name in row))
    table = [[pictures[scale].get(name) for scale in scales] for name in names]
    return grid(table, rows=names, columns=[f"scale {scale:g}" for scale in scales], caption=caption)


def spread(values: Sequence, number: int) -> list:
    """At most `number` of the values, evenly from the first to the last."""
    return list(dict.fromkeys(values[round(k * (len(values) - 1) / (number - 1))] for k in range(number)))


def short_name(block: str) -> str:
    """A block's name in few words: ``down_blocks.1.attentions.0.proj_out`` is ``down 1.0``, the middle one ``mid``."""
    short = re.sub(r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+).*", r"\1 \2.\3", block)
    return "mid" if block.startswith("mid_block") else short
