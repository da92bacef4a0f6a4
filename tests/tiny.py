"""Tiny random pipelines of the shapes of Stable Diffusion 1.x, 2.x and XL, built offline in a moment.

Widths are 32 and 64 where the real ones are 320 to 1280, and of the repeated layers there is one, which makes 7
`proj_out` modules. What a test could depend on is the real ones': the pipeline classes, the kinds of blocks and their
order, convolutional or linear projections, two text encoders and several `attn2` under one `proj_out` for XL. Weights
are random, so pictures are noise: only equalities between two ways of computing them mean something.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

KINDS = ("sd1", "sd2", "sdxl")
#: Words that are one token each. Every other word is split into its letters, as rare words are by the real tokenizer.
WORDS = (
    "a an the of on in and with at by front photo picture sks cat dog duck robot mug car red blue green beach snow "
    "grass brick wall night wooden table teddy bear"
).split()
TEXT_WIDTH = 32
ATTENTION_GAIN = 4.0


def tiny_tokenizer(max_length: int = 77, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A real CLIP tokenizer with a vocabulary of bytes and of `WORDS`; the end token has the largest id."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # earlier merges first, as the tokenizer will apply them
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.append(pieces[0] + pieces[1])
            pieces = _merge(pieces, merges[-1])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=max_length)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def tiny_text_encoder(tokenizer: CLIPTokenizer, projected: bool = False) -> CLIPTextModel:
    """A two-layer text encoder of width 32 for `tokenizer`; with `projected` the second one of XL."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def tiny_unet(kind: str) -> UNet2DConditionModel:
    """A random U-Net with the blocks of `kind`: 'sd1', 'sd2' or 'sdxl'."""
    common = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": TEXT_WIDTH}
    plain_last = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    plain_first = {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
    }
    heads = {"attention_head_dim": (2, 2, 4), "use_linear_projection": True}  # numbers of heads, as in the real ones
    own = {"sd1": plain_last | {"attention_head_dim": 4}, "sd2": plain_last | heads, "sdxl": plain_first | heads}[kind]
    unet = UNet2DConditionModel(**common | own)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            # Fresh layers attend almost evenly; sharper maps leave the order of positions beyond rounding.
            if ".attn2.to_q." in name or ".attn2.to_k." in name:
                parameter.mul_(ATTENTION_GAIN)
    return unet


def tiny_pipeline(kind: str = "sd1", seed: int = 0) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A frozen random pipeline of `kind` ('sd1', 'sd2', 'sdxl') for pictures of 64 x 64 and latents of 8 x 8.

    'sd1' predicts noise, 'sd2' predicts v (as SD 2.1 does), both with DDIM; 'sdxl' predicts noise, with Euler.
    The same `seed` gives the same weights. No safety checker, no progress bar.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        text_encoder = tiny_text_encoder(tokenizer)
        unet = tiny_unet(kind)
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,  # smaller than the pictures, so that `enable_vae_tiling` does tile them
            scaling_factor=0.18215,
        )
        extra = {}
        if kind == "sdxl":
            extra["tokenizer_2"] = tiny_tokenizer(pad="!")
            extra["text_encoder_2"] = tiny_text_encoder(extra["tokenizer_2"], projected=True)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, **extra)
    if kind == "sdxl":
        scheduler = EulerDiscreteScheduler(**noise)
        pipeline = StableDiffusionXLPipeline(scheduler=scheduler, add_watermarker=False, **parts)
    else:
        prediction = "v_prediction" if kind == "sd2" else "epsilon"
        scheduler = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
        pipeline = StableDiffusionPipeline(
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompt="a photo of a sks cat on the beach", *, steps: int = 2, seed: int = 0, **arguments):
    """Final latents (B, 4, 8, 8) of a short run from seeded noise; further `arguments` go to the pipeline."""
    arguments = {"output_type": "latent", "guidance_scale": 5.0, "height": 64, "width": 64} | arguments
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, num_inference_steps=steps, generator=generator, **arguments).images
