"""Figures made of numbers: curves, bars, losses by noise level, singular values."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from persres_lite.course.figures.style import (
    COLORS,
    NEUTRAL,
    STYLE,
    Drawing,
    as_array,
    captioned,
    fits,
    looks,
    new_figure,
    new_plot,
)


def _legend(axes) -> None:
    """Above the axes, where it covers nothing; in two columns if the words are short."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]))
    columns = 1 if longest > 24 else 2
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)


def curves(
    series: Mapping[str, Any],
    x: Sequence[float] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    smooth: int = 0,
    log: bool = False,
    caption: str | None = None,
) -> Drawing:
    """Curves by name. Values (n,) are one curve; values (runs, n) their mean, in a band of one standard deviation.

    Parameters
    ----------
    smooth : int
        Width of a running mean, in points; the raw values stay visible behind it. 0 draws them as they are.
    log : bool
        Whether the vertical axis is logarithmic.
    """
    figure, axes = new_plot()
    for (color, dash, marker), (name, values) in zip(looks(list(series)), series.items(), strict=True):
        runs = np.atleast_2d(as_array(values))
        places = np.arange(runs.shape[1]) if x is None else np.asarray(x, dtype=float)
        mean = runs.mean(0)
        if smooth > 1 and len(mean) >= smooth:
            axes.plot(places, mean, color=color, alpha=0.25, linewidth=0.8)
            kernel = np.ones(smooth) / smooth
            mean, places = np.convolve(mean, kernel, "valid"), np.convolve(places, kernel, "valid")
        elif len(runs) > 1:
            axes.fill_between(places, mean - runs.std(0), mean + runs.std(0), color=color, alpha=0.2, linewidth=0)
        marks = {"marker": marker if len(mean) <= 12 else "", "markersize": 4}
        axes.plot(places, mean, color=color, linestyle=dash, label=name, **marks)
    axes.set(xlabel=xlabel, ylabel=ylabel, **({"yscale": "log"} if log else {}))
    if len(series) > 1:
        _legend(axes)
    return captioned(figure, caption)


