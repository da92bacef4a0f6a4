"""The study: what is asked for, methods that leave the base as it was, rows that can be taken up, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from data.make.study import __main__ as command
from data.make.study import methods as m
from data.make.study import report, rows, ways
from data.make.study.judging import PaperJudge, ToyboxJudge, toys_in
from data.make.study.methods import METHODS, Bench, Recipe, fit, learn
from data.make.study.subjects import SCENES, Picture, custom101_subjects, toybox_subjects
from persres_lite import bases, personalize
from persres_lite.masks import disc
from persres_lite.residuals import Residuals
from persres_lite.support.paths import data_dir
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox.world import LONGEST, RESERVED
from tests.helpers import hooks_of, make_concept
from tests.tiny import sample

TOYS = toybox_subjects()
TRAINED = [name for name, method in METHODS.items() if method.kind != "frozen"]


@pytest.fixture
def bench(sd1, monkeypatch):
    """A tiny base whose pictures are 64 wide and drawn in two steps, and trainings of one or two."""
    entry = bases.BASES["sd-1.4"]
    recipe = {**entry.recipe, "steps": 3, "rank": 0.25, "lr": 1e-2}
    monkeypatch.setitem(bases.BASES, "sd-1.4", bases.replace(entry, size=64, steps=2, guidance=4.0, recipe=recipe))
    return Bench(sd1)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Rivals learn for two steps."""
    for name in rows.RIVALS:
        prior = 2 if METHODS[name].paper.prior else 0
        brief = bases.replace(METHODS[name], paper=Recipe(2, 1, 1e-2, prior))
        monkeypatch.setitem(METHODS, name, brief)


def custom101(folder: Path, file: str = "dataset_multiconcept.json") -> Path:
    """CustomConcept101's layout, with two concepts of two small pictures."""
    entries = []
    (folder / "prompts").mkdir(parents=True)
    for kind in ("cat", "dog"):
        place = folder / "benchmark_dataset" / f"pet_{kind}1"
        place.mkdir(parents=True)
        for number, image in enumerate(make_concept(2).images):
            image.save(place / f"{number}.png")
        (folder / "prompts" / f"{kind}.txt").write_text("photo of a {}\n\n{} on the beach\n")
        files = {"instance_data_dir": f"./benchmark_dataset/pet_{kind}1", "prompt_filename": f"prompts/{kind}.txt"}
        entries.append({"class_prompt": kind, **files})
    (folder / "prompts" / "pet_pet.txt").write_text("the {1} beside the {0}\n")
    (folder / "dataset.json").write_text(json.dumps(entries))
    multi = [[*entries, {"prompt_filename_compose": "prompts/pet_pet.txt"}]]
    (folder / "dataset_multiconcept.json").write_text(json.dumps(multi))
    return folder / file


# ------------------------------------------------------------------------------------------------------- subjects


def test_toys_are_those_that_neither_pretraining_nor_the_search_has_seen():
    searched = {toy.paint for toy, _ in shipped.SEARCH.values()}
    assert {subject.toy.paint for subject in TOYS} == RESERVED - searched and len({s.name for s in TOYS}) == 30
    assert [subject.place is not None for subject in TOYS] == [False, True] * 15
    assert len({(bool(subject.place), subject.tokens) for subject in TOYS}) == 4  # no token goes with bias


@pytest.mark.parametrize("scene", SCENES)
def test_prompts_are_short_enough_and_ask_for_a_place_that_no_reference_shows(scene):
    for subject in TOYS[:6]:
        seen = {view.place for view in shipped.views(subject.name, subject.toy, subject.place)}
        pictures = subject.pictures(scene, 6)
        assert pictures == subject.pictures(scene, 8)[:6] and len(set(pictures)) == 6
        assert [picture.noise for picture in pictures] == [1, 1, 1, 1, 2, 2]
        for picture in pictures:
            assert picture.asked["place"] not in seen and (picture.start is not None) == (
                scene in rows.LAYOUTS[:2] + ("border",)
            )
            assert len(picture.text.format("sks toy").split()) <= LONGEST
    assert all(len(s.described.split()) + len("a photo of in front of a brick wall".split()) <= LONGEST for s in TOYS)


