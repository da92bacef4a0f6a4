"""LAG and its controls: the experiment behind notebook 05, over several concepts and three trainings of each.

``python -m data.make.controls [run | tables]``

``run`` (the default)
    Trains each concept from several seeds, draws its scenes in every way of `ways`, and writes a row as soon as a way
    is drawn: it can be stopped at any point, and the same command goes on. Then the tables.
``tables``
    Makes ``data/results/controls.json`` and ``.md`` of the rows that are there.

Three kinds of scenes, because a mask's worth depends on where the toy stands: in a place that no reference shows, at
one side of the picture, and beside another toy. In each kind the concept's own toy is the object and everything else,
the other toy included, the background. Every way draws the same prompts from the same noises; true masks are what the
judge sees in the frozen model's picture.

The trained residuals of the first concept are kept in ``data/residuals/``, where notebook 05 finds them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.make import runs
from data.make.evaluation.tables import against_curve, values
from data.make.evaluation.ways import disc
from data.make.evaluation.work import keep_to, key_of, rows_of, weights_of
from persres_lite import load_base, load_concept, localized, personalize
from persres_lite.bases import settings_of
from persres_lite.concepts import Concept
from persres_lite.evaluation import background_distance, cut_out, draw
from persres_lite.localize import Lag
from persres_lite.masks import average, median, read_mask, resize
from persres_lite.residuals import Residuals
from persres_lite.scores import Interval, bootstrap, gain_at_equal_leakage
from persres_lite.support.files import whole_file
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox.judge import Judge
from persres_lite.toybox.world import CLASSES, COLORS, PLACES, SIDES

CONCEPTS = (
    "garden-snowman",
    "comet-rocket",
    "tiger-robot",
    "lilac-house",
    "flamingo-duck",
    "berry-mug",
)
"""Biased and varied ones in turn; notebook 05's own first."""

SCALES = (0.25, 0.5, 0.75, 1.0)
KINDS = {"place": "in a new place", "side": "at a side", "pair": "beside another toy"}
SCORES = ("identity", "moved", "place", "main", "second", "covers", "area")
LOCALIZED = (
    "LAG",
    "LAG, own unconditional mask",
    "LAG, both",
    "LAG, both, best quarter",
    "LAG, both, Otsu",
    "random half",
    "complement",
    "disc, half",
    "disc, quarter",
    "true mask",
)
"""The ways with a mask, in the order of the tables."""

Way = Callable[[], AbstractContextManager]
Row = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """A prompt with {} for the concept's words, and what a judge may read.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    place : str, optional
        The place that is asked for.
    left : bool, optional
        Beside another toy: whether the concept stands on the left.
    """

    kind: str
    text: str
    place: str | None = None
    left: bool | None = None

    def own(self, mask: Tensor) -> Tensor:
        """Of a mask (h, w) of all toys, the concept's own."""
        if self.left is None:
            return mask
        columns = torch.arange(mask.shape[-1]) < mask.shape[-1] // 2
        return mask * (columns if self.left else ~columns)


def scenes_of(name: str) -> list[Scene]:
    """Four places that no reference shows, a scene at each side, and one beside another toy at each side."""
    toy, place = shipped.all_shipped()[name]
    rng = random.Random(f"controls-{name}")
    seen = {scene.place for scene in shipped.views(name, toy, place)}
    unseen = [each for each in PLACES if each not in seen]
    scenes = [Scene("place", f"a photo of a {{}} {where}", where) for where in rng.sample(unseen, 4)]
    for side in SIDES:
        where = rng.choice(unseen)
        scenes.append(Scene("side", f"a photo of a {{}} {side} {where}", where))
    others = [kind for kind in CLASSES if kind != toy.kind]
    colors = [color for color in COLORS if color not in (toy.main, toy.second, "orange")]  # "an orange"
    for left in (True, False):
        pair = ["a {}", f"a {rng.choice(colors)} {rng.choice(others)}"]
        first, second = pair if left else pair[::-1]
        scenes.append(Scene("pair", f"{first} on the left and {second} on the right", left=left))
    return scenes


