"""Lesson 06, `notebooks/06_does_it_work.ipynb`: does it work? The same noise drawn in several ways, and scores.

The three alignment scores of the paper's first table are cosines between features of pretrained encoders: CLIP-T
(picture and prompt), CLIP-I and DINO-I (picture and reference pictures). Here they are plain cosines between -1 and 1;
CustomConcept101 prints CLIP-T as 2.5 times the cosine. Score prompts *without* the rare token, as it does: "a cat on
the beach", since no CLIP knows what "sks" is.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from persres_lite.bases import settings_of
from persres_lite.concepts import Concept
from persres_lite.localize import Lag, localized
from persres_lite.masks import average, resize
from persres_lite.residuals import Residuals
from persres_lite.support.memory import advising_smaller
from persres_lite.support.paths import data_dir
from persres_lite.support.sheet import sheet

Way = Callable[[], AbstractContextManager]
"""Opens a context in which the pipeline draws in some way: ``lambda: residuals.attached(base, scale=0.6)``."""

JUDGES = {"toybox": ("toybox-clip", "toybox-dino")}
"""A base's own CLIP- and DINO-like encoders, in the data folder."""

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
PAPER_JUDGES = (CLIP, DINO)
"""The encoders of the paper and of CustomConcept101, for every base that has none of its own."""

PARAMETERS = {CLIP: 151_277_313, DINO: 21_665_664}
"""Numbers that are fetched of each, of four bytes."""

REVISIONS = {CLIP: "c237dc49a33fc61debc9276459120b7eac67e7ef"}
"""Commits, so that the weights are always the same ones. CLIP's is the hub's conversion to safetensors; the commit that
is usually pinned has pickles only. Of DINO no commit with safetensors is known to us: without one, transformers asks
the hub for its conversion of the newest.
"""

Pictures = Sequence[Image.Image] | Image.Image


@dataclass
class Judges:
    """A CLIP-like and a DINO-like encoder with what they need to read their inputs; made by `load_judges`."""

    clip: Any
    tokenizer: Any
    clip_processor: Any
    dino: Any
    dino_processor: Any

    def text_alignment(self, images: Pictures, prompts: str | Sequence[str]) -> Tensor:
        """CLIP-T: the cosine between each picture and its prompt.

        Parameters
        ----------
        images : picture or list of picture
            n pictures, or one.
        prompts : str or list of str
            One prompt for all pictures, or n prompts; without the rare token.

        Returns
        -------
        Tensor
            (n,), between -1 and 1.

        Raises
        ------
        ValueError
            If there are neither one nor n prompts.
        """
        images = _pictures(images)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if len(prompts) not in (1, len(images)):
            raise ValueError(f"{len(images)} pictures need one prompt or {len(images)} prompts, not {len(prompts)}.")
        return (self._clip_pictures(images) * self._clip_words(prompts)).sum(-1)

    def text_gap(self, images: Pictures, prompts: Sequence[str]) -> Tensor:
        """How much better each picture fits its own prompt than the other prompts of the list; (n,).

        A cosine between picture and prompt has no scale of its own: for a CLIP-like encoder a wrong prompt may score
        nearly as high as the right one. Only the gap between them says whether a picture shows what it was asked for.

        Raises
        ------
        ValueError
            If there are not as many prompts as pictures, or not two different ones.
        """
        images, prompts = _pictures(images), list(prompts)
        if len(prompts) != len(images) or len(set(prompts)) < 2:
            raise ValueError("A gap needs one prompt a picture, and at least two different prompts.")
        cosines = self._clip_pictures(images) @ self._clip_words(prompts).T  # (pictures, prompts)
        others = torch.tensor([[a != b for b in prompts] for a in prompts], device=cosines.device)
        return cosines.diagonal() - (cosines * others).sum(1) / others.sum(1)

    def image_alignment(self, images: Pictures, refs: Pictures) -> Tensor:
        """CLIP-I: each picture's cosine with the reference pictures, averaged over the references; (n,)."""
        return (self._clip_pictures(_pictures(images)) @ self._clip_pictures(_pictures(refs)).T).mean(-1)

    def identity(self, images: Pictures, refs: Pictures) -> Tensor:
        """DINO-I: as CLIP-I with the DINO-like encoder, which tells one object from another of its class; (n,)."""
        return (self._dino_pictures(_pictures(images)) @ self._dino_pictures(_pictures(refs)).T).mean(-1)

    @torch.no_grad()
    def _clip_pictures(self, images: list[Image.Image]) -> Tensor:
        pixels = self.clip_processor(images=images, return_tensors="pt")["pixel_values"].to(self.clip.device)
        return F.normalize(_features(self.clip.get_image_features(pixel_values=pixels)), dim=-1)

    @torch.no_grad()
    def _clip_words(self, prompts: list[str]) -> Tensor:
        longest = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        tokens = {name: tokens[name].to(self.clip.device) for name in ("input_ids", "attention_mask")}
        return F.normalize(_features(self.clip.get_text_features(**tokens)), dim=-1)

    @torch.no_grad()
    def _dino_pictures(self, images: list[Image.Image]) -> Tensor:
        pixels = self.dino_processor(images=images, return_tensors="pt")["pixel_values"].to(self.dino.device)
        output = self.dino(pixel_values=pixels)
        hidden = output.last_hidden_state
        # A transformer, (n, tokens, c), says what the picture is in its class token; DINO's pooler has no weights.
        # A convolutional encoder, (n, c, h, w), says it in the mean over positions, its pooler.
        features = hidden[:, 0] if hidden.dim() == 3 else output.pooler_output.flatten(1)
        return F.normalize(features, dim=-1)


