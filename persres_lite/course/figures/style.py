"""The one style of all figures, and what shows itself: pictures as HTML, and plots."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.text import Text
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
"""Pixels an inch at which a plot is shown; it is drawn with twice as many, for sharp lines and letters."""
QUALITY = 88
"""Of a JPEG: 16 pictures at twice their shown size take some 290 KB of a notebook."""

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
        own: Any = WAYS.get(ways.get(name, ""))
        if own is None or own in found.values():
            taken = kept.union(*found.values())
            free = (next((each for each in choices if each not in taken), choices[-1]) for choices in (DASHES, MARKERS))
            own = own[0] if own else next(colors), *free
        found[name] = own
    return [found[name] for name in names]


@dataclass
class Shown:
    """What shows itself at the end of a cell as one piece of HTML, the same in every viewer: pictures with words for
    those who do not see them, the caption below as text.

    Attributes
    ----------
    body, below : str
        HTML above and below the caption. It reads well without its styles, which GitHub removes.
    """

    body: str
    caption: str | None = None
    below: str = ""

    @property
    def html(self) -> str:
        """All of it."""
        words = f'<figcaption style="max-width:52em">{escape(self.caption)}</figcaption>' if self.caption else ""
        return f'<figure style="margin:0">{self.body}{words}{self.below}</figure>'

    def _ipython_display_(self) -> None:
        display({"text/html": self.html, "text/plain": repr(self)}, raw=True)

    def __repr__(self) -> str:
        return f"Figure: {self.caption or 'without a caption'}"


class Drawing(Figure):
    """A plot that shows itself, without pyplot and its list of open figures; in words, it is all that is written in it.

    Attributes
    ----------
    below : str
        HTML below the caption.
    """

    caption: str | None = None
    below = ""

    def shown(self) -> Shown:
        """The plot as HTML."""
        buffer = io.BytesIO()
        self.savefig(buffer, dpi=2 * SCREEN, bbox_inches="tight", pad_inches=0.05)
        drawn = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        written: Any = self.findobj(Text)
        words = (text.get_text().replace("\n", " ") for text in written)
        alt = f"Plot: {', '.join(dict.fromkeys(each for each in words if re.match(r'[^$]*[A-Za-z]', each)))}"
        return Shown(img(encoded(drawn, "png"), alt, drawn.width / 2, "100%"), self.caption, self.below)

    def _ipython_display_(self) -> None:
        self.shown()._ipython_display_()


def encoded(picture: Image.Image, kind: str) -> bytes:
    """The picture as a file of a kind: "png" or "jpeg"."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=QUALITY, optimize=kind == "jpeg")
    return buffer.getvalue()


def img(data: bytes, alt: str, width: float, most: str = "none") -> str:
    """A picture's file as an HTML element, `width` pixels wide on the page, and at most `most` (CSS)."""
    kind = str(Image.open(io.BytesIO(data)).format).lower()
    source = f"data:image/{kind};base64,{b64encode(data).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" width="{width:.0f}" style="max-width:{most}">'


def html_table(rows: Iterable[str]) -> str:
    """Rows of cells as a table without lines, which scrolls if it is too wide."""
    body = "".join(f'<tr style="background:none">{row}</tr>' for row in rows)
    return f'<div style="overflow-x:auto"><table style="margin:0;border:0">{body}</table></div>'


def cells(words: Iterable[str], kind: str = "td", look: str = "") -> str:
    """Words as cells of a kind: "td" or, for a heading, "th"."""
    return "".join(f'<{kind} style="padding:2px 6px;{look}">{escape(each)}</{kind}>' for each in words)


def new_plot(
    width: float = 5.5, height: float = 3.0, caption: str | None = None, columns: int = 1, **options: Any
) -> tuple[Drawing, Any]:
    """A figure in the common style, `width` x `height` inches, outside of pyplot, and its axes: of several columns an
    array.
    """
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained", facecolor="white")
        figure.caption = caption
        return figure, figure.subplots(1, columns, **options)


def as_array(values: Any) -> np.ndarray:
    """A tensor from any device, a picture (gray, in [0, 1]) or whatever NumPy understands."""
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    if isinstance(values, Image.Image):
        return np.asarray(values.convert("L"), dtype=float) / 255
    return np.asarray(values, dtype=float)
