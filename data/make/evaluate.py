"""Does it work? Every method on one base, with one set of pictures, prompts, noises and judges.

``python -m data.make.evaluate [run | tables | search | ablations]``

``run`` (the default)
    Trains and draws what no row is there for yet, and writes a row as soon as it is known: it can be stopped at any
    point, and the same command goes on. Then the tables, as ``tables``. With ``--steps`` all methods take as many, as
    in the committed table, and only the rate is that of ``search``.
``tables``
    Makes ``OUT.md`` and ``OUT.json`` of the rows that are there.
``search``
    Tries rates and steps of each method on concepts that are in no table, and writes the recipes that ``run`` takes.
    The rule was fixed before the first run: of the recipes that keep the place asked for in at least 0.9 of the
    pictures, the one with the highest identity of the toy alone; in a tie, to two digits, fewer steps.
``ablations``
    One choice of the method changed at a time, on the first two concepts if no number is given: rows in a folder of
    their own, and a table of what is there. Other methods stand beside it with as many steps as the recipe has, and
    with as many as fit into the seconds that these take. ``--only`` names some kinds of rows, as ``--only heads``.

Without a list of concepts, the rendered ones of Toybox. With CustomConcept101's list, the paper's protocol:
``PERSRES_BASE=sd-1.4 python -m data.make.evaluate --custom101 FOLDER/dataset.json --seeds 50``.

Several processes share the work, one a GPU: ``accelerate launch -m data.make.evaluate ...``; on a CPU one a
core: ``torchrun --nproc-per-node 2 -m data.make.evaluate ...``. Each computes in one thread on a CPU, so
that rows do not depend on how many there are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from data.make import runs
from data.make.evaluation import ablations, subjects, tables, work
from data.make.evaluation.judging import judge_of
from data.make.evaluation.methods import (
    METHODS,
    PAPER_RECIPES,
    RESIDUALS,
    Bench,
    Recipe,
    as_long,
    step_seconds,
)
from data.make.evaluation.ways import SCALES
from persres_lite import load_base
from persres_lite.bases import settings_of
from persres_lite.concepts import Concept
from persres_lite.support.files import whole_file

RECIPES = "evaluation-recipes.json"
QUICK = ("textual inversion", "DreamBooth", "residuals")
QUICK_STEPS = 10  # of sampling
STEP_SECONDS = "step-seconds.json"

# Where the search on Toybox starts; each rate is also tried three times lower and three times higher.
TOYBOX_RECIPES = {
    "textual inversion": Recipe(100, 4, 3e-2),
    "DreamBooth": Recipe(100, 4, 3e-4),
    "DreamBooth, prior": Recipe(100, 4, 3e-4, prior=16),
    "Custom Diffusion": Recipe(100, 4, 1e-3, prior=16),
    "attention LoRA, rank 4": Recipe(100, 4, 1e-2),
    "attention LoRA, equal parameters": Recipe(100, 4, 3e-3),
    "attention LoRA, rank 4, prior": Recipe(100, 4, 1e-2, prior=16),
    "residuals": Recipe(100, 4, 1e-2),
    "residuals, prior": Recipe(100, 4, 1e-2, prior=16),
    "proj_out LoRA": Recipe(100, 4, 1e-2),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=["run", "tables", "search", "ablations"])
    parser.add_argument("--quick", action="store_true", help="two concepts, few methods and prompts, half the steps")
    parser.add_argument("--base", help="as the notebooks' BASE; by default PERSRES_BASE, else toybox")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the project's data folder")
    parser.add_argument("--custom101", type=Path, help="CustomConcept101's dataset.json or dataset_multiconcept.json")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="only these")
    parser.add_argument("--concepts", type=int, help="how many concepts, the first ones")
    parser.add_argument("--trainings", type=int, default=3, help="of each concept by each method")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--steps", type=int, help="the same number of training steps for every method")
    parser.add_argument(
        "--seconds",
        type=lambda text: text if text == RESIDUALS else float(text),
        help=f'of training, the same for every method: as many steps as fit in; "{RESIDUALS}" for what theirs take',
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WHAT", help='of the ablations, those of this, as "macro class", and the recipe'
    )
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="strengths of what was learned")
    parser.add_argument(
        "--controls", nargs="*", choices=work.CONTROLS, metavar="CONTROL", help="other masks: only these"
    )
    parser.add_argument("--ranked", type=int, default=4, help="pictures of each way that the renderer reads")
    parser.add_argument("--rows", type=Path, default=Path("build/evaluation"), help="folder of the rows")
    parser.add_argument("--out", type=Path, help="where the tables go, without ending")
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    return parser.parse_args(arguments)


def recipes_of(base: Any, data: Path) -> dict[str, Recipe]:
    """The search's for Toybox if there are some, the authors' for all other bases."""
    if settings_of(base).name != "toybox":
        return dict(PAPER_RECIPES)
    path = data / "results" / RECIPES
    found = json.loads(path.read_text(encoding="utf-8"))["recipes"] if path.exists() else {}
    return TOYBOX_RECIPES | {name: Recipe(**recipe) for name, recipe in found.items()}


def plan_of(args: argparse.Namespace, base: Any) -> work.Plan:
    """What the command line asks for."""
    recipes = recipes_of(base, args.data)
    if args.steps:
        recipes = {name: replace(recipe, steps=args.steps) for name, recipe in recipes.items()}
    scales = tuple(sorted({*args.scales, 1.0}))
    controls = None if args.controls is None else tuple(args.controls)
    plan = work.Plan(tuple(args.methods), recipes, args.trainings, args.seeds, scales, controls, args.ranked)
    if not args.quick:
        return plan
    few = tuple(method for method in QUICK if method in args.methods)
    if not args.steps:
        recipes = {name: replace(recipe, steps=max(1, recipe.steps // 2)) for name, recipe in recipes.items()}
    chosen = ("complement", "true mask", "disc, half")
    return work.Plan(few, recipes, trainings=1, seeds=1, scales=(0.5, 1.0), controls=chosen, ranked=2)


def main(arguments: list[str] | None = None) -> None:
    """Carry out one command."""
    args = parse(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums then run in one order, whatever the number of processes
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    base = load_base(args.base, state.device, torch.float32)
    base.set_progress_bar_config(disable=True)
    sampling = settings_of(base).sampling
    steps = sampling["num_inference_steps"]
    try:
        if args.quick:
            sampling["num_inference_steps"] = QUICK_STEPS
        _carry_out(args, base, state)
    finally:
        sampling["num_inference_steps"] = steps
        torch.set_num_threads(threads)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "data.make.evaluate", *given])
    if args.what == "ablations" and state.is_main_process:
        _write_ablations(args, base, command)
    elif args.what != "search" and state.is_main_process:
        rows, out = work.rows_of(args.rows), args.out or args.rows / "evaluation"
        found = tables.write(rows, planned(args.rows, rows), out, command, args.draws)
        print(f"{out}.md: {len(found['methods'])} methods and ways")


def _carry_out(args: argparse.Namespace, base: Any, state: PartialState) -> None:
    """Everything but the tables."""
    plan = plan_of(args, base)
    if args.what == "search":
        _search(args, base, plan, state)
    if args.what == "ablations":
        pairs = subjects.first(pairs_of(args, base), args.concepts or 2)
        folder, judge = args.rows / "ablations", judge_of(base, args.data)
        bench, recipes = Bench(base), {}
        rivals = any(one.method for one in ablations.chosen(base, args.only))
        with state.main_process_first():
            settings = _settings(args, base, plan) | {"recipe": settings_of(base).recipe}
            work.keep_to(folder, settings if rivals else settings | {"recipes": {}})
            if rivals:
                recipes = ablations.equal(bench, pairs[0][0].concept, plan.recipes, folder / STEP_SECONDS)
        numbers = (args.trainings, args.seeds, args.ranked, state.process_index, state.num_processes)
        ablations.run(bench, judge, pairs, folder, *numbers, args.only, recipes)
        state.wait_for_everyone()
    if args.what != "run":
        return
    pairs = pairs_of(args, base)
    with state.main_process_first():
        if args.seconds:
            plan = within(args.seconds, base, pairs[0][0].concept, plan, args.rows / STEP_SECONDS)
        work.keep_to(args.rows, _settings(args, base, plan))
    judge, bench = judge_of(base, args.data), Bench(base)
    work.run(bench, judge, pairs, plan, args.rows, state.process_index, state.num_processes)
    state.wait_for_everyone()


def _write_ablations(args: argparse.Namespace, base: Any, command: str) -> None:
    folder = args.rows / "ablations"
    rows = work.rows_of(folder)
    found = ablations.tables_of(rows, base, args.draws)
    about = tables.about_of(command, rows) | {"absent": ablations.absent(base)}
    out = args.out or folder / "ablations"
    with whole_file(out.with_suffix(".json")) as file:
        file.write_text(json.dumps({"about": about, "ablations": found}, indent=1) + "\n")
    with whole_file(out.with_suffix(".md")) as file:
        file.write_text(ablations.markdown(found, about))
    print(f"{out}.md: {len(found)} rows")


def planned(folder: Path, rows: list[work.Row]) -> work.Plan:
    """What the rows in a folder were made with, whatever the command line says now."""
    path = folder / "settings.json"
    if not path.exists():
        raise SystemExit(f"There are no rows in {folder}: run first, or name their folder with --rows.")
    settings = json.loads(path.read_text(encoding="utf-8"))
    recipes = {method: Recipe(**recipe) for method, recipe in settings["recipes"].items()}
    trainings = {row["training"] for row in rows} - {None}
    scales = {row["scale"] for row in rows if row["training"] is not None}
    return work.Plan(tuple(recipes), recipes, len(trainings), settings["pictures a prompt"], tuple(sorted(scales)))


def pairs_of(args: argparse.Namespace, base: Any) -> list[subjects.Pair]:
    """The concepts that the command line asks for, in pairs."""
    if args.custom101 is None and settings_of(base).name != "toybox":
        raise SystemExit("Rendered toys are for Toybox: give CustomConcept101's list, --custom101 FOLDER/dataset.json.")
    count = 2 if args.quick and args.concepts is None else args.concepts
    pairs = subjects.custom101_pairs(args.custom101, count) if args.custom101 else subjects.toybox_pairs(count)
    return [tuple(_fewer(subject) for subject in pair) for pair in pairs] if args.quick else pairs


def _settings(args: argparse.Namespace, base: Any, plan: work.Plan) -> dict[str, Any]:
    """What all rows of a folder must share; concepts, trainings and methods may be added later."""
    return {
        "base": settings_of(base).name,
        "weights": work.weights_of(base, args.data),
        "concepts": str(args.custom101) if args.custom101 else "toybox",
        "sampling": settings_of(base).sampling,
        "pictures a prompt": plan.seeds,
        "pictures ranked": plan.ranked,
        "prompts": "few" if args.quick else "all",
        "recipes": {method: asdict(plan.recipes[method]) for method in plan.methods},
    }


def within(seconds: float | str, base: Any, concept: Concept, plan: work.Plan, path: Path) -> work.Plan:
    """The plan with as many steps as fit into so many seconds, or into those that the residuals' own steps take."""
    asked = {*plan.methods, *([RESIDUALS] if seconds == RESIDUALS else [])}
    of_one = step_seconds(Bench(base), concept, {name: plan.recipes[name] for name in METHODS if name in asked}, path)
    limit = of_one[RESIDUALS] * plan.recipes[RESIDUALS].steps if seconds == RESIDUALS else float(seconds)
    recipes = {name: as_long(plan.recipes[name], limit, of_one[name]) for name in plan.methods}
    return replace(plan, recipes=recipes)


