"""The evaluation's machinery: subjects, methods that leave the base as it was, rows that can be taken up, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from data.make import evaluate, runs
from data.make.evaluation import ablations, judging, methods, subjects, tables, ways, work
from data.make.evaluation.methods import METHODS, Bench, Recipe, Trained, fit, train
from persres_lite import bases, evaluation, personalize
from persres_lite.residuals import Residuals
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox import render
from persres_lite.toybox.world import LONGEST, RESERVED, Scene, vocabulary
from tests.helpers import hooks_of, make_concept
from tests.tiny import sample

ROOT = Path(__file__).resolve().parents[1]


@cache
def toybox() -> list[subjects.Pair]:
    """The first four concepts, photographed when a test first needs them."""
    return subjects.toybox_pairs(4)


# ------------------------------------------------------------------------------------------------------- subjects


def test_toys_are_those_that_neither_pretraining_nor_the_search_has_seen():
    items = [item for pair in subjects.toybox_toys() for item in pair]
    paints = [toy.paint for _, toy, _ in items]
    searched = {toy.paint for toy, _ in shipped.SEARCH.values()}
    assert len(set(paints)) == len(paints) == 30 and set(paints) == RESERVED - searched
    assert {paint[0] for paint in paints} == {paint[0] for paint in RESERVED}
    assert len({name for name, _, _ in items}) == len(items)
    assert sum(place is not None for _, _, place in items) * 2 == len(items)


def test_a_pair_is_told_apart_by_class_and_token_and_no_token_goes_with_bias():
    assert all(one[1].kind != other[1].kind for one, other in subjects.toybox_toys())
    for one, other in toybox():
        assert one.concept.token != other.concept.token
    assert len({(subject.biased, subject.concept.token) for pair in toybox() for subject in pair}) == 4


def test_what_is_held_out_is_the_same_toy_seen_anew():
    subject = toybox()[0][0]
    known = {image.tobytes() for image in subject.concept.images}
    held_out = {image.tobytes() for image in subject.held_out.images}
    assert (len(known), len(held_out)) == (subjects.REFERENCES, subjects.HELD_OUT) and not known & held_out
    assert len(subject.held_out.masks) == 2 and len(subject.others.images) == subjects.OTHERS
    ((again,),) = subjects.toybox_pairs(1)
    assert [image.tobytes() for image in again.concept.images] == [i.tobytes() for i in subject.concept.images]


def test_prompts_are_of_six_types_and_ask_for_what_no_reference_shows():
    for subject in (subject for pair in toybox() for subject in pair):
        kinds = [prompt.kind for prompt in subject.prompts]
        assert kinds.count("place") == 4 and set(subjects.KINDS[:5]) <= set(kinds)
        sides = [(p.asked["side"], p.left) for p in subject.prompts if p.kind == "off center"]
        assert sides == [("on the left", False), ("on the right", False)]
        for prompt in subject.prompts:
            words = prompt.text.format("sks toy", "zwx toy")
            assert "sks toy" in words and ("zwx toy" in words) == (prompt.kind == "two concepts")
            assert prompt.left == (prompt.kind in subjects.BESIDE)
        assert [p.kind for p in subject.drift] == ["class word"] * 2 + ["unrelated"] * 2
        assert not any("{0}" in p.text or "sks" in p.text for p in subject.drift)
        assert all((subject.toy.kind in p.text) == (p.kind == "class word") for p in subject.drift)
    first, second = toybox()[0]
    assert "two concepts" in [p.kind for p in first.prompts] and "two concepts" not in [p.kind for p in second.prompts]


def test_every_prompt_is_short_enough_to_be_read_to_its_end():
    """The text encoder was trained on captions of so many words, and cuts off what is longer."""
    for pair in toybox():
        for subject, partner in (pair, pair[::-1]):
            for words in ((str(subject.concept), str(partner.concept)), (subject.described, partner.briefly)):
                lengths = {len(prompt.text.format(*words).split()) for prompt in subject.prompts}
                assert max(lengths) <= LONGEST


def test_fewer_concepts_are_the_first_ones():
    three = subjects.toybox_pairs(3)
    assert [len(pair) for pair in three] == [2, 1]
    assert [any(p.kind == "two concepts" for p in pair[0].prompts) for pair in three] == [True, False]
    assert [s.concept.name for pair in three for s in pair] == [s.concept.name for p in toybox() for s in p][:3]


def custom101(folder: Path) -> Path:
    """CustomConcept101's layout, with two concepts of two small pictures."""
    entries = []
    for index, kind in enumerate(("cat", "dog"), start=1):
        place = folder / "benchmark_dataset" / f"pet_{kind}{index}"
        place.mkdir(parents=True)
        for number, image in enumerate(make_concept(2).images):
            image.save(place / f"{number}.png")
        (folder / "prompts").mkdir(exist_ok=True)
        (folder / "prompts" / f"{kind}.txt").write_text("Photo of a {}.\n\n{} on the beach\n")
        entries.append(
            {
                "instance_prompt": f"photo of a <new{index}> {kind}",
                "class_prompt": kind,
                "instance_data_dir": f"./benchmark_dataset/pet_{kind}{index}",
                "class_data_dir": f"./regularization/pet_{kind}",
                "prompt_filename": f"prompts/{kind}.txt",
            }
        )
    (folder / "prompts" / "pet_pet.txt").write_text("the {1} beside the {0}\n")
    (folder / "dataset.json").write_text(json.dumps(entries))
    multi = [[*entries, {"prompt_filename_compose": "prompts/pet_pet.txt"}]]
    (folder / "dataset_multiconcept.json").write_text(json.dumps(multi))
    return folder / "dataset.json"


