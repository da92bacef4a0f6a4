"""`make lab`, started for real: it opens notebook 00, serves what that links to, asks nothing, and takes photographs;
in a real browser, where one is installed, a slider moves the picture.
"""

from __future__ import annotations

import html
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from notebooks.tools import notebooks

ROOT = notebooks.ROOT
FIRST = "notebooks/00_the_result_first.ipynb"
TOKEN = "t"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PLENTY = 300
"""Seconds that anything here may take on a machine that does much else; usually it is a few."""

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="jupyterlab is not installed"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`make lab` as a user starts it, with settings and a browser of its own: yields address, opened page and log."""
    folder = tmp_path_factory.mktemp("lab")
    tools = folder / "venv"  # what make takes for .venv, set up already
    scripts = {
        folder / "browser": f'cp "${{1#file://}}" {folder}/opened.html',
        tools / "bin" / "jupyter": f'exec {sys.executable} -m jupyter "$@"',
        tools / ".ready": "",
    }
    for path, line in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    settings = folder / "jupyterlab_settings_dir/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # cells outside the window are on the page, too
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    env = {**clean, **{kind: str(folder / kind.lower()) for kind in kinds}, "BROWSER": f"{folder}/browser %s"}
    options = f"--ServerApp.port={port} --ServerApp.port_retries=0 --ServerApp.ip=127.0.0.1"
    command = ["make", "lab", f"VENV={tools}", f"ARGS={options} --IdentityProvider.token={TOKEN}"]
    address, log = f"http://127.0.0.1:{port}", folder / "log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        until(lambda: server.poll() is not None or (get(f"{address}/api/status") and (folder / "opened.html").exists()))
        assert server.poll() is None, f"make lab did not start:\n{log.read_text()[-2000:]}"
        yield address, (folder / "opened.html").read_text(), log
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=PLENTY)


def until(condition) -> None:
    ends = time.monotonic() + PLENTY
    while not condition():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.2)


def get(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"Authorization": f"token {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=PLENTY) as answer:
            return answer.read()
    except (urllib.error.URLError, ConnectionError):
        return b""


def test_the_browser_is_sent_to_the_first_notebook_and_what_it_links_to_is_served(lab):
    address, opened, _ = lab
    (target,) = set(re.findall(r'url=([^"]+)"', html.unescape(opened)))
    assert target.split("?")[0].endswith(f"/lab/tree/{FIRST}")
    assert json.loads(get(f"{address}/api/contents/{FIRST}?content=0"))["type"] == "notebook"
    for linked in ("data/toybox-sd/README.md", "data/results/toybox.md", "README.md"):
        served = json.loads(get(f"{address}/api/contents/{linked}"))
        assert served["content"] == (ROOT / linked).read_text(encoding="utf-8")


def test_nobody_is_asked_for_news_nothing_looks_for_updates_and_no_option_is_unknown(lab):
    address, _, log = lab
    page = get(f"{address}/lab/tree/{FIRST}").decode()
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert config["news"] == {"disabled": True}
    assert json.loads(get(f"{address}/lab/api/update"))["notification"] is None
    text = log.read_text()
    assert not re.search(r"Running as root|root_dir|deprecated.*(?:LabApp|ServerApp)|Unrecognized", text), text[-2000:]


def test_only_root_is_allowed_to_be_root(tmp_path):
    tool = tmp_path / "id"
    for number, allowed in (("0", True), ("1000", False)):
        tool.write_text(f"#!/bin/sh\necho {number}\n")
        tool.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        made = subprocess.run(["make", "-n", "lab"], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True)
        assert (b"--allow-root" in made.stdout) == allowed


PLAY = f"""\
import sys
sys.path.insert(0, {str(ROOT)!r})
from ipywidgets import Label
from PIL import Image
from persres_lite.course import explorers, own
button, arrived = own.uploader(), Label()
size = lambda _: sum(len(each["content"]) for each in button.value)
button.observe(lambda _: setattr(arrived, "value", f"came: {{size(_)}}"), "value")
display(button, arrived)
explorers.compare({{k / 2: {{"LAG": Image.new("RGB", (64, 64), (100 * k, 0, 200))}} for k in range(3)}})"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_in_a_browser_a_slider_moves_the_picture_and_photographs_arrive(lab, tmp_path):
    from playwright.sync_api import sync_playwright

    def pixels():
        return np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB")).astype(int)

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    photographs = [tmp_path / f"{number}.jpg" for number in range(6)]
    for each in photographs:
        each.write_bytes(bytes(5_000_000))
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder, sync_playwright() as play:
        spec = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PLAY)], metadata=spec)
        nbformat.write(book, Path(folder) / "play.ipynb")
        browser = play.chromium.launch(executable_path=BROWSER, headless=True, args=flags)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(PLENTY * 1000)
        page.goto(f"{lab[0]}/lab/tree/build/{Path(folder).name}/play.ipynb?token={TOKEN}")
        # What is run before the kernel has answered for the first time is dropped without a word.
        page.get_by_text("(ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        picture = page.locator("img.widget-image")
        picture.wait_for()
        before = pixels()
        page.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        until(lambda: not np.array_equal(pixels(), before))
        page.keyboard.press("ArrowLeft")
        until(lambda: np.array_equal(pixels(), before))
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="photographs").click()
        chooser.value.set_files(photographs)
        page.get_by_text("came: 30000000").first.wait_for()
        browser.close()
