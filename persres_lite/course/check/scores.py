"""Checks for the exercises on scores and how sure they are (notebook 06)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from persres_lite.course.check.answers import call, exercise, random, require, same

SIDES = torch.tensor([-1.0, 1.0])


@exercise
def on_ruler(answer: Callable) -> str:
    """``answer(score, floor, ceiling)``, three numbers: 0 at the floor, 1 at the ceiling, a straight line between."""
    score, floor, ceiling = 0.7, 0.58, 0.9
    wrong = {
        "at the floor it should be 0: subtract the floor first": score / ceiling,
        "divide by the distance from floor to ceiling, not by the ceiling": (score - floor) / ceiling,
        "this is how much is missing to the ceiling": (ceiling - score) / (ceiling - floor),
        "this is still in units of the score: the ceiling should be at 1": score - floor,
    }
    found = call(answer, score, floor, ceiling)
    same(found, (score - floor) / (ceiling - floor), "the place on the ruler", mistakes=wrong)
    clipped = "do not clip it, because the line goes on beyond both ends"
    same(call(answer, 0.95, 0.5, 0.9), 1.125, "the place of a score above the ceiling", mistakes={clipped: 1.0})
    same(call(answer, 0.45, 0.5, 0.9), -0.125, "the place of a score below the floor", mistakes={clipped: 0.0})
    return "now scores of different encoders, and of different classes, can stand in one column."


@exercise
def diversity(answer: Callable) -> str:
    """``answer(features)``, (n, c), a row a picture, of any length: 1 - the mean cosine of all pairs."""
    features = random(4, 6) + 0.5
    unit = torch.nn.functional.normalize(features, dim=1)
    pairs = unit @ unit.T
    off = ~torch.eye(4, dtype=torch.bool)
    raw = features @ features.T
    wrong = {
        "a picture with itself is no pair": float(1 - pairs.mean()),
        "this is how alike they are, not how different": float(pairs[off].mean()),
        "give each row the length 1 first": float(1 - raw[off].mean()),
        "count the pairs without those of a picture with itself": float(1 - pairs[off].sum() / 16),
        "each pair is counted once above and twice below": float(1 - pairs[off].mean() / 2),
    }
    same(call(answer, features), float(1 - pairs[off].mean()), "the diversity", mistakes=wrong)
    same(call(answer, features[:1].repeat(3, 1)), 0.0, "the diversity of three copies", atol=1e-5)
    return "a method that copies its references has none, whatever its identity."


@exercise
def at_equal_leakage(answer: Callable) -> str:
    """``answer(leakage, leaks, scores)``, leaks (k,) increasing, scores (k,): the score where it leaks as much."""
    leaks, scores = torch.tensor([0.0, 0.04, 0.10, 0.16]), torch.tensor([0.50, 0.66, 0.78, 0.80])
    leakage = 0.06
    wrong = {
        "this is the nearest point of the curve, not the line between its neighbors": 0.66,
        "this draws one line from the first point to the last": 0.5 + 0.3 * leakage / 0.16,
        "the weights of the two neighbors are exchanged": 0.66 + 0.12 * 2 / 3,
        "this is the middle between the two neighbors, wherever the leakage lies": 0.72,
        "this is a leakage, not a score: the two axes are exchanged": 0.0,
    }
    same(call(answer, leakage, leaks, scores), 0.66 + 0.12 / 3, "the score at that leakage", mistakes=wrong)
    same(call(answer, 0.10, leaks, scores), 0.78, "the score at a point of the curve")
    return "subtract it from a method's own score: what is left is not bought with a weaker residual."


@exercise
def grouped_mean(answer: Callable) -> str:
    """``answer(groups)``, by concept and training lists of pictures' scores: each concept counts once, and within it
    each training.
    """
    groups = {"cat": {0: [0.9, 0.7, 0.8], 1: [0.4]}, "car": {0: [0.2]}}
    everything = [value for trainings in groups.values() for values in trainings.values() for value in values]
    wrong = {
        "this counts each picture once, so a concept with many pictures counts most": sum(everything) / 5,
        "this counts each training once; a concept with more trainings counts more": (0.8 + 0.4 + 0.2) / 3,
        "within a concept each training counts once, however many pictures it has": (2.8 / 4 + 0.2) / 2,
        "this is the sum over the concepts, not their mean": 0.6 + 0.2,
    }
    same(call(answer, groups), (0.6 + 0.2) / 2, "the mean", mistakes=wrong)
    return "and a bootstrap must draw again at the same three levels."


@exercise
def interval(answer: Callable) -> str:
    """``answer(means, level)``, means (n,) of the draws: the two ends (2,) between which that share of them lies."""
    means = random(2001) + 0.3 * random(2001, seed=1) ** 2  # skewed
    for level in (0.95, 0.5):
        low, high = means.quantile((1 - level) / 2), means.quantile((1 + level) / 2)
        right, spread = torch.stack([low, high]), 1.959964 * means.std()
        wrong = {
            "half of what is left out belongs to each side": means.quantile(torch.tensor([1 - level, level])),
            "these are the least and the greatest draw": torch.stack([means.min(), means.max()]),
            "the lower end comes first": right.flip(0),
            "this assumes a normal distribution: read the ends from the draws": means.mean() + spread * SIDES,
        }
        found = call(answer, means, level)
        if isinstance(found, (list, tuple)):
            found = torch.stack([torch.as_tensor(each) for each in found])
        require(len(getattr(found, "shape", ())) > 0, "the interval needs both ends, not one number.")
        same(found, right, f"the interval of level {level}", mistakes=wrong, atol=5e-3)
    return "if zero lies within it, the difference may be chance."
