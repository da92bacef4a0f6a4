"""Every notebook has what the series promises, as it lies in the folder: nothing is run here."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from notebooks.tools import exercises, notebooks, runs

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

PATHS = notebooks.notebook_paths()
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])

read = cache(notebooks.read)


def markdown(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


def code(path: Path) -> list:
    return runs.code_cells(read(path))


def test_the_series_is_complete_and_numbered():
    assert [path.stem for path in PATHS if path.stem[:2] <= "06"] == list(SERIES)


@each
def test_it_opens_with_badge_title_aim_abilities_measured_time_and_the_same_first_cell(path):
    badge, opening, setup = (cell.source for cell in read(path).cells[:3])
    assert badge == notebooks.badge(notebooks.public_address(), path.name)
    title, aim = notebooks.opening(read(path))
    assert title.startswith(f"{path.stem[:2]} · ") and aim.endswith(".")
    assert re.search(r"\*\*You will be able to\*\*\n\n- .+", opening)
    assert f"{runs.TIME_LINE} {runs.time_and_memory(read(path))}." in opening
    assert read(path).metadata["persres"]["seconds"] < MAX_SECONDS
    assert setup == notebooks.first_cell(notebooks.public_address()) and read(path).cells[2].cell_type == "code"


@each
def test_it_has_the_sections_in_order(path):
    found = [line for text in markdown(path) for line in text.splitlines()[:1] if line in SECTIONS]
    assert found == SECTIONS


@each
def test_its_outputs_come_from_one_fresh_run_without_complaint_and_name_no_folder_of_the_machine(path):
    cells = code(path)
    assert all(cell.source.strip() for cell in cells), "an empty code cell"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) > 5 and not any(output.output_type == "error" for output in outputs)
    assert not "".join(runs.printed(cell, "stderr") for cell in cells)
    words = " ".join(str(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    assert str(notebooks.ROOT) not in words and str(Path.home()) + "/" not in words


@each
def test_github_can_show_it(path):
    assert "widgets" not in read(path).metadata
    runs.refuse(read(path))
    kinds = {kind for cell in code(path) for output in cell.outputs for kind in output.get("data", {})}
    assert kinds <= {"text/plain", "text/html", "text/markdown", "image/png", "image/jpeg"}
    assert kinds & {*runs.FIGURES, "text/html"}


@each
def test_its_checked_cells_hold_text_that_can_be_compared(path):
    tagged = [cell for cell in code(path) if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert tagged, "nbval would compare nothing"
    for cell in tagged:
        assert [output.output_type for output in cell.outputs] == ["stream"], cell.source


@each
def test_it_asks_before_it_shows(path):
    asking = [text for text in markdown(path) if "**Predict before you run.**" in text]
    assert asking
    assert all("<details><summary>Answer</summary>" in text for text in asking)


@each
def test_it_has_three_exercises_of_its_own_number_and_each_is_proved(path):
    found = exercises.exercises(read(path))
    assert len(found) >= 3
    assert [each.number for each in found] == [f"{int(path.stem[:2])}.{k}" for k in range(1, len(found) + 1)]
    assert all(len(each.wrong) >= 3 and all(says for _, says in each.wrong) for each in found)
    assert all(len(each.right) >= 2 for each in found), "in other styles than the solution's"


@each
def test_it_has_a_widget_with_its_still_twin(path):
    sources = "\n".join(cell.source for cell in code(path))
    assert "explorers." in sources
    assert "a widget: run the notebook" in str([cell.outputs for cell in code(path)])


def test_links_and_stamps_and_the_table_are_as_the_commands_leave_them():
    assert notebooks.problems() == []


def test_the_glossary_is_sorted_and_names_each_term_once():
    text = (notebooks.ROOT / "notebooks" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(terms) > 40 and terms == sorted(set(terms), key=str.lower)
