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
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from data.make.bench_runs import random_unet, reset_peak, resident_peak
from data.make.runs import machine
from persres_lite import load_base, localized, personalize
from persres_lite.concepts import Concept
from persres_lite.cost import GIB
from persres_lite.support.files import whole_file
from persres_lite.support.paths import data_dir

FULL = 320
"""Channels of the first level, of SD 1.4 and of XL."""

WIDTHS = {"sd-1.4": FULL, "sdxl": 64}
"""Of the measured models: XL at its full width needs more memory than most machines without a GPU have."""

FILES = {"sd-1.4": "full-size", "sdxl": "sdxl-reduced"}

KEPT = "MALLOC_MMAP_THRESHOLD_"
"""Environment variable: glibc gives back what is freed from this size on. Without it a process keeps much of what the
step before has freed, and its memory is no measure of what was needed."""

PROMPT = "a photo of a sks cat on the beach"


def random_pipeline(width: int, device: torch.device, dtype: torch.dtype, kind: str = "sd-1.4") -> Any:
    """The pipeline of `kind` with random weights; its words are Toybox's tokenizer's, for nothing is fetched.

    Parameters
    ----------
    width : int
        Channels of the U-Net's first level, 320 in the real one; the others grow with it.
    kind : str
        "sd-1.4" or "sdxl".
    """
    tokenizer = load_base("toybox").tokenizer
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "vae": _autoencoder(width, kind)}
    layers = 12 if width == FULL else 1
    vocabulary = 49408 if width == FULL else len(tokenizer)
    parts["text_encoder"] = CLIPTextModel(_text_config(tokenizer, 768, layers, vocabulary))
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline: Any
    if kind == "sdxl":
        second = _text_config(tokenizer, 1280, 1, vocabulary)
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModelWithProjection(second)}
        parts["scheduler"] = EulerDiscreteScheduler(**noise)
        pipeline = StableDiffusionXLPipeline(unet=_xl_unet(width), add_watermarker=False, **parts)
    else:
        levels = tuple(width * factor for factor in (1, 2, 4, 4))
        parts["unet"] = random_unet(torch.device("cpu"), block_out_channels=levels, attention_head_dim=8)
        parts["scheduler"] = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False)
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **none)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval().to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _text_config(tokenizer: Any, width: int, layers: int, vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _autoencoder(width: int, kind: str) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=tuple(width * 4 * factor // 10 // 32 * 32 or 32 for factor in (1, 2, 4, 4)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024 if kind == "sdxl" else 512,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
    )


def _xl_unet(width: int) -> UNet2DConditionModel:
    """XL's: three levels, without attention on the first, ten transformer layers under one projection on the last."""
    return random_unet(
        torch.device("cpu"),
        sample_size=128,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=tuple(max(1, width * factor // 64) for factor in (1, 2, 4)),  # heads of 64 channels
        cross_attention_dim=768 + 1280,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
    )


def measure(base: Any, batch: int, rounds: int = 3, **sampling: Any) -> dict[str, Any]:
    """Two training steps and two sampling steps: memory above the model, ratios of times, masks, and what is finite."""
    device = base.unet.device
    pictures = [Image.linear_gradient("L").resize((512, 512)).convert("RGB").rotate(90 * k) for k in range(4)]
    concept = Concept("random", "cat", images=pictures)
    before = _start(device)
    residuals = personalize(base, concept, steps=2, batch_size=batch, progress=False)
    training = (_peak(device) - before) / GIB
    options = {"num_inference_steps": 2, "output_type": "latent", **sampling}

    def latents() -> torch.Tensor:
        return base(PROMPT, generator=torch.Generator().manual_seed(0), **options).images

    times: dict[str, list[float]] = {"original": [], "LAG": []}
    before = _start(device)
    for _ in range(rounds):
        start = time.perf_counter()
        plain = latents().float().cpu()
        middle = time.perf_counter()
        with localized(base, residuals, concept) as lag:
            local = latents().float().cpu()
        times["original"].append(middle - start)
        times["LAG"].append(time.perf_counter() - middle)
    learned = residuals.named_parameters().values()
    return {
        "batch": batch,
        "parameters": sum(p.numel() for p in base.unet.parameters()),
        "residual_parameters": residuals.num_parameters(),
        "training_gib": round(training, 2),
        "sampling_gib": round((_peak(device) - before) / GIB, 2),
        "lag_over_original": statistics.median(b / a for a, b in zip(*times.values(), strict=True)),
        "masks": len(lag.masks),
        "mask_sides": sorted({mask.shape[-1] for mask in lag.masks.values()}, reverse=True),
        "finite": bool(all(value.isfinite().all() for value in (plain, local, *learned))),
        "losses": residuals.losses,
    }


def _start(device: torch.device) -> float:
    if device.type != "cuda":
        return reset_peak()
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else resident_peak()


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    sides = ", ".join(map(str, found["mask_sides"]))
    return "\n".join(
        [
            f"# {found['model']}, random weights",
            "",
            f"Made by `{found['command']}` on {found['machine']}, in {found['dtype']}.",
            "",
            "| what | found |",
            "|---|---|",
            f"| parameters of the U-Net | {found['parameters']:,} |",
            f"| parameters of the residuals | {found['residual_parameters']:,} |",
            f"| memory of a training step, batch {found['batch']} | {found['training_gib']} GiB above the model |",
            f"| memory of sampling, one picture | {found['sampling_gib']} GiB above the model |",
            f"| time of LAG / original, median of the rounds | {found['lag_over_original']:.3f} |",
            f"| masks in two steps, and their sides | {found['masks']}; {sides} |",
            f"| every latent and every factor is finite | {'yes' if found['finite'] else 'no'} |",
            "",
        ]
    )


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
    parser.add_argument("--out", type=Path, default=None, help="folder; default: data/results")
    chosen = parser.parse_args(arguments)
    width = chosen.width or WIDTHS[chosen.kind]
    if width < WIDTHS[chosen.kind] and chosen.out is None:
        parser.error("a trial at a smaller width is no result: name a folder with --out.")
    base = random_pipeline(width, torch.device(chosen.device), getattr(torch, chosen.dtype), chosen.kind)
    found = measure(base, chosen.batch, chosen.rounds, height=chosen.size, width=chosen.size)
    command = f"python -m data.make.full_size {chosen.kind}"
    found |= {"command": command, "machine": machine(), "dtype": chosen.dtype}
    size = "at full size" if width == FULL else f"{width} channels wide instead of {FULL}"
    found["model"] = f"{'Stable Diffusion XL' if chosen.kind == 'sdxl' else 'Stable Diffusion 1.4'}, {size}"
    folder = chosen.out or data_dir() / "results"
    for name, text in ((".json", json.dumps(found, indent=1) + "\n"), (".md", report(found))):
        with whole_file(folder / f"{FILES[chosen.kind]}{name}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    if KEPT not in os.environ:  # read by malloc when a process begins
        os.environ[KEPT] = "65536"
        os.execv(sys.executable, [sys.executable, "-m", "data.make.full_size", *sys.argv[1:]])
    main()
