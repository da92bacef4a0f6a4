"""How much code there is: lines without blanks, comments and docstrings, beside how many there should be at most.

`make size` prints the table. The numbers say what "small" means here and fail nothing.
"""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {  # patterns, what should be there at most, and what was before the third plan
    "the page `method.py`": (["persres_lite/method.py"], 110, "-"),
    "core, `persres_lite/*.py`": (["persres_lite/*.py"], 1600, 2836),
    "the wheel, `persres_lite/`": (["persres_lite/**/*.py"], 4600, 6947),
    "makers and tools": (["data/**/*.py", "notebooks/**/*.py"], 3000, 5446),
    "tests": (["tests/*.py"], 6000, 9596),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}


@functools.cache
def code_lines(text: str) -> set[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def longest(text: str) -> tuple[int, int]:
    """Code lines of the longest function, and the most arguments that one takes."""
    lines, found = code_lines(text), [(0, 0)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found.append((len(lines & set(range(node.lineno, node.end_lineno + 1))), len(arguments)))
    return max(number for number, _ in found), max(number for _, number in found)


def test_lines_are_counted():
    text = '"""What it is.\n\nMore."""\n\n# why\ndef f(a, *, b):\n    """Doc."""\n'
    text += '    x = """two\n    lines"""\n    return x\n'
    assert sorted(code_lines(text)) == [6, 8, 9, 10]
    assert longest(text) == (4, 2)


def test_the_sizes_are_printed():
    print(f"\n{'code lines':32}{'now':>8}{'at most':>10}{'before':>10}")
    for name, (patterns, most, before) in BUDGETS.items():
        paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
        print(f"{name:32}{sum(len(code_lines(path.read_text())) for path in paths):>8}{most:>10}{before:>10}")
    paths = [path for part in ("persres_lite", "data", "notebooks") for path in (ROOT / part).rglob("*.py")]
    sizes = [longest(path.read_text()) for path in paths]
    print(f"{'longest function':32}{max(size for size, _ in sizes):>8}{50:>10}{104:>10}")
    print(f"{'most arguments':32}{max(size for _, size in sizes):>8}{10:>10}{17:>10}")
