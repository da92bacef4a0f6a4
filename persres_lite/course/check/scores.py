"""Checks for the exercises on scores and how sure they are (notebook 06)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from persres_lite.course.check.answers import exercise, random, require

LEAKS, RISING = torch.tensor([0.0, 0.04, 0.10, 0.16]), torch.tensor([0.50, 0.66, 0.78, 0.80])
UNSORTED = torch.tensor([0.80, 0.50, 0.66, 0.78])
NORMAL = torch.tensor([-1.959964, 1.959964])
SKEWED = random(2001) + 0.3 * random(2001, seed=1) ** 2


@exercise(
    [(0.7, 0.58, 0.9), (0.95, 0.5, 0.9), (0.45, 0.5, 0.9)],
    "now scores of different encoders, and of different classes, can stand in one column.",
)
def on_ruler(score, floor, ceiling):
    """0 at the floor, 1 at the ceiling, a straight line between and beyond."""
    right = (score - floor) / (ceiling - floor)
    return right, {
        "at the floor it should be 0: subtract the floor first": score / ceiling,
        "divide by the distance from floor to ceiling, not by the ceiling": (score - floor) / ceiling,
        "this is how much is missing to the ceiling": (ceiling - score) / (ceiling - floor),
        "this is still in units of the score: the ceiling should be at 1": score - floor,
        "do not clip it, because the line goes on beyond both ends": min(1.0, max(0.0, right)),
    }


@exercise(
    [(random(4, 6) + 0.5,), ((random(1, 6) + 0.5).repeat(3, 1),)],
    "a method that copies its references has none, whatever its identity.",
)
def diversity(features):
    """1 minus the mean cosine of all pairs of rows of features (n, c), which may have any length."""
    unit, n = normalize(features), len(features)
    pairs, different = unit @ unit.T, ~torch.eye(n, dtype=torch.bool)
    alike = pairs[different].mean()
    return 1 - alike, {
        "a picture with itself is no pair": 1 - pairs.mean(),
        "this is how alike they are, not how different": alike,
        "give each row the length 1 first": 1 - (features @ features.T)[different].mean(),
        "count the pairs without those of a picture with itself": 1 - alike * (n - 1) / n,
        "each pair is counted once above and twice below": 1 - alike / 2,
    }


@exercise(
    [(0.06, LEAKS, RISING), (0.10, LEAKS, RISING), (0.08, LEAKS, UNSORTED)],
    "subtract it from a method's own score: what is left is not bought with a weaker residual.",
)
def at_equal_leakage(leakage, leaks, scores):
    """The score where a curve leaks as much; leaks (k,) increasing, scores (k,)."""
    right, k = np.interp(leakage, leaks, scores), int((leaks < leakage).sum())
    neighbors = float(scores[k - 1] + scores[k])
    return right, {
        "this is the nearest point of the curve, not the line between its neighbors": scores[
            (leaks - leakage).abs().argmin()
        ],
        "this draws one line from the first point to the last": np.interp(leakage, leaks[[0, -1]], scores[[0, -1]]),
        "the weights of the two neighbors are exchanged": neighbors - right,
        "this is the middle between the two neighbors, wherever the leakage lies": neighbors / 2,
        "this is a leakage, not a score: the two axes are exchanged": np.interp(leakage, scores, leaks),
    }


@exercise(
    [({"cat": {0: [0.9, 0.7, 0.8], 1: [0.4]}, "car": {0: [0.2]}},)],
    "and a bootstrap must draw again at the same three levels.",
)
def grouped_mean(groups):
    """The mean of scores by concept and training: each concept counts once, and within it each training."""
    return (0.6 + 0.2) / 2, {
        "this counts each picture once, so a concept with many pictures counts most": 3.0 / 5,
        "this counts each training once; a concept with more trainings counts more": (0.8 + 0.4 + 0.2) / 3,
        "within a concept each training counts once, however many pictures it has": (2.8 / 4 + 0.2) / 2,
        "this is the sum over the concepts, not their mean": 0.6 + 0.2,
    }


def _ends(found, means, level):
    found = np.asarray([float(each) for each in found] if isinstance(found, list | tuple) else found)
    require(found.ndim > 0, "the interval needs both ends, not one number.")
    return found


@exercise(
    [(SKEWED, 0.95), (SKEWED, 0.5)], "if zero lies within it, the difference may be chance.", read=_ends, tolerance=5e-3
)
def interval(means, level):
    """The two ends between which that share of the means (n,) of the draws lies."""
    low, high = means.quantile((1 - level) / 2), means.quantile((1 + level) / 2)
    return (low, high), {
        "half of what is left out belongs to each side": (means.quantile(1 - level), means.quantile(level)),
        "these are the least and the greatest draw": (means.min(), means.max()),
        "the lower end comes first": (high, low),
        "this assumes a normal distribution: read the ends from the draws": means.mean() + NORMAL * means.std(),
    }
