"""Where words stand in a prompt, and to which prompt a U-Net call belongs."""

from __future__ import annotations

import pytest
import torch

from persres_lite.prompts import Call, find_words, token_positions, watch_prompts, words_of
from tests.helpers import hooks_of
from tests.tiny import sample, tiny_tokenizer

PROMPT = "a photo of a sks cat on the beach"
#        0 1 2     3  4 5   6   7  8   9

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("prompt", "words", "expected"),
    [
        (PROMPT, "cat", [6]),
        (PROMPT, ["sks", "cat"], [5, 6]),
        (PROMPT, "sks cat", [5, 6]),
        ("A Photo of a SKS cat.", "sks cat", [5, 6]),
        ("a wombat", "wombat", [2, 3, 4, 5]),  # wo-m-b-at
        ("a sks wombat on grass", ["sks wombat"], [2, 3, 4, 5, 6]),
        ("a cat and a sks cat", "sks cat", [5, 6]),  # the phrase, not the other cat
        ("a cat and a sks cat", ["sks", "cat"], [2, 5, 6]),
        ("a sks, the cat", "sks cat", [2, 5]),
        ("a cat's mug", "cat", [2]),
        ("a wombat and an at", "at", [8]),  # not the last piece of wombat
    ],
)
def test_token_positions(prompt, words, expected):
    assert token_positions(TOKENIZER, prompt, words) == expected


@pytest.mark.parametrize(
    ("prompt", "words", "message"),
    [
        ("a photo of a dog", "sks cat", "\"a photo of a dog\" does not contain 'sks', 'cat': .*\"sks cat\""),
        ("a photo of a cat", "sks cat", "does not contain 'sks': it needs the words \"sks cat\""),
        ("a photo of cats", "cat", "does not contain 'cat'"),
        ("a wombat", "bat", "does not contain 'bat'"),
        ("a photo " * 40 + "of a sks cat", "sks cat", 'has 86 tokens and is cut off at 77, before the end of "sks'),
    ],
)
def test_words_that_are_not_there(prompt, words, message):
    with pytest.raises(ValueError, match=message):
        token_positions(TOKENIZER, prompt, words)


def test_embeddings_of_several_vectors_are_spelled_out(sd1):
    """Textual inversion names its vectors <cat>, <cat>_1; the pipeline writes both into the prompt."""
    sd1.tokenizer.add_tokens(["<cat>", "<cat>_1"])
    assert find_words(sd1, ["a photo of <cat> on the beach", "a <cat>"], "<cat>") == [[4, 5], [2, 3]]


def test_words_of_a_prompt():
    assert words_of('a cat, a "sks" (cat) on the beach.') == ["a", "cat", "sks", "on", "the", "beach"]


# Which prompt stands behind a U-Net call


def test_rows_are_known_by_their_text_in_whatever_order(sd1):
    positive, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True)
    call = Call(sd1, [PROMPT], positive)
    one, two = slice(0, 1), slice(1, 2)
    for text, rows, others in [
        (torch.cat([negative, positive]), two, one),
        (torch.cat([positive, negative]), one, two),
        (positive, one, None),
        (torch.cat([positive, positive]), two, one),  # the negative prompt is the prompt itself
        (positive.bfloat16().float(), one, None),
    ]:
        call.next(text)
        assert (call.rows, call.others) == (rows, others)
    assert call.step == 4
    other = sd1.encode_prompt("a photo of a sks dog on the beach", "cpu", 1, False)[0]  # one word differs
    for text in (other, negative, positive.expand(3, -1, -1)):
        with pytest.raises(ValueError, match="text that are not .*sks cat.* open the context with the prompts"):
            call.next(text)


def test_each_pipeline_call_is_told_of_once_and_counted_from_its_first_step(sd1):
    calls = []
    with watch_prompts(sd1, calls.append):
        sample(sd1, ["a cat", "a dog"], steps=3, num_images_per_prompt=2)
        sample(sd1, "a cat", steps=2, guidance_scale=1.0)
    assert [call.prompts for call in calls] == [["a cat", "a cat", "a dog", "a dog"], ["a cat"]]
    assert [call.step for call in calls] == [2, 1]
    assert (calls[0].others, calls[0].rows, calls[1].others) == (slice(0, 4), slice(4, 8), None)
    assert hooks_of(sd1.unet) == 0 and "encode_prompt" not in vars(sd1)


def test_embeddings_are_taken_for_those_of_the_prompts_only_if_they_are(sd1):
    """A text with weights stretches its tokens; one with brackets and numbers in it has them at other places."""
    embeds, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True)
    weights = torch.ones(1, 77, 1)
    weights[0, 6] = 1.3
    calls = []
    with watch_prompts(sd1, calls.append, PROMPT):
        sample(sd1, None, prompt_embeds=embeds * weights, negative_prompt_embeds=negative, steps=1)
        sample(sd1, None, prompt_embeds=embeds, negative_prompt_embeds=negative, num_images_per_prompt=2, steps=1)
        assert [len(call.columns(["cat"])) for call in calls] == [1, 1, 2]  # at once, and at each pipeline call
        for other in ("a photo of a (sks cat:1.3) on the beach", "a sks cat"):
            embeds, negative = sd1.encode_prompt(other, "cpu", 1, True)
            with pytest.raises(ValueError, match="the prompts whose embeddings you pass"):
                sample(sd1, None, prompt_embeds=embeds, negative_prompt_embeds=negative, steps=1)
    with watch_prompts(sd1, calls.append), pytest.raises(ValueError, match="hide the words: pass `prompts=` too"):
        sample(sd1, None, prompt_embeds=embeds, negative_prompt_embeds=negative, steps=1)


def test_contexts_inside_contexts_each_hear_of_the_call(sd1):
    first, second = [], []
    with watch_prompts(sd1, first.append):
        with watch_prompts(sd1, second.append):
            sample(sd1, "a cat", steps=1)
        sample(sd1, "a dog", steps=1)
    assert [call.prompts for call in first] == [["a cat"], ["a dog"]]
    assert [call.prompts for call in second] == [["a cat"]]
    assert hooks_of(sd1.unet) == 0 and "encode_prompt" not in vars(sd1)


def test_calls_that_nobody_announced(sd1):
    embeds = sd1.encode_prompt(PROMPT, "cpu", 1, False)[0]
    with watch_prompts(sd1, lambda call: None), pytest.raises(ValueError, match="No prompt is known yet"):
        sd1.unet(torch.zeros(1, 4, 8, 8), 10, embeds)
    with watch_prompts(sd1, lambda call: None, needed=False):  # as for masks that are drawn by hand
        sd1.unet(torch.zeros(1, 4, 8, 8), 10, embeds)
