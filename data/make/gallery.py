"""Pictures decide: every shipped concept in four places and four noises, by way; nothing is selected.

``python -m data.make.gallery [--out FOLDER]`` writes one sheet a concept, ``NAME.jpg``: a row a way, the
first four columns one place with noises 1 to 4, and so on, with a reference at the left of each row. The places are the
first four of the world's list in which no reference stands. Then it prints, by way, in how many of the 160 pictures the
judge and the renderer together find what a stranger should: one toy of the right class, its own paint before eleven
near misses, in the place asked. Concepts that are there already are not drawn again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from data.make.study import report
from data.make.study.judging import ToyboxJudge
from data.make.study.methods import FROZEN, RESIDUAL, Bench
from data.make.study.subjects import Picture, Subject
from data.make.study.ways import LAG, WAYS, Run
from persres_lite import load_base
from persres_lite.support.files import whole_file
from persres_lite.support.paths import data_dir
from persres_lite.support.sheet import sheet
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox.world import PLACES

NOISES = (1, 2, 3, 4)
OUTSIDE = "residual, outside held"
SHOWN = {
    "frozen": (FROZEN, "frozen"),
    "residual": (RESIDUAL, "whole, x 1"),
    "residual, LAG": (RESIDUAL, LAG),
    "outside held": (OUTSIDE, "whole, x 1"),
    "outside held, LAG": (OUTSIDE, LAG),
}
"""By name of the row: method and way."""


def pictures_of(subject: Subject) -> list[Picture]:
    """What is asked for: four places, in each all noises."""
    seen = {view.place for view in shipped.views(subject.name, subject.toy, subject.place)} if subject.toy else set()
    places = [place for place in PLACES if place not in seen][:4]
    return [Picture("place", f"a photo of a {{0}} {p}", noise, {"place": p}) for p in places for noise in NOISES]


def draw(bench: Bench, judge: ToyboxJudge, subject: Subject, out: Path) -> None:
    """One concept's sheet, and beside it the scores of every picture."""
    asked, drawn, found = pictures_of(subject), list[list[Image.Image]](), list[dict]()
    runs = {method: Run(bench, subject, method, 0) for method, _ in SHOWN.values()}
    for row, (method, way) in SHOWN.items():
        images = []
        for start in range(0, len(asked), 8):
            some = asked[start : start + 8]
            with torch.no_grad(), WAYS[way](runs[method], some, asked):
                images += runs[method].draw(some)
        for picture, image, scores in zip(asked, images, judge.score(subject, asked, images), strict=True):
            scores |= judge.rank(subject, picture, image)
            head = {"concept": subject.name, "training": None if method == FROZEN else 0, "method": method, "way": way}
            found.append(
                {"row": row, **head, "scene": "place", "prompt": picture.text, "noise": picture.noise, **scores}
            )
        drawn.append([subject.concepts[0].images[len(drawn) % 4], *images])
    with whole_file(out / f"{subject.name}.json") as file:
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    with whole_file(out / f"{subject.name}.jpg") as file:
        sheet(drawn, words=list(SHOWN), gap=2).save(file, "JPEG", quality=85)


def count(out: Path) -> pd.DataFrame:
    """By way: how many pictures there are, and in how many everything is as asked, or one thing."""
    every = [row for path in sorted(out.glob("*.json")) for row in json.loads(path.read_text(encoding="utf-8"))]
    frame = report.frame_of(every)
    frame["as asked"] = frame[["one toy", "ranked first", "kept"]].min(axis=1)
    table = frame.groupby("row", sort=False)[["as asked", "one toy", "ranked first", "kept"]].sum().astype(int)
    return table.assign(pictures=frame.groupby("row").size(), identity=frame.groupby("row").identity.mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/results/gallery"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    base = load_base("toybox")
    base.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    bench, judge = Bench(base), ToyboxJudge(data_dir())
    for name, (toy, place) in shipped.all_shipped().items():
        if not (args.out / f"{name}.jpg").exists():
            draw(bench, judge, Subject(name, (toy.kind,), ("sks",), toy, place), args.out)
    print(count(args.out).round(3).to_string())


if __name__ == "__main__":
    main()
