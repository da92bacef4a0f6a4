"""What a large base costs, said before it is spent: hours on a processor, and memory on a GPU.

The memory is counted from the configurations alone. What training keeps for its backward pass is the inputs of those
layers that need them: of a ResNet block both normalizations and both activations, of a transformer block its three
normalizations, both attentions and the gated layer. Nothing is kept before the first residual, whose layers no gradient
reaches, and of frozen layers the weights alone. With checkpointing it is the inputs of the blocks, and what one of them
needs when it is computed again.

This is what is alive, not what a process holds. On a processor glibc keeps much of what was freed between the inputs
of the blocks: measured without a GPU, a checkpointed step takes twice what is estimated, unless the environment
variable ``MALLOC_MMAP_THRESHOLD_`` says 65536, by which what is freed goes back to the system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from persres_lite.bases import BASES, settings_of

LARGE = 256
"""Pixels: a base whose pictures are smaller than this is quick anywhere."""

MINUTES = 12.0
"""For a picture of 512 x 512 pixels in 50 steps on two cores: what `make bench` measures for a step of SD 1.4's U-Net
at 256 x 256, times the operations of the larger size; two runs of it gave 10 and 14. More cores are taken to be faster
in proportion."""

PICTURES = 12.5
"""Learning a concept by the paper's recipe takes as long as so many pictures: 600 passes there and back."""

GIB = 2**30
SLACK = 1.15
"""What an allocator holds beyond what is asked of it: blocks that fit nothing else."""
CONTEXT = 0.5
"""GiB that CUDA and its libraries take before anything else."""

_CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_SD = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": _CROSS, "layers_per_block": 2}
_VAE = {"block_out_channels": (128, 256, 512, 512)}
#: By family: the U-Net's and the autoencoder's configuration, as far as it matters here, and the number of parameters
#: of the U-Net, the autoencoder and the text encoders.
KNOWN: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "sd-1.4": ({**_SD, "cross_attention_dim": 768}, _VAE, 859_520_964 + 83_653_863 + 123_060_480),
    "sd-2.1": ({**_SD, "cross_attention_dim": 1024}, _VAE, 865_910_724 + 83_653_863 + 340_387_840),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "layers_per_block": 2,
        },
        {**_VAE, "force_upcast": True},
        2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840,
    ),
}
KNOWN["sd-1.5"] = KNOWN["sd-1.4"]


def without_gpu(base: str | os.PathLike) -> str | None:
    """Say in a sentence what a large base would cost on this machine's processor; None if there is nothing to say.

    Parameters
    ----------
    base : str or path
        A base's name, folder or hub id; nothing is loaded.

    Returns
    -------
    str or None
        None if torch has a GPU, or the base is a small one.
    """
    size = picture_size(base)
    if size < LARGE or torch.cuda.is_available() or torch.backends.mps.is_available():
        return None
    cores = os.cpu_count() or 1
    minutes = MINUTES * (size / 512) ** 2.5 * 2 / cores
    return (
        f"There is no GPU here. On {cores} core{'s' * (cores > 1)}, a picture of {size} x {size} pixels takes "
        f"{_about(minutes)} and learning a concept {_about(PICTURES * minutes)}; Toybox needs no GPU."
    )


