"""What personalizing Toybox gives: ``python -m data.make.toybox_concepts concepts | search``.

``concepts``
    For each of the ten shipped concepts, in places where its references do not stand, from the same noise: the original
    model, the residual everywhere, and LAG. Scores by the judge: identity (cosine with the references) of the whole
    picture and of the toy alone on gray, the place asked for, and for the biased five the place of the references. The
    renderer as judge ranks the toy's own paint among its near misses in some of the pictures. And, from the same
    residual, the pictures of the plain class word: what it gains in identity, over what the concept's words gain.

    Training by training and concept by concept, a row written at a time: the same command goes on where it was stopped.
    Tables are made of the rows that are there (``--trainings 0`` makes nothing else). ``concepts-sheet.jpg`` shows the
    references beside all pictures of the first training, ``concepts-pictures.json`` has the scores of each picture.
``search``
    Steps, rate and rank, as means over four concepts that are in no other table: what the registry's recipe was taken
    from. The rule was fixed before the first run: of the recipes with which LAG shows the place asked for in at least
    0.9 of the pictures, the one with which LAG comes nearest to the references; in a tie, to two digits, fewer steps,
    then the lower rank.

Each writes ``data/results/<name>.json`` and ``.md``. ``search`` runs one training a core, side by side, so its
seconds are longer than those of ``concepts``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from data.make import runs
from data.make.evaluation.tables import table
from data.make.evaluation.work import keep_to, weights_of
from data.make.inverse import read
from persres_lite import compare, load_base, load_concept, personalize
from persres_lite.bases import settings_of
from persres_lite.concepts import Concept
from persres_lite.evaluation import Comparison, background_distance, cut_out, draw
from persres_lite.masks import read_mask
from persres_lite.residuals import Residuals
from persres_lite.scores import Interval, bootstrap, paired
from persres_lite.support.files import whole_file
from persres_lite.support.sheet import sheet
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox.judge import Judge
from persres_lite.toybox.world import PLACES, Toy, near_misses

SEEDS = (0, 1)  # of the pictures, for each place
UNSEEN = 4  # places
WAYS = ("original", "residual", "LAG")
ALONE = "identity, toy alone"
CLOCKS = ("seconds", "CPU seconds")  # of training: by the wall, and of a core of its own
CLASS_WORD = "class word over V*"
RANKS = ("ranked first", "median rank")
PARTS = ("main", "second", "pattern", "accessory")

Row = dict[str, Any]


def unseen_places(images: list[Image.Image], judge: Judge) -> list[str]:
    """The first four places, in the world's order, in which no reference picture stands."""
    seen = {row["place"] for row in judge.read(images)}
    return [place for place in PLACES if place not in seen][:UNSEEN]


def alone(judge: Judge, images: list[Image.Image], concept: Concept) -> list[float]:
    """Identity of each picture's toy, cut out on gray where the judge sees it: nothing of the place is scored."""
    masks = concept.masks or list((judge.where(concept.images) > 0.5).float())
    references = [cut_out(image, read_mask(mask))[0] for image, mask in zip(concept.images, masks, strict=True)]
    toys = cut_out(images, judge.where(images) > 0.5)
    return (judge.identity(toys) @ judge.identity(references).T).mean(1).tolist()


def score(judge: Judge, found: Comparison, concept: Concept, places: list[str], biased: str | None) -> dict[str, dict]:
    """By way and measure, one number a picture.

    Identity of the whole picture and of the toy alone, the place asked for, the place of biased references, and how far
    the background moved: it is where the judge sees no toy, neither here nor in the original model's picture.
    """
    asked = [place for place in places for _ in SEEDS]
    references = judge.identity(concept.images).T
    before = found.pictures["original"]
    scores = {}
    for way, images in found.pictures.items():
        read_places = [row["place"] for row in judge.read(images)]
        toy = torch.maximum(judge.where(images), judge.where(before)) > 0.5
        scores[way] = {
            "identity": (judge.identity(images) @ references).mean(1).tolist(),
            ALONE: alone(judge, images, concept),
            "place": [float(a == b) for a, b in zip(read_places, asked, strict=True)],
            "background moved": background_distance(images, before, toy).tolist(),
        }
        if biased:
            scores[way]["place of the references"] = [float(place == biased) for place in read_places]
    return scores


