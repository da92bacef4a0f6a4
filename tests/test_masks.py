"""Rules that make masks of maps: by hand, by brute force, and their common promises; and masks that somebody drew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from persres_lite.masks import RULES, average, disc, make_mask, median, otsu, quantile, read_mask, resize

HAND = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]]])  # (1, 2, 3)


def maps(batch=3, h=6, w=8, seed=0):
    return torch.rand(batch, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("median", {}, [[0, 0, 0], [1, 1, 1]]),
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
    assert (RULES[name](torch.full((2, 4, 4), 0.3)) == (0.5 if name == "soft" else 0)).all()  # a constant map


@pytest.mark.parametrize("shape", [(6, 8), (5, 5)], ids=["even", "odd"])
def test_ranks_choose_what_the_numbers_choose_where_none_are_equal(shape):
    several = maps(4, *shape)
    flat = several.flatten(1)
    middle = flat.median(1).values[:, None, None]
    assert torch.equal(median(several), (several > middle).float())
    for q in (0.0, 0.25, 0.29, 0.75, 0.8, 1.0):
        level = flat.double().quantile(q, dim=1)[:, None, None]
        assert torch.equal(quantile(several, q=q), (several.double() > level + 1e-12).float())


def test_equal_values_are_told_apart_by_their_place_but_for_the_least():
    assert median(torch.tensor([[[1.0, 2, 2], [2, 2, 2]]])).tolist() == [[[0, 1, 1], [1, 0, 0]]]
    assert median(torch.tensor([[[0.0, 0, 0], [0, 0, 2]]])).tolist() == [[[0, 0, 0], [0, 0, 1]]]
    assert otsu(torch.tensor([[[1.0, 2, 2], [2, 2, 2]]])).tolist() == [[[0, 1, 1], [1, 1, 1]]]


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_mask(HAND, "mean"), "'mean'.* median, otsu, quantile, soft, threshold"),
        (lambda: make_mask(HAND, "quantile", q=75), "from 0 to 1, not 75"),
    ],
)
def test_rules_and_options_that_are_not_there(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_function_of_ones_own():
    assert torch.equal(make_mask(HAND, lambda several, at: (several > at).float(), at=4), (HAND > 4).float())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(16, 16), (6, 9)])
def test_a_disc_takes_its_share_of_the_positions_the_nearest_ones(shape, share):
    mask = disc(shape, share)
    assert mask.shape == shape and mask.sum() == round(share * mask.numel())
    y, x = (torch.arange(side) - (side - 1) / 2 for side in shape)
    radius = (y[:, None] ** 2 + x**2).sqrt()
    if 0 < share < 1:
        assert radius[mask == 1].max() <= radius[mask == 0].min() + 1e-6


# Masks that somebody drew

BYTES = np.array([[0, 255], [255, 0]], dtype=np.uint8)
COLORS = np.stack([BYTES] * 3, -1)
PHOTO = np.array([[[200, 30, 30], [90, 160, 20]], [[20, 60, 220], [10, 10, 10]]], dtype=np.uint8)
RED = np.where(BYTES[..., None] > 0, np.array([255, 0, 0]), 255).astype(np.uint8)  # on white


def with_alpha(colors, alpha=BYTES):
    return Image.fromarray(np.dstack([colors, alpha]))


def palette():
    image = Image.fromarray(BYTES // 255).convert("P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.putdata([0, 1, 1, 0])
    return image


@pytest.mark.parametrize(
    "drawn",
    [
        Image.fromarray(BYTES),
        Image.fromarray(BYTES).convert("1"),
        Image.fromarray(COLORS),
        Image.fromarray(BYTES // 255),
        Image.fromarray(BYTES.astype(np.uint16) * 257),
        palette(),
        with_alpha(PHOTO),
        with_alpha(np.zeros_like(COLORS)),
        with_alpha(COLORS, np.full_like(BYTES, 255)),
        BYTES,
        BYTES > 0,
        torch.tensor(BYTES / 255).bfloat16(),
    ],
    ids="gray|1 bit|rgb|0 and 1|16 bit|palette|cut-out|black strokes|opaque|bytes|bool|half".split("|"),
)
def test_masks_drawn_by_hand(drawn, tmp_path):
    right = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert torch.equal(read_mask(drawn), right)
    if isinstance(drawn, Image.Image):
        drawn.save(tmp_path / "mask.png")
        assert torch.equal(read_mask([tmp_path / "mask.png", str(tmp_path / "mask.png")]), torch.stack([right, right]))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (Image.fromarray(RED), "has colors.* white on black"),
        (Image.fromarray(PHOTO), "has colors"),
        (Image.fromarray(BYTES // 50), "to 5, where white is 255: paint the object white on black"),
        (torch.full((2, 2), 1.5), "numbers from 0 to 1"),
        (torch.tensor([[0.0, torch.nan]]), "nan.* numbers from 0 to 1"),
    ],
    ids=["red on white", "photograph", "labels", "beyond", "NaN"],
)
def test_masks_that_may_mean_several_things_are_refused(drawn, message):
    with pytest.raises(ValueError, match=message):
        read_mask(drawn)


def test_resize_and_average():
    corner = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(resize(corner, (2, 2)), corner)
    assert resize(torch.ones(2, 3, 8, 4), (4, 2)).eq(1).all()
    checkered = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert resize(checkered, (1, 1)).item() == 0.5  # areas are averaged, not sampled
    assert resize(corner, (4, 4)).shape == (1, 4, 4)
    both = average([corner, torch.ones(1, 4, 4)])
    assert both.shape == (1, 4, 4)  # at the finest resolution
    torch.testing.assert_close(both, (resize(corner, (4, 4)) + 1) / 2)
    assert average([corner, torch.ones(1, 4, 4)], (2, 2)).shape == (1, 2, 2)
