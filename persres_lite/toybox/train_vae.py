"""How the autoencoder is trained, and its decoder for longer; every training picture as a latent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .dataset import to_float
from .models import make_autoencoder
from .trainer import faster_precision, load_trained, still_valid, train, trained


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
    """(n, 6, 16, 16): every picture encoded once, kept on disk until the encoder learns again."""
    path = folder / "latents.npy"
    if not still_valid(path, "vae", folder):
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