def learn(base: Any, judge: Judge, concept: Concept, biased: str | None, **recipe: Any) -> tuple[Row, Comparison, Any]:
    """Learn one concept and score it, in places where its references do not stand; `recipe` goes to `personalize`.

    Returns
    -------
    (dict, Comparison, Residuals)
        The row, the pictures that it is made of, and what was learned.
    """
    begun, cpu = time.perf_counter(), time.process_time()
    residuals = personalize(base, concept, progress=False, **recipe)
    row: Row = {"seconds": round(time.perf_counter() - begun, 1), "CPU seconds": round(time.process_time() - cpu, 1)}
    row["parameters"], row["places"] = residuals.num_parameters(), unseen_places(concept.images, judge)
    found = compare(base, residuals, concept, row["places"], SEEDS, progress=False)
    return row | score(judge, found, concept, row["places"], biased), found, residuals


def of_class_word(base: Any, concept: Concept, places: list[str], residuals: Residuals | None) -> list[Image.Image]:
    """Pictures of the plain class, with the noises of `learn`: by the frozen model, or with residuals everywhere."""
    asked = [(f"a photo of a {concept.macro_class} {place}", seed) for place in places for seed in SEEDS]
    noise = [torch.Generator().manual_seed(seed) for _, seed in asked]
    prompts, settings = [prompt for prompt, _ in asked], settings_of(base).sampling
    if residuals is None:
        return draw(base, prompts, generator=noise, **settings)
    with residuals.attached(base):
        return draw(base, prompts, generator=noise, **settings)


