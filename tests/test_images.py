"""Every kind of picture that people have: what it becomes, or the sentence that refuses it."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from persres_lite.support.images import MAX_PIXELS, read_image, read_images, read_mask, square_crop

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


def save_exif(path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # shown turned by a quarter, clockwise
    halves().save(path, exif=exif)


def save_alpha(path):
    image = halves(mode="RGBA", left=(*RED, 255), right=(0, 0, 0, 0))
    image.save(path)


def save_gray_alpha(path):
    Image.merge("LA", (Image.new("L", (40, 20), 0), Image.new("L", (40, 20), 0))).save(path)


def save_cmyk(path):
    halves().convert("CMYK").save(path, quality=95)


def save_16_bit(path):
    Image.fromarray(np.full((20, 40), 65535, np.uint16)).save(path)


def save_palette(path):
    halves().quantize(4).save(path)


def save_transparent_palette(path):
    image = halves().quantize(4)
    image.save(path, transparency=image.getpixel((39, 0)))


def save_gray(path):
    Image.new("L", (40, 20), 128).save(path)


def save_bilevel(path):
    Image.new("1", (40, 20), 1).save(path)


def save_animation(path):
    halves().save(path, save_all=True, append_images=[Image.new("RGB", (40, 20), "blue")] * 3)


@pytest.mark.parametrize(
    "name, save, size, left, right",
    [
        ("plain.png", lambda path: halves().save(path), (40, 20), RED, GREEN),
        ("alpha.png", save_alpha, (40, 20), RED, WHITE),
        ("gray-alpha.png", save_gray_alpha, (40, 20), WHITE, WHITE),
        ("cmyk.jpg", save_cmyk, (40, 20), RED, GREEN),
        ("16-bit.png", save_16_bit, (40, 20), WHITE, WHITE),
        ("palette.png", save_palette, (40, 20), RED, GREEN),
        ("palette.gif", save_palette, (40, 20), RED, GREEN),
        ("transparent-palette.png", save_transparent_palette, (40, 20), RED, WHITE),
        ("gray.png", save_gray, (40, 20), (128, 128, 128), (128, 128, 128)),
        ("bilevel.png", save_bilevel, (40, 20), WHITE, WHITE),
        ("animation.gif", save_animation, (40, 20), RED, GREEN),
        ("animation.webp", save_animation, (40, 20), RED, GREEN),
    ],
)
def test_kinds_of_files(tmp_path, name, save, size, left, right):
    save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == size
    assert np.allclose(image.getpixel((5, 10)), left, atol=12), "JPEG and WebP may change a color a little"
    assert np.allclose(image.getpixel((35, 10)), right, atol=12)
    assert image.info == {"source": name}


def test_exif_rotation(tmp_path):
    save_exif(tmp_path / "turned.jpg")
    image = read_image(tmp_path / "turned.jpg")
    assert image.size == (20, 40)
    assert np.allclose(image.getpixel((10, 5)), RED, atol=12) and np.allclose(image.getpixel((10, 35)), GREEN, atol=12)


def test_sixteen_bit_gray_keeps_its_gray(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    ramp = np.asarray(read_image(tmp_path / "ramp.png"))[0, :, 0]
    assert np.array_equal(ramp, np.arange(256))


def test_a_pil_picture_is_read_and_left_alone():
    image = halves(mode="RGBA", left=(*RED, 255), right=(0, 0, 0, 0))
    assert read_image(image).getpixel((35, 10)) == WHITE
    assert image.mode == "RGBA" and image.getpixel((35, 10)) == (0, 0, 0, 0)


# ---------------------------------------------------------------------------------------------- what is refused


def cut_short(path):
    Image.effect_noise((200, 200), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    "name, make, error, sentence",
    [
        ("notes.jpg", lambda p: p.write_text("not a picture"), ValueError, r"notes.jpg cannot be read as a picture"),
        ("empty.png", lambda p: p.write_bytes(b""), ValueError, r"empty.png cannot be read as a picture"),
        ("cut.jpg", cut_short, ValueError, r"cut.jpg is broken or cut short .*: replace it or take it away"),
        ("cut.png", cut_short, ValueError, r"cut.png is broken or cut short .*: replace it or take it away"),
        (
            "bomb.png",
            lambda p: p.write_bytes(png_that_claims(100_000, 100_000)),
            ValueError,
            r"bomb.png has more than 80 million pixels and is not opened: make it smaller",
        ),
        (
            "large.png",
            lambda p: p.write_bytes(png_that_claims(10_000, MAX_PIXELS // 10_000 + 1)),
            ValueError,
            r"large.png has more than 80 million pixels",
        ),
        (
            "float.tif",
            lambda p: Image.fromarray(np.ones((20, 20), np.float32)).save(p),
            ValueError,
            r"float.tif holds floating point numbers whose black and white are not known: save it with 8 or 16 bits",
        ),
        (
            "deep.tif",
            lambda p: Image.fromarray(np.full((20, 20), 70_000, np.int32)).save(p),
            ValueError,
            r"deep.tif holds 32-bit numbers",
        ),
        ("gone.png", lambda p: None, FileNotFoundError, r"gone.png does not exist: give the path of a picture"),
        ("folder", lambda p: p.mkdir(), FileNotFoundError, r"folder is a folder, not a picture"),
    ],
)
def test_refused_files(tmp_path, name, make, error, sentence):
    make(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one sentence, and not a warning of Pillow's beside it
        with pytest.raises(error, match=sentence):
            read_image(tmp_path / name)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_that_claims(9_000, 9_000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="million pixels"):
        read_image(tmp_path / "bomb.png")


# ----------------------------------------------------------------------------------------------- folders, lists


def test_a_folder_is_read_in_natural_order_and_the_rest_is_skipped_by_name(tmp_path):
    for number in (10, 2, 0):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    halves().save(tmp_path / "unnamed", format="PNG")  # a picture without a suffix is still a picture
    (tmp_path / "notes.txt").write_text("skip me")
    (tmp_path / "list.csv").write_text("a,b")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "masks").mkdir()
    images, skipped = read_images(tmp_path)
    assert [image.info["source"] for image in images] == ["0.png", "2.png", "10.png", "unnamed"]
    assert skipped == ["list.csv", "notes.txt"]


def test_a_broken_picture_in_a_folder_is_named_and_not_skipped(tmp_path):
    halves().save(tmp_path / "good.png")
    cut_short(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match="bad.jpg is broken or cut short"):
        read_images(tmp_path)


def test_a_bomb_without_a_suffix_is_not_skipped(tmp_path):
    (tmp_path / "bomb").write_bytes(png_that_claims(100_000, 100_000))
    with pytest.raises(ValueError, match="bomb has more than 80 million pixels"):
        read_images(tmp_path)


def test_lists_files_and_pictures(tmp_path):
    halves().save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), halves(), [halves()], (tmp_path / "a.png",)):
        images, skipped = read_images(source)
        assert [image.size for image in images] == [(40, 20)] and skipped == []
    assert len(read_images([tmp_path / "a.png", halves()])[0]) == 2


@pytest.mark.parametrize(
    "fill, sentence",
    [
        (lambda folder: None, r"There is no picture in .*\. Put three to five pictures of the concept in it"),
        (
            lambda folder: [(folder / f"{number}.txt").write_text("x") for number in range(7)],
            r"7 files there are no pictures \(0.txt, 1.txt, 2.txt, 3.txt, 4.txt, …\)",
        ),
    ],
)
def test_a_folder_without_pictures_is_refused(tmp_path, fill, sentence):
    fill(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        read_images(tmp_path)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="list of pictures is empty"):
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


def test_small_pictures_are_enlarged_with_a_warning_and_tiny_ones_refused():
    with pytest.warns(UserWarning, match="a picture is 128 x 200 and is enlarged to 512 x 512"):
        assert square_crop(Image.new("RGB", (128, 200)), 512).size == (512, 512)
    with pytest.raises(ValueError, match="a picture is 127 x 200, less than a quarter of the 512 pixels"):
        square_crop(Image.new("RGB", (127, 200)), 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        square_crop(Image.new("RGB", (512, 512)), 512)


def test_messages_name_the_file(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "stamp.png")
    with pytest.raises(ValueError, match="stamp.png is 20 x 20"):
        square_crop(read_image(tmp_path / "stamp.png"), 512)


# ----------------------------------------------------------------------------------------------------- masks


def test_masks(tmp_path):
    halves(left=WHITE, right=(0, 0, 0)).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", (40, 20))
    assert mask.mode == "L" and mask.getpixel((5, 5)) == 255 and mask.getpixel((35, 5)) == 0


def test_what_is_transparent_in_a_mask_is_black():
    cutout = halves(mode="RGBA", left=(255, 255, 255, 255), right=(255, 255, 255, 0))
    assert read_mask(cutout, (40, 20)).getbbox() == (0, 0, 20, 20)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mask a picture is 40 x 20 and its picture 64 x 64: make them equal"):
        read_mask(halves(), (64, 64))
    with pytest.raises(ValueError, match="marks nothing: paint the object white on black"):
        read_mask(Image.new("L", (40, 20)), (40, 20))
    with pytest.raises(ValueError, match="The mask is 40 x 20 and its picture 64 x 64"):
        square_crop(Image.new("RGB", (64, 64)), 64, Image.new("L", (40, 20), 255))
