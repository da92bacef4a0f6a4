"""How the denoiser is trained."""

from __future__ import annotations

import random
import shutil
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from persres_lite.toybox.world import caption

from .autoencoder import latents_of
from .dataset import Shards, scenes_of
from .judge import seen_by_judge
from .models import make_identity_encoder, make_scheduler, make_unet
from .muon import faster_type
from .ship import save_pipeline
from .text import ids_of, text_encoder_of, trained_text
from .trainer import Run, train

BATCH = {"cpu": 24, "cuda": 512}  # a GPU is not busy with fewer
EMPTY = 0.1  # share of captions left empty, for classifier-free guidance
TOY_WEIGHT = 3.0  # of a latent covered by a toy in the loss; the best prediction stays the same
ALIGNMENT = 0.3  # of the second task, see `train_unet`


def unet_parts(unet: Any) -> nn.ModuleDict:
    """The denoiser, and a head on its middle that tells what the identity encoder would see; it is thrown away."""
    _, fine, coarse, _ = make_identity_encoder().config.hidden_sizes
    middle = unet.config.block_out_channels[-1]
    head = nn.Sequential(nn.Conv2d(middle, 256, 1), nn.SiLU(), nn.Conv2d(256, fine + coarse, 1))
    return nn.ModuleDict({"unet": unet, "head": head})


def train_unet(run: Run, pictures: Shards) -> None:
    """The denoiser, on v prediction with timesteps spread evenly over each batch; writes the pipeline as it goes.

    Its second task (representation alignment: Yu et al., 2025, arXiv 2410.06940): from the middle of the network, tell
    the maps that the identity encoder would have made of the clean picture. It calls for the shape of the toy, which is
    a small part of the first loss.
    """
    torch.manual_seed(3)
    known = latents_of(run, pictures) | seen_by_judge(run, pictures)
    text_encoder = text_encoder_of(trained_text(run.folder)["clip"]).to(run.device)
    parts: Any = unet_parts(make_unet(run.layers, run.widths))
    unet: Any = parts["unet"]
    if run.device.type == "cpu" and faster_type(run.device) is torch.bfloat16:
        unet.set_attn_processor(AttnProcessor())  # in bfloat16 the fused one's gradient takes a fourth of a step
    parts.to(memory_format=torch.channels_last)  # with the fused one a step in single precision takes .83 of the time
    if run.minutes["unet"] >= 10 and (shutil.which("g++") or shutil.which("clang++")):
        unet.compile()  # its many small operations, joined, train faster; compiling takes minutes
    middle: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, inputs, output: middle.append(output))
    alphas = make_scheduler().alphas_cumprod.to(run.device)
    scenes = scenes_of("train", 0, len(pictures))
    mean_weight = 1 + (TOY_WEIGHT - 1) * float(np.mean(known["covered"], dtype=np.float64))
    batch = BATCH[run.device.type]

    def step(number: int) -> dict[str, torch.Tensor]:
        rng = random.Random(torch.initial_seed())
        chosen = torch.randint(0, len(scenes), (batch,)).numpy()
        z, toy, fine, coarse = (
            torch.from_numpy(known[name][chosen]).to(run.device).float()
            for name in ("latents", "covered", "fine", "coarse")
        )
        captions = ["" if rng.random() < EMPTY else caption(scenes[i], rng) for i in chosen]
        t = ((torch.arange(batch) + torch.rand(batch)) * 1000 / batch).long().to(run.device)
        noise = torch.randn_like(z)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy, target = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
        with torch.no_grad():
            context = text_encoder(ids_of(captions, run.device))[0]
        with run.faster_precision():
            predicted = unet(noisy, t, context).sample.float()
            told = parts["head"](middle.pop()).float()
        fine_told, coarse_told = told.split([fine.shape[1], coarse.shape[1]], 1)
        weight = (1 + (TOY_WEIGHT - 1) * toy) / mean_weight
        missed = (F.avg_pool2d(weight, 2) * (fine_told - fine).square()).mean()
        missed = missed + (F.avg_pool2d(weight, 4) * (F.avg_pool2d(coarse_told, 2) - coarse).square()).mean()
        return {"loss": (weight * (predicted - target).square()).mean(), "alignment": ALIGNMENT / 2 * missed}

    publish = partial(save_pipeline, run)
    train("unet", parts, step, run, lr=2e-3, muon=True, ema=0.999, batch=batch, on_save=publish)
