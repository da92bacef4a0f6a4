"""Lesson 07, `notebooks/07_your_own_concept.ipynb`: from your photographs to a concept, and what to know before.

What a run needs is said first; photographs come from a folder or an upload; they are looked at as the model will see
them, by plain arithmetic on pixels; the macro class is chosen by scores, and the rare token is taken to pieces.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from persres_lite.bases import BASES, settings_of
from persres_lite.cost import LARGE, NEEDS, in_pieces, on_gpu, picture_size, without_gpu
from persres_lite.evaluation import JUDGES, PAPER_JUDGES, PARAMETERS
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


def preflight(base: str, pictures: int = PICTURES, trainings: float = TRAININGS) -> dict[str, str]:
    """What a run on a base needs and what is there, by topic, in sentences.

    Parameters
    ----------
    base : str
        A base's name, folder or hub id; nothing is loaded.
    pictures : int
        How many pictures will be drawn.
    trainings : float
        For how many times the recipe's steps will be trained.
    """
    try:
        base = settings_of(base).name
    except ValueError:  # it is known only when it is loaded; what can be estimated is estimated as for SD 1.4
        pass
    size, gpu, home = picture_size(base), torch.cuda.is_available(), base in JUDGES or Path(base).is_dir()
    found = {"GPU": torch.cuda.get_device_name() if gpu else "none that torch can use"}
    found["memory"] = on_gpu(base) or ("little: the base is small" if size < LARGE else "not known for this base")
    judges = 0 if base in JUDGES else sum(4 * PARAMETERS.get(judge, 0) for judge in PAPER_JUDGES) / 1e9
    model = NEEDS[base].parameters * (2 if gpu else 4) / 1e9 if base in NEEDS else 0
    free = shutil.disk_usage(Path.home() if Path.home().exists() else Path.cwd()).free / 1e9
    enough = "" if free > 1.2 * (model + judges) else ": too little for the download"
    found["disk"] = f"{free:.0f} GB are free{enough}" if model + judges else "enough is free"
    parts = {"the model": model, "CLIP and DINO, which give the scores": judges}
    named = " and ".join(f"{part:.1f} GB for {what}" for what, part in parts.items() if part)
    if not (model or home):
        named = f"as much as the model's page says, and {named}"
    found["download"] = f"{named}, once; what is in the cache is not fetched again" if named else "none"
    known = BASES.get(base, BASES["sd-1.4"])
    if slow := without_gpu(base):
        found["time"] = f"{slow} This notebook draws {pictures} pictures and trains {trainings:g} times as long."
    elif size < LARGE:
        found["time"] = "a minute or two"
    else:
        again = 4 / 3 if in_pieces(base) else 1  # blocks are computed twice
        seconds = pictures * known.sampling["num_inference_steps"] * CALL
        seconds += trainings * known.recipe["steps"] * STEP * again
        found["time"] = (
            f"about {seconds * (size / 512) ** 2 / 60:.0f} minutes for {pictures} pictures and {trainings:g} times the "
            "recipe's training steps, if the GPU is as fast as a T4 is assumed"
        )
    found["license"] = LICENSES.get(base, "see the model's own page")
    return found


def uploader() -> Any:
    """A button that takes several photographs; leave it as the last expression of a cell, then see `save_uploads`."""
    import ipywidgets as widgets

    return widgets.FileUpload(accept="image/*", multiple=True, description="photographs")


def save_uploads(button: Any, folder: str | Path) -> Path | None:
    """Write what was uploaded into a folder; None if nothing was.

    Parameters
    ----------
    button : FileUpload
        From `uploader`, of ipywidgets 7 or 8.
    folder : path
        Made if it is missing. Only the last part of a file's name counts.
    """
    files = button.value
    if isinstance(files, Mapping):  # ipywidgets 7, which Colab has
        files = [{"name": name, "content": each["content"]} for name, each in files.items()]
    if not files:
        return None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for each in files:
        name = Path(str(each["name"]).replace("\\", "/")).name.lstrip(".")
        (folder / (name or "photograph.jpg")).write_bytes(bytes(each["content"]))
    return folder


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
    names = [str(image.info.get("source") or f"number {k}") for k, image in enumerate(images, start=1)]
    small = [name for name, image in zip(names, images, strict=True) if min(image.size) < size]
    if small:
        said.append(f"Smaller than the {size} pixels of this base, and will look soft: {', '.join(small)}.")
    cut = [image.crop(_middle(image.size)).convert("RGB") for image in images]
    soft = [name for name, image in zip(names, cut, strict=True) if sharpness(image) < SOFT]
    if soft:
        said.append(f"Perhaps blurred: {', '.join(soft)}.")
    tiny = [np.asarray(image.convert("L").resize((16, 16)), dtype=float).ravel() for image in cut]
    for i in range(len(cut)):
        for j in range(i):
            spread = tiny[i].std() * tiny[j].std()
            if spread and np.mean((tiny[i] - tiny[i].mean()) * (tiny[j] - tiny[j].mean())) / spread > ALIKE:
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
    found = {}
    for tokenizer in ENCODERS.values():
        reader = getattr(base, tokenizer, None)
        if reader is not None:
            found[tokenizer] = reader.convert_ids_to_tokens(reader(word, add_special_tokens=False).input_ids)
    return found


def _middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def _frame(image: Image.Image) -> np.ndarray:
    """The mean color of a picture's outer frame, (3,), 0 to 1."""
    values = np.asarray(image.resize((32, 32)), dtype=float) / 255
    inner = np.zeros((32, 32), dtype=bool)
    inner[4:-4, 4:-4] = True
    return values[~inner].mean(0)