def test_custom_concept_101_is_read(tmp_path):
    (cat,), (dog,) = subjects.custom101_pairs(custom101(tmp_path))
    assert (cat.concept.name, str(cat.concept), len(cat.concept.images)) == ("pet_cat1", "sks cat", 2)
    assert [prompt.text.format("sks dog", "") for prompt in dog.prompts] == [
        "Photo of a sks dog.",
        "sks dog on the beach",
    ]
    ((one, two),) = subjects.custom101_pairs(tmp_path / "dataset_multiconcept.json")
    assert one.prompts[-1].text.format(str(one.concept), str(two.concept)) == "the ktn dog beside the sks cat"
    assert [prompt.kind for prompt in (*one.prompts, *two.prompts)] == ["any", "any", "two concepts", "any", "any"]
    assert len(subjects.custom101_pairs(tmp_path / "dataset.json", 1)) == 1


def test_what_is_no_such_list_is_one_sentence(tmp_path):
    path = custom101(tmp_path)
    (tmp_path / "prompts" / "dog.txt").unlink()
    with pytest.raises(FileNotFoundError, match="There are no prompts"):
        subjects.custom101_pairs(path)
    path.write_text('{"class_prompt": "cat"}')
    with pytest.raises(ValueError, match="no list of concepts"):
        subjects.custom101_pairs(path)


# -------------------------------------------------------------------------------------------------------- methods

SHORT = Recipe(2, 1, 1e-2)


def small(base, monkeypatch):
    """The settings of a base whose pictures are 64 wide and drawn in two steps."""
    entry = bases.BASES["sd-1.4"]
    sampling = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    recipe = {**entry.recipe, "rank": 0.25}
    tiny = bases.replace(entry, size=64, sampling=sampling, recipe=recipe)
    monkeypatch.setitem(bases.BASES, "sd-1.4", tiny)
    return Bench(base)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_at_any_strength_and_leaves_the_base_bit_for_bit(method, sd1, monkeypatch):
    bench, concept = small(sd1, monkeypatch), make_concept()
    before = {
        name: value.clone() for name, value in [*sd1.unet.state_dict().items(), *sd1.text_encoder.state_dict().items()]
    }
    modules = [type(module) for module in sd1.unet.modules()]
    original, hooks = sample(sd1), hooks_of(sd1.unet)
    trained = train(bench, method, concept, 0, bases.replace(SHORT, prior=2 if "prior" in method else 0))
    assert torch.equal(sample(sd1), original)
    with trained.attached(0.0):
        assert torch.equal(sample(sd1), original)
    with trained.attached(0.5):
        half = sample(sd1)
    with trained.attached(1.0):
        whole = sample(sd1)
    assert not torch.equal(half, original) and not torch.equal(whole, half)
    assert torch.equal(sample(sd1), original)
    bench.clear()
    after = {**sd1.unet.state_dict(), **sd1.text_encoder.state_dict()}
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in sd1.unet.modules()] == modules and hooks_of(sd1.unet) == hooks
    assert not any(parameter.requires_grad for parameter in sd1.unet.parameters())
    assert trained.parameters > 0 and trained.seconds > 0 and trained.peak >= 0


