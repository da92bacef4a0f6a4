"""Lesson 06, `notebooks/06_does_it_work.ipynb`: does it work? The same noise drawn in several ways, and scores.

The three alignment scores of the paper's first table are cosines between features of pretrained encoders: CLIP-T
(picture and prompt), CLIP-I and DINO-I (picture and reference pictures). Here they are plain cosines between -1 and 1;
CustomConcept101 prints CLIP-T as 2.5 times the cosine. Score prompts *without* the rare token, as it does: "a cat on
the beach", since no CLIP knows what "sks" is.

A score never costs a picture: what an encoder that cannot be had would give is NaN, and one sentence says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
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
from persres_lite.masks import average, read_mask, resize
from persres_lite.residuals import Residuals
from persres_lite.support.memory import advising_smaller
from persres_lite.support.notices import tell
from persres_lite.support.paths import data_dir
from persres_lite.support.sheet import sheet

#: Opens a context in which the pipeline draws in some way: ``lambda: residuals.attached(base, scale=0.6)``.
Way = Callable[[], AbstractContextManager]

#: A base's own CLIP- and DINO-like encoders, in the data folder.
JUDGES = {"toybox": ("toybox-clip", "toybox-dino")}

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dinov2-small"
#: The encoders for every base that has none of its own. CLIP is the paper's. Its DINO, ``facebook/dino-vits16``, is on
#: the hub as a pickle alone, which may run any code; the next generation of the same size is there as safetensors. So
#: DINO-I here is another number than the paper's.
PAPER_JUDGES = (CLIP, DINO)

#: Numbers that are fetched of each, of four bytes.
PARAMETERS = {CLIP: 151_277_313, DINO: 22_056_576}

#: Commits, so that the weights are always the same ones, and safetensors.
REVISIONS = {CLIP: "c237dc49a33fc61debc9276459120b7eac67e7ef", DINO: "ed25f3a31f01632728cabb09d1542f84ab7b0056"}

Pictures = Sequence[Image.Image] | Image.Image


@dataclass(frozen=True)
class Judges:
    """A CLIP-like and a DINO-like encoder; made by `load_judges`.

    Attributes
    ----------
    see, read, know : callable
        CLIP's features of pictures and of prompts, DINO's of pictures: one or n of them in, unit vectors (n, c) out; of
        an encoder that could not be had, NaN.
    """

    see: Callable[[Any], Tensor]
    read: Callable[[Any], Tensor]
    know: Callable[[Any], Tensor]

    def text_alignment(self, images: Pictures, prompts: str | Sequence[str]) -> Tensor:
        """CLIP-T: the cosine between each picture and its prompt; (n,).

        Parameters
        ----------
        images : picture or list of picture
            n pictures, or one.
        prompts : str or list of str
            One prompt for all pictures, or n prompts; without the rare token.
        """
        return (self.see(images) * self.read(prompts)).sum(-1)

    def text_gap(self, images: Pictures, prompts: Sequence[str]) -> Tensor:
        """How much better each picture fits its own prompt than the other prompts of the list; (n,).

        A cosine between picture and prompt has no scale of its own: for a CLIP-like encoder a wrong prompt may score
        nearly as high as the right one. Only the gap between them says whether a picture shows what it was asked for.
        At least two of the n prompts must differ.
        """
        cosines = self.see(images) @ self.read(prompts).T  # (pictures, prompts)
        others = torch.tensor([[a != b for b in prompts] for a in prompts], device=cosines.device)
        return cosines.diagonal() - (cosines * others).sum(1) / others.sum(1)

    def image_alignment(self, images: Pictures, refs: Pictures) -> Tensor:
        """CLIP-I: each picture's cosine with the reference pictures, averaged over the references; (n,)."""
        return (self.see(images) @ self.see(refs).T).mean(-1)

    def identity(self, images: Pictures, refs: Pictures) -> Tensor:
        """DINO-I: as CLIP-I with the DINO-like encoder, which tells one object from another of its class; (n,)."""
        return (self.know(images) @ self.know(refs).T).mean(-1)


