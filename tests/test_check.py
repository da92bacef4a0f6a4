"""Every check accepts a right answer, refuses wrong ones with a helpful sentence, and waits for an unanswered one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from persres_lite.course import check


def _frozen(module):
    module.requires_grad_(False)
    module.eval()


def _by_level(losses, timesteps, edges):
    bins = zip(edges[:-1], edges[1:], strict=True)
    return torch.stack([losses[(timesteps >= low) & (timesteps < high)].mean() for low, high in bins])


def _truncated(matrix, rank):
    left, values, right = torch.linalg.svd(matrix)
    return left[:, :rank], values[:rank, None] * right[:rank]


def _needed_rank(matrix, share, power=2):
    strengths = torch.linalg.svdvals(matrix) ** power
    return int((strengths.cumsum(0) / strengths.sum() < share).sum()) + 1


def _otsu(values):
    best, mask = -1.0, None
    for cut in values.unique()[:-1]:
        high = values > cut
        between = high.float().mean() * (~high).float().mean() * (values[high].mean() - values[~high].mean()) ** 2
        if between > best:
            best, mask = between, high
    return mask.float()


def _overlap(mask, truth):
    return float((mask & truth).sum() / (mask | truth).sum())


def _attention(q, k, tokens):
    column = torch.zeros(*k.shape[:2], 1)
    column[:, tokens] = 1
    return functional.scaled_dot_product_attention(q, k, column)[..., 0].mean(0)


def _detail(gray):
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return (around - 4 * gray[1:-1, 1:-1]).var()


def _diversity(features):
    unit = functional.normalize(features, dim=1)
    n = len(unit)
    return 1 - ((unit @ unit.T).sum() - n) / (n * (n - 1))


def _read(leakage, leaks, scores):
    k = int((leaks < leakage).sum().clamp(min=1, max=len(leaks) - 1))
    share = (leakage - leaks[k - 1]) / (leaks[k] - leaks[k - 1])
    return scores[k - 1] + share * (scores[k] - scores[k - 1])


def _mean(values):
    return sum(values) / len(values)


def _grouped(groups):
    return _mean([_mean([_mean(values) for values in trainings.values()]) for trainings in groups.values()])


def _stopping(losses, patience):
    best = 0
    for number, value in enumerate(losses):
        if value < losses[best]:
            best = number
        elif number - best >= patience:
            break
    return best


RIGHT = {
    "passes": lambda steps, batch_size, photographs: steps * batch_size / photographs,
    "detail": _detail,
    "best_stage": lambda identity, fit, slack: int(identity.where(fit >= fit[0] - slack, torch.tensor(-1.0)).argmax()),
    "ddim_step": lambda z, n, a, b: b**0.5 * (z - (1 - a) ** 0.5 * n) / a**0.5 + (1 - b) ** 0.5 * n,
    "v_target": lambda z, n, a: a**0.5 * n - (1 - a) ** 0.5 * z,
    "timestep_of": lambda alpha_bars, share: int((1 - alpha_bars > share).int().argmax()),
    "projection": lambda x, w, b: torch.einsum("oc,bchw->bohw", w.flatten(1), x) + b[:, None, None],
    "alignment": lambda p, r: (functional.normalize(p, dim=1) @ functional.normalize(r, dim=1).T).mean(1),
    "freeze": _frozen,
    "residual_linear": lambda x, w, bias, a, b: functional.linear(x, w, bias) + x @ b.T @ a.T,
    "parameter_count": lambda widths, fraction: sum(2 * w * round(w * fraction) for w in widths),
    "merge": lambda w, a, b, s: w + s * (a @ b)[:, :, None, None],
    "truncated": _truncated,
    "needed_rank": _needed_rank,
    "factor_gradients": lambda g, a, b: (g @ b.T, a.T @ g),
    "loss": functional.mse_loss,
    "losses_by_noise_level": _by_level,
    "smoothed": lambda x, width: x.unfold(0, width, 1).mean(-1),
    "masked_loss": lambda p, t, w: (w * (p - t) ** 2).mean() / w.mean(),
    "stopping": _stopping,
    "attention_map": _attention,
    "iou": lambda m, t: (m & t).sum() / (m | t).sum(),
    "best_cut": lambda a, t: max(_overlap(a >= level, t) for level in a.unique()),
    "median_mask": lambda m: (m > m.flatten(1).median(1).values[:, None, None]).float(),
    "otsu": _otsu,
    "quantile_mask": lambda m, share: (m > m.quantile(1 - share)).float(),
    "blend": lambda f, g, m: (1 - m[:, None]) * f + m[:, None] * g,
    "weights": lambda m: m / m.sum(0).clamp(min=1),
    "background_distance": lambda a, b, m: (a - b).abs()[:, ~m].mean(),
    "on_ruler": lambda score, floor, ceiling: (score - floor) / (ceiling - floor),
    "diversity": _diversity,
    "at_equal_leakage": _read,
    "grouped_mean": _grouped,
    "interval": lambda means, level: (means.quantile((1 - level) / 2), means.quantile((1 + level) / 2)),
}


def _apart(values, high):
    return float(values[high > 0].mean() - values[high == 0].mean())


WRONG = [  # check, answer, a part of the sentence
    ("ddim_step", lambda z, n, a, b: b**0.5 * z + (1 - b) ** 0.5 * torch.randn_like(z), "not a fresh one"),
    ("timestep_of", lambda alpha_bars, share: int((1 - alpha_bars >= share).int().argmax()), "just that share"),
    ("projection", functional.conv2d, "calls a convolution"),
    ("residual_linear", lambda x, w, bias, a, b: functional.linear(x, w + a @ b, bias), "forms an m x m matrix"),
    ("residual_linear", lambda x, w, bias, a, b: x @ w.T + bias + x @ a @ b, "exchanged"),
    ("parameter_count", lambda widths, part: sum(2 * w * w * part for w in widths), "whole number: round it"),
    ("parameter_count", lambda widths, part: sum(2 * w * int(w * part) for w in widths), "rounded down"),
    ("attention_map", lambda q, k, t: (q @ k.mT / 8**0.5).softmax(-1)[..., t].sum(-1).mean(0), "table of all weights"),
    (
        "attention_map",
        lambda q, k, t: functional.scaled_dot_product_attention(q, k, torch.eye(5).expand(2, 5, 5))[..., t].sum(-1),
        "table of all weights",
    ),
    ("median_mask", lambda m: (m >= m.flatten(1).median(1).values[:, None, None]).float(), ""),
    ("quantile_mask", lambda m, share: (m >= m.quantile(1 - share)).float(), "stays outside"),
    ("quantile_mask", lambda m, share: (m > m.quantile(share)).float(), "quantile of 1 - share"),
    ("otsu", lambda v: (v > (v.min() + v.max()) / 2).float(), "in the middle"),
    ("otsu", lambda v: max(((v > c).float() for c in v.unique()[:-1]), key=lambda h: _apart(v, h)), "outlier"),
    ("blend", lambda f, g, m: m[:, None] * g, "f remains"),
    ("iou", lambda m, t: (m & t).sum() / m.numel(), "size of the picture"),
    ("v_target", lambda z, n, a: (a**0.5 * n - (1 - a) ** 0.5 * z).sum(), "shape"),
    ("v_target", lambda z, n, a: n.mul_(a**0.5).sub_((1 - a) ** 0.5 * z), "in place"),
    ("ddim_step", lambda z, n, a, b: (z - (1 - a) ** 0.5 * n) / a**0.5, "noise it again"),
    ("v_target", lambda z, n, a: (1 - a) ** 0.5 * z - a**0.5 * n, "sign"),
    ("timestep_of", lambda alpha_bars, share: int((alpha_bars > share).int().argmax()), "so much of the picture"),
    ("timestep_of", lambda alpha_bars, share: int((1 - alpha_bars <= share).sum()) - 1, "one too early"),
    ("projection", lambda x, w, b: torch.einsum("oc,bchw->bohw", w.flatten(1), x), "bias is missing"),
    ("projection", lambda x, w, b: torch.einsum("co,bchw->bohw", w.flatten(1), x) + b[:, None, None], "transposed"),
    ("alignment", lambda p, r: (p @ r.T).mean(1), "lengths still count"),
    ("alignment", lambda p, r: (functional.normalize(p, dim=1) @ functional.normalize(r, dim=1).T).amax(1), "nearest"),
    ("freeze", lambda module: module.requires_grad_(False), "training mode"),
    ("freeze", lambda module: module.eval(), "0.weight"),
    ("residual_linear", lambda x, w, bias, a, b: functional.linear(x, w, bias), "residual is missing"),
    ("parameter_count", lambda widths, part: sum(2 * w * round(w * part) for w in set(widths)), "every width once"),
    ("merge", lambda w, a, b, s: w + (a @ b)[:, :, None, None], "scale is missing"),
    ("merge", lambda w, a, b, s: w[:, :, 0, 0] + s * a @ b, "(6, 6, 1, 1), but has (6, 6)"),
    ("truncated", lambda w, r: _truncated(w, r)[0] @ _truncated(w, r)[1], "two tensors"),
    ("truncated", lambda w, r: (torch.linalg.svd(w)[0][:, :r], torch.linalg.svd(w).Vh[:r]), "values are missing"),
    ("truncated", lambda w, r: _truncated(w, r)[::-1], "shapes (6, 1) and (1, 6)"),
    ("needed_rank", lambda w, share: _needed_rank(w, share, power=1), "sums their squares"),
    ("needed_rank", lambda w, share: _needed_rank(w, share) - 1, "counted from 0"),
    ("needed_rank", lambda w, share: _needed_rank(w, share) + 1, "more than needed"),
    ("factor_gradients", lambda g, a, b: (a.T @ g, g @ b.T), "A's shape"),
    ("factor_gradients", lambda g, a, b: (g.T @ b.T, a.T @ g), "G is transposed"),
    ("loss", lambda p, t: ((p - t) ** 2).sum(), "sum, not the mean"),
    ("loss", lambda p, t: (p - t) ** 2, "one number"),
    ("losses_by_noise_level", lambda x, t, e: _by_level(x, t, e) * torch.tensor([1, 2, 2]), "sums, not means"),
    ("losses_by_noise_level", lambda x, t, e: _by_level(x, t - 1e-3, e), "begins there"),
    ("smoothed", lambda x, width: x.unfold(0, width, 1).sum(-1), "sums"),
    ("smoothed", lambda x, width: x.cumsum(0)[width - 1 :] / width, "has left the window"),
    ("smoothed", lambda x, width: np.convolve(x, np.ones(width) / width, "same"), "as many means as losses"),
    ("masked_loss", lambda p, t, w: (w * (p - t) ** 2).mean(), "small object"),
    ("masked_loss", lambda p, t, w: (w * (p - t) ** 2).sum() / w.sum(), "several channels"),
    ("masked_loss", lambda p, t, w: ((1 - w) * (p - t) ** 2).mean() / (1 - w).mean(), "background"),
    ("masked_loss", lambda p, t, w: ((p - t) ** 2)[(w > 0.5).expand_as(p)].mean(), "as far as it is object"),
    ("masked_loss", lambda p, t, w: ((w * (p - t)) ** 2).mean() / w.mean(), "the mask is squared"),
    ("stopping", lambda losses, patience: int(np.argmin(losses)), "never made"),
    ("stopping", lambda losses, patience: _stopping(losses, patience) + patience, "where the training ends"),
    ("attention_map", lambda q, k, tokens: _attention(q * 8**0.5, k, tokens), "square root of d_k"),
    ("attention_map", lambda q, k, tokens: _attention(q, k, tokens) / 2, "summed, not averaged"),
    ("iou", lambda m, t: (m & t).sum() / m.sum(), "size of the mask"),
    ("iou", lambda m, t: m.nothing, "AttributeError"),
    ("best_cut", lambda a, t: _overlap(a > a.median(), t), "median"),
    ("best_cut", lambda a, t: _overlap(a >= a.flatten().topk(int(t.sum())).values[-1], t), "true area"),
    ("median_mask", lambda m: (m > m.median()).float(), "its own median"),
    ("otsu", lambda v: (v > v.median()).float(), "median"),
    ("otsu", lambda v: (v > v.mean()).float(), "mean of all values"),
    ("quantile_mask", lambda m, share: (m < m.quantile(share)).float(), "lowest"),
    ("blend", lambda f, g, m: m[:, None] * f + (1 - m[:, None]) * g, "exchanged"),
    ("blend", lambda f, g, m: torch.where(m[:, None] == 1, g, f), "one half"),
    ("weights", lambda m: m / 2, "single mask"),
    ("background_distance", lambda a, b, m: (a - b).abs().mean(), "not left out"),
    ("passes", lambda steps, batch_size, photographs: steps * batch_size, "in all"),
    ("passes", lambda steps, batch_size, photographs: steps / photographs, "not one"),
    ("detail", lambda gray: _detail(gray).sqrt(), "standard deviation"),
    ("best_stage", lambda identity, fit, slack: int(identity.argmax()), "forgotten the prompt"),
    ("best_stage", lambda identity, fit, slack: int(fit.argmax()), "fits the prompt best"),
    ("on_ruler", lambda score, floor, ceiling: score / ceiling, "subtract the floor"),
    ("on_ruler", lambda score, floor, ceiling: min(1, (score - floor) / (ceiling - floor)), "above the ceiling"),
    ("diversity", lambda x: 1 - (functional.normalize(x, dim=1) @ functional.normalize(x, dim=1).T).mean(), "no pair"),
    ("at_equal_leakage", lambda at, x, y: y[(x - at).abs().argmin()], "nearest point"),
    ("grouped_mean", lambda groups: _mean([v for t in groups.values() for p in t.values() for v in p]), "each picture"),
    ("grouped_mean", lambda groups: _mean([_mean(p) for t in groups.values() for p in t.values()]), "more trainings"),
    ("interval", lambda means, level: (means.quantile(1 - level), means.quantile(level)), "each side"),
]


def test_every_check_has_a_right_and_a_wrong_answer():
    valued = {"share", "choice"}  # they take a value, below
    assert set(RIGHT) | valued == set(check.__all__)
    assert {name for name, _, _ in WRONG} == set(RIGHT)


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_are_accepted(name, capsys):
    getattr(check, name)(RIGHT[name])
    assert capsys.readouterr().out.startswith("Correct: ")


@pytest.mark.parametrize(("name", "answer", "sentence"), WRONG)
def test_wrong_answers_are_refused_with_the_sentence_that_helps(name, answer, sentence, capsys):
    with pytest.raises(AssertionError) as refusal:
        getattr(check, name)(answer)
    assert sentence in str(refusal.value)
    assert "Correct" not in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_unanswered_stubs_are_only_remarked_upon(name, capsys):
    getattr(check, name)(lambda *arguments: ...)
    getattr(check, name)(lambda *arguments: 2.0 * ...)
    getattr(check, name)(...)
    assert capsys.readouterr().out.count("Not answered yet") == 3


def test_values_are_checked_too(capsys):
    check.share(0.144, 1_239_040, 859_520_964)
    check.choice("B", "b", "because.")
    check.share(..., 1, 2)
    assert capsys.readouterr().out.splitlines()[1:2] == ["Correct: because."]
    with pytest.raises(AssertionError, match="percent"):
        check.share(0.00144, 1_239_040, 859_520_964)
    with pytest.raises(AssertionError, match="not a"):
        check.choice("a", "b", "because.")


def test_arrays_of_numpy_are_answers_too(capsys):
    def alignment(pictures, references):
        pictures, references = (
            x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.asarray, (pictures, references))
        )
        return (pictures @ references.T).mean(1)

    check.alignment(alignment)
    check.median_mask(lambda m: m > m.flatten(1).median(1).values[:, None, None])  # booleans
    assert capsys.readouterr().out.count("Correct") == 2


def test_a_notebook_shows_a_refusal_in_one_line_and_no_source():
    with pytest.raises(check.answers.Refused) as refusal:
        check.loss(lambda p, t: ((p - t) ** 2).sum())
    assert refusal.value._render_traceback_() == [f"Not yet: {refusal.value}"]
    assert refusal.value.__cause__ is None and "sum" in str(refusal.value)


def test_not_a_number_and_not_a_tensor_are_named():
    with pytest.raises(AssertionError, match="NaN"):
        check.loss(lambda p, t: float("nan"))
    with pytest.raises(AssertionError, match="should be a tensor, but is a float"):
        check.blend(lambda f, g, m: 0.5)
    with pytest.raises(AssertionError, match="returns nothing"):
        check.blend(lambda f, g, m: None)
    with pytest.raises(AssertionError, match="expected a function, but got a float"):
        check.blend(0.5)
