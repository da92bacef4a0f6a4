"""The four commands behind `persres-lite`: each works, then writes its files whole or not at all."""

from __future__ import annotations

import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from persres_lite import Residuals, load_base, load_concept, localized
from persres_lite import personalize as learn
from persres_lite.bases import entry
from persres_lite.cost import without_gpu
from persres_lite.lora import PREFIX, export_lora, import_lora
from persres_lite.masks import average
from persres_lite.residuals import FORMAT
from persres_lite.support.files import read_tensors, whole_file


def personalize(chosen: Namespace) -> None:
    """Learn a concept and write its residuals."""
    _needs_suffix(chosen.out, ".safetensors")
    concept = load_concept(_one_or_many(chosen.concept), chosen.macro_class, chosen.token)
    base = _load_base(chosen)
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
        f"{len(concept.images)} pictures in {len(residuals.history)} steps and {time.perf_counter() - start:.0f} s."
    )


def sample(chosen: Namespace) -> None:
    """Draw pictures, each to a file of its own."""
    if chosen.out.is_file():
        raise ValueError(f"{chosen.out} is a file: --out names a folder for the pictures.")
    base, residuals = _load(chosen)
    for prompt in _prompts(chosen, residuals):
        for k in range(chosen.images):
            seed = chosen.seed + k
            picture, _ = _draw(chosen, base, residuals, prompt, seed, chosen.mode)
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            path = chosen.out / f"{slug}-{chosen.mode}-{seed}.png"
            _write_picture(picture, path)
            print(path)


def compare(chosen: Namespace) -> None:
    """Draw each prompt three times from the same noise: original, residual everywhere, LAG; and LAG's mean mask."""
    _needs_suffix(chosen.out, ".png")
    base, residuals = _load(chosen)
    prompts = [prompt for prompt in _prompts(chosen, residuals) for _ in range(chosen.images)]
    rows = []
    with tqdm(total=3 * len(prompts), desc="compare", unit="picture", disable=chosen.quiet) as bar:
        for i, prompt in enumerate(prompts):
            row = []
            for mode in ("original", "residual", "lag"):
                picture, mask = _draw(chosen, base, residuals, prompt, chosen.seed + i % chosen.images, mode)
                row.append(picture)
                bar.update()
            rows.append((prompt, [*row, mask]))  # the last one's, LAG's
    _write_picture(_sheet(("original", "residual", "LAG", "mean mask of LAG"), rows), chosen.out)
    print(f"{chosen.out}: {len(rows)} rows, each from one noise.")


def export(chosen: Namespace) -> None:
    """Write residuals as a LoRA for other tools, and say how to use it."""
    _, residuals = _load(chosen)
    print(export_lora(residuals, chosen.out, chosen.format))


def _load(chosen: Namespace) -> tuple[Any, Residuals]:
    """The base and the residuals of a file: our own, or a LoRA on the output projections."""
    _, metadata = read_tensors(chosen.residuals)
    ours = metadata.get("format") == FORMAT
    known = metadata.get("base") if ours else metadata.get(PREFIX + "base")
    base = _load_base(chosen, known)
    if ours:
        return base, Residuals.load(chosen.residuals, base)
    return base, import_lora(chosen.residuals, base, only_proj_out=chosen.only_proj_out)


def _load_base(chosen: Namespace, known: str | None = None) -> Any:
    """The base asked for, else the one that a file names; what it costs without a GPU is said before it is fetched."""
    name = chosen.base or known or os.environ.get("PERSRES_BASE") or "toybox"
    if chosen.command != "export" and (cost := without_gpu(name)):
        print(cost, file=sys.stderr, flush=True)
    return load_base(name, chosen.device, _dtype(chosen.dtype))


def _words(chosen: Namespace, residuals: Residuals) -> str:
    words = [residuals.metadata.get(name, "") for name in ("token", "macro_class")]
    if not chosen.words and not all(words):
        raise ValueError(f'{chosen.residuals} does not say its concept\'s words: give them, as in --words "sks cat".')
    return chosen.words or " ".join(words)


def _prompts(chosen: Namespace, residuals: Residuals) -> list[str]:
    return [prompt.replace("{}", _words(chosen, residuals)) if "{}" in prompt else prompt for prompt in chosen.prompt]


def _draw(
    chosen: Namespace, base: Any, residuals: Residuals, prompt: str, seed: int, mode: str
) -> tuple[Image.Image, Image.Image]:
    """One picture, and where the residual was applied: the mean over steps and blocks, of the picture's size."""
    options = dict(entry(base).sampling) | {"generator": torch.Generator().manual_seed(seed)}
    if chosen.steps is not None:
        options["num_inference_steps"] = chosen.steps
    if chosen.guidance is not None:
        options["guidance_scale"] = chosen.guidance
    if mode == "original":
        picture = base(prompt, **options).images[0]
        return picture, Image.new("L", picture.size, 0)
    if mode == "residual":
        with residuals.attached(base, scale=chosen.scale):
            picture = base(prompt, **options).images[0]
        return picture, Image.new("L", picture.size, 255)
    rule = {"mask": chosen.mask, "window": tuple(chosen.window), **dict(chosen.mask_option)}
    with localized(base, residuals, _words(chosen, residuals), scale=chosen.scale, **rule) as lag:
        picture = base(prompt, **options).images[0]
    mask = average([mask.float().cpu() for mask in lag.masks.values()])[0]
    return picture, Image.fromarray((mask * 255).round().to(torch.uint8).numpy()).resize(picture.size)


def _sheet(titles: Sequence[str], rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Pictures in rows, a title above each column, the prompt above each row."""
    gap, line = 8, 18
    width, height = rows[0][1][0].size
    shown = max(width, 128)  # Toybox's 64 pixels are shown twice as large
    height = height * shown // width
    sheet = Image.new("RGB", (len(titles) * (shown + gap) + gap, line + len(rows) * (height + line + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (shown + gap), 3), title, "black")
    for number, (prompt, pictures) in enumerate(rows):
        top = line + number * (height + line + gap)
        draw.text((gap, top + 3), prompt, "gray")
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((shown, height)), (gap + column * (shown + gap), top + line))
    return sheet


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
