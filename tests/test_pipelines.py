"""Sampling under the contexts in the other pipelines of the family, as they are used: random, tiny, in seconds."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from persres_lite import method
from persres_lite.attention import record_attention
from persres_lite.localize import localized
from tests import helpers
from tests.helpers import NO_CHECKER, PICTURE, hooks_of, img2img, parts_of, random_residuals, refiner, with_unet
from tests.tiny import sample, tiny_pipeline

PROMPT = "a photo of a sks cat on the beach"
AT = [5, 6]  # sks cat
HALF = Image.new("L", (64, 64))
HALF.paste(255, (0, 0, 32, 64))


def controlnet_for(base):
    """A ControlNet that does something: a fresh one adds zeros."""
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_channels=3).eval().requires_grad_(False)
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
    controlnet.controlnet_cond_embedding = torch.nn.Conv2d(3, 32, 8, stride=8)  # as large as these latents
    return controlnet


def inpainting_with_nine_channels():
    pipeline = StableDiffusionInpaintPipeline(**with_unet(tiny_pipeline("sd1"), in_channels=9), **NO_CHECKER)
    return pipeline, {"image": PICTURE, "mask_image": HALF, "strength": 1.0}


def controlnet():
    base = tiny_pipeline("sd1")
    pipeline = StableDiffusionControlNetPipeline(**parts_of(base), controlnet=controlnet_for(base), **NO_CHECKER)
    return pipeline, {"image": PICTURE}


def lcm_distilled():
    """A latent consistency model is told its guidance by an embedding: no second half of the batch."""
    pipeline = StableDiffusionPipeline(**with_unet(tiny_pipeline("sd1"), time_cond_proj_dim=8), **NO_CHECKER)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    return pipeline, {"guidance_scale": 5.0}


def automatic_img2img():
    return AutoPipelineForImage2Image.from_pipe(tiny_pipeline("sdxl")), {"image": PICTURE, "strength": 0.9}


def xl_controlnet():
    base = tiny_pipeline("sdxl")
    parts = parts_of(base) | {"controlnet": controlnet_for(base)}
    return StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False), {"image": PICTURE}


PIPELINES = [
    img2img,
    inpainting_with_nine_channels,
    controlnet,
    lcm_distilled,
    automatic_img2img,
    xl_controlnet,
    refiner,
]


def latents(pipeline, **arguments):
    """The final latents of a short run from seeded noise."""
    pipeline.set_progress_bar_config(disable=True)
    usual = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **usual | arguments).images


@pytest.mark.parametrize("make", PIPELINES, ids=lambda make: make.__name__)
def test_sampling_under_the_contexts(make, last_layer):
    pipeline, arguments = make()
    residuals = random_residuals(pipeline)
    original = latents(pipeline, **arguments)
    with residuals.attached(pipeline):
        everywhere = latents(pipeline, **arguments)
    with localized(pipeline, residuals, "sks cat") as lag:
        ours = latents(pipeline, **arguments)
    steps = range(1 + max(step for step, _ in lag.masks))
    assert lag.masks.keys() == {(step, name) for step in steps for name in residuals.A}
    if make is not lcm_distilled:  # which has no second half; page one expects it
        with torch.no_grad(), method.lag(pipeline.unet, *helpers.page_one(residuals), AT):
            torch.testing.assert_close(ours, latents(pipeline, **arguments), atol=1e-3, rtol=1e-3)
    assert all((ours - other).abs().max() > 0.02 for other in (original, everywhere))
    with localized(pipeline, residuals, fixed_mask=torch.zeros(8, 8)):
        assert torch.equal(latents(pipeline, **arguments), original)
    with localized(pipeline, residuals, fixed_mask=torch.ones(8, 8)):
        torch.testing.assert_close(latents(pipeline, **arguments), everywhere, atol=1e-4, rtol=1e-4)
    with record_attention(pipeline, words=["sks cat"]) as record:
        assert torch.equal(latents(pipeline, **arguments), original)
    assert record.maps.keys() == lag.masks.keys()
    assert hooks_of(pipeline.unet) == 0


def test_base_and_refiner_share_the_steps():
    """XL as its authors use it: the refiner does the last fifth; each has residuals of its own."""
    base, (second, _) = tiny_pipeline("sdxl"), refiner()
    pair = random_residuals(base), random_residuals(second)

    def draw():
        half = latents(base, num_inference_steps=5, denoising_end=0.8, height=64, width=64)
        return latents(second, num_inference_steps=5, denoising_start=0.8, image=half)

    original = draw()
    with localized(base, pair[0], "sks cat") as first, localized(second, pair[1], "sks cat") as last:
        assert (draw() - original).abs().max() > 0.05
    assert {step for step, _ in first.masks} == {0, 1, 2, 3} and {step for step, _ in last.masks} == {0}
    assert torch.equal(draw(), original)


@pytest.mark.parametrize("way", ["attached", "localized", "recorded"])
def test_too_little_memory_while_drawing_says_what_to_do(sd1, way):
    residuals = random_residuals(sd1)
    contexts = {
        "attached": lambda: residuals.attached(sd1),
        "localized": lambda: localized(sd1, residuals, "sks cat"),
        "recorded": lambda: record_attention(sd1),
    }

    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    sd1.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory") as caught, contexts[way]():
        sample(sd1)
    said = str(caught.value)
    assert "num_images_per_prompt" in said and "enable_slicing" in said
