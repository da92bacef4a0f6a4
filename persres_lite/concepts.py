"""A concept: a few reference pictures of one particular thing, its class, and the rare token that will name it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from persres_lite.support.images import Picture, picture_files, read_images, read_mask, some_names
from persres_lite.support.notices import tell
from persres_lite.support.paths import data_dir

RARE_TOKEN = "sks"
"""A word that CLIP's vocabulary holds as one token and that hardly means anything; the paper leaves its choice open."""

CARD = "concept.json"
WORDS = ("name", "macro_class", "token")


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
        if not self.token or self.token.split() != [self.token]:
            raise ValueError(f"The token must be one word without spaces, not {self.token!r}: for example 'sks'.")
        if self.masks is not None and len(self.masks) != len(self.images):
            counts = f"{len(self.images)} pictures and {len(self.masks)} masks"
            raise ValueError(f"{self.name} has {counts}: give a mask for each picture.")

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
    source: Picture | Iterable[Picture],
    macro_class: str | None = None,
    token: str | None = None,
) -> Concept:
    """Read a concept from a folder, from files, or from PIL pictures.

    Parameters
    ----------
    source : path, picture, or list of them
        A folder with pictures; the name of a shipped concept (`shipped_concepts`); or a list of files or PIL pictures.
        A folder may hold a card, ``concept.json``, with at least ``macro_class``, and masks: ``masks/0.png`` for
        ``0.jpg``, white where the object is.
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
        If no macro class is known, the card is not JSON, a picture or mask cannot be read (see
        `persres_lite.support.images`), there is no picture at all, only some pictures have a mask, or it is not
        clear which mask belongs to which picture.

    Warns
    -----
    UserWarning
        If files that are not pictures were skipped; it counts them and names the first.
    """
    if isinstance(source, str | Path):
        source = _find(source)
    images, skipped = read_images(source)
    folder = source if isinstance(source, Path) and source.is_dir() else None
    card = _read_card(folder) if folder else {}
    skipped = [name for name in skipped if name != CARD]
    if skipped:
        what = "1 file that is no picture" if len(skipped) == 1 else f"{len(skipped)} files that are no pictures"
        tell(f"Skipped {what} in {folder}: {some_names(skipped)}.")
    return Concept(
        name=card.get("name", None) or (folder.name if folder else "concept"),
        macro_class=macro_class or card.get("macro_class", ""),
        token=token or card.get("token", RARE_TOKEN),
        images=images,
        masks=_read_masks(folder, images) if folder else None,
        path=folder,
        info={key: value for key, value in card.items() if key not in WORDS},
    )


def _find(source: str | Path) -> Path:
    """The folder or file itself, or a shipped concept's folder, whatever the working directory is."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    try:
        data = data_dir()
    except FileNotFoundError:
        data = path  # no project around: only the path itself counts
    for place in (data / "concepts" / path, data.parent / path):
        if (place / CARD).is_file():
            return place
    shipped = f", or take a shipped concept ({', '.join(shipped_concepts())})" if data != path else ""
    raise FileNotFoundError(f"There is no folder or picture {source}: check the path{shipped}.")


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows puts a mark in front
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): mend it or take it away.") from None
    if not isinstance(card, dict) or not all(isinstance(card.get(word, ""), str) for word in WORDS):
        raise ValueError(f'{path} must be one JSON object with words in it: {{"macro_class": "cat", "token": "sks"}}.')
    return card


def _read_masks(folder: Path, images: list[Image.Image]) -> list[Image.Image] | None:
    places = folder / "masks"
    files = picture_files(places)[0] if places.is_dir() else []
    if not files:
        return None
    names = [image.info["source"] for image in images]
    _refuse_doubles(places, [path.name for path in files])
    _refuse_doubles(folder, names)
    masks = {path.stem: path for path in files}
    missing = [Path(name).stem for name in names if Path(name).stem not in masks]
    if missing:
        raise ValueError(f"{places} has no mask for {some_names(missing)}: make one for every picture, or none.")
    return [read_mask(masks[Path(name).stem], image.size) for name, image in zip(names, images, strict=True)]


def _refuse_doubles(folder: Path, names: list[str]) -> None:
    """A picture and its mask belong together by name, the ending aside."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(Path(name).stem, name)
        if other != name:
            raise ValueError(f"{folder} holds {other} and {name}, and masks go by name without ending: rename one.")
