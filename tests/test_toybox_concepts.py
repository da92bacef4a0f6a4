"""What personalizing Toybox gives, as a table: arithmetic on rows, rows that are taken up again, and the sheet."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
from PIL import Image

from data.make import toybox_concepts as made
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox.render import draw
from persres_lite.toybox.world import Scene


def row(concept="plum-cat", training=0, identity=0.75, **more):
    """One training's, eight pictures a way and four of them ranked."""
    ways = {"original": 0.5, "residual": identity, "LAG": identity - 0.05}
    scores = {
        way: {
            "identity": [value] * 8,
            made.ALONE: [value] * 8,
            "place": [1.0] * 8,
            "background moved": [0.0] * 8,
            "rank": [1, 4, 1, 3],
        }
        for way, value in ways.items()
    }
    asked = {"original": [0.5] * 8, "residual": [0.5 + (identity - 0.5) / 2] * 8}
    head = {"concept": concept, "training": training, "seconds": 2.0, "CPU seconds": 1.0, "parameters": 10}
    return {**head, "places": ["at night"] * 4, "class word": asked, **scores, **more}


def test_trainings_are_averaged_and_ranks_have_a_median():
    both = made.averaged([row(identity=0.75), row(training=1, identity=0.85, seconds=4.0)])
    assert both["residual"][made.ALONE] == pytest.approx(0.8) and both["seconds"] == 3.0
    assert both["LAG"]["ranked first"] == 0.5 and both["LAG"]["median rank"] == 2.0
    assert both["residual"][made.CLASS_WORD] == pytest.approx(0.5)
    assert made.CLASS_WORD not in made.averaged([row(identity=0.5)])["residual"]  # nothing gained, nothing to divide by


def test_the_table_has_columns_only_for_what_is_known_and_the_notes_say_n():
    rows = [row(name, training) for name in ("plum-cat", "comet-rocket") for training in (0, 1)]
    found = {name: made.averaged(each) for name, each in made.by_concept(rows).items()}
    mean = made.mean_of(list(found.values()))
    first, second = (made._table(found | {"mean": mean}, by_renderer)[0] for by_renderer in (False, True))
    assert "identity: LAG" in first and "seconds" in first and "rank" not in first
    assert f"{made.CLASS_WORD}: residual" in second and f"{made.CLASS_WORD}: LAG" not in second
    assert "median rank: original" in second and "seconds" not in second
    notes = "\n".join(made._notes(rows))
    assert "n: 2 concepts, trainings of each: 2, pictures a training and way: 8" in notes
    assert "residual minus original | 0.250 [0.250, 0.250] | 2 of 2 | 2 concepts, 4 trainings, 32 pictures" in notes


def test_the_renderer_reads_every_place_before_a_second_noise():
    toy = shipped.VARIED["plum-cat"]
    places = ["on the grass", "in the desert"]
    images = [Image.fromarray(draw(Scene((toy,), place, fill=0.7)).image) for place in places for _ in made.SEEDS]
    found = made.by_renderer(images, toy, places, 2)
    assert found["rank"] == [1, 1] and found["pattern read"] == found["accessory read"] == [1.0, 1.0]


def test_rows_are_taken_up_again_and_the_sheet_is_made_of_the_first_training(tmp_path, monkeypatch):
    learned = []
    picture = Image.new("RGB", (128, 128), "red")
    Found = namedtuple("Found", "pictures")

    def learn(base, judge, concept, biased, seed):
        learned.append((seed, concept.name))
        if len(learned) == 3:
            raise KeyboardInterrupt
        scores = {name: value for name, value in row().items() if name not in ("concept", "training")}
        return scores, Found({way: [picture] * 8 for way in made.WAYS}), None

    monkeypatch.setattr(made, "learn", learn)
    monkeypatch.setattr(made, "load_base", lambda name: None)
    monkeypatch.setattr(made, "settings_of", lambda base: made.argparse.Namespace(recipe={}, sampling={}))
    monkeypatch.setattr(made, "weights_of", lambda base, data: "")
    monkeypatch.setattr(made, "Judge", lambda data: None)
    monkeypatch.setattr(made, "of_class_word", lambda *given: [])
    monkeypatch.setattr(made, "alone", lambda *given: [0.5] * 8)
    data = made.Path(__file__).parents[1] / "data"
    with pytest.raises(KeyboardInterrupt):
        made.concepts(data, tmp_path, 2, 0)
    file = tmp_path / "rows.jsonl"
    assert [json.loads(line)["concept"] for line in file.read_text().splitlines()] == ["plum-cat", "tiger-robot"]
    file.write_text(file.read_text() + '{"concept": "flam')  # killed in the middle of a line
    rows = made.concepts(data, tmp_path, 1, 0)
    assert len(rows) == 10 and len(learned) == 3 + 8 and made.rows_in(file) == rows
    assert [seed for seed, _ in learned] == [0] * 11
    sheet = made.concepts_sheet(tmp_path, data)
    assert sheet.width >= 11 * 128 and sheet.height >= 20 * 128
    assert made.concepts(data, tmp_path, 0, 0) == rows
    monkeypatch.setattr(made, "weights_of", lambda base, data: "trained further")
    with pytest.raises(ValueError, match="made with another choice of weights"):
        made.concepts(data, tmp_path, 1, 0)


def test_the_searchs_rule():
    def tried(identity, place):
        return {"LAG": {"identity": identity, "place": place}}

    rows = {
        "100 steps, rate 0.01, rank 0.25": tried(0.95, 0.8),
        "200 steps, rate 0.003, rank 0.25": tried(0.9, 0.95),
        "100 steps, rate 0.003, rank 0.25": tried(0.901, 0.95),
        "100 steps, rate 0.001, rank 0.05": tried(0.9, 1.0),
    }
    assert made.best(rows) == "100 steps, rate 0.001, rank 0.05"
