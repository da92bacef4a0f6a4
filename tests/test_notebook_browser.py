"""A notebook opened in JupyterLab in a real browser: it runs, a slider moves, and the picture on the screen changes."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import numpy as np
import pytest
from PIL import Image

from persres_lite.maintain import notebooks

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="jupyterlab is not installed"),
]

CELLS = [
    f"import sys\nsys.path.insert(0, {str(notebooks.ROOT)!r})",
    """\
import torch
from PIL import Image
from persres_lite import explorers
from persres_lite.record import AttentionRecord

record = AttentionRecord(words=["cat"], prompts=["a cat"])
for step in range(4):
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 2 * step : 2 * step + 2, :4] = 1.0
    record.maps[step, "mid_block.attentions.0.proj_out", "cond"] = maps""",
    'explorers.maps(record, Image.new("RGB", (64, 64), "white"))',
]


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a free port of this machine, with settings and folders of its own: yields its address."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(made, tmp_path / "play.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    folders = {kind: str(tmp_path / kind.lower()) for kind in kinds}
    quiet = (
        tmp_path / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    )
    quiet.parent.mkdir(parents=True)  # nobody is asked for news or newer versions
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    options = [
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={tmp_path}",
        "--IdentityProvider.token=",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options]
        server = subprocess.Popen(command, env={**os.environ, **folders}, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status", server, tmp_path / "lab.log")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(address, server, log, seconds=90):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def _pixels(element) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)


def test_a_slider_moves_and_the_picture_changes(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            page.goto(f"{lab}/lab/tree/play.ipynb")
            page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=90_000)
            # What is run before the kernel has answered for the first time is dropped without a word.
            page.get_by_text("(ipykernel) | Idle").wait_for(timeout=90_000)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            picture = page.locator(".jp-OutputArea-output img.widget-image")
            picture.wait_for(timeout=120_000)
            readout = page.locator(".widget-readout").first
            assert readout.inner_text() == "all"
            before = _pixels(picture)
            handle = page.locator(".noUi-handle").first
            handle.focus()
            page.keyboard.press("ArrowRight")
            page.wait_for_function("document.querySelector('.widget-readout').innerText == '0'", timeout=30_000)
            _until(lambda: not np.array_equal(_pixels(picture), before))
            first = _pixels(picture)
            # All steps together looked at the whole left half; step 0 looked at its upper quarter only.
            height, width = first.shape[:2]
            gain = (first - before).sum(-1)
            assert gain[height // 2 :, : width // 3].mean() < -100
            assert abs(gain[: height // 8, : width // 3].mean()) < 20
            page.keyboard.press("ArrowRight")
            _until(lambda: not np.array_equal(_pixels(picture), first))
            assert readout.inner_text() == "1"
        finally:
            browser.close()


def _until(condition, seconds=30):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "nothing changed on the screen"
        time.sleep(0.2)
