"""Rows become tables: Markdown to read, and the same numbers as JSON, with the command, the commit and the machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.make import runs
from data.make.evaluation.methods import RESIDUALS
from data.make.evaluation.subjects import BESIDE
from data.make.evaluation.work import DRIFT, Plan, Row
from persres_lite.scores import Interval, bootstrap, gain_at_equal_leakage, on_ruler, paired
from persres_lite.support.files import whole_file

SHARES = (
    "place",
    "side",
    "style",
    "class",
    "main",
    "second",
    "pattern",
    "accessory",
    "property asked for",
    "both objects",
    "ranked first",
)
MEANS = (
    "identity",
    "identity, whole picture",
    "CLIP-I",
    "CLIP-T",
    "moved",
    "text gap",
    "diversity",
    "size",
    "rank",
    "yaw spread",
    "yaw from references",
)
DRIFTS = ("drift, class word", "drift, unrelated")
DISCS = ("disc, half", "disc, quarter")
FAR, SMALL = 0.25, 0.15
SCENES: dict[str, Callable[[dict[str, Any]], bool]] = {
    f"off center (middle more than {FAR:g} of half a picture to a side)": lambda p: _alone(p) and p["off before"] > FAR,
    f"small (less than {SMALL:g} of the picture)": lambda p: _alone(p) and p["size before"] < SMALL,
    "large and central": lambda p: _alone(p) and p["off before"] <= FAR and p["size before"] >= SMALL,
    "beside another": lambda p: p["kind"] in BESIDE,
}
"""By where the toy stands in the frozen model's picture: whether one of its pictures belongs there."""

Groups = dict[str, dict[int | None, list[Any]]]


def label(row: Row) -> str:
    """What a table calls a row's method and way."""
    if row["method"] in ("frozen", "ruler"):
        return f"{row['method']}, {row['way']}"
    how = "" if row["way"] == "everywhere" else f" + {row['way']}"
    return row["method"] + how


def values(rows: Iterable[Row], score: str, kind: str | None = None) -> Groups:
    """A score by concept and training, NaN where a picture has none; only of prompts of one kind, if it is named."""
    groups: Groups = {}
    for row in rows:
        chosen = [picture for picture in row["pictures"] if kind in (None, picture["kind"])]
        numbers = [np.nan if picture.get(score) is None else float(picture[score]) for picture in chosen]
        groups.setdefault(row["concept"], {})[row["training"]] = numbers
    return groups


def _alone(picture: dict[str, Any]) -> bool:
    return picture["kind"] not in BESIDE and "off before" in picture


def against_curve(
    method: list[Row],
    curve: list[Row],
    zero: list[Row],
    chosen: Callable[[dict[str, Any]], bool] = lambda _: True,
    beside: list[Row] | None = None,
) -> Groups:
    """For `gain_at_equal_leakage`: of each picture the method's leakage and identity, and those of the scale curve.

    Parameters
    ----------
    method : list of row
        One way at one scale.
    curve : list of row
        The residual everywhere, at all scales.
    zero : list of row
        The frozen model with the concept's words, which is the curve at scale 0.
    chosen : callable
        Of a picture: whether it counts.
    beside : list of row, optional
        Another way, whose leakage and identity then stand second, for `gained_more`.
    """
    others = {(row["concept"], row["training"]): row for row in beside or ()}
    start = {row["concept"]: row for row in zero}
    scales = sorted({row["scale"] for row in curve})
    at = {(row["concept"], row["training"], row["scale"]): row for row in curve}
    groups: Groups = {}
    for row in method:
        concept, training = row["concept"], row["training"]
        trainings = [training] if training is not None else sorted({t for c, t, _ in at if c == concept})
        for each in trainings:
            keys = [(concept, each, scale) for scale in scales]
            if concept not in start or not all(key in at for key in keys):
                continue  # the run was cut short: it is not counted in n either
            if beside is not None and (concept, training) not in others:
                continue
            second = [] if beside is None else [others[concept, training]]
            points = [row, *second, start[concept], *(at[key] for key in keys)]
            columns = [
                [np.nan if picture[score] is None else picture[score] for picture in point["pictures"]]
                for point in points
                for score in ("moved", "identity")
            ]
            counted = [chosen(picture) for picture in row["pictures"]]
            if any(counted):
                groups.setdefault(concept, {})[each] = np.array(columns, dtype=float).T[counted].tolist()
    return groups


