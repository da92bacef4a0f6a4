"""What a lecturer takes from the notebooks: the student's version, the answer key, and slides for 90 minutes.

Slides are chosen by `RULES`, so they fit the notebooks in any state: a cell's own wish (``metadata.persres.slide``, a
title, or false for no slide) comes first.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from persres_lite.maintain import exercises

SOLUTION = re.compile(r"\n*<details>\s*<summary>Solution</summary>.*?</details>", re.DOTALL)
FOLDED = re.compile(r"\n*<details>.*?</details>", re.DOTALL)
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$", re.DOTALL)
PICTURES = ("image/png", "image/jpeg")

MINUTES = {"00": 10, "01": 12, "02": 12, "03": 10, "04": 12, "05": 18, "06": 10, "07": 6}
"""The plan of the 90 minutes, by lesson."""


@dataclass(frozen=True)
class Slide:
    """One slide: a title, and Markdown or a picture below it."""

    title: str
    text: str = ""
    pictures: Sequence[tuple[str, str, str]] = field(default=())
    """MIME type, base64 and alternative text of each."""
    kind: str = "text"


def student(notebook: NotebookNode) -> NotebookNode:
    """A copy without solutions, outputs and the answers in the exercises' metadata; hints and predictions stay.

    Raises
    ------
    ValueError
        If a solution is left over: it stands in another form than every exercise's.
    """
    result = deepcopy(notebook)
    for cell in result.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            about = {key: value for key, value in cell.metadata.get("persres", {}).items() if key not in ANSWERS}
            cell.metadata.pop("persres", None)
            if about:
                cell.metadata["persres"] = about
        elif cell.source.startswith("### Exercise "):
            cell.source = SOLUTION.sub("", cell.source)
            if "Solution</summary>" in cell.source:
                raise ValueError(f"A solution is left in {cell.source.splitlines()[0]!r}: fold it as in the others.")
    return result


ANSWERS = ("wrong", "right")


def answers(notebook: NotebookNode) -> str:
    """The answer key of one notebook, as Markdown: statement, solution, its note, common wrong answers and what the
    check says to each.
    """
    parts = [f"## {_title(notebook)}"]
    for exercise in exercises.exercises(notebook):
        folded = re.search(r"<summary>Solution</summary>(.*?)</details>", exercise.text, re.DOTALL)
        parts += [FOLDED.sub("", exercise.text).strip(), "**Solution**", folded[1].strip() if folded else ""]
        parts += ["**Common wrong answers**"]
        for code, says in exercise.wrong:
            refused = f"The check says: “… {says} …”" if says else "The check refuses it."
            parts += [f"```python\n{code}\n```", refused]
        if exercise.right:
            parts += ["**Also right**", *(f"```python\n{code}\n```" for code in exercise.right)]
    return "\n\n".join(parts)


def answer_key(notebooks: Sequence[NotebookNode]) -> str:
    """The answer key of the series, as one Markdown text."""
    return "# Answer key\n\n" + "\n\n".join(answers(each) for each in notebooks if exercises.exercises(each)) + "\n"


def aim(notebook: NotebookNode) -> Iterator[Slide]:
    """The lesson's title, aim and abilities."""
    text = notebook.cells[1].source
    found = re.search(r"\*\*Aim:\*\*.+?(?=\*\*Time and memory:\*\*|\Z)", text, re.DOTALL)
    yield Slide(_title(notebook), found[0].strip() if found else "", kind="lesson")


def equation(notebook: NotebookNode) -> Iterator[Slide]:
    """The first displayed equation, with the paragraph before it."""
    for cell in notebook.cells[2:]:
        if cell.cell_type == "markdown" and "$$" in cell.source and not cell.source.startswith("### Exercise"):
            paragraphs = re.split(r"\n\s*\n", cell.source)
            place = next(number for number, each in enumerate(paragraphs) if "$$" in each)
            before = [each for each in paragraphs[max(0, place - 1) : place] if not each.startswith(("#", "|", "-"))]
            yield Slide("The equation", "\n\n".join([*before, paragraphs[place]]))
            return


