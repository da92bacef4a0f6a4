"""Figures made of numbers: curves, bars, dots with whiskers, numbers as colors."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from persres_lite.course.figures.style import COLORS, NEUTRAL, Drawing, as_array, cells, html_table, looks, new_plot


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
    figure, axes = new_plot(caption=caption)
    for (color, dash, marker), (name, values) in zip(looks(list(series)), series.items(), strict=True):
        runs = np.atleast_2d(as_array(values))
        places = np.arange(runs.shape[1]) if x is None else np.asarray(x, dtype=float)
        mean, spread = runs.mean(0), runs.std(0)
        if smooth > 1 and len(mean) >= smooth:
            axes.plot(places, mean, color=color, alpha=0.25, linewidth=0.8)
            mean, places = (np.convolve(each, np.ones(smooth) / smooth, "valid") for each in (mean, places))
        elif len(runs) > 1:
            axes.fill_between(places, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        few = marker if len(mean) <= 12 else ""
        axes.plot(places, mean, color=color, linestyle=dash, label=name, marker=few, markersize=4)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    _legend(axes, len(series) > 1)
    return figure


def loss_by_noise_level(
    losses: Mapping[str, tuple[Any, Any]], bins: int = 10, last: int = 1000, caption: str | None = None
) -> Drawing:
    """The mean loss of each range of timesteps, with a band of one standard error.

    Parameters
    ----------
    losses : dict of str to (array (n,), array (n,))
        By name: timesteps and losses.
    last : int
        The number of timesteps that the model was trained on.
    """
    edges = np.linspace(0, last, bins + 1)
    bands = {}  # whose mean is the mean loss, and whose standard deviation its error
    for name, (timesteps, values) in losses.items():
        places, numbers = np.digitize(as_array(timesteps), edges[1:-1]), as_array(values)
        mean, error = np.array([_mean_and_error(numbers[places == level]) for level in range(bins)]).T
        bands[name] = np.stack([mean - error, mean + error])
    return curves(
        bands, list((edges[1:] + edges[:-1]) / 2), "timestep (right: more noise)", "mean loss", caption=caption
    )


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
    figure, axes = new_plot(height=2.8, caption=caption)
    colored = [name for name in values if name not in neutral]
    found = dict(zip(colored, looks([way]) * len(colored) if way else looks(colored), strict=True))
    for place, (name, value) in enumerate(values.items()):
        numbers = np.atleast_1d(as_array(value))
        fill, dots = NEUTRAL if name in neutral else (found[name][0], found[name][0])
        axes.bar(place, numbers.mean(), color=fill, edgecolor=dots, width=0.6, alpha=1 if name in neutral else 0.6)
        above = (place, max(0, *numbers, numbers.mean()))
        mean = f"{numbers.mean():#.3g}".rstrip(".")
        axes.annotate(mean, above, xytext=(0, 5), textcoords="offset points", ha="center")
        if len(numbers) > 1:
            spread = np.linspace(-0.18, 0.18, len(numbers))
            axes.scatter(place + spread, numbers, color=dots, edgecolor="white", s=22, zorder=3)
    if reference:
        axes.axhline(reference[1], color="0.35", linestyle="--", linewidth=1.2, label=reference[0])
        _legend(axes)
    axes.set_xticks(range(len(values)), [textwrap.fill(name, 14) for name in values])
    axes.set_ylabel(ylabel)
    axes.margins(y=0.12)
    return figure


def forest(
    rows: Mapping[str, Any], xlabel: str = "", caption: str | None = None, reference: tuple[str, float] = ("", 0.0)
) -> Drawing:
    """Dots with whiskers: a dot at each mean, a whisker from low to high, the highest mean above, a line at zero, and
    the numbers folded below.

    Parameters
    ----------
    rows : dict of str to dict
        By name: "mean", "low" and "high". Or by group, which has a column of axes, and then by name, which may be
        missing in a group.
    reference : (str, float)
        A name and a value to compare with instead of zero, drawn as a dashed line; means below it are pale.
    """
    groups = {"": rows} if "mean" in next(iter(rows.values())) else rows
    means = {
        name: [group[name]["mean"] for group in groups.values() if name in group] for name in chain(*groups.values())
    }
    names = sorted(means, key=lambda name: -float(np.mean(means[name])))
    styles = looks(names) if len(groups) > 1 else [(COLORS[0], "-", "o")] * len(names)
    width = min(4, 0.6 + max(map(len, names)) / 12) + max(3, 2 * len(groups))
    figure, made = new_plot(width, 0.95 + 0.27 * len(names), caption, len(groups), sharey=True, sharex=True)
    places = np.atleast_1d(made)
    for axes, (title, group) in zip(places, groups.items(), strict=True):
        axes.axvline(reference[1], color="0.35", linestyle="--", linewidth=1.0, label=reference[0])
        for place, (name, (color, _, marker)) in enumerate(zip(names, styles, strict=True)):
            if row := group.get(name):
                look = {"color": color, "alpha": 0.4 if reference[0] and row["mean"] < reference[1] else 1.0}
                axes.hlines(place, row["low"], row["high"], linewidth=1.6, **look)
                axes.plot([row["mean"]], [place], marker=marker, markersize=7, linestyle="", **look)
        axes.set_title(textwrap.fill(title, 20))
        axes.tick_params(axis="y", length=0)
    _legend(places[0], bool(reference[0]))
    places[0].set_yticks(range(len(names)), [textwrap.fill(name, 44) for name in names])
    places[0].set_ylim(len(names) - 0.5, -0.5)
    places[len(groups) // 2].set_xlabel(xlabel)
    figure.below = _folded(groups, names)
    return figure


gains = forest
"""Its name where what is shown was gained."""


def ranked(
    values: Mapping[str, Any], xlabel: str = "", reference: tuple[str, float] = ("", 0.0), caption: str | None = None
) -> Drawing:
    """A `forest` of means with one standard error, from the values (n,) of each name."""
    spreads = {name: _mean_and_error(np.atleast_1d(as_array(numbers))) for name, numbers in values.items()}
    rows = {name: {"mean": mean, "low": mean - e, "high": mean + e} for name, (mean, e) in spreads.items()}
    return forest(rows, xlabel, caption, reference)


def _folded(groups: Mapping[str, Any], names: Sequence[str]) -> str:
    """The numbers of a forest as a table that opens on a click: a row for each name, a column for each group."""
    lines = [cells(["", *groups], "th")] if len(groups) > 1 else []
    for name in names:
        found = (group.get(name) for group in groups.values())
        said = ("{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row) if row else "" for row in found)
        lines.append(cells([name, *said]))
    return f"<details><summary>The numbers</summary>{html_table(lines)}</details>"


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
    figure, axes = new_plot(7.0 if many else 5.5, 3.8 if many else 3.4, caption)
    styles = dict(zip([*curves, *points], looks([*curves, *points]), strict=True))
    for name, line in curves.items():
        color, dash, marker = styles[name]
        axes.plot(*zip(*line, strict=True), color=color, linestyle=dash, label=name, marker=marker, markersize=4)
    for name, (x, y) in points.items():
        color, _, marker = styles[name]
        if each and name in each:
            axes.scatter(*zip(*each[name], strict=True), color=color, marker=marker, s=18, alpha=0.35, linewidths=0)
        if ranges and name in ranges:
            thin = {"color": color, "linewidth": 0.9, "alpha": 0.7}
            axes.hlines(y, *ranges[name][0], **thin)
            axes.vlines(x, *ranges[name][1], **thin)
        axes.plot([x], [y], color=color, label=name, marker=marker, markersize=8, linestyle="")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(axes, beside=many)
    return figure


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
    figure, axes = new_plot(6.2, 1.3 + 0.24 * len(table), caption, subplot_kw={"frame_on": False})
    shown = axes.imshow(table, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(table)), list(rows))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.tick_params(length=0)
    figure.colorbar(shown, ax=axes, label=label, aspect=12)
    return figure


def _legend(axes: Any, wanted: bool = True, beside: bool = False) -> None:
    """Above the axes, where it covers nothing, in two columns if the words are short; or beside them."""
    if wanted:
        short = max(map(len, axes.get_legend_handles_labels()[1])) <= 24 and not beside
        place = {"loc": "center left" if beside else "lower center", "bbox_to_anchor": (1, 0.5) if beside else (0.5, 1)}
        axes.legend(frameon=False, ncols=2 if short else 1, **place)


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error; not a number if there is no value."""
    return (values.mean(), values.std() / len(values) ** 0.5) if len(values) else (np.nan, np.nan)
