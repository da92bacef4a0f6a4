"""How the denoiser is trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.make.pretraining.models import (
    make_identity_encoder,
    make_scheduler,
    make_tokenizer,
    make_unet,
)
from persres_lite.toybox.world import caption, scene_by_index

from .autoencoder import latents_of
from .dataset import draw_scenes, load_drawn
from .judge import seen_by_judge
from .ship import save_pipeline
from .text import text_encoder_of, trained_text
from .trainer import CPU, compile_inside_ddp, faster_precision, rank_and_size, train

BATCH = {"cpu": 24, "cuda": 192}  # a GPU is not busy with fewer
EMPTY = 0.1  # share of captions left empty, for classifier-free guidance
TOY_WEIGHT = 3.0  # of a latent covered by a toy in the loss; the best prediction stays the same
ALIGNMENT = 0.3  # of the second task, see `train_unet`


def unet_parts() -> nn.ModuleDict:
    """The denoiser, and a head on its middle that tells what the identity encoder would see; it is thrown away."""
    unet, (_, fine, coarse, _) = make_unet(), make_identity_encoder().config.hidden_sizes
    middle = unet.config.block_out_channels[-1]
    head = nn.Sequential(nn.Conv2d(middle, 256, 1), nn.SiLU(), nn.Conv2d(256, fine + coarse, 1))
    return nn.ModuleDict({"unet": unet, "head": head})


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


def encode_text(tokenizer, text_encoder, captions: list[str]) -> torch.Tensor:
    """(n, 24, 128), as the pipeline does it."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids.to(text_encoder.device))[0]


def train_unet(folder: Path, data: Path, minutes: float, count: int, device: torch.device = CPU) -> None:
    """The denoiser, on v prediction with timesteps spread evenly over each batch; writes the pipeline as it goes.

    Its second task (representation alignment: Yu et al., 2025, arXiv 2410.06940): from the middle of the network, tell
    the maps that the identity encoder would have made of the clean picture. It calls for the shape of the toy, which is
    a small part of the first loss.
    """
    pictures = load_drawn(draw_scenes, count, folder / "pictures", "train")
    latents, covered = latents_of(pictures, folder, device)
    judged = seen_by_judge(pictures, folder, device)
    tokenizer, text_encoder = make_tokenizer(), text_encoder_of(trained_text(folder)["clip"]).to(device)
    torch.manual_seed(3)
    parts = unet_parts()
    unet: Any = parts["unet"]
    if device.type == "cpu":
        unet.set_attn_processor(PlainAttention())
    compile_inside_ddp(unet)
    middle: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, inputs, output: middle.append(output))
    alphas = make_scheduler().alphas_cumprod.to(device)
    scenes = [scene_by_index(i) for i in range(len(pictures))]
    mean_weight = 1 + (TOY_WEIGHT - 1) * float(np.mean(covered, dtype=np.float64))
    batch = BATCH[device.type]

    def rows_of(array: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array[rows]).to(device).float()

    def step(number: int) -> dict[str, torch.Tensor]:
        rng = random.Random(torch.initial_seed())
        chosen = torch.randint(0, len(latents), (batch,))
        rows = chosen.numpy()
        z = rows_of(latents, rows)
        captions = ["" if rng.random() < EMPTY else caption(scenes[i], rng) for i in chosen]
        t = ((torch.arange(batch) + torch.rand(batch)) * 1000 / batch).long().to(device)
        noise = torch.randn_like(z)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * z
        with torch.no_grad():
            context = encode_text(tokenizer, text_encoder, captions)
        with faster_precision(device):
            predicted = unet(noisy, t, context).sample.float()
            told = parts["head"](middle.pop()).float()
        fine, coarse = (rows_of(judged[name], rows) for name in ("fine", "coarse"))
        fine_told, coarse_told = told.split([fine.shape[1], coarse.shape[1]], 1)
        weight = (1 + (TOY_WEIGHT - 1) * rows_of(covered, rows)) / mean_weight
        missed = (F.avg_pool2d(weight, 2) * (fine_told - fine).square()).mean()
        missed = missed + (F.avg_pool2d(weight, 4) * (F.avg_pool2d(coarse_told, 2) - coarse).square()).mean()
        return {"loss": (weight * (predicted - target).square()).mean(), "alignment": ALIGNMENT / 2 * missed}

    def publish(learned: Any) -> None:
        if rank_and_size()[0] == 0:
            save_pipeline(data, folder, learned["unet"])

    train(
        "unet",
        parts,
        step,
        minutes=minutes,
        lr=2e-3,
        weight_decay=1e-3,
        muon=True,
        ema=0.999,
        pictures=batch,
        folder=folder,
        needs=("vae", "text"),
        on_publish=publish,
        device=device,
    )
    publish(parts)
