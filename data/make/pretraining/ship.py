"""What pretraining leaves: an ordinary diffusers folder, with the judges in it."""

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

from persres_lite.toybox.render import SIZE

from .judge import judge_parts
from .models import make_autoencoder, make_scheduler, make_tokenizer
from .text import text_encoder_of, trained_text
from .trainer import Run, trained


def _put(new: Path, target: Path) -> None:
    """Move every file of a finished folder to its place in another one, each whole, and leave the others there."""
    for path in [path for path in new.rglob("*") if path.is_file()]:
        place = target / path.relative_to(new)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(new)


def save_pipeline(run: Run, learned: Any) -> None:
    """Write ``run.base``, U-Net (in `learned`) and autoencoder in half precision.

    The text encoder stays in single precision: transformers opens a file in the precision it was saved in,
    diffusers in single precision, and a pipeline that is opened without naming one must agree with itself. It is
    small.
    """
    vae = trained("vae", make_autoencoder(), run.folder)
    trained("decoder", vae.decoder, run.folder, optional=True)
    pipeline = StableDiffusionPipeline(
        vae=vae.half().to(memory_format=torch.contiguous_format),
        text_encoder=text_encoder_of(trained_text(run.folder)["clip"]),
        tokenizer=make_tokenizer(),
        unet=copy.deepcopy(learned["unet"]).cpu().half().to(memory_format=torch.contiguous_format),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    new = run.folder / "new"
    pipeline.save_pretrained(new, safe_serialization=True)
    # AutoencoderTiny writes one entry that it then warns about at every opening: it makes it anew by itself.
    config = json.loads((new / "vae" / "config.json").read_text())
    config.pop("block_out_channels")
    (new / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _put(new, run.base)


def save_judges(run: Run) -> None:
    """Write the judges, ``toybox-clip`` and ``toybox-dino``, as ordinary transformers folders in half precision."""
    clip = trained("vision", trained_text(run.folder), run.folder, optional=True)["clip"]
    parts = trained("probes", trained("judge", judge_parts(), run.folder), run.folder, optional=True)
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(do_center_crop=False, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    new = run.folder / "new"
    for name, model in (("toybox-clip", clip), ("toybox-dino", parts["encoder"])):
        model.half().to(memory_format=torch.contiguous_format).save_pretrained(new / name, safe_serialization=True)
        processor.save_pretrained(new / name)
    make_tokenizer().save_pretrained(new / "toybox-clip")
    save_file(parts["probes"].half().state_dict(), new / "toybox-dino" / "probes.safetensors")
    _put(new, run.base)