def load_judges(
    base: Any = "toybox",
    *,
    clip: str | Path | None = None,
    dino: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Judges:
    """Load the encoders that score a base's pictures.

    Parameters
    ----------
    base : pipeline or str
        A loaded pipeline or a base's name: Toybox has its own judges in ``data/``, all others take the paper's.
    clip, dino : str or path, optional
        Other encoders: a folder, or an id on the Hugging Face hub.
    device : str or torch.device, optional
        Where they compute; None takes the pipeline's device, or the CPU for a name.

    Returns
    -------
    Judges
        Frozen and in eval mode.

    Raises
    ------
    OSError
        If a folder is missing, if the hub is out of reach and nothing was fetched before, or if there are no weights as
        safetensors: a pickle, which may run any code, is never opened.
    """
    name = settings_of(base).name
    own = [data_dir() / folder for folder in JUDGES[name]] if name in JUDGES else PAPER_JUDGES
    clip, dino = clip or own[0], dino or own[1]
    device = device or getattr(base, "device", "cpu")
    from transformers import AutoModel, AutoTokenizer, CLIPModel

    return Judges(
        clip=_load_model(CLIPModel, clip).to(device),
        tokenizer=_load(AutoTokenizer, clip),
        clip_processor=_load_processor(clip),
        dino=_load_model(AutoModel, dino).to(device),
        dino_processor=_dinos_own() if str(dino) == DINO else _load_processor(dino),
    )


def draw(base: Any, prompts: Sequence[str], **options: Any) -> list[Image.Image]:
    """What the pipeline draws, one picture a prompt.

    Raises
    ------
    FloatingPointError
        If numbers are not finite, which the pipeline itself would turn into a black picture without a word.
    """
    with advising_smaller():  # for the original model no context of ours is open that would
        values = base(list(prompts), output_type="np", **options).images  # (n, h, w, 3) in [0, 1]
    for prompt, picture in zip(prompts, values, strict=True):
        if not np.isfinite(picture).all() or picture.min() == picture.max():
            raise FloatingPointError(f'The picture of "{prompt}" is no picture: numbers became too large.')
    return base.image_processor.numpy_to_pil(values)


@dataclass(frozen=True)
class Comparison:
    """Pictures drawn in several ways from the same noises; made by `compare`.

    Attributes
    ----------
    prompts : list of str
        One for each picture of a way.
    seeds : list of int
        Of the noise, one for each picture of a way.
    pictures : dict of str to list of PIL.Image.Image
        By way.
    masks : dict of str to tensor (pictures, h, w)
        Of the ways that localize: where the residuals were applied, the mean over steps and blocks.
    seconds : dict of str to float
        What each way took in all.
    concept : Concept or str
        As it was given.
    """

    prompts: list[str]
    seeds: list[int]
    pictures: dict[str, list[Image.Image]]
    masks: dict[str, Tensor]
    seconds: dict[str, float]
    concept: Concept | str

    def scores(
        self,
        judges: Judges,
        where: Callable[[list[Image.Image]], Tensor] | None = None,
        references: Pictures | None = None,
    ) -> dict[str, dict[str, float]]:
        """Mean scores by way.

        Parameters
        ----------
        judges : Judges
            From `load_judges`.
        where : callable, optional
            Gives where the object is, (n, h, w) in [0, 1], for n pictures: then "background moved" is how far the
            background, which neither picture's object covers, is from that of the first way's picture.
        references : list of pictures, optional
            To compare with; by default the concept's own, which flatters what was trained on them.

        Returns
        -------
        dict of str to dict of str to float
            "CLIP-T" of prompts without the rare token; "CLIP-I" and "DINO-I" if there are references; "background
            moved" with `where`.
        """
        references = getattr(self.concept, "images", None) if references is None else references
        plain = getattr(self.concept, "macro_class", None)
        prompts = [prompt.replace(str(self.concept), plain) if plain else prompt for prompt in self.prompts]
        first = next(iter(self.pictures.values()))
        scores = {}
        for way, images in self.pictures.items():
            row = {"CLIP-T": judges.text_alignment(images, prompts).mean().item()}
            if references:
                row["CLIP-I"] = judges.image_alignment(images, references).mean().item()
                row["DINO-I"] = judges.identity(images, references).mean().item()
            if where is not None:
                objects = torch.maximum(where(images), where(first))
                row["background moved"] = background_distance(images, first, objects).mean().item()
            scores[way] = row
        return scores

    def sheet(self) -> Image.Image:
        """One row a noise, one column a way, and beside a way that localizes its mean mask; the prompt above each
        row.
        """
        columns: dict[str, list[Image.Image]] = {}
        for way, pictures in self.pictures.items():
            columns[way] = pictures
            if way in self.masks:
                shown = resize(self.masks[way].float().cpu(), pictures[0].size[::-1])
                columns[f"mean mask of {way}"] = [Image.fromarray((m * 255).round().byte().numpy()) for m in shown]
        return sheet(list(zip(*columns.values(), strict=True)), list(columns), self.prompts, gap=8, shown=128)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.sheet().save(file, "PNG")
        return file.getvalue()


def usual_ways(
    base: Any,
    residuals: Residuals,
    concept: Concept | str | None,
    *,
    scale: float = 1.0,
    lag: Mapping[str, Any] | None = None,
) -> dict[str, Way]:
    """The ways that the lessons compare, by name: the original model, the residual everywhere, and LAG."""
    return {
        "original": nullcontext,
        "residual": lambda: residuals.attached(base, scale=scale),
        "LAG": lambda: localized(base, residuals, concept, scale=scale, **lag or {}),
    }


def compare(
    base: Any,
    residuals: Residuals,
    concept: Concept | str,
    places: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    *,
    prompts: Sequence[str] | None = None,
    ways: Mapping[str, Way | None] | None = None,
    scale: float = 1.0,
    lag: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    **sampling: Any,
) -> Comparison:
    """Draw prompts with the original model, the residual everywhere, and LAG, each from the same noises.

    Parameters
    ----------
    base : pipeline
        From `persres_lite.load_base`.
    residuals : Residuals
        The concept's.
    concept : Concept or str
        Its words ("sks cat").
    places : list of str, optional
        Each makes a prompt, "a photo of a sks cat" and the place. By default the first four of the base's own.
    seeds : list of int
        Noises of each prompt.
    prompts : list of str, optional
        Whole prompts, instead of `places`.
    ways : dict of str to callable, optional
        Further ways: each opens a context in which the pipeline draws. None leaves out a usual way of that name.
    scale : float
        Strength of the residual, everywhere and with LAG.
    lag : dict, optional
        Further options of `persres_lite.localized`.
    batch_size : int, optional
        Pictures drawn at once; the base's own number by default. A noise does not depend on it.
    progress : bool
        Whether to show a bar.
    **sampling
        Of the pipeline call, instead of the base's own settings.

    Returns
    -------
    Comparison
        A picture a way for each prompt and, within it, each seed.

    Raises
    ------
    ValueError
        If there are no prompts or seeds, if both places and prompts are given, or if a prompt lacks the concept's
        words.
    FloatingPointError
        As `draw`.
    """
    settings = settings_of(base)
    if places is not None and prompts is not None:
        raise ValueError("Give places or whole prompts, not both.")
    if prompts is None:
        prompts = [f"a photo of a {concept} {place}" for place in (settings.places[:4] if places is None else places)]
    each = [(prompt, seed) for prompt in prompts for seed in seeds]
    if not each:
        raise ValueError("There is nothing to draw: give at least one place or prompt, and one seed.")
    named = {**usual_ways(base, residuals, concept, scale=scale, lag=lag), **(ways or {})}
    opened = {name: way for name, way in named.items() if way is not None}
    options = settings.sampling | sampling
    size = batch_size or settings.images_per_prompt
    pictures: dict[str, list[Image.Image]] = {}
    masks: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}
    with tqdm(total=len(opened) * len(each), desc="comparing", unit="picture", disable=not progress) as bar:
        for way, context in opened.items():
            begun = time.perf_counter()
            for start in range(0, len(each), size):
                part = each[start : start + size]
                noise = [torch.Generator().manual_seed(seed) for _, seed in part]
                with context() as used:
                    drawn = draw(base, [prompt for prompt, _ in part], generator=noise, **options)
                pictures.setdefault(way, []).extend(drawn)
                if isinstance(used, Lag) and used.masks:
                    masks.setdefault(way, []).append(average([mask.float().cpu() for mask in used.masks.values()]))
                bar.update(len(part))
            seconds[way] = time.perf_counter() - begun
    return Comparison(
        prompts=[prompt for prompt, _ in each],
        seeds=[seed for _, seed in each],
        pictures=pictures,
        masks={way: torch.cat(parts) for way, parts in masks.items()},
        seconds=seconds,
        concept=concept,
    )


