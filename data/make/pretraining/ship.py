"""What pretraining leaves in the project's data folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from data.make.pretraining.models import make_autoencoder, make_scheduler, make_tokenizer
from data.make.runs import between
from persres_lite.toybox.render import SIZE

from .judge import judge_parts
from .text import text_encoder_of, trained_text
from .trainer import load_trained, trained


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
    tokenizer, text_encoder = make_tokenizer(), text_encoder_of(trained_text(folder)["clip"])
    vae = make_autoencoder()
    trained("vae", vae, folder)
    load_trained("decoder", vae.decoder, folder)
    vae.half()
    unet = copy.deepcopy(unet).cpu().half()
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
    both, parts = trained_text(folder), trained("judge", judge_parts(), folder)
    load_trained("vision", both, folder)
    load_trained("probes", parts, folder)
    clip = both["clip"]
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(do_center_crop=False, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for name, model in (("toybox-clip", clip), ("toybox-dino", parts["encoder"])):
        new = data / f"{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        model.half().to(memory_format=torch.contiguous_format).save_pretrained(new, safe_serialization=True)
        processor.save_pretrained(new)
        if model is clip:
            make_tokenizer().save_pretrained(new)
        else:
            save_file(parts["probes"].half().state_dict(), new / "probes.safetensors")
        _replace_folder(new, data / name)


def write_card(data: Path, folder: Path, stages: list[str], further: bool) -> None:
    """Put into the model card how long each stage was trained, as its checkpoint says; a run that goes `further` adds
    its rows to those of the runs before.
    """
    card = data / "toybox-sd" / "README.md"
    if not card.exists():
        return
    lines = ["| stage | minutes | steps | pictures seen |", "|---|---|---|---|"]
    if further:
        before = card.read_text().split("<!-- training: begin -->")[1].split("<!-- training: end -->")[0]
        lines += [line for line in before.splitlines() if line.startswith("| ") and line not in lines]
    for name in stages:
        if (folder / f"{name}.pt").exists():
            state = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
            if state["step"]:
                minutes = f"{state['seconds'] / 60:.0f}"
                label = f"{name}, further" if further else name
                lines.append(f"| {label} | {minutes} | {state['step']:,} | {state['pictures']:,} |")
    card.write_text(between(card.read_text(), "training", "\n".join(lines)))
