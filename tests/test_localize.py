"""f^ = (1 - M) W x + M W' x in the same forward pass: against page one, and with all that pipelines offer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from persres_lite import method
from persres_lite.attention import record_attention
from persres_lite.localize import localized
from persres_lite.masks import RULES, average, disc, make_mask
from persres_lite.residuals import Residuals, find_proj_outs
from tests.helpers import call_arguments, hooks_of, page_one, random_residuals
from tests.tiny import sample, tiny_pipeline

PROMPT = "a photo of a sks cat on the beach"
AT = [5, 6]  # sks cat


class Cat:
    """All that `localized` reads of a concept is str(concept)."""

    def __str__(self):
        return "sks cat"


# Against page one


def test_pictures_are_those_of_page_one(pipeline, last_layer):
    residuals = random_residuals(pipeline)
    with localized(pipeline, residuals, Cat()) as lag:
        ours = sample(pipeline, PROMPT)
    with torch.no_grad(), method.lag(pipeline.unet, *page_one(residuals), AT) as masks:
        expected = sample(pipeline, PROMPT)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for name, mask in zip(residuals.A, masks, strict=True):
        assert torch.equal(lag.masks[1, name].flatten(1), mask[:1]), name
    with residuals.attached(pipeline):
        everywhere = sample(pipeline, PROMPT)
    for other in (sample(pipeline, PROMPT), everywhere):  # the mask does matter
        assert (ours - other).abs().max() > 0.1


def both_halves(pipeline) -> torch.Tensor:
    """What the pipeline encodes the negative prompt and `PROMPT` to, as one batch."""
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(
            PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )[:2]
    return torch.cat([negative, positive])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradients_are_those_of_page_one(kind, last_layer):
    pipeline = tiny_pipeline(kind)
    arguments = call_arguments(kind) | {"encoder_hidden_states": both_halves(pipeline)}
    residuals, twin = random_residuals(pipeline), random_residuals(pipeline)
    with localized(pipeline, residuals, "sks cat", prompts=PROMPT):
        pipeline.unet(**arguments).sample.square().mean().backward()
    with method.lag(pipeline.unet, *page_one(twin), AT):
        pipeline.unet(**arguments).sample.square().mean().backward()
    for ours, expected in zip(residuals.parameters(), twin.parameters(), strict=True):
        largest = expected.grad.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-4 * largest, rtol=1e-4)


# Identity controls


def test_identity_controls_bit_for_bit(pipeline):
    original = sample(pipeline)
    residuals = random_residuals(pipeline)
    with residuals.attached(pipeline):
        everywhere = sample(pipeline)
    with localized(pipeline, Residuals(pipeline), "sks cat") as lag:
        assert torch.equal(sample(pipeline), original)  # zero residual
    assert 0 < sum(mask.sum() for mask in lag.masks.values())
    for arguments, expected in (
        ({"scale": 0.0}, original),
        ({"fixed_mask": torch.zeros(8, 8)}, original),
        ({"mask": torch.zeros_like}, original),
        ({"fixed_mask": torch.ones(8, 8)}, everywhere),
        ({"mask": torch.ones_like}, everywhere),
        ({"mask": torch.zeros_like, "window": (0.0, 0.5)}, original),
    ):
        with localized(pipeline, residuals, "sks cat", **arguments):
            assert torch.equal(sample(pipeline), expected), arguments
    assert torch.equal(sample(pipeline), original)


def test_leaving_restores_everything_also_through_an_exception(pipeline):
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    processors = dict(pipeline.unet.attn_processors)

    def stop(pipe, step, timestep, arguments):
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        with localized(pipeline, random_residuals(pipeline), "sks cat"):
            assert pipeline.unet.state_dict().keys() == before.keys()
            sample(pipeline, callback_on_step_end=stop)
    assert hooks_of(pipeline.unet) == 0 and "encode_prompt" not in vars(pipeline)
    assert pipeline.unet.attn_processors == processors
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())


def test_no_model_evaluation_is_added(pipeline):
    """LAG calls no module of the U-Net more often than plain sampling does."""
    calls: dict[str, int] = {}

    def count(name):
        def hook(*_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in pipeline.unet.named_modules()]
    sample(pipeline, steps=2)
    plain, calls = calls, {}
    with localized(pipeline, random_residuals(pipeline), "sks cat"):
        sample(pipeline, steps=2)
    for handle in handles:
        handle.remove()
    assert calls == plain and calls[""] == 2


@pytest.mark.parametrize("rule", RULES)
def test_masks_are_of_the_same_pass_they_are_used_in(sd1, rule):
    with localized(sd1, random_residuals(sd1), "sks cat", mask=rule) as lag:
        with record_attention(sd1, words=["sks cat"]) as record:
            sample(sd1, steps=2)
    assert lag.masks.keys() == record.maps.keys()
    for key, mask in lag.masks.items():
        assert torch.equal(mask, make_mask(record.maps[key][:, 0], rule))
    assert not torch.equal(*(lag.masks[step, record.blocks[0]] for step in (0, 1)))


def test_the_next_call_begins_anew(sd1):
    with localized(sd1, random_residuals(sd1), "sks cat", aggregate="steps") as lag:
        sample(sd1, steps=3)
        one = sample(sd1, steps=2)
        assert max(step for step, _ in lag.masks) == 1
        assert torch.equal(sample(sd1, steps=2), one)


# Choices


@pytest.mark.parametrize(("window", "inside"), [((0.0, 0.5), [0, 1]), ((0.5, 1.0), [2, 3]), ((0.2, 0.3), [1])])
def test_window_of_steps(sd1, window, inside):
    residuals, latents = random_residuals(sd1), {}

    def keep(pipe, step, timestep, arguments):
        latents.setdefault(step, []).append(arguments["latents"].clone())
        return arguments

    with localized(sd1, residuals, "sks cat", window=window) as lag:
        sample(sd1, steps=4, callback_on_step_end=keep)
    assert sorted({step for step, _ in lag.masks}) == inside
    sample(sd1, steps=4, callback_on_step_end=keep)
    for step in range(4):  # until then it is the original model
        assert torch.equal(*latents[step]) == (step < inside[0])


def test_the_map_is_the_mean_of_heads_and_layers(sdxl):
    """By the explicit softmax of every layer: XL has several before one projection, here 2."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(attn, args, kwargs, output, *, name):
        A = method.attention(attn, args[0], kwargs["encoder_hidden_states"])
        seen.setdefault(name, []).append(A[1:, :, AT].sum(-1))  # (1, HW) of the positive half

    handles = [
        layer.attn2.register_forward_hook(partial(keep, name=name), with_kwargs=True)
        for name in find_proj_outs(sdxl.unet)
        for layer in sdxl.unet.get_submodule(name.removesuffix(".proj_out")).transformer_blocks
    ]
    with localized(sdxl, random_residuals(sdxl), "sks cat", mask=lambda maps: maps) as lag:
        sample(sdxl, PROMPT, steps=1)
    for handle in handles:
        handle.remove()
    assert {len(maps) for maps in seen.values()} == {1, 2}
    for name, maps in seen.items():
        torch.testing.assert_close(lag.masks[0, name].flatten(1), torch.stack(maps).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("aggregate", ["blocks", "steps", "both"])
def test_aggregation_over_blocks_and_steps(sd1, aggregate):
    """Each mask is made of the average of the maps so far: of the others, of the earlier steps, or of both."""
    blocks = list(find_proj_outs(sd1.unet))
    with localized(sd1, random_residuals(sd1), "sks cat", aggregate=aggregate) as lag:
        with record_attention(sd1, words=["sks cat"]) as record:
            sample(sd1, steps=3)

    def so_far(step, block):
        """A block's map: the latest, or the mean over the steps up to now, as far as it has run in this pass."""
        seen = [record.maps[at, block][:, 0] for at in range(step + 1)]
        return seen[-1] if aggregate == "blocks" else torch.stack(seen).mean(0)

    for (step, block), mask in lag.masks.items():
        here = blocks.index(block)
        parts = [so_far(step, block)]
        if aggregate != "steps":
            parts = [so_far(step, name) for name in blocks[: here + 1]]
            parts += [so_far(step - 1, name) for name in blocks[here + 1 :] if step > 0]
        expected = make_mask(average(parts, tuple(mask.shape[-2:])))
        assert (mask != expected).float().mean() < 0.02  # values that differ in the last bit may change their order


def test_fixed_masks(sd1, tmp_path):
    residuals, left = random_residuals(sd1), torch.zeros(8, 8)
    left[:, :4] = 1
    Image.fromarray((left * 255).byte().numpy()).save(tmp_path / "left.png")
    with localized(sd1, residuals, fixed_mask=tmp_path / "left.png") as lag:
        drawn = sample(sd1, "a photo of a dog", steps=2)  # no words are needed
    for mask in lag.masks.values():
        assert mask.shape[0] == 1 and torch.equal(mask[0, :, : mask.shape[2] // 2], torch.ones_like(mask[0, :, ::2]))
        assert mask.mean() == 0.5
    assert not torch.equal(drawn, sample(sd1, "a photo of a dog", steps=2))
    each = torch.stack([left, 1 - left])  # one for each image
    with localized(sd1, residuals, fixed_mask=each) as lag:
        both = sample(sd1, ["a dog", "a cat"], steps=1, latents=torch.ones(2, 4, 8, 8))
    assert torch.equal(lag.masks[0, "down_blocks.0.attentions.0.proj_out"], each)
    for i, prompt in enumerate(["a dog", "a cat"]):
        with localized(sd1, residuals, fixed_mask=each[i]):
            alone = sample(sd1, prompt, steps=1, latents=torch.ones(1, 4, 8, 8))
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    embeds, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True)
    with localized(sd1, residuals, fixed_mask=disc((8, 8), 0.5)):
        sample(sd1, None, prompt_embeds=embeds, negative_prompt_embeds=negative, steps=1)


def test_masks_of_another_run_are_replayed(sd1):
    one, two, prompt = random_residuals(sd1), random_residuals(sd1, seed=2), "a sks cat and a wombat on the beach"
    pairs = [(one, "sks cat"), (two, "wombat")]
    with localized(sd1, pairs, mask="soft", window=(0, 0.5)) as lag:
        expected = sample(sd1, prompt, steps=3)
    with localized(sd1, pairs, fixed_mask=lag.parts, window=(0, 0.5)) as again:
        torch.testing.assert_close(sample(sd1, prompt, steps=3), expected, atol=1e-5, rtol=1e-5)
    assert again.masks.keys() == lag.masks.keys()


# Several concepts


def test_several_concepts_share_what_overlaps(sd1):
    one, two = random_residuals(sd1, seed=1), random_residuals(sd1, seed=2)
    prompt = "a sks cat and a wombat on the beach"
    with localized(sd1, [(one, "sks cat"), (two, "wombat")]) as lag:
        with record_attention(sd1, words=["sks cat", "wombat"]) as record:
            sample(sd1, prompt, steps=2)
    shared = 0.0
    for key, total in lag.masks.items():
        first, second = (part[key] for part in lag.parts)
        cat, wombat = make_mask(record.maps[key][0])
        assert total.max() <= 1
        torch.testing.assert_close(first[0], cat / (cat + wombat).clamp(min=1))
        torch.testing.assert_close(second[0], wombat / (cat + wombat).clamp(min=1))
        shared += (cat * wombat).sum().item()
    assert shared > 0  # they did overlap


def test_several_concepts_are_the_sum_of_their_parts(sd1):
    """f^ = (1 - M1 - M2) W x + M1 W1 x + M2 W2 x, in one U-Net call with drawn masks."""
    one, two = random_residuals(sd1, seed=1), random_residuals(sd1, seed=2)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    with localized(sd1, [(one, None), (two, None)], fixed_mask=[left, 1 - left]) as lag:
        disjoint = sample(sd1, steps=1)
    assert all(mask.eq(1).all() for mask in lag.masks.values())
    with localized(sd1, one, fixed_mask=left), localized(sd1, two, fixed_mask=1 - left):
        torch.testing.assert_close(sample(sd1, steps=1), disjoint, atol=1e-4, rtol=1e-4)
    with localized(sd1, [(one, None), (two, None)], fixed_mask=torch.ones(8, 8)):
        overlapping = sample(sd1, steps=1)
    with one.attached(sd1, scale=0.5), two.attached(sd1, scale=0.5):
        torch.testing.assert_close(sample(sd1, steps=1), overlapping, atol=1e-4, rtol=1e-4)


# What pipelines offer


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, HeunDiscreteScheduler])
def test_any_scheduler(sd1, scheduler):
    """Also one that evaluates the model twice a step."""
    sd1.scheduler = scheduler.from_config(sd1.scheduler.config)
    residuals = random_residuals(sd1)
    with localized(sd1, residuals, "sks cat", window=(0.5, 1.0)) as lag:
        ours = sample(sd1)
    evaluations = len(sd1.scheduler.timesteps)
    assert {step for step, _ in lag.masks} == set(range((evaluations + 1) // 2, evaluations))
    assert not torch.equal(ours, sample(sd1))


def test_rows_of_a_batch_are_what_they_are_alone(sd1):
    residuals = random_residuals(sd1)
    prompts = ["a sks cat in the grass", "a photo of the beach at night and a sks cat"]
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with localized(sd1, residuals, "sks cat") as lag:
        both = sample(sd1, prompts, num_images_per_prompt=2, latents=latents, negative_prompt=["a dog", "red"])
        assert lag.prompts == [prompts[0]] * 2 + [prompts[1]] * 2
        for row, (prompt, negative) in enumerate([(prompts[0], "a dog")] * 2 + [(prompts[1], "red")] * 2):
            alone = sample(sd1, prompt, latents=latents[row : row + 1], negative_prompt=negative)
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"aggregate": "both"}], ids=["single", "averaged"])
def test_a_callback_that_halves_the_batch(sd1, arguments):
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    cutting = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"], "steps": 4}
    residuals = random_residuals(sd1)
    with localized(sd1, residuals, "sks cat", **arguments) as lag:
        ours = sample(sd1, PROMPT, **cutting)
    assert len(lag.masks) == 4 * 7 and all(len(mask) == 1 for mask in lag.masks.values())
    if not arguments:
        with localized(sd1, residuals, fixed_mask=dict(lag.masks)):
            assert torch.equal(sample(sd1, PROMPT, **cutting), ours)


