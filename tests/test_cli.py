"""The command line: a whole round, exit codes, sentences instead of tracebacks, and files whole or not at all."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from persres_lite import Residuals, training
from persres_lite.cli import SCHEDULERS, _parser, commands, main
from persres_lite.masks import RULES
from persres_lite.support import paths
from tests.helpers import make_concept
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
COMMANDS = ("personalize", "sample", "compare", "show", "export")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base's folder, a concept's folder and a file of residuals that were learned on both."""
    home = tmp_path_factory.mktemp("world")
    tiny_pipeline("sd1").save_pretrained(home / "base")
    for image, name in zip(make_concept().images, "012", strict=True):
        (home / "cat" / "masks").mkdir(parents=True, exist_ok=True)
        image.save(home / "cat" / f"{name}.png")
        Image.new("L", image.size, "white").save(home / "cat" / "masks" / f"{name}.png")
    (home / "folder.safetensors").mkdir()
    assert main(learn(home)) == 0
    return home


@pytest.fixture
def loaded(monkeypatch):
    """The pipelines that commands have loaded: made anew in memory, not read."""
    made = []
    monkeypatch.setattr(commands, "load_base", lambda *_: made.append(tiny_pipeline("sd1")) or made[-1])
    return made


def learn(home, *more, out="cat.safetensors"):
    """The arguments of a short training."""
    what = ["personalize", str(home / "cat"), "--class", "cat", "--base", str(home / "base"), "--device", "cpu"]
    return [*what, "--steps", "3", "--batch-size", "2", "--quiet", "--out", str(home / out), *map(str, more)]


def draw(home, command, *more):
    """The arguments of a short sampling."""
    what = [command, str(home / "cat.safetensors"), "--base", str(home / "base"), "--device", "cpu"]
    return [*what, "--steps", "1", "--quiet", *map(str, more)]


def told(capsys):
    """What was said on the error stream: one line of ours, and no traceback."""
    shown = capsys.readouterr().err
    assert shown.startswith("persres-lite: ") and shown.count("\n") == 1, shown
    return shown


# --------------------------------------------------------------------------------------------------------- the round


