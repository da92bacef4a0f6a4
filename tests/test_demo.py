"""`make demo` from end to end, with fewer steps."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from data.make import demo
from persres_lite import Residuals, load_base, load_concept
from persres_lite.bases import BASES


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(BASES["toybox"].sampling, "num_inference_steps", 2)
    monkeypatch.setattr(demo, "PLACES", 2)


def test_it_writes_one_picture_and_prints_the_scores(quick, tmp_path, capsys, monkeypatch):
    places, draw = [], demo.draw
    monkeypatch.setattr(demo, "draw", lambda concept, shown, made: places.extend(shown) or draw(concept, shown, made))
    out = tmp_path / "new" / "demo.png"
    assert demo.main(["--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    concept = load_concept(demo.CONCEPT)
    assert f"named “{concept}”" in printed and "2 steps" in printed
    parameters = Residuals(load_base("toybox").unet, rank=BASES["toybox"].recipe["rank"]).num_parameters()
    assert f"{parameters:,} parameters" in printed
    for mode in ("original", "residual", "LAG"):
        (row,) = re.findall(rf"^{mode} +([\d.]+) +(\S+) +([\d.]+) +(\d) of 2$", printed, re.MULTILINE)
        seconds, identity, moved, right = map(float, row)
        assert seconds > 0 and -1 <= identity <= 1 and 0 <= moved <= 1 and right <= 2
    assert [path.name for path in out.parent.iterdir()] == ["demo.png"], "whole, and nothing beside it"
    assert Image.open(out).width > 400
    assert len(set(places)) == 2 and set(places) <= set(BASES["toybox"].places)
    assert concept.info["biased_place"] not in places, "new places"
