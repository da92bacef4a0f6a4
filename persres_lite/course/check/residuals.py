"""Checks for the exercises on residuals and on training them (notebooks 02 and 03)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from persres_lite.course.check.answers import call, exercise, random, require, same


@exercise
def residual_linear(answer: Callable) -> str:
    """``answer(x, W, bias, A, B)`` with x (batch, N, m): (W + A B) x + bias for each of the N positions."""
    x, weight, bias = random(2, 5, 6), random(6, 6, seed=1), random(6, seed=2)
    a, b = random(6, 2, seed=3), random(2, 6, seed=4)
    wrong = {
        "the residual is missing": functional.linear(x, weight, bias),
        "the bias is missing": functional.linear(x, weight + a @ b),
        "A and B are exchanged": functional.linear(x, weight, bias) + x @ (a @ b),
        "the bias belongs to W alone: it is counted twice": functional.linear(x, weight + a @ b, 2 * bias),
        "x is a row here, so the weights are transposed: x @ W.T": x @ (weight + a @ b) + bias,
    }
    right = functional.linear(x, weight + a @ b, bias)
    found = call(answer, x, weight, bias, a, b, forbidden={"6 x 6": "this forms an m x m matrix: begin with B x."})
    same(found, right, "the output", mistakes=wrong, atol=1e-4)
    return "W x + A (B x) is the same as (W + A B) x, and never needs the m x m matrix."


@exercise
def parameter_count(answer: Callable) -> str:
    """``answer(widths, fraction)``: how many numbers the residuals of layers of these widths hold together."""
    sixteen = [320] * 5 + [640] * 5 + [1280] * 6
    for widths, fraction in (([50, 90, 90], 0.03), ([320], 0.05), (sixteen, 0.05)):
        ranks = [round(fraction * width) for width in widths]
        right = sum(2 * width * rank for width, rank in zip(widths, ranks, strict=True))
        wrong = {
            "this counts only one of the two matrices": right // 2,
            "this counts the full matrices": sum(width * width for width in widths),
            "a rank is a whole number: round it": sum(2 * width * fraction * width for width in widths),
            "the ranks are rounded down; take the nearest": sum(2 * width * int(fraction * width) for width in widths),
            "this counts every width once": sum(2 * width * round(fraction * width) for width in set(widths)),
        }
        same(call(answer, widths, fraction), right, f"the number for {len(widths)} layers", mistakes=wrong, rtol=1e-9)
    return f"{right:,} for the sixteen layers of Stable Diffusion 1.4."


@exercise
def merge(answer: Callable) -> str:
    """``answer(W, A, B, scale)`` with a convolution's W (m, m, 1, 1): the weight with the residual merged in."""
    weight, a, b = random(6, 6, 1, 1), random(6, 2, seed=1), random(2, 6, seed=2)
    for scale in (1.0, 0.5, 0.0):
        full = (a @ b)[:, :, None, None]
        wrong = {"the scale is missing": weight + full, "the scale belongs to A B, not to W": scale * (weight + full)}
        found = call(answer, weight, a, b, scale)
        same(
            found, weight + scale * full, f"the merged weight at scale {scale}", mistakes=None if scale == 1 else wrong
        )
    return "after merging, sampling costs exactly what it did, and nothing is left that a mask could act on."


@exercise
def truncated(answer: Callable) -> str:
    """``answer(dW, rank)``: factors A (m, r) and B (r, m) whose product is the nearest to dW (m, m) at that rank."""
    matrix = random(6, 6)
    left, values, right = torch.linalg.svd(matrix)
    for rank in (1, 3):
        found = call(answer, matrix, rank)
        require(
            isinstance(found, (tuple, list)) and len(found) == 2, "your function should return two tensors, A and B."
        )
        shapes = [tuple(getattr(factor, "shape", ())) for factor in found]
        require(shapes == [(6, rank), (rank, 6)], f"A and B should have the shapes (6, {rank}) and ({rank}, 6).")
        nearest = left[:, :rank] * values[:rank] @ right[:rank]
        wrong = {
            "the singular values are missing": left[:, :rank] @ right[:rank],
            "the singular values are in both factors": left[:, :rank] * values[:rank] ** 2 @ right[:rank],
            "these are the weakest directions": left[:, -rank:] * values[-rank:] @ right[-rank:],
            "the third result of svd is transposed already": left[:, :rank] * values[:rank] @ right.T[:rank],
        }
        same(found[0] @ found[1], nearest, f"A B at rank {rank}", mistakes=wrong, atol=1e-4)
    return "no other matrix of that rank is nearer to dW."


