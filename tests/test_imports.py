"""The plan of the package: what is importable from the top, and which part imports which."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import persres_lite

PACKAGE = Path(persres_lite.__file__).parent
TESTS = Path(__file__).parent
NOTEBOOKS = PACKAGE.parent / "notebooks"

SMALL = {"support", "masks", "prompts"}
FIRST = SMALL | {"bases", "concepts", "residuals"}
METHOD = FIRST | {"scores", "cost", "training", "attention", "lora", "localize", "evaluation"}
#: By part (a module, or a whole subpackage): which others it may import, anywhere, also inside functions.
MAY_IMPORT: dict[str, set[str]] = {
    "method": set(),
    "support": set(),
    "masks": set(),
    "prompts": set(),
    "scores": set(),
    "bases": {"support"},
    "cost": {"bases"},
    "concepts": {"support"},
    "residuals": {"support"},
    "attention": FIRST,
    "training": FIRST | {"attention"},
    "lora": FIRST,
    "localize": FIRST | {"attention", "lora"},
    "evaluation": FIRST | {"localize"},
    "toybox": set(),
    "course": METHOD | {"toybox"},
    "cli": METHOD,
    "__main__": {"cli"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_by(path: Path, nodes=ast.walk) -> set[str]:
    """The parts that a file imports; what it takes from the top counts as the module that has it."""
    names = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "persres_lite":
            parts = node.module.split(".")[1:]
            asked = parts[:1] or [persres_lite._MODULES.get(alias.name, alias.name) for alias in node.names]
            names |= set(asked) - {"__version__"}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("persres_lite.")}
    return names


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_file_imports_only_what_its_part_may(path):
    extra = imported_by(path) - {part_of(path)} - MAY_IMPORT[part_of(path)]
    assert not extra, f"{part_of(path)} may not import {', '.join(sorted(extra))}"


def test_the_plan_is_a_whole_one():
    """Every part stands in the plan, nobody imports a part that imports it, and what stands apart is imported last."""
    assert {part_of(path) for path in FILES} == set(MAY_IMPORT)
    done: set[str] = set()
    for part, others in MAY_IMPORT.items():  # in an order in which each finds all others above it
        assert others <= done, f"{part} imports {others - done}, which come later"
        done.add(part)


def test_who_reads_lesson_05_needs_four_other_files():
    def top(tree: ast.Module):
        return tree.body

    assert imported_by(PACKAGE / "localize.py", top) == {"attention", "masks", "prompts", "residuals"}


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.name)
def test_no_test_imports_another(path):
    found = [
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("tests.test_", "test_"))
    ]
    assert not found, "what two tests need belongs into tests/helpers.py"


def test_the_import_is_instant():
    """Nothing heavy is loaded until a name is used."""
    code = "import sys, persres_lite; print([name for name in ('torch', 'diffusers', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", persres_lite.__all__)
def test_every_name_at_the_top_is_there(name):
    assert callable(getattr(persres_lite, name))
    assert name in dir(persres_lite)


def test_the_top_is_in_the_order_of_the_lessons():
    assert persres_lite.__all__ == list(persres_lite._MODULES)
    lessons = [lesson_of(module) for module in persres_lite._MODULES.values()]
    numbered = [number for number in lessons if number is not None]
    assert numbered == sorted(numbered)


def lesson_of(module: str) -> int | None:
    """The lesson that a module's first line names."""
    first = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text())) or ""
    return int(first[7:9]) if first.startswith("Lesson ") else None


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'personalise'"):
        _ = persres_lite.personalise


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0*.ipynb")), ids=lambda path: path.stem)
def test_a_lesson_ends_with_its_module_which_begins_with_the_lesson(path):
    last = "".join(json.loads(path.read_text())["cells"][-1]["source"]).splitlines()[-1]
    found = re.fullmatch(r"Source: \[(persres_lite/([\w/]+)\.py)\]\(\.\./\1\)", last)
    assert found, last
    text = ast.get_docstring(ast.parse((PACKAGE / f"{found[2]}.py").read_text())) or ""
    if path.stem.startswith("00"):  # the whole before its parts: the comparison, which no lesson takes apart
        assert found[2] == "evaluation"
    else:
        assert text.startswith(f"Lesson {path.stem[:2]}, `notebooks/{path.name}`: ")
