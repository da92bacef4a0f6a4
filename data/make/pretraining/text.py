"""How the text encoder is trained, and an image encoder toward it: together they are the CLIP-like judge."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel

from persres_lite.toybox.judge import PROBES, LinearProbes, labels_of
from persres_lite.toybox.world import NAMES, Scene, caption, vocabulary

from .dataset import Shards, scenes_of, to_float
from .judge import contrast, misread, seen_by_judge
from .models import make_clip, make_identity_encoder, make_tokenizer
from .trainer import Run, only_learning, train, trained


def clip_parts() -> nn.ModuleDict:
    """The contrastive pair, and two layers that help it to learn and are thrown away: one that takes the identity
    encoder's summary to where text features are, and one that names attributes.
    """
    clip = make_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(14))
    width = 2 * LinearProbes(make_identity_encoder().config).width
    looks = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, clip.config.projection_dim))
    attributes = nn.Linear(clip.config.vision_config.hidden_size, sum(len(v) for v in PROBES.values()))
    return nn.ModuleDict({"clip": clip, "looks": looks, "attributes": attributes})


def short_caption(scene: Scene, rng: random.Random) -> str:
    """What the contrastive stage reads: often one attribute alone, so that each is learned, else a caption as the
    U-Net gets it.

    Which of two colors is the main one is the hard part, so main color and class together have the largest share.
    """
    toy, chance = scene.toys[0], rng.random()
    if toy.name and chance < 0.5:
        return f"a photo of a {toy.name} {toy.kind}"
    plain_single = len(scene.toys) == 1 and scene.style not in ("in black and white", "in sepia")
    if chance < 0.10 and len(scene.toys) == 1:
        return f"a photo of a {toy.kind}"
    if chance < 0.18:
        return f"a photo {scene.place}" + (f" {scene.style}" if scene.style else "")
    if chance < 0.48 and plain_single:
        return f"a photo of a {toy.main} {toy.kind}"
    if chance < 0.58 and plain_single:
        return f"a photo of a {toy.main} and {toy.second} {toy.kind}"
    if chance < 0.66 and plain_single and toy.pattern != "plain":
        return f"a photo of a {toy.pattern} {toy.kind}"
    return caption(scene, rng)


def ids_of(captions: list[str], device: torch.device) -> torch.Tensor:
    """(n, 24) token ids, as the pipeline makes them."""
    ids = make_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.to(device)


def compared(clip: Any, looks: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """The contrastive loss of projected pictures and their captions; equal captions count as equally right."""
    words = clip.text_projection(clip.text_model(input_ids=ids_of(captions, looks.device)).pooler_output)
    names = {text: i for i, text in enumerate(captions)}
    key = torch.tensor([names[text] for text in captions], device=looks.device)
    return contrast(looks, words, clip.logit_scale.exp().clamp(max=60), (key[:, None] == key[None]).float())


def train_text(run: Run, pictures: Shards) -> None:
    """The text encoder, contrastively with the identity encoder's summary of the picture (locked-image tuning: Zhai et
    al., 2022, arXiv 2111.07991).
    """
    torch.manual_seed(0)
    parts = clip_parts()
    clip: Any = parts["clip"]
    only_learning(parts, clip.text_model, clip.text_projection, parts["looks"])
    clip.logit_scale.requires_grad_(True)
    scenes = scenes_of("train", 0, len(pictures))
    summary, batch = seen_by_judge(run, pictures)["summary"], 256

    def step(number: int) -> dict[str, torch.Tensor]:
        rng = random.Random(torch.initial_seed())
        chosen = torch.randint(0, len(pictures), (batch,))
        captions = [short_caption(scenes[i], rng) for i in chosen]
        seen = torch.from_numpy(summary[chosen.numpy()]).to(run.device).float()
        return {"contrast": compared(clip, parts["looks"](F.dropout(seen, 0.1)), captions)}

    train("text", parts, step, run, lr=1e-3, batch=batch)


@torch.no_grad()
def lengthen_unused(clip: Any) -> None:
    """Give the token embeddings that no caption has used the mean length of a word's, in place.

    Rare tokens are among them. They keep the direction that chance gave them, but at the length that they start with,
    less than half of a word's, a rare token changed what the text encoder says of the word behind it as little as a
    comma does.
    """
    tokenizer, weight = make_tokenizer(), clip.text_model.embeddings.token_embedding.weight
    used = {i for word in vocabulary() for i in tokenizer(word).input_ids}  # start and end are among them
    unused = torch.tensor([i for i in range(len(weight)) if i not in used])
    words = torch.tensor([tokenizer(word).input_ids[1] for word in vocabulary() if word not in NAMES])
    weight[unused] = F.normalize(weight[unused], dim=-1) * weight[words].norm(dim=-1).mean()


def trained_text(folder: Path) -> Any:
    """The text stage's parts as it has left them, with `lengthen_unused` done."""
    parts = trained("text", clip_parts(), folder)
    lengthen_unused(parts["clip"])
    return parts


def train_vision(run: Run, pictures: Shards) -> None:
    """The image half of the CLIP-like judge, toward the finished text half."""
    torch.manual_seed(5)
    parts = trained_text(run.folder)
    clip: Any = parts["clip"]
    clip.set_attn_implementation("eager")  # faster to train than fused attention at this size
    only_learning(parts, clip.vision_model, clip.visual_projection, parts["attributes"])
    scenes = scenes_of("train", 0, len(pictures))
    labels, batch = labels_of(scenes), 128

    def step(number: int) -> dict[str, torch.Tensor]:
        rng = random.Random(torch.initial_seed())
        chosen = torch.randint(0, len(pictures), (batch,))
        images = to_float(pictures[chosen][..., :3], run.device).roll((rng.randint(-6, 6), rng.randint(-6, 6)), (2, 3))
        captions = [short_caption(scenes[i], rng) for i in chosen]
        with run.faster_precision():
            seen = clip.vision_model(pixel_values=images).pooler_output.float()
        # Naming the attributes directly is a help for the image encoder alone.
        named = parts["attributes"](seen).split([len(values) for values in PROBES.values()], dim=1)
        answers = {name: labels[name][chosen] for name in PROBES}
        return {
            "contrast": compared(clip, clip.visual_projection(seen), captions),
            "attributes": 0.3 * misread(dict(zip(PROBES, named, strict=True)), answers),
        }

    train("vision", parts, step, run, lr=1e-3, batch=batch)


def text_encoder_of(clip: Any) -> CLIPTextModel:
    """The text half of the pair as Stable Diffusion's text encoder, frozen."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval().requires_grad_(False)
