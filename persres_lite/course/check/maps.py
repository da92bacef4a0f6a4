"""Checks for the exercises on attention maps, masks and the blend (notebooks 04 and 05)."""

from __future__ import annotations

import torch

from persres_lite.course.check.answers import exercise, random

MASK, TRUTH, BOX = random(8, 7) > 0.3, random(8, 7, seed=1) > -0.2, torch.zeros(6, 6, dtype=torch.bool)
BOX[1:4, 1:5] = True
HEAT = BOX + 0.6 * random(6, 6, seed=3)
F, CHANGED, HERE = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), (random(2, 4, 4, seed=2) > 0).float()


@exercise(
    [(random(2, 6, 8), random(2, 5, 8, seed=1), [1, 3])],
    "at every position the weights of all tokens add up to one.",
    forbidden={
        "softmax": "this calls softmax: scaled_dot_product_attention does it inside.",
        "6 x 5": "this makes the table of all weights, (HW, T): give the kernel a v with one column.",
    },
)
def attention_map(q, k, tokens):
    """The map of the tokens, (HW,), mean of heads, from q (heads, HW, d) and k (heads, T, d)."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (heads, HW, T)
    summed = weights[..., tokens].sum(-1)  # (heads, HW)
    return summed.mean(0), {
        "the tokens are summed, not averaged": summed.mean(0) / len(tokens),
        "the heads are averaged, not summed": summed.sum(0),
        "only the first token is counted": weights[..., tokens[0]].mean(0),
    }


def _iou(mask, truth):
    return float((mask & truth).sum() / (mask | truth).sum())


@exercise([(MASK, TRUTH), (TRUTH, TRUTH)], "equal masks give one, masks that do not touch give zero.")
def iou(mask, truth):
    """Intersection over union of boolean tensors (h, w)."""
    both = (mask & truth).sum()
    return _iou(mask, truth), {
        "this divides by the size of the mask, not of the union": both / mask.sum(),
        "this divides by the size of the truth, not of the union": both / truth.sum(),
        "this counts where they agree, background included": (mask == truth).float().mean(),
        "the union is counted with the intersection twice": both / (mask.sum() + truth.sum()),
    }


@exercise(
    # in the last map nearly all values lie close to zero
    [(HEAT, BOX), (BOX + 1.5 * random(6, 6, seed=3), BOX), ((9 * HEAT).exp(), BOX)],
    "no rule that cuts this map at one level can do better.",
)
def best_cut(attention, truth):
    """The highest IoU with a boolean truth (h, w) of all masks ``map >= value``."""
    best, level = max((_iou(attention >= value, truth), value) for value in attention.unique())
    spaced = torch.linspace(float(attention.min()), float(attention.max()), 100)
    area = attention.flatten().topk(int(truth.sum())).values[-1]
    return best, {
        "this is the mask at the true area; another size can fit better": _iou(attention >= area, truth),
        "this is the mask at the median; try every value of the map": _iou(attention > attention.median(), truth),
        "this is the threshold, or its place, not the IoU that it reaches": level,
        "evenly spaced thresholds miss the best one: try every value of the map": max(
            _iou(attention >= value, truth) for value in spaced
        ),
    }


@exercise(
    # in the second map two positions have the median's value
    [(torch.stack([random(4, 4).abs(), 10 + random(4, 4, seed=1)]),), (torch.tensor([[[1.0, 2.0], [2.0, 3.0]]]),)],
    "half of the positions, however small the object is.",
)
def median_mask(maps):
    """1 where one of the maps (B, h, w) is above its own median, of two middle values the lower one, else 0."""
    median = maps.flatten(1).median(1).values[:, None, None]
    return maps > median, {
        "every map of the batch has its own median": maps > maps.median(),
        "this is the mean, not the median": maps > maps.mean((1, 2), keepdim=True),
        "1 belongs above the median: the comparison is the other way round": maps < median,
        "a position at the median itself stays outside": maps >= median,
    }


OTSU = [  # for the first, every mistake cuts at a place of its own
    [0.0, 0.1, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 2.0],
    [0.0, 0.1, 0.05, 0.9, 1.0],
    [0.2, 0.21, 0.19, 0.2, 0.22, 0.95],
    [0.0, 0.05, 0.1, 0.15, 0.3, 0.45, 0.9, 1.0],
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.1],
]


@exercise(
    [(torch.tensor(values),) for values in OTSU], "the split follows the values, so a small object gets a small mask."
)
def otsu(values):
    """The mask of the split of values (n,) with most variance between its classes."""
    cuts = [values > cut for cut in values.unique()[:-1]]
    apart = torch.stack([values[high].mean() - values[~high].mean() for high in cuts])
    shares = torch.stack([high.float().mean() for high in cuts])
    right = cuts[(shares * (1 - shares) * apart**2).argmax()]
    return right, {
        "this is the split at the median": values > values.median(),
        "this is the split at the mean of all values": values > values.mean(),
        "this is the split in the middle between the least and the greatest": values
        > (values.min() + values.max()) / 2,
        "without the shares one outlier wins: weight by w_0 w_1": cuts[apart.argmax()],
    }


@exercise(
    # in the last map a position has the quantile's own value
    [*((random(4, 5), share) for share in (0.25, 0.5, 0.1)), (random(3, 7), 0.25)],
    "a quantile chooses the size of the mask; the median is the quantile of one half.",
)
def quantile_mask(heat, share):
    """1 for the `share` of a map's positions with the highest values, else 0."""
    return heat > heat.quantile(1 - share), {
        "these are the lowest values": heat < heat.quantile(share),
        "the share lies above the quantile, so take the quantile of 1 - share": heat > heat.quantile(share),
        "the position at the quantile itself stays outside": heat >= heat.quantile(1 - share),
        "this is a share of the highest value, not of the positions": heat > share * heat.max(),
    }