def test_help_teaches_and_answers_without_loading_torch():
    check = """import sys; from persres_lite.cli import main
try: main(["--help"])
finally: assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in (*COMMANDS, "dW = A B", "plum-cat", "Exit codes"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and len(shown.split()) > 60
    if command in ("sample", "compare"):
        assert all(word in shown for word in (*RULES, *SCHEDULERS))


def test_a_whole_round(world, tmp_path, capsys):
    residuals = Residuals.load(world / "cat.safetensors", tiny_pipeline("sd1"))
    assert residuals.metadata["token"] == "sks" and len(residuals.losses) == 3
    out = str(tmp_path / "pictures")
    for mode, images in (("lag", "2"), ("residual", "1"), ("original", "1")):
        more = ("a photo of a {} at night", "--out", out, "--mode", mode, "--images", images, "--scale", "30")
        assert main(draw(world, "sample", *more)) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 4 and "a-photo-of-a-sks-cat-at-night-lag-0.png" in names[0]
    pictures = [np.asarray(Image.open(name)) for name in names]
    assert pictures[0].shape == (64, 64, 3)
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])  # modes and seeds all differ

    sheet = tmp_path / "compare.png"
    more = ("--out", sheet, "--mask", "quantile", "--mask-option", "q=0.9")
    assert main(draw(world, "compare", "a photo of a sks cat", "a {} on the beach", *more)) == 0
    assert "2 rows" in capsys.readouterr().out and Image.open(sheet).width > 4 * 128

    for format in ("diffusers", "kohya"):
        lora = tmp_path / f"{format}.safetensors"
        write = ["export", str(world / "cat.safetensors"), "--base", str(world / "base"), "--format", format]
        assert main([*write, "--out", str(lora)]) == 0
        assert 'type "sks cat"' in capsys.readouterr().out
        assert main(["sample", str(lora), "a {}", "--out", out, *draw(world, "sample")[2:]]) == 0


def test_a_lora_on_other_layers_too_needs_the_option_that_its_sentence_names(world, loaded, tmp_path, capsys):
    path, out, base = tmp_path / "lora.safetensors", tmp_path / "again.safetensors", str(world / "base")
    assert main(["export", str(world / "cat.safetensors"), "--out", str(path), "--base", base]) == 0
    other = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 64, 1, 1)}
    save_file(load_file(path) | other, path)
    assert main(["export", str(path), "--out", str(out), "--base", base]) == 2
    assert "--only-proj-out" in told(capsys)
    assert main(["export", str(path), "--out", str(out), "--only-proj-out", "--base", base]) == 0 and out.is_file()


def test_sizes_samplers_and_negative_prompts(world, loaded, tmp_path, capsys):
    tries: list[tuple[str, ...]] = [(), ("--height", "96", "--width", "64"), ("--negative-prompt", "a dog")]
    tries += [("--scheduler", short) for short in SCHEDULERS]
    for number, more in enumerate(tries):
        assert main(draw(world, "sample", "a {}", "--out", tmp_path / str(number), "--steps", "2", *more)) == 0
    plain, sized, negative, *others = (np.asarray(Image.open(name)) for name in capsys.readouterr().out.split())
    assert sized.shape == (96, 64, 3) and (negative != plain).any()
    assert (others[0] == plain).all() and (others[4] != plain).any()  # its own is DDIM; euler-a adds noise
    assert [type(base.scheduler).__name__ for base in loaded[3:]] == list(SCHEDULERS.values())


def test_several_concepts_in_one_prompt_each_by_its_own_words(world, loaded, tmp_path, capsys, monkeypatch):
    other = Residuals(tiny_pipeline("sd1"), init="random", seed=5)
    other.metadata.update(token="zwx", macro_class="dog")
    dog, seen = str(other.save(tmp_path / "rex.safetensors")), []
    localized = commands.usual_ways
    monkeypatch.setattr(commands, "usual_ways", lambda base, pairs, **_: seen.append(pairs) or localized(base, pairs))
    for prompt in ("a photo of a {cat} beside a {rex}", "a photo of a {a} beside a {b}"):
        assert main(draw(world, "sample", dog, prompt, "--out", tmp_path / "d")) == 0
        assert main(draw(world, "sample", dog, "--out", tmp_path / "d", prompt)) == 0  # behind an option
    names = capsys.readouterr().out.split()
    assert len(names) == 4 and {Path(name).name for name in names} == {
        "a-photo-of-a-sks-cat-beside-a-zwx-dog-lag-0.png"  # one picture
    }
    assert [words for _, words in seen[0]] == ["sks cat", "zwx dog"]
    for wrong, said in (("a {}", "{a}, {b}, {cat}, {rex}"), ("a {mug}", "{mug}"), ("a {a}", "zwx")):
        assert main(draw(world, "sample", dog, wrong)) == 2 and said in told(capsys)
    assert main(draw(world, "compare", dog, "a {a}, a {b}", "--out", tmp_path / "c.png")) == 0


def test_what_a_training_keeps_along_the_way(world, loaded):
    more = ("--sample-every", "2", "--save-every", "2", "--rank", "2", "--init", "random", "--train-token")
    assert main(learn(world, *more, out="sub/other.safetensors")) == 0
    names = {path.name for path in (world / "sub").iterdir()}
    assert names == {"other.safetensors", "other-00002.safetensors", "other-00002.png"}
    early, whole = (Residuals.load(world / "sub" / name, loaded[0]) for name in sorted(names)[1:])
    assert whole.losses[:2] == early.losses and set(whole.ranks.values()) == {2} and whole.token_embeddings


def test_show_says_and_draws_what_a_thing_is(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora = tmp_path / "lora.safetensors"
    assert main(["export", str(world / "cat.safetensors"), "--base", str(world / "base"), "--out", str(lora)]) == 0
    assert main(learn(world, "--checkpoint", tmp_path / "state.safetensors", "--out", "cat.safetensors")) == 0
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    capsys.readouterr()
    for path, said in (
        (world / "cat.safetensors", 'residuals of "sks cat"'),
        (lora, 'a LoRA of residuals of "sks cat"'),
        (tmp_path / "state.safetensors", "the state of a training"),
        (tmp_path / "x.safetensors", "no LoRA"),
    ):
        assert main(["show", str(path)]) == 0
        shown = capsys.readouterr().out
        assert said in shown and shown.count("\n") == 1
    assert main(["show", str(world / "cat"), "--class", "cat"]) == 0
    assert "3 pictures with masks" in capsys.readouterr().out
    assert Image.open("cat.png").size == (8 + 2 * (128 + 8), 18 + 8 + 3 * (128 + 8) - 8)


# ---------------------------------------------------------------------------------------------------------- bad input

LEARN = ["personalize", "{home}/cat", "--class", "cat", "--base", "{home}/base", "--out", "{out}"]
DRAW = ["sample", "{home}/cat.safetensors", "--base", "{home}/base", "--steps", "1"]
WRITE = ["export", "{home}/cat.safetensors", "--base", "{home}/base", "--out", "{out}"]
BAD = [
    (["personalize", "{home}/nowhere", "--out", "{out}"], "There is no folder or picture"),
    (["personalize", "{home}/cat", "--base", "{home}/base", "--out", "{out}"], "needs a macro class"),
    ([*LEARN, "--base", "no-such-base"], "no-such-base"),
    ([*LEARN, "--out", "cat.pt"], ".safetensors"),
    ([*LEARN, "--out", "{home}/folder.safetensors"], "must be a file"),
    ([*LEARN, "--checkpoint", "{out}"], "too: name another"),
    ([*LEARN, "--checkpoint", "{home}/cat.safetensors"], "no checkpoint of a training"),
    (["sample", "{home}/missing.safetensors", "a cat"], "There is no file"),
    (["sample", "{home}/cat/0.png", "a cat"], "not a whole safetensors file"),
    ([*DRAW, "a {}", "--out", "{home}/cat/0.png"], "is a file"),
    ([*DRAW, "a {}", "a dog on the beach"], "does not contain"),  # before the first picture
    ([*DRAW, "a {}", "--mask", "circle"], "circle"),
    ([*DRAW, "a {}", "--mask-option", "scale=0.5"], "'scale'"),
    ([*DRAW, "a {}", "--mask", "quantile", "--mask-option", "q=5"], "quantile"),
    ([*DRAW, "a {}", "--window", "0.7", "0.2"], "--window"),
    ([*DRAW, "a {}", "--height", "100"], "divisible by 8"),
    ([*DRAW, "a {}", "--device", "cuda:99"], "choose --device cpu"),
    (["compare", *DRAW[1:], "a {}", "--out", "compare.jpg"], ".png"),
    (["compare", *DRAW[1:], "{home}/cat.safetensors"], "no prompt"),
    ([*WRITE, "--out", "{home}/cat.safetensors"], "too: name another one"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(world, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    for name, place in {"{home}": str(world), "{out}": str(tmp_path / "out.safetensors")}.items():
        arguments = [part.replace(name, place) for part in arguments]
    assert main(arguments) == 2
    assert sentence in told(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["sample", "a"],
        ["sample", "a", "b", "--images", "0"],
        ["sample", "a", "b", "--mask-option", "q"],
        ["sample", "a", "b", "--scale", "nan"],
        ["compare", "a", "--sedd", "5", "b"],
        ["compare", "a", "b", "--sedd=5"],
        ["personalize", "a", "--out", "b.safetensors", "--batch-size", "1000000000"],
        ["personalize", "a", "--out", "b.safetensors", "--class", "a photo of a "],
    ],
)
def test_arguments_that_do_not_parse_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: persres-lite" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["cat", "a cat", "a photo of a cat", "my cat"])
def test_a_class_is_a_word_for_a_kind(text):
    assert _parser().parse_args(["show", "x", "--class", text]).macro_class == "cat"


def test_a_mistyped_base_is_refused_before_anything_is_estimated(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "without_gpu", lambda name: f"{name} takes hours here.")
    assert main(learn(world, "--base", "sd1.4", "--out", tmp_path / "o.safetensors")) == 2
    assert "sd1.4" in told(capsys)
    assert main(learn(world, "--base", "sd-1.4", "--out", tmp_path / "o.safetensors")) == 1  # offline
    said = capsys.readouterr().err.splitlines()
    assert "takes hours" in said[0] and "network" in said[1]


def test_home_is_understood_where_the_shell_leaves_it(world, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(world / "cat.safetensors", tmp_path / "cat.safetensors")
    assert main(["sample", "~/cat.safetensors", "a {}", "--out=~/x", *draw(world, "sample")[2:]]) == 0
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a-sks-cat-lag-0.png"]
    assert main(learn(world, "--out=~/y.safetensors", "--checkpoint=~/z.safetensors")) == 0
    assert {"y.safetensors", "z.safetensors"} < {path.name for path in tmp_path.iterdir()}


def test_the_end_of_a_prompt_that_is_too_long_is_a_plain_remark(world, loaded, tmp_path, capsys):
    prompt = "a {}" + " red" * 80  # and two marks: 85 tokens, of 77 that are read
    assert main(draw(world, "sample", prompt, "--out", tmp_path)) == 0 and "8 tokens" in told(capsys)


def test_a_base_that_a_file_names_is_not_fetched_unasked(world, tmp_path, capsys, monkeypatch):
    residuals, asked = Residuals.load(world / "cat.safetensors", tiny_pipeline("sd1")), []
    base = str(world / "base")
    monkeypatch.setattr(commands, "load_base", lambda name, *_: asked.append(name) or tiny_pipeline("sd1"))
    for number, name in enumerate(("some/one", "../base")):
        residuals.metadata["base"] = name
        path, lora = residuals.save(tmp_path / f"{number}.safetensors"), str(tmp_path / "k.safetensors")
        assert main(["export", str(path), "--out", lora, "--base", base]) == 0
        for file in (str(path), lora):  # a LoRA of ours says it, too
            assert main(["sample", file, "a {}", "--out", str(tmp_path / "d")]) == 2
            shown = told(capsys)
            assert repr(name)[1:-1] in shown and "--base" in shown
    assert set(asked) == {base}
    monkeypatch.setenv("PERSRES_BASE", "my/own")  # the user's own choice
    assert main(["sample", str(path), "a {}", "--steps", "1", "--out", str(tmp_path / "d")]) == 0
    assert asked[-1] == "my/own"


def test_the_package_alone_has_no_toybox_and_says_so(tmp_path, capsys, monkeypatch):
    """As a wheel installs it, without the checkout around it: the first example of --help."""
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "site-packages" / "persres_lite" / "support" / "paths.py"))
    assert main(["personalize", "plum-cat", "--out", str(tmp_path / "plum-cat.safetensors")]) == 2
    shown = told(capsys)
    assert "clone" in shown and "PERSRES_DATA" in shown and "another base" in shown


# ------------------------------------------------------------------------------------------------------------ failures


def test_interrupted_it_says_how_to_go_on_and_does(world, loaded, capsys, monkeypatch):
    save, interrupted = Residuals.save, []

    def stop(self, path):
        if "00002" in str(path) and not interrupted:
            interrupted.append(path)
            raise KeyboardInterrupt
        return save(self, path)

    monkeypatch.setattr(Residuals, "save", stop)
    arguments = learn(world, "--checkpoint", world / "state.safetensors", "--save-every", "2", out="again.safetensors")
    assert main(arguments) == 1 and "the same command goes on from" in told(capsys)
    assert not (world / "again.safetensors").exists()
    assert main(arguments) == 0
    whole, resumed = (Residuals.load(world / f"{name}.safetensors", loaded[0]) for name in ("cat", "again"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_training_that_diverges_leaves_no_file_that_sample_would_refuse(world, loaded, capsys, monkeypatch):
    loss = training.diffusion_loss
    monkeypatch.setattr(training, "diffusion_loss", lambda *arguments: loss(*arguments) * math.nan)
    assert main(learn(world, "--checkpoint", world / "bad.safetensors", out="diverged.safetensors")) == 1
    shown = told(capsys)
    assert "try a rate below" in shown and ".residuals" not in shown and "bad.safetensors first" in shown
    assert not (world / "diverged.safetensors").exists()


@pytest.mark.parametrize("reason", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory"])
def test_too_little_memory_is_a_sentence(world, capsys, monkeypatch, reason):
    def fail(*_):
        raise RuntimeError(reason)

    monkeypatch.setattr(commands, "load_base", fail)
    assert main(draw(world, "sample", "a {}")) == 1
    shown = told(capsys)
    assert "out of memory" in shown and "--dtype bfloat16" in shown and "--height" in shown


def test_a_mistake_of_the_program_itself_is_not_hidden(world, monkeypatch):
    def fail(chosen):
        raise RuntimeError("something nobody thought of")

    monkeypatch.setattr(commands, "sample", fail)
    with pytest.raises(RuntimeError, match="nobody"):
        main(draw(world, "sample", "a {}"))


def test_numbers_that_are_not_finite_are_refused(world, tmp_path, capsys, monkeypatch):
    base = tiny_pipeline("sd1")
    base.unet.conv_out.bias.fill_(float("nan"))
    monkeypatch.setattr(commands, "load_base", lambda *_: base)
    for mode in ("lag", "residual", "original"):
        assert main(draw(world, "sample", "a {}", "--mode", mode, "--out", tmp_path / "d")) == 1
        shown = told(capsys)
        assert "is no picture" in shown and "--dtype float32" in shown and not (tmp_path / "d").exists()


# --------------------------------------------------------------------------------------------------------------- files


def test_names_of_pictures_come_from_prompts_and_nothing_is_overwritten(world, loaded, tmp_path, capsys):
    out = ["--out", tmp_path, "--mode", "residual", "--scale", "3"]
    assert main(draw(world, "sample", "{} 猫", "a {}!", "a {}?", "a {}\non the\tbeach 🏖️🐱", "🐱", *out)) == 0
    names = [Path(name).name for name in capsys.readouterr().out.splitlines()]
    ends = ("sks-cat-猫", "a-sks-cat", "a-sks-cat", "a-sks-cat-on-the-beach", "picture")
    expected = [f"{name}-residual-0.png" for name in ends]
    expected[2] = "a-sks-cat-residual-0-2.png"
    assert names == expected
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(draw(world, "sample", "a {}!", *out)) == 0  # the same picture again: no second copy of it
    assert main(draw(world, "sample", "a {}!", *out, "--guidance", "1")) == 0
    assert "a-sks-cat-residual-0-3.png" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_words_for_the_mask_leave_the_prompt_as_it_is(world, loaded, tmp_path, capsys):
    """{} stands for the concept's words, whatever --words says."""
    pictures = []
    for mode in ("residual", "lag"):
        for more in ([], ["--words", "beach"]):
            arguments = ["--scale", 9, "--mode", mode, "--out", tmp_path / str(len(pictures)), *more]
            assert main(draw(world, "sample", "a {} on the beach", *arguments)) == 0
            pictures.append(Path(capsys.readouterr().out.strip()).read_bytes())
    assert pictures[0] == pictures[1] and pictures[2] != pictures[3]


def test_places_that_cannot_be_written_are_told_before_the_work(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "load_base", lambda *_: pytest.fail("began to work"))
    (tmp_path / "file").write_text("not a folder")
    cat, there = str(world / "cat.safetensors"), ["--base", str(world / "base")]
    for place in (tmp_path / "file" / "x", Path("/proc/nothing")):
        for arguments in (
            learn(world, "--out", place / "cat.safetensors"),
            learn(world, "--checkpoint", place / "s.safetensors", out="no.safetensors"),
            draw(world, "sample", "a {}", "--out", place),
            draw(world, "compare", "a {}", "--out", place / "sheet.png"),
            ["export", cat, *there, "--out", str(place / "lora.safetensors")],
        ):
            assert main(arguments) in (1, 2) and "cannot be written" in told(capsys)


# ---------------------------------------------------------------------------------------------------------------- quiet


def test_ordinary_commands_say_nothing_that_nobody_can_act_on(world, tmp_path):
    """In a process of its own: nothing on the error stream but what is ours."""
    run = f"""from persres_lite.cli import main
assert main({learn(world, "--out", tmp_path / "a.safetensors")!r}) == main({draw(world, "sample", "a {}")!r}) == 0"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-c", run], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
