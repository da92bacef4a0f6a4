"""Lesson 05, `notebooks/05_localized_sampling.ipynb`: localized attention-guided sampling (LAG).

The residuals act where the concept is, and the original model elsewhere:
f^_i = (1 - M_i) W_i x + M_i W'_i x for each transformer block i, where M_i is made of the cross-attention map of the
concept's words in the same block and the same forward pass (Ham et al., CVPR 2024). Since W' = W + A B, this is
W x + M A B x: the frozen projection runs as ever, and no extra model evaluation is needed.

A prompt comes by in this order, and `_Localizer` has a method for each stop:

1. the pipeline encodes it: where do the concept's words stand? (`prompts`)
2. a U-Net call begins: which rows are the prompt's, and is this step within the window?
3. a block attends: the map of those words in those rows (`attention`)
4. the map becomes a mask (`masks`), and the mask the weight of each row
5. the block projects: the residual is added as far as its weight says (`residuals`)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from persres_lite.attention import REDUCTIONS, Reduce, indicator, watch_attention
from persres_lite.masks import Rule, average, find_rule, read_mask, resize
from persres_lite.prompts import Call, find_words, watch_prompts
from persres_lite.residuals import (
    Residuals,
    add_low_rank,
    advising_smaller,
    find_proj_outs,
    refuse_compiled,
    refuse_compiling,
    unet_of,
)

Masks = dict[tuple[int, str], torch.Tensor]


@dataclass
class Lag:
    """What localized sampling used in the latest pipeline call.

    Attributes
    ----------
    prompts : list of str
        One for each image of the batch.
    parts : list of dict of (step, block) to tensor (images, h, w)
        The weight of each concept's residuals, in the order the concepts were given.
    """

    prompts: list[str] = field(default_factory=list)
    parts: list[Masks] = field(default_factory=list)

    @property
    def masks(self) -> Masks:
        """By (step, block name): M (images, h, w) in [0, 1]; of several concepts the sum, at most 1."""
        return {key: torch.stack([part[key] for part in self.parts]).sum(0) for key in self.parts[0]}


@contextmanager
def localized(
    base: Any,
    residuals: Residuals | str | Sequence[tuple[Residuals | str, Any]],
    concept: Any = None,
    *,
    mask: str | Rule = "median",
    scale: float = 1.0,
    unconditional: Literal["same", "own", "residual", "original"] = "same",
    window: tuple[float, float] = (0.0, 1.0),
    fixed_mask: Any = None,
    aggregate: Literal["blocks", "steps", "both"] | None = None,
    refine: int = 0,
    heads: str | Reduce = "mean",
    layers: str | Reduce = "mean",
    prompts: str | Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Lag]:
    """f^ = (1 - M) W x + M W' x for every pipeline call inside the context.

    Prompts are read from the pipeline call (`prompts.watch_prompts` says how); each row of a batch has its own
    positions of the concept's words.

    Parameters
    ----------
    base : pipeline
        Any scheduler, batch, `num_images_per_prompt`, callback or attention processor; called as usual.
    residuals : Residuals, str or list of pairs
        The name of an adapter stands for a LoRA on `proj_out` that the pipeline has loaded. A list of (residuals,
        concept) pairs localizes several at once; where masks overlap they are divided by their sum, so that weights
        sum to at most one.
    concept : Concept, str or list of str
        Whose attention makes the mask: str(concept) is looked for as a phrase ("sks cat"), else word by word.
    mask : str or callable
        A rule of `masks.RULES`, with its `options`, or a function of maps (B, h, w).
    scale : float
        Strength of the residual inside the mask.
    unconditional : 'same', 'own', 'residual' or 'original'
        What the negative half does under guidance, whose prompt lacks the concept; the paper does not say. 'same'
        (default) uses the positive half's mask, so that a mask of ones is the plain residual; 'own' makes a mask of the
        attention to the same token positions in the negative prompt; 'residual' is M = 1, 'original' is M = 0.
    window : (float, float)
        The share of steps at which masks are made: (0, 0.5) is the first half. At the others M = 0. A step is one
        U-Net evaluation.
    fixed_mask : picture, array or tensor, or a list with one for each pair, optional
        A mask drawn by hand, (h, w) or one for each image (images, h, w), in [0, 1] (pictures and bytes: 0 to 255);
        resized to each block. Then no attention is looked at, and no words are needed.
    aggregate : 'blocks', 'steps' or 'both', optional
        Make each mask of an average of maps instead of one block's at one step (the paper's way): over all blocks (for
        those that have not yet run in this pass, their last map), over all steps so far, or over both.
    refine : int
        How many times to spread each map along self-attention first, by the mean of its heads.
    heads, layers : 'mean', 'max', 'first', 'last' or callable
        How one map is made of those of a layer's heads, and of those of the layers under one projection, where there
        are several: one in SD 1.x, 2.x and Toybox, 2 or 10 in SDXL. The paper says neither. A function gets maps
        (B, several, HW, concepts) and gives (B, HW, concepts).
    prompts : str or list of str, optional
        Needed only if the pipeline is called with `prompt_embeds`, or its U-Net directly.
    **options
        Of the mask rule, for instance q=0.8 for 'quantile'.

    Yields
    ------
    Lag
        Its `masks` are what was used, by (step, block).

    Raises
    ------
    ValueError
        At once if an argument is unknown or the residuals do not fit; from the pipeline call if a prompt lacks the
        concept's words; from a U-Net call if its text is not that of the prompts (see `prompts.Call.next`), if it is
        made for the negative half alone while `unconditional` is 'same', or if the U-Net was compiled meanwhile.
    """
    pairs = [(residuals, concept)] if isinstance(residuals, (Residuals, str)) else list(residuals)
    if not pairs:
        raise ValueError("No residuals were given: pass residuals and a concept, or a list of such pairs.")
    refuse_compiled(base)
    _check(unconditional=unconditional, aggregate=aggregate, window=window, heads=heads, layers=layers)
    drawn = None if fixed_mask is None else _drawn(fixed_mask, len(pairs))
    if drawn is None and any(which is None for _, which in pairs):
        raise ValueError("No concept was given: its words tell where to look (or pass `fixed_mask`).")
    choices = _Choices(
        concepts=[which if isinstance(which, (list, tuple)) else str(which) for _, which in pairs],
        rule=find_rule(mask, **options),
        scale=scale,
        unconditional=unconditional,
        window=window,
        drawn=drawn,
        aggregate=aggregate,
    )
    localizer = _Localizer(base, choices)
    with ExitStack() as stack:
        for index, (which, _) in enumerate(pairs):
            for handle in _project(base, which, localizer, index):
                stack.callback(handle.remove)
            if isinstance(which, Residuals) and scale != 0:
                stack.enter_context(which.token_attached(base))
        stack.enter_context(watch_prompts(base, localizer.begin, prompts, needed=drawn is None))
        stack.callback(unet_of(base).register_forward_pre_hook(localizer.next, with_kwargs=True).remove)
        if drawn is None:
            parts = (localizer.rows, localizer.columns, localizer.tell)
            how = [each if callable(each) else REDUCTIONS[each] for each in (heads, layers)]
            stack.enter_context(watch_attention(base, *parts, None, refine, *how))
        else:
            stack.callback(refuse_compiling(base).remove)
            for name in find_proj_outs(unet_of(base)):
                transformer = unet_of(base).get_submodule(name.removesuffix(".proj_out"))
                hook = partial(localizer.draw, name=name)
                stack.callback(transformer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(advising_smaller())
        yield localizer.lag


def _check(**arguments: Any) -> None:
    """Refuse unknown choices at once, not at the first step."""
    choices: dict[str, tuple] = {
        "unconditional": ("same", "own", "residual", "original"),
        "aggregate": (None, "blocks", "steps", "both"),
        "heads": tuple(REDUCTIONS),
        "layers": tuple(REDUCTIONS),
    }
    for name, allowed in choices.items():
        if arguments[name] not in allowed and not (name in ("heads", "layers") and callable(arguments[name])):
            raise ValueError(f"Unknown {name} {arguments[name]!r}: choose one of {', '.join(map(repr, allowed))}.")
    start, end = arguments["window"]
    if not 0 <= start < end <= 1:
        raise ValueError(f"The window {arguments['window']} is not a range of shares: give (start, end) within (0, 1).")


def _drawn(fixed_mask: Any, number: int) -> list[torch.Tensor]:
    """Masks drawn by hand, (1 or images, h, w), one for each of the `number` concepts."""
    each = fixed_mask if isinstance(fixed_mask, (list, tuple)) and number > 1 else [fixed_mask] * number
    if len(each) != number:
        raise ValueError(f"Got {len(each)} fixed masks for {number} pairs of residuals and concept.")
    masks = [read_mask(one) for one in each]
    return [mask if mask.ndim == 3 else mask[None] for mask in masks]


@dataclass(frozen=True)
class _Choices:
    """The arguments of `localized`, read: what stays the same while the context is open."""

    concepts: list[Any]  # words of each
    rule: Rule
    scale: float
    unconditional: str
    window: tuple[float, float]
    drawn: list[torch.Tensor] | None  # masks by hand, one for each concept
    aggregate: str | None


class _Localizer:
    """One open context. The methods stand in the order in which they are called."""

    def __init__(self, base: Any, choices: _Choices) -> None:
        self.base, self.choices = base, choices
        self.lag = Lag(parts=[{} for _ in choices.concepts])

    def begin(self, call: Call) -> None:
        """1. A pipeline call: where do the words of each concept stand in each prompt?"""
        self.call = call
        if self.choices.drawn is None:
            by_concept = [find_words(self.base, call.prompts, words) for words in self.choices.concepts]
            self.positions = [list(row) for row in zip(*by_concept, strict=True)]  # by row, then by concept
        self.lag.prompts, self.lag.parts = call.prompts, [{} for _ in self.choices.concepts]
        self.indicators: dict[tuple[int, int, torch.device], torch.Tensor] = {}
        self.sums: dict[tuple[str, int, str], tuple[torch.Tensor, int]] = {}  # of maps so far, and their number

    def next(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """2. A U-Net call, of which `self.call` knows the step and the rows: is it within the window?"""
        start, end = self.choices.window
        self.inside = (start, end) == (0, 1) or start <= self.call.step / self._steps() < end
        self.weights: dict[str, list[torch.Tensor]] = {}  # by block: for each concept (batch, h, w)
        alone = self.call.halves.conditional is None
        if alone and self.inside and self.choices.unconditional == "same" and self.choices.drawn is None:
            raise ValueError(
                "The U-Net was called for the negative prompt alone, and unconditional='same' needs the mask of the "
                "prompt: call both halves at once, or choose 'own', 'residual' or 'original'."
            )

    def _steps(self) -> int:
        if not hasattr(self.base, "scheduler"):
            raise ValueError("A window needs the number of steps: pass the pipeline instead of its U-Net.")
        return getattr(self.base, "_num_timesteps", None) or len(self.base.scheduler.timesteps)

    def rows(self, batch: int) -> slice | None:
        """3. A block attends: in these rows its map is asked for."""
        if not self.inside:
            return None
        return slice(0, batch) if self.choices.unconditional == "own" else self.call.halves.conditional

    def columns(self, keys: torch.Tensor) -> torch.Tensor:
        """3. And of these tokens: (rows, T, concepts)."""
        copies = len(keys) // len(self.positions)
        which = (copies, keys.shape[1], keys.device)  # one transfer to the device a run, not one a layer
        if which not in self.indicators:
            self.indicators[which] = indicator(self.positions * copies, keys.shape[1]).to(keys.device)
        return self.indicators[which]

    def tell(self, name: str, maps: torch.Tensor) -> None:
        """4. The block's maps (rows, concepts, h, w) become masks."""
        halves = self.call.halves
        parts = {"cond": halves.conditional, "uncond": halves.unconditional}
        if self.choices.unconditional != "own":
            parts = {"cond": slice(None)}
        self._use(
            name,
            {
                half: [self.choices.rule(self._mean(half, i, name, maps[rows, i])) for i in range(maps.shape[1])]
                for half, rows in parts.items()
                if rows is not None
            },
        )

    def _mean(self, half: str, concept: int, name: str, maps: torch.Tensor) -> torch.Tensor:
        """Maps (images, h, w) averaged with those of other blocks or of earlier steps, as `aggregate` says."""
        how = self.choices.aggregate
        if how is None:
            return maps
        total, count = maps, 1
        if how != "blocks" and (half, concept, name) in self.sums:
            before, steps = self.sums[half, concept, name]
            total, count = before + maps, steps + 1
        self.sums[half, concept, name] = total, count
        blocks = [name] if how == "steps" else [block for *which, block in self.sums if which == [half, concept]]
        sums = [self.sums[half, concept, block] for block in blocks]
        return average([total / count for total, count in sums], maps.shape[-2:])

    def draw(self, module: nn.Module, args: tuple, kwargs: dict, *, name: str) -> None:
        """3 and 4 for masks drawn by hand: a block begins, and they take its size."""
        if not self.inside or self.choices.drawn is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        images = len(self.call.prompts) or len(hidden)
        for mask in self.choices.drawn:
            if len(mask) not in (1, images):
                raise ValueError(f"Got {len(mask)} fixed masks for {images} images: give 1 or as many.")
        rows = [mask.to(hidden.device).expand(images, -1, -1) for mask in self.choices.drawn]
        masks = [resize(mask, tuple(hidden.shape[-2:])) for mask in rows]
        self._use(name, {"cond": masks, "uncond": masks})

    def _use(self, name: str, masks: dict[str, list[torch.Tensor]]) -> None:
        """Masks (images, h, w) by half, for each concept, become the weights of a block, which sum to at most one."""
        for half, each in masks.items():
            if len(each) > 1:
                total = torch.stack(each).sum(0).clamp(min=1)
                masks[half] = [mask / total for mask in each]
        if self.call.halves.conditional is not None:
            for part, mask in zip(self.lag.parts, masks["cond"], strict=True):
                part[self.call.step, name] = mask
        self.weights[name] = [
            self._for_batch({half: each[i] for half, each in masks.items()}) for i in range(len(self.lag.parts))
        ]

    def _for_batch(self, masks: dict[str, torch.Tensor]) -> torch.Tensor:
        """The masks of a concept's halves, (images, h, w) each, as (batch, h, w)."""
        cond, uncond = self.call.halves.conditional, self.call.halves.unconditional
        if uncond is None:
            return masks["cond"]
        known = next(iter(masks.values()))
        choose = {"same": known, "original": torch.zeros_like(known), "residual": torch.ones_like(known)}
        negative = masks["uncond"] if self.choices.unconditional == "own" else choose[self.choices.unconditional]
        if cond is None:
            return negative
        return torch.cat([negative, masks["cond"]] if uncond.start == 0 else [masks["cond"], negative])

    def weight(self, name: str, concept: int) -> torch.Tensor | float:
        """5. The block projects: M (batch, h, w), or one number where all positions are alike."""
        if not self.inside:
            return 0.0
        if name not in self.weights:  # the negative half alone, for which no map was asked
            return 1.0 if self.choices.unconditional == "residual" else 0.0
        return self.weights[name][concept]


