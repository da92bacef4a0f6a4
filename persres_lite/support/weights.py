"""Which of a repository's files to load: half precision where that is wanted and there, and how much is to be fetched.

Repositories hold the weights once in full precision and mostly once more in half ("fp16" in the file's name), which is
half the download. Only safetensors files count: pickles are never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?P<half>\.fp16)?(?:-\d+-of-\d+)?\.safetensors")
"""What a part's weights are called; others, such as ``.non_ema.``, are not meant."""

KINDS: dict[str | None, bool] = {None: False, "fp16": True}
"""By variant, as diffusers calls it: whether its files have the half in their names."""


def on_hub(repository: str, revision: str | None) -> dict[str, int]:
    """The files of a repository on the hub and their bytes; none if it cannot be asked."""
    try:
        found = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
    except (OSError, HfHubHTTPError, HFValidationError, httpx.HTTPError):  # who loads it says what is wrong
        return {}
    return {file.rfilename: file.size or 0 for file in found.siblings or ()}


def in_cache(repository: str, revision: str | None) -> dict[str, int]:
    """The files of a repository in the local cache and their bytes."""
    try:
        index = try_to_load_from_cache(repository, "model_index.json", revision=revision)
    except HFValidationError:
        return {}
    if not isinstance(index, str):
        return {}
    folder = Path(index).parent
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def whole(files: Iterable[str], parts: Iterable[str], variant: str | None) -> bool:
    """Whether every one of the parts has weights of this variant among the files."""
    there = {name.partition("/")[0] for name in files if _is_of(name, variant)}
    return set(parts) <= there


def choose(
    cached: Mapping[str, int], hub: Mapping[str, int], parts: Iterable[str], half: bool
) -> tuple[str | None, int]:
    """The variant to load, and how many bytes of weights are fetched for it.

    What is in the cache goes first, in the precision that is wanted; full precision serves for half as well. Half
    serves for full only where nothing else can be had.

    Parameters
    ----------
    cached, hub : dict of str to int
        Files and their bytes in the cache and on the hub; no files on the hub if there is no network.
    parts : list of str
        The parts of the pipeline that have weights, "unet" say.
    half : bool
        Whether the weights are wanted in half precision.

    Returns
    -------
    tuple[str | None, int]
        "fp16" or None, as diffusers takes it, and bytes.
    """
    parts = list(parts)
    wanted: list[str | None] = ["fp16", None] if half else [None, "fp16"]
    if whole(cached, parts, wanted[0]) or half and whole(cached, parts, None):
        return (wanted[0] if whole(cached, parts, wanted[0]) else None), 0
    for variant in wanted:
        if whole(hub, parts, variant):
            chosen = [name for name in hub if _is_of(name, variant) and name.partition("/")[0] in parts]
            return variant, sum(hub[name] for name in chosen if name not in cached)
    return ("fp16" if whole(cached, parts, "fp16") else None), 0


def parts_with_weights(config: Mapping[str, Any], without: Iterable[str]) -> list[str]:
    """The parts of a pipeline that have weights, by what its model_index.json says."""
    classes = {part: value[1] for part, value in config.items() if isinstance(value, list | tuple) and len(value) == 2}
    none = ("Tokenizer", "Scheduler", "FeatureExtractor", "ImageProcessor", "TokenizerFast")
    return [
        part
        for part, kind in classes.items()
        if isinstance(kind, str) and not kind.endswith(none) and part not in without
    ]


def _is_of(name: str, variant: str | None) -> bool:
    folder, _, file = name.rpartition("/")
    match = WEIGHTS.fullmatch(file)
    return bool(folder) and match is not None and bool(match["half"]) == KINDS[variant]
