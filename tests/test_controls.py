"""The experiment behind lesson 05: its scenes, its order, and tables of its rows."""

from __future__ import annotations

import json

import pytest
import torch

from data.make import controls
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox.world import LONGEST


@pytest.mark.parametrize("name", controls.CONCEPTS)
def test_scenes_ask_for_what_no_reference_shows(name):
    toy, place = shipped.all_shipped()[name]
    scenes = controls.scenes_of(name)
    assert [scene.kind for scene in scenes] == ["place"] * 4 + ["side"] * 2 + ["pair"] * 2
    assert len({scene.text for scene in scenes}) == 8 and scenes == controls.scenes_of(name)
    shown = {view.place for view in shipped.views(name, toy, place)}
    assert not shown & {scene.place for scene in scenes}
    assert max(len(scene.text.format(f"sks {toy.kind}").split()) for scene in scenes) <= LONGEST


def test_beside_another_toy_only_its_own_half_is_the_concepts():
    left, right = controls.scenes_of("garden-snowman")[-2:]
    whole = torch.ones(4, 6)
    assert left.own(whole)[:, :3].all() and not left.own(whole)[:, 3:].any()
    assert torch.equal(left.own(whole) + right.own(whole), whole)
    assert torch.equal(controls.Scene("place", "{}").own(whole), whole)


def test_a_run_that_is_stopped_has_all_trainings_of_the_first_concept():
    found = controls.units(["a", "b", "c"], 2)
    assert found == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("b", 1), ("c", 1)]


def rows():
    """One concept, two trainings: the residual gains 0.4 for each 0.1 of leakage, LAG the same for half of that."""
    made = [{"method": "frozen", "way": "original", "scale": 0.0, "training": None, "moved": 0.0, "identity": 0.5}]
    for training in (0, 1):
        each = {"method": "residuals", "training": training}
        for scale in controls.SCALES:
            values = {"moved": 0.1 * scale, "identity": 0.5 + 0.4 * scale}
            made.append(each | {"way": "residual", "scale": scale} | values)
        made.append(each | {"way": "LAG", "scale": 1.0, "moved": 0.05, "identity": 0.9})
    for row in made:
        picture = {"kind": "place", "place": 1.0, "moved": row.pop("moved"), "identity": row.pop("identity")}
        row |= {"concept": "a", "pictures": [picture, picture]}
    return made


def test_tables_hold_gains_against_the_strengths_of_the_residual(tmp_path):
    controls.write(rows(), tmp_path / "controls", draws=20)
    found = json.loads((tmp_path / "controls.json").read_text())
    assert found["about"]["trainings"] == {"a": 2}
    everything = found["scenes"]["all"]
    assert list(everything)[:2] == ["original", "residual, scale 0.25"] and list(everything)[-1] == "LAG"
    assert everything["LAG"]["gain"]["mean"] == pytest.approx(0.2)
    assert (everything["LAG"]["gain"]["trainings"], everything["LAG"]["gain"]["pictures"]) == (2, 4)
    assert found["scenes"]["place"] == everything and found["scenes"]["side"] == {}
    assert "| LAG | 0.900 | 0.050 | 1.000 |" in (tmp_path / "controls.md").read_text()