def gained_more(means: np.ndarray) -> float:
    """A statistic for `bootstrap`: `gain_at_equal_leakage` of one way minus that of another.

    Parameters
    ----------
    means : array (4 + 2 k,)
        Leakage and identity of the one, of the other, and of the k points of the curve in turn.
    """
    first, second, curve = means[:2], means[2:4], means[4:]
    return gain_at_equal_leakage(np.r_[first, curve]) - gain_at_equal_leakage(np.r_[second, curve])


def tables_of(rows: list[Row], draws: int = 2000) -> dict[str, Any]:
    """Everything that the Markdown shows, as plain numbers.

    Returns
    -------
    dict
        "methods": scores at full strength by method; "curves": identity and leakage over the scale; "at equal leakage":
        what each gains over the residual turned down as far, and "by scene" the same for ways of localizing, by where
        the toy stands; "against a disc": how much more than a disc in the mask's place, in pictures of one concept;
        "LAG minus residual": by type of prompt; "ruler".
    """
    drifted, rows = [row for row in rows if row["way"] == DRIFT], [row for row in rows if row["way"] != DRIFT]
    full = _grouped(row for row in rows if row["scale"] in (0.0, 1.0))
    found: dict[str, Any] = {"methods": {}, "curves": {}, "at equal leakage": {}, "LAG minus residual": {}}
    for name, group in full.items():
        found["methods"][name] = _scores(group, draws) | _costs(group)
    for name in dict.fromkeys(row["method"] for row in drifted):
        for kind in ("class word", "unrelated"):
            mean = _mean(values([row for row in drifted if row["method"] == name], "drift", kind), draws)
            if mean is not None and name in found["methods"]:
                found["methods"][name][f"drift, {kind}"] = mean
    found["ruler"] = {name: row["identity"]["mean"] for name, row in found["methods"].items() if "ruler" in name}
    ends = [full.get(f"ruler, {way}", []) for way in ("others of the class", "held-out references")]
    for name, row in found["methods"].items() if all(ends) else ():
        floor, ceiling = (_identity(end, among=full[name]) for end in ends)  # a run may have been cut short
        row["on the ruler"] = on_ruler(row["identity"]["mean"], floor, ceiling)
    for row in rows:
        if row["method"] not in ("frozen", "ruler") and row["way"] in ("everywhere", "LAG"):
            found["curves"].setdefault(label(row), {}).setdefault(str(row["scale"]), []).append(row)
    for curve in found["curves"].values():
        for scale, group in curve.items():
            curve[scale] = {score: _mean(values(group, score), draws) for score in ("identity", "moved")}
    curve_rows = [row for row in rows if row["method"] == RESIDUALS and row["way"] == "everywhere"]
    zero = full.get("frozen, rare token", [])
    if curve_rows and zero:
        for name, group in full.items():
            if name.startswith("ruler") or name in (RESIDUALS, "frozen, rare token"):
                continue
            made = _whole(partial(_at_equal_leakage, group, curve_rows, zero, draws))
            if made is not None:
                found["at equal leakage"][name] = made
            for disc in DISCS if name.startswith(f"{RESIDUALS} +") else ():
                other = f"{RESIDUALS} + LAG, {disc}"
                if other in full and other != name:
                    made = _whole(partial(_more_than, group, full[other], curve_rows, zero, draws))
                    if made is not None:
                        found.setdefault("against a disc", {}).setdefault(name, {})[disc] = made
            for scene, chosen in SCENES.items() if name.startswith(f"{RESIDUALS} +") else ():
                made = _whole(partial(_at_equal_leakage, group, curve_rows, zero, draws, chosen))
                if made is not None:
                    found.setdefault("by scene", {}).setdefault(name, {})[scene] = made
    lag, residual = full.get(f"{RESIDUALS} + LAG", []), full.get(RESIDUALS, [])
    drawn = {(row["concept"], row["training"]) for row in residual}
    lag = [row for row in lag if (row["concept"], row["training"]) in drawn]
    if lag and residual:
        for kind in dict.fromkeys(picture["kind"] for row in lag for picture in row["pictures"]):
            found["LAG minus residual"][kind] = {}
            for score in (*MEANS, *SHARES):
                first, second = values(lag, score, kind), values(residual, score, kind)
                first = {concept: group for concept, group in first.items() if all(group.values())}
                made = _whole(partial(_paired, first, second, draws)) if first else None
                if made is not None:
                    found["LAG minus residual"][kind][score] = made
    return found


