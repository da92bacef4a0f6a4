"""Numbers made of scores: how sure a mean is, what a score is worth, and methods compared at equal leakage.

Everything here is arithmetic on arrays; `evaluation` has the scores of pictures themselves. Rows of an evaluation are
grouped as they were made: pictures belong to a training, trainings to a concept. Two pictures of one training are more
alike than two of different trainings, so an interval that counts all pictures as independent is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: By concept, then by training: one value a picture, or one row of values.
Groups = Mapping[Any, Mapping[Any, Sequence[Any] | np.ndarray]]


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes
    ----------
    mean, low, high : float
        The estimate and the ends of its interval.
    concepts, trainings, pictures : int
        Of how many: n at each level.
    better_in : int
        In how many concepts the mean is above zero; for a difference, in how many the first method is ahead.
    """

    mean: float
    low: float
    high: float
    concepts: int
    trainings: int
    pictures: int
    better_in: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(first: Groups, second: Groups) -> dict[Any, dict[Any, np.ndarray]]:
    """first - second, picture by picture: both from the same concept, training, prompt and noise.

    Parameters
    ----------
    first : dict of dict of list
        By concept and training, the pictures in the same order in both.
    second : dict of dict of list
        A method that is not trained has one training, None, which stands beside every training of the first.

    Raises
    ------
    ValueError
        If a concept, a training or a picture of the first is missing in the second.
    """
    result: dict[Any, dict[Any, np.ndarray]] = {concept: {} for concept in first}
    for concept, trainings in first.items():
        for training, values in trainings.items():
            others = second.get(concept, {})
            other = others.get(training, others.get(None))
            if other is None or len(other) != len(values):
                raise ValueError(f"{concept}, training {training}: the two methods do not have the same pictures.")
            result[concept][training] = np.asarray(values, dtype=float) - np.asarray(other, dtype=float)
    return result


def bootstrap(
    groups: Groups, statistic: Any = None, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The mean over concepts of means over trainings of means over pictures, and its percentile interval.

    In each draw concepts are drawn with replacement, then of each the trainings, then of each the pictures: as many as
    there are. What was not repeated cannot be seen to vary: with one training a concept, the interval leaves out how
    much trainings differ, and the table that shows n = 1 says so.

    Parameters
    ----------
    groups : dict of dict of list
        By concept and training: (pictures,) values, or (pictures, columns). A picture without a value is NaN.
    statistic : callable, optional
        Makes one number of the means over a training's pictures, (columns,); needed for rows of several columns.
    draws : int
        How many times everything is drawn anew.
    level : float
        How much of the draws lies within the interval.
    seed : int
        Of the draws.

    Raises
    ------
    ValueError
        If there are no values at all.
    """
    concepts = [[np.asarray(values, dtype=float) for values in trainings.values()] for trainings in groups.values()]
    if not any(np.isfinite(values).any() for trainings in concepts for values in trainings):
        raise ValueError("There is not one value to take a mean of.")
    generator = np.random.default_rng(seed)

    def again(items: Any) -> Any:
        drawn = generator.integers(0, len(items), len(items))
        return items[drawn] if isinstance(items, np.ndarray) else [items[index] for index in drawn]

    def of_training(values: np.ndarray) -> float:
        known = values[np.isfinite(values).reshape(len(values), -1).all(1)]
        return float((statistic or float)(known.mean(0))) if len(known) else math.nan

    def of_concept(trainings: Any, pick: Callable[[Any], Any] = lambda items: items) -> float:
        return _mean([of_training(pick(values)) for values in pick(trainings)])

    # By hand: scipy's bootstrap draws one level, and here a picture belongs to a training, a training to a concept.
    means = [_mean([of_concept(trainings, again) for trainings in again(concepts)]) for _ in range(draws)]
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    found = [of_concept(trainings) for trainings in concepts]
    counted = [trainings for trainings, mean in zip(concepts, found, strict=True) if not math.isnan(mean)]
    trainings = [training for concept in counted for training in concept]
    better = sum(mean > 0 for mean in found)
    numbers = len(counted), len(trainings), sum(map(len, trainings)), better
    return Interval(_mean(found), float(low), float(high), *numbers)


def at_equal_leakage(leakage: float, curve: Sequence[tuple[float, float]]) -> float:
    """The score that a method has on its scale curve where it leaks as much, between the points by a straight line.

    Less of a residual changes less of the background, too, so a method that leaks less may only be a weaker one. A fair
    question is: turned down until it leaks as much, which score has the other method left?

    Parameters
    ----------
    leakage : float
        Of the method that is compared.
    curve : list of (leakage, score)
        Of the other method, at several scales, best from 0 (the original model, without leakage) to beyond 1.

    Returns
    -------
    float
        NaN if the curve does not reach that leakage: then there is nothing to compare with.
    """
    points, scores = np.array(sorted(curve), dtype=float).T
    return float(np.interp(leakage, points, scores, left=math.nan, right=math.nan))


def gain_at_equal_leakage(means: np.ndarray) -> float:
    """A statistic for `bootstrap`: a method's score minus that of a curve at the same leakage.

    Parameters
    ----------
    means : array (2 + 2 k,)
        Leakage and score of the method, then of the k points of the curve in turn.
    """
    (leakage, score), *curve = means.reshape(-1, 2).tolist()
    return score - at_equal_leakage(leakage, [(x, y) for x, y in curve])


def on_ruler(score: float, floor: float, ceiling: float) -> float:
    """Where a score stands between floor (0) and ceiling (1): 0.62 alone says nothing.

    The floor is what another object of the class gets, the ceiling what pictures of the concept itself get that were
    kept out of the training. NaN if the ceiling is not above the floor: then the score cannot tell them apart.
    """
    return (score - floor) / (ceiling - floor) if ceiling > floor else math.nan


def diversity(features: Any) -> float:
    """1 - the mean cosine of all pairs: 0 for copies of one picture.

    Parameters
    ----------
    features : array or tensor (n, c)
        Of n pictures of one prompt, at least two.

    Raises
    ------
    ValueError
        If there are fewer than two.
    """
    vectors = np.asarray(features, dtype=float)
    if len(vectors) < 2:
        raise ValueError("Diversity needs at least two pictures of a prompt.")
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return float(1 - (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)].mean())


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
