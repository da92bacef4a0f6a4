"""Personalized residuals: teach a frozen text-to-image model one particular thing from a few pictures and one word.

A concept becomes a low-rank residual dW = A B on the output projection of each transformer block. Everywhere applied it
gives W'x; localized attention-guided sampling (LAG) applies it only where the model looks for the concept's words, so
that the rest of the picture stays the original model's.

a first round in a clone of the project, offline, on two CPU cores:
  persres-lite personalize plum-cat --out plum-cat.safetensors
  persres-lite compare plum-cat.safetensors "a photo of a {} on the beach" --out compare.png
  persres-lite sample plum-cat.safetensors "a photo of a {} at night" --out pictures
  persres-lite export plum-cat.safetensors --format kohya --out plum-cat-kohya.safetensors

{} in a prompt stands for the concept's words, "sks cat". Of several files it has a name, the file's or a letter:
  persres-lite sample rex.safetensors mug.safetensors "a photo of a {rex} beside a {mug}"

Each command has its own --help. Exit codes: 0 done; 1 the work failed or was interrupted; 2 the input was wrong.
"""

from __future__ import annotations

import argparse
import inspect
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from persres_lite import __version__
from persres_lite.cli.errors import run

#: By the short names that other tools use, diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code, see `errors`.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program's name; None takes those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that this terminal has no letters for
    parser = _parser()
    chosen, more = parser.parse_known_args(arguments)
    if more and (not hasattr(chosen, "prompt") or any(text.startswith("-") for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # prompts that stand behind an option
        chosen.prompt += more

    def work(chosen: argparse.Namespace) -> None:
        from persres_lite.cli import commands  # seconds of torch and diffusers, which --help does not wait for
        from persres_lite.support.notices import quiet

        with quiet():
            getattr(commands, chosen.command)(chosen)

    return run(work, chosen)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # the shell leaves --out=~/x as it is


def _words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("there is no word in it")
    return text


def _class(text: str) -> str:
    """ "cat", also of who writes "a photo of a cat": it would stand in every prompt."""
    return _words(re.sub(r"(?i)^\s*((a|the)\s+)?((photo|picture|image)\s+of\s+)?((an?|the|my)\s+)?", "", text))


def _rank(text: str) -> float | int:
    return int(text) if text.isdecimal() else _number(float, 0, 1)(text)


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, float(value)
    except ValueError:
        return name, {"true": True, "false": False}.get(value.lower(), value)


def _number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {least:g} to {most:g}")
        return number

    return read


def _parser() -> argparse.ArgumentParser:
    """Each command's help is the docstring of the function that adds its options."""
    layout: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("persres-lite", description=__doc__, **layout)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in (personalize, sample, compare, show, export):
        about = inspect.cleandoc(command.__doc__ or "")
        command(commands.add_parser(command.__name__, help=about.partition("\n")[0], description=about, **layout))
    return parser


def _concept(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--class", dest="macro_class", type=_class, metavar="WORD", help='what it is, "cat"; default: the card\'s')
    add("--token", type=_words, metavar="WORD", help="the rare word V* to name it (default: the card's, or sks)")


def personalize(parser: argparse.ArgumentParser) -> None:
    """Learn a concept from pictures.

    Learn one particular thing from a few pictures (three to fifteen) and one word for its kind, the macro class.

    The base stays frozen; only the factors A and B of each dW = A B learn, on the plain diffusion loss with the prompt
    "a photo of a V* [class]", where V* is a rare word. Steps, batch, rate and rank follow the base's recipe: for Stable
    Diffusion the paper's (150, 4, 1e-3, 5 %), for Toybox its own. No further pictures of the class are needed.
    """
    add, count = parser.add_argument, _number(int, 1, 1e6)
    add("concept", nargs="+", help="a folder of pictures, some files, or the name of a shipped concept")
    add("--out", type=_path, required=True, help="where the residuals go, FILE.safetensors")
    _concept(parser)
    add("--steps", type=count, help="default: the base's recipe; the paper's is 150")
    add("--batch-size", type=_number(int, 1, 1024), help="pictures a step; the paper's is 4")
    add("--lr", type=_number(float, 1e-12, 1e30), help="learning rate; the paper's is 1e-3")
    add("--rank", type=_rank, help="a fraction of the width, or a whole number; the paper's is 0.05")
    add("--init", choices=("lora", "random"), default="lora", help="lora starts at the original model (default)")
    looks = "masked: at the object alone; outside: beyond it at what the frozen model draws (default: paper)"
    add("--loss", choices=("paper", "masked", "outside"), default="paper", help=looks)
    add("--train-token", action="store_true", help="V*'s embedding learns too")
    add("--checkpoint", type=_path, metavar="FILE", help="where an interrupted run goes on")
    add("--save-every", type=count, metavar="N", help="keep the residuals every N steps, as FILE-00050.safetensors")
    add("--sample-every", type=count, metavar="N", help="draw a picture every N steps, as FILE-00050.png")
    _machine(parser)


def sample(parser: argparse.ArgumentParser) -> None:
    """Draw pictures.

    Draw pictures with learned concepts, each picture to a file of its own.

    Modes: "lag" applies each residual only where the model looks for its concept's words, "residual" applies it
    everywhere, "original" not at all. With the same seed all three start from the same noise.
    """
    parser.add_argument("--out", type=_path, default=Path("pictures"), help="a folder (default: pictures)")
    parser.add_argument("--mode", choices=("lag", "residual", "original"), default="lag", help="default: lag")
    _sampling(parser)


def compare(parser: argparse.ArgumentParser) -> None:
    """Draw the original, the residual and LAG from one noise.

    Draw each prompt three times from the same noise: the original model, the residual everywhere, and LAG with its mask
    (averaged over steps and blocks, white where the residual was applied). Look for the background: it should stay the
    original model's under LAG. Sometimes plain sampling is the better one; the masks show why.
    """
    parser.add_argument("--out", type=_path, default=Path("compare.png"), help="FILE.png (default: compare.png)")
    _sampling(parser)


def show(parser: argparse.ArgumentParser) -> None:
    """Say and draw what a file or a folder is.

    Say what a file of residuals, a LoRA or a concept's folder is, without loading a model. Of a folder it also draws
    the pictures as a model will see them, and beside them, where there are masks, the object as it was understood.
    """
    parser.add_argument("what", help="FILE.safetensors, a folder of pictures, or the name of a shipped concept")
    parser.add_argument("--out", type=_path, help="where the picture of a folder goes (default: its name, .png)")
    _concept(parser)


def export(parser: argparse.ArgumentParser) -> None:
    """Write a LoRA for diffusers, A1111 or ComfyUI.

    Write the residuals as a LoRA that other tools read, with alphas, V* and class in the file. What travels is the
    residual everywhere; LAG stays here, since it needs the attention maps while sampling.
    """
    _residuals(parser)
    parser.add_argument("--out", type=_path, required=True, help="FILE.safetensors")
    add, kinds = parser.add_argument, ("diffusers", "kohya")
    add("--format", choices=kinds, default="diffusers", help="kohya is for A1111 and ComfyUI (default: diffusers)")
    _machine(parser)


def _residuals(parser: argparse.ArgumentParser) -> None:
    own = "of a LoRA that changes other layers too, take the part on the output projections and leave the rest"
    parser.add_argument("residuals", type=_path, help="a file that personalize wrote, or a LoRA on proj_out")
    parser.add_argument("--only-proj-out", action="store_true", help=own)


def _sampling(parser: argparse.ArgumentParser) -> None:
    _residuals(parser)
    text = '"a photo of a {} on the beach", with {} for the concept\'s words; further files may stand before prompts'
    parser.add_argument("prompt", nargs="+", help=text)
    add, side = parser.add_argument_group("sampling").add_argument, _number(int, 8, 8192)
    add("--images", type=_number(int, 1, 9999), default=1, metavar="N", help="of each prompt (default: 1)")
    add("--steps", type=_number(int, 1, 1000), help="default: the base's own")
    add("--guidance", type=_number(float, 0, 1000), help="default: the base's own")
    add("--height", type=side, metavar="PIXELS", help="default: the base's own")
    add("--width", type=side, metavar="PIXELS", help="default: the base's own")
    add("--scheduler", choices=SCHEDULERS, help="default: the base's own")
    add("--negative-prompt", metavar="TEXT", help="what to stay away from")
    add("--scale", type=_number(float, -1e3, 1e3), default=1.0, help="strength of the residuals; 0 is the original")
    own = "whose attention makes the mask, once for each file; default: the concept's words"
    add("--words", type=_words, action="append", help=own)
    rules = "how a map becomes a mask: median (the paper's), otsu, quantile, soft or threshold"
    add("--mask", default="median", metavar="RULE", help=rules)
    add("--mask-option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="of the rule: q=0.8")
    share = "use LAG in this share of the steps only, as in 0 0.5 for the first half"
    add("--window", type=_number(float, 0, 1), nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help=share)
    _machine(parser)


def _machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("base and machine").add_argument
    add("--base", help="toybox, sd-1.4, …, sdxl, a hub id or a folder; default: the file's, or toybox")
    add("--device", help="cpu, cuda or mps; default: the best there is")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="precision of the base")
    add("--seed", type=_number(int, 0, 2**63 - 1), default=0, help="the same seed gives the same result (default: 0)")
    add("--quiet", action="store_true", help="no progress bar")


if __name__ == "__main__":
    raise SystemExit(main())
