"""`make lab`, started for real without a screen: it opens notebook 00, serves what that links to, and asks nothing."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST = "notebooks/00_the_result_first.ipynb"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="jupyterlab is not installed"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`make lab` as a user starts it, with settings and a browser of its own: yields address, opened page and log."""
    folder = tmp_path_factory.mktemp("lab")
    browser = folder / "browser"
    browser.write_text(f'#!/bin/sh\ncp "${{1#file://}}" {folder}/opened.html\n')
    browser.chmod(0o755)
    tools = folder / "venv"  # what make takes for .venv, set up already
    (tools / "bin").mkdir(parents=True)
    jupyter = tools / "bin" / "jupyter"
    jupyter.write_text(f'#!/bin/sh\nexec {sys.executable} -m jupyter "$@"\n')
    jupyter.chmod(0o755)
    (tools / ".ready").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    folders = {kind: str(folder / kind.lower()) for kind in kinds}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    options = f"--ServerApp.port={port} --ServerApp.port_retries=0 --ServerApp.ip=127.0.0.1 --IdentityProvider.token="
    command = ["make", "lab", f"VENV={tools}", f"ARGS={options}"]
    env = {**clean, **folders, "BROWSER": f"{browser} %s"}
    log = folder / "log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: get(f"{address}/api/status"), server, log)
        until(lambda: (folder / "opened.html").exists(), server, log)
        yield address, (folder / "opened.html").read_text(), log
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def until(found, server, log, seconds=90):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and server.poll() is None:
        if answer := found():
            return answer
        time.sleep(0.2)
    pytest.fail(f"make lab did not start:\n{log.read_text()[-2000:]}")


def get(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.read()
    except (urllib.error.URLError, ConnectionError):
        return b""


def test_the_browser_is_sent_to_the_first_notebook(lab):
    address, opened, _ = lab
    (target,) = set(re.findall(r'url=([^"]+)"', html.unescape(opened)))
    assert target.split("?")[0].endswith(f"/lab/tree/{FIRST}")
    assert target.startswith(("http://127.0.0.1", "http://localhost"))


def test_the_notebook_and_what_it_links_to_are_below_the_root(lab):
    address, _, _ = lab
    assert json.loads(get(f"{address}/api/contents/{FIRST}?content=0"))["type"] == "notebook"
    for linked in ("data/toybox-sd/README.md", "data/results/toybox.md", "README.md"):
        served = json.loads(get(f"{address}/api/contents/{linked}"))
        assert served["content"] == (ROOT / linked).read_text(encoding="utf-8")


def test_nobody_is_asked_for_news_and_nothing_looks_for_updates(lab):
    address, _, _ = lab
    page = get(f"{address}/lab/tree/{FIRST}").decode()
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert config["news"] == {"disabled": True}
    assert json.loads(get(f"{address}/lab/api/update"))["notification"] is None


def test_its_log_has_no_warning_that_concerns_the_project(lab):
    _, _, log = lab
    text = log.read_text()
    assert not re.search(r"Running as root|root_dir|deprecated.*(?:LabApp|ServerApp)|Unrecognized", text), text[-2000:]


def test_only_root_is_allowed_to_be_root(tmp_path):
    tool = tmp_path / "id"
    plans = {}
    for number in ("0", "1000"):
        tool.write_text(f"#!/bin/sh\necho {number}\n")
        tool.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        made = subprocess.run(["make", "-n", "lab"], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True)
        plans[number] = made.stdout.decode()
    assert "--allow-root" in plans["0"] and "--allow-root" not in plans["1000"]
