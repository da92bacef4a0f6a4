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
BRANCH = "main"

FIRST_CELL = """\
# @title Set-up: finds the project, or fetches it on Colab and in an empty folder { display-mode: "form" }
BASE = None  # @param {type: "raw"}
# The frozen model: None takes the environment variable PERSRES_BASE, else "toybox"; with a GPU: "sd-1.4".
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
homes = [folder for folder in (here, *here.parents, here / "persres-lite") if (folder / "persres_lite").is_dir()]
if not homes and importlib.util.find_spec("persres_lite") is None:
    address = os.environ.get("PERSRES_REPOSITORY", "{address}")
    homes, half = [here / "persres-lite"], here / "persres-lite.half"
    for left in (half, *homes):  # by a run that was interrupted
        if (left / ".git").is_dir():
            shutil.rmtree(left)
    fetch = ["git", "clone", "--quiet", "--depth", "1", address, str(half)]
    if shutil.which("git") is None or subprocess.run(fetch).returncode:
        raise RuntimeError(f"Could not fetch {address}: is there a network, and is git installed?")
    half.rename(homes[0])
sys.path[:0] = [str(home) for home in homes[:1]]

from persres_lite.course.start import start

HOME, BASE = start(BASE)"""

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}/{path})"


def public_address(root: Path = ROOT) -> str:
    """The repository's one public address: the ``Repository`` entry of ``pyproject.toml``, without a final slash or
    ``.git``.

    Raises
    ------
    ValueError
        If the entry is missing or is not on GitHub, which the Colab badges need.
    """
    match = re.search(
        r'^\s*"?Repository"?\s*=\s*"([^"]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    address = match.group(1).rstrip("/").removesuffix(".git") if match else ""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(
            f'pyproject.toml needs Repository = "https://github.com/owner/name" under [project.urls]; found {address!r}'
        )
    return address


def first_cell(address: str) -> str:
    """The first code cell, the same in every notebook."""
    return FIRST_CELL.replace('"{address}"', f'"{address}"')


def badge(address: str, name: str) -> str:
    """The Colab badge of ``notebooks/<name>``."""
    colab = (
        address.replace("https://github.com/", "https://colab.research.google.com/github/")
        + f"/blob/{BRANCH}/notebooks"
    )
    return BADGE.format(colab=colab, path=name)


def stamped(notebook: NotebookNode, name: str, address: str) -> NotebookNode:
    """Return the notebook with its badge as first cell, and the first code cell as it should be.

    The first code cell is known by ``metadata.persres.role == "setup"``, the badge by ``"badge"``: both are replaced
    where they stand; where they are missing, the badge is put first and the set-up after the opening.
    """
    result = nbformat.from_dict(notebook)
    _place(result, 0, "badge", nbformat.v4.new_markdown_cell, badge(address, name))
    _place(result, 2, "setup", nbformat.v4.new_code_cell, first_cell(address))
    return result


def restamp(text: str, address: str) -> str:
    """A text file with the address that its own ``git clone`` line names replaced, in all its links, by `address`."""
    match = re.search(r"git clone (?:--depth 1 )?https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?(?=[\s`]|$)", text)
    if match is None:
        return text
    new = address.removeprefix("https://github.com/")
    return re.sub(rf"(github(?:\.com)?/){re.escape(match.group(1))}(?![\w-])", rf"\g<1>{new}", text)


def notebook_paths(root: Path = ROOT, names: list[str] | None = None) -> list[Path]:
    """The numbered notebooks in reading order, or those whose file name begins with one of `names`.

    Raises
    ------
    FileNotFoundError
        If a name fits no notebook.
    """
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not names:
        return paths
    chosen = [path for path in paths if any(path.name.startswith(Path(name).name) for name in names)]
    for name in names:
        if not any(path.name.startswith(Path(name).name) for path in paths):
            raise FileNotFoundError(
                f"No notebook begins with {name!r}; there are {', '.join(path.stem for path in paths) or 'none'}."
            )
    return chosen


def read(path: Path) -> NotebookNode:
    """Read a notebook in format 4."""
    return nbformat.read(path, as_version=4)


