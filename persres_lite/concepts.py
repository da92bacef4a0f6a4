"""A concept: a few reference pictures of one particular thing, its class, and the rare token that will name it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from persres_lite.masks import read_mask
from persres_lite.support.images import Picture, kept_size, picture_files, read_images, some_names
from persres_lite.support.notices import tell
from persres_lite.support.paths import data_dir

RARE_TOKEN = "sks"
"""A word that CLIP's vocabulary holds as one token and that hardly means anything; the paper leaves its choice open."""

CARD = "concept.json"


@dataclass
class Concept:
    """Reference pictures and the words that will mean them. ``str(concept)`` is what to put into a prompt: "sks cat".

    Attributes
    ----------
    name : str
        What to call it in titles and file names.
    macro_class : str
        The paper's macro class: the word for things of this kind, "cat" or "teddy bear".
    token : str
        The paper's V*: a rarely used word.
    images : list of picture
        Reference pictures, RGB, each of its own size.
    masks : list of picture, optional
        For each picture where the object is (L, of the picture's size, white = object), or None if that is not known.
    path : path, optional
        The folder that they came from, or None.
    info : dict
        What else its card says: description, license, source, …
    """

    name: str
    macro_class: str
    token: str = RARE_TOKEN
    images: list[Image.Image] = field(default_factory=list)
    masks: list[Image.Image] | None = None
    path: Path | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.macro_class = " ".join(self.macro_class.split())
        if not self.macro_class:
            raise ValueError(f"The concept {self.name} needs a macro class: say what it is, as macro_class='cat'.")
        if self.token.split() != [self.token]:
            raise ValueError(f"The token must be one word without spaces, not {self.token!r}: for example 'sks'.")
        images, masks = ([each.size for each in pictures or ()] for pictures in (self.images, self.masks))
        if masks not in ([], images):
            raise ValueError(f"{self.name} has masks of {masks} pixels for pictures of {images}: give each its own.")

    def __str__(self) -> str:
        return f"{self.token} {self.macro_class}"

    @property
    def words(self) -> list[str]:
        """Token and macro class, one by one (the paper's set C), for instance for `record_attention`.

        LAG does not read them: it looks for the phrase ``str(concept)``, so that another cat in the prompt is left out.
        """
        return [self.token, self.macro_class]

    @property
    def training_prompt(self) -> str:
        """The paper's training prompt, "a photo of a V* [macro class]"."""
        return f"a photo of a {self}"


def shipped_concepts() -> list[str]:
    """The names of the concepts in the project's data, for `load_concept`."""
    return sorted(card.parent.name for card in (data_dir() / "concepts").glob(f"*/{CARD}"))


def load_concept(
    source: Picture | Iterable[Picture], macro_class: str | None = None, token: str | None = None
) -> Concept:
    """Read a concept from a folder, a zip, from files, or from PIL pictures.

    Parameters
    ----------
    source : path, picture, or list of them
        A folder with pictures, or a zip of one; the name of a shipped concept (`shipped_concepts`); or a list of files
        or PIL pictures. A folder without pictures of its own stands for the one folder inside that has some. It may
        hold a card, ``concept.json``, with at least ``macro_class``, and masks: ``masks/0.png`` for ``0.jpg``, white
        where the object is.
    macro_class, token : str, optional
        What it is, and the word that will name it. None takes the card's; without a card the class must be given, and
        the token is `RARE_TOKEN`.

    Returns
    -------
    Concept

    Raises
    ------
    FileNotFoundError
        If there is no such folder, file or shipped concept.
    ValueError
        If no macro class is known, the card is no JSON object, a picture or mask cannot be read (see
        `persres_lite.support.images`), there is no picture at all or in several folders, or only some have a mask.

    Warns
    -----
    UserWarning
        If files that are not pictures were skipped; it counts them, names the first, and says so where they are
        captions (``1.txt`` beside ``1.jpg``).
    """
    if isinstance(source, str | Path):
        source = _find(source)
        if source.suffix.lower() == ".zip":
            with TemporaryDirectory() as place:
                unpacked = Path(place) / source.stem
                shutil.unpack_archive(source, unpacked, "zip")  # which writes nothing outside of it
                return replace(load_concept(unpacked, macro_class, token), path=None)
        if source.is_dir():
            return _read_folder(source, macro_class, token)
    return Concept("concept", macro_class or "", token or RARE_TOKEN, read_images(source))


