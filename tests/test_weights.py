"""Which weights are loaded from the hub or its cache, and what is said before a download."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from persres_lite import load_base
from persres_lite.support import weights

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


def test_a_cache_that_holds_only_half_precision_serves(sd1, tmp_path, monkeypatch):
    """In the hub's own layout, without a network."""
    revision, cache = "0" * 40, tmp_path / "models--some--one"
    sd1.save_pretrained(cache / "snapshots" / revision, variant="fp16")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for dtype in (torch.float16, torch.float32):
        weight = load_base("some/one", device="cpu", dtype=dtype).unet.conv_in.weight
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.float(), sd1.unet.conv_in.weight, atol=1e-3, rtol=1e-2)