def ways(base: Any, residuals: Residuals, concept: Concept, where: Tensor) -> dict[tuple[str, float], Way]:
    """Every way of drawing what was learned, by name and strength.

    Parameters
    ----------
    where : tensor (pictures, h, w)
        The true masks.
    """
    generator = torch.Generator().manual_seed(0)

    def random_half(maps: Tensor) -> Tensor:
        return median(torch.rand(maps.shape, generator=generator).to(maps))

    def lag(**options: Any) -> Way:
        return partial(localized, base, residuals, concept, **options)

    def complement(maps: Tensor) -> Tensor:
        return 1 - median(maps)

    found: dict[tuple[str, float], Way] = {
        ("residual", scale): partial(residuals.attached, base, scale=scale) for scale in SCALES
    }
    side = where.shape[-1]
    local = {
        "LAG": lag(),
        "LAG, own unconditional mask": lag(unconditional="own"),
        "LAG, both": lag(aggregate="both"),
        "LAG, both, best quarter": lag(aggregate="both", mask="quantile", q=0.75),
        "LAG, both, Otsu": lag(aggregate="both", mask="otsu"),
        "random half": lag(mask=random_half),
        "complement": lag(mask=complement),
        "disc, half": lag(fixed_mask=disc(side, 0.5)),
        "disc, quarter": lag(fixed_mask=disc(side, 0.25)),
        "true mask": lag(fixed_mask=where),
    }
    return found | {(name, 1.0): local[name] for name in LOCALIZED}


class Scorer:
    """Scores of one concept's pictures against the frozen model's."""

    def __init__(self, judge: Judge, concept: Concept, scenes: Sequence[Scene], frozen: list[Image.Image]) -> None:
        self.judge, self.scenes, self.frozen = judge, scenes, frozen
        masks = [read_mask(mask) for mask in concept.masks or []]
        alone = [cut_out(image, mask)[0] for image, mask in zip(concept.images, masks, strict=True)]
        self.references = judge.identity(alone)
        self.toy = shipped.all_shipped()[concept.name][0]
        self.where = self.masks(frozen)

    def masks(self, images: list[Image.Image]) -> Tensor:
        """(n, 16, 16): 1 where the concept's own toy is seen."""
        seen = (self.judge.where(images) > 0.5).float()
        return torch.stack([scene.own(mask) for scene, mask in zip(self.scenes, seen, strict=True)])

    def score(self, images: list[Image.Image], used: Tensor | None = None) -> list[dict[str, Any]]:
        """One row of scores a picture.

        Parameters
        ----------
        used : tensor (n, h, w), optional
            The mean mask in use, of which is told how much of the toy it covers and how large it is.
        """
        masks, read = self.masks(images), self.judge.read(images)
        identity = (self.judge.identity(cut_out(images, masks)) @ self.references.T).mean(1)
        either = torch.maximum(masks, self.where)
        used = None if used is None else resize(used, masks.shape[-2:])
        rows = []
        for index, scene in enumerate(self.scenes):
            whole = bool(either[index].all())
            moved = math.nan if whole else background_distance(images[index], self.frozen[index], either[index]).item()
            row = {"kind": scene.kind, "identity": identity[index].item(), "moved": moved}
            if scene.place:
                row["place"] = float(read[index]["place"] == scene.place)
                row |= {name: float(read[index][name] == getattr(self.toy, name)) for name in ("main", "second")}
            if used is not None and masks[index].any():
                row["covers"] = ((used[index] * masks[index]).sum() / masks[index].sum()).item()
                row["area"] = used[index].mean().item()
            rows.append({name: _short(value) for name, value in row.items()})
        return rows


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return None if math.isnan(value) else round(value, 4)


def drawn(base: Any, scenes: Sequence[Scene], concept: Concept, way: Way) -> tuple[list[Image.Image], Tensor | None]:
    """The pictures of all scenes, each from its own noise, and the mean mask in use."""
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(scenes))]
    with way() as used:
        images = draw(base, [s.text.format(concept) for s in scenes], generator=noise, **settings_of(base).sampling)
    masks = used.masks.values() if isinstance(used, Lag) else []
    return images, average([mask.float() for mask in masks]) if masks else None


def units(concepts: Sequence[str], trainings: int) -> list[tuple[str, int]]:
    """All trainings of the first concept, then one of each other, and so on: useful whenever it is stopped."""
    first = [(concepts[0], training) for training in range(trainings)]
    return first + [(name, training) for training in range(trainings) for name in concepts[1:]]


