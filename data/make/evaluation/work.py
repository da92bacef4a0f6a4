"""The work and its rows: cut into units, shared out between processes, written one row at a time, taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from data.make.evaluation.judging import PaperJudge, ToyboxJudge
from data.make.evaluation.methods import RESIDUALS, Bench, Recipe, Trained, train
from data.make.evaluation.subjects import Pair
from data.make.evaluation.ways import (
    SCALES,
    Frozen,
    Way,
    controls,
    draw_all,
    draw_frozen,
    drift_of,
    everywhere,
    frozen_way,
    inside,
    pictures_of,
    words_of,
)
from data.make.runs import commit
from persres_lite.bases import settings_of
from persres_lite.residuals import fingerprint
from persres_lite.support.files import whole_file

Row = dict[str, Any]
Key = tuple[str, int | None, str, str, float]

DRIFT = "drift"
"""The way of rows about prompts without the concept's words, with what was learned in force everywhere."""

CUT = "by the judge"
"""How the ruler's toys are cut out: as those that a method draws."""

CLOCKS = ("seconds", "peak")
"""What differs from run to run; everything else in a row is the same on every machine of a kind."""


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes
    ----------
    methods : tuple of str
        Of `methods.METHODS`.
    recipes : dict of str to Recipe
        By method.
    trainings, seeds : int
        How many trainings a concept and method, and pictures a prompt; both are numbered from 0.
    scales : tuple of float
        Strengths at which every trained method is drawn.
    controls : tuple of str, optional
        Of `ways.controls`; None for all.
    ranked : int
        Pictures of each way at full strength that the renderer reads.
    frozen : bool
        Whether the frozen model gets rows of its own.
    """

    methods: tuple[str, ...]
    recipes: dict[str, Recipe]
    trainings: int = 3
    seeds: int = 2
    scales: tuple[float, ...] = SCALES
    controls: tuple[str, ...] | None = None
    ranked: int = 0
    frozen: bool = True


@dataclass(frozen=True)
class Unit:
    """What one process does in one piece: a method's training of a pair of concepts, and all that is drawn with it."""

    pair: Pair
    method: str | None  # None: the frozen model
    training: int | None


def units_of(pairs: Sequence[Pair], plan: Plan) -> list[Unit]:
    """All units, in a fixed order; training by training, so that a run that was cut short has all methods."""
    found = [Unit(pair, None, None) for pair in pairs] if plan.frozen else []
    for training in range(plan.trainings):
        found += [Unit(pair, method, training) for pair in pairs for method in plan.methods]
    return found