@exercise(
    [(F, CHANGED, HERE), (F, CHANGED, torch.full_like(HERE, 0.5))],
    "mask 0 is the original model, mask 1 the plain residual, and nothing is computed twice.",
)
def blend(f, f_residual, mask):
    """(1 - M) f + M f' for f (B, C, h, w) and a mask (B, h, w)."""
    m = mask[:, None]
    return (1 - m) * f + m * f_residual, {
        "mask and 1 - mask are exchanged": m * f + (1 - m) * f_residual,
        "where the mask is 1 only f' remains: f is counted too": f + m * f_residual,
        "outside the mask f remains, not zero": m * f_residual,
        "a mask may lie between 0 and 1: multiply by it instead of cutting it": torch.where(m > 0.5, f_residual, f),
    }


@exercise(
    [(torch.tensor([[[1.0, 1.0, 0.0, 0.4]], [[0.0, 1.0, 0.0, 0.2]]]),)],
    "where two concepts claim a position, each gets half.",
)
def weights(masks):
    """Weights that sum to at most one, of masks (concepts, h, w) in [0, 1]."""
    alone = torch.nan_to_num(masks / masks.sum(0))
    return masks / masks.sum(0).clamp(min=1), {
        "only where masks overlap is something shared out: a weight of 0.4 alone stays 0.4": alone,
        "a single mask keeps its whole weight": masks / 2,
        "where both masks are 1 the weights still sum to 2": masks,
    }


@exercise(
    [(random(3, 4, 4), random(3, 4, 4, seed=1), random(4, 4, seed=2) > 0)],
    "zero means that the background is the original model's, number by number.",
)
def background_distance(a, b, mask):
    """The mean absolute difference of pictures (3, h, w) outside a boolean mask (h, w)."""
    apart = (a - b).abs()
    return apart[:, ~mask].mean(), {
        "this looks inside the mask": apart[:, mask].mean(),
        "the mean is over the background's positions only": (apart * ~mask).mean(),
        "this is the squared difference": (apart[:, ~mask] ** 2).mean(),
    }
