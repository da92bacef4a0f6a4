"""The plan as a small table, and its rows: cut into units, shared out, written one by one, taken up again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm.auto import tqdm

from data.make.study import methods as m
from data.make.study.judging import PaperJudge, ToyboxJudge
from data.make.study.methods import Bench
from data.make.study.subjects import SCENES, Picture, Subject
from data.make.study.ways import BATCH, LAG, MASKED, WAYS, WHOLE, Run, localizable, strength_of
from persres_lite.support.files import whole_file

Row = dict[str, Any]
KEY = ("concept", "training", "method", "way", "scene", "prompt", "noise")


@dataclass(frozen=True)
class Line:
    """A line of a study: every method in every way in every scene.

    Attributes
    ----------
    pictures : int
        Of each scene, in each way.
    first, concepts : int
        The subjects from this one to that one.
    biased : bool
        Only those whose references share a place.
    trainings : int
        Of each concept and method.
    ranked : int
        How many pictures of a scene the renderer reads.
    """

    methods: tuple[str, ...]
    ways: tuple[str, ...]
    scenes: tuple[str, ...] = ("place",)
    pictures: int = 4
    first: int = 0
    concepts: int = 30
    biased: bool = False
    trainings: int = 1
    ranked: int = 0


RIVALS = tuple(name for name, one in m.METHODS.items() if one.kind in ("token", "weights", "adapter"))
LOSSES = ("residual, masked loss", "residual, outside held", m.ATTENDED, "residual, V* learns")
CHOICES = tuple(name for name, one in m.METHODS.items() if one.kind == "residual" and name not in (m.RESIDUAL, *LOSSES))
CONTROLS = (LAG, "disc, half", "disc, quarter", "complement")
LAYOUTS = ("side", "small", "beside", "border")

STUDIES: dict[str, tuple[Line, ...]] = {
    # Each number of pictures is what fits into 2.5 hours on two cores.
    "full": (
        Line((m.FROZEN,), ("frozen",), SCENES, pictures=4),
        Line((m.FROZEN,), ("frozen",), pictures=8, biased=True),
        Line((m.CLASS_WORD, m.DESCRIBED), ("frozen",), pictures=4, ranked=2),
        Line((m.RESIDUAL,), (*WHOLE, LAG), pictures=8, biased=True, trainings=3, ranked=2),
        Line((m.RESIDUAL,), MASKED, pictures=4, ranked=1),
        Line((m.RESIDUAL,), ("whole, x 1", *MASKED), LAYOUTS, pictures=2, concepts=20),
        Line((m.RESIDUAL,), ("whole, x 1", LAG), ("style", "property"), pictures=3),
        Line(LOSSES, (*WHOLE, LAG), pictures=8, concepts=16, biased=True, ranked=2),
        Line(RIVALS, (*WHOLE, LAG), pictures=4, concepts=16, biased=True, ranked=2),
        Line(CHOICES, ("whole, x 1", LAG), pictures=4, concepts=6),
    ),
    # The one question that comes first, in some twenty minutes of a core: what is kept of the references' place?
    "headline": (
        Line((m.FROZEN,), ("frozen",), pictures=8, concepts=20, biased=True),
        Line(
            (m.RESIDUAL,),
            (*WHOLE, LAG, "disc, half", "disc, quarter", "complement"),
            pictures=8,
            concepts=20,
            biased=True,
        ),
    ),
    # The tests run this one; what it must show stands in tests/test_study.py.
    "quick": (
        Line((m.FROZEN,), ("frozen",), pictures=8, concepts=8, biased=True),
        Line(
            (m.RESIDUAL,),
            ("whole, x 0.5", "whole, x 1", LAG, "swap", "complement"),
            pictures=8,
            concepts=8,
            biased=True,
        ),
    ),
    "paper": (
        Line((m.FROZEN,), ("frozen",), ("any",), pictures=1, concepts=10**6),
        Line((m.RESIDUAL, *RIVALS), (*WHOLE, LAG), ("any",), pictures=1, concepts=10**6),
    ),
}


@dataclass
class Unit:
    """What one process does in one piece: a method's training of a subject, and the cells that are drawn with it."""

    subject: Subject
    method: str
    training: int | None  # None: the frozen model
    cells: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # by way and scene: pictures, ranked

    def add(self, line: Line) -> None:
        """What the line asks for, where it asks for more."""
        kind = m.METHODS[self.method].kind
        for way in WAYS:  # LAG before what needs its masks
            fits = way == "frozen" if kind == "frozen" else way in WHOLE or way in MASKED and localizable(self.method)
            if way in line.ways and fits:
                for scene in line.scenes:
                    count, ranked = self.cells.get((way, scene), (0, 0))
                    self.cells[way, scene] = max(count, line.pictures), max(ranked, line.ranked)


