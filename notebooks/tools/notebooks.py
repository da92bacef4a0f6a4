"""Keep the notebooks whole: stamp the public address, run them in place, make the table, check the links;
and make from them what a lecturer needs.

python -m notebooks.tools.notebooks stamp            badges, first code cells and the README's links
python -m notebooks.tools.notebooks run [NAME ...]   run in place in fresh kernels, save outputs and measurements
python -m notebooks.tools.notebooks solve [NAME ...] try every solution and every wrong answer of the exercises
python -m notebooks.tools.notebooks table            the README's table of notebooks
python -m notebooks.tools.notebooks student          build/student: without solutions and outputs
python -m notebooks.tools.notebooks answers          build/answers.md: the answer key of all exercises
python -m notebooks.tools.notebooks slides           build/slides.html: 90 minutes, in one file without a network
python -m notebooks.tools.notebooks                  say which links lead nowhere, and what needs stamp or table
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from data.make.shared import ROOT, between, markdown
from notebooks.tools import exercises, links, runs, teaching
from persres_lite.support.files import whole_file

GITHUB = "https://github.com/"
COLAB = "https://colab.research.google.com/"
BADGE = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]({COLAB}github/{{}}/blob/main/notebooks/{{}})"


def public_address(root: Path = ROOT) -> str:
    """The repository's one public address: the ``Repository`` entry of ``pyproject.toml``, on GitHub as the Colab
    badges need it.
    """
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(https://github\.com/[\w.-]+/[\w.-]+?)(?:\.git)?/?"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('pyproject.toml needs Repository = "https://github.com/owner/name" under [project.urls].')
    return found[1]


def first_cell(address: str) -> str:
    """The first code cell, the same in every notebook: that of lesson 00, with the address in it."""
    (cell,) = with_role(read(notebook_paths()[0]), "setup")
    return re.sub(r'"https://github\.com/[^"]+"', f'"{address}"', cell.source)


def badge(address: str, name: str) -> str:
    """The Colab badge of ``notebooks/<name>``."""
    return BADGE.format(address.removeprefix(GITHUB), name)


def with_role(notebook: NotebookNode, role: str) -> list[NotebookNode]:
    """The cells whose ``metadata.persres.role`` it is."""
    return [cell for cell in notebook.cells if cell.metadata.get("persres", {}).get("role") == role]


def stamped(notebook: NotebookNode, name: str, address: str) -> NotebookNode:
    """Return the notebook with its badge as first cell, and the first code cell as it should be.

    The first code cell is known by ``metadata.persres.role == "setup"``, the badge by ``"badge"``: both are replaced
    where they stand; where they are missing, the badge is put first and the set-up after the opening.
    """
    result = nbformat.from_dict(notebook)
    wanted = {"badge": (0, "markdown", badge(address, name)), "setup": (2, "code", first_cell(address))}
    for role, (place, kind, source) in wanted.items():
        if not with_role(result, role):
            make = getattr(nbformat.v4, f"new_{kind}_cell")
            result.cells.insert(place, make(metadata={"persres": {"role": role}}, id=role))
        with_role(result, role)[0].source = source
    return result


def restamp(text: str, address: str) -> str:
    """A text file with the address that its own ``git clone`` line names replaced, in all its links, by `address`."""
    match = re.search(r"git clone (?:--depth 1 )?https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?(?=[\s`]|$)", text)
    if match is None:
        return text
    new = address.removeprefix(GITHUB)
    return re.sub(rf"(github(?:\.com)?/){re.escape(match[1])}(?![\w-])", rf"\g<1>{new}", text)


def notebook_paths(root: Path = ROOT, names: list[str] | None = None) -> list[Path]:
    """The numbered notebooks in reading order, or those whose file name begins with one of `names`.

    Raises
    ------
    FileNotFoundError
        If a name fits no notebook.
    """
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for name in names or []:
        if not any(path.name.startswith(name) for path in paths):
            raise FileNotFoundError(f"No notebook begins with {name!r}; there are {[path.stem for path in paths]}.")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def counted(paths: list[Path]) -> Iterator[Path]:
    """Say before each notebook which one it is."""
    for number, path in enumerate(paths, start=1):
        print(f"[{number}/{len(paths)}] {path.stem}", flush=True)
        yield path


def read(path: Path) -> NotebookNode:
    """Read a notebook in format 4."""
    return nbformat.read(path, as_version=4)


def write(files: dict[Path, str], root: Path) -> None:
    """Write text files, each whole or not at all, and say which have changed."""
    for path, text in files.items():
        same = path.exists() and path.read_text(encoding="utf-8") == text
        print(f"{'unchanged' if same else 'written  '} {path.relative_to(root)}")
        if not same:
            with whole_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def stamp_files(root: Path = ROOT) -> dict[Path, str]:
    """What `stamp` writes: every notebook and the README, with the text that each should hold."""
    address = public_address(root)
    wanted = {path: nbformat.writes(stamped(read(path), path.name, address)) + "\n" for path in notebook_paths(root)}
    return wanted | {root / "README.md": restamp((root / "README.md").read_text(encoding="utf-8"), address)}


def opening(notebook: NotebookNode) -> tuple[str, str]:
    """Title and aim of a notebook: its first heading, and the sentence after ``**Aim:**``."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    aim = re.search(r"^\*\*Aim:\*\* (.+)$", text, re.MULTILINE)
    if title is None or aim is None:
        raise ValueError("a notebook opens with a line '# NN · Title' and a line '**Aim:** one sentence'")
    return title[1].strip(), aim[1].strip()