def test_sizes_that_are_not_square(sd1):
    residuals = random_residuals(sd1)
    with localized(sd1, residuals, "sks cat") as lag:
        ours = sample(sd1, height=64, width=96)
    assert lag.masks[0, "down_blocks.0.attentions.0.proj_out"].shape == (1, 8, 12)
    with torch.no_grad(), method.lag(sd1.unet, *page_one(residuals), AT):
        torch.testing.assert_close(ours, sample(sd1, height=64, width=96), atol=1e-4, rtol=1e-4)


def test_prompt_embeds(sd1):
    residuals = random_residuals(sd1)
    with localized(sd1, residuals, "sks cat"):
        expected = sample(sd1, PROMPT)
    embeds, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True)
    for encoder in (sd1.text_encoder, None):  # gone, as people do who have little memory
        sd1.text_encoder = encoder
        with localized(sd1, residuals, "sks cat", prompts=PROMPT):
            assert torch.equal(sample(sd1, None, prompt_embeds=embeds, negative_prompt_embeds=negative), expected)


def test_half_precision(sd1):
    sd1.to(torch.bfloat16)
    residuals = random_residuals(sd1)
    original = sample(sd1)
    with localized(sd1, residuals, "sks cat") as lag:
        ours = sample(sd1)
    assert ours.dtype == torch.bfloat16 and not torch.equal(ours, original)
    assert all(mask.dtype == torch.float32 and mask.mean() == 0.5 for mask in lag.masks.values())
    with localized(sd1, residuals, "sks cat", mask=torch.zeros_like):
        assert torch.equal(sample(sd1), original)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": "mean"}, "'mean'.* median"),
        ({"window": (0.5, 0.5)}, r"window \(0.5, 0.5\) is not a range of shares"),
        ({"prompts": "a photo of a dog"}, "\"a photo of a dog\" does not contain 'sks', 'cat'"),
    ],
)
def test_bad_arguments(sd1, arguments, message):
    with pytest.raises(ValueError, match=message):
        with localized(sd1, Residuals(sd1), "sks cat", **arguments):
            pass
    assert hooks_of(sd1.unet) == 0 and "encode_prompt" not in vars(sd1)


@pytest.mark.parametrize("prompt", ["a photo of a dog", ["a sks cat", "a sks dog"]])
def test_prompts_that_lack_the_words(sd1, prompt):
    with localized(sd1, Residuals(sd1), "sks cat"):
        with pytest.raises(ValueError, match='dog" does not contain .*\'cat\'.*"sks cat"'):
            sample(sd1, prompt, steps=1)
        sample(sd1, "a sks cat", steps=1)  # the context is still good
