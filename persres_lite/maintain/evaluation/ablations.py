"""One choice changed at a time: what rank, layers, start, steps, words, mask and loss are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from persres_lite import compare, localized, personalize
from persres_lite.bases import settings_of
from persres_lite.maintain.evaluation.judging import PaperJudge, ToyboxJudge
from persres_lite.maintain.evaluation.methods import LAYERS, Bench, Recipe, train_layers
from persres_lite.maintain.evaluation.subjects import Pair, Subject
from persres_lite.maintain.evaluation.tables import MEANS, SHARES, Groups, table, values
from persres_lite.maintain.evaluation.ways import Frozen, draw_all, everywhere, pictures_of, words_of
from persres_lite.maintain.evaluation.work import Row, key_of, rows_of
from persres_lite.scores import Interval, bootstrap, paired
from persres_lite.toybox.world import CLASSES

RECIPE = "the recipe"
GAINED = "identity gained"
SHOWN = ("identity", GAINED, "moved", "place", "side", "ranked first")
KINDS = ("place", "off center", "any")


@dataclass(frozen=True)
class Ablation:
    """One row of the table.

    Attributes
    ----------
    what, value : str
        What is changed, and to what.
    training : dict
        Arguments of `personalize`.
    sampling : dict
        Arguments of `localized`; then the recipe's own training is drawn.
    layers : str, optional
        Of `methods.LAYERS`: a LoRA on these layers in place of the residuals.
    wrong_class : bool
        Whether another class's word stands beside the rare token.
    """

    what: str
    value: str
    training: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    layers: str | None = None
    wrong_class: bool = False

    @property
    def label(self) -> str:
        return f"{self.what}: {self.value}" if self.value else self.what


def ablations(recipe: dict[str, Any]) -> list[Ablation]:
    """All rows, the recipe itself first.

    What the package leaves no choice in, is not here: a class word is always given, heads are averaged, and Toybox's
    captions have no general word ("toy", "thing") that could stand for a class.
    """
    steps = recipe["steps"]
    found = [Ablation(RECIPE, "")]
    found += [Ablation("rank", f"{r:g}", {"rank": r}) for r in (1, 0.05, 0.125, 0.25, 0.5) if r != recipe["rank"]]
    found += [Ablation("layers", f"{layers}, a LoRA of as many parameters", layers=layers) for layers in LAYERS]
    found += [
        Ablation("start", "random", {"init": "random"}),
        Ablation("token", "learns", {"train_token": True}),
        *(Ablation("steps", str(count), {"steps": count}) for count in (steps // 2, steps * 2)),
        Ablation("macro class", "wrong", wrong_class=True),
        Ablation("loss", "masked", {"masked_loss": True}),
    ]
    masks: dict[str, dict[str, Any]] = {
        "Otsu": {"mask": "otsu"},
        "best quarter": {"mask": "quantile", "q": 0.75},
        "soft": {"mask": "soft"},
        "aggregated": {"aggregate": "both"},
        "aggregated, best quarter": {"aggregate": "both", "mask": "quantile", "q": 0.75},
        "refined": {"refine": 1},
    }
    found += [Ablation("mask", name, sampling=options) for name, options in masks.items()]
    found += [
        Ablation("unconditional half", choice, sampling={"unconditional": choice})
        for choice in ("own", "residual", "original")
    ]
    found += [
        Ablation("steps with a mask", name, sampling={"window": window})
        for name, window in (("the first half", (0.0, 0.5)), ("the second half", (0.5, 1.0)))
    ]
    return found


def run(
    bench: Bench,
    judge: ToyboxJudge | PaperJudge,
    pairs: Sequence[Pair],
    folder: Path,
    trainings: int = 1,
    seeds: int = 1,
    ranked: int = 4,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Do this process's share of what no row is there for yet; rows are written one concept and training at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    done = {key_of(row) for row in rows_of(folder)}
    known = ablations(settings_of(bench.base).recipe)
    groups = [[one for one in known if one.sampling or one.what == RECIPE]]  # one training, drawn in many ways
    groups += [[one] for one in known if one not in groups[0]]
    units = [
        (subject, training, group)
        for training in range(trainings)
        for pair in pairs
        for subject in pair
        for group in groups
        if any((subject.concept.name, training, one.label, way, 1.0) not in done for one in group for way in _ways(one))
    ][process::processes]
    with open(folder / f"rows-{process}.jsonl", "a", encoding="utf-8") as file:
        for subject, training, group in tqdm(units, desc="ablations", unit="training", disable=process > 0):
            for row in rows_of_group(bench, judge, fewer(subject), training, group, seeds, ranked):
                file.write(json.dumps(row, sort_keys=True) + "\n")
            file.flush()
            bench.clear()


def fewer(subject: Subject) -> Subject:
    """Prompts that ask for one toy and a place, with the concept's own paint."""
    return replace(subject, prompts=[prompt for prompt in subject.prompts if prompt.kind in KINDS])


