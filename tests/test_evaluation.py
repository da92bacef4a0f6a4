"""Alignment scores against the encoders used by hand, mask and background scores against cases counted by hand, and the
same noise drawn in several ways.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageFilter
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from persres_lite import Residuals, evaluation, localized
from persres_lite.concepts import load_concept
from persres_lite.evaluation import background_distance, compare, cut_out, iou, load_judges, pointing_game, ruler
from tests.helpers import make_concept, random_residuals
from tests.tiny import tiny_pipeline, tiny_tokenizer


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random encoders saved as ordinary transformers folders."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("judges")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = tiny_tokenizer(max_length=16)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = layers | {"image_size": 32, "patch_size": 8}
    models = {
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)),
        "vit": ViTModel(ViTConfig(**vision), add_pooling_layer=False),
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    }
    for name, model in models.items():
        model.save_pretrained(home / name)
        processor.save_pretrained(home / name)
    tokenizer.save_pretrained(home / "clip")
    return home


@pytest.fixture(scope="module")
def judges(folders):
    return load_judges("sd-1.4", clip=folders / "clip", dino=folders / "vit")


def test_text_alignment_is_the_cosine_of_clips_features(judges, folders):
    images, prompts = pictures(2), ["a photo of a cat", "a red car on the beach"]
    model, processor = CLIPModel.from_pretrained(folders / "clip"), judges.clip_processor
    with torch.no_grad():
        tokens = torch.tensor([judges.tokenizer(p, padding="max_length", max_length=16).input_ids for p in prompts])
        words = model.text_projection(model.text_model(tokens).pooler_output)
        pixels = torch.stack([torch.as_tensor(processor(image)["pixel_values"][0]) for image in images])
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
    right = F.cosine_similarity(words, seen)
    torch.testing.assert_close(judges.text_alignment(images, prompts), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judges.text_alignment(images[1], prompts[1]), right[1:], rtol=1e-4, atol=1e-5)
    assert judges.text_alignment(images, prompts[0]).shape == (2,)
    together = judges.image_alignment(images[0], images)
    torch.testing.assert_close(together[0], (1 + F.cosine_similarity(seen[:1], seen[1:])[0]) / 2, rtol=1e-4, atol=1e-5)


def test_the_gap_of_a_prompt_by_hand(judges):
    """Right prompt minus the mean of the others; a prompt that is asked twice is not another one."""
    images, prompts = pictures(3), ["a cat", "a red car", "a cat"]
    cat, car = (judges.text_alignment(images, prompt) for prompt in ("a cat", "a red car"))
    right = torch.stack([cat[0] - car[0], car[1] - cat[1], cat[2] - car[2]])
    torch.testing.assert_close(judges.text_gap(images, prompts), right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least two different prompts"):
        judges.text_gap(images, ["a cat"] * 3)


def test_a_prompts_score_does_not_depend_on_the_others(judges):
    """Padding to the longest of a batch would change what a short prompt is worth."""
    image, long = pictures(1)[0], "a red cat on the beach in front of a wall"
    alone = judges.text_alignment(image, "a cat")
    torch.testing.assert_close(judges.text_alignment([image, image], ["a cat", long])[:1], alone, rtol=1e-4, atol=1e-5)


def test_identity_reads_a_transformers_class_token_and_a_networks_mean(folders, judges):
    images = pictures(3)
    for name, kind in (("vit", ViTModel), ("resnet", ResNetModel)):
        judge = load_judges("sd-1.4", clip=folders / "clip", dino=folders / name)
        model = kind.from_pretrained(folders / name, **({"add_pooling_layer": False} if name == "vit" else {})).eval()
        with torch.no_grad():
            hidden = model(judge.dino_processor(images=images, return_tensors="pt")["pixel_values"]).last_hidden_state
        features = hidden[:, 0] if name == "vit" else hidden.mean((2, 3))
        right = F.cosine_similarity(features[:1, None], features[None, 1:], dim=-1).mean(1)
        torch.testing.assert_close(judge.identity(images[0], images[1:]), right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(judge.identity(images[0], images[0]), torch.ones(1))


def test_judges_are_frozen_and_in_fp32(folders):
    judges = load_judges("sd-1.4", clip=folders / "clip", dino=folders / "resnet")
    for model in (judges.clip, judges.dino):
        assert not model.training
        assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_wrong_numbers_of_prompts_and_pictures_are_refused(judges):
    with pytest.raises(ValueError, match="3 pictures need one prompt or 3 prompts, not 2"):
        judges.text_alignment(pictures(3), ["a cat", "a dog"])
    with pytest.raises(ValueError, match="no pictures to score"):
        judges.identity([], pictures(1))


def test_a_base_chooses_its_judges(monkeypatch, sd1):
    asked = []

    def record(kind, where, **options):
        asked.append(str(where))
        return torch.nn.Identity()

    monkeypatch.setattr(evaluation, "_load", record)
    for base in ("sd-1.4", "sdxl", sd1):
        asked.clear()
        load_judges(base)
        assert set(asked) == {"openai/clip-vit-base-patch32", "facebook/dino-vits16"}
    asked.clear()
    load_judges("toybox")
    assert {where.rsplit("/", 1)[-1] for where in asked} == {"toybox-clip", "toybox-dino"}


def test_a_judge_that_cannot_be_had_is_one_clear_error(folders, tmp_path):
    with pytest.raises(
        OSError, match=r"openai/clip-vit-base-patch32 could not be loaded: connect to the network once, or"
    ):
        load_judges("sd-1.4")  # tests run offline
    with pytest.raises(OSError, match="its folder is not whole"):
        load_judges("sd-1.4", clip=tmp_path, dino=folders / "vit")


def test_a_judge_that_is_a_pickle_is_never_opened(folders, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    shutil.copytree(folders / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    with open(tmp_path / "vit" / "pytorch_model.bin", "wb") as file:
        pickle.dump(Trap(), file)
    with pytest.raises(OSError, match="vit could not be loaded: its weights are a pickle, .* model.safetensors first"):
        load_judges("sd-1.4", clip=folders / "clip", dino=tmp_path / "vit")
    assert not (tmp_path / "sprung").exists()


def test_the_papers_judges_are_asked_for_by_commit_and_as_safetensors(monkeypatch):
    asked = []

    def record(name):
        def from_pretrained(where, **options):
            asked.append((name, where, options))
            return torch.nn.Identity()

        return classmethod(lambda kind, where, **options: from_pretrained(where, **options))

    for name in ("CLIPModel", "AutoModel", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", record(name))
    monkeypatch.setattr(evaluation, "_prepared_by_pillow", lambda where, **options: asked.append(("", where, options)))
    load_judges("sd-1.4")
    commit = {"revision": evaluation.REVISIONS[evaluation.CLIP]}
    assert re.fullmatch("[0-9a-f]{40}", commit["revision"])
    assert asked == [
        ("CLIPModel", evaluation.CLIP, {"use_safetensors": True} | commit),
        ("AutoTokenizer", evaluation.CLIP, commit),
        ("", evaluation.CLIP, commit),
        ("AutoModel", evaluation.DINO, {"use_safetensors": True}),
    ]


def test_toyboxes_judges_know_its_concepts():
    judges = load_judges("toybox")
    cat, car = load_concept("plum-cat").images, load_concept("cricket-car").images
    right = judges.text_alignment(cat, "a photo of a cat")
    assert (right > judges.text_alignment(cat, "a photo of a car")).all()
    assert (judges.identity(cat[:1], cat[1:]) > judges.identity(cat[:1], car)).all()
    assert (judges.image_alignment(cat[:1], cat[1:]) > judges.image_alignment(cat[:1], car)).all()


# Masks and background


def square(size=8, left=0, top=0, side=4):
    mask = torch.zeros(size, size)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_iou_by_counting():
    a, b = square(), square(left=2)  # 16 positions each, 8 shared
    assert iou(a, b).tolist() == pytest.approx([8 / 24])
    assert iou(torch.stack([a, a]), torch.stack([a, square(left=4)])).tolist() == [1.0, 0.0]
    assert iou(torch.zeros(4, 4), torch.zeros(4, 4)).tolist() == [1.0]
    assert iou(square(4, side=2), a).tolist() == [1.0]  # a coarser mask of the same place
    assert iou(a.numpy(), Image.fromarray((a.numpy() * 255).astype(np.uint8))).tolist() == [1.0]


def test_pointing_by_the_highest_position():
    truth = square()
    inside, outside = torch.zeros(8, 8), torch.zeros(8, 8)
    inside[1, 2], outside[6, 6] = 5, 5
    outside[1, 2] = 4
    assert pointing_game(torch.stack([inside, outside]), truth).tolist() == [1.0, 0.0]
    coarse = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert pointing_game(coarse, truth).tolist() == [1.0] and pointing_game(coarse.flip(0), truth).tolist() == [0.0]


def test_background_distance_leaves_the_object_out():
    a = Image.new("RGB", (8, 8))
    b = a.copy()
    b.paste((255, 255, 255), (0, 0, 4, 4))  # only the object changes
    assert background_distance(a, b, square()).tolist() == [0.0]
    assert background_distance(a, b, square(left=4, top=4)).tolist() == pytest.approx([16 / 48])
    white = Image.new("RGB", (8, 8), "white")
    assert background_distance([a, a], [white, a], square(4, side=2)).tolist() == [1.0, 0.0]


def test_an_object_is_cut_out_on_gray():
    white = Image.new("RGB", (8, 8), "white")
    (cut,) = cut_out(white, square(4, side=2))  # the upper left quarter
    pixels = np.asarray(cut)
    assert (pixels[:4, :4] == 255).all() and (pixels[4:] == 128).all() and (pixels[:, 4:] == 128).all()
    assert len(cut_out([white, white], torch.stack([square(), square(left=4)]))) == 2
    with pytest.raises(ValueError, match="2 pictures need one mask or 2 masks, not 3"):
        cut_out([white, white], torch.ones(3, 8, 8))


def test_floor_and_ceiling_by_hand():
    """Pictures that are their own features: the mean color, to length 1."""

    def identity(images):
        return F.normalize(torch.from_numpy(np.stack([np.asarray(i).mean((0, 1)) for i in images])), dim=-1)

    red, green, yellow = (Image.new("RGB", (2, 2), color) for color in ("#f00", "#0f0", "#ff0"))
    floor, ceiling = ruler(identity, [red, red], [yellow], [green, yellow])
    assert ceiling == pytest.approx(0.5**0.5) and floor == pytest.approx(0.5**0.5 / 2)


def test_pictures_that_cannot_be_compared_are_refused():
    a = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="differ in size"):
        background_distance(a, Image.new("RGB", (4, 4)), square())
    with pytest.raises(ValueError, match="covers the whole picture"):
        background_distance(a, a, torch.ones(8, 8))


@pytest.fixture(scope="module")
def tiny():
    return tiny_pipeline("sd1")


def drawn(base, residuals, **options):
    # The same batch each time: another size may round otherwise.
    given = {"num_inference_steps": 2, "height": 32, "width": 32, "batch_size": 4, "progress": False}
    return compare(base, residuals, "sks cat", ["on the beach", "at night"], [3, 4], **given | options)


def test_all_ways_start_from_the_same_noise(tiny):
    nothing = Residuals(tiny, rank=1)  # one factor is zero: the original model
    made = drawn(tiny, nothing)
    first, *others = made.pictures.values()
    assert list(made.pictures) == ["original", "residual", "LAG"] == list(made.seconds)
    assert others == [first, first] and len({picture.tobytes() for picture in first}) == 4
    assert made.prompts[1:3] == ["a photo of a sks cat on the beach", "a photo of a sks cat at night"]
    assert made.seeds == [3, 4, 3, 4] and list(made.masks) == ["LAG"] and len(made.masks["LAG"]) == 4


def test_ways_differ_where_the_residual_is_not_zero(tiny):
    residuals = random_residuals(tiny)
    ones = torch.ones(1, 4, 4)
    ways = {
        "off": lambda: residuals.attached(tiny, scale=0.0),
        "everywhere": lambda: localized(tiny, residuals, fixed_mask=ones),
    }
    made = drawn(tiny, residuals, ways=ways, scale=2.0)
    assert made.pictures["off"] == made.pictures["original"] != made.pictures["residual"]
    assert set(made.masks) == {"LAG", "everywhere"} and (made.masks["everywhere"] == 1).all()
    assert 0.3 < made.masks["LAG"].mean() < 0.7
    assert made.pictures["LAG"] not in (made.pictures["original"], made.pictures["residual"])


def test_a_usual_way_can_be_left_out(tiny):
    made = drawn(tiny, random_residuals(tiny), ways={"LAG": None, "residual": None})
    assert list(made.pictures) == ["original"] and not made.masks


def test_drawing_without_memory_says_what_to_try():
    def base(prompts, **_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="num_images_per_prompt.*Tried to allocate 2 GiB"):
        evaluation.draw(base, ["a cat"])


def test_a_comparison_draws_and_scores_itself(tiny, judges):
    concept = make_concept()
    made = compare(
        tiny, random_residuals(tiny), concept, prompts=["a sks cat"], seeds=[0], num_inference_steps=2, progress=False
    )
    scores = made.scores(judges, where=lambda images: torch.zeros(len(images), 8, 8))
    assert set(scores) == set(made.pictures)
    assert set(scores["LAG"]) == {"CLIP-T", "CLIP-I", "DINO-I", "background moved"}
    assert scores["original"]["background moved"] == 0 < scores["residual"]["background moved"]
    assert scores["LAG"]["CLIP-T"] == judges.text_alignment(made.pictures["LAG"], "a cat").mean().item()
    assert scores["LAG"]["DINO-I"] == judges.identity(made.pictures["LAG"], concept.images).mean().item()
    sheet = made.sheet()
    assert sheet.width > 4 * 128 and sheet.width // sheet.height >= 2
    assert Image.open(io.BytesIO(made._repr_png_())).size == sheet.size


@pytest.mark.parametrize(
    "options, message",
    [({"prompts": ["a sks cat"]}, "not both"), ({"seeds": []}, "nothing to draw"), ({"lag": {"mask": "no"}}, "no")],
)
def test_what_cannot_be_compared_is_refused(tiny, options, message):
    given = {"places": ["at night"], "seeds": [0], "num_inference_steps": 1, "progress": False} | options
    with pytest.raises(ValueError, match=message):
        compare(tiny, random_residuals(tiny), "sks cat", **given)


def test_dino_sees_a_picture_as_its_authors_prepared_it(folders, monkeypatch):
    """Shorter side to 256, bicubic, and the middle 224 x 224: not the whole picture squashed."""
    monkeypatch.setattr(evaluation, "_load", lambda kind, where, **options: torch.nn.Linear(1, 1))
    processor = load_judges("sd-1.4", clip=folders / "clip").dino_processor
    picture = Image.effect_noise((500, 300), 90).convert("RGB").filter(ImageFilter.GaussianBlur(3))
    seen = torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"])[0]
    left, top = (427 - 224) // 2, (256 - 224) // 2
    by_hand = picture.resize((427, 256), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    right = (torch.from_numpy(np.asarray(by_hand).copy()).float() / 255 - mean) / std
    assert seen.shape == (3, 224, 224)
    assert (seen - right.permute(2, 0, 1)).abs().mean() < 0.02


@pytest.mark.parametrize(
    "settings, kind",
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessorPil"),
        ({"image_processor_type": "ViTImageProcessorFast"}, "ViTImageProcessorPil"),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 224}, "ViTImageProcessorPil"),  # as DINO's
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}, "CLIPImageProcessorPil"),
    ],
)
def test_pictures_are_prepared_without_torchvision(settings, kind, tmp_path, capfd):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = evaluation._load_processor(tmp_path)
    assert type(processor).__name__ == kind
    assert processor(images=pictures(1), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)
    assert capfd.readouterr() == ("", "")