def _project(base: Any, which: Residuals | str, localizer: _Localizer, concept: int) -> list[Any]:
    """Hooks that add, or for a loaded LoRA weaken, one concept's residual in every block; returns their handles."""
    scale = localizer.choices.scale

    def add(module: nn.Module, inputs: tuple, output: torch.Tensor, *, name: str, A, B) -> torch.Tensor:
        weight = localizer.weight(name, concept)
        if scale == 0 or isinstance(weight, float) and weight == 0:
            return output
        return add_low_rank(output, inputs[0], A, B, None if isinstance(weight, float) else weight, scale)

    def weaken(module: nn.Module, inputs: tuple, output: torch.Tensor, *, name: str) -> torch.Tensor:
        weight = localizer.weight(name, concept)
        if isinstance(weight, float):
            return output * (scale * weight)
        weight = weight.unsqueeze(1) if output.ndim == 4 else weight.flatten(1).unsqueeze(2)
        return output * (scale * weight).to(output.dtype)

    if isinstance(which, str):
        from persres_lite.lora import adapter_layers  # only who brings a LoRA of others needs to read on there

        layers = adapter_layers(base, which).items()
        return [layer.register_forward_hook(partial(weaken, name=name)) for name, layer in layers]
    return [
        module.register_forward_hook(partial(add, name=name, A=which.A[name], B=which.B[name]))
        for name, module in which.layers_in(base).items()
    ]
