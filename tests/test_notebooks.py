"""Every notebook has what the series promises, runs on Stable Diffusion's layout too, and its exercises are proved."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from nbformat import v4

from data.make import runs
from notebooks.tools import exercises, links, notebooks
from tests.tiny import tiny_pipeline

SERIES = (
    "00_the_result_first",
    "01_a_frozen_model",
    "02_residual_injection",
    "03_training_loop",
    "04_cross_attention",
    "05_localized_sampling",
    "06_does_it_work",
)
SECTIONS = ["## Theory", "## Practice", "## Discussion", "## Exercises", "## References"]
MAX_SECONDS = 150
"""The series promises two minutes on a laptop; the committed measurement may come from a machine that was not idle."""

FEWER_STEPS = """
from persres_lite.bases import BASES
BASES["sd-1.4"].sampling["num_inference_steps"] = 6  # an unknown folder takes its settings from this entry
BASES["sd-1.4"].recipe["steps"] = 4
from persres_lite import evaluation
evaluation.PAPER_JUDGES = tuple(str(HOME / "data" / folder) for folder in evaluation.JUDGES["toybox"])
"""

PATHS = notebooks.notebook_paths()
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])

read = cache(notebooks.read)


def markdown(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


def code(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_the_series_is_complete_and_numbered():
    assert [path.stem for path in PATHS if path.stem[:2] <= "06"] == list(SERIES)


@each
def test_it_opens_with_badge_title_aim_abilities_and_measured_time(path):
    badge, opening = (cell.source for cell in read(path).cells[:2])
    assert badge == notebooks.badge(notebooks.public_address(), path.name)
    title, aim = runs.opening(read(path))
    assert title.startswith(f"{path.stem[:2]} · ") and aim.endswith(".")
    assert re.search(r"\*\*You will be able to\*\*\n\n- .+", opening)
    assert f"{runs.TIME_LINE} {runs.time_and_memory(read(path))}." in opening
    assert read(path).metadata["persres"]["seconds"] < MAX_SECONDS


@each
def test_it_has_the_sections_in_order(path):
    found = [line for text in markdown(path) for line in text.splitlines()[:1] if line in SECTIONS]
    assert found == SECTIONS


@each
def test_its_first_code_cell_is_the_same_letter_for_letter(path):
    assert read(path).cells[2].source == notebooks.first_cell(notebooks.public_address())
    assert read(path).cells[2].cell_type == "code"


@each
def test_its_outputs_come_from_one_fresh_run(path):
    cells = code(path)
    assert all(cell.source.strip() for cell in cells), "an empty code cell"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert len(outputs) > 5


@each
def test_github_can_show_it(path):
    assert "widgets" not in read(path).metadata
    assert path.stat().st_size <= runs.MAX_BYTES
    runs.refuse(read(path))
    kinds = {kind for cell in code(path) for output in cell.outputs for kind in output.get("data", {})}
    assert kinds <= {"text/plain", "text/html", "text/markdown", "image/png", "image/jpeg"} and kinds & {*runs.FIGURES}


@each
def test_its_outputs_name_no_folder_of_the_machine_it_ran_on(path):
    words = " ".join(
        str(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in code(path)
        for output in cell.outputs
    )
    assert str(notebooks.ROOT) not in words and str(Path.home()) + "/" not in words


@each
def test_its_checked_cells_hold_text_that_can_be_compared(path):
    tagged = [cell for cell in code(path) if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert tagged, "nbval would compare nothing"
    for cell in tagged:
        assert [output.output_type for output in cell.outputs] == ["stream"], cell.source
    assert any({*output.get("data", {})} & {*runs.FIGURES} for cell in code(path) for output in cell.outputs)


@each
def test_it_asks_before_it_shows(path):
    asking = [text for text in markdown(path) if "**Predict before you run.**" in text]
    assert asking
    assert all("<details><summary>Answer</summary>" in text for text in asking)


@each
def test_it_has_three_exercises_of_its_own_number(path):
    found = exercises.exercises(read(path))
    assert [each.number for each in found] == [f"{int(path.stem[:2])}.{k}" for k in range(1, len(found) + 1)]
    assert len(found) >= 3


@each
def test_every_exercise_is_proved(path):
    assert [lack for found in exercises.exercises(read(path)) for lack in exercises.unproven(found)] == []


@each
def test_it_has_a_widget_with_its_still_twin(path):
    sources = "\n".join(cell.source for cell in code(path))
    assert "explorers." in sources
    assert "a widget: run the notebook" in str([cell.outputs for cell in code(path)])


def test_links_and_stamps_and_the_table_are_as_the_commands_leave_them(capsys):
    assert notebooks.main(["check"]) == 0, capsys.readouterr().out
    assert links.broken(notebooks.ROOT, notebooks.public_address()) == []


def test_the_glossary_is_sorted_and_names_each_term_once():
    text = (notebooks.ROOT / "notebooks" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(terms) > 40 and terms == sorted(set(terms), key=str.lower)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Random weights in the folder layout and block structure of Stable Diffusion 1.4."""
    folder = tmp_path_factory.mktemp("bases") / "sd-1.4-shaped"
    tiny_pipeline("sd1").save_pretrained(folder)
    return folder


