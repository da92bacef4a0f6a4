"""How what was learned is drawn: in force everywhere, at any strength, or inside masks of one kind or another.

All ways of one training draw the same pictures from the same noises, so that their rows are pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from torch import Tensor

from data.make.study.methods import CLASS_WORD, DESCRIBED, METHODS, Bench, Learned, learn, named
from data.make.study.subjects import Picture, Subject
from persres_lite.attention import record_attention
from persres_lite.concepts import Concept
from persres_lite.evaluation import draw
from persres_lite.localize import localized
from persres_lite.masks import average, disc, median, quantile, resize
from persres_lite.residuals import Residuals
from persres_lite.toybox.world import with_article

BATCH = 8
EARLY = 0.25  # of a frozen run's steps, from which a mask is made before the picture is drawn
LAYOUT = 0.85  # of the noise, under which a layout is left
STRENGTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
Masks = dict[tuple[int, str], Tensor]


@dataclass
class Run:
    """One training of one subject by one method; what is drawn with it, and what the ways share.

    Attributes
    ----------
    where : callable, optional
        Of pictures and images: where a judge sees the subject, (n, h, w) of 0 and 1.
    """

    bench: Bench
    subject: Subject
    method: str
    seed: int
    where: Callable[[Sequence[Picture], list[Image.Image]], Tensor] | None = None
    before: dict[Picture, tuple[Image.Image, Tensor]] = field(default_factory=dict)
    looked: dict[Picture, Masks] = field(default_factory=dict)  # LAG's masks, by picture

    @cached_property
    def learned(self) -> list[Learned]:
        """One a concept; trained when a picture first needs it."""
        return [learn(self.bench, self.method, concept, self.seed) for concept in self.subject.concepts]

    @cached_property
    def from_layout(self) -> Any:
        """The base's parts as a pipeline that begins from a noised picture."""
        pipe = StableDiffusionImg2ImgPipeline(**self.bench.base.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pipe(self, pictures: Sequence[Picture]) -> Any:
        """What draws these, which are all with a layout or all without."""
        return self.bench.base if pictures[0].start is None else self.from_layout

    def words(self) -> list[str]:
        """What stands for each concept in prompts."""
        if self.method == CLASS_WORD:
            return [concept.macro_class for concept in self.subject.concepts]
        return [str(named(self.method, concept)) for concept in self.subject.concepts]

    def text(self, picture: Picture) -> str:
        """The prompt in this method's words."""
        if self.method == DESCRIBED:
            return picture.text.replace("a {0}", with_article(self.subject.described)).format(self.subject.described)
        return picture.text.format(*self.words())

    def draw(self, pictures: Sequence[Picture]) -> list[Image.Image]:
        """The pictures, in whatever context is open."""
        pipe, options = self.pipe(pictures), dict(self.bench.sampling)
        if pictures[0].start is not None:
            options = {k: v for k, v in options.items() if k not in ("height", "width")}
            options |= {"image": [picture.start for picture in pictures], "strength": LAYOUT}
        noise = [torch.Generator().manual_seed(picture.noise) for picture in pictures]
        return draw(pipe, [self.text(picture) for picture in pictures], generator=noise, **options)

    @contextmanager
    def whole(self, pictures: Sequence[Picture], scale: float) -> Iterator[None]:
        """What was learned in force at every position."""
        with ExitStack() as stack:
            for member in pictures[0].members:
                stack.enter_context(self.learned[member].attached(scale))
            yield

    @contextmanager
    def local(self, pictures: Sequence[Picture], scale: float = 1.0, **options: Any) -> Iterator[Any]:
        """What was learned in force inside masks only; `options` go to `localized`."""
        with ExitStack() as stack:
            pairs: list[tuple[Residuals, Concept]] = []
            for member in pictures[0].members:
                one = self.learned[member]
                assert one.local is not None
                pairs.append((one.local, named(self.method, self.subject.concepts[member])))
            yield stack.enter_context(localized(self.pipe(pictures), pairs, scale=scale, **options))

    def frozen(self, pictures: Sequence[Picture]) -> tuple[list[Image.Image], list[Tensor]]:
        """What the frozen model draws of these, once, and where the concept's words look in its first steps (h, w)."""
        new = [picture for picture in pictures if picture not in self.before]
        if new:
            pipe, word = self.pipe(new), self.words()[0]
            steps = range(max(1, round(EARLY * self.bench.sampling["num_inference_steps"])))
            with record_attention(pipe, None, [word], steps=list(steps)) as record:
                images = self.draw(new)
            for number, (picture, image) in enumerate(zip(new, images, strict=True)):
                self.before[picture] = image, record.map(word, image=number)
        return [self.before[picture][0] for picture in pictures], [self.before[picture][1] for picture in pictures]

    def masks(self, pictures: Sequence[Picture]) -> list[Masks]:
        """The masks that LAG made for these pictures, step by step and block by block, (h, w) each."""
        new = [picture for picture in pictures if picture not in self.looked]
        if new:
            with self.local(new) as lag:
                self.draw(new)
            self.keep(new, lag)
        return [self.looked[picture] for picture in pictures]

    def keep(self, pictures: Sequence[Picture], lag: Any) -> None:
        """Remember the masks of LAG's run."""
        for number, picture in enumerate(pictures):
            self.looked[picture] = {key: mask[number] for key, mask in lag.masks.items()}


def worst_block(run: Run, cell: Sequence[Picture]) -> str:
    """The block whose LAG masks cover least of the toy, over a cell's pictures; the toy is the frozen model's."""
    covered: dict[str, list[float]] = {}
    for toy, masks in zip(_true(run, cell), run.masks(cell), strict=True):
        for (_, name), mask in masks.items():
            inside = resize(mask[None].float(), toy.shape)[0]
            covered.setdefault(name, []).append(float((inside * toy).sum() / toy.sum().clamp(min=1)))
    return min(covered, key=lambda name: sum(covered[name]))


Way = Callable[[Run, Sequence[Picture], Sequence[Picture]], AbstractContextManager]
"""Of a run, the pictures that are drawn now and their whole cell: a context in which they are drawn."""


def _whole(scale: float) -> Way:
    return lambda run, pictures, cell: run.whole(pictures, scale)


def _lag(fixed: Callable[[Run, Sequence[Picture]], Tensor] | None = None, **options: Any) -> Way:
    return lambda run, pictures, cell: run.local(
        pictures, **options | ({"fixed_mask": fixed(run, pictures)} if fixed else {})
    )


@contextmanager
def _paper(run: Run, pictures: Sequence[Picture], cell: Sequence[Picture]) -> Iterator[None]:
    with run.local(pictures) as lag:
        yield
    run.keep(pictures, lag)


def _swap(run: Run, pictures: Sequence[Picture], cell: Sequence[Picture]) -> AbstractContextManager:
    """Each picture with the masks of its neighbor's run: the next prompt of the scene."""
    others = [cell[(cell.index(picture) + 1) % len(cell)] for picture in pictures]
    return _with_masks(run, pictures, run.masks(others))


def _without_worst(run: Run, pictures: Sequence[Picture], cell: Sequence[Picture]) -> AbstractContextManager:
    """LAG's own masks, but for the worst block's: there the median of all other blocks' at that step."""
    worst, found = worst_block(run, cell), []
    for masks in run.masks(pictures):
        others: dict[int, list[Tensor]] = {}
        for (step, name), mask in masks.items():
            if name != worst:
                others.setdefault(step, []).append(mask[None].float())
        size = next(mask.shape for (_, name), mask in masks.items() if name == worst)
        means = {(step, worst): median(average(each, size))[0] for step, each in others.items()}
        found.append(masks | means)
    return _with_masks(run, pictures, found)


def _with_masks(run: Run, pictures: Sequence[Picture], masks: list[Masks]) -> AbstractContextManager:
    """What was learned inside masks that are known beforehand for every step and block, a dict a picture."""
    return run.local(pictures, fixed_mask={key: torch.stack([one[key] for one in masks]) for key in masks[0]})


def _random_half(maps: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # anew at each step and block: one half that stays
    return median(torch.rand(maps.shape, generator=generator).to(maps))


def _complement(maps: Tensor) -> Tensor:
    return 1 - median(maps)


def _true(run: Run, pictures: Sequence[Picture]) -> Tensor:
    """Where the judge sees the frozen model's toy, from the same noise and layout."""
    assert run.where is not None
    return run.where(pictures, run.frozen(pictures)[0])


def _first_steps(run: Run, pictures: Sequence[Picture]) -> Tensor:
    return quantile(torch.stack(run.frozen(pictures)[1]), q=0.75)


LAG = "LAG"
WAYS: dict[str, Way] = {
    "frozen": lambda run, pictures, cell: nullcontext(),
    **{f"whole, x {scale:g}": _whole(scale) for scale in STRENGTHS},
    LAG: _paper,
    "Otsu": _lag(mask="otsu"),
    "aggregated": _lag(aggregate="both"),
    "aggregated, Otsu": _lag(aggregate="both", mask="otsu"),
    "aggregated, best quarter": _lag(aggregate="both", mask="quantile", q=0.75),
    "without the worst block": _without_worst,
    "swap": _swap,
    "random half": _lag(mask=_random_half),
    "complement": _lag(mask=_complement),
    "disc, half": _lag(lambda run, pictures: disc((16, 16), 0.5)),
    "disc, quarter": _lag(lambda run, pictures: disc((16, 16), 0.25)),
    "true mask": _lag(_true),
    "first steps": _lag(_first_steps),
}
WHOLE = tuple(name for name in WAYS if name.startswith("whole"))
MASKED = tuple(name for name in WAYS if name not in ("frozen", *WHOLE))


def strength_of(way: str) -> float:
    """In force where it is in force at all; 0 is the frozen model."""
    return 0.0 if way == "frozen" else float(way.split()[-1]) if way in WHOLE else 1.0


def localizable(method: str) -> bool:
    """Whether the method's result can be masked."""
    return METHODS[method].kind == "residual" or method == "proj_out LoRA"