def about_of(command: str, rows: Iterable[Row]) -> dict[str, Any]:
    """What stands above a table: the command, the commit that is checked out, the machine, and the commits at which
    rows were made; those of long ago do not say theirs.
    """
    made = sorted({row.get("commit", "an earlier one") for row in rows})
    return {"command": command, "commit": runs.commit(), "machine": runs.machine(), "rows of": made}


def head_of(about: dict[str, Any]) -> list[str]:
    """`about_of` in words."""
    lines = [f"Made by `{about['command']}` at commit {about['commit']}, on {about['machine']}."]
    if about["rows of"] != [about["commit"]]:
        lines += [f"Commits of its rows, all with these weights and settings: {', '.join(about['rows of'])}."]
    return lines


def markdown(found: dict[str, Any], about: dict[str, Any], plan: Plan) -> str:
    """The tables in words and bars."""
    lines = [*head_of(about), "", "## Protocol", "", *_protocol(plan), ""]
    lines += ["## Methods at full strength", ""]
    lines += ["Mean over concepts of means over trainings of means over pictures, and in brackets its 95 % interval."]
    lines += [
        "On the ruler 0 is another toy of the class, 1 the held-out references. Drift is how far pictures of prompts"
    ]
    lines += [
        "without the concept's words move; LAG leaves them alone. On a CPU the peak is what the process grew by: 0"
    ]
    lines += ["where an earlier training had taken as much.", ""]
    columns = [name for name in (*MEANS, *DRIFTS) if any(name in row for row in found["methods"].values())]
    shares = [name for name in SHARES if any(name in row for row in found["methods"].values())]
    head = ["", *columns, "on the ruler", *shares, "parameters", "seconds", "peak, MB", "n"]
    lines += table(head, [_method_row(name, row, columns, shares) for name, row in found["methods"].items()])
    lines += ["", "## At equal leakage", ""]
    lines += ["Identity minus that of the plain residual, turned down until it moves the background as far.", ""]
    gains = [
        [name, _shown(row), f"{row['better_in']} of {row['concepts']}", _n(row)]
        for name, row in found["at equal leakage"].items()
    ]
    lines += table(["", "identity gained", "ahead in", "n"], gains)
    if "against a disc" in found:
        lines += ["", "## More than a disc", ""]
        lines += ["The gain of the table above minus that of a disc in the mask's place, in the same pictures: what"]
        lines += [
            "looking is worth, beside a disc that takes half of the picture or a quarter. Without the pictures of two"
        ]
        lines += ["concepts, in which all masks that are made before the picture, discs too, are cut at the middle, to"]
        lines += ["the side where the prompt puts each; the other tables count them.", ""]
        more = [
            [name, *(f"{_shown(row[disc])} ({row[disc]['concepts']})" if disc in row else "" for disc in DISCS)]
            for name, row in found["against a disc"].items()
        ]
        lines += table(["gained more than (n concepts)", *DISCS], more)
    if "by scene" in found:
        lines += ["", "## At equal leakage, by where the toy stands in the frozen model's picture", ""]
        scenes = [scene for scene in SCENES if any(scene in row for row in found["by scene"].values())]
        standing = [
            [name, *(f"{_shown(row[scene])} ({row[scene]['pictures']})" if scene in row else "" for scene in scenes)]
            for name, row in found["by scene"].items()
        ]
        lines += table(["identity gained (n pictures)", *scenes], standing)
    lines += ["", "## Over the strength", ""]
    scales = sorted({scale for curve in found["curves"].values() for scale in curve}, key=float)
    curves = [
        [name, *(f"{c[s]['identity']['mean']:.3f} / {c[s]['moved']['mean']:.3f}" if s in c else "" for s in scales)]
        for name, c in found["curves"].items()
    ]
    lines += table(["identity / moved", *scales], curves)
    if found["LAG minus residual"]:
        lines += ["", "## LAG minus residual, by type of prompt", ""]
        scores = list(dict.fromkeys(score for row in found["LAG minus residual"].values() for score in row))
        by_kind = [
            [kind, *(_shown(row[score]) if score in row else "" for score in scores)]
            for kind, row in found["LAG minus residual"].items()
        ]
        lines += table(["", *scores], by_kind)
    return "\n".join([*lines, ""])


def write(rows: list[Row], plan: Plan, path: Path, command: str, draws: int = 2000) -> dict[str, Any]:
    """Write `path`.md and `path`.json; returns the tables."""
    found = tables_of(rows, draws)
    about = about_of(command, rows)
    recipes = {name: asdict(recipe) for name, recipe in plan.recipes.items() if name in plan.methods}
    protocol = {"trainings": plan.trainings, "seeds": plan.seeds, "scales": plan.scales, "recipes": recipes}
    with whole_file(path.with_suffix(".json")) as file:
        file.write_text(json.dumps({"about": about, "protocol": protocol, **found}, indent=1) + "\n")
    with whole_file(path.with_suffix(".md")) as file:
        file.write_text(markdown(found, about, plan))
    return found