def _fewer(subject: subjects.Subject) -> subjects.Subject:
    """Two prompts of places, or the first two, one of two concepts, and one of each kind without the concept."""
    several = [prompt for prompt in subject.prompts if prompt.kind in ("place", "any")][:2]
    both = [prompt for prompt in subject.prompts if prompt.kind == "two concepts"][:1]
    return replace(subject, prompts=several + both, drift=subject.drift[::2])


def _of_places(subject: subjects.Subject) -> subjects.Subject:
    """Only the prompts that the search's rule asks about."""
    return replace(subject, prompts=[prompt for prompt in subject.prompts if prompt.kind == "place"], drift=[])


def _search(args: argparse.Namespace, base: Any, plan: work.Plan, state: PartialState) -> None:
    """Rates three times lower and higher and half the steps; one folder of rows a recipe."""
    pairs, judge, bench = subjects.search_pairs(), judge_of(base, args.data), Bench(base)
    if args.concepts:
        pairs = pairs[: args.concepts]
    pairs = [tuple(_of_places(subject) for subject in pair) for pair in pairs]
    kept: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for method in plan.methods:
        start = TOYBOX_RECIPES[method]
        for steps in (start.steps // 2, start.steps):
            for factor in (1 / 3, 1, 3):
                recipe = replace(start, steps=steps, lr=float(f"{start.lr * factor:.1g}"))
                folder = args.rows / f"search-{method.replace(' ', '-')}-{recipe.steps}-{recipe.lr:g}"
                one = replace(plan, methods=(method,), recipes={method: recipe}, trainings=1, scales=(1.0,))
                one = replace(one, controls=(), ranked=0, frozen=False)
                with state.main_process_first():
                    work.keep_to(folder, _settings(args, base, one))
                work.run(bench, judge, pairs, one, folder, state.process_index, state.num_processes, kept)
                state.wait_for_everyone()
                full = tables.tables_of(work.rows_of(folder), draws=2)["methods"][method]
                row = {"recipe": asdict(recipe), "identity": full["identity"]["mean"], "place": full["place"]["mean"]}
                found.setdefault(method, {})[f"{recipe.steps} steps, rate {recipe.lr:g}"] = row
    if state.is_main_process:
        recipes = {method: best(rows)["recipe"] for method, rows in found.items()}
        with whole_file(args.out or args.data / "results" / RECIPES) as file:
            file.write_text(json.dumps({"recipes": recipes, "tried": found, "commit": runs.commit()}, indent=1) + "\n")


def best(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By the rule that stands at the top of this file."""
    fit = [row for row in rows.values() if row["place"] >= 0.9] or list(rows.values())
    return max(fit, key=lambda row: (round(row["identity"], 2), -row["recipe"]["steps"]))


if __name__ == "__main__":
    main()
