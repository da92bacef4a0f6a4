"""The renderer as judge: what it reads from fresh renders, and that it cannot be pleased by anything else."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data.make import toybox_scores as scores
from data.make.inverse import read
from persres_lite.support.paths import data_dir
from persres_lite.toybox import concepts, world
from persres_lite.toybox.render import draw


@pytest.fixture(scope="module")
def renders():
    """Eight scenes of one toy, each with its picture and what is read from it."""
    rng, found = random.Random("inverse-test"), []
    for index in range(8):
        kind, place = world.CLASSES[index % 10], world.PLACES[index % 8]
        style = world.STYLES[1 + index // 4] if index % 4 == 3 else None
        scene = world.random_view(rng, (world.random_toy(rng, kind),), place, style)
        image = Image.fromarray(draw(scene).image)
        found.append((scene, image, read(image, scene.toys[0], place, style)))
    return found


def test_own_paint_is_ranked_first_on_fresh_renders(renders):
    assert sum(reading.rank == 1 for _, _, reading in renders) >= 7
    for part in ("main", "second", "pattern", "accessory"):
        right = [getattr(reading.toy, part) == getattr(scene.toys[0], part) for scene, _, reading in renders]
        assert sum(right) >= 6, part


def test_the_view_that_is_found_is_the_one_that_was_drawn(renders):
    yaws = [abs(scene.toys[0].yaw - reading.toy.yaw) for scene, _, reading in renders]
    views = [[draw(view).masks[0] > 127 for view in (scene, reading.scene)] for scene, _, reading in renders]
    overlaps = [(one & two).sum() / (one | two).sum() for one, two in views]
    assert np.median(yaws) < 0.1 and np.median(overlaps) > 0.9


def test_another_paint_than_the_drawn_one_is_not_ranked_first(renders):
    firsts = 0
    for scene, image, reading in renders[:3]:
        other = world.near_misses(scene.toys[0])[0]
        asked = read(image, other, scene.place, scene.style)
        assert (asked.scene, asked.error) == (reading.scene, reading.error)  # what is asked for guides no search
        firsts += asked.rank == 1
    assert firsts <= 1


def test_a_toy_that_is_not_there_leaves_a_larger_error(renders):
    rocket = (world.Toy("rocket", "cyan", "pink"),)
    empty = []
    for scene, _, _ in renders[:3]:
        away = Image.fromarray(draw(replace(scene, shift=(0.0, 0.0), toys=rocket)).image)
        empty.append(read(away, scene.toys[0], scene.place, scene.style).error)
    assert np.mean(empty) > 1.5 * np.mean([reading.error for _, _, reading in renders[:3]])


def test_concepts_are_recognized_in_a_reference():
    ranks = []
    for name in ("plum-cat", "comet-rocket"):
        toy, place = concepts.all_shipped()[name]
        image = Image.open(data_dir() / "concepts" / name / "0.png")
        ranks.append(read(image, toy, concepts.views(name, toy, place)[0].place).rank)
    assert min(ranks) == 1


def test_rows_of_the_renderer_as_judge_can_be_written(renders):
    scene, image, reading = renders[0]
    (row,) = json.loads(json.dumps(scores.read_all("one", [image], [scene])))
    assert (row["rank"], row["error"]) == (reading.rank, reading.error)
    assert row["pattern"] == (reading.toy.pattern == scene.toys[0].pattern)


def test_table_of_the_renderer_as_judge_has_shares_and_means():
    row = {"pictures": "somewhere", "kind": "cat", "style": "in sepia", "rank": 1, "main": True}
    row |= {"second": True, "pattern": True, "accessory": True}
    table = scores.judge_table([{**row, "error": 0.1}, {**row, "rank": 4, "main": False, "error": 0.3}])
    assert table[2].replace(" ", "") == "|somewhere|2.000|0.500|2.500|0.500|1.000|1.000|1.000|0.200|"