def _read_folder(outer: Path, macro_class: str | None, token: str | None) -> Concept:
    folder = _with_pictures(outer)
    images, card = read_images(folder), _read_card(folder / CARD) or _read_card(outer / CARD)
    concept = Concept(
        card.pop("name", folder.name),
        macro_class or card.get("macro_class", ""),
        token or card.get("token", RARE_TOKEN),
        images,
        _read_masks(folder / "masks", images),
        folder,
        info={key: value for key, value in card.items() if key not in ("macro_class", "token")},
    )
    if skipped := [path.name for path in picture_files(folder)[1] if path.name != CARD]:
        told = f"Skipped what is no picture in {folder} ({len(skipped)}): {some_names(skipped)}."
        if {Path(image.info["source"]).stem + ".txt" for image in images} & {*skipped}:
            told += f' Captions are not read: of every picture "{concept.training_prompt}" is learned.'
        tell(told)
    return concept


def _find(source: str | Path) -> Path:
    """The folder or file itself, or a shipped concept's folder, whatever the working directory is."""
    path, shipped = Path(source).expanduser(), ""
    places = [path]
    with suppress(FileNotFoundError):  # no project around: only the path itself counts
        places += [data_dir() / "concepts" / path, data_dir().parent / path]
        shipped = f", or take a shipped concept ({', '.join(shipped_concepts())})"
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"There is no folder or picture {source}: check the path{shipped}.")


def _with_pictures(folder: Path) -> Path:
    """The folder, or, if it has no pictures of its own, the one inside that has, as programs pack and download them."""
    if picture_files(folder)[0]:
        return folder
    folders = [path for path in sorted(folder.rglob("*")) if path.is_dir()]
    inside = [path for path in folders if path.name != "masks" and path.name[0] != "." and picture_files(path)[0]]
    if len(inside) > 1:
        names = some_names([str(path.relative_to(folder)) for path in inside])
        raise ValueError(f"{folder} holds pictures in several folders ({names}): give one of them, or put all in one.")
    return inside[0] if inside else folder


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        card = dict(json.loads(path.read_text(encoding="utf-8-sig")))  # Windows puts a mark in front
        return card | {word: str(card[word]) for word in ("name", "macro_class", "token") if word in card}
    except (ValueError, TypeError, RecursionError) as error:
        example = '{"macro_class": "cat", "token": "sks"}'
        raise ValueError(f"{path} is not such a JSON object as {example} ({error}): mend it.") from None


def _read_masks(places: Path, images: list[Image.Image]) -> list[Image.Image] | None:
    """A picture and its mask belong together by name, the ending aside."""
    files = {path.stem: path for path in picture_files(places)[0]} if places.is_dir() else {}
    if not files:
        return None
    names = [Path(image.info["source"]).stem for image in images]
    missing = list(Counter(names) - Counter(files.keys()))  # also one of two pictures that differ in the ending alone
    if missing:
        raise ValueError(f"{places} has no mask for {some_names(missing)}: make one for every picture, or none.")
    return [_read_mask(files[name], image.size) for name, image in zip(names, images, strict=True)]


def _read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    values = read_mask(path)
    if values.max() < 0.5:
        raise ValueError(f"The mask {path} marks nothing: paint the object white on black.")
    mask = Image.fromarray((255 * values).round().byte().numpy())
    return mask.resize(size) if kept_size(mask.size) == size != mask.size else mask  # reduced as its picture was
