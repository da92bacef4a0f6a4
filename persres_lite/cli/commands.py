"""The commands behind `persres-lite`: each works, then writes its files whole or not at all."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import diffusers
import torch
from PIL import Image, ImageEnhance

from persres_lite import Residuals, load_base, load_concept
from persres_lite import compare as side_by_side
from persres_lite import personalize as learn
from persres_lite.bases import BASES, settings_of, source_of
from persres_lite.cli import SCHEDULERS
from persres_lite.cli.errors import Failed, say
from persres_lite.concepts import Concept
from persres_lite.cost import on_gpu, without_gpu
from persres_lite.evaluation import Comparison, draw, usual_ways
from persres_lite.lora import PREFIX, export_lora, import_lora
from persres_lite.masks import find_rule
from persres_lite.prompts import find_words
from persres_lite.residuals import FORMAT
from persres_lite.support.files import check_place, read_tensors, whole_file
from persres_lite.support.images import square_crops
from persres_lite.support.notices import tell
from persres_lite.support.sheet import sheet
from persres_lite.training import Diverged

Pairs = list[tuple[Residuals, str]]  # each with the words whose attention makes its mask


def personalize(chosen: Namespace) -> None:
    """Learn a concept and write its residuals."""
    _check_out(chosen, ".safetensors", chosen.checkpoint)
    if chosen.checkpoint:
        check_place(chosen.checkpoint)
    name, sources = _base_name(chosen), chosen.concept
    concept = load_concept(sources if len(sources) > 1 else sources[0], chosen.macro_class, chosen.token)
    base = _base(chosen, name)
    begun = time.perf_counter()
    try:
        residuals = learn(
            base,
            concept,
            **{part: getattr(chosen, part) for part in ("steps", "batch_size", "lr", "rank", "seed", "init", "loss")},
            train_token=chosen.train_token,
            checkpoint=chosen.checkpoint,
            on_step=_along_the_way(chosen, base, concept),
            progress=not chosen.quiet,
        )
    except Diverged as error:
        again = f" Delete {chosen.checkpoint} first: it goes on with its own rate only." if chosen.checkpoint else ""
        raise Failed(f"{str(error).partition(';')[0]}. No residuals were written.{again}") from error
    residuals.save(chosen.out)
    print(
        f"{chosen.out}: {residuals.num_parameters():,} parameters for {str(concept)!r}, learned from "
        f"{len(concept.images)} pictures in {len(residuals.losses)} steps and {time.perf_counter() - begun:.0f} s."
    )


def _along_the_way(chosen: Namespace, base: Any, concept: Concept) -> Callable[[int, float, Residuals], None]:
    """What is kept of a training before it ends: `--save-every` and `--sample-every`."""

    def on_step(step: int, loss: float, residuals: Residuals) -> None:
        path = chosen.out.with_name(f"{chosen.out.stem}-{step:05d}.safetensors")
        try:
            if chosen.save_every and step % chosen.save_every == 0:
                residuals.save(path)
            if chosen.sample_every and step % chosen.sample_every == 0:
                noise = torch.Generator().manual_seed(chosen.seed)
                picture = draw(base, [concept.training_prompt], generator=noise, **settings_of(base).sampling)[0]
                _write_beside(picture, path.with_suffix(".png"))
        except OSError as error:  # a disk that has filled up does not end a training
            tell(f"{error} The training goes on.")

    return on_step


def sample(chosen: Namespace) -> None:
    """Draw pictures, each to a file of its own."""
    if chosen.out.is_file():
        raise ValueError(f"{chosen.out} is a file: --out names a folder for the pictures.")
    check_place(chosen.out / "picture.png")
    base, pairs, prompts = _read(chosen)
    for prompt in prompts:
        for seed in range(chosen.seed, chosen.seed + chosen.images):
            [[picture]] = _drawn(chosen, base, pairs, [prompt], [seed]).pictures.values()
            print(_write_beside(picture, chosen.out / f"{_slug(prompt)}-{chosen.mode}-{seed}.png"), flush=True)


def compare(chosen: Namespace) -> None:
    """Draw each prompt three times from the same noise: original, residual everywhere, LAG; and LAG's mean mask."""
    _check_out(chosen, ".png")
    base, pairs, prompts = _read(chosen)
    comparison = _drawn(chosen, base, pairs, prompts, range(chosen.seed, chosen.seed + chosen.images))
    _write(_png(comparison.sheet()), chosen.out)
    print(f"{chosen.out}: {len(comparison.prompts)} rows, each from one noise.")


