"""The untrained parts of Toybox: the classes of Stable Diffusion and CLIP, at about a thousandth of the size."""

from __future__ import annotations

import json
import string

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetModel,
)

from persres_lite.toybox.render import SIZE
from persres_lite.toybox.world import RARE_TOKENS, vocabulary

MAX_LENGTH = 24  # tokens of a prompt, start and end included
TEXT_WIDTH = 128
LATENT_CHANNELS = 16  # a cell of 8 x 8 pixels, so as many numbers a pixel as 4 channels at 4 x 4


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the captions, and every rare token, is one piece; other words fall
    into several.

    The end token has the largest id, as in the real CLIP: `CLIPTextModel` finds the end of a prompt by it.
    """
    # Byte-pair encoding, trained until nothing is left to merge, makes one piece of each word it has seen. Letters,
    # digits and punctuation are seen alone, so that any other text can be spelled.
    words = [*vocabulary(), *RARE_TOKENS, *string.ascii_lowercase, *string.digits, *string.punctuation]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # Given first and in order, every letter, alone and at the end of a word, has the same number in every process: left
    # to itself the trainer numbers them as its hash table happens to hand them out.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        end_of_word_suffix="</w>",
        special_tokens=[*letters, *(f"{letter}</w>" for letter in letters)],
        show_progress=False,
    )
    bpe.train_from_iterator([[word] for word in words], trainer)
    state = json.loads(bpe.to_str())["model"]
    pieces = [*sorted(state["vocab"], key=state["vocab"].get), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in state["merges"]], model_max_length=MAX_LENGTH)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The contrastive pair; its text half becomes the text encoder, the whole one the CLIP-like judge."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=128,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=16,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def make_identity_encoder() -> ResNetModel:
    """The DINO-like judge: a small residual network, with maps of 32, 16, 8, 4 and 2 cells a side."""
    return ResNetModel(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[48, 96, 160, 256],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            hidden_act="relu",
            downsample_in_first_stage=True,
        )
    ).to(memory_format=torch.channels_last)


def make_autoencoder() -> AutoencoderTiny:
    """128 x 128 x 3 to 16 x 16 x 16 and back. No residual block at full resolution, where it would cost most and learn
    least; the decoder has one at half of it, where edges are made.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        decoder_block_out_channels=(48, 48, 48, 48),
        num_encoder_blocks=(0, 0, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def make_unet() -> UNet2DConditionModel:
    """A U-Net of two levels with cross-attention on both: seven transformer blocks, 1x1 convolutions as `proj_out`
    as in SD 1.x.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),  # number of heads a level, of width 32: diffusers #2011 on the name
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, predicting v (Salimans and Ho, 2022)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