def loss_by_noise_level(
    losses: Mapping[str, tuple[Any, Any]],
    bins: int = 10,
    last: int = 1000,
    caption: str | None = None,
) -> Drawing:
    """The mean loss of each range of timesteps, with a band of one standard error.

    Parameters
    ----------
    losses : dict of str to (array (n,), array (n,))
        By name: (timesteps, losses), both (n,).
    last : int
        The number of timesteps that the model was trained on.
    """
    figure, axes = new_plot()
    edges = np.linspace(0, last, bins + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    for (color, dash, marker), (name, (timesteps, values)) in zip(looks(list(losses)), losses.items(), strict=True):
        places, numbers = np.digitize(as_array(timesteps), edges[1:-1]), as_array(values)
        groups = [numbers[places == level] for level in range(bins)]
        mean = np.array([group.mean() if len(group) else np.nan for group in groups])
        error = np.array([group.std() / len(group) ** 0.5 if len(group) else np.nan for group in groups])
        axes.fill_between(middle, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        axes.plot(middle, mean, color=color, linestyle=dash, label=name, marker=marker, markersize=4)
    axes.set(xlabel="timestep (right: more noise)", ylabel="mean loss", xlim=(0, last))
    if len(losses) > 1:
        _legend(axes)
    return captioned(figure, caption)


def bars(
    values: Mapping[str, Any],
    ylabel: str = "",
    reference: tuple[str, float] | None = None,
    caption: str | None = None,
    way: str | None = None,
    neutral: Collection[str] = (),
) -> Drawing:
    """A bar for each name; where a list is given its mean, with every value as a dot.

    Parameters
    ----------
    reference : (str, float), optional
        A name and a value to compare with, drawn as a dashed line.
    way : str, optional
        All bars have the color of this way: for repeats of one way of sampling.
    neutral : collection of str
        Names of what no method has made, as a floor and a ceiling: pale gray with an outline.
    """
    figure, axes = new_plot(height=2.8)
    colored = [name for name in values if name not in neutral]
    found = dict(zip(colored, looks([way]) * len(colored) if way else looks(colored), strict=True))
    for place, (name, value) in enumerate(values.items()):
        numbers = np.atleast_1d(as_array(value))
        fill, edge = NEUTRAL if name in neutral else (found[name][0], "none")
        alpha = 1.0 if name in neutral else 0.55 if len(numbers) > 1 else 0.9
        axes.bar(place, numbers.mean(), color=fill, edgecolor=edge, width=0.6, alpha=alpha)
        above = (place, max(0, *numbers, numbers.mean()))
        mean = f"{numbers.mean():#.3g}".rstrip(".")
        axes.annotate(mean, above, xytext=(0, 5), textcoords="offset points", ha="center")
        if len(numbers) > 1:
            spread = np.linspace(-0.18, 0.18, len(numbers))
            dots = NEUTRAL[1] if name in neutral else fill
            axes.scatter(place + spread, numbers, color=dots, edgecolor="white", s=22, zorder=3)
    if reference:
        axes.axhline(reference[1], color="0.35", linestyle="--", linewidth=1.2, label=reference[0])
        _legend(axes)
    axes.set_xticks(range(len(values)), [textwrap.fill(name, 14) for name in values])
    axes.set_ylabel(ylabel)
    axes.margins(y=0.12)
    return captioned(figure, caption)


def ranked(
    values: Mapping[str, Any],
    xlabel: str = "",
    reference: tuple[str, float] | None = None,
    caption: str | None = None,
) -> Drawing:
    """A lying bar for each name, the mean of its values, the longest above; the thin line is one standard error.

    Parameters
    ----------
    reference : (str, float), optional
        A name and a value to compare with, drawn as a dashed line; bars that do not reach it are pale.
    """
    numbers = {name: np.atleast_1d(as_array(value)) for name, value in values.items()}
    order = sorted(numbers, key=lambda name: numbers[name].mean())
    figure, axes = new_plot(height=1.1 + 0.24 * len(order))
    for place, name in enumerate(order):
        mean, error = numbers[name].mean(), numbers[name].std() / len(numbers[name]) ** 0.5
        pale = reference is not None and mean < reference[1]
        axes.barh(place, mean, color=COLORS[0], alpha=0.4 if pale else 0.9, height=0.7)
        axes.hlines(place, mean - error, mean + error, color="0.15", linewidth=1.0)
        axes.annotate(f"{mean:.2f}", (mean + error, place), (4, 0), textcoords="offset points", va="center")
    if reference:
        axes.axvline(reference[1], color=COLORS[1], linestyle="--", linewidth=1.4, label=reference[0])
        _legend(axes)
    axes.set_yticks(range(len(order)), order)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.1, y=0.02)
    return captioned(figure, caption)


def singular_values(matrices: Mapping[str, Any], rank: int | None = None, caption: str | None = None) -> Drawing:
    """The singular values of each matrix, largest first, on a logarithmic axis, relative to its largest.

    Parameters
    ----------
    rank : int, optional
        Drawn as a vertical line after the `rank` first values.
    """
    figure, axes = new_plot()
    for (color, dash, marker), (name, matrix) in zip(looks(list(matrices)), matrices.items(), strict=True):
        values = torch.linalg.svdvals(torch.as_tensor(matrix).detach().double().flatten(1)).cpu().numpy()
        shown = np.maximum(values / max(values[0], 1e-30), 1e-8)  # zeros of a low rank stay on the paper
        count = np.arange(1, len(shown) + 1)
        axes.plot(count, shown, color=color, linestyle=dash, label=name, marker=marker, markersize=3)
    if rank is not None:
        axes.axvline(rank + 0.5, color="0.35", linestyle="--", linewidth=1.2, label=f"rank {rank}")
    axes.set(xlabel="number", ylabel="singular value / largest", yscale="log")
    _legend(axes)
    return captioned(figure, caption)


def tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    points: Mapping[str, tuple[float, float]],
    xlabel: str = "",
    ylabel: str = "",
    caption: str | None = None,
    each: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ranges: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] | None = None,
) -> Drawing:
    """What is won against what it costs: lines through the strengths of a method, and single points beside them.

    Parameters
    ----------
    curves : dict of str to list of (x, y)
        By name, in the order of their strengths.
    points : dict of str to (x, y)
        By name.
    each : dict of str to list of (x, y), optional
        What a point is the mean of, by the point's name: drawn pale and small, behind it.
    ranges : dict of str to ((x low, x high), (y low, y high)), optional
        By the name of a point: its intervals, drawn as thin lines through it.
    """
    many = len(curves) + len(points) > 6  # then the names stand beside the axes and not above
    figure, axes = new_plot(width=7.0 if many else 5.5, height=3.8 if many else 3.4)
    styles = dict(zip([*curves, *points], looks([*curves, *points]), strict=True))
    for name, line in curves.items():
        x, y = zip(*line, strict=True)
        color, dash, marker = styles[name]
        axes.plot(x, y, color=color, linestyle=dash, label=name, marker=marker, markersize=4)
    for name, point in points.items():
        color, _, marker = styles[name]
        if each and name in each:
            axes.scatter(*zip(*each[name], strict=True), color=color, marker=marker, s=18, alpha=0.35, linewidths=0)
        if name in (ranges or {}):
            (left, right), (low, high) = (ranges or {})[name]
            axes.hlines(point[1], left, right, color=color, linewidth=0.9, alpha=0.7)
            axes.vlines(point[0], low, high, color=color, linewidth=0.9, alpha=0.7)
        axes.plot([point[0]], [point[1]], color=color, label=name, marker=marker, markersize=8, linestyle="")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if many:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        _legend(axes)
    return captioned(figure, caption)


