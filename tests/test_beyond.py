"""LAG for LoRAs of other tools, layer by layer, and concepts that overlap."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from persres_lite.beyond import by_position, layers_of, localized_lora, strongest
from persres_lite.localize import localized
from persres_lite.lora import export_lora
from persres_lite.masks import make_mask, resize
from persres_lite.residuals import find_proj_outs
from tests.helpers import call_arguments, hooks_of, random_residuals
from tests.tiny import KINDS, sample, tiny_pipeline

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PICTURE = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "conv"]
TIME = ["time_emb_proj", "time_embedding.linear_1", "conv_in", "conv_out"]
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1
ONES = torch.ones(8, 8)


def load(model, name="cat", layers=PICTURE, seed=1, dora=False):
    """A LoRA of random factors, as somebody's file would bring it."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=layers, use_dora=dora), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key and "magnitude" not in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5


def output_of(unet, name, run):
    """What a layer gives while `run` does; of an attention to the text the whole of it."""
    seen = []
    layer = unet.get_submodule(re.sub(r"(attn2)\..*", r"\1", name))
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run()
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_identity_controls_bit_for_bit(kind):
    pipeline = tiny_pipeline(kind)
    frozen = sample(pipeline)
    load(pipeline.unet, layers=PICTURE + TIME)  # on everything
    load(pipeline.text_encoder, layers=["q_proj", "fc1"])
    everywhere = sample(pipeline)
    assert (everywhere - frozen).abs().max() > 0.01
    hooks = hooks_of(pipeline.unet) + hooks_of(pipeline.text_encoder)
    with localized_lora(pipeline, {"cat": None}, fixed_mask=ONES):
        assert torch.equal(sample(pipeline), everywhere)
    with localized_lora(pipeline, {"cat": None}, fixed_mask=0 * ONES, everywhere=False):
        assert torch.equal(sample(pipeline), frozen)
    with localized_lora(pipeline, {"cat": "sks cat"}, mask=torch.zeros_like, everywhere=False):
        assert torch.equal(sample(pipeline), frozen)
    with pytest.raises(ValueError, match="'wombat'"), localized_lora(pipeline, {"cat": "wombat"}, everywhere=False):
        sample(pipeline)
    assert hooks_of(pipeline.unet) + hooks_of(pipeline.text_encoder) == hooks
    assert torch.equal(sample(pipeline), everywhere)  # nothing is left, also after an error


