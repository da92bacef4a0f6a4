"""Checks for the exercises on the frozen model: noise, prediction types, guidance, freezing (notebooks 00 and 01)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d, cosine_similarity

from persres_lite.course.check.answers import Unanswered, call, exercise, random, require, same, speaking

FRESH = "equal inputs give two different latents: noise the guess with the predicted noise, not a fresh one."
CLEAN, NOISE, ALPHA_BARS = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1), torch.linspace(0.99, 0.01, 50) ** 1.5
TWICE_ONE_HALF = torch.tensor([0.75, 0.5, 0.5, 0.25])  # at two steps noise is one half of the variance to the last bit


@speaking
def share(answer: float, part: int, whole: int) -> str:
    """`answer` is the share of `part` in `whole`, in percent; two digits are enough."""
    right = 100 * part / whole
    wrong = {
        "this is a fraction, and percent were asked for": part / whole,
        "this is the whole in percent of the part: divide the other way round": 100 * whole / part,
        "the parameters that were added are not part of the U-Net's": 100 * part / (whole + part),
    }
    same(answer, [right, float(f"{right:.2g}")], "the share", wrong, 0.003 * min(1, right))
    return f"{right:.2g} %."


@exercise(
    [(CLEAN, NOISE, 0.2, 0.4), (CLEAN, NOISE, 0.7, 1.0)],
    "predict the clean latent, then noise it with the same noise to the next, lower level.",
    forbidden=dict.fromkeys(("randn", "randn_like"), FRESH),
)
def ddim_step(noised, predicted, alpha_bar, alpha_bar_next):
    """One deterministic DDIM step (eta = 0)."""
    clean = (noised - (1 - alpha_bar) ** 0.5 * predicted) / alpha_bar**0.5
    return alpha_bar_next**0.5 * clean + (1 - alpha_bar_next) ** 0.5 * predicted, {
        "this is the clean latent: noise it again, for the next level": clean,
        "the new noise level needs the next alpha_bar": noised,
    }


@exercise(
    [(CLEAN, NOISE, 0.9), (CLEAN, NOISE, 0.3)],
    "v turns from the noise (hardly any noise added) to minus the clean latent (nothing but noise).",
)
def v_target(clean, noise, alpha_bar):
    """The target of v prediction, sqrt(a) noise - sqrt(1 - a) z."""
    signal, rest = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    return signal * noise - rest * clean, {
        "this is the noised latent": signal * clean + rest * noise,
        "the two factors are exchanged": rest * noise - signal * clean,
    }


@exercise(
    [*((ALPHA_BARS, share) for share in (0.5, 0.1, 0.9)), (TWICE_ONE_HALF, 0.5)],
    "alpha bar and the noise's share add up to one, so you compare with one number.",
)
def timestep_of(alpha_bars, share):
    """The first timestep at which noise makes up more than `share` of the variance."""
    right = (1 - alpha_bars > share).int().argmax()
    return right, {
        "this is the first timestep with so much of the picture": (alpha_bars > share).int().argmax(),
        "there is no root in a variance": (1 - alpha_bars.sqrt() > share).int().argmax(),
        "this is the last timestep with less noise, one too early": right - 1,
        "at this timestep noise makes up just that share, and more was asked for": (
            (1 - alpha_bars >= share).int().argmax()
        ),
    }


@exercise(
    [(random(2, 4, 3, 5), random(4, 4, 1, 1, seed=1), random(4, seed=2))],
    "one matrix, the same at every position.",
    forbidden={"conv2d": "this calls a convolution: do without."},
)
def projection(x, weight, bias):
    """The 1x1 convolution of x (B, C, h, w) with weight (C, C, 1, 1) and bias (C,)."""
    return conv2d(x, weight, bias), {
        "the bias is missing": conv2d(x, weight),
        "the matrix is transposed": conv2d(x, weight.transpose(0, 1), bias),
    }


@exercise(
    [(random(3, 5) + 1, 4 * random(2, 5, seed=1) + 1)],
    "only directions count: a vector and twice the vector score the same.",
)
def alignment(pictures, references):
    """The mean cosine of each of the features (n, d) with all references (m, d): (n,)."""
    cosines = cosine_similarity(pictures[:, None], references[None], dim=-1)  # (n, m)
    return cosines.mean(1), {
        "the vectors' lengths still count: divide by them first": (pictures @ references.T).mean(1),
        "this is the nearest reference, not the mean over them": cosines.amax(1),
        "average the cosines, not the references": cosine_similarity(pictures, references.mean(0, keepdim=True)),
    }


@speaking
def freeze(answer: Callable) -> str:
    """``answer(module)`` freezes the module: no parameter learns, and dropout and the like are off."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before = [parameter.clone() for parameter in module.parameters()]
    returned = call(lambda part: [answer(part)], module)  # nothing need be returned
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    training = any(part.training for part in module.modules())
    if returned == [...] and len(learning) == len(before) and training:  # the stub, and nothing was done before it
        raise Unanswered
    require(not learning, f"{', '.join(learning)} still learn: set requires_grad to False for every parameter.")
    require(not training, "the module is still in training mode: dropout stays random.")
    unchanged = all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    require(unchanged, "the weights have changed: freezing keeps them as they are.")
    return "nothing learns, and equal inputs give equal outputs."


@speaking
def choice(answer: Any, right: Any, because: str) -> str:
    """`answer` is one of a few given choices; `because` says why the right one is right."""
    agree = str(answer).strip().lower() == str(right).strip().lower()
    require(agree, f"it is not {answer}: put the number into the equation, or look at the figure again.")
    return because