def units_of(lines: Sequence[Line], subjects: Sequence[Subject], only: Sequence[str] | None = None) -> list[Unit]:
    """All units, the frozen ones first, then training by training, each in an order that mixes cheap and dear ones."""
    units: dict[tuple[str, str, int | None], Unit] = {}
    for line in lines:
        for subject in subjects[line.first : line.concepts]:
            for method in line.methods if subject.place or not line.biased else ():
                trainings = [None] if m.METHODS[method].kind == "frozen" else range(line.trainings)
                for training in trainings if method in (only or line.methods) else ():
                    unit = units.setdefault((subject.name, method, training), Unit(subject, method, training))
                    unit.add(line)
    mixed = Random(0).sample(list(units.values()), len(units))
    return sorted(mixed, key=lambda unit: -1 if unit.training is None else unit.training)


def rows_of(folder: Path) -> list[Row]:
    """All whole rows of all processes; a line that was cut off is left out."""
    lines = [line for path in sorted(folder.glob("rows-*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def keep_to(folder: Path, settings: Row) -> None:
    """Note what the rows of a folder are made with, once; refuse to add rows made otherwise.

    Raises
    ------
    ValueError
        If the folder has rows of other settings.
    """
    path = folder / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    for name in (name for name in settings if before.get(name) != settings[name]):
        was = f"{before.get(name)!r}, now {settings[name]!r}"
        raise ValueError(f"{folder} has rows made with another {name} ({was}): name another folder with --rows.")
    with whole_file(path) as file:
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def run(
    bench: Bench,
    judge: ToyboxJudge | PaperJudge,
    units: Sequence[Unit],
    folder: Path,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Make this process's share of the rows that are not there yet, each written as soon as it is known."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows-{process}.jsonl"
    done = {tuple(row[name] for name in KEY) for row in rows_of(folder)}
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that was cut off
        for unit in tqdm(units[process::processes], desc="study", unit="training", disable=process > 0):
            for row in rows_of_unit(bench, judge, unit, done):
                file.write(json.dumps(row) + "\n")
                file.flush()
            bench.clear()


def rows_of_unit(bench: Bench, judge: ToyboxJudge | PaperJudge, unit: Unit, done: set[tuple]) -> Iterator[Row]:
    """The unit's missing rows; it is trained when the first picture needs it."""
    one = Run(bench, unit.subject, unit.method, unit.training or 0, judge.where)
    for (way, scene), (count, ranked) in unit.cells.items():
        cell = unit.subject.pictures(scene, count)
        head = {"concept": unit.subject.name, "biased": bool(unit.subject.place), "training": unit.training}
        head |= {"method": unit.method, "way": way, "strength": strength_of(way)}
        heads = {p: head | {"scene": p.scene, "prompt": p.text, "noise": p.noise} for p in cell}
        missing = [p for p in cell if tuple(heads[p][name] for name in KEY) not in done]
        for batch in batches(missing):
            with torch.no_grad(), WAYS[way](one, batch, cell):
                images = one.draw(batch)
            for picture, image, scores in zip(batch, images, judge.score(unit.subject, batch, images), strict=True):
                if cell.index(picture) < ranked:
                    scores |= judge.rank(unit.subject, picture, image)
                if "learned" in vars(one):
                    scores |= {"parameters": sum(each.parameters for each in one.learned)}
                    scores |= {"seconds": round(sum(each.seconds for each in one.learned), 1)}
                yield heads[picture] | scores


def batches(pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """Pictures that can be drawn together: of the same concepts, at most `BATCH`."""
    groups: dict[tuple[int, ...], list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.members, []).append(picture)
    for group in groups.values():
        yield from (group[start : start + BATCH] for start in range(0, len(group), BATCH))