def load_judges(base: Any = "toybox", *, clip: Any = None, dino: Any = None, device: Any = None) -> Judges:
    """Load the encoders that score a base's pictures, frozen and in eval mode.

    Parameters
    ----------
    base : pipeline or str
        A loaded pipeline or a base's name: Toybox has its own judges in ``data/``, all others take `PAPER_JUDGES`.
    clip, dino : str or path, optional
        Other encoders: a folder, or an id on the Hugging Face hub. Only safetensors are read.
    device : str or torch.device, optional
        Where they compute; None takes the pipeline's device, or the CPU for a name.

    Warns
    -----
    UserWarning
        If an encoder cannot be had: no network, no safetensors, a folder that is not whole. Its scores are NaN then.
    """
    from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    name, device = settings_of(base).name, device or getattr(base, "device", "cpu")
    own = [data_dir() / folder for folder in JUDGES[name]] if name in JUDGES else PAPER_JUDGES
    # The processor resizes the shorter side and cuts out the middle, as CLIP and DINOv2 want it; without torchvision.
    clip_model, clip_looks, clip_words = _load(clip or own[0], device, CLIPModel, CLIPImageProcessorPil, AutoTokenizer)
    dino_model, dino_looks = _load(dino or own[1], device, AutoModel, CLIPImageProcessorPil)

    def see(images: Any) -> Tensor:
        return clip_model.get_image_features(**clip_looks(images=images, return_tensors="pt").to(device)).pooler_output

    def read(prompts: Any) -> Tensor:  # all padded to one length: no score depends on the other prompts
        tokens = clip_words(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return clip_model.get_text_features(**tokens.to(device)).pooler_output

    def know(images: Any) -> Tensor:
        output = dino_model(**dino_looks(images=images, return_tensors="pt").to(device))
        hidden = output.last_hidden_state
        # A transformer, (n, tokens, c), says what the picture is in its class token; DINO's pooler has no weights.
        # A convolutional encoder, (n, c, h, w), says it in the mean over positions, its pooler.
        return hidden[:, 0] if hidden.dim() == 3 else output.pooler_output.flatten(1)

    return Judges(_unit(clip_model, see), _unit(clip_model, read), _unit(dino_model, know))


def _unit(model: Any, features: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The function for one or several, with vectors of length 1; without its model, NaN."""

    @torch.no_grad()
    def vectors(each: Any) -> Tensor:
        each = _listed(each)
        return F.normalize(features(each), dim=-1) if model else torch.full((len(each), 1), torch.nan)

    return vectors


def _load(where: str | Path, device: Any, model: Any, *readers: Any) -> list[Any]:
    """An encoder and what reads for it; all None, with a sentence, if it cannot be had."""
    commit = {} if Path(where).is_dir() else {"revision": REVISIONS.get(str(where), "main")}
    try:
        loaded = model.from_pretrained(str(where), use_safetensors=True, **commit)
        loaded.eval().requires_grad_(False).float().to(device)
        return [loaded, *(reader.from_pretrained(str(where), **commit) for reader in readers)]
    except Exception as error:  # of three libraries and the network: whatever it is, it must not cost a picture
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        advice = "connect to the network once, or name a whole folder with its model.safetensors"
        tell(f"Scores by {where} are left out, since it could not be loaded ({why}): {advice}.")
        return [None] * (1 + len(readers))


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
    """

    prompts: list[str]
    seeds: list[int]
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def sheet(self) -> Image.Image:
        """One row a noise, one column a way, and beside a way that localizes its mean mask; the prompt above each
        row.
        """
        columns: dict[str, list[Image.Image]] = {}
        for way, pictures in self.pictures.items():
            columns[way] = pictures
            if way in self.masks:
                shown = (resize(self.masks[way], pictures[0].size[::-1]) * 255).round().byte()
                columns[f"mean mask of {way}"] = [Image.fromarray(mask.numpy()) for mask in shown]
        return sheet(list(zip(*columns.values(), strict=True)), list(columns), self.prompts, gap=8, shown=128)


def usual_ways(base: Any, residuals: Any, concept: Any = None, **lag: Any) -> dict[str, Way]:
    """The ways that the lessons compare, by name: the original model, the residual everywhere, and LAG.

    Parameters
    ----------
    base : pipeline
        From `persres_lite.load_base`.
    residuals : Residuals or list of pairs
        As for `persres_lite.localized`: of several concepts a list of (residuals, concept).
    concept : Concept or str, optional
        The concept's words, where there is one.
    **lag
        Further options of `localized`; its `scale` is that of the residual everywhere, too.
    """
    pairs = [(residuals, concept)] if isinstance(residuals, Residuals) else list(residuals)

    @contextmanager
    def everywhere() -> Iterator[None]:
        with ExitStack() as stack:
            for each, _ in pairs:
                stack.enter_context(each.attached(base, scale=lag.get("scale", 1.0)))
            yield

    return {"original": nullcontext, "residual": everywhere, "LAG": lambda: localized(base, pairs, **lag)}


def compare(
    base: Any,
    residuals: Residuals | Sequence[tuple[Residuals, Any]],
    concept: Concept | str,
    places: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    *,
    prompts: Sequence[str] | None = None,
    ways: Mapping[str, Way | None] | None = None,
    scale: float = 1.0,
    batch_size: int | None = None,
    progress: bool = True,
    **sampling: Any,
) -> Comparison:
    """Draw prompts with the original model, the residual everywhere, and LAG, each from the same noises.

    Parameters
    ----------
    base : pipeline
        From `persres_lite.load_base`.
    residuals : Residuals or list of pairs
        The concept's; of several concepts as for `usual_ways`.
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
        If a prompt lacks the concept's words.
    FloatingPointError
        As `draw`.
    """
    settings = settings_of(base)
    places = settings.places[:4] if places is None else places
    prompts = [f"a photo of a {concept} {place}" for place in places] if prompts is None else prompts
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    made = Comparison([prompt for prompt, _ in rows], [seed for _, seed in rows])
    named = usual_ways(base, residuals, concept, scale=scale) | dict(ways or {})
    opened = {name: way for name, way in named.items() if way is not None}
    size = batch_size or settings.images_per_prompt
    with tqdm(total=len(opened) * len(rows), desc="comparing", unit="picture", disable=not progress) as bar:
        for way, context in opened.items():
            begun, made.pictures[way], masks = time.perf_counter(), [], []
            for part in (rows[start : start + size] for start in range(0, len(rows), size)):
                noise = [torch.Generator().manual_seed(seed) for _, seed in part]
                options = settings.sampling | sampling | {"generator": noise}
                with context() as used:
                    made.pictures[way] += draw(base, [prompt for prompt, _ in part], **options)
                if isinstance(used, Lag) and used.masks:
                    masks.append(average([mask.float().cpu() for mask in used.masks.values()]))
                bar.update(len(part))
            made.masks.update({way: torch.cat(masks)} if masks else {})
            made.seconds[way] = time.perf_counter() - begun
    return made


def cut_out(images: Pictures, masks: Any) -> list[Image.Image]:
    """The objects alone, on gray: a score of what is left cannot reward a copied background.

    Parameters
    ----------
    images : picture or list of picture
        n pictures, or one.
    masks : what `masks.read_mask` reads, one or n
        Where each object is; more than one half counts as inside. Scaled to the pictures (nearest position).
    """
    images, masks, alone = _listed(images), read_mask(masks), []
    for image, mask in zip(images, masks.expand(len(images), *masks.shape[-2:]), strict=True):
        inside = Image.fromarray((_scaled(mask, image.size[::-1])[0] > 0.5).numpy())
        alone.append(Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "gray"), inside))
    return alone


