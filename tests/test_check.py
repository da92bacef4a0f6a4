"""Every check accepts right answers, refuses wrong ones with a sentence that helps, and waits for an unanswered one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from persres_lite.course import check
from persres_lite.course.check.answers import EXERCISES, Refused

FUNCTIONS = {name: made for name, made in EXERCISES.items() if hasattr(made, "known")}
MISTAKES = [(name, said) for name, made in FUNCTIONS.items() for said in made.known(*made.cases[0])[1]]


def known(name, sentence=None):
    """What a check knows as a function: its right answer, or one of its mistakes; without what is forbidden."""

    def answer(*case):
        with torch._C.DisableTorchFunction():
            right, mistakes = FUNCTIONS[name].known(*case)
        return (right[0] if isinstance(right, list) else right) if sentence is None else mistakes[sentence]

    return answer


def _attention(q, k, tokens):
    column = torch.zeros(*k.shape[:2], 1)
    column[:, tokens] = 1
    return functional.scaled_dot_product_attention(q, k, column)[..., 0].mean(0)


def _frozen(module):
    module.requires_grad_(False).eval()
    return ...  # the stub's own last line


def _roots(clean, noise, a):
    noised = torch.sqrt(a) * clean + torch.sqrt(1 - a) * noise  # torch takes no plain number here
    return (torch.sqrt(a) * noised - clean) / torch.sqrt(1 - a)


def _best_cut(heat, truth, levels=None):
    cuts = [heat >= level for level in (heat.unique() if levels is None else levels(heat))]
    return max(float((cut & truth).sum() / (cut | truth).sum()) for cut in cuts)


def _backward(grad, a, b):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return torch.autograd.grad(a @ b, (a, b), grad)


def _stages(identity, fit, slack):
    return [stage for stage in range(len(fit)) if fit[stage] >= fit[0] - slack]


RIGHT = [  # in other styles than the checks' own
    ("attention_map", _attention),
    ("freeze", _frozen),
    ("v_target", _roots),
    ("residual_linear", lambda x, w, bias, a, b: x @ w.T.contiguous() + bias + x @ b.T @ a.T),
    ("alignment", lambda p, r: [float(np.mean([x @ y / x.norm() / y.norm() for y in r])) for x in p]),
    ("median_mask", lambda m: np.asarray(m) > np.asarray(m.flatten(1).median(1).values)[:, None, None]),
    ("masked_loss", lambda p, t, w: np.average(((p - t) ** 2).mean(1, keepdim=True), weights=w)),
    ("detail", lambda gray: known("detail")(gray).numpy()),
    ("best_stage", lambda i, f, slack: max(_stages(i, f, slack), key=lambda stage: i[stage])),
]

WRONG = [  # beside the mistakes that a check knows: its name, the answer, a part of the sentence
    ("projection", functional.conv2d, "calls a convolution"),
    ("residual_linear", lambda x, w, bias, a, b: functional.linear(x, w + a @ b, bias), "forms an m x m matrix"),
    ("attention_map", lambda q, k, t: (q @ k.mT / 8**0.5).softmax(-1)[..., t].sum(-1).mean(0), "table of all weights"),
    ("factor_gradients", _backward, "by hand"),
    ("factor_gradients", lambda g, a, b: g @ b.T, "two tensors"),
    ("best_cut", lambda a, t: _best_cut(a, t, lambda heat: torch.linspace(heat.min(), heat.max(), 500)), "every value"),
    ("best_stage", lambda i, f, slack: max(_stages(i, f, slack), key=lambda k: max(i[k], f[k])), "should be 1"),
    ("best_stage", lambda i, f, slack: 0.78, "a whole number"),
    ("freeze", lambda module: module.requires_grad_(False), "training mode"),
    ("freeze", lambda module: module.eval(), "0.weight"),
    ("v_target", lambda z, n, a: n.mul_(a**0.5).sub_((1 - a) ** 0.5 * z), "in place"),
    ("v_target", lambda z, n, a: (a**0.5 * n - (1 - a) ** 0.5 * z).sum(), "shape"),
    ("truncated", lambda w, r: known("truncated")(w, r)[::-1], "shapes (6, 1) and (1, 6)"),
    ("merge", lambda w, a, b, s: w[:, :, 0, 0] + s * a @ b, "(6, 6, 1, 1), but has (6, 6)"),
    ("loss", lambda p, t: (p - t) ** 2, "one number"),
    ("loss", lambda p, t: float("nan"), "NaN"),
    ("loss", lambda p, t: 3 * functional.mse_loss(p, t), "3 times what it should be"),
    ("passes", lambda steps, batch, count: steps * batch / count - 1, "steps = 150, batch_size = 4, photographs = 7"),
    ("projection", lambda x, w, b: -known("projection")(x, w, b), "sign is the other way round"),
    ("otsu", lambda values: torch.ones_like(values), "of 9 values differ"),
    ("interval", lambda means, level: means.quantile(level), "both ends"),
    ("iou", lambda m, t: m.nothing, "AttributeError"),
    ("grouped_mean", lambda groups: groups, "should be a number, but is a dict"),
    ("blend", lambda f, g, m: None, "returns nothing"),
    ("blend", 0.5, "expected a function, but got a float"),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_checks_own_answer_is_accepted(name, capsys):
    getattr(check, name)(known(name))
    assert capsys.readouterr().out.startswith("Correct: ")


@pytest.mark.parametrize(("name", "sentence"), MISTAKES)
def test_every_mistake_that_a_check_knows_is_named(name, sentence):
    with pytest.raises(Refused) as refusal:
        getattr(check, name)(known(name, sentence))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_are_accepted(name, answer, capsys):
    getattr(check, name)(answer)
    assert capsys.readouterr().out.startswith("Correct: ")


@pytest.mark.parametrize(("name", "answer", "sentence"), WRONG)
def test_wrong_answers_are_refused_with_the_sentence_that_helps(name, answer, sentence, capsys):
    with pytest.raises(AssertionError) as refusal:
        getattr(check, name)(answer)
    assert sentence in str(refusal.value)
    assert "Correct" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [*FUNCTIONS, "freeze"])
def test_unanswered_stubs_are_only_remarked_upon(name, capsys):
    getattr(check, name)(lambda *arguments: ...)
    getattr(check, name)(lambda *arguments: 2.0 * ...)
    getattr(check, name)(...)
    assert capsys.readouterr().out.count("Not answered yet") == 3


def test_values_are_checked_too(capsys):
    for answer in (0.144, 0.1442, 0.14):
        check.share(answer, 1_239_040, 859_520_964)  # two digits are enough
    check.choice("B", "b", "because.")
    check.share(..., 1, 2)
    assert capsys.readouterr().out.splitlines()[3:4] == ["Correct: because."]
    for answer, words in ((0.00144, "percent"), (0.2, "should be"), ("none", "a number, but is a str")):
        with pytest.raises(Refused, match=words):
            check.share(answer, 1_239_040, 859_520_964)
    with pytest.raises(Refused, match="not a"):
        check.choice("a", "b", "because.")


def test_a_notebook_shows_a_refusal_in_one_line_and_no_source():
    with pytest.raises(Refused) as refusal:
        check.loss(lambda p, t: ((p - t) ** 2).sum())
    assert refusal.value._render_traceback_() == [f"Not yet: {refusal.value}"]
    assert refusal.value.__cause__ is None and "sum" in str(refusal.value)
