"""Stable Diffusion 1.4 at its full size, and XL at a fifth of its width, with random weights: does everything fit, run,
and stay finite?

    python -m data.make.full_size [sd-1.4 | sdxl] [--device cuda] [--dtype bfloat16] [--width N]

The layout is the real one, the weights are random, so nothing is fetched and pictures mean nothing. Two training steps
and two sampling steps; what counts is the peak of memory beside the estimate, the time of LAG over the original
model's, the sizes of the masks, and that every number is finite. A smaller `--width` is for a trial. Results go to
data/results/full-size.json and full-size.md, those of XL to sdxl-reduced.json and sdxl-reduced.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.make import runs
from data.make.bench_runs import FULL, PROMPT, peak_memory, random_pipeline, start_memory
from persres_lite import localized, personalize
from persres_lite.concepts import Concept
from persres_lite.cost import GIB, SLACK, memory_of

WIDTHS = {"sd-1.4": FULL, "sdxl": 64}
"""Of the measured models: XL at its full width needs more memory than most machines without a GPU have."""

FILES = {"sd-1.4": "full-size", "sdxl": "sdxl-reduced"}

KEPT = "MALLOC_MMAP_THRESHOLD_"
"""Environment variable: glibc gives back what is freed from this size on. Without it a process keeps much of what the
step before has freed, and its memory is no measure of what was needed."""


def measure(base: Any, batch: int, rounds: int = 3, **sampling: Any) -> dict[str, Any]:
    """Two training steps and two sampling steps: memory above the model, ratios of times, masks, and what is finite."""
    device = base.unet.device
    pictures = [Image.linear_gradient("L").resize((512, 512)).convert("RGB").rotate(90 * k) for k in range(4)]
    concept = Concept("random", "cat", images=pictures)
    before = start_memory(device)
    residuals = personalize(base, concept, steps=2, batch_size=batch, progress=False)
    training = (peak_memory(device) - before) / GIB
    options = {"num_inference_steps": 2, "output_type": "latent", **sampling}

    def latents() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        made = base(PROMPT, generator=torch.Generator().manual_seed(0), **options).images.float().cpu()
        return made, time.perf_counter() - start

    ratios = []
    before = start_memory(device)
    for _ in range(rounds):
        plain, once = latents()
        with localized(base, residuals, concept) as lag:
            local, slower = latents()
        ratios.append(slower / once)
    learned = residuals.named_parameters().values()
    need = memory_of(base, batch=batch)
    assert need is not None  # of a base that is loaded it is always known
    return {
        "batch": batch,
        "parameters": sum(p.numel() for p in base.unet.parameters()),
        "residual_parameters": residuals.num_parameters(),
        "training_gib": round(training, 2),
        "estimated_gib": round(need.training, 2),
        "sampling_gib": round((peak_memory(device) - before) / GIB, 2),
        "lag_over_original": statistics.median(ratios),
        "masks": len(lag.masks),
        "mask_sides": sorted({mask.shape[-1] for mask in lag.masks.values()}, reverse=True),
        "finite": bool(all(value.isfinite().all() for value in (plain, local, *learned))),
        "losses": residuals.losses,
    }


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = {
        "parameters of the U-Net": f"{found['parameters']:,}",
        "parameters of the residuals": f"{found['residual_parameters']:,}",
        f"memory of a training step, batch {found['batch']}": f"{found['training_gib']} GiB above the model",
        f"the same, estimated, without slack of {SLACK - 1:.0%}": f"{found['estimated_gib']} GiB",
        "memory of sampling, one picture": f"{found['sampling_gib']} GiB above the model",
        "time of LAG / original, median of the rounds": f"{found['lag_over_original']:.3f}",
        "masks in two steps, and their sides": f"{found['masks']}; {', '.join(map(str, found['mask_sides']))}",
        "every latent and every factor is finite": "yes" if found["finite"] else "no",
    }
    made = f"Made by `{found['command']}` on {found['machine']}, in {found['dtype']}."
    return f"# {found['model']}, random weights\n\n{made}\n\n{runs.markdown(['what', 'found'], rows.items())}\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write full-size.json and full-size.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", nargs="?", choices=list(WIDTHS), default="sd-1.4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--width", type=int, help="channels of the first level; less than usual is a trial")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="pixels that are sampled")
    parser.add_argument("--rounds", type=int, default=3, help="times that original and LAG take turns")
    parser.add_argument("--out", type=Path, default=runs.ROOT / "data/results", help="folder; default: data/results")
    chosen = parser.parse_args(arguments)
    width = chosen.width or WIDTHS[chosen.kind]
    if width < WIDTHS[chosen.kind] and chosen.out == parser.get_default("out"):
        parser.error("a trial at a smaller width is no result: name a folder with --out.")
    base = random_pipeline(width, torch.device(chosen.device), getattr(torch, chosen.dtype), chosen.kind)
    found = measure(base, chosen.batch, chosen.rounds, height=chosen.size, width=chosen.size)
    command = f"python -m data.make.full_size {chosen.kind}"
    found |= {"command": command, "machine": runs.machine(), "dtype": chosen.dtype}
    size = "at full size" if width == FULL else f"{width} channels wide instead of {FULL}"
    found["model"] = f"{'Stable Diffusion XL' if chosen.kind == 'sdxl' else 'Stable Diffusion 1.4'}, {size}"
    runs.keep(chosen.out / FILES[chosen.kind], found, report(found))
    print(report(found))


if __name__ == "__main__":
    if KEPT not in os.environ:  # read by malloc when a process begins
        os.environ[KEPT] = "65536"
        os.execv(sys.executable, [sys.executable, "-m", "data.make.full_size", *sys.argv[1:]])
    main()
