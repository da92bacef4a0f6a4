"""The command `persres-lite`: learn a concept, draw with it, compare, export. See ``persres-lite --help``.

Exit codes: 0 done; 1 the work failed or was interrupted; 2 the input was wrong, and nothing was written.
"""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from persres_lite import __version__
from persres_lite.support.memory import out_of_memory

ABOUT = """\
Personalized residuals: teach a frozen text-to-image model one particular thing from a few pictures and one word.

A concept becomes a low-rank residual dW = A B on the output projection of each transformer block. Everywhere applied it
gives W'x; localized attention-guided sampling (LAG) applies it only where the model looks for the concept's words, so
that the rest of the picture stays the original model's.
"""

EXAMPLES = """\
a first round, offline, on two CPU cores:
  persres-lite personalize plum-cat --out plum-cat.safetensors
  persres-lite compare plum-cat.safetensors "a photo of a {} on the beach" --out compare.png
  persres-lite sample plum-cat.safetensors "a photo of a {} at night" --out pictures
  persres-lite export plum-cat.safetensors --format kohya --out plum-cat-kohya.safetensors

{} in a prompt stands for the concept's words, "sks cat". Each command has its own --help.
exit codes: 0 done; 1 the work failed or was interrupted; 2 the input was wrong.
"""

ABOUT_PERSONALIZE = """\
Learn one particular thing from a few pictures (three to fifteen) and one word for its kind, the macro class.

The base stays frozen; only the factors A and B of each dW = A B learn, on the plain diffusion loss with the prompt
"a photo of a V* [class]", where V* is a rare word. Steps, batch, rate and rank follow the base's recipe: for Stable
Diffusion the paper's (150, 4, 1e-3, 5 %), for Toybox its own. No further pictures of the class are needed.
"""

ABOUT_SAMPLE = """\
Draw pictures with a learned concept, each to a file of its own.

Modes: "lag" applies the residual only where the model looks for the concept's words, "residual" applies it everywhere,
"original" not at all. With the same seed all three start from the same noise.
"""

ABOUT_COMPARE = """\
Draw each prompt three times from the same noise: the original model, the residual everywhere, and LAG with its mask
(averaged over steps and blocks, white where the residual was applied). Look for the background: it should stay the
original model's under LAG. Sometimes plain sampling is the better one; the masks show why.
"""

ABOUT_EXPORT = """\
Write the residuals as a LoRA that other tools read, with alphas, V* and class in the file. What travels is the residual
everywhere; LAG stays here, since it needs the attention maps while sampling.
"""

LONGEST = 2000  # letters of a message: the name of a tensor in someone's file may have millions


class Failed(Exception):
    """The work failed, for a reason that the message says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Whatever a user can bring about is one sentence; a traceback is left for what is this program's own fault.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program's name; None takes those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that this terminal has no letters for
    chosen = _parser().parse_args(arguments)
    try:
        with _only_our_notices():
            from persres_lite.cli import commands  # seconds of torch and diffusers, which --help does not wait for

            getattr(commands, chosen.command)(chosen)
        sys.stdout.flush()
    except Exception as error:
        complaint = _complaint(error, chosen)
        if complaint is None:
            raise
        return _complain(*complaint)
    except KeyboardInterrupt:
        return _complain(_interrupted(chosen), 1)
    return 0


def _complaint(error: Exception, chosen: argparse.Namespace) -> tuple[str, int] | None:
    """What to tell of an error, and the exit code; None for one that no user has brought about."""
    what = str(error)
    if isinstance(error, OSError) and error.errno is not None:  # the system's own words
        what = f"{error.filename or 'reading or writing failed'}: {str(error.strerror).lower()}."
    if isinstance(error, BrokenPipeError):
        # Who was reading has left; what is still to be printed must not fail once more at the exit.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return what, 1
    if isinstance(error, Failed):
        return what, 1
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return _as_typed(what, chosen), 2
    if isinstance(error, OSError):  # no network, no space; or a name that no file can have
        return what, 2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 1
    if out_of_memory(error):
        return f"out of memory: {_smaller(chosen, on_processor='CPU' in what or isinstance(error, MemoryError))}.", 1
    return None


def _smaller(chosen: argparse.Namespace, on_processor: bool) -> str:
    """What needs less memory than the command that ran out of it, apart from what was asked for already."""
    tries = []
    halved = chosen.dtype in ("float16", "bfloat16")
    if not halved and (on_processor or chosen.dtype == "float32"):  # on a GPU it is the default
        tries.append("--dtype bfloat16")
    if not on_processor and chosen.command != "personalize":
        tries.append("--device cpu")
    return f"close what else uses it{', or try ' if tries else ''}{', or '.join(tries)}"


def _as_typed(what: str, chosen: argparse.Namespace) -> str:
    """A sentence that advises an argument of Python's, with the option that stands for it here."""
    for name in vars(chosen):
        option = "--" + name.removeprefix("macro_").replace("_", "-")
        what = re.sub(rf"\b{name}=True\b", option, what)
        what = re.sub(rf"\b{name}='(\w+)'", rf"{option} \1", what)
    return what


def _interrupted(chosen: argparse.Namespace) -> str:
    checkpoint = getattr(chosen, "checkpoint", None)
    if checkpoint is not None and checkpoint.exists():
        return f"interrupted; the same command goes on from {checkpoint}."
    if chosen.command == "personalize":
        return "interrupted, and nothing is kept; with --checkpoint FILE the same command goes on where it stopped."
    return "interrupted."


