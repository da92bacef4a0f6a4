"""Numbers in prose that come from `data/results/` are the ones that stand there now."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from notebooks.tools import links

ROOT = Path(__file__).resolve().parents[1]
EARLY = "first steps of a frozen run"


def results(name: str) -> dict:
    return json.loads((ROOT / "data" / "results" / f"{name}.json").read_text())


def readme_sentences() -> list[str]:
    """What the README must say, with the numbers of now."""
    drawn = {name: f"{share:.2f} of {count}" for name, (share, count) in results("toybox")["pictures"].items()}
    mean = results("concepts")["mean"]
    ways = {way: {name: f"{value:.2f}" for name, value in mean[way].items()} for way in ("original", "residual", "LAG")}

    def three(measure: str) -> str:
        return (
            f"{ways['original'][measure]} with the original model, {ways['residual'][measure]} with the residual "
            f"everywhere and {ways['LAG'][measure]} with LAG"
        )

    def interval(row: dict) -> str:
        return "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row)

    controls = results("controls")["scenes"]["all"]
    gain = {way: interval(row["gain"]) for way, row in controls.items() if row.get("gain")}
    against = {method: interval(row) for method, row in results("evaluation")["at equal leakage"].items()}
    beyond = {
        way: interval(row["disc, half"])
        for way, row in results("evaluation")["against a disc"].items()
        if "disc, half" in row
    }

    t4 = sum(row["minutes"] for row in results("t4-estimate").values())
    full = results("full-size")
    ratio = {
        (model, row["kind"], row["of"], row["to"]): f"{row['median']:.2f}"
        for model, found in results("bench")["models"].items()
        for row in found["ratios"]
    }
    lag = [ratio[model, "sampling", "lag", "original"] for model in ("toybox", "sd-1.4-shape")]
    step = [
        ratio[model, kind, "residuals", "lora"]
        for model in ("toybox", "sd-1.4-shape")
        for kind in ("training", "memory")
    ]

    return [
        f"On a T4 with Stable Diffusion 1.4 all eight take about {t4:.0f} minutes",
        f"a training step of four pictures needs {full['training_gib']} GiB beside the model "
        f"({full['estimated_gib']} are estimated, and 15 % are always added), LAG takes "
        f"{full['lag_over_original']:.2f} times as long as the original model",
        f"On two cores LAG takes {lag[0]} times as long as the original model on Toybox and {lag[1]} times on a U-Net "
        f"of SD 1.4's shape; a training step takes {step[0]} of the time of an attention LoRA's and {step[1]} of its "
        f"memory on Toybox, {step[2]} and {step[3]} on that shape",
        f"the class in {drawn['class']} pictures, the place in {drawn['place']}, the main color in "
        f"{drawn['main color']}, the second color in {drawn['second color']}, both objects of a pair in "
        f"{drawn['both of a pair']}",
        f"a pattern that the prompt names is there in {drawn['pattern']} pictures, an accessory in "
        f"{drawn['accessory']}",
        f"The likeness of the toy alone to its references is a mean cosine of {three('identity, toy alone')}",
        "The renderer as judge is stricter: among twelve toys that differ in paint alone, it ranks the right one first "
        f"in a share of {three('ranked first')}",
        f"The residual everywhere moves the background by {ways['residual']['background moved']} of the range on "
        f"average, LAG by {ways['LAG']['background moved']}, less in each of the ten; the place asked for is shown in "
        f"{ways['residual']['place']} of the pictures with the residual and in {ways['LAG']['place']} with LAG",
        "Compared with the residual turned down until it moves the background as far, the paper's LAG gains "
        f"{gain['LAG']} of identity, LAG with maps averaged over blocks and steps {gain['LAG, both']}, and its best "
        f"quarter {gain['LAG, both, best quarter']} (95 % intervals)",
        f"A disc on half of the picture, which looks at nothing, gains {gain['disc, half']}",
        f"residuals with LAG gain {against['residuals + LAG']} over the weaker residual, the disc in its mask's "
        f"place {against['residuals + LAG, disc, half']}, the true mask {against['residuals + LAG, true mask']}, a "
        f"mask made in the first steps of a frozen run {against[f'residuals + LAG, {EARLY}']}, DreamBooth "
        f"{against['DreamBooth']}, textual inversion {against['textual inversion']}, an attention LoRA of rank 4 "
        f"{against['attention LoRA, rank 4']}",
        f"above zero, {beyond['residuals + LAG, true mask']} and {beyond[f'residuals + LAG, {EARLY}']}",
        f"words that describe the toy gain most, {against['frozen, full description']}",
    ]


def sentences() -> dict[str, list[str]]:
    """By file: what it must say, with the numbers of now."""
    drawn = {name: (f"{share:.2f}", count) for name, (share, count) in results("toybox")["pictures"].items()}
    return {
        "README.md": readme_sentences(),
        "notebooks/04_cross_attention.ipynb": [
            "it showed both in {} of {} pictures (`data/results/toybox.md`)".format(*drawn["both of a pair"]),
        ],
    }


def test_what_the_readme_and_lesson_06_say_of_equal_seconds():
    changed = results("ablations")["ablations"]
    gained = {name: row["residual"]["identity gained"]["mean"] for name, row in changed.items() if "equal" in name}
    ahead = {name for name, mean in gained.items() if mean > 0}
    assert {name for name in ahead if "seconds" in name} == {
        "equal seconds: textual inversion",
        "equal seconds: proj_out LoRA",
    }
    assert sum("steps" in name for name in ahead) > sum("steps" in name for name in gained) / 2
    assert changed["equal seconds: proj_out LoRA"]["steps"] - changed["equal steps: proj_out LoRA"]["steps"] == 6
    said = "only textual inversion and a LoRA on the same layers have a higher mean, and the LoRA a lower one with six"
    assert said in prose("README.md")
    said = "with as many steps most rivals have a higher mean than the residuals; with as many seconds only two have"
    assert said in prose("notebooks/06_does_it_work.ipynb")


def test_what_the_readme_and_lesson_06_say_of_masks_and_methods():
    measured = results("evaluation")
    attention = {
        way.removeprefix("residuals + LAG, ")
        for way, row in measured["against a disc"].items()
        if all(found["low"] > 0 for found in row.values())
    }
    assert attention == {"true mask", EARLY}  # "more than both discs"
    assert all(row["low"] < 0 for row in measured["against a disc"]["residuals + LAG"].values())
    counts = [measured["at equal leakage"][way]["concepts"] for way in ("textual inversion", "attention LoRA, rank 4")]
    assert counts == [8, 9] and "in the eight and the nine concepts" in prose("README.md")
    identity = {way: row["identity"]["mean"] for way, row in measured["methods"].items() if "LAG" not in way}
    rivals = [way for way in identity if not way.startswith(("residuals", "frozen", "ruler"))]
    nearer = [way for way in rivals if identity[way] > identity["residuals"]]
    assert len(nearer) > len(rivals) / 2  # "most rivals come nearer to the references"
    gained = {way: row["mean"] for way, row in measured["at equal leakage"].items()}
    assert max(gained, key=gained.__getitem__) == "frozen, full description"
    for way in ("DreamBooth", "attention LoRA, rank 4", "residuals"):
        assert identity[f"{way}, prior"] < identity[way]
    assert {recipe["steps"] for recipe in measured["protocol"]["recipes"].values()} == {100}


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