def rows_of_group(
    bench: Bench,
    judge: ToyboxJudge | PaperJudge,
    subject: Subject,
    training: int,
    group: Sequence[Ablation],
    seeds: int,
    ranked: int,
) -> Iterator[Row]:
    """Train once and yield a row for every way in which each of the group is drawn."""
    base, first = bench.base, group[0]
    if first.wrong_class:
        kinds = [*CLASSES, CLASSES[0]] if subject.toy else ["car", "cat", "car"]
        wrong = kinds[kinds.index(subject.concept.macro_class) + 1] if subject.concept.macro_class in kinds else "car"
        subject = replace(subject, concept=replace(subject.concept, macro_class=wrong))
    prompts = pictures_of(subject, range(seeds))
    texts = [prompt.text.format(*words_of(subject, None)) for prompt in subject.prompts]
    pictures: dict[tuple[str, str], list]
    if first.layers is None:
        residuals = personalize(base, subject.concept, seed=training, progress=False, **first.training)
        options: dict[str, dict[str, Any]] = {one.label: one.sampling for one in group if one.sampling}
        ways: dict[str, Callable[[], AbstractContextManager]] = {
            label: partial(localized, base, residuals, subject.concept, **chosen) for label, chosen in options.items()
        }
        found = compare(base, residuals, subject.concept, prompts=texts, seeds=range(seeds), ways=ways, progress=False)
        original, parameters = found.pictures["original"], residuals.num_parameters()
        pictures = {(first.label, way): found.pictures[way] for way in ("residual", "LAG")}
        pictures |= {(label, "LAG"): found.pictures[label] for label in options}
    else:
        recipe = settings_of(base).recipe
        plan = Recipe(recipe["steps"], recipe["batch_size"], recipe["lr"])
        trained = train_layers(bench, first.layers, subject.concept, training, plan)
        parameters, words = trained.parameters, words_of(subject, None)
        original = draw_all(base, prompts, words, everywhere(trained, None, 0.0))
        pictures = {(first.label, "residual"): draw_all(base, prompts, words, everywhere(trained, None, 1.0))}
    frozen = Frozen(original, torch.empty(0), judge.masks(original, [prompt for prompt, _ in prompts]))
    for (label, way), images in pictures.items():
        scores = judge.score(subject, prompts, images, frozen)
        if ranked:
            judge.rank(subject, scores, images, ranked)
        row: Row = {"concept": subject.concept.name, "training": training, "method": label, "way": way, "scale": 1.0}
        yield row | {"pictures": scores, "parameters": parameters}


def _ways(ablation: Ablation) -> tuple[str, ...]:
    """In which an ablation is drawn: a mask changes LAG alone, and a LoRA on other layers has none."""
    if ablation.layers:
        return ("residual",)
    return ("LAG",) if ablation.sampling else ("residual", "LAG")


def tables_of(rows: list[Row], recipe: dict[str, Any], draws: int = 2000) -> dict[str, dict[str, Any]]:
    """By ablation, in their order: parameters, and by way the scores with their intervals.

    `GAINED` is the identity minus the recipe's, picture by picture: what both share, easy and hard concepts above all,
    is in the intervals of the two scores and not in that of the difference.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in ablations(recipe):
        for way in _ways(one):
            group = [row for row in rows if (row["method"], row["way"]) == (one.label, way)]
            if not group:
                continue
            entry = found.setdefault(one.label, {"parameters": group[0]["parameters"]})
            entry[way] = {}
            for score in (*MEANS, *SHARES):
                numbers = values(group, score)
                if any(v == v for trainings in numbers.values() for each in trainings.values() for v in each):
                    entry[way][score] = vars(bootstrap(numbers, draws=draws))
            recipes = [row for row in rows if (row["method"], row["way"]) == (RECIPE, way)]
            first, second = (_of_both(values(part, "identity"), group, recipes) for part in (group, recipes))
            if one.label != RECIPE and first and "identity" in entry[way]:
                entry[way][GAINED] = vars(bootstrap(paired(first, second), draws=draws))
    return found


def _of_both(groups: Groups, *parts: list[Row]) -> Groups:
    """What concept and training have rows for in all parts: a run may have been cut short."""
    keys = set.intersection(*({(row["concept"], row["training"]) for row in part} for part in parts))
    kept = {c: {t: each for t, each in found.items() if (c, t) in keys} for c, found in groups.items()}
    return {concept: found for concept, found in kept.items() if found}


def markdown(found: dict[str, dict[str, Any]], about: dict[str, str]) -> str:
    """One row an ablation."""
    heads = [(way, score) for way in ("residual", "LAG") for score in SHOWN]
    heads = [(w, s) for w, s in heads if any(s in row.get(w, {}) for row in found.values())]
    lines = []
    for label, row in found.items():
        cells = [label, f"{row['parameters']:,}"]
        for way, score in heads:
            one = row.get(way, {}).get(score)
            ends = f" [{one['low']:.3f}, {one['high']:.3f}]" if one and score == "identity" else ""
            plain = "" if one is None else f"{one['mean']:.3f}{ends}"
            cells.append(str(Interval(**one)) if one and score == GAINED else plain)
        any_way = row.get("LAG") or row["residual"]
        n = any_way["identity"]
        lines.append([*cells, f"{n['concepts']} concepts, {n['trainings']} trainings, {n['pictures']} pictures"])
    head = [f"Made by `{about['command']}` at commit {about['commit']}, on {about['machine']}.", ""]
    head += ["Each row changes one thing of the recipe; everything else, and every noise, stays the same."]
    head += [
        "What is gained is the difference to the recipe, picture by picture; an interval that includes zero leaves"
    ]
    head += ["open which of the two is better.", ""]
    return "\n".join([*head, *table(["", "parameters", *(f"{s}: {w}" for w, s in heads), "n"], lines), ""])
