"""Loading the frozen models that everything here starts from.

A base is an ordinary diffusers pipeline. Nothing wraps it: it is loaded, put into evaluation mode and frozen. Which
ones there are, and what follows from the choice of one, stands in :mod:`persres_lite.registry`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from persres_lite.registry import BASES, Base
from persres_lite.support.paths import data_dir
from persres_lite.support.rare_token import ENCODERS


class UnfitBase(ValueError):
    """The model is whole, and of a kind that is not meant here."""


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
    name
        A short name of `BASES`, a folder in diffusers' layout, or a hub id. None takes the environment variable
        ``PERSRES_BASE`` (the one switch of the notebooks), and without it Toybox, which needs no network.
    device
        "cpu", "cuda", "mps", … None takes the best that there is.
    dtype
        None: fp32 on CPU and MPS, and for Toybox everywhere; on CUDA bf16 where the processor has it, else fp16. In
        fp16 the autoencoder of XL overflows to black pictures (diffusers #4325): its pipeline decodes in fp32 by
        itself, and :func:`persres_lite.personalize` encodes in fp32.
    safety_checker
        Stable Diffusion 1.x comes with a classifier that paints pictures black which it takes for indecent. It is not
        loaded, because a black picture falsifies the figures and scores of an experiment. Load it for anything that
        shows pictures to a public.

    Returns
    -------
    diffusers.DiffusionPipeline
        On `device`; no parameter requires a gradient. Small bases (up to 128 pixels) sample without a progress bar.

    Raises
    ------
    ValueError
        If the name is unknown, the folder is no pipeline, or the model is not a Stable Diffusion U-Net (a diffusion
        transformer, say).
    OSError
        If the weights are neither on this machine nor to be had, or a folder is not whole.
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
            with _quiet() if local else nullcontext():
                pipeline = DiffusionPipeline.from_pretrained(
                    source, dtype=dtype, use_safetensors=True, **where, **options
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
    pipeline.set_progress_bar_config(disable=entry(pipeline).size <= 128)
    return pipeline.to(target)


def entry(base: Any) -> Base:
    """What is known of a base: its line of `BASES`, or, for a model that is not in it, what its structure says.

    Parameters
    ----------
    base
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
        raise ValueError(f"Nothing is known of {source!r} before it is loaded: ask entry(load_base({source!r})).")
    relative = BASES["sdxl"] if hasattr(base, "text_encoder_2") else BASES["sd-1.4"]
    side = base.unet.config.sample_size
    size = side * base.vae_scale_factor if isinstance(side, int) else relative.size
    sampling = relative.sampling | {"height": size, "width": size}
    return replace(relative, name=source, repositories=(), size=size, sampling=sampling)


def _known(source: str) -> Base | None:
    for base in BASES.values():
        if source == base.name or source in (repository for repository, _ in base.repositories):
            return base
        if base.folder and Path(source).name == base.folder:
            return base
    return None


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
def _quiet() -> Iterator[None]:
    """Nothing on the screen while a folder is read.

    It takes a second and no network. What the libraries would print, bars and the remark that torchvision is missing
    (it is not used), would stay in a notebook.
    """
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (bars, verbosity) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
