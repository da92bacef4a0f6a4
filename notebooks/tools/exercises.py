"""Exercises in notebooks: find them, and prove that every solution passes and every given wrong answer is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass

import nbformat
from nbformat import NotebookNode

from notebooks.tools import runs

_FOLDED = r"<details>\s*<summary>{}</summary>{}</details>"
UNANSWERED, CORRECT = "Not answered yet", "Correct"


@dataclass(frozen=True)
class Exercise:
    """One exercise: a Markdown cell with statement, hint and folded solution, and the reader's code cell after it."""

    number: str
    position: int
    """Index of the reader's code cell."""
    text: str
    solution: str
    check: str
    """The lines of the reader's cell from the first one that begins with ``check.``"""
    wrong: tuple[tuple[str, str], ...]
    """Wrong answers, each with words of the sentence that refuses it."""
    right: tuple[str, ...]
    """Right answers in other styles than the solution's: as a loop, in NumPy, with another function."""


PARTS = {
    "a line '**Difficulty:** ●○○ · **Minutes:** 5'": r"\*\*Difficulty:\*\* [●○]{3} · \*\*Minutes:\*\* \d+",
    "a hint '<details><summary>Hint</summary> … </details>'": _FOLDED.format("Hint", ".+?"),
    "a folded solution with a ```python block": _FOLDED.format("Solution", r".+?```python\n.+?```.*?"),
}
"""What an exercise's text must have."""


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, in order.

    Raises
    ------
    ValueError
        If one is not built as it must be: the sentence says which, and what is missing.
    """
    found = []
    for index, cell in enumerate(notebook.cells):
        heading = re.match(r"### Exercise (\d+\.\d+)", cell.source) if cell.cell_type == "markdown" else None
        if heading is None:
            continue
        number, text = heading[1], cell.source
        lacks = [part for part, pattern in PARTS.items() if not re.search(pattern, text, re.DOTALL)]
        reader = notebook.cells[index + 1] if index + 1 < len(notebook.cells) else cell
        if "exercise" not in reader.metadata.get("tags", []):
            lacks.append("a code cell with the tag 'exercise' after it")
        solution = re.search(r"<summary>Solution</summary>.+?```python\n(.+?)\n```", text, re.DOTALL)
        check = re.search(r"^check\..*", reader.source, re.MULTILINE | re.DOTALL)
        about = reader.metadata.get("persres", {})
        if solution is None or check is None or not about.get("wrong"):
            lacks.append("a line 'check.…(…)' in its cell, and a wrong answer in its metadata.persres.wrong")
        if lacks:
            raise ValueError(f"exercise {number} lacks {lacks[0]}")
        assert solution is not None and check is not None
        wrong = tuple((each["code"], each["says"]) for each in about["wrong"])
        found.append(Exercise(number, index + 1, text, solution[1], check[0], wrong, tuple(about.get("right", []))))
    return found


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """A copy of the notebook in which each exercise cell is followed by its wrong answers, then by right ones.

    Each wrong answer stands in a cell of its own that fails unless the check refuses it with an AssertionError, and in
    the words that belong to it.
    """
    result = nbformat.from_dict(notebook)
    for exercise in reversed(exercises(notebook)):
        cells = [_refused(exercise, number, *wrong) for number, wrong in enumerate(exercise.wrong, start=1)]
        for answer in (*exercise.right, exercise.solution):
            about = {"persres": {"solution": exercise.number}}
            cells.append(nbformat.v4.new_code_cell(f"{answer}\n{exercise.check}", metadata=about))
        result.cells[exercise.position + 1 : exercise.position + 1] = cells
    return result


def unproved(executed: NotebookNode) -> list[str]:
    """What an executed `with_solutions` notebook did not say: each stub 'Not answered yet', each solution 'Correct'."""
    problems = []
    for cell in runs.code_cells(executed):
        solution, said = cell.metadata.get("persres", {}).get("solution"), runs.printed(cell)
        if "exercise" in cell.metadata.get("tags", []) and UNANSWERED not in said:
            problems.append(f"the exercise cell {cell.source.splitlines()[0]!r} does not print {UNANSWERED!r}")
        if solution and CORRECT not in said:
            problems.append(f"the solution of exercise {solution} does not print {CORRECT!r}")
    return problems


def _refused(exercise: Exercise, number: int, wrong: str, says: str) -> NotebookNode:
    return nbformat.v4.new_code_cell(
        f"""try:
    exec({wrong!r}, globals())
    exec({exercise.check!r}, globals())
except AssertionError as refusal:
    print("Refused:", refusal)
    if {says!r} not in str(refusal):
        raise RuntimeError("exercise {exercise.number}: wrong answer {number} is refused in other words") from refusal
else:
    raise RuntimeError("exercise {exercise.number}: wrong answer {number} was accepted")"""
    )
