"""Every kind of picture that people have: what it becomes, or the sentence that refuses it."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from persres_lite.support.images import (
    KEPT_PIXELS,
    picture_files,
    read_image,
    read_images,
    square_crop,
    square_crops,
)
from tests.helpers import exif_of, icc

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
EXIF_ORIENTATION = 0x0112


def halves(size=(40, 20), left=RED, right=GREEN, mode="RGB"):
    """A picture with one color on the left and another on the right."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------- what is read


def marked(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION], exif[0x010F] = value, "a camera"
    return exif


def cut_out():
    return halves(mode="RGBA", left=(*RED, 255), right=(0, 0, 0, 0))


PALETTE, GRAY = halves().quantize(4), (128, 128, 128)
FILM = {"save_all": True, "append_images": [Image.new("RGB", (40, 20), "blue")] * 3}


@pytest.mark.parametrize(
    "name, image, options, left, right",
    [
        ("plain.png", halves(), {}, RED, GREEN),
        ("alpha.png", cut_out(), {}, RED, WHITE),
        ("gray-alpha.png", Image.new("LA", (40, 20)), {}, WHITE, WHITE),
        ("cmyk.jpg", halves().convert("CMYK"), {"quality": 95}, RED, GREEN),
        ("16-bit.png", Image.fromarray(np.full((20, 40), 65535, np.uint16)), {}, WHITE, WHITE),
        ("palette.gif", PALETTE, {}, RED, GREEN),
        ("transparent-palette.png", PALETTE, {"transparency": PALETTE.getpixel((39, 0))}, RED, WHITE),
        ("gray.png", Image.new("L", (40, 20), 128), {}, GRAY, GRAY),
        ("bilevel.png", Image.new("1", (40, 20), 1), {}, WHITE, WHITE),
        ("animation.gif", halves(), FILM, RED, GREEN),
        ("animation.webp", halves(), FILM, RED, GREEN),
    ],
)
def test_kinds_of_files(tmp_path, name, image, options, left, right):
    image.save(tmp_path / name, **options)
    read = read_image(tmp_path / name)
    assert read.mode == "RGB" and read.size == (40, 20) and read.info == {"source": name}
    assert np.allclose(read.getpixel((5, 10)), left, atol=12), "JPEG and WebP may change a color a little"
    assert np.allclose(read.getpixel((35, 10)), right, atol=12)


def test_the_pictures_of_phones_are_read_where_their_plugin_is_installed(tmp_path, monkeypatch):
    (tmp_path / "cat.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="cat.heic cannot be read .*pip install pillow-heif"):
        read_image(tmp_path / "cat.heic")

    def register():
        monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: halves(), lambda start: b"ftypheic" in start))
        monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert read_image(tmp_path / "cat.heic").getpixel((5, 5)) == RED


@pytest.mark.parametrize("name", ["phone.jpg", "phone.png"])
def test_a_phones_colors_are_those_that_the_photographer_saw(tmp_path, name):
    Image.new("RGB", (40, 20), (230, 60, 40)).save(tmp_path / name, icc_profile=icc(), quality=100, lossless=True)
    image = read_image(tmp_path / name)
    assert np.allclose(image.getpixel((5, 5)), (250, 31, 14), atol=2)
    assert "icc_profile" not in image.info, "its colors are no longer those of the profile"


def test_gray_in_linear_light_and_a_gray_photograph_with_its_cameras_profile():
    gray = Image.new("L", (2, 2), 55)  # linear, 0.2157: in sRGB half of the range
    gray.info["icc_profile"] = icc(space=b"GRAY")
    assert np.allclose(read_image(gray).getpixel((0, 0)), 128, atol=2)
    gray.info["icc_profile"] = icc()
    assert np.allclose(read_image(gray).getpixel((0, 0)), 55, atol=1)


