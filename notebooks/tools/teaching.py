"""What a lecturer takes from the notebooks: the student's version, the answer key, and slides for 90 minutes.

Slides are chosen by the rules of `lesson_slides`, so they fit the notebooks in any state; a cell with
``metadata.persres.slide`` false gets none.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from notebooks.tools import exercises, runs

SOLUTION = re.compile(r"\n*<details>\s*<summary>Solution</summary>.*?</details>", re.DOTALL)
FOLDED = re.compile(r"\n*<details>.*?</details>", re.DOTALL)
CODE = r"(?P<code>```.*?```|`[^`\n]+`)"
LINK = re.compile(rf"{CODE}|(?<!!)\[(?P<words>[^\]]+)\]\((?!https?:)[^)\s]+\)", re.DOTALL)
REFERENCE = r" \[[1-9]\d*(?:, ?[1-9]\d*)*\](?!\()"
MATH = r"\$\$(?P<display>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$"
SPECIAL = re.compile(rf"{CODE}|{MATH}|{REFERENCE}", re.DOTALL)
PREDICT = "**Predict before you run.**"
EXERCISE = re.compile(
    r"### Exercise (?P<number>[\d.]+): (?P<title>[^\n]+)\n(?P<text>.*?\*\*Minutes:\*\* (?P<minutes>\d+).*)", re.DOTALL
)
PAGE = Path(__file__).with_name("slides.html")

MINUTES = {"00": 10, "02": 25, "04": 20, "05": 35}
"""The plan of the 90 minutes, by lesson, as the README has it; of the other lessons only what these need."""

EXERCISES = {"04": 5, "05": 10}
"""Minutes of a lesson for its exercises: in reading order, those that fit."""

QUESTIONS = 2
"""Of a lesson's questions to predict that a figure answers, so many get a slide."""

EQUATIONS = ("01", "03")
"""Lessons of which the 90 minutes need only the equations."""


@dataclass(frozen=True)
class Slide:
    """One slide: a title, and Markdown or a picture below it."""

    title: str
    text: str = ""
    pictures: Sequence[str] = ()
    """Figures with their captions, as HTML."""
    kind: str = "text"
    notes: str = ""
    """Markdown for the lecturer, shown by the key N."""
    lesson: str = ""


def student(notebook: NotebookNode) -> NotebookNode:
    """A copy without solutions, outputs and the answers in the exercises' metadata; hints and predictions stay.

    The badge goes, too, for it opens the lesson with its solutions. Links out of the folder fit ``build/student``.

    Raises
    ------
    ValueError
        If a solution is left over: it stands in another form than every exercise's.
    """
    result = deepcopy(notebook)
    result.cells = [cell for cell in result.cells if cell.metadata.get("persres", {}).get("role") != "badge"]
    for cell in result.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            for answer in ("wrong", "right"):
                cell.metadata.get("persres", {}).pop(answer, None)
            continue
        if cell.source.startswith("### Exercise "):
            cell.source = SOLUTION.sub("", cell.source)
            if "Solution</summary>" in cell.source:
                raise ValueError(f"A solution is left in {cell.source.splitlines()[0]!r}: fold it as in the others.")
        cell.source = cell.source.replace("](../", "](../../")
    return result


def answer_key(notebooks: Sequence[NotebookNode]) -> str:
    """The answer key of the series, as Markdown: of each exercise the statement, the solution with its note, common
    wrong answers and what the check says to each.
    """
    parts = ["# Answer key"]
    for notebook in notebooks:
        parts += [f"## {_title(notebook)}"]
        for exercise in exercises.exercises(notebook):
            folded = re.findall(r"<summary>Solution</summary>(.*?)</details>", exercise.text, re.DOTALL)
            parts += [FOLDED.sub("", exercise.text).strip(), "**Solution**", *map(str.strip, folded)]
            parts += ["**Common wrong answers**"]
            for code, says in exercise.wrong:
                parts += [f"```python\n{code}\n```", f"The check says: “… {says} …”"]
            parts += ["**Also right**", *(f"```python\n{code}\n```" for code in exercise.right)]
    return without_links("\n\n".join(parts)) + "\n"


def without_links(text: str) -> str:
    """Markdown with its links into the notebooks and the package reduced to their words; code stays as it is."""
    return LINK.sub(lambda match: match["words"] or match[0], text)


