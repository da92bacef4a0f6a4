"""Figures made of pictures: tables of them, maps laid over them, masks outlined on them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import chain
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from persres_lite.course.figures.style import WIDTH, Drawing, as_array, captioned, fits, picture_axes

HEAT = "inferno"
SHOWN = 192
"""Pixels to which smaller pictures are enlarged."""

ORANGE, WHITE = (1.0, 0.55, 0.0), (1.0, 1.0, 1.0)


def grid(
    pictures: Sequence[Image.Image] | Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    caption: str | None = None,
) -> Drawing:
    """Pictures side by side: a list is one row, a list of lists a table, None leaves a place empty.

    Parameters
    ----------
    rows, columns : list of str, optional
        Words beside the rows and above the columns; long ones are broken into lines.
    """
    rows_given = [pictures] if isinstance(pictures[0], Image.Image) else pictures
    table: list[list[Image.Image | None]] = [list(row) for row in rows_given]  # type: ignore[arg-type]
    fits(rows, len(table), "rows")
    fits(columns, width := max(len(row) for row in table), "columns")
    titles: list[Sequence[str | None]] = [columns or [None] * width, *[[None] * width] * (len(table) - 1)]
    figure, axes = _placed([row + [None] * (width - len(row)) for row in table], titles, 0.6 if rows else 0)
    for each, words in zip(axes[:, 0], rows or [], strict=False):
        each.set_ylabel(textwrap.fill(words, 14), rotation=0, ha="right", va="center", labelpad=6)
    return captioned(figure, caption)


def heats(
    pictures: Image.Image | Sequence[Image.Image],
    maps: Sequence[Any],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    label: str = "attention",
    caption: str | None = None,
) -> Drawing:
    """Maps over pictures, all on one scale, with its color bar.

    Parameters
    ----------
    pictures : picture or list of picture
        One for each map, or one for all.
    maps : list of tensor (h, w)
        Each (h, w), any size.
    columns : int, optional
        How many stand in a row; at most four by default.
    """
    pictures = [pictures] * len(maps) if isinstance(pictures, Image.Image) else list(pictures)
    fits(pictures, len(maps), "pictures")
    fits(titles, len(maps), "titles")
    arrays = [as_array(values) for values in maps]
    low, high = min(a.min() for a in arrays), max(a.max() for a in arrays)
    shown = [heat_picture(picture, values, low, high) for picture, values in zip(pictures, arrays, strict=True)]
    figure, axes = _tiles(shown, titles, columns or min(4, len(shown)))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), HEAT)
    figure.colorbar(scale, ax=list(axes.flat), label=label, shrink=0.85, aspect=25)
    return captioned(figure, caption)


def outlines(
    pictures: Image.Image | Sequence[Image.Image],
    masks: Sequence[Any],
    titles: Sequence[str] | None = None,
    truth: Any = None,
    columns: int | None = None,
    caption: str | None = None,
) -> Drawing:
    """Masks over pictures: the outside dimmed, the edge orange, and the edge of the true mask white.

    Parameters
    ----------
    truth : picture or tensor (h, w), or a list of them, optional
        The true mask, one for all, or a list with one for each mask.
    """
    pictures = [pictures] * len(masks) if isinstance(pictures, Image.Image) else list(pictures)
    truths = list(truth) if isinstance(truth, list | tuple) else [truth] * len(masks)
    fits(pictures, len(masks), "pictures")
    fits(truths, len(masks), "true masks")
    fits(titles, len(masks), "titles")
    shown = [outline_picture(*each) for each in zip(pictures, masks, truths, strict=True)]
    figure, _ = _tiles(shown, titles, columns or min(4, len(shown)))
    return captioned(figure, caption)


def enlarge(picture: Image.Image, size: int = SHOWN) -> Image.Image:
    """The picture enlarged by a whole factor (Lanczos) to at least `size` pixels on its shorter side; never shrunk."""
    factor = -(-size // min(picture.size))
    if factor <= 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def heat_picture(
    picture: Image.Image, attention: Any, low: float | None = None, high: float | None = None
) -> Image.Image:
    """The picture, dimmed, with a map laid over it in colors.

    Parameters
    ----------
    attention : tensor or array (h, w)
        The map, (h, w), any size: tensor or array.
    low, high : float, optional
        Values that get the darkest and the brightest color; the map's own extremes by default.
    """
    values = as_array(attention)
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    shown = enlarge(picture).convert("L")
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    smooth = Image.fromarray((scaled * 255).round().astype(np.uint8)).resize(shown.size, Image.Resampling.BILINEAR)
    colors = matplotlib.colormaps[HEAT](np.asarray(smooth) / 255)[..., :3]
    gray = np.asarray(shown)[..., None] / 255
    return Image.fromarray(((0.35 * gray + 0.65 * colors) * 255).round().astype(np.uint8))


def contour_picture(picture: Image.Image, attention: Any, share: float = 0.5) -> Image.Image:
    """The picture with an orange line around all that is above `share` of the map's highest value.

    Unlike colors over the picture it hides nothing. A flat map, all of it above the share, has no line.
    """
    shown = enlarge(picture).convert("RGB")
    values = Image.fromarray(as_array(attention).astype(np.float32)).resize(shown.size, Image.Resampling.BICUBIC)
    high = np.asarray(values) > share * float(as_array(attention).max())
    pixels = np.asarray(shown).copy()

    pixels[_edge(high) | _edge(~high)] = [round(255 * part) for part in ORANGE]
    return Image.fromarray(pixels)


def outline_picture(picture: Image.Image, mask: Any, truth: Any = None) -> Image.Image:
    """The picture, dimmed outside the mask, with the mask's edge in orange and the true mask's, if given, in white."""
    shown = enlarge(picture)
    inside = _enlarged_mask(mask, shown.size)
    pixels = np.asarray(shown.convert("RGB")) / 255 * (0.45 + 0.55 * inside[..., None])
    pixels[_edge(inside > 0.5)] = ORANGE
    if truth is not None:
        pixels[_edge(_enlarged_mask(truth, shown.size) > 0.5)] = WHITE
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _tiles(shown: list[Image.Image], titles: Sequence[str] | None, columns: int) -> tuple[Drawing, np.ndarray]:
    """Pictures in rows of `columns`, each with its title."""
    empty = [None] * (-len(shown) % columns)
    pictures: list[Image.Image | None] = [*shown, *empty]
    given: Sequence[str | None] = titles or [None] * len(shown)
    words: list[str | None] = [*given, *empty]
    starts = range(0, len(pictures), columns)
    table, above = [pictures[at : at + columns] for at in starts], [words[at : at + columns] for at in starts]
    return _placed(table, above, 0.5, room=0.25 if titles else 0)


def _placed(
    table: Sequence[Sequence[Image.Image | None]],
    titles: Sequence[Sequence[str | None]],
    margin: float,
    room: float = 0.0,
) -> tuple[Drawing, np.ndarray]:
    """A table of pictures, all rows of one length, with words above each.

    Parameters
    ----------
    margin : float
        What stands beside the table, in widths of a picture.
    room : float
        Inches between the rows, for titles in each of them.
    """
    width = len(table[0])
    side = min(WIDTH / (width + margin), 1.9)
    first = next(picture for row in table for picture in row if picture is not None)
    figure, axes = picture_axes(len(table), width, side, side * first.height / first.width + room)
    for each, picture, words in zip(axes.flat, chain(*table), chain(*titles), strict=True):
        if picture is not None:
            each.imshow(enlarge(picture), interpolation="none")
        if words:
            each.set_title(textwrap.fill(words, max(8, int(side * 11))))
    return figure, axes


def _enlarged_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray((np.clip(as_array(mask), 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST)) / 255


def _edge(inside: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have a neighbor outside it, two pixels wide; the picture's border is no edge."""
    edge = np.zeros_like(inside)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            moved = np.roll(inside, step, axis)
            border = slice(0, step) if step > 0 else slice(step, None)
            index = (border, slice(None)) if axis == 0 else (slice(None), border)
            moved[index] = inside[index]
            edge |= inside & ~moved
    return edge
