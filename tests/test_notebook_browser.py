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

from notebooks.tools import notebooks

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

NOTEBOOK = notebooks.ROOT / "notebooks" / "04_cross_attention.ipynb"
SECONDS = 900
"""How long the notebook may take: about a minute on two idle cores, far more beside other work."""

SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # nobody is asked for news
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells outside the window are on the page, too
}


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a free port of this machine, with settings and folders of its own: yields its address."""
    book = notebooks.read(NOTEBOOK)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(book, tmp_path / "play.ipynb")  # a copy, because JupyterLab saves what it has open
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    folders = {kind: str(tmp_path / kind.lower()) for kind in kinds}
    for plugin, setting in SETTINGS.items():
        file = tmp_path / "jupyterlab_settings_dir" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(setting))
    options = [
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={tmp_path}",
        "--IdentityProvider.token=",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options]
        environment = {**os.environ, **folders, "PYTHONPATH": str(notebooks.ROOT)}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
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
            last = sum(cell.cell_type == "code" for cell in notebooks.read(NOTEBOOK).cells)
            # The first is the cell's own number: an output that is a value repeats it.
            page.get_by_text(f"[{last}]:", exact=True).first.wait_for(timeout=SECONDS * 1000)
            picture, readout = page.locator("img.widget-image"), page.locator(".widget-readout").first
            shown = [_pixels(picture)]
            assert readout.inner_text() == "all" and shown[0].std() > 10
            page.locator(".noUi-handle").first.focus()
            for step in ("0", "1"):
                page.keyboard.press("ArrowRight")
                _until(lambda: not np.array_equal(_pixels(picture), shown[-1]))
                assert readout.inner_text() == step
                shown.append(_pixels(picture))
            page.keyboard.press("Home")
            _until(lambda: np.array_equal(_pixels(picture), shown[0]))  # all steps again
        finally:
            browser.close()


def _until(condition, seconds=30):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "nothing changed on the screen"
        time.sleep(0.2)
