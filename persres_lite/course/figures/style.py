"""The one style of all figures, and the figure that shows itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
import torch
from IPython.display import Markdown, display
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
"""Inches that a figure may be wide: a notebook's column."""
DPI = 220
"""Twice what a screen is counted as, for sharp letters; a figure is shown at half of its pixels."""
LARGE = 100_000
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
MARKERS = "osD^vP*X<>ph8d"


def looks(names: Sequence[str]) -> list[tuple[str, Any, str]]:
    """A color, a dash and a marker for each name: its own if it is a way of sampling, else the next ones not taken.

    Of several names that mean one way, as "disc, half" and "disc, quarter", the first has its look, and the others have
    its color with dashes and markers that are not taken.
    """
    found: dict[str, tuple[str, Any, str]] = {}
    ways = {
        name: way
        for way in sorted(WAYS, key=len)
        for name in names
        if name == way or name.startswith((way + ",", way + " "))
    }
    colors = cycle([color for color in COLORS if color not in {WAYS[way][0] for way in ways.values()}] or COLORS)
    for name in sorted(names, key=lambda name: name not in ways):
        if name in ways and WAYS[ways[name]] not in found.values():
            found[name] = WAYS[ways[name]]
            continue
        dashes, markers = ({look[part] for look in found.values()} for part in (1, 2))
        markers |= {look[2] for look in WAYS.values()} if ways else set()
        found[name] = (
            WAYS[ways[name]][0] if name in ways else next(colors),
            next((dash for dash in DASHES if dash not in dashes), DASHES[-1]),
            next((marker for marker in MARKERS if marker not in markers), MARKERS[-1]),
        )
    return [found[name] for name in names]


class Drawing(Figure):
    """A figure that shows itself at the end of a cell, without pyplot and its list of open figures: as a PNG, or as a
    JPEG if it is full of pictures, with its caption as text below it, which a screen reader reads as well.
    """

    caption: str | None = None

    def picture(self) -> tuple[str, bytes, dict[str, Any]]:
        """Its type, its bytes, and the metadata of a notebook's output: the size to show it at, and its words."""
        buffer = io.BytesIO()
        self.savefig(buffer, dpi=DPI, bbox_inches="tight", pad_inches=0.05)
        drawn, kind, options = Image.open(buffer).convert("RGB"), "png", {}
        if not any(np.asarray(image.get_array()).ndim == 3 for axes in self.axes for image in axes.images):
            drawn = drawn.quantize(256, dither=Image.Dither.NONE)  # lines and letters need no more colors
        elif buffer.tell() > LARGE:
            kind, options = "jpeg", {"quality": 80}
        buffer = io.BytesIO()
        drawn.save(buffer, kind, optimize=True, **options)
        about = {"width": drawn.width // 2, "height": drawn.height // 2, "alt": self.caption or ""}
        return f"image/{kind}", buffer.getvalue(), about

    def _ipython_display_(self) -> None:
        kind, data, about = self.picture()
        display({kind: data, "text/plain": repr(self)}, metadata={kind: about}, raw=True)
        if self.caption:
            display(Markdown(self.caption))

    def __repr__(self) -> str:
        return f"Figure: {self.caption or 'without a caption'}"


def new_figure(width: float, height: float, caption: str | None = None) -> Drawing:
    """An empty figure in the common style, `width` x `height` inches, outside of pyplot."""
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.caption = caption
    return figure


def new_axes(figure: Drawing, rows: int = 1, columns: int = 1, **options: Any) -> np.ndarray:
    """Axes (rows, columns) in the common style."""
    with matplotlib.rc_context(STYLE):
        return figure.subplots(rows, columns, squeeze=False, **options)


def new_plot(width: float = 5.5, height: float = 3.0, caption: str | None = None) -> tuple[Drawing, Any]:
    """A figure with one pair of axes."""
    figure = new_figure(width, height, caption)
    return figure, new_axes(figure)[0, 0]


def bare(*axes: Any) -> None:
    """Take frames and ticks off axes that show pictures."""
    for each in axes:
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(False)


def as_array(values: Any) -> np.ndarray:
    """A tensor from any device, a picture (gray, in [0, 1]) or whatever NumPy understands."""
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    if isinstance(values, Image.Image):
        return np.asarray(values.convert("L"), dtype=float) / 255
    return np.asarray(values, dtype=float)
