"""What a lecturer takes from the notebooks: nothing is given away to students, and slides need no network."""

from __future__ import annotations

import re

import nbformat
import pytest

from persres_lite.maintain import notebooks, teaching
from tests.notebook_example import WRONG, example

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def book():
    made = example()
    figure = nbformat.v4.new_code_cell("draw()")
    figure.outputs = [nbformat.v4.new_output("display_data", {"image/png": PIXEL}, metadata={"alt": "A <pixel>"})]
    made.cells.insert(4, nbformat.v4.new_markdown_cell("### Learn\n\nThe weight is\n\n$$W' = W + A B$$"))
    made.cells.insert(5, figure)
    return made


def test_the_students_version_gives_nothing_away(book):
    given = teaching.student(book)
    text = nbformat.writes(given)
    assert "Solution" not in text and "A @ B" not in text and '"wrong"' not in text
    assert "<summary>Hint</summary>" in text and "<summary>Answer</summary>" in text  # of a prediction
    assert all(not cell.outputs and cell.execution_count is None for cell in given.cells if cell.cell_type == "code")
    assert any("exercise" in cell.metadata.get("tags", []) for cell in given.cells)
    assert "Solution" in nbformat.writes(book)  # the original keeps its own


def test_a_solution_in_another_form_is_not_handed_out(book):
    cell = next(cell for cell in book.cells if cell.source.startswith("### Exercise"))
    cell.source = cell.source.replace("<details><summary>Solution", "<details open><summary>Solution")
    with pytest.raises(ValueError, match="A solution is left"):
        teaching.student(book)


def test_the_answer_key_has_statement_solution_note_and_wrong_answers(book):
    key = teaching.answer_key([book])
    assert key.startswith("# Answer key\n\n## 04")
    for part in ("Write `merge(W, A, B, scale)`", "W + scale * (A @ B)", "A scale of 0 leaves W as it is.", WRONG):
        assert part in key
    assert "<details>" not in key


def test_slides_are_one_page_without_a_network(book):
    made = teaching.slides({"04": book})
    assert [slide.kind for slide in made[:2]] == ["lesson", "lesson"]
    assert "| 0 | 04 · An example | 12 |" in made[0].text
    assert any(slide.title.startswith("Your turn: merging") and "Solution" not in slide.text for slide in made)
    page = teaching.page(made)
    assert page.count("<section") == len(made)
    assert 'alt="A &lt;pixel&gt;"' in page and 'class="equation"' in page
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:", page)


def test_a_cell_asks_for_its_slide_or_for_none(book):
    book.cells[4].metadata["persres"] = {"slide": "How it learns"}
    book.cells[5].metadata["persres"] = {"slide": False}
    made = list(teaching.results(book))
    assert "How it learns" in [slide.title for slide in made] and not any(slide.pictures for slide in made)


def test_what_matplotlib_cannot_draw_stays_readable():
    assert teaching.drawn_equation(r"\nonsense{a}") == r"<code>\nonsense{a}</code>"
    assert "<img" in teaching.to_html("so $x_i$") and "<img" not in teaching.to_html("`$x_i$`")


def test_the_series_makes_a_lecture():
    made = teaching.slides({path.name[:2]: notebooks.read(path) for path in notebooks.notebook_paths()})
    assert 45 <= len(made) <= 75 and sum(teaching.MINUTES.values()) == 90
    for path in notebooks.notebook_paths():
        teaching.student(notebooks.read(path))
