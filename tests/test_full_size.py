"""The command that runs Stable Diffusion 1.4 at full size with random weights, tried at a tenth of its width."""

from __future__ import annotations

import json

import pytest
import torch

from data.make import full_size
from persres_lite import Residuals


@pytest.mark.parametrize(
    ("kind", "masks", "sides"),
    [("sd-1.4", 32, "32, 16, 8, 4"), pytest.param("sdxl", 22, "16, 8", marks=pytest.mark.slow)],
)
def test_a_trial_at_reduced_width(kind, masks, sides, tmp_path, capsys):
    full_size.main([kind, "--device=cpu", "--width=32", f"--out={tmp_path}"])
    file = tmp_path / full_size.KINDS[kind][1]
    found = json.loads(file.with_suffix(".json").read_text())
    assert (found["masks in two steps"], found["their sides"]) == (masks, sides)  # two steps; of 256 pixels
    assert found["every latent and every factor is finite"] == "yes"
    text = file.with_suffix(".md").read_text()
    assert text.strip() == capsys.readouterr().out.strip() and "32 channels wide instead of 320" in text


def test_a_trial_is_no_result(capsys):
    with pytest.raises(SystemExit):
        full_size.main(["--width=32"])
    assert "--out" in capsys.readouterr().err


def test_what_is_not_finite_is_said(sd1, monkeypatch):
    residuals = Residuals(sd1, init="random")
    next(iter(residuals.A.values())).data.fill_(torch.nan)
    monkeypatch.setattr(full_size, "personalize", lambda *_, **__: residuals)
    assert full_size.measure(sd1, 1, 64, 1)["every latent and every factor is finite"] == "no"