def test_numbers_of_parameters_by_counting(sd1, monkeypatch):
    bench, concept = small(sd1, monkeypatch), make_concept()
    count = {method: train(bench, method, concept, 0, bases.replace(SHORT, steps=1)).parameters for method in METHODS}
    bench.clear()
    residuals = Residuals(sd1, rank=0.25).num_parameters()
    kv = sum(p.numel() for n, p in sd1.unet.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n)
    row = 32  # one token, of the tiny text encoder's width
    assert count["residuals"] == count["residuals, prior"] == count["proj_out LoRA"] == residuals
    assert count["textual inversion"] == row and count["Custom Diffusion"] == kv + row
    assert count["DreamBooth"] == sum(p.numel() for p in sd1.unet.parameters())
    four = count["attention LoRA, rank 4"]
    assert count["attention LoRA, equal parameters"] % (four // 4) == 0  # a whole rank, the nearest one
    assert abs(count["attention LoRA, equal parameters"] - residuals) <= four // 8


def test_without_a_prior_the_loop_is_that_of_personalize(sd1, monkeypatch):
    small(sd1, monkeypatch)
    concept, steps = make_concept(), 3
    right = personalize(sd1, concept, steps=steps, batch_size=2, lr=1e-2, rank=0.25, seed=4, progress=False)
    mine = Residuals(sd1, rank=0.25, seed=4)
    with mine.attached(sd1):
        fit(sd1, concept, list(mine.parameters()), Recipe(steps, 2, 1e-2), 4)
    assert all(torch.equal(mine.A[name], right.A[name]) and torch.equal(mine.B[name], right.B[name]) for name in mine.A)


def test_pictures_of_the_class_are_learned_from_too(sd1, monkeypatch):
    bench, concept = small(sd1, monkeypatch), make_concept()
    assert bench.pictures_of("cat", 3)[:2] == bench.pictures_of("cat", 2)
    plain = train(bench, "residuals", concept, 0, bases.replace(SHORT, steps=1)).residuals
    kept = train(bench, "residuals, prior", concept, 0, bases.replace(SHORT, steps=1, prior=2)).residuals
    name = next(iter(plain.A))
    assert not torch.equal(plain.A[name] @ plain.B[name], kept.A[name] @ kept.B[name])


def test_two_concepts_stand_in_one_picture_whatever_the_method(sd1, monkeypatch):
    bench = small(sd1, monkeypatch)
    cat, dog = make_concept(), make_concept(macro_class="dog", token="red")
    prompt = "a photo of a sks cat and a red dog"
    for method in ("DreamBooth", "attention LoRA, rank 4"):
        one, two = (train(bench, method, concept, 0, SHORT) for concept in (cat, dog))
        alone = []
        for each in (one, two):
            with each.attached(1.0):
                alone.append(sample(sd1, prompt))
        with one.attached(1.0), two.attached(1.0):
            both = sample(sd1, prompt)
        original = sample(sd1, prompt)
        assert not any(torch.equal(both, other) for other in (*alone, original))
        bench.clear()


def test_half_precision_and_unknown_methods_are_refused(sd1):
    with pytest.raises(ValueError, match="Unknown method 'magic'"):
        train(Bench(sd1), "magic", make_concept(), 0, SHORT)
    sd1.unet.to(torch.bfloat16)
    with pytest.raises(ValueError, match="half precision"):
        train(Bench(sd1), "residuals", make_concept(), 0, SHORT)


def test_a_disc_takes_its_share():
    for share in (0.25, 0.5):
        mask = ways.disc(16, share)
        assert abs(mask.mean().item() - share) < 0.04 and mask[7:9, 7:9].min() == 1 and mask[0, 0] == 0


# ----------------------------------------------------------------------------------------------------------- rows


class Counting:
    """A judge that gives each picture its mean gray, and counts."""

    def __init__(self):
        self.calls = 0

    def masks(self, images, prompts):
        return torch.ones(len(images), 4, 4)

    def ruler(self, subject):
        return {}

    def score(self, subject, prompts, images, frozen):
        self.calls += 1
        return [
            {
                "kind": p.kind,
                "prompt": p.text,
                "identity": round(float(torch.tensor(i.convert("L").getextrema()).sum()), 4),
            }
            for (p, _), i in zip(prompts, images, strict=True)
        ]


def plan(**options) -> work.Plan:
    recipes = dict.fromkeys(METHODS, SHORT)
    given = {"trainings": 1, "seeds": 1, "scales": (1.0,), "controls": ("Otsu", "complement", "disc, half")}
    return work.Plan(("textual inversion", "residuals", "proj_out LoRA"), recipes, **given | options)


def plain(rows: list[work.Row]) -> list[work.Row]:
    return [{name: value for name, value in row.items() if name not in work.CLOCKS} for row in rows]


@pytest.fixture
def tried(tmp_path, sd1, monkeypatch):
    """A bench, two concepts that also stand together, and a folder for rows."""
    custom101(tmp_path)
    return small(sd1, monkeypatch), subjects.custom101_pairs(tmp_path / "dataset_multiconcept.json"), tmp_path / "rows"


def test_every_way_gives_one_row_and_done_ones_are_not_done_again(tried):
    bench, pairs, folder = tried
    judge = Counting()
    work.run(bench, judge, pairs, plan(), folder)
    rows = work.rows_of(folder)
    assert judge.calls == len(rows) == 2 * (2 + 1 + (2 + 3) + 2)
    assert {tables.label(row) for row in rows} >= {"frozen, class word", "residuals + LAG, Otsu", "proj_out LoRA + LAG"}
    assert all(len(row["pictures"]) == (3 if row["concept"] == "pet_cat1" else 2) for row in rows)
    work.run(bench, judge, pairs, plan(), folder)
    assert judge.calls == len(rows) == len(work.rows_of(folder))


def test_a_run_that_was_killed_goes_on_to_the_same_rows(tried):
    bench, pairs, folder = tried
    work.run(bench, Counting(), pairs, plan(), folder)
    whole = work.rows_of(folder)
    path = folder / "rows-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9]) + lines[9][:40])  # in the middle of a line
    assert len(work.rows_of(folder)) == 9
    judge = Counting()
    work.run(bench, judge, pairs, plan(), folder)
    assert plain(work.rows_of(folder)) == plain(whole) and judge.calls == len(whole) - 9


def test_shares_of_several_processes_make_up_the_rows_of_one(tried):
    bench, pairs, folder = tried
    work.run(bench, Counting(), pairs, plan(), folder / "one")
    for process in range(2):
        work.run(bench, Counting(), pairs, plan(), folder / "two", process, 2)
    one, two = work.rows_of(folder / "one"), work.rows_of(folder / "two")
    assert plain(one) == plain(two) and len(list((folder / "two").glob("rows-*.jsonl"))) == 2


def test_no_method_falls_to_one_process_alone():
    units = [work.Unit(pair, method, 0) for pair in [*toybox(), *toybox()] for method in METHODS]
    shares = [work.share_of(units, len(METHODS), process, 2) for process in range(2)]
    assert len(shares[0]) == len(shares[1]) and all(unit in shares[0] + shares[1] for unit in units)
    for share in shares:
        assert {unit.method for unit in share} == set(METHODS)


def test_rows_of_two_kinds_do_not_mix(tmp_path):
    first = {"base": "toybox", "recipes": {"residuals": {"steps": 100}}}
    work.keep_to(tmp_path, first)
    work.keep_to(tmp_path, first | {"recipes": {"DreamBooth": {"steps": 50}}})  # another method beside it
    work.keep_to(tmp_path, first)
    with pytest.raises(ValueError, match="another choice of recipes: choose another --rows"):
        work.keep_to(tmp_path, first | {"recipes": {"DreamBooth": {"steps": 60}}})
    with pytest.raises(ValueError, match="another choice of base"):
        work.keep_to(tmp_path, first | {"base": "sd-1.4"})


# --------------------------------------------------------------------------------------------------------- tables


def row(concept, training, method, way, scale, identity, moved, **more):
    pictures = [{"kind": "place", "identity": i, "moved": m} for i, m in zip(identity, moved, strict=True)]
    return {
        "concept": concept,
        "training": training,
        "method": method,
        "way": way,
        "scale": scale,
        "pictures": pictures,
    } | more


def made_by_hand() -> list[work.Row]:
    rows = []
    for concept in ("cat", "car"):
        rows.append(row(concept, None, "frozen", "rare token", 0.0, [0.5, 0.5], [0.0, 0.0]))
        rows.append(row(concept, None, "ruler", "held-out references", 1.0, [0.9], [None]))
        rows.append(row(concept, None, "ruler", "others of the class", 1.0, [0.5], [None]))
        for training in (0, 1):
            cost = {"parameters": 10, "seconds": 2.0, "peak": 1e6}
            rows.append(row(concept, training, "residuals", "everywhere", 0.5, [0.6, 0.6], [0.1, 0.1], **cost))
            rows.append(row(concept, training, "residuals", "everywhere", 1.0, [0.7, 0.7], [0.2, 0.2], **cost))
            rows.append(row(concept, training, "residuals", "LAG", 1.0, [0.7, 0.68], [0.1, 0.1], **cost))
    return rows


def test_tables_by_hand(tmp_path):
    found = tables.tables_of(made_by_hand(), draws=20)
    lag = found["methods"]["residuals + LAG"]
    assert lag["identity"]["mean"] == pytest.approx(0.69) and lag["on the ruler"] == pytest.approx((0.69 - 0.5) / 0.4)
    assert (lag["identity"]["concepts"], lag["identity"]["trainings"], lag["identity"]["pictures"]) == (2, 4, 8)
    # LAG leaks 0.1, where the residual at half its strength has 0.6.
    assert found["at equal leakage"]["residuals + LAG"]["mean"] == pytest.approx(0.09)
    assert found["LAG minus residual"]["place"]["identity"]["mean"] == pytest.approx(-0.01)
    assert found["curves"]["residuals"]["0.5"]["moved"]["mean"] == pytest.approx(0.1)
    tables.write(made_by_hand(), plan(), tmp_path / "made", "python -m this", draws=5)
    text, numbers = (tmp_path / "made.md").read_text(), json.loads((tmp_path / "made.json").read_text())
    assert "`python -m this`" in text and runs.commit() in text and "| residuals + LAG | +0.090" in text
    assert "2 concepts, 4 trainings, 8 pictures" in text and numbers["about"]["command"] == "python -m this"


def test_what_a_mask_gains_beyond_a_disc_is_counted_in_the_same_pictures():
    """A disc of the same leakage and 0.05 less identity; in one concept it was not drawn."""
    rows = made_by_hand()
    for each in [each for each in rows if each["way"] == "LAG" and each["scale"] == 1.0]:
        worse = [picture | {"identity": picture["identity"] - 0.05} for picture in each["pictures"]]
        rows.append(each | {"way": "LAG, disc, half", "pictures": worse})
    found = tables.tables_of(rows, draws=5)
    more = found["against a disc"]["residuals + LAG"]["disc, half"]
    assert more["mean"] == more["low"] == more["high"] == pytest.approx(0.05) and more["concepts"] == 2
    assert set(found["against a disc"]) == {"residuals + LAG"}
    text = tables.markdown(found, tables.about_of("", rows), plan())
    assert "| residuals + LAG | +0.050 [+0.050, +0.050] (2) |  |" in text
    two = [picture | {"kind": "two concepts"} for picture in rows[0]["pictures"][:1]]
    with_two = [each | {"pictures": [*each["pictures"], *two]} for each in rows]
    assert tables.tables_of(with_two, draws=5)["against a disc"]["residuals + LAG"]["disc, half"] == more
    fewer = [each for each in rows if (each["concept"], each["way"]) != ("car", "LAG, disc, half")]
    assert tables.tables_of(fewer, draws=5)["against a disc"]["residuals + LAG"]["disc, half"]["concepts"] == 1


def test_a_table_says_of_which_commits_its_rows_are():
    now = runs.commit()
    whole = tables.head_of(tables.about_of("this", [{"commit": now}, {"commit": now}]))
    assert len(whole) == 1 and now in whole[0]
    mixed = tables.head_of(tables.about_of("this", [{"commit": now}, {"commit": "abc"}, {}]))
    assert "abc" in mixed[1] and "an earlier one" in mixed[1]


def test_tables_of_a_run_that_was_cut_short():
    rows = [r for r in made_by_hand() if (r["concept"], r["training"], r["way"]) != ("car", 1, "everywhere")]
    found = tables.tables_of(rows, draws=5)
    assert found["at equal leakage"]["residuals + LAG"]["trainings"] == 3
    assert found["LAG minus residual"]["place"]["identity"]["trainings"] == 3
    assert tables.tables_of(rows[:3], draws=5)["at equal leakage"] == {}
    rows += [row("mug", None, "ruler", "held-out references", 1.0, [0.3], [None])]  # of a concept that nobody learned
    rows += [row("mug", None, "ruler", "others of the class", 1.0, [0.1], [None])]
    found = tables.tables_of(rows, draws=5)["methods"]
    assert found["residuals + LAG"]["on the ruler"] == pytest.approx((0.69 - 0.5) / 0.4)
    assert found["ruler, held-out references"]["on the ruler"] == pytest.approx(1.0)


def test_an_interval_is_of_the_concepts_that_the_mean_counts():
    """Of the car the curve reaches LAG's leakage in one picture alone, so that some draws would bring it back."""
    rows = made_by_hand()
    for each in rows:
        if (each["concept"], each["way"]) == ("car", "LAG"):
            each["pictures"][0] |= {"moved": 0.9, "identity": 0.0}
    gain = tables.tables_of(rows, draws=200)["at equal leakage"]["residuals + LAG"]
    assert (gain["concepts"], gain["trainings"]) == (1, 2) and gain["mean"] == pytest.approx(0.09)
    assert (gain["low"], gain["high"]) == pytest.approx((0.08, 0.1))


def test_drift_is_a_column_of_its_own_and_counts_in_no_mean():
    rows = made_by_hand()
    drifted = row("cat", 0, "residuals", "drift", 1.0, [0.1, 0.1], [9.0, 9.0])
    drifted["pictures"] = [{"kind": "class word", "drift": 0.2}, {"kind": "unrelated", "drift": 0.1}]
    found = tables.tables_of([*rows, drifted], draws=5)
    assert found["methods"]["residuals"]["drift, class word"]["mean"] == 0.2
    assert found["methods"]["residuals"]["drift, unrelated"]["mean"] == 0.1
    assert (
        found["methods"]["residuals"]["identity"] == tables.tables_of(rows, draws=5)["methods"]["residuals"]["identity"]
    )
    assert "residuals + drift" not in found["methods"] and "residuals + drift" not in found["curves"]


def test_gains_by_where_the_toy_stands():
    """LAG gains where the toy is off center, and nothing where it is central."""
    rows = made_by_hand()
    for each in rows:
        for picture, off in zip(each["pictures"], (0.6, 0.0), strict=False):
            picture |= {"off before": off, "size before": 0.2}
    found = tables.tables_of(rows, draws=5)["by scene"]["residuals + LAG"]
    gains = {scene.split(" (")[0]: interval["mean"] for scene, interval in found.items()}
    assert gains == pytest.approx({"off center": 0.1, "large and central": 0.08})
    text = tables.markdown(tables.tables_of(rows, draws=5), tables.about_of("", rows), plan())
    assert "where the toy stands" in text and "+0.100 [+0.100, +0.100] (4)" in text


def test_the_judge_says_where_a_toy_stands_and_how_the_renderer_ranks_it():
    subject = toybox()[0][0]
    judge = judging.ToyboxJudge(ROOT / "data")
    prompts = [(prompt, 0) for prompt in subject.prompts if prompt.kind in ("place", "off center")]
    images = [
        Image.fromarray(render.draw(Scene((subject.toy,), p.asked["place"], fill=0.5, shift=(x, 0.0))).image)
        for (p, _), x in zip(prompts, (0.0, 0.0, 0.0, 0.0, -0.55, -0.55), strict=True)
    ]
    where = judge.masks(images, [prompt for prompt, _ in prompts])
    rows = judge.score(subject, prompts, images, ways.Frozen(images, torch.empty(0), where))
    assert [each.get("side") for each in rows] == [None] * 4 + [True, False]
    judge.masks = lambda images, prompts: torch.zeros(len(images), 16, 16)  # no toy is seen: it is on no side
    unseen = judge.score(subject, prompts, images, ways.Frozen(images, torch.empty(0), where))
    assert [each.get("side") for each in unseen] == [None] * 4 + [False, False]
    assert rows[0]["off before"] < 0.25 < rows[4]["off before"] and 0 < rows[0]["size before"] < 0.5
    judge.rank(subject, rows, images, 2)
    assert [each.get("rank") for each in rows] == [1, 1] + [None] * 4
    assert rows[0]["yaw spread"] < 0.2 and rows[0]["yaw from references"] < 0.8


def test_the_ruler_is_cut_out_as_a_methods_pictures_are(tmp_path):
    """By the same reading of the picture; rows of rulers that were cut by their true masks are made again."""
    subject = toybox()[0][0]
    judge = judging.ToyboxJudge(ROOT / "data")
    exact = judge.alone(subject, subject.held_out.images, subject.held_out.masks)
    seen = judge.alone(subject, subject.held_out.images, (judge.judge.where(subject.held_out.images) > 0.5).float())
    scores = [row["identity"] for row in judge.ruler(subject)["held-out references"]]
    assert scores == pytest.approx(seen.tolist(), abs=1e-4) and scores != pytest.approx(exact.tolist(), abs=1e-4)
    old = [each for each in made_by_hand() if each["concept"] == "cat"]
    new = [each | {"cut": work.CUT} for each in old if each["way"] == "others of the class"]
    (tmp_path / "rows-0.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*old, *new]))
    assert [each["way"] for each in work.rows_of(tmp_path) if each["method"] == "ruler"] == ["others of the class"]


def test_a_ruler_alone_is_made_without_drawing(sd1, monkeypatch):
    pair, judge = toybox()[0][:1], Counting()
    judge.ruler = lambda subject: {"held-out references": [{"kind": "none", "identity": 0.9}]}
    known = plan(scales=(1.0,))
    keys = work._keys(work.Unit(pair, None, None), 0, known)
    missing = [key for key in keys if key[3] == "held-out references"]
    monkeypatch.setattr(work, "draw_frozen", lambda *_: pytest.fail("nothing is asked of the frozen model"))
    unit = work.Unit(pair, None, None)
    (made,) = work.rows_of_unit(Bench(sd1), judge, unit, known, set(keys) - set(missing), {})
    assert work.key_of(made) == missing[0] and made["cut"] == work.CUT


def test_the_searchs_rule():
    def tried(identity, place, steps):
        return {"identity": identity, "place": place, "recipe": {"steps": steps}}

    rows = {"a": tried(0.9, 0.5, 50), "b": tried(0.801, 0.95, 100), "c": tried(0.8, 0.9, 50), "d": tried(0.7, 1.0, 50)}
    assert evaluate.best(rows) is rows["c"]  # the nearest loses its places; of the next two the one with fewer steps
    assert evaluate.best({"a": rows["a"]}) is rows["a"]


def test_the_controls_are_those_that_are_announced(sd1):
    pair = toybox()[0]
    frozen = ways.Frozen([None], torch.rand(1, 8, 8), torch.ones(1, 8, 8))
    assert set(ways.controls(sd1, pair, 0, [], frozen)) == set(work.CONTROLS)


# -------------------------------------------------------------------------------------------------------- ablations


class Ranking(Counting):
    """And ranks nothing; it notes by which class it judges."""

    def rank(self, subject, rows, images, count):
        assert len(rows) == len(images)
        self.judged = {*getattr(self, "judged", ()), subject.concept.macro_class}


LAYERS = "layers: keys and values of cross-attention, a LoRA of as many parameters"
MOST = "heads: each one's median, by majority"


@pytest.fixture
def few(tried, monkeypatch):
    """What `tried` is, with the ablations of some labels alone, each trained for two steps."""
    bench, pairs, folder = tried
    bases.settings_of(bench.base).recipe.update(steps=2, batch_size=1)

    def limit(*labels):
        known = [one for one in every if one.label in (*labels, "the recipe")]
        assert len(known) == len(labels) + 1
        monkeypatch.setattr(ablations, "ablations", lambda base: known)
        return known

    every = ablations.ablations(bench.base)
    return bench, pairs[:1], folder, limit


def test_each_ablation_is_a_row_and_done_ones_are_not_done_again(few):
    bench, pairs, folder, limit = few
    known = limit("rank: 0.05", "start: random", "macro class: wrong", "mask: Otsu", "unconditional half: own", LAYERS)
    judge = Ranking()
    ablations.run(bench, judge, pairs, folder)
    rows = work.rows_of(folder)
    assert judge.calls == len(rows) == 2 * (4 * 2 + 2 + 1)
    ablations.run(bench, judge, pairs, folder)
    assert judge.calls == len(rows)
    found = ablations.tables_of(rows, bench.base, draws=5)
    assert list(found) == [one.label for one in known] and set(found["mask: Otsu"]) == {"parameters", "steps", "LAG"}
    whole, smaller, other = (found[label]["parameters"] for label in ("the recipe", "rank: 0.05", LAYERS))
    assert smaller < whole and abs(other - whole) < whole / 2 and found["the recipe"]["seconds"] > 0
    gain, score, recipe = (found[label]["LAG"] for label in ("mask: Otsu", "mask: Otsu", "the recipe"))
    assert gain["identity gained"]["mean"] == pytest.approx(score["identity"]["mean"] - recipe["identity"]["mean"])
    assert "identity gained" not in recipe and gain["identity gained"]["pictures"] == 4
    begun = [row for row in rows if row["method"] != "the recipe" or row["concept"] == rows[0]["concept"]]
    assert ablations.tables_of(begun, bench.base, draws=5)["mask: Otsu"]["LAG"]["identity gained"]["concepts"] == 1
    text = ablations.markdown(found, tables.about_of("this", rows) | {"absent": ["No rows for X."]})
    assert (
        "| macro class: wrong |" in text and "2 concepts, 2 trainings, 4 pictures" in text and "No rows for X." in text
    )


def test_what_is_added_later_or_was_cut_off_is_all_that_is_drawn(few):
    bench, pairs, folder, limit = few
    limit("mask: Otsu")
    ablations.run(bench, Ranking(), pairs, folder)
    before = work.rows_of(folder)
    limit("mask: Otsu", "heads: the greatest", MOST)
    judge = Ranking()
    ablations.run(bench, judge, pairs, folder)
    whole = work.rows_of(folder)
    assert judge.calls == 2 * 2 and len(whole) == len(before) + 4 and all(row in whole for row in before)
    path = folder / "rows-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed in the middle of a line
    ablations.run(bench, judge, pairs, folder)
    assert judge.calls == 2 * 2 + 1 and plain(work.rows_of(folder)) == plain(whole)


def test_heads_vote_each_by_its_own_median():
    heads = torch.tensor([[4.0, 3, 2, 1], [4, 1, 3, 2], [1, 2, 3, 4]])[None, :, :, None]  # (1, heads, HW, concepts)
    shares = ablations.votes(heads)
    assert shares.flatten().tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3, 1 / 3])
    assert ablations.majority(shares).flatten().tolist() == [1, 0, 1, 0]


