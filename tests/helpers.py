"""What several tests need: residuals, concepts and pipelines to try them on, and what stands on a model."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from persres_lite.concepts import Concept
from persres_lite.residuals import Residuals
from tests.tiny import ATTENTION_GAIN, TEXT_WIDTH, tiny_pipeline

NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


FAST = {"steps": 3, "batch_size": 1, "lr": 1e-2, "progress": False}


def hooks_of(module: torch.nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def random_residuals(base, rank=0.25, seed=1) -> Residuals:
    return Residuals(base, rank=rank, init="random", seed=seed)


def call_arguments(kind: str, batch: int = 2) -> dict:
    """Inputs of one U-Net call, seeded."""
    generator = torch.Generator().manual_seed(0)
    text = 64 if kind == "sdxl" else 32
    arguments = {
        "sample": torch.randn(batch, 4, 16, 16, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, text, generator=generator),
    }
    if kind == "sdxl":
        added = {"text_embeds": torch.randn(batch, 32, generator=generator), "time_ids": torch.ones(batch, 6)}
        arguments["added_cond_kwargs"] = added
    return arguments


def make_concept(pictures=3, size=64, masks=False, **words):
    """Smooth random pictures, with a centered square as object."""
    rng = np.random.default_rng(0)
    blocks = (rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(pictures))
    images = [Image.fromarray(block).resize((size, size)) for block in blocks]
    square = Image.new("L", (size, size))
    square.paste(255, (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    words = {"macro_class": "cat", "token": "sks"} | words
    return Concept("test", images=images, masks=[square] * pictures if masks else None, **words)


class Foreign(AttnProcessor2_0, torch.nn.Module):
    """Like IP-Adapter's: a module that takes (text, picture) tokens and adds a second attention of its own."""

    def __init__(self, width, text):
        torch.nn.Module.__init__(self)
        self.to_k_ip = torch.nn.Linear(text, width, bias=False)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        text, picture = encoder_hidden_states[:, :-4], encoder_hidden_states[:, -4:]
        return AttnProcessor2_0.__call__(self, attn, hidden_states, text) + self.to_k_ip(picture).mean(1, keepdim=True)


def install_foreign(unet):
    for key in unet.attn_processors:
        if ".attn2." in key:
            attn = unet.get_submodule(key.removesuffix(".processor"))
            attn.set_processor(Foreign(attn.inner_dim, 32))


def parts_of(base):
    return {name: part for name, part in base.components.items() if part is not None}


def with_unet(base, **changes):
    """The parts of a pipeline, with a random U-Net of another configuration."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(base.unet.config, **changes).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if ".attn2.to_q." in name or ".attn2.to_k." in name:
            parameter.mul_(ATTENTION_GAIN)
    return {name: part for name, part in base.components.items() if part is not None} | {"unet": unet}


def img2img():
    return StableDiffusionImg2ImgPipeline(**parts_of(tiny_pipeline("sd1")), **NO_CHECKER), {"image": PICTURE}


def refiner():
    """XL's second model: the second text encoder alone, and a score for looks among what the U-Net is told."""
    parts = with_unet(
        tiny_pipeline("sdxl"),
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=(2, 2, 4, 4),
        cross_attention_dim=TEXT_WIDTH,
        projection_class_embeddings_input_dim=5 * 8 + TEXT_WIDTH,
    ) | {"text_encoder": None, "tokenizer": None}
    pipeline = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    return pipeline, {"image": PICTURE, "strength": 0.9}
