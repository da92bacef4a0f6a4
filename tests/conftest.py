"""What holds for all tests: one thread a process, nothing reaches the network, and tiny random pipelines."""

from __future__ import annotations

import os

# Before torch is imported, and for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: a test that needs the hub is a defect
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402

from persres_lite import attention  # noqa: E402
from persres_lite.support import notices  # noqa: E402
from tests.tiny import tiny_pipeline  # noqa: E402


@pytest.fixture(autouse=True)
def unsaid():
    """Each test hears every remark of the package, also one that another test has heard."""
    notices._said.clear()


@pytest.fixture(params=["sd1", "sdxl"])
def pipeline(request):
    """A fresh tiny pipeline, with convolutions and with linear projections; 'sd2' is between them, and predicts v."""
    return tiny_pipeline(request.param)


@pytest.fixture
def sd1():
    """A fresh tiny pipeline of the shape of Stable Diffusion 1.x."""
    return tiny_pipeline("sd1")


@pytest.fixture
def sdxl():
    """A fresh tiny pipeline of the shape of Stable Diffusion XL."""
    return tiny_pipeline("sdxl")


@pytest.fixture
def last_layer(monkeypatch):
    """Of several layers under one projection the last makes the map, as on page one."""
    monkeypatch.setattr(attention, "mean", lambda maps: maps[:, -1].mean(1))
