"""A small notebook with everything that one of the series must have, and the series on random bases."""

from __future__ import annotations

from pathlib import Path

from nbformat import NotebookNode, v4

from notebooks.tools import notebooks, runs
from tests.tiny import tiny_pipeline

ADDRESS = "https://github.com/persres-lite/persres-lite"
NAME = "04_example.ipynb"

OPENING = """# 04 · An example

**Aim:** see that the tools work.

**You will be able to**

- add two numbers.

**Time and memory:** not measured yet"""

EXERCISE = """### Exercise 4.1: merging

**Difficulty:** ●○○ · **Minutes:** 2

Write `merge(W, A, B, scale)`.

<details><summary>Hint</summary>

`[:, :, None, None]` makes a kernel of a matrix.

</details>

<details><summary>Solution</summary>

```python
def merge(W, A, B, scale):
    return W + scale * (A @ B)[:, :, None, None]
```

A scale of 0 leaves W as it is.

</details>"""

STUB = """def merge(W, A, B, scale):
    return ...  # your answer


check.merge(merge)"""

WRONG = """def merge(W, A, B, scale):
    return W + (A @ B)[:, :, None, None]"""
SAYS = "scale"

PREDICT = """**Predict before you run.** What is 2 + 2?

<details><summary>Answer</summary>

4.

</details>"""


def example(first_cell: str | None = None) -> NotebookNode:
    """The notebook, stamped; `first_cell` in place of the real one, for tests that run it in an empty folder."""
    text, code = v4.new_markdown_cell, v4.new_code_cell
    cells = [
        text(OPENING),
        text("## Theory\n\n$$1 + 1 = 2$$"),
        text("## Practice\n\nThe package's checks, see the [glossary](glossary.md)."),
        code("from persres_lite.course import check"),
        text(PREDICT),
        code("print(2 + 2)", metadata={"tags": ["nbval-check-output"]}),
        text("## Discussion\n\nFour is enough."),
        text("## Exercises"),
        text(EXERCISE),
        code(STUB, metadata={"tags": ["exercise"], "persres": {"wrong": [{"code": WRONG, "says": SAYS}]}}),
        text("## References\n\n- arXiv 2405.12978"),
    ]
    made = notebooks.stamped(v4.new_notebook(cells=cells), NAME, ADDRESS)
    for number, cell in enumerate(made.cells):
        cell.id = f"c{number}"
    if first_cell is not None:
        path = f"import sys\nsys.path.insert(0, {str(notebooks.ROOT)!r})\n"
        next(cell for cell in made.cells if cell.cell_type == "code").source = path + first_cell
    return made


FEWER_STEPS = """
from persres_lite import evaluation
from persres_lite.bases import BASES, replace
known = BASES["{name}"]  # an unknown folder takes its settings from this entry
# Few steps at a high rate: what is learned must be larger than the rounding of half precision, as on a real base.
BASES["{name}"] = replace(known, steps=6, recipe=known.recipe | {{"steps": 4, "lr": 1e-2}})
evaluation.PAPER_JUDGES = tuple(str(HOME / "data" / folder) for folder in evaluation.JUDGES["toybox"])
"""


def run_on(kind: str, book: NotebookNode, folder: Path, first: str = "") -> NotebookNode:
    """A lesson, run with fewer steps on random weights in the folder layout and block structure of `kind`."""
    tiny_pipeline(kind).save_pretrained(folder / kind)
    few = FEWER_STEPS.format(name="sdxl" if kind == "sdxl" else "sd-1.4")
    book.cells.insert(3, v4.new_code_cell(few + first))
    env = {"PERSRES_BASE": str(folder / kind), "HF_HUB_OFFLINE": "1"}
    return runs.execute(book, notebooks.ROOT / "notebooks", env)
