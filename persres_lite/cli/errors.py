"""What goes wrong, in one place: a sentence for what a user can bring about, a traceback for this program's own fault.

Exit codes: 0 done; 1 the work failed or was interrupted; 2 the input was wrong, and nothing was written.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress

from persres_lite.support.notices import Notice

SMALLER = "close what else uses it, or try --dtype bfloat16, a smaller --height and --width, or --device cpu"

WRONG_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class Failed(Exception):
    """The work failed, for a reason that the message says."""


def run(work: Callable[[Namespace], None], chosen: Namespace) -> int:
    """Do a command's work and return its exit code."""
    try:
        with warnings.catch_warnings():  # our own remarks alone: about the libraries' a user can do nothing
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=Notice)
            warnings.showwarning = lambda message, *_, **__: say(str(message))
            work(chosen)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        code, what = 1, _interrupted(chosen)
    except Exception as error:
        code, what = 2 if isinstance(error, WRONG_INPUT) else 1, _sentence(error, chosen)
        if not what:
            raise
    say(what)
    return code


def say(what: str) -> None:
    """Print one line on the error stream, whatever a hostile file has put into a name."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in what)
    print("persres-lite:", *line.split(), file=sys.stderr, flush=True)


def _sentence(error: Exception, chosen: Namespace) -> str:
    """What to tell of an error; nothing for one that no user has brought about."""
    from persres_lite.support.memory import out_of_memory

    what = str(error)
    if isinstance(error, BrokenPipeError):
        # Who was reading has left; what is still to be printed must not fail once more at the exit.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, OSError) and error.errno is not None:  # the system's own words
        return f"{error.filename or 'reading or writing failed'}: {str(error.strerror).lower()}."
    if isinstance(error, FloatingPointError):
        broken = "if --mode original fails as well, the base is broken, otherwise the residuals are"
        return f"{what} Try --dtype float32 or a --scale below 1; {broken}."
    if out_of_memory(error):
        return f"out of memory: {SMALLER}."
    for name in vars(chosen):  # an argument of Python's is advised: the option stands for it here
        option = "--" + name.removeprefix("macro_").replace("_", "-")
        what = re.sub(rf"\b{name}=True\b", option, what)
        what = re.sub(rf"\b{name}='(\w+)'", rf"{option} \1", what)
    return what if isinstance(error, ValueError | Failed | OSError | ImportError) else ""


def _interrupted(chosen: Namespace) -> str:
    checkpoint = getattr(chosen, "checkpoint", None)
    if checkpoint and checkpoint.exists():
        return f"interrupted; the same command goes on from {checkpoint}."
    return "interrupted." + " With --checkpoint FILE it could have gone on." * (chosen.command == "personalize")
