"""The small world: what its pictures and captions promise, and that training can be interrupted."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from persres_lite.maintain import toybox_concepts
from persres_lite.support.paths import data_dir
from persres_lite.toybox import concepts, dataset, pretrain, ship, train_judge, trainer, world
from persres_lite.toybox.judge import READINGS, Judge, labels_of
from persres_lite.toybox.models import MAX_LENGTH, make_tokenizer
from persres_lite.toybox.render import draw


def test_reserved_paint_never_occurs_in_pretraining():
    seen = [toy for index in range(5000) for toy in world.scene_by_index(index).toys]
    assert not {toy.paint for toy in seen} & world.RESERVED
    # The draw could have hit them: every class, color and pattern of the reserved ones does occur.
    for column in range(4):
        assert {paint[column] for paint in world.RESERVED} <= {toy.paint[column] for toy in seen}


def test_reserved_paint_is_refused_even_where_the_draw_insists(monkeypatch):
    cat = ("cat", "purple", "yellow", "dotted")
    rng = random.Random(0)
    monkeypatch.setattr(world, "COLORS", {"purple": 0, "yellow": 0})
    monkeypatch.setattr(world, "PATTERNS", ("plain", "plain", "plain", "dotted"))
    paints = {world.random_toy(rng, "cat").paint for _ in range(300)}
    assert cat not in paints and len(paints) == 3


def test_concepts_are_reserved_and_no_two_share_a_class():
    shipped = concepts.all_shipped()
    toys = [toy for toy, _ in shipped.values()]
    assert len(toys) == 10 and {toy.kind for toy in toys} == set(world.CLASSES)
    assert {toy.paint for toy in toys} <= world.RESERVED
    assert not {toy.paint for toy in toys} & {toy.paint for toy, _ in concepts.SEARCH.values()}
    assert sum(place is not None for _, place in shipped.values()) == 5


def test_shipped_concepts_are_what_the_code_draws():
    folder = data_dir() / "concepts" / "plum-cat"
    drawn = concepts.photograph("plum-cat", *concepts.all_shipped()["plum-cat"])
    for index, picture in enumerate(drawn):
        for name, made in ((f"{index}.png", picture.image), (f"masks/{index}.png", picture.masks[0])):
            # Another processor rounds otherwise, and at an edge a single ray may then meet another part: what is
            # bounded is the mean difference and the share of pixels that differ visibly.
            apart = np.abs(np.asarray(Image.open(folder / name)).astype(int) - made)
            assert apart.mean() < 0.2 and (apart > 8).mean() < 0.005, name


def test_scenes_and_pictures_follow_from_their_number():
    assert world.scene_by_index(7) == world.scene_by_index(7) != world.scene_by_index(8)
    assert world.scene_by_index(7) != world.scene_by_index(7, "other")
    one, two = draw(world.scene_by_index(7)), draw(world.scene_by_index(7))
    assert np.array_equal(one.image, two.image) and np.array_equal(one.masks, two.masks)


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


def test_toys_fill_what_the_scene_asks_for():
    heights = []
    for index in range(120):
        scene = world.scene_by_index(index)
        if len(scene.toys) == 1:
            rows = np.flatnonzero(draw(scene).masks[0].max(1) > 127)
            heights.append((rows[-1] - rows[0] + 1) / 64)
    assert len(heights) > 80 and min(heights) >= 0.45 and max(heights) <= 0.70


def test_two_toys_have_two_masks_left_and_right():
    scene = next(s for s in map(world.scene_by_index, range(100)) if len(s.toys) == 2)
    left, right = draw(scene).masks
    across = np.arange(64)
    assert (left.sum(0) * across).sum() / left.sum() + 10 < (right.sum(0) * across).sum() / right.sum()


@pytest.mark.parametrize("style, gray", [("in black and white", True), (None, False)])
def test_styles_change_the_whole_picture(style, gray):
    image = draw(world.Scene((world.Toy("mug", "blue", "red"),), "on the grass", style)).image.astype(int)
    assert (np.ptp(image, axis=-1).max() <= 1) == gray


def test_labels_leave_open_what_a_picture_does_not_settle():
    toy = world.Toy("cat", "red", "blue")
    pair = world.Scene((toy, world.Toy("mug", "pink", "gray")), "at night", "in sepia")
    labels = labels_of([world.Scene((toy,), "at night"), pair])
    assert labels["main"].tolist() == [READINGS["main"].index("red"), -1]
    assert labels["class"].tolist() == [world.CLASSES.index("cat"), -1]
    assert labels["left"].tolist() == [-1, world.CLASSES.index("cat")]
    assert labels["right"].tolist() == [-1, world.CLASSES.index("mug")]


def test_drawn_pictures_are_cached_and_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 4)
    first = dataset.load_drawn(dataset.draw_scenes, 8, tmp_path, "few", workers=1)
    (tmp_path / "few-0001.npy").unlink()
    stamp = (tmp_path / "few-0000.npy").stat().st_mtime_ns
    again = dataset.load_drawn(dataset.draw_scenes, 8, tmp_path, "few", workers=1)
    assert np.array_equal(first, again) and first.shape == (8, 64, 64, 5)
    assert (tmp_path / "few-0000.npy").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="multiple of 4"):
        dataset.load_drawn(dataset.draw_scenes, 9, tmp_path, "few")


def test_tokenizer_has_one_piece_for_each_word_and_ends_last():
    tokenizer = make_tokenizer()
    for word in [*world.vocabulary(), *world.RARE_TOKENS]:
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert (
        len(tokenizer("moonbase").input_ids) > 3 and tokenizer.unk_token_id not in tokenizer("moonbase").input_ids[1:-1]
    )
    assert not set(world.RARE_TOKENS) & set(world.vocabulary())


@pytest.mark.parametrize("folder", ["toybox-sd/tokenizer", "toybox-clip"])
def test_shipped_tokenizers_number_words_as_this_process_does(folder):
    # Numbers that differ from one process to the next would mix up the words of every stage after the first.
    shipped, made = CLIPTokenizer.from_pretrained(data_dir() / folder), make_tokenizer()
    assert shipped.get_vocab() == made.get_vocab()
    text = " ".join([*world.vocabulary(), *world.RARE_TOKENS])
    assert shipped(text).input_ids == made(text).input_ids


def test_interrupted_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    seen = []

    def run(minutes, stop_at=None):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)

        def step(number):
            if number == stop_at:
                raise KeyboardInterrupt
            seen.append(number)
            return {"loss": layer(torch.randn(4, 3)).square().mean()}

        trainer.train("toy", layer, step, minutes=minutes, lr=0.1, pictures=4, folder=tmp_path, ema=0.9, save_every=0)
        return layer.weight.detach()

    clock = iter(range(100_000))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))  # every step takes one second
    with pytest.raises(KeyboardInterrupt):
        run(0.5, stop_at=12)
    resumed = run(0.5)
    assert seen == list(range(30))
    (tmp_path / "toy.pt").unlink()
    seen.clear()
    assert torch.equal(run(0.5), resumed) and seen == list(range(30))


def learn_a_line(folder):
    """A few steps of a layer, toward 1 in one process and 3 in the other, one of them slow; then both show theirs."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    rank, _ = trainer.rank_and_size()
    steps = []

    def step(number):
        steps.append(number)
        time.sleep(0.02 * rank)
        return {"loss": (layer(torch.randn(4, 3)) - (1, 3)[rank]).square().mean()}

    trainer.train("line", layer, step, minutes=0.02, lr=0.1, pictures=4, folder=folder)
    torch.save({**layer.state_dict(), "steps": len(steps)}, folder / f"{rank}.pt")