def results(notebook: NotebookNode) -> Iterator[Slide]:
    """In reading order: figures, questions to predict, exercises as "your turn", and what a cell's metadata ask for."""
    heading, asked = _title(notebook), 0
    for cell in notebook.cells[2:]:
        wish = cell.metadata.get("persres", {}).get("slide")
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#{2,3} (.+)$", cell.source, re.MULTILINE)
            exercise = re.match(r"### Exercise ([\d.]+): (.+)", cell.source)
            if headings and not exercise:
                heading = headings[-1]
            if wish:
                yield Slide(wish, FOLDED.sub("", cell.source))
            elif exercise and wish is not False:
                statement = FOLDED.sub("", cell.source.split("\n", 1)[1]).strip()
                yield Slide(f"Your turn: {exercise[2]} ({exercise[1]})", statement, kind="turn")
            elif "**Predict before you run.**" in cell.source and wish is not False and asked < QUESTIONS:
                asked += 1
                question = FOLDED.sub("", cell.source[cell.source.index("**Predict before you run.**") :])
                yield Slide(heading, question.split("\n#")[0].strip(), kind="turn")
            continue
        shown = list(_pictures(cell))
        if wish or (shown and wish is not False):
            yield Slide(wish or heading, pictures=shown, text="" if shown else f"```python\n{cell.source}\n```")


QUESTIONS = 1
"""Of a lesson's questions to predict, so many get a slide; the others stay in the notebook."""

Rule = Callable[[NotebookNode], Iterator[Slide]]
RULES: tuple[tuple[str, Rule], ...] = tuple((number, rule) for number in MINUTES for rule in (aim, equation, results))
"""Which slides a lesson gives, in order: (its number, a function of the notebook)."""

MOST = {"00": 6, "01": 5, "02": 5, "03": 6, "04": 6, "05": 8, "06": 5, "07": 3}
"""Slides a lesson may have beside its opening and its equation; of more, some in between are left out."""


def slides(notebooks: dict[str, NotebookNode]) -> list[Slide]:
    """The slides of the whole series: a plan, then each lesson's, by `RULES`.

    Parameters
    ----------
    notebooks : dict of str to notebook
        By number: ``{"00": …, "01": …}``; lessons that are missing are left out.
    """
    plan = ["| from minute | lesson | minutes |", "|---|---|---|"]
    start = 0
    for number, notebook in notebooks.items():
        plan.append(f"| {start} | {_title(notebook)} | {MINUTES.get(number, 0)} |")
        start += MINUTES.get(number, 0)
    found = [Slide("Personalized residuals in 90 minutes", "\n".join(plan), kind="lesson")]
    for number, rule in RULES:
        if number in notebooks:
            made = list(rule(notebooks[number]))
            found += _thinned(made, MOST[number]) if rule is results else made
    return found


def page(made: Sequence[Slide]) -> str:
    """One HTML file with a section for each slide, that needs no network: arrows turn the page, printing gives one
    slide a page.
    """
    sections = []
    for number, slide in enumerate(made, start=1):
        images = "".join(
            f'<img class="figure" src="data:{kind};base64,{data}" alt="{html.escape(alt, quote=True)}">'
            for kind, data, alt in slide.pictures
        )
        body = images + (to_html(slide.text) if slide.text else "")
        sections.append(
            f'<section class="{slide.kind}" id="s{number}"><h2>{to_html(slide.title, inline=True)}</h2>'
            f'<div class="body">{body}</div><footer>{number} / {len(made)}</footer></section>'
        )
    return PAGE.replace("{sections}", "\n".join(sections))


def to_html(text: str, inline: bool = False) -> str:
    """Markdown as HTML, with equations drawn and links into the notebooks reduced to their words."""
    drawn: list[str] = []

    def keep(match: re.Match[str]) -> str:
        drawn.append(drawn_equation(match[1] or match[2], display=match[1] is not None))
        return f"EQUATION{len(drawn) - 1}HERE"

    code: list[str] = []

    def aside(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"CODE{len(code) - 1}HERE"

    text = re.sub(r"```.*?```|`[^`\n]+`", aside, text, flags=re.DOTALL)
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)
    text = MATH.sub(keep, text)
    text = re.sub(r"CODE(\d+)HERE", lambda match: code[int(match[1])], text)
    made = markdown2html(text)
    made = re.sub(r'<a class="anchor-link".*?</a>', "", made)
    made = re.sub(r"EQUATION(\d+)HERE", lambda match: drawn[int(match[1])], made)
    return re.sub(r"^\s*<p>(.*)</p>\s*$", r"\1", made, flags=re.DOTALL) if inline else made