def test_processes_share_the_ablations_whenever_they_begin(few):
    bench, pairs, folder, limit = few
    limit("start: random", "mask: Otsu")
    ablations.run(bench, Ranking(), pairs, folder / "one")
    for process in range(2):  # the second finds rows of the first
        ablations.run(bench, Ranking(), pairs, folder / "two", process=process, processes=2)
    two = [path.read_text().splitlines() for path in sorted((folder / "two").glob("rows-*"))]
    assert plain(work.rows_of(folder / "one")) == plain(work.rows_of(folder / "two")) and all(two)
    assert sum(map(len, two)) == len(work.rows_of(folder / "two"))


def test_the_word_beside_the_rare_token_changes_and_the_judge_asks_for_the_class(few, monkeypatch):
    bench, pairs, folder, limit = few
    general = 'macro class: general, "picture" (the base knows no "object" or "toy")'
    limit("macro class: wrong", general, "macro class: none")
    asked = set()
    monkeypatch.setattr(ablations, "personalize", lambda base, concept, **given: (
        asked.add(concept.training_prompt), personalize(base, concept, **given))[1])  # fmt: skip
    judge = Ranking()
    ablations.run(bench, judge, pairs, folder, ranked=1)
    words = {"sks cat", "sks car", "sks picture", "sks"}
    others = {"ktn dog", "ktn car", "ktn picture", "ktn"}
    assert asked == {f"a photo of a {each}" for each in words | others} and judge.judged == {"cat", "dog"}
    assert len(work.rows_of(folder)) == 2 * 4 * 2


