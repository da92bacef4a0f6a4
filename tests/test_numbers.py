"""Numbers in prose that come from `data/results/` are the ones that stand there now."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from persres_lite.maintain import links

ROOT = Path(__file__).resolve().parents[1]


def results(name: str) -> dict:
    return json.loads((ROOT / "data" / "results" / f"{name}.json").read_text())


def identity_under_lag(row: dict) -> float:
    return row["LAG"]["identity"]


def sentences() -> dict[str, list[str]]:
    """By file: what it must say, with the numbers of now."""
    drawn = {name: (f"{share:.2f}", count) for name, (share, count) in results("toybox")["pictures"].items()}
    rows = results("concepts")
    first = next(iter(rows["mean"].keys() - {"seconds", "residual", "LAG"}))  # what the other two are compared with
    mean = {
        way: {name: f"{value:.2f}" for name, value in rows["mean"][way].items()} for way in (first, "residual", "LAG")
    }
    rocket = rows["comet-rocket"]
    shown = {way: rows["mean"][way]["place"] for way in ("residual", "LAG")}
    search = results("toybox-search")
    best = {
        rank: max((row for label, row in search.items() if label.endswith(f"rank {rank}")), key=identity_under_lag)
        for rank in (0.05, 0.25)
    }
    kept = "all 80" if shown["LAG"] == 1 else f"{shown['LAG']:.2f} of them"
    return {
        "README.md": [
            "the class in {} of {} pictures".format(*drawn["class"]),
            "the place in {} of {}".format(*drawn["place"]),
            "the main color in {} of {}".format(*drawn["main color"]),
            "both objects of a pair in {} of {}".format(*drawn["both of a pair"]),
            "a pattern that the prompt names is there in {} of {} pictures".format(*drawn["pattern"]),
            f"a mean cosine of {mean[first]['identity']} becomes {mean['residual']['identity']} with the residual "
            f"everywhere and {mean['LAG']['identity']} with LAG, after {rows['mean']['seconds']:.0f} seconds "
            "of training",
            f"moves the background by {mean['residual']['background moved']} of the range on average, "
            f"LAG by {mean['LAG']['background moved']}",
            f"shown in {mean['residual']['place']} of the pictures with the residual and in {kept} with LAG",
        ],
        "notebooks/00_the_result_first.ipynb": [
            f"does so in {rocket['residual']['place']:.2f} of its pictures with the residual everywhere and in "
            + ("all" if rocket["LAG"]["place"] == 1 else f"{rocket['LAG']['place']:.2f}"),
        ],
        "notebooks/02_residual_injection.ipynb": [
            f"identity {identity_under_lag(best[0.25]):.2f}, where the best with 5 % had "
            f"{identity_under_lag(best[0.05]):.2f}",
            f"the place asked for in {best[0.25]['residual']['place']:.2f} of the pictures, and with 5 % in "
            f"{best[0.05]['residual']['place']:.2f}",
        ],
        "notebooks/04_cross_attention.ipynb": [
            "it showed both in {} of {} pictures (`data/results/toybox.md`)".format(*drawn["both of a pair"]),
        ],
    }


def prose(name: str) -> str:
    """A file's Markdown, its line breaks as spaces."""
    return " ".join(links.text_of(ROOT / name).split())


@pytest.mark.parametrize("name, sentence", [(name, each) for name, found in sentences().items() for each in found])
def test_prose_says_what_the_results_say(name, sentence):
    assert " ".join(sentence.split()) in prose(name)


def test_every_file_that_takes_a_number_from_the_results_is_held():
    """A sentence that names the folder and has a fraction in it."""
    files = [
        ROOT / "README.md",
        *sorted((ROOT / "notebooks").glob("*.ipynb")),
        *sorted((ROOT / "notebooks").glob("*.md")),
    ]
    taking = set()
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        for sentence in re.split(r"(?<=[.!?]) ", prose(name)):
            if "data/results/" in sentence and re.search(r"\b0\.\d+\b", sentence):
                taking.add(name)
    assert taking <= sentences().keys()


def test_in_every_concept_lag_moves_the_background_less():
    """As the README says: "less in each of the ten"."""
    rows = {name: row for name, row in results("concepts").items() if name != "mean"}
    assert len(rows) == 10 and "less in each of the ten" in prose("README.md")
    assert all(row["LAG"]["background moved"] < row["residual"]["background moved"] for row in rows.values())
