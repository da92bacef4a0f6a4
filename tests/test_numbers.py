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


def sentences() -> dict[str, list[str]]:
    """By file: what it must say, with the numbers of now."""
    drawn = {name: (f"{share:.2f}", count) for name, (share, count) in results("toybox")["pictures"].items()}
    rows = results("concepts")
    first = next(
        iter(rows["mean"].keys() - {"seconds", "CPU seconds", "residual", "LAG"})
    )  # what the other two are compared with
    mean = {
        way: {name: f"{value:.2f}" for name, value in rows["mean"][way].items()} for way in (first, "residual", "LAG")
    }
    snowman = rows["garden-snowman"]
    shown = {way: rows["mean"][way]["place"] for way in ("residual", "LAG")}
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
        "notebooks/04_cross_attention.ipynb": [
            "it showed both in {} of {} pictures (`data/results/toybox.md`)".format(*drawn["both of a pair"]),
        ],
        "notebooks/05_localized_sampling.ipynb": [
            f"whole picture {snowman['residual']['identity']:.2f} and, for LAG, {snowman['LAG']['identity']:.2f}",
            f"over the ten concepts of that table, too ({mean['residual']['identity']} and {mean['LAG']['identity']})",
            f"LAG kept {'every place' if shown['LAG'] == 1 else shown['LAG']} that was asked for, the residual "
            f"{mean['residual']['place']} of them",
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
