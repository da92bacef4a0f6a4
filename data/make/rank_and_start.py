"""What the rank and the start are worth on Toybox: ``python -m data.make.rank_and_start``, for lesson 02.

Two shipped concepts, one photographed in four places and one always in the same, are learned by the registry's recipe
from the zero start and from the random start, and from the zero start with other ranks; each three times, with the
seeds 0, 1 and 2, which decide the factors' start and every draw of training. Two trainings of one concept and seed draw
the same pictures, noises and timesteps, so they are compared in pairs.

Identity is the encoder's cosine with the references, the toy cut out on gray in both. Each training writes its row into
``data/results/toybox-rank-and-start.json`` at once, and the same command goes on from there; rows of other weights or
of another recipe are thrown away. The table ``.md`` is made of the rows that there are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from data.make.evaluation.work import weights_of
from data.make.toybox_concepts import SEEDS, unseen_places
from persres_lite import compare, load_base, load_concept, personalize
from persres_lite.bases import settings_of
from persres_lite.evaluation import background_distance, cut_out
from persres_lite.support.files import whole_file
from persres_lite.toybox.judge import Judge

CONCEPTS = ("cricket-car", "comet-rocket")
TRAININGS = (0, 1, 2)
RANKS: tuple[float | int, ...] = (1, 0.05, 0.25, 1.0)
MEASURES = ("identity", "place", "background moved", "last loss")
NAME = "toybox-rank-and-start"
STARTS = {"lora": "zero", "random": "random"}

Row = dict[str, Any]


def plan(recipe: dict[str, Any]) -> Iterator[tuple[str, str, float | int, int]]:
    """(concept, init, rank, seed) of every training: first the two starts, then the other ranks."""
    for seed in TRAININGS:
        for name in CONCEPTS:
            yield from ((name, init, recipe["rank"], seed) for init in STARTS)
    for seed in TRAININGS:
        for name in CONCEPTS:
            yield from ((name, "lora", rank, seed) for rank in RANKS if not _same(rank, recipe["rank"]))


def train_and_score(base: Any, judge: Judge, data: Path, name: str, **training: Any) -> dict[str, float]:
    """One training, and the scores of its residual in places that no reference shows."""
    concept = load_concept(data / "concepts" / name)
    residuals = personalize(base, concept, progress=False, **training)
    places = unseen_places(concept.images, judge)
    found = compare(base, residuals, concept, places, SEEDS, ways={"LAG": None}, progress=False)
    original, images = found.pictures["original"], found.pictures["residual"]
    references = judge.identity(cut_out(concept.images, concept.masks))
    where = judge.where(images)
    asked = [place for place in places for _ in SEEDS]
    read = [row["place"] for row in judge.read(images)]
    covered = torch.maximum(where, judge.where(original)) > 0.5
    return {
        "identity": (judge.identity(cut_out(images, where)) @ references.T).mean().item(),
        "place": sum(a == b for a, b in zip(asked, read, strict=True)) / len(read),
        "background moved": background_distance(images, original, covered).nanmean().item(),
        "last loss": statistics.fmean(residuals.losses[-max(1, len(residuals.losses) // 5) :]),
    }


def mean_and_spread(rows: list[Row], start: str, rank: float | int) -> dict[str, tuple[float, float, int]]:
    """By measure: the mean over all trainings of a start and rank, their standard deviation, and how many there are."""
    chosen = [row for row in rows if row["start"] == start and _same(row["rank"], rank)]
    found = {}
    for measure in MEASURES:
        values = [row[measure] for row in chosen]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            found[measure] = statistics.fmean(values), spread, len(values)
    return found


def differences(rows: list[Row], measure: str) -> list[float]:
    """Random start minus zero start, for each concept and seed that has both."""
    starts = {
        (row["start"], row["concept"], row["seed"]): row[measure]
        for row in rows
        if any(other["start"] == "random" and _same(other["rank"], row["rank"]) for other in rows)
    }
    return [
        value - starts["zero", name, seed]
        for (start, name, seed), value in starts.items()
        if start == "random" and ("zero", name, seed) in starts
    ]


def table(rows: list[Row], recipe: dict[str, Any]) -> str:
    """The rows as Markdown."""
    said = f"{recipe['steps']} steps, rate {recipe['lr']:g}, rank {recipe['rank']:g}"
    lines = [
        "Made by `python -m data.make.rank_and_start`.",
        "",
        f"{' and '.join(CONCEPTS)}, up to {len(TRAININGS)} trainings of each; recipe: {said}. Mean ± standard deviation"
        " over trainings.",
        "",
        "| start | rank | trainings | " + " | ".join(MEASURES) + " |",
        "|---" * (len(MEASURES) + 3) + "|",
    ]
    kinds = {(row["start"], _words(row["rank"])): row["rank"] for row in rows}  # rank 1 equals 1.0 and is not the same
    for (start, words), rank in kinds.items():
        found = mean_and_spread(rows, start, rank)
        cells = [f"{mean:.3f} ± {spread:.3f}" if n > 1 else f"{mean:.3f}" for mean, spread, n in found.values()]
        number = next(iter(found.values()))[2]
        lines.append(f"| {start} | {words} | {number} | " + " | ".join(cells) + " |")
    lines += ["", "Random start minus zero start, each pair with the same concept and seed:", ""]
    for measure in MEASURES:
        pairs = differences(rows, measure)
        lines.append(f"- {measure}: " + (", ".join(f"{value:+.3f}" for value in pairs) or "none yet"))
    return "\n".join([*lines, ""])


def known(path: Path, about: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run by the same recipe on the same weights."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    return kept["rows"] if {key: kept.get(key) for key in about} == about else []


def save(folder: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """Write both files, each whole or not at all."""
    for ending, text in {
        "json": json.dumps({**about, "rows": rows}, indent=1) + "\n",
        "md": table(rows, about["recipe"]),
    }.items():
        with whole_file(folder / f"{NAME}.{ending}") as temporary:
            temporary.write_text(text)


def _same(a: float | int, b: float | int) -> bool:
    """The rank 1 is one direction, the rank 1.0 all of them."""
    return a == b and isinstance(a, int) == isinstance(b, int)


def _words(rank: float | int) -> str:
    return str(rank) if isinstance(rank, int) else f"{rank:.0%}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    base, judge = load_base("toybox"), Judge(args.data)
    about: dict[str, Any] = {"recipe": settings_of(base).recipe, "weights": weights_of(base, args.data)}
    rows = known(args.data / "results" / f"{NAME}.json", about)
    done = {(row["concept"], row["start"], row["rank"], isinstance(row["rank"], int), row["seed"]) for row in rows}
    for name, init, rank, seed in tqdm(list(plan(about["recipe"])), desc="trainings"):
        if (name, STARTS[init], rank, isinstance(rank, int), seed) in done:
            continue
        scores = train_and_score(base, judge, args.data, name, init=init, rank=rank, seed=seed)
        rows.append({"concept": name, "start": STARTS[init], "rank": rank, "seed": seed, **scores})
        save(args.data / "results", about, rows)
    print(table(rows, about["recipe"]))


if __name__ == "__main__":
    main()