def iou(mask: Any, truth: Any) -> Tensor:
    """Intersection over union of masks and true masks; (n,), between 0 and 1, and 1 where both are empty.

    Parameters
    ----------
    mask, truth : what `masks.read_mask` reads, one or n
        More than one half counts as inside. A mask of another size than the truth's is first scaled to it (nearest
        position).
    """
    size = read_mask(truth).shape[-2:]
    mask, truth = (_scaled(read_mask(each), size) > 0.5 for each in (mask, truth))
    both, either = (mask & truth).sum((-2, -1)), (mask | truth).sum((-2, -1))
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def pointing_game(map: Any, truth: Any) -> Tensor:
    """Whether the highest position of each map lies inside the true mask: (n,), 1.0 or 0.0. Its mean is the pointing
    accuracy.

    Parameters
    ----------
    map : tensor (h, w) or (n, h, w)
        Of another size it is first scaled to the truth's (bilinear).
    truth : what `masks.read_mask` reads, one or n
    """
    truth = read_mask(truth).cpu() > 0.5
    map, inside = torch.broadcast_tensors(_scaled(map, truth.shape[-2:], "bilinear"), truth)
    return inside.flatten(1).gather(1, map.flatten(1).argmax(1, keepdim=True))[:, 0].float()


def background_distance(a: Any, b: Any, mask: Any) -> Tensor:
    """Mean absolute difference of two pictures outside the object: how much of the original's background was changed.

    Parameters
    ----------
    a, b : picture or list of picture
        One picture each or n each, of one size, for example from the same noise with and without residuals.
    mask : what `masks.read_mask` reads, one or n
        The object: what it covers by more than one half does not count. For two pictures with objects in different
        places give the union of both masks.

    Returns
    -------
    Tensor
        (n,), in units of the full brightness range: 0 for equal backgrounds, 1 for black against white, NaN where the
        mask leaves no background.
    """
    difference = (_pixels(a) - _pixels(b)).abs().mean(-1)  # (n, h, w)
    outside = (_scaled(read_mask(mask), difference.shape[1:]) <= 0.5).float()
    return (difference * outside).sum((-2, -1)) / outside.sum((-2, -1)).expand(len(difference))


def _listed(each: Any) -> list[Any]:
    return [each] if isinstance(each, Image.Image | str) else list(each)


def _pixels(images: Any) -> Tensor:
    """(n, h, w, 3) in [0, 1]."""
    each = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in _listed(images)]
    return torch.from_numpy(np.stack(each))


def _scaled(maps: Tensor, size: Sequence[int], mode: str = "nearest") -> Tensor:
    """Maps (h, w) or (n, h, w) at a size, (n, *size), on the CPU."""
    return F.interpolate(maps.float().cpu().reshape(-1, 1, *maps.shape[-2:]), tuple(size), mode=mode)[:, 0]
