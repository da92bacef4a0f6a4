"""How the shipped Toybox was made: ``make pretrain``, from nothing, with no network.

Stages, each with a fixed budget of minutes and a checkpoint that it goes on from after a kill:

``judge``       the identity encoder, with readings of class, colors, pattern and place
``readings``    those readings for longer, on the finished encoder
``text``        the text encoder, contrastively with what that encoder sees
``vision``      an image encoder toward the text encoder: together they are the CLIP-like judge
``vae``         the autoencoder
``decoder``     its second half for longer, on the latents of the first
``unet``        the denoiser, on latents made once, with the frozen text encoder, one process a core

The text encoder comes before the U-Net and stays frozen because that is what Stable Diffusion does, and because learned
together with the U-Net it had not learned colors when the other way had. It learns from the identity encoder, not from
an image encoder that begins as it does, because what it can learn is bounded by what the other half sees.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, ResNetModel

from .dataset import draw_scenes, draw_views, load_drawn, views_by_index
from .judge import READINGS, Readings, labels_of, summary_of
from .models import make_autoencoder, make_clip, make_identity_encoder, make_scheduler, make_tokenizer, make_unet
from .trainer import begin_from, faster_precision, load_trained, rank_and_size, side_by_side, train
from .world import CLASSES, caption, scene_by_index

MINUTES = {"judge": 20.0, "readings": 2.0, "text": 8.0, "vision": 20.0, "vae": 30.0, "decoder": 30.0, "unet": 180.0}
PICTURES = 60_000
VIEWS = 10_000  # toys seen twice, for the identity encoder
EMPTY = 0.1  # share of captions left empty, for classifier-free guidance
TOY_WEIGHT = 3.0  # of a latent covered by a toy in the U-Net's loss; the best prediction stays the same
ALIGNMENT = 0.3  # of the U-Net's second task, see `train_unet`


def to_float(pictures: np.ndarray) -> torch.Tensor:
    """(n, 64, 64, 3) uint8 to (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def encode_text(tokenizer, text_encoder, captions: list[str]) -> torch.Tensor:
    """(n, 24, 128), as the pipeline does it."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids)[0]


def short_caption(scene, rng: random.Random) -> str:
    """What the contrastive stage reads: often one attribute alone, so that each is learned, else a caption as the
    U-Net gets it.

    Which of two colors is the main one is the hard part, so main color and class together have the largest share.
    """
    toy, chance = scene.toys[0], rng.random()
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


def clip_parts() -> nn.ModuleDict:
    """The contrastive pair, and two layers that help it to learn and are thrown away: one that takes the identity
    encoder's summary to where text features are, and one that names attributes.
    """
    clip = make_clip(make_tokenizer())
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(14))
    width = 2 * Readings(make_identity_encoder().config).width
    looks = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, clip.config.projection_dim))
    attributes = nn.Linear(clip.config.vision_config.hidden_size, sum(len(v) for v in READINGS.values()))
    return nn.ModuleDict({"clip": clip, "looks": looks, "attributes": attributes})


def judge_parts() -> nn.ModuleDict:
    """The identity encoder and its readings."""
    encoder = make_identity_encoder()
    return nn.ModuleDict({"encoder": encoder, "readings": Readings(encoder.config)})


def unet_parts() -> nn.ModuleDict:
    """The denoiser, and a head on its middle that tells what the identity encoder would see; it is thrown away."""
    unet, (_, fine, coarse, _) = make_unet(), make_identity_encoder().config.hidden_sizes
    middle = unet.config.block_out_channels[-1]
    head = nn.Sequential(nn.Conv2d(middle, 256, 1), nn.SiLU(), nn.Conv2d(256, fine + coarse, 1))
    return nn.ModuleDict({"unet": unet, "head": head})


def trained(name: str, module: nn.Module, folder: Path) -> Any:
    """`module` as stage `name` has left it."""
    if not load_trained(name, module, folder):
        raise FileNotFoundError(
            f"Stage {name} has left nothing in {folder}: run `make pretrain`, or --stage {name} first."
        )
    return module.requires_grad_(False)


def misread(named: dict[str, torch.Tensor], answers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the readings, summed over those that any picture of the batch settles."""
    settled = [name for name in READINGS if (answers[name] >= 0).any()]
    return torch.stack([F.cross_entropy(named[name], answers[name], ignore_index=-1) for name in settled]).sum()


def train_judge(folder: Path, pictures: np.ndarray, minutes: float) -> None:
    """The identity encoder, contrastively on two views of each toy, and the linear readings of its features."""
    torch.manual_seed(1)
    both = judge_parts()
    encoder, readings = both["encoder"], both["readings"]
    scenes = [scene_by_index(i) for i in range(len(pictures))]
    labels = labels_of(scenes)
    masks = torch.from_numpy(pictures[..., 3:].max(-1)).float().div(255)
    views = load_drawn(draw_views, VIEWS, folder / "pictures", "views")
    viewed = [scene for i in range(VIEWS) for scene in views_by_index(i)]
    view_labels = labels_of(viewed)
    kinds = view_labels["class"][::2].numpy()
    by_kind = [np.flatnonzero(kinds == kind) for kind in range(len(CLASSES))]
    batch, toys = 96, min(48, *(len(some) for some in by_kind))

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,))
        kind = number % len(by_kind)  # telling toys of one class apart is the task, so a batch holds one class
        pair = np.random.default_rng(torch.initial_seed()).choice(by_kind[kind], toys, replace=False)
        both_views = torch.from_numpy(np.stack([2 * pair, 2 * pair + 1], 1).ravel())
        images = torch.cat([to_float(pictures[chosen, ..., :3]), to_float(views[pair].reshape(-1, 64, 64, 3))])
        images = images * (1 + 0.1 * torch.randn(len(images), 1, 1, 1)) + 0.05 * torch.randn(len(images), 1, 1, 1)
        with faster_precision():
            images = images.contiguous(memory_format=torch.channels_last)
            hidden = [h.float() for h in encoder(images, output_hidden_states=True).hidden_states]
        named = readings(hidden)
        # The views are of one class, which they would teach by rote: it is read from the mixed pictures alone.
        answers = {name: torch.cat([labels[name][chosen], view_labels[name][both_views]]) for name in READINGS}
        answers["class"][batch:] = -1
        covered = F.avg_pool2d(masks[chosen][:, None], 4)[:, 0]
        losses = {
            "readings": misread(named, answers),
            "mask": F.binary_cross_entropy_with_logits(named["mask"][:batch], covered) * 2,
        }
        seen = F.normalize(hidden[-1][batch:].mean((2, 3)), dim=-1)
        similarity = seen[0::2] @ seen[1::2].T / 0.07
        target = torch.arange(toys)
        losses["identity"] = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        return losses

    train(
        "judge",
        both,
        step,
        minutes=minutes,
        lr=1.5e-3,
        weight_decay=0.05,
        ema=0.998,
        pictures=batch + 2 * toys,
        folder=folder,
    )


