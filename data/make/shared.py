"""What makers share: the machine in words, memory, tables, and files written whole."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from persres_lite.support.files import whole_file

ROOT = Path(__file__).resolve().parents[2]


def between(text: str, name: str, new: str) -> str:
    """`text` with what stands between the two marks called `name` replaced.

    Raises
    ------
    ValueError
        If there is not one mark of each kind.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"there must be one line {begin} and one line {end}")
    return f"{text.split(begin)[0]}{begin}\n{new}\n{end}{text.split(end)[1]}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [" | ".join(map(str, row)) for row in (heads, *rows)]
    return "\n".join(f"| {line} |" for line in lines).replace("\n", f"\n|{'---|' * len(heads)}\n", 1)


def keep(path: Path, results: Any, text: str) -> None:
    """Write results as ``path.json`` and, as a text, ``path.md``, each whole or not at all."""
    for ending, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text)):
        with whole_file(path.with_name(path.name + ending)) as temporary:
            temporary.write_text(content, encoding="utf-8")


def machine() -> str:
    """The machine in words: cores and processor, and the GPU if torch sees one."""
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    words = f"{os.cpu_count()} cores of {found[1].strip() if found else platform.processor() or platform.machine()}"
    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


@contextmanager
def peak(device: torch.device) -> Iterator[list[float]]:
    """The list that it gives holds at its end how many bytes more than before were in use within, at the peak."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    else:
        with suppress(OSError):  # another system than Linux: then loading counts if it needed more than the steps
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = resident_peak()
    yield found
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
    found.append(float(after) - before)


def resident_peak() -> float:
    """The most memory that the process has had, or since `peak` began, in bytes."""
    if found := re.search(r"VmHWM:\s+(\d+) kB", _read("/proc/self/status")):
        return 1024.0 * int(found[1])
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)


def peaks() -> tuple[int, int]:
    """The most bytes that this process has had in memory, and on a GPU if there is one."""
    return int(resident_peak()), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
