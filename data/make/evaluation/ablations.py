"""One choice changed at a time: what rank, layers, start, steps, words, map, mask, loss and method are worth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from data.make.evaluation.judging import PaperJudge, ToyboxJudge
from data.make.evaluation.methods import (
    LAYERS,
    METHODS,
    RESIDUALS,
    Bench,
    Recipe,
    as_long,
    step_seconds,
    train,
    train_layers,
)
from data.make.evaluation.subjects import Pair, Subject
from data.make.evaluation.tables import MEANS, SHARES, Groups, head_of, table, values
from data.make.evaluation.ways import Frozen, draw_all, everywhere, pictures_of, words_of
from data.make.evaluation.work import Key, Row, appending, key_of, rows_of
from data.make.runs import commit
from persres_lite import compare, localized, personalize
from persres_lite.bases import settings_of
from persres_lite.concepts import Concept
from persres_lite.prompts import END_OF_WORD
from persres_lite.residuals import find_proj_outs
from persres_lite.scores import Interval, bootstrap, paired
from persres_lite.toybox.world import CLASSES

RECIPE = "the recipe"
GAINED = "identity gained"
SHOWN = ("identity", GAINED, "moved", "place", "side", "class", "ranked first")
KINDS = ("place", "off center", "any")
RIVALS = tuple(method for method in METHODS if method != RESIDUALS)
GENERAL = ("object", "toy", "picture")
"""Words for nearly anything, of which a base gets the first that it knows."""


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
    called : callable, optional
        Of a subject: the word beside the rare token in place of its class, "" for none.
    layers : str, optional
        Of `methods.LAYERS`: a LoRA on these layers in place of the residuals.
    method : str, optional
        Of `RIVALS`, in place of the residuals.
    """

    what: str
    value: str
    training: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    called: Callable[[Subject], str] | None = None
    layers: str | None = None
    method: str | None = None

    @property
    def label(self) -> str:
        return f"{self.what}: {self.value}" if self.value else self.what


@dataclass
class Called(Concept):
    """A concept whose rare token stands before another word than its class, or before none.

    The package knows no such thing: a concept is called by its class. Whoever judges pictures still asks for that.
    """

    word: str = ""

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def words(self) -> list[str]:
        return [self.token, self.word] if self.word else [self.token]


