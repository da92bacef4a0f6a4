"""The command that runs Stable Diffusion 1.4 at full size with random weights, tried on tiny models of its shape."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from data.make import full_size
from persres_lite import Residuals
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize(
    ("kind", "tiny", "masks", "sides"), [("sd-1.4", "sd1", 14, "8, 4, 2"), ("sdxl", "sdxl", 14, "4, 2")]
)
def test_a_tiny_run_writes_what_it_found(kind, tiny, masks, sides, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(full_size, "random_pipeline", lambda width, device, dtype, kind: tiny_pipeline(tiny).to(dtype))
    monkeypatch.setattr(full_size, "measure", functools.partial(full_size.measure, batch=1, size=64, rounds=1))
    full_size.main([kind, "--device=cpu", f"--out={tmp_path}"])
    file = tmp_path / full_size.KINDS[kind][1]
    found = json.loads(file.with_suffix(".json").read_text())
    assert (found["masks in two steps"], found["their sides"]) == (masks, sides)
    assert found["every latent and every factor is finite"] == "yes"
    text = file.with_suffix(".md").read_text()
    assert text.strip() == capsys.readouterr().out.strip() and f"`python -m data.make.full_size {kind}`" in text


def test_what_is_not_finite_is_said(sd1, monkeypatch):
    residuals = Residuals(sd1, init="random")
    next(iter(residuals.A.values())).data.fill_(torch.nan)
    monkeypatch.setattr(full_size, "personalize", lambda *_, **__: residuals)
    assert full_size.measure(sd1, 1, 64, 1)["every latent and every factor is finite"] == "no"
