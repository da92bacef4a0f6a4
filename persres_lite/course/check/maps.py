"""Checks for the exercises on attention maps, masks and the blend (notebooks 04 and 05)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from persres_lite.course.check.answers import call, exercise, random, same


@exercise
def attention_map(answer: Callable) -> str:
    """``answer(q, k, tokens)``, q (heads, HW, d), k (heads, T, d): the map of the tokens, (HW,), mean of heads."""
    q, k, tokens = random(2, 6, 8), random(2, 5, 8, seed=1), [1, 3]
    logits = q @ k.transpose(-1, -2)  # (heads, HW, T)
    weights = (logits / 8**0.5).softmax(-1)
    wrong = {
        "divide by the square root of d_k before the softmax": logits.softmax(-1)[..., tokens].sum(-1).mean(0),
        "the softmax runs over the tokens, not over the positions": (logits / 8**0.5)
        .softmax(1)[..., tokens]
        .sum(-1)
        .mean(0),
        "the tokens are summed, not averaged": weights[..., tokens].mean(-1).mean(0),
        "the heads are averaged, not summed": weights[..., tokens].sum(-1).sum(0),
        "only the first token is counted": weights[..., 1].mean(0),
    }
    table = "this makes the table of all weights, (HW, T): give the kernel a v with one column."
    forbidden = {"softmax": "this calls softmax: scaled_dot_product_attention does it inside.", "6 x 5": table}
    found = call(answer, q, k, tokens, forbidden=forbidden)
    same(found, weights[..., tokens].sum(-1).mean(0), "the map", mistakes=wrong)
    return "at every position the weights of all tokens add up to one."


@exercise
def iou(answer: Callable) -> str:
    """``answer(mask, truth)`` for boolean tensors (h, w): intersection over union."""
    mask, truth = random(8, 7) > 0.3, random(8, 7, seed=1) > -0.2
    both, either = (mask & truth).sum(), (mask | truth).sum()
    wrong = {
        "this divides by the size of the mask, not of the union": both / mask.sum(),
        "this divides by the size of the truth, not of the union": both / truth.sum(),
        "this divides by the size of the picture, not of the union": both / mask.numel(),
        "this counts where they agree, background included": (mask == truth).float().mean(),
        "the union is counted with the intersection twice": both / (mask.sum() + truth.sum()),
    }
    same(
        call(answer, mask, truth),
        float(both / either),
        "the intersection over union",
        mistakes={s: float(v) for s, v in wrong.items()},
    )
    same(call(answer, truth, truth), 1.0, "the value for two equal masks")
    return "equal masks give one, masks that do not touch give zero."


@exercise
def best_cut(answer: Callable) -> str:
    """``answer(map, truth)``, a map (h, w), a boolean truth (h, w): the highest IoU of all masks ``map >= value``."""
    truth = torch.zeros(6, 6, dtype=torch.bool)
    truth[1:4, 1:5] = True
    for noise in (0.6, 1.5):
        attention = truth + noise * random(6, 6, seed=3)
        cuts = [attention >= level for level in attention.unique()]
        values = [float((mask & truth).sum() / (mask | truth).sum()) for mask in cuts]
        half = attention > attention.median()
        wrong = {
            "this is the mask at the true area; another size can fit better": values[-int(truth.sum())],
            "this is the mask at the median; try every value of the map": float(
                (half & truth).sum() / (half | truth).sum()
            ),
            "this is the threshold, or its place, not the IoU that it reaches": float(
                attention.unique()[values.index(max(values))]
            ),
        }
        same(call(answer, attention, truth), max(values), "the best IoU", mistakes=wrong)
    return "no rule that cuts this map at one level can do better."


@exercise
def median_mask(answer: Callable) -> str:
    """``answer(maps)`` with maps (B, h, w): 1 where a map is above its own median (torch's, the lower one), else 0."""
    maps = torch.stack([random(4, 4).abs(), 10 + random(4, 4, seed=1)])
    flat = maps.flatten(1)
    right = (maps > flat.median(1).values[:, None, None]).float()
    wrong = {
        "every map of the batch has its own median": (maps > maps.median()).float(),
        "this is the mean, not the median": (maps > flat.mean(1)[:, None, None]).float(),
        "the mask is 1 where the map is high, not where it is low": 1 - right,
        "1 belongs above the median: the comparison is the other way round": (
            maps < flat.median(1).values[:, None, None]
        ).float(),
        "a position at the median itself stays outside": (maps >= flat.median(1).values[:, None, None]).float(),
    }
    same(call(answer, maps), right, "the mask", mistakes=wrong)
    even = torch.tensor([[[1.0, 2.0], [2.0, 3.0]]])  # two positions have the median's value
    wrong = {"a position at the median itself stays outside": (even >= 2).float()}
    same(call(answer, even), (even > 2).float(), "the mask of a map with equal values", mistakes=wrong)
    return "half of the positions, however small the object is."


@exercise
def otsu(answer: Callable) -> str:
    """``answer(values)`` with a tensor (n,): the mask (n,) of the split with most variance between its classes."""
    for values, right in (
        (  # here every rule that is taken for Otsu's cuts at a place of its own
            torch.tensor([0.0, 0.1, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 2.0]),
            torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1, 1]),
        ),
        (torch.tensor([0.0, 0.1, 0.05, 0.9, 1.0]), torch.tensor([0.0, 0, 0, 1, 1])),
        (torch.tensor([0.2, 0.21, 0.19, 0.2, 0.22, 0.95]), torch.tensor([0.0, 0, 0, 0, 0, 1])),
        (torch.tensor([0.0, 0.05, 0.1, 0.15, 0.3, 0.45, 0.9, 1.0]), torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1])),
        (torch.arange(8) / 10, torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1])),
        (torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.1]), torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 1])),
    ):
        wrong = {
            "this is the split at the median": (values > values.median()).float(),
            "this is the split at the mean of all values": (values > values.mean()).float(),
            "the high class should be 1": 1 - right,
            "this is the split in the middle between the least and the greatest": (
                values > (values.min() + values.max()) / 2
            ).float(),
            "without the shares one outlier wins: weight by w_0 w_1": _widest(values),
        }
        same(call(answer, values), right, "the mask", mistakes=wrong)
    return "the split follows the values, so a small object gets a small mask."