def lesson_slides(notebook: NotebookNode, lesson: str) -> Iterator[Slide]:
    """A lesson's slides: its aim, then in reading order the first equations, questions that a figure answers, exercises
    that fit the lesson's minutes, what there is to move by hand, and figures.
    """
    aim = notebook.cells[1].source
    yield Slide(lesson, aim[aim.index("\n") :].strip(), kind="lesson", lesson=lesson)
    heading, number = lesson, lesson[:2]
    minutes, questions, equations = EXERCISES.get(number, 0), QUESTIONS, 1
    for place, cell in enumerate(notebook.cells[2:], start=2):
        exercise = EXERCISE.match(cell.source)
        if cell.cell_type == "markdown" and not exercise:
            heading = (re.findall(r"^#{2,3} (.+)$", cell.source, re.MULTILINE) or [heading])[-1]
        if not _wanted(cell):
            continue
        if pictures := list(_pictures(cell)):
            yield Slide(heading, "", pictures, notes=_notes(notebook, place), lesson=lesson)
        elif exercise and int(exercise["minutes"]) <= minutes:
            minutes -= int(exercise["minutes"])
            text = FOLDED.sub("", exercise["text"]).strip()
            yield Slide(f"Your turn: {exercise['title']} ({exercise['number']})", text, kind="turn", lesson=lesson)
        elif _has_equations(cell) and equations:
            equations = 0
            yield Slide("In equations", equations_of(cell), lesson=lesson)
        elif PREDICT in cell.source and questions and _answered(notebook, place):
            questions -= 1
            yield Slide(heading, _question(cell.source), kind="turn", lesson=lesson)
        elif number in EXERCISES and cell.cell_type == "code" and "explorers." in cell.source:
            asked = _paragraphs(FOLDED.sub("", notebook.cells[place - 1].source))[-1]
            yield Slide(f"Try it: {heading[:1].lower()}{heading[1:]}", asked, kind="turn", lesson=lesson)


def slides(notebooks: dict[str, NotebookNode]) -> list[Slide]:
    """The slides of the 90 minutes: a plan, the lessons' slides, and what to do afterwards.

    Parameters
    ----------
    notebooks : dict of str to notebook
        By number: ``{"00": …, "01": …}``; lessons that are missing are left out.
    """
    plan = ["| from minute | lesson | minutes |", "|---|---|---|"]
    later = ["| lesson | aim |", "|---|---|"]
    made: list[Slide] = []
    start = 0
    for number, notebook in notebooks.items():
        lesson, opening = _title(notebook), notebook.cells[1].source
        if number in MINUTES:
            plan.append(f"| {start} | {lesson} | {MINUTES[number]} |")
            start += MINUTES[number]
            made += lesson_slides(notebook, lesson)
        else:
            later += [f"| {lesson} | {aim} |" for aim in re.findall(r"\*\*Aim:\*\* (.+)", opening)]
            if number in EQUATIONS:
                cell = next(cell for cell in notebook.cells[2:] if _has_equations(cell))
                made.append(Slide(f"{lesson}: in equations", equations_of(cell), lesson=lesson))
    first = Slide("Personalized residuals in 90 minutes", "\n".join([*plan, "", PAPER, "", KEYS]), kind="lesson")
    return [first, *made, Slide("Afterwards", "\n".join(later), kind="lesson")]


PAPER = (
    "C. Ham, M. Fisher, J. Hays, N. Kolkin, Y. Liu, R. Zhang, T. Hinz: *Personalized Residuals for Concept-Driven "
    "Text-to-Image Generation*. CVPR 2024."
)
KEYS = "Keys: → and ← turn the page, N shows the lecturer's notes; a click opens an answer."


def page(made: Sequence[Slide]) -> str:
    """One HTML file with a section for each slide, that needs no network: arrows turn the page, printing gives one
    slide a page.
    """
    sections = []
    for number, slide in enumerate(made, start=1):
        body = "".join(slide.pictures) + (to_html(slide.text) if slide.text else "")
        notes = f"<aside>{to_html(slide.notes)}</aside>" if slide.notes else ""
        lesson = f"{html.escape(slide.lesson)} &nbsp; " if slide.lesson else ""
        sections.append(
            f'<section class="{slide.kind}" id="s{number}"><h2>{to_html(slide.title, inline=True)}</h2>'
            f'<div class="body">{body}</div>{notes}<footer>{lesson}{number} / {len(made)}</footer></section>'
        )
    return PAGE.read_text(encoding="utf-8").replace("{sections}", "\n".join(sections))


def to_html(text: str, inline: bool = False) -> str:
    """Markdown as HTML, with equations drawn, links into the notebooks reduced to their words, and without numbers of
    references.
    """
    drawn: list[str] = []

    def special(match: re.Match[str]) -> str:
        if match["code"]:
            return match["code"]
        latex = match["display"] or match["inline"]
        if latex is None:  # numbers of references
            return ""
        drawn.append(drawn_equation(latex, display=match["display"] is not None))
        return f"EQUATION{len(drawn) - 1}HERE"

    made = markdown2html(SPECIAL.sub(special, without_links(text)))
    made = re.sub(r'<a class="anchor-link".*?</a>', "", made)
    made = re.sub(r"EQUATION(\d+)HERE", lambda match: drawn[int(match[1])], made)
    return re.sub(r"^\s*<p>(.*)</p>\s*$", r"\1", made, flags=re.DOTALL) if inline else made


