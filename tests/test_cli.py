"""The command line: a whole round, exit codes, sentences instead of tracebacks, and files whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from persres_lite import Residuals, training
from persres_lite.cli import commands, main
from persres_lite.masks import RULES
from tests.test_training import make_concept
from tests.tiny import tiny_pipeline

COMMANDS = ("personalize", "sample", "compare", "export")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base's folder, a concept's folder and a file of residuals that were learned on both."""
    home = tmp_path_factory.mktemp("world")
    tiny_pipeline("sd1").save_pretrained(home / "base")
    (home / "cat").mkdir()
    for i, image in enumerate(make_concept().images):
        image.save(home / "cat" / f"{i}.png")
    assert main(learn(home)) == 0
    return home


def learn(home, *more, out="cat.safetensors"):
    """The arguments of a short training."""
    what = ["personalize", str(home / "cat"), "--class", "cat", "--base", str(home / "base"), "--device", "cpu"]
    return [*what, "--steps", "3", "--batch-size", "2", "--quiet", "--out", str(home / out), *more]


def draw(home, command, *more):
    """The arguments of a short sampling."""
    what = [command, str(home / "cat.safetensors"), "--base", str(home / "base"), "--device", "cpu"]
    return [*what, "--steps", "2", *more]


def test_help_teaches_and_answers_without_loading_torch():
    check = """import sys; from persres_lite.cli import main
try: main(["--help"])
finally: assert "torch" not in sys.modules"""
    home = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", check], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in (*COMMANDS, "dW = A B", "plum-cat", "exit codes"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and len(shown.split()) > 60
    if command in ("sample", "compare"):
        assert all(rule in shown for rule in RULES)


def test_a_whole_round(world, tmp_path, capsys):
    base = tiny_pipeline("sd1")
    residuals = Residuals.load(world / "cat.safetensors", base)
    assert residuals.metadata["token"] == "sks" and len(residuals.history) == 3

    out = str(tmp_path / "pictures")
    for mode, images in (("lag", "2"), ("residual", "1"), ("original", "1")):
        more = ("a photo of a {} at night", "--out", out, "--mode", mode, "--images", images, "--scale", "3")
        assert main(draw(world, "sample", *more)) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 4 and "a-photo-of-a-sks-cat-at-night-lag-0.png" in names[0]
    pictures = [np.asarray(Image.open(name)) for name in names]
    assert pictures[0].shape == (64, 64, 3)
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])  # modes and seeds all differ

    sheet = tmp_path / "compare.png"
    more = ("--out", str(sheet), "--mask", "quantile", "--mask-option", "q=0.9")
    assert main(draw(world, "compare", "a photo of a sks cat", "a {} on the beach", *more)) == 0
    assert "2 rows" in capsys.readouterr().out and Image.open(sheet).width > 4 * 128

    for format in ("diffusers", "kohya"):
        lora = tmp_path / f"{format}.safetensors"
        write = ["export", str(world / "cat.safetensors"), "--base", str(world / "base"), "--format", format]
        assert main([*write, "--out", str(lora)]) == 0
        assert 'type "sks cat"' in capsys.readouterr().out
        assert main(["sample", str(lora), "a {}", "--out", out, *draw(world, "sample")[2:]]) == 0
        capsys.readouterr()


def test_a_lora_on_other_layers_too_needs_the_option_that_its_sentence_names(world, tmp_path, capsys):
    path, out = tmp_path / "lora.safetensors", tmp_path / "again.safetensors"
    there = ["--base", str(world / "base"), "--device", "cpu"]
    assert main(["export", str(world / "cat.safetensors"), "--out", str(path), *there]) == 0
    other = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 64, 1, 1)}
    save_file(load_file(path) | other, path)
    assert main(["export", str(path), "--out", str(out), *there]) == 2
    assert "--only-proj-out" in capsys.readouterr().err
    assert main(["export", str(path), "--out", str(out), "--only-proj-out", *there]) == 0 and out.is_file()


def test_compare_shows_what_sample_draws(world, tmp_path):
    prompt = "a photo of a sks cat"
    main(draw(world, "compare", prompt, "--out", str(tmp_path / "compare.png"), "--scale", "3", "--quiet"))
    main(draw(world, "sample", prompt, "--out", str(tmp_path), "--scale", "3"))
    sheet = Image.open(tmp_path / "compare.png").convert("RGB")
    alone = Image.open(tmp_path / "a-photo-of-a-sks-cat-lag-0.png").resize((128, 128))
    left = 8 + 2 * (128 + 8)
    assert (np.asarray(sheet.crop((left, 36, left + 128, 36 + 128))) == np.asarray(alone)).all()


def test_personalize_samples_along_the_way_and_takes_its_options(world, monkeypatch):
    known = training.entry(tiny_pipeline("sd1"))
    quick = replace(known, sampling=known.sampling | {"num_inference_steps": 2})
    monkeypatch.setattr(training, "entry", lambda base: quick)
    more = ("--sample-every", "2", "--rank", "2", "--init", "random", "--train-token", "--gradient-checkpointing")
    arguments = learn(world, *more, out="sub/other.safetensors")
    assert main(arguments) == 0
    assert (world / "sub" / "other-0002.png").is_file() and not (world / "sub" / "other-0003.png").exists()
    residuals = Residuals.load(world / "sub" / "other.safetensors", tiny_pipeline("sd1"))
    assert set(residuals.ranks.values()) == {2} and residuals.rows and residuals.metadata["init"] == "random"


LEARN = ["personalize", "{home}/cat", "--class", "cat", "--base", "{home}/base", "--out", "{out}"]
DRAW = ["sample", "{home}/cat.safetensors", "--base", "{home}/base", "--steps", "1"]
WRITE = ["export", "{home}/cat.safetensors", "--base", "{home}/base", "--out", "{out}"]

