"""The command that runs Stable Diffusion 1.4 at full size with random weights, tried at a tenth of its width."""

from __future__ import annotations

import json

import pytest
import torch

from data.make import bench_runs, full_size
from persres_lite import Residuals

SMALL = ["--device=cpu", "--dtype=float32", "--width=32", "--batch=1", "--size=256", "--rounds=1"]


@pytest.mark.parametrize(
    ("kind", "layers", "sides"), [("sd-1.4", 16, [32, 16, 8, 4]), ("sdxl", 11, [16, 8])]
)  # of 256 pixels
def test_a_trial_at_reduced_width(kind, layers, sides, tmp_path, capsys):
    full_size.main([kind, *SMALL, f"--out={tmp_path}"])
    found = json.loads((tmp_path / f"{full_size.FILES[kind]}.json").read_text())
    assert found["masks"] == 2 * layers and found["mask_sides"] == sides
    assert found["finite"] and len(found["losses"]) == 2 and found["lag_over_original"] > 0
    text = (tmp_path / f"{full_size.FILES[kind]}.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip() and "32 channels wide instead of 320" in text
    assert f"| {2 * layers}; {', '.join(map(str, sides))} |" in text and f"{found['parameters']:,}" in text


def test_a_trial_is_no_result(capsys):
    with pytest.raises(SystemExit):
        full_size.main(["--width=32"])
    assert "--out" in capsys.readouterr().err


def test_what_is_not_finite_is_said(monkeypatch):
    base = bench_runs.random_pipeline(32, torch.device("cpu"), torch.float32)
    residuals = Residuals(base, init="random")
    next(iter(residuals.A.values())).data.fill_(torch.nan)
    monkeypatch.setattr(full_size, "personalize", lambda *_, **__: residuals)
    found = full_size.measure(base, 1, rounds=1, height=64, width=64)
    rows = {"command": "x", "machine": "y", "dtype": "z", "model": "m"}
    assert not found["finite"] and "finite | no |" in full_size.report(found | rows)
