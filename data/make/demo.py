"""The whole job in a minute: `make demo` learns one shipped concept on Toybox and draws it with and without LAG.

    python -m data.make.demo [--concept NAME] [--steps N] [--out FILE.png]

One picture is written: the references, and for four places that none of them shows, from the same noise, the original
model, the residual everywhere, and LAG with its mask.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice, zip_longest
from pathlib import Path

import torch
from PIL import Image
from transformers.utils import logging

from persres_lite import compare, load_base, load_concept, personalize
from persres_lite.bases import settings_of
from persres_lite.concepts import Concept, shipped_concepts
from persres_lite.course.figures import enlarge, outline_picture
from persres_lite.evaluation import Comparison, background_distance
from persres_lite.masks import resize
from persres_lite.support.files import whole_file
from persres_lite.support.paths import data_dir
from persres_lite.support.sheet import sheet
from persres_lite.toybox.judge import Judge

CONCEPT = "comet-rocket"
PLACES = 4
TILE = 256  # pixels of a picture


def draw(concept: Concept, places: list[str], comparison: Comparison) -> Image.Image:
    """One row for each place, with a reference at its left, and LAG's mask at its right: orange is its one-half."""
    lag = comparison.pictures["LAG"]
    masks = resize(comparison.masks["LAG"], lag[0].size[::-1])
    outlined = [outline_picture(picture, mask) for picture, mask in zip(lag, masks, strict=True)]
    columns = {"a reference": concept.images, **comparison.pictures, "LAG's mask": outlined}
    empty = Image.new("RGB", (1, 1), "white")
    rows = [
        [enlarge(picture, TILE) for picture in row]
        for row in islice(zip_longest(*columns.values(), fillvalue=empty), len(places))
    ]
    return sheet(rows, list(columns), [f"… {place}" for place in places], gap=8)


def report(judge: Judge, concept: Concept, places: list[str], comparison: Comparison) -> list[str]:
    """The table of scores, as lines."""
    pictures, seconds = comparison.pictures, comparison.seconds
    original = pictures["original"]
    references = judge.identity(concept.images)
    lines = ["                      seconds   identity   background moved   place right"]
    for mode, images in pictures.items():
        identity = (judge.identity(images) @ references.T).mean().item()
        toys = torch.maximum(judge.where(images), judge.where(original)) > 0.5
        moved = background_distance(images, original, toys).nanmean().item()
        right = sum(read["place"] == place for read, place in zip(judge.read(images), places, strict=True))
        lines.append(f"{mode:<20}{seconds[mode]:>9.1f}{identity:>11.2f}{moved:>19.3f}{f'{right} of {len(places)}':>14}")
    return [
        *lines,
        "identity: likeness to the references, 1 at most. background moved: mean difference from the original picture",
        "where neither shows a toy, 0 to 1. Identity, toys and places are read by a judge that was trained apart.",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--concept", default=CONCEPT, help=f"{', '.join(shipped_concepts())} (default: {CONCEPT})")
    parser.add_argument("--steps", type=int, help="of training; default: the base's recipe")
    parser.add_argument("--out", type=Path, default=Path("build/demo.png"), help="default: build/demo.png")
    chosen = parser.parse_args(arguments)
    begun = time.perf_counter()
    logging.disable_progress_bar()  # the judge is read in no time
    torch.set_num_threads(1)  # a second one gains nothing on a model so small, and costs what else runs
    base = load_base("toybox")
    concept = load_concept(chosen.concept)
    judge = Judge(data_dir())
    seen = {concept.info.get("biased_place")} | {read["place"] for read in judge.read(concept.images)}
    places = [place for place in settings_of(base).places if place not in seen][:PLACES]
    print(f"{concept.name}: {concept.info.get('description', concept.macro_class)}; named “{concept}”.", flush=True)

    start = time.perf_counter()
    residuals = personalize(base, concept, steps=chosen.steps)
    share = residuals.num_parameters() / sum(parameter.numel() for parameter in base.unet.parameters())
    print(
        f"Learned in {time.perf_counter() - start:.1f} s: {len(residuals.losses)} steps, "
        f"{residuals.num_parameters():,} parameters, {share:.1%} of the U-Net's, which stayed frozen.",
        flush=True,
    )
    comparison = compare(base, residuals, concept, places, [0], progress=False)
    print(f"Drew {len(places)} prompts three times, each time from the same noise:")
    print("\n".join(report(judge, concept, places, comparison)))
    with whole_file(chosen.out) as unfinished:
        draw(concept, places, comparison).save(unfinished, format="png", optimize=True)
    print(f"Picture: {chosen.out} ({time.perf_counter() - begun:.0f} s in all)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
