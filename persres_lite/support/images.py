"""Reading anyone's pictures without surprises: every one becomes upright 8-bit sRGB, or is refused in one sentence."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from persres_lite.support.notices import tell

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
"""What is opened, whatever a file is called. Pillow knows forty more, among them one that starts a PostScript
interpreter (EPS). HEIF, as phones write it, counts where pillow-heif is installed."""

KEPT_PIXELS = 8_000_000
"""Larger pictures are reduced to this while they are read: twice what the largest base sees, and 24 megabytes."""

PICTURE_SUFFIXES = frozenset(".avif .bmp .gif .heic .heif .jfif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
"""What pictures' files are called. One of these that cannot be read is an error; any other file is skipped."""

Picture = Image.Image | str | Path

BLACK_STAYS_BLACK = 0x2000  # lcms: black point compensation, for papers whose black is gray


def read_image(source: Picture) -> Image.Image:
    """Read one picture as upright 8-bit sRGB.

    The camera's rotation mark (EXIF) is obeyed, colors are converted from the profile that the file carries (phones'
    Display P3, Adobe RGB, CMYK), transparency is laid over white, palette and gray become RGB, 16-bit gray is scaled to
    8 bit, of an animation the first frame is taken, and more than `KEPT_PIXELS` pixels are reduced to that many.

    Parameters
    ----------
    source : path or picture
        A file or a PIL picture. A PIL picture is not changed.

    Returns
    -------
    PIL.Image.Image
        Mode RGB. ``info["source"]`` keeps the file's name for messages.

    Raises
    ------
    OSError
        If there is no such file, or it may not be read.
    ValueError
        If the file is of none of `FORMATS`, is broken, has so many pixels that Pillow warns of it (a few kilobytes of
        a compressed file can claim gigabytes of picture), or holds floating point numbers.
    """
    name = _name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks: what matters of them is judged here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _decoded(source)
            _turn_upright(image)
            rgb = _to_srgb(_flattened(image), image.info.get("icc_profile"))
    except Exception as error:  # Pillow raises almost everything on odd files
        if isinstance(error, OSError) and error.errno is not None:  # the system's own words
            raise
        heif = " (or pip install pillow-heif)" if name.lower().endswith((".heic", ".heif")) else ""
        why = str(error) or type(error).__name__
        raise ValueError(
            f"{name} cannot be read as a picture ({why}): save it as a JPEG or PNG of usual size{heif}."
        ) from None
    rgb.info = {"source": name}
    return rgb


def read_images(source: Picture | Iterable[Picture]) -> list[Image.Image]:
    """Read a folder of pictures, one file, or a list of files and PIL pictures.

    Parameters
    ----------
    source : path, picture, or list of them
        A folder is read in the order of its file names (2.png before 10.png), without what is no `picture_files`. Of
        a list each counts, also where two files of different folders have one name.

    Returns
    -------
    list of PIL.Image.Image
        At least one, each as `read_image` gives it.

    Raises
    ------
    OSError, ValueError
        As `read_image`; also if there is not one picture.
    """
    where = ""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        source, where = (picture_files(path)[0], f" in {path}") if path.is_dir() else ([path], "")
    images = [read_image(one) for one in ([source] if isinstance(source, Image.Image) else source)]
    if not images:
        raise ValueError(f"There is no picture{where}: give three to five pictures of the concept.")
    return images


