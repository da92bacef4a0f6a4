"""Reading anyone's pictures without surprises: every one becomes upright 8-bit RGB, or is refused in one sentence."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 80_000_000
"""More than any camera makes at once. Larger files are refused before they are decoded, because a few kilobytes of a
compressed file can claim gigabytes of picture (a decompression bomb)."""

PICTURE_SUFFIXES = frozenset(".avif .bmp .gif .heic .heif .jfif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
"""What pictures' files are called. One of these that cannot be read is an error; any other file is skipped."""

PathLike = str | Path
Picture = Image.Image | PathLike


def read_image(source: Picture) -> Image.Image:
    """Read one picture as upright 8-bit RGB.

    The camera's rotation mark (EXIF) is obeyed, transparency is laid over white, CMYK, palette and gray become RGB,
    16-bit gray is scaled to 8 bit, and of an animation the first frame is taken.

    Parameters
    ----------
    source
        A file or a PIL picture. A PIL picture is not changed.

    Returns
    -------
    PIL.Image.Image
        Mode RGB. ``info["source"]`` keeps the file's name for messages.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no picture, is broken, has more than `MAX_PIXELS` pixels, or holds numbers whose black and white
        are not known (floating point, 32-bit integers beyond 16 bits).
    """
    image, name = _open(source)
    rgb = _flatten(image, "white", name).convert("RGB")
    rgb.info = {"source": name}
    return rgb


def read_mask(source: Picture, size: tuple[int, int]) -> Image.Image:
    """Read the mask of a picture: 8-bit gray, white where the object is.

    Parameters
    ----------
    source
        A file or a PIL picture, of any mode that :func:`read_image` takes. What is transparent counts as black.
    size
        (width, height) that it must have: the picture's.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`read_image`; also if the size differs or nothing in it is white.
    """
    image, name = _open(source)
    if image.size != size:
        raise ValueError(f"The mask {name} is {_shape(image.size)} and its picture {_shape(size)}: make them equal.")
    mask = _flatten(image, "black", name).convert("L")
    if np.asarray(mask).max() < 128:
        raise ValueError(f"The mask {name} marks nothing: paint the object white on black.")
    mask.info = {"source": name}
    return mask


def read_images(source: Picture | Iterable[Picture]) -> tuple[list[Image.Image], list[str]]:
    """Read a folder of pictures, one file, or a list of files and PIL pictures.

    Parameters
    ----------
    source
        A folder is read in the order of its file names (2.png before 10.png); its subfolders and hidden files are left
        alone. Files that are not pictures by name nor by content are skipped.

    Returns
    -------
    list of PIL.Image.Image
        At least one, each as :func:`read_image` gives it.
    list of str
        The names of the files that were skipped; empty unless `source` is a folder.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If there is not one picture in it, or if a picture cannot be read (see :func:`read_image`).
    """
    if isinstance(source, str | Path):
        path = Path(source)
        return _read_folder(path) if path.is_dir() else ([read_image(path)], [])
    if isinstance(source, Image.Image):
        return [read_image(source)], []
    images = [read_image(one) for one in source]
    if not images:
        raise ValueError("The list of pictures is empty: give three to five pictures of the concept.")
    return images, []


