"""Damaged files at random, with a fixed seed, through the command line: a result or one sentence, never a traceback."""

from __future__ import annotations

import io
import random
import struct
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from persres_lite import Residuals
from persres_lite.cli import commands, main
from persres_lite.lora import export_lora
from persres_lite.support.images import read_image
from tests.helpers import exif_of, icc
from tests.tiny import tiny_pipeline

PICTURES, FILES = 200, 16  # damaged ones; of files as many of each kind


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """One file with a few wrong bits, bytes, lengths, or pieces that are gone, doubled or moved."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not data:
            break
        # Most of what programs trip over stands at the beginning.
        at = draw.randrange(min(len(data), draw.choice((32, 256, len(data)))))
        number = struct.pack(draw.choice(("<I", ">I")), draw.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1)))
        length = draw.randrange(1, 40)
        start, end, new = draw.choice(
            [
                (at, at + 1, bytes([data[at] ^ 1 << draw.randrange(8)])),
                (at, at + 4, number),
                (at, len(data), b""),
                (at, at + length, b""),
                (at, at, data[at : at + length]),
                (at, at, draw.randbytes(length)),
            ]
        )
        data[start:end] = new
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
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"):
        for mode in modes:
            try:
                found.append(encoded(mode, kind))
                found.append(encoded(mode, kind, exif=exif, icc_profile=icc()))
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
        assert str(error).startswith(path.name) and str(error).endswith("."), error
        return "refused"


def test_pictures(tmp_path, recwarn):
    draw, kinds, counted = random.Random(1), seeds(), Counter()
    assert len(kinds) > 40
    path = tmp_path / "cat.png"
    for number in range(PICTURES):
        path.write_bytes(kinds[number] if number < len(kinds) else damaged(draw, draw.choice(kinds)))
        counted[outcome(path)] += 1
    assert counted["read"] > PICTURES / 10 and counted["refused"] > PICTURES / 10, counted
    assert not recwarn.list, "one sentence, and not a library's warning beside it"


@pytest.mark.parametrize("kind", ["residuals", "diffusers", "kohya"])
def test_residuals_and_loras(tmp_path, capsys, monkeypatch, kind):
    """`export` reads all that `sample` reads, and writes."""
    base = tiny_pipeline("sd1")
    monkeypatch.setattr(commands, "load_base", lambda *_: base)
    good, path, out = tmp_path / "good.safetensors", tmp_path / "cat.safetensors", tmp_path / "out.safetensors"
    residuals = Residuals(base, rank=2, init="random")
    residuals.metadata.update(token="sks", macro_class="cat", base="toybox")
    residuals.save(good) if kind == "residuals" else export_lora(residuals, good, kind)
    draw, whole, codes = random.Random(kind), good.read_bytes(), Counter()
    capsys.readouterr()
    for _ in range(FILES):
        path.write_bytes(damaged(draw, whole))
        code = main(["export", str(path), "--out", str(out), "--base", "toybox"])
        lines = capsys.readouterr().err.splitlines()
        codes[code] += 1
        assert out.exists() == (code == 0) and all(line.startswith("persres-lite: ") for line in lines), lines
        assert (code != 0) <= len(lines) and all(line.isprintable() for line in lines), lines
        out.unlink(missing_ok=True)
    assert set(codes) <= {0, 2} and codes[2] > FILES / 3, codes
    assert {each.name for each in tmp_path.iterdir()} == {"good.safetensors", "cat.safetensors"}
