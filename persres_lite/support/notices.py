"""What the package has to say beside its results: one plain sentence each, said once."""

from __future__ import annotations

import logging
import warnings
from typing import Any

_said: set[str] = set()


class Notice(UserWarning):
    """A remark of this package that its reader can act on."""


def tell(sentence: str) -> None:
    """Warn with one sentence, once a process: Python's own memory of what was said is lost whenever filters change."""
    if sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, Notice, stacklevel=3)


def plainly() -> None:
    """From now on a notice is shown as its sentence alone; other warnings keep their file, line and category."""
    if warnings.formatwarning is not _format:
        global _others
        _others, warnings.formatwarning = warnings.formatwarning, _format


_others: Any = warnings.formatwarning


def _format(message: Any, category: type[Warning], *where: Any, **rest: Any) -> str:
    return f"Note: {message}\n" if issubclass(category, Notice) else _others(message, category, *where, **rest)


def without_torchvision() -> None:
    """Let transformers not say, at every import of diffusers, what it would do if torchvision were there: it is not
    used here.
    """
    logging.getLogger("transformers.utils.import_utils").addFilter(_of_use)


def _of_use(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()