def _complain(what: str, code: int) -> int:
    """Print one line, whatever a hostile file has put into a name; returns the code."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in what)
    line = " ".join(line.split())
    print(f"persres-lite: {line if len(line) <= LONGEST else line[:LONGEST] + ' …'}", file=sys.stderr)
    return code


@contextmanager
def _only_our_notices() -> Iterator[None]:
    """This package's own remarks as plain lines, and none of the libraries', which a user can do nothing about."""
    from persres_lite.support.notices import Notice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=Notice)
        warnings.showwarning = lambda message, *_, **__: _complain(str(message), 0)  # type: ignore[assignment]
        yield


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not text in UTF-8") from None
    return text


def _words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("there is no word in it")
    return _text(text)


def _rank(text: str) -> float | int:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number: give 0.05 or 16, for example") from None


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, float(value)
    except ValueError:
        return name, {"true": True, "false": False}.get(value.lower(), value)


def _whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """For whole numbers in a range."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if least is not None and number < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}")
        return number

    return read


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("persres-lite", description=ABOUT, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=about, formatter_class=layout)

    learn = command("personalize", "learn a concept from pictures", ABOUT_PERSONALIZE)
    learn.add_argument("concept", nargs="+", help="a folder of pictures, some files, or the name of a shipped concept")
    learn.add_argument("--out", type=Path, required=True, help="where the residuals go, FILE.safetensors")
    learn.add_argument(
        "--class",
        dest="macro_class",
        type=_words,
        metavar="WORD",
        help='what it is, "cat"; default: what the folder\'s card says',
    )
    learn.add_argument(
        "--token", type=_words, metavar="WORD", help="the rare word V* to name it (default: the card's, or sks)"
    )
    learn.add_argument("--steps", type=_whole(), help="default: the base's recipe; the paper's is 150")
    learn.add_argument("--batch-size", type=_whole(most=1024), help="pictures a step; the paper's is 4")
    learn.add_argument("--lr", type=_finite, help="learning rate; the paper's is 1e-3")
    learn.add_argument("--rank", type=_rank, help="a fraction of the width, or a whole number; the paper's is 0.05")
    learn.add_argument(
        "--init", choices=("lora", "random"), default="lora", help="lora (starts at the original model) or random"
    )
    learn.add_argument("--train-token", action="store_true", help="V*'s embedding learns too")
    learn.add_argument(
        "--loss",
        choices=("paper", "masked", "outside"),
        default="paper",
        help="what it looks at: all; the object alone (needs masks); or outside it the frozen model's own prediction",
    )
    learn.add_argument("--checkpoint", type=Path, metavar="FILE", help="where an interrupted run goes on")
    learn.add_argument("--sample-every", type=_whole(), metavar="N", help="draw a picture every N steps")
    _common(learn)

    draw = command("sample", "draw pictures", ABOUT_SAMPLE)
    _residuals(draw)
    draw.add_argument(
        "prompt", nargs="+", type=_text, help='with {} for the concept\'s words: "a photo of a {} on the beach"'
    )
    draw.add_argument("--out", type=Path, default=Path("pictures"), help="a folder (default: pictures)")
    draw.add_argument("--mode", choices=("lag", "residual", "original"), default="lag", help="default: lag")
    _sampling(draw)
    _common(draw)

    both = command("compare", "original, residual and LAG from one noise", ABOUT_COMPARE)
    _residuals(both)
    both.add_argument("prompt", nargs="+", type=_text, help="as for sample")
    both.add_argument("--out", type=Path, default=Path("compare.png"), help="FILE.png (default: compare.png)")
    _sampling(both)
    _common(both)

    write = command("export", "write a LoRA for diffusers, A1111 or ComfyUI", ABOUT_EXPORT)
    _residuals(write)
    write.add_argument("--out", type=Path, required=True, help="FILE.safetensors")
    write.add_argument("--format", default="diffusers", help="diffusers, or kohya (A1111, ComfyUI); default: diffusers")
    _common(write)
    for reader in (draw, both, write):
        reader.add_argument(
            "--only-proj-out",
            action="store_true",
            help="of a LoRA that changes other layers too, take the part on the output projections and leave the rest",
        )
    return parser


def _residuals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("residuals", type=Path, help="a file that personalize wrote, or a LoRA on proj_out")


def _sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--images", type=_whole(1, 9999), default=1, metavar="N", help="of each prompt (default: 1)")
    group.add_argument("--steps", type=_whole(1, 1000), help="default: the base's own")
    group.add_argument("--guidance", type=_finite, help="default: the base's own")
    group.add_argument(
        "--scale", type=_finite, default=1.0, help="strength of the residuals; 0 is the original (default: 1)"
    )
    group.add_argument("--words", type=_words, help="whose attention makes the mask; default: the concept's words")
    group.add_argument(
        "--mask",
        default="median",
        metavar="RULE",
        help="how a map becomes a mask: median (the paper's), otsu, quantile, soft or threshold",
    )
    group.add_argument(
        "--mask-option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="of the rule: q=0.8"
    )
    group.add_argument(
        "--window",
        type=_finite,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("FROM", "TO"),
        help="use LAG in this share of the steps only, as in 0 0.5 for the first half",
    )


def _common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base and machine")
    group.add_argument("--base", help="toybox, sd-1.4, …, sdxl, a hub id or a folder; default: the file's, or toybox")
    group.add_argument("--device", help="cpu, cuda or mps; default: the best there is")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="precision of the base")
    group.add_argument(
        "--seed", type=_whole(0, 2**63 - 1), default=0, help="the same seed gives the same result (default: 0)"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


if __name__ == "__main__":
    raise SystemExit(main())