def picture_size(base: str | os.PathLike) -> int:
    """Side of a base's pictures in pixels, as far as that is known before it is loaded: otherwise SD 1.4's."""
    try:  # what is wrong with a folder is said by the one who loads it
        side = json.loads((Path(base) / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
        return 8 * int(side)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    try:
        return settings_of(os.fspath(base)).size
    except ValueError:
        return BASES["sd-1.4"].size


@dataclass(frozen=True)
class Memory:
    """What a base needs on its device, in GiB, apart from what an allocator and a driver add.

    Attributes
    ----------
    weights : float
        Of all its models.
    training : float
        Of one training step, on top.
    sampling : float
        Of one step of sampling, on top.
    decoding : float
        Of turning latents into pictures, on top.
    """

    weights: float
    training: float
    sampling: float
    decoding: float

    @property
    def to_train(self) -> float:
        """GiB that training needs on an empty GPU, with what comes on top of it."""
        return SLACK * (self.weights + self.training) + CONTEXT

    @property
    def to_sample(self) -> float:
        """GiB that sampling needs on an empty GPU, with what comes on top of it."""
        return SLACK * (self.weights + max(self.sampling, self.decoding)) + CONTEXT


def memory(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    parameters: int,
    *,
    size: int,
    bytes: int = 2,
    batch: int = 4,
    checkpointing: bool = False,
    pictures: int = 1,
    decoded: int = 1,
    scale_factor: int = 8,
) -> Memory:
    """Estimate a base's memory from its configurations.

    Parameters
    ----------
    unet, vae : dict
        The configurations of U-Net and autoencoder.
    parameters : int
        Numbers in all its models.
    size : int
        Side of the pictures, in pixels.
    bytes : int
        Of a number: 2 in half precision, 4 in fp32.
    batch : int
        Pictures that go through the U-Net at once in training.
    checkpointing : bool
        Whether blocks are computed again in the backward pass.
    pictures : int
        Pictures sampled at once; guidance makes two of each.
    decoded : int
        Pictures decoded at once: 1 with a sliced autoencoder.
    scale_factor : int
        Pixels to a side of a latent.
    """
    side = -(-size // scale_factor)
    kept, recomputed, most, started = 0.0, 0.0, 0.0, False
    skips = 0.0
    for kind, given, width, positions, depth in _blocks(unet, side * side):
        here = width * positions
        if kind == "skip":
            skips += here
            continue
        if kind == "resnet":
            inside, entry, working = 2 * (given + width) * positions, given * positions, 3 * max(given, width)
        else:
            inside, entry, working = (2 + 21 * depth) * here, (2 + depth) * here, 20 * width
        if not started and kind == "attention":  # of the first, only what its projection reads
            started, inside, entry = True, here, here
        if started:
            kept += entry if checkpointing else inside
            recomputed = max(recomputed, inside / max(1, depth) if checkpointing else 0)
        most = max(most, working * positions)
    pixels = vae.get("block_out_channels", (0,))[:2][-1] * 3 * size * size
    exact = 4 if vae.get("force_upcast") else bytes
    return Memory(
        weights=parameters * bytes / GIB,
        training=(kept + recomputed + most) * batch * bytes / GIB,
        sampling=(skips + most) * 2 * pictures * bytes / GIB,
        decoding=pixels * decoded * exact / GIB,
    )


def _blocks(unet: Mapping[str, Any], positions: int) -> Iterator[tuple[str, int, int, int, int]]:
    """The blocks of a U-Net in order: kind, channels in, channels out, positions, transformer blocks inside.

    A "skip" is what is kept for the way up.
    """
    widths, kinds = list(unet["block_out_channels"]), list(unet["down_block_types"])
    levels = len(widths)
    layers, depths = (
        list(value) if isinstance(value, list | tuple) else [value] * levels
        for value in (unet.get("layers_per_block", 2), unet.get("transformer_layers_per_block", 1))
    )
    skips = [widths[0]]
    width = widths[0]
    yield "skip", width, width, positions, 0
    for level in range(levels):
        for _ in range(layers[level]):
            yield "resnet", width, widths[level], positions, 0
            width = widths[level]
            if "CrossAttn" in kinds[level]:
                yield "attention", width, width, positions, depths[level]
            yield "skip", width, width, positions, 0
            skips.append(width)
        if level < levels - 1:
            positions //= 4
            yield "skip", width, width, positions, 0
            skips.append(width)
    yield "resnet", width, width, positions, 0
    if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
        yield "attention", width, width, positions, depths[-1]
        yield "resnet", width, width, positions, 0
    for level in reversed(range(levels)):
        for _ in range(layers[level] + 1):
            yield "resnet", width + skips.pop(), widths[level], positions, 0
            width = widths[level]
            if "CrossAttn" in kinds[level]:
                yield "attention", width, width, positions, depths[level]
        if level > 0:
            positions *= 4
    yield "resnet", width, 0, positions, 0  # the last normalization and activation


def memory_of(base: Any, **options: Any) -> Memory | None:
    """The memory of a base that is loaded, or of a name or folder whose configuration is known; else None.

    Parameters
    ----------
    base : pipeline, str or path
        A base, or what `load_base` would load.
    **options : Any
        As for `memory`: batch, checkpointing, pictures, decoded, size, bytes.
    """
    if isinstance(base, str | os.PathLike):
        found = KNOWN.get(os.fspath(base)) or _in_folder(Path(base))
        if found is None:
            return None
        return memory(*found, **{"size": picture_size(base), **options})
    models = [part for part in base.components.values() if isinstance(part, torch.nn.Module)]
    parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
    given = {"size": settings_of(base).size, "bytes": base.unet.dtype.itemsize, "scale_factor": base.vae_scale_factor}
    return memory(base.unet.config, base.vae.config, parameters, **given | options)


def _in_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], int] | None:
    """What `KNOWN` holds, of a folder in diffusers' layout; what is wrong with one is said by who loads it."""
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae"))
        parameters = 0
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            for path in (folder / part).glob("*.safetensors"):
                with safe_open(path, "pt") as file:
                    parameters += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())
        list(_blocks(unet, 1))
        return unet, vae, parameters
    except (OSError, ValueError, TypeError, LookupError, SafetensorError):
        return None


