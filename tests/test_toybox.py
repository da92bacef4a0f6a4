"""The small world: what its pictures, captions and tokenizers promise."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from data.make import toybox_scores
from data.make.pretraining.models import MAX_LENGTH, make_tokenizer
from persres_lite.bases import load_base
from persres_lite.support.paths import data_dir
from persres_lite.toybox import concepts, world
from persres_lite.toybox.judge import PROBES, labels_of
from persres_lite.toybox.render import draw


def test_reserved_paint_never_occurs_in_pretraining():
    seen = [toy for index in range(5000) for toy in world.scene_by_index(index).toys]
    assert not {toy.paint for toy in seen} & world.RESERVED
    # The draw could have hit them: every class, color and pattern of the reserved ones does occur.
    for column in range(4):
        assert {paint[column] for paint in world.RESERVED} <= {toy.paint[column] for toy in seen}


def test_concepts_are_reserved_and_no_two_share_a_class():
    shipped = concepts.all_shipped()
    toys = [toy for toy, _ in shipped.values()]
    assert len(toys) == 10 and {toy.kind for toy in toys} == set(world.CLASSES)
    assert {toy.paint for toy in toys} <= world.RESERVED
    assert not {toy.paint for toy in toys} & {toy.paint for toy, _ in concepts.SEARCH.values()}
    assert sum(place is not None for _, place in shipped.values()) == 5


def test_shipped_concepts_are_what_the_code_draws():
    # Another processor rounds otherwise, and at an edge a single ray may then meet another part: no picture is equal to
    # the bit everywhere, so what is bounded is the mean difference and the share of pixels that differ visibly.
    folder = data_dir() / "concepts" / "plum-cat"
    for index, picture in enumerate(concepts.photograph("plum-cat", *concepts.all_shipped()["plum-cat"])):
        for name, made in ((f"{index}.png", picture.image), (f"masks/{index}.png", picture.masks[0])):
            apart = np.abs(np.asarray(Image.open(folder / name)).astype(int) - made)
            assert apart.mean() < 0.2 and (apart > 8).mean() < 0.005, name


def test_scenes_and_pictures_follow_from_their_number():
    assert world.scene_by_index(7) == world.scene_by_index(7) != world.scene_by_index(8)
    assert world.scene_by_index(7) != world.scene_by_index(7, "other")
    assert np.array_equal(draw(world.scene_by_index(7)).image, draw(world.scene_by_index(7)).image)


def test_captions_name_only_what_is_there():
    rng = random.Random(0)
    words = set(world.vocabulary())
    pairs = 0
    for index in range(2000):
        scene = world.scene_by_index(index)
        text = world.caption(scene, rng).split()
        assert len(text) <= world.LONGEST == MAX_LENGTH - 2 and set(text) <= words
        kinds = [toy.kind for toy in scene.toys]
        assert [word for word in text if word in world.CLASSES] == kinds  # left before right
        allowed = {color for toy in scene.toys for color in (toy.main, toy.second)}
        if scene.style in ("in black and white", "in sepia"):
            allowed = {"black", "white"}  # of the style's own name
        assert {word for word in text if word in world.COLORS} <= allowed
        pairs += len(kinds) == 2
    assert 0.15 < pairs / 2000 < 0.25


def test_masks_are_where_the_toy_is():
    scene = world.Scene((world.Toy("duck", "red", "yellow"),), "in the snow")
    with_toy = draw(scene)
    mask = with_toy.masks[0] / 255
    red = with_toy.image[..., 0].astype(int) - with_toy.image[..., 2] > 60
    assert red.sum() > 200 and mask[red].mean() > 0.95
    assert mask[:, 0].max() == 0 and 0.1 < mask.mean() < 0.5


def test_toys_have_many_sizes_and_do_not_all_stand_in_the_middle():
    across = (np.arange(64) + 0.5) / 32 - 1
    disc = across[:, None] ** 2 + across**2 <= 2 / np.pi  # half of the picture's area
    heights, missed, said = [], [], []
    for scene in (scene for scene in map(world.scene_by_index, range(150)) if len(scene.toys) == 1):
        mask = draw(scene, 64, supersample=1).masks[0] / 255
        rows = np.flatnonzero(mask.max(1) > 0.5)
        heights.append((rows[-1] - rows[0] + 1) / 64)
        missed.append((mask * ~disc).sum() / mask.sum())
        if side := world.side_of(scene):
            said.append((side == "on the right") == ((mask.sum(0) * across).sum() > 0))
    assert min(heights) >= 0.40 and max(heights) <= 0.83 and max(heights) - min(heights) > 0.25
    assert 0.55 < np.mean(heights) < 0.70 and np.mean(missed) > 0.07
    assert len(said) > 20 and np.mean(said) > 0.97


def test_a_word_with_a_name_means_one_toy():
    assert world.named_toy("bafo") == world.named_toy("bafo") and world.named_toy("bafo").name == "bafo"
    assert len({(toy.paint, toy.proportions) for toy in map(world.named_toy, world.NAMES)}) == len(world.NAMES) == 100
    assert not set(world.NAMES) & set(world.RARE_TOKENS)
    toys = [scene.toys[0] for scene in map(world.scene_by_index, range(1500)) if len(scene.toys) == 1]
    named = [toy for toy in toys if toy.name]
    assert 0.10 < len(named) / len(toys) < 0.20
    assert all(toy.paint == world.named_toy(toy.name).paint for toy in named)
    called = [toy.name in world.describe(toy, random.Random(i)) for i, toy in enumerate(named)]
    assert 0.6 < np.mean(called) < 0.8


def test_near_misses_differ_in_paint_alone():
    cat = world.Toy("cat", "purple", "yellow", "dotted", "hat", (1.1, 1.0, 0.9))
    gallery = world.near_misses(cat)
    assert len({toy.paint for toy in gallery} - {cat.paint}) == len(gallery) == 11
    assert gallery == world.near_misses(cat) and gallery[:5] == world.near_misses(cat, 5)
    assert {(toy.kind, toy.accessory, toy.proportions) for toy in gallery} == {("cat", "hat", (1.1, 1.0, 0.9))}


def test_two_toys_have_two_masks_left_and_right():
    scene = next(s for s in map(world.scene_by_index, range(100)) if len(s.toys) == 2)
    left, right = draw(scene).masks
    across = np.arange(128)
    assert (left.sum(0) * across).sum() / left.sum() + 10 < (right.sum(0) * across).sum() / right.sum()


@pytest.mark.parametrize("style, gray", [("in black and white", True), (None, False)])
def test_styles_change_the_whole_picture(style, gray):
    image = draw(world.Scene((world.Toy("mug", "blue", "red"),), "on the grass", style)).image.astype(int)
    assert (np.ptp(image, axis=-1).max() <= 1) == gray


def test_labels_leave_open_what_a_picture_does_not_settle():
    toy = world.Toy("cat", "red", "blue")
    pair = world.Scene((toy, world.Toy("mug", "pink", "gray")), "at night", "in sepia")
    labels = labels_of([world.Scene((toy,), "at night"), pair])
    assert labels["main"].tolist() == [PROBES["main"].index("red"), -1]
    assert labels["class"].tolist() == [world.CLASSES.index("cat"), -1]
    assert labels["left"].tolist() == [-1, world.CLASSES.index("cat")]
    assert labels["right"].tolist() == [-1, world.CLASSES.index("mug")]


def test_tokenizer_has_one_piece_for_each_word_and_ends_last():
    tokenizer = make_tokenizer()
    for word in [*world.vocabulary(), *world.RARE_TOKENS]:
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.eos_token_id == len(tokenizer) - 1 and len(tokenizer("moonbase").input_ids) > 3
    assert not set(world.RARE_TOKENS) & set(world.vocabulary())


@pytest.mark.parametrize("folder", ["toybox-sd/tokenizer", "toybox-clip"])
def test_shipped_tokenizers_number_words_as_this_process_does(folder):
    # Numbers that differ from one process to the next would mix up the words of every stage after the first.
    assert CLIPTokenizer.from_pretrained(data_dir() / folder).get_vocab() == make_tokenizer().get_vocab()


def test_bare_diffusers_opens_the_shipped_model():
    folder = data_dir() / "toybox-sd"
    parts = json.loads((folder / "model_index.json").read_text())
    libraries = {part[0] for part in parts.values() if isinstance(part, list)}
    assert libraries <= {"diffusers", "transformers", None}, "nothing of this package is needed"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompt, generator = "a photo of a red duck on the beach", torch.Generator().manual_seed(0)
    image = pipe(prompt, num_inference_steps=2, generator=generator).images[0]
    assert image.size == (128, 128) and image.getextrema()[0][0] != image.getextrema()[0][1]


@pytest.mark.parametrize("kind", world.CLASSES)
@pytest.mark.parametrize("pattern", ["striped", "dotted", "checkered"])
def test_every_kind_shows_every_pattern(kind, pattern):
    # A box whose faces lie between the dots of the lattice once showed none.
    plain, marked = (
        draw(world.random_view(random.Random(kind), (world.Toy(kind, "black", "white", p),), "on the grass"))
        for p in ("plain", pattern)
    )
    changed = np.abs(plain.image.astype(int) - marked.image).max(-1) > 40
    assert changed.sum() > 0.06 * (marked.masks[0] > 127).sum()
    begins = np.count_nonzero(changed[1:] & ~changed[:-1], axis=0)  # of bands, by column of pixels
    assert begins.max() >= 2


def test_the_loss_says_whether_a_unet_knows_its_pictures_and_its_words(monkeypatch):
    base = load_base("toybox")
    known = toybox_scores.score_loss(base, 8, 8)
    assert set(known) == {"training pictures", "fresh renders"}
    assert all(0 < value < 0.3 for value in known.values())
    monkeypatch.setattr(toybox_scores, "caption", lambda scene, rng: "a photo of a red car at night")
    misled = toybox_scores.score_loss(base, 8, 8)
    assert all(misled[name] > known[name] for name in known)
