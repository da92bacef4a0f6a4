"""How Toybox is made from nothing, with no network.

Run by ``python -m data.make.pretraining``.

Stages, each with a fixed budget of minutes and a checkpoint that it goes on from after a kill:

``judge``       the identity encoder, with linear probes for class, colors, pattern and place
``probes``    those probes for longer, on the finished encoder
``text``        the text encoder, contrastively with what that encoder sees
``vision``      an image encoder toward the text encoder: together they are the CLIP-like judge
``vae``         the autoencoder
``decoder``     its second half for longer, on the latents of the first
``unet``        the denoiser, on latents made once, with the frozen text encoder

The autoencoder and the denoiser learn in one process a core. Where there is a GPU, every stage learns on it, in larger
batches, and may have fewer minutes (``--unet-minutes 30``); what ships was made without one, and no run on one
is on record.

The text encoder comes before the U-Net and stays frozen because that is what Stable Diffusion does, and because learned
together with the U-Net it had not learned colors when the other way had. It learns from the identity encoder, not from
an image encoder that begins as it does, because what it can learn is bounded by what the other half sees.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, ResNetModel

from data.make.pretraining.models import make_autoencoder

from .autoencoder import latents_of, train_decoder, train_vae
from .dataset import draw_scenes, load_drawn
from .judge import VIEWS, judge_parts, seen_by_judge, train_judge, train_probes
from .ship import save_judges, write_card
from .text import clip_parts, train_text, train_vision
from .trainer import begin_from, data_parallel
from .unet import train_unet, unet_parts

MINUTES = {"judge": 20.0, "probes": 2.0, "text": 8.0, "vision": 20.0, "vae": 60.0, "decoder": 30.0, "unet": 240.0}
PICTURES = 60_000


def adopt(data: Path, folder: Path) -> None:
    """Begin from the shipped weights: leave them in `folder` as if each stage had just begun, where it has not yet.

    Their latents stay the same, so that the U-Net may be trained further without the other stages. Stages that go on
    from another one (``probes``, ``vision``, ``decoder``) find there what is shipped of theirs, too.
    """
    parts: dict[str, Any] = {"judge": judge_parts(), "text": clip_parts(), "vae": make_autoencoder()}
    parts["unet"] = unet_parts()
    shipped = StableDiffusionPipeline.from_pretrained(data / "toybox-sd", dtype=torch.float32)
    parts["text"]["clip"].load_state_dict(CLIPModel.from_pretrained(data / "toybox-clip").state_dict())
    parts["text"]["clip"].text_model.load_state_dict(shipped.text_encoder.state_dict())  # in single precision
    parts["judge"]["encoder"].load_state_dict(ResNetModel.from_pretrained(data / "toybox-dino").state_dict())
    parts["judge"]["probes"].load_state_dict(load_file(data / "toybox-dino" / "probes.safetensors"))
    parts["vae"].load_state_dict(shipped.vae.state_dict())
    parts["unet"]["unet"].load_state_dict(shipped.unet.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in parts.items():
        begin_from(name, module, folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/toybox-128"), help="pictures and checkpoints")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the finished models go")
    parser.add_argument("--stage", choices=list(MINUTES), action="append", help="only this one (may be repeated)")
    parser.add_argument("--further", action="store_true", help="begin from the shipped weights, not from nothing")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=usual, help=f"by default {usual} here")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="and processes of the longest stages")
    parser.add_argument("--pictures", type=int, default=PICTURES, help=f"of the training set, {PICTURES:,} by default")
    parser.add_argument("--views", type=int, default=VIEWS, help=f"toys that the judge sees twice, {VIEWS:,}")
    for name, budget in MINUTES.items():
        parser.add_argument(f"--{name}-minutes", type=float, default=budget, help=f"budget, {budget:g} by default")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    folder, wanted, device = args.folder, args.stage or list(MINUTES), torch.device(args.device)
    processes = args.threads if device.type == "cpu" else 1
    minutes = {name: getattr(args, f"{name}_minutes") for name in MINUTES}
    pictures = load_drawn(draw_scenes, args.pictures, folder / "pictures", "train")
    if args.further:
        adopt(args.data, folder)

    if "judge" in wanted:
        train_judge(folder, pictures, minutes["judge"], args.views, device)
    if "probes" in wanted:
        train_probes(folder, pictures, minutes["probes"], device)
    if "text" in wanted:
        train_text(folder, pictures, minutes["text"], device)
    if "vision" in wanted:
        train_vision(folder, pictures, minutes["vision"], device)
    if "vae" in wanted:
        data_parallel(train_vae, processes, folder, pictures, minutes["vae"], device)
    if "decoder" in wanted:
        train_decoder(folder, pictures, minutes["decoder"], device)
    if {"probes", "vision"} & set(wanted):
        save_judges(args.data, folder)
    if "unet" in wanted:
        latents_of(pictures, folder, device), seen_by_judge(pictures, folder, device)  # once, before the processes part
        del pictures  # every process opens its own
        data_parallel(train_unet, processes, folder, args.data, minutes["unet"], args.pictures, device)
        write_card(args.data, folder, list(MINUTES), args.further)


if __name__ == "__main__":
    main()