@each
def test_it_runs_on_stable_diffusions_layout_and_its_exercises_prove_themselves(path, stable_diffusion):
    """One run for both: each exercise is followed by its wrong answers, which must be refused, and by its solution."""
    book = exercises.with_solutions(read(path))
    book.cells.insert(3, v4.new_code_cell(FEWER_STEPS))
    environment = {"PERSRES_BASE": str(stable_diffusion), "HF_HUB_OFFLINE": "1"}
    done = runs.execute(book, path.parent, env=environment, timeout=300)
    assert exercises.unproved(done) == []
    said = "".join(output.get("text", "") for output in next(c for c in done.cells if c.cell_type == "code").outputs)
    assert "Base: sd-1.4-shaped" in said


IN_BF16 = """
import functools, torch, persres_lite
persres_lite.load_base = functools.partial(persres_lite.load_base, dtype=torch.bfloat16)
"""

FEWER_PICTURES = {"[:24]": "[:8]", "[:12]": "[:4]"}
"""In the sources of lesson 04, whose many pictures serve its scores and not what is tried here."""

LAYOUTS = {  # of the lessons that look into a layer or make noise by hand: one run of each other kind of base
    "00-xl": ("00", "sdxl", ""),
    "01-xl": ("01", "sdxl", ""),  # two text encoders, an empty prompt of zeros
    "02-xl": ("02", "sdxl", ""),  # several layers under one projection, another sampler's noise
    "03-xl": ("03", "sdxl", ""),
    "04-xl": ("04", "sdxl", ""),
    "05-xl": ("05", "sdxl", ""),
    "01-sd2-bf16": ("01", "sd2", IN_BF16),
    "02-sd2-bf16": ("02", "sd2", IN_BF16),  # linear projections, prediction of v, half precision
    "03-sd2-bf16": ("03", "sd2", IN_BF16),
    "04-sd2-bf16": ("04", "sd2", IN_BF16),
}


@pytest.mark.parametrize(("number", "kind", "precision"), LAYOUTS.values(), ids=LAYOUTS)
def test_it_runs_on_other_layouts(number, kind, precision, tmp_path):
    (path,) = notebooks.notebook_paths(names=[number])
    tiny_pipeline(kind).save_pretrained(tmp_path / kind)
    book = deepcopy(read(path))
    for cell in book.cells:
        for many, few in FEWER_PICTURES.items():
            cell.source = cell.source.replace(many, few)
    steps = FEWER_STEPS.replace("sd-1.4", "sdxl") if kind == "sdxl" else FEWER_STEPS
    book.cells.insert(3, v4.new_code_cell(steps + precision))
    runs.execute(book, path.parent, env={"PERSRES_BASE": str(tmp_path / kind), "HF_HUB_OFFLINE": "1"}, timeout=300)


@each
def test_noise_by_hand_is_that_of_training(path):
    """A sampler may have other noise levels (Euler), and none at all after it has drawn."""
    assert all(".scheduler.add_noise" not in cell.source or path.stem[:2] == "01" for cell in code(path))
