"""Maps from the fused kernel against an explicit softmax, and everything that must go on working around them."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from persres_lite import method
from persres_lite.attention import attend, record_attention
from persres_lite.prompts import token_positions
from persres_lite.residuals import find_proj_outs
from tests.helpers import hooks_of
from tests.tiny import sample, tiny_pipeline, tiny_tokenizer

PROMPT = "a photo of a sks cat on the beach"
#        0 1 2     3  4 5   6   7  8   9

TOKENIZER = tiny_tokenizer()


# Maps


def explicit_maps(pipeline, words, prompt=PROMPT, **arguments):
    """{(step, block): (rows, HW, words)} by the softmax of page one, averaged over the layers under each block."""
    at = [token_positions(TOKENIZER, prompt, word) for word in words]
    seen, handles = {name: [] for name in find_proj_outs(pipeline.unet)}, []

    def keep(attn, inputs, keywords, output, *, name):
        A = method.attention(attn, inputs[0], keywords["encoder_hidden_states"])
        seen[name].append(torch.stack([A[..., places].sum(-1) for places in at], -1))

    for name in seen:
        for layer in pipeline.unet.get_submodule(name.removesuffix(".proj_out")).transformer_blocks:
            handles.append(layer.attn2.register_forward_hook(partial(keep, name=name), with_kwargs=True))
    sample(pipeline, prompt, **arguments)
    for handle in handles:
        handle.remove()
    steps = arguments["steps"]
    return {
        (step, name): torch.stack(part).mean(0)
        for name, maps in seen.items()
        for step, part in enumerate(zip(*[iter(maps)] * (len(maps) // steps), strict=True))
    }


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "wide"])
def test_maps_equal_an_explicit_softmax(pipeline, size):
    prompt, words = "a photo of a sks wombat on the beach", ["sks wombat", "wombat", "beach"]
    height, width = size
    arguments = {"steps": 2, "height": height, "width": width, "num_images_per_prompt": 2}
    with record_attention(pipeline, prompt, words) as record:
        sample(pipeline, prompt, **arguments)
    expected = explicit_maps(pipeline, words, prompt, **arguments)
    assert record.maps.keys() == expected.keys() and len(expected) == 2 * len(find_proj_outs(pipeline.unet))
    for key, explicit in expected.items():
        ours = record.maps[key]  # (images, words, h, w)
        assert ours.shape[-1] / ours.shape[-2] == width / height
        torch.testing.assert_close(ours.flatten(2).mT, explicit[2:], atol=1e-5, rtol=0)
    assert len({tuple(value.shape[-2:]) for value in record.maps.values()}) >= 2  # several resolutions


def test_more_words_than_a_head_is_wide(sd1):
    """The fused kernel takes as many columns as a head has channels (8 here); more words need several calls."""
    asked = [*dict.fromkeys(PROMPT.split()), "sks cat", "the beach"]
    assert len(asked) > 8
    with record_attention(sd1, PROMPT, asked) as record:
        sample(sd1, steps=1)
    for key, explicit in explicit_maps(sd1, asked, steps=1).items():
        torch.testing.assert_close(record.maps[key].flatten(2).mT, explicit[1:], atol=1e-5, rtol=0)


def test_the_picture_is_the_same_bit_for_bit(pipeline):
    original = sample(pipeline)
    with record_attention(pipeline) as record:
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
        method.attention(attn, q, k)
    assert max(largest) >= 4 * 4096 * 77  # the explicit way does make one, so this test can fail
    largest.clear()
    with Shapes(), torch.no_grad():
        attend(attn, q, k, columns)
    assert max(largest) <= q.numel()


def test_only_what_was_asked_for_is_kept_and_nothing_else_stays_alive(sd1):
    queries = []
    to_q = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    handle = to_q.register_forward_hook(lambda module, args, output: queries.append(weakref.ref(output)))
    with record_attention(sd1, words=["cat"], steps=[1]) as record:
        sample(sd1, steps=3)
        gc.collect()
        assert len(queries) == 3 and all(query() is None for query in queries)
    handle.remove()
    assert record.steps == [1] and len(record.blocks) == 7
    assert record.maps[1, "mid_block.attentions.0.proj_out"].shape == (1, 1, 2, 2)


def test_batches_of_different_prompts(sd1):
    """Each prompt's word has its own position, and each row its own map; a word that a prompt lacks has none."""
    prompts = ["a sks cat on the beach", "a photo of the beach at night and a sks cat"]
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with record_attention(sd1) as both:
        sample(sd1, prompts, num_images_per_prompt=2, steps=1, latents=latents)
    assert both.prompts == [prompts[0]] * 2 + [prompts[1]] * 2
    for row, prompt in enumerate(both.prompts):
        with record_attention(sd1, words=["cat"]) as alone:
            sample(sd1, prompt, steps=1, latents=latents[row : row + 1])
        torch.testing.assert_close(both.map("cat", image=row), alone.map("cat"), atol=1e-5, rtol=1e-4)
    assert both.map("night", image=2).min() > 0 and not both.map("night", image=0).any()


