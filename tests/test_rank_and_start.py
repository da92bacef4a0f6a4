"""The command behind lesson 02's table: what it trains, how rows become means and pairs, how it goes on."""

from __future__ import annotations

import json

from data.make import rank_and_start

RECIPE = {"steps": 100, "batch_size": 4, "lr": 3e-3, "rank": 0.25}
ABOUT = {"recipe": RECIPE, "fingerprint": "0f"}


def row(start="zero", rank=0.25, seed=0, concept="cricket-car", identity=0.5):
    measures = dict.fromkeys(rank_and_start.MEASURES, 0.0) | {"identity": identity}
    return {"concept": concept, "start": start, "rank": rank, "seed": seed, **measures}


def test_the_starts_come_first_and_no_training_twice():
    cells = list(rank_and_start.plan(RECIPE))
    assert len(cells) == 2 * 2 * 3 + 2 * 3 * 3 and len({(*cell, type(cell[2])) for cell in cells}) == len(cells)
    assert {rank for _, _, rank, _ in cells[:12]} == {0.25} and {init for _, init, _, _ in cells[:12]} == {
        "lora",
        "random",
    }
    assert all(init == "lora" and rank != 0.25 for _, init, rank, _ in cells[12:])


def test_the_rank_of_one_direction_is_not_that_of_all():
    rows = [row(rank=1, identity=0.2), row(rank=1.0, identity=0.8), row(rank=1.0, seed=1, identity=0.6)]
    assert rank_and_start.mean_and_spread(rows, "zero", 1)["identity"][0] == 0.2
    mean, spread, number = rank_and_start.mean_and_spread(rows, "zero", 1.0)["identity"]
    assert (round(mean, 6), round(spread, 3), number) == (0.7, 0.141, 2)
    text = rank_and_start.table(rows, RECIPE)
    assert "| zero | 1 | 1 | 0.200 | " in text and "| zero | 100 % | 2 | 0.700 ± 0.141 | " in text


def test_starts_are_compared_in_pairs_of_one_rank():
    rows = [row(), row("random", identity=0.6), row(seed=1), row(rank=1, identity=0.1), row("random", seed=2)]
    assert [round(value, 6) for value in rank_and_start.differences(rows, "identity")] == [0.1]
    text = rank_and_start.table(rows, RECIPE)
    assert "| zero | 25 % | 2 | 0.500 ± 0.000 |" in text and "| zero | 1 | 1 | 0.100 | " in text
    assert "- identity: +0.100" in text


def test_rows_of_the_same_recipe_and_weights_are_kept(tmp_path):
    rank_and_start.save(tmp_path, ABOUT, [row()])
    path = tmp_path / "toybox-rank-and-start.json"
    assert rank_and_start.known(path, ABOUT) == [row()] == json.loads(path.read_text())["rows"]
    assert rank_and_start.known(path, ABOUT | {"fingerprint": "ff"}) == []
    assert rank_and_start.known(tmp_path / "none.json", ABOUT) == []