def _grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups


def _scores(group: list[Row], draws: int) -> dict[str, Any]:
    found = {score: _mean(values(group, score), draws) for score in (*MEANS, *SHARES)}
    return {score: row for score, row in found.items() if row is not None}


def _costs(group: list[Row]) -> dict[str, float]:
    """Of the trainings: parameters and seconds on average, and the most memory, because a process that has trained
    before may have enough already.
    """
    known = [row for row in group if "parameters" in row]
    if not known:
        return {}
    means = {name: float(np.mean([row[name] for row in known])) for name in ("parameters", "seconds")}
    return means | {"peak": float(max(row["peak"] for row in known))}


def _mean(groups: Groups, draws: int) -> dict[str, Any] | None:
    return _whole(lambda: bootstrap(groups, draws=draws))


def _identity(rows: list[Row], among: list[Row]) -> float:
    """The mean of the rows of those concepts that the others are of."""
    concepts = {row["concept"] for row in among}
    found = _mean(values([row for row in rows if row["concept"] in concepts], "identity"), draws=1)
    return found["mean"] if found else np.nan


def _at_equal_leakage(group: list[Row], curve_rows: list[Row], zero: list[Row], draws: int, *chosen: Any) -> Interval:
    groups = against_curve(group, curve_rows, zero, *chosen)
    return bootstrap(_reached(groups, gain_at_equal_leakage), gain_at_equal_leakage, draws=draws)


def _more_than(group: list[Row], other: list[Row], curve_rows: list[Row], zero: list[Row], draws: int) -> Interval:
    groups = against_curve(group, curve_rows, zero, lambda picture: picture["kind"] != "two concepts", other)
    return bootstrap(_reached(groups, gained_more), gained_more, draws=draws)


def _reached(groups: Groups, statistic: Callable[[np.ndarray], float]) -> Groups:
    """Without the trainings that the curve does not reach: the mean leaves them out, so no draw may bring them back."""

    def gain(pictures: list[Any]) -> float:
        numbers = np.array(pictures, dtype=float)
        known = numbers[np.isfinite(numbers).all(1)]
        return statistic(known.mean(0)) if len(known) else np.nan

    kept = {c: {t: each for t, each in found.items() if not np.isnan(gain(each))} for c, found in groups.items()}
    return {concept: found for concept, found in kept.items() if found}


def _paired(first: Groups, second: Groups, draws: int) -> Interval:
    return bootstrap(paired(first, second), draws=draws)


def _whole(make: Callable[[], Interval]) -> dict[str, Any] | None:
    """An interval as plain numbers; None where no picture has the score, or no curve reaches the leakage."""
    try:
        found = make()
    except ValueError:
        return None
    return None if np.isnan(found.mean) else asdict(found)


def _method_row(name: str, row: dict[str, Any], columns: list[str], shares: list[str]) -> list[str]:
    cells = [name, *(_plain(row[score]) if score in row else "" for score in columns)]
    cells.append(f"{row['on the ruler']:.2f}" if "on the ruler" in row else "")
    cells += [f"{row[score]['mean']:.2f}" if score in row else "" for score in shares]
    cells += (
        [f"{row['parameters']:,.0f}", f"{row['seconds']:.1f}", f"{row['peak'] / 1e6:.0f}"]
        if "peak" in row
        else [""] * 3
    )
    return [*cells, _n(row["identity"])]


def _protocol(plan: Plan) -> list[str]:
    rows = [
        [name, str(recipe.steps), str(recipe.batch_size), f"{recipe.lr:g}", str(recipe.prior or "none")]
        for name, recipe in plan.recipes.items()
        if name in plan.methods
    ]
    text = f"{plan.trainings} trainings a concept and method, {plan.seeds} pictures a prompt, seeds from 0."
    return [text, "", *table(["method", "steps", "batch", "rate", "pictures of the class"], rows)]


def _plain(row: dict[str, Any]) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _shown(row: dict[str, Any]) -> str:
    return str(Interval(**row))


def _n(row: dict[str, Any]) -> str:
    return f"{row['concepts']} concepts, {row['trainings']} trainings, {row['pictures']} pictures"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