def write(path: Path, text: str) -> bool:
    """Write a text file whole or not at all; say whether it changed."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True


def stamp_files(root: Path = ROOT) -> dict[Path, str]:
    """What `stamp` writes: every notebook and the README, with the text that each should hold."""
    address = public_address(root)
    wanted = {path: nbformat.writes(stamped(read(path), path.name, address)) + "\n" for path in notebook_paths(root)}
    readme = root / "README.md"
    if readme.exists():
        wanted[readme] = restamp(readme.read_text(encoding="utf-8"), address)
    return wanted


def table_file(root: Path = ROOT) -> dict[Path, str]:
    """What `table` writes: the README with the table of notebooks between its two markers."""
    readme = root / "README.md"
    results = root / runs.GPU_RESULTS
    gpu = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    rows = runs.table([(path, read(path)) for path in notebook_paths(root)], gpu)
    return {readme: runs.between(readme.read_text(encoding="utf-8"), "notebooks", rows)}


def teaching_files(kind: str, root: Path = ROOT, names: list[str] | None = None) -> dict[Path, str]:
    """What `student`, `answers` or `slides` writes below ``build``."""
    read_ones = {path: read(path) for path in notebook_paths(root, names)}
    if kind == "student":
        made = {path.name: nbformat.writes(teaching.student(each)) + "\n" for path, each in read_ones.items()}
        made |= {page.name: page.read_text(encoding="utf-8") for page in sorted((root / "notebooks").glob("*.md"))}
        return {root / "build" / "student" / name: text for name, text in made.items()}
    if kind == "answers":
        return {root / "build" / "answers.md": teaching.answer_key(list(read_ones.values()))}
    by_number = {path.name[:2]: each for path, each in read_ones.items()}
    return {root / "build" / "slides.html": teaching.page(teaching.slides(by_number))}


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command",
        nargs="?",
        default="check",
        choices=["check", "stamp", "run", "solve", "table", "student", "answers", "slides", "links"],
    )
    parser.add_argument("names", nargs="*", help="only these notebooks, by the beginning of their names: 00 04")
    options = parser.parse_args(arguments)
    if options.command in ("run", "solve"):
        chosen = notebook_paths(ROOT, options.names)
        return sum(_run(path) if options.command == "run" else _solve(path) for path in _counted(chosen)) and 1
    if options.command in ("stamp", "table"):
        for path, text in (stamp_files(ROOT) if options.command == "stamp" else table_file(ROOT)).items():
            print(f"{'written  ' if write(path, text) else 'unchanged'} {path.relative_to(ROOT)}")
        return 0
    if options.command in ("student", "answers", "slides"):
        for path, text in teaching_files(options.command, ROOT, options.names).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"{'written  ' if write(path, text) else 'unchanged'} {path.relative_to(ROOT)}")
        return 0
    problems = links.broken(ROOT, public_address(ROOT))
    if options.command == "check":
        wanted = [*stamp_files(ROOT).items(), *table_file(ROOT).items()]
        stale = {path.relative_to(ROOT): None for path, text in wanted if path.read_text(encoding="utf-8") != text}
        problems += [f"{path}: run stamp, then table" for path in stale]
    print("\n".join(problems) or "all well")
    return 1 if problems else 0


def _run(path: Path) -> int:
    done = runs.run(read(path), path.parent, on_cell=_progress)
    write(path, nbformat.writes(done) + "\n")
    print(f"\r  {runs.time_and_memory(done)}", flush=True)
    return 0


def _solve(path: Path) -> int:
    done = runs.execute(exercises.with_solutions(read(path)), path.parent, on_cell=_progress)
    problems = exercises.unproved(done)
    print("\r  " + ("\n  ".join(problems) or "every solution passes, every wrong answer is refused"), flush=True)
    return len(problems)


def _counted(paths: list[Path]) -> Iterator[Path]:
    for number, path in enumerate(paths, start=1):
        print(f"[{number}/{len(paths)}] {path.name}", flush=True)
        yield path


def _progress(number: int, count: int) -> None:
    if sys.stdout.isatty():
        print(f"\r  cell {number} of {count} ", end="", flush=True)


def _place(notebook: NotebookNode, position: int, role: str, make, source: str) -> None:
    for cell in notebook.cells:
        if cell.metadata.get("persres", {}).get("role") == role:
            cell.source = source
            return
    cell = make(source, metadata={"persres": {"role": role}}, id=role)
    notebook.cells.insert(position, cell)


if __name__ == "__main__":
    sys.exit(main())
