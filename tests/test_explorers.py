"""Explorers answer when a control moves: the picture changes as the still figure's would, and no model is needed."""

from __future__ import annotations

import io

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


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.picture.value)).convert("RGB"))


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
    opened = pixels(explorer)
    for control, value in (("word", "cat"), ("step", 2), ("block", BLOCKS[1])):
        before = pixels(explorer)
        explorer.controls[control].value = value
        assert not np.array_equal(before, pixels(explorer)), control
    wanted = heat_picture(PICTURE, record.map("cat", step=2, block=BLOCKS[1]))
    assert np.array_equal(pixels(explorer), np.asarray(wanted))
    assert "<b>cat</b>: 4 × 4 positions, highest 2.000" in explorer.note.value
    assert [label for label, _ in explorer.controls["block"].options] == ["all", "down 0.0", "mid"]
    for control, value in (("word", "sks"), ("step", explorers.ALL), ("block", explorers.ALL)):
        explorer.controls[control].value = value
    assert np.array_equal(pixels(explorer), opened), "back where it began"


def test_masks_follow_rule_and_option_and_are_scored():
    attention = torch.zeros(8, 8)
    attention[2:4, 2:4] = torch.tensor([[1.0, 0.9], [0.8, 0.4]])
    truth = Image.fromarray((np.kron(attention.numpy() > 0, np.ones((8, 8))) * 255).astype(np.uint8))
    explorer = explorers.masks(PICTURE, attention, truth)
    assert list(explorer.controls["rule"].options) == list(RULES)
    opened = explorer.picture.value
    explorer.controls["amount"].value = 1.0
    assert explorer.picture.value != opened, "the slider serves the rule that it opens on"
    explorer.controls["rule"].value = "threshold"
    explorer.controls["amount"].value = 0.5
    assert "level 0.50: 5% of the picture, IoU 0.75" in explorer.note.value  # 3 of 64 positions, 3 of the 4 true ones
    explorer.controls["rule"].value = "otsu"
    assert "no option" in explorer.note.value


def plain(**colors):
    return {name: Image.new("RGB", (64, 64), color) for name, color in colors.items()}


def test_compare_shows_the_pictures_of_the_scale():
    pictures = {0.0: plain(residual="black", LAG="blue"), 0.5: plain(residual="red", LAG="blue")}
    explorer = explorers.compare(pictures, references=[*plain(thing="green").values()])
    assert pixels(explorer)[0, 0].tolist() == [0, 0, 0]
    explorer.controls["scale"].value = 0.5
    assert pixels(explorer)[0, [0, 600, -1]].tolist() == [[255, 0, 0], [0, 0, 255], [0, 128, 0]]
    assert "residual, LAG, reference; scale 0.5" in explorer.note.value
    wide = pixels(explorer).shape[1]
    explorer.controls["reference"].value = False
    assert pixels(explorer).shape[1] < wide and not explorers.compare(pictures).controls["reference"].value


def test_the_studio_lays_the_mask_over_the_way_that_used_it():
    pictures = dict.fromkeys((0.0, 1.0), plain(residual="red", LAG="blue"))
    shown = explorers.studio(pictures, {scale: torch.eye(8) for scale in pictures})
    before = pixels(shown)
    shown.controls["mask"].value = True
    after, half = pixels(shown), before.shape[1] // 2
    assert (after[:, half:] != before[:, half:]).any() and "acted most often" in shown.note.value
    assert (after[:, : half - 10] == before[:, : half - 10]).all(), "the residual's has none"
    shown.controls["scale"].value = 1.0
    assert "scale 1" in shown.note.value


def test_an_explorer_shows_itself_and_lets_errors_through(record, monkeypatch):
    shown = []
    monkeypatch.setattr(explorers, "display", shown.append)
    explorer = explorers.maps(record, PICTURE)
    explorer._ipython_display_()
    assert shown == [explorer.box]
    record.maps.clear()
    with pytest.raises(ValueError, match="recorded"):
        explorer.controls["step"].value = 1
