"""The command line: a whole round, exit codes, sentences instead of tracebacks, and files whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
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
from persres_lite.support import files
from tests.helpers import make_concept
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
    assert residuals.metadata["token"] == "sks" and len(residuals.losses) == 3

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
    known = training.settings_of(tiny_pipeline("sd1"))
    quick = replace(known, sampling=known.sampling | {"num_inference_steps": 2})
    monkeypatch.setattr(training, "settings_of", lambda base: quick)
    more = ("--sample-every", "2", "--rank", "2", "--init", "random", "--train-token")
    arguments = learn(world, *more, out="sub/other.safetensors")
    assert main(arguments) == 0
    assert (world / "sub" / "other-0002.png").is_file() and not (world / "sub" / "other-0003.png").exists()
    residuals = Residuals.load(world / "sub" / "other.safetensors", tiny_pipeline("sd1"))
    assert set(residuals.ranks.values()) == {2} and residuals.token_embeddings
    assert residuals.metadata["init"] == "random"


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
    ([*LEARN, "--loss", "masked"], "has no masks"),
    ([*LEARN, "--checkpoint", "{home}/cat.safetensors"], "no checkpoint of a training"),
    (["sample", "{home}/missing.safetensors", "a cat"], "There is no file"),
    (["sample", "{home}/cat/0.png", "a cat"], "not a whole safetensors file"),
    ([*DRAW, "a {}", "--out", "{home}/cat/0.png"], "is a file"),
    ([*DRAW, "a dog on the beach"], "does not contain"),
    ([*DRAW, "a {}", "--mask", "circle"], "Unknown mask rule 'circle': choose one of median"),
    ([*DRAW, "a {}", "--mask-option", "q=0.5"], "has no option 'q'"),
    ([*DRAW, "a {}", "--window", "0.7", "0.2"], "is not a range of shares"),
    ([*DRAW, "a {}", "--window", "0.9", "1", "--steps", "2"], "None of 2 steps begins in the window 0.9 to 1"),
    ([*DRAW, "a {}", "--device", "gpu"], "There is no kind of device 'gpu': choose cpu, cuda or mps"),
    ([*DRAW, "a {}", "--device", "cuda:99"], "has no cuda:99 device: choose --device cpu"),
    ([*DRAW, "a {}", "--device", "meta"], "has no meta device"),
    ([*DRAW, "a {}", "--mask", "quantile", "--mask-option", "q=5"], "must be a number from 0 to 1, not 5.0"),
    ([*DRAW, "a {}", "--mask", "quantile", "--mask-option", "q=half"], "must be a number from 0 to 1, not 'half'"),
    ([*DRAW, "a {}", "--mask", "soft", "--mask-option", "sharpness=nan"], "must be a number above 0, not nan"),
    ([*DRAW, "a {}", "--mask-option", "scale=0.5"], "has no option 'scale'"),
    ([*DRAW, "a {}", "--mask-option", "mask=otsu"], "has no option 'mask'"),
    ([*DRAW, "a {}", "--mask-option", "maps=1"], "has no option 'maps'"),
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
    [
        [],
        ["paint"],
        ["sample"],
        ["sample", "a", "b", "--images", "0"],
        ["sample", "a", "b", "--mask-option", "q"],
        ["sample", "a", "b", "--seed", "99999999999999999999"],
        ["sample", "a", "b", "--seed", "-1"],
        ["sample", "a", "b", "--scale", "nan"],
        ["sample", "a", "b", "--guidance", "inf"],
        ["sample", "a", "\udcff"],
        ["personalize", "a", "--out", "b.safetensors", "--lr", "1e999"],
        ["personalize", "a", "--out", "b.safetensors", "--batch-size", "1000000000"],
        ["personalize", "a", "--out", "b.safetensors", "--class", " "],
    ],
)
def test_arguments_that_do_not_parse_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: persres-lite" in capsys.readouterr().err


def test_interrupted_it_says_how_to_go_on_and_does(world, capsys, monkeypatch):
    step, count = training.step, []

    def interrupted(*arguments, **options):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(training, "step", interrupted)
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


def test_a_training_without_memory_for_a_single_picture_says_so(world, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "step", fail)
    assert main(learn(world, out="no.safetensors")) == 1
    assert "out of memory: close what else uses it" in capsys.readouterr().err


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


# ------------------------------------------------------------------------------- what a user cannot see going wrong


def test_two_prompts_of_one_name_are_two_files_and_nothing_is_overwritten(world, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--mode", "residual", "--scale", "3"]
    assert main(draw(world, "sample", "{} 猫", "{} 犬", "a {}!", "a {}?", *out)) == 0
    names = capsys.readouterr().out.split()
    assert len(set(names)) == 4 and all(Path(name).is_file() for name in names)
    assert {Path(name).name for name in names} == {
        "sks-cat-猫-residual-0.png",
        "sks-cat-犬-residual-0.png",
        "a-sks-cat-residual-0.png",
        "a-sks-cat-residual-0-2.png",
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(draw(world, "sample", "a {}!", *out)) == 0  # the same picture again: no second copy of it
    assert main(draw(world, "sample", "a {}!", *out, "--guidance", "1")) == 0
    assert "a-sks-cat-residual-0-3.png" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_words_for_the_mask_leave_the_prompt_as_it_is(world, tmp_path, capsys):
    """{} stands for the concept's words, whatever --words says."""
    more = ("a photo of a {} on the beach", "--mode", "residual", "--out")
    assert main(draw(world, "sample", *more, str(tmp_path / "one"), "--words", "beach")) == 0
    assert main(draw(world, "sample", *more, str(tmp_path / "other"))) == 0
    one, other = (Path(name).read_bytes() for name in capsys.readouterr().out.split())
    assert one == other
    more = ("a photo of a {} on the beach", "--mode", "lag", "--scale", "9", "--out")
    assert main(draw(world, "sample", *more, str(tmp_path / "one"), "--words", "beach")) == 0
    assert main(draw(world, "sample", *more, str(tmp_path / "other"))) == 0
    one, other = (Path(name).read_bytes() for name in capsys.readouterr().out.split())
    assert one != other