@overload
def square_crop(image: Image.Image, size: int, mask: None = None) -> Image.Image: ...
@overload
def square_crop(image: Image.Image, size: int, mask: Image.Image) -> tuple[Image.Image, Image.Image]: ...
def square_crop(image: Image.Image, size: int, mask: Image.Image | None = None):
    """Cut the largest square out of a picture and resize it.

    Without a mask the square is the middle one. With a mask it is moved, as far as the picture reaches, to have the
    object in its middle, and the mask is cut in the same way.

    Parameters
    ----------
    image
        Mode RGB, any size.
    size
        Side of the result, in pixels: the base's.
    mask
        Mode L, of the picture's size, white where the object is.

    Returns
    -------
    PIL.Image.Image, or a pair of them
        The picture, (size, size); with a mask the pair of picture and mask.

    Raises
    ------
    ValueError
        If the shorter side is less than a quarter of `size`, or if the mask is of another size than the picture.

    Warns
    -----
    UserWarning
        If the picture is smaller than `size` and has to be enlarged.
    """
    side = min(image.size)
    name = image.info.get("source", "a picture")
    if 4 * side < size:
        raise ValueError(
            f"{name} is {_shape(image.size)}, less than a quarter of the {size} pixels that this base works with: "
            "use a larger one."
        )
    if side < size:
        message = f"{name} is {_shape(image.size)} and is enlarged to {size} x {size}: it will look soft."
        warnings.warn(message, stacklevel=2)
    box = _square(image.size, mask)
    square = image.crop(box).resize((size, size), Image.Resampling.LANCZOS)  # resize(box=…) would look beyond the edge
    square.info = {"source": name}
    if mask is None:
        return square
    return square, mask.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def _square(size: tuple[int, int], mask: Image.Image | None) -> tuple[int, int, int, int]:
    """The largest square in a picture of `size`, around the mask's object: (left, top, right, bottom)."""
    width, height = size
    side = min(size)
    middle = (width / 2, height / 2)
    if mask is not None:
        if mask.size != size:
            raise ValueError(f"The mask is {_shape(mask.size)} and its picture {_shape(size)}: make them equal.")
        found = mask.point(lambda value: 255 * (value >= 128)).getbbox()
        if found:
            middle = ((found[0] + found[2]) / 2, (found[1] + found[3]) / 2)
    left = round(min(max(middle[0] - side / 2, 0), width - side))
    top = round(min(max(middle[1] - side / 2, 0), height - side))
    return left, top, left + side, top + side


def _read_folder(folder: Path) -> tuple[list[Image.Image], list[str]]:
    files = sorted((path for path in folder.iterdir() if path.is_file() and path.name[0] != "."), key=_natural)
    images, skipped = [], []
    for path in files:
        if path.suffix.lower() in PICTURE_SUFFIXES or _looks_like_picture(path):
            images.append(read_image(path))
        else:
            skipped.append(path.name)
    if not images:
        others = f": {len(skipped)} files there are no pictures ({_names(skipped)})" if skipped else ""
        raise ValueError(f"There is no picture in {folder}{others}. Put three to five pictures of the concept in it.")
    return images, skipped


def _looks_like_picture(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return isinstance(error, Image.DecompressionBombError)
    return True


def _open(source: Picture) -> tuple[Image.Image, str]:
    """The picture decoded and upright, in its own mode, and what to call it in messages."""
    if isinstance(source, Image.Image):
        name = str(source.info.get("source", "a picture"))
    else:
        path = Path(source)
        name = path.name
        if not path.is_file():
            what = "is a folder, not a picture" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {what}: give the path of a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below, by our own limit
            opened = nullcontext(source) if isinstance(source, Image.Image) else Image.open(path)
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()  # of an animation the first frame
            return ImageOps.exif_transpose(image), name
    except Image.DecompressionBombError:
        limit = f"{MAX_PIXELS // 1_000_000} million pixels"
        raise ValueError(f"{name} has more than {limit} and is not opened: make it smaller.") from None
    except UnidentifiedImageError:
        why = "broken, or of a format that Pillow does not know"
        raise ValueError(f"{name} cannot be read as a picture ({why}): save it as JPEG or PNG.") from None
    except (OSError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise half way through a file
        raise ValueError(f"{name} is broken or cut short ({error}): replace it or take it away.") from None


def _flatten(image: Image.Image, background: str, name: str) -> Image.Image:
    """The picture without transparency and with 8 bits a channel."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, name)
    if "transparency" not in image.info and not image.mode.lower().endswith("a"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floating point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{name} holds {kind} numbers whose black and white are not known: save it with 8 or 16 bits.")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A sorting key that puts 2.png before 10.png."""
    return [(0, int(part)) if part.isdigit() else (1, part.lower()) for part in re.split(r"(\d+)", path.name) if part]


def _names(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
