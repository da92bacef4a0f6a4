"""The one style of all figures, and the figure that shows itself."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
import torch
from IPython.display import Markdown, display
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
SCREEN = 110
"""Pixels an inch at which a figure is shown."""
DPI = 2 * SCREEN
"""Of lines and letters: twice the screen's, for sharp ones."""
PICTURES, QUALITY = 160, 75
"""Pixels an inch and quality of a JPEG: a table of 4 x 4 pictures takes some 110 KB of a notebook, which must stay
below a megabyte with all of its figures."""
LARGE = 100_000
"""Bytes of a PNG beyond which a figure of pictures is stored as a JPEG, a fifth of the size."""

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
    ways = {name: way for way in sorted(WAYS, key=len) for name in names if re.match(rf"{way}(?![^ ,])", name)}
    colors = cycle([color for color in COLORS if color not in {WAYS[way][0] for way in ways.values()}] or COLORS)
    kept = {look[2] for look in WAYS.values()} if ways else set()
    for name in sorted(names, key=lambda name: name not in ways):
        own = WAYS.get(ways.get(name, ""))
        if own is None or own in found.values():
            color = own[0] if own else next(colors)
            dashes, markers = ({look[part] for look in found.values()} for part in (1, 2))
            own = color, _free(DASHES, dashes), _free(MARKERS, markers | kept)
        found[name] = own
    return [found[name] for name in names]


def _free(choices: Sequence, taken: set) -> Any:
    return next((choice for choice in choices if choice not in taken), choices[-1])


class Drawing(Figure):
    """A figure that shows itself at the end of a cell, without pyplot and its list of open figures: as a PNG, or as a
    JPEG if it is full of pictures, with its caption as text below it, which a screen reader reads as well.
    """

    caption: str | None = None

    def picture(self) -> tuple[str, bytes, dict[str, Any]]:
        """Its type, its bytes, and the metadata of a notebook's output: the size to show it at, and its words."""
        kind, dpi, drawn = "png", DPI, self._drawn(DPI)
        if not any(np.asarray(image.get_array()).ndim == 3 for axes in self.axes for image in axes.images):
            drawn = drawn.quantize(256, dither=Image.Dither.NONE)  # lines and letters need no more colors
        data = _stored(drawn, kind)
        if drawn.mode == "RGB" and len(data) > LARGE:
            kind, dpi, drawn = "jpeg", PICTURES, self._drawn(PICTURES)
            data = _stored(drawn, kind)
        width, height = (side * SCREEN // dpi for side in drawn.size)
        return f"image/{kind}", data, {"width": width, "height": height, "alt": self.caption or ""}

    def _drawn(self, dpi: int) -> Image.Image:
        buffer = io.BytesIO()
        self.savefig(buffer, dpi=dpi, bbox_inches="tight", pad_inches=0.05)
        return Image.open(buffer).convert("RGB")

    def _ipython_display_(self) -> None:
        kind, data, about = self.picture()
        display({kind: data, "text/plain": repr(self)}, metadata={kind: about}, raw=True)
        if self.caption:
            display(Markdown(self.caption))

    def __repr__(self) -> str:
        return f"Figure: {self.caption or 'without a caption'}"


def _stored(drawn: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    drawn.save(buffer, kind, optimize=True, quality=QUALITY)
    return buffer.getvalue()


def new_axes(
    width: float, height: float, caption: str | None, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Drawing, np.ndarray]:
    """A figure in the common style, `width` x `height` inches, outside of pyplot, and its axes (rows, columns)."""
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained", facecolor="white")
        figure.caption = caption
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def new_plot(width: float = 5.5, height: float = 3.0, caption: str | None = None) -> tuple[Drawing, Any]:
    """A figure with one pair of axes."""
    figure, axes = new_axes(width, height, caption)
    return figure, axes[0, 0]


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