@exercise
def needed_rank(answer: Callable) -> str:
    """``answer(dW, share)``: how many of the strongest directions hold at least `share` of dW's squared norm."""
    left, _, right = torch.linalg.svd(random(6, 6))
    values = torch.tensor([8.0, 2.0, 2.0, 2.0, 2.0, 1.0])
    matrix = left * values @ right

    def first(strengths: torch.Tensor, share: float) -> int:
        return int((strengths.cumsum(0) / strengths.sum() < share).sum()) + 1

    for share in (0.75, 0.86, 0.95):
        wanted = first(values**2, share)
        wrong = {
            "these are shares of the sum of the singular values; the norm sums their squares": first(values, share),
            "a position is counted from 0, a number of directions from 1": wanted - 1,
            "this is one direction more than needed": wanted + 1,
            "these are the weakest directions: begin with the strongest": first(values.flip(0) ** 2, share),
        }
        same(call(answer, matrix, share), wanted, f"the number for a share of {share}", mistakes=wrong)
    return "this number says how concentrated a change is. It does not say whether what is left out matters."


@exercise
def factor_gradients(answer: Callable) -> str:
    """``answer(G, A, B)`` with G (m, m), the gradient with respect to dW = A B: the gradients (of A, of B)."""
    gradient = random(6, 6)
    for a, b in ((random(6, 2, seed=1), random(2, 6, seed=2)), (torch.zeros(6, 2), random(2, 6, seed=2))):
        found = call(answer, gradient, a, b)
        require(
            isinstance(found, (tuple, list)) and len(found) == 2,
            "your function should return two tensors, the gradients of A and of B.",
        )
        for name, value, right, wrong in (
            ("A", found[0], gradient @ b.T, {"G is transposed": gradient.T @ b.T}),
            ("B", found[1], a.T @ gradient, {"G is transposed": a.T @ gradient.T}),
        ):
            shape = tuple(getattr(value, "shape", ()))
            require(
                shape == tuple(right.shape),
                f"the gradient of {name} has {name}'s shape, {tuple(right.shape)}, not {shape}.",
            )
            same(value, right, f"the gradient of {name}", mistakes=wrong if a.any() else None, atol=1e-4)
    return "each gradient holds the other factor: while A is zero, only A learns, and with both zero nothing would."


@exercise
def loss(answer: Callable) -> str:
    """``answer(prediction, target)``: the mean squared error over everything, one number."""
    prediction, target = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    error = prediction - target
    wrong = {
        "this is the sum, not the mean": (error**2).sum(),
        "this is the mean of the absolute error": error.abs().mean(),
        "this is the root of the mean squared error": (error**2).mean().sqrt(),
        "the squares are missing": error.mean(),
    }
    same(
        call(answer, prediction, target),
        float((error**2).mean()),
        "the loss",
        mistakes={s: float(v) for s, v in wrong.items()},
    )
    return "one mean over batch, channels and positions."


@exercise
def losses_by_noise_level(answer: Callable) -> str:
    """``answer(losses, timesteps, edges)``: the mean loss of each bin edges[i] <= t < edges[i + 1], as a tensor."""
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    timesteps, edges = torch.tensor([0, 100, 499, 500, 999]), [0, 100, 500, 1000]
    wrong = {
        "these are sums, not means": torch.tensor([1.0, 6.0, 24.0]),
        "a step on an edge belongs to the bin that begins there": torch.tensor([2.0, 6.0, 16.0]),
        "a step on an edge belongs to the bin that begins there, not to the one that ends": torch.tensor([1.5, 6, 16]),
        "a step on an edge is counted twice: leave out the upper edge": torch.tensor([1.5, 14 / 3, 12.0]),
        "these sums are divided by the number of all losses: divide by that of the bin": torch.tensor([0.2, 1.2, 4.8]),
    }
    same(call(answer, losses, timesteps, edges), torch.tensor([1.0, 3.0, 12.0]), "the mean of each bin", mistakes=wrong)
    return "the loss falls from step to step, but it differs far more from one noise level to the next."


