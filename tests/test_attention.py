"""Maps from the fused kernel against an explicit softmax, and everything that must go on working around them."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from persres_lite.attention import attend, record_attention, watch_attention
from persres_lite.masks import refine
from persres_lite.prompts import token_positions
from persres_lite.residuals import find_proj_outs
from tests.helpers import hooks_of, install_foreign
from tests.reference import all_probabilities, explicit_probabilities
from tests.tiny import sample, tiny_pipeline, tiny_tokenizer

PROMPT = "a photo of a sks cat on the beach"
#        0 1 2     3  4 5   6   7  8   9

TOKENIZER = tiny_tokenizer()


# Maps


def explicit_maps(pipeline, words, prompt=PROMPT, **arguments):
    """{(step, block): (rows, words, HW)} from all probabilities, averaged over the layers under each block."""
    at = [token_positions(TOKENIZER, prompt, word) for word in words]
    with all_probabilities(pipeline.unet) as seen:
        sample(pipeline, prompt, **arguments)
    blocks = list(find_proj_outs(pipeline.unet))
    maps, step, last = {}, 0, -1
    for name, probabilities in seen:
        if blocks.index(name) < last:
            step += 1
        last = blocks.index(name)
        columns = torch.stack([probabilities[:, :, places].sum(-1) for places in at], 1)
        maps.setdefault((step, name), []).append(columns)
    return {key: torch.stack(layers).mean(0) for key, layers in maps.items()}


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "wide"])
def test_maps_equal_an_explicit_softmax(pipeline, size):
    prompt, words = "a photo of a sks wombat on the beach", ["sks wombat", "wombat", "beach"]
    height, width = size
    arguments = {"steps": 2, "height": height, "width": width, "num_images_per_prompt": 2}
    with record_attention(pipeline, prompt, words, halves=("cond", "uncond")) as record:
        sample(pipeline, prompt, **arguments)
    expected = explicit_maps(pipeline, words, prompt, **arguments)
    assert {key[:2] for key in record.maps} == expected.keys()
    assert len(record.maps) == 2 * 2 * len(find_proj_outs(pipeline.unet))
    for (step, block), both in expected.items():
        halves = {"uncond": both[:2], "cond": both[2:]}
        for half, explicit in halves.items():
            ours = record.maps[step, block, half]  # (images, words, h, w)
            assert ours.shape[-1] / ours.shape[-2] == width / height
            torch.testing.assert_close(ours.flatten(2), explicit, atol=1e-5, rtol=0)
    assert len({tuple(value.shape[-2:]) for value in record.maps.values()}) >= 2  # several resolutions


def test_more_words_than_a_head_is_wide(sd1):
    """The fused kernel takes as many columns as a head has channels (8 here); more words need several calls."""
    words = PROMPT.split()
    asked = [*dict.fromkeys(words), "sks cat", "the beach"]
    assert len(asked) > 8
    with record_attention(sd1, PROMPT, asked) as record:
        sample(sd1, steps=1)
    expected = explicit_maps(sd1, asked, steps=1)
    for (step, block), both in expected.items():
        torch.testing.assert_close(record.maps[step, block, "cond"].flatten(2), both[1:], atol=1e-5, rtol=0)


def test_maps_of_all_tokens_sum_to_one(sd1):
    unet = sd1.unet
    sums = []

    def rows(batch):
        return slice(0, batch)

    def columns(keys):
        return torch.ones(len(keys), keys.shape[1], 1)

    with watch_attention(unet, rows, columns, lambda name, maps: sums.append(maps)):
        sample(sd1, steps=1)
    assert len(sums) == 16
    for each in sums:
        torch.testing.assert_close(each, torch.ones_like(each))


def test_the_picture_is_the_same_bit_for_bit(pipeline):
    original = sample(pipeline)
    with record_attention(pipeline, refine=1) as record:
        assert torch.equal(sample(pipeline), original)
    assert record.words == ["a", "photo", "of", "sks", "cat", "on", "the", "beach"]
    assert hooks_of(pipeline.unet) == 0


def test_no_positions_by_tokens_tensor_is_made(sd1):
    """Memory: between the kernel's input and the map there is nothing of the size HW x 77."""
    attn = sd1.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    q, k, columns = torch.randn(1, 4096, 32), torch.randn(1, 77, 32), torch.zeros(1, 77, 2)

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple) else (result,):
                if isinstance(each, torch.Tensor):
                    largest.append(each.numel())
            return result

    largest: list[int] = []
    with Shapes(), torch.no_grad():
        explicit_probabilities(attn, q, k)
    assert max(largest) >= 4 * 4096 * 77  # the explicit way does make one, so this test can fail
    largest.clear()
    with Shapes(), torch.no_grad():
        attend(attn, q, k, columns)
    assert max(largest) <= q.numel()