def test_processes_side_by_side_learn_as_one(tmp_path):
    trainer.side_by_side(learn_a_line, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    assert not torch.equal(one["weight"], nn.Linear(3, 1).weight)
    assert torch.equal(one["weight"], two["weight"]) and torch.equal(one["bias"], two["bias"])
    kept = torch.load(tmp_path / "line.pt", weights_only=True)
    assert one["steps"] == two["steps"] == kept["step"] > 2 and kept["pictures"] == 8 * kept["step"]


def test_the_recipe_is_chosen_by_its_rule():
    def recipe(identity, place):
        return {"class": {}, "residual": {}, "LAG": {"identity": identity, "place": place}}

    rows = {
        "200 steps, rate 0.01, rank 0.25": recipe(0.90, 0.80),  # nearest, but the place is lost
        "200 steps, rate 0.003, rank 0.25": recipe(0.704, 0.95),
        "100 steps, rate 0.01, rank 0.25": recipe(0.701, 1.0),
        "100 steps, rate 0.01, rank 0.05": recipe(0.699, 0.9),
        "100 steps, rate 0.003, rank 0.05": recipe(0.5, 1.0),
    }
    assert toybox_concepts.best(rows) == "100 steps, rate 0.01, rank 0.05"
    assert toybox_concepts.best({name: rows[name] for name in list(rows)[:1]}) == list(rows)[0]
    scored = [{"seconds": 1.0, **recipe(0.2, 1)}, {"seconds": 2.0, "class": {}, "residual": {}, "LAG": {"place": 0}}]
    assert toybox_concepts.mean_of(scored) == {"seconds": 1.5, **recipe(0.2, 0.5)}


def wait_long(folder):
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(120)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes run")
def test_processes_end_when_what_began_them_is_killed(tmp_path):
    code = (
        "import pathlib, tests.test_toybox as t\n"
        f"if __name__ == '__main__': t.trainer.side_by_side(t.wait_long, 2, pathlib.Path({str(tmp_path)!r}))"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    root = Path(__file__).parents[1]
    parent = subprocess.Popen([sys.executable, str(program)], env=os.environ | {"PYTHONPATH": str(root)})
    until = time.time() + 90
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.time() < until:
        time.sleep(0.2)
    children = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    until = time.time() + 20
    while any(alive(child) for child in children) and time.time() < until:
        time.sleep(0.2)
    assert not any(alive(child) for child in children)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_going_further_passes_on_what_an_earlier_stage_has_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 32)
    monkeypatch.setattr(pretrain, "PICTURES", 64)
    monkeypatch.setattr(train_judge, "VIEWS", 64)
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    for name in ("toybox-sd", "toybox-clip", "toybox-dino"):
        shutil.copytree(data_dir() / name, tmp_path / "data" / name)
    runs = tmp_path / "runs"
    where = ["--folder", str(runs), "--data", str(tmp_path / "data"), "--further", "--threads", "1"]

    def go(*stages):
        pretrain.main([*where, *(word for name in stages for word in ("--stage", name, f"--{name}-minutes", "0.001"))])
        return {name: torch.load(runs / f"{name}.pt", weights_only=True) for name in stages}

    left = go("judge", "readings", "text", "vision")
    encoder = "encoder.embedder.embedder.convolution.weight"
    word = "clip.text_model.embeddings.token_embedding.weight"
    shipped = CLIPModel.from_pretrained(data_dir() / "toybox-clip", dtype=torch.float32)
    learned = train_judge.trained("judge", train_judge.judge_parts(), runs).state_dict()[encoder]
    assert torch.equal(left["readings"]["module"][encoder], learned)
    assert torch.equal(left["vision"]["module"][word], left["text"]["module"][word])
    assert not torch.equal(left["vision"]["module"][word], shipped.text_model.embeddings.token_embedding.weight)


def test_what_was_made_with_a_stage_is_made_again_when_it_has_learned_since(tmp_path):
    made, source = tmp_path / "latents.npy", tmp_path / "vae.pt"
    made.touch()
    assert not trainer.still_valid(made, "vae", tmp_path)
    source.touch()
    os.utime(made, (100, 100)), os.utime(source, (100, 100))
    assert trainer.still_valid(made, "vae", tmp_path)
    os.utime(source, (101, 101))
    assert not trainer.still_valid(made, "vae", tmp_path)


def test_a_run_that_goes_further_adds_to_the_card(tmp_path):
    card = tmp_path / "toybox-sd" / "README.md"
    card.parent.mkdir()
    card.write_text("before\n<!-- training: begin -->\nold\n<!-- training: end -->\n| after | it |\n")
    for further, steps in ((False, 10), (True, 2000)):
        torch.save({"step": steps, "seconds": 120.0, "pictures": 16 * steps}, tmp_path / "unet.pt")
        ship.write_card(tmp_path, tmp_path, ["vae", "unet"], further)
    rows = ["| unet | 2 | 10 | 160 |", "| unet, further | 2 | 2,000 | 32,000 |"]
    table = ["| stage | minutes | steps | pictures seen |", "|---|---|---|---|", *rows]
    marks = ["<!-- training: begin -->", *table, "<!-- training: end -->"]
    assert card.read_text().splitlines() == ["before", *marks, "| after | it |"]


def test_bare_diffusers_opens_the_shipped_model():
    code = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
image = pipe("a photo of a red duck on the beach", num_inference_steps=2, generator=generator).images[0]
assert image.size == (64, 64) and image.getextrema()[0][0] != image.getextrema()[0][1]
assert not [name for name in sys.modules if name.startswith("persres")]
"""
    folder = data_dir() / "toybox-sd"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_shipped_files_are_small_and_hold_no_pickles():
    files = [path for path in data_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_pretraining_goes_from_nothing_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 32)
    monkeypatch.setattr(pretrain, "PICTURES", 64)
    monkeypatch.setattr(train_judge, "VIEWS", 64)
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    where = ["--folder", str(tmp_path / "runs"), "--data", str(tmp_path / "data")]
    options = [word for name in pretrain.MINUTES for word in ("--stage", name, f"--{name}-minutes", "0.001")]
    with pytest.raises(FileNotFoundError, match="Stage vae has left nothing"):
        pretrain.main([*where, "--stage", "unet"])
    pretrain.main([*where, *options, "--threads", "1"])
    first = load_file(tmp_path / "data" / "toybox-sd" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in first.values())
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "data" / "toybox-sd")
    assert Judge(tmp_path / "data").identity([Image.new("RGB", (64, 64))]).shape == (1, 256)
    assert pipeline.vae_scale_factor == 4 and pipeline.scheduler.config.prediction_type == "v_prediction"