def table(notebooks: list[tuple[Path, NotebookNode]]) -> str:
    """The README's table: a row for each notebook, from its title, its aim and its measurements."""
    rows, machines = [], {}
    for path, notebook in notebooks:
        title, aim = opening(notebook)
        row = [f"[{title}](notebooks/{path.name})", aim, "not run", "not run"]
        if measured := notebook.metadata.get("persres"):
            row[2:] = [f"{measured['seconds'] / 60:.1f}", f"{measured['peak_gb']} GB"]
            machines[measured["machine"]] = True
        rows.append(row)
    heads = ["notebook", "idea", "minutes", "memory"]
    return f"{markdown(heads, rows)}\n\nMeasured on {'; '.join(machines)}, from start to end in a fresh kernel."


def table_file(root: Path = ROOT) -> dict[Path, str]:
    """What `table` writes: the README with the table of notebooks between its two markers."""
    rows = table([(path, read(path)) for path in notebook_paths(root)])
    return {root / "README.md": between((root / "README.md").read_text(encoding="utf-8"), "notebooks", rows)}


def teaching_files(kind: str, root: Path = ROOT) -> dict[Path, str]:
    """What `student`, `answers` or `slides` writes below ``build``."""
    books = {path: read(path) for path in notebook_paths(root)}
    if kind == "answers":
        return {root / "build/answers.md": teaching.answer_key(list(books.values()))}
    if kind == "slides":
        made = teaching.slides({path.name[:2]: book for path, book in books.items()})
        return {root / "build/slides.html": teaching.page(made)}
    pages = {page: page.read_text(encoding="utf-8") for page in sorted((root / "notebooks").glob("*.md"))}
    pages |= {path: nbformat.writes(teaching.student(book)) + "\n" for path, book in books.items()}
    return {root / "build/student" / path.name: text for path, text in pages.items()}


def problems(root: Path = ROOT) -> list[str]:
    """What is not as the commands would leave it, and what links nowhere."""
    wanted = [*stamp_files(root).items(), *table_file(root).items()]
    stale = {path.relative_to(root) for path, text in wanted if path.read_text(encoding="utf-8") != text}
    return links.broken(root, public_address(root)) + [f"{path}: run stamp, then table" for path in sorted(stale)]


COMMANDS = ("check", "stamp", "run", "solve", "table", "student", "answers", "slides")


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="check", choices=COMMANDS)
    parser.add_argument("names", nargs="*", help="run, solve: only these notebooks, by how their names begin: 00 04")
    options = parser.parse_args(arguments)
    files = {"stamp": stamp_files, "table": table_file}
    found = []
    if options.command == "check":
        found = problems(ROOT)
        print("\n".join(found) or "all well")
    elif options.command == "run":
        for path in counted(notebook_paths(ROOT, options.names)):
            done = runs.run_for_saving(read(path), path.parent)
            write({path: nbformat.writes(done) + "\n"}, ROOT)
            print(f"  {runs.time_and_memory(done)}", flush=True)
    elif options.command == "solve":
        for path in counted(notebook_paths(ROOT, options.names)):
            found += exercises.unproved(runs.execute(exercises.with_solutions(read(path)), path.parent))
        print("\n".join(found) or "every solution passes, every wrong answer is refused")
    else:
        write(files[options.command](ROOT) if options.command in files else teaching_files(options.command, ROOT), ROOT)
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(main())
