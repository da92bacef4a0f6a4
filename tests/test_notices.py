"""What the package has to say beside its results: a sentence, once, and not in the way of other warnings."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from persres_lite.support.notices import Notice, tell


def test_a_sentence_is_said_once():
    with pytest.warns(Notice, match="make it larger") as heard:
        for _ in range(168):
            tell("cat.png is small: make it larger.")
        tell("dog.png is small: make it larger.")
    assert len(heard) == 2


def test_whoever_does_not_want_to_hear_them_can_say_so():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore", UserWarning)
        tell("cat.png is small.")
    assert not heard


def test_a_lesson_shows_the_sentence_alone():
    """In a process of its own; warnings of others keep their file, line and kind."""
    code = """
import warnings, persres_lite.course
from persres_lite.support.notices import tell
tell("cat.png is small: make it larger.")
warnings.warn("another one", DeprecationWarning)"""
    place = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=place, capture_output=True, text=True)
    first, *others = done.stderr.splitlines()
    assert first == "Note: cat.png is small: make it larger."
    assert "DeprecationWarning: another one" in others[0]
