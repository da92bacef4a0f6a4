"""Docstrings are of one dialect, numpy's, and name what is there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import persres_lite

PACKAGE = Path(persres_lite.__file__).parent
SECTION = re.compile(r"^(\w+)\n-{3,}$", re.MULTILINE)
OTHER = re.compile(r":(func|mod|class|meth|param|returns?):|^\s*(Args|Raises|Returns):$", re.MULTILINE)


def described(text: str) -> list[str]:
    """The lines under Parameters and Attributes that stand at the margin: those with names and types."""
    parts = SECTION.split(inspect.cleandoc(text))
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = f"{sections.get('Parameters', '')}\n{sections.get('Attributes', '')}".splitlines()
    return [line for line in lines if line and not line.startswith(" ")]


def names_in(node: ast.AST) -> set[str]:
    """All names that a function's arguments or a class's body hold."""
    inside = list(ast.walk(node.args if isinstance(node, ast.FunctionDef) else node))
    stars = node.args if isinstance(node, ast.FunctionDef) else ast.arguments([], [], None, [], [], None, [])
    found = {getattr(each, kind) for each in inside for kind in ("arg", "id", "attr", "name") if hasattr(each, kind)}
    return found | {f"*{stars.vararg.arg}" if stars.vararg else "", f"**{stars.kwarg.arg}" if stars.kwarg else ""}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_parameters_have_a_type_and_are_there_and_no_other_dialect_is_used(path):
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
        for line in described(text or ""):
            names, colon, kind = line.partition(" : ")
            assert line.startswith("*") or (colon and kind), f"{node.name}: {line!r} is not `name : type`"
            assert set(names.split(", ")) <= names_in(node), f"{node.name} has not all of {names}"
        assert not OTHER.search(text or ""), node.name


@pytest.mark.parametrize("name", persres_lite.__all__)
def test_every_argument_of_what_is_public_is_described(name):
    value = getattr(persres_lite, name)
    there = {each for line in described(inspect.getdoc(value) or "") for each in line.partition(" : ")[0].split(", ")}
    assert set(inspect.signature(value).parameters) <= {each.lstrip("*") for each in there}
