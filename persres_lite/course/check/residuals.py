"""Checks for the exercises on residuals and on training them (notebooks 02 and 03)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import linear

from persres_lite.course.check.answers import exercise, pair, random, require

SQUARE, A, B, BIAS = random(6, 6), random(6, 2, seed=1), random(2, 6, seed=2), random(6, seed=3)
CONCENTRATED = torch.linalg.svd(SQUARE)[0] * torch.tensor([8.0, 2.0, 2.0, 2.0, 2.0, 1.0]) @ torch.linalg.svd(SQUARE)[2]
BY_HAND = "this lets autograd compute the gradients: write them by hand."


@exercise(
    [(random(2, 5, 6), SQUARE, BIAS, A, B)],
    "W x + A (B x) is the same as (W + A B) x, and never needs the m x m matrix.",
    forbidden={"6 x 6": "this forms an m x m matrix: begin with B x."},
)
def residual_linear(x, weight, bias, a, b):
    """(W + A B) x + bias for each of the N positions of x (batch, N, m)."""
    return linear(x, weight + a @ b, bias), {
        "the residual is missing": linear(x, weight, bias),
        "A and B are exchanged": linear(x, weight, bias) + x @ a @ b,
        "the bias belongs to W alone: it is counted twice": linear(x, weight + a @ b, 2 * bias),
        "x is a row here, so the weights are transposed: x @ W.T": x @ (weight + a @ b) + bias,
    }


@exercise(
    [([50, 90, 90], 0.03), ([40, 110, 320], 0.03), ([320], 0.05), ([320] * 5 + [640] * 5 + [1280] * 6, 0.05)],
    "1,239,040 for the sixteen layers of Stable Diffusion 1.4.",
    tolerance=1e-9,
)
def parameter_count(widths, fraction):
    """How many numbers the residuals of layers of these widths hold together."""
    widths = np.array(widths)
    ranks = fraction * widths
    right = 2 * widths @ ranks.round()
    return right, {
        "this counts only one of the two matrices": right / 2,
        "this counts the full matrices": widths @ widths,
        "a rank is a whole number: round it": 2 * widths @ ranks,
        "the ranks are rounded down; take the nearest": 2 * widths @ np.floor(ranks),
    }


@exercise(
    [(random(6, 6, 1, 1), A, B, scale) for scale in (1.0, 0.5, 0.0)],
    "after merging, sampling costs exactly what it did, and nothing is left that a mask could act on.",
)
def merge(weight, a, b, scale):
    """A convolution's weight W (m, m, 1, 1) with `scale` times the residual merged in."""
    full = (a @ b)[:, :, None, None]
    wrong = {"the scale is missing": weight + full, "the scale belongs to A B, not to W": scale * (weight + full)}
    return weight + scale * full, wrong


def _product(found, matrix, rank):
    first, second = pair(found, "A and B")
    fits = np.shape(first) == (6, rank) and np.shape(second) == (rank, 6)
    require(fits, f"A and B should have the shapes (6, {rank}) and ({rank}, 6).")
    return first @ second


@exercise([(SQUARE, 1), (SQUARE, 3)], "no other matrix of that rank is nearer to dW.", read=_product)
def truncated(matrix, rank):
    """Factors A (m, r) and B (r, m) whose product is the nearest to dW (m, m) at that rank."""
    left, values, right = torch.linalg.svd(matrix)
    scaled = left * values
    return (scaled[:, :rank], right[:rank]), {
        "the singular values are missing": (left[:, :rank], right[:rank]),
        "the singular values are in both factors": (scaled[:, :rank] * values[:rank], right[:rank]),
        "these are the weakest directions": (scaled[:, -rank:], right[-rank:]),
        "the third result of svd is transposed already": (scaled[:, :rank], right.T[:rank]),
    }


def _reached(strengths, share):
    return int((strengths.cumsum(0) / strengths.sum() < share).sum()) + 1


@exercise(
    [(CONCENTRATED, share) for share in (0.75, 0.86, 0.95)],
    "this number says how concentrated a change is. It does not say whether what is left out matters.",
)
def needed_rank(matrix, share):
    """How many of the strongest directions hold at least `share` of dW's squared norm."""
    values = torch.linalg.svdvals(matrix)
    right = _reached(values**2, share)
    return right, {
        "these are shares of the sum of the singular values; the norm sums their squares": _reached(values, share),
        "a position is counted from 0, a number of directions from 1": right - 1,
        "this is one direction more than needed": right + 1,
        "these are the weakest directions: begin with the strongest": _reached(values.flip(0) ** 2, share),
    }


def _gradients(found, *case):
    first, second = pair(found, "the gradients of A and of B")
    return np.concatenate([np.ravel(first), np.ravel(second)])


