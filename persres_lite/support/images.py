"""Reading anyone's pictures without surprises: every one becomes upright 8-bit sRGB, or is refused in one sentence."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from persres_lite.support.notices import tell

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
"""What is opened, whatever a file is called. Pillow knows forty more, among them one that starts a PostScript
interpreter (EPS). HEIF counts where a plugin for it is registered."""

MAX_PIXELS = 80_000_000
"""More than any camera makes at once. Larger files are refused before they are decoded, because a few kilobytes of a
compressed file can claim gigabytes of picture (a decompression bomb)."""

KEPT_PIXELS = 8_000_000
"""Larger pictures are reduced to this while they are read: twice what the largest base sees, and 24 megabytes."""

PICTURE_SUFFIXES = frozenset(".avif .bmp .gif .heic .heif .jfif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
"""What pictures' files are called. One of these that cannot be read is an error; any other file is skipped."""

ORIENTATION = 0x0112  # the one field of EXIF that is read
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

PathLike = str | Path
Picture = Image.Image | PathLike


BLACK_STAYS_BLACK = 0x2000  # lcms: black point compensation, for papers whose black is gray


class Unreadable(ValueError):
    """A picture that is refused; the message names it and says what to do."""


def read_image(source: Picture) -> Image.Image:
    """Read one picture as upright 8-bit sRGB.

    The camera's rotation mark (EXIF) is obeyed, colors are converted from the profile that the file carries (phones'
    Display P3, Adobe RGB, CMYK), transparency is laid over white, palette and gray become RGB, 16-bit gray is scaled to
    8 bit, of an animation the first frame is taken, and more than `KEPT_PIXELS` pixels are reduced to that many.

    Parameters
    ----------
    source : Picture
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
        If the file is of none of `FORMATS`, is broken, has more than `MAX_PIXELS` pixels, or holds numbers whose black
        and white are not known (floating point, 32-bit integers beyond 16 bits).
    """
    with _opened(source) as (image, name):
        rgb = _to_srgb(_flatten(image, "white", name), image.info.get("icc_profile"))
    rgb.info = {"source": name}
    return rgb


def read_mask(source: Picture, size: tuple[int, int]) -> Image.Image:
    """Read the mask of a picture: 8-bit gray, white where the object is.

    Parameters
    ----------
    source : Picture
        A file or a PIL picture, of any mode that :func:`read_image` takes. What is transparent counts as black.
    size : (int, int)
        (width, height) that it must have: the picture's. The mask of a picture that was reduced is reduced like it.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`read_image`; also if the size differs or nothing in it is white.
    """
    with _opened(source) as (image, name):
        mask = _flatten(image, "black", name).convert("L")
        if mask.size != _kept(size):
            sizes = f"{_shape(mask.size)} and its picture {_shape(size)}"
            raise Unreadable(f"The mask {name} is {sizes}: make them equal.")
    if np.asarray(mask).max() < 128:
        raise Unreadable(f"The mask {name} marks nothing: paint the object white on black.")
    mask.info = {"source": name}
    return mask


def read_images(source: Picture | Iterable[Picture]) -> tuple[list[Image.Image], list[str]]:
    """Read a folder of pictures, one file, or a list of files and PIL pictures.

    Parameters
    ----------
    source : Picture or iterable of Picture
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


def picture_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder and its other files, each in the order of names (2.png before 10.png).

    A picture is what is called so (`PICTURE_SUFFIXES`), and what is one by its content. Hidden files and subfolders are
    neither.
    """
    files = sorted((path for path in folder.iterdir() if path.name[0] != "." and path.is_file()), key=_natural)
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES or _looks_like_picture(path)]
    return pictures, [path for path in files if path not in pictures]


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
    image : PIL.Image.Image
        Mode RGB, any size.
    size : int
        Side of the result, in pixels: the base's.
    mask : PIL.Image.Image, optional
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
    _tell_small([image], size)
    square, cut = _cut(image, size, mask)
    return square if mask is None else (square, cut)


def square_crops(
    images: Sequence[Image.Image], size: int, masks: Sequence[Image.Image] | None = None
) -> tuple[list[Image.Image], list[Image.Image]]:
    """:func:`square_crop` of several pictures and of their masks, with one warning for all that have to be enlarged.

    Returns
    -------
    list of PIL.Image.Image, list of PIL.Image.Image
        The pictures and their masks; no masks if none were given.
    """
    _tell_small(images, size)
    cut = [_cut(image, size, mask) for image, mask in zip(images, masks or (None,) * len(images), strict=True)]
    return [image for image, _ in cut], [mask for _, mask in cut if mask is not None]


def _cut(image: Image.Image, size: int, mask: Image.Image | None) -> tuple[Image.Image, Image.Image | None]:
    name = _name(image)
    if 4 * min(image.size) < size:
        raise Unreadable(
            f"{name} is {_shape(image.size)}, less than a quarter of the {size} pixels that this base works with: "
            "use a larger one."
        )
    box = _square(image.size, mask)
    square = image.crop(box).resize((size, size), Image.Resampling.LANCZOS)  # resize(box=…) would look beyond the edge
    square.info = {"source": name}
    return square, mask and mask.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def _tell_small(images: Sequence[Image.Image], size: int) -> None:
    small = [image for image in images if 4 * min(image.size) >= size > min(image.size)]
    if len(small) == 1:
        what = f"{_name(small[0])} is {_shape(small[0].size)} and is enlarged to {size} x {size}: it will look soft."
        tell(what)
    elif small:
        names = some_names([_name(image) for image in small])
        tell(f"{len(small)} pictures are enlarged to {size} x {size} and will look soft: {names}.")


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
    pictures, others = picture_files(folder)
    skipped = [path.name for path in others]
    if not pictures:
        what = f": {len(skipped)} files there are no pictures ({some_names(skipped)})" if skipped else ""
        raise ValueError(f"There is no picture in {folder}{what}. Put three to five pictures of the concept in it.")
    return [read_image(path) for path in pictures], skipped