def test_a_concept_without_a_class_word_is_only_the_ablations():
    cat = make_concept()
    nameless = ablations.Called(**vars(cat))
    assert (str(nameless), nameless.words, nameless.macro_class) == ("sks", ["sks"], "cat")
    assert str(ablations.Called(**vars(cat), word="toy")) == "sks toy"
    with pytest.raises(ValueError, match="needs a macro class"):
        bases.replace(cat, macro_class="")


@pytest.mark.parametrize("trained", ["toybox-sd/vae", "toybox-dino", "toybox-clip"])
def test_rows_know_when_the_decoder_or_a_judge_was_trained_further(tmp_path, monkeypatch, trained):
    monkeypatch.setattr(work, "settings_of", lambda base: SimpleNamespace(name="toybox"))
    for name in ("toybox-sd/unet", "toybox-sd/vae", "toybox-dino", "toybox-clip"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"before")
    before = work.weights_of(None, tmp_path)
    assert work.weights_of(None, tmp_path) == before
    (tmp_path / trained / "model.safetensors").write_bytes(b"after")
    assert work.weights_of(None, tmp_path) != before


def test_toyboxs_most_general_word_is_in_its_captions():
    base = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(ROOT / "data" / "toybox-sd" / "tokenizer"))
    word, label = ablations._general(base)
    assert word == "picture" and 'no "object" or "toy"' in label
    assert word in vocabulary() and not {"object", "toy", "thing"} & set(vocabulary())