def gains(values: Mapping[str, Mapping[str, Any]], xlabel: str = "", caption: str | None = None) -> Drawing:
    """Differences with their intervals: a row for each name, a column of axes for each group, a line at zero.

    Parameters
    ----------
    values : dict of str to dict of str to Interval
        By group, then by name: anything with `mean`, `low` and `high`, as attributes or as keys. A name may be missing
        in a group.
    """
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    figure = new_figure(1.9 + 1.75 * len(values), 0.95 + 0.27 * len(names))
    with matplotlib.rc_context(STYLE):
        panels = figure.subplots(1, len(values), sharey=True, sharex=True, squeeze=False)[0]
    for axes, (title, group) in zip(panels, values.items(), strict=True):
        axes.axvline(0, color="0.35", linestyle="--", linewidth=1.0)
        for name, interval in group.items():
            mean, low, high = (_part(interval, part) for part in ("mean", "low", "high"))
            color, _, marker = looks(names)[names.index(name)]
            place = names.index(name)
            axes.hlines(place, low, high, color=color, linewidth=1.6)
            axes.plot([mean], [place], color=color, marker=marker, markersize=7, linestyle="", label=name)
        axes.set_title(title)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[len(panels) // 2].set_xlabel(xlabel)
    return captioned(figure, caption)


def _part(interval: Any, name: str) -> float:
    return float(interval[name] if isinstance(interval, Mapping) else getattr(interval, name))


def mosaic(
    values: Any,
    rows: Sequence[str],
    xlabel: str = "",
    label: str = "",
    low: float | None = None,
    high: float | None = None,
    caption: str | None = None,
) -> Drawing:
    """A table of numbers (rows, columns) as colors on one scale, with its color bar: by block and step, for instance.

    Parameters
    ----------
    rows : list of str
        A name for each row, from above.
    label : str
        What the colors mean.
    low, high : float, optional
        Values of the darkest and the brightest color; the table's own extremes by default.
    """
    table = as_array(values)
    fits(rows, len(table), "rows")
    figure, axes = new_plot(width=6.2, height=1.3 + 0.24 * len(table))
    shown = axes.imshow(table, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(table)), list(rows))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=xlabel)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, label=label, aspect=12)
    return captioned(figure, caption)


def heat_table(table: Mapping[str, Mapping[str, float]], caption: str | None = None) -> Drawing:
    """A number in each cell, red where it is below zero and blue where it is above; each column has its own scale.

    Parameters
    ----------
    table : dict of str to dict of str to float
        By row, then by column; a cell that is missing or NaN stays white.
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    values = np.array([[row.get(column, np.nan) for column in columns] for row in table.values()], dtype=float)
    largest = np.nanmax(np.abs(values), axis=0, initial=1e-9)
    figure, axes = new_plot(width=1.6 + 1.1 * len(columns), height=0.9 + 0.42 * len(table))
    axes.imshow(np.nan_to_num(values / largest), cmap="RdBu", vmin=-1.6, vmax=1.6, aspect="auto")
    for y, x in zip(*np.nonzero(~np.isnan(values)), strict=True):
        axes.annotate(f"{values[y, x]:+.3f}", (x, y), ha="center", va="center")
    axes.set_xticks(range(len(columns)), [textwrap.fill(name, 12) for name in columns])
    axes.set_yticks(range(len(table)), list(table))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return captioned(figure, caption)
