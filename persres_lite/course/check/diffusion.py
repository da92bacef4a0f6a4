"""Checks for the exercises on the frozen model: noise, prediction types, guidance, freezing (notebooks 00 and 01)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from persres_lite.course.check.answers import call, exercise, random, require, same

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


@exercise
def share(answer: float, part: int, whole: int) -> str:
    """`answer` is the share of `part` in `whole`, in percent."""
    right = 100 * part / whole
    wrong = {
        "this is a fraction, and percent were asked for": part / whole,
        "this is the whole in percent of the part: divide the other way round": 100 * whole / part,
        "the parameters that were added are not part of the U-Net's": 100 * part / (whole + part),
    }
    same(answer, right, "the share", mistakes=wrong, rtol=0.003)
    return f"{right:.2g} %."


@exercise
def ddim_step(answer: Callable) -> str:
    """``answer(noised, predicted_noise, alpha_bar, alpha_bar_next)``: one deterministic DDIM step (eta = 0)."""
    noised, noise = random(1, 4, 3, 3), random(1, 4, 3, 3, seed=1)
    twice = [call(answer, noised, noise, 0.2, 0.4) for _ in range(2)]
    again = bool((np.asarray(twice[0]) == np.asarray(twice[1])).all())
    require(
        again, "equal inputs give two different latents: noise the guess with the predicted noise, not a fresh one."
    )
    for a, b in ((0.2, 0.4), (0.7, 1.0)):
        clean = (noised - (1 - a) ** 0.5 * noise) / a**0.5
        wrong = {
            "this is the clean latent: noise it again, for the next level": clean,
            "the new noise level needs the next alpha_bar": noised,
        }
        right = b**0.5 * clean + (1 - b) ** 0.5 * noise
        same(call(answer, noised, noise, a, b), right, "the next latent", mistakes=wrong if b < 1 else None, atol=1e-4)
    return "predict the clean latent, then noise it with the same noise to the next, lower level."


@exercise
def v_target(answer: Callable) -> str:
    """``answer(clean, noise, alpha_bar)``: the target of v prediction, sqrt(a) noise - sqrt(1 - a) z."""
    clean, noise = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    for a in (0.9, 0.3):
        wrong = {
            "the sign is the other way round": (1 - a) ** 0.5 * clean - a**0.5 * noise,
            "this is the noised latent": a**0.5 * clean + (1 - a) ** 0.5 * noise,
            "the two factors are exchanged": (1 - a) ** 0.5 * noise - a**0.5 * clean,
        }
        same(call(answer, clean, noise, a), a**0.5 * noise - (1 - a) ** 0.5 * clean, "v", mistakes=wrong)
    return "v turns from the noise (hardly any noise added) to minus the clean latent (nothing but noise)."


@exercise
def timestep_of(answer: Callable) -> str:
    """``answer(alpha_bars, share)``: the first timestep at which noise makes up more than `share` of the variance."""
    alpha_bars = torch.linspace(0.99, 0.01, 50) ** 1.5
    for part in (0.5, 0.1, 0.9):
        right = int((1 - alpha_bars > part).int().argmax())
        wrong = {
            "this is the first timestep with so much of the picture": int((alpha_bars > part).int().argmax()),
            "there is no root in a variance": int((1 - alpha_bars.sqrt() > part).int().argmax()),
            "this is the last timestep with less noise, one too early": right - 1,
        }
        same(call(answer, alpha_bars, part), right, f"the timestep for a share of {part}", mistakes=wrong)
    exact = torch.tensor([0.75, 0.5, 0.25, 0.125])  # at the second, noise is one half of the variance to the last bit
    wrong = {"at this timestep noise makes up just that share, and more was asked for": 1}
    same(call(answer, exact, 0.5), 2, "the timestep for a share of 0.5", mistakes=wrong)
    return "alpha bar and the noise's share add up to one, so you compare with one number."


@exercise
def projection(answer: Callable) -> str:
    """``answer(x, weight, bias)``: the 1x1 convolution of x (B, C, h, w) with weight (C, C, 1, 1) and bias (C,)."""
    x, weight, bias = random(2, 4, 3, 5), random(4, 4, 1, 1, seed=1), random(4, seed=2)
    wrong = {
        "the bias is missing": torch.nn.functional.conv2d(x, weight),
        "the matrix is transposed": torch.nn.functional.conv2d(x, weight.transpose(0, 1), bias),
    }
    right = torch.nn.functional.conv2d(x, weight, bias)
    found = call(
        answer, x, weight, bias, forbidden=dict.fromkeys(CONVOLUTIONS, "this calls a convolution: do without.")
    )
    same(found, right, "the projection", mistakes=wrong)
    return "one matrix, the same at every position."


@exercise
def alignment(answer: Callable) -> str:
    """``answer(pictures, references)`` for features (n, d) and (m, d): the mean cosine with all references, (n,)."""
    pictures, references = random(3, 5) + 1, 4 * random(2, 5, seed=1) + 1
    cosines = torch.nn.functional.cosine_similarity(pictures[:, None], references[None], dim=-1)  # (n, m)
    mean_first = torch.nn.functional.cosine_similarity(pictures, references.mean(0, keepdim=True), dim=-1)
    wrong = {
        "the vectors' lengths still count: divide by them first": (pictures @ references.T).mean(1),
        "this is the nearest reference, not the mean over them": cosines.amax(1),
        "average the cosines, not the references": mean_first,
    }
    same(call(answer, pictures, references), cosines.mean(1), "the alignment", mistakes=wrong)
    return "only directions count: a vector and twice the vector score the same."


@exercise
def freeze(answer: Callable) -> str:
    """``answer(module)`` freezes the module: no parameter learns, and dropout and the like are off."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before = [parameter.clone() for parameter in module.parameters()]
    call(lambda part: part if (found := answer(part)) is None else found, module)  # freezing need not return anything
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    require(not learning, f"{', '.join(learning)} still learn: set requires_grad to False for every parameter.")
    training = any(part.training for part in module.modules())
    require(not training, "the module is still in training mode: dropout stays random.")
    unchanged = all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    require(unchanged, "the weights have changed: freezing keeps them as they are.")
    return "nothing learns, and equal inputs give equal outputs."


@exercise
def choice(answer: Any, right: Any, because: str) -> str:
    """`answer` is one of a few given choices; `because` says why the right one is right."""
    agree = str(answer).strip().lower() == str(right).strip().lower()
    require(agree, f"it is not {answer}: put the number into the equation, or look at the figure again.")
    return because