def look(encoder: Any, images: np.ndarray) -> dict[str, torch.Tensor]:
    """What the identity encoder makes of pictures: "summary" (n, 2 x 592), and the maps after its second and its third
    stage, "fine" (n, 96, 8, 8) and "coarse" (n, 160, 4, 4).
    """
    x = to_float(images).contiguous(memory_format=torch.channels_last)
    hidden = encoder(x, output_hidden_states=True).hidden_states
    return {"summary": summary_of(hidden), "fine": hidden[2], "coarse": hidden[3]}


def by_channel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel."""
    dims = [0, *range(2, x.dim())]
    return x.mean(dims, keepdim=True), x.std(dims, keepdim=True) + 1e-6


@torch.no_grad()
def seen_by_judge(pictures: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """`look` at every picture: computed once, each channel with mean 0 and deviation 1 on the first 2,000, kept on disk
    in half precision and opened without being read.
    """
    paths = {name: folder / f"judged-{name}.npy" for name in ("summary", "fine", "coarse")}
    if not all(path.exists() for path in paths.values()):
        encoder = trained("judge", judge_parts(), folder)["encoder"]
        scales = {name: by_channel(x) for name, x in look(encoder, pictures[:2000, ..., :3]).items()}
        kept: dict[str, list[np.ndarray]] = {name: [] for name in paths}
        for start in tqdm(range(0, len(pictures), 200), desc="judging"):
            for name, x in look(encoder, pictures[start : start + 200, ..., :3]).items():
                mean, deviation = scales[name]
                kept[name].append(((x - mean) / deviation).half().contiguous().numpy())
        for name, path in paths.items():
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, np.concatenate(kept[name]))
            os.replace(path.with_suffix(".part"), path)
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def train_readings(folder: Path, pictures: np.ndarray, minutes: float) -> None:
    """The readings alone, on what the finished encoder sees: a linear layer has soon learned all that it can."""
    torch.manual_seed(6)
    parts = trained("judge", judge_parts(), folder)
    readings: Any = parts["readings"]
    with torch.no_grad():
        mean, deviation = by_channel(look(parts["encoder"], pictures[:2000, ..., :3])["summary"])
    readings.scale.running_mean.copy_(mean[0])
    readings.scale.running_var.copy_(deviation[0].square())
    only_learning(parts, readings.linear)
    labels = labels_of([scene_by_index(i) for i in range(len(pictures))])
    summary = torch.from_numpy(np.array(seen_by_judge(pictures, folder)["summary"]))
    batch = 512

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,))
        named = readings.named(F.dropout(summary[chosen].float(), 0.1))
        return {"readings": misread(named, {name: labels[name][chosen] for name in READINGS})}

    train("readings", parts, step, minutes=minutes, lr=1e-3, weight_decay=0.05, pictures=batch, folder=folder)


def contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """The contrastive loss (Radford et al., 2021) of matching rows; equal captions count as equally right."""
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * scale.exp().clamp(max=60)
    names = {text: i for i, text in enumerate(captions)}
    key = torch.tensor([names[text] for text in captions])
    same = (key[:, None] == key[None]).float()
    target = same / same.sum(1, keepdim=True)
    return -((target * logits.log_softmax(1)).sum(1).mean() + (target * logits.T.log_softmax(1)).sum(1).mean()) / 2


def only_learning(module: nn.Module, *parts: nn.Module) -> None:
    """Let these parts of a module learn, and no other."""
    module.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def train_text(folder: Path, pictures: np.ndarray, minutes: float) -> None:
    """The text encoder, contrastively with the identity encoder's summary of the picture (locked-image tuning: Zhai et
    al., 2022, arXiv 2111.07991).
    """
    torch.manual_seed(0)
    parts, tokenizer = clip_parts(), make_tokenizer()
    clip: Any = parts["clip"]
    only_learning(parts, clip.text_model, clip.text_projection, parts["looks"])
    clip.logit_scale.requires_grad_(True)
    scenes = [scene_by_index(i) for i in range(len(pictures))]
    summary = torch.from_numpy(np.array(seen_by_judge(pictures, folder)["summary"]))
    batch = 256

    def step(number: int) -> dict[str, torch.Tensor]:
        rng = random.Random(torch.initial_seed())
        chosen = torch.randint(0, len(pictures), (batch,))
        captions = [short_caption(scenes[i], rng) for i in chosen]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        looks = parts["looks"](F.dropout(summary[chosen].float(), 0.1))
        words = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        return {"contrast": contrast(looks, words, clip.logit_scale, captions)}

    train("text", parts, step, minutes=minutes, lr=1e-3, weight_decay=0.05, pictures=batch, folder=folder)


def train_vision(folder: Path, pictures: np.ndarray, minutes: float) -> None:
    """The image half of the CLIP-like judge, toward the finished text half."""
    torch.manual_seed(5)
    parts, tokenizer = clip_parts(), make_tokenizer()
    load_trained("text", parts, folder)
    clip: Any = parts["clip"]
    clip.set_attn_implementation("eager")  # faster to train than fused attention at this size
    attributes = parts["attributes"]
    only_learning(parts, clip.vision_model, clip.visual_projection, attributes)
    scenes = [scene_by_index(i) for i in range(len(pictures))]
    labels = labels_of(scenes)
    batch = 128

    def step(number: int) -> dict[str, torch.Tensor]:
        rng = random.Random(torch.initial_seed())
        chosen = torch.randint(0, len(pictures), (batch,))
        images = to_float(pictures[chosen, ..., :3]).roll((rng.randint(-3, 3), rng.randint(-3, 3)), (2, 3))
        captions = [short_caption(scenes[i], rng) for i in chosen]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with faster_precision():
            seen = clip.vision_model(pixel_values=images).pooler_output.float()
        words = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        # Naming the attributes directly is a help for the image encoder alone.
        parts_of = attributes(seen).split([len(v) for v in READINGS.values()], dim=1)
        named = dict(zip(READINGS, parts_of, strict=True))
        return {
            "contrast": contrast(clip.visual_projection(seen), words, clip.logit_scale, captions),
            "attributes": 0.3 * misread(named, {name: labels[name][chosen] for name in READINGS}),
        }

    train("vision", parts, step, minutes=minutes, lr=1e-3, weight_decay=0.05, pictures=batch, folder=folder)


def train_vae(folder: Path, pictures: np.ndarray, minutes: float) -> None:
    """The autoencoder. Latents are held near mean 0 and deviation 1 in each channel, so that no scaling factor is
    needed.
    """
    torch.manual_seed(2)
    vae = make_autoencoder()
    batch = 16

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,))
        x = to_float(pictures[chosen, ..., :3]).contiguous(memory_format=torch.channels_last)
        with faster_precision():
            z = vae.encode(x).latents.float()
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        moments = z.mean((0, 2, 3)).square().mean() + z.std((0, 2, 3)).log().square().mean()
        return {"l1": (y - x).abs().mean(), "mse": F.mse_loss(y, x) * 2, "moments": 0.02 * moments}

    train("vae", vae, step, minutes=minutes, lr=2e-3, weight_decay=1e-4, ema=0.998, pictures=batch, folder=folder)


@torch.no_grad()
def latents_of(pictures: np.ndarray, folder: Path) -> torch.Tensor:
    """(n, 6, 16, 16): every picture encoded once, kept on disk."""
    path = folder / "latents.npy"
    if not path.exists():
        vae = trained("vae", make_autoencoder(), folder)
        parts = []
        for start in tqdm(range(0, len(pictures), 100), desc="encoding"):
            x = to_float(pictures[start : start + 100, ..., :3]).contiguous(memory_format=torch.channels_last)
            parts.append(vae.encode(x).latents.contiguous().numpy())
        with open(path.with_suffix(".part"), "wb") as file:
            np.save(file, np.concatenate(parts))
        os.replace(path.with_suffix(".part"), path)
    return torch.from_numpy(np.load(path))


def train_decoder(folder: Path, pictures: np.ndarray, minutes: float) -> None:
    """The decoder alone for longer, on the latents of the finished encoder: what the U-Net learns stays valid."""
    torch.manual_seed(4)
    latents = latents_of(pictures, folder)
    vae = make_autoencoder()
    load_trained("vae", vae, folder)
    batch = 16

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,))
        x = to_float(pictures[chosen, ..., :3]).contiguous(memory_format=torch.channels_last)
        z = latents[chosen].contiguous(memory_format=torch.channels_last)
        with faster_precision():
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        return {"l1": (y - x).abs().mean(), "mse": F.mse_loss(y, x) * 2}

    train(
        "decoder",
        vae.decoder,
        step,
        minutes=minutes,
        lr=2e-3,
        weight_decay=1e-4,
        ema=0.999,
        pictures=batch,
        folder=folder,
    )


class PlainAttention:
    """Attention of the U-Net by its formula: in bfloat16 on a CPU the gradient of the fused kernel alone takes a fourth
    of a training step.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, tokens, width)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(source)), heads(attn.to_v(source))
        probabilities = (attn.scale * q @ k.transpose(-1, -2)).softmax(-1).to(v.dtype)
        return attn.to_out[0]((probabilities @ v).transpose(1, 2).flatten(2))


