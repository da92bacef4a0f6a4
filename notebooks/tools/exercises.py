"""Exercises in notebooks: find them, and prove that every solution passes and every given wrong answer is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import nbformat
from nbformat import NotebookNode

from notebooks.tools import runs

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


BUILT = re.compile(
    r"### Exercise (?P<number>\d+\.\d+).+?\*\*Difficulty:\*\* [●○]{3} · \*\*Minutes:\*\* \d+\n"
    r".+?<details>\s*<summary>Hint</summary>.+?</details>"
    r"\s*<details>\s*<summary>Solution</summary>.+?```python\n(?P<solution>.+?)\n```.*</details>",
    re.DOTALL,
)
"""An exercise's text."""
NEEDS = (
    "its text a line '**Difficulty:** ●○○ · **Minutes:** 5', a folded hint, and a folded solution with a block of "
    "Python; the code cell after it the tag 'exercise', a line 'check.…(…)', and wrong answers in persres.wrong"
)


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, in order.

    Raises
    ------
    ValueError
        If one is not built as it must be: the sentence says which, and what an exercise needs.
    """
    found = []
    for index, (cell, reader) in enumerate(pairwise(notebook.cells)):
        if cell.cell_type != "markdown" or not cell.source.startswith("### Exercise "):
            continue
        text, about = BUILT.match(cell.source), reader.metadata.get("persres", {})
        check = re.search(r"^check\..*", reader.source, re.MULTILINE | re.DOTALL)
        if not (text and check and about.get("wrong") and "exercise" in reader.metadata.get("tags", [])):
            raise ValueError(f"{cell.source.splitlines()[0][4:]} lacks a part: it needs in {NEEDS}")
        wrong, right = tuple((each["code"], each["says"]) for each in about["wrong"]), tuple(about.get("right", []))
        found.append(Exercise(text["number"], index + 1, cell.source, text["solution"], check[0], wrong, right))
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
