"""Pretraining of Toybox: caches, interruptions, several processes, going further, and all of it in miniature."""

from __future__ import annotations

import os
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
from transformers import CLIPModel

from data.make.pretraining import __main__ as main
from data.make.pretraining import dataset, judge, ship, trainer
from data.make.pretraining.muon import Muon, optimizers_of
from data.make.pretraining.text import clip_parts, lengthen_unused, make_tokenizer
from persres_lite.support.paths import data_dir
from persres_lite.toybox.judge import Judge
from persres_lite.toybox.world import NAMES, RARE_TOKENS, vocabulary


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
    moved = (ours - start).abs().mean()
    assert (ours - theirs).abs().mean() < 0.03 * moved  # both iterate in bfloat16


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
    module = nn.ModuleDict(
        {
            "words": nn.Embedding(5, 8),
            "conv_in": nn.Conv2d(3, 8, 3),
            "middle": nn.Linear(8, 8),
            "frozen": nn.Linear(2, 2),
        }
    )
    module["frozen"].requires_grad_(False)
    adamw, muon = optimizers_of(module, 3e-3, 0.01, muon=True)
    kept = [[id(p) for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert kept[1] == [id(module["middle"].weight)]
    assert sorted(kept[0] + kept[1]) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    decays = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert (
        decays[id(module["words"].weight)]
        == decays[id(module["middle"].bias)]
        == 0
        < decays[id(module["conv_in"].weight)]
    )


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
    assert set(NAMES) < set(vocabulary())


def test_a_stage_begins_anew_where_one_that_it_needs_has_learned_since(tmp_path, monkeypatch):
    clock = iter(range(100_000))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))  # every step takes one second
    weights = []

    def run(name, minutes, **options):
        layer = nn.Linear(3, 1)

        def step(number):
            return {"loss": layer(torch.randn(4, 3)).square().mean()}

        trainer.train(name, layer, step, minutes=minutes, lr=0.1, pictures=4, folder=tmp_path, **options)
        weights.append(layer.weight.detach())
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    run("first", 0.1)
    assert run("second", 0.1, needs=("first",))["step"] == 6
    assert run("second", 0.2, needs=("first",))["step"] == 12
    run("first", 0.2)
    state = run("second", 0.05, needs=("first",))
    assert state["step"] == 3 and state["needed"] == {"first": 12}
    assert (
        weights[-1] - weights[2]
    ).abs().max() < 0.05  # it went on from what it knew, at a rate that has just begun to rise


def test_drawn_pictures_are_cached_and_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 4)
    first = dataset.load_drawn(dataset.draw_scenes, 8, tmp_path, "few", workers=1)
    (tmp_path / "few-0001.npy").unlink()
    stamp = (tmp_path / "few-0000.npy").stat().st_mtime_ns
    again = dataset.load_drawn(dataset.draw_scenes, 8, tmp_path, "few", workers=1)
    assert np.array_equal(first[:], again[:]) and first[:].shape == (8, 128, 128, 4)
    assert (tmp_path / "few-0000.npy").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="multiple of 4"):
        dataset.load_drawn(dataset.draw_scenes, 9, tmp_path, "few")


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


def test_data_parallel_processes_learn_as_one(tmp_path):
    trainer.data_parallel(learn_a_line, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    assert not torch.equal(one["weight"], nn.Linear(3, 1).weight)
    assert torch.equal(one["weight"], two["weight"]) and torch.equal(one["bias"], two["bias"])
    kept = torch.load(tmp_path / "line.pt", weights_only=True)
    assert one["steps"] == two["steps"] == kept["step"] > 2 and kept["pictures"] == 8 * kept["step"]


def wait_long(folder):
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(120)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes run")
def test_processes_end_when_what_began_them_is_killed(tmp_path):
    code = (
        "import pathlib, tests.test_pretraining as t\n"
        f"if __name__ == '__main__': t.trainer.data_parallel(t.wait_long, 2, pathlib.Path({str(tmp_path)!r}))"
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
    monkeypatch.setattr(main, "PICTURES", 64)
    monkeypatch.setattr(main, "VIEWS", 64)
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    for name in ("toybox-sd", "toybox-clip", "toybox-dino"):
        shutil.copytree(data_dir() / name, tmp_path / "data" / name)
    runs = tmp_path / "runs"
    where = ["--folder", str(runs), "--data", str(tmp_path / "data"), "--further", "--threads", "1"]

    def go(*stages):
        main.main([*where, *(word for name in stages for word in ("--stage", name, f"--{name}-minutes", "0.001"))])
        return {name: torch.load(runs / f"{name}.pt", weights_only=True) for name in stages}

    left = go("judge", "probes", "text", "vision")
    encoder = "encoder.embedder.embedder.convolution.weight"
    word = "clip.text_model.embeddings.token_embedding.weight"
    shipped = CLIPModel.from_pretrained(data_dir() / "toybox-clip", dtype=torch.float32)
    learned = trainer.trained("judge", judge.judge_parts(), runs).state_dict()[encoder]
    assert torch.equal(left["probes"]["module"][encoder], learned)
    cat = make_tokenizer()("cat").input_ids[1]  # of the words that captions use: the others are lengthened
    assert torch.equal(left["vision"]["module"][word][cat], left["text"]["module"][word][cat])
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


def test_pretraining_goes_from_nothing_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 32)
    monkeypatch.setattr(main, "PICTURES", 64)
    monkeypatch.setattr(main, "VIEWS", 64)
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    where = ["--folder", str(tmp_path / "runs"), "--data", str(tmp_path / "data")]
    options = [word for name in main.MINUTES for word in ("--stage", name, f"--{name}-minutes", "0.001")]
    with pytest.raises(FileNotFoundError, match="Stage vae has left nothing"):
        main.main([*where, "--stage", "unet"])
    main.main([*where, *options, "--threads", "1"])
    first = load_file(tmp_path / "data" / "toybox-sd" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in first.values())
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "data" / "toybox-sd")
    assert Judge(tmp_path / "data").identity([Image.new("RGB", (128, 128))]).shape == (1, 256)
    assert pipeline.vae_scale_factor == 8 and pipeline.scheduler.config.prediction_type == "v_prediction"
