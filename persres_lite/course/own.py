"""Lesson 07, `notebooks/07_your_own_concept.ipynb`: from your photographs to a concept, and what to know before.

What a run needs is said first; photographs come from a folder or an upload; they are looked at as the model will see
them, by plain arithmetic on pixels; the macro class is chosen by scores, and the rare token is taken to pieces.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ipywidgets import FileUpload
from PIL import Image, ImageFilter, ImageOps

from persres_lite.bases import BASES, settings_of
from persres_lite.concepts import load_concept
from persres_lite.cost import LARGE, NEEDS, on_gpu, picture_size, without_gpu
from persres_lite.course.start import NotReady, on_colab
from persres_lite.evaluation import JUDGES, PAPER_JUDGES, PARAMETERS
from persres_lite.support.files import whole_file
from persres_lite.support.images import square_crops
from persres_lite.support.rare_token import ENCODERS

LICENSES = {
    "toybox": "MIT",
    "sd-1.4": "CreativeML OpenRAIL-M, whose restrictions on use pass on to what you make of the model",
    "sd-2.1": "CreativeML Open RAIL++-M, whose restrictions on use pass on to what you make of the model",
}
LICENSES |= {"sd-1.5": LICENSES["sd-1.4"], "sdxl": LICENSES["sd-2.1"]}

CALL, STEP = 0.12, 1.6
"""Seconds that a T4 is assumed to take for a U-Net call of two pictures of 512 x 512, and for a training step of four:
assumptions for planning, not measurements."""

PICTURES, TRAININGS = 29, 2
"""What the notebook does with a base: so many pictures are drawn, and the last of its stages has so many times the
recipe's steps."""

ALIKE = 0.95
"""Correlation of two small gray copies above which they are nearly one picture."""

SOFT = 0.05
"""Share of a picture's contrast that its finest detail has; less looks blurred."""

SAME_PLACE = 0.08
"""Spread of the frames' mean colors, 0 to 1, below which all photographs seem to have one background."""

DRIVE = Path("/content/drive/MyDrive")
"""Where Colab mounts one's drive."""


def preflight(base: str) -> dict[str, str]:
    """What this notebook needs on a base and what is there, by topic, in sentences.

    Parameters
    ----------
    base : str
        A base's name, folder or hub id; nothing is loaded.
    """
    try:
        base = settings_of(base).name
    except ValueError:  # it is known only when it is loaded; what can be estimated is estimated as for SD 1.4
        pass
    size, gpu, known = picture_size(base), torch.cuda.is_available(), BASES.get(base, BASES["sd-1.4"])
    judges = 0 if base in JUDGES else sum(4 * PARAMETERS.get(judge, 0) for judge in PAPER_JUDGES) / 1e9  # GB
    model = NEEDS[base].parameters * (2 if gpu else 4) / 1e9 if base in NEEDS else 0
    parts = {"the model": model, "CLIP and DINO, which give the scores": judges}
    named = " and ".join(f"{part:.1f} GB for {what}" for what, part in parts.items() if part)
    if not (model or base in JUDGES or Path(base).is_dir()):
        named = f"as much as the model's page says, and {named}"
    free = shutil.disk_usage(Path.home() if Path.home().exists() else Path.cwd()).free / 1e9
    enough = "" if free > 1.2 * (model + judges) else ": too little for the download"
    again = 4 / 3 if size > 768 else 1  # to save memory its blocks are computed twice
    seconds = PICTURES * known.sampling["num_inference_steps"] * CALL + TRAININGS * known.recipe["steps"] * STEP * again
    work = f"{PICTURES} pictures and {TRAININGS:g} times the recipe's training steps"
    long = f"about {seconds * (size / 512) ** 2 / 60:.0f} minutes for {work}, if the GPU is as fast as a T4 is assumed"
    slow = without_gpu(base)
    return {
        "GPU": torch.cuda.get_device_name() if gpu else "none that torch can use",
        "memory": on_gpu(base) or ("little: the base is small" if size < LARGE else "not known for this base"),
        "disk": f"{free:.0f} GB are free{enough}" if model + judges else "enough is free",
        "download": f"{named}, once; what is in the cache is not fetched again" if named else "none",
        "time": f"{slow} This notebook makes {work}." if slow else "a minute or two" if size < LARGE else long,
        "license": LICENSES.get(base, "see the model's own page"),
    }


class Uploaded(dict):
    """Files by name, which a cell shows by their names alone."""

    def __repr__(self) -> str:
        return f"uploaded: {', '.join(self) or 'nothing'}"


def uploader(wanted: bool = True) -> Any:
    """A button that takes several photographs; leave it as the last expression of a cell, then see `photographs`.

    On Colab, whose widgets lose files above 1 MB (ipywidgets #3452), this waits for Colab's own dialog instead, unless
    none are `wanted`, and returns what it took.
    """
    if not on_colab():
        return FileUpload(accept="image/*", multiple=True, description="photographs")
    return Uploaded(colab_files().upload() if wanted else {})


def save_uploads(button: Any, folder: str | Path) -> Path | None:
    """Write what was uploaded into a folder; None if nothing was.

    Parameters
    ----------
    button : FileUpload or dict of str to bytes
        From `uploader`.
    folder : path
        Made if it is missing. Only the last part of a file's name counts; two pictures of one name are both kept.
    """
    given = getattr(button, "value", button)
    files = given.items() if isinstance(given, Mapping) else [(each["name"], each["content"]) for each in given]
    for name, content in files:
        content = bytes(content["content"] if isinstance(content, Mapping) else content)  # ipywidgets 7 has the first
        name = Path(str(name).replace("\\", "/")).name.lstrip(".") or "photograph.jpg"
        with whole_file(_free(Path(folder) / name, content)) as unfinished:
            unfinished.write_bytes(content)
    return Path(folder) if files else None


