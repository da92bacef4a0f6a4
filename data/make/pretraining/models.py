"""The untrained parts of Toybox: the classes of Stable Diffusion and CLIP, at about a thousandth of the size."""

from __future__ import annotations

import functools
import json
import re
import string

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ResNetConfig, ResNetModel

from persres_lite.toybox.render import SIZE
from persres_lite.toybox.world import RARE_TOKENS, vocabulary

MAX_LENGTH = 24  # tokens of a prompt, start and end included
TEXT_WIDTH = 128
LATENT_CHANNELS = 16  # a cell of 8 x 8 pixels, so as many numbers a pixel as 4 channels at 4 x 4


@functools.cache
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
    special = [*letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, end_of_word_suffix="</w>", special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator([[word] for word in words], trainer)
    state = json.loads(bpe.to_str())["model"]
    pieces = [*sorted(state["vocab"], key=state["vocab"].get), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in state["merges"]], model_max_length=MAX_LENGTH)


def make_clip() -> CLIPModel:
    """The contrastive pair; its text half becomes the text encoder, the whole one the CLIP-like judge."""
    tokenizer, ends = make_tokenizer(), ("bos_token_id", "eos_token_id", "pad_token_id")
    both = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
        **{name: getattr(tokenizer, name) for name in ends},
        **both,
    }
    vision = {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 16, **both}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_identity_encoder() -> ResNetModel:
    """The DINO-like judge: a small residual network, with maps of 32, 16, 8, 4 and 2 cells a side."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 160, 256],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        hidden_act="relu",
        downsample_in_first_stage=True,
    )
    return ResNetModel(config).to(memory_format=torch.channels_last)


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


def make_unet(layers: int = 2, widths: tuple[int, int] = (64, 128)) -> UNet2DConditionModel:
    """A U-Net of two levels with cross-attention on both, 1x1 convolutions as `proj_out` as in SD 1.x: with two layers
    a block eleven transformer blocks, with one seven.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=layers,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(width // 32 for width in widths),  # the number of heads: diffusers #2011 on the name
        norm_num_groups=16,
    )


def deepened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net with one layer a block as one with two that computes the very same (Chen et al., 2016, arXiv 1511.05641).

    A new layer adds nothing at first: its last convolution and its transformer's `proj_out` are zero, and where it
    takes a skip, its shortcut drops that. It stands second in its block, where its input has the block's width, but
    first in the first up block, whose input has it from the start; so the old layers find the skips that they know.
    """
    deep = make_unet(2, unet.config.block_out_channels)
    stands = {"down_blocks.0": 1, "down_blocks.1": 1, "up_blocks.0": 0, "up_blocks.1": 1}

    def moved(found: re.Match) -> str:
        block, kind, index = found[1], found[2], int(found[3])
        return f"{block}.{kind}.{index + (index >= stands[block])}"

    layer = re.compile(r"^((?:down|up)_blocks\.\d)\.(resnets|attentions)\.(\d)")
    deep.load_state_dict({layer.sub(moved, name): weight for name, weight in unet.state_dict().items()}, strict=False)
    for block, index in stands.items():
        residual = deep.get_submodule(f"{block}.resnets.{index}")
        for last in (residual.conv2, deep.get_submodule(f"{block}.attentions.{index}").proj_out):
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        if residual.conv_shortcut is not None:
            nn.init.dirac_(residual.conv_shortcut.weight), nn.init.zeros_(residual.conv_shortcut.bias)
    return deep


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule made to end in noise alone, predicting v (Salimans and Ho, 2022).

    As it was, its last step still showed how light the picture is, and sampling began with a noise whose mean said
    it: snow became sand (Lin et al., 2023, arXiv 2305.08891).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
