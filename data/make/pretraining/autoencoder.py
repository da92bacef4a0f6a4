"""How the autoencoder is trained, and its decoder for longer; every training picture as a latent."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .dataset import Shards, to_float
from .judge import judge_parts, of_every_picture
from .models import make_autoencoder
from .trainer import Run, train, trained

BATCH = {"cpu": 8, "cuda": 64}  # a GPU is not busy with fewer
NOISE = 0.05  # added to latents while the decoder learns: what the U-Net makes is never exact


def train_vae(run: Run, pictures: Shards) -> None:
    """The autoencoder. Latents are held near mean 0 and deviation 1 in each channel, so that no scaling factor is
    needed.
    """
    torch.manual_seed(2)
    vae, batch = make_autoencoder(), BATCH[run.device.type]

    def step(number: int) -> dict[str, torch.Tensor]:
        x = to_float(pictures[torch.randint(0, len(pictures), (batch,))][..., :3], run.device)
        with run.faster_precision():
            z = vae.encode(x).latents.float()
            y = vae.decode(z + NOISE * torch.randn_like(z)).sample.float()
        moments = z.mean((0, 2, 3)).square().mean() + z.std((0, 2, 3)).log().square().mean()
        return {"l1": (y - x).abs().mean(), "mse": F.mse_loss(y, x) * 2, "moments": 0.02 * moments}

    train("vae", vae, step, run, lr=3e-3, muon=True, ema=0.998, batch=batch)


def latents_of(run: Run, pictures: Shards) -> dict[str, np.ndarray]:
    """Every picture encoded, "latents" (n, 16, 16, 16), and the share of each cell that is toy, "covered" (n, 1, 16,
    16).
    """

    def begin():
        vae = trained("vae", make_autoencoder(), run.folder).to(run.device)

        def of(some: np.ndarray):
            latents = vae.encode(to_float(some[..., :3], run.device)).latents
            toy = torch.from_numpy(some[..., 3]).float()[:, None] / 255
            return latents, F.avg_pool2d(toy, toy.shape[-1] // latents.shape[-1])

        return of

    return of_every_picture(run, pictures, "vae", ["latents", "covered"], begin)


def train_decoder(run: Run, pictures: Shards) -> None:
    """The decoder alone for longer, on the latents of the finished encoder: what the U-Net learns stays valid.

    Beside the pixels, the first maps of the identity encoder are compared (a perceptual loss, every other step): they
    ask for edges and patterns where the pixels alone are content with a blur.
    """
    torch.manual_seed(4)
    latents = latents_of(run, pictures)["latents"]
    encoder = trained("judge", judge_parts(), run.folder)["encoder"].to(run.device)
    vae, batch = trained("vae", make_autoencoder(), run.folder).to(run.device), BATCH[run.device.type]
    vae.decoder.requires_grad_(True)

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,)).numpy()
        x = to_float(pictures[chosen][..., :3], run.device)
        z = torch.from_numpy(latents[chosen]).to(run.device).float().contiguous(memory_format=torch.channels_last)
        with run.faster_precision():
            y = vae.decode(z + NOISE * torch.randn_like(z)).sample.float()
        losses = {"l1": (y - x).abs().mean(), "mse": F.mse_loss(y, x) * 2}
        if number % 2 == 0:
            with run.faster_precision():
                wanted, made = (encoder(image, output_hidden_states=True).hidden_states[:3] for image in (x, y))
            apart = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(made, wanted, strict=True)]
            losses["seen"] = 0.1 * torch.stack(apart).sum().float()
        return losses

    train("decoder", vae.decoder, step, run, lr=2e-3, muon=True, ema=0.999, batch=batch)
