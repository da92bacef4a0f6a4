"""Does it work? Every method, way and scene in one study, a row a picture: ``python -m data.make.study [NAME]``.

A study is a table of lines (`rows.STUDIES`): "full", "headline", "quick" (the same as --quick) or "paper". Rows are
written as soon as they are known, so that the same command goes on where it was stopped; then tables and figures are
made of the rows that are there, in seconds: ``OUT.md``, ``OUT.json``, ``OUT-*.png``. ``--tables`` makes nothing else.

On CPUs a process a core shares the work, with one thread each, so that rows do not depend on how many there are. On
GPUs: ``accelerate launch -m data.make.study ...``, a process each. The paper's protocol, which needs CustomConcept101:
``python -m data.make.study --custom101 FOLDER --base sd-1.4``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from data.make.study import report, rows
from data.make.study.judging import judge_of
from data.make.study.methods import Bench
from data.make.study.subjects import Subject, custom101_subjects, toybox_subjects
from persres_lite import load_base
from persres_lite.bases import settings_of
from persres_lite.residuals import fingerprint
from persres_lite.support.paths import data_dir


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.make.study", description=str(__doc__).split("\n")[0])
    parser.add_argument("study", nargs="?", choices=list(rows.STUDIES), help="which table of lines; full by default")
    parser.add_argument("--quick", action="store_true", help="the study of that name, with short trainings and runs")
    parser.add_argument("--custom101", type=Path, help="CustomConcept101's folder, or one of its lists")
    parser.add_argument("--base", default="toybox", help="toybox, sd-1.4, ...")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--concepts", type=int, help="only the first so many")
    parser.add_argument("--rows", type=Path, help="the folder of rows: build/study-NAME by default")
    parser.add_argument("--out", type=Path, help="path of tables and figures without ending: in the folder by default")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="on a CPU: one a core by default")
    parser.add_argument("--tables", action="store_true", help="only make tables and figures of the rows")
    args = parser.parse_args(arguments)
    args.study = args.study or ("quick" if args.quick else "paper" if args.custom101 else "full")
    args.quick = args.quick or args.study == "quick"
    args.rows = args.rows or Path("build") / f"study-{args.study}"
    args.out = args.out or args.rows / "study"
    return args


def main(arguments: list[str] | None = None) -> None:
    """Carry out the command; without `accelerate launch` this process starts the others and makes the tables."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parse(given)
    process, processes = int(os.environ.get("RANK", -1)), int(os.environ.get("WORLD_SIZE", 1))
    if not args.tables:
        if process >= 0 or torch.cuda.is_available() or args.processes == 1:
            work(args, max(process, 0), processes)
        else:
            share_out(given, args.processes)
    command = shlex.join(["python", "-m", "data.make.study", *given])
    paths = report.write(rows.rows_of(args.rows), args.out, command)  # by the last process with all rows
    print("\n".join(map(str, paths if process < 0 else ())))


def share_out(given: list[str], processes: int) -> None:
    """The same command in so many processes of one thread each."""
    known = os.environ | {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "data.make.study", *given]
    running = [subprocess.Popen(command, env=known | {"RANK": str(rank)}) for rank in range(processes)]
    if max(abs(one.wait()) for one in running):
        raise SystemExit("A process of the study failed: the same command goes on with what is missing.")


def work(args: argparse.Namespace, process: int, processes: int) -> None:
    """One process's share of the rows."""
    torch.set_num_threads(1)  # sums then run in one order, whatever the number of processes
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    base = load_base(args.base, device, torch.float32)
    base.set_progress_bar_config(disable=True)
    bench = Bench(base, args.quick)
    settings = {"weights": fingerprint(base.unet), "sampling": bench.sampling, "recipe": settings_of(base).recipe}
    rows.keep_to(args.rows, settings | {"quick": args.quick})
    units = rows.units_of(rows.STUDIES[args.study], subjects_of(args), args.methods)
    rows.run(bench, judge_of(base, data_dir()), units, args.rows, process, processes)


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """Rendered toys, or what a list of CustomConcept101 names."""
    found = custom101_subjects(args.custom101) if args.custom101 else toybox_subjects()
    return found[: args.concepts]


if __name__ == "__main__":
    main()
