"""How answers are checked: call the reader's function, compare, and say in one sentence what is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

EXERCISES: dict[str, Callable] = {}
"""Every check by its name. Those made by `exercise` also say what they know, and their cases."""

LIKELY: dict[str, Callable] = {
    "the sign is the other way round": np.negative,
    "it is 1 minus what it should be": lambda right: 1 - right,
    "it is upside down": lambda right: 1 / right,
    "it is the square of what it should be": np.square,
    "it is the root of what it should be": lambda right: np.sqrt(np.abs(right)),
    "the last two axes are exchanged": lambda right: right.swapaxes(-1, -2) if right.ndim > 1 else right,
}
"""What a wrong answer may be where none of an exercise's own mistakes fits: a sentence, and how it comes about."""


class Unanswered(Exception):
    """The reader's stub still holds its ``...``."""


class Refused(AssertionError):
    """A wrong answer. A notebook shows its one sentence and no traceback, in whose lines the solution would stand."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback."""
        return [f"Not yet: {self}"]


def speaking(check: Callable[..., str]) -> Callable[..., None]:
    """Turn a function that raises `Refused` on a wrong answer into a check that speaks.

    The check prints ``Correct: …`` with the sentence that the function returns, or ``Not answered yet`` while the
    answer is ``...``; a refusal passes through, without what caused it.
    """

    @wraps(check)
    def spoken(answer: Any, *arguments: Any) -> None:
        try:
            if answer is ... or answer is None:
                raise Unanswered
            print("Correct:", check(answer, *arguments))
        except Unanswered:
            print("Not answered yet: replace the ... above, then run this cell again.")
        except Refused as refusal:
            raise refusal from None

    EXERCISES[check.__name__] = spoken
    return spoken


def exercise(
    cases: list[tuple],
    praise: str,
    *,
    read: Callable = lambda found, *case: found,
    forbidden: Mapping[str, str] | None = None,
    tolerance: float = 1e-4,
) -> Callable[[Callable], Callable[[Any], None]]:
    """Make a check of a function that gives, for a case, the right answer (or a list of them) and the well-known
    mistakes: what each gives instead, by the sentence that helps.

    Parameters
    ----------
    cases : list of tuple
        The arguments that the reader's function is tried on, each time.
    praise : str
        What is said of a right answer.
    read : callable
        Takes what was returned, then the case's arguments: gives what is compared, or raises `Refused`.
    forbidden : dict of str to str, optional
        What the exercise does without, see `Watched`.
    tolerance : float
        How far an answer may be off, both absolutely and as a share.
    """

    def made(known: Callable) -> Callable[[Any], None]:
        def check(answer: Callable) -> str:
            for case in cases:
                found = read(call(answer, *case, forbidden=forbidden), *case)
                right, mistakes = known(*case)
                rights = right if isinstance(right, list) else [read(right, *case)]
                wrong = {sentence: read(each, *case) for sentence, each in mistakes.items()}
                same(found, rights, f"your result{_said(known, case)}", wrong, tolerance)
            return praise

        check.__name__, check.__doc__ = known.__name__, known.__doc__
        spoken = speaking(check)
        spoken.known, spoken.cases = known, cases  # type: ignore[attr-defined]
        return spoken

    return made


def call(function: Callable, *arguments: Any, forbidden: Mapping[str, str] | None = None) -> Any:
    """What the reader's function returns for copies of `arguments`; numbers become tensors if it takes no others.

    Raises
    ------
    Unanswered
        If it returns ``...``, or stumbles over one in its arithmetic.
    Refused
        If it is no function, fails, returns nothing, changes its arguments, or does what is `forbidden`.
    """
    require(callable(function), f"expected a function, but got {_kind(function)}: give its name, without calling it.")
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    try:
        with Watched(forbidden or {}):
            found = function(*copies)
    except Refused:
        raise
    except Exception as error:
        if "ellipsis" in str(error).lower():
            raise Unanswered from None
        if "must be Tensor, not float" in str(error):  # torch.sqrt of a number
            given = [torch.tensor(value) if isinstance(value, float) else value for value in arguments]
            return call(function, *given, forbidden=forbidden)
        raise Refused(f"your function raises {type(error).__name__}: {error}") from error
    if found is ...:
        raise Unanswered
    require(found is not None, "your function returns nothing: does it end in a return?")
    for before, after in zip(arguments, copies, strict=True):
        unchanged = not isinstance(before, torch.Tensor) or torch.equal(before, after)
        require(unchanged, "your function changes its argument in place: compute a new tensor instead.")
    return found


