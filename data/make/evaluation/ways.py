"""How a trained concept is drawn: over strengths, localized by the paper's rule, and localized by its controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.make.evaluation.methods import Trained
from data.make.evaluation.subjects import Pair, Prompt, Subject
from persres_lite.attention import record_attention
from persres_lite.bases import settings_of
from persres_lite.evaluation import draw
from persres_lite.localize import localized
from persres_lite.masks import median, quantile

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
EARLY = 0.25  # of a frozen run's steps, from which a mask is made before the picture is drawn

Way = Callable[[slice, bool], AbstractContextManager]
"""Of a part of a subject's pictures, and whether its partner stands beside it: a context in which the base draws."""


@dataclass
class Frozen:
    """What the frozen model draws for a subject's prompts, concept's words and all: what leakage is measured from.

    Attributes
    ----------
    images : list of picture
        One a prompt and seed.
    early : tensor (pictures, h, w)
        Where the concept's words look in the first steps, the mean over blocks.
    where : tensor (pictures, h, w), optional
        Where a judge sees the object, as a mask.
    drift : list of picture
        One for each of the subject's prompts without its words, and seed.
    """

    images: list[Image.Image]
    early: Tensor
    where: Tensor | None = None
    drift: list[Image.Image] = field(default_factory=list)


def pictures_of(subject: Subject, seeds: Sequence[int]) -> list[tuple[Prompt, int]]:
    """Every prompt with every seed, in the order in which all methods draw them; those with a partner last."""
    ordered = sorted(subject.prompts, key=lambda prompt: prompt.kind == "two concepts")
    return [(prompt, seed) for prompt in ordered for seed in seeds]


def drift_of(subject: Subject, seeds: Sequence[int]) -> list[tuple[Prompt, int]]:
    """Every prompt without the concept's words, with every seed."""
    return [(prompt, seed) for prompt in subject.drift for seed in seeds]


def draw_all(
    base: Any, prompts: list[tuple[Prompt, int]], words: Sequence[str], way: Way, batch: int = 8
) -> list[Image.Image]:
    """A subject's pictures in one way, each from its own seed.

    Parameters
    ----------
    words : (str, str)
        What stands for the concept, and for its partner.
    """
    images: list[Image.Image] = []
    alone = sum(prompt.kind != "two concepts" for prompt, _ in prompts)
    cuts = [*range(0, alone, batch), *range(alone, len(prompts), batch), len(prompts)]
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = prompts[start:end]
        noise = [torch.Generator().manual_seed(seed) for _, seed in part]
        with way(slice(start, end), start >= alone):
            texts = [prompt.text.format(*words) for prompt, _ in part]
            images += draw(base, texts, generator=noise, **settings_of(base).sampling)
    return images


def draw_frozen(base: Any, subject: Subject, partner: Subject | None, seeds: Sequence[int]) -> Frozen:
    """The frozen model's pictures of a subject, and where its words looked at the beginning."""
    maps: list[Tensor] = []
    steps = range(max(1, round(EARLY * settings_of(base).sampling["num_inference_steps"])))

    @contextmanager
    def recording(part: slice, _: bool) -> Iterator[None]:
        word = str(subject.concept)
        with record_attention(base, None, [word], steps=list(steps)) as record:
            yield
        maps.extend(record.map(word, image=index) for index in range(len(record.prompts)))

    images = draw_all(base, pictures_of(subject, seeds), words_of(subject, partner), recording)
    drift = draw_all(base, drift_of(subject, seeds), ("", ""), frozen_way)
    return Frozen(images, torch.stack(maps), drift=drift)


def words_of(subject: Subject, partner: Subject | None) -> tuple[str, str]:
    """Of a subject and its partner, as they stand in prompts."""
    return str(subject.concept), str(partner.concept) if partner else ""


def frozen_way(part: slice, together: bool) -> AbstractContextManager:
    """The base as it is."""
    return nullcontext()


def everywhere(trained: Trained, other: Trained | None, scale: float) -> Way:
    """What was learned in force at every position."""

    @contextmanager
    def way(part: slice, together: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for each in (trained, other if together else None):
                if each is not None:
                    stack.enter_context(each.attached(scale))
            yield

    return way


def inside(
    base: Any, pair: Pair, index: int, trained: Sequence[Trained], scale: float = 1.0, fixed: Any = None, **options: Any
) -> Way:
    """What was learned in force only inside masks; `options` go to `localized`.

    Parameters
    ----------
    index : int
        Which of the pair is drawn.
    fixed : tensor (pictures, h, w), optional
        Masks made before the pictures. Beside a partner rendered toys get the halves in which their prompt puts them;
        other concepts share the mask evenly.
    """

    @contextmanager
    def way(part: slice, together: bool) -> Iterator[Any]:
        chosen = [index, *([1 - index] if together else [])]
        named = [trained[each] for each in chosen]
        masks = None if fixed is None else fixed[part]
        if masks is not None and together:
            left = (torch.arange(masks.shape[-1]) < masks.shape[-1] // 2).float()
            masks = [masks * left, masks * (1 - left)] if pair[0].toy else [masks, masks]
        with ExitStack() as stack:
            for each in named:
                if isinstance(each.residuals, str):  # a LoRA must be in force to be weakened outside of the mask
                    stack.enter_context(each.attached(1.0))
            pairs: list[Any] = [
                (each.residuals, pair[which].concept) for each, which in zip(named, chosen, strict=True)
            ]
            yield stack.enter_context(localized(base, pairs, scale=scale, fixed_mask=masks, **options))

    return way


def controls(base: Any, pair: Pair, index: int, trained: Sequence[Trained], frozen: Frozen) -> dict[str, Way]:
    """Other masks than the paper's, at full strength: better ones, worse ones, and such as know nothing."""
    generator = torch.Generator().manual_seed(0)

    def random_half(maps: Tensor) -> Tensor:
        return median(torch.rand(maps.shape, generator=generator).to(maps))

    def complement(maps: Tensor) -> Tensor:
        return 1 - median(maps)

    def way(**options: Any) -> Way:
        return inside(base, pair, index, trained, **options)

    count, side = len(frozen.images), frozen.early.shape[-1]
    ways = {
        "own unconditional mask": way(unconditional="own"),
        "Otsu": way(mask="otsu"),
        "best quarter": way(mask="quantile", q=0.75),
        "aggregated": way(aggregate="both"),
        "aggregated, Otsu": way(aggregate="both", mask="otsu"),
        "aggregated, best quarter": way(aggregate="both", mask="quantile", q=0.75),
        "refined": way(refine=1),
        "random half": way(mask=random_half),
        "complement": way(mask=complement),
        "disc, half": way(fixed=disc(side, 0.5).expand(count, -1, -1)),
        "disc, quarter": way(fixed=disc(side, 0.25).expand(count, -1, -1)),
        "first steps of a frozen run": way(fixed=quantile(frozen.early, q=0.75)),
    }
    if frozen.where is not None:
        ways["true mask"] = way(fixed=frozen.where)
    return ways


def disc(side: int, share: float) -> Tensor:
    """A disc in the middle (side, side) that takes this share of the positions."""
    line = torch.linspace(-1, 1, side)
    radius = (line[:, None].square() + line.square()).sqrt()
    return (radius <= radius.flatten().quantile(share)).float()
