"""Tables and figures of a study, by pandas from its rows, in seconds.

One headline a claim: which differences are asked about was fixed before looking (`QUESTIONS`); intervals are those of
the nested, paired bootstrap over concepts, trainings and pictures.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from data.make.study.methods import CLASS_WORD, DESCRIBED, FROZEN, METHODS, RESIDUAL
from data.make.study.rows import CHOICES, KEY
from data.make.study.ways import LAG, MASKED, WHOLE
from persres_lite.course.figures import forest
from persres_lite.scores import Interval, bootstrap
from persres_lite.support.files import whole_file
from persres_lite.support.paths import data_dir

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DRAWS = 500
TOO_LARGE = 1.5  # times the larger of the frozen model's toy and the references' largest
KNOWN = ("toys", "rank", "area of references", "in disc, half", "in disc, quarter", "seconds", "parameters")
SHOWN = ("identity", "one toy", "area", "ranked first", "misfit", "leak", "kept", "CLIP-I", "CLIP-T")
QUESTIONS = (
    ("The paper's mask against a half disc", "identity", LAG, "disc, half"),
    ("Best quarter of aggregated maps against a quarter disc", "identity", "aggregated, best quarter", "disc, quarter"),
    ("The paper's mask against another scene's", "identity", LAG, "swap"),
    ("The paper's mask against its complement", "identity", LAG, "complement"),
    ("Without the worst block against with it", "identity", "without the worst block", LAG),
    *((f"Leak of LAG against the {way}", "leak", LAG, way) for way in WHOLE),
)
"""Of the same residual, paired: what is asked, the score, one way and the other."""
PICTURE = ["concept", "scene", "prompt", "noise"]


def frame_of(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """All rows, with what only rows together can say: whether there is one toy, no larger than it should be."""
    frame = pd.DataFrame(rows).drop_duplicates(list(KEY), keep="last")
    for name in (*SHOWN, *KNOWN):
        frame[name] = pd.to_numeric(frame[name]) if name in frame else float("nan")
    frozen = frame[frame.method == FROZEN].set_index(PICTURE).area.rename("area before")
    frame = frame.join(frozen, on=PICTURE)
    largest = frame[["area before", "area of references"]].max(axis=1)
    known = frame.toys.notna() & frame["area before"].notna()
    frame["one toy"] = ((frame.toys == 1) & (frame.area <= TOO_LARGE * largest)).astype(float).where(known)
    frame["ranked first"] = (frame["rank"] == 1).astype(float).where(frame["rank"].notna())
    return frame


def means(frame: pd.DataFrame, by: Sequence[str] = ("method", "way")) -> pd.DataFrame:
    """Over concepts the mean of means over trainings of means over pictures; n counts pictures."""
    each = frame.fillna({"training": -1}).groupby([*by, "concept", "training"], sort=False)[list(SHOWN)].mean()
    found = each.groupby([*by, "concept"], sort=False).mean().groupby(list(by), sort=False).mean()
    found["n"] = frame.groupby(list(by), sort=False).size()
    return found.dropna(axis=1, how="all")


def difference(frame: pd.DataFrame, score: str, one: pd.DataFrame, other: pd.DataFrame) -> Interval | None:
    """The mean of one - other, picture by picture, of the same concept and training; None if they share no picture."""
    on = PICTURE if other.training.isna().all() else [*PICTURE, "training"]
    both = (
        one[[*PICTURE, "training", score]].merge(other[[*on, score]], on=on).dropna(subset=[f"{score}_x", f"{score}_y"])
    )
    if both.empty:
        return None
    both["d"] = both[f"{score}_x"] - both[f"{score}_y"]
    groups = {
        concept: {training: list(part.d) for training, part in of.groupby("training", dropna=False)}
        for concept, of in both.groupby("concept")
    }
    return bootstrap(groups, draws=DRAWS)


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """`QUESTIONS`, scene by scene, of the residual; of leaks only biased concepts know."""
    mine, found = frame[frame.method == RESIDUAL], []
    for question, score, one, other in QUESTIONS:
        for scene in mine.scene.unique():
            ways = [mine[(mine.way == way) & (mine.scene == scene)] for way in (one, other)]
            found.append((question, scene, difference(frame, score, *ways)))
    rows = [
        {"question": question, "scene": scene, "mean": d.mean, "low": d.low, "high": d.high}
        | {"ahead in": f"{d.better_in} of {d.concepts}", "trainings": d.trainings, "pictures": d.pictures}
        for question, scene, d in found
        if d is not None
    ]
    return pd.DataFrame(rows)


def curves(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By method: leak, identity and one toy by strength, over the biased concepts in new places, and LAG's row.

    At strength 0 stands the frozen model with the concept's words, on the same pictures.
    """
    at = frame[(frame.scene == "place") & frame.biased] if frame.leak.notna().any() else frame[frame.scene == "any"]
    found = {}
    for method in at.method.unique():
        own = at[at.method == method]
        if METHODS[method].kind == "frozen" or method in CHOICES or not own.way.isin(WHOLE).any():
            continue
        shared = at[(at.method == FROZEN)].merge(own[PICTURE].drop_duplicates(), on=PICTURE)
        parts = [shared.assign(method=method), own[own.way.isin((*WHOLE, LAG))]]
        found[method] = means(pd.concat(parts), ("way", "strength")).reset_index().sort_values("strength")
    return found