def cut_out(images: Pictures, masks: Any) -> list[Image.Image]:
    """The objects alone, on gray: a score of what is left cannot reward a copied background.

    Parameters
    ----------
    images : picture or list of picture
        n pictures, or one.
    masks : tensor, array or picture (h, w) or (n, h, w)
        Where each object is; more than one half counts as inside. Scaled to the pictures (nearest position).
    """
    images = _pictures(images)
    each = [
        _resized(mask[None], image.size[::-1], "nearest")[0] > 0.5
        for image, mask in zip(images, _one_each(masks, len(images)), strict=True)
    ]
    gray = [Image.new("RGB", image.size, "gray") for image in images]
    marks = [Image.fromarray(inside.numpy()) for inside in each]
    return [Image.composite(i.convert("RGB"), g, m) for i, g, m in zip(images, gray, marks, strict=True)]


def ruler(
    identity: Callable[[list[Image.Image]], Tensor],
    references: list[Image.Image],
    held_out: list[Image.Image],
    others: list[Image.Image],
) -> tuple[float, float]:
    """Floor and ceiling of an identity score, both measured as the method's pictures are: against the references.

    Parameters
    ----------
    identity : callable
        Gives unit vectors (n, c) for n pictures.
    references : list of picture
        That the concept was learned from.
    held_out : list of picture
        Of the same object, kept out of the training: nothing that a method draws should be expected to score higher.
    others : list of picture
        Of other objects of the class: what the class alone is worth.

    Returns
    -------
    (float, float)
        Floor and ceiling, mean cosines.
    """
    known = identity(references).T
    return (identity(others) @ known).mean().item(), (identity(held_out) @ known).mean().item()


