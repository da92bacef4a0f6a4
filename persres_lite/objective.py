"""What a training step computes: latents of the pictures, features of the text, and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a base may have been trained to predict."""


@dataclass
class TrainingSet:
    """A concept's pictures as latents; first index 0 as they are, 1 mirrored; n pictures, latents (c, h, w)."""

    mean: Tensor  # (2, n, c, h, w), already scaled as the U-Net expects
    std: Tensor | None  # the same shape for an autoencoder that is a distribution, drawn anew at each step
    weights: Tensor | None  # (2, n, 1, h, w), the object's share of each position, for the masked loss

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Latents (b, c, h, w) of pictures in random order, each as often as the others, and their weights."""
        count = self.mean.shape[1]
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-batch_size // count))])
        which = torch.randint(0, 2, (batch_size,), generator=generator), order[:batch_size]
        latents = self.mean[which]
        if self.std is not None:
            latents = latents + self.std[which] * torch.randn(latents.shape, generator=generator)
        return latents, None if self.weights is None else self.weights[which]


@torch.no_grad()
def encode_images(base: Any, images: list[Image.Image]) -> tuple[Tensor, Tensor | None]:
    """Latents of pictures, as they are and mirrored.

    Parameters
    ----------
    base
        The pipeline; its autoencoder is used in fp32 where its configuration asks for that (SDXL's overflows in fp16,
        diffusers #4325).
    images
        n square RGB pictures of one size.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        Mean and standard deviation, each (2, n, c, h, w) in fp32 on the CPU; no deviation for an autoencoder that has
        none.
    """
    vae = base.vae
    dtype = vae.dtype
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 127.5 - 1)
    pixels = pixels.permute(0, 3, 1, 2)  # (n, 3, h, w) in -1..1
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    means, stds = [], []
    for picture in torch.cat([pixels, pixels.flip(-1)]):  # one at a time: memory stays that of sampling
        encoded = vae.encode(picture[None].to(vae.device, vae.dtype))
        if hasattr(encoded, "latents"):  # AutoencoderTiny, Toybox's
            means.append(encoded.latents)
        else:
            means.append(encoded.latent_dist.mean)
            stds.append(encoded.latent_dist.std)
    if upcast:
        vae.to(dtype)
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    def both(parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts).float().cpu()
        return joined.unflatten(0, (2, len(images)))

    mean = (both(means) - shift) * vae.config.scaling_factor
    return mean, both(stds) * vae.config.scaling_factor if stds else None


def encode_prompt(base: Any, prompt: str, size: int) -> dict[str, Any]:
    """What the U-Net is told about one prompt, as its keyword arguments, for a batch of one.

    Parameters
    ----------
    base
        A Stable Diffusion or Stable Diffusion XL pipeline.
    prompt
        The text.
    size
        Side of the pictures in pixels: XL is also told the original size, the crop's corner and the size asked for.

    Returns
    -------
    dict
        ``encoder_hidden_states`` (1, tokens, width), and for XL ``added_cond_kwargs``.
    """
    encoded = base.encode_prompt(
        prompt=prompt, device=base.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    condition: dict[str, Any] = {"encoder_hidden_states": encoded[0]}
    if base.unet.config.addition_embed_type == "text_time":
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=encoded[0].device, dtype=encoded[0].dtype)
        condition["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": time_ids}
    return condition


def diffusion_loss(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    condition: dict[str, Any],
    noise: Tensor,
    timesteps: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """The plain latent-diffusion loss, E || target - model(z_t, t, text) ||^2.

    Parameters
    ----------
    unet
        The U-Net, with residuals attached or not.
    scheduler
        Gives z_t and the target; its ``prediction_type`` is "epsilon" (the noise), "v_prediction" or "sample".
    latents, noise
        (b, c, h, w) in fp32.
    condition
        From :func:`encode_prompt`; broadcast over the batch.
    timesteps
        (b,) whole numbers.
    weights
        (b, 1, h, w) or None: the loss becomes the weighted mean over positions.

    Returns
    -------
    Tensor
        One number, in fp32.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps).to(unet.dtype)
    batch = _expanded(condition, len(latents))
    predicted = unet(noisy, timesteps, return_dict=False, **batch)[0].float()
    kind = scheduler.config.get("prediction_type")
    if kind not in PREDICTIONS:
        raise ValueError(
            f"The target {kind!r} is not one of DDPM's ({', '.join(PREDICTIONS)}): take another scheduler."
        )
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = {"epsilon": noise, "sample": latents}[kind]
    if weights is None:
        return F.mse_loss(predicted, target)
    return (weights * (predicted - target).square()).mean() / weights.mean().clamp(min=1e-6)


def _expanded(condition: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """A condition for one picture, repeated for a batch without copying."""
    return {
        name: _expanded(value, batch_size) if isinstance(value, dict) else value.expand(batch_size, *value.shape[1:])
        for name, value in condition.items()
    }
