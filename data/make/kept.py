"""A plugin of pytest for `make gpu`: what nbval has run is written back into the notebook, with times and failures.

nbval compares and forgets. Here each cell keeps the outputs that it has just given, also after a failure, so that one
run on a GPU gives both the verdict and the executed notebook.
"""

from __future__ import annotations

from typing import Any

import nbformat
import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any):
    """Note what a cell gave, and how long it took."""
    report = (yield).get_result()
    if report.when != "call" or not hasattr(item, "cell_num"):
        return
    book, cell = item.parent.nb, item.cell
    cell.outputs, cell.execution_count = item.test_outputs or [], item.cell_num + 1
    kept = book.metadata.setdefault("persres", {})
    kept["seconds"] = kept.get("seconds", 0) + report.duration
    if report.failed:
        kept.setdefault("failed", []).append([cell.get("id", str(item.cell_num)), _reason(call.excinfo)])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: Any, nextitem: Any) -> None:
    """After a notebook's last cell, write it in the place of the one that was run."""
    if hasattr(item, "cell_num") and (nextitem is None or nextitem.parent is not item.parent):
        nbformat.write(item.parent.nb, item.parent.path)


def _reason(raised: Any) -> str:
    """One line: the error itself, which IPython puts last, or that an output is another one."""
    trace = getattr(raised.value, "inner_traceback", None)
    lines = [line for line in str(trace or raised.value).splitlines() if line.strip()]
    return lines[-1].strip() if trace and lines else str(raised.value).splitlines()[0]
