"""Scores of a subject's pictures, one row a picture: by Toybox's judge, or by the paper's encoders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.make.evaluation.subjects import Prompt, Subject
from data.make.evaluation.ways import Frozen
from data.make.inverse import read
from persres_lite.bases import settings_of
from persres_lite.evaluation import Judges, background_distance, cut_out, load_judges
from persres_lite.masks import read_mask
from persres_lite.scores import diversity
from persres_lite.toybox.judge import Judge
from persres_lite.toybox.world import SIDES

Scores = dict[str, Any]


class ToyboxJudge:
    """Reads what stands in a picture, and scores the toy cut out on gray."""

    def __init__(self, data: Path) -> None:
        self.judge, self.encoders = Judge(data), load_judges("toybox")

    def masks(self, images: list[Image.Image], prompts: list[Prompt]) -> Tensor:
        """(n, 16, 16): 1 where the concept's toy is seen; beside another one, in its half alone."""
        masks = (self.judge.where(images) > 0.5).float()
        left = (torch.arange(masks.shape[-1]) < masks.shape[-1] // 2).float()
        return torch.stack([m * left if prompt.left else m for m, prompt in zip(masks, prompts, strict=True)])

    def alone(self, subject: Subject, images: list[Image.Image], masks: Any) -> Tensor:
        """(n,): cosine of each toy on gray with the references on gray, the mean over the references."""
        references = self.judge.identity(_on_gray(subject.concept.images, subject.concept.masks))
        return (self.judge.identity(_on_gray(images, masks)) @ references.T).mean(1)

    def ruler(self, subject: Subject) -> dict[str, list[Scores]]:
        """Rows of what stands for the ceiling and for the floor, by their names; cut out as what a method draws is."""
        found = {}
        for name, concept in {"held-out references": subject.held_out, "others of the class": subject.others}.items():
            if concept is not None:
                values = self.alone(subject, concept.images, (self.judge.where(concept.images) > 0.5).float())
                found[name] = [{"kind": "none", "identity": _short(value)} for value in values.tolist()]
        return found

    def score(
        self, subject: Subject, prompts: list[tuple[Prompt, int]], images: list[Image.Image], frozen: Frozen
    ) -> list[Scores]:
        """One row a picture."""
        asked = [prompt for prompt, _ in prompts]
        masks, before = self.masks(images, asked), self.judge.where(frozen.images)
        either = torch.maximum(self.judge.where(images), before)
        alone = self.alone(subject, images, masks)
        whole = (self.judge.identity(images) @ self.judge.identity(subject.concept.images).T).mean(1)
        gaps = _gaps(self.encoders, subject, asked, images)
        rows = []
        for index, seen in enumerate(self.judge.read(images)):
            row: Scores = _stands(frozen.where, index) | {
                "identity": _short(alone[index]),
                "identity, whole picture": _short(whole[index]),
                "moved": _short(_moved(images[index], frozen.images[index], either[index])),
                "size": _short(masks[index].mean()),
                "text gap": _short(gaps[index]),
            }
            row |= _readings(subject, asked[index], seen)
            if "side" in asked[index].asked:  # a toy that is not seen is on no side
                side = SIDES[_across(masks[index]) > 0] if masks[index].any() else None
                row["side"] = side == asked[index].asked["side"]
            rows.append(row)
        return _with_diversity(rows, prompts, self.judge.identity(images))

    def rank(self, subject: Subject, rows: list[Scores], images: list[Image.Image], count: int) -> None:
        """Let the renderer read pictures that ask for a place alone, the first `count` of the first seed, and add to
        their rows what it finds: the paint's rank, and how the toy is turned.

        "yaw spread" is how far a picture's yaw is from their mean, "yaw from references" from the nearest reference's;
        a concept that was learned by heart keeps to its poses.
        """
        if subject.toy is None:
            return
        first = min(row["seed"] for row in rows)
        places = {prompt.text: prompt.asked["place"] for prompt in subject.prompts if prompt.kind == "place"}
        chosen = [index for index, row in enumerate(rows) if row["prompt"] in places and row["seed"] == first][:count]
        found = {index: read(images[index], subject.toy, places[rows[index]["prompt"]]) for index in chosen}
        yaws = {index: one.scene.toys[0].yaw for index, one in found.items()}
        middle = sum(yaws.values()) / max(len(yaws), 1)
        for index, one in found.items():
            rows[index] |= {"rank": one.rank, "ranked first": one.rank == 1}
            rows[index]["yaw spread"] = _short(abs(yaws[index] - middle))
            if subject.yaws:
                rows[index]["yaw from references"] = _short(min(abs(yaws[index] - yaw) for yaw in subject.yaws))

    def drift(
        self, subject: Subject, prompts: list[tuple[Prompt, int]], images: list[Image.Image], before: list[Image.Image]
    ) -> list[Scores]:
        """How far pictures without the concept's words are from the frozen model's, and how near to the concept."""
        alone = self.alone(subject, images, (self.judge.where(images) > 0.5).float())
        rows = _drift(prompts, images, before)
        return [row | {"identity": _short(value)} for row, value in zip(rows, alone.tolist(), strict=True)]


def _readings(subject: Subject, prompt: Prompt, read: dict[str, Any]) -> dict[str, bool]:
    """What the judge reads of a picture: what the prompt asks for, and the toy's own paint where it may keep it."""
    row = {}
    for name, value in prompt.asked.items():
        if name in ("partner", "side"):
            continue
        if name == "pair":
            row["both objects"] = sorted(read["pair"]) == value
        elif name == "main":
            row["property asked for"] = read["main"] == value
        else:
            row[name] = read[name] == value
    if prompt.left or subject.toy is None:
        return row
    row["class"] = read["class"] == subject.toy.kind
    if prompt.kind == "place":
        row |= {name: read[name] == getattr(subject.toy, name) for name in ("main", "second", "pattern")}
        if "accessory" in read:
            row["accessory"] = read["accessory"] == subject.toy.accessory
    return row


class PaperJudge:
    """CLIP and DINO on whole pictures, as CustomConcept101 scores them; where objects are, nobody says."""

    def __init__(self, base: Any) -> None:
        self.encoders = load_judges(base)

    def masks(self, images: list[Image.Image], prompts: list[Prompt]) -> None:
        """Not known."""

    def ruler(self, subject: Subject) -> dict[str, list[Scores]]:
        """No pictures are held out there."""
        return {}

    def score(
        self, subject: Subject, prompts: list[tuple[Prompt, int]], images: list[Image.Image], frozen: Frozen
    ) -> list[Scores]:
        """One row a picture; "moved" is the change of the whole picture, the object included."""
        asked, references = [prompt for prompt, _ in prompts], subject.concept.images
        scores: dict[str, Any] = {
            "identity": self.encoders.identity(images, references),
            "CLIP-I": self.encoders.image_alignment(images, references),
            "CLIP-T": self.encoders.text_alignment(images, _plain(subject, asked)),
            "text gap": _gaps(self.encoders, subject, asked, images),
        }
        rows: list[Scores] = [{name: _short(v[index]) for name, v in scores.items()} for index in range(len(images))]
        for row, image, before in zip(rows, images, frozen.images, strict=True):
            row["moved"] = _short(_moved(image, before, torch.zeros(1, 1)))
        return _with_diversity(rows, prompts, self.encoders.know(images))

    def rank(self, subject: Subject, rows: list[Scores], images: list[Image.Image], count: int) -> None:
        """No renderer knows these objects."""

    def drift(
        self, subject: Subject, prompts: list[tuple[Prompt, int]], images: list[Image.Image], before: list[Image.Image]
    ) -> list[Scores]:
        """How far pictures without the concept's words are from the frozen model's."""
        return _drift(prompts, images, before)


def judge_of(base: Any, data: Path) -> ToyboxJudge | PaperJudge:
    """Toybox's own judge for Toybox, the paper's encoders for all others."""
    return ToyboxJudge(data) if settings_of(base).name == "toybox" else PaperJudge(base)


def _drift(prompts: list[tuple[Prompt, int]], images: list[Image.Image], before: list[Image.Image]) -> list[Scores]:
    """Of whole pictures."""
    return [
        {"kind": prompt.kind, "prompt": prompt.text, "seed": seed, "drift": _short(_moved(a, b, torch.zeros(1, 1)))}
        for (prompt, seed), a, b in zip(prompts, images, before, strict=True)
    ]


def _stands(masks: Tensor | None, index: int) -> Scores:
    """Where the object stood in the frozen model's picture: how much of it it takes, and how far to a side it is."""
    if masks is None or not masks[index].any():
        return {}
    return {"size before": _short(masks[index].mean()), "off before": _short(abs(_across(masks[index])))}


def _across(mask: Tensor) -> float:
    """The middle of a mask, in half pictures from the picture's middle; to the right is positive."""
    line = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1] * 2 - 1
    return float((mask.sum(-2) * line).sum() / mask.sum())


