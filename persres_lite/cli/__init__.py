"""The command `persres-lite`: learn a concept, draw with it, compare, export. See ``persres-lite --help``.

Exit codes: 0 done; 1 the work failed or was interrupted; 2 the input was wrong, and nothing was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persres_lite import __version__

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments
        Without the program's name; None takes those of the process.
    """
    chosen = _parser().parse_args(arguments)
    try:
        from persres_lite.cli import commands  # seconds of torch and diffusers, which --help does not wait for

        getattr(commands, chosen.command)(chosen)
    except KeyboardInterrupt:
        again = getattr(chosen, "checkpoint", None)
        return _complain("interrupted" + (f"; the same command goes on from {again}." if again else "."), 1)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        return _complain(error, 2)
    except OSError as error:  # no network, no space
        return _complain(error, 1)
    except RuntimeError as error:
        if "out of memory" in str(error):
            return _complain("out of memory: try --dtype float16, or a smaller --batch-size.", 1)
        from persres_lite.training import Diverged

        if isinstance(error, Diverged):
            return _complain(error, 1)
        raise
    return 0


def _complain(what: object, code: int) -> int:
    print(f"persres-lite: {what}", file=sys.stderr)
    return code


def _rank(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, float(value)
    except ValueError:
        return name, {"true": True, "false": False}.get(value.lower(), value)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
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
        "--class", dest="macro_class", metavar="WORD", help='what it is, "cat"; default: what the folder\'s card says'
    )
    learn.add_argument("--token", metavar="WORD", help="the rare word V* to name it (default: the card's, or sks)")
    learn.add_argument("--steps", type=int, help="default: the base's recipe; the paper's is 150")
    learn.add_argument("--batch-size", type=int, help="pictures a step; the paper's is 4")
    learn.add_argument("--lr", type=float, help="learning rate; the paper's is 1e-3")
    learn.add_argument("--rank", type=_rank, help="a fraction of the width, or a whole number; the paper's is 0.05")
    learn.add_argument("--init", default="lora", help="lora (starts at the original model) or random (both factors)")
    learn.add_argument("--train-token", action="store_true", help="V*'s embedding learns too")
    learn.add_argument("--masked-loss", action="store_true", help="only the object counts; needs masks")
    learn.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    learn.add_argument("--mixed-precision", metavar="KIND", help="fp16 or bf16")
    learn.add_argument("--checkpoint", type=Path, metavar="FILE", help="where an interrupted run goes on")
    learn.add_argument("--sample-every", type=int, metavar="N", help="draw a picture every N steps")
    _common(learn)

    draw = command("sample", "draw pictures", ABOUT_SAMPLE)
    draw.add_argument("residuals", type=Path, help="a file that personalize wrote, or a LoRA on proj_out")
    draw.add_argument("prompt", nargs="+", help='with {} for the concept\'s words: "a photo of a {} on the beach"')
    draw.add_argument("--out", type=Path, default=Path("pictures"), help="a folder (default: pictures)")
    draw.add_argument("--mode", choices=("lag", "residual", "original"), default="lag", help="default: lag")
    _sampling(draw)
    _common(draw)

    both = command("compare", "original, residual and LAG from one noise", ABOUT_COMPARE)
    both.add_argument("residuals", type=Path, help="a file that personalize wrote, or a LoRA on proj_out")
    both.add_argument("prompt", nargs="+", help="as for sample")
    both.add_argument("--out", type=Path, default=Path("compare.png"), help="FILE.png (default: compare.png)")
    _sampling(both)
    _common(both)

    write = command("export", "write a LoRA for diffusers, A1111 or ComfyUI", ABOUT_EXPORT)
    write.add_argument("residuals", type=Path, help="a file that personalize wrote, or a LoRA on proj_out")
    write.add_argument("--out", type=Path, required=True, help="FILE.safetensors")
    write.add_argument("--format", default="diffusers", help="diffusers, or kohya (A1111, ComfyUI); default: diffusers")
    _common(write)
    return parser


def _sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--images", type=_at_least_one, default=1, metavar="N", help="of each prompt (default: 1)")
    group.add_argument("--steps", type=_at_least_one, help="default: the base's own")
    group.add_argument("--guidance", type=float, help="default: the base's own")
    group.add_argument("--scale", type=float, default=1.0, help="strength of the residuals, 0 to 1 (default: 1)")
    group.add_argument("--words", help="whose attention makes the mask; default: the words that the file names")
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
        type=float,
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
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same result (default: 0)")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


if __name__ == "__main__":
    raise SystemExit(main())
