"""Files that were made to do harm, a kill in the middle of writing: one sentence, nothing run, nothing half written."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import signal
import struct
import tarfile
import time
import zipfile
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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """With a file of residuals for the tiny pipeline."""
    home = tmp_path_factory.mktemp("home")
    base = tiny_pipeline("sd1")
    residuals = Residuals(base)
    residuals.metadata.update(token="sks", macro_class="cat", base=str(home / "base"))
    residuals.save(home / "cat.safetensors")
    return home


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The base need not be read anew for every file."""
    monkeypatch.setattr(commands, "load_base", lambda *_: tiny_pipeline("sd1"))
    monkeypatch.setattr(commands, "without_gpu", lambda _: None)  # which would take it for one of unknown size


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def in_a_zip(mark: Path) -> bytes:
    with io.BytesIO() as file:
        torch.save({"state": Trap(mark)}, file)
        return file.getvalue()


def zip_bomb(mark: Path) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.pkl", bytes(20_000_000))
            archive.writestr("../../escaped", "x")
        return file.getvalue()


def tar_upwards(mark: Path) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            link = tarfile.TarInfo("cat.safetensors")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        return file.getvalue()


def tensor(shape=(1,), at=(0, 4), kind="F32") -> dict:
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(at)}


TRAPS = {
    "pickle": lambda mark: pickle.dumps(Trap(mark)),
    "torch.save": in_a_zip,
    "old torch.save": lambda mark: pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(Trap(mark)),
    "zip bomb": zip_bomb,
    "tar with a link": tar_upwards,
    "gzip": lambda mark: b"\x1f\x8b\x08\0" + bytes(60),
    "hdf5": lambda mark: b"\x89HDF\r\n\x1a\n" + bytes(60),
    "script": lambda mark: f"#!/bin/sh\ntouch {mark}\n".encode(),
    "empty": lambda mark: b"",
    "header longer than the file": lambda mark: container({"a": tensor()}, bytes(4), length=2**40),
    "header of 2^64 bytes": lambda mark: container({}, length=2**64 - 1),
    "header in a header": lambda mark: container(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "header that is no JSON": lambda mark: container(b"\xff\xfe{}"),
    "tensor beyond the file": lambda mark: container({"a": tensor((10**6,), (0, 4 * 10**6))}, bytes(4)),
    "tensor before the file": lambda mark: container({"a": tensor((1,), (-4, 0))}, bytes(4)),
    "two tensors in one place": lambda mark: container({"a": tensor(), "b": tensor()}, bytes(4)),
    "shape that overflows": lambda mark: container({"a": tensor((2**40, 2**40), (0, 4))}, bytes(4)),
    "shape below zero": lambda mark: container({"a": tensor((-1,))}, bytes(4)),
    "unknown kind of number": lambda mark: container({"a": tensor(kind="OBJECT")}, bytes(4)),
    "metadata that are no words": lambda mark: container(
        {"__metadata__": {"format": {"a": [1]}}, "a": tensor()}, bytes(4)
    ),
    "name that moves the cursor": lambda mark: save({"\x1b[2J\x1b]0;owned\x07\n\nTraceback": torch.zeros(1)}),
    "name of a million letters": lambda mark: save({"a" * 1_000_000: torch.zeros(1)}),
    "ours, of a version to come": lambda mark: save({}, {"format": "personalized-residuals", "version": "9" * 5000}),
    "ours, with a base that is a command": lambda mark: save(
        {}, {"format": "personalized-residuals", "base": f"$(touch {mark})"}
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("command", ["sample", "export", "personalize"])
def test_a_trap_is_one_sentence(home, tmp_path, capsys, trap, command):
    mark, path = tmp_path / "sprung", tmp_path / "trap.safetensors"
    path.write_bytes(TRAPS[trap](mark))
    there = ["--base", str(home / "base"), "--device", "cpu"]
    if command == "sample":
        arguments = ["sample", str(path), "a {}", "--steps", "1", "--out", str(tmp_path / "d"), *there]
    elif command == "export":
        arguments = ["export", str(path), "--out", str(tmp_path / "o.safetensors"), *there]
    else:
        (tmp_path / "cat").mkdir()
        Image.new("RGB", (64, 64), "red").save(tmp_path / "cat" / "0.png")
        arguments = ["personalize", str(tmp_path / "cat"), "--class", "cat", "--steps", "1", "--checkpoint", str(path)]
        arguments += ["--out", str(tmp_path / "o.safetensors"), "--quiet", *there]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("persres-lite: ") and shown.err.count("\n") == 1
    assert "Traceback" not in shown.err.split(":")[1] and shown.err.isascii() or shown.err[:-1].isprintable()
    assert len(shown.err) < 2200 and "\x1b" not in shown.err
    assert {each.name for each in tmp_path.iterdir()} <= {"trap.safetensors", "cat"}, "nothing was run or written"


def test_what_is_no_file_is_not_waited_for(home, tmp_path, capsys):
    """A pipe would keep its reader waiting, an endless device its memory."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "long.safetensors").symlink_to("x" * 300)
    names = sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert main(["sample", str(tmp_path / name), "a {}", "--base", str(home / "base")]) == 2
        assert capsys.readouterr().err.count("\n") == 1, name


def test_a_folder_of_pictures_with_pipes_and_links(home, tmp_path, capsys):
    cat = tmp_path / "cat"
    cat.mkdir()
    Image.new("RGB", (64, 64), "red").save(cat / "0.png")
    os.mkfifo(cat / "1.png")
    (cat / "2.png").symlink_to("/dev/zero")
    (cat / "3.png").symlink_to("3.png")
    (cat / "masks").symlink_to("/dev")
    arguments = ["personalize", str(cat), "--class", "cat", "--steps", "1", "--batch-size", "1", "--quiet"]
    arguments += ["--base", str(home / "base"), "--out", str(tmp_path / "o.safetensors")]
    assert main(arguments) == 0
    (cat / "4.png").symlink_to("/etc/passwd")
    assert main(arguments) == 2
    assert "4.png cannot be read as a picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    "card", ["[" * 100_000, '{"macro_class": ' + "9" * 10_000 + "}", '{"macro_class": "a\\u0000"}']
)
def test_cards_that_were_made_to_do_harm(home, tmp_path, capsys, card):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cat" / "0.png")
    (tmp_path / "cat" / "concept.json").write_text(card)
    arguments = ["personalize", str(tmp_path / "cat"), "--steps", "1", "--base", str(home / "base"), "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "o.safetensors")]) in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(home, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "o.safetensors").symlink_to("precious")
    arguments = ["export", str(home / "cat.safetensors"), "--base", str(home / "base")]
    assert main([*arguments, "--out", str(tmp_path / "o.safetensors")]) == 0
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "o.safetensors").is_symlink()


def test_the_name_under_which_is_written_cannot_be_foreseen(tmp_path):
    names = set()
    for _ in range(20):
        with whole_file(tmp_path / "x.png") as temporary:
            names.add(temporary.name)
            assert temporary.suffix == ".png" and temporary.parent == tmp_path and temporary.is_file()
    assert len(names) == 20 and [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
def test_killed_while_it_writes_the_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.zeros(200_000)}, {"value": "0"})
    draw, seen = random.Random(0), set()
    for _ in range(12):
        child = os.fork()
        if child == 0:  # write without end, until killed
            try:
                torch.set_num_threads(1)  # the parent's other threads are not there after a fork
                value = 0
                while True:
                    value += 1
                    write_tensors(path, {"a": torch.full((200_000,), float(value))}, {"value": str(value)})
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tensors, metadata = read_tensors(path)
        assert (tensors["a"] == float(metadata["value"])).all() and len(tensors["a"]) == 200_000
        seen.add(metadata["value"])
    assert len(seen) > 1, "it did write"