def test_only_what_was_asked_for_is_kept_and_nothing_else_stays_alive(sd1):
    block = "mid_block.attentions.0.proj_out"
    with record_attention(sd1, words=["cat"], steps=[1], blocks=[block]) as record:
        sample(sd1, steps=3)
    assert list(record.maps) == [(1, block, "cond")]
    assert record.maps[1, block, "cond"].shape == (1, 1, 2, 2)

    queries = []
    to_q = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    handle = to_q.register_forward_hook(lambda module, args, output: queries.append(weakref.ref(output)))
    with record_attention(sd1, words=["cat"]):
        sample(sd1, steps=2)
        gc.collect()
        assert len(queries) == 2 and all(query() is None for query in queries)
    handle.remove()


def test_batches_of_different_prompts(sd1):
    """Each prompt's word has its own position, and each row its own map."""
    prompts = ["a sks cat on the beach", "a photo of the beach at night and a sks cat"]
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with record_attention(sd1, words=["sks cat"]) as both:
        sample(sd1, prompts, num_images_per_prompt=2, steps=1, latents=latents)
    assert both.prompts == [prompts[0]] * 2 + [prompts[1]] * 2
    for row, prompt in enumerate(both.prompts):
        with record_attention(sd1, words=["sks cat"]) as alone:
            sample(sd1, prompt, steps=1, latents=latents[row : row + 1])
        torch.testing.assert_close(both.map("sks cat", image=row), alone.map("sks cat"), atol=1e-5, rtol=1e-4)


def test_all_words_of_several_prompts(sd1):
    with record_attention(sd1) as record:
        sample(sd1, ["a cat", "a dog"], steps=1)
    assert record.words == ["a", "cat", "dog"]
    assert record.map("dog", image=1).min() > 0 and not record.map("dog", image=0).any()


def test_guidance_off_and_cut_off(sd1):
    with record_attention(sd1, words=["cat"], halves=("cond", "uncond")) as record:
        sample(sd1, steps=2, guidance_scale=1.0)
    assert {half for _, _, half in record.maps} == {"cond"}
    from diffusers.callbacks import SDCFGCutoffCallback

    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    arguments = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with record_attention(sd1, words=["cat"], halves=("cond", "uncond")) as record:
        sample(sd1, steps=3, **arguments)
    assert {(step, half) for step, _, half in record.maps} == {(0, "cond"), (0, "uncond"), (1, "cond"), (2, "cond")}


def test_refined_by_self_attention_equals_the_explicit_matrix(sd1):
    seen = {}

    def keep(module, args, kwargs, output):
        probabilities, _ = explicit_probabilities(module, args[0], args[0])
        seen["P"] = probabilities.mean(1)

    attn1 = sd1.unet.down_blocks[0].attentions[1].transformer_blocks[0].attn1
    name = "down_blocks.0.attentions.1.proj_out"
    handle = attn1.register_forward_hook(keep, with_kwargs=True)
    with record_attention(sd1, words=["cat"]) as plain, record_attention(sd1, words=["cat"], refine=2) as refined:
        sample(sd1, steps=1)
    handle.remove()
    expected = refine(plain.maps[0, name, "cond"][:, 0], seen["P"][1:], times=2)
    torch.testing.assert_close(refined.maps[0, name, "cond"][:, 0], expected, atol=1e-5, rtol=0)