def photographs(
    button: Any, given: str | Path | None, word: str, shipped: str | Path, folder: str | Path
) -> str | Path:
    """Where to learn from: what was uploaded, the folder `given`, what was uploaded before, or the shipped concept.

    Parameters
    ----------
    button : FileUpload or dict of str to bytes
        From `uploader`.
    word : str
        The class word of the notebook.
    shipped : str or path
        What is learned while the class word is its own.
    folder : path
        Takes what is uploaded.

    Raises
    ------
    NotReady
        If no photographs have arrived, and the class word is not that of the shipped concept.
    """
    if found := save_uploads(button, folder) or given or (folder if Path(folder).is_dir() else None):
        return found
    if word != (own := load_concept(shipped)).macro_class:
        raise NotReady(
            f"No photographs have arrived for the class word {word!r}: upload some, or set PHOTOS to a folder with "
            f"them. Without photographs this notebook learns {own.name}, whose class word is {own.macro_class!r}."
        )
    return shipped


def keep(*files: str | Path) -> None:
    """On Colab, where a session ends after 90 idle minutes, bring files to your drive if it is mounted, and else
    download them; elsewhere they are safe, and nothing happens.
    """
    for path in map(Path, files if on_colab() else ()):
        if not DRIVE.is_dir():
            colab_files().download(str(path))
        elif DRIVE not in path.resolve().parents:
            kept = _free(DRIVE / path.name, path.read_bytes())
            with whole_file(kept) as unfinished:
                shutil.copy(path, unfinished)
            print(f"Kept as {kept}.")


def seen(images: Sequence[Image.Image], size: int) -> list[Image.Image]:
    """The photographs as the model will see them: the middle square, `size` pixels wide."""
    return square_crops(images, size)[0]


def sharpness(image: Image.Image) -> float:
    """The share of a picture's contrast that is in its finest detail: near 0 for a blurred one."""
    gray = image.convert("L").resize((256, 256), Image.Resampling.LANCZOS)
    smooth = np.asarray(gray.filter(ImageFilter.GaussianBlur(1.5)), dtype=float)
    values = np.asarray(gray, dtype=float)
    return float((values - smooth).std() / max(values.std(), 1e-6))


def advice(images: Sequence[Image.Image], size: int) -> list[str]:
    """What to mend before training, a sentence each; rough tests on pixels, which can be wrong.

    Parameters
    ----------
    images : list of picture
        The photographs, uncut.
    size : int
        Side of the base's pictures, in pixels.
    """
    said = []
    if not 4 <= len(images) <= 8:
        said.append(f"{len(images)} photographs: four to eight are best, from several sides.")
    names = [str(image.info.get("source", f"number {k}")) for k, image in enumerate(images, start=1)]
    cut = [ImageOps.fit(image.convert("RGB"), (min(image.size),) * 2) for image in images]
    if small := [name for name, image in zip(names, images, strict=True) if min(image.size) < size]:
        said.append(f"Smaller than the {size} pixels of this base, and will look soft: {', '.join(small)}.")
    if soft := [name for name, image in zip(names, cut, strict=True) if sharpness(image) < SOFT]:
        said.append(f"Perhaps blurred: {', '.join(soft)}.")
    tiny = np.stack([np.asarray(image.convert("L").resize((16, 16)), dtype=float).ravel() for image in cut])
    tiny = tiny - tiny.mean(1, keepdims=True)
    norms = np.maximum(np.linalg.norm(tiny, axis=1), 1e-9)
    for i, j in zip(*np.nonzero(np.tril(tiny @ tiny.T > ALIKE * np.outer(norms, norms), -1)), strict=True):
        said.append(f"Nearly the same picture twice: {names[j]} and {names[i]}; leave one out.")
    if len(cut) > 1 and np.std([_frame(image) for image in cut], axis=0).max() < SAME_PLACE:
        said.append("All seem to have one background, and it will be learned with the thing: add other places.")
    return said


def class_scores(judges: Any, images: Sequence[Image.Image], words: Sequence[str]) -> dict[str, float]:
    """How well "a photo of a WORD" fits the photographs, by CLIP's mean cosine; the best word first."""
    scores = {word: float(judges.text_alignment(list(images), f"a photo of a {word}").mean()) for word in words}
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def pieces(base: Any, word: str) -> dict[str, list[str]]:
    """The pieces that each of a base's tokenizers makes of a word; a good rare token is one piece."""
    readers = {name: reader for name in ENCODERS.values() if (reader := getattr(base, name, None)) is not None}
    return {name: reader.tokenize(word) for name, reader in readers.items()}


def colab_files() -> Any:
    """What Colab has for uploads and downloads."""
    return importlib.import_module("google.colab.files")


def _free(path: Path, content: bytes) -> Path:
    """The path, or with a number in its name if a file with another content is there."""
    names = chain([path], (path.with_stem(f"{path.stem}-{number}") for number in count(2)))
    return next(each for each in names if not each.exists() or each.read_bytes() == content)


def _frame(image: Image.Image) -> np.ndarray:
    """The mean color of a picture's outer frame, (3,), 0 to 1."""
    values = np.asarray(image.resize((32, 32)), dtype=float) / 255
    return (values.sum((0, 1)) - values[4:-4, 4:-4].sum((0, 1))) / (32**2 - 24**2)
