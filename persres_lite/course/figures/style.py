"""The one style of all figures, and the figure that shows itself."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Okabe and Ito's colors, which most readers can tell apart; strong ones first."""

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
}
WIDTH = 7.0
"""Inches that a figure may be wide: a notebook's column, at `DPI`."""
DPI = 110
LARGE = 60_000
"""Bytes beyond which a figure is stored as a JPEG, a fifth of the size: a notebook must stay below a megabyte."""

WAYS: dict[str, tuple[str, Any, str]] = {  # color, dash and marker
    "original": ("#555555", ":", "o"),
    "residual": ("#0072b2", "-", "s"),
    "LAG": ("#d55e00", "--", "D"),
    "LAG, both": ("#009e73", "-.", "^"),
    "true mask": ("#e69f00", (0, (5, 1)), "*"),
    "disc": ("#cc79a7", (0, (1, 1)), "v"),
    "random half": ("#56b4e9", (0, (3, 1, 1, 1)), "P"),
    "complement": ("#f0e442", (0, (8, 2)), "X"),
}
"""The ways of sampling look the same in every notebook; also under a longer name, as in "LAG, median"."""

NEUTRAL = ("#ececec", "#767676")
"""Fill and outline of what no method has made, as a floor and a ceiling: it must not look like a way."""

DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
"""Curves that cross are told apart by these too, not by color alone."""
MARKERS = "osD^vP*X"


def looks(names: Sequence[str]) -> list[tuple[str, Any, str]]:
    """A color, a dash and a marker for each name: its own if it is a way of sampling, else the next ones not taken.

    Of several names that mean one way, as "disc, half" and "disc, quarter", the first has its look, and the others have
    its color with dashes and markers that are not taken.
    """
    longest = sorted(WAYS, key=len, reverse=True)
    found: dict[str, tuple[str, Any, str]] = {}
    for name in names:
        way = next((way for way in longest if name == way or name.startswith((f"{way},", f"{way} "))), None)
        if way and WAYS[way] not in found.values():
            found[name] = WAYS[way]
        elif way:
            found[name] = WAYS[way][0], *_not_taken(found)
    taken = {color for color, _, _ in found.values()}
    free = [color for color in COLORS if color not in taken] or list(COLORS)
    rest = [name for name in names if name not in found]
    for number, name in enumerate(rest):
        place = number + len(found)
        found[name] = free[number % len(free)], DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)]
    return [found[name] for name in names]


def _not_taken(found: dict[str, tuple[str, Any, str]]) -> tuple[Any, str]:
    """A dash and a marker that no look has, or the last ones."""
    dashes, markers = ({look[part] for look in found.values()} for part in (1, 2))
    markers |= {look[2] for look in WAYS.values()}
    return next((d for d in DASHES if d not in dashes), DASHES[-1]), next(
        (m for m in "<>ph8d" if m not in markers), "d"
    )


class Drawing(Figure):
    """A figure that shows itself at the end of a cell, without pyplot and its list of open figures: as a PNG, or as a
    JPEG if it is full of pictures. Its caption, or what `alt` says instead, is what a screen reader reads.
    """

    caption: str | None = None
    alt: str | None = None

    def _repr_png_(self) -> tuple[bytes, dict[str, str]] | None:
        png = self._drawn("png")
        return (png, self._described()) if len(png) <= LARGE else None

    def _repr_jpeg_(self) -> tuple[bytes, dict[str, str]] | None:
        if len(self._drawn("png")) <= LARGE:
            return None
        return self._drawn("jpeg", pil_kwargs={"quality": 88, "subsampling": 0, "optimize": True}), self._described()

    def _drawn(self, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.05, **options)
        return buffer.getvalue()

    def _described(self) -> dict[str, str]:
        words = self.alt or self.caption
        return {"alt": words} if words else {}

    def __repr__(self) -> str:
        return f"Figure: {self.alt or self.caption or 'without a caption'}"


def new_figure(width: float, height: float) -> Drawing:
    """An empty figure in the common style, `width` x `height` inches, outside of pyplot."""
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_plot(width: float = 5.5, height: float = 3.0) -> tuple[Drawing, Any]:
    """A figure with one pair of axes."""
    figure = new_figure(width, height)
    with matplotlib.rc_context(STYLE):
        return figure, figure.subplots()


def picture_axes(rows: int, columns: int, width: float, height: float) -> tuple[Drawing, np.ndarray]:
    """A figure with axes (rows, columns) for pictures, each `width` x `height` inches, without frames or ticks."""
    figure = new_figure(width * columns, height * rows)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    with matplotlib.rc_context(STYLE):
        axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(False)
    return figure, axes


def captioned(figure: Drawing, caption: str | None) -> Drawing:
    """Write the caption below a figure, which is also its text for those who do not see it."""
    if caption:
        figure.caption = caption
        wide = max(30, int(figure.get_figwidth() * 15))
        with matplotlib.rc_context(STYLE):
            figure.supxlabel(textwrap.fill(caption, wide), x=0.01, ha="left", fontsize=9.5, color="0.25")
    return figure


def as_array(values: Any) -> np.ndarray:
    """A tensor from any device, a picture (gray, in [0, 1]) or whatever NumPy understands."""
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    if isinstance(values, Image.Image):
        return np.asarray(values.convert("L"), dtype=float) / 255
    return np.asarray(values, dtype=float)


def fits(words: Sequence | None, number: int, what: str) -> None:
    """Raise a `ValueError` unless there is one of `words` for each of a `number` of things; None always fits."""
    if words is not None and len(words) != number:
        raise ValueError(f"{len(words)} {what} are given for {number}: give one for each.")