def test_unets_called_directly(sd1):
    embeds, _ = sd1.encode_prompt(PROMPT, "cpu", 1, False)
    with record_attention(sd1, PROMPT, ["cat"]) as record:
        sd1.unet(torch.zeros(1, 4, 16, 16), 10, embeds)
        sd1.unet(torch.zeros(1, 4, 16, 16), 10, embeds)
    assert record.steps == [0, 1]
    assert torch.equal(record.map("cat", 0), record.map("cat", 1))


def test_prompt_embeds(sd1):
    embeds, negative = sd1.encode_prompt([PROMPT, "a dog"], "cpu", 1, True)
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_images_per_prompt": 2, "steps": 1}
    with record_attention(sd1, [PROMPT, "a dog"]) as record:
        sample(sd1, None, **arguments)
    with record_attention(sd1) as same:
        sample(sd1, [PROMPT, "a dog"], num_images_per_prompt=2, steps=1)
    assert record.maps.keys() == same.maps.keys()
    assert all(torch.equal(record.maps[key], same.maps[key]) for key in same.maps)
    with record_attention(sd1) as record, pytest.raises(ValueError, match="`prompt_embeds`, which hide the words"):
        sample(sd1, None, **arguments)


# Whatever else was done to the attention layers


@pytest.mark.parametrize("change", ["sliced", "fused projections", "foreign"])
def test_other_processors_go_on_working_and_are_left_in_place(sd1, change):
    if change == "sliced":
        sd1.enable_attention_slicing(1)
    elif change == "fused projections":
        sd1.fuse_qkv_projections()
    else:
        torch.manual_seed(0)
        install_foreign(sd1.unet)
    before = dict(sd1.unet.attn_processors)
    original = sample(sd1, steps=2)
    with record_attention(sd1, words=["sks cat"], refine=1) as refined:
        assert torch.equal(sample(sd1, steps=2), original)
        assert sd1.unet.attn_processors == before
    assert sd1.unet.attn_processors == before
    assert refined.map("sks cat").min() > 0
    if change != "foreign":  # the same maps as without it
        plain = tiny_pipeline("sd1")
        with record_attention(plain, words=["sks cat"], refine=1) as expected:
            sample(plain, steps=2)
        torch.testing.assert_close(refined.map("sks cat"), expected.map("sks cat"), atol=1e-5, rtol=1e-4)


