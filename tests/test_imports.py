"""The plan of the house: what is importable from the top, and which room imports which."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import persres_lite

PACKAGE = Path(persres_lite.__file__).parent
#: Apart from the core, which never imports them.
APART = {"toybox", "maintain"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports() -> dict[str, set[str]]:
    """By room (a module, or a whole subpackage): which other rooms it imports anywhere, also inside functions."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("persres_lite"):
                parts = node.module.split(".")
                names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("persres_lite.")}
        rooms = {each for each in names if (PACKAGE / each).exists() or (PACKAGE / f"{each}.py").exists()}
        found.setdefault(room, set()).update(rooms - {room})
    return found


def test_imports_have_no_circles():
    order = list(TopologicalSorter(imports()).static_order())  # raises CycleError with the circle
    assert order.index("projections") < order.index("residuals") < order.index("localize")


def test_the_core_never_imports_what_stands_apart():
    for room, others in imports().items():
        if room not in APART:
            assert not others & APART, f"{room} imports {others & APART}"


def test_the_import_is_instant():
    """Nothing heavy is loaded until a name is used."""
    code = "import sys, persres_lite; print([name for name in ('torch', 'diffusers', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", persres_lite.__all__)
def test_every_name_at_the_top_is_there(name):
    assert callable(getattr(persres_lite, name))
    assert name in dir(persres_lite)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'personalise'"):
        _ = persres_lite.personalise