def show(chosen: Namespace) -> None:
    """Say what a file is; of a concept's folder also draw its pictures and what its masks mark."""
    path = Path(os.path.expanduser(chosen.what))
    if path.suffix == ".safetensors":
        return print(_described(path))
    concept = load_concept(chosen.what, chosen.macro_class, chosen.token)
    images, masks = square_crops(concept.images, 128, concept.masks)
    rows = [[image] for image in images]
    for row, mask in zip(rows, masks, strict=False):  # no masks, or one for each
        row.append(Image.composite(row[0], ImageEnhance.Brightness(row[0]).enhance(0.25), mask))
    picture = sheet(rows, ["as seen", "its object"], gap=8, shown=128)
    place = _write_beside(picture, chosen.out or Path(f"{_slug(concept.name)}.png"))
    told = f'{len(images)} pictures{" with masks" if masks else ""} of "{concept}"'
    print(f"{concept.name}: {told}, whose class is {concept.macro_class!r}. Drawn in {place}.")


def export(chosen: Namespace) -> None:
    """Write residuals as a LoRA for other tools, and say how to use it."""
    _check_out(chosen, ".safetensors", chosen.residuals)
    base = _base(chosen, _base_name(chosen, chosen.residuals))
    print(export_lora(_load(chosen, chosen.residuals, base), chosen.out, chosen.format))


def _described(path: Path) -> str:
    """One sentence about a file, from its names and metadata alone."""
    tensors, metadata = read_tensors(path)
    known = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    size = f"{len(tensors)} tensors of {sum(tensor.numel() for tensor in tensors.values()):,} numbers"
    if "structure" in known:
        kind = "residuals" if metadata.get("format") == FORMAT else "a LoRA of residuals"
        words = f"{known.get('token', '?')} {known.get('macro_class', '?')}"
        steps = len(json.loads(known.get("losses", "[]"))) or "an unknown number of"
        where = f"{known.get('base', 'a base without a name')} ({known['structure']})"
        return f'{path}: {kind} of "{words}" on {where}; rank {known.get("rank")}, {steps} steps; {size}.'
    if any("checkpoint" in key for key in known):
        return f"{path}: the state of a training, which personalize --checkpoint {path} goes on with; {size}."
    return f"{path}: {'a LoRA of another program' if any('lora' in name for name in tensors) else 'no LoRA'}; {size}."


def _read(chosen: Namespace) -> tuple[Any, Pairs, list[str]]:
    """The base, residuals with their mask's words, and prompts: all that could be refused is, before a picture."""
    more = list(itertools.takewhile(lambda text: text.endswith(".safetensors"), chosen.prompt))
    paths = [chosen.residuals, *(Path(os.path.expanduser(text)) for text in more)]
    texts = [" ".join(text.split()) for text in chosen.prompt[len(more) :]]
    if not texts:
        raise ValueError('There is no prompt: add one, as in "a photo of a {} on the beach".')
    base = _base(chosen, _base_name(chosen, paths[0]))
    if chosen.scheduler:
        base.scheduler = getattr(diffusers, SCHEDULERS[chosen.scheduler]).from_config(base.scheduler.config)
    loaded = [_load(chosen, path, base) for path in paths]
    spoken, looked = _words_of(chosen, paths, loaded)
    prompts = [_spelled(text, paths, spoken) for text in texts]
    pairs = list(zip(loaded, looked, strict=True))
    if chosen.command == "compare" or chosen.mode == "lag":
        _check_lag(chosen, base, pairs, prompts)
    for prompt in prompts:
        extra = len(base.tokenizer(prompt, verbose=False).input_ids) - base.tokenizer.model_max_length
        if extra > 0:
            tell(f'The end of "{prompt}" is not read, {extra} tokens: shorten it.')
    return base, pairs, prompts


def _words_of(chosen: Namespace, paths: list[Path], loaded: list[Residuals]) -> tuple[list[str], list[str]]:
    """For each file the words that its braces stand for, and those whose attention makes its mask."""
    given, spoken, looked = chosen.words or [""] * len(paths), [], []
    if len(given) != len(paths):
        raise ValueError(f"{len(paths)} files, and --words is given {len(given)} times: once for each file, or never.")
    for path, residuals, words in zip(paths, loaded, given, strict=True):
        own = " ".join(residuals.metadata.get(part, "") for part in ("token", "macro_class")).strip()
        if not own and not words:
            raise ValueError(f'{path} does not say its concept\'s words: give them, as in --words "sks cat".')
        spoken.append(own or words)
        looked.append(words or own)
    if len(set(looked)) < len(looked):
        raise ValueError(f'Two files have the same words, "{looked[0]}": personalize one with another --token.')
    return spoken, looked


def _spelled(text: str, paths: list[Path], spoken: list[str]) -> str:
    """A prompt with the words of each file in the place of its braces: {}, or {name}, or {a}, {b}, ... in order."""
    named = dict(zip(ascii_lowercase, spoken, strict=False))
    named |= {path.stem: words for path, words in zip(paths, spoken, strict=True)}
    named |= {"": spoken[0]} if len(spoken) == 1 else {}
    for name in re.findall(r"\{([^{}]*)\}", text):
        if name not in named:
            known = ", ".join(f"{{{each}}}" for each in sorted(named))
            raise ValueError(f"Nothing is known by {{{name}}} in {text!r}: use {known}.")
        text = text.replace(f"{{{name}}}", named[name])
    return text


