"""The four commands behind `persres-lite`: each works, then writes its files whole or not at all."""

from __future__ import annotations

import io
import itertools
import os
import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from PIL import Image, ImageDraw
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from persres_lite import Residuals, load_base, load_concept, localized
from persres_lite import personalize as learn
from persres_lite.bases import BASES, settings_of
from persres_lite.cli import Failed
from persres_lite.lora import PREFIX, export_lora, import_lora
from persres_lite.masks import average, find_rule
from persres_lite.prompts import find_words
from persres_lite.residuals import FORMAT
from persres_lite.support.files import check_place, read_tensors, whole_file
from persres_lite.support.notices import tell
from persres_lite.training import Diverged


def personalize(chosen: Namespace) -> None:
    """Learn a concept and write its residuals."""
    _needs_suffix(chosen.out, ".safetensors")
    _are_two_files(chosen, "out", "checkpoint")
    places = [path for path in (chosen.out, chosen.checkpoint) if path is not None]
    for path in places:
        check_place(path)
    concept = load_concept(_one_or_many(chosen.concept), chosen.macro_class, chosen.token)
    base = _base(chosen)
    recipe = settings_of(base).recipe
    rank = recipe["rank"] if chosen.rank is None else chosen.rank
    room = 4 * Residuals(base.unet, rank=rank).num_parameters()
    for path in places:  # a checkpoint holds three numbers for one, and the new one is written beside the old one
        check_place(path, room if chosen.checkpoint is None else 7 * room)
    start = time.perf_counter()
    try:
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
    except Diverged as error:
        raise Failed(_diverged(str(error), chosen)) from error
    path = _keep(residuals.save, chosen.out)
    for step, picture in residuals.samples.items():
        _write_beside(picture, path.with_name(f"{path.stem}-{step:04d}.png"))
    print(
        f"{path}: {residuals.num_parameters():,} parameters for {str(concept)!r}, learned from "
        f"{len(concept.images)} pictures in {len(residuals.losses)} steps and {time.perf_counter() - start:.0f} s."
    )
    _moved(path, chosen.out)


def sample(chosen: Namespace) -> None:
    """Draw pictures, each to a file of its own."""
    if chosen.out.is_file():
        raise ValueError(f"{chosen.out} is a file: --out names a folder for the pictures.")
    check_place(chosen.out / "picture.png")
    base, residuals = _load(chosen)
    prompts = _prompts(chosen, base, residuals, [chosen.mode])
    check_place(chosen.out / "picture.png", 3 * settings_of(base).size ** 2)
    for prompt in prompts:
        for k in range(chosen.images):
            seed = chosen.seed + k
            picture, _ = _draw(chosen, base, residuals, prompt, seed, chosen.mode)
            print(_write_beside(picture, chosen.out / f"{_slug(prompt)}-{chosen.mode}-{seed}.png"))


def compare(chosen: Namespace) -> None:
    """Draw each prompt three times from the same noise: original, residual everywhere, LAG; and LAG's mean mask."""
    _needs_suffix(chosen.out, ".png")
    check_place(chosen.out)
    base, residuals = _load(chosen)
    modes = ("original", "residual", "lag")
    prompts = [prompt for prompt in _prompts(chosen, base, residuals, modes) for _ in range(chosen.images)]
    check_place(chosen.out, len(prompts) * 4 * 4 * settings_of(base).size ** 2)
    rows = []
    with tqdm(total=3 * len(prompts), desc="compare", unit="picture", disable=chosen.quiet) as bar:
        for i, prompt in enumerate(prompts):
            row = []
            for mode in modes:
                picture, mask = _draw(chosen, base, residuals, prompt, chosen.seed + i % chosen.images, mode)
                row.append(picture)
                bar.update()
            rows.append((prompt, [*row, mask]))  # the last one's, LAG's
    sheet = _sheet(("original", "residual", "LAG", "mean mask of LAG"), rows)
    path = _keep(lambda path: _write_picture(sheet, path), chosen.out)
    print(f"{path}: {len(rows)} rows, each from one noise.")
    _moved(path, chosen.out)


def export(chosen: Namespace) -> None:
    """Write residuals as a LoRA for other tools, and say how to use it."""
    _needs_suffix(chosen.out, ".safetensors")
    _are_two_files(chosen, "out", "residuals")
    check_place(chosen.out)
    _, residuals = _load(chosen)
    print(export_lora(residuals, chosen.out, chosen.format))


def _load(chosen: Namespace) -> tuple[Any, Residuals]:
    """The base and the residuals of a file: our own, or a LoRA on the output projections."""
    path = chosen.residuals
    _, metadata = read_tensors(path)
    ours = metadata.get("format") == FORMAT
    named = metadata.get("base") if ours else metadata.get(PREFIX + "base")
    if named not in BASES:  # a file does not choose what is fetched and run
        own, named = named, os.environ.get("PERSRES_BASE")
        if own and not named and not chosen.base:
            raise ValueError(f"{path} names a base of its own, {own!r}: if you know and want it, give it with --base.")
    base = _base(chosen, named)
    try:
        if ours:
            return base, Residuals.load(path, base)
        return base, import_lora(path, base, only_proj_out=chosen.only_proj_out)
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # files of others may be wrong in every way
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be used as residuals or a LoRA ({error or type(error).__name__}).") from error


def _base(chosen: Namespace, name: str | None = None) -> Any:
    """The frozen model: the one asked for, else the one that a file names."""
    with _silence():
        return load_base(chosen.base or name, chosen.device, _dtype(chosen.dtype))


