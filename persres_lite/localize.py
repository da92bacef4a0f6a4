"""Lesson 05, `notebooks/05_localized_sampling.ipynb`: localized attention-guided sampling (LAG).

The residuals act where the concept is, and the original model elsewhere:
f^_i = (1 - M_i) W_i x + M_i W'_i x for each transformer block i, where M_i is made of the cross-attention map of the
concept's words in the same block and the same forward pass (Ham et al., CVPR 2024). Since W' = W + A B, this is
W x + M A B x: the frozen projection runs as ever, and no extra model evaluation is needed.

A prompt comes by in this order, and `Localizer` has a method for each stop:

1. the pipeline encodes it: where do the concept's words stand? (`prompts`)
2. a block attends: is this step within the window, and which rows are the prompt's? (`attention`)
3. its map becomes a mask (`masks`), and the mask the weight of each row
4. the block projects: the residual is added as far as its weight says (`residuals`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from persres_lite.attention import watch_attention
from persres_lite.masks import Rule, average, find_rule, read_mask, resize
from persres_lite.prompts import Call, watch_prompts
from persres_lite.residuals import Residuals, add_low_rank, advising_smaller, find_proj_outs, refuse_compiling, unet_of

Masks = dict[tuple[int, str], torch.Tensor]

#: Over what maps are averaged.
AGGREGATE = {None: (), "blocks": ("blocks",), "steps": ("steps",), "both": ("blocks", "steps")}


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
    residuals: Residuals | Sequence[tuple[Residuals, Any]],
    concept: Any = None,
    *,
    mask: str | Rule = "median",
    scale: float = 1.0,
    window: tuple[float, float] = (0.0, 1.0),
    fixed_mask: Any = None,
    aggregate: Literal["blocks", "steps", "both"] | None = None,
    overlap: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    prompts: str | Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Lag]:
    """f^ = (1 - M) W x + M W' x for every pipeline call inside the context.

    Prompts are read from the pipeline call (`prompts.watch_prompts` says how); each row of a batch has its own
    positions of the concept's words. Under guidance the negative half, whose prompt lacks the concept and of which the
    paper does not speak, takes the positive half's mask, so that a mask of ones is the plain residual.

    Parameters
    ----------
    base : pipeline
        Any scheduler, batch, `num_images_per_prompt`, callback or attention processor; called as usual.
    residuals : Residuals or list of pairs
        A list of (residuals, concept) pairs localizes several at once; where masks overlap they are divided by their
        sum, so that weights sum to at most one (or see `overlap`). A LoRA of another tool that is on `proj_out` comes
        by `lora.import_lora`; for one on any layers there is `beyond.localized_lora`.
    concept : Concept, str or list of str
        Whose attention makes the mask: str(concept) is looked for as a phrase ("sks cat"), else word by word.
    mask : str or callable
        A rule of `masks.RULES`, with its `options`, or a function of maps (B, h, w).
    scale : float
        Strength of the residual inside the mask.
    window : (float, float)
        The share of steps at which masks are made: (0, 0.5) is the first half. At the others M = 0. A step is one
        U-Net evaluation.
    fixed_mask : what `masks.read_mask` reads, a dict of masks, or a list with one of these for each pair, optional
        A mask drawn by hand, (h, w) or one for each image (images, h, w); resized to each block. Then no attention is
        looked at, and no words are needed. A dict by (step, block), such as `Lag.masks`, replays another run's.
    aggregate : 'blocks', 'steps' or 'both', optional
        Make each mask of an average of maps instead of one block's at one step (the paper's way): over all blocks (for
        those that have not yet run in this pass, their last map), over all steps so far, or over both.
    overlap : callable, optional
        Says how several concepts share what their masks have in common: a function of masks and maps (concepts, images,
        h, w) that gives masks, such as `beyond.strongest`. Not asked for drawn masks.
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
        At once if the residuals, the rule or the window do not fit; from the pipeline call if a prompt lacks the
        concept's words; from a U-Net call if its text is not that of the prompts (see `prompts.Call.next`), or if the
        U-Net was compiled meanwhile; at the end, if it was passed by.
    """
    pairs = [(residuals, concept)] if isinstance(residuals, Residuals) else list(residuals)
    how = {"mask": mask, "window": window, "fixed_mask": fixed_mask, "aggregate": aggregate, "overlap": overlap}
    localizer = Localizer(base, [which for _, which in pairs], **how, **options)
    localizer.scale = scale
    with ExitStack() as stack:
        for index, (each, _) in enumerate(pairs):
            for name, module in each.layers_in(base).items():
                add = partial(localizer.add, index=index, A=each.A[name], B=each.B[name], name=name)
                stack.callback(module.register_forward_hook(add).remove)
            if scale != 0:
                stack.enter_context(each.token_attached(base))
        stack.enter_context(localizer.watching(prompts))
        yield localizer.lag


class Localizer:
    """Makes the masks of several concepts in each pipeline call, for `localized` and for others that act by them.

    The arguments are those of `localized`. The methods stand in the order in which they are called.

    Attributes
    ----------
    drawn : list of tensor or dict
        Masks by hand, one for each concept; empty where attention makes them.
    weights : dict of str to tensor (concepts, batch, h, w)
        By block, for all rows of the batch; the latest block stands last.
    lag : Lag
        What was used.
    """

    def __init__(
        self,
        base: Any,
        concepts: Sequence[Any],
        *,
        mask: str | Rule = "median",
        window: tuple[float, float] = (0.0, 1.0),
        fixed_mask: Any = None,
        aggregate: Literal["blocks", "steps", "both"] | None = None,
        overlap: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= window[0] < window[1] <= 1:
            raise ValueError(f"The window {window} is not a range of shares: give (start, end) within (0, 1).")
        self.base, self.rule, self.window, self.overlap = base, find_rule(mask, **options), window, overlap
        self.aggregate = AGGREGATE[aggregate]
        self.concepts = [which if isinstance(which, (list, tuple)) else str(which) for which in concepts]
        self.drawn: list[Any] = []
        if fixed_mask is not None:
            several = isinstance(fixed_mask, (list, tuple)) and len(concepts) > 1
            masks = fixed_mask if several else [fixed_mask] * len(concepts)
            self.drawn = [each if isinstance(each, Mapping) else read_mask(each) for each in masks]
        self.weights: dict[str, torch.Tensor] = {}
        self.scale = 1.0  # of residuals
        self.lag = Lag()

    @contextmanager
    def watching(self, prompts: str | Sequence[str] | None = None) -> Iterator[None]:
        """Masks are made in every pipeline call inside the context."""
        with ExitStack() as stack:
            stack.enter_context(watch_prompts(self.base, self.begin, prompts, needed=not self.drawn))
            if self.drawn:
                stack.callback(refuse_compiling(self.base).remove)
                for name in find_proj_outs(unet_of(self.base)):
                    block = unet_of(self.base).get_submodule(name.removesuffix(".proj_out"))
                    draw = partial(self.draw, name=name)
                    stack.callback(block.register_forward_pre_hook(draw, with_kwargs=True).remove)
            else:
                stack.enter_context(watch_attention(self.base, self.ask, self.tell))
            stack.enter_context(advising_smaller())
            yield

    def begin(self, call: Call) -> None:
        """1. A pipeline call: where do the words of each concept stand in each prompt?"""
        if not self.drawn:
            self.columns = call.columns(self.concepts)
        self.call = call
        self.lag.prompts, self.lag.parts = call.prompts, [{} for _ in self.concepts]
        self.sums: dict[str, tuple[torch.Tensor, int]] = {}  # by block: of maps so far, and their number
        self.weights = {}

    def inside(self) -> bool:
        """Is this step within the window?"""
        if self.window == (0, 1):
            return True
        steps = getattr(self.base, "_num_timesteps", None) or len(self.base.scheduler.timesteps)
        return self.window[0] <= self.call.step / steps < self.window[1]

    def ask(self) -> tuple[slice, torch.Tensor] | None:
        """2. A block attends: in the prompts' rows its map is asked for, of these tokens."""
        return (self.call.rows, self.columns) if self.inside() else None

    def tell(self, name: str, maps: torch.Tensor) -> None:
        """3. The block's maps (images, concepts, h, w), or their average with others', become masks."""
        if self.aggregate:
            before, count = self.sums.get(name, (0, 0)) if "steps" in self.aggregate else (0, 0)
            self.sums[name] = before + maps, count + 1
            sums = list(self.sums.values()) if "blocks" in self.aggregate else [self.sums[name]]
            maps = average([total / count for total, count in sums], maps.shape[-2:])
        maps = maps.transpose(0, 1)  # (concepts, images, h, w)
        masks = torch.stack([self.rule(each) for each in maps])
        self._use(name, self.overlap(masks, maps) if self.overlap else masks)

    def draw(self, module: nn.Module, args: tuple, kwargs: dict, *, name: str) -> None:
        """2 and 3 for masks drawn by hand: a block begins, and they take its size."""
        if self.inside():
            hidden = args[0] if args else kwargs["hidden_states"]
            each = [mask[self.call.step, name] if isinstance(mask, Mapping) else mask for mask in self.drawn]
            shape = (len(self.call.prompts) or len(hidden), *hidden.shape[-2:])
            self._use(name, torch.stack([resize(mask, shape[1:]).expand(shape) for mask in each]).to(hidden.device))

    def _use(self, name: str, masks: torch.Tensor) -> None:
        """Masks (concepts, images, h, w) become the weights of a block in both halves, which sum to at most one."""
        masks = masks / masks.sum(0).clamp(min=1)
        for part, mask in zip(self.lag.parts, masks, strict=True):
            part[self.call.step, name] = mask
        self.weights.pop(name, None)  # to stand last
        self.weights[name] = masks if self.call.others is None else torch.cat([masks, masks], 1)

    def add(
        self, module: nn.Module, inputs: tuple, output: torch.Tensor, *, index: int, name: str, A: Any, B: Any
    ) -> torch.Tensor:
        """4. The block projects, and a concept's residual is added where its weight says."""
        if self.scale == 0 or not self.inside():
            return output
        return add_low_rank(output, inputs[0], A, B, self.weights[name][index], self.scale)
