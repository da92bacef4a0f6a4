"""The four commands behind `persres-lite`: each works, then writes its files whole or not at all."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from persres_lite import Residuals, load_base, load_concept
from persres_lite import compare as side_by_side
from persres_lite import personalize as learn
from persres_lite.bases import BASES, settings_of
from persres_lite.cli import Failed
from persres_lite.cost import on_gpu, without_gpu
from persres_lite.evaluation import draw, usual_ways
from persres_lite.lora import PREFIX, export_lora, import_lora
from persres_lite.masks import find_rule
from persres_lite.prompts import find_words
from persres_lite.residuals import FORMAT
from persres_lite.support.files import check_place, read_tensors, whole_file
from persres_lite.support.notices import tell
from persres_lite.training import Diverged, samples_every


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
            on_step=samples_every(chosen.sample_every, base, concept, chosen.seed) if chosen.sample_every else None,
            train_token=chosen.train_token,
            loss=chosen.loss,
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
            picture = _draw(chosen, base, residuals, prompt, seed)
            print(_write_beside(picture, chosen.out / f"{_slug(prompt)}-{chosen.mode}-{seed}.png"))


def compare(chosen: Namespace) -> None:
    """Draw each prompt three times from the same noise: original, residual everywhere, LAG; and LAG's mean mask."""
    _needs_suffix(chosen.out, ".png")
    check_place(chosen.out)
    base, residuals = _load(chosen)
    prompts = _prompts(chosen, base, residuals, ("original", "residual", "lag"))
    check_place(chosen.out, len(prompts) * chosen.images * 4 * 4 * settings_of(base).size ** 2)
    with _silence(), _one_sentence():
        comparison = side_by_side(
            base,
            residuals,
            _mask_words(chosen, residuals),
            prompts=prompts,
            seeds=range(chosen.seed, chosen.seed + chosen.images),
            scale=chosen.scale,
            lag=_rule(chosen),
            batch_size=1,  # as `sample` draws them
            progress=not chosen.quiet,
            **_sampling(chosen),
        )
    sheet = comparison.sheet()
    path = _keep(lambda path: _write_picture(sheet, path), chosen.out)
    print(f"{path}: {len(comparison.prompts)} rows, each from one noise.")
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
    name = chosen.base or name or os.environ.get("PERSRES_BASE") or "toybox"
    usual = chosen.device is None or chosen.device.startswith("cuda")
    cost = without_gpu(name) or (on_gpu(name) if usual else None)
    if chosen.command != "export" and cost:  # said before anything is fetched
        print(cost, file=sys.stderr, flush=True)
    with _silence():
        return load_base(name, chosen.device, _dtype(chosen.dtype))


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


def _rule(chosen: Namespace) -> dict[str, Any]:
    """The options of LAG that were given."""
    return {"mask": find_rule(chosen.mask, **dict(chosen.mask_option)), "window": tuple(chosen.window)}


def _sampling(chosen: Namespace) -> dict[str, Any]:
    """The options of the pipeline call that were given."""
    given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    return {name: value for name, value in given.items() if value is not None}


def _draw(chosen: Namespace, base: Any, residuals: Residuals, prompt: str, seed: int) -> Image.Image:
    """One picture in the mode that was chosen."""
    words = _mask_words(chosen, residuals) if chosen.mode == "lag" else None
    ways = usual_ways(base, residuals, words, scale=chosen.scale, lag=_rule(chosen))
    options = settings_of(base).sampling | _sampling(chosen)
    with _silence(), _one_sentence(), ways["LAG" if chosen.mode == "lag" else chosen.mode]():
        return draw(base, [prompt], generator=torch.Generator().manual_seed(seed), **options)[0]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What Python is told of a picture that is none, in words of the command line."""
    try:
        yield
    except FloatingPointError as error:
        raise Failed(
            f"{error} Try --dtype float32 or a --scale below 1; if --mode original fails as well, the base is broken, "
            "otherwise the residuals are."
        ) from error


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
