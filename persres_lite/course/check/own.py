"""Checks for the exercises on a concept of one's own: photographs, and how long to train (notebook 07)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from persres_lite.course.check.answers import call, exercise, random, require, same


@exercise
def passes(answer: Callable) -> str:
    """``answer(steps, batch_size, photographs)``: how often each photograph is seen in a training."""
    for steps, batch, count in ((150, 4, 7), (100, 4, 8), (60, 1, 6)):
        wrong = {
            "this is how many pictures the model sees in all": steps * batch,
            "every step sees batch_size photographs, not one": steps / count,
            "this leaves out how many photographs there are and how many steps": batch / count,
            "whole passes only: give the mean, which may be a fraction": steps * batch // count,
            "this is upside down": count / (steps * batch),
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
            "the sign of the middle is wrong": (around + 4 * gray[1:-1, 1:-1]).var(),
            "this is the variance of the picture, not of its Laplacian": gray.var(),
            "leave the border out: a position there lacks a neighbor": _padded(gray).var(),
        }
        found, right = call(answer, gray), float(laplacian.var())
        by_n = float(laplacian.var(correction=0))  # NumPy divides by n, torch by n - 1
        if getattr(found, "ndim", 0) == 0 and abs(float(found) - by_n) < 1e-4 * by_n:
            right = by_n
        same(found, right, "the variance", mistakes=wrong, rtol=1e-3)
    return "a blurred picture has no fine detail, so its Laplacian hardly varies."


@exercise
def best_stage(answer: Callable) -> str:
    """``answer(identity, fit, slack)``: of those stages whose fit lost at most `slack`, the one with most identity.

    Both are (n,), by stage of the training; the loss of fit is counted from stage 0.
    """
    identity = torch.tensor([0.50, 0.62, 0.66, 0.71, 0.78, 0.80])
    fit = torch.tensor([0.30, 0.36, 0.32, 0.305, 0.26, 0.15])
    for slack, right in ((0.05, 4), (0.0, 3), (0.2, 5)):
        stages = {
            "this stage has forgotten the prompt": 5,
            "this stage fits the prompt best, but others that fit well enough have more identity": 1,
            "count the slack from the fit of stage 0, not from the best one": _within(identity, fit, fit.max() - slack),
            "a stage may lose up to slack of the fit": _within(identity, fit, fit[0]),
        }
        wrong = {sentence: stage for sentence, stage in stages.items() if stage != right}
        found = call(answer, identity, fit, slack)
        require(float(found) in range(len(fit)), "a stage is a whole number: return its index, not its score.")
        same(found, right, f"the stage at slack {slack}", mistakes=wrong)
    return "train as long as the prompt is still heard, and no longer."


def _padded(gray: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return torch.nn.functional.conv2d(gray[None, None], kernel[None, None], padding=1)


def _within(identity: torch.Tensor, fit: torch.Tensor, least: float | torch.Tensor) -> int:
    return int(identity.where(fit >= least, torch.tensor(-1.0)).argmax())