def read_off(curve: pd.DataFrame, leak: float) -> float | None:
    """The best identity on a curve of strengths where it leaks no more than `leak`, by straight lines between points;
    None if it does not get there. The frozen model, which shows no concept, does not count as getting there.
    """
    points = list(curve[["leak", "identity"]].itertuples(index=False, name=None))[1:]
    best = [identity for x, identity in points if x <= leak]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if (x0 - leak) * (x1 - leak) < 0:
            best.append(y0 + (y1 - y0) * (leak - x0) / (x1 - x0))
    return max(best, default=None)


def at_lags_leak(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Each method's identity at the leak of the residual's LAG, or that it does not get there, and its own LAG."""
    mine = found.get(RESIDUAL, pd.DataFrame(columns=["way"]))
    lag = mine[mine.way == LAG]
    rows = []
    for method, curve in found.items() if len(lag) and "leak" in mine else ():
        whole, own = curve[curve.way != LAG], curve[curve.way == LAG]
        reached = read_off(whole, float(lag.leak.iloc[0]))
        least = whole.iloc[1:].leak.min()
        rows.append({"method": method, "identity at full strength": whole.identity.iloc[-1],
                     "leak at full strength": whole.leak.iloc[-1], "least leak": least,
                     "identity at LAG's leak": f"{reached:.3f}" if reached is not None else "does not get there",
                     "own LAG, identity": own.identity.max(), "own LAG, leak": own.leak.max()})  # fmt: skip
    return pd.DataFrame(rows)


def draw_leakage(found: dict[str, pd.DataFrame], path: Path) -> None:
    """Identity against directed leakage: a curve for each method, LAG's point a star; hollow where toys sprawl."""
    figure, axes = plt.subplots(figsize=(8, 5))
    colors = plt.get_cmap("tab20").colors
    for color, (method, curve) in zip(colors, found.items(), strict=False):
        whole, own = curve[curve.way != LAG], curve[curve.way == LAG]
        width = 2.5 if method == RESIDUAL else 1.2
        axes.plot(whole.leak, whole.identity, color=color, lw=width, label=method)
        for _, point in pd.concat([whole, own]).iterrows():
            one = point["one toy"] if "one toy" in point else 1.0
            size, marker = (180, "*") if point.way == LAG else (28, "o")
            face = color if not one < 0.8 else "white"
            axes.scatter(point.leak, point.identity, s=size, marker=marker, color=face, edgecolors=color, zorder=3)
    axes.set_xlabel("directed leakage: how likely the references' place is where another was asked")
    axes.set_ylabel("identity of the toy alone")
    axes.set_title("Strengths 0 to 1; star: LAG; hollow: fewer than 80 % show one toy of its size", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def draw_forest(found: pd.DataFrame, path: Path) -> None:
    """Differences: a row for each question, a column for each scene."""
    groups = {
        scene: {row["question"]: row for row in part.to_dict("records")}
        for scene, part in found.groupby("scene", sort=False)
    }
    _save(forest(groups, "difference of identity, paired on the same residual and noise; 95 %"), path)


def draw_cost(bench: dict[str, Any], path: Path) -> None:
    """What it costs: ratios of medians with their quartiles, and a line at one."""
    rows = {}
    for model, each in bench["models"].items():
        for one in each["ratios"]:
            low, high = one.get("quartiles") or (one["median"], one["median"])
            name = f"{model}, {one['kind']}: {one['of']} / {one['to']}"
            rows[name] = {"mean": one["median"], "low": low, "high": high}
    _save(forest(rows, "ratio; the bar is from quartile to quartile", reference=("as much", 1.0)), path)


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def table(frame: pd.DataFrame) -> str:
    """A table in Markdown, three digits; nothing where nothing is known."""
    head, *lines = frame.to_csv(sep="|", index=False, float_format="%.3f", quoting=csv.QUOTE_NONE).splitlines()
    rule = "|".join("---" for _ in frame.columns)
    return "\n".join(f"|{line}|" for line in (head, rule, *lines))


def sections(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Titles and tables, the headlines first."""
    scene = "place" if (frame.scene == "place").any() else "any"
    found = curves(frame)
    yield "Directed leakage: identity at the leak of LAG (concepts whose references share a place)", at_lags_leak(found)
    parts = [curve.assign(method=method) for method, curve in found.items()]
    kept = ["method", "way", *(name for name in SHOWN if parts and name in parts[0])]
    yield "Directed leakage: the curves", pd.concat(parts)[kept] if parts else pd.DataFrame()
    yield "What attention earns, on the same residual", differences(frame)
    at = frame[(frame.method == RESIDUAL) & frame.way.isin(("whole, x 1", *MASKED))]
    for name in at.scene.unique():
        yield f"Ways in the scene: {name}", means(at[at.scene == name], ("way",)).reset_index()
    floor = frame[frame.method.isin((CLASS_WORD, FROZEN, DESCRIBED)) & (frame.scene == scene)]
    yield "Floor and ceiling: the frozen model", means(floor, ("method",)).reset_index()
    choices = frame[
        frame.method.isin((RESIDUAL, *CHOICES)) & frame.way.isin(("whole, x 1", LAG)) & (frame.scene == scene)
    ]
    of = choices[choices.concept.isin(choices[choices.method != RESIDUAL].concept) & ~(choices.training > 0)]
    yield "Open choices, one at a time", means(of).reset_index()
    trained = frame.dropna(subset=["seconds"]).groupby("method", sort=False)[["parameters", "seconds"]].median()
    yield "Parameters, and seconds of a training (median)", trained.reset_index()
    toys = frame[frame.method == FROZEN].groupby("scene", sort=False)[["in disc, half", "in disc, quarter"]].mean()
    yield "How much of the frozen model's toy is inside a centered disc", toys.reset_index()


def write(rows: Sequence[dict[str, Any]], out: Path, command: str) -> list[Path]:
    """Write the tables and figures that the rows allow; returns where they are."""
    if not rows:
        return []
    frame = frame_of(rows)
    tables = {title: part for title, part in sections(frame) if len(part)}
    text = f"Made by `{command}`: {len(frame):,} pictures of {frame.concept.nunique()} concepts.\n"
    text += "".join(f"\n## {title}\n\n{table(part)}\n" for title, part in tables.items())
    data = {title: json.loads(part.to_json(orient="records")) for title, part in tables.items()}
    paths = [
        out.with_name(out.name + ending) for ending in (".md", ".json", "-leakage.png", "-attention.png", "-cost.png")
    ]
    for path, content in zip(paths, (text, json.dumps({"command": command, **data}, indent=1) + "\n"), strict=False):
        with whole_file(path) as file:
            file.write_text(content, encoding="utf-8")
    found, asked = curves(frame), tables.get("What attention earns, on the same residual", pd.DataFrame())
    if found and frame.leak.notna().any():
        draw_leakage(found, paths[2])
    if len(asked):
        draw_forest(asked[~asked.question.str.startswith("Leak")], paths[3])
    bench = data_dir() / "results" / "bench.json"
    if bench.is_file():
        draw_cost(json.loads(bench.read_text(encoding="utf-8")), paths[4])
    return [path for path in paths if path.is_file()]
