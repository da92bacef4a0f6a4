"""Docstrings are of one dialect, numpy's, and name what is there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import persres_lite

PACKAGE = Path(persres_lite.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SECTION = re.compile(r"^(\w+)\n-{3,}$", re.MULTILINE)


def documented(path: Path) -> list[tuple[ast.AST, str]]:
    """Each function and class of a file that has a docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))
    return [(node, text) for node in nodes if (text := ast.get_docstring(node))]


def section(text: str, title: str) -> list[str]:
    """The lines of a section that stand at the margin: of Parameters, those with names and types."""
    parts = SECTION.split(inspect.cleandoc(text))
    found = dict(zip(parts[1::2], parts[2::2], strict=True)).get(title, "")
    return [line for line in found.splitlines() if line and not line.startswith(" ")]


def arguments_of(node: ast.AST) -> set[str]:
    """The names that may stand under Parameters or Attributes."""
    if isinstance(node, ast.ClassDef):
        inside = [each for each in ast.walk(node) if isinstance(each, (ast.AnnAssign, ast.Assign, ast.FunctionDef))]
        names = {each.name for each in inside if isinstance(each, ast.FunctionDef)}
        targets = [
            t for each in inside for t in (getattr(each, "targets", None) or [getattr(each, "target", None)]) if t
        ]
        names |= {getattr(t, "id", getattr(t, "attr", "")) for target in targets for t in ast.walk(target)}
        for each in inside:
            names |= arguments_of(each) if isinstance(each, ast.FunctionDef) and each.name == "__init__" else set()
        return names
    given = node.args
    stars = {f"*{given.vararg.arg}"} if given.vararg else set()
    stars |= {f"**{given.kwarg.arg}"} if given.kwarg else set()
    return {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)} | stars


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_parameters_have_a_type_and_are_there(path):
    for node, text in documented(path):
        for title in ("Parameters", "Attributes"):
            for line in section(text, title):
                names, colon, kind = line.partition(" : ")
                assert line.startswith("*") or (colon and kind), f"{node.name}: {line!r} is not `name : type`"
                unknown = set(names.split(", ")) - arguments_of(node)
                assert not unknown, f"{node.name} has no {', '.join(unknown)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_dialect(path):
    for node, text in documented(path):
        assert not re.search(
            r":(func|mod|class|meth|param|returns?):|^\s*(Args|Raises|Returns):$", text, re.MULTILINE
        ), node.name


@pytest.mark.parametrize("name", persres_lite.__all__)
def test_every_argument_of_what_is_public_is_described(name):
    value = getattr(persres_lite, name)
    text = inspect.getdoc(value) or ""
    described = {each for line in section(text, "Parameters") for each in line.partition(" : ")[0].split(", ")}
    described |= {each for line in section(text, "Attributes") for each in line.partition(" : ")[0].split(", ")}
    signature = inspect.signature(value).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    assert {f"{stars.get(each.kind, '')}{each.name}" for each in signature} <= described
