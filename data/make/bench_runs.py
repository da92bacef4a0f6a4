"""What `bench` measures: bases, what is done with them (functions without arguments), and clocks and meters."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from persres_lite import Residuals, load_base
from persres_lite.bases import encode_prompt, settings_of
from persres_lite.evaluation import usual_ways
from persres_lite.support.checkpoint import State, snapshot
from persres_lite.support.paths import data_dir
from persres_lite.training import TrainingSet, diffusion_loss
from persres_lite.training import step as training_step_of

WORDS = "sks cat"
PROMPT = f"a photo of a {WORDS} on the beach"


@dataclass
class Subject:
    """A base, and how much of it is run in one measurement."""

    base: Any
    about: str
    size: int  # of the pictures, in pixels
    batch: int  # of a training step
    images: int  # of a sampling run
    steps: int  # of a sampling run


def toybox(device: torch.device) -> Subject:
    """The shipped base, at its usual size and batch."""
    return Subject(load_base("toybox", device), "the shipped Toybox", size=128, batch=4, images=4, steps=10)


def sd14_shape(device: torch.device) -> Subject:
    """Stable Diffusion 1.4's U-Net, 859,520,964 random weights: time and memory do not depend on what they say."""
    unet = random_unet(device)
    toy = data_dir() / "toybox-sd" / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(toy, model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=768,
        num_attention_heads=12,
        num_hidden_layers=1,  # the text is encoded once
    )
    base = StableDiffusionPipeline(
        vae=AutoencoderTiny(scaling_factor=1.0),  # not measured: pictures stay latents
        text_encoder=CLIPTextModel(text).eval().requires_grad_(False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    base.set_progress_bar_config(disable=True)
    if device.type == "cpu":  # a quarter of the usual positions, so that it ends in minutes
        return Subject(base, "SD 1.4's U-Net with random weights, at 256 x 256", size=256, batch=1, images=1, steps=1)
    return Subject(base, "SD 1.4's U-Net with random weights, at 512 x 512", size=512, batch=4, images=1, steps=10)


MODELS: dict[str, Callable[[torch.device], Subject]] = {"toybox": toybox, "sd-1.4-shape": sd14_shape}


def random_unet(device: torch.device, **config: Any) -> UNet2DConditionModel:
    """A frozen U-Net of SD 1.4's configuration with small random weights, filled faster than its own initialization."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{"sample_size": 64, "cross_attention_dim": 768} | config)
    unet.to_empty(device=device)
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    with torch.no_grad():
        for parameter in unet.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(pattern)):
                flat[start : start + len(pattern)] = pattern[: len(flat) - start]
    return unet.eval().requires_grad_(False)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A second U-Net that shares the first one's weights in memory, with switches and adapters of its own."""
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict(), assign=True)
    return copy.eval().requires_grad_(False)


def attention_lora(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    """Put PEFT's LoRA on a frozen U-Net as diffusers' train_dreambooth_lora does by default; returns what learns."""
    from peft import LoraConfig

    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def training_step(subject: Subject, method: str) -> Callable[[], object]:
    """A function that does one training step of `method`, on a U-Net of its own that shares the frozen weights."""
    base, unet = subject.base, subject.base.unet
    device = unet.device
    side = subject.size // base.vae_scale_factor
    latents = torch.randn(2, 4, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = encode_prompt(base, PROMPT, subject.size)
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    other = twin(unet)
    if method == "residuals":
        residuals = Residuals(other, rank=settings_of(base).recipe["rank"])
        learned = residuals.named_parameters()
        optimizer = torch.optim.Adam(learned.values(), lr=1e-4)
        state = State(learned, optimizer, generator, torch.amp.GradScaler(device.type, enabled=False), [])
        data = TrainingSet(latents, None, None)
        attached = ExitStack()
        attached.enter_context(residuals.attached(other))  # for as long as the function below lives, which holds it

        def step(attached: ExitStack = attached) -> None:
            training_step_of(other, scheduler, data, text, state, subject.batch)
            snapshot(state)

        return step
    noise, timesteps = torch.randn_like(latents[0]), torch.randint(0, 1000, (4,), generator=generator)
    batch = [tensor[: subject.batch].to(device) for tensor in (latents[0], noise, timesteps)]

    def loss() -> torch.Tensor:
        return diffusion_loss(other, scheduler, batch[0], text, batch[1], batch[2])

    if method == "floor":

        @torch.no_grad()
        def two_passes() -> None:
            loss()
            loss()

        return two_passes
    trained = attention_lora(other) if method == "lora" else list(other.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def adam_step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return adam_step


def sampling_run(subject: Subject, method: str, residuals: Residuals) -> Callable[[], object]:
    """A function that samples once, to latents, guided, with the original model, the residual everywhere, or LAG."""
    way = usual_ways(subject.base, residuals, WORDS)["LAG" if method == "lag" else method]
    options = {"num_inference_steps": subject.steps, "num_images_per_prompt": subject.images, "output_type": "latent"}
    options |= {"height": subject.size, "width": subject.size, "guidance_scale": 7.5}

    def run() -> None:
        with way():
            subject.base(PROMPT, generator=torch.Generator().manual_seed(0), **options)

    return run


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each method in each round; the order rotates, so that no method always follows the same one."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + repeats):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = seconds(runs[name], device)
            if number >= warm_up:
                times[name].append(taken)
    return times


def measure_memory(subject: Subject, method: str) -> float:
    """What `peak_memory` asks of its process."""
    device = subject.base.unet.device
    step = training_step(subject, method)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    else:
        before = reset_peak()
    for _ in range(2):  # Adam makes its moments in the first
        step()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()) - before


def reset_peak() -> float:
    """Forget the peak so far, where the system allows it (Linux), and return what it is now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or one that forbids it: then loading counts if it needed more than the steps
        pass
    return resident_peak()


def resident_peak() -> float:
    """The most memory that the process has had since the last `reset_peak`, in bytes."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return 1024.0 * int(found[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)
