"""The four commands behind `persres-lite`: each works, then writes its files whole or not at all."""

from __future__ import annotations

import re
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from persres_lite import Residuals, load_base, load_concept, localized
from persres_lite import compare as side_by_side
from persres_lite import personalize as learn
from persres_lite.bases import settings_of
from persres_lite.evaluation import Way
from persres_lite.lora import PREFIX, export_lora, import_lora
from persres_lite.residuals import FORMAT
from persres_lite.support.files import read_tensors, whole_file


def personalize(chosen: Namespace) -> None:
    """Learn a concept and write its residuals."""
    _needs_suffix(chosen.out, ".safetensors")
    concept = load_concept(_one_or_many(chosen.concept), chosen.macro_class, chosen.token)
    base = load_base(chosen.base, chosen.device, _dtype(chosen.dtype))
    start = time.perf_counter()
    residuals = learn(
        base,
        concept,
        steps=chosen.steps,
        batch_size=chosen.batch_size,
        lr=chosen.lr,
        rank=chosen.rank,
        seed=chosen.seed,
        init=chosen.init,
        checkpoint=chosen.checkpoint,
        sample_every=chosen.sample_every,
        train_token=chosen.train_token,
        masked_loss=chosen.masked_loss,
        gradient_checkpointing=chosen.gradient_checkpointing,
        mixed_precision=chosen.mixed_precision,
        progress=not chosen.quiet,
    )
    residuals.save(chosen.out)
    for step, picture in residuals.samples.items():
        _write_picture(picture, chosen.out.with_name(f"{chosen.out.stem}-{step:04d}.png"))
    print(
        f"{chosen.out}: {residuals.num_parameters():,} parameters for {str(concept)!r}, learned from "
        f"{len(concept.images)} pictures in {len(residuals.losses)} steps and {time.perf_counter() - start:.0f} s."
    )


def sample(chosen: Namespace) -> None:
    """Draw pictures, each to a file of its own."""
    if chosen.out.is_file():
        raise ValueError(f"{chosen.out} is a file: --out names a folder for the pictures.")
    base, residuals = _load(chosen)
    for prompt in _prompts(chosen, residuals):
        for k in range(chosen.images):
            seed = chosen.seed + k
            picture = _draw(chosen, base, residuals, prompt, seed)
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            path = chosen.out / f"{slug}-{chosen.mode}-{seed}.png"
            _write_picture(picture, path)
            print(path)


def compare(chosen: Namespace) -> None:
    """Draw each prompt three times from the same noise: original, residual everywhere, LAG; and LAG's mean mask."""
    _needs_suffix(chosen.out, ".png")
    base, residuals = _load(chosen)
    comparison = side_by_side(
        base,
        residuals,
        _words(chosen, residuals),
        prompts=_prompts(chosen, residuals),
        seeds=range(chosen.seed, chosen.seed + chosen.images),
        scale=chosen.scale,
        lag=_rule(chosen),
        batch_size=1,  # as `sample` draws them
        progress=not chosen.quiet,
        **_sampling(chosen),
    )
    _write_picture(comparison.sheet(), chosen.out)
    print(f"{chosen.out}: {len(comparison.prompts)} rows, each from one noise.")


def export(chosen: Namespace) -> None:
    """Write residuals as a LoRA for other tools, and say how to use it."""
    _, residuals = _load(chosen)
    print(export_lora(residuals, chosen.out, chosen.format))


def _load(chosen: Namespace) -> tuple[Any, Residuals]:
    """The base and the residuals of a file: our own, or a LoRA on the output projections."""
    _, metadata = read_tensors(chosen.residuals)
    ours = metadata.get("format") == FORMAT
    known = metadata.get("base") if ours else metadata.get(PREFIX + "base")
    base = load_base(chosen.base or known, chosen.device, _dtype(chosen.dtype))
    if ours:
        return base, Residuals.load(chosen.residuals, base)
    return base, import_lora(chosen.residuals, base, only_proj_out=chosen.only_proj_out)


def _words(chosen: Namespace, residuals: Residuals) -> str:
    words = [residuals.metadata.get(name, "") for name in ("token", "macro_class")]
    if not chosen.words and not all(words):
        raise ValueError(f'{chosen.residuals} does not say its concept\'s words: give them, as in --words "sks cat".')
    return chosen.words or " ".join(words)


def _prompts(chosen: Namespace, residuals: Residuals) -> list[str]:
    return [prompt.replace("{}", _words(chosen, residuals)) if "{}" in prompt else prompt for prompt in chosen.prompt]


def _rule(chosen: Namespace) -> dict[str, Any]:
    """The options of LAG that were given."""
    return {"mask": chosen.mask, "window": tuple(chosen.window), **dict(chosen.mask_option)}


def _sampling(chosen: Namespace) -> dict[str, Any]:
    """The options of the pipeline call that were given."""
    given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    return {name: value for name, value in given.items() if value is not None}


def _draw(chosen: Namespace, base: Any, residuals: Residuals, prompt: str, seed: int) -> Image.Image:
    """One picture in the mode that was chosen."""
    ways: dict[str, Way] = {
        "original": nullcontext,
        "residual": lambda: residuals.attached(base, scale=chosen.scale),
        "lag": lambda: localized(base, residuals, _words(chosen, residuals), scale=chosen.scale, **_rule(chosen)),
    }
    options = settings_of(base).sampling | _sampling(chosen)
    with ways[chosen.mode]():
        return base(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]


def _write_picture(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        picture.save(temporary)


def _needs_suffix(path: Path, suffix: str) -> None:
    """Told before the work, not after it."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"--out {path} must end in {suffix}.")
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder: name a file.")


def _one_or_many(sources: list[str]) -> Any:
    return sources[0] if len(sources) == 1 else sources


def _dtype(name: str | None) -> Any:
    return None if name is None else getattr(torch, name)
