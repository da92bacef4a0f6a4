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
"""Bytes beyond which a figure is stored with 256 colors, a third of the size: a notebook must stay below a megabyte."""


class Drawing(Figure):
    """A figure that shows itself as a PNG at the end of a cell, without pyplot and its list of open figures."""

    caption: str | None = None

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.05)
        return buffer.getvalue() if buffer.tell() <= LARGE else _with_palette(buffer)


def _with_palette(png: io.BytesIO) -> bytes:
    buffer = io.BytesIO()
    # kmeans: the palette is improved until fewer than so many pixels change their color; half a second.
    few = Image.open(png).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=5000)
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Drawing:
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_plot(width: float = 5.5, height: float = 3.0) -> tuple[Drawing, Any]:
    figure = new_figure(width, height)
    with matplotlib.rc_context(STYLE):
        return figure, figure.subplots()


def picture_axes(rows: int, columns: int, width: float, height: float) -> tuple[Drawing, np.ndarray]:
    figure = new_figure(width * columns, height * rows)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    with matplotlib.rc_context(STYLE):
        axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(False)
    return figure, axes


def captioned(figure: Drawing, caption: str | None) -> Drawing:
    if caption:
        figure.caption = caption
        wide = max(30, int(figure.get_figwidth() * 15))
        with matplotlib.rc_context(STYLE):
            figure.supxlabel(textwrap.fill(caption, wide), x=0.01, ha="left", fontsize=9.5, color="0.25")
    return figure


def as_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    if isinstance(values, Image.Image):
        return np.asarray(values.convert("L"), dtype=float) / 255
    return np.asarray(values, dtype=float)


def fits(words: Sequence | None, number: int, what: str) -> None:
    if words is not None and len(words) != number:
        raise ValueError(f"{len(words)} {what} are given for {number}: give one for each.")
