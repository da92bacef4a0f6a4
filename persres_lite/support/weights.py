"""Loading a base: from a folder, one file or the hub; which of its files, and how much is to be fetched.

Repositories hold the weights once in full precision and mostly once more in half ("fp16" in the file's name), which is
half the download. Only safetensors files count: pickles are never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from safetensors import safe_open

from persres_lite.support.notices import tell

WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?P<half>\.fp16)?(?:-\d+-of-\d+)?\.safetensors")
"""What a part's weights are called; others, such as ``.non_ema.``, are not meant."""

WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "FeatureExtractor", "ImageProcessor")


class UnfitBase(ValueError):
    """The model is whole, and of a kind that is not meant here."""


def load(source: str, revision: str | None, dtype: torch.dtype, safety_checker: bool) -> DiffusionPipeline:
    """A pipeline from one place, as it is there.

    Parameters
    ----------
    source : str
        A folder, a file, or a repository on the hub.
    revision : str, optional
        Of a repository.
    dtype : torch.dtype
        Of its weights.
    safety_checker : bool
        Whether to load it, where there is one.

    Raises
    ------
    UnfitBase
        If it is not a Stable Diffusion with a U-Net.
    Exception
        Of many kinds, for files that are missing or damaged.
    """
    path = Path(source)
    # Before 0.40 diffusers knew only the longer word, and passes over the other one in silence.
    word = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
    options: dict[str, Any] = {word: dtype}
    if path.is_file():
        pipeline = _kind_of(path).from_single_file(source, **options)
        pipeline.register_to_config(_name_or_path=source)
        return pipeline
    hub, trouble = ({}, "") if path.is_dir() else on_hub(source, revision)
    where = {"revision": revision, "local_files_only": path.is_dir() or bool(trouble)}
    try:
        config = DiffusionPipeline.load_config(source, **where)
        if "UNet2DConditionModel" not in (config.get("unet") or ()):  # said before gigabytes are fetched
            raise UnfitBase(
                f"{source} ({config.get('_class_name')}) has no U-Net that takes a text (in a diffusion transformer "
                "proj_out is the last layer, not one in each block): choose a Stable Diffusion model."
            )
        if not safety_checker and "safety_checker" in config:  # pipelines that never had one warn of it
            options |= {"safety_checker": None, "requires_safety_checker": False}
        here = in_folder(path) if path.is_dir() else in_cache(source, revision)
        half = dtype.itemsize == 2 and not path.is_dir()  # a folder is read as exactly as it is
        variant, size = choose(here, hub, parts_with_weights(config, options), half)
        if size:
            tell(f"{source} is downloaded now, once: {size / 1e9:.1f} GB.")
        pipeline = DiffusionPipeline.from_pretrained(source, variant=variant, use_safetensors=True, **where, **options)
    except OSError as error:
        if trouble:
            raise OSError(f"{trouble}, and not in the local cache") from error
        raise
    if path.is_dir():
        _find_gaps(path, pipeline)
    return pipeline


def _kind_of(path: Path) -> Any:
    """The pipeline for all weights in one file, under the names of the first Stable Diffusion's code."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    if "model.diffusion_model.input_blocks.0.0.weight" not in names:
        raise UnfitBase(
            f"{path} holds no U-Net of Stable Diffusion (a LoRA? a diffusion transformer, such as FLUX or sd-3.5?): "
            "give the file of a whole Stable Diffusion model."
        )
    two = any(name.startswith("conditioner.embedders.1.") for name in names)  # text encoders
    return StableDiffusionXLPipeline if two else StableDiffusionPipeline


def _find_gaps(folder: Path, pipeline: Any) -> None:
    """Raise OSError where something is missing that the libraries pass over, or fill with random numbers."""
    parts = pipeline.components
    for part, module in ((part, parts[part]) for part in parts if isinstance(parts[part], torch.nn.Module)):
        empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if part.startswith("text_encoder"):
            stored: set[str] = set()
            for path in (folder / part).glob("*.safetensors"):
                with safe_open(path, "pt") as file:
                    stored |= {name.removeprefix("text_model.") for name in file.keys()}  # left out by newer versions
            empty += [name for name in module.state_dict() if name.removeprefix("text_model.") not in stored]
            tokenizer = parts[part.replace("text_encoder", "tokenizer")]
            known, words = module.get_input_embeddings().num_embeddings, len(tokenizer)
            if not known / 2 < words <= known:
                raise OSError(f"its {part} knows {known} words, and its tokenizer {words}")
        if empty:
            raise OSError(f"its {part} lacks {len(empty)} tensors, the first {empty[0]!r}")


def on_hub(repository: str, revision: str | None) -> tuple[dict[str, int], str]:
    """The files of a repository on the hub and their bytes; or none, and why it cannot be asked.

    Whatever the reason is (no network, a proxy of a kind that needs another package, a repository that has moved), what
    is in the cache may serve.
    """
    try:
        found = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
    except RepositoryNotFoundError:
        return {}, "no such repository, or one that asks for an access token"
    except Exception as error:
        # HTTPError is of the library by which huggingface_hub speaks to the network: requests, httpx or httpx2.
        offline = isinstance(error, OSError | HTTPError) and not isinstance(error, HfHubHTTPError)
        return {}, "no network" if offline else first_sentence(error)
    return {file.rfilename: file.size or 0 for file in found.siblings or ()}, ""


def first_sentence(error: Exception) -> str:
    """What an error says, cut to one sentence without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def in_cache(repository: str, revision: str | None) -> dict[str, int]:
    """The files of a repository in the local cache and their bytes."""
    index = try_to_load_from_cache(repository, "model_index.json", revision=revision)
    return in_folder(Path(index).parent) if isinstance(index, str) else {}


def in_folder(folder: Path) -> dict[str, int]:
    """The files below a folder and their bytes."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def choose(here: Mapping[str, int], hub: Mapping[str, int], parts: Sequence[str], half: bool) -> tuple[str | None, int]:
    """The variant to load, and how many bytes of weights are fetched for it.

    What is here goes first, in the precision that is wanted; full precision serves for half as well. Half serves for
    full only where nothing else can be had.

    Parameters
    ----------
    here, hub : dict of str to int
        Files and their bytes on this machine and on the hub; no files on the hub if there is no network.
    parts : list of str
        The parts of the pipeline that have weights, "unet" say.
    half : bool
        Whether the weights are wanted in half precision.

    Returns
    -------
    tuple[str | None, int]
        "fp16" or None, as diffusers takes it, and bytes.
    """
    wanted: list[str | None] = ["fp16", None] if half else [None, "fp16"]
    places = [(here, each) for each in wanted[: 1 + half]] + [(hub, each) for each in wanted] + [(here, "fp16")]
    for files, variant in places:
        chosen = [name for name in files if _is_of(name, variant) and name.partition("/")[0] in parts]
        if set(parts) <= {name.partition("/")[0] for name in chosen}:
            return variant, sum(files[name] for name in chosen if name not in here)
    return None, 0


def parts_with_weights(config: Mapping[str, Any], without: Iterable[str]) -> list[str]:
    """The parts of a pipeline that have weights, by what its model_index.json says."""
    classes = {part: value[1] for part, value in config.items() if isinstance(value, list) and part not in without}
    return [part for part, kind in classes.items() if kind and not kind.endswith(WITHOUT_WEIGHTS)]


def _is_of(name: str, variant: str | None) -> bool:
    folder, _, file = name.rpartition("/")
    match = WEIGHTS.fullmatch(file)
    return bool(folder) and match is not None and bool(match["half"]) == (variant == "fp16")