def train_unet(folder: Path, data: Path, minutes: float) -> None:
    """The denoiser, on v prediction with timesteps spread evenly over each batch; writes the pipeline as it goes.

    Its second task (representation alignment: Yu et al., 2025, arXiv 2410.06940): from the middle of the network, tell
    the maps that the identity encoder would have made of the clean picture. It calls for the shape of the toy, which is
    a small part of the first loss.
    """
    pictures = load_drawn(draw_scenes, PICTURES, folder / "pictures", "train")
    latents = latents_of(pictures, folder)
    judged = seen_by_judge(pictures, folder)
    tokenizer, text_encoder = make_tokenizer(), text_encoder_of(trained("text", clip_parts(), folder)["clip"])
    torch.manual_seed(3)
    parts = unet_parts()
    unet: Any = parts["unet"]
    unet.set_attn_processor(PlainAttention())
    middle: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, inputs, output: middle.append(output))
    alphas = make_scheduler().alphas_cumprod
    scenes = [scene_by_index(i) for i in range(len(pictures))]
    covered = F.avg_pool2d(torch.from_numpy(pictures[..., 3:].max(-1)).float()[:, None] / 255, 4)
    weights = 1 + (TOY_WEIGHT - 1) * covered
    weights = weights / weights.mean()
    del pictures
    batch = 16

    def step(number: int) -> dict[str, torch.Tensor]:
        rng = random.Random(torch.initial_seed())
        chosen = torch.randint(0, len(latents), (batch,))
        z = latents[chosen]
        captions = ["" if rng.random() < EMPTY else caption(scenes[i], rng) for i in chosen]
        t = ((torch.arange(batch) + torch.rand(batch)) * 1000 / batch).long()
        noise = torch.randn_like(z)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * z
        with torch.no_grad():
            context = encode_text(tokenizer, text_encoder, captions)
        with faster_precision():
            predicted = unet(noisy, t, context).sample.float()
            told = parts["head"](middle.pop()).float()
        fine, coarse = (torch.from_numpy(judged[name][chosen.numpy()]).float() for name in ("fine", "coarse"))
        fine_told, coarse_told = told.split([fine.shape[1], coarse.shape[1]], 1)
        weight = weights[chosen]
        missed = (F.avg_pool2d(weight, 2) * (fine_told - fine).square()).mean()
        missed = missed + (F.avg_pool2d(weight, 4) * (F.avg_pool2d(coarse_told, 2) - coarse).square()).mean()
        return {"loss": (weight * (predicted - target).square()).mean(), "alignment": ALIGNMENT / 2 * missed}

    def publish() -> None:
        if rank_and_size()[0] == 0:
            save_pipeline(data, folder, unet)

    train(
        "unet",
        parts,
        step,
        minutes=minutes,
        lr=1e-3,
        weight_decay=1e-3,
        ema=0.999,
        pictures=batch,
        folder=folder,
        on_publish=publish,
    )
    publish()


