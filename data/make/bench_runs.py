"""What `bench` and `full_size` measure: bases with random weights, and what is done with them, without arguments."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from persres_lite import Residuals, load_base
from persres_lite.bases import encode_prompt, settings_of
from persres_lite.evaluation import usual_ways
from persres_lite.support.checkpoint import State, snapshot
from persres_lite.training import TrainingSet, diffusion_loss
from persres_lite.training import step as training_step_of

WORDS = "sks cat"
PROMPT = f"a photo of a {WORDS} on the beach"

FULL = 320
"""Channels of the first level, of SD 1.4 and of XL."""


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
    base, about = random_pipeline(FULL, device, torch.float32), "SD 1.4's U-Net with random weights, at"
    if device.type == "cpu":  # a quarter of the usual positions, so that it ends in minutes
        return Subject(base, f"{about} 256 x 256", size=256, batch=1, images=1, steps=1)
    return Subject(base, f"{about} 512 x 512", size=512, batch=4, images=1, steps=10)


MODELS: dict[str, Callable[[torch.device], Subject]] = {"toybox": toybox, "sd-1.4-shape": sd14_shape}


def random_pipeline(width: int, device: torch.device, dtype: torch.dtype, kind: str = "sd-1.4") -> Any:
    """The pipeline of `kind` with random weights, so that nothing is fetched: U-Net and autoencoder as they are, text
    encoders of one layer and with the words of Toybox's tokenizer.

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
    pipeline: Any
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(_text_config(tokenizer, 768))}
    parts["vae"] = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if width == FULL else (32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    parts["scheduler"] = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False)
    if kind == "sdxl":
        second = CLIPTextModelWithProjection(_text_config(tokenizer, 1280))
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": second, "unet": xl_unet(width)}
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **none, unet=sd14_unet(width))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval().to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _text_config(tokenizer: Any, channels: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=channels,
        projection_dim=channels,
        num_hidden_layers=1,
        num_attention_heads=channels // 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def sd14_unet(width: int = FULL, device: str = "cpu") -> UNet2DConditionModel:
    """Stable Diffusion 1.4's."""
    levels = (width, 2 * width, 4 * width, 4 * width)
    return _filled(device, sample_size=64, cross_attention_dim=768, block_out_channels=levels)


def xl_unet(width: int) -> UNet2DConditionModel:
    """XL's: three levels, without attention on the first, ten transformer layers under one projection on the last."""
    return _filled(
        "cpu",
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


def _filled(device: str, **config: Any) -> UNet2DConditionModel:
    """A frozen U-Net with small random weights, filled faster than its own initialization."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet.to_empty(device=device)
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    with torch.no_grad():
        for parameter in unet.parameters():
            repeats = -(-parameter.numel() // len(pattern))
            parameter.copy_(pattern.repeat(repeats)[: parameter.numel()].view_as(parameter))
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
    base, device = subject.base, subject.base.unet.device
    side = subject.size // base.vae_scale_factor
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, base.unet.config.in_channels, side, side, generator=generator)
    with torch.no_grad():
        text = encode_prompt(base, PROMPT, subject.size)
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    unet = twin(base.unet)
    if method == "residuals":
        residuals = Residuals(unet, rank=settings_of(base).recipe["rank"])
        learned = residuals.named_parameters()
        optimizer: Any = torch.optim.Adam(learned.values(), lr=1e-4)
        state = State(learned, optimizer, generator, torch.amp.GradScaler(device.type, enabled=False), [])
        data, attached = TrainingSet(latents, None, None), ExitStack()
        attached.enter_context(residuals.attached(unet))

        def step(attached: ExitStack = attached) -> None:  # which it holds for as long as it lives
            training_step_of(unet, scheduler, data, text, state, subject.batch)
            snapshot(state)

        return step
    noise, timesteps = torch.randn_like(latents[0]), torch.randint(0, 1000, (4,), generator=generator)
    first, noise, timesteps = (tensor[: subject.batch].to(device) for tensor in (latents[0], noise, timesteps))

    def loss() -> torch.Tensor:
        return diffusion_loss(unet, scheduler, first, text, noise, timesteps)

    if method == "floor":
        return torch.no_grad()(lambda: (loss(), loss()))
    trained = attention_lora(unet) if method == "lora" else list(unet.requires_grad_(True).parameters())
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


def take_turns(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each method in each round after one that is not counted, the device's work included; the order
    rotates, so that no method always follows the same one.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1 + repeats):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            runs[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return times
