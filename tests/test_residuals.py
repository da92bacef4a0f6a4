"""dW = A B on every output projection: counts, attaching, merging, and files that are refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from persres_lite.attention import record_attention
from persres_lite.localize import localized
from persres_lite.lora import export_lora, import_lora
from persres_lite.residuals import Residuals, add_low_rank, find_proj_outs, fingerprint
from tests.helpers import call_arguments, hooks_of, random_residuals
from tests.tiny import sample, tiny_pipeline, tiny_unet

#: The published U-Net configurations, as far as they are not diffusers' defaults, which are those of the first Stable
#: Diffusion; with U-Net parameters, blocks, kind, and residual parameters at rank 5 %.
PUBLISHED = {
    "sd-1.4": ({"cross_attention_dim": 768}, 859_520_964, {320: 5, 640: 5, 1280: 6}, torch.nn.Conv2d, 1_239_040),
    "sd-2.1": (
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        865_910_724,
        {320: 5, 640: 5, 1280: 6},
        torch.nn.Linear,
        1_239_040,
    ),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
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
        unet = UNet2DConditionModel(**config)
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
    """In a diffusion transformer `proj_out` is the last layer."""
    config = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8}
    transformer = PixArtTransformer2DModel(**config, norm_num_groups=2, cross_attention_dim=8, caption_channels=8)
    for model in (transformer, AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no transformer blocks .* U-Net"):
            Residuals(SimpleNamespace(transformer=model))


# Ranks and initialization


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0.05, {32: 2, 64: 3}), (0.001, {32: 1, 64: 1}), (1.0, {32: 32, 64: 64}), (4, {32: 4, 64: 4})],
)
def test_ranks(sd1, rank, expected):
    residuals = Residuals(sd1, rank=rank)
    assert {A.shape[0]: A.shape[1] for A in residuals.A.values()} == expected
    assert {B.shape[1]: B.shape[0] for B in residuals.B.values()} == expected
    assert residuals.metadata["rank"] == str(rank)


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


def test_zero_residual_and_zero_scale_are_the_original_bit_for_bit(pipeline):
    original = sample(pipeline, steps=1)
    with Residuals(pipeline).attached(pipeline):
        assert torch.equal(sample(pipeline, steps=1), original)
    with random_residuals(pipeline).attached(pipeline, scale=0.0):
        assert torch.equal(sample(pipeline, steps=1), original)


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
        expected = sample(sd1, steps=1)
    with one.attached(sd1, scale=0.5), two.attached(sd1.unet, scale=2.0):
        torch.testing.assert_close(sample(sd1, steps=1), expected, atol=1e-4, rtol=1e-4)
    with two.attached(sd1):
        inner_only = sample(sd1, steps=1)
    with two.attached(sd1):
        with one.attached(sd1):
            assert not torch.equal(sample(sd1, steps=1), inner_only)
        assert torch.equal(sample(sd1, steps=1), inner_only)  # leaving the inner context leaves the outer one in force


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


def test_residuals_of_other_weights_are_refused(tmp_path, sd1):
    """The same shapes, and another model: a picture would come out, and not of this concept."""
    other, residuals = tiny_pipeline("sd1", seed=1), random_residuals(sd1)
    residuals.metadata["base"] = "sd-1.4"
    path, lora = residuals.save(tmp_path / "cat.safetensors"), tmp_path / "lora.safetensors"
    export_lora(residuals, lora)
    for use in (
        lambda: residuals.layers_in(other),
        lambda: Residuals.load(path, other),
        lambda: import_lora(lora, other),
    ):
        with pytest.raises(ValueError, match="trained on other weights than those of this model.* load sd-1.4"):
            use()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_same_weights_in_another_precision_are_the_same_model(sd1, dtype):
    stored = fingerprint(sd1.unet)
    differing = int(fingerprint(sd1.unet.to(dtype)), 16) ^ int(stored, 16)
    assert differing.bit_count() < 0.1 * 4 * len(stored)


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


# Merging


def test_a_compiled_model_is_told_because_it_would_not_call_what_is_attached(sd1):
    residuals = random_residuals(sd1)
    with residuals.attached(sd1):
        right = sample(sd1)
    compiled = tiny_pipeline("sd1")
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    for context in (
        residuals.attached(compiled),
        localized(compiled, residuals, "sks cat"),
        record_attention(compiled),
    ):
        with pytest.raises(ValueError, match="merge the residuals"), context:
            pass
    residuals.merge(compiled)  # what the sentence advises works, under the names of the model that was not compiled
    compiled.unet = compiled.unet._orig_mod
    torch.testing.assert_close(sample(compiled), right, rtol=1e-3, atol=1e-3)


#: Each way that the documentation of PyTorch or diffusers names; the backend runs the code as it is.
WAYS_TO_COMPILE = {
    "unet.compile": lambda base: base.unet.compile(backend="eager"),
    "torch.compile": lambda base: setattr(base, "unet", torch.compile(base.unet, backend="eager")),
    "forward": lambda base: setattr(base.unet, "forward", torch.compile(base.unet.forward, backend="eager")),
    "one block": lambda base: base.unet.mid_block.compile(backend="eager"),
    "repeated blocks": lambda base: base.unet.compile_repeated_blocks(backend="eager"),
}
CASES = [("attached", how) for how in WAYS_TO_COMPILE]
CASES += [(context, "one block") for context in ("localized", "drawn", "recorded")]


@pytest.mark.parametrize(("context", "how"), CASES)
def test_a_model_that_is_compiled_while_a_context_is_open_is_told_at_its_next_call(sd1, context, how):
    residuals, unet = random_residuals(sd1), sd1.unet
    opened = {
        "attached": lambda: residuals.attached(sd1),
        "localized": lambda: localized(sd1, residuals, "sks cat"),
        "drawn": lambda: localized(sd1, residuals, "sks cat", fixed_mask=torch.ones(4, 4)),
        "recorded": lambda: record_attention(sd1),
    }
    with opened[context]():
        WAYS_TO_COMPILE[how](sd1)
        with pytest.raises(ValueError, match="compiled code does not call what is attached .* merge the residuals"):
            sample(sd1, steps=1)
    assert hooks_of(unet) == 0


def test_merging_into_offloaded_weights_is_refused(sd1):
    residuals = random_residuals(sd1)
    cpu_offload(sd1.unet, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded and come to the device for each call only"):
        residuals.merge(sd1)
    remove_hook_from_submodules(sd1.unet)
    residuals.merge(sd1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_merging_into_quantized_weights_is_refused(dtype):
    base = tiny_pipeline("sd2")
    residuals = random_residuals(base)
    layer = base.unet.mid_block.attentions[0].proj_out
    layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    residuals.metadata["fingerprint"] = ""  # which such weights may have or not
    with pytest.raises(ValueError, match="quantized.*half precision"):
        residuals.merge(base)
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def test_muted_they_add_nothing_and_come_back(sd1):
    residuals = random_residuals(sd1)
    original = sample(sd1, steps=1)
    with residuals.attached(sd1):
        personalized = sample(sd1, steps=1)
        with pytest.raises(KeyboardInterrupt), residuals.muted():
            assert torch.equal(sample(sd1, steps=1), original)
            raise KeyboardInterrupt
        assert torch.equal(sample(sd1, steps=1), personalized)


def test_merge_is_attached_and_unmerge_restores_bit_for_bit(pipeline):
    original = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    residuals = random_residuals(pipeline)
    with residuals.attached(pipeline, scale=0.7):
        attached = sample(pipeline, steps=1)
    residuals.merge(pipeline, scale=0.7)
    torch.testing.assert_close(sample(pipeline, steps=1), attached, atol=1e-4, rtol=1e-4)
    residuals.unmerge()
    assert all(torch.equal(value, original[name]) for name, value in pipeline.unet.state_dict().items())


def test_merges_are_undone_in_reverse_order_and_none_counts_twice(sd1):
    one, two = random_residuals(sd1, seed=1), random_residuals(sd1, seed=2)
    weight = sd1.unet.mid_block.attentions[0].proj_out.weight
    original = weight.clone()
    one.merge(sd1)
    for twice in (lambda: one.merge(sd1), lambda: one.attached(sd1).__enter__()):
        with pytest.raises(ValueError, match="merged into this model already: call `unmerge"):
            twice()
    merged = weight.clone()
    two.merge(sd1)
    two.unmerge()
    assert torch.equal(weight, merged) and not torch.equal(weight, original)
    one.unmerge()
    assert torch.equal(weight, original)


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


FIRST = "down_blocks.0.attentions.0.proj_out"


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        ({f"{FIRST}.A": None}, {}, f"damaged.*{FIRST}.A"),
        ({f"{FIRST}.A": torch.zeros(32, 5)}, {}, "damaged"),
        ({f"{FIRST}.B": torch.full((2, 32), math.nan)}, {}, f"holds NaN or infinity in '{FIRST}.B'"),
        ({}, {"version": "3"}, "of version 3, .* update the package"),
        ({}, {"losses": "[" * 5000}, "damaged"),
        ({}, {"format": ""}, "a LoRA file must be imported first"),
        ({}, {"structure": "16 convolutions 320x16", "base": "sd-1.4"}, r"320x16 \(sd-1.4\); this one has 7"),
    ],
)
def test_wrong_files_are_refused_with_the_difference(tmp_path, sd1, tensors, metadata, named):
    residuals = random_residuals(sd1, rank=2)
    whole = load_file(residuals.save(tmp_path / "right.safetensors"))
    Residuals.load(tmp_path / "right.safetensors", sd1)
    changed = {name: value for name, value in (whole | tensors).items() if value is not None}
    save_file(changed, tmp_path / "wrong.safetensors", residuals.metadata | {"losses": "[]"} | metadata)
    with pytest.raises(ValueError, match=named):
        Residuals.load(tmp_path / "wrong.safetensors", sd1)


@pytest.mark.parametrize("keep", [0, 200, -1])
def test_truncated_files_are_refused(tmp_path, sd1, keep):
    path = Residuals(sd1).save(tmp_path / "cat.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cat.safetensors is not a whole safetensors file"):
        Residuals.load(path, sd1)


def test_missing_and_foreign_files_are_refused(tmp_path, sd1, sdxl):
    with pytest.raises(FileNotFoundError, match="There is no file .*nowhere.safetensors"):
        Residuals.load(tmp_path / "nowhere.safetensors", sd1)
    path = Residuals(sd1).save(tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match="made for a U-Net with 7 conv.*this one has 7 linear"):
        Residuals.load(path, sdxl)