@exercise
def smoothed(answer: Callable) -> str:
    """``answer(losses, width)``: the mean of each `width` neighboring losses, as a tensor of n - width + 1 numbers."""
    losses = torch.tensor([1.0, 3.0, 5.0, 1.0, 2.0])
    for width in (2, 1, 5):
        windows = losses.unfold(0, width, 1)
        wrong = {
            "these are sums": windows.sum(-1),
            "a loss that has left the window still counts": losses.cumsum(0)[width - 1 :] / width,
            "this is the median of each window": windows.median(-1).values,
        }
        found = call(answer, losses, width)
        kept = width == 1 or getattr(found, "shape", None) != losses.shape
        require(kept, "there are as many means as losses: keep only the windows that lie wholly inside.")
        same(found, windows.mean(-1), f"the mean over {width}", mistakes=wrong if width == 2 else None)
    return "single losses jump with the noise level that was drawn; means show the trend."


@exercise
def masked_loss(answer: Callable) -> str:
    """``answer(prediction, target, inside)`` with inside (b, 1, h, w): the weighted mean squared error, one number."""
    prediction, target = random(3, 4, 5, 5), random(3, 4, 5, 5, seed=1)
    square = (prediction - target) ** 2
    hard = (random(3, 1, 5, 5, seed=2) > torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)).float()
    soft = hard * random(3, 1, 5, 5, seed=3).sigmoid()  # at an edge, a part of a position is object
    for inside in (hard, soft):
        marked, area = inside * square, inside.expand_as(square)
        each = marked.sum((1, 2, 3)) / area.sum((1, 2, 3))
        wrong = {
            "the sum is divided by the number of all positions: a small object would count for little": marked.mean(),
            "each position has several channels, and the mask counts it once": marked.sum() / inside.sum(),
            "this is the background's loss": ((1 - inside) * square).sum() / (1 - area).sum(),
            "this is a mean of the pictures' means: take one mean over the whole batch": each.mean(),
            "the mask is not used": square.mean(),
        }
        if inside is soft:
            wrong["a position counts as far as it is object, not wholly or not at all"] = square[area > 0.5].mean()
            wrong["the mask is squared: multiply the squared error by it, not the error"] = (
                inside**2 * square
            ).sum() / area.sum()
        found = call(answer, prediction, target, inside)
        right = float(marked.sum() / area.sum())
        same(found, right, "the loss", mistakes={sentence: float(value) for sentence, value in wrong.items()})
    return "a weighted mean: the background may be whatever it likes."


@exercise
def stopping(answer: Callable) -> str:
    """``answer(losses, patience)``: the number of the lowest loss before `patience` in a row brought no lower one."""
    early = "the training has ended before this exam: it was never made"
    last = "compare with the lowest loss so far, not the one before"
    for losses, patience, right, wrong in (
        ([3.0, 5.0, 4.0, 2.0, 4.0, 5.0, 1.0], 2, 0, {last: 3, early: 6}),
        ([5.0, 4.0, 3.0, 3.5, 3.2, 2.0], 2, 2, {early: 5}),
        ([5.0, 4.0, 3.0, 3.5, 3.2, 2.0], 3, 5, {}),
        ([5.0, 3.0, 4.0, 2.0, 2.5, 1.0], 2, 5, {"only misses in a row count: a new lowest loss forgives them": 3}),
        ([2.0, 2.0, 2.0, 1.0], 2, 0, {"an equal loss is no lower one": 3}),
    ):
        found = call(answer, list(losses), patience)
        ends = min(right + patience, len(losses) - 1)
        mistakes = {"this is where the training ends, and not the best exam until then": ends} | wrong
        same(found, right, f"the exam to go back to in {losses} with a patience of {patience}", mistakes=mistakes)
    return "the held-out loss decides, and only with what is known at that time."