@pytest.mark.parametrize("profile", [b"", b"no profile", icc()[:300], icc(space=b"CMYK"), icc(space=b"GRAY")])
def test_a_profile_that_is_broken_or_of_another_kind_is_ignored(profile):
    image = Image.new("RGB", (2, 2), (230, 60, 40))
    image.info["icc_profile"] = profile
    assert read_image(image).getpixel((0, 0)) == (230, 60, 40)


def test_transparency_is_laid_over_white_before_colors_are_converted(tmp_path):
    halves(mode="RGBA", left=(230, 60, 40, 255), right=(0, 0, 0, 0)).save(tmp_path / "cut.png", icc_profile=icc())
    image = read_image(tmp_path / "cut.png")
    assert np.allclose(image.getpixel((5, 5)), (250, 31, 14), atol=2) and image.getpixel((35, 5)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["turned.jpg", "turned.png"])
def test_every_orientation(tmp_path, name, orientation):
    """The camera's mark says what to do with the stored picture, whatever else stands beside it."""
    upright = Image.new("RGB", (40, 20), "black")
    upright.paste(RED, (0, 0, 20, 10))  # top left
    upright.paste(GREEN, (20, 0, 40, 10))
    # How the camera stored it: by the inverse of what undoes it.
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / name, exif=marked(orientation))
    image = read_image(tmp_path / name)
    assert image.size == (40, 20)
    for place, color in (((5, 5), RED), ((35, 5), GREEN), ((5, 15), (0, 0, 0))):
        assert np.allclose(image.getpixel(place), color, atol=60), "colors bleed at JPEG's half resolution"


def test_odd_fields_beside_the_mark_do_no_harm(tmp_path):
    """Writing EXIF anew, as Pillow does to turn a picture, fails on such fields (Pillow #4665)."""
    for tag, kind in ((0x010F, 3), (0x011A, 2), (0x0132, 7), (0x9286, 1)):
        fields = sorted([(EXIF_ORIENTATION, 3, 1, struct.pack(">HH", 6, 0)), (tag, kind, 2, b"\xff\0\xff\0")])
        halves().save(tmp_path / "odd.jpg", exif=exif_of(fields))
        assert read_image(tmp_path / "odd.jpg").size == (20, 40), fields