def _looks_like_picture(path: Path) -> bool:
    # The raw files of cameras begin like a TIFF, and hold no picture that could be read as one.
    formats = [name for name in _formats() if name != "TIFF" or not path.suffix]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path, formats=formats).close()
    except Exception as error:  # whatever its parsers come across in a file that is something else
        return isinstance(error, Image.DecompressionBombError)
    return True


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _opened(source: Picture) -> Iterator[tuple[Image.Image, str]]:
    """A picture decoded, upright and not too large, in its own mode, and what to call it in messages.

    Whatever goes wrong with it, here or in the block, is one sentence: Pillow raises almost everything on odd files.
    """
    name = _name(source)
    if not isinstance(source, Image.Image) and not Path(source).is_file():
        what = "is a folder, not a picture" if Path(source).is_dir() else "does not exist"
        raise FileNotFoundError(f"{source} {what}: give the path of a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks: what matters of them is judged here
            if isinstance(source, Image.Image):
                decoded = _decoded(source)
            else:
                with Image.open(source, formats=_formats()) as image:
                    decoded = _decoded(image, reduce=True)
            yield decoded, name
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        limit = f"{MAX_PIXELS // 1_000_000} million pixels"
        raise Unreadable(f"{name} has more than {limit} and is not opened: make it smaller.") from None
    except UnidentifiedImageError:
        why = "broken, or of a format that is not opened here"
        raise Unreadable(f"{name} cannot be read as a picture ({why}): save it as JPEG or PNG.") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's: no permission, say
            raise
        why = str(error) or type(error).__name__
        raise Unreadable(f"{name} is broken or cut short ({why}): replace it or take it away.") from None


def _decoded(image: Image.Image, reduce: bool = False) -> Image.Image:
    """A new picture, upright and not too large; with `reduce` a JPEG is made smaller while it is decoded already."""
    if image.format not in (None, *FORMATS):  # someone's PIL picture that is not decoded yet
        raise UnidentifiedImageError
    claimed = image.size
    if not claimed[0] * claimed[1]:
        raise ValueError("it has no pixels")
    if claimed[0] * claimed[1] > MAX_PIXELS:
        raise Image.DecompressionBombError
    if reduce:
        image.draft(image.mode, _kept(claimed))
    drafted = image.size != claimed
    image.load()  # of an animation the first frame; a TIFF turns itself
    turn = _turn(image)
    image = _reduced(image, _kept(claimed if drafted else image.size))
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to put a picture upright; whatever else its EXIF holds, and of what type, is nobody's business here."""
    try:
        found = _orientation(image.info.get("exif") or b"")
        return TURNS.get(image.getexif()[ORIENTATION] if found is None else found)  # Pillow knows where else it may be
    except Exception:  # what cannot be read says nothing
        return None


def _orientation(exif: bytes) -> int | None:
    """The one field of EXIF that counts; Pillow gives up on all of them where one is damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    mark = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if mark is None:
        return None
    with suppress(struct.error):  # cut short
        (start,) = struct.unpack_from(f"{mark}I", exif, 4)
        (count,) = struct.unpack_from(f"{mark}H", exif, start)
        for field in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{mark}HH", exif, field)
            if tag == ORIENTATION:
                return struct.unpack_from(mark + {1: "B", 3: "H", 4: "I"}.get(kind, "H"), exif, field + 8)[0]
    return None


def _kept(size: tuple[int, int]) -> tuple[int, int]:
    """The size that a picture is reduced to: `KEPT_PIXELS` at most."""
    scale = (KEPT_PIXELS / (size[0] * size[1])) ** 0.5
    return size if scale >= 1 else (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def _reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A new picture of this size; one of a palette or of large numbers keeps its own until it is flattened."""
    if image.size == size or image.mode in ("1", "P", "PA", "F") or image.mode.startswith("I"):
        return image.copy()
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _flatten(image: Image.Image, background: str, name: str) -> Image.Image:
    """The picture without transparency, with 8 bits a channel and not too large."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, name)
    if "transparency" in image.info or image.mode.lower().endswith("a"):
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        flat = Image.new(image.mode[:-1], image.size, background)
        flat.paste(image.convert(flat.mode), mask=image.getchannel("A"))
        image = flat
    if image.mode not in ("L", "CMYK"):  # which have profiles of their own
        image = image.convert("RGB")
    return _reduced(image, _kept(image.size))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB as screens and models take it, of a picture whose colors are described by an ICC profile.

    A profile that is broken, or for another kind of picture, is ignored.
    """
    if profile:
        try:
            theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[theirs.profile.xcolor_space.strip()]
            if image.mode == "L" and mode == "RGB":  # a gray photograph keeps the profile of its camera
                image = image.convert("RGB")
            if image.mode == mode:
                ours = ImageCms.createProfile("sRGB")
                intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
                return ImageCms.profileToProfile(image, theirs, ours, intent, "RGB", flags=BLACK_STAYS_BLACK)  # type: ignore
        except Exception:  # as for EXIF: the picture is there without it
            pass
    return image.convert("RGB")


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floating point" if image.mode == "F" else "32-bit"
        raise Unreadable(f"{name} holds {kind} numbers whose black and white are not known: save it with 8 or 16 bits.")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _name(source: Picture) -> str:
    return str(source.info.get("source", "a picture")) if isinstance(source, Image.Image) else Path(source).name


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A sorting key that puts 2.png before 10.png."""
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in re.split(r"(\d+)", path.name) if part]


def some_names(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
