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
from dataclasses import dataclass, field, replace

from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from PIL import Image

from notebooks.tools import exercises

SOLUTION = re.compile(r"\n*<details>\s*<summary>Solution</summary>.*?</details>", re.DOTALL)
FOLDED = re.compile(r"\n*<details>.*?</details>", re.DOTALL)
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$", re.DOTALL)
PICTURES = ("image/png", "image/jpeg")

MINUTES = {"00": 10, "02": 25, "04": 20, "05": 35}
"""The plan of the 90 minutes, by lesson, as the README has it; of the other lessons only what these need."""

EXERCISES = {"04": 5, "05": 10}
"""Minutes of a lesson for its exercises: in reading order, those that fit."""

QUESTIONS = 2
"""Of a lesson's questions to predict that a figure answers, so many get a slide."""

FIGURES = {"00": 6, "02": 7, "04": 7, "05": 10}
"""Figures a lesson may have; of more, some in between are left out, but none that a cell or a question asks for."""


@dataclass(frozen=True)
class Slide:
    """One slide: a title, and Markdown or a picture below it."""

    title: str
    text: str = ""
    pictures: Sequence[tuple[str, str, str]] = field(default=())
    """MIME type, base64 and alternative text of each."""
    kind: str = "text"
    notes: str = ""
    """Markdown for the lecturer, shown by the key N."""
    lesson: str = ""
    kept: bool = False
    """Whether it stays however many figures the lesson has."""


def student(notebook: NotebookNode) -> NotebookNode:
    """A copy without solutions, outputs and the answers in the exercises' metadata; hints and predictions stay.

    The badge goes, too, for it opens the lesson with its solutions. Links out of the folder fit ``build/student``.

    Raises
    ------
    ValueError
        If a solution is left over: it stands in another form than every exercise's.
    """
    result = deepcopy(notebook)
    result.cells = [each for each in result.cells if each.metadata.get("persres", {}).get("role") != "badge"]
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
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](../../")
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
    return without_links("\n\n".join(parts))


def without_links(text: str) -> str:
    """Markdown with its links into the notebooks and the package reduced to their words; code stays as it is."""
    return CODE_OR_LINK.sub(lambda match: match[0] if match["code"] else match["words"], text)


CODE_OR_LINK = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|(?<!!)\[(?P<words>[^\]]+)\]\((?!https?:)[^)\s]+\)", re.DOTALL)


def answer_key(notebooks: Sequence[NotebookNode]) -> str:
    """The answer key of the series, as one Markdown text."""
    return "# Answer key\n\n" + "\n\n".join(answers(each) for each in notebooks if exercises.exercises(each)) + "\n"


def aim(notebook: NotebookNode) -> Iterator[Slide]:
    """The lesson's title, aim and abilities, and how long its cells run."""
    yield Slide(_title(notebook), _opening(notebook)[notebook.cells[1].source.index("\n") :].strip(), kind="lesson")


def equations(notebook: NotebookNode) -> Iterator[Slide]:
    """The displayed equations of the first cell that has any, each with the paragraph before it."""
    cell = next((cell for cell in notebook.cells[2:] if _has_equations(cell)), None)
    if cell is not None:
        yield _equations(cell, f"{_title(notebook)}: in equations")


def results(notebook: NotebookNode) -> Iterator[Slide]:
    """In reading order: the first equations, figures, questions that a figure answers, exercises that fit the lesson's
    minutes as "your turn", what there is to move by hand, and what a cell's metadata ask for.
    """
    number = _title(notebook)[:2]
    heading, asked, minutes, explained = _title(notebook), 0, EXERCISES.get(number, 0), False
    asking = False  # whether the next figure answers a question that has a slide
    for place, cell in enumerate(notebook.cells[2:], start=2):
        wish = cell.metadata.get("persres", {}).get("slide")
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#{2,3} (.+)$", cell.source, re.MULTILINE)
            exercise = re.match(r"### Exercise ([\d.]+): (.+)", cell.source)
            if headings and not exercise:
                heading = headings[-1]
            if wish:
                yield Slide(wish, FOLDED.sub("", cell.source), kept=True)
            elif exercise:
                needs = re.search(r"\*\*Minutes:\*\* (\d+)", cell.source)
                if wish is not False and needs and int(needs[1]) <= minutes:
                    minutes -= int(needs[1])
                    statement = FOLDED.sub("", cell.source.split("\n", 1)[1]).strip()
                    yield Slide(f"Your turn: {exercise[2]} ({exercise[1]})", statement, kind="turn", kept=True)
            elif wish is not False and _has_equations(cell) and not explained:
                explained = True
                yield _equations(cell, "In equations")
            elif PREDICT in cell.source and wish is not False and asked < QUESTIONS and _answered(notebook, place):
                asked, asking = asked + 1, True
                yield Slide(heading, _question(cell.source), kind="turn", kept=True)
            continue
        shown = list(_pictures(cell))
        if wish or (shown and wish is not False):
            text = "" if shown else f"```python\n{cell.source}\n```"
            yield Slide(wish or heading, text, shown, notes=_notes(notebook, place), kept=bool(wish) or asking)
            asking = False
        elif number in EXERCISES and wish is not False and re.search(r"\bexplorers\.\w+\(", cell.source):
            before = FOLDED.sub("", notebook.cells[place - 1].source).strip()
            if notebook.cells[place - 1].cell_type == "markdown" and PREDICT not in before:
                yield Slide(
                    f"Try it: {heading[:1].lower()}{heading[1:]}", _paragraphs(before)[-1], kind="turn", kept=True
                )