def test_a_large_photograph_is_turned_and_reduced_while_it_is_read(tmp_path):
    Image.linear_gradient("L").resize((4000, 3000)).convert("RGB").save(tmp_path / "large.jpg", exif=marked(6))
    image = read_image(tmp_path / "large.jpg")  # the gradient runs from black, now on the right, to white
    assert 0.99 * KEPT_PIXELS < image.width * image.height < 1.01 * KEPT_PIXELS and image.width < image.height
    middle = [image.getpixel((x, 9))[0] for x in (image.width - 1, image.width // 2, 0)]
    assert np.allclose(middle, (0, 128, 255), atol=3)


def test_sixteen_bit_gray_keeps_its_gray(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    ramp = np.asarray(read_image(tmp_path / "ramp.png"))[0, :, 0]
    assert np.array_equal(ramp, np.arange(256))


# ---------------------------------------------------------------------------------------------- what is refused


def cut_short(path):
    Image.effect_noise((200, 200), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    "name, make, error, sentence",
    [
        ("notes.jpg", lambda p: p.write_text("not a picture"), ValueError, "notes.jpg .*: save it as a JPEG or PNG"),
        ("cut.jpg", cut_short, ValueError, "cut.jpg cannot be read .* truncated"),
        ("large.png", lambda p: p.write_bytes(png_that_claims(10**4, 10**4)), ValueError, "large.png .* pixels"),
        ("float.tif", lambda p: Image.fromarray(np.ones((9, 9), np.float32)).save(p), ValueError, "black and white"),
        ("gone.png", lambda p: None, FileNotFoundError, "gone.png"),
        ("folder", lambda p: p.mkdir(), IsADirectoryError, "folder"),
    ],
)
def test_refused_files(tmp_path, name, make, error, sentence):
    make(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one sentence, and not a warning of Pillow's beside it
        with pytest.raises(error, match=sentence):
            read_image(tmp_path / name)


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n"


@pytest.mark.parametrize("name", ["cat1.jpg", "cat1.eps"])
def test_a_file_never_starts_a_program(tmp_path, monkeypatch, name):
    """Pillow goes by a file's content, and hands PostScript to an interpreter."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started"))
    (tmp_path / name).write_text(POSTSCRIPT)
    with pytest.raises(ValueError, match=f"{name} cannot be read as a picture .*: save it as a JPEG"):
        read_image(tmp_path / name)
    with Image.open(tmp_path / name) as lazy, pytest.raises(ValueError, match="cannot be read as a picture"):
        read_image(lazy)


# ----------------------------------------------------------------------------------------------- folders, lists


def test_a_folder_is_read_in_natural_order_and_the_rest_is_left(tmp_path):
    for number in (10, 2, 0):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.PNG")
    for name in ("notes.txt", "raw.dng", "clip.mpg", ".DS_Store", "._0.png"):
        (tmp_path / name).write_bytes(b"II*\0" + bytes(60))
    (tmp_path / "masks").mkdir()
    assert [image.info["source"] for image in read_images(tmp_path)] == ["0.PNG", "2.PNG", "10.PNG"]
    assert [path.name for path in picture_files(tmp_path)[1]] == ["clip.mpg", "notes.txt", "raw.dng"]


def test_a_broken_picture_in_a_folder_is_named_and_not_skipped(tmp_path):
    halves().save(tmp_path / "good.png")
    cut_short(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match="bad.jpg cannot be read"):
        read_images(tmp_path)


def test_lists_files_and_pictures(tmp_path):
    halves().save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), halves(), [halves()], (tmp_path / "a.png",)):
        assert [image.size for image in read_images(source)] == [(40, 20)]
    assert len(read_images([tmp_path / "a.png", halves()])) == 2
    with pytest.raises(ValueError, match="There is no picture.* three to five pictures"):
        read_images([])


# --------------------------------------------------------------------------------------------------- cropping


def test_the_middle_square_without_a_mask():
    image = Image.new("RGB", (300, 100), WHITE)
    image.paste(RED, (100, 0, 200, 100))
    square = square_crop(image, 64)
    assert square.size == (64, 64)
    assert np.asarray(square).reshape(-1, 3).tolist() == [list(RED)] * 64 * 64


@pytest.mark.parametrize("left, expected", [(0, 0), (180, 150), (260, 200)])
def test_the_square_follows_the_mask_as_far_as_the_picture_reaches(left, expected):
    columns = np.tile(np.minimum(np.arange(300), 255).astype(np.uint8), (100, 1))  # each shows its own number
    image = Image.fromarray(columns).convert("RGB")
    mask = Image.new("L", (300, 100), 0)
    mask.paste(255, (left, 20, left + 40, 60))
    square, cut = square_crop(image, 100, mask)
    assert square.size == cut.size == (100, 100)
    assert square.getpixel((0, 0))[0] == expected, "the first column that is left"
    assert cut.getbbox() == (left - expected, 20, left - expected + 40, 60)


def test_an_upright_picture_is_cut_around_the_mask_too():
    mask = Image.new("L", (100, 300), 0)
    mask.paste(255, (0, 250, 40, 290))
    _, cut = square_crop(Image.new("RGB", (100, 300)), 100, mask)
    assert cut.getbbox() == (0, 50, 40, 90)


def test_small_pictures_are_enlarged_with_one_warning(recwarn):
    small = [Image.new("RGB", (200, 130)) for _ in range(20)]
    for number, image in enumerate(small):
        image.info["source"] = f"{number}.png"
    squares, masks = square_crops([*small, Image.new("RGB", (512, 600))], 512)
    assert [square.size for square in squares] == [(512, 512)] * 21 and masks == [] and len(recwarn) == 1
    said = str(recwarn.pop().message)
    assert "512 x 512" in said and "4.png (200 x 130), …" in said and "20.png" not in said