def flipped(path, target):
    """One bit of one exponent is another: 0.06 becomes 2e37."""
    residuals = Residuals.load(path, tiny_pipeline("sd1"))
    factor = next(iter(residuals.A.values())).data
    factor.view(torch.int32)[0, 0] = torch.tensor(0.063).view(torch.int32) ^ (1 << 30)
    assert factor[0, 0] > 1e36
    residuals.save(target)


@pytest.mark.parametrize("mode", ["lag", "residual"])
def test_a_flipped_bit_is_not_a_black_picture(world, tmp_path, capsys, mode):
    flipped(world / "cat.safetensors", tmp_path / "bit.safetensors")
    arguments = draw(world, "sample", "a {}", "--mode", mode, "--out", str(tmp_path / "d"))
    arguments[1] = str(tmp_path / "bit.safetensors")
    assert main(arguments) == 2
    assert "damaged" in capsys.readouterr().err and not (tmp_path / "d").exists()


@pytest.mark.parametrize("mode", ["lag", "residual", "original"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_numbers_that_are_not_finite_are_refused(world, tmp_path, capsys, monkeypatch, mode, part):
    load = commands.load_base

    def broken(*arguments):
        base = load(*arguments)
        next(getattr(base, part).conv_out.parameters() if part == "unet" else base.vae.decoder.parameters()).fill_(
            float("nan")
        )
        return base

    monkeypatch.setattr(commands, "load_base", broken)
    assert main(draw(world, "sample", "a {}", "--mode", mode, "--out", str(tmp_path / "d"))) == 1
    assert "is no picture" in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_a_scale_beyond_all_numbers_is_refused(world, tmp_path, capsys):
    assert main(draw(world, "sample", "a {}", "--mode", "residual", "--scale", "1e38", "--out", str(tmp_path))) == 1
    assert "a --scale below 1" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_all_prompts_are_checked_before_the_first_picture(world, tmp_path, capsys):
    assert main(draw(world, "sample", "a {}", "a dog", "--out", str(tmp_path / "d"))) == 2
    assert "does not contain" in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_what_is_cut_off_a_prompt_is_said(world, tmp_path, capsys):
    assert main(draw(world, "sample", "a {}" + " red" * 80, "--out", str(tmp_path))) == 0
    assert "is not read, 8 tokens: shorten it" in capsys.readouterr().err  # 80 + 3 and two marks, of 77


def test_a_base_that_a_file_names_is_not_fetched_unasked(world, tmp_path, capsys, monkeypatch):
    residuals = Residuals.load(world / "cat.safetensors", tiny_pipeline("sd1"))
    asked = []
    monkeypatch.setattr(commands, "load_base", lambda name, *_: asked.append(name) or tiny_pipeline("sd1"))
    for number, name in enumerate(("some/one", str(tmp_path), "../base", "https://host/x")):
        residuals.metadata["base"] = name
        path = residuals.save(tmp_path / f"{number}.safetensors")
        assert main(["sample", str(path), "a {}", "--steps", "1", "--out", str(tmp_path / "d")]) == 2
        shown = capsys.readouterr().err
        assert "names a base of its own" in shown and repr(name)[1:-1] in shown and "--base" in shown
        main(["export", str(path), "--out", str(tmp_path / "k.safetensors"), "--base", "mine", "--format", "kohya"])
        assert main(["sample", str(tmp_path / "k.safetensors"), "a {}"]) == 2  # a LoRA of ours says it, too
    assert set(asked) == {"mine"}
    monkeypatch.setenv("PERSRES_BASE", "my/own")  # the user's own choice
    assert main(["sample", str(path), "a {}", "--steps", "1", "--out", str(tmp_path / "d")]) == 0
    assert asked[-1] == "my/own"


def test_a_rate_that_is_too_high_is_told_with_options_of_the_command_line(world, tmp_path, capsys):
    arguments = learn(world, "--checkpoint", str(tmp_path / "state.safetensors"), out="never.safetensors")
    assert main([*arguments, "--lr", "1e25"]) == 1
    shown = capsys.readouterr().err
    assert "try a rate below" in shown and ".residuals" not in shown and "No residuals were written" in shown
    assert f"Delete {tmp_path / 'state.safetensors'} first" in shown
    (tmp_path / "state.safetensors").unlink()
    assert main(arguments) == 0


def test_a_loss_that_ends_far_above_its_beginning_is_said(world, capsys, monkeypatch):
    """A rate of a million: nothing is infinite, and nothing was learned."""

    def step(*arguments):
        arguments[4].losses.append(losses.pop(0))
        return arguments[4].losses[-1]

    monkeypatch.setattr(training, "step", step)
    losses = [0.11, 0.9, 1.2]
    assert main(learn(world, "--lr", "1e6", out="worse.safetensors")) == 0
    assert "The loss ended at 1.2, far above 0.11 where it began" in capsys.readouterr().err
    losses = [0.11, 0.3, 0.2]  # the noise of a batch
    assert main(learn(world, out="better.safetensors")) == 0
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------ no room, no right


@contextmanager
def little_room(folder, size="100k"):
    """A file system of its own that is soon full; without the right to mount one, a limit on the size of files."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_known_before_the_training(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "step", lambda *_: pytest.fail("trained"))
    full = tmp_path / "full"
    with little_room(full):
        (full / "taken").write_bytes(bytes(60_000))
        for more in (["--out", str(full / "cat.safetensors")], ["--checkpoint", str(full / "state.safetensors")]):
            assert main(learn(world, *more, "--rank", "8", out="no-room.safetensors")) == 1
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1 and "cannot be written" in shown and "make room or name another" in shown
        assert [path.name for path in full.iterdir()] == ["taken"]
    assert not (world / "no-room.safetensors").exists()


@pytest.mark.parametrize("command", ["export", "compare", "sample"])
def test_no_room_for_a_result_is_one_sentence_and_nothing_is_half_written(
    world, tmp_path, capsys, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    full = tmp_path / "full"
    with little_room(full):
        (full / "taken").write_bytes(bytes(98_000))
        if command == "export":
            arguments = ["export", str(world / "cat.safetensors"), "--base", str(world / "base")]
            arguments += ["--out", str(full / "lora.safetensors")]
        else:
            out = full / "sheet.png" if command == "compare" else full
            arguments = draw(world, command, "a {}", "--quiet", "--out", str(out))
        code = main(arguments)
        shown = capsys.readouterr().err
        assert code == 1 and shown.count("\n") == 1 and "cannot be written" in shown
        assert [path.name for path in full.iterdir()] == ["taken"]


def test_a_disk_that_fills_up_meanwhile_loses_no_training(world, tmp_path, capsys, monkeypatch):
    """The result goes where there is room, and a checkpoint that cannot be renewed ends nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    write, place = files.whole_file, tmp_path / "there"
    begun = []

    def full(path):
        if Path(path).parent == place and begun:
            raise OSError(28, "No space left on device")
        return write(path)

    step = training.step
    monkeypatch.setattr(training, "step", lambda *given, **options: begun.append(1) or step(*given, **options))
    monkeypatch.setattr(files, "whole_file", full)
    more = ["--checkpoint", str(place / "state.safetensors"), "--out", str(place / "kept.safetensors")]
    assert main(learn(world, *more)) == 1
    shown = capsys.readouterr().err
    assert "No space left" in shown and f"so the result is in {tmp_path / 'kept.safetensors'}" in shown
    kept = Residuals.load(tmp_path / "kept.safetensors", tiny_pipeline("sd1"))
    whole = Residuals.load(world / "cat.safetensors", tiny_pipeline("sd1"))
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), whole.parameters(), strict=True))


