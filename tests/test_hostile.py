"""Files that were made to do harm, a kill in the middle of writing: one sentence, nothing run, nothing half written."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from persres_lite import Residuals
from persres_lite.cli import commands, main
from persres_lite.support.files import read_tensors, whole_file, write_tensors
from tests.tiny import tiny_pipeline


class Trap:
    """Whoever unpickles this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The base need not be read anew for every file."""
    monkeypatch.setattr(commands, "load_base", lambda *_: tiny_pipeline("sd1"))


def container(shape: tuple, end: int) -> bytes:
    """A safetensors file with one tensor, which is not as large as its header says."""
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


TRAPS = {
    "pickle": lambda mark: pickle.dumps(Trap(mark)),
    "empty": lambda mark: b"",
    "header of 2^64 bytes": lambda mark: struct.pack("<Q", 2**64 - 1) + b"{}",
    "tensor beyond the file": lambda mark: container((10**6,), 4 * 10**6),
    "shape that overflows": lambda mark: container((2**40, 2**40), 4),
    "name that moves the cursor": lambda mark: save({"\x1b[2J\x1b]0;owned\x07\n\nTraceback": torch.zeros(1)}),
    "name of a million letters": lambda mark: save({"a" * 1_000_000: torch.zeros(1)}),
    "ours, of a version to come": lambda mark: save({}, {"format": "personalized-residuals", "version": "9" * 5000}),
    "ours, with a base that is a command": lambda mark: save(
        {}, {"format": "personalized-residuals", "base": f"$(touch {mark})"}
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("command", ["sample", "export", "personalize"])
def test_a_trap_is_one_sentence(tmp_path, capsys, trap, command):
    mark, path, out = tmp_path / "sprung", tmp_path / "trap.safetensors", str(tmp_path / "o.safetensors")
    path.write_bytes(TRAPS[trap](mark))
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cat" / "0.png")
    arguments = {
        "sample": [str(path), "a {}", "--out", str(tmp_path / "d")],
        "export": [str(path), "--out", out],
        "personalize": [str(tmp_path / "cat"), "--class", "cat", "--out", out, "--checkpoint", str(path)],
    }[command]
    assert main([command, *arguments, "--base", "mine"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("persres-lite: ") and shown.err.count("\n") == 1
    assert shown.err[:-1].isprintable() and len(shown.err) < 2200
    assert {each.name for each in tmp_path.iterdir()} == {"trap.safetensors", "cat"}, "nothing was run or written"


def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    """A pipe would keep its reader waiting, an endless device its memory."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    for path in list(tmp_path.iterdir()):
        assert main(["sample", str(path), "a {}", "--base", "mine"]) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1, path


def test_a_folder_of_pictures_with_pipes_and_links(tmp_path):
    cat = tmp_path / "cat"
    cat.mkdir()
    Image.new("RGB", (64, 64), "red").save(cat / "0.png")
    os.mkfifo(cat / "1.png")
    (cat / "2.png").symlink_to("/dev/zero")
    (cat / "3.png").symlink_to("3.png")
    arguments = ["personalize", str(cat), "--class", "cat", "--steps", "1", "--batch-size", "1", "--quiet"]
    assert main([*arguments, "--base", "mine", "--out", str(tmp_path / "o.safetensors")]) == 0


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "o.safetensors").symlink_to("precious")
    cat = Residuals(tiny_pipeline("sd1")).save(tmp_path / "cat.safetensors")
    assert main(["export", str(cat), "--base", "mine", "--out", str(tmp_path / "o.safetensors")]) == 0
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "o.safetensors").is_symlink()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
def test_killed_while_it_writes_the_file_is_the_old_one(tmp_path):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.zeros(4)}, {"value": "old"})
    child = os.fork()
    if child == 0:
        try:
            with whole_file(path) as temporary:
                temporary.write_bytes(path.read_bytes()[:20])
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert read_tensors(path)[1]["value"] == "old" and len(list(tmp_path.iterdir())) == 2