# Whatever else was done to the attention layers


@pytest.mark.parametrize("change", ["sliced", "fused projections"])
def test_other_processors_go_on_working_and_are_left_in_place(sd1, change):
    if change == "sliced":
        sd1.enable_attention_slicing(1)
    else:
        sd1.fuse_qkv_projections()
    before = dict(sd1.unet.attn_processors)
    original = sample(sd1, steps=1)
    with record_attention(sd1, words=["sks cat"]) as record:
        assert torch.equal(sample(sd1, steps=1), original)
        assert sd1.unet.attn_processors == before
    assert sd1.unet.attn_processors == before
    plain = tiny_pipeline("sd1")
    with record_attention(plain, words=["sks cat"]) as expected:
        sample(plain, steps=1)
    torch.testing.assert_close(record.map("sks cat"), expected.map("sks cat"), atol=1e-5, rtol=1e-4)


def test_ip_adapter_of_diffusers(sd1):
    """Its processors get a tuple of text and picture tokens; the map is that of the text."""
    torch.manual_seed(0)
    unet = sd1.unet
    embeds, _ = sd1.encode_prompt(PROMPT, "cpu", 1, False)
    with record_attention(sd1, PROMPT, ["cat"]) as expected:
        unet(torch.ones(1, 4, 8, 8), 10, embeds)
    for key in unet.attn_processors:
        if ".attn2." in key:
            attn = unet.get_submodule(key.removesuffix(".processor"))
            attn.set_processor(IPAdapterAttnProcessor2_0(attn.inner_dim, 32, num_tokens=(4,), scale=0.0))
    with record_attention(sd1, PROMPT, ["cat"]) as record:
        unet(torch.ones(1, 4, 8, 8), 10, (embeds, [torch.randn(1, 1, 4, 32)]))
    torch.testing.assert_close(record.map("cat"), expected.map("cat"))


# The record


@pytest.fixture(scope="module")
def recorded():
    pipeline = tiny_pipeline("sd1")
    with record_attention(pipeline) as record:
        sample(pipeline, steps=3)
    return record


def test_averages(recorded):
    block = recorded.blocks[0]
    assert recorded.steps == [0, 1, 2] and len(recorded.blocks) == 7
    at = recorded.words.index("cat")
    assert torch.equal(recorded.map("cat", 1, block), recorded.maps[1, block][0, at])
    assert torch.equal(recorded.map("cat", -1, block), recorded.map("cat", 2, block))
    early = (recorded.map("cat", 0, block) + recorded.map("cat", 1, block)) / 2
    torch.testing.assert_close(recorded.map("cat", slice(0, 2), block), early)
    both = recorded.map("sks", 0, block) + recorded.map("cat", 0, block)
    torch.testing.assert_close(recorded.map(["sks", "cat"], 0, block), both)
    assert recorded.map("cat").shape == (8, 8)  # the finest


@pytest.mark.parametrize("asked", [("dog",), ("cat", 7), ("cat", -4), ("cat", None, "nowhere")])
def test_what_was_not_recorded(recorded, asked):
    with pytest.raises(ValueError, match=r"No map of (dog|cat) was .*photo.*steps \[0, 1, 2\] and blocks down_blocks"):
        recorded.map(*asked)