@pytest.mark.parametrize("equal", ["equal steps", "equal seconds"])
def test_other_methods_stand_beside_the_recipe(few, equal):
    bench, pairs, folder, limit = few
    methods = ("textual inversion", "DreamBooth, prior", "attention LoRA, rank 4")
    limit(*(f"{equal}: {method}" for method in methods))
    recipes = {f"{equal}: {method}": bases.replace(SHORT, steps=3, prior=2 * ("prior" in method)) for method in methods}
    ablations.run(bench, Ranking(), pairs, folder, recipes=recipes)
    found = ablations.tables_of(work.rows_of(folder), bench.base, draws=5)
    assert len(found) == 4 and all(found[label]["steps"] == 3 and "LAG" not in found[label] for label in recipes)
    assert "identity gained" in found[f"{equal}: textual inversion"]["residual"]
    other = {label: bases.replace(recipe, steps=4) for label, recipe in recipes.items()}
    with pytest.raises(ValueError, match="with 3 steps, and now they would have 4.*--rows"):
        ablations.run(bench, Ranking(), pairs, folder, recipes=other)


def test_steps_and_seconds_are_equal_to_those_of_the_residuals(few, monkeypatch, tmp_path):
    bench, _, _, _ = few
    bases.settings_of(bench.base).recipe.update(steps=100)
    of_one = dict.fromkeys(METHODS, 0.1) | {"DreamBooth": 0.3, "textual inversion": 0.05}
    monkeypatch.setattr(ablations, "step_seconds", lambda bench, concept, recipes, path: of_one)
    made = ablations.equal(bench, make_concept(), dict.fromkeys(METHODS, SHORT), tmp_path / "seconds.json")
    assert len(made) == 2 * (len(METHODS) - 1)
    assert {recipe.steps for label, recipe in made.items() if "steps" in label} == {100}
    seconds = {label.split(": ")[1]: recipe.steps for label, recipe in made.items() if "seconds" in label}
    assert (seconds["DreamBooth"], seconds["textual inversion"], seconds["proj_out LoRA"]) == (33, 200, 100)
    assert made["equal seconds: DreamBooth"].lr == SHORT.lr