def test_places_that_cannot_be_written_are_told(world, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    cat, there = str(world / "cat.safetensors"), ["--base", str(world / "base")]
    for place in (tmp_path / "file" / "x", Path("/proc/nothing"), Path("/dev/null/x")):
        for arguments in (
            learn(world, "--out", str(place / "cat.safetensors")),
            learn(world, "--checkpoint", str(place / "s.safetensors"), out="no.safetensors"),
            draw(world, "sample", "a {}", "--out", str(place)),
            draw(world, "compare", "a {}", "--out", str(place / "sheet.png")),
            ["export", cat, *there, "--out", str(place / "lora.safetensors")],
        ):
            assert main(arguments) in (1, 2)
            shown = capsys.readouterr().err
            assert shown.startswith("persres-lite: ") and shown.count("\n") == 1, shown
    assert not (world / "no.safetensors").exists()


def test_files_are_for_whom_the_umask_says(world, tmp_path):
    before = os.umask(0o022)
    try:
        there = ["--base", str(world / "base")]
        assert main(["export", str(world / "cat.safetensors"), "--out", str(tmp_path / "l.safetensors"), *there]) == 0
        assert main(draw(world, "sample", "a {}", "--out", str(tmp_path))) == 0
        os.umask(0o027)
        assert main(["export", str(world / "cat.safetensors"), "--out", str(tmp_path / "m.safetensors"), *there]) == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"l.safetensors": 0o644, "a-sks-cat-lag-0.png": 0o644, "m.safetensors": 0o640}


