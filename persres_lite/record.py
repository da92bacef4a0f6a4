"""A record of attention: asked for a word, it answers with a map, and draws it over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from persres_lite.masks import average, resize


@dataclass
class AttentionRecord:
    """Maps of words, by step and block.

    Attributes
    ----------
    words : list of str
        What was asked for.
    prompts : list of str
        One for each image of the batch.
    maps : dict of (step, block, half) to tensor (images, words, h, w), float32, on the CPU
        The share of attention that each position gives to each word: over all tokens it sums to 1.
    """

    words: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    maps: dict[tuple[int, str, str], torch.Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Recorded steps, in order."""
        return sorted({step for step, _, _ in self.maps})

    @property
    def blocks(self) -> list[str]:
        """Recorded blocks, in the order of the forward pass."""
        return list(dict.fromkeys(block for _, block, _ in self.maps))

    def map(
        self,
        word: str | Sequence[str],
        step: int | slice | None = None,
        block: str | None = None,
        half: str = "cond",
        image: int = 0,
    ) -> torch.Tensor:
        """Where a word looked: the mean over all steps and blocks that are not named.

        Parameters
        ----------
        word : str or list of str
            One of `words`; of several the maps are added (paper: A_{i,C}).
        step : int or slice, optional
            One step, counted from 0 (negative from the end), or a range such as slice(0, 10).
        block : str, optional
            The name of one `proj_out`.
        half : 'cond' or 'uncond'
            Which half under guidance.
        image : int
            Which image of the batch.

        Returns
        -------
        tensor (h, w)
            At the finest resolution among the maps that are averaged.

        Raises
        ------
        ValueError
            If nothing was recorded for this word, step, block, half or image.
        """
        asked = [str(word)] if not isinstance(word, (list, tuple)) else [str(each) for each in word]
        for each in asked:
            if each not in self.words:
                raise ValueError(f"No map of {each!r} was recorded: the words are {', '.join(map(repr, self.words))}.")
        if not 0 <= image < len(self.prompts):
            raise ValueError(f"There is no image {image}: the batch had {len(self.prompts)}.")
        if step is None:
            steps = self.steps
        elif isinstance(step, slice):
            steps = list(range(*step.indices(max(self.steps, default=-1) + 1)))
        else:
            steps = [step if step >= 0 else max(self.steps, default=-1) + 1 + step]
        chosen = [
            maps[image, [self.words.index(each) for each in asked]].sum(0)
            for (at, name, which), maps in self.maps.items()
            if at in steps and block in (None, name) and which == half
        ]
        if not chosen:
            raise ValueError(
                f"Nothing was recorded at step {step}, block {block!r}, half {half!r}: there are steps {self.steps} "
                f"and blocks {', '.join(self.blocks) or 'none'}."
            )
        return average([each[None] for each in chosen])[0]

    def show(
        self,
        picture: Any = None,
        words: Sequence[str] | None = None,
        step: int | slice | None = None,
        block: str | None = None,
        half: str = "cond",
        image: int = 0,
    ) -> Any:
        """Draw one map a word, over the picture if it is given; each map has its own color scale.

        Parameters
        ----------
        picture : PIL image, optional
            What the pipeline made; maps are stretched over it.
        words, step, block, half, image
            As in `map`; all words by default.

        Returns
        -------
        matplotlib Figure
        """
        from matplotlib import pyplot

        words = list(self.words if words is None else words)
        figure, axes = pyplot.subplots(1, len(words), figsize=(2.2 * len(words), 2.5), squeeze=False)
        for axis, word in zip(axes[0], words, strict=True):
            heat = self.map(word, step, block, half, image)
            if picture is not None:
                axis.imshow(picture)
                heat = resize(heat[None], (picture.height, picture.width))[0]
            axis.imshow(heat.numpy(), cmap="magma", alpha=1.0 if picture is None else 0.6)
            axis.set_title(word if isinstance(word, str) else " ".join(word))
            axis.axis("off")
        figure.tight_layout()
        return figure
