"""Checks for the exercises on a concept of one's own: photographs, and how long to train (notebook 07)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from persres_lite.course.check.answers import call, exercise, random, same


@exercise
def passes(answer: Callable) -> str:
    """``answer(steps, batch_size, photographs)``: how often each photograph is seen in a training."""
    for steps, batch, count in ((150, 4, 5), (100, 4, 8), (60, 1, 6)):
        wrong = {
            "this is how many pictures the model sees in all": steps * batch,
            "every step sees batch_size photographs, not one": steps / count,
        }
        same(call(answer, steps, batch, count), steps * batch / count, "the number of times", mistakes=wrong)
    return "the fewer photographs, the more often each is seen, and the sooner it is learned by heart."


@exercise
def detail(answer: Callable) -> str:
    """``answer(gray)``: the variance of a picture's Laplacian, for (h, w), inside its border."""
    for height, width in ((12, 9), (7, 7)):
        gray = random(height, width)
        around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
        laplacian = around - 4 * gray[1:-1, 1:-1]
        wrong = {
            "this is the standard deviation": laplacian.std(),
            "this is the mean": laplacian.mean(),
            "the middle counts minus four times": (around - gray[1:-1, 1:-1]).var(),
        }
        same(call(answer, gray), laplacian.var(), "the variance", mistakes=wrong, rtol=1e-3)
    return "a blurred picture has no fine detail, so its Laplacian hardly varies."


@exercise
def best_stage(answer: Callable) -> str:
    """``answer(identity, fit, slack)``: of those stages whose fit lost at most `slack`, the one with most identity.

    Both are (n,), by stage of the training; the loss of fit is counted from stage 0.
    """
    identity = torch.tensor([0.50, 0.62, 0.71, 0.78, 0.80])
    fit = torch.tensor([0.30, 0.31, 0.29, 0.24, 0.15])
    for slack, right in ((0.02, 2), (0.1, 3), (0.5, 4)):
        wrong = {"this one has forgotten the prompt": 4} if right != 4 else {}
        wrong |= {"this one fits the prompt best": 1}
        same(call(answer, identity, fit, slack), right, "the stage", mistakes=wrong)
    return "train as long as the prompt is still heard, and no longer."
