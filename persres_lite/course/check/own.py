"""Checks for the exercises on a concept of one's own: photographs, and how long to train (notebook 07)."""

from __future__ import annotations

import torch
from torch.nn.functional import conv2d

from persres_lite.course.check.answers import exercise, random, require

IDENTITY, FIT = torch.tensor([0.50, 0.62, 0.66, 0.71, 0.78, 0.80]), torch.tensor([0.30, 0.36, 0.32, 0.305, 0.26, 0.15])
UNSTEADY = torch.tensor([0.20, 0.45, 0.31, 0.40, 0.50]), torch.tensor([0.60, 0.58, 0.75, 0.57, 0.40])


@exercise(
    [(150, 4, 7), (100, 4, 8), (60, 1, 6)],
    "the fewer photographs, the more often each is seen, and the sooner it is learned by heart.",
)
def passes(steps, batch_size, photographs):
    """How often each photograph is seen in a training."""
    seen = steps * batch_size
    return seen / photographs, {
        "this is how many pictures the model sees in all": seen,
        "every step sees batch_size photographs, not one": steps / photographs,
        "this leaves out how many photographs there are and how many steps": batch_size / photographs,
        "whole passes only: give the mean, which may be a fraction": seen // photographs,
    }


def _laplacian(gray, middle=-4.0, padding=0):
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, middle, 1.0], [0.0, 1.0, 0.0]])
    return conv2d(gray[None, None], kernel[None, None], padding=padding)


@exercise(
    [(random(12, 9),), (random(7, 7),)],
    "a blurred picture has no fine detail, so its Laplacian hardly varies.",
    tolerance=1e-3,
)
def detail(gray):
    """The variance of a picture's Laplacian, for (h, w), inside its border; NumPy divides by n, torch by n - 1."""
    laplacian = _laplacian(gray)
    return [laplacian.var(), laplacian.var(correction=0)], {
        "this is the standard deviation": laplacian.std(),
        "the middle counts minus four times": _laplacian(gray, middle=-1.0).var(),
        "the sign of the middle is wrong": _laplacian(gray, middle=4.0).var(),
        "this is the variance of the picture, not of its Laplacian": gray.var(),
        "leave the border out: a position there lacks a neighbor": _laplacian(gray, padding=1).var(),
    }


def _index(found, identity, fit, slack):
    require(float(found) in range(len(fit)), "a stage is a whole number: return its index, not its score.")
    return found


@exercise(
    [*((IDENTITY, FIT, slack) for slack in (0.05, 0.0, 0.2)), (*UNSTEADY, 0.05)],
    "train as long as the prompt is still heard, and no longer.",
    read=_index,
)
def best_stage(identity, fit, slack):
    """Of those stages whose fit lost at most `slack` since stage 0, the one with most identity; both are (n,)."""

    def within(least):
        return identity.where(fit >= least, torch.tensor(-1.0)).argmax()

    return within(fit[0] - slack), {
        "this stage has forgotten the prompt": identity.argmax(),
        "this stage fits the prompt best, but others that fit well enough have more identity": fit.argmax(),
        "count the slack from the fit of stage 0, not from the best one": within(fit.max() - slack),
        "a stage may lose up to slack of the fit": within(fit[0]),
    }