def test_in_two_scenes_a_centered_disc_misses_most_of_the_toy():
    judge = ToyboxJudge(data_dir())
    for scene in ("side", "border"):
        pictures = [picture for subject in TOYS[:4] for picture in subject.pictures(scene, 2)]
        toys = judge.where(pictures, [picture.start for picture in pictures])
        inside = (toys * disc((16, 16), 0.25)).sum() / toys.sum()
        assert inside < 0.4, scene


def test_custom_concept_101_is_read_with_entries_of_several_concepts(tmp_path):
    path = custom101(tmp_path)
    cat, dog = custom101_subjects(tmp_path)
    assert (cat.name, str(cat.concepts[0]), len(cat.concepts[0].images)) == ("pet_cat1", "sks cat", 2)
    assert [p.text.format("sks dog") for p in dog.pictures("any", 1)] == ["photo of a sks dog", "sks dog on the beach"]
    (both,) = custom101_subjects(path)
    words = [str(concept) for concept in both.concepts]
    assert (both.name, words) == ("pet_cat1+pet_dog1", ["sks cat", "ktn dog"])
    texts = {p.text.format(*words): p.members for p in both.pictures("any", 1)}
    assert (
        texts["the ktn dog beside the sks cat"] == (0, 1) and texts["ktn dog on the beach"] == (1,) and len(texts) == 5
    )


def test_what_is_no_such_list_is_one_sentence(tmp_path):
    path = custom101(tmp_path, "dataset.json")
    (tmp_path / "prompts" / "dog.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompts.*dog\.txt"):
        custom101_subjects(path)
    path.write_text('{"class_prompt": "cat"}')
    with pytest.raises(ValueError, match=r"dataset\.json"):
        custom101_subjects(path)
    path.write_text('[{"class_prompt": "cat", "instance_data_dir": "benchmark_dataset/pet_cat1"}]')
    with pytest.raises(ValueError, match="pet_cat1"):
        custom101_subjects(path)


# -------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", [*rows.RIVALS, m.RESIDUAL, *rows.LOSSES])
def test_a_method_learns_at_any_strength_and_leaves_the_base_bit_for_bit(method, bench):
    base, concept = bench.base, make_concept(masks=True)
    before = {key: value.clone() for part in (base.unet, base.text_encoder) for key, value in part.state_dict().items()}
    original, hooks = sample(base), hooks_of(base.unet)
    learned = learn(bench, method, concept, 0)
    seen = []
    for scale in (0.0, 0.5, 1.0):
        with learned.attached(scale), torch.no_grad():
            seen.append(sample(base))
    assert torch.equal(seen[0], original)
    assert not torch.equal(seen[1], original) and not torch.equal(seen[2], seen[1])
    bench.clear()
    after = {**base.unet.state_dict(), **base.text_encoder.state_dict()}
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert hooks_of(base.unet) == hooks and torch.equal(sample(base), original)
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())


def test_numbers_of_parameters_by_counting(bench):
    count = {}
    for method in (*rows.RIVALS, m.RESIDUAL):
        count[method] = learn(bench, method, make_concept(), 0).parameters
        bench.clear()
    unet = bench.base.unet
    kv = sum(p.numel() for n, p in unet.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n)
    row = 32  # one token, of the tiny text encoder's width
    assert count[m.RESIDUAL] == count[m.PROJ_OUT] == Residuals(unet, rank=0.25).num_parameters()
    assert count["textual inversion"] == row and count["Custom Diffusion"] == kv + row
    assert count["DreamBooth"] == sum(p.numel() for p in unet.parameters())
    four = count["attention LoRA, rank 4"]
    assert abs(count["attention LoRA, equal parameters"] - count[m.RESIDUAL]) <= four // 8  # a whole rank, the nearest


def test_without_a_prior_the_loop_is_that_of_personalize(bench):
    concept = make_concept()
    right = personalize(bench.base, concept, steps=3, batch_size=2, lr=1e-2, rank=0.25, seed=4, progress=False)
    mine = Residuals(bench.base, rank=0.25, seed=4)
    with mine.attached(bench.base):
        fit(bench.base, concept, list(mine.parameters()), Recipe(3, 2, 1e-2), 4)
    assert all(torch.equal(mine.A[name], right.A[name]) and torch.equal(mine.B[name], right.B[name]) for name in mine.A)


# ----------------------------------------------------------------------------------------------------------- ways


