"""What a run needs is said before it starts, from a table."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from persres_lite import cost
from persres_lite.course import start as notebook

T4 = 14.5
"""GiB that a T4 has free before anything is loaded."""


@pytest.fixture
def t4(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(T4 * cost.GIB), int(T4 * cost.GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)


def test_the_number_of_parameters_is_the_librarys():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    text = 123_060_480
    assert sum(p.numel() for model in (unet, vae) for p in model.parameters()) + text == cost.NEEDS["sd-1.4"].parameters


@pytest.mark.parametrize("base", cost.NEEDS)
def test_a_row_of_the_table_can_be_true(base):
    """The weights are there in any case, a whole step needs more than a part of one, and a T4 trains all of them."""
    need = cost.NEEDS[base]
    assert 2 * need.parameters / cost.GIB < min(need.sample, need.least) and need.least < need.train
    assert max(need.sample, need.least) < T4


def test_it_is_said_before_a_run(t4, monkeypatch, capsys):
    monkeypatch.setattr(notebook, "describe", lambda base: base)
    notebook.start("sdxl")
    said = capsys.readouterr().out
    assert "in smaller pieces" in said and "14.5 GiB are free" in said and "may not fit" not in said
    assert "as it is" in cost.on_gpu("sd-1.4")
    assert cost.on_gpu("toybox") is None and cost.on_gpu("some/one") is None, "nothing is known of it"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * cost.GIB, 0))
    assert "may not fit: close what else uses the GPU" in cost.on_gpu("sdxl")


def test_the_room_on_a_gpu(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * cost.GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: cost.GIB)
    assert cost.room() == pytest.approx(T4 + 1), "what torch holds unused is free for it"
