"""Page one, `method.py`, is the oracle: the package trains and samples as it does, to within rounding."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from persres_lite import method
from persres_lite.bases import encode_prompt
from persres_lite.residuals import Residuals, find_proj_outs
from persres_lite.training import personalize, training_scheduler, training_set
from tests.helpers import call_arguments, make_concept, random_residuals
from tests.tiny import KINDS, sample, tiny_pipeline

PROMPT = "a photo of a sks cat on the beach"


def factors_of(residuals: Residuals):
    """The package's A and B as method.py has them: two lists, in the order of the forward pass."""
    return tuple([p.detach().clone().requires_grad_() for p in each.values()] for each in (residuals.A, residuals.B))


def test_the_page_is_one_page_and_needs_torch_alone():
    tree = ast.parse(inspect.getsource(method))
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"math", "contextlib", "torch"}


def test_lessons_02_03_and_05_write_the_page_word_for_word():
    notebooks = Path(method.__file__).parents[1] / "notebooks"
    cells = [
        "".join(cell["source"])
        for name in ("02_residual_injection", "03_training_loop", "05_localized_sampling")
        for cell in json.loads((notebooks / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    functions = [one for one in vars(method).values() if inspect.isfunction(one) and one.__module__ == method.__name__]
    assert len(functions) == 7
    for one in functions:
        assert sum(inspect.getsource(one).strip() in cell for cell in cells) == 1, one.__name__


@pytest.mark.parametrize(("kind", "rank"), [("sd1", 0.05), ("sd2", 0.25)])
def test_it_trains_to_the_same_losses_and_factors(kind, rank):
    base, concept = tiny_pipeline(kind), make_concept()
    torch.manual_seed(0)
    width = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    base.vae = AutoencoderTiny(**width, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)  # nothing is drawn
    ours = personalize(base, concept, steps=3, batch_size=2, lr=1e-3, rank=rank, seed=7, progress=False)

    A, B = factors_of(Residuals(base, rank=rank, seed=7))
    latents = training_set(base, concept).mean
    text = encode_prompt(base, concept.training_prompt, 64)["encoder_hidden_states"]
    scheduler, recipe = training_scheduler(base), {"steps": 3, "batch": 2, "lr": 1e-3, "seed": 7}
    losses = method.train(base.unet, scheduler, A, B, latents, text, **recipe)

    assert losses == pytest.approx(ours.losses, rel=1e-5)
    # Adam divides by a gradient's own size: where that is rounding alone, so is a step of 1e-3. Hence a mean.
    for one, other in zip((*ours.A.values(), *ours.B.values()), (*A, *B), strict=True):
        assert one.any() and (one - other).abs().mean() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_found_in_the_same_order(kind):
    unet = tiny_pipeline(kind).unet
    assert [block.proj_out for block in method.blocks_of(unet)] == list(find_proj_outs(unet).values())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_residual_everywhere_is_the_same_through_a_whole_run(kind):
    base = tiny_pipeline(kind)
    residuals = random_residuals(base)
    with residuals.attached(base):
        ours = sample(base, PROMPT)
    with method.attached(base.unet, *factors_of(residuals)):
        torch.testing.assert_close(ours, sample(base, PROMPT), atol=1e-5, rtol=1e-5)
    assert (ours - sample(base, PROMPT)).abs().max() > 0.1  # it does matter


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradients_are_the_same(kind):
    unet = tiny_pipeline(kind).unet
    residuals = random_residuals(unet)
    A, B = factors_of(residuals)
    for context in (residuals.attached(unet), method.attached(unet, A, B)):
        with context:
            unet(**call_arguments(kind)).sample.square().mean().backward()
    for one, other in zip((*residuals.A.values(), *residuals.B.values()), (*A, *B), strict=True):
        scale = other.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4 * scale, rtol=1e-4)
    assert all(parameter.grad is None for parameter in unet.parameters())