BLOCK = "down_blocks.1.attentions.0"
FIRST = f"{BLOCK}.transformer_blocks.0"
LAYERS = ["down_blocks.1.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", f"{BLOCK}.proj_in"]
LAYERS += [f"{FIRST}.{name}" for name in ("attn1.to_k", "ff.net.0.proj", "attn2.to_q", "attn2.to_k", "attn2.to_v")]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", LAYERS, ids=lambda name: name.split("s.", 1)[1])
def test_half_of_a_layer_is_the_adapted_one_and_half_the_frozen_one(kind, name):
    """Two adapters, left and right. Bit for bit, since all that comes before this layer is the frozen model."""
    pipeline = tiny_pipeline(kind)
    unet = pipeline.unet
    load(unet, "cat", [name])
    load(unet, "dog", [name], seed=2)
    unet.set_adapters(["cat", "dog"])
    assert layers_of(pipeline, "cat") == {f"unet.{name}": "query" if "attn2" in name else "position"}
    run = partial(unet, **call_arguments(kind))
    with localized_lora(pipeline, {"cat": None, "dog": None}, fixed_mask=[LEFT, 1 - LEFT]):
        ours = output_of(unet, name, run)
    unet.set_adapters("cat")
    cat = output_of(unet, name, run)
    unet.set_adapters("dog")
    dog = output_of(unet, name, run)
    left = LEFT[:: 8 // round((ours[0].numel() / ours.shape[1 if ours.ndim == 4 else 2]) ** 0.5)]
    left = left[:, :: 8 // len(left)].expand(len(ours), -1, -1)
    assert torch.equal(ours, by_position(cat, left) + by_position(dog, 1 - left))
    unet.disable_adapters()
    frozen = output_of(unet, name, run)
    assert min((a - b).abs().max() for a, b in ((cat, dog), (cat, frozen), (dog, frozen))) > 1e-3


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_kohya_file_on_proj_out_gives_the_pictures_of_lag(kind, tmp_path):
    pipeline = tiny_pipeline(kind)
    residuals = random_residuals(pipeline)
    with localized(pipeline, residuals, "sks cat", window=(0.0, 0.6)) as lag:
        expected = sample(pipeline, steps=3)
    export_lora(residuals, tmp_path / "cat.safetensors", "kohya")
    frozen = sample(pipeline, steps=3)
    pipeline.load_lora_weights(tmp_path / "cat.safetensors", adapter_name="cat")
    with localized_lora(pipeline, {"cat": "sks cat"}, window=(0.0, 0.6)) as ours:
        torch.testing.assert_close(sample(pipeline, steps=3), expected, atol=1e-4, rtol=1e-4)
    assert ours.masks.keys() == lag.masks.keys() and {step for step, _ in ours.masks} == {0, 1}
    assert (expected - frozen).abs().max() > 0.1
    with localized_lora(pipeline, {"cat": "sks cat"}, fixed_mask=lag.masks, window=(0.0, 0.6)):  # another run's
        torch.testing.assert_close(sample(pipeline, steps=3), expected, atol=1e-4, rtol=1e-4)


ORIGINS = {  # of a layer, in the first or the second call of the U-Net: call and block
    "its own block": (f"{FIRST}.attn2.to_v", 2, (1, f"{BLOCK}.proj_out")),
    "the block before": ("up_blocks.1.resnets.0.conv1", 2, (1, "mid_block.attentions.0.proj_out")),
    "the step before": ("conv_in", 2, (0, "up_blocks.2.attentions.1.proj_out")),
    "nowhere yet": ("conv_in", 1, None),
}


@pytest.mark.parametrize(("name", "calls", "origin"), ORIGINS.values(), ids=list(ORIGINS))
def test_where_the_mask_of_a_layer_comes_from(sd1, name, calls, origin):
    """Two images, each with its own masks; before the first map the LoRA is not in force."""
    load(sd1.unet, layers=[name])
    prompts = ["a photo of a sks cat", "a duck and a sks cat on the beach"]
    text = torch.cat(sd1.encode_prompt(prompts, "cpu", 1, True)[::-1])  # negative prompts first

    def run():
        for _ in range(calls):
            sd1.unet(**call_arguments("sd1", 4) | {"encoder_hidden_states": text})

    with localized_lora(sd1, {"cat": "sks cat"}, mask="soft", prompts=prompts) as lag:
        ours = output_of(sd1.unet, name, run)
    adapted = output_of(sd1.unet, name, run)
    sd1.disable_lora()
    frozen = output_of(sd1.unet, name, run)
    mask = lag.masks[origin] if origin else torch.zeros(2, 8, 8)
    assert (adapted - frozen).abs().max() > 1e-3 and torch.equal(mask[0], mask[1]) == (origin is None)
    mask = resize(mask, ours.shape[-2:]) if ours.ndim == 4 else mask
    halves = torch.cat([mask, mask])  # the negative half takes it, too
    torch.testing.assert_close(ours, frozen + by_position(adapted - frozen, halves), atol=1e-5, rtol=1e-5)


def test_who_is_not_named_acts_everywhere(sd1):
    load(sd1.unet, "style", ATTENTION, seed=2)
    styled = sample(sd1)
    load(sd1.unet, "cat")
    sd1.unet.set_adapters(["style", "cat"])
    with localized_lora(sd1, {"cat": None}, fixed_mask=0 * ONES):
        assert torch.equal(sample(sd1), styled)


REFUSED = {"unknown": "load_lora_weights.*'cat'", "off": "set_adapters", "fused": "unfuse_lora", "DoRA": "DoRA"}


@pytest.mark.parametrize(("case", "words"), REFUSED.items(), ids=list(REFUSED))
def test_what_cannot_be_kept_to_a_place_is_refused_with_the_way_out(sd1, case, words):
    load(sd1.unet, layers=ATTENTION, dora=case == "DoRA")
    {"off": sd1.disable_lora, "fused": sd1.fuse_lora}.get(case, list)()
    name = "dog" if case == "unknown" else "cat"
    with pytest.raises(ValueError, match=words), localized_lora(sd1, {name: "sks cat"}):
        pass


# Several concepts


def test_the_stronger_map_wins_where_masks_overlap():
    maps = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    masks = torch.stack([make_mask(each) for each in maps])
    shares = strongest(masks, maps)
    one = masks.sum(0) == 1
    assert one.any() and (masks.sum(0) > 1).any()
    torch.testing.assert_close(shares.sum(0), masks.sum(0).clamp(max=1))
    torch.testing.assert_close(shares[:, one], masks[:, one])  # alone, each keeps its place
    gain = torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1)
    torch.testing.assert_close(strongest(masks, gain * maps + gain), shares)  # of maps only the shape counts
    scores = (maps - maps.mean((-2, -1), keepdim=True)) / maps.std((-2, -1), keepdim=True, correction=0)
    winner, some = scores.where(masks > 0, -torch.inf).argmax(0), masks.sum(0) > 0
    assert torch.equal(shares.argmax(0)[some], winner[some])
    torch.testing.assert_close(strongest(masks, maps, sharpness=0.0), masks / masks.sum(0).clamp(min=1))


def test_the_order_of_concepts_does_not_matter(sd1):
    pairs = [(random_residuals(sd1, seed=1), "sks cat"), (random_residuals(sd1, seed=2), "duck")]
    prompt = "a sks cat and a duck on the beach"
    pictures = []
    for chosen in (pairs, pairs[::-1]):
        with localized(sd1, chosen, overlap=strongest):
            pictures.append(sample(sd1, prompt))
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=1e-4)
    with localized(sd1, pairs):
        assert (sample(sd1, prompt) - pictures[0]).abs().max() > 1e-2


# A diffusion transformer


def test_in_a_diffusion_transformer_the_structure_is_refused_and_tokens_of_the_picture_can_be_masked():
    torch.manual_seed(0)
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, joint_attention_dim=16, pooled_projection_dim=16, **width
    ).eval()
    with pytest.raises(ValueError, match="diffusion transformer"):
        find_proj_outs(model)
    load(model, layers=["transformer_blocks.1.ff.net.2"])  # of the picture's stream, in the last block: no mixing after
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 16)}
    inputs |= {"pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([500])}
    adapted = model(**inputs).sample
    up = model.transformer_blocks[1].ff.net[2].lora_B["cat"]
    left = LEFT[None, ::2, ::2]  # tokens are 2 x 2 patches of the latents
    hook = up.register_forward_hook(lambda module, args, output: by_position(output, left))
    ours = model(**inputs).sample
    hook.remove()
    model.disable_adapters()
    assert torch.equal(ours, torch.where(LEFT > 0, adapted, model(**inputs).sample))
    assert (ours - adapted).abs().max() > 1e-3
