"""Keep the notebooks whole: stamp the public address, run them in place, make the table, check the links;
and make from them what a lecturer needs.

python -m notebooks.tools.notebooks stamp            badges, first code cells and the README's links
python -m notebooks.tools.notebooks run [NAME ...]   run in place in fresh kernels, save outputs and measurements
python -m notebooks.tools.notebooks solve [NAME ...] try every solution and every wrong answer of the exercises
python -m notebooks.tools.notebooks table            the README's table of notebooks
python -m notebooks.tools.notebooks student [NAME ...] build/student: without solutions and outputs
python -m notebooks.tools.notebooks answers          build/answers.md: the answer key of all exercises
python -m notebooks.tools.notebooks slides           build/slides.html: 90 minutes, in one file without a network
python -m notebooks.tools.notebooks links            relative links, anchors and badges, offline
python -m notebooks.tools.notebooks                  only say what is not as these commands would leave it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from data.make import runs
from notebooks.tools import exercises, links, teaching
from persres_lite.support.files import whole_file

ROOT = Path(__file__).resolve().parents[2]

COLAB = "https://colab.research.google.com/github/"
BADGE = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB}{{}}/blob/main/notebooks/{{}})"


def public_address(root: Path = ROOT) -> str:
    """The repository's one public address: the ``Repository`` entry of ``pyproject.toml``.

    Raises
    ------
    ValueError
        If the entry is missing or is not on GitHub, which the Colab badges need.
    """
    found = re.search(
        r'^Repository = "(https://github\.com/[\w.-]+/[\w.-]+?)(?:\.git)?/?"$',
        (root / "pyproject.toml").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    if found is None:
        raise ValueError('pyproject.toml needs Repository = "https://github.com/owner/name" under [project.urls].')
    return found[1]


def first_cell(address: str) -> str:
    """The first code cell, the same in every notebook: that of lesson 00, with the address in it."""
    (cell,) = [
        cell for cell in read(notebook_paths()[0]).cells if cell.metadata.get("persres", {}).get("role") == "setup"
    ]
    return re.sub(r'"https://github\.com/[^"]+"', f'"{address}"', cell.source)


def badge(address: str, name: str) -> str:
    """The Colab badge of ``notebooks/<name>``."""
    return BADGE.format(address.removeprefix("https://github.com/"), name)


def stamped(notebook: NotebookNode, name: str, address: str) -> NotebookNode:
    """Return the notebook with its badge as first cell, and the first code cell as it should be.

    The first code cell is known by ``metadata.persres.role == "setup"``, the badge by ``"badge"``: both are replaced
    where they stand; where they are missing, the badge is put first and the set-up after the opening.
    """
    result = nbformat.from_dict(notebook)
    wanted = {"badge": (0, "markdown", badge(address, name)), "setup": (2, "code", first_cell(address))}
    for role, (place, kind, source) in wanted.items():
        found = [cell for cell in result.cells if cell.metadata.get("persres", {}).get("role") == role]
        if not found:
            make = getattr(nbformat.v4, f"new_{kind}_cell")
            result.cells.insert(place, make(metadata={"persres": {"role": role}}, id=role))
            found = [result.cells[place]]
        found[0].source = source
    return result


def restamp(text: str, address: str) -> str:
    """A text file with the address that its own ``git clone`` line names replaced, in all its links, by `address`."""
    match = re.search(r"git clone (?:--depth 1 )?https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?(?=[\s`]|$)", text)
    if match is None:
        return text
    new = address.removeprefix("https://github.com/")
    return re.sub(rf"(github(?:\.com)?/){re.escape(match[1])}(?![\w-])", rf"\g<1>{new}", text)


def notebook_paths(root: Path = ROOT, names: list[str] | None = None) -> list[Path]:
    """The numbered notebooks in reading order, or those whose file name begins with one of `names`.

    Raises
    ------
    FileNotFoundError
        If a name fits no notebook.
    """
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    wanted = {
        Path(name).name: [path for path in paths if path.name.startswith(Path(name).name)] for name in names or []
    }
    for name, found in wanted.items():
        if not found:
            raise FileNotFoundError(f"No notebook begins with {name!r}; there are {[path.stem for path in paths]}.")
    return sorted({path for found in wanted.values() for path in found}) if names else paths


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


def table_file(root: Path = ROOT) -> dict[Path, str]:
    """What `table` writes: the README with the table of notebooks between its two markers."""
    results = root / runs.GPU_RESULTS
    gpu = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    rows = runs.table([(path, read(path)) for path in notebook_paths(root)], gpu)
    return {root / "README.md": runs.between((root / "README.md").read_text(encoding="utf-8"), "notebooks", rows)}


def teaching_files(kind: str, root: Path = ROOT, names: list[str] | None = None) -> dict[Path, str]:
    """What `student`, `answers` or `slides` writes below ``build``."""
    books = {path: read(path) for path in notebook_paths(root, names)}
    build = root / "build"
    if kind == "answers":
        return {build / "answers.md": teaching.answer_key(list(books.values()))}
    if kind == "slides":
        made = teaching.slides({path.name[:2]: book for path, book in books.items()})
        return {build / "slides.html": teaching.page(made)}
    pages = {page.name: page.read_text(encoding="utf-8") for page in sorted((root / "notebooks").glob("*.md"))}
    pages |= {path.name: nbformat.writes(teaching.student(book)) + "\n" for path, book in books.items()}
    return {build / "student" / name: text for name, text in pages.items()}


def problems(root: Path = ROOT) -> list[str]:
    """What is not as the commands would leave it, and what links nowhere."""
    wanted = [*stamp_files(root).items(), *table_file(root).items()]
    stale = {path.relative_to(root) for path, text in wanted if path.read_text(encoding="utf-8") != text}
    return links.broken(root, public_address(root)) + [f"{path}: run stamp, then table" for path in sorted(stale)]


COMMANDS = ("check", "stamp", "run", "solve", "table", "student", "answers", "slides", "links")


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="check", choices=COMMANDS)
    parser.add_argument("names", nargs="*", help="only these notebooks, by the beginning of their names: 00 04")
    options = parser.parse_args(arguments)
    command = options.command
    if command in ("run", "solve"):
        one = _run if command == "run" else _solve
        return min(1, sum(one(path) for path in counted(notebook_paths(ROOT, options.names))))
    if command in ("check", "links"):
        found = problems(ROOT) if command == "check" else links.broken(ROOT, public_address(ROOT))
        print("\n".join(found) or "all well")
        return 1 if found else 0
    files = {"stamp": stamp_files, "table": table_file}
    write(files[command](ROOT) if command in files else teaching_files(command, ROOT, options.names), ROOT)
    return 0


def _run(path: Path) -> int:
    done = runs.run(read(path), path.parent, on_cell=_progress)
    write({path: nbformat.writes(done) + "\n"}, ROOT)
    print(f"  {runs.time_and_memory(done)}", flush=True)
    return 0


def _solve(path: Path) -> int:
    done = runs.execute(exercises.with_solutions(read(path)), path.parent, on_cell=_progress)
    found = exercises.unproved(done)
    print("  " + ("\n  ".join(found) or "every solution passes, every wrong answer is refused"), flush=True)
    return len(found)


def counted(paths: list[Path]) -> Iterator[Path]:
    """Say before each notebook which one it is."""
    for number, path in enumerate(paths, start=1):
        print(f"[{number}/{len(paths)}] {path.stem}", flush=True)
        yield path


def _progress(number: int, count: int) -> None:
    if sys.stdout.isatty():
        print(f"  cell {number} of {count} ", end="\r", flush=True)


if __name__ == "__main__":
    sys.exit(main())