BAD = [
    (["personalize", "{home}/nowhere", "--out", "{out}"], "There is no folder or picture"),
    (["personalize", "{home}/cat", "--base", "{home}/base", "--out", "{out}"], "needs a macro class"),
    ([*LEARN, "--base", "no-such-base"], "no-such-base"),
    ([*LEARN, "--out", "cat.pt"], "must end in .safetensors"),
    ([*LEARN, "--out", "{home}/folder.safetensors"], "is a folder"),
    ([*LEARN, "--steps", "0"], "steps must be at least 1"),
    ([*LEARN, "--lr", "-1"], "lr must be a positive number"),
    ([*LEARN, "--rank", "0"], "Rank 0 does not fit"),
    ([*LEARN, "--init", "zero"], "Unknown init 'zero'"),
    ([*LEARN, "--mixed-precision", "fp8"], "choose 'fp16', 'bf16' or None"),
    ([*LEARN, "--masked-loss"], "masked_loss needs masks"),
    ([*LEARN, "--checkpoint", "{home}/cat.safetensors"], "no checkpoint of a training"),
    (["sample", "{home}/missing.safetensors", "a cat"], "There is no file"),
    (["sample", "{home}/cat/0.png", "a cat"], "not a whole safetensors file"),
    ([*DRAW, "a {}", "--out", "{home}/cat/0.png"], "is a file"),
    ([*DRAW, "a dog on the beach"], "does not contain"),
    ([*DRAW, "a {}", "--mask", "circle"], "Unknown mask rule 'circle': choose one of median"),
    ([*DRAW, "a {}", "--mask-option", "q=0.5"], "has no option 'q'"),
    ([*DRAW, "a {}", "--window", "0.7", "0.2"], "is not a range of shares"),
    (["compare", *DRAW[1:], "a {}", "--out", "compare.jpg"], "must end in .png"),
    ([*WRITE, "--format", "ckpt"], "Unknown format"),
    ([*WRITE, "--out", "lora.bin"], "must end in .safetensors"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(world, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (world / "folder.safetensors").mkdir(exist_ok=True)
    places = {"{home}": str(world), "{out}": str(tmp_path / "out.safetensors")}
    for name, place in places.items():
        arguments = [part.replace(name, place) for part in arguments]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    complaint = shown.strip().splitlines()[-1]
    assert complaint.startswith("persres-lite: ") and sentence in complaint and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [[], ["paint"], ["sample"], ["sample", "a", "b", "--images", "0"], ["sample", "a", "b", "--mask-option", "q"]],
)
def test_arguments_that_do_not_parse_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: persres-lite" in capsys.readouterr().err


def test_interrupted_it_says_how_to_go_on_and_does(world, capsys, monkeypatch):
    step, count = training._step, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training, "_step", interrupted)
    arguments = learn(world, "--checkpoint", str(world / "state.safetensors"), out="again.safetensors")
    assert main(arguments) == 1
    assert "interrupted; the same command goes on from" in capsys.readouterr().err
    assert not (world / "again.safetensors").exists()
    assert main(arguments) == 0 and len(count) == 4  # one step was left
    base = tiny_pipeline("sd1")
    whole, resumed = (Residuals.load(world / f"{name}.safetensors", base) for name in ("cat", "again"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_training_that_diverges_exits_with_1_and_writes_no_residuals(world, capsys):
    assert main(learn(world, "--lr", "1e25", out="diverged.safetensors")) == 1
    assert "try a rate below 1e+25" in capsys.readouterr().err
    assert not (world / "diverged.safetensors").exists()


def test_a_base_out_of_reach_exits_with_1(world, capsys):
    assert main(learn(world, "--base", "sd-1.4", out="far.safetensors")) == 1  # tests run offline
    assert "Connect to the network once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reason", "arguments", "advised", "not_advised"),
    [
        ("CUDA out of memory. Tried to allocate", [], "--device cpu", "--dtype"),
        ("CUDA out of memory. Tried to allocate", ["--dtype", "float32"], "--dtype bfloat16", "--batch-size"),
        ("DefaultCPUAllocator: can't allocate memory", [], "--dtype bfloat16", "--device"),
        ("DefaultCPUAllocator: not enough memory", ["--dtype", "bfloat16"], "close what else", "--"),
    ],
)
def test_too_little_memory_is_a_sentence(world, capsys, monkeypatch, reason, arguments, advised, not_advised):
    def fail(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setattr(commands, "load_base", fail)
    assert main(draw(world, "sample", "a {}", *arguments)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("persres-lite: out of memory: ") and advised in shown and not_advised not in shown


def test_a_training_without_memory_advises_what_was_not_yet_asked_for(world, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "_step", fail)
    assert main(learn(world, "--gradient-checkpointing", out="no.safetensors")) == 1
    shown = capsys.readouterr().err
    assert "--batch-size 1" in shown and "--gradient-checkpointing" not in shown


def test_a_mistake_of_the_program_itself_is_not_hidden(world, monkeypatch):
    def fail(chosen):
        raise RuntimeError("something nobody thought of")

    monkeypatch.setattr(commands, "sample", fail)
    with pytest.raises(RuntimeError, match="nobody"):
        main(draw(world, "sample", "a {}"))


def test_a_failure_while_writing_leaves_the_old_file(world, tmp_path, monkeypatch):
    path = tmp_path / "compare.png"
    path.write_text("the old one")

    def full(self, where, *_):
        Path(where).write_text("half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(draw(world, "compare", "a {}", "--out", str(path), "--quiet")) == 1
    assert path.read_text() == "the old one" and [p.name for p in tmp_path.iterdir()] == ["compare.png"]
