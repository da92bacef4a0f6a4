"""`make demo` from end to end, with fewer steps."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from persres_lite import Residuals, load_base, load_concept
from persres_lite.bases import BASES, settings_of
from persres_lite.maintain import demo


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(BASES["toybox"].sampling, "num_inference_steps", 2)


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
    for mode in ("original model", "residual everywhere", "LAG"):
        (row,) = re.findall(rf"^{mode} +([\d.]+) +(\S+) +([\d.]+) +(\d) of 4$", printed, re.MULTILINE)
        seconds, identity, moved, right = map(float, row)
        assert seconds > 0 and -1 <= identity <= 1 and 0 <= moved <= 1 and right <= 4
    assert [path.name for path in out.parent.iterdir()] == ["demo.png"], "whole, and nothing beside it"
    assert min(Image.open(out).size) > 400
    assert len(set(places)) == 4 and set(places) <= set(BASES["toybox"].places)
    assert concept.info["biased_place"] not in places, "new places"


def test_all_modes_start_from_the_same_noise(quick):
    base, concept = load_base("toybox"), load_concept(demo.CONCEPT)
    nothing = Residuals(base.unet, rank=1)  # one factor is zero: the original model
    sampling = settings_of(base).sampling
    prompts = [f"a {concept}", f"a photo of a {concept}"]  # the same batch each time: another size rounds otherwise
    comparison = demo.compare(base, nothing, concept, prompts, 0, **sampling)
    first, *others = comparison.pictures.values()
    assert [pictures == first for pictures in others] == [True, True]
    assert first[0] != first[1] and comparison.masks.shape[0] == 2
    with torch.no_grad():
        for A, B in zip(nothing.A.values(), nothing.B.values(), strict=True):
            A.fill_(0.5), B.fill_(0.5)
    changed = demo.compare(base, nothing, concept, prompts, 0, **sampling).pictures
    assert changed["original model"] == first
    assert all(one != other for one, other in zip(first, changed["residual everywhere"], strict=True))