def pair(found: Any, names: str) -> Any:
    """What was returned, if it is two things."""
    require(isinstance(found, tuple | list) and len(found) == 2, f"your function should return two tensors: {names}.")
    return found


def same(found: Any, wanted: list, what: str, mistakes: Mapping[str, Any], tolerance: float = 1e-4) -> None:
    """Raise `Refused` with one sentence unless `found` is one of the `wanted` within rounding.

    Where a tensor is wanted, an array of NumPy or a list does as well, and for a mask booleans do as well as 0 and 1.
    """

    def close(one: np.ndarray, other: np.ndarray) -> bool:
        return one.shape == other.shape and np.allclose(one, other, atol=tolerance, rtol=tolerance)

    first, right = _array(found, what, np.ndim(wanted[0]) == 0), _array(wanted[0], what)
    if any(close(first, _array(value, what)) for value in wanted):
        return
    fitting = [sentence for sentence, value in mistakes.items() if close(first, _array(value, what))]
    if len(fitting) == 1:  # what two mistakes explain is named after neither
        raise Refused(f"{what} is not right: {fitting[0]}.")
    if first.shape != right.shape:
        raise Refused(f"{what} should have the shape {right.shape}, but has {first.shape}.")
    require(bool(np.isfinite(first).all()), f"{what} holds NaN or infinity.")
    place = np.unravel_index(int(np.argmax(np.abs(first - right))), first.shape)
    where = f" at {[int(index) for index in place]}" if first.ndim else ""
    with np.errstate(all="ignore"):
        likely = [sentence for sentence, mistake in LIKELY.items() if close(first, np.asarray(mistake(right)))]
        ratio = first[place] / right[place]
        whole = any(np.isclose(part, np.round(part), atol=1e-3) for part in (ratio, 1 / ratio))
        if not likely and whole and close(first, ratio * right):
            likely = [f"it is {ratio:.4g} times what it should be"]
    if not likely and first.ndim:
        likely = [f"{np.sum(~np.isclose(first, right, tolerance, tolerance))} of {first.size} values differ"]
    hint = f"; {likely[0]}" if likely else ""
    raise Refused(f"{what} should be {right[place]:.6g}{where}, but is {first[place]:.6g}{hint}.")


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
        computed from others (a view or a copy of one that was given does not count).
    """

    def __init__(self, forbidden: Mapping[str, str]):
        super().__init__()
        self.forbidden = forbidden

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        require(name not in self.forbidden, self.forbidden.get(name, ""))
        result = function(*arguments, **options or {})
        inside = [part for value in arguments for part in (value if isinstance(value, tuple | list) else [value])]
        given = [value.data_ptr() for value in inside if isinstance(value, torch.Tensor)]
        if len(given) > 1 and isinstance(result, torch.Tensor) and result.ndim > 1 and result.data_ptr() not in given:
            size = "{} x {}".format(*result.shape[-2:])
            require(size not in self.forbidden, self.forbidden.get(size, ""))
        return result


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at every call: what a check tries the reader's function on."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _said(function: Callable, case: tuple) -> str:
    """The arguments of a case that can be read: " for share = 0.5"."""
    names = [f"{name} = {value}" for name, value in zip(inspect.signature(function).parameters, case, strict=True)]
    short = [each for each in names if "tensor" not in each and len(each) < 50]
    return f" for {', '.join(short)}" if short else ""


def _array(value: Any, what: str, number: bool = False) -> np.ndarray:
    value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    with suppress(TypeError, ValueError):
        found = np.asarray(value, dtype=float)
        require(not number or found.size == 1, f"{what} should be one number, but has the shape {found.shape}.")
        return found.reshape(()) if number else found
    raise Refused(f"{what} should be a {'number' if number else 'tensor'}, but is {_kind(value)}.")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