@contextmanager
def _silence() -> Iterator[None]:
    """The libraries keep to themselves what nobody can act on: that torchvision is missing, which is not used, say."""
    libraries = (diffusers_logging, hub_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def _diverged(message: str, chosen: Namespace) -> str:
    """Python's message without the part about its exception, and with how to go on from here."""
    reason = message.partition(";")[0]
    if "at step 1:" in reason:  # nothing was learned yet, so no rate can help
        return f"{reason.partition(':')[0]}, before anything was learned: the base is broken, or try --dtype float32."
    again = f" Delete {chosen.checkpoint} first: it goes on with its own rate only." if chosen.checkpoint else ""
    return f"{reason}. No residuals were written.{again}"


def _own_words(chosen: Namespace, residuals: Residuals) -> str:
    """What {} stands for: the file's words, or, of a file that names none, those of --words."""
    words = [residuals.metadata.get(name, "") for name in ("token", "macro_class")]
    if not all(words) and not chosen.words:
        raise ValueError(f'{chosen.residuals} does not say its concept\'s words: give them, as in --words "sks cat".')
    return " ".join(words) if all(words) else chosen.words


def _mask_words(chosen: Namespace, residuals: Residuals) -> str:
    return chosen.words or _own_words(chosen, residuals)


def _prompts(chosen: Namespace, base: Any, residuals: Residuals, modes: Sequence[str]) -> list[str]:
    """The prompts, with all that one of them or an option could be refused for, before the first picture is drawn."""
    find_rule(chosen.mask, **dict(chosen.mask_option))
    prompts = [
        prompt.replace("{}", _own_words(chosen, residuals)) if "{}" in prompt else prompt for prompt in chosen.prompt
    ]
    if "lag" in modes:
        find_words(base, prompts, _mask_words(chosen, residuals))
        start, end = chosen.window
        steps = chosen.steps or settings_of(base).sampling["num_inference_steps"]
        if 0 <= start < end <= 1 and not any(start <= step / steps < end for step in range(steps)):
            raise ValueError(f"None of {steps} steps begins in the window {start:g} to {end:g}: widen it.")
    for prompt in prompts:
        tokens = len(base.tokenizer(prompt, verbose=False).input_ids)
        if tokens > base.tokenizer.model_max_length:
            tell(f'The end of "{prompt}" is not read, {tokens - base.tokenizer.model_max_length} tokens: shorten it.')
    return prompts


def _draw(
    chosen: Namespace, base: Any, residuals: Residuals, prompt: str, seed: int, mode: str
) -> tuple[Image.Image, Image.Image]:
    """One picture, and where the residual was applied: the mean over steps and blocks, of the picture's size."""
    options = dict(settings_of(base).sampling) | {"generator": torch.Generator().manual_seed(seed)}
    if chosen.steps is not None:
        options["num_inference_steps"] = chosen.steps
    if chosen.guidance is not None:
        options["guidance_scale"] = chosen.guidance
    if mode == "original":
        picture = _picture(base, prompt, options)
        return picture, Image.new("L", picture.size, 0)
    if mode == "residual":
        with residuals.attached(base, scale=chosen.scale):
            picture = _picture(base, prompt, options)
        return picture, Image.new("L", picture.size, 255)
    rule, words = find_rule(chosen.mask, **dict(chosen.mask_option)), _mask_words(chosen, residuals)
    with localized(base, residuals, words, mask=rule, scale=chosen.scale, window=tuple(chosen.window)) as lag:
        picture = _picture(base, prompt, options)
    mask = average([mask.float().cpu() for mask in lag.masks.values()])[0]
    return picture, Image.fromarray((mask * 255).round().to(torch.uint8).numpy()).resize(picture.size)


def _picture(base: Any, prompt: str, options: dict[str, Any]) -> Image.Image:
    """What the pipeline draws. Numbers that are not finite would become a black picture without a word."""
    with _silence():
        values = base(prompt, output_type="np", **options).images  # (1, h, w, 3) in 0..1
    if not np.isfinite(values).all() or values.min() == values.max():
        raise Failed(
            f'The picture of "{prompt}" is no picture: numbers became too large. Try --dtype float32 or a --scale '
            "below 1; if --mode original fails as well, the base is broken, otherwise the residuals are."
        )
    return base.image_processor.numpy_to_pil(values)[0]


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


def _slug(prompt: str) -> str:
    """A prompt as a part of a file's name: its letters in any script, not more than file systems take."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words.encode()[:120].decode(errors="ignore").strip("-") or "picture"


def _write_beside(picture: Image.Image, path: Path) -> Path:
    """Write a picture; where another one has this name already, under the next free one. Returns where it is."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    for number in itertools.count(2):
        if not path.exists() or path.is_file() and path.read_bytes() == encoded.getvalue():
            break
        path = path.with_name(
            re.sub(rf"(-{number - 1})?\.png$" if number > 2 else r"\.png$", f"-{number}.png", path.name)
        )
    with whole_file(path) as temporary:
        temporary.write_bytes(encoded.getvalue())
    return path


def _write_picture(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        picture.save(temporary)


def _keep(write: Callable[[Path], Any], path: Path) -> Path:
    """Write a result; if its place has filled up meanwhile, elsewhere, since hours of work may be in it."""
    try:
        write(path)
        return path
    except OSError as error:
        for folder in (Path.cwd(), Path(tempfile.gettempdir())):
            other = folder / path.name
            with suppress(OSError):
                if not other.exists():
                    write(other)
                    return other
        raise Failed(str(error)) from error


def _moved(path: Path, wanted: Path) -> None:
    if path != wanted:
        raise Failed(f"{wanted} could not be written, so the result is in {path.resolve()}.")


def _are_two_files(chosen: Namespace, one: str, other: str) -> None:
    first, second = getattr(chosen, one), getattr(chosen, other)
    if second is not None and os.path.realpath(first) == os.path.realpath(second):
        raise ValueError(f"--{one} {first} is the file of the {other}, too: name another one.")


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
