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
ROOT = PACKAGE.parent

FIRST = {"support", "masks", "prompts", "bases", "concepts", "residuals"}
METHOD = FIRST | {"scores", "cost", "training", "attention", "lora", "localize", "evaluation", "beyond"}
#: By part (a module, or a whole subpackage): which others it may import, anywhere, also inside functions.
MAY_IMPORT: dict[str, set[str]] = {
    "method": set(),
    "support": set(),
    "masks": set(),
    "prompts": set(),
    "scores": set(),
    "bases": {"support"},
    "cost": {"bases"},
    "concepts": {"support", "masks"},
    "residuals": {"support"},
    "attention": FIRST,
    "training": FIRST | {"attention"},
    "lora": FIRST,
    "localize": FIRST | {"attention"},
    "evaluation": FIRST | {"localize"},
    "beyond": FIRST | {"localize"},
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
            names |= set(parts[:1] or [persres_lite._MODULES.get(alias.name, alias.name) for alias in node.names])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("persres_lite.")}
    return names - {"__version__"}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_file_imports_only_what_its_part_may():
    """And the plan is a whole one: all parts stand in it, in an order in which each finds all others above it."""
    parts = list(MAY_IMPORT)
    assert {part_of(path) for path in FILES} == set(parts)
    assert all(others <= set(parts[: parts.index(part)]) for part, others in MAY_IMPORT.items())
    extra = {path: imported_by(path) - {part_of(path)} - MAY_IMPORT[part_of(path)] for path in FILES}
    assert not {path.relative_to(ROOT).as_posix(): names for path, names in extra.items() if names}


def test_who_reads_lesson_05_needs_few_other_files():
    assert imported_by(PACKAGE / "localize.py", lambda tree: tree.body) <= {
        "attention",
        "masks",
        "prompts",
        "residuals",
    }


def test_nobody_imports_a_maker_a_tool_or_a_test():
    """Makers and tools import the package and each other; two tests share what is in tests/helpers.py."""
    forbidden = {"persres_lite": r"(data|notebooks|tests)\b", "data": r"tests\b|notebooks\b", "tests": r"tests\.test_"}
    found = [
        (path.relative_to(ROOT).as_posix(), name)
        for folder, pattern in forbidden.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        if re.match(pattern, name)
    ]
    assert not found


def test_the_import_is_instant():
    """Nothing heavy is loaded until a name is used."""
    code = "import sys, persres_lite; print([name for name in ('torch', 'diffusers', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", persres_lite.__all__)
def test_every_name_at_the_top_is_there(name):
    assert callable(getattr(persres_lite, name))
    assert name in dir(persres_lite)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'personalise'"):
        _ = persres_lite.personalise


def beginning_of(module: str) -> str:
    return ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text())) or ""


def test_the_top_is_in_the_order_of_the_lessons():
    assert persres_lite.__all__ == list(persres_lite._MODULES)
    numbers = [re.match(r"Lesson (\d\d)", beginning_of(module)) for module in persres_lite._MODULES.values()]
    numbers = [int(number[1]) for number in numbers if number]
    assert numbers and numbers == sorted(numbers)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_a_lesson_ends_with_its_module_which_begins_with_the_lesson(path):
    last = "".join(json.loads(path.read_text())["cells"][-1]["source"]).splitlines()[-1]
    found = re.fullmatch(r"Source: \[(persres_lite/([\w/]+)\.py)\]\(\.\./\1\)", last)
    assert found, last
    if path.stem.startswith("00"):  # the whole before its parts: the comparison, which no lesson takes apart
        assert found[2] == "evaluation"
    else:
        assert beginning_of(found[2]).startswith(f"Lesson {path.stem[:2]}, `notebooks/{path.name}`: ")