PREDICT = "**Predict before you run.**"

Rule = Callable[[NotebookNode], Iterator[Slide]]
RULES: tuple[tuple[str, Rule], ...] = (
    ("00", aim),
    ("00", results),
    ("01", equations),
    ("02", aim),
    ("02", results),
    ("03", equations),
    ("04", aim),
    ("04", results),
    ("05", aim),
    ("05", results),
)
"""Which slides a lesson gives, in order: (its number, a function of the notebook)."""


def slides(notebooks: dict[str, NotebookNode]) -> list[Slide]:
    """The slides of the 90 minutes: a plan, the lessons' slides by `RULES`, and what to do afterwards.

    Parameters
    ----------
    notebooks : dict of str to notebook
        By number: ``{"00": …, "01": …}``; lessons that are missing are left out.
    """
    plan = ["| from minute | lesson | minutes |", "|---|---|---|"]
    later = ["| lesson | aim |", "|---|---|"]
    start = 0
    for number, notebook in notebooks.items():
        if number in MINUTES:
            plan.append(f"| {start} | {_title(notebook)} | {MINUTES[number]} |")
            start += MINUTES[number]
        elif found := re.search(r"\*\*Aim:\*\*\s*(.+?)(?=\n\n|\Z)", _opening(notebook), re.DOTALL):
            later.append(f"| {_title(notebook)} | {found[1].strip()} |")
    made = [Slide("Personalized residuals in 90 minutes", "\n".join([*plan, "", PAPER, "", KEYS]), kind="lesson")]
    for number, rule in RULES:
        if number in notebooks:
            lesson = _title(notebooks[number])
            found_here = _thinned(list(rule(notebooks[number])), FIGURES.get(number, 0))
            made += [replace(slide, lesson=lesson) for slide in found_here]
    if later[2:]:
        made.append(Slide("Afterwards", "\n".join(later), kind="lesson"))
    return made


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
        images = "".join(_figure(*picture) for picture in slide.pictures)
        body = images + (to_html(slide.text) if slide.text else "")
        notes = f"<aside>{to_html(slide.notes)}</aside>" if slide.notes else ""
        lesson = f"{html.escape(slide.lesson)} &nbsp; " if slide.lesson else ""
        sections.append(
            f'<section class="{slide.kind}" id="s{number}"><h2>{to_html(slide.title, inline=True)}</h2>'
            f'<div class="body">{body}</div>{notes}<footer>{lesson}{number} / {len(made)}</footer></section>'
        )
    return PAGE.replace("{sections}", "\n".join(sections))


def _figure(kind: str, data: str, alt: str) -> str:
    """A picture; beside a high one stands its caption again, which would be too small to read inside it."""
    width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
    picture = f'<img src="data:{kind};base64,{data}" alt="{html.escape(alt, quote=True)}">'
    high = height > 0.75 * width
    caption = f"<figcaption>{html.escape(alt)}</figcaption>" if high and alt else ""
    return f"<figure{' class=high' if high else ''}>{picture}{caption}</figure>"


def to_html(text: str, inline: bool = False) -> str:
    """Markdown as HTML, with equations drawn, links into the notebooks reduced to their words, and without numbers of
    references.
    """
    drawn: list[str] = []

    def keep(match: re.Match[str]) -> str:
        drawn.append(drawn_equation(match[1] or match[2], display=match[1] is not None))
        return f"EQUATION{len(drawn) - 1}HERE"

    code: list[str] = []

    def aside(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"CODE{len(code) - 1}HERE"

    text = re.sub(r"```.*?```|`[^`\n]+`", aside, text, flags=re.DOTALL)
    text = MATH.sub(keep, text)
    text = re.sub(r" \[[1-9]\d*(?:, ?[1-9]\d*)*\](?!\()", "", without_links(text))
    text = re.sub(r"CODE(\d+)HERE", lambda match: code[int(match[1])], text)
    made = markdown2html(text)
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
    r"\tfrac": r"\frac",
    r"\dfrac": r"\frac",
    r"\le ": r"\leq ",
    r"\mathcal N": r"\mathcal{N}",
    r"\mathbb{1}": r"\mathbf{1}",
}
"""What matplotlib's own LaTeX does not know, and what it knows in its place."""


