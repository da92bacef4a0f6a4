"""Stable Diffusion 1.4 at its full size, and XL at a fifth of its width, with random weights: does everything fit, run,
and stay finite?

    python -m data.make.full_size [sd-1.4 | sdxl] [--device cuda] [--out FOLDER]

The layout is the real one, the weights are random, so nothing is fetched and pictures mean nothing. Two training steps
and two sampling steps in bfloat16; what counts is the peak of memory, the time of LAG over the original model's, the
sizes of the masks, and that every number is finite. Results go to data/results/full-size.json and full-size.md, those
of XL to sdxl-reduced.json and sdxl-reduced.md.
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

from data.make.bench_runs import FULL, PROMPT, random_pipeline
from data.make.shared import ROOT, keep, machine, markdown, peak
from persres_lite import localized, personalize
from persres_lite.concepts import Concept
from persres_lite.cost import GIB

KINDS = {"sd-1.4": (FULL, "full-size", "Stable Diffusion 1.4"), "sdxl": (64, "sdxl-reduced", "Stable Diffusion XL")}
"""Width, file and name: XL at its full width needs more memory than most machines without a GPU have."""

KEPT = "MALLOC_MMAP_THRESHOLD_"
"""Environment variable: glibc gives back what is freed from this size on. Without it a process keeps much of what the
step before has freed, and its memory is no measure of what was needed."""


def measure(base: Any, batch: int = 4, size: int = 512, rounds: int = 3) -> dict[str, Any]:
    """Two training steps and two sampling steps: memory above the model, ratios of times, masks, and what is finite.

    Parameters
    ----------
    batch : int
        Pictures in a training step.
    size : int
        Pixels of a side that are sampled.
    rounds : int
        How often the original model and LAG take turns.
    """
    pictures = [Image.linear_gradient("L").resize((512, 512)).convert("RGB").rotate(90 * k) for k in range(4)]
    concept = Concept("random", "cat", images=pictures)
    with peak(base.unet.device) as training:
        residuals = personalize(base, concept, steps=2, batch_size=batch, progress=False)
    options = {"num_inference_steps": 2, "output_type": "latent", "height": size, "width": size}

    def latents() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        made = base(PROMPT, generator=torch.Generator().manual_seed(0), **options).images.float().cpu()
        return made, time.perf_counter() - start

    ratios = []
    with peak(base.unet.device) as sampling:
        for _ in range(rounds):
            plain, once = latents()
            with localized(base, residuals, concept) as lag:
                local, slower = latents()
            ratios.append(slower / once)
    numbers = (plain, local, *residuals.named_parameters().values())
    return {
        "parameters of the U-Net": f"{sum(p.numel() for p in base.unet.parameters()):,}",
        "parameters of the residuals": f"{residuals.num_parameters():,}",
        f"memory of a training step, batch {batch}": f"{training[0] / GIB:.2f} GiB above the model",
        "memory of sampling, one picture": f"{sampling[0] / GIB:.2f} GiB above the model",
        "time of LAG / original, median of the rounds": f"{statistics.median(ratios):.3f}",
        "masks in two steps": len(lag.masks),
        "their sides": ", ".join(map(str, sorted({mask.shape[-1] for mask in lag.masks.values()}, reverse=True))),
        "every latent and every factor is finite": "yes" if all(value.isfinite().all() for value in numbers) else "no",
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write full-size.json and full-size.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", nargs="?", choices=list(KINDS), default="sd-1.4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "data/results", help="folder; default: data/results")
    chosen = parser.parse_args(arguments)
    width, file, name = KINDS[chosen.kind]
    found = measure(random_pipeline(width, torch.device(chosen.device), torch.bfloat16, chosen.kind))
    size = "at full size" if width == FULL else f"{width} channels wide instead of {FULL}"
    made = f"Made by `python -m data.make.full_size {chosen.kind}` on {machine()}, in bfloat16."
    text = f"# {name}, {size}, random weights\n\n{made}\n\n{markdown(['what', 'found'], found.items())}\n"
    keep(chosen.out / file, found, text)
    print(text)


if __name__ == "__main__":
    if KEPT not in os.environ:  # read by malloc when a process begins
        os.environ[KEPT] = "65536"
        os.execv(sys.executable, [sys.executable, "-m", "data.make.full_size", *sys.argv[1:]])
    main()
