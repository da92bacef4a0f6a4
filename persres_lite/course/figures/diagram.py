"""A U-Net, drawn from its own structure: where the transformer blocks sit, and each one's output projection; and what a
residual adds to one of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from matplotlib.patches import FancyBboxPatch, Rectangle

from persres_lite.course.figures.style import COLORS, WIDTH, Drawing, captioned, new_figure
from persres_lite.residuals import find_proj_outs

TRANSFORMER, RESIDUAL, CHANGE = "#cfe3f1", "#e8e8e8", "#ffffff"
CELL = 0.44


@dataclass(frozen=True)
class Part:
    """A part of a block: its kind ('resnet', 'transformer', 'smaller' or 'larger'), width, and how many it stacks."""

    kind: str
    width: int = 0
    depth: int = 1


def unet_parts(unet: Any) -> dict[str, list[list[Part]]]:
    """The parts of each block in the order of the forward pass, under 'down', 'mid' and 'up'.

    Transformers are found as `persres_lite.residuals.find_proj_outs` finds them: their number and widths are those of
    the residuals.
    """
    found: dict[str, Any] = dict(find_proj_outs(unet))
    transformers = {name.removesuffix(".proj_out"): layer.weight.shape[0] for name, layer in found.items()}
    blocks = {
        "down": [f"down_blocks.{i}" for i in range(len(unet.down_blocks))],
        "mid": ["mid_block"],
        "up": [f"up_blocks.{i}" for i in range(len(unet.up_blocks))],
    }
    return {side: [_parts(unet, name, transformers) for name in names] for side, names in blocks.items()}


def unet_diagram(unet: Any, caption: str | None = None) -> Drawing:
    """Draw a U-Net: down on the left, up on the right, the middle below, an orange bar on every output projection.

    Parameters
    ----------
    unet : Module
        A `UNet2DConditionModel` of any size, also one without weights (built under ``torch.device("meta")``).
    caption : str, optional
        By default, how many output projections there are, of which widths.
    """
    parts = unet_parts(unet)
    drawn = [part for blocks in parts.values() for block in blocks for part in block]
    widths = Counter(part.width for part in drawn if part.kind == "transformer")
    levels = len(parts["down"])
    left = max(len(block) for block in parts["down"]) * CELL
    right = max(len(block) for block in parts["up"]) * CELL
    gap = max(0.9, len(parts["mid"][0]) * CELL - min(left, right))
    figure = new_figure(WIDTH, 0.75 * (levels + 1) + 0.75)
    axes = figure.subplots()
    axes.set(xlim=(-0.1, left + gap + right + 0.1), ylim=(-levels - 1.05, 0.75), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    size = unet.config.sample_size if isinstance(unet.config.sample_size, int) else max(unet.config.sample_size)
    for level, (down, up) in enumerate(zip(parts["down"], reversed(parts["up"]), strict=True)):
        end = _draw(axes, down, left - len(down) * CELL, -level)
        start = left + gap
        _draw(axes, up, start, -level)
        arrow = {"arrowstyle": "->", "color": "0.6", "linestyle": "--"}
        axes.annotate("", (start - 0.06, -level + 0.2), (end + 0.06, -level + 0.2), arrowprops=arrow)
        side = f"{size >> level} × {size >> level}"
        axes.text((end + start) / 2, -level + 0.24, side, ha="center", va="bottom", fontsize=9, color="0.35")
    middle = parts["mid"][0]
    _draw(axes, middle, left + gap / 2 - len(middle) * CELL / 2, -levels)
    _legend(axes, left + gap + right, -levels - 0.75)
    axes.text(0, 0.6, "down", fontsize=10, color="0.35")
    axes.text(left + gap + right, 0.6, "up", fontsize=10, color="0.35", ha="right")
    counted = ", ".join(f"{number} of width {width}" for width, number in sorted(widths.items()))
    said = f"{sum(widths.values())} output projections: {counted}. Dashed: what the left side hands to the right."
    return captioned(figure, caption or said)


def low_rank_diagram(width: int, rank: int, caption: str | None = None) -> Drawing:
    """Draw W + A B to scale: a frozen square of `width`, and two factors of `rank` that learn.

    Parameters
    ----------
    width, rank : int
        m and r: W is (m, m), A (m, r), B (r, m).
    """
    side, thin = 2.0, 2.0 * rank / width
    figure = new_figure(5.5, 2.6)
    axes = figure.subplots()
    axes.set(xlim=(-0.1, 2 * side + thin + 1.5), ylim=(-0.75, side + 0.1), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    second = side + 0.6
    third = second + thin + 0.6
    for name, color, x, y, wide, high, size in (
        ("W", RESIDUAL, 0.0, 0.0, side, side, f"{width} × {width}, frozen"),
        ("A", COLORS[1], second, 0.0, thin, side, f"{width} × {rank}"),
        ("B", COLORS[1], third, side - thin, side, thin, f"{rank} × {width}"),
    ):
        box = Rectangle((x, y), wide, high, facecolor=color, edgecolor="0.3", linewidth=0.8)
        box.set_gid(name)
        axes.add_patch(box)
        axes.text(x + wide / 2, y - 0.12, f"{name}\n{size}", ha="center", va="top", fontsize=10)
    axes.text(side + 0.3, side / 2, "+", ha="center", va="center", fontsize=16)
    return captioned(figure, caption or f"To scale: a weight of width {width}, and a residual of rank {rank}.")


def _parts(unet: Any, name: str, transformers: dict[str, int]) -> list[Part]:
    block = unet.get_submodule(name)
    inside = [key for key in transformers if key.startswith(f"{name}.")]
    attentions = [
        Part("transformer", transformers[key], len(unet.get_submodule(key).transformer_blocks)) for key in inside
    ]
    resnets = [Part("resnet", resnet.out_channels) for resnet in block.resnets]
    # Residual blocks and transformers take turns; the middle block has one residual block more, and begins with it.
    parts = [resnets.pop(0)] if name == "mid_block" else []
    first, second = (attentions, resnets) if name == "mid_block" else (resnets, attentions)
    for pair in zip_longest(first, second):
        parts += [part for part in pair if part is not None]
    if getattr(block, "downsamplers", None):
        parts.append(Part("smaller"))
    if getattr(block, "upsamplers", None):
        parts.append(Part("larger"))
    return parts


def _draw(axes, parts: list[Part], x: float, y: float) -> float:
    for part in parts:
        _cell(axes, part, x, y)
        x += CELL
    return x


def _cell(axes, part: Part, x: float, y: float) -> None:
    stacked = f"T×{part.depth}" if part.depth > 1 else "T"
    letters = {"resnet": "R", "transformer": stacked, "smaller": "↓", "larger": "↑"}[part.kind]
    color = {"resnet": RESIDUAL, "transformer": TRANSFORMER}.get(part.kind, CHANGE)
    shape = "round,pad=0,rounding_size=0.05"
    box = FancyBboxPatch(
        (x + 0.02, y), CELL - 0.06, 0.42, boxstyle=shape, facecolor=color, edgecolor="0.5", linewidth=0.7
    )
    box.set_gid(part.kind)
    axes.add_patch(box)
    middle = x + CELL / 2 - (0.04 if part.kind == "transformer" else 0.01)
    axes.text(middle, y + 0.22, letters, ha="center", va="center", fontsize=10 if len(letters) == 1 else 7.5)
    if part.kind == "transformer":
        bar = Rectangle((x + CELL - 0.11, y + 0.03), 0.07, 0.36, facecolor=COLORS[1], edgecolor="none")
        bar.set_gid("proj_out")
        axes.add_patch(bar)
        axes.text(x + CELL / 2, y - 0.03, str(part.width), ha="center", va="top", fontsize=8, color=COLORS[1])


def _legend(axes, right: float, y: float) -> None:
    words = [
        ("R", RESIDUAL, "residual block"),
        ("T", TRANSFORMER, "transformer (T×n: n stacked)"),
        ("", COLORS[1], "proj_out, its width below"),
    ]
    x = 0.0
    for letter, color, text in words:
        wide = 0.22 if letter else 0.08
        axes.add_patch(Rectangle((x, y - 0.1), wide, 0.28, facecolor=color, edgecolor="0.5", linewidth=0.7))
        axes.text(x + 0.11, y + 0.04, letter, ha="center", va="center", fontsize=9)
        axes.text(x + 0.3 if letter else x + 0.16, y + 0.04, text, va="center", fontsize=9)
        x += right * (0.27 if letter == "R" else 0.42)


def block_diagram(caption: str | None = None) -> Drawing:
    """Draw one transformer block: two kinds of attention, the feed-forward part, the output projection, and the skips.

    Parameters
    ----------
    caption : str, optional
        By default, what the long arrow means for a small residual.
    """
    figure = new_figure(WIDTH, 2.5)
    axes = figure.subplots()
    axes.set(xlim=(-0.2, 8.3), ylim=(-1.3, 1.75), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    plain = {"arrowstyle": "->", "color": "0.35", "shrinkA": 0, "shrinkB": 0}
    words = ("self-\nattention", "cross-\nattention", "feed-\nforward", "output\nprojection")
    axes.text(0, 0, "in", ha="center", va="center")
    left = 0.2
    for number, word in enumerate(words):
        x = 0.75 + 1.85 * number
        color = COLORS[1] if number == 3 else TRANSFORMER
        shape = "round,pad=0,rounding_size=0.08"
        box = FancyBboxPatch((x, -0.4), 1.1, 0.8, boxstyle=shape, facecolor=color, edgecolor="0.5", linewidth=0.7)
        box.set_gid("part")
        axes.add_patch(box)
        axes.text(x + 0.55, 0, word, ha="center", va="center", fontsize=9.5, color="white" if number == 3 else "black")
        axes.annotate("", (x, 0), (left, 0), arrowprops=plain)
        plus = x + 1.35
        axes.annotate("", (plus - 0.1, 0), (x + 1.1, 0), arrowprops=plain)
        axes.text(plus, 0, "+", ha="center", va="center", fontsize=13)
        start = x - 0.2 if number < 3 else 0.35
        height = 0.65 if number < 3 else 1.25
        skip = axes.plot([start, start, plus], [0, height, height], color="0.35", linewidth=1.8 if number == 3 else 0.9)
        skip[0].set_gid("skip")
        axes.annotate("", (plus, 0.14), (plus, height), arrowprops=plain)
        left = plus + 0.1
    axes.text(4, 1.3, "skip connection of the block", ha="center", va="bottom", fontsize=9.5, color="0.25")
    axes.annotate("", (8.0, 0), (left, 0), arrowprops=plain)
    axes.text(8.15, 0, "out", ha="center", va="center")
    axes.annotate("", (3.15, -0.4), (3.15, -0.85), arrowprops=plain)
    axes.text(3.15, -0.9, "text, one vector per token", ha="center", va="top", fontsize=9.5)
    axes.text(6.85, -0.5, "W, and here A B", ha="center", va="top", fontsize=9.5, color=COLORS[1])
    said = (
        "One transformer block (normalization and input projection left out). The long skip carries the input past "
        "everything: a small residual A B changes only what is added to it."
    )
    return captioned(figure, caption or said)
