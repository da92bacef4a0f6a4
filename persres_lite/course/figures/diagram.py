"""A U-Net, drawn from its own structure: where the transformer blocks sit, and each one's output projection; and what a
residual adds to one of them.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from persres_lite.course.figures.style import COLORS, WIDTH, Drawing, new_plot
from persres_lite.residuals import find_proj_outs

TRANSFORMER, RESIDUAL, CHANGE, PROJECTION = "#cfe3f1", "#e8e8e8", "#ffffff", COLORS[1]
CELL = 0.44
MIDDLE = {"ha": "center", "va": "center"}
BELOW = {"ha": "center", "va": "top"}


class Part(NamedTuple):
    """A part of a block: its kind ('resnet', 'transformer', 'smaller' or 'larger'), width, and how many it stacks."""

    kind: str
    width: int = 0
    depth: int = 1


def unet_parts(unet: Any) -> dict[str, list[list[Part]]]:
    """The parts of each block in the order of the forward pass, under 'down', 'mid' and 'up'.

    Transformers are found as `persres_lite.residuals.find_proj_outs` finds them: their number and widths are those of
    the residuals.
    """
    layers: dict[str, Any] = dict(find_proj_outs(unet))
    widths = {name.removesuffix(".proj_out"): layer.weight.shape[0] for name, layer in layers.items()}

    def parts(name: str) -> list[Part]:
        block = unet.get_submodule(name)
        inside = {key: unet.get_submodule(key) for key in widths if key.startswith(f"{name}.")}
        attentions = [Part("transformer", widths[key], len(each.transformer_blocks)) for key, each in inside.items()]
        resnets = [Part("resnet", resnet.out_channels) for resnet in block.resnets]
        # Residual blocks and transformers take turns; the middle block has one residual block more.
        found = [part for pair in zip_longest(resnets, attentions) for part in pair if part is not None]
        ends = {"downsamplers": "smaller", "upsamplers": "larger"}
        return found + [Part(kind) for name, kind in ends.items() if getattr(block, name, None)]

    sides = {side: len(getattr(unet, f"{side}_blocks")) for side in ("down", "up")}
    made = {side: [parts(f"{side}_blocks.{i}") for i in range(number)] for side, number in sides.items()}
    return made | {"mid": [parts("mid_block")]}


def unet_diagram(unet: Any) -> Drawing:
    """Draw a U-Net: down on the left, up on the right, the middle below, an orange bar on every output projection.

    Parameters
    ----------
    unet : Module
        A `UNet2DConditionModel` of any size, also one without weights (built under ``torch.device("meta")``).
    """
    parts = unet_parts(unet)
    widths = Counter(part.width for part in chain(*chain(*parts.values())) if part.kind == "transformer")
    counted = ", ".join(f"{number} of width {width}" for width, number in sorted(widths.items()))
    caption = f"{widths.total()} output projections: {counted}. Dashed: what the left side hands to the right."
    levels, middle = len(parts["down"]), parts["mid"][0]
    left, right = (CELL * max(map(len, parts[side])) for side in ("down", "up"))
    gap = max(0.9, len(middle) * CELL - min(left, right))
    end = left + gap + right
    figure, axes = _canvas((WIDTH, 0.75 * (levels + 1) + 0.75), (-0.1, end + 0.1), (-levels - 1.05, 0.75), caption)
    arrow = {"arrowstyle": "->", "color": "0.6", "linestyle": "--"}
    for level, (down, up) in enumerate(zip(parts["down"], reversed(parts["up"]), strict=True)):
        _cells(axes, down, left - len(down) * CELL, -level)
        _cells(axes, up, left + gap, -level)
        axes.annotate("", (left + gap - 0.06, -level + 0.2), (left + 0.06, -level + 0.2), arrowprops=arrow)
        side = f"{unet.config.sample_size >> level} × {unet.config.sample_size >> level}"
        axes.text(left + gap / 2, -level + 0.24, side, ha="center", va="bottom", fontsize=9, color="0.35")
    _cells(axes, middle, left + gap / 2 - len(middle) * CELL / 2, -levels)
    meaning = {"R: residual block": RESIDUAL, "T: transformer (T×n: n stacked)": TRANSFORMER}
    meaning |= {"proj_out, its width below": PROJECTION}
    shown = [Patch(facecolor=color, edgecolor="0.5", label=words) for words, color in meaning.items()]
    axes.legend(handles=shown, loc="lower center", ncols=3, frameon=False, fontsize=9, handlelength=1, borderpad=0)
    axes.text(0, 0.6, "down", fontsize=10, color="0.35")
    axes.text(end, 0.6, "up", fontsize=10, color="0.35", ha="right")
    return figure


def low_rank_diagram(width: int, rank: int, caption: str | None = None) -> Drawing:
    """Draw W + A B to scale: a frozen square of `width`, and two factors of `rank` that learn.

    Parameters
    ----------
    width, rank : int
        m and r: W is (m, m), A (m, r), B (r, m).
    """
    side, thin = 2.0, 2.0 * rank / width
    figure, axes = _canvas((5.5, 2.6), (-0.1, 2 * side + thin + 1.5), (-0.75, side + 0.1), caption)
    axes.set_aspect("equal")
    second = side + 0.6
    for name, color, place, size in (
        ("W", RESIDUAL, (0.0, 0.0, side, side), f"{width} × {width}, frozen"),
        ("A", PROJECTION, (second, 0.0, thin, side), f"{width} × {rank}"),
        ("B", PROJECTION, (second + thin + 0.6, side - thin, side, thin), f"{rank} × {width}"),
    ):
        _box(axes, place, color, name)
        axes.text(place[0] + place[2] / 2, place[1] - 0.12, f"{name}\n{size}", fontsize=10, **BELOW)
    axes.text(side + 0.3, side / 2, "+", fontsize=16, **MIDDLE)
    return figure


def block_diagram(caption: str | None = None) -> Drawing:
    """Draw one transformer block: two kinds of attention, the feed-forward part, the output projection, and the
    skips.
    """
    figure, axes = _canvas((WIDTH, 2.5), (-0.2, 8.3), (-1.3, 1.75), caption)

    def arrow(*points: tuple[float, float]) -> None:
        """Through points to the last one."""
        axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "->", "color": "0.35", "shrinkA": 0})

    axes.text(0, 0, "in", **MIDDLE)
    left = 0.2
    for number, word in enumerate(("self-\nattention", "cross-\nattention", "feed-\nforward", "output\nprojection")):
        last = number == 3
        x = 0.75 + 1.85 * number
        color = PROJECTION if last else TRANSFORMER
        _box(axes, (x, -0.4, 1.1, 0.8), color, "part", word, fontsize=9.5, color="white" if last else "black")
        plus, start, height = x + 1.35, 0.35 if last else x - 0.2, 1.25 if last else 0.65
        arrow((left, 0), (x, 0))
        arrow((x + 1.1, 0), (plus - 0.1, 0))
        axes.text(plus, 0, "+", fontsize=13, **MIDDLE)
        skip = {"color": "0.35", "linewidth": 1.8 if last else 0.9, "gid": "skip"}
        axes.plot([start, start, plus], [0, height, height], **skip)
        arrow((plus, height), (plus, 0.14))
        left = plus + 0.1
    arrow((left, 0), (8.0, 0))
    arrow((3.15, -0.85), (3.15, -0.4))
    axes.text(4, 1.3, "skip connection of the block", ha="center", va="bottom", fontsize=9.5, color="0.25")
    axes.text(8.15, 0, "out", **MIDDLE)
    axes.text(3.15, -0.9, "text, one vector per token", fontsize=9.5, **BELOW)
    axes.text(6.85, -0.5, "W, and here A B", fontsize=9.5, color=PROJECTION, **BELOW)
    return figure


def _canvas(
    size: tuple[float, float], x: tuple[float, float], y: tuple[float, float], caption: str | None
) -> tuple[Drawing, Any]:
    """A figure without axes."""
    look = {"xlim": x, "ylim": y, "xticks": (), "yticks": (), "frame_on": False}
    return new_plot(*size, caption, subplot_kw=look)


def _box(axes: Any, place: tuple[float, ...], fill: str, name: str, words: str = "", **style: Any) -> None:
    """A box at (x, y, width, height), rounded where it has words, which stand in its middle."""
    x, y, width, height = place
    look: dict[str, Any] = {"facecolor": fill, "edgecolor": "0.5", "linewidth": 0.7, "gid": name}
    box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.05", **look)
    axes.add_patch(box if words else Rectangle((x, y), width, height, **look))
    axes.text(x + width / 2, y + height / 2, words, **MIDDLE, **style)


def _cells(axes: Any, parts: list[Part], x: float, y: float) -> None:
    """The parts of a block, from `x` to the right."""
    for part in parts:
        stacked = f"T×{part.depth}" if part.depth > 1 else "T"
        letters = {"resnet": "R", "transformer": stacked, "smaller": "↓", "larger": "↑"}[part.kind]
        color = {"resnet": RESIDUAL, "transformer": TRANSFORMER}.get(part.kind, CHANGE)
        size = 10 if len(letters) == 1 else 7.5
        _box(axes, (x + 0.02, y, CELL - 0.06, 0.42), color, part.kind, letters, fontsize=size)
        if part.kind == "transformer":
            _box(axes, (x + CELL - 0.11, y + 0.03, 0.07, 0.36), PROJECTION, "proj_out")
            axes.text(x + CELL / 2, y - 0.03, str(part.width), fontsize=8, color=PROJECTION, **BELOW)
        x += CELL
