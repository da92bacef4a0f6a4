"""Files that were made to do harm, a kill in the middle of writing: one sentence, nothing run, nothing half written."""

from __future__ import annotations

import os
import pickle
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from persres_lite.cli import commands, main
from persres_lite.support.files import read_tensors, whole_file, write_tensors
from tests.tiny import tiny_pipeline


class Trap:
    """Whoever unpickles this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


TRAPS = {
    "a pickle": lambda mark: pickle.dumps(Trap(mark)),
    "an empty file": lambda mark: b"",
    "a header of 2^64 bytes": lambda mark: struct.pack("<Q", 2**64 - 1) + b"{}",
    "a name that moves the cursor": lambda mark: save({"\x1b[2J\x1b]0;owned\x07\n\nTraceback": torch.zeros(1)}),
    "a version to come": lambda mark: save({}, {"format": "personalized-residuals", "version": "9"}),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("command", ["export", "personalize"])
def test_a_trap_is_one_sentence(tmp_path, capsys, monkeypatch, trap, command):
    monkeypatch.setattr(commands, "load_base", lambda *_: tiny_pipeline("sd1"))
    path, out = tmp_path / "trap.safetensors", str(tmp_path / "o.safetensors")
    path.write_bytes(TRAPS[trap](tmp_path / "sprung"))
    arguments = {
        "export": [str(path)],
        "personalize": ["plum-cat", "--checkpoint", str(path)],
    }[command]
    assert main([command, *arguments, "--out", out, "--base", "toybox"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("persres-lite: ") and shown.err.count("\n") == 1
    assert shown.err[:-1].isprintable() and "trap.safetensors" in shown.err
    assert [each.name for each in tmp_path.iterdir()] == ["trap.safetensors"], "nothing was run or written"


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