def test_replayed_masks_give_lags_own_picture_and_another_scenes_do_not(bench, tmp_path):
    (subject,) = custom101_subjects(custom101(tmp_path))
    run = ways.Run(bench, subject, m.RESIDUAL, 0)
    cell = [picture for picture in subject.pictures("any", 1) if picture.members == (0,)]

    def drawn(name, cell):
        with torch.no_grad(), ways.WAYS[name](run, cell, cell):
            return [image.tobytes() for image in run.draw(cell)]

    lag = drawn(ways.LAG, cell)
    with torch.no_grad(), ways._with_masks(run, cell, run.masks(cell)):
        assert [image.tobytes() for image in run.draw(cell)] == lag
    assert drawn("swap", cell) != lag


def test_pieces_of_a_mask_are_counted_but_for_crumbs():
    mask = torch.zeros(16, 16)
    mask[2:5, 2:5] = mask[5:8, 5:8] = 1  # they touch at a corner
    mask[12:14, 12:14] = 1
    mask[0, 15] = 1
    assert (toys_in(mask), toys_in(torch.zeros(16, 16))) == (2, 0)


def test_a_reference_has_the_identity_of_one_toy_in_the_place_that_leaks():
    judge, subject = ToyboxJudge(data_dir()), TOYS[1]
    pictures = [Picture("place", "a photo of a {0} at night", 1, {"place": "at night"})] * 4
    scores = pd.DataFrame(judge.score(subject, pictures, subject.concepts[0].images))
    assert scores.identity.min() > 0.7 and (scores.toys == 1).all() and scores.leak.mean() > 0.9
    assert not scores.kept.any() and judge.rank(subject, pictures[0], subject.concepts[0].images[0])["misfit"] < 0.5


# ----------------------------------------------------------------------------------------------------------- rows


class Gray:
    """A judge that gives each picture its darkest and lightest gray, and counts."""

    count = 0

    def where(self, pictures, images):
        return torch.ones(len(images), 16, 16)

    def score(self, subject, pictures, images):
        self.count += len(images)
        return [{"identity": sum(image.convert("L").getextrema()) / 510} for image in images]

    def rank(self, subject, picture, image):
        return {"rank": 1}


LINES = (
    rows.Line((m.FROZEN, m.CLASS_WORD), ("frozen",), ("any",), pictures=1),
    rows.Line((m.RESIDUAL, m.PROJ_OUT, "DreamBooth"), ("whole, x 1", ways.LAG, "disc, half"), ("any",), pictures=1),
)


def plain(found: list[dict]) -> list[str]:
    """Rows without what differs from run to run, in one order."""
    return sorted(json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in found)