def text_encoder_of(clip) -> CLIPTextModel:
    """The text half of the pair as Stable Diffusion's text encoder, frozen."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval().requires_grad_(False)


def _replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an old one, keeping the files that are not made here (the model card)."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        for kept in target.glob("*.md"):
            shutil.copy2(kept, new / kept.name)
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def save_pipeline(data: Path, folder: Path, unet: Any) -> None:
    """Write ``toybox-sd``, the ordinary diffusers folder. U-Net and autoencoder in half precision.

    The text encoder stays in single precision: transformers opens a file in the precision it was saved in,
    diffusers in single precision, and a pipeline that is opened without naming one must agree with itself. It is
    small.
    """
    target = data / "toybox-sd"
    tokenizer, text_encoder = make_tokenizer(), text_encoder_of(trained("text", clip_parts(), folder)["clip"])
    vae = make_autoencoder()
    trained("vae", vae, folder).decoder.requires_grad_(True)  # what learns is what has averages
    load_trained("decoder", vae.decoder, folder)
    vae.half()
    unet = copy.deepcopy(unet).half()
    pipeline = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.to(memory_format=torch.contiguous_format),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    pipeline.save_pretrained(new, safe_serialization=True)
    # AutoencoderTiny writes one entry that it then warns about at every opening: it makes it anew by itself.
    config = json.loads((new / "vae" / "config.json").read_text())
    config.pop("block_out_channels")
    (new / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _replace_folder(new, target)


def save_judges(data: Path, folder: Path) -> None:
    """Write the judges, ``toybox-clip`` and ``toybox-dino``, as ordinary transformers folders in half precision."""
    clip = trained("vision", clip_parts(), folder)["clip"]
    parts = trained("readings", judge_parts(), folder)
    size = {"height": 64, "width": 64}
    processor = CLIPImageProcessor(do_center_crop=False, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for name, model in (("toybox-clip", clip), ("toybox-dino", parts["encoder"])):
        new = data / f"{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        model.half().to(memory_format=torch.contiguous_format).save_pretrained(new, safe_serialization=True)
        processor.save_pretrained(new)
        if model is clip:
            make_tokenizer().save_pretrained(new)
        else:
            save_file(parts["readings"].half().state_dict(), new / "readings.safetensors")
        _replace_folder(new, data / name)


def adopt(data: Path, folder: Path) -> None:
    """Begin from the shipped weights: leave them in `folder` as if each stage had just begun, where it has not yet.

    Their latents stay the same, so that the U-Net may be trained further without the other stages.
    """
    parts: dict[str, Any] = {"judge": judge_parts(), "text": clip_parts(), "vae": make_autoencoder()}
    parts |= {"readings": parts["judge"], "vision": parts["text"], "unet": unet_parts()}
    shipped = StableDiffusionPipeline.from_pretrained(data / "toybox-sd", dtype=torch.float32)
    parts["text"]["clip"].load_state_dict(CLIPModel.from_pretrained(data / "toybox-clip").state_dict())
    parts["text"]["clip"].text_model.load_state_dict(shipped.text_encoder.state_dict())  # in single precision
    parts["judge"]["encoder"].load_state_dict(ResNetModel.from_pretrained(data / "toybox-dino").state_dict())
    parts["judge"]["readings"].load_state_dict(load_file(data / "toybox-dino" / "readings.safetensors"))
    parts["vae"].load_state_dict(shipped.vae.state_dict())
    parts["unet"]["unet"].load_state_dict(shipped.unet.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in parts.items():
        begin_from(name, module, folder)


def between(text: str, name: str, lines: list[str]) -> str:
    """`text` with what stands between the two marks called `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return "\n".join([before + begin, *lines, end + rest.split(end)[1]])


def write_card(data: Path, folder: Path, further: bool) -> None:
    """Put into the model card how long each stage was trained, as its checkpoint says; a run that goes `further` adds
    its rows to those of the runs before.
    """
    card = data / "toybox-sd" / "README.md"
    if not card.exists():
        return
    lines = ["| stage | minutes | steps | pictures seen |", "|---|---|---|---|"]
    if further:
        stage = re.compile(rf"\| ({'|'.join(MINUTES)})\b")
        lines += [line for line in card.read_text().splitlines() if stage.match(line)]
    for name in MINUTES:
        if (folder / f"{name}.pt").exists():
            state = torch.load(folder / f"{name}.pt", weights_only=True)
            if state["step"]:
                minutes = f"{state['seconds'] / 60:.0f}"
                label = f"{name}, further" if further else name
                lines.append(f"| {label} | {minutes} | {state['step']:,} | {state['pictures']:,} |")
    card.write_text(between(card.read_text(), "training", lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/toybox"), help="pictures and checkpoints")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the finished models go")
    parser.add_argument("--stage", choices=list(MINUTES), action="append", help="only this one (may be repeated)")
    parser.add_argument("--further", action="store_true", help="begin from the shipped weights, not from nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="and processes of the U-Net's stage")
    for name, budget in MINUTES.items():
        parser.add_argument(f"--{name}-minutes", type=float, default=budget, help=f"budget, {budget:g} by default")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    folder, wanted = args.folder, args.stage or list(MINUTES)
    minutes = {name: getattr(args, f"{name}_minutes") for name in MINUTES}
    pictures = load_drawn(draw_scenes, PICTURES, folder / "pictures", "train")
    if args.further:
        adopt(args.data, folder)

    if "judge" in wanted:
        train_judge(folder, pictures, minutes["judge"])
    if "readings" in wanted:
        train_readings(folder, pictures, minutes["readings"])
    if "text" in wanted:
        train_text(folder, pictures, minutes["text"])
    if "vision" in wanted:
        train_vision(folder, pictures, minutes["vision"])
    if "vae" in wanted:
        train_vae(folder, pictures, minutes["vae"])
    if "decoder" in wanted:
        train_decoder(folder, pictures, minutes["decoder"])
    if {"readings", "vision"} & set(wanted):
        save_judges(args.data, folder)
    if "unet" in wanted:
        latents_of(pictures, folder), seen_by_judge(pictures, folder)  # made once, before the processes part
        del pictures  # every process opens its own
        side_by_side(train_unet, args.threads, folder, args.data, minutes["unet"])
        write_card(args.data, folder, args.further)


if __name__ == "__main__":
    main()
