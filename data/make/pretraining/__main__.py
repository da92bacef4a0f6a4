"""How Toybox is made from nothing, with no network.

Run by ``python -m data.make.pretraining``.

Stages, each with a budget of minutes and a checkpoint that it goes on from after a kill (with no checkpoint a stage
begins anew):

``judge``       the identity encoder, with linear probes for class, colors, pattern and place
``probes``      those probes for longer, on the finished encoder
``text``        the text encoder, contrastively with what that encoder sees
``vision``      an image encoder toward the text encoder: together they are the CLIP-like judge
``vae``         the autoencoder
``decoder``     its second half for longer, on the latents of the first
``unet``        the denoiser, on latents made once, with the frozen text encoder

All learn in one process a core, of one thread each. Where there is a GPU, they learn on it, in larger batches and in
bfloat16. Ten minutes of one make a longer training of the U-Net than any so far; what it has learned is written out
every two minutes::

    python -m data.make.pretraining --further --stage unet=10
    python -m data.make.pretraining --further --stage unet=10 --widths 128 256

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

from .autoencoder import latents_of, train_decoder, train_vae
from .dataset import load_drawn
from .judge import judge_parts, seen_by_judge, train_judge, train_probes
from .models import deepened
from .ship import save_judges
from .text import clip_parts, train_text, train_vision
from .trainer import Run, begin_from, data_parallel, still_valid
from .unet import train_unet, unet_parts

MINUTES = {"judge": 20.0, "probes": 2.0, "text": 8.0, "vision": 20.0, "vae": 60.0, "decoder": 30.0, "unet": 240.0}
LEARN = (train_judge, train_probes, train_text, train_vision, train_vae, train_decoder, train_unet)
FROM = {"probes": "judge", "vision": "text", "decoder": "vae"}


def adopt(run: Run, shipped: Path) -> None:
    """Begin from finished weights: leave them in ``run.folder`` as if each stage had just begun, where it has not yet.

    The latents stay the same, so that the U-Net may be trained further without the other stages. A U-Net with one layer
    a block is `deepened` where two are wanted; of other widths it begins from nothing. The judges are those in the
    folder, or else beside it. Stages that go on from another one (`FROM`) are left to begin from that.
    """
    base: Any = StableDiffusionPipeline.from_pretrained(shipped, dtype=torch.float32)
    clip, dino = (
        next(folder for folder in (shipped / name, shipped.parent / name) if (folder / "config.json").exists())
        for name in ("toybox-clip", "toybox-dino")
    )
    text: Any = clip_parts()
    judge = judge_parts()
    text["clip"].load_state_dict(CLIPModel.from_pretrained(clip).float().state_dict())
    text["clip"].text_model.load_state_dict(base.text_encoder.state_dict())  # in single precision
    judge["encoder"].load_state_dict(ResNetModel.from_pretrained(dino).float().state_dict())
    judge["probes"].load_state_dict(load_file(dino / "probes.safetensors"))
    begun = {"judge": judge, "text": text, "vae": base.vae}
    if tuple(base.unet.config.block_out_channels) == run.widths:
        begun["unet"] = unet_parts(deepened(base.unet) if run.layers > base.unet.config.layers_per_block else base.unet)
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, module in begun.items():
        begin_from(name, module, run.folder)


def budgets(words: list[str] | None) -> dict[str, float]:
    """Minutes by stage, from words such as "unet" and "unet=10"; all stages where there are none."""
    chosen = dict(word.partition("=")[::2] for word in words or MINUTES)
    return {name: float(chosen[name] or MINUTES[name]) for name in MINUTES if name in chosen}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/pretraining"), help="pictures and checkpoints")
    parser.add_argument("--base", type=Path, default=Path("data/toybox-next"), help="where the finished models go")
    parser.add_argument("--stage", action="append", metavar="NAME[=MINUTES]", help="only this one (may be repeated)")
    parser.add_argument("--further", action="store_true", help="begin from --base (or toybox-sd), not from nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that learn as one, without a GPU")
    parser.add_argument("--pictures", type=int, default=Run.pictures, help="of the training set, %(default)s")
    parser.add_argument("--views", type=int, default=Run.views, help="that show the judge toys twice, %(default)s")
    parser.add_argument("--layers", type=int, choices=[1, 2], default=Run.layers, help="a block of the U-Net")
    parser.add_argument("--widths", type=int, nargs=2, default=Run.widths, help="of the U-Net's two levels")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    minutes, shape = budgets(args.stage), {"layers": args.layers, "widths": tuple(args.widths)}
    run = Run(args.folder, args.base, minutes, device, args.pictures, args.views, **shape)
    pictures = load_drawn(run.folder / "pictures", "train", run.pictures)
    if args.further:
        adopt(run, run.base if (run.base / "model_index.json").exists() else run.base.with_name("toybox-sd"))

    processes = args.processes if device.type == "cpu" else 1
    for name, learn in zip(MINUTES, LEARN, strict=True):
        if name not in minutes:
            continue
        # What every process reads is made once, before they part.
        if name == "judge":
            load_drawn(run.folder / "pictures", "views", run.views)
        if name in ("probes", "text", "unet"):
            seen_by_judge(run, pictures)
        if name in ("decoder", "unet"):
            latents_of(run, pictures)
        if name in FROM and not still_valid(run.folder / f"{name}.pt", FROM[name], run.folder):
            (run.folder / f"{name}.pt").unlink(missing_ok=True)
        data_parallel(learn, processes, run, pictures)
    if {"probes", "vision"} & set(minutes):
        save_judges(run)


if __name__ == "__main__":
    main()
