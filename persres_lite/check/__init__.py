"""Checks of the reader's answers: ``check.iou(my_function)`` says what is wrong, or prints ``Correct``.

One public function for each exercise. Each takes the reader's answer first, mostly a function, and tries it on small random inputs; its
docstring says with which arguments the function is called. A wrong answer raises AssertionError with one sentence, so that a
test runner refuses it too; an answer that is still ``...`` is only remarked upon.

A folder and not one file, because a lesson's checks are read beside the lesson: `diffusion` (notebooks 00, 01), `residuals` (02, 03),
`maps` (04, 05), and `answers`, the mechanism.
"""

from persres_lite.check.diffusion import add_noise, choice, ddim_step, freeze, guidance, predict_clean, share, v_target
from persres_lite.check.maps import (
    as_picture,
    attention_map,
    background_distance,
    blend,
    iou,
    median_mask,
    otsu,
    pointing,
    quantile_mask,
    weights,
)
from persres_lite.check.residuals import (
    delta,
    energy,
    fold,
    loss,
    losses_by_noise_level,
    parameter_count,
    rank_of,
    residual_convolution,
    residual_linear,
    smoothed,
)

__all__ = [
    "add_noise",
    "as_picture",
    "attention_map",
    "background_distance",
    "blend",
    "choice",
    "ddim_step",
    "delta",
    "energy",
    "fold",
    "freeze",
    "guidance",
    "iou",
    "loss",
    "losses_by_noise_level",
    "median_mask",
    "otsu",
    "parameter_count",
    "pointing",
    "predict_clean",
    "quantile_mask",
    "rank_of",
    "residual_convolution",
    "residual_linear",
    "share",
    "smoothed",
    "v_target",
    "weights",
]
