"""Intervals, equal leakage, the ruler and diversity, against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from persres_lite.scores import at_equal_leakage, bootstrap, diversity, gain_at_equal_leakage, on_ruler, paired


def test_the_mean_counts_each_concept_once_whatever_it_has():
    groups = {"cat": {0: [1.0, 3.0], 1: [5.0]}, "car": {0: [0.0]}}  # cat: (2 + 5) / 2
    found = bootstrap(groups, draws=10)
    assert found.mean == pytest.approx((3.5 + 0) / 2)
    assert (found.concepts, found.trainings, found.pictures, found.better_in) == (2, 3, 4, 1)


def test_two_concepts_of_one_picture_give_the_three_means_that_can_be_drawn():
    """0 and 1, each drawn twice with replacement: 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4."""
    groups = {"cat": {0: [0.0]}, "car": {0: [1.0]}}
    wide = bootstrap(groups, draws=1000, level=0.95)
    assert (wide.low, wide.mean, wide.high) == (0.0, 0.5, 1.0)
    narrow = bootstrap(groups, draws=1000, level=0.4)  # from the 30th to the 70th of 100: within the middle half
    assert (narrow.low, narrow.high) == (0.5, 0.5)


@pytest.mark.parametrize(
    "groups",
    [
        {str(k): {0: [v]} for k, v in enumerate((-1, -1, 1, 1))},
        {"cat": {k: [v] for k, v in enumerate((-1, -1, 1, 1))}},
        {"cat": {0: (-1, -1, 1, 1)}},
    ],
)
def test_every_level_is_drawn_again(groups):
    """Of four equal numbers -1 and 1 drawn four times the variance is 1/4, at whatever level they differ."""
    found = bootstrap(groups, draws=1000, level=0.6827)  # about one standard deviation to each side
    assert (found.high - found.low) / 2 == pytest.approx(0.5, abs=0.01)  # the means are 0, ±1/2 and ±1


def test_what_all_pictures_of_a_training_share_widens_the_interval():
    trainings = {"cat": {k: [v] * 50 for k, v in enumerate((-1.0, 1.0, -1.0, 1.0))}}
    flat = bootstrap({"cat": {0: [v for values in trainings["cat"].values() for v in values]}}, draws=500)
    grouped = bootstrap(trainings, draws=500)
    assert grouped.mean == flat.mean == 0 and grouped.high - grouped.low > 4 * (flat.high - flat.low)


def test_pairs_take_away_what_both_share():
    noise = np.random.default_rng(0).normal(size=(3, 2, 8))
    first = {k: dict(enumerate(noise[k] + 0.1)) for k in range(3)}
    second = {k: dict(enumerate(noise[k])) for k in range(3)}
    found = bootstrap(paired(first, second), draws=50)
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_an_untrained_method_stands_beside_every_training():
    made = paired({"cat": {0: [1, 2], 1: [3, 4]}}, {"cat": {None: [1, 1]}})["cat"]
    assert made[0].tolist() == [0, 1] and made[1].tolist() == [2, 3]


@pytest.mark.parametrize("second", [{}, {"cat": {1: [1.0]}}, {"cat": {0: [1.0, 2.0]}}])
def test_what_has_no_partner_is_refused(second):
    with pytest.raises(ValueError, match="do not have the same pictures"):
        paired({"cat": {0: [1.0]}}, second)


def test_pictures_without_a_value_are_left_out_and_nothing_is_no_mean():
    assert bootstrap({"cat": {0: [1.0, math.nan]}, "car": {0: [math.nan]}}, draws=5).concepts == 1
    with pytest.raises(ValueError, match="not one value"):
        bootstrap({"cat": {0: [math.nan]}})


CURVE = [(0.0, 0.5), (0.1, 0.7), (0.2, 0.8)]


def test_equal_leakage_by_hand():
    assert at_equal_leakage(0.05, CURVE) == pytest.approx(0.6)
    assert at_equal_leakage(0.15, CURVE[::-1]) == pytest.approx(0.75)  # in any order
    assert at_equal_leakage(0.2, CURVE) == 0.8 and math.isnan(at_equal_leakage(0.21, CURVE))
    row = np.array([0.05, 0.63, *(x for point in CURVE for x in point)])
    assert gain_at_equal_leakage(row) == pytest.approx(0.03)


def test_the_curve_is_read_at_the_mean_of_the_pictures_not_at_each():
    """Leakage of two pictures 0 and 0.2, their scores 0.7: the mean leaks 0.1, where the curve has 0.7."""
    rows = [[leakage, 0.7, *(x for point in CURVE for x in point)] for leakage in (0.0, 0.2)]
    found = bootstrap({"cat": {0: rows}}, gain_at_equal_leakage, draws=5)
    assert found.mean == pytest.approx(0.0) and found.pictures == 2


def test_the_ruler_and_diversity_by_hand():
    assert on_ruler(0.7, 0.5, 0.9) == pytest.approx(0.5) and on_ruler(0.5, 0.5, 0.9) == 0
    assert math.isnan(on_ruler(0.5, 0.9, 0.9))
    assert diversity([[1, 0], [2, 0]]) == pytest.approx(0) and diversity([[1, 0], [0, 3]]) == pytest.approx(1)
    assert diversity([[1, 0], [1, 0], [0, 1]]) == pytest.approx(2 / 3)  # of three pairs one is equal
    with pytest.raises(ValueError, match="two pictures"):
        diversity([[1, 0]])