def test_every_choice_of_the_method_has_its_row(sd1, sdxl, monkeypatch):
    small(sd1, monkeypatch)
    bases.settings_of(sd1).recipe.update(steps=100)
    labels = [one.label for one in ablations.ablations(sd1)]
    assert len(set(labels)) == len(labels) and {"rank: 1", "rank: 0.5"} < set(labels)
    assert "rank: 0.25" not in labels and "steps: 50" in labels
    kinds = {
        "the recipe",
        "rank",
        "layers",
        "start",
        "token",
        "steps",
        "macro class",
        "loss",
        "mask",
        "heads",
        "unconditional half",
        "steps with a mask",
        "equal steps",
        "equal seconds",
    }
    assert {label.split(":")[0] for label in labels} == kinds
    assert {one.label for one in ablations.chosen(sd1, ["heads"])} == {"the recipe", "heads: the greatest", MOST}
    with pytest.raises(ValueError, match="no ablation of 'maps of a projection' on this base: choose of rank, layers"):
        ablations.chosen(sd1, ["maps of a projection"])
    assert len(ablations.absent(sd1)) == 1 and ablations.absent(sdxl) == []
    several = ablations.chosen(sdxl, ["maps of a projection"])
    assert [one.sampling for one in several] == [{}, {"layers": "first"}, {"layers": "last"}]


def test_rank_1_and_the_whole_width_are_two_ranks(sd1, monkeypatch):
    small(sd1, monkeypatch)
    bases.settings_of(sd1).recipe.update(rank=1.0)
    assert "rank: 1" in {one.label for one in ablations.ablations(sd1)}
    bases.settings_of(sd1).recipe.update(rank=1)
    assert "rank: 1" not in {one.label for one in ablations.ablations(sd1)}


# ------------------------------------------------------------------------------------------------------ the command


