"""Lesson 07's helpers: what is said before a run, photographs and advice about them, words and their scores."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageFilter

from notebooks.tools import notebooks, runs
from persres_lite import evaluation, load_base, load_concept
from persres_lite.bases import BASES
from persres_lite.course import own
from persres_lite.course.start import NotReady
from persres_lite.evaluation import PARAMETERS, load_judges
from persres_lite.support.paths import data_dir
from tests.tiny import tiny_pipeline

LESSON = next(path for path in notebooks.notebook_paths() if path.name.startswith("07"))


def photographs(count=4, size=128, seed=0):
    """Random blocks of colors with hard edges, each on a background of its own."""
    rng = np.random.default_rng(seed)
    made = []
    for k in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(0, 256, 3)))
        picture.paste(blocks.resize((size // 2, size // 2), Image.Resampling.NEAREST), (size // 4, size // 4))
        picture.info["source"] = f"{k}.jpg"
        made.append(picture)
    return made


def in_one_place(pictures):
    border = Image.new("L", pictures[0].size, 255)
    border.paste(0, (32, 32, 96, 96))
    return [Image.composite(Image.new("RGB", picture.size, "teal"), picture, border) for picture in pictures]


ADVICE = {  # by what is done to good photographs: the base's pixels, the beginning of the only sentence
    lambda good: good: (64, None),
    lambda good: good[:3]: (64, "3 photographs: four to eight are best"),
    lambda good: good[:]: (256, "Smaller than the 256 pixels of this base, and will look soft: 0.jpg, 1.jpg,"),
    lambda good: [good[0].filter(ImageFilter.GaussianBlur(8)), *good[1:]]: (64, "Perhaps blurred: 0.jpg."),
    lambda good: [*good, good[0].point(lambda value: min(255, value + 3))]: (64, "Nearly the same picture twice: 0"),
    in_one_place: (64, "All seem to have one background"),
}


@pytest.mark.parametrize("change", ADVICE)
def test_each_fault_of_photographs_is_named_and_only_that(change):
    size, sentence = ADVICE[change]
    said = own.advice(change(photographs()), size)
    assert len(said) == (sentence is not None) and all(each.startswith(sentence) for each in said)


def test_what_the_model_sees_is_the_middle_square():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    (cut,) = own.seen([wide], 100)
    assert cut.size == (100, 100) and (np.asarray(cut) == [0, 0, 255]).all()


@pytest.mark.parametrize("kind", ["ipywidgets 7", "ipywidgets 8", "Colab"])
def test_uploads_are_written_below_the_folder_whatever_they_are_called(kind, tmp_path):
    files = {"../../evil.jpg": b"1", "C:\\pictures\\a.png": b"2", ".hidden": b"3"}
    given = {
        "ipywidgets 7": types.SimpleNamespace(value={name: {"content": data} for name, data in files.items()}),
        "ipywidgets 8": types.SimpleNamespace(value=[{"name": n, "content": memoryview(d)} for n, d in files.items()]),
        "Colab": own.Uploaded(files),
    }[kind]
    for _ in range(2):  # a cell that runs again keeps no second copy
        folder = own.save_uploads(given, tmp_path / "in" / "photographs")
    assert {path.name for path in folder.iterdir()} == {"evil.jpg", "a.png", "hidden"}
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder] == []


def test_several_uploads_of_one_name_are_several_pictures(tmp_path):
    value = [{"name": "image.jpg", "content": content} for content in (b"1", b"2", b"3", b"2")]
    folder = own.save_uploads(types.SimpleNamespace(value=value), tmp_path)
    assert sorted(path.read_bytes() for path in folder.iterdir()) == [b"1", b"2", b"3"]


NOTHING = types.SimpleNamespace(value=())


def test_without_photographs_only_the_shipped_concept_is_learned_under_its_own_word(tmp_path):
    def found(button=NOTHING, given=None, word="rocket"):
        return own.photographs(button, given, word, shipped="comet-rocket", folder=tmp_path / "photographs")

    assert found() == "comet-rocket" and found(given="mine", word="dog") == "mine"
    with pytest.raises(NotReady, match="No photographs .*'dog'.*PHOTOS.*comet-rocket.*'rocket'") as stop:
        found(word="dog")
    assert stop.value._render_traceback_() == [str(stop.value)]
    assert found({"a.jpg": b"1"}, word="dog") == found(word="dog") == tmp_path / "photographs"


@pytest.fixture
def colab(monkeypatch):
    """Stands for Colab's own module; returns what was downloaded."""
    made, downloaded = types.ModuleType("google.colab.files"), []
    made.upload, made.download = lambda: {"image.jpg": b"1"}, downloaded.append
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setitem(sys.modules, "google.colab.files", made)
    return downloaded


def test_photographs_come_from_a_widget_and_on_colab_from_its_own_dialog(colab, monkeypatch):
    assert own.uploader() == {"image.jpg": b"1"} and repr(own.uploader()) == "uploaded: image.jpg"
    assert own.uploader(wanted=False) == {}
    monkeypatch.delitem(sys.modules, "google.colab")
    assert own.uploader().multiple