def picture_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder and its other files, each in the order of names (2.png before 10.png).

    A picture is what is called so (`PICTURE_SUFFIXES`). Hidden files and subfolders are neither.
    """
    files = sorted((path for path in folder.iterdir() if path.name[0] != "." and path.is_file()), key=_natural)
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    return pictures, [path for path in files if path not in pictures]


def kept_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size that a picture is reduced to: `KEPT_PIXELS` at most."""
    scale = (KEPT_PIXELS / (size[0] * size[1])) ** 0.5
    return size if scale >= 1 else (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def square_crop(image: Image.Image, size: int, mask: Image.Image | None = None) -> Any:
    """Cut the largest square out of a picture and resize it.

    Without a mask the square is the middle one. With a mask it is moved, as far as the picture reaches, to have the
    object in its middle, and the mask is cut in the same way.

    Parameters
    ----------
    image : picture
        Mode RGB, any size.
    size : int
        Side of the result, in pixels: the base's.
    mask : picture, optional
        Mode L, of the picture's size, white where the object is.

    Returns
    -------
    PIL.Image.Image, or a pair of them
        The picture, (size, size); with a mask the pair of picture and mask.

    Warns
    -----
    UserWarning
        If the picture is smaller than `size` and has to be enlarged.
    """
    squares, masks = square_crops([image], size, [mask] if mask else None)
    return (squares[0], masks[0]) if mask else squares[0]


def square_crops(
    images: Sequence[Image.Image], size: int, masks: Sequence[Image.Image] | None = None
) -> tuple[list[Image.Image], list[Image.Image]]:
    """`square_crop` of several pictures and of their masks, with one warning for all that have to be enlarged.

    Returns
    -------
    list of PIL.Image.Image, list of PIL.Image.Image
        The pictures and their masks; no masks if none were given.
    """
    small = [f"{_name(image)} ({image.width} x {image.height})" for image in images if min(image.size) < size]
    if small:
        tell(f"Enlarged to {size} x {size}, which will look soft: {some_names(small)}.")
    squares, cut = [], []
    for number, image in enumerate(images):
        box = _square(image.size, masks[number] if masks else None)
        square = image.crop(box).resize((size, size), Image.Resampling.LANCZOS)  # resize(box=…) looks beyond the edge
        square.info = {"source": _name(image)}
        squares.append(square)
        if masks:
            cut.append(masks[number].crop(box).resize((size, size), Image.Resampling.BILINEAR))
    return squares, cut


def _square(size: tuple[int, int], mask: Image.Image | None) -> tuple[int, int, int, int]:
    """The largest square in a picture of `size`, around the mask's object: (left, top, right, bottom)."""
    found = mask and mask.point(lambda value: 255 * (value >= 128)).getbbox()
    x0, y0, x1, y1 = found or (0, 0, *size)
    side = min(size)
    left = round(min(max((x0 + x1) / 2 - side / 2, 0), size[0] - side))
    top = round(min(max((y0 + y1) / 2 - side / 2, 0), size[1] - side))
    return left, top, left + side, top + side


def formats() -> list[str]:
    """Those of `FORMATS` that can be opened here."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decoded(source: Picture) -> Image.Image:
    """A new picture in its own mode; a large JPEG is made smaller while it is decoded."""
    if isinstance(source, Image.Image):
        if source.format not in (None, *FORMATS):  # and not decoded yet, perhaps
            raise UnidentifiedImageError(f"{source.format} is not opened here")
        return source.copy()
    with Image.open(Path(source).expanduser(), formats=formats()) as image:
        image.draft(image.mode, kept_size(image.size))
        return image.copy()


def _turn_upright(image: Image.Image) -> None:
    """Obey the camera's mark; what is damaged says nothing."""
    with suppress(Exception):
        image.getexif()  # which keeps what it has read
        image.info.pop("exif", None)  # Pillow would write all of it anew, and fails on odd fields (Pillow #4665)
        ImageOps.exif_transpose(image, in_place=True)


def _flattened(image: Image.Image) -> Image.Image:
    """The picture without transparency, with 8 bits a channel and not too large."""
    if image.mode == "F":
        raise ValueError("of its numbers black and white are not known")
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info or image.mode.lower().endswith("a"):
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        flat = Image.new(image.mode[:-1], image.size, "white")
        flat.paste(image.convert(flat.mode), mask=image.getchannel("A"))
        image = flat
    if image.mode not in ("L", "CMYK"):  # which have profiles of their own
        image = image.convert("RGB")
    size = kept_size(image.size)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB as screens and models take it, of a picture whose colors are described by an ICC profile.

    A profile that is broken, or for another kind of picture, is ignored.
    """
    with suppress(Exception):  # the picture is there without it
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[theirs.profile.xcolor_space.strip()]
        if image.mode == "L" and mode == "RGB":  # a gray photograph keeps the profile of its camera
            image = image.convert("RGB")
        if image.mode == mode:
            ours, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
            return ImageCms.profileToProfile(image, theirs, ours, intent, "RGB", flags=BLACK_STAYS_BLACK)  # type: ignore
    return image.convert("RGB")


def _name(source: Picture) -> str:
    return str(source.info.get("source", "a picture")) if isinstance(source, Image.Image) else Path(source).name


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A sorting key that puts 2.png before 10.png."""
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in re.split(r"(\d+)", path.name) if part]


def some_names(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
