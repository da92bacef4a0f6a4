"""How answers are checked: call the reader's function, compare, and say in one sentence what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch


class Unanswered(Exception):
    """The reader's stub still holds its ``...``."""


def exercise(check: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that raises AssertionError on a wrong answer into a check that speaks.

    The check prints ``Correct: …`` with the sentence that the function returns, or ``Not answered yet`` while the
    answer is ``...``; an AssertionError passes through.
    """

    @wraps(check)
    def speaking(answer: Any, *arguments: Any, **options: Any) -> None:
        try:
            if answer is ... or answer is None:
                raise Unanswered
            print("Correct:", check(answer, *arguments, **options))
        except Unanswered:
            print("Not answered yet: replace the ... above, then run this cell again.")

    return speaking


def call(function: Callable, *arguments: Any) -> Any:
    """What the reader's function returns for copies of `arguments`.

    Raises
    ------
    Unanswered
        If it returns ``...``, or stumbles over one in its arithmetic.
    AssertionError
        If it is no function, fails, returns nothing, or changes its arguments.
    """
    require(callable(function), f"expected a function, but got {_kind(function)}: give its name, without calling it.")
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    try:
        found = function(*copies)
    except Exception as error:
        if "ellipsis" in str(error).lower():
            raise Unanswered from None
        raise AssertionError(f"your function raises {type(error).__name__}: {error}") from error
    if found is ...:
        raise Unanswered
    require(found is not None, "your function returns nothing: does it end in a return?")
    for before, after in zip(arguments, copies, strict=True):
        if isinstance(before, torch.Tensor):
            unchanged = torch.equal(before, after)
            require(unchanged, "your function changes its argument in place: compute a new tensor instead.")
    return found


def same(
    found: Any,
    wanted: Any,
    what: str,
    *,
    mistakes: Mapping[str, Any] | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-4,
) -> None:
    """Raise AssertionError with one sentence unless `found` is `wanted` within rounding.

    Parameters
    ----------
    what : str
        What is compared, as the beginning of a sentence: "the blend".
    mistakes : dict of str to object, optional
        Sentences for well-known mistakes, each with the value that such a mistake gives; a matching one is named.
    """
    if isinstance(wanted, torch.Tensor):
        require(isinstance(found, torch.Tensor), f"{what} should be a tensor, but is {_kind(found)}.")
        if found.shape != wanted.shape:
            raise AssertionError(f"{what} should have the shape {tuple(wanted.shape)}, but has {tuple(found.shape)}.")
        if found.dtype != wanted.dtype and (wanted.dtype == torch.bool or not found.dtype.is_floating_point):
            raise AssertionError(f"{what} should have the dtype {wanted.dtype}, but has {found.dtype}.")
    else:
        found, wanted = _number(found, what), float(wanted)
    first, second = _array(found), _array(wanted)
    require(bool(np.isfinite(first).all()), f"{what} holds NaN or infinity.")
    if np.allclose(first, second, atol=atol, rtol=rtol):
        return
    for sentence, value in (mistakes or {}).items():
        wrong = _array(value)
        if wrong.shape == first.shape and np.allclose(first, wrong, atol=atol, rtol=rtol):
            raise AssertionError(f"{what} is not right: {sentence}.")
    if first.ndim == 0:
        raise AssertionError(f"{what} should be {second.item():.6g}, but is {first.item():.6g}.")
    place = np.unravel_index(int(np.argmax(np.abs(first - second))), first.shape)
    where = ", ".join(str(int(index)) for index in place)
    raise AssertionError(f"{what} should be {second[place]:.4g} at [{where}], but is {first[place]:.4g} there.")


def require(condition: bool, sentence: str) -> None:
    """Raise AssertionError with `sentence` unless `condition` holds."""
    if not condition:
        raise AssertionError(sentence)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at every call: what a check tries the reader's function on."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _number(value: Any, what: str) -> float:
    shape = tuple(getattr(value, "shape", ()))
    require(int(np.prod(shape)) == 1, f"{what} should be one number, but has the shape {shape}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise AssertionError(f"{what} should be a number, but is {_kind(value)}.") from None


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype=float)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