def by_renderer(images: list[Image.Image], toy: Toy, places: list[str], count: int) -> Row:
    """Ranks of the toy's own paint, and by part whether it is read as it is, in `count` pictures, seed by seed."""
    order = [place * len(SEEDS) + seed for seed in range(len(SEEDS)) for place in range(len(places))][:count]
    found = [read(images[index], toy, places[index // len(SEEDS)]) for index in order]
    parts = {f"{part} read": [float(getattr(one.toy, part) == getattr(toy, part)) for one in found] for part in PARTS}
    return {"rank": [one.rank for one in found], **parts}


def run(base: Any, judge: Judge, concept: Concept, biased: str | None, **recipe: Any) -> Row:
    """The row of one training, each score its mean over the pictures."""
    return averaged([learn(base, judge, concept, biased, **recipe)[0]])


def averaged(rows: list[Row]) -> Row:
    """Rows of one concept's trainings as one: means over pictures, then over trainings; of ranks the median."""
    row: Row = {name: round(_mean([one[name] for one in rows]), 1) for name in CLOCKS}
    row |= {name: rows[0][name] for name in ("parameters", "places")}
    for way in WAYS:
        row[way] = {
            measure: _mean([_mean(one[way][measure]) for one in rows]) for measure in rows[0][way] if measure != "rank"
        }
        ranks = [rank for one in rows for rank in one[way].get("rank", ())]
        if ranks:
            row[way]["ranked first"] = _mean([float(rank == 1) for rank in ranks])
            row[way]["median rank"] = float(statistics.median(ranks))
    if "class word" in rows[0] and (share := class_word_share(rows)) is not None:
        row["residual"][CLASS_WORD] = share
    return row


def gains(rows: list[Row], words: str) -> list[float]:
    """What the residual adds to the identity of the toy alone, picture by picture, each asked in the same words."""
    pairs = [(row["class word"]["residual"], row["class word"]["original"]) for row in rows]
    if words == "V*":
        pairs = [(row["residual"][ALONE], row["original"][ALONE]) for row in rows]
    return [after - before for one in pairs for after, before in zip(*one, strict=True)]


def class_word_share(rows: list[Row]) -> float | None:
    """The mean gain of the plain class word over that of the concept's words; None where these gained nothing."""
    whole = _mean(gains(rows, "V*"))
    return _mean(gains(rows, "class word")) / whole if whole > 0 else None


def run_alone(cell: tuple[Concept, str | None, dict], data: Path) -> list[Row]:
    """`run` in a process of its own, on one core; with several numbers of steps, each goes on from the one before."""
    torch.set_num_threads(1)
    concept, biased, recipe = cell
    base, judge = load_base("toybox"), Judge(data)
    steps = recipe.pop("steps", (None,))
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(base, judge, concept, biased, steps=n, checkpoint=f"{folder}/state", **recipe) for n in steps]
    return [
        {**row, **{clock: round(sum(r[clock] for r in rows[: number + 1]), 1) for clock in CLOCKS}}
        for number, row in enumerate(rows)
    ]


def run_all(cells: list[tuple[Concept, str | None, dict]], data: Path) -> list[list[Row]]:
    """`run_alone` for every cell, one a core."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(partial(run_alone, data=data), cells), total=len(cells), desc="trainings"))


def concepts(data: Path, folder: Path, trainings: int, ranked: int) -> list[Row]:
    """Rows by concept and training: those that stand in the folder, and those that are made now and written there.

    Of the first training the pictures are kept as well, for the sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, frozen = folder / "rows.jsonl", dict[str, list[float]]()
    rows = rows_in(file)
    wanted = [(training, name) for training in range(trainings) for name in shipped.all_shipped()]
    missing = [key for key in wanted if key not in {(row["training"], row["concept"]) for row in rows}]
    base = load_base("toybox")
    settings = settings_of(base)
    keep_to(folder, {"weights": weights_of(base, data), "recipe": settings.recipe, "sampling": settings.sampling})
    if not missing:
        return rows
    judge = Judge(data)
    for training, name in tqdm(missing, desc="trainings"):
        toy, biased = shipped.all_shipped()[name]
        concept = load_concept(data / "concepts" / name)
        row, found, residuals = learn(base, judge, concept, biased, seed=training)
        places = row["places"]
        for way in WAYS if ranked else ():
            row[way] |= by_renderer(found.pictures[way], toy, places, ranked)
        if name not in frozen:
            frozen[name] = alone(judge, of_class_word(base, concept, places, None), concept)
        asked = alone(judge, of_class_word(base, concept, places, residuals), concept)
        row["class word"] = {"original": frozen[name], "residual": asked}
        if training == 0:
            for way in WAYS:
                sheet([found.pictures[way]]).save(folder / f"{name}-{way}.png")
        rows.append({"concept": name, "training": training, "biased": biased is not None, **row})
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(rows[-1]) + "\n")
    return rows


def rows_in(file: Path) -> list[Row]:
    """All whole lines; a last one that was cut off is taken away, so that the next one begins a line of its own."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole, cut, _ = text.rpartition("\n")
    if text and not text.endswith("\n"):
        with whole_file(file) as path:
            path.write_text(whole + cut, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines() if line]


def by_concept(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each concept's trainings, in the order of the trainings."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["training"]):
        found.setdefault(row["concept"], []).append(row)
    return {name: found[name] for name in shipped.all_shipped() if name in found}


def intervals(rows: list[Row]) -> list[str]:
    """What the ten together say, with the interval over concepts, then trainings, then pictures."""

    def groups(way: str, measure: str) -> dict[str, dict[int, list[float]]]:
        found: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            values = row[way].get(measure, [])
            if measure == "rank":
                values = [float(rank == 1) for rank in values]
            if values:
                found.setdefault(row["concept"], {})[row["training"]] = values
        return found

    def said(name: str, found: Interval) -> str:
        return (
            f"| {name} | {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] | {found.better_in} of {found.concepts} "
            f"| {found.concepts} concepts, {found.trainings} trainings, {found.pictures} pictures |"
        )

    lines = ["| | mean and 95 % interval | above zero in | n |", "|---|---|---|---|"]
    for name, measure in ((ALONE, ALONE), ("background moved", "background moved"), ("ranked first", "rank")):
        for one, other in (("residual", "original"), ("LAG", "original"), ("LAG", "residual")):
            if groups(one, measure):
                difference = bootstrap(paired(groups(one, measure), groups(other, measure)))
                lines.append(said(f"{name}: {one} minus {other}", difference))
    return lines


def concepts_sheet(folder: Path, data: Path, columns: int = 8) -> Image.Image:
    """The references of each concept, two by two, beside unselected pictures: the residual's above, LAG's below."""
    lines, words = [], []
    for name in shipped.all_shipped():
        if not (folder / f"{name}-LAG.png").is_file():
            continue
        references = load_concept(data / "concepts" / name).images
        for half, way in zip((references[:2], references[2:4]), ("residual", "LAG"), strict=True):
            strip = Image.open(folder / f"{name}-{way}.png").convert("RGB")
            side = strip.height
            pictures = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
            lines.append([*half, Image.new("RGB", (side, side), "white"), *pictures[:columns]])
            words.append(f"{name}, {way}")
    return sheet(lines, ["references", "", "", "all pictures of the first training"], words, gap=4)


def search(data: Path) -> dict[str, Row]:
    """The mean scores of every recipe of the grid over the search concepts, by "STEPS steps, rate RATE, rank RANK"."""
    cells: list[tuple[Concept, str | None, dict]] = []
    for name, (toy, biased) in shipped.SEARCH.items():
        images = [Image.fromarray(picture.image) for picture in shipped.photograph(name, toy, biased)]
        for rank, lr in product((0.05, 0.25), (1e-3, 3e-3, 1e-2)):
            recipe: dict = {"steps": (100, 200), "lr": lr, "rank": rank}
            cells.append((Concept(name, toy.kind, images=images), biased, recipe))
    found: dict[str, list[Row]] = {}
    for (concept, _, recipe), rows in zip(cells, run_all(cells, data), strict=True):
        for steps, row in zip(recipe["steps"], rows, strict=True):
            label = f"{steps} steps, rate {recipe['lr']:g}, rank {recipe['rank']:g}"
            found.setdefault(label, []).append({**row, "concept": concept.name})
    return {label: {**mean_of(rows), "concepts": rows} for label, rows in found.items()}


def mean_of(rows: list[Row]) -> Row:
    """The mean of each score over concepts, of those that have it."""
    means: Row = {name: round(_mean([row[name] for row in rows]), 1) for name in CLOCKS}
    for way in WAYS:
        measures = dict.fromkeys(measure for row in rows for measure in row[way])
        values = {measure: [row[way][measure] for row in rows if measure in row[way]] for measure in measures}
        means[way] = {measure: _mean(known) for measure, known in values.items()}
    return means


def best(rows: dict[str, Row]) -> str:
    """The recipe that the rule at the top of this file takes."""
    scored = {label: row["LAG"] for label, row in rows.items()}
    fit = {label: scores for label, scores in scored.items() if scores["place"] >= 0.9} or scored
    highest = max(round(scores["identity"], 2) for scores in fit.values())
    tied = [label for label, scores in fit.items() if round(scores["identity"], 2) == highest]
    return min(tied, key=lambda label: [float(word.split()[-1]) for word in (label.split(" steps")[0], label)])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _table(rows: dict[str, Row], by_renderer: bool = False) -> list[str]:
    """A column for each measure in each way that has it; those of the renderer, and the class word's, on demand."""
    known = list(dict.fromkeys(m for row in rows.values() for way in WAYS for m in row[way]))
    parts = [f"{part} read" for part in PARTS]
    measures = [m for m in known if m not in parts and (m in (*RANKS, CLASS_WORD)) == by_renderer]
    heads = [(m, way) for m in measures for way in WAYS if any(m in row[way] for row in rows.values())]
    clock = () if by_renderer else CLOCKS
    lines = []
    for name, row in rows.items():
        cells = [row[way].get(measure) for measure, way in heads]
        shown = ["" if cell is None else f"{cell:.2f}" for cell in cells]
        lines.append([name, *shown, *(str(row[each]) for each in clock)])
    return table(["", *(f"{m}: {way}" for m, way in heads), *clock], lines)


def _parts(mean: Row) -> list[str]:
    """How often the renderer reads each part as the toy has it."""
    names = [f"{part} read" for part in PARTS if f"{part} read" in mean["LAG"]]
    return table(["", *names], [[way, *(f"{mean[way][name]:.2f}" for name in names)] for way in WAYS])


def _save(what: str, rows: dict[str, Row], folder: Path, command: str, last: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = what if what == "concepts" else f"toybox-{what}"
    made = f"Made by `{command}` at commit {runs.commit()}, on {runs.machine()}."
    lines = [made, "", *_table(rows), "", *last]
    (folder / f"{name}.md").write_text("\n".join(lines))
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


def _notes(rows: list[Row]) -> list[str]:
    """What the table of the concepts does not say by itself."""
    grouped = by_concept(rows)
    counts = sorted({len(found) for found in grouped.values()})
    trainings = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    ranked = len(rows[0]["LAG"].get("rank", ()))
    pictures = len(rows[0]["LAG"]["identity"])
    gallery = len(near_misses(next(iter(shipped.all_shipped().values()))[0])) + 1
    lines = [
        f"n: {len(grouped)} concepts, trainings of each: {trainings}, pictures a training and way: {pictures} "
        f"({UNSEEN} places that no reference shows, {len(SEEDS)} noises in each).",
        "",
        "identity: cosine with the references by the identity encoder, which also sees the place; toy alone: both cut "
        "out on gray.",
    ]
    if ranked:
        lines += [
            f"ranked first, median rank: where the renderer as judge puts the toy's own paint among {gallery}, in "
            f"{ranked} of the {pictures} pictures (the first noise in each place before the second); by chance "
            f"{1 / gallery:.2f} and {(gallery + 1) / 2}. Main, second, pattern, accessory read: as the toy has them.",
        ]
    share = class_word_share(rows)
    lines += [
        f"{CLASS_WORD}: what the residual adds to the identity of the toy alone where the prompt has the plain class "
        f"word, over what it adds where it has the concept's words. In the last row, of the mean gains over "
        f"all pictures: {'not known' if share is None else format(share, '.2f')}.",
        "",
        *intervals(rows),
        "",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["concepts", "search"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--trainings", type=int, default=3, help="of each concept, for `concepts`")
    parser.add_argument("--ranked", type=int, default=4, help="pictures a way that the renderer reads, for `concepts`")
    parser.add_argument("--rows", type=Path, default=Path("build/concepts"), help="folder of the rows of `concepts`")
    args = parser.parse_args()
    results = args.data / "results"
    command = shlex.join(["python", "-m", "data.make.toybox_concepts", *sys.argv[1:]])
    rows: dict[str, Row] = {}
    last: list[str] = []
    if args.what == "concepts":
        found = concepts(args.data, args.rows, args.trainings, args.ranked)
        if not found:
            raise SystemExit(f"There are no rows in {args.rows}: ask for at least one training.")
        rows = {name: averaged(each) for name, each in by_concept(found).items()}
        rows["mean"] = mean_of(list(rows.values()))
        if (share := class_word_share(found)) is not None:  # not the mean of quotients, some of small numbers
            rows["mean"]["residual"][CLASS_WORD] = share
        last = [*_table(rows, by_renderer=True), "", *_parts(rows["mean"]), "", *_notes(found)]
        (results / "concepts-pictures.json").write_text(json.dumps(found) + "\n")
        concepts_sheet(args.rows, args.data).save(results / "concepts-sheet.jpg", quality=88)
    else:
        rows = search(args.data)
        last = [f"By the rule that stands at the top of the program: {best(rows)}.", ""]
    _save(args.what, rows, results, command, last)


if __name__ == "__main__":
    main()
