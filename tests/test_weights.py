"""Which weights are loaded from the hub or its cache, and what is said before a download."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from persres_lite.support import weights
from tests.tiny import tiny_pipeline

PARTS = ["unet", "vae", "text_encoder"]
FULL = {"unet/diffusion_pytorch_model.safetensors": 34, "vae/diffusion_pytorch_model.safetensors": 4}
FULL |= {"text_encoder/model.safetensors": 6}
HALF = {name.replace(".safetensors", ".fp16.safetensors"): size // 2 for name, size in FULL.items()}
OTHER = {
    "v1-4.safetensors": 999,  # at the top: another tool's
    "unet/diffusion_pytorch_model.bin": 999,
    "unet/diffusion_pytorch_model.non_ema.safetensors": 999,
    "safety_checker/model.fp16.safetensors": 999,
    "model_index.json": 1,
}


@pytest.mark.parametrize(
    "cached, hub, half, chosen",
    [
        ({}, FULL | HALF, True, ("fp16", 22)),
        ({}, FULL | HALF, False, (None, 44)),
        ({}, FULL, True, (None, 44)),
        (FULL, FULL | HALF, True, (None, 0)),  # rounding it is exact enough, and nothing is fetched
        (HALF, FULL | HALF, True, ("fp16", 0)),
        (HALF, FULL | HALF, False, (None, 44)),
        (HALF, {}, False, ("fp16", 0)),  # without a network what is there has to do
        (FULL, {}, True, (None, 0)),
        ({"unet/diffusion_pytorch_model.fp16.safetensors": 17}, FULL | HALF, True, ("fp16", 5)),  # goes on
        ({}, {**FULL, "unet/diffusion_pytorch_model.fp16.safetensors": 17}, True, (None, 44)),  # half of it in half
        ({}, {}, True, (None, 0)),
    ],
)
def test_what_is_loaded_and_fetched(cached, hub, half, chosen):
    hub = hub | OTHER if hub else hub
    assert weights.choose(cached | OTHER if cached else {}, hub, PARTS, half) == chosen


def test_shards_count_and_other_files_do_not():
    shards = {f"unet/diffusion_pytorch_model.fp16-0000{k}-of-00002.safetensors": 5 for k in (1, 2)}
    assert weights.choose({}, shards, ["unet"], half=True) == ("fp16", 10)
    assert weights.choose({}, OTHER, ["unet"], half=True) == (None, 0)


def answer(status: int, kind=HfHubHTTPError):
    """What the hub's server says, as huggingface_hub raises it."""
    library = import_module(next(each for each in HTTPError.__module__.split(".") if each))
    return kind(
        "Too many requests. Wait.", response=library.Response(status, request=library.Request("GET", "https://x"))
    )


@pytest.mark.parametrize(
    "error, why",
    [
        (OfflineModeIsEnabled("offline"), "no network"),
        (HTTPError("unreachable"), "no network"),
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed. Make sure to"), "socksio"),
        (answer(404, RepositoryNotFoundError), "no such repository, or one that asks for an access token"),
        (answer(429), "Too many requests"),
    ],
)
def test_a_hub_that_cannot_be_asked_says_why(monkeypatch, error, why):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(weights.HfApi, "model_info", fail)
    files, reason = weights.on_hub("some/one", None)
    assert files == {} and why in reason
    assert weights.in_cache("some/one-that-is-not-there", None) == {}


LOAD = """
import torch
from persres_lite import load_base
for dtype in (torch.float16, torch.float32):
    base = load_base("some/one", device="cpu", dtype=dtype)
    print(base.unet.dtype, float(base.unet.conv_in.weight.flatten()[0]) * 1000)
"""


def test_a_cache_that_holds_only_half_precision_serves(tmp_path):
    """In the hub's own layout, without a network, in a process of its own, which reads the place at its start."""
    revision = "0" * 40
    cache = tmp_path / "hub" / "models--some--one"
    pipeline = tiny_pipeline("sd1")
    pipeline.save_pretrained(cache / "snapshots" / revision, variant="fp16")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split()
    assert lines[0] == "torch.float16" and lines[2] == "torch.float32"
    value = 1000 * float(pipeline.unet.conv_in.weight.flatten()[0])
    assert float(lines[1]) == pytest.approx(value, rel=1e-2) and float(lines[3]) == pytest.approx(value, rel=1e-2)