def iou(mask: Any, truth: Any) -> Tensor:
    """Intersection over union of masks and true masks.

    Parameters
    ----------
    mask, truth : tensor, array or picture (h, w) or (n, h, w)
        More than one half counts as inside. A mask of another
        size than the truth's is first scaled to it (nearest position).

    Returns
    -------
    Tensor
        (n,), between 0 and 1; 1 where both are empty.
    """
    truth = _stack(truth) > 0.5
    mask = _resized(_stack(mask), truth.shape[-2:], "nearest") > 0.5
    both, either = (mask & truth).sum((-2, -1)), (mask | truth).sum((-2, -1))
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def pointing_game(map: Any, truth: Any) -> Tensor:
    """Whether the highest position of each map lies inside the true mask; the mean is the pointing accuracy.

    Parameters
    ----------
    map, truth : tensor, array or picture (h, w) or (n, h, w)
        A map of another size is first scaled to the truth's
        (bilinear).

    Returns
    -------
    Tensor
        (n,), 1.0 for inside and 0.0 for outside.
    """
    truth = _stack(truth) > 0.5
    map = _resized(_stack(map), truth.shape[-2:], "bilinear")
    map, inside = torch.broadcast_tensors(map, truth)
    return inside.flatten(1).gather(1, map.flatten(1).argmax(1, keepdim=True))[:, 0].float()


