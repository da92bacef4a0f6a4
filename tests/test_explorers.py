"""Explorers answer when a control moves: the picture changes as the still figure's would, and no model is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from persres_lite.attention import AttentionRecord
from persres_lite.course import explorers
from persres_lite.course.figures import heat_picture
from persres_lite.masks import RULES

BLOCKS = ["down_blocks.0.attentions.0.proj_out", "mid_block.attentions.0.proj_out"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def record():
    """Two words, three steps, two blocks of different resolution; every map has its peak elsewhere."""
    made = AttentionRecord(words=["sks", "cat"], prompts=["a sks cat"])
    for step in range(3):
        for size, block in zip((8, 4), BLOCKS, strict=True):
            maps = torch.zeros(1, 2, size, size)
            maps[0, 0, step, 0], maps[0, 1, 0, step + 1] = 1.0, 2.0
            made.maps[step, block] = maps
    return made


def test_maps_follow_word_step_and_block(record):
    explorer = explorers.maps(record, PICTURE)
    shown = {}
    for control, value in (("word", "cat"), ("step", 2), ("block", BLOCKS[1])):
        before = explorer.pixels
        explorer.controls[control].value = value
        shown[control] = explorer.pixels
        assert not np.array_equal(before, shown[control]), control
    wanted = heat_picture(
        PICTURE.resize((256, 256), Image.Resampling.LANCZOS), record.map("cat", step=2, block=BLOCKS[1])
    )
    assert np.array_equal(shown["block"], np.asarray(wanted))
    assert "<b>cat</b>: 4 × 4 positions, highest 2.000" in explorer.note.value
    assert [label for label, _ in explorer.controls["block"].options] == ["all", "down 0.0", "mid"]


def test_maps_come_back_where_they_began(record):
    explorer = explorers.maps(record, PICTURE)
    begun = explorer.pixels
    explorer.controls["step"].value = 1
    assert not np.array_equal(explorer.pixels, begun)
    explorer.controls["step"].value = explorers.ALL
    assert np.array_equal(explorer.pixels, begun)


def test_masks_follow_rule_and_option_and_are_scored():
    attention = torch.zeros(8, 8)
    attention[2:4, 2:4] = torch.tensor([[1.0, 0.9], [0.8, 0.4]])
    truth = Image.fromarray((np.kron(attention.numpy() > 0, np.ones((8, 8))) * 255).astype(np.uint8))
    explorer = explorers.masks(PICTURE, attention, truth)
    assert list(explorer.controls["rule"].options) == list(RULES)
    opened = explorer.pixels
    explorer.controls["amount"].value = 1.0
    assert not np.array_equal(explorer.pixels, opened), "the slider serves the rule that it opens on"
    explorer.controls["rule"].value = "threshold"
    explorer.controls["amount"].value = 0.5
    half, said = explorer.pixels, explorer.note.value
    assert "level 0.50: 5% of the picture, IoU 0.75" in said  # 3 of 64 positions, 3 of the 4 true ones
    explorer.controls["amount"].value = 0.3
    assert "6% of the picture, IoU 1.00" in explorer.note.value
    assert not np.array_equal(explorer.pixels, half)
    explorer.controls["rule"].value = "otsu"
    assert "no option" in explorer.note.value


def test_masks_without_truth_give_no_score():
    explorer = explorers.masks(PICTURE, torch.rand(8, 8))
    explorer.controls["rule"].value = "median"
    assert "<b>median</b>, no option: 50% of the picture" in explorer.note.value
    assert "IoU" not in explorer.note.value


def test_compare_shows_the_pictures_of_the_scale():
    colors = {0.0: "black", 0.5: "red", 1.0: "white"}
    pictures = {
        scale: {"residual": Image.new("RGB", (64, 64), color), "LAG": Image.new("RGB", (64, 64), "blue")}
        for scale, color in colors.items()
    }
    explorer = explorers.compare(pictures, references=[Image.new("RGB", (64, 64), "green")])
    assert explorer.pixels[0, 0].tolist() == [0, 0, 0]
    explorer.controls["scale"].value = 0.5
    assert explorer.pixels[0, 0].tolist() == [255, 0, 0]
    assert explorer.pixels[0, 400].tolist() == [0, 0, 255] and explorer.pixels[0, -1].tolist() == [0, 128, 0]
    assert "residual, LAG, reference; scale 0.5" in explorer.note.value
    wide = explorer.pixels.shape[1]
    explorer.controls["reference"].value = False
    assert explorer.pixels.shape[1] < wide


def test_compare_refuses_unequal_scales():
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="same pictures"):
        explorers.compare({0.0: {"LAG": picture}, 1.0: {"residual": picture}})


def test_an_explorer_shows_itself_and_lets_errors_through(record, monkeypatch):
    shown = []
    monkeypatch.setattr(explorers, "display", shown.append)
    explorer = explorers.maps(record, PICTURE)
    explorer._ipython_display_()
    assert shown == [explorer.box]
    record.maps.clear()
    with pytest.raises(ValueError, match="Nothing was recorded"):
        explorer.controls["step"].value = 1