def test_one_file_for_two_things_is_refused(world, capsys):
    same = str(world / "both.safetensors")
    assert main(learn(world, "--out", same, "--checkpoint", str(world / "." / "both.safetensors"))) == 2
    assert "is the file of the checkpoint, too" in capsys.readouterr().err
    cat = str(world / "cat.safetensors")
    assert main(["export", cat, "--out", cat, "--base", str(world / "base")]) == 2
    assert "is the file of the residuals, too" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- quiet, and small


def test_ordinary_commands_say_nothing_that_nobody_can_act_on(world, tmp_path):
    """In a process of its own: nothing on the error stream but what is ours."""
    place = {"cwd": tmp_path, "capture_output": True, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONWARNINGS": "default"}
    (tmp_path / "cat").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40), (200, 60 * i, 60)).save(tmp_path / "cat" / f"{i}.png")
    commands = (
        learn(world, out=str(tmp_path / "a.safetensors"))[:-2] + ["--out", str(tmp_path / "a.safetensors")],
        draw(world, "sample", "a {}"),
    )
    for arguments in commands:
        run = [sys.executable, "-c", "import sys; from persres_lite.cli import main; sys.exit(main(sys.argv[1:]))"]
        done = subprocess.run([*run, *arguments], env=environment, **place)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_remark_of_ours_is_a_plain_line(world, tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (200, 60 * i, 60)).save(tmp_path / "cat" / f"{i}.png")
    (tmp_path / "cat" / "clip.mpg").write_bytes(b"\0\0\1\xb3" + bytes(100))
    arguments = learn(world, "--out", str(tmp_path / "out.safetensors"))
    arguments[1] = str(tmp_path / "cat")
    assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("persres-lite: ") for line in lines] == [True, True]
    assert "Skipped 1 file" in lines[0] and "3 pictures are enlarged to 64 x 64" in lines[1]
