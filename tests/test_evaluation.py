"""Alignment scores against the encoders used by hand, mask and background scores against cases counted by hand, and the
same noise drawn in several ways.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
)

from persres_lite import Residuals, evaluation, localized
from persres_lite.concepts import load_concept
from persres_lite.evaluation import background_distance, compare, cut_out, iou, load_judges, pointing_game
from tests.helpers import random_residuals
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
        "dino": Dinov2Model(Dinov2Config(**vision)),
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    }
    for name, model in models.items():
        model.save_pretrained(home / name)
        processor.save_pretrained(home / name)
    tokenizer.save_pretrained(home / "clip")
    return home


@pytest.fixture(scope="module")
def judges(folders):
    return load_judges("sd-1.4", clip=folders / "clip", dino=folders / "dino")


def test_text_alignment_is_the_cosine_of_clips_features(judges, folders):
    images, prompts = pictures(2), ["a photo of a cat", "a red car on the beach"]
    model, processor = (kind.from_pretrained(folders / "clip") for kind in (CLIPModel, CLIPImageProcessorPil))
    tokenizer = tiny_tokenizer(max_length=16)
    with torch.no_grad():
        tokens = torch.tensor([tokenizer(p, padding="max_length", max_length=16).input_ids for p in prompts])
        words = model.text_projection(model.text_model(tokens).pooler_output)
        pixels = torch.stack([torch.as_tensor(processor(image)["pixel_values"][0]) for image in images])
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
    right = F.cosine_similarity(words, seen)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(judges.text_alignment(images, prompts), right, **close)
    torch.testing.assert_close(judges.text_alignment(images[1], prompts[1]), right[1:], **close)  # alone, the same
    assert judges.text_alignment(images, prompts[0]).shape == (2,)
    together = judges.image_alignment(images[0], images)
    torch.testing.assert_close(together[0], (1 + F.cosine_similarity(seen[:1], seen[1:])[0]) / 2, **close)


def test_the_gap_of_a_prompt_by_hand(judges):
    """Right prompt minus the mean of the others; a prompt that is asked twice is not another one."""
    images, prompts = pictures(3), ["a cat", "a red car", "a cat"]
    cat, car = (judges.text_alignment(images, prompt) for prompt in ("a cat", "a red car"))
    right = torch.stack([cat[0] - car[0], car[1] - cat[1], cat[2] - car[2]])
    torch.testing.assert_close(judges.text_gap(images, prompts), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, kind", [("dino", Dinov2Model), ("resnet", ResNetModel)])
def test_identity_reads_a_transformers_class_token_and_a_networks_mean(folders, name, kind):
    images, judge = pictures(3), load_judges("sd-1.4", clip=folders / "clip", dino=folders / name)
    processor = CLIPImageProcessorPil.from_pretrained(folders / name)
    with torch.no_grad():
        seen = processor(images=images, return_tensors="pt")["pixel_values"]
        hidden = kind.from_pretrained(folders / name).eval()(seen).last_hidden_state
    features = hidden[:, 0] if name == "dino" else hidden.mean((2, 3))
    right = F.cosine_similarity(features[:1, None], features[None, 1:], dim=-1).mean(1)
    torch.testing.assert_close(judge.identity(images[0], images[1:]), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judge.identity(images[0], images[0]), torch.ones(1))


@pytest.mark.parametrize("reason", ["offline", "a pickle", "an empty folder"])
def test_an_encoder_that_cannot_be_had_costs_its_scores_and_nothing_else(folders, tmp_path, tiny, monkeypatch, reason):
    """What a lesson does: pictures, judges, scores. Tests run offline, and a pickle is never opened."""
    where = None if reason == "offline" else tmp_path
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    if reason == "a pickle":
        for path in (folders / "dino").glob("*.json"):
            (tmp_path / path.name).write_text(path.read_text())
        (tmp_path / "pytorch_model.bin").write_bytes(b"who opens it runs it")
    images, refs = drawn(tiny, random_residuals(tiny)).pictures["LAG"], pictures(2)
    prompts = ["a cat", "a dog"] * 2
    with pytest.warns(UserWarning, match=r"left out.*model\.safetensors"):
        judges = load_judges("sd-1.4", clip=folders / "clip", dino=where)
    assert judges.identity(images, refs).isnan().tolist() == [True] * 4
    assert judges.text_alignment(images, prompts).isfinite().all()
    judges = load_judges("sd-1.4", dino=folders / "dino", clip=where)
    for score, other in ((judges.text_alignment, prompts), (judges.text_gap, prompts), (judges.image_alignment, refs)):
        assert score(images, other).isnan().tolist() == [True] * 4
    assert judges.identity(images, refs).isfinite().all()


def test_encoders_are_asked_for_by_commit_and_as_safetensors(monkeypatch):
    asked = []

    def record(where, **options):
        asked.append((where, options))
        return torch.nn.Identity()

    kinds = ("CLIPModel", "CLIPImageProcessorPil", "AutoTokenizer", "AutoModel", "CLIPImageProcessorPil")
    for name in kinds:
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", record)
    for base in ("sd-1.4", tiny_pipeline("sd1")):
        load_judges(base)
        for number, (where, options) in enumerate(asked):
            assert where == (evaluation.CLIP if number < 3 else evaluation.DINO)
            assert re.fullmatch("[0-9a-f]{40}", options.pop("revision"))
            assert options == ({"use_safetensors": True} if number in (0, 3) else {})
        assert len(asked) == len(kinds)
        asked.clear()


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
    assert background_distance(a, white, torch.ones(8, 8)).isnan().all(), "no background"


def test_an_object_is_cut_out_on_gray():
    white = Image.new("RGB", (8, 8), "white")
    (cut,) = cut_out(white, square(4, side=2))  # the upper left quarter
    pixels = np.asarray(cut)
    assert (pixels[:4, :4] == 255).all() and (pixels[4:] == 128).all() and (pixels[:, 4:] == 128).all()
    assert len(cut_out([white, white], torch.stack([square(), square(left=4)]))) == 2


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
    assert made.sheet().width > 4 * 128 and made.sheet().height > 4 * 128


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
