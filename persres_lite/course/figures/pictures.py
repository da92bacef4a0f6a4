"""Figures made of pictures: tables of them (and of numbers), maps laid over them, masks outlined on them, films."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from persres_lite.course.figures.style import Shown, as_array, cells, encoded, html_table, img
from persres_lite.support.files import whole_file
from persres_lite.support.sheet import sheet

HEAT = "inferno"
SIDE = 192
"""Pixels of a picture's shorter side on the page."""
SHOWN = 2 * SIDE
"""Pixels that it is stored with, for screens with two of them to one of the page."""
WIDE = 5
"""Pictures in a row, where the rows mean nothing."""
FILM = 1_500_000
"""Bytes of a film, at most."""

ORANGE, WHITE = (1.0, 0.55, 0.0), (1.0, 1.0, 1.0)

Pictures = Sequence[Image.Image | None]


def grid(
    pictures: Pictures | Sequence[Pictures],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    caption: str | None = None,
    most: int = 24,
) -> Shown:
    """Pictures side by side: a list is one row, a list of lists a table, None leaves a place empty.

    Parameters
    ----------
    rows, columns : list of str, optional
        Words beside the rows and above the columns, one for each. With the number of a picture where they are missing,
        they are what a reader is told who does not see it.
    most : int
        How many pictures are shown: the rows that do not fit are left out, and the caption says how many.
    """
    table: Any = [pictures] if isinstance(pictures[0], Image.Image) else pictures
    if len(table) == 1 and not rows:
        return Shown(_tiles(table[0], columns), caption)
    named = list(zip(rows or [""] * len(table), table, strict=True))
    fitting = named[: max(1, most // max(map(len, table)))]
    if len(fitting) < len(named):
        caption = f"{caption or ''} Shown: {len(fitting)} of {len(named)} rows.".strip()
    return Shown(_table([(label, columns or [], row) for label, row in fitting]), caption)


def heats(
    pictures: Image.Image | Sequence[Image.Image],
    maps: Sequence[Any],
    titles: Sequence[str] | None = None,
    label: str = "attention",
    caption: str | None = None,
) -> Shown:
    """Maps (h, w) over pictures, one for each or one for all, on one scale, which stands below them."""
    arrays = [as_array(values) for values in maps]
    low, high = min(values.min() for values in arrays), max(values.max() for values in arrays)
    shown = [heat_picture(picture, values, low, high) for picture, values in _paired(pictures, arrays)]
    colors = _as_picture(matplotlib.colormaps[HEAT](np.linspace(0, 1, SHOWN))[None, :, :3]).resize((SHOWN, 24))
    bar = img(encoded(colors, "png"), "to, from dark to bright,", SIDE)
    return Shown(f"{_tiles(shown, titles, 4)}<p>{escape(label)}: {low:.3f} {bar} {high:.3f}</p>", caption)


def outlines(
    pictures: Image.Image | Sequence[Image.Image],
    masks: Sequence[Any],
    titles: Sequence[str] | None = None,
    truth: Any = None,
    columns: int = 4,
    caption: str | None = None,
) -> Shown:
    """Masks over pictures: the outside dimmed, the edge orange, and the edge of the true mask white.

    Parameters
    ----------
    truth : picture or tensor (h, w), optional
        The true mask, one for all.
    columns : int
        How many stand in a row.
    """
    shown = [outline_picture(picture, mask, truth) for picture, mask in _paired(pictures, masks)]
    return Shown(_tiles(shown, titles, columns), caption)


def film(
    frames: Sequence[Image.Image | Sequence[Image.Image]],
    words: Sequence[str] = (),
    columns: Sequence[str] = (),
    caption: str | None = None,
    seconds: float = 0.3,
    path: Path | None = None,
) -> Shown:
    """An animated GIF below 1.5 MB: a concept appearing over training steps, or a mask over sampling.

    It is drawn for two pixels of the screen to one of the page, coarser where it would be too large, and with fewer
    frames where that is not enough. The last frame stands for two seconds.

    Parameters
    ----------
    frames : list of picture, or list of list of picture
        What is seen at each time: one picture, or several side by side.
    words : list of str, optional
        Above each frame, as "step 40".
    columns : list of str, optional
        Above the pictures of a frame.
    seconds : float
        How long a frame stands.
    path : Path, optional
        The GIF is also written there.
    """
    rows = [[frame] if isinstance(frame, Image.Image) else frame for frame in frames]
    for size, every in ((SHOWN, 1), (SHOWN * 2 // 3, 1), *((SIDE, 2**k) for k in range(6))):
        kept = sorted({*range(0, len(rows), every), len(rows) - 1})
        tables = ([[enlarge(each, size) for each in rows[k]]] for k in kept)
        drawn = [sheet(table, columns, words[k : k + 1], size // 32) for k, table in zip(kept, tables, strict=True)]
        if len(data := _gif(drawn, seconds * every)) <= FILM:
            break
    if path:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(data)
    seen = [*columns, " to ".join([*words[:1], *words[-1:]])]
    alt = f"Film of {len(kept)} frames: {', '.join(filter(None, seen))}".rstrip(": ")
    return Shown(img(data, alt, drawn[0].width * SIDE / size, "100%"), caption)


def heat_table(table: Mapping[str, Mapping[str, float]], caption: str | None = None) -> Shown:
    """A number in each cell, red where it is below zero and blue where it is above; each column has its own scale.

    Parameters
    ----------
    table : dict of str to dict of str to float
        By row, then by column; a cell that is missing or NaN stays white.
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    values = np.array([[row.get(column, np.nan) for column in columns] for row in table.values()], dtype=float)
    shares = values / np.nanmax(np.abs(values), axis=0, initial=1e-9)
    lines = [cells(["", *columns], "th")]
    for name, row, strengths in zip(table, values, shares, strict=True):
        line = cells([name], "th")
        for number, share in zip(row, strengths, strict=True):
            look = f"background:rgba({'0,114,178' if number > 0 else '213,94,0'},{abs(share) / 2:.2f})"
            line += "<td></td>" if np.isnan(number) else cells([f"{number:+.3f}"], "td", look)
        lines.append(line)
    return Shown(html_table(lines), caption)


def _gif(frames: Sequence[Image.Image], seconds: float) -> bytes:
    """Frames as an endless GIF, all in the colors of the first and the last, so that what stands still is still."""
    colors = sheet([[frames[0], frames[-1]]]).quantize(256, Image.Quantize.MEDIANCUT)
    drawn = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    times = [round(1000 * seconds)] * (len(frames) - 1) + [2000]
    drawn[0].save(buffer, "gif", save_all=True, append_images=drawn[1:], duration=times, loop=0)
    return buffer.getvalue()


def enlarge(picture: Image.Image, size: int = SHOWN) -> Image.Image:
    """The picture, in RGB, with `size` pixels on its shorter side: enlarged by a whole factor, then shrunk if
    that is too much (Lanczos, both).
    """
    factor = -(-size // min(picture.size))
    large = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)
    return ImageOps.cover(large, (size, size), Image.Resampling.LANCZOS)


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
    pixels = np.asarray(enlarge(picture)) / 255
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

    pixels = np.asarray(shown) / 255 * (0.45 + 0.55 * enlarged(mask)[..., None])
    pixels[_edge(enlarged(mask) > 0.5)] = ORANGE
    if truth is not None:
        pixels[_edge(enlarged(truth) > 0.5)] = WHITE
    return _as_picture(pixels)


def _as_picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))


def _paired(pictures: Image.Image | Sequence[Image.Image], over: Sequence[Any]) -> Iterable[tuple[Image.Image, Any]]:
    """Each picture, or the one again and again, with what is laid over it."""
    return zip([pictures] * len(over) if isinstance(pictures, Image.Image) else pictures, over, strict=True)


def _tiles(shown: Pictures, titles: Sequence[str] | None, columns: int = WIDE) -> str:
    """Pictures in rows of at most `columns`, as equal as can be, with a title above each."""
    columns = -(-len(shown) // -(-len(shown) // columns))
    parts = (slice(at, at + columns) for at in range(0, len(shown), columns))
    return _table([("", (titles or [])[part], shown[part]) for part in parts])


def _table(rows: Sequence[tuple[str, Sequence[str], Pictures]]) -> str:
    """Rows of (words beside, titles, pictures) as HTML; titles stand above the first of the rows that share them."""
    beside = any(words for words, *_ in rows)
    lines: list[str] = []
    numbers, last = count(1), None
    for label, titles, pictures in rows:
        if titles and titles != last:
            lines.append(cells([""] * beside + [*titles], "th", f"text-align:center;max-width:{SIDE}px"))
        last, line = titles, cells([label] * beside, "th", "text-align:right")
        for picture, title in zip_longest(pictures, titles):
            alt = ", ".join(filter(None, (label, title or f"picture {next(numbers)}")))
            line += f'<td width="{SIDE}" style="padding:2px">{_tile(picture, alt) if picture else ""}</td>'
        lines.append(line)
    return html_table(lines)


def _tile(picture: Image.Image, alt: str) -> str:
    shown = enlarge(picture)
    return img(encoded(shown, "png" if shown.getcolors(1024) else "jpeg"), alt, shown.width / 2)


def _edge(inside: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have a neighbor outside it, four pixels wide; the picture's border is no edge."""
    return inside & ~np.asarray(Image.fromarray(inside).convert("L").filter(ImageFilter.MinFilter(9)), dtype=bool)
