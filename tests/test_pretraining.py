"""Pretraining of Toybox: caches, interruptions, several processes, going further, and all of it in miniature."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPModel

from data.make import toybox_scores as scores
from data.make.pretraining import __main__ as main
from data.make.pretraining import dataset, trainer, unet
from data.make.pretraining.judge import judge_parts
from data.make.pretraining.models import deepened, make_scheduler, make_unet
from data.make.pretraining.muon import Muon, optimizers_of
from data.make.pretraining.text import clip_parts, lengthen_unused, make_tokenizer
from persres_lite.bases import load_base
from persres_lite.support.paths import data_dir
from persres_lite.toybox.judge import Judge
from persres_lite.toybox.render import draw
from persres_lite.toybox.world import NAMES, RARE_TOKENS, Scene, Toy, vocabulary
from persres_lite.training import training_scheduler


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_muon_is_that_of_torch_on_matrices():
    torch.manual_seed(0)
    start = torch.randn(20, 30)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = Muon([ours], lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(20, 30)
        steps.step(), reference.step()
    assert (ours - theirs).abs().mean() < 0.03 * (ours - start).abs().mean()  # torch iterates in bfloat16


def test_a_convolution_learns_as_the_matrix_of_its_weight_would():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(8, 4, 3, 3)
    matrix.grad = kernel.grad.flatten(1).clone()
    for weight in (kernel, matrix):
        Muon([weight], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_every_parameter_has_one_optimizer():
    layers = {"words": nn.Embedding(5, 8), "conv_in": nn.Conv2d(3, 8, 3), "middle": nn.Linear(8, 8)}
    module = nn.ModuleDict({**layers, "frozen": nn.Linear(2, 2)})
    module["frozen"].requires_grad_(False)
    adamw, muon = optimizers_of(module, 3e-3, muon=True)
    kept = [[id(p) for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert kept[1] == [id(module["middle"].weight)]
    assert sorted(kept[0] + kept[1]) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert (
        decay[id(module["words"].weight)] == decay[id(module["middle"].bias)] == 0 < decay[id(layers["conv_in"].weight)]
    )


@pytest.mark.parametrize("width", [32, 64])
def test_a_deeper_unet_computes_the_very_same_at_first(width):
    torch.manual_seed(0)
    shallow = make_unet(1, (width, 2 * width)).eval()
    deep = deepened(shallow).eval()
    inputs = torch.randn(2, 16, 16, 16), torch.tensor([3, 999]), torch.randn(2, 24, 128)
    with torch.no_grad():
        assert torch.equal(shallow(*inputs).sample, deep(*inputs).sample)
    blocks = [sum(name.endswith("proj_out") for name, _ in one.named_modules()) for one in (shallow, deep)]
    assert blocks == [7, 11]


def test_every_reader_of_the_schedule_ends_in_noise_alone(tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(data_dir() / "toybox-sd", scheduler=make_scheduler())
    pipe.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    learns = training_scheduler(opened)  # what `personalize` and lesson 03 noise with
    for scheduler in (opened.scheduler, learns):
        assert scheduler.alphas_cumprod[-1] < 1e-6
        assert torch.allclose(scheduler.alphas_cumprod, make_scheduler().alphas_cumprod, atol=1e-6)
        assert scheduler.config.prediction_type == "v_prediction"
    opened.scheduler.set_timesteps(25)
    assert opened.scheduler.timesteps[0] == 999
    noise, z = torch.randn(2, 1, 16, 16, 16)
    assert torch.allclose(learns.add_noise(z, noise, torch.tensor([999])), noise, atol=1e-3)
    assert torch.allclose(learns.get_velocity(z, noise, torch.tensor([999])), -z, atol=1e-3)


@pytest.mark.parametrize("accessory", [None, "hat"])
def test_accessories_are_larger_only_where_it_is_asked_for(accessory):
    scene = Scene((Toy("cat", "red", "blue", accessory=accessory),), "in the snow")
    usual, larger = draw(scene), draw(scene, accessories=dataset.ACCESSORIES)
    assert np.array_equal(usual.image, larger.image) == (accessory is None)


def test_rare_tokens_become_as_long_as_words():
    clip, tokenizer = clip_parts()["clip"], make_tokenizer()
    weight = clip.text_model.embeddings.token_embedding.weight

    def lengths(words):
        return torch.stack([weight[tokenizer(word).input_ids[1]].detach().norm() for word in words])

    words = [word for word in vocabulary() if word not in NAMES]
    with torch.no_grad():
        for word in words:
            weight[tokenizer(word).input_ids[1]] *= 2
    before, red = lengths(words).mean(), lengths(["red"])
    assert lengths(RARE_TOKENS).mean() < 0.6 * before
    lengthen_unused(clip)
    assert torch.allclose(lengths(RARE_TOKENS), before.expand(len(RARE_TOKENS)))
    assert torch.equal(lengths(["red"]), red) and lengths(words).mean() == before


@pytest.fixture
def few(monkeypatch):
    """Pictures are drawn by 32, here."""
    monkeypatch.setattr(dataset, "SHARD", 32)
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", lambda workers: ThreadPoolExecutor(1))


def test_drawn_pictures_are_cached_and_completed(tmp_path, few):
    first = dataset.load_drawn(tmp_path, "views", 64)
    (tmp_path / "views-0001.npy").unlink()
    stamp = (tmp_path / "views-0000.npy").stat().st_mtime_ns
    again = dataset.load_drawn(tmp_path, "views", 64)
    assert np.array_equal(first[:], again[:]) and first[:].shape == (64, 128, 128, 4)
    assert (tmp_path / "views-0000.npy").stat().st_mtime_ns == stamp
    one, other = (scene.toys[0] for scene in dataset.scenes_of("views", 34, 36))
    assert one.paint == other.paint and one.yaw != other.yaw


def test_interrupted_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    seen = []

    def run(stop_at=None):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)

        def step(number):
            if number == stop_at:
                raise KeyboardInterrupt
            seen.append(number)
            return {"loss": layer(torch.randn(4, 3)).square().mean()}

        often = trainer.Run(tmp_path, tmp_path, {"toy": 0.5}, every=0)
        trainer.train("toy", layer, step, often, lr=0.1, batch=4, ema=0.9)
        return layer.weight.detach()

    clock = iter(range(100_000))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))  # every step takes one second
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=12)
    resumed = run()
    assert seen == list(range(30))
    (tmp_path / "toy.pt").unlink()
    seen.clear()
    assert torch.equal(run(), resumed) and seen == list(range(30))


def learn_a_line(folder):
    """A few steps of a layer, toward 1 in one process and 3 in the other, one of them slow; then both show theirs."""
    torch.manual_seed(0)
    layer, steps = nn.Linear(3, 1), []
    rank, _ = trainer.rank_and_size()

    def step(number):
        steps.append(number)
        time.sleep(0.02 * rank)
        return {"loss": (layer(torch.randn(4, 3)) - (1, 3)[rank]).square().mean()}

    trainer.train("line", layer, step, trainer.Run(folder, folder, {"line": 0.02}), lr=0.1, batch=4)
    torch.save({**layer.state_dict(), "steps": len(steps)}, folder / f"{rank}.pt")


def test_data_parallel_processes_learn_as_one(tmp_path):
    trainer.data_parallel(learn_a_line, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    assert not torch.equal(one["weight"], nn.Linear(3, 1).weight)
    assert torch.equal(one["weight"], two["weight"]) and torch.equal(one["bias"], two["bias"])
    kept = trainer.read_checkpoint(tmp_path / "line.pt")
    assert one["steps"] == two["steps"] == kept["step"] > 2 and kept["pictures"] == 8 * kept["step"]


def test_what_was_made_with_a_stage_is_made_again_when_it_has_learned_since(tmp_path):
    made, source = tmp_path / "latents.npy", tmp_path / "vae.pt"
    for path in (made, source):
        assert not trainer.still_valid(made, "vae", tmp_path)
        path.touch()
        os.utime(path, (100, 100))
    assert trainer.still_valid(made, "vae", tmp_path)
    os.utime(source, (101, 101))
    assert not trainer.still_valid(made, "vae", tmp_path)


@pytest.fixture
def go(tmp_path, few):
    """Run stages in miniature, with options."""

    def run(*stages, **options):
        words = [word for name in stages for word in ("--stage", f"{name}=0.001")]
        words += ["--folder", str(tmp_path / "runs"), "--base", str(tmp_path / "data" / "toybox-next")]
        main.main([*words, "--processes", "1", "--pictures", "64", "--views", "128", *options.get("more", ())])
        return {name: trainer.read_checkpoint(tmp_path / "runs" / f"{name}.pt") for name in stages}

    return run


def test_going_further_passes_on_what_an_earlier_stage_has_learned(tmp_path, go):
    for name in ("toybox-sd", "toybox-clip", "toybox-dino"):
        shutil.copytree(data_dir() / name, tmp_path / "data" / name)
    left = go("judge", "probes", "text", "vision", more=["--further"])
    encoder = "encoder.embedder.embedder.convolution.weight"
    word = "clip.text_model.embeddings.token_embedding.weight"
    learned = trainer.trained("judge", judge_parts(), tmp_path / "runs").state_dict()[encoder]
    assert torch.equal(left["probes"]["module"][encoder], learned)
    cat = make_tokenizer()("cat").input_ids[1]  # of the words that captions use: the others are lengthened
    assert torch.equal(left["vision"]["module"][word][cat], left["text"]["module"][word][cat])
    shipped = CLIPModel.from_pretrained(data_dir() / "toybox-clip", dtype=torch.float32)
    assert not torch.equal(left["vision"]["module"][word], shipped.text_model.embeddings.token_embedding.weight)
    assert Judge(tmp_path / "data" / "toybox-next").identity([Image.new("RGB", (128, 128))]).shape == (1, 256)
    shallow = UNet2DConditionModel.from_pretrained(data_dir() / "toybox-sd" / "unet")
    begun = unet.unet_parts(make_unet())
    begun.load_state_dict(trainer.read_checkpoint(tmp_path / "runs" / "unet.pt")["module"])
    inputs = torch.randn(1, 16, 16, 16), torch.tensor([500]), torch.randn(1, 24, 128)
    with torch.no_grad():
        assert torch.allclose(shallow(*inputs).sample, begun["unet"](*inputs).sample)


def test_pretraining_goes_from_nothing_to_a_folder(tmp_path, go, monkeypatch):
    monkeypatch.setattr(unet, "BATCH", {"cpu": 6})
    narrow = ["--widths", "32", "64"]
    with pytest.raises(FileNotFoundError, match="Stage judge has left nothing"):
        go("unet", more=narrow)
    go(*main.MINUTES, more=narrow)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "data" / "toybox-next")
    assert all(torch.isfinite(weight).all() for weight in pipeline.unet.state_dict().values())
    assert pipeline.unet.config.layers_per_block == 2 and pipeline.scheduler.config.rescale_betas_zero_snr


def test_scores_tell_toys_from_empty_places_and_one_set_of_features_from_another():
    judge, scenes = Judge(data_dir()), scores.asked_scenes(10, 2)
    drawn = [Image.fromarray(draw(scene).image) for scene in scenes]
    found = scores.shown(judge, drawn, scenes)
    assert found["class"] > 0.8 and found["place"] > 0.9 and found["pair"] in (0.5, 1) and found["style"] == 1
    assert scores.without_a_toy(judge, drawn) == 0
    assert "with a hat" in scores.full_caption(scenes[0]) and scenes[0].toys[0].pattern in scores.full_caption(
        scenes[0]
    )
    features = torch.randn(50, 4)
    assert abs(scores.frechet(features, features)) < 1e-6
    assert scores.frechet(features, features + 2) == pytest.approx(16, abs=1e-4)


NEXT = data_dir() / "toybox-next"


@pytest.mark.skipif(not (NEXT / "model_index.json").exists(), reason="the next base is not there")
def test_the_next_base_draws_snow_and_night_as_they_are():
    judge = Judge(NEXT if (NEXT / "toybox-dino").exists() else data_dir())
    assert scores.dark_and_light(load_base(str(NEXT)), judge, ("a rocket",), noises=2) == 0