def test_ip_adapter_of_diffusers(sd1):
    """Its processors get a tuple of text and picture tokens; the map is that of the text."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(0)
    unet = sd1.unet
    with record_attention(sd1, PROMPT, ["cat"]) as expected:
        embeds, _ = sd1.encode_prompt(PROMPT, "cpu", 1, False)
        unet(torch.ones(1, 4, 16, 16), 10, embeds)
    processors = {}
    for key, processor in unet.attn_processors.items():
        if ".attn2." in key:
            width = unet.get_submodule(key.removesuffix(".processor")).inner_dim
            processor = IPAdapterAttnProcessor2_0(width, 32, num_tokens=(4,), scale=0.0)
        processors[key] = processor
    unet.set_attn_processor(processors)
    text_and_pictures = (embeds, [torch.randn(1, 1, 4, 32)])
    with record_attention(sd1, PROMPT, ["cat"]) as record:
        unet(torch.ones(1, 4, 16, 16), 10, text_and_pictures)
    torch.testing.assert_close(record.map("cat"), expected.map("cat"))


def test_processors_with_keys_of_their_own_are_refused(sd1):
    class Own:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            return hidden_states

    sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Own())
    message = "An attention layer before 'mid_block.attentions.0.proj_out' did not call .* its processor Own brings"
    with record_attention(sd1, words=["cat"]), pytest.raises(RuntimeError, match=message):
        sample(sd1, steps=1)


def test_text_that_is_masked_out_gets_no_attention(sd1):
    embeds, _ = sd1.encode_prompt(PROMPT, "cpu", 1, False)
    seen = torch.ones(1, 77)
    seen[0, 6] = 0  # the cat
    with record_attention(sd1, PROMPT, ["cat", "sks"]) as record:
        sd1.unet(torch.zeros(1, 4, 16, 16), 10, embeds, encoder_attention_mask=seen)
    assert not record.map("cat").any() and record.map("sks").min() > 0


def test_leaving_restores_everything_also_through_an_exception(sd1):
    encode = sd1.encode_prompt
    with pytest.raises(RuntimeError, match="in between"):
        with record_attention(sd1), record_attention(sd1, words=["cat"]):
            assert sd1.encode_prompt != encode
            raise RuntimeError("in between")
    assert sd1.encode_prompt == encode and "encode_prompt" not in vars(sd1)
    assert hooks_of(sd1.unet) == 0


# The record


@pytest.fixture(scope="module")
def recorded():
    pipeline = tiny_pipeline("sd1")
    with record_attention(pipeline) as record:
        sample(pipeline, steps=3)
    return record


def test_averages(recorded):
    block = recorded.blocks[0]
    assert recorded.steps == [0, 1, 2] and len(recorded.blocks) == 16
    at = recorded.words.index("cat")
    assert torch.equal(recorded.map("cat", 1, block), recorded.maps[1, block, "cond"][0, at])
    assert torch.equal(recorded.map("cat", -1, block), recorded.map("cat", 2, block))
    early = (recorded.map("cat", 0, block) + recorded.map("cat", 1, block)) / 2
    torch.testing.assert_close(recorded.map("cat", slice(0, 2), block), early)
    torch.testing.assert_close(
        recorded.map(["sks", "cat"], 0, block), recorded.map("sks", 0, block) + recorded.map("cat", 0, block)
    )
    assert recorded.map("cat").shape == (16, 16)  # the finest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"word": "dog"}, "No map of 'dog' was recorded: the words are 'a', 'photo'"),
        ({"word": "cat", "step": 7}, r"Nothing was recorded at step 7, .*: there are steps \[0, 1, 2\] and"),
        ({"word": "cat", "block": "nowhere"}, "block 'nowhere'"),
        ({"word": "cat", "half": "uncond"}, "half 'uncond'"),
        ({"word": "cat", "image": 1}, "There is no image 1: the batch had 1"),
    ],
)
def test_what_was_not_recorded(recorded, arguments, message):
    with pytest.raises(ValueError, match=message):
        recorded.map(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": ["nowhere"]}, "Unknown block 'nowhere': the U-Net has down_blocks.0.attentions.0.proj_out"),
        ({"halves": ("both",)}, "Unknown half 'both': choose 'cond' or 'uncond'"),
        ({"prompt": "a dog", "words": ["cat"]}, 'The prompt "a dog" does not contain \'cat\''),
    ],
)
def test_bad_arguments(sd1, arguments, message):
    with pytest.raises(ValueError, match=message):
        with record_attention(sd1, **arguments):
            pass
    assert hooks_of(sd1.unet) == 0 and "encode_prompt" not in vars(sd1)


def test_the_pipeline_called_for_another_prompt(sd1):
    with record_attention(sd1, PROMPT), pytest.raises(ValueError, match=re.escape("was opened for ['a photo of a sks")):
        sample(sd1, "a dog")
    with record_attention(sd1), pytest.raises(ValueError, match="No prompt is known yet"):
        sd1.unet(torch.zeros(1, 4, 16, 16), 10, torch.zeros(1, 77, 32))
    with record_attention(sd1, PROMPT), pytest.raises(ValueError, match="called with 3 rows for 1 images"):
        sd1.unet(torch.zeros(3, 4, 16, 16), 10, torch.zeros(3, 77, 32))
    with pytest.raises(ValueError, match="UNet2DConditionModel has no `encode_prompt`"):
        with record_attention(sd1.unet, words=["cat"]):
            pass