def _widest(values: torch.Tensor) -> torch.Tensor:
    """The split whose classes have means farthest apart."""
    cuts = [values > cut for cut in values.unique()[:-1]]
    return max(cuts, key=lambda high: float(values[high].mean() - values[~high].mean())).float()


@exercise
def quantile_mask(answer: Callable) -> str:
    """``answer(map, share)`` with a map (h, w): 1 for the `share` of positions with the highest values, else 0."""
    for heat, share, count in (
        (random(4, 5), 0.25, 5),
        (random(4, 5), 0.5, 10),
        (random(4, 5), 0.1, 2),
        (random(3, 7), 0.25, 5),  # here a position has the quantile's own value
    ):
        order = heat.flatten().sort(descending=True)
        right = (heat >= order.values[count - 1]).float()
        wrong = {
            "these are the lowest values": (heat <= heat.flatten().sort().values[count - 1]).float(),
            "the share lies above the quantile, so take the quantile of 1 - share": (
                heat > heat.quantile(share)
            ).float(),
            "the position at the quantile itself stays outside": (heat >= heat.quantile(1 - share)).float(),
            "this is a share of the highest value, not of the positions": (heat > share * heat.max()).float(),
        }
        same(call(answer, heat, share), right, f"the mask for {share}", mistakes=wrong)
    return "a quantile chooses the size of the mask; the median is the quantile of one half."


@exercise
def blend(answer: Callable) -> str:
    """``answer(f, f_residual, mask)`` with f (B, C, h, w), mask (B, h, w): (1 - M) f + M f'."""
    original, changed, mask = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), (random(2, 4, 4, seed=2) > 0).float()
    right = torch.where(mask[:, None] > 0, changed, original)
    wrong = {
        "mask and 1 - mask are exchanged": torch.where(mask[:, None] > 0, original, changed),
        "where the mask is 1 only f' remains: f is counted too": original + mask[:, None] * changed,
        "outside the mask f remains, not zero": mask[:, None] * changed,
    }
    same(call(answer, original, changed, mask), right, "the blend", mistakes=wrong)
    soft = "a mask may lie between 0 and 1: multiply by it instead of cutting it at one half"
    half, also = torch.full_like(mask, 0.5), f"{soft} or above"
    wrong = {soft: original, also: changed}
    what = "the blend with a mask of one half everywhere"
    same(call(answer, original, changed, half), (original + changed) / 2, what, mistakes=wrong)
    return "mask 0 is the original model, mask 1 the plain residual, and nothing is computed twice."


@exercise
def weights(answer: Callable) -> str:
    """``answer(masks)`` with masks (concepts, h, w) in [0, 1]: weights (concepts, h, w) that sum to at most one."""
    masks = torch.tensor([[[1.0, 1.0, 0.0, 0.4]], [[0.0, 1.0, 0.0, 0.2]]])
    right = masks / masks.sum(0).clamp(min=1)
    wrong = {
        "only where masks overlap is something shared out: a weight of 0.4 alone stays 0.4": torch.nan_to_num(
            masks / masks.sum(0)
        ),
        "a single mask keeps its whole weight": masks / 2,
        "where both masks are 1 the weights still sum to 2": masks,
        "add up the concepts at each position, not the positions of a mask": masks / masks.sum((1, 2), keepdim=True),
    }
    same(call(answer, masks), right, "what your function returns", mistakes=wrong)
    return "where two concepts claim a position, each gets half."


@exercise
def background_distance(answer: Callable) -> str:
    """``answer(a, b, mask)``, pictures (3, h, w), a boolean mask (h, w): mean absolute difference outside the mask."""
    a, b, mask = random(3, 4, 4), random(3, 4, 4, seed=1), random(4, 4, seed=2) > 0
    difference = (a - b).abs()
    wrong = {
        "this looks inside the mask": float(difference[:, mask].mean()),
        "the object is not left out": float(difference.mean()),
        "the mean is over the background's positions only": float((difference * ~mask).mean()),
        "this is the squared difference": float(((a - b) ** 2)[:, ~mask].mean()),
    }
    same(call(answer, a, b, mask), float(difference[:, ~mask].mean()), "the distance", mistakes=wrong)
    return "zero means that the background is the original model's, number by number."