def test_equal_seconds_are_as_many_steps_as_fit_in(tmp_path, monkeypatch):
    measured = []

    def train(bench, method, concept, seed, recipe):
        measured.append(method)
        slow = 1.0 if len(measured) % 4 in (1, 2) else 0.0  # something else ran: the faster try counts
        return Trained(
            nullcontext, 1, seconds=3.0 + slow + {"residuals": 0.5, "DreamBooth": 2.0}[method] * recipe.steps
        )

    monkeypatch.setattr(methods, "train", train)
    base, path = SimpleNamespace(unet=None), tmp_path / "seconds.json"

    def steps(seconds, *asked):
        two = work.Plan(asked, dict.fromkeys(METHODS, SHORT))
        return {name: recipe.steps for name, recipe in evaluate.within(seconds, base, None, two, path).recipes.items()}

    assert steps(10.0, "residuals") == {"residuals": 20} and measured == ["residuals"] * 4
    for _ in range(2):  # what is known is not measured again, what is added later is
        assert steps(10.0, "residuals", "DreamBooth") == {"residuals": 20, "DreamBooth": 5}
    assert measured == ["residuals"] * 4 + ["DreamBooth"] * 4
    assert steps(20.0, "DreamBooth") == {"DreamBooth": 10}  # other seconds are not those of the first run
    assert steps("residuals", "DreamBooth") == {"DreamBooth": 1}  # two steps of half a second
    given = ["--seconds", "residuals"]
    assert evaluate.parse(given).seconds == "residuals" and evaluate.parse(["--seconds", "7"]).seconds == 7.0


@pytest.mark.parametrize("method", ["attention LoRA, rank 4", "DreamBooth, prior"])
def test_a_step_of_a_real_method_is_measured(method, sd1, monkeypatch, tmp_path):
    bench = small(sd1, monkeypatch)
    recipe = bases.replace(SHORT, prior=2 * ("prior" in method))
    found = methods.step_seconds(bench, make_concept(), {method: recipe}, tmp_path / "new" / "seconds.json")
    assert set(found) == {method} and 0 < found[method] < 60
    assert json.loads((tmp_path / "new" / "seconds.json").read_text()) == found
    assert not getattr(sd1.unet, "peft_config", None)


def test_the_papers_protocol_is_the_same_command(tmp_path, sd1, monkeypatch):
    """On a base in Stable Diffusion's layout with CustomConcept101's list, CLIP and DINO being Toybox's here."""
    small(sd1, monkeypatch)
    sd1.save_pretrained(tmp_path / "base")
    custom101(tmp_path)
    own = evaluation.JUDGES["toybox"]
    monkeypatch.setattr(evaluation, "PAPER_JUDGES", tuple(str(ROOT / "data" / folder) for folder in own))
    given = ["--base", str(tmp_path / "base"), "--methods", "residuals", "--steps", "1", "--trainings", "2"]
    given += ["--seeds", "2", "--draws", "5", "--rows", str(tmp_path / "rows")]
    with pytest.raises(SystemExit, match="give CustomConcept101's list"):
        evaluate.main(given)
    evaluate.main([*given, "--custom101", str(tmp_path / "dataset_multiconcept.json")])
    made = json.loads((tmp_path / "rows" / "evaluation.json").read_text())
    rows = made["methods"]
    assert {"frozen, class word", "residuals", "residuals + LAG", "residuals + LAG, disc, quarter"} <= set(rows)
    assert {"CLIP-T", "CLIP-I", "identity", "text gap", "diversity", "moved"} <= set(rows["residuals"])
    assert rows["residuals"]["identity"]["trainings"] == 4 and rows["frozen, rare token"]["moved"]["mean"] == 0
    assert made["protocol"]["recipes"]["residuals"] == {"steps": 1, "batch_size": 4, "lr": 1e-3, "prior": 0}
    prompts = {picture["prompt"] for row in work.rows_of(tmp_path / "rows") for picture in row["pictures"]}
    assert "the {1} beside the {0}" in prompts and len(prompts) == 3


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Two concepts, four ways of personalizing: minutes on a laptop."""
    folder = tmp_path_factory.mktemp("quick")
    evaluate.main(["--quick", "--base", "toybox", "--rows", str(folder), "--draws", "200"])
    return json.loads((folder / "evaluation.json").read_text())


def test_quick_orderings(quick):
    """Only what must hold: with four pictures a way, one training and a third of the steps, LAG need not move less
    than the residual, nor the residual come nearer than the class word.
    """
    rows = quick["methods"]
    identity = {name: row["identity"]["mean"] for name, row in rows.items()}
    moved = {name: row["moved"]["mean"] for name, row in rows.items() if "moved" in row}
    assert identity["ruler, held-out references"] > max(identity["residuals"], identity["frozen, class word"])
    assert identity["ruler, held-out references"] > identity["ruler, others of the class"]
    assert moved["frozen, rare token"] == 0 < min(moved["residuals + LAG"], moved["residuals"])
    assert moved["residuals + LAG, true mask"] < moved["residuals"]
    curve = quick["curves"]["residuals"]
    assert curve["0.5"]["moved"]["mean"] < curve["1.0"]["moved"]["mean"]
    parameters = {name: row.get("parameters") for name, row in rows.items()}
    assert parameters["textual inversion"] < parameters["residuals"] < parameters["DreamBooth"]
    assert rows["residuals"]["identity"]["concepts"] == 2


def test_two_processes_write_what_one_writes(tmp_path):
    """As `accelerate launch` and torchrun start them: each computes in its own thread, and knows its number."""
    given = ["--quick", "--steps", "1", "--methods", "textual inversion", "--draws", "5", "--base", "toybox", "--rows"]
    single = [sys.executable, "-m", "data.make.evaluate", *given, str(tmp_path / "one")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for command in (single, [*launch, *single[2:-1], str(tmp_path / "two")]):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = work.rows_of(tmp_path / "one"), work.rows_of(tmp_path / "two")
    assert {path.name for path in (tmp_path / "two").glob("rows-*")} == {"rows-0.jsonl", "rows-1.jsonl"}
    assert plain(one) == plain(two) and len(one) > 8
