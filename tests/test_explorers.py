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
    for control, value in (("word", "sks"), ("step", explorers.ALL), ("block", explorers.ALL)):
        explorer.controls[control].value = value
    assert np.array_equal(explorer.pixels, explorers.maps(record, PICTURE).pixels), "back where it began"


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


def test_the_studio_shows_the_mask_only_over_the_way_that_used_it():
    pictures = {
        scale: {"residual": Image.new("RGB", (64, 64), "red"), "LAG": Image.new("RGB", (64, 64), "blue")}
        for scale in (0.0, 1.0)
    }
    shown = explorers.studio(pictures, {scale: torch.eye(8) for scale in pictures})
    plain = shown.pixels
    shown.controls["mask"].value = True
    assert (shown.pixels != plain).any() and "acted most often" in shown.note.value
    shown.controls["way"].value = "residual"
    assert (shown.pixels == np.array([255, 0, 0])).all()
    shown.controls["scale"].value = 1.0
    assert "scale 1" in shown.note.value


def test_an_explorer_shows_itself_and_lets_errors_through(record, monkeypatch):
    shown = []
    monkeypatch.setattr(explorers, "display", shown.append)
    explorer = explorers.maps(record, PICTURE)
    explorer._ipython_display_()
    assert shown == [explorer.box]
    record.maps.clear()
    with pytest.raises(ValueError, match="Nothing was recorded"):
        explorer.controls["step"].value = 1
