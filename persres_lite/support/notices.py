"""What the package has to say beside its results, a plain sentence each, and what the libraries need not say."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    others = warnings.formatwarning

    def shown(message: Any, category: type[Warning], *where: Any, **rest: Any) -> str:
        return f"Note: {message}\n" if issubclass(category, Notice) else others(message, category, *where, **rest)

    warnings.formatwarning = shown


def without_torchvision() -> None:
    """Let transformers not say, at every import of diffusers, what it would do if torchvision were there: it is not
    used here.
    """
    remarks = logging.getLogger("transformers.utils.import_utils")
    remarks.addFilter(lambda record: "requires torchvision" not in record.getMessage())


@contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """While this is open, diffusers, transformers and huggingface_hub speak of errors only.

    Parameters
    ----------
    bars : bool
        Whether they may show their bars: a folder is read in a second, and its bars would stay in a notebook.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    speakers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    libraries = (diffusers_logging, transformers_logging)
    drawers = [each for each in libraries if not bars and each.is_progress_bar_enabled()]
    before = [each.level for each in speakers]
    try:
        for speaker in speakers:
            speaker.setLevel(logging.ERROR)
        for drawer in drawers:
            drawer.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")  # of how diffusers calls it
            yield
    finally:
        for speaker, level in zip(speakers, before, strict=True):
            speaker.setLevel(level)
        for drawer in drawers:
            drawer.enable_progress_bar()