def share_of(units: Sequence[Unit], methods: int, process: int, processes: int) -> list[Unit]:
    """The units of one process: taken in turn, and from one pair's methods to the next the turn moves on by one, so
    that the method with the most ways to draw does not always fall to the same process.
    """
    return [unit for index, unit in enumerate(units) if (index + index // methods) % processes == process]


def rows_of(folder: Path) -> list[Row]:
    """All rows that processes have written there; a last line that was cut off is left out."""
    rows: dict[Key, Row] = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["method"] != "ruler" or row.get("cut") == CUT:  # once it was cut by its true masks, and stood higher
                rows[key_of(row)] = row
    return [rows[key] for key in sorted(rows, key=str)]


@contextmanager
def appending(path: Path) -> Iterator[IO[str]]:
    """A file of rows, open for more of them; a last line that was cut off when a run was killed is ended first."""
    cut_off = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        if cut_off:
            file.write("\n")
        yield file


def keep_to(folder: Path, settings: dict[str, Any]) -> None:
    """Rows in one folder belong together: note what they are made with, or refuse to add others to them.

    Parameters
    ----------
    settings : dict
        What all rows must share. Recipes count method by method, so that a method can be added later.

    Raises
    ------
    ValueError
        If the rows there were made with something else.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they will be read
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    recipes = before.get("recipes", {}) | settings.get("recipes", {})
    for name, value in before.items():
        same = recipes | value == recipes if name == "recipes" else settings.get(name) == value
        if not same:
            raise ValueError(f"The rows in {folder} were made with another choice of {name}: choose another --rows.")
    with whole_file(path) as file:
        file.write_text(json.dumps(settings | {"recipes": recipes}, indent=1) + "\n")


def weights_of(base: Any, data: Path) -> str:
    """A sign of what rows are drawn and scored with; for Toybox of every weight of base and judges, since each may be
    trained further without the others.
    """
    if settings_of(base).name != "toybox":
        return fingerprint(base.unet)
    sign = hashlib.sha256()
    for name in ("toybox-sd", "toybox-clip", "toybox-dino"):
        for path in sorted((data / name).rglob("*.safetensors")):
            sign.update(path.read_bytes())
    return sign.hexdigest()[:16]


def key_of(row: Row) -> Key:
    """What a row is of: concept, training, method, way, scale."""
    return row["concept"], row["training"], row["method"], row["way"], row["scale"]


def run(
    bench: Bench,
    judge: ToyboxJudge | PaperJudge,
    pairs: Sequence[Pair],
    plan: Plan,
    folder: Path,
    process: int = 0,
    processes: int = 1,
    kept: dict[str, Frozen] | None = None,
) -> None:
    """Do this process's share of what no row is there for yet.

    Parameters
    ----------
    kept : dict of str to Frozen, optional
        What the frozen model draws, by concept, for several runs on the same few concepts; else it is forgotten as soon
        as the next pair's turn comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {key_of(row) for row in rows_of(folder)}
    units = share_of(units_of(pairs, plan), len(plan.methods), process, processes)
    frozen, made = {} if kept is None else kept, commit()
    with (
        appending(folder / f"rows-{process}.jsonl") as file,
        tqdm(units, desc="evaluating", unit="unit", disable=process > 0) as bar,
    ):
        for unit in bar:
            for old in set(frozen) - {each.concept.name for each in unit.pair} if kept is None else ():
                del frozen[old]
            bar.set_postfix_str(f"{unit.pair[0].concept.name}, {unit.method or 'frozen'}")
            for row in rows_of_unit(bench, judge, unit, plan, done, frozen):
                file.write(json.dumps(row | {"commit": made}, sort_keys=True) + "\n")
                file.flush()
            bench.clear()


def rows_of_unit(
    bench: Bench,
    judge: ToyboxJudge | PaperJudge,
    unit: Unit,
    plan: Plan,
    done: set[Key],
    frozen: dict[str, Frozen],
) -> Iterator[Row]:
    """Train what the unit says and yield a row for each way of drawing it that is not done; nothing if all are.

    Parameters
    ----------
    frozen : dict of str to Frozen
        By concept: what the frozen model draws, kept from unit to unit of a pair.
    """
    wanted = {index: [key for key in _keys(unit, index, plan) if key not in done] for index in range(len(unit.pair))}
    if not any(wanted.values()):
        return
    trained: list[Trained] = []
    if unit.method is not None and unit.training is not None:
        recipe = plan.recipes[unit.method]
        trained = [train(bench, unit.method, each.concept, unit.training, recipe) for each in unit.pair]
    for index, subject in enumerate(unit.pair):
        name, partner = subject.concept.name, unit.pair[1 - index] if len(unit.pair) == 2 else None
        prompts = pictures_of(subject, range(plan.seeds))
        rulers = [key for key in wanted[index] if key[2] == "ruler"]
        for way, rows in judge.ruler(subject).items() if rulers else ():
            if (name, None, "ruler", way, 1.0) in rulers:
                yield {"concept": name, "training": None, "method": "ruler", "way": way, "scale": 1.0} | {
                    "biased": subject.biased,
                    "cut": CUT,
                    "pictures": rows,
                }
        if len(rulers) == len(wanted[index]):
            continue
        if name not in frozen:
            frozen[name] = draw_frozen(bench.base, subject, partner, range(plan.seeds))
            frozen[name].where = judge.masks(frozen[name].images, [prompt for prompt, _ in prompts])
        ways = _ways(bench.base, unit, index, trained, frozen[name], plan)
        for key in wanted[index]:
            row: Row = dict(zip(("concept", "training", "method", "way", "scale"), key, strict=True))
            if row["way"] == DRIFT:
                asked = drift_of(subject, range(plan.seeds))
                images = draw_all(bench.base, asked, ("", ""), everywhere(trained[index], None, 1.0))
                scores = judge.drift(subject, asked, images, frozen[name].drift)
            elif key in ways:
                words, context = ways[key]
                images = draw_all(bench.base, prompts, words, context)
                scores = judge.score(subject, prompts, images, frozen[name])
                if plan.ranked and row["scale"] in (0.0, 1.0):
                    judge.rank(subject, scores, images, plan.ranked)
            else:
                continue
            row |= {"biased": subject.biased, "pictures": scores}
            if trained:
                one = trained[index]
                row |= {"parameters": one.parameters, "seconds": round(one.seconds, 2), "peak": round(one.peak)}
                row["steps"] = recipe.steps
            yield row


def _ways(
    base: Any, unit: Unit, index: int, trained: list[Trained], frozen: Frozen, plan: Plan
) -> dict[Key, tuple[tuple[str, str], Way]]:
    """By key: the words for concept and partner, and the way."""
    subject = unit.pair[index]
    partner = unit.pair[1 - index] if len(unit.pair) == 2 else None
    name, words = subject.concept.name, words_of(subject, partner)
    if unit.method is None:
        plain = (subject.concept.macro_class, partner.concept.macro_class if partner else "")
        found: dict[Key, tuple[tuple[str, str], Way]] = {
            (name, None, "frozen", "rare token", 0.0): (words, frozen_way),
            (name, None, "frozen", "class word", 0.0): (plain, frozen_way),
        }
        if subject.described:
            described = (subject.described, (partner.briefly or "") if partner else "")
            found[name, None, "frozen", "full description", 0.0] = (described, frozen_way)
        return found
    mine = trained[index] if trained else None
    other = trained[1 - index] if len(trained) == 2 else None
    made: dict[tuple[str, float], Way] = {}
    for scale in plan.scales:
        if mine:
            made["everywhere", scale] = everywhere(mine, other, scale)
            if mine.residuals is not None:
                made["LAG", scale] = inside(base, unit.pair, index, trained, scale)
    if mine and unit.method == RESIDUALS:
        for control, way in controls(base, unit.pair, index, trained, frozen).items():
            if plan.controls is None or control in plan.controls:
                made[f"LAG, {control}", 1.0] = way
    return {(name, unit.training, unit.method, way, scale): (words, made[way, scale]) for way, scale in made}


def _keys(unit: Unit, index: int, plan: Plan) -> list[Key]:
    """The keys of a unit's rows for one of its concepts, known before anything is trained."""
    subject = unit.pair[index]
    name = subject.concept.name
    if unit.method is None:
        keys: list[Key] = [(name, None, "frozen", way, 0.0) for way in ("rare token", "class word")]
        if subject.described:
            keys.append((name, None, "frozen", "full description", 0.0))
        if subject.held_out:
            keys += [(name, None, "ruler", way, 1.0) for way in ("held-out references", "others of the class")]
        return keys
    ways = ["everywhere", *(["LAG"] if _localizes(unit.method) else [])]
    keys = [(name, unit.training, unit.method, way, scale) for way in ways for scale in plan.scales]
    if subject.drift:
        keys.append((name, unit.training, unit.method, DRIFT, 1.0))
    if unit.method == RESIDUALS:
        known = CONTROLS if plan.controls is None else plan.controls
        if subject.toy is None:  # nobody says where the object is
            known = tuple(control for control in known if control != "true mask")
        keys += [(name, unit.training, unit.method, f"LAG, {control}", 1.0) for control in known]
    return keys


def _localizes(method: str) -> bool:
    return method.startswith("residuals") or method == "proj_out LoRA"


CONTROLS = (
    "own unconditional mask",
    "Otsu",
    "best quarter",
    "aggregated",
    "aggregated, Otsu",
    "aggregated, best quarter",
    "refined",
    "random half",
    "complement",
    "disc, half",
    "disc, quarter",
    "first steps of a frozen run",
    "true mask",
)
