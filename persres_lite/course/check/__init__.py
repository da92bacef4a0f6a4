"""Checks of the reader's answers: ``check.iou(my_function)`` says what is wrong, or prints ``Correct``.

One public function for each exercise. Each takes the reader's answer first, mostly a function, and tries it on small
random inputs; its docstring says with which arguments the function is called. A wrong answer raises `Refused`, an
AssertionError of one sentence, which a notebook shows without a traceback; an answer that is still ``...`` is only
remarked upon.

A folder and not one file, because a lesson's checks are read beside the lesson: `diffusion` (notebooks 00, 01),
`residuals` (02, 03), `maps` (04, 05), `scores` (06), `own` (07), and `answers`, the mechanism.
"""

from persres_lite.course.check.diffusion import (
    alignment,
    choice,
    ddim_step,
    freeze,
    projection,
    share,
    timestep_of,
    v_target,
)
from persres_lite.course.check.maps import (
    attention_map,
    background_distance,
    best_cut,
    blend,
    iou,
    median_mask,
    otsu,
    quantile_mask,
    weights,
)
from persres_lite.course.check.own import best_stage, detail, passes
from persres_lite.course.check.residuals import (
    factor_gradients,
    loss,
    losses_by_noise_level,
    masked_loss,
    merge,
    needed_rank,
    parameter_count,
    residual_linear,
    smoothed,
    stopping,
    truncated,
)
from persres_lite.course.check.scores import at_equal_leakage, diversity, grouped_mean, interval, on_ruler

__all__ = [
    "alignment",
    "at_equal_leakage",
    "attention_map",
    "background_distance",
    "best_cut",
    "best_stage",
    "blend",
    "choice",
    "ddim_step",
    "detail",
    "diversity",
    "factor_gradients",
    "freeze",
    "grouped_mean",
    "interval",
    "iou",
    "loss",
    "losses_by_noise_level",
    "masked_loss",
    "median_mask",
    "merge",
    "needed_rank",
    "on_ruler",
    "otsu",
    "parameter_count",
    "passes",
    "projection",
    "quantile_mask",
    "residual_linear",
    "share",
    "smoothed",
    "stopping",
    "timestep_of",
    "truncated",
    "v_target",
    "weights",
]
