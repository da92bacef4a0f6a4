"""The state behind `localized`: what the current U-Net call is for, and which weights its blocks use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from persres_lite.masks import Rule, average, resize
from persres_lite.prompts import count_conditional, find_words
from persres_lite.watch import indicator

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


@dataclass
class Run:
    """One open context. The arguments of `localized`, then what changes from call to call."""

    base: Any
    concepts: list[Any]
    drawn: list[torch.Tensor] | None
    rule: Rule
    unconditional: str
    window: tuple[float, float]
    outside: str
    aggregate: str | None
    lag: Lag
    guided: bool | None = None
    step: int = -1
    active: bool = False
    batch: int = 0
    conditional: int = 0  # how many of the last rows belong to the prompts
    positions: list[list[list[int]]] = field(default_factory=list)  # by row and concept
    columns: dict[tuple[int, int, torch.device], torch.Tensor] = field(default_factory=dict)
    weights: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # by block, for each concept (batch, h, w)
    memory: dict[tuple[int, str], tuple[torch.Tensor, int]] = field(default_factory=dict)  # sums of maps, and counts

    def note(self, prompts: list[str], guided: bool | None) -> None:
        """A pipeline call begins."""
        if self.drawn is None:
            by_concept = [find_words(self.base, prompts, words) for words in self.concepts]
            self.positions = [list(row) for row in zip(*by_concept, strict=True)]
        self.lag.prompts, self.lag.parts = prompts, [{} for _ in self.concepts]
        self.guided, self.step = guided, -1
        self.columns, self.memory = {}, {}

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A U-Net call begins."""
        self.step += 1
        self.batch = len(args[0] if args else kwargs["sample"])
        images = len(self.lag.prompts) or self.batch  # a bare U-Net with a drawn mask: all rows alike
        self.conditional = count_conditional(self.batch, images, self.guided)
        self.active = self.window == (0, 1) or self.window[0] <= self.step / self._steps() < self.window[1]
        self.weights = {}

    def _steps(self) -> int:
        if not hasattr(self.base, "scheduler"):
            raise ValueError("A window needs the number of steps: pass the pipeline instead of its U-Net.")
        return getattr(self.base, "_num_timesteps", None) or len(self.base.scheduler.timesteps)

    def ask(self, batch: int, keys: torch.Tensor | None) -> Any:
        """For `watch_attention`: the concepts' tokens, in the rows that need a map."""
        if not self.active:
            return 0
        copies = self.batch // self.conditional if self.unconditional == "own" else 1
        if keys is None:
            return copies * self.conditional
        which = (copies, keys.shape[1], keys.device)  # one transfer to the device a run, not one a layer
        if which not in self.columns:
            self.columns[which] = indicator(self.positions * copies, keys.shape[1]).to(keys.device)
        return self.columns[which]

    def tell(self, name: str, maps: torch.Tensor) -> None:
        """From `watch_attention`: maps (rows, concepts, h, w) of the block that is about to project."""
        self.use(name, [self.rule(self._gather(i, name, maps[:, i])) for i in range(maps.shape[1])])

    def _gather(self, concept: int, name: str, maps: torch.Tensor) -> torch.Tensor:
        if self.aggregate is None:
            return maps
        total, count = maps, 1
        if self.aggregate != "blocks" and (concept, name) in self.memory:
            before, steps = self.memory[concept, name]
            total, count = before[-len(maps) :] + maps, steps + 1  # fewer rows, if guidance has ended
        self.memory[concept, name] = total, count
        blocks = [name] if self.aggregate == "steps" else [block for which, block in self.memory if which == concept]
        sums = [self.memory[concept, block] for block in blocks]
        return average([total[-len(maps) :] / count for total, count in sums], maps.shape[-2:])

    def draw(self, module: nn.Module, args: tuple, kwargs: dict, *, name: str) -> None:
        """Instead of `tell`, for masks drawn by hand: a transformer begins."""
        if not self.active or self.drawn is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        masks = [each if each.ndim == 3 else each[None] for each in self.drawn]
        for each in masks:
            if len(each) not in (1, self.conditional):
                raise ValueError(f"Got {len(each)} fixed masks for {self.conditional} images: give 1 or as many.")
        rows = [each.to(hidden.device).expand(self.conditional, -1, -1) for each in masks]
        self.use(name, [resize(each, tuple(hidden.shape[-2:])) for each in rows])

    def use(self, name: str, masks: list[torch.Tensor]) -> None:
        """Keep masks as the weights of a block; where several overlap, divide by their sum."""
        if len(masks) > 1:
            total = torch.stack(masks).sum(0).clamp(min=1)
            masks = [each / total for each in masks]
        for part, each in zip(self.lag.parts, masks, strict=True):
            part[self.step, name] = each[-self.conditional :]
        self.weights[name] = [self._for_batch(each) for each in masks]

    def _for_batch(self, mask: torch.Tensor) -> torch.Tensor:
        if len(mask) == self.batch:
            return mask
        if self.unconditional == "residual":
            return torch.cat([torch.ones_like(mask), mask])
        if self.unconditional == "original":
            return torch.cat([torch.zeros_like(mask), mask])
        return torch.cat([mask, mask])

    def weight(self, name: str, concept: int) -> torch.Tensor | float:
        """M (batch, h, w) of a block that is projecting, or 0 or 1 outside the window."""
        if self.active:
            return self.weights[name][concept]
        return 1.0 if self.outside == "residual" else 0.0