def _opening(notebook: NotebookNode) -> str:
    return notebook.cells[1].source


def _paragraphs(text: str) -> list[str]:
    return [each for each in re.split(r"\n\s*\n", text.strip()) if each]


def _has_equations(cell: NotebookNode) -> bool:
    return cell.cell_type == "markdown" and "$$" in cell.source and not cell.source.startswith("### Exercise")


def _equations(cell: NotebookNode, title: str) -> Slide:
    paragraphs = _paragraphs(cell.source)
    kept = []
    for number, each in enumerate(paragraphs):
        if "$$" in each:
            before = paragraphs[number - 1] if number else ""
            kept += [] if not before or "$$" in before or before.startswith(("#", "|", "- ")) else [before]
            kept.append(each)
    return Slide(title, "\n\n".join(kept), kept=True)


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
            return cell.metadata.get("persres", {}).get("slide") is not False
    return False


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


def _pictures(cell: NotebookNode) -> Iterator[tuple[str, str, str]]:
    for output in cell.get("outputs", []):
        for kind in PICTURES:
            if kind in output.get("data", {}):
                alt = output.get("metadata", {}).get("alt") or output.metadata.get(kind, {}).get("alt", "")
                yield kind, "".join(output.data[kind]).replace("\n", ""), alt


def _thinned(made: list[Slide], most: int) -> list[Slide]:
    """At most so many figures, evenly from first to last; all that is to be kept, and all text."""
    figures = [slide for slide in made if slide.pictures]
    free = [slide for slide in figures if not slide.kept]
    some = _spread(free, max(0, most - len(figures) + len(free)))
    return [slide for slide in made if slide.kept or not slide.pictures or any(slide is each for each in some)]


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
.body > :first-child { margin-top: 0 }
.body:has(> figure) { display: flex; flex-direction: column }
figure { margin: 0; flex: 1; min-height: 0; display: flex; flex-direction: column; justify-content: center }
figure.high { flex-direction: row; align-items: center; gap: 3vw }
figure img { min-height: 0; min-width: 0; max-width: 100%; width: 100%; height: 100%; object-fit: contain }
figure.high img { width: auto; flex: 0 1 auto }
figcaption { flex: 1 0 14em }
.display { display: block; text-align: center; margin: .7em 0; font-size: 1.4em }
.tag { font-size: .7em; margin-left: 2em }
summary { cursor: pointer; color: #b34700 }
.equation { max-width: 100% }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em }
table { border-collapse: collapse }
td, th { padding: .25em .9em; border-bottom: 1px solid #ccc; text-align: left }
aside { display: none; position: absolute; inset: auto 0 0 0; max-height: 60vh; overflow: auto; padding: 1vh 6vw 4vh;
  background: #fff6d5; border-top: 1px solid #ccc; font-size: .85em }
.notes aside { display: block }
footer { position: absolute; right: 2vw; bottom: 1.5vh; color: #777; font-size: .6em }
@media print {
  @page { size: 297mm 167mm; margin: 0 }
  body { font-size: 4.6mm }
  .notes aside { display: none }
  section { display: flex; height: 166mm; padding: 10mm 14mm; page-break-after: always }
}
</style>
</head>
<body>
{sections}
<script>
const all = [...document.querySelectorAll("section")];
let at = Math.max(0, all.findIndex(each => "#" + each.id === location.hash));
function fit(section) {  // the largest letters with which the text needs no scrolling
  const body = section.querySelector(".body");
  if (body.querySelector("figure")) return;
  for (let size = 140; size >= 50; size -= 5) {
    body.style.fontSize = size + "%";
    if (body.scrollHeight <= body.clientHeight && body.scrollWidth <= body.clientWidth) return;
  }
}
function fitAll() {
  all.forEach(each => { each.classList.add("shown"); fit(each); each.classList.remove("shown") });
  all[at].classList.add("shown");
}
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
  else if (event.key === "n" || event.key === "N") document.body.classList.toggle("notes");
  else return;
  event.preventDefault();
});
window.addEventListener("hashchange", () => show(all.findIndex(each => "#" + each.id === location.hash)));
document.addEventListener("click", event => {
  if (!event.target.closest("a, details, aside")) show(at + (event.clientX < innerWidth / 4 ? -1 : 1));
});
document.addEventListener("toggle", event => fit(event.target.closest("section")), true);
window.addEventListener("resize", fitAll);
show(at);
fitAll();
</script>
</body>
</html>
"""
