"""Damaged files at random, with a fixed seed, through the command line: a result or one sentence, never a traceback."""

from __future__ import annotations

import io
import json
import random
import re
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from persres_lite import Residuals
from persres_lite.cli import commands, main
from persres_lite.lora import export_lora
from persres_lite.support.images import read_image, read_mask
from tests.helpers import exif_of, icc
from tests.tiny import tiny_pipeline

PICTURES = 1200
"""Damaged pictures, each read as a photograph and as a mask."""
THROUGH = 40
"""Of them, and of EXIF, those that go through the whole command."""
FILES = 120
"""Damaged files of residuals, and as many LoRAs of either format."""


@pytest.fixture(scope="module")
def base():
    return tiny_pipeline("sd1")


@pytest.fixture(autouse=True)
def of_known_size(monkeypatch):
    """It is no folder, so what it costs without a GPU would be said."""
    monkeypatch.setattr(commands, "without_gpu", lambda _: None)


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """One file with a few wrong bits, bytes, lengths, or pieces that are gone, doubled or moved."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not data:
            break
        # Most of what programs trip over stands at the beginning.
        at = draw.randrange(min(len(data), draw.choice((32, 256, len(data)))))
        kind = draw.randrange(7)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            data[at : at + 4] = struct.pack(draw.choice(("<I", ">I")), draw.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1)))
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 5:
            data[at:at] = data[at : at + draw.randrange(1, 40)]
        else:
            data[at:at] = draw.randbytes(draw.randrange(1, 12))
    return bytes(data)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def seeds() -> list[bytes]:
    """Small pictures of every kind that is opened, in the modes that each can hold."""
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    alpha = colors.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(colors.size))
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(24, 20) * 100)
    exif = exif_of([(0x0112, 3, 1, struct.pack(">HH", 6, 0)), (0x010F, 2, 4, b"cam\0")])
    modes = [colors, alpha, colors.convert("L"), colors.convert("1"), colors.quantize(8), deep, colors.convert("CMYK")]
    modes += [alpha.convert("LA"), colors.convert("YCbCr"), Image.fromarray(np.ones((9, 9), np.float32))]
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"):
        for mode in modes:
            try:
                found.append(encoded(mode, kind))
                found.append(encoded(mode, kind, exif=exif, icc_profile=icc()))
                found.append(encoded(mode, kind, save_all=True, append_images=[mode] * 2))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a kind that has no such mode
                continue
    return found


def outcome(path) -> str:
    """What reading a picture comes to: a picture as promised, or a sentence; anything else fails the test."""
    try:
        image = read_image(path)
        assert image.mode == "RGB" and image.width * image.height > 0 and set(image.info) == {"source"}
        return "read"
    except ValueError as error:
        assert str(error).startswith(path.name) and str(error).endswith((".", "black.", "pixels.")), error
        return "refused"


def test_pictures(tmp_path, recwarn):
    draw, kinds, counted = random.Random(1), seeds(), Counter()
    assert len(kinds) > 60
    path = tmp_path / "cat.png"
    for number in range(PICTURES):
        path.write_bytes(kinds[number] if number < len(kinds) else damaged(draw, draw.choice(kinds)))
        counted[outcome(path)] += 1
        try:
            read_mask(path, (20, 24))
        except ValueError:
            counted["no mask"] += 1
    assert counted["read"] > PICTURES / 10 and counted["refused"] > PICTURES / 10, counted
    assert not recwarn.list, "one sentence, and not a library's warning beside it"


def test_exif(tmp_path, recwarn):
    """Fields of any type, count and place: the picture is read, whatever stands there."""
    draw, path = random.Random(2), tmp_path / "cat.jpg"
    plain = Image.new("RGB", (40, 20), "red")
    for _ in range(1000):
        fields = [
            (draw.choice((0x0112, 0x0100, 0x8769, 0x8825, 0x927C, draw.randrange(65536))), draw.randrange(16))
            + (draw.choice((0, 1, 2, 9, 2**31, 2**32 - 1)), draw.randbytes(4))
            for _ in range(draw.randrange(1, 9))
        ]
        exif = exif_of(fields, draw.random() < 0.5)
        plain.save(path, exif=damaged(draw, exif) if draw.random() < 0.3 else exif)
        assert read_image(path).size in ((40, 20), (20, 40))
    assert not recwarn.list


def run(arguments, capsys) -> tuple[int, str]:
    """A command in this process; a traceback is an exception here, and fails the test."""
    code = main([str(each) for each in arguments])
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert code in (0, 1, 2) and all(line.startswith("persres-lite: ") for line in lines), shown
    assert (code != 0) <= len(lines) and all(line.isprintable() and len(line) < 2200 for line in lines), shown
    return code, shown


def test_photographs_through_the_command(base, tmp_path, capsys, monkeypatch):
    """Up to the training itself, which does not know what the pictures were."""
    monkeypatch.setattr(commands, "load_base", lambda *_: base)
    monkeypatch.setattr("persres_lite.training.step", lambda *arguments, **_: arguments[4].losses.append(0.5) or 0.5)
    draw, kinds, codes = random.Random(3), seeds(), Counter()
    cat, out = tmp_path / "cat", tmp_path / "out.safetensors"
    cat.mkdir()
    for _ in range(THROUGH):
        card = b'{"macro_class": "cat", "token": "sks"}'
        for name in ("0.jpg", draw.choice(("clip.mpg", "notes.txt", "1.png"))):
            picture = draw.choice(kinds)
            (cat / name).write_bytes(damaged(draw, picture) if draw.random() < 0.5 else picture)
        (cat / "concept.json").write_bytes(damaged(draw, card) if draw.random() < 0.3 else card)
        arguments = ["personalize", cat, "--class", "cat", "--steps", 1, "--batch-size", 1, "--quiet", "--out", out]
        code, _ = run(arguments, capsys)
        codes[code] += 1
        assert out.exists() == (code == 0)
        for path in (out, *cat.iterdir()):
            path.unlink(missing_ok=True)
    assert set(codes) == {0, 2} and min(codes.values()) > 2, codes


def damaged_tensors(draw: random.Random, whole: bytes) -> bytes:
    """A safetensors file that is wrong in its bytes, or whole with wrong tensors and metadata."""
    if draw.random() < 0.4:
        return damaged(draw, whole)
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: torch.frombuffer(bytearray(data[slice(*each["data_offsets"])]), dtype=torch.float32).view(each["shape"])
        for name, each in header.items()
    }
    for _ in range(draw.choice((1, 1, 3))):
        name = draw.choice(list(tensors))
        kind = draw.randrange(9)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name + draw.choice(("x", ".dora_scale", ".alpha", ".bias", "_mid.weight"))] = tensors[name].clone()
        elif kind == 2:
            tensors[name] = tensors[name].flatten()[: draw.randrange(tensors[name].numel() + 1)].clone()
        elif kind == 3:
            tensors[name] = tensors[name].reshape(-1, *[1] * draw.randrange(5))
        elif kind == 4:
            kinds = (torch.float16, torch.int8, torch.bool, torch.complex64, torch.float64, torch.float8_e5m2)
            tensors[name] = tensors[name].to(draw.choice(kinds))
        elif kind == 5:
            tensors[name] = tensors[name] * draw.choice((float("nan"), float("inf"), 1e30, 0.0, -1.0))
        elif kind == 6 and metadata:
            metadata.pop(draw.choice(list(metadata)))
        elif metadata:
            odd = (
                "",
                "null",
                "[" * 5000,
                '{"a": ' * 3,
                "9" * 400,
                "\x1b[2J",
                "../..",
                "1e999",
                "{}",
                "[1]",
                "sks cat " * 40,
            )
            metadata[draw.choice(list(metadata))] = draw.choice(odd)
        if not tensors:
            break
    return save(tensors, metadata or None)


@pytest.mark.parametrize("kind", ["residuals", "diffusers", "kohya"])
def test_residuals_and_loras(base, tmp_path, capsys, monkeypatch, kind):
    """`export` reads all that `sample` reads, and writes; where it has a result, drawing takes no harm."""
    monkeypatch.setattr(commands, "load_base", lambda *_: base)
    good, path, out = tmp_path / "good.safetensors", tmp_path / "cat.safetensors", tmp_path / "out.safetensors"
    residuals = Residuals(base, rank=2, init="random")
    residuals.metadata.update(token="sks", macro_class="cat", base="toybox")
    residuals.losses = [0.5, 0.25]
    residuals.save(good) if kind == "residuals" else export_lora(residuals, good, kind)
    draw, whole, codes, drawn = random.Random(kind), good.read_bytes(), Counter(), 0
    for _ in range(FILES):
        path.write_bytes(damaged_tensors(draw, whole))
        code, _ = run(["export", path, "--out", out, "--base", "mine"], capsys)
        codes[code] += 1
        assert out.exists() == (code == 0)
        if code == 0 and drawn < 3:
            drawn += 1
            mode = draw.choice(("lag", "residual"))
            arguments = ["sample", path, "a {} on the beach", "--steps", 1, "--mode", mode, "--out", tmp_path / "d"]
            run([*arguments, "--words", "beach", "--base", "mine"], capsys)
        out.unlink(missing_ok=True)
    assert codes[0] > 3 and codes[2] > FILES / 3, codes
    assert {each.name for each in tmp_path.iterdir()} <= {"good.safetensors", "cat.safetensors", "d"}


def test_arguments(base, tmp_path, capsys, monkeypatch):
    """Odd values of every option, one or two at a time."""
    monkeypatch.setattr(commands, "load_base", lambda *_: base)
    monkeypatch.setattr(commands, "_draw", lambda *_: Image.new("RGB", (64, 64)))
    monkeypatch.chdir(tmp_path)
    residuals = Residuals(base, rank=2)
    residuals.metadata.update(token="sks", macro_class="cat", base="toybox")
    residuals.save(tmp_path / "cat.safetensors")
    options = ["--images", "--steps", "--guidance", "--scale", "--words", "--mask", "--mask-option", "--window"]
    options += ["--base", "--dtype", "--seed", "--out"]
    values = ["", " ", "0", "1", "-1", "nan", "inf", "1e999", "9" * 30, "cat", "q=5", "q=", "=", "q=nan", "q=true"]
    values += ["otsu", "soft", "float16", "a" * 300, "x/y/z", "\t", "猫", "..", "/", "{}", "sks cat", "0.5", "--", "-"]
    draw, codes = random.Random(4), Counter()
    for _ in range(400):
        arguments = [
            "sample",
            "cat.safetensors",
            draw.choice(("a {}", "{}", "", "a sks cat", "{} " * 90, "\n", "%s{0}")),
        ]
        for option in draw.sample(options, draw.choice((1, 2))):
            count = 2 if option == "--window" else 1
            arguments += [option, *draw.choices(values, k=count)]
        try:
            code, _ = run(arguments, capsys)
        except SystemExit as stopped:  # the parser's own way
            code, shown = stopped.code, capsys.readouterr().err
            assert code == 2 and re.search(r"persres-lite sample: error: .+\n$", shown), shown
        codes[code] += 1
    assert codes[0] > 20 and codes[2] > 100, codes