@exercise(
    [(SQUARE, A, B), (SQUARE, torch.zeros(6, 2), B)],
    "each gradient holds the other factor: while A is zero, only A learns, and with both zero nothing would.",
    read=_gradients,
    forbidden=dict.fromkeys(("backward", "grad", "requires_grad_", "__set__"), BY_HAND),
)
def factor_gradients(gradient, a, b):
    """The gradients of A and of B from G (m, m), the gradient with respect to dW = A B."""
    return (gradient @ b.T, a.T @ gradient), {
        "in the gradient of A, G is transposed": (gradient.T @ b.T, a.T @ gradient),
        "in the gradient of B, G is transposed": (gradient @ b.T, a.T @ gradient.T),
        "the gradient of A has A's shape, that of B has B's": (a.T @ gradient, gradient @ b.T),
    }


@exercise([(random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1))], "one mean over batch, channels and positions.")
def loss(prediction, target):
    """The mean squared error over everything, one number."""
    error = prediction - target
    return (error**2).mean(), {
        "this is the sum, not the mean": (error**2).sum(),
        "this is the mean of the absolute error": error.abs().mean(),
        "the squares are missing": error.mean(),
    }


@exercise(
    [(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 100, 499, 500, 999]), [0, 100, 500, 1000])],
    "the loss falls from step to step, but it differs far more from one noise level to the next.",
)
def losses_by_noise_level(losses, timesteps, edges):
    """The mean loss of each bin edges[i] <= t < edges[i + 1]."""
    return [[1.0, 3.0, 12.0]], {
        "these are sums, not means": [1.0, 6.0, 24.0],
        "a step on an edge belongs to the bin that begins there": [2.0, 6.0, 16.0],
        "a step on an edge belongs to the bin that begins there, not to the one that ends": [1.5, 6.0, 16.0],
        "a step on an edge is counted twice: leave out the upper edge": [1.5, 14 / 3, 12.0],
        "these sums are divided by the number of all losses: divide by that of the bin": [0.2, 1.2, 4.8],
    }


@exercise(
    [(torch.tensor([1.0, 3.0, 5.0, 1.0, 2.0]), width) for width in (2, 1, 5)],
    "single losses jump with the noise level that was drawn; means show the trend.",
)
def smoothed(losses, width):
    """The mean of each `width` neighboring losses: n - width + 1 numbers."""
    windows, everywhere = losses.unfold(0, width, 1), np.convolve(losses, np.ones(width) / width, "same")
    return windows.mean(-1), {
        "these are sums": windows.sum(-1),
        "a loss that has left the window still counts": losses.cumsum(0)[width - 1 :] / width,
        "this is the median of each window": windows.median(-1).values,
        "there are as many means as losses: keep only the windows that lie wholly inside": everywhere,
    }


HARD = (random(3, 1, 5, 5, seed=2) > torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)).float()
SOFT = HARD * random(3, 1, 5, 5, seed=3).sigmoid()  # at an edge, a part of a position is object


@exercise(
    [(random(3, 4, 5, 5), random(3, 4, 5, 5, seed=1), inside) for inside in (HARD, SOFT)],
    "a weighted mean: the background may be whatever it likes.",
)
def masked_loss(prediction, target, inside):
    """The mean squared error, weighted by inside (b, 1, h, w), one number."""
    square, area = (prediction - target) ** 2, inside.mean()
    marked = inside * square
    each = marked.mean((1, 2, 3)) / inside.mean((1, 2, 3))
    return marked.mean() / area, {
        "the sum is divided by the number of all positions: a small object would count for little": marked.mean(),
        "each position has several channels, and the mask counts it once": marked.sum() / inside.sum(),
        "this is a mean of the pictures' means: take one mean over the whole batch": each.mean(),
        "a position counts as far as it is object, not wholly or not at all": (
            square[(inside > 0.5).expand_as(square)].mean()
        ),
        "the mask is squared: multiply the squared error by it, not the error": (inside * marked).mean() / area,
    }


def _exam(losses, patience, ends=False, equal=False, forgiven=True, before=False):
    """The exam to go back to, or the one at which the training `ends`; the other options are mistakes."""
    best = number = missed = 0
    for number in range(1, len(losses)):
        lower = losses[number] <= losses[best] if equal else losses[number] < losses[best]
        hit = losses[number] < losses[number - 1] if before else lower
        missed = missed + 1 if not hit else 0 if forgiven else missed
        best = number if lower else best
        if missed == patience:
            break
    return number if ends else best


@exercise(
    [
        ([3.0, 5.0, 4.0, 2.0, 4.0, 5.0, 1.0], 2),
        *(([5.0, 4.0, 3.0, 3.5, 3.2, 2.0], patience) for patience in (2, 3)),
        ([5.0, 3.0, 4.0, 2.0, 2.5, 1.0], 2),
        ([2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 1.0], 3),
    ],
    "the held-out loss decides, and only with what is known at that time.",
)
def stopping(losses, patience):
    """The number of the lowest loss before `patience` in a row brought no lower one."""
    return _exam(losses, patience), {
        "the training has ended before this exam: it was never made": losses.index(min(losses)),
        "compare with the lowest loss so far, not the one before": _exam(losses, patience, before=True),
        "only misses in a row count: a new lowest loss forgives them": _exam(losses, patience, forgiven=False),
        "an equal loss is no lower one": _exam(losses, patience, equal=True),
        "this is where the training ends, and not the best exam until then": _exam(losses, patience, ends=True),
    }
