"""The command that runs Stable Diffusion 1.4 at full size with random weights, tried at a tenth of its width."""

from __future__ import annotations

import json

import pytest
import torch

from data.make import full_size


def test_a_trial_at_reduced_width(tmp_path, capsys):
    small = ["--device=cpu", "--dtype=float32", "--width=32", "--batch=1", "--size=256", "--rounds=1"]
    full_size.main([*small, f"--out={tmp_path}"])
    found = json.loads((tmp_path / "full-size.json").read_text())
    assert found["masks"] == 2 * 16 and found["mask_sides"] == [32, 16, 8, 4], "256 pixels, half of the usual"
    assert found["finite"] and len(found["losses"]) == 2 and found["lag_over_original"] > 0
    text = (tmp_path / "full-size.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| 32; 32, 16, 8, 4 |" in text and f"{found['parameters']:,}" in text


def test_a_trial_of_xl(tmp_path):
    small = ["sdxl", "--device=cpu", "--dtype=float32", "--width=32", "--batch=1", "--size=256", "--rounds=1"]
    full_size.main([*small, f"--out={tmp_path}"])
    found = json.loads((tmp_path / "sdxl-reduced.json").read_text())
    assert found["masks"] == 2 * 11 and found["mask_sides"] == [16, 8] and found["finite"]
    assert "XL, 32 channels wide instead of 320" in (tmp_path / "sdxl-reduced.md").read_text()


def test_a_trial_is_no_result(capsys):
    with pytest.raises(SystemExit):
        full_size.main(["--width=32"])
    assert "name a folder with --out" in capsys.readouterr().err


def test_what_is_not_finite_is_said(monkeypatch):
    base = full_size.random_pipeline(32, torch.device("cpu"), torch.float32)
    rows = {"command": "x", "machine": "y", "dtype": "z", "model": "m"}
    monkeypatch.setattr(full_size, "personalize", lambda base, *_, **__: broken(base))
    found = full_size.measure(base, 1, rounds=1, height=64, width=64)
    assert not found["finite"] and "finite | no |" in full_size.report(found | rows)


def broken(base):
    from persres_lite import Residuals

    residuals = Residuals(base, init="random")
    with torch.no_grad():
        next(iter(residuals.A.values())).fill_(torch.nan)
    return residuals