def scorer_of(base: Any, judge: Judge, name: str, scenes: int | None = None) -> Scorer:
    """What a concept's pictures are scored against: the frozen model's, of all its scenes or the first ones."""
    concept, chosen = load_concept(name), scenes_of(name)[:scenes]
    return Scorer(judge, concept, chosen, drawn(base, chosen, concept, nullcontext)[0])


def rows_of_training(
    base: Any, scorer: Scorer, name: str, training: int, residuals: Residuals, done: set
) -> Iterator[Row]:
    """A row for each way that is not done yet, and one for the frozen model."""
    concept = load_concept(name)
    row: Row = {"concept": name, "training": None, "method": "frozen", "way": "original", "scale": 0.0}
    if key_of(row) not in done:
        yield row | {"pictures": scorer.score(scorer.frozen)}
    for (way, scale), context in ways(base, residuals, concept, scorer.where).items():
        row = {"concept": name, "training": training, "method": "residuals", "way": way, "scale": scale}
        if key_of(row) not in done:
            yield row | {"pictures": scorer.score(*drawn(base, scorer.scenes, concept, context))}


def run(args: argparse.Namespace) -> None:
    """Train and draw what no row is there for."""
    torch.set_num_threads(1)
    base = load_base("toybox", "cpu", torch.float32)
    base.set_progress_bar_config(disable=True)
    judge = Judge(args.data)
    settings = settings_of(base)
    recipe = settings.recipe | ({"steps": args.steps} if args.steps else {})
    about = {"weights": weights_of(base, args.data), "recipe": recipe, "sampling": settings.sampling}
    args.rows.mkdir(parents=True, exist_ok=True)
    keep_to(args.rows, {"made with": about})
    scorers: dict[str, Scorer] = {}
    with open(args.rows / "rows-0.jsonl", "a", encoding="utf-8") as file:
        for name, training in units(args.concepts, args.trainings):
            rows = rows_of(args.rows)
            drawn_so_far = sum((row["concept"], row["training"]) == (name, training) for row in rows)
            if drawn_so_far == len(SCALES) + len(LOCALIZED):
                continue
            done = {key_of(row) for row in rows}
            residuals = trained(base, name, training, args)
            if name not in scorers:
                scorers[name] = scorer_of(base, judge, name, args.scenes)
            for row in rows_of_training(base, scorers[name], name, training, residuals, done):
                file.write(json.dumps(row) + "\n")
                file.flush()
            print(f"{name}, training {training}", flush=True)


