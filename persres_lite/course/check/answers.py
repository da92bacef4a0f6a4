"""How answers are checked: call the reader's function, compare, and say in one sentence what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


class Unanswered(Exception):
    """The reader's stub still holds its ``...``."""


class Refused(AssertionError):
    """A wrong answer. A notebook shows its one sentence and no traceback, in whose lines the solution would stand."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback."""
        return [f"Not yet: {self}"]


def exercise(check: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that raises `Refused` on a wrong answer into a check that speaks.

    The check prints ``Correct: …`` with the sentence that the function returns, or ``Not answered yet`` while the
    answer is ``...``; a refusal passes through, without what caused it.
    """

    @wraps(check)
    def speaking(answer: Any, *arguments: Any, **options: Any) -> None:
        try:
            if answer is ... or answer is None:
                raise Unanswered
            print("Correct:", check(answer, *arguments, **options))
        except Unanswered:
            print("Not answered yet: replace the ... above, then run this cell again.")
        except Refused as refusal:
            raise refusal from None

    return speaking


def call(function: Callable, *arguments: Any, forbidden: Mapping[str, str] | None = None) -> Any:
    """What the reader's function returns for copies of `arguments`.

    Parameters
    ----------
    forbidden : dict of str to str, optional
        What the exercise does without, see `Watched`.

    Raises
    ------
    Unanswered
        If it returns ``...``, or stumbles over one in its arithmetic.
    Refused
        If it is no function, fails, returns nothing, or changes its arguments.
    """
    require(callable(function), f"expected a function, but got {_kind(function)}: give its name, without calling it.")
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    try:
        with Watched(forbidden or {}):
            found = function(*copies)
    except Exception as error:
        if "ellipsis" in str(error).lower():
            raise Unanswered from None
        if isinstance(error, Refused):
            raise
        raise Refused(f"your function raises {type(error).__name__}: {error}") from error
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
    """Raise `Refused` with one sentence unless `found` is `wanted` within rounding.

    Where a tensor is wanted, an array of NumPy or a list does as well, and for a mask booleans do as well as 0 and 1.

    Parameters
    ----------
    what : str
        What is compared, as the beginning of a sentence: "the blend".
    mistakes : dict of str to value, optional
        Sentences for well-known mistakes, each with the value that such a mistake gives; a matching one is named.
    """
    if isinstance(wanted, torch.Tensor):
        found = _tensor(found, what)
        if found.shape != wanted.shape:
            raise Refused(f"{what} should have the shape {tuple(wanted.shape)}, but has {tuple(found.shape)}.")
    else:
        found, wanted = _number(found, what), float(wanted)
    first, second = _array(found), _array(wanted)
    require(bool(np.isfinite(first).all()), f"{what} holds NaN or infinity.")
    if _close(first, second, atol, rtol):
        return
    fitting = [s for s, value in (mistakes or {}).items() if _close(first, _array(value), atol, rtol)]
    if len(fitting) == 1:  # what two mistakes explain is named after neither
        raise Refused(f"{what} is not right: {fitting[0]}.")
    if first.ndim == 0:
        raise Refused(f"{what} should be {second.item():.6g}, but is {first.item():.6g}.")
    place = np.unravel_index(int(np.argmax(np.abs(first - second))), first.shape)
    where = ", ".join(str(int(index)) for index in place)
    raise Refused(f"{what} should be {second[place]:.4g} at [{where}], but is {first[place]:.4g} there.")


def require(condition: bool, sentence: str) -> None:
    """Raise `Refused` with `sentence` unless `condition` holds."""
    if not condition:
        raise Refused(sentence)


class Watched(TorchFunctionMode):
    """Refuses what an exercise forbids while the reader's function computes.

    Parameters
    ----------
    forbidden : dict of str to str
        The sentence, by the name of one of torch's functions or by the last two sizes, "6 x 5", of a tensor that is
        computed (a view of one that was given does not count).
    """

    def __init__(self, forbidden: Mapping[str, str]):
        super().__init__()
        self.forbidden = forbidden

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        reasons = [getattr(function, "__name__", "")]
        if isinstance(result, torch.Tensor) and result.ndim > 1 and self.forbidden:
            given = [value.data_ptr() for value in arguments if isinstance(value, torch.Tensor)]
            if result.data_ptr() not in given:
                reasons.append("{} x {}".format(*result.shape[-2:]))
        for reason in reasons:
            require(reason not in self.forbidden, self.forbidden.get(reason, ""))
        return result


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at every call: what a check tries the reader's function on."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _close(found: np.ndarray, value: np.ndarray, atol: float, rtol: float) -> bool:
    return found.shape == value.shape and np.allclose(found, value, atol=atol, rtol=rtol)


def _number(value: Any, what: str) -> float:
    shape = tuple(getattr(value, "shape", ()))
    require(int(np.prod(shape)) == 1, f"{what} should be one number, but has the shape {shape}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Refused(f"{what} should be a number, but is {_kind(value)}.") from None


def _tensor(value: Any, what: str) -> torch.Tensor:
    if isinstance(value, np.ndarray | list | tuple):
        try:
            value = torch.as_tensor(np.asarray(value, dtype=float))
        except (TypeError, ValueError):
            raise Refused(f"{what} should be a tensor, but is {_kind(value)} of other things.") from None
    require(isinstance(value, torch.Tensor), f"{what} should be a tensor, but is {_kind(value)}.")
    return value


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype=float)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