def room() -> float | None:
    """GiB that are free on the GPU for this process; None without one."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / GIB


def fitting(base: Any, batch: int, free: float | None, **options: Any) -> dict[str, Any]:
    """How to train so that it fits: as it is, or else with the least memory that there is.

    Parameters
    ----------
    base : pipeline, str or path
        As for `memory_of`. A loaded base's weights count as being on the GPU already.
    batch : int
        Pictures in a training step.
    free : float or None
        GiB that are free, see `room`; None is without limit.
    **options : Any
        Of `memory`, such as bytes.

    Returns
    -------
    dict
        at_once, the pictures that go through the U-Net together, and gradient_checkpointing: arguments of
        `persres_lite.personalize`.
    """
    as_it_is = {"at_once": batch, "gradient_checkpointing": False}
    need = memory_of(base, batch=batch, **options)
    if need is None or free is None:
        return as_it_is
    loaded = not isinstance(base, str | os.PathLike)
    if (SLACK * need.training if loaded else need.to_train) <= free:
        return as_it_is
    return {"at_once": 1, "gradient_checkpointing": True}


def on_gpu(base: str | os.PathLike) -> str | None:
    """Say in a sentence what a large base needs of this machine's GPU, and how it will fit; None without one.

    Parameters
    ----------
    base : str or path
        A base's name, folder or hub id; nothing is loaded.
    """
    free = room()
    if free is None or picture_size(base) < LARGE:
        return None
    batch = BASES["sd-1.4"].recipe["batch_size"]
    plan = fitting(base, batch, free)
    need = memory_of(base, batch=plan["at_once"], checkpointing=plan["gradient_checkpointing"])
    if need is None:
        return None
    how = "as it is" if plan["at_once"] == batch else f"with gradient checkpointing and 1 picture at a time of {batch}"
    said = (
        f"Estimated GPU memory in half precision: {need.to_sample:.1f} GiB to sample, {need.to_train:.1f} GiB to train "
        f"{how}; {free:.1f} GiB are free."
    )
    if max(need.to_sample, need.to_train) > free:
        said += " That may not fit: close what else uses the GPU, or choose a smaller base."
    return said


def _about(minutes: float) -> str:
    if minutes < 90:
        return f"about {max(1, round(minutes))} minutes" if minutes >= 1.5 else "about a minute"
    return f"about {round(minutes / 30) / 2:g} hours"