def drawn_equation(latex: str, display: bool = False) -> str:
    """An equation as a picture inside the page; where matplotlib cannot draw it, its LaTeX as code."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    number = re.search(r"\\tag\{([^}]*)\}", latex)
    plain = re.sub(r"\\tag\{[^}]*\}|\\(?:begin|end)\{aligned\}", "", " ".join(latex.split()))
    for old, new in MATHTEXT.items():
        plain = plain.replace(old, new)
    images: list[str] = []
    for line in re.split(r"\\\\", plain):
        drawn = line.replace("&", "").strip().rstrip(".,").rstrip()
        buffer = io.BytesIO()
        try:
            depth = math_to_image(f"${drawn}$", buffer, prop=FontProperties(size=10), dpi=300, format="png")
        except (ValueError, RuntimeError):
            return f"<code>{html.escape(latex.strip())}</code>"
        data = base64.b64encode(buffer.getvalue()).decode()
        height = int.from_bytes(buffer.getvalue()[20:24], "big") / 300 * 72 / 10  # in the font's size
        style = f"height:{height:.2f}em" + ("" if display else f";vertical-align:-{depth / 10:.2f}em")
        alt = html.escape(drawn if len(images) else latex.strip())
        images.append(f'<img class="equation" style="{style}" src="data:image/png;base64,{data}" alt="{alt}">')
    tag = f' <span class="tag">({html.escape(number[1])})</span>' if number else ""
    return f'<span class="display">{"<br>".join(images)}{tag}</span>' if display else images[0]


MATHTEXT = {
    r"\lVert": r"\Vert ",
    r"\rVert": r"\Vert ",
    r"\top": r"T",
    r"\big": "",
    r"\!": "",
    r"\;": r"\ ",
    r"\text": r"\mathrm",
    r"\operatorname": r"\mathrm",
    r"\le ": r"\leq ",
    r"\mathcal N": r"\mathcal{N}",
    r"\mathbb{1}": r"\mathbf{1}",
}
"""What matplotlib's own LaTeX does not know, and what it knows in its place."""


def _paragraphs(text: str) -> list[str]:
    return [each for each in re.split(r"\n\s*\n", text.strip()) if each]


def _has_equations(cell: NotebookNode) -> bool:
    return cell.cell_type == "markdown" and "$$" in cell.source and not cell.source.startswith("### Exercise")


def equations_of(cell: NotebookNode) -> str:
    """The displayed equations of a text, each with the paragraph before it."""
    paragraphs = ["", *_paragraphs(cell.source)]
    kept = []
    for before, each in zip(paragraphs, paragraphs[1:], strict=False):
        if "$$" in each:
            kept += [] if "$$" in before or before.startswith(("#", "|", "- ")) else [before]
            kept.append(each)
    return "\n\n".join(kept).strip()


def _question(text: str) -> str:
    """A question to predict with its folded answer; where a list stands before it, with the section up to it."""
    begin = text.index(PREDICT)
    before = re.split(r"(?:\A|\n)#{2,3} .+\n", text[:begin])[-1]
    asked = re.split(r"\n#{2,3} ", text[begin:])[0].strip()
    return f"{before.strip()}\n\n{asked}" if re.search(r"^- ", before, re.MULTILINE) else asked


def _answered(notebook: NotebookNode, place: int) -> bool:
    """Whether a figure follows the question in the cell `place`, before any other text."""
    for cell in notebook.cells[place + 1 :]:
        if cell.cell_type == "markdown":
            return False
        if list(_pictures(cell)):
            return _wanted(cell)
    return False


def _wanted(cell: NotebookNode) -> bool:
    return cell.metadata.get("persres", {}).get("slide") is not False


def _notes(notebook: NotebookNode, place: int) -> str:
    """What the lesson says about the figure of the cell `place`: the next text of the same section."""
    for cell in notebook.cells[place + 1 :]:
        if cell.cell_type == "markdown":
            return FOLDED.sub("", re.split(rf"(?:\A|\n)#{{2,3}} |{re.escape(PREDICT)}", cell.source)[0]).strip()
        if list(_pictures(cell)):
            return ""
    return ""


def _title(notebook: NotebookNode) -> str:
    return notebook.cells[1].source.splitlines()[0].removeprefix("# ")


def _pictures(cell: NotebookNode) -> Iterator[str]:
    """The figures of a cell as HTML: those of `course.figures` are, and have words for who does not see them."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "".join(data.get("text/html", "")).startswith("<figure"):
            yield "".join(data["text/html"])
        for kind in {*runs.FIGURES} & {*data}:
            yield f'<figure><img src="data:{kind};base64,{"".join(data[kind]).strip()}" alt=""></figure>'
