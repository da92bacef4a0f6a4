"""dW = A B on every output projection: counts, attaching, merging, and files that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import AutoencoderKL, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from persres_lite import method
from persres_lite.attention import record_attention
from persres_lite.localize import localized
from persres_lite.lora import export_lora, import_lora
from persres_lite.residuals import Residuals, add_low_rank, find_proj_outs, fingerprint, unet_of
from tests.helpers import call_arguments, hooks_of, page_one, random_residuals
from tests.tiny import KINDS, sample, tiny_pipeline, tiny_unet

CROSS_FOUR = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
#: The published U-Net configurations, with U-Net parameters, blocks, kind, and residual parameters at rank 5 %.
PUBLISHED = {
    "sd-1.4": (
        CROSS_FOUR | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        859_520_964,
        {320: 5, 640: 5, 1280: 6},
        torch.nn.Conv2d,
        1_239_040,
    ),
    "sd-2.1": (
        CROSS_FOUR
        | {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        865_910_724,
        {320: 5, 640: 5, 1280: 6},
        torch.nn.Linear,
        1_239_040,
    ),
    "sdxl": (
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
        {640: 5, 1280: 6},
        torch.nn.Linear,
        1_187_840,
    ),
}


# Counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_models(name):
    config, unet_parameters, widths, kind, residual_parameters = PUBLISHED[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == unet_parameters
    modules = find_proj_outs(unet)
    assert all(type(module) is kind for module in modules.values())
    found = [module.weight.shape[0] for module in modules.values()]
    assert {width: found.count(width) for width in set(found)} == widths
    residuals = Residuals(unet)
    assert residuals.num_parameters() == residual_parameters
    assert all(parameter.device.type == "cpu" for parameter in residuals.parameters())
    ranks = {320: 16, 640: 32, 1280: 64}
    assert list(residuals.ranks.values()) == [ranks[width] for width in found]


def test_projections_are_listed_in_the_order_of_the_forward_pass(pipeline):
    called = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in find_proj_outs(pipeline.unet).items()
    ]
    sample(pipeline, steps=1)
    for handle in handles:
        handle.remove()
    assert called == list(find_proj_outs(pipeline.unet))


def test_models_without_such_projections_are_refused_by_name():
    with pytest.raises(ValueError, match="Found 0 output projections in AutoencoderKL"):
        find_proj_outs(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    with pytest.raises(TypeError, match="object has no U-Net: pass a Stable Diffusion pipeline"):
        Residuals(object())


@pytest.mark.parametrize("kind", [PixArtTransformer2DModel, SD3Transformer2DModel])
def test_diffusion_transformers_are_refused_by_name(kind):
    config = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8}
    if kind is PixArtTransformer2DModel:
        config |= {"norm_num_groups": 2, "cross_attention_dim": 8, "caption_channels": 8}
    else:
        config |= {"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8}
    model = kind(**config)
    message = f"{kind.__name__} is a diffusion transformer: its `proj_out` is the final unpatchify layer"
    with pytest.raises(ValueError, match=message):
        find_proj_outs(model)

    class Pipeline:
        transformer = model

    with pytest.raises(ValueError, match=message):
        Residuals(Pipeline())


# Ranks and initialization


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0.05, {32: 2, 64: 3}),
        (0.001, {32: 1, 64: 1}),
        (0.25, {32: 8, 64: 16}),
        (1.0, {32: 32, 64: 64}),
        (4, {32: 4, 64: 4}),
    ],
)
def test_ranks(sd1, rank, expected):
    residuals = Residuals(sd1, rank=rank)
    assert {A.shape[0]: A.shape[1] for A in residuals.A.values()} == expected
    assert {B.shape[1]: B.shape[0] for B in residuals.B.values()} == expected
    assert residuals.metadata["rank"] == str(rank)


def test_ranks_by_name(sd1):
    ranks = {name: 1 + i % 5 for i, name in enumerate(find_proj_outs(sd1.unet))}
    assert Residuals(sd1, rank=ranks).ranks == ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "Rank 0 does not fit .* of width 32: give a fraction .* or a whole number from 1 to 32"),
        ({"rank": 33}, "Rank 33 does not fit"),
        ({"rank": -0.1}, "Rank -0.1 does not fit"),
        ({"rank": 1.5}, "Rank 1.5 does not fit"),
        ({"rank": math.nan}, "Rank nan does not fit"),
        ({"rank": {}}, "The ranks by layer lack 'down_blocks.0.attentions.0.proj_out'"),
        ({"init": "zeros"}, "Unknown init 'zeros': choose 'lora' or 'random'"),
    ],
)
def test_bad_arguments(sd1, arguments, message):
    with pytest.raises(ValueError, match=message):
        Residuals(sd1, **arguments)


def test_lora_init_starts_at_the_original_model_and_random_does_not(sd1):
    start = Residuals(sd1, init="lora")
    assert all(not start.delta(name).any() for name in start.A)
    assert all(B.abs().min() > 0 for B in start.B.values())
    # Both random: every entry of A B has 1/sqrt(3) = 0.577 of the standard deviation of a fresh layer's weight.
    wide = torch.nn.Module()
    wide.block = torch.nn.Module()
    wide.block.proj_out, wide.block.transformer_blocks = torch.nn.Linear(1280, 1280), torch.nn.ModuleList()
    block = torch.nn.Module()
    block.attn2 = torch.nn.Module()
    block.attn2.to_k = torch.nn.Linear(8, 8)
    wide.block.transformer_blocks.append(block)
    residuals = Residuals(wide, rank=64, init="random")
    ratio = residuals.delta("block.proj_out").std() / wide.block.proj_out.weight.std()
    assert ratio.item() == pytest.approx(1 / math.sqrt(3), rel=0.02)


def test_seeds(sd1):
    one, same, other = (random_residuals(sd1, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one.A[name], same.A[name]) and torch.equal(one.B[name], same.B[name]) for name in one.A)
    assert not any(torch.equal(one.B[name], other.B[name]) for name in one.B)


# Attaching


def test_attached_agrees_with_explicit_weights_through_a_whole_run(pipeline):
    residuals = random_residuals(pipeline)
    with residuals.attached(pipeline):
        ours = sample(pipeline, steps=4)
    with method.attached(pipeline.unet, page_one(pipeline.unet, residuals)), torch.no_grad():
        slow = sample(pipeline, steps=4)
    assert (slow - sample(pipeline, steps=4)).abs().max() > 0.1  # the residuals do matter
    torch.testing.assert_close(ours, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_explicit_weights(kind):
    unet = tiny_pipeline(kind).unet
    residuals = random_residuals(unet)
    twin = random_residuals(unet)
    A, B = twin.A, twin.B
    with residuals.attached(unet):
        unet(**call_arguments(kind)).sample.square().mean().backward()
    with method.attached(unet, page_one(unet, twin)):
        unet(**call_arguments(kind)).sample.square().mean().backward()
    for name in A:
        scale = A[name].grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(residuals.A[name].grad, A[name].grad, atol=1e-4 * scale.item(), rtol=1e-4)
        scale = B[name].grad.abs().max()
        torch.testing.assert_close(residuals.B[name].grad, B[name].grad, atol=1e-4 * scale.item(), rtol=1e-4)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_gradients_with_checkpointing(sd1):
    """The same gradients, when activations are computed again in the backward pass."""
    residuals = random_residuals(sd1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            sd1.unet.enable_gradient_checkpointing()
            sd1.unet.train()  # diffusers checkpoints only in training mode; nothing here has dropout
        for parameter in residuals.parameters():
            parameter.grad = None
        with residuals.attached(sd1):
            sd1.unet(**call_arguments("sd1")).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in residuals.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-4)


def test_zero_residual_and_zero_scale_are_the_original_bit_for_bit(pipeline):
    original = sample(pipeline)
    with Residuals(pipeline).attached(pipeline):
        assert torch.equal(sample(pipeline), original)
    with random_residuals(pipeline).attached(pipeline, scale=0.0):
        assert torch.equal(sample(pipeline), original)
    assert torch.equal(sample(pipeline), original)


def test_leaving_restores_hooks_and_state_dict_also_through_an_exception(pipeline):
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    residuals = random_residuals(pipeline)
    with pytest.raises(RuntimeError, match="in between"):
        with residuals.attached(pipeline) as same:
            assert same is residuals
            assert hooks_of(pipeline.unet) == len(residuals.A) + 1  # and one that sees to it that nothing is compiled
            assert pipeline.unet.state_dict().keys() == before.keys()
            raise RuntimeError("in between")
    assert hooks_of(pipeline.unet) == 0
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())


def test_contexts_nest_and_add_up(sd1):
    one, two = random_residuals(sd1, seed=1), random_residuals(sd1, seed=2)
    both = Residuals(sd1, rank=0.5)
    for name in both.A:
        both.A[name].data = torch.cat([0.5 * one.A[name], 2.0 * two.A[name]], 1).detach()
        both.B[name].data = torch.cat([one.B[name], two.B[name]], 0).detach()
    with both.attached(sd1):
        expected = sample(sd1)
    with one.attached(sd1, scale=0.5), two.attached(sd1.unet, scale=2.0):
        torch.testing.assert_close(sample(sd1), expected, atol=1e-4, rtol=1e-4)
    with two.attached(sd1):
        inner_only = sample(sd1)
    with two.attached(sd1):
        with one.attached(sd1):
            assert not torch.equal(sample(sd1), inner_only)
        assert torch.equal(sample(sd1), inner_only)  # leaving the inner context leaves the outer one in force


def test_scale_interpolates(sd1):
    residuals = random_residuals(sd1)
    halved = Residuals(sd1, rank=0.25)
    for name in halved.A:
        halved.A[name].data, halved.B[name].data = 0.5 * residuals.A[name].data, residuals.B[name].data
    with halved.attached(sd1):
        expected = sample(sd1)
    with residuals.attached(sd1, scale=0.5):
        torch.testing.assert_close(sample(sd1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 24, 8)], ids=["convolution", "linear"])
def test_apply_is_A_B_x(shape):
    unet = tiny_unet("sd1")
    residuals = random_residuals(unet)
    name = next(iter(residuals.A))
    x = torch.randn(2, 32, 4, 6) if len(shape) == 4 else torch.randn(2, 24, 32)
    equation = "ij,bjhw->bihw" if len(shape) == 4 else "ij,bnj->bni"
    ours = add_low_rank(torch.zeros_like(x), x, residuals.A[name], residuals.B[name])
    torch.testing.assert_close(ours, torch.einsum(equation, residuals.delta(name), x))


def test_low_rank_sum_keeps_channels_last_and_the_bits_under_a_zero_mask():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    output = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    A, B = torch.randn(8, 3), torch.randn(3, 8)
    mask = (torch.rand(2, 4, 4) > 0.5).float()
    result = add_low_rank(output, x, A, B, mask)
    outside = mask[:, None].expand_as(output) == 0
    assert torch.equal(result[outside], output[outside])
    torch.testing.assert_close(result, output + mask[:, None] * torch.einsum("ij,bjhw->bihw", A @ B, x))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_bases_keep_fp32_residuals(autocast):
    unet = tiny_pipeline("sd1").unet
    if not autocast:
        unet.to(torch.bfloat16)
    residuals = Residuals(unet)
    assert {parameter.dtype for parameter in residuals.parameters()} == {torch.float32}
    arguments = call_arguments("sd1")
    if not autocast:
        arguments = {key: v.bfloat16() if v.is_floating_point() else v for key, v in arguments.items()}
    with residuals.attached(unet), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = unet(**arguments).sample
    assert prediction.dtype == torch.bfloat16
    prediction.float().square().mean().backward()
    assert all(A.grad.dtype == torch.float32 and A.grad.any() for A in residuals.A.values())


def test_residuals_of_another_shape_are_refused(sd1, sdxl):
    residuals = Residuals(sd1)
    with pytest.raises(ValueError, match="made for a U-Net with 16 convolutions 32x10 64x6.*this one has 11 linear"):
        with residuals.attached(sdxl):
            pass
    assert hooks_of(sdxl.unet) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_of_other_weights_are_refused(tmp_path, kind):
    """The same shapes, and another model: a picture would come out, and not of this concept."""
    base, other = tiny_pipeline(kind), tiny_pipeline(kind, seed=1)
    residuals = random_residuals(base)
    residuals.metadata["base"] = "sd-1.4"
    sentence = "were trained on other weights than those of this model, though of the same shapes: load sd-1.4, or a"
    path = residuals.save(tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match=f"These residuals {sentence}"), residuals.attached(other):
        pass
    with pytest.raises(ValueError, match=sentence), localized(other, residuals, "sks cat"):
        pass
    with pytest.raises(ValueError, match=sentence):
        residuals.merge(other.unet)
    with pytest.raises(ValueError, match=f"The residuals of {path} {sentence}"):
        Residuals.load(path, other)
    for format in ("diffusers", "kohya"):
        export_lora(residuals, path, format)
        with pytest.raises(ValueError, match=f"The residuals of {path} {sentence}"):
            import_lora(path, other)
    assert hooks_of(other.unet) == 0


def test_convolutions_and_linear_layers_of_the_same_names_and_widths(sd1):
    residuals = Residuals(sd1)
    with pytest.raises(ValueError, match="with 16 convolutions 32x10 64x6.* this one has 16 linear layers 32x10 64x6"):
        with residuals.attached(tiny_pipeline("sd2")):
            pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_the_same_weights_in_another_precision_are_the_same_model(pipeline, dtype):
    residuals = random_residuals(pipeline)
    pipeline.unet.to(dtype)
    assert residuals.layers_in(pipeline)
    agreeing = 1 - (int(fingerprint(pipeline.unet), 16) ^ int(residuals.metadata["fingerprint"], 16)).bit_count() / (
        4 * len(residuals.metadata["fingerprint"])
    )
    assert agreeing > 0.9


def test_a_fine_tuned_model_is_still_the_same_one(sd1):
    """As LoRAs are carried over to models that were made from theirs; and a merged residual is a change, too."""
    residuals = random_residuals(sd1)
    for seed in (2, 3):
        random_residuals(sd1, seed=seed).merge(sd1)
    assert residuals.layers_in(sd1)
    torch.manual_seed(0)
    for module in find_proj_outs(sd1.unet).values():
        module.weight.data += 0.3 * module.weight.std() * torch.randn_like(module.weight)
    assert residuals.layers_in(sd1)


def test_files_and_models_without_a_fingerprint_go_where_they_fit(tmp_path, sd1):
    residuals = random_residuals(sd1)
    del residuals.metadata["fingerprint"]  # as the first edition wrote them
    path = residuals.save(tmp_path / "cat.safetensors")
    assert Residuals.load(path, tiny_pipeline("sd1", seed=1)).layers_in(tiny_pipeline("sd1", seed=2))
    with torch.device("meta"):
        empty = tiny_unet("sd1")
    assert Residuals(empty).metadata["fingerprint"] == "" and random_residuals(sd1).layers_in(empty)


@pytest.mark.parametrize("stored", ["zz" * 128, "ab", "0x" + "f" * 254, "é" * 256])
def test_a_fingerprint_that_is_none_fits_nothing(sd1, stored):
    residuals = random_residuals(sd1)
    residuals.metadata["fingerprint"] = stored
    with pytest.raises(ValueError, match="trained on other weights"):
        residuals.layers_in(sd1)


# Merging


@pytest.mark.parametrize("how", ["unet.compile", "torch.compile", "one block"])
def test_a_compiled_model_is_told_because_it_would_not_call_what_is_attached(sd1, how):
    residuals = random_residuals(sd1)
    with residuals.attached(sd1):
        right = sample(sd1)
    compiled = tiny_pipeline("sd1")
    if how == "unet.compile":
        compiled.unet.compile(backend="eager")
    elif how == "torch.compile":
        compiled.unet = torch.compile(compiled.unet, backend="eager")
    else:
        compiled.unet.mid_block.compile(backend="eager")
    contexts = (
        residuals.attached(compiled),
        localized(compiled, residuals, "sks cat"),
        localized(compiled, residuals, "sks cat", fixed_mask=torch.ones(4, 4)),
        record_attention(compiled),
    )
    for context in contexts:
        with pytest.raises(ValueError, match="compiled code does not call what is attached .* merge the residuals"):
            with context:
                pass
    # What the sentence advises works, under the names of the model that was not compiled.
    assert list(find_proj_outs(unet_of(compiled))) == list(residuals.ranks)
    residuals.merge(compiled)
    if how != "torch.compile":
        compiled.unet._compiled_call_impl = None  # the compiler itself need not run here
    else:
        compiled.unet = compiled.unet._orig_mod
    torch.testing.assert_close(sample(compiled), right, rtol=1e-3, atol=1e-3)


def compile_now(base, how):
    """Each way that the documentation of PyTorch or diffusers names; the backend runs the code as it is."""
    if how == "unet.compile":
        base.unet.compile(backend="eager")
    elif how == "whole graph":
        base.unet.compile(backend="eager", fullgraph=True)
    elif how == "torch.compile":
        base.unet = torch.compile(base.unet, backend="eager")
    elif how == "forward":
        base.unet.forward = torch.compile(base.unet.forward, backend="eager")
    elif how == "one block":
        base.unet.mid_block = torch.compile(base.unet.mid_block, backend="eager")
    else:
        base.unet.compile_repeated_blocks(backend="eager")


WAYS_TO_COMPILE = ("unet.compile", "whole graph", "torch.compile", "forward", "one block", "repeated blocks")
OTHER_CONTEXTS = ("localized", "drawn", "recorded")
CASES = [("attached", how) for how in WAYS_TO_COMPILE] + [(context, "one block") for context in OTHER_CONTEXTS]


@pytest.mark.parametrize(("context", "how"), CASES)
def test_a_model_that_is_compiled_while_a_context_is_open_is_told_at_its_next_call(context, how):
    base = tiny_pipeline("sd1")
    residuals = random_residuals(base)
    opened = {
        "attached": lambda: residuals.attached(base),
        "localized": lambda: localized(base, residuals, "sks cat"),
        "drawn": lambda: localized(base, residuals, "sks cat", fixed_mask=torch.ones(4, 4)),
        "recorded": lambda: record_attention(base),
    }
    unet = base.unet
    with opened[context]():
        sample(base, steps=1)
        compile_now(base, how)
        with pytest.raises(ValueError, match="compiled code does not call what is attached .* merge the residuals"):
            sample(base, steps=1)
    assert hooks_of(unet) == 0


def test_merging_into_offloaded_weights_is_refused(sd1):
    residuals = random_residuals(sd1)
    cpu_offload(sd1.unet, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded and come to the device for each call only"):
        residuals.merge(sd1)
    remove_hook_from_submodules(sd1.unet)
    residuals.merge(sd1)


def test_factors_are_in_fp32_whatever_the_default(sd1):
    torch.set_default_dtype(torch.float16)
    try:
        residuals = Residuals(sd1, init="random")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in residuals.parameters()} == {torch.float32}
    pairs = zip(residuals.parameters(), Residuals(sd1, init="random").parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_merge_is_attached_and_unmerge_restores_bit_for_bit(pipeline):
    original = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    residuals = random_residuals(pipeline)
    with residuals.attached(pipeline, scale=0.7):
        attached = sample(pipeline)
    residuals.merge(pipeline, scale=0.7)
    torch.testing.assert_close(sample(pipeline), attached, atol=1e-4, rtol=1e-4)
    residuals.unmerge()
    assert all(torch.equal(value, original[name]) for name, value in pipeline.unet.state_dict().items())


def test_merge_in_half_precision_restores_bit_for_bit(sd1):
    sd1.unet.to(torch.bfloat16)
    original = {name: value.clone() for name, value in sd1.unet.state_dict().items()}
    residuals = random_residuals(sd1)
    residuals.merge(sd1.unet)
    name = next(iter(residuals.A))
    assert not torch.equal(sd1.unet.state_dict()[f"{name}.weight"], original[f"{name}.weight"])
    residuals.unmerge()
    assert all(torch.equal(value, original[key]) for key, value in sd1.unet.state_dict().items())


def test_merging_out_of_order_is_refused(sd1):
    one, two = random_residuals(sd1, seed=1), random_residuals(sd1, seed=2)
    with pytest.raises(ValueError, match="not merged into a model"):
        one.unmerge()
    one.merge(sd1)
    with pytest.raises(ValueError, match="merged into a model already: call `unmerge"):
        one.merge(sd1)
    with pytest.raises(ValueError, match="merged into this model already"):
        with one.attached(sd1):
            pass
    merged = sd1.unet.mid_block.attentions[0].proj_out.weight.clone()
    two.merge(sd1)
    with pytest.raises(ValueError, match="changed after `merge`"):
        one.unmerge()
    two.unmerge()
    assert torch.equal(sd1.unet.mid_block.attentions[0].proj_out.weight, merged)
    one.unmerge()


# Files


def test_save_and_load(tmp_path, pipeline):
    residuals = random_residuals(pipeline)
    residuals.metadata |= {"base": "tiny", "token": "sks", "macro_class": "cat"}
    residuals.losses = [0.5, 0.25]
    path = residuals.save(tmp_path / "new" / "cat.safetensors")
    assert [each.name for each in path.parent.iterdir()] == ["cat.safetensors"]  # no temporary file left
    loaded = Residuals.load(path, pipeline)
    assert loaded.metadata == residuals.metadata
    assert loaded.metadata.keys() >= {"base", "token", "macro_class", "rank", "version"}
    assert loaded.losses == residuals.losses
    for name in residuals.A:
        assert torch.equal(loaded.A[name], residuals.A[name]) and torch.equal(loaded.B[name], residuals.B[name])
        assert loaded.A[name].requires_grad
    assert set(load_file(path)) == {f"{name}.{factor}" for name in residuals.A for factor in "AB"}


def test_files_of_version_1_are_read(tmp_path, sd1):
    """They called the losses "history" and a learned token embedding "rows"."""
    residuals = random_residuals(sd1)
    tensors = load_file(residuals.save(tmp_path / "new.safetensors")) | {"text_encoder.rows": torch.ones(1, 32)}
    metadata = residuals.metadata | {"version": "1", "token": "sks", "history": "[0.5, 0.25]"}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    loaded = Residuals.load(tmp_path / "old.safetensors", sd1)
    assert loaded.losses == [0.5, 0.25] and loaded.token_embeddings["text_encoder"].eq(1).all()
    assert all(torch.equal(loaded.A[name], residuals.A[name]) for name in residuals.A)
    again = Residuals.load(loaded.save(tmp_path / "again.safetensors"), sd1)
    assert again.metadata["version"] == "2" and again.losses == loaded.losses
    assert again.token_embeddings.keys() == {"text_encoder"}


def test_a_failed_save_leaves_the_old_file(tmp_path, sd1, monkeypatch):
    path = Residuals(sd1).save(tmp_path / "cat.safetensors")
    before = path.read_bytes()

    def fail(self, content):
        with open(self, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        random_residuals(sd1).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["cat.safetensors"]


FIRST = "down_blocks.0.attentions.0.proj_out"


def lacking(tensors, metadata):
    del tensors[f"{FIRST}.A"]


def extra(tensors, metadata):
    tensors["somewhere.A"] = torch.zeros(2, 2)


def not_a_number(tensors, metadata):
    tensors[f"{FIRST}.B"][0, 0] = math.nan


def other_shape(tensors, metadata):
    tensors[f"{FIRST}.A"] = torch.zeros(32, 5)


def flipped(tensors, metadata):
    """One bit of an exponent: 0.06 becomes 2e37."""
    tensors[f"{FIRST}.A"] += 1e-3
    tensors[f"{FIRST}.B"].view(torch.int32)[0, 0] ^= 1 << 30


def newer(tensors, metadata):
    metadata["version"] = "3"


def no_version(tensors, metadata):
    metadata["version"] = "one"


def no_list(tensors, metadata):
    metadata["losses"] = "[" * 5000


def no_losses(tensors, metadata):
    metadata["losses"] = '{"a": 1}'


def whole_numbers(tensors, metadata):
    tensors[f"{FIRST}.A"] = torch.zeros(32, 2, dtype=torch.int8)


def other_rows(tensors, metadata):
    tensors["text_encoder.rows"] = torch.zeros(3, 32)


def huge_rows(tensors, metadata):
    tensors["text_encoder.rows"] = torch.full((1, 32), 1e30)


def a_lora(tensors, metadata):
    metadata.clear()


def other_base(tensors, metadata):
    metadata |= {"structure": "16 convolutions 320x5 640x5 1280x6, text width 768", "base": "sd-1.4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, rf"lacks tensor '{FIRST}.A' \(1 in all\)"),
        (extra, r"has an extra tensor 'somewhere.A' \(1 in all\)"),
        (not_a_number, f"holds NaN or infinity in '{FIRST}.B'"),
        (other_shape, rf"has factors of shapes \(32, 5\) and \(2, 32\) for '{FIRST}', where \(32, r\) and \(r, 32\)"),
        (flipped, f"would change weights of '{FIRST}' by up to .e.3.*the file is damaged, or the training"),
        (newer, "is of version 3, newer than 2: update the package"),
        (no_version, "is of version one, newer than 2"),
        (no_list, "has losses that are no list of numbers: it is damaged"),
        (no_losses, "has losses that are no list of numbers"),
        (whole_numbers, f"has factors of whole or complex numbers for '{FIRST}': it is damaged"),
        (other_rows, r"has an embedding of shape \(3, 32\) for 'sks' in text_encoder, where \(1, 32\) was expected"),
        (huge_rows, "has an embedding of 'sks' beyond all others: it is damaged"),
        (a_lora, "does not hold personalized residuals; a LoRA file must be imported first"),
        (other_base, "made for another base, sd-1.4, with 16 convolutions 320x5 .* this one has 16 convolutions 32x10"),
    ],
)
def test_wrong_files_are_refused_with_the_difference(tmp_path, sd1, change, message):
    residuals = Residuals(sd1)
    residuals.metadata["token"] = "sks"
    tensors = load_file(residuals.save(tmp_path / "right.safetensors"))
    metadata = {key: str(value) for key, value in residuals.metadata.items()} | {"losses": json.dumps([])}
    change(tensors, metadata)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    Residuals.load(tmp_path / "right.safetensors", sd1)
    with pytest.raises(ValueError, match=message):
        Residuals.load(tmp_path / "wrong.safetensors", sd1)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files_are_refused(tmp_path, sd1, keep):
    path = Residuals(sd1).save(tmp_path / "cat.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cat.safetensors is not a whole safetensors file"):
        Residuals.load(path, sd1)


def test_missing_and_foreign_files_are_refused(tmp_path, sd1, sdxl):
    with pytest.raises(FileNotFoundError, match="There is no file .*nowhere.safetensors"):
        Residuals.load(tmp_path / "nowhere.safetensors", sd1)
    path = Residuals(sd1).save(tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match="made for another base, unnamed, with 16 conv.*this one has 11 linear"):
        Residuals.load(path, sdxl)