def test_rows_are_made_once_by_any_number_of_processes_also_after_a_cut(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(ways.Subject, "place", "somewhere", raising=False)
    units = rows.units_of(LINES, custom101_subjects(custom101(tmp_path / "list")))
    judge, one, two = Gray(), tmp_path / "one", tmp_path / "two"
    rows.run(bench, judge, units, one)
    whole = rows.rows_of(one)
    assert judge.count == len(whole) == 5 * (2 + 3 + 3 + 1)  # DreamBooth cannot be masked
    assert {row["method"] for row in whole} == {name for line in LINES for name in line.methods}
    rows.run(bench, judge, units, one)
    assert judge.count == len(rows.rows_of(one))
    for process in (0, 1):
        rows.run(bench, Gray(), units, two, process, 2)
    assert plain(rows.rows_of(two)) == plain(whole)
    path = one / "rows-0.jsonl"
    path.write_text(path.read_text()[:-3500])  # in the middle of a line
    assert len(rows.rows_of(one)) < len(whole)
    rows.run(bench, Gray(), units, one)
    assert plain(rows.rows_of(one)) == plain(whole)


def test_rows_of_other_weights_are_not_mixed_in(tmp_path):
    rows.keep_to(tmp_path, {"weights": "a", "quick": True})
    rows.keep_to(tmp_path, {"weights": "a", "quick": True})
    with pytest.raises(ValueError, match="weights.*--rows"):
        rows.keep_to(tmp_path, {"weights": "b", "quick": True})


def test_every_line_of_every_study_has_units():
    for name, lines in rows.STUDIES.items():
        units = rows.units_of(lines, TOYS)
        assert units and all(unit.cells for unit in units), name
    cells = {way for unit in rows.units_of(rows.STUDIES["full"], TOYS) for way, _ in unit.cells}
    assert cells == set(ways.WAYS)
    assert {unit.method for unit in rows.units_of(rows.STUDIES["full"], TOYS)} == set(METHODS)


def test_the_papers_protocol_runs_on_a_list_of_concepts(bench, tmp_path, monkeypatch):
    base, data = bench.base, data_dir()
    monkeypatch.setattr(command, "load_base", lambda *_: base)
    judge = PaperJudge(base, clip=data / "toybox-clip", dino=data / "toybox-dino")
    monkeypatch.setattr(command, "judge_of", lambda *_: judge)
    path, out = custom101(tmp_path / "list"), tmp_path / "out"
    given = ["--custom101", str(path), "--base", "sd-1.4", "--rows", str(out), "--processes", "1"]
    command.main([*given, "--methods", m.FROZEN, m.RESIDUAL])
    frame = report.frame_of(rows.rows_of(out))
    assert len(frame) == 5 * (1 + 6) and {"identity", "CLIP-I", "CLIP-T"} <= set(frame)
    assert frame.identity.notna().all() and frame["one toy"].isna().all()
    assert "|residual|LAG|" in (out / "study.md").read_text()


# --------------------------------------------------------------------------------------------------------- report


def test_the_identity_at_a_leak_is_read_off_the_curve_or_is_not_reached():
    curve = pd.DataFrame({"leak": [0.0, 0.02, 0.06, 0.10], "identity": [0.3, 0.5, 0.7, 0.8]})
    assert report.read_off(curve, 0.04) == pytest.approx(0.6) and report.read_off(curve, 0.2) == 0.8
    assert report.read_off(curve, 0.01) is None  # the frozen model itself does not count


def row(method, way, identity, leak=0.1, area=0.2, toys=1, **others):
    """A row of a study as the judge makes it."""
    known = {"concept": "duck", "biased": True, "training": None if method == m.FROZEN else 0, "scene": "place"}
    known |= {"prompt": "a", "noise": 1, "strength": ways.strength_of(way), "area of references": 0.25}
    return (
        known | {"method": method, "way": way, "identity": identity, "leak": leak, "area": area, "toys": toys} | others
    )


def test_one_toy_is_one_no_larger_than_it_should_be():
    sprawl = [row(m.RESIDUAL, ways.LAG, 0.9, toys=2), row(m.RESIDUAL, "swap", 0.9, area=0.5)]
    frame = report.frame_of([row(m.FROZEN, "frozen", 0.3), row(m.RESIDUAL, "whole, x 1", 0.7, area=0.37), *sprawl])
    assert frame["one toy"].tolist() == [1, 1, 0, 0]


def test_means_are_over_concepts_then_trainings_and_differences_are_pairs():
    found = [row(m.RESIDUAL, ways.LAG, value, noise=n) for n, value in enumerate((0.6, 0.8))]
    found += [row(m.RESIDUAL, ways.LAG, 0.1, training=1), row(m.RESIDUAL, ways.LAG, 0.6, concept="mug")]
    found += [row(m.RESIDUAL, "swap", value, noise=n) for n, value in enumerate((0.5, 0.7))]
    frame = report.frame_of(found)
    assert report.means(frame).identity[m.RESIDUAL, ways.LAG] == pytest.approx(((0.7 + 0.1) / 2 + 0.6) / 2)
    difference = report.difference(frame, "identity", *(frame[frame.way == way] for way in (ways.LAG, "swap")))
    assert difference.mean == pytest.approx(0.1) and difference.pictures == 2


def test_quick_study_shows_what_must_hold(tmp_path):
    command.main(["--quick", "--processes", "1", "--rows", str(tmp_path)])
    assert json.loads((tmp_path / "settings.json").read_text())["sampling"]["num_inference_steps"] == m.QUICK_STEPS
    found = report.means(report.frame_of(rows.rows_of(tmp_path))).loc[m.RESIDUAL]
    assert (found.leak[ways.LAG] < found.leak[[way for way in found.index if way in ways.WHOLE]]).all()
    assert found.identity["complement"] < found.identity["swap"] < found.identity[ways.LAG]
    assert found.identity["complement"] + 0.1 < found.identity[ways.LAG]
    for ending in (".md", ".json", "-leakage.png", "-attention.png", "-cost.png"):
        assert (tmp_path / f"study{ending}").stat().st_size > 1000
    assert Image.open(tmp_path / "study-leakage.png").size[0] > 500
