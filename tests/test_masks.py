"""Rules that make masks of maps: by hand, by brute force, and their common promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from persres_lite.masks import (
    RULES,
    average,
    find_rule,
    make_mask,
    median,
    otsu,
    quantile,
    read_mask,
    refine,
    resize,
    soft,
    threshold,
)

HAND = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]]])  # (1, 2, 3)


def maps(batch=3, h=6, w=8, seed=0):
    return torch.rand(batch, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("median", {}, [[0, 0, 0], [1, 1, 1]]),
        ("median", {"inclusive": True}, [[0, 0, 1], [1, 1, 1]]),
        ("quantile", {"q": 0.5}, [[0, 0, 0], [1, 1, 1]]),
        ("quantile", {"q": 0.8}, [[0, 0, 0], [0, 0, 1]]),
        ("quantile", {"q": 0.0}, [[0, 1, 1], [1, 1, 1]]),
        ("threshold", {}, [[0, 0, 0], [0, 0, 1]]),  # above 1 + (9 - 1) / 2 = 5
        ("threshold", {"level": 0.2}, [[0, 0, 1], [1, 1, 1]]),  # above 2.6
        ("otsu", {}, [[0, 0, 0], [0, 0, 1]]),
    ],
)
def test_rules_by_hand(rule, options, expected):
    assert make_mask(HAND, rule, **options).tolist() == [expected]


@pytest.mark.parametrize("name", RULES)
def test_promises_of_every_rule(name):
    several = maps()
    before = several.clone()
    masks = RULES[name](several)
    assert masks.shape == several.shape and masks.dtype == several.dtype
    assert 0 <= masks.min() and masks.max() <= 1 and 0 < masks.mean() < 1
    assert torch.equal(several, before)
    for one, mask in zip(several, masks, strict=True):  # each map for itself
        torch.testing.assert_close(make_mask(one, name), mask)
    torch.testing.assert_close(RULES[name](several * 1e-3), masks, atol=1e-4, rtol=0)  # whatever the maps' scale
    brightest = several.flatten(1).argmax(1, keepdim=True)
    assert torch.equal(masks.flatten(1).gather(1, brightest)[:, 0], masks.flatten(1).amax(1))


@pytest.mark.parametrize(
    ("rule", "value"), [(median, 0), (quantile, 0), (threshold, 0), (otsu, 0), (soft, 0.5)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 1, 1), (1, 1, 3)])
def test_constant_maps(rule, value, shape):
    assert (rule(torch.full(shape, 0.3)) == value).all()
    if rule is median:
        assert (median(torch.full(shape, 0.3), inclusive=True) == 1).all()


def test_median_chooses_half_however_small_the_object_is():
    small = torch.zeros(1, 8, 8)
    small[0, 3, 3] = 1.0  # one position of 64
    noisy = small + 1e-3 * maps(1, 8, 8)
    assert median(noisy).sum() == 32
    assert otsu(noisy).sum() == 1


def test_otsu_is_the_best_cut_of_all():
    several = torch.cat([maps(4), maps(4, seed=1) ** 3])
    for one, mask in zip(several, otsu(several), strict=True):
        values = one.flatten().double()

        def spread(cut, values=values):
            above = values > cut
            share = above.double().mean()
            return (share * (1 - share) * (values[above].mean() - values[~above].mean()) ** 2).item()

        best = max(spread(cut) for cut in values.sort().values[:-1])
        assert spread(one[mask == 0].max().double()) == pytest.approx(best, rel=1e-5)


def test_soft_becomes_the_median_rule():
    several = maps()
    assert ((soft(several, sharpness=1e6) > 0.5).float() == median(several)).all()
    gentle, steep = soft(several, sharpness=1), soft(several, sharpness=10)
    assert ((steep - 0.5).abs() >= (gentle - 0.5).abs()).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_mask(HAND, "mean"), "Unknown mask rule 'mean': choose one of median, otsu, quantile, soft, th"),
        (lambda: make_mask(HAND, "otsu", q=0.5), "'otsu' has no option 'q': it has none"),
        (lambda: find_rule("quantile", level=1), "'quantile' has no option 'level': it has q"),
        (lambda: make_mask(HAND[0, 0]), r"Expected one map \(h, w\) or several \(B, h, w\), got the shape \(3,\)"),
        (lambda: average([]), "There is no map to average"),
        (lambda: read_mask(torch.zeros(4)), r"Expected a mask \(h, w\) or \(images, h, w\), got the shape \(4,\)"),
        (lambda: read_mask(torch.full((2, 2), 1.5)), "A mask must lie between 0 and 1"),
        (lambda: read_mask(torch.full((2, 2), torch.nan)), "A mask must lie between 0 and 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_function_of_ones_own():
    assert torch.equal(make_mask(HAND, lambda several, at: (several > at).float(), at=4), (HAND > 4).float())


@pytest.mark.parametrize(
    "drawn",
    [
        Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)),
        Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("RGB"),
        np.array([[0, 255], [255, 0]], dtype=np.uint8),
        np.array([[False, True], [True, False]]),
        torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
        torch.tensor([[0, 1], [1, 0]]),
        [[0.0, 1.0], [1.0, 0.0]],
    ],
    ids=["gray", "rgb", "bytes", "bool", "double", "int", "list"],
)
def test_masks_drawn_by_hand(drawn):
    assert torch.equal(read_mask(drawn), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_resize_and_average():
    corner = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(resize(corner, (2, 2)), corner)
    assert resize(torch.ones(1, 8, 4), (4, 2)).eq(1).all()
    checkered = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert resize(checkered, (1, 1)).item() == 0.5  # areas are averaged, not sampled
    assert resize(corner, (4, 4)).shape == (1, 4, 4)
    both = average([corner, torch.ones(1, 4, 4)])
    assert both.shape == (1, 4, 4)  # at the finest resolution
    torch.testing.assert_close(both, (resize(corner, (4, 4)) + 1) / 2)
    assert average([corner, torch.ones(1, 4, 4)], (2, 2)).shape == (1, 2, 2)


def test_refine_spreads_along_the_affinity():
    # Positions 0 and 1 attend to each other evenly, 2 and 3 likewise.
    pairs = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])[None]
    one = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert refine(one, pairs).tolist() == [[[0.5, 0.5], [0.0, 0.0]]]
    step = torch.softmax(torch.randn(2, 48, 48, generator=torch.Generator().manual_seed(0)), -1)
    several = maps(2)
    torch.testing.assert_close(refine(several, step, times=2), refine(refine(several, step), step))
    assert torch.equal(refine(several, step, times=0), several)