def _check_lag(chosen: Namespace, base: Any, pairs: Pairs, prompts: list[str]) -> None:
    """What LAG could be refused for, before the first picture."""
    for _, words in pairs:
        find_words(base, prompts, words)
    if not chosen.window[0] < chosen.window[1]:
        raise ValueError("--window must begin before it ends, as in --window 0 0.5 for the first half.")
    try:
        find_rule(chosen.mask, **dict(chosen.mask_option))(torch.arange(16.0).view(1, 4, 4))
    except Exception as error:  # of torch, which a value out of its range comes to
        raise ValueError(f"--mask {chosen.mask} does not go with its --mask-option: {error}.") from error


def _base_name(chosen: Namespace, path: Path | None = None) -> str:
    """The base to load: the one asked for, or the one that a file names, if it is a known one."""
    name = chosen.base or os.environ.get("PERSRES_BASE")
    if path:
        _, metadata = read_tensors(path)
        named = metadata.get("base" if metadata.get("format") == FORMAT else PREFIX + "base")
        if named and named not in BASES and not name:  # a file does not choose what is fetched and run
            raise ValueError(
                f"{path} names a base of its own, {named!r}: if you know and want it, give it with --base."
            )
        name = chosen.base or (named if named in BASES else name)
    source_of(name or "toybox")  # a name that is wrong is told first; and a wheel alone has no Toybox, and says so
    return name or "toybox"


def _base(chosen: Namespace, name: str) -> Any:
    """The frozen model; what a large one costs is said before anything is fetched."""
    usual = chosen.device is None or chosen.device.startswith("cuda")
    if chosen.command != "export" and (cost := without_gpu(name) or (on_gpu(name) if usual else None)):
        say(cost)
    if name == "toybox" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second one gains nothing on a model so small, and costs what else runs
    base = load_base(name, chosen.device, getattr(torch, chosen.dtype) if chosen.dtype else None)
    if chosen.quiet:
        base.set_progress_bar_config(disable=True)
    return base


def _load(chosen: Namespace, path: Path, base: Any) -> Residuals:
    """The residuals of a file: our own, or a LoRA on the output projections."""
    try:
        if read_tensors(path)[1].get("format") == FORMAT:
            return Residuals.load(path, base)
        return import_lora(path, base, only_proj_out=chosen.only_proj_out)
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # files of others may be wrong in every way
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be used as residuals or a LoRA ({error or type(error).__name__}).") from error


def _drawn(chosen: Namespace, base: Any, pairs: Pairs, prompts: list[str], seeds: Sequence[int]) -> Comparison:
    """Each prompt from the noise of each seed: in all ways, or in the one that is the mode; a picture at a time."""
    rule = find_rule(chosen.mask, **dict(chosen.mask_option))
    ways: dict[str, Any] = usual_ways(base, pairs, scale=chosen.scale, mask=rule, window=tuple(chosen.window))
    if chosen.command == "sample":
        ways |= {way: None for way in ways if way.lower() != chosen.mode}
    given = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance}
    given |= {"height": chosen.height, "width": chosen.width}
    given |= {"negative_prompt": [chosen.negative_prompt] if chosen.negative_prompt else None}  # of one picture
    options = {name: value for name, value in given.items() if value is not None}
    options |= {"batch_size": 1, "progress": chosen.command == "compare" and not chosen.quiet}
    return side_by_side(base, pairs, "", prompts=prompts, seeds=seeds, ways=ways, **options)


def _slug(prompt: str) -> str:
    """A prompt as a part of a file's name: its letters in any script, not more than file systems take."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words.encode()[:120].decode(errors="ignore").strip("-") or "picture"


def _png(picture: Image.Image) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        return file.getvalue()


def _write(content: bytes, path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def _write_beside(picture: Image.Image, path: Path) -> Path:
    """Write a picture; where another one has this name already, under the next free one. Returns where it is."""
    content, place = _png(picture), path
    for number in itertools.count(2):
        if not place.exists() or place.is_file() and place.read_bytes() == content:
            break
        place = path.with_name(f"{path.stem}-{number}.png")
    _write(content, place)
    return place


def _check_out(chosen: Namespace, suffix: str, other: Path | None = None) -> None:
    """Told before the work, not after it: whether `--out` can be written."""
    if chosen.out.suffix.lower() != suffix or chosen.out.is_dir():
        raise ValueError(f"--out {chosen.out} must be a file that ends in {suffix}.")
    if other and os.path.realpath(chosen.out) == os.path.realpath(other):
        raise ValueError(f"--out {chosen.out} is another file of this command, too: name another one.")
    check_place(chosen.out)
