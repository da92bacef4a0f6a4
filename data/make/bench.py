"""`make bench`: what the residuals and LAG cost, as ratios within one run.

    python -m data.make.bench [--models toybox sd-1.4-shape] [--repeats N] [--device cuda] [--out FOLDER]

Machines differ and are shared, so seconds of different runs say little. Here the methods take turns, each round gives
one ratio, and what counts is the median ratio with its quartiles. Peak memory is measured in a fresh process for each
method. Run it on an otherwise idle machine. Results go to data/results/bench.json and bench.md.

Training methods, all on the same cached latents and text features, batch and loss:

residuals   what `personalize` does in a step
lora        PEFT on q, k, v, out of both attentions, rank 4, AdamW, as diffusers' train_dreambooth_lora sets it up
full        the whole U-Net with AdamW, as DreamBooth
floor       two forward passes without gradient: a backward pass to the activations costs about one forward
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data.make.bench_runs import MODELS, sampling_run, take_turns, training_step
from data.make.shared import ROOT, keep, machine, markdown, peak
from persres_lite import Residuals

TRAINING = ("residuals", "lora", "full", "floor")
SAMPLING = ("original", "residual", "lag")
ROUNDS = {"toybox": {"sampling": 15, "training": 25}, "sd-1.4-shape": {"sampling": 4, "training": 3}}  # on a CPU
FULL_NEEDS = 17e9  # bytes: weights, gradients and both moments of 860 million parameters in fp32, and activations

GOALS = {  # what is divided by what, and what it may be at most
    ("sampling", "lag", "residual"): 1.05,
    ("sampling", "lag", "original"): None,
    ("training", "residuals", "lora"): 0.75,
    ("training", "residuals", "full"): None,
    ("training", "residuals", "floor"): 1.15,
    ("memory", "residuals", "lora"): 1.0,
    ("memory", "residuals", "full"): None,
}


def memory_of(model: str, method: str, device: torch.device) -> float:
    """Peak bytes of two training steps on top of the loaded model, of a process that does nothing else."""
    step = training_step(MODELS[model](device), method)
    with peak(device) as found:
        step()
        step()  # Adam makes its moments in the first
    return found[0]


def peak_memory(model: str, method: str, device: str) -> float:
    """`memory_of` in a fresh process."""
    command = [sys.executable, "-m", "data.make.bench", "--models", model, "--device", device]
    done = subprocess.run([*command, "--memory-of", method], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def enough_memory(model: str, device: torch.device) -> bool:
    """Whether full fine-tuning can be tried. Toybox's always can."""
    if model != "sd-1.4-shape" or device.type == "cuda" or not Path("/proc/meminfo").exists():
        return True
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return available is None or 1024 * int(available[1]) > FULL_NEEDS


def measure(model: str, device: torch.device, repeats: dict[str, int]) -> dict[str, Any]:
    """All raw figures of one model: seconds by method and round, and peak bytes by method."""
    subject = MODELS[model](device)
    methods = [name for name in TRAINING if name != "full" or enough_memory(model, device)]
    residuals = Residuals(subject.base, init="random")
    ways = {name: sampling_run(subject, name, residuals) for name in SAMPLING}
    print(f"{model}: sampling", flush=True)
    found: dict[str, Any] = {"about": subject.about, "batch": subject.batch, "skipped": []}
    found["sampling"] = take_turns(ways, repeats["sampling"], device)
    print(f"{model}: training", flush=True)
    found["training"] = take_turns({n: training_step(subject, n) for n in methods}, repeats["training"], device)
    del subject, ways, residuals  # a second model of this size may not fit beside it
    found["memory"] = {}
    for name in methods[:-1]:  # the floor trains nothing
        print(f"{model}: memory of {name}", flush=True)
        found["memory"][name] = peak_memory(model, name, device.type)
    if "full" not in methods:
        found["skipped"].append(f"full fine-tuning needs {FULL_NEEDS / 1e9:.0f} GB of free memory")
    return found


def ratios(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each pair of `GOALS` that was measured: the median over rounds of the ratio within a round, and its quartiles."""
    rows = []
    for (kind, ours, other), goal in GOALS.items():
        a, b = found[kind].get(ours), found[kind].get(other)
        if a is None or b is None:
            continue
        each = [a / b] if kind == "memory" else [x / y for x, y in zip(a, b, strict=True)]
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        rows.append({"kind": kind, "of": ours, "to": other, "median": middle, "quartiles": [low, high], "goal": goal})
    return rows


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = ["# Time and memory", f"Measured with `{results['command']}` on {results['machine']}."]
    for model, found in results["models"].items():
        rows: list[list[Any]] = []
        for row in found["ratios"]:
            spread = "one run" if row["kind"] == "memory" else " to ".join(f"{value:.3f}" for value in row["quartiles"])
            goal = "" if row["goal"] is None else f"at most {row['goal']:g}"
            rows.append([f"{row['kind']}: {row['of']} / {row['to']}", f"**{row['median']:.3f}**", spread, goal])
        ratio = markdown(["ratio", "median", "quartiles", "goal"], rows)
        rows = []
        for kind in ("sampling", "training"):
            for name, times in found[kind].items():
                peak = found["memory"].get(name) if kind == "training" else None
                seconds = (f"{value:.3f}" for value in (statistics.median(times), min(times)))
                memory = "" if peak is None else f"{peak / 1e6:,.0f} MB"
                rows.append([f"{kind}: {name}", *seconds, len(times), memory])
        heads = ["", "median seconds", "fastest", "rounds", "peak memory above the model"]
        title = f"## {model}: {found['about']}, training batch {found['batch']}"
        parts += [title, ratio, markdown(heads, rows), *(f"Left out: {reason}." for reason in found["skipped"])]
    return "\n\n".join([*parts, "What the methods are stands at the top of `data/make/bench.py`.\n"])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write bench.json and bench.md."""
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, help="rounds; default: as many as end in six minutes on two cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "data/results", help="folder; default: data/results")
    parser.add_argument("--memory-of", choices=TRAINING, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if chosen.memory_of:
        print(memory_of(chosen.models[0], chosen.memory_of, device))
        return
    start = time.perf_counter()
    where = f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results: dict[str, Any] = {"command": "python -m data.make.bench", "machine": where, "models": {}}
    for model in chosen.models:
        usual = ROUNDS[model] if device.type == "cpu" else dict.fromkeys(("sampling", "training"), 15)
        found = measure(model, device, {kind: chosen.repeats or count for kind, count in usual.items()})
        results["models"][model] = found | {"ratios": ratios(found)}
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    text = table(results)
    keep(chosen.out / "bench", results, text)
    print(f"{text}\nWritten to {chosen.out} after {results['minutes']} minutes.")


if __name__ == "__main__":
    main()
