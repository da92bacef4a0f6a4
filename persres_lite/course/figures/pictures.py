"""Figures made of pictures: tables of them, maps laid over them, masks outlined on them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageFilter

from persres_lite.course.figures.style import PICTURES, WIDTH, Drawing, as_array, bare, new_axes

HEAT = "inferno"
SHOWN = 192
"""Pixels to which smaller pictures are enlarged, and that each has at least in a table."""

ORANGE, WHITE = (1.0, 0.55, 0.0), (1.0, 1.0, 1.0)

Pictures = Sequence[Image.Image | None]


def grid(
    pictures: Pictures | Sequence[Pictures],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    caption: str | None = None,
) -> Drawing:
    """Pictures side by side: a list is one row, a list of lists a table, None leaves a place empty.

    Parameters
    ----------
    rows, columns : list of str, optional
        Words beside the rows and above the columns, one for each; long ones are broken into lines.
    """
    table: Any = [pictures] if isinstance(pictures[0], Image.Image) else pictures
    figure, axes = _placed(table, columns or [], caption, margin=0.6 if rows else 0)
    for each, words in zip(axes[:, 0], rows or [""] * len(axes), strict=True):
        each.set_ylabel(textwrap.fill(words, 14), rotation=0, ha="right", va="center", labelpad=6)
    return figure


def heats(
    pictures: Image.Image | Sequence[Image.Image],
    maps: Sequence[Any],
    titles: Sequence[str] | None = None,
    label: str = "attention",
    caption: str | None = None,
) -> Drawing:
    """Maps (h, w) over pictures, one for each or one for all, four in a row, all on one scale, with its color bar."""
    arrays = [as_array(values) for values in maps]
    ends = {"low": min(values.min() for values in arrays), "high": max(values.max() for values in arrays)}
    shown = [heat_picture(picture, values, **ends) for picture, values in _paired(pictures, arrays)]
    figure, axes = _tiles(shown, titles, 4, caption)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*ends.values()), HEAT)
    figure.colorbar(scale, ax=list(axes.flat), label=label, shrink=0.85, aspect=25)
    return figure


def outlines(
    pictures: Image.Image | Sequence[Image.Image],
    masks: Sequence[Any],
    titles: Sequence[str] | None = None,
    truth: Any = None,
    columns: int = 4,
    caption: str | None = None,
) -> Drawing:
    """Masks over pictures: the outside dimmed, the edge orange, and the edge of the true mask white.

    Parameters
    ----------
    truth : picture or tensor (h, w), optional
        The true mask, one for all.
    columns : int
        How many stand in a row.
    """
    shown = [outline_picture(picture, mask, truth) for picture, mask in _paired(pictures, masks)]
    return _tiles(shown, titles, columns, caption)[0]


def enlarge(picture: Image.Image, size: int = SHOWN) -> Image.Image:
    """The picture enlarged by a whole factor (Lanczos) to at least `size` pixels on its shorter side; never shrunk."""
    factor = max(1, -(-size // min(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def heat_picture(
    picture: Image.Image, attention: Any, low: float | None = None, high: float | None = None
) -> Image.Image:
    """The picture, dimmed, with a map laid over it in colors.

    Parameters
    ----------
    attention : tensor or array (h, w)
        The map, of any size.
    low, high : float, optional
        Values that get the darkest and the brightest color; the map's own extremes by default.
    """
    values = as_array(attention).astype(np.float32)
    shown = enlarge(picture).convert("L")
    scale = matplotlib.colors.Normalize(values.min() if low is None else low, values.max() if high is None else high)
    smooth = Image.fromarray(values).resize(shown.size, Image.Resampling.BILINEAR)
    colors = matplotlib.colormaps[HEAT](scale(np.asarray(smooth)))[..., :3]
    return _as_picture(0.35 * np.asarray(shown)[..., None] / 255 + 0.65 * colors)


def contour_picture(picture: Image.Image, attention: Any, share: float = 0.5) -> Image.Image:
    """The picture with an orange line around all that is above `share` of the map's highest value.

    Unlike colors over the picture it hides nothing. A flat map, all of it above the share, has no line.
    """
    pixels = np.asarray(enlarge(picture).convert("RGB")) / 255
    values = Image.fromarray(as_array(attention).astype(np.float32))
    smooth = values.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
    high = np.asarray(smooth) > share * np.asarray(values).max()
    pixels[_edge(high) | _edge(~high)] = ORANGE
    return _as_picture(pixels)


def outline_picture(picture: Image.Image, mask: Any, truth: Any = None) -> Image.Image:
    """The picture, dimmed outside the mask, with the mask's edge in orange and the true mask's, if given, in white."""
    shown = enlarge(picture)

    def enlarged(values: Any) -> np.ndarray:
        return np.asarray(_as_picture(as_array(values)).resize(shown.size, Image.Resampling.NEAREST)) / 255

    pixels = np.asarray(shown.convert("RGB")) / 255 * (0.45 + 0.55 * enlarged(mask)[..., None])
    pixels[_edge(enlarged(mask) > 0.5)] = ORANGE
    if truth is not None:
        pixels[_edge(enlarged(truth) > 0.5)] = WHITE
    return _as_picture(pixels)


def _as_picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))


def _paired(pictures: Image.Image | Sequence[Image.Image], over: Sequence[Any]) -> Iterable[tuple[Image.Image, Any]]:
    """Each picture, or the one again and again, with what is laid over it."""
    return zip([pictures] * len(over) if isinstance(pictures, Image.Image) else pictures, over, strict=True)


def _tiles(
    shown: Pictures, titles: Sequence[str] | None, columns: int, caption: str | None
) -> tuple[Drawing, np.ndarray]:
    """Pictures in rows of at most `columns`, with a title above each."""
    columns = min(columns, len(shown))
    table = [shown[at : at + columns] for at in range(0, len(shown), columns)]
    return _placed(table, titles or [], caption, margin=0.5, room=0.25 if titles else 0)


def _placed(
    table: Sequence[Pictures], titles: Sequence[str], caption: str | None, margin: float, room: float = 0.0
) -> tuple[Drawing, np.ndarray]:
    """A table of pictures, short rows filled up with empty places; titles above the first ones.

    Parameters
    ----------
    margin : float
        What stands beside the table, in widths of a picture.
    room : float
        Inches between the rows, for titles in each of them.
    """
    width = max(len(row) for row in table)
    side = max((SHOWN + 10) / PICTURES, min(WIDTH / (width + margin), 1.9))
    first = next(picture for row in table for picture in row if picture is not None)
    height = (side * first.height / first.width + room) * len(table)
    figure, axes = new_axes(side * width, height, caption, len(table), width)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    bare(*axes.flat)
    for row, places in zip(table, axes, strict=True):
        for picture, each in zip(row, places, strict=False):
            if picture is not None:
                each.imshow(enlarge(picture), interpolation="bicubic")
    for words, each in zip(titles, axes.flat, strict=False):
        each.set_title(textwrap.fill(words, max(8, int(side * 11))))
    return figure, axes


def _edge(inside: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have a neighbor outside it, two pixels wide; the picture's border is no edge."""
    return inside & ~np.asarray(Image.fromarray(inside).convert("L").filter(ImageFilter.MinFilter(5)), dtype=bool)
