"""Widgets to play with: maps by word, step and block; mask rules; the scale of a residual. Core ipywidgets only.

An explorer looks at what was recorded before and computes no new picture with the model, so a slider answers at once.
Its callbacks are plain functions of the controls' values. For each there is a still figure (`course.figures`:
map_table, mask_table, scale_table) for readers who see the notebook on GitHub.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display
from PIL import Image

from persres_lite.course.figures.pictures import enlarge, heat_picture, outline_picture
from persres_lite.course.figures.stills import short_name
from persres_lite.course.figures.style import encoded
from persres_lite.evaluation import iou
from persres_lite.masks import RULES, make_mask
from persres_lite.support.sheet import sheet

ALL = "all"  # and not None, which a slider takes for nothing chosen


class Explorer:
    """Controls, one picture and one line of text that follow each other.

    Leave it as the last expression of a cell to show it. ``explorer.controls["step"].value = 3`` moves a control as a
    hand would.
    """

    def __init__(self, draw: Callable[..., tuple[Image.Image, str]], controls: dict[str, widgets.Widget]) -> None:
        self.draw, self.controls = draw, controls
        self.picture = widgets.Image(format="png", layout=widgets.Layout(flex="0 0 auto", max_width="100%"))
        self.note = widgets.HTML()
        beside = widgets.VBox([*controls.values(), self.note])
        # Beside the picture, or below it where that is wide.
        self.box = widgets.Box([self.picture, beside], layout=widgets.Layout(flex_flow="row wrap"))
        for control in controls.values():
            control.observe(self._follow, names="value")
        self._follow()

    def _follow(self, change: Any = None) -> None:
        picture, words = self.draw(**{name: control.value for name, control in self.controls.items()})
        self.picture.value, self.note.value = encoded(picture, "png"), words
        self.picture.width = max(256, picture.width // 2)  # sharp on screens with two pixels to one

    def _ipython_display_(self) -> None:  # ipywidgets 7, which Colab has, knows no other way
        display(self.box)


def maps(record: Any, picture: Image.Image) -> Explorer:
    """Look where each word looked, at each step and in each block.

    Parameters
    ----------
    record : AttentionRecord
        From `record_attention`.
    picture : picture
        What the pipeline made.
    """
    steps = [(ALL, ALL), *((str(step), step) for step in record.steps)]
    blocks = [(ALL, ALL), *((short_name(block), block) for block in record.blocks)]

    def draw(word: str, step: int | str, block: str) -> tuple[Image.Image, str]:
        found = record.map(word, step=None if step == ALL else step, block=None if block == ALL else block)
        said = f"<b>{word}</b>: {found.shape[0]} × {found.shape[1]} positions, highest {found.max():.3f}"
        return heat_picture(picture, found), said

    controls = {
        "word": widgets.Dropdown(options=list(record.words), description="word"),
        "step": widgets.SelectionSlider(options=steps, description="step"),
        "block": widgets.Dropdown(options=blocks, description="block"),
    }
    return Explorer(draw, controls)


def masks(picture: Image.Image, attention: torch.Tensor, truth: Any = None) -> Explorer:
    """Play with the rules that make a mask of a map.

    Parameters
    ----------
    attention : tensor (h, w)
        The map.
    truth : picture or array (h, w), optional
        The true mask, of any size: outlined in white, and compared with.
    """

    def draw(rule: str, amount: float) -> tuple[Image.Image, str]:
        value = {name: whole * amount for name, whole in _options(RULES[rule]).items()}
        mask = make_mask(attention, rule, **value)
        said = "".join(f", {name} {number:.2f}" for name, number in value.items()) or ", no option"
        words = f"<b>{rule}</b>{said}: {mask.float().mean():.0%} of the picture"
        if truth is not None:
            words += f", IoU {iou(mask, truth).item():.2f}"
        return outline_picture(picture, mask, truth), words

    controls = {
        # Of this rule the slider moves at once.
        "rule": widgets.Dropdown(options=list(RULES), value="quantile", description="rule"),
        "amount": widgets.FloatSlider(value=0.75, min=0, max=1, step=0.05, description="its option"),
    }
    return Explorer(draw, controls)


def compare(
    pictures: Mapping[float, Mapping[str, Image.Image]],
    references: Sequence[Image.Image] = (),
    masks: Mapping[float, torch.Tensor] | None = None,
) -> Explorer:
    """Compare ways of sampling from one noise while the residual's scale grows.

    Parameters
    ----------
    pictures : dict of float to dict of str to picture
        By scale, then by name: ``{0.0: {"residual": …, "LAG": …}, 1.0: …}``; every scale has the same names.
    references : list of picture, optional
        Pictures of the concept; the first is shown beside.
    masks : dict of float to tensor (h, w), optional
        By scale: the mean mask of "LAG", to lay over its picture.
    """

    def draw(scale: float, reference: bool, mask: bool) -> tuple[Image.Image, str]:
        shown = {**pictures[scale], **({"reference": references[0]} if reference else {})}
        words = f"left to right: {', '.join(shown)}; scale {scale:g}"
        if masks and mask:
            shown["LAG"] = heat_picture(shown["LAG"], masks[scale], 0, 1)
            words += "; bright: there the residual acted most often"
        return sheet([[enlarge(picture) for picture in shown.values()]], gap=12), words

    options = [(f"{scale:g}", scale) for scale in sorted(pictures)]
    controls = {
        "scale": widgets.SelectionSlider(options=options, description="scale"),
        "reference": widgets.Checkbox(value=bool(references), description="reference", disabled=not references),
        "mask": widgets.Checkbox(value=False, description="LAG's mask", disabled=not masks),
    }
    return Explorer(draw, controls)


def studio(pictures: Mapping[float, Mapping[str, Image.Image]], masks: Mapping[float, torch.Tensor]) -> Explorer:
    """`compare` for one's own pictures, with LAG's mask."""
    return compare(pictures, masks=masks)


def _options(rule: Callable) -> dict[str, float]:
    """A rule's numeric option, and its value where the slider stands at 1: 1 for shares, else twice the default."""
    defaults = {name: each.default for name, each in inspect.signature(rule).parameters.items()}
    return {name: 2 * value if value > 1 else 1.0 for name, value in defaults.items() if isinstance(value, float)}