def test_on_colab_what_was_learned_is_kept(colab, monkeypatch, tmp_path, capsys):
    (learned := tmp_path / "residual.safetensors").write_bytes(b"new")
    monkeypatch.setattr(own, "DRIVE", tmp_path / "drive")
    own.keep(learned)
    assert colab == [str(learned)]
    own.DRIVE.mkdir()
    (own.DRIVE / learned.name).write_bytes(b"another's")
    own.keep(learned)
    own.keep(own.DRIVE / learned.name)
    assert {path.read_bytes() for path in own.DRIVE.iterdir()} == {b"new", b"another's"}
    assert capsys.readouterr().out == f"Kept as {own.DRIVE / 'residual-2.safetensors'}.\n"
    monkeypatch.delitem(sys.modules, "google.colab")
    own.keep(learned)
    assert len(colab) == 1


def test_the_true_word_scores_best_on_toybox():
    found = own.class_scores(load_judges("toybox"), load_concept("tiger-robot").images, ["mug", "robot", "cat"])
    assert list(found)[0] == "robot" and list(found.values()) == sorted(found.values(), reverse=True)


def test_pieces_in_every_tokenizer():
    assert own.pieces(load_base("toybox"), "sks") == {"tokenizer": ["sks</w>"]}
    found = own.pieces(tiny_pipeline("sdxl"), "zwx")
    assert found.keys() == {"tokenizer", "tokenizer_2"} and all(len(each) == 3 for each in found.values())


def test_preflight_says_all_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small, large, other = (own.preflight(base) for base in ("toybox", "sd-1.4", "some/one"))
    assert small["download"] == "none" and small["license"] == "MIT" and small["GPU"].startswith("none")
    assert large.keys() == small.keys() and "OpenRAIL" in large["license"]
    assert large["download"].startswith(
        "4.3 GB for the model and 0.7 GB for CLIP and DINO, which give the scores, once;"
    )
    assert large["time"].startswith("There is no GPU here.") and "29 pictures and 2 times the" in large["time"]
    assert own.preflight("CompVis/stable-diffusion-v1-4") == large
    assert other["license"] == "see the model's own page" and "GB are free" in other["disk"]
    assert other["download"].startswith("as much as the model's page says, and 0.7 GB for CLIP and DINO")
    assert own.preflight(str(tmp_path))["download"].startswith("0.7 GB for CLIP and DINO")


def test_preflight_on_a_gpu_counts_every_picture_and_training(monkeypatch):
    there = {"is_available": True, "get_device_name": "a GPU", "mem_get_info": (14 * 2**30, 15 * 2**30)}
    for name, value in {**there, "memory_reserved": 0, "memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    minutes = {base: int(own.preflight(base)["time"].split()[1]) for base in ("sd-1.4", "some/one", "sdxl")}
    assert own.preflight("sd-1.4")["download"].startswith("2.1 GB for the model and 0.7 GB")
    assert minutes["sd-1.4"] == round((29 * 50 * own.CALL + 2 * 150 * own.STEP) / 60)
    assert minutes["some/one"] == minutes["sd-1.4"] < minutes["sdxl"] / 4, "no more is known of it"


def test_the_judges_have_as_many_numbers_as_is_said():
    with torch.device("meta"):
        clip = transformers.CLIPModel(transformers.CLIPConfig())
        small = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518)
        dino = transformers.Dinov2Model(small)
    assert [sum(p.numel() for p in model.parameters()) for model in (clip, dino)] == list(PARAMETERS.values())


def test_the_lesson_with_photographs_of_another_package(tmp_path, monkeypatch, capsys):
    """From start to end on a random base of Stable Diffusion's shape, with a folder of real photographs."""
    from skimage import data  # brings photographs

    (tmp_path / "photographs").mkdir()
    for name in ("cat", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / "photographs" / f"{name}.jpg")
    tiny_pipeline("sd1").save_pretrained(tmp_path / "base")
    monkeypatch.setenv("PERSRES_BASE", str(tmp_path / "base"))
    monkeypatch.chdir(LESSON.parent)
    monkeypatch.setattr(sys, "path", sys.path[:])
    usual = BASES["sd-1.4"]
    monkeypatch.setitem(BASES, "sd-1.4", replace(usual, steps=1, recipe=usual.recipe | {"steps": 8}))
    small = tuple(str(data_dir() / Path(name).name) for name in evaluation.JUDGES["toybox"])
    monkeypatch.setattr(evaluation, "PAPER_JUDGES", small)
    drawn, call = [], StableDiffusionPipeline.__call__
    counted = wraps(call)(lambda *given, **options: drawn.append(1) or call(*given, **options))
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    lesson: dict = {}
    for cell in runs.code_cells(notebooks.read(LESSON)):
        source = cell.source.replace("PHOTOS = None", f"PHOTOS = {str(tmp_path / 'photographs')!r}")
        exec(source.replace("WORK = None", f"WORK = {str(tmp_path)!r}"), lesson)
    said = capsys.readouterr().out
    assert "3 photographs: four to eight are best" in said
    assert said.count("the file holds what was learned") == 2
    trained = len(lesson["late"].losses) / lesson["steps"]
    assert (trained, len(drawn)) == (own.TRAININGS, own.PICTURES), "of what preflight tells the time"