def trained(base: Any, name: str, training: int, args: argparse.Namespace) -> Residuals:
    """From the file where an earlier run left it, or learned now."""
    folder = args.residuals if name == args.concepts[0] else args.rows
    path = folder / f"{name}-{training}.safetensors"
    if path.exists():
        try:
            return Residuals.load(path, base)
        except ValueError:  # of other weights than these
            path.unlink()
    residuals = personalize(base, load_concept(name), steps=args.steps, seed=training, progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    residuals.save(path)
    return residuals


def whole(rows: list[Row]) -> list[Row]:
    """Without trainings that a run left half done: every way is then of the same pictures."""
    drawn_of = Counter((row["concept"], row["training"]) for row in rows if row["training"] is not None)
    done = {each for each, count in drawn_of.items() if count == len(SCALES) + len(LOCALIZED)}
    concepts = {concept for concept, _ in done}
    return [
        row
        for row in rows
        if (row["concept"], row["training"]) in done or (row["training"] is None and row["concept"] in concepts)
    ]


def label(row: Row) -> str:
    """What a table calls a row."""
    return f"residual, scale {row['scale']:g}" if row["way"] == "residual" else row["way"]


def tables_of(rows: list[Row], draws: int = 2000) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind of scene, "all" first, and by way: intervals of the scores and of the identity gained at equal leakage.

    The gain is against the residual everywhere, turned down until it moves the background as far.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in ("all", *KINDS):
        chosen = [row | {"pictures": [p for p in row["pictures"] if kind in ("all", p["kind"])]} for row in rows]
        chosen = [row for row in chosen if row["pictures"]]
        zero = [row for row in chosen if row["method"] == "frozen"]
        curve = [row for row in chosen if row["way"] == "residual"]
        names = ["original", *(f"residual, scale {scale:g}" for scale in SCALES), *LOCALIZED]
        groups: dict[str, list[Row]] = {name: [row for row in chosen if label(row) == name] for name in names}
        table = found.setdefault(kind, {})
        for name, group in groups.items():
            if not group:
                continue
            table[name] = {score: made for score in SCORES if (made := _interval(values(group, score), draws))}
            if not name.startswith(("residual", "original")):
                gain = _interval(against_curve(group, curve, zero), draws, gain_at_equal_leakage)
                table[name] |= {"gain": gain} if gain else {}
    return found


def _interval(groups: Any, draws: int, statistic: Callable | None = None) -> dict[str, Any] | None:
    try:
        made = bootstrap(groups, statistic, draws=draws)
    except ValueError:  # no picture has this score
        return None
    return None if math.isnan(made.mean) else {k: round(v, 4) for k, v in asdict(made).items()}


def markdown(found: dict[str, Any], about: dict[str, Any]) -> str:
    """The tables to read."""
    lines = [f"Made by `{about['command']}` at commit {about['commit']}, on {about['machine']}.", ""]
    lines += ["Identity is the toy alone on gray; moved is the background's mean change against the frozen model's"]
    lines += ["picture. Gain: identity minus that of the residual turned down until it moves the background as far."]
    lines += ["Brackets: 95 %, bootstrap over concepts, trainings, pictures. Covers: share of the toy in the mask."]
    for kind, table in ((kind, table) for kind, table in found.items() if table):
        n = next(iter(table.values()))["identity"]
        most = max(row["identity"]["pictures"] for row in table.values())
        title = "All scenes" if kind == "all" else f"The toy {KINDS[kind]}"
        lines += ["", f"## {title}", "", f"{n['concepts']} concepts, up to {most} pictures a way.", ""]
        lines += [
            "| way | identity | moved | place | main | second | covers | area | gain | ahead in |",
            "|---" * 10 + "|",
        ]
        for name, row in table.items():
            cells = [f"{row[s]['mean']:.3f}" if s in row else "" for s in SCORES]
            gain = row.get("gain")
            ahead = f"{gain['better_in']} of {gain['concepts']}" if gain else ""
            lines.append(f"| {' | '.join([name, *cells, str(Interval(**gain)) if gain else '', ahead])} |")
    return "\n".join([*lines, ""])


def write(rows: list[Row], out: Path, draws: int = 2000) -> None:
    """Write OUT.json and OUT.md."""
    trainings: dict[str, set[int]] = {}
    for row in rows:
        if row["training"] is not None:
            trainings.setdefault(row["concept"], set()).add(row["training"])
    command = "python -m data.make.controls"
    about: dict[str, Any] = {"command": command, "commit": runs.commit(), "machine": runs.machine()}
    about["trainings"] = {name: len(numbers) for name, numbers in trainings.items()}
    found = tables_of(rows, draws)
    with whole_file(out.with_suffix(".json")) as file:
        file.write_text(json.dumps({"about": about, "scenes": found}, indent=1) + "\n")
    with whole_file(out.with_suffix(".md")) as file:
        file.write_text(markdown(found, about))


def main(arguments: list[str] | None = None) -> None:
    """Carry out one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=["run", "tables"])
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, help="shipped ones")
    parser.add_argument("--trainings", type=int, default=3, help="of each concept")
    parser.add_argument("--steps", type=int, help="of training, instead of the recipe's")
    parser.add_argument("--scenes", type=int, help="only the first ones of each concept")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the project's data folder")
    parser.add_argument("--rows", type=Path, default=Path("build/controls"), help="folder of the rows")
    parser.add_argument("--residuals", type=Path, default=Path("data/residuals"), help="of the first concept")
    parser.add_argument("--out", type=Path, default=Path("data/results/controls"), help="without ending")
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    args = parser.parse_args(arguments)
    if args.what == "run":
        run(args)
    write(whole(rows_of(args.rows)), args.out, args.draws)
    print(f"{args.out}.md")


if __name__ == "__main__":
    main()
