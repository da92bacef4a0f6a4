"""Pictures in rows on one sheet, for files and sliders; figures for notebooks are drawn by `course.figures`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LINE = 18  # pixels of a line of words, at least


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    words: Sequence[str] = (),
    gap: int = 0,
    shown: int = 0,
) -> Image.Image:
    """Paste pictures into a table.

    Parameters
    ----------
    rows : list of list of PIL.Image.Image
        The last row may be shorter.
    titles : list of str, optional
        Above the columns.
    words : list of str, optional
        Above each row.
    gap : int
        Pixels between pictures and, where there are titles or words, around them.
    shown : int
        Width to which narrower pictures are enlarged; under titles 128 keeps them apart.

    Returns
    -------
    PIL.Image.Image
        RGB, white where nothing is.
    """
    pictures = [picture for row in rows for picture in row]
    width = max(shown, max(picture.width for picture in pictures))
    height = max(picture.height * width // picture.width for picture in pictures)
    edge = gap if titles or words else 0
    line = max(LINE, width // 9)
    font = ImageFont.load_default(line * 0.6)
    above, over = (line if titles else 0), (line if words else 0)
    across, down = width + gap, over + height + gap  # from one picture to the next
    size = (2 * edge + max(map(len, rows)) * across - gap, above + edge + len(rows) * down - gap)
    whole = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(whole)
    for column, title in enumerate(titles):
        draw.text((edge + column * across, 3), title, "black", font)
    for number, row in enumerate(rows):
        if words:
            draw.text((edge, above + number * down + 3), words[number], "gray", font)
        for column, picture in enumerate(row):
            if picture.width != width:
                picture = picture.resize((width, picture.height * width // picture.width))
            whole.paste(picture, (edge + column * across, above + number * down + over))
    return whole