def drawn_equation(latex: str, display: bool = False) -> str:
    """An equation as a picture inside the page; where matplotlib cannot draw it, its LaTeX as code."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    plain = re.sub(r"\\tag\{[^}]*\}", "", " ".join(latex.split())).strip().rstrip(".")
    for old, new in MATHTEXT.items():
        plain = plain.replace(old, new)
    buffer = io.BytesIO()
    try:
        depth = math_to_image(f"${plain}$", buffer, prop=FontProperties(size=10), dpi=300, format="png")
    except (ValueError, RuntimeError):
        return f"<code>{html.escape(latex.strip())}</code>"
    data = base64.b64encode(buffer.getvalue()).decode()
    height = int.from_bytes(buffer.getvalue()[20:24], "big") / 300 * 72 / 10  # in the font's size
    style = f"height:{height:.2f}em" + ("" if display else f";vertical-align:-{depth / 10 * 72 / 300:.2f}em")
    image = (
        f'<img class="equation" style="{style}" src="data:image/png;base64,{data}" alt="{html.escape(latex.strip())}">'
    )
    return f'<span class="display">{image}</span>' if display else image


MATHTEXT = {
    r"\lVert": r"\Vert ",
    r"\rVert": r"\Vert ",
    r"\top": r"T",
    r"\big": "",
    r"\!": "",
    r"\;": r"\ ",
    r"\text": r"\mathrm",
    r"\operatorname": r"\mathrm",
    r"\tfrac": r"\frac",
    r"\dfrac": r"\frac",
    r"\le ": r"\leq ",
    r"\mathcal N": r"\mathcal{N}",
    r"\mathbb{1}": r"\mathbf{1}",
}
"""What matplotlib's own LaTeX does not know, and what it knows in its place."""


def _title(notebook: NotebookNode) -> str:
    return notebook.cells[1].source.splitlines()[0].removeprefix("# ")


def _pictures(cell: NotebookNode) -> Iterator[tuple[str, str, str]]:
    for output in cell.get("outputs", []):
        for kind in PICTURES:
            if kind in output.get("data", {}):
                alt = output.get("metadata", {}).get("alt") or output.metadata.get(kind, {}).get("alt", "")
                yield kind, "".join(output.data[kind]).replace("\n", ""), alt


def _thinned(made: list[Slide], most: int) -> list[Slide]:
    """At most so many, evenly from first to last, figures before questions and exercises."""
    if len(made) <= most:
        return made
    figures = [slide for slide in made if slide.kind == "text"]
    turns = [slide for slide in made if slide.kind == "turn"]
    some = _spread(turns, max(2, most - len(figures)))
    some += _spread(figures, most - len(some))
    return [slide for slide in made if any(slide is each for each in some)]


def _spread(values: list[Slide], number: int) -> list[Slide]:
    if len(values) <= number:
        return list(values)
    return [values[round(place * (len(values) - 1) / max(1, number - 1))] for place in range(number)]


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Personalized residuals in 90 minutes</title>
<style>
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: #222; font: 2.9vh/1.4 system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
section { display: none; flex-direction: column; height: 100vh; padding: 5vh 6vw 3vh; position: relative }
section.shown { display: flex }
h2 { margin: 0 0 2.5vh; font-size: 1.5em; line-height: 1.2; color: #0072b2 }
.lesson h2 { font-size: 1.9em; margin-top: 8vh }
.turn h2 { color: #b34700 }
.body { flex: 1; min-height: 0; overflow: auto }
.body:has(> .figure) { display: flex; flex-direction: column; align-items: center; justify-content: center }
.figure { min-height: 0; max-width: 100%; width: 100%; height: 100%; object-fit: contain }
.display { display: block; text-align: center; margin: 4vh 0; font-size: 1.5em }
.turn .body { font-size: 1.15em }
.equation { max-width: 100% }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em }
table { border-collapse: collapse }
td, th { padding: .25em .9em; border-bottom: 1px solid #ccc; text-align: left }
footer { position: absolute; right: 2vw; bottom: 1.5vh; color: #777; font-size: .6em }
@media print {
  @page { size: 297mm 167mm; margin: 0 }
  body { font-size: 5.2mm }
  section { display: flex; height: 166mm; padding: 10mm 14mm; page-break-after: always }
}
</style>
</head>
<body>
{sections}
<script>
const all = [...document.querySelectorAll("section")];
let at = Math.max(0, all.findIndex(each => "#" + each.id === location.hash));
function show(number) {
  at = Math.min(all.length - 1, Math.max(0, number));
  all.forEach((each, index) => each.classList.toggle("shown", index === at));
  history.replaceState(null, "", "#" + all[at].id);
}
document.addEventListener("keydown", event => {
  if (["ArrowRight", "ArrowDown", "PageDown", " "].includes(event.key)) show(at + 1);
  else if (["ArrowLeft", "ArrowUp", "PageUp"].includes(event.key)) show(at - 1);
  else if (event.key === "Home") show(0);
  else if (event.key === "End") show(all.length - 1);
  else return;
  event.preventDefault();
});
window.addEventListener("hashchange", () => show(all.findIndex(each => "#" + each.id === location.hash)));
document.addEventListener("click", event => {
  if (!event.target.closest("a")) show(at + (event.clientX < innerWidth / 4 ? -1 : 1));
});
show(at);
</script>
</body>
</html>
"""
