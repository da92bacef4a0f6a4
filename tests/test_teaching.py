"""What a lecturer takes from the notebooks: nothing is given away to students, and slides need no network."""

from __future__ import annotations

import re

import nbformat
import pytest

from notebooks.tools import notebooks, teaching
from tests.notebook_example import WRONG, example

FIGURE = (
    '<figure><img src="data:image/png;base64,iVBORw0KGgo" alt="a &lt;pixel&gt;"><figcaption>Red.</figcaption></figure>'
)


def exercise_of(book):
    return next(cell for cell in book.cells if cell.source.startswith("### Exercise"))


@pytest.fixture
def book():
    made = example()
    figure = nbformat.v4.new_code_cell("draw()")
    figure.outputs = [nbformat.v4.new_output("display_data", {"text/html": FIGURE})]
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
    cell = exercise_of(book)
    cell.source = cell.source.replace("<details><summary>Solution", "<details open><summary>Solution")
    with pytest.raises(ValueError, match="A solution is left"):
        teaching.student(book)


def test_the_answer_key_has_statement_solution_note_and_wrong_answers(book):
    key = teaching.answer_key([book])
    assert key.startswith("# Answer key\n\n## 04")
    for part in ("Write `merge(W, A, B, scale)`", "W + scale * (A @ B)", "A scale of 0 leaves W as it is.", WRONG):
        assert part in key
    assert "<details>" not in key


def test_students_and_answers_get_no_link_to_solutions_and_none_that_leads_nowhere(book):
    book.cells[-1].source += "\n\nSource: [its file](../persres_lite/residuals.py)"
    exercise = exercise_of(book)
    exercise.source = exercise.source.replace("Write `", "See [rank](glossary.md#rank). Write `")
    given = nbformat.writes(teaching.student(book))
    assert "colab" not in given and "](../../persres_lite/residuals.py)" in given
    assert "See rank. Write" in teaching.answer_key([book])
    assert teaching.without_links("`f[i](x)` [`x`](a.md) [b](https://b)") == "`f[i](x)` `x` [b](https://b)"
    made = notebooks.teaching_files("student")
    assert {"glossary.md", "prerequisites.md"} < {path.name for path in made}


def test_slides_are_one_page_without_a_network(book):
    made = teaching.slides({"04": book})
    assert [slide.kind for slide in made[:2]] == ["lesson", "lesson"]
    assert "| 0 | 04 · An example | 20 |" in made[0].text
    assert any(slide.title.startswith("Your turn: merging") and "Solution" not in slide.text for slide in made)
    page = teaching.page(made)
    assert page.count("<section") == len(made)
    assert FIGURE in page and 'class="equation"' in page
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:", page)


def test_exercises_fit_the_lessons_minutes(book):
    exercise = exercise_of(book)
    exercise.source = exercise.source.replace("**Minutes:** 2", "**Minutes:** 15")
    assert not any("Your turn" in slide.title for slide in teaching.slides({"04": book}))


def test_a_question_stands_before_the_figure_that_answers_it_and_the_lesson_speaks_in_the_notes(book):
    text = nbformat.v4.new_markdown_cell
    said = "The pixel is red."
    book.cells[5:6] = [text("**Predict before you run.** What?\n\n<details>…</details>"), book.cells[5], text(said)]
    made = teaching.slides({"04": book})
    asked = next(number for number, slide in enumerate(made) if slide.text.startswith("**Predict"))
    assert "<details>" in made[asked].text and made[asked + 1].pictures and made[asked + 1].notes == said
    assert f"<aside><p>{said}</p>" in teaching.page(made)
    assert not any("2 + 2" in slide.text for slide in made)  # its answer is printed, not shown by a figure


def test_a_lessons_equations_stand_on_one_slide(book):
    book.cells[3].source = "## Theory\n\nFirst\n\n$$a = b$$\n\nwords between\n\nthen\n\n$$c = d$$\n\nthe end"
    assert teaching.equations_of(book.cells[3]) == "First\n\n$$a = b$$\n\nthen\n\n$$c = d$$"


def test_equations_and_code_are_kept_and_numbers_of_references_are_not():
    drawn = teaching.to_html(r"$$\begin{aligned} a &= b, \\ c &= d. \end{aligned} \tag{2}$$")
    assert drawn.count("<img") == 2 and "(2)</span>" in drawn
    assert teaching.to_html("as in LoRA [2, 3], `x[0] [1]`", inline=True) == "as in LoRA, <code>x[0] [1]</code>"
    assert teaching.to_html("masks in [0, 1]", inline=True) == "masks in [0, 1]"
    assert teaching.drawn_equation(r"\nonsense{a}") == r"<code>\nonsense{a}</code>", "what matplotlib cannot draw"
    assert "<img" in teaching.to_html("so $x_i$") and "<img" not in teaching.to_html("`$x_i$`")


def test_a_question_about_a_list_brings_the_list(book):
    text = "### Which?\n\nThese:\n\n- one\n- two\n\n**Predict before you run.** Order them."
    book.cells.insert(5, nbformat.v4.new_markdown_cell(text))
    asked = next(slide for slide in teaching.lesson_slides(book, "04 · An example") if teaching.PREDICT in slide.text)
    assert asked.title == "Which?" and asked.text.startswith("These:\n\n- one")
    book.cells.insert(6, nbformat.v4.new_markdown_cell("Other words come before the figure."))
    assert not any(teaching.PREDICT in slide.text for slide in teaching.lesson_slides(book, "04 · An example"))


def test_a_cell_asks_for_no_slide(book):
    book.cells[5].metadata["persres"] = {"slide": False}
    assert not any(slide.pictures for slide in teaching.lesson_slides(book, "04 · An example"))


def test_the_series_makes_a_lecture():
    made = teaching.slides({path.name[:2]: notebooks.read(path) for path in notebooks.notebook_paths()})
    assert 35 <= len(made) <= 55 and sum(teaching.MINUTES.values()) == 90
    readme = (notebooks.ROOT / "README.md").read_text(encoding="utf-8").split("**90 minutes**")[1].split("**")[0]
    assert {
        number: int(minutes) for number, minutes in re.findall(r"\b(0\d)\b[^()]*\((\d+)\)", readme)
    } == teaching.MINUTES
