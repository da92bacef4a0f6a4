"""Scores, a few a picture, of which none can be fooled alone: by Toybox's judge and its renderer, or by encoders.

A cosine of the toy rises when its pattern fills the frame; so how many toys and how large stands beside it, and the
rank of its paint by a judge that was never trained (`data.make.inverse`). The leak is directed: how likely the judge
finds the place of the references where the prompt asks for another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.make.inverse import read
from data.make.study.subjects import Picture, Subject
from persres_lite.bases import settings_of
from persres_lite.evaluation import cut_out, load_judges
from persres_lite.masks import disc, read_mask
from persres_lite.toybox.judge import Judge
from persres_lite.toybox.world import PLACES

Scores = dict[str, Any]
DINO = "facebook/dinov2-small"  # ships safetensors, which DINO itself does not
LEAST = 3  # of 256 cells: what is smaller is no toy


class ToyboxJudge:
    """Reads what stands in a picture, and scores the toy cut out on gray."""

    def __init__(self, data: Path) -> None:
        self.judge = Judge(data)
        self.references: dict[str, tuple[Tensor, float]] = {}

    def where(self, pictures: Sequence[Picture], images: list[Image.Image]) -> Tensor:
        """(n, 16, 16) of 0 and 1: the subject's toy; beside another one, what is in the left half alone."""
        seen = (self.judge.where(images) > 0.5).float()
        left = (torch.arange(seen.shape[-1]) < seen.shape[-1] // 2).float()
        return torch.stack([m * left if "pair" in p.asked else m for m, p in zip(seen, pictures, strict=True)])

    def of_references(self, subject: Subject) -> tuple[Tensor, float]:
        """Features of the references' toys (n, 256), and the largest one's share of its picture."""
        if subject.name not in self.references:
            concept = subject.concepts[0]
            masks = [read_mask(mask) for mask in concept.masks or ()]
            alone = [cut_out(image, mask)[0] for image, mask in zip(concept.images, masks, strict=True)]
            self.references[subject.name] = self.judge.identity(alone), max(float(mask.mean()) for mask in masks)
        return self.references[subject.name]

    def score(self, subject: Subject, pictures: Sequence[Picture], images: list[Image.Image]) -> list[Scores]:
        """One row a picture."""
        seen, masks = self.judge.read(images), self.where(pictures, images)
        features, largest = self.of_references(subject)
        identity = (self.judge.identity(cut_out(images, masks)) @ features.T).mean(1)
        leaks = self._places(images)[:, PLACES.index(subject.place)] if subject.place else None
        rows = []
        for n, picture in enumerate(pictures):
            row: Scores = {"identity": float(identity[n]), "toys": toys_in(masks[n]), "area": float(masks[n].mean())}
            row["area of references"] = largest
            row |= {f"in disc, {name}": _share(masks[n], share) for name, share in (("half", 0.5), ("quarter", 0.25))}
            row["leak"] = None if leaks is None else float(leaks[n])
            row["place kept"] = float(seen[n]["place"] == picture.asked["place"])
            row["kept"] = float(kept(subject, picture, seen[n]))
            rows.append({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()})
        return rows

    @torch.no_grad()
    def _places(self, images: list[Image.Image]) -> Tensor:
        """(n, places): how likely each place is."""
        return self.judge.probes(self.judge._hidden(images))["place"].softmax(-1)

    def rank(self, subject: Subject, picture: Picture, image: Image.Image) -> Scores:
        """What the renderer finds: the rank of the toy's own paint among near misses, and what its best fit leaves."""
        assert subject.toy is not None
        found = read(image, subject.toy, picture.asked["place"], picture.asked.get("style"))
        return {"rank": found.rank, "misfit": round(found.error, 4)}


def kept(subject: Subject, picture: Picture, seen: dict[str, Any]) -> bool:
    """Whether the judge reads all that was asked for: place, style, color, and the class or both classes."""
    asked = dict(picture.asked)
    pair = asked.pop("pair", None)
    things = sorted(seen["pair"]) == sorted(pair) if pair else seen["class"] == subject.classes[0]
    return things and all(seen[name] == value for name, value in asked.items())


def toys_in(mask: Tensor) -> int:
    """How many pieces of at least `LEAST` cells a mask (h, w) has; cells that touch at a corner are one piece."""
    labels = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    while True:
        spread = F.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    _, sizes = labels[labels > 0].unique(return_counts=True)
    return int((sizes >= LEAST).sum())


def _share(mask: Tensor, share: float) -> float | None:
    """How much of a toy lies inside a centered disc."""
    return float((mask * disc(mask.shape, share)).sum() / mask.sum()) if mask.any() else None


class PaperJudge:
    """CLIP and a DINO on whole pictures, as CustomConcept101 scores them; where objects are, nobody says."""

    where = None

    def __init__(self, base: Any, clip: str | Path | None = None, dino: str | Path = DINO) -> None:
        self.encoders = load_judges(base, clip=clip, dino=dino)

    def score(self, subject: Subject, pictures: Sequence[Picture], images: list[Image.Image]) -> list[Scores]:
        """One row a picture; of several concepts the mean of what it has of each."""
        rows = []
        for picture, image in zip(pictures, images, strict=True):
            references = [subject.concepts[member].images for member in picture.members]
            plain = picture.text.format(*subject.classes)
            scores = {
                "identity": [float(self.encoders.identity(image, each)) for each in references],
                "CLIP-I": [float(self.encoders.image_alignment(image, each)) for each in references],
                "CLIP-T": [float(self.encoders.text_alignment(image, plain))],
            }
            rows.append({name: round(sum(values) / len(values), 4) for name, values in scores.items()})
        return rows

    def rank(self, subject: Subject, picture: Picture, image: Image.Image) -> Scores:
        """No renderer knows these objects."""
        return {}


def judge_of(base: Any, data: Path) -> ToyboxJudge | PaperJudge:
    """Toybox's own judge for Toybox, the paper's encoders for all others."""
    return ToyboxJudge(data) if settings_of(base).name == "toybox" else PaperJudge(base)