def ablations(base: Any) -> list[Ablation]:
    """All rows, the recipe itself first."""
    recipe = settings_of(base).recipe
    steps, own = recipe["steps"], recipe["rank"]
    found = [Ablation(RECIPE, "")]
    ranks = [rank for rank in (1, 0.05, 0.125, 0.25, 0.5) if (type(rank), rank) != (type(own), own)]
    found += [Ablation("rank", str(rank), {"rank": rank}) for rank in ranks]  # 1 is a rank, 1.0 all of the width
    found += [Ablation("layers", f"{layers}, a LoRA of as many parameters", layers=layers) for layers in LAYERS]
    found += [
        Ablation("start", "random", {"init": "random"}),
        Ablation("token", "learns", {"train_token": True}),
        *(Ablation("steps", str(count), {"steps": count}) for count in (steps // 2, steps * 2)),
        Ablation("macro class", "wrong", called=_wrong),
        Ablation("macro class", _general(base)[1], called=lambda _: _general(base)[0]),
        Ablation("macro class", "none", called=lambda _: ""),
        Ablation("loss", "masked", {"loss": "masked"}),
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
        Ablation("heads", "the greatest", sampling={"heads": "max"}),
        Ablation("heads", "each one's median, by majority", sampling={"heads": votes, "mask": majority}),
    ]
    if _several(base):
        found += [Ablation("maps of a projection", f"the {one}", sampling={"layers": one}) for one in ("first", "last")]
    found += [
        Ablation("unconditional half", choice, sampling={"unconditional": choice})
        for choice in ("own", "residual", "original")
    ]
    found += [
        Ablation("steps with a mask", name, sampling={"window": window})
        for name, window in (("the first half", (0.0, 0.5)), ("the second half", (0.5, 1.0)))
    ]
    found += [Ablation(equal, method, method=method) for method in RIVALS for equal in ("equal steps", "equal seconds")]
    return found


def chosen(base: Any, only: Sequence[str] | None = None) -> list[Ablation]:
    """The ablations of these kinds, and the recipe that they are compared with; all if none is named.

    Raises
    ------
    ValueError
        If there is none of a kind.
    """
    known = ablations(base)
    kinds = list(dict.fromkeys(one.what for one in known))
    for unknown in set(only or ()) - set(kinds):
        raise ValueError(f"There is no ablation of {unknown!r} on this base: choose of {', '.join(kinds[1:])}.")
    return [one for one in known if not only or one.what in (*only, RECIPE)]


def absent(base: Any) -> list[str]:
    """What a table says of the rows that it cannot have."""
    if _several(base):
        return []
    return ["One layer of attention stands before each projection here, so there is one map: XL alone has several."]


def _several(base: Any) -> bool:
    """Whether several layers of attention, with a map each, stand before one projection."""
    names = (name.removesuffix(".proj_out") for name in find_proj_outs(base.unet))
    return any(len(base.unet.get_submodule(name).transformer_blocks) > 1 for name in names)


def _general(base: Any) -> tuple[str, str]:
    """A word for nearly anything that is one token of the base, and how a table speaks of it."""
    known = base.tokenizer.get_vocab()
    word = next(each for each in GENERAL if f"{each}{END_OF_WORD}" in known)
    unknown = GENERAL[: GENERAL.index(word)]
    why = " or ".join(f'"{each}"' for each in unknown)
    return word, f'general, "{word}"' + (f" (the base knows no {why})" if unknown else "")


def _wrong(subject: Subject) -> str:
    """Another class."""
    kinds = [*CLASSES, CLASSES[0]] if subject.toy else ["car", "cat", "car"]
    right = subject.concept.macro_class
    return kinds[kinds.index(right) + 1] if right in kinds else "car"


def votes(maps: torch.Tensor) -> torch.Tensor:
    """Maps of heads (B, heads, HW, concepts) as the share of heads that are above their own median there."""
    return (maps > maps.median(2, keepdim=True).values).to(maps.dtype).mean(1)


def majority(maps: torch.Tensor) -> torch.Tensor:
    """1 where more than half of the heads voted."""
    return (maps > 0.5).to(maps.dtype)


def equal(bench: Bench, concept: Concept, recipes: dict[str, Recipe], path: Path) -> dict[str, Recipe]:
    """By label: every other method for as many steps as the residuals' recipe has, and for as many seconds as these
    take, at its own rate and batch. What comes before the first step counts for none.
    """
    mine = _own_recipe(bench.base)
    of_one = step_seconds(bench, concept, {RESIDUALS: mine} | {name: recipes[name] for name in RIVALS}, path)
    seconds = of_one[RESIDUALS] * mine.steps
    return {f"equal steps: {name}": replace(recipes[name], steps=mine.steps) for name in RIVALS} | {
        f"equal seconds: {name}": as_long(recipes[name], seconds, of_one[name]) for name in RIVALS
    }


def _own_recipe(base: Any) -> Recipe:
    recipe = settings_of(base).recipe
    return Recipe(recipe["steps"], recipe["batch_size"], recipe["lr"])


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
    only: Sequence[str] | None = None,
    recipes: dict[str, Recipe] | None = None,
) -> None:
    """Do this process's share of what no row is there for yet; rows are written one concept and training at a time.

    Parameters
    ----------
    only : list of str, optional
        Kinds of ablations; all by default.
    recipes : dict of str to Recipe, optional
        By label, of other methods: from `equal`.

    Raises
    ------
    ValueError
        If rows of another method are there that were trained for other steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = rows_of(folder)
    for row in before:
        recipe = (recipes or {}).get(row["method"])
        if recipe and row["steps"] != recipe.steps:
            raise ValueError(
                f'{folder} has rows of "{row["method"]}" with {row["steps"]} steps, and now they would have '
                f"{recipe.steps}, for the seconds of a step were measured anew: name another folder with --rows."
            )
    done = {key_of(row) for row in before}
    known = chosen(bench.base, only)
    groups = [[one for one in known if one.sampling or one.what == RECIPE]]  # one training, drawn in many ways
    groups += [[one] for one in known if one not in groups[0]]
    units = [
        (subject, training, group)
        for training in range(trainings)
        for pair in pairs
        for subject in pair
        for group in groups
    ][process::processes]
    made = commit()
    with appending(folder / f"rows-{process}.jsonl") as file:
        for subject, training, group in tqdm(units, desc="ablations", unit="training", disable=process > 0):
            keys = [_key(subject, training, one.label, way) for one in group for way in _ways(one)]
            wanted = [key for key in keys if key not in done]
            rows = rows_of_group(bench, judge, fewer(subject), training, group, seeds, ranked, wanted, recipes)
            for row in rows if wanted else ():
                file.write(json.dumps(row | {"commit": made}, sort_keys=True) + "\n")
            file.flush()
            bench.clear()


def _key(subject: Subject, training: int, label: str, way: str) -> Key:
    return subject.concept.name, training, label, way, 1.0


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
    wanted: Sequence[Key],
    recipes: dict[str, Recipe] | None = None,
) -> Iterator[Row]:
    """Train once and yield a row for every way that is wanted in which each of the group is drawn."""
    first = group[0]
    if first.called is not None:
        word = first.called(subject)
        subject = replace(subject, concept=Called(**vars(subject.concept), word=word))
    prompts = pictures_of(subject, range(seeds))
    drawn = {(one.label, way): one for one in group for way in _ways(one)}
    drawn = {each: one for each, one in drawn.items() if _key(subject, training, *each) in wanted}
    if first.layers or first.method:
        recipe = (recipes or {})[first.label] if first.method else _own_recipe(bench.base)
        original, images, costs = _rival(bench, subject, training, first, recipe, prompts)
        pictures: Drawn = {(first.label, "residual"): images}
    else:
        original, pictures, costs = _residuals(bench.base, subject, training, drawn, seeds)
    frozen = Frozen(original, torch.empty(0), judge.masks(original, [prompt for prompt, _ in prompts]))
    for (label, way), images in pictures.items():
        scores = judge.score(subject, prompts, images, frozen)
        if ranked:
            judge.rank(subject, scores, images, ranked)
        row: Row = {"concept": subject.concept.name, "training": training, "method": label, "way": way, "scale": 1.0}
        yield row | {"pictures": scores} | costs


Drawn = dict[tuple[str, str], list]
"""Pictures by label and way."""


def _residuals(
    base: Any, subject: Subject, training: int, drawn: dict[tuple[str, str], Ablation], seeds: int
) -> tuple[list, Drawn, dict[str, Any]]:
    """The residuals: the original's pictures, those of every way, and what the training cost."""
    first = next(iter(drawn.values()))
    begun = time.perf_counter()
    residuals = personalize(base, subject.concept, seed=training, progress=False, **first.training)
    costs: dict[str, Any] = {"parameters": residuals.num_parameters()}
    costs["steps"] = first.training.get("steps", settings_of(base).recipe["steps"])
    costs["seconds"] = round(time.perf_counter() - begun, 2)
    usual = {way: label for (label, way), one in drawn.items() if not one.sampling}
    ways: dict[str, Callable[[], AbstractContextManager] | None] = {
        way: None for way in ("residual", "LAG") if way not in usual
    }
    for (label, _), one in drawn.items():
        if one.sampling:
            ways[label] = partial(localized, base, residuals, subject.concept, **one.sampling)
    texts = [prompt.text.format(*words_of(subject, None)) for prompt in subject.prompts]
    found = compare(base, residuals, subject.concept, prompts=texts, seeds=range(seeds), ways=ways, progress=False)
    pictures = {(label, way): found.pictures[label if one.sampling else way] for (label, way), one in drawn.items()}
    return found.pictures["original"], pictures, costs


def _rival(
    bench: Bench, subject: Subject, training: int, one: Ablation, recipe: Recipe, prompts: list
) -> tuple[list, list, dict[str, Any]]:
    """What stands in place of the residuals: the original's pictures, its own, and what its training cost."""
    if one.layers:
        trained = train_layers(bench, one.layers, subject.concept, training, recipe)
    else:
        trained = train(bench, one.method or "", subject.concept, training, recipe)
    costs: dict[str, Any] = {"parameters": trained.parameters, "steps": recipe.steps}
    if one.method:
        costs["seconds"] = round(trained.seconds, 2)
    original, images = (
        draw_all(bench.base, prompts, words_of(subject, None), everywhere(trained, None, scale)) for scale in (0.0, 1.0)
    )
    return original, images, costs


def _ways(ablation: Ablation) -> tuple[str, ...]:
    """In which an ablation is drawn: a mask changes LAG alone, and what is no residual has none."""
    if ablation.layers or ablation.method:
        return ("residual",)
    return ("LAG",) if ablation.sampling else ("residual", "LAG")


def tables_of(rows: list[Row], base: Any, draws: int = 2000) -> dict[str, dict[str, Any]]:
    """By ablation, in their order: parameters, steps and seconds, and by way the scores with their intervals.

    `GAINED` is the identity minus the recipe's, picture by picture: what both share, easy and hard concepts above all,
    is in the intervals of the two scores and not in that of the difference.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in ablations(base):
        for way in _ways(one):
            group = [row for row in rows if (row["method"], row["way"]) == (one.label, way)]
            if not group:
                continue
            entry = found.setdefault(one.label, {"parameters": group[0]["parameters"]})
            entry |= {"steps": group[0]["steps"]} if "steps" in group[0] else {}
            known = [row["seconds"] for row in group if "seconds" in row]
            entry |= {"seconds": sum(known) / len(known)} if known and not one.sampling else {}
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


def markdown(found: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    """One row an ablation."""
    columns = [(way, score) for way in ("residual", "LAG") for score in SHOWN]
    columns = [(w, s) for w, s in columns if any(s in row.get(w, {}) for row in found.values())]
    lines = []
    for label, row in found.items():
        cells = [label, f"{row['parameters']:,}", str(row.get("steps", ""))]
        cells.append(f"{row['seconds']:.1f}" if "seconds" in row else "")
        for way, score in columns:
            one = row.get(way, {}).get(score)
            ends = f" [{one['low']:.3f}, {one['high']:.3f}]" if one and score == "identity" else ""
            plain = "" if one is None else f"{one['mean']:.3f}{ends}"
            cells.append(str(Interval(**one)) if one and score == GAINED else plain)
        any_way = row.get("LAG") or row["residual"]
        n = any_way["identity"]
        lines.append([*cells, f"{n['concepts']} concepts, {n['trainings']} trainings, {n['pictures']} pictures"])
    head = [*head_of(about), ""]
    head += [
        "Each row changes one thing of the recipe, the rows of equal steps or seconds the whole method; every noise",
        "stays the same.",
    ]
    head += [
        "What is gained is the difference to the recipe, picture by picture; an interval that includes zero leaves"
    ]
    head += ["open which of the two is better.", *about.get("absent", ()), ""]
    names = ["", "parameters", "steps", "seconds", *(f"{score}: {way}" for way, score in columns), "n"]
    return "\n".join([*head, *table(names, lines), ""])