def background_distance(a: Any, b: Any, mask: Any) -> Tensor:
    """Mean absolute difference of two pictures outside the object: how much of the original's background was changed.

    Parameters
    ----------
    a, b : picture or list of picture
        One picture each or n each, of one size, for example from the same noise with and without residuals.
    mask : tensor, array or picture (h, w) or (n, h, w)
        The object: what it covers by more than one half does not
        count. For two pictures with objects in different places give the union of both masks.

    Returns
    -------
    Tensor
        (n,), in units of the full brightness range: 0 for equal backgrounds, 1 for black against white.

    Raises
    ------
    ValueError
        If the pictures differ in size, or a mask leaves no background.
    """
    a, b = _pixels(a), _pixels(b)  # (n, h, w, 3)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"The pictures differ in size: {tuple(a.shape[1:3])} and {tuple(b.shape[1:3])}.")
    outside = (_resized(_stack(mask), a.shape[1:3], "nearest") <= 0.5).float()
    if (outside.sum((-2, -1)) == 0).any():
        raise ValueError("The mask covers the whole picture, so there is no background to compare.")
    difference = (a - b).abs().mean(-1)
    return (difference * outside).sum((-2, -1)) / outside.sum((-2, -1)).expand(len(difference))


def _load_model(kind: Any, where: str | Path) -> Any:
    """Frozen, in eval mode and in fp32, whatever was shipped; of safetensors only."""
    return _load(kind, where, use_safetensors=True).eval().requires_grad_(False).float()


def _load(kind: Any, where: str | Path, **options: Any) -> Any:
    if str(where) in REVISIONS and not Path(where).is_dir():
        options["revision"] = REVISIONS[str(where)]
    try:
        return kind.from_pretrained(str(where), **options)
    except (OSError, ValueError) as error:
        if not Path(where).is_dir():
            # Without a commit transformers asks the hub for a conversion each time, and finds none offline.
            often = " once" if "revision" in options else ""
            advice = (
                f"connect to the network{often}, or name a folder with such a model.safetensors (clip=..., dino=...)."
            )
        elif options.get("use_safetensors") and not any(Path(where).glob("*.safetensors")) and any(_pickles(where)):
            advice = "its weights are a pickle, which may run any code: convert them to model.safetensors first."
        else:
            advice = "its folder is not whole; fetch it again."
        raise OSError(f"The judge {where} could not be loaded: {advice}") from error


def _pickles(folder: str | Path) -> Iterator[Path]:
    return (path for path in Path(folder).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))


def _load_processor(where: str | Path) -> Any:
    return _load(SimpleNamespace(from_pretrained=_prepared_by_pillow), where)


def _prepared_by_pillow(where: str, **options: Any) -> Any:
    """What prepares an encoder's pictures, without torchvision, which AutoImageProcessor would take or ask for."""
    import transformers

    # Only read, of whatever kind.
    settings, _ = transformers.CLIPImageProcessorPil.get_image_processor_dict(where, **options)
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""  # the older word
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Pil").removesuffix("Fast")
    kind = getattr(transformers, f"{name}Pil", transformers.AutoImageProcessor)
    return kind.from_pretrained(where, **options)


def _dinos_own() -> Any:
    """How DINO's authors, and CustomConcept101 after them, prepare a picture.

    The shorter side becomes 256 (bicubic), of which the middle 224 x 224 are seen. The copy for transformers squashes
    the whole picture to 224 x 224 instead (bilinear), which scores other features.
    """
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406],  # of ImageNet
        image_std=[0.229, 0.224, 0.225],
    )


def _features(output: Any) -> Tensor:
    """transformers 5 wraps what get_text_features gives; before, it was the tensor itself."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _pictures(images: Pictures) -> list[Image.Image]:
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images:
        raise ValueError("There are no pictures to score.")
    return images


def _pixels(images: Any) -> Tensor:
    images = images if isinstance(images, (list, tuple)) else [images]
    return torch.stack([torch.from_numpy(np.asarray(i.convert("RGB"), dtype=np.float32) / 255) for i in images])


def _stack(masks: Any) -> Tensor:
    """(n, h, w) float of tensors, arrays or pictures (whose 0..255 becomes 0..1), one or several."""
    if isinstance(masks, (list, tuple)):
        return torch.cat([_stack(mask) for mask in masks])
    if isinstance(masks, Image.Image):
        masks = np.asarray(masks.convert("L"), dtype=np.float32) / 255
    masks = torch.as_tensor(masks).float().cpu()
    return masks if masks.dim() == 3 else masks[None]


def _one_each(masks: Any, number: int) -> Tensor:
    """(number, h, w): one mask for each of several pictures, or one for all."""
    stacked = _stack(masks)
    if len(stacked) not in (1, number):
        raise ValueError(f"{number} pictures need one mask or {number} masks, not {len(stacked)}.")
    return stacked.expand(number, -1, -1)


def _resized(maps: Tensor, size: Sequence[int], mode: str) -> Tensor:
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size), mode=mode)[:, 0]