def _with_diversity(rows: list[Scores], prompts: list[tuple[Prompt, int]], features: Tensor) -> list[Scores]:
    """Each row with its prompt and seed, and how different the pictures of its prompt are from each other."""
    groups: dict[str, list[int]] = {}
    for index, (prompt, _) in enumerate(prompts):
        groups.setdefault(prompt.text, []).append(index)
    for row, (prompt, seed) in zip(rows, prompts, strict=True):
        same = groups[prompt.text]
        row["diversity"] = _short(diversity(features[same].cpu())) if len(same) > 1 else None
        row |= {"kind": prompt.kind, "prompt": prompt.text, "seed": seed}
    return rows


def _gaps(encoders: Judges, subject: Subject, prompts: list[Prompt], images: list[Image.Image]) -> list[float]:
    texts = _plain(subject, prompts)
    if len(set(texts)) < 2:
        return [math.nan] * len(images)
    return encoders.text_gap(images, texts).tolist()


def _plain(subject: Subject, prompts: list[Prompt]) -> list[str]:
    """Prompts without the rare token, which no encoder knows."""
    return [prompt.text.format(subject.concept.macro_class, prompt.asked.get("partner", "")) for prompt in prompts]


def _moved(image: Image.Image, before: Image.Image, either: Tensor) -> float:
    """How far the background moved; NaN if object covers the whole picture."""
    return math.nan if bool((either > 0.5).all()) else background_distance(image, before, either).item()


def _on_gray(images: list[Image.Image], masks: Any) -> list[Image.Image]:
    if isinstance(masks, list):
        return [cut_out(image, read_mask(mask))[0] for image, mask in zip(images, masks, strict=True)]
    return cut_out(images, masks)


def _short(value: Any) -> float | None:
    """Four digits, for a file; None for what is not known."""
    value = float(value)
    return None if math.isnan(value) else round(value, 4)
