"""How the autoencoder is trained, and its decoder for longer; every training picture as a latent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from data.make.pretraining.models import make_autoencoder

from .dataset import Shards, to_float
from .judge import judge_parts
from .trainer import CPU, faster_precision, load_trained, still_valid, train, trained

BATCH = {"cpu": 8, "cuda": 32}  # a GPU is not busy with fewer
NOISE = 0.05  # added to latents while the decoder learns: what the U-Net makes is never exact


def train_vae(folder: Path, pictures: Shards, minutes: float, device: torch.device = CPU) -> None:
    """The autoencoder. Latents are held near mean 0 and deviation 1 in each channel, so that no scaling factor is
    needed.
    """
    torch.manual_seed(2)
    vae = make_autoencoder()
    batch = BATCH[device.type]

    def step(number: int) -> dict[str, torch.Tensor]:
        x = to_float(pictures[torch.randint(0, len(pictures), (batch,))][..., :3], device)
        with faster_precision(device):
            z = vae.encode(x).latents.float()
            y = vae.decode(z + NOISE * torch.randn_like(z)).sample.float()
        moments = z.mean((0, 2, 3)).square().mean() + z.std((0, 2, 3)).log().square().mean()
        return {"l1": (y - x).abs().mean(), "mse": F.mse_loss(y, x) * 2, "moments": 0.02 * moments}

    train(
        "vae", vae, step, minutes=minutes, lr=3e-3, weight_decay=1e-4, muon=True, ema=0.998, pictures=batch,
        folder=folder, device=device,
    )  # fmt: skip


@torch.no_grad()
def latents_of(pictures: Shards, folder: Path, device: torch.device = CPU) -> tuple[np.ndarray, np.ndarray]:
    """Every picture encoded once, (n, 16, 16, 16), and the share of each cell that is toy, (n, 1, 16, 16), in half
    precision; kept on disk until the encoder learns again, and opened without being read.
    """
    paths = [folder / "latents.npy", folder / "covered.npy"]
    if not all(still_valid(path, "vae", folder) for path in paths):
        vae = trained("vae", make_autoencoder(), folder).to(device)
        parts: list[list[np.ndarray]] = [[], []]
        for start in tqdm(range(0, len(pictures), 100), desc="encoding"):
            some = pictures[start : start + 100]
            covered = torch.from_numpy(some[..., 3]).float()[:, None] / 255
            parts[0].append(vae.encode(to_float(some[..., :3], device)).latents.half().contiguous().cpu().numpy())
            parts[1].append(F.avg_pool2d(covered, some.shape[1] // parts[0][-1].shape[-1]).half().numpy())
        for path, made in zip(paths, parts, strict=True):
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, np.concatenate(made))
            os.replace(path.with_suffix(".part"), path)
    latents, covered = (np.load(path, mmap_mode="r") for path in paths)
    return latents, covered


def train_decoder(folder: Path, pictures: Shards, minutes: float, device: torch.device = CPU) -> None:
    """The decoder alone for longer, on the latents of the finished encoder: what the U-Net learns stays valid.

    Beside the pixels, the first maps of the identity encoder are compared (a perceptual loss, every other step): they
    ask for edges and patterns where the pixels alone are content with a blur.
    """
    torch.manual_seed(4)
    latents, _ = latents_of(pictures, folder, device)
    encoder = trained("judge", judge_parts(), folder)["encoder"].to(device)
    vae = make_autoencoder()
    load_trained("vae", vae, folder)
    vae.to(device)
    batch = BATCH[device.type]

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,)).numpy()
        x = to_float(pictures[chosen][..., :3], device)
        z = torch.from_numpy(latents[chosen]).to(device).float().contiguous(memory_format=torch.channels_last)
        with faster_precision(device):
            y = vae.decode(z + NOISE * torch.randn_like(z)).sample.float()
        losses = {"l1": (y - x).abs().mean(), "mse": F.mse_loss(y, x) * 2}
        if number % 2 == 0:
            with faster_precision(device):
                with torch.no_grad():
                    wanted = encoder(x, output_hidden_states=True).hidden_states[:3]
                made = encoder(y, output_hidden_states=True).hidden_states[:3]
            apart = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(made, wanted, strict=True)]
            losses["seen"] = 0.1 * torch.stack(apart).sum().float()
        return losses

    train(
        "decoder", vae.decoder, step, minutes=minutes, lr=2e-3, weight_decay=1e-4, muon=True, ema=0.999,
        pictures=batch, folder=folder, needs=("vae",), device=device,
    )  # fmt: skip
