"""Figures show what they are given: pictures, values, words; and a reader can tell what is what."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from persres_lite.attention import AttentionRecord
from persres_lite.concepts import load_concept
from persres_lite.course import figures
from persres_lite.course.figures import style
from persres_lite.course.figures.diagram import unet_parts
from persres_lite.course.figures.style import COLORS, NEUTRAL, WAYS
from persres_lite.masks import RULES
from persres_lite.residuals import find_proj_outs
from tests.tiny import tiny_unet

RED = Image.new("RGB", (64, 64), "red")
BLUE = Image.new("RGB", (64, 64), "blue")
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1.0


def tiles(figure):
    """The pictures of a figure by their words, as arrays."""
    found = re.findall(r'<img src="data:image/\w+;base64,([^"]+)" alt="([^"]+)"', figure.html)
    return {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data, alt in found}


def labels(figure):
    return [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes.yaxis.label)]


def test_a_figure_shows_itself_with_words_for_who_does_not_see_it_and_its_caption_as_text(monkeypatch):
    from matplotlib import pyplot

    outputs = []
    monkeypatch.setattr(style, "display", lambda *given, **options: outputs.append((*given, options)))
    figures.grid([RED], columns=["a <red> one"], caption="What to see & say.")._ipython_display_()
    figures.curves({"a way": [1, 2]}, ylabel="loss")._ipython_display_()
    (picture, _), (plot, _) = outputs
    assert 'alt="a &lt;red&gt; one" width="192"' in picture["text/html"]
    assert ">What to see &amp; say.</figcaption>" in picture["text/html"]
    assert picture["text/plain"] == "Figure: What to see & say."
    assert 'alt="Plot: loss"' in plot["text/html"] and "image/png;base64" in plot["text/html"]
    assert pyplot.get_fignums() == []


def test_pictures_are_twice_as_large_as_shown_and_leave_room_in_a_notebook():
    figure = figures.grid([load_concept(name).images for name in ("plum-cat", "berry-mug")])
    assert [tile.shape for tile in tiles(figure).values()] == [(384, 384, 3)] * 8
    assert figure.html.count("image/jpeg") == 8 and len(figure.html) < 160_000
    assert "image/png" in figures.grid([RED]).html, "flat pictures are exact"


def test_a_way_of_sampling_looks_the_same_in_every_figure():
    lines = figures.curves({"LAG": [1, 2], "residual": [2, 1], "something": [0, 0]}).axes[0].lines
    other = figures.tradeoff({"residual": [(0, 1), (1, 0)]}, {"LAG, median": (1, 1)}).axes[0].lines
    assert [line.get_color() for line in lines[:2]] == [line.get_color() for line in reversed(other)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3


def test_variants_of_a_way_share_its_color_and_differ_otherwise():
    figure = figures.tradeoff({}, dict.fromkeys(("disc, half", "disc, quarter", "LAG", "LAG, Otsu"), (0, 0)))
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert looks[0][0] == looks[1][0] and looks[2][0] == looks[3][0] and len(set(looks)) == 4


def test_pictures_are_enlarged_or_shrunk_and_keep_their_colors():
    half = Image.new("RGB", (64, 64), "red")
    half.paste((0, 0, 255), (32, 0, 64, 64))
    large = figures.enlarge(half, 200)
    assert large.size == (200, 200)
    assert large.getpixel((40, 96)) == (255, 0, 0) and large.getpixel((150, 96)) == (0, 0, 255)
    assert figures.enlarge(Image.new("RGB", (500, 300)), 150).size == (250, 150)


def test_grid_places_pictures_and_words():
    figure = figures.grid([[RED, BLUE], [BLUE, None]], rows=["beach", "snow"], columns=["original", "LAG"])
    colors = {words: tile[0, 0].tolist() for words, tile in tiles(figure).items()}
    assert colors == {"beach, original": [255, 0, 0], "beach, LAG": [0, 0, 255], "snow, original": [0, 0, 255]}
    assert figure.html.count("<tr") == 3 and figure.html.count(">LAG</th>") == 1
    with pytest.raises(ValueError):
        figures.grid([RED, BLUE], rows=["a", "b"])  # one row


def test_what_is_no_table_is_broken_into_equal_rows_with_a_title_above_each_picture():
    figure = figures.grid([RED] * 7, columns=[f"step {k}" for k in range(7)])
    assert figure.html.count("<tr") == 4 and list(tiles(figure)) == [f"step {k}" for k in range(7)]
    assert list(tiles(figures.grid([RED, BLUE]))) == ["picture 1", "picture 2"]


def test_too_many_rows_are_left_out_and_the_caption_says_so():
    table = [[RED] * 6] * 5
    assert figures.grid(table, caption="See.").caption == "See. Shown: 4 of 5 rows."
    assert figures.grid(table, most=30).html.count("<img") == 30


def test_a_film_moves_says_what_it_shows_and_stays_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 128, 128, 3), dtype=np.uint8)
    frames = [[Image.fromarray(each), RED] for each in noise]
    path = tmp_path / "new" / "film.gif"
    shown = figures.film(frames, [f"step {k}" for k in range(12)], ["LAG", "mask"], "It appears.", path=path)
    film = Image.open(path)
    assert path.stat().st_size <= figures.pictures.FILM and film.is_animated and film.width > 2 * 192
    assert 'frames: LAG, mask, step 0 to step 11"' in shown.html and ">It appears.</figcaption>" in shown.html
    short = figures.film([RED, BLUE])
    assert "Film of 2 frames" in short.html and 'width="192"' in short.html


def test_heat_is_bright_where_the_map_is_high():
    pixels = np.asarray(figures.heat_picture(RED, LEFT)).astype(int).sum(-1)
    assert pixels[:, :128].mean() > 2 * pixels[:, 256:].mean()
    weak = np.asarray(figures.heat_picture(RED, LEFT, low=0.0, high=4.0)).astype(int).sum(-1)
    assert weak[:, :128].mean() < pixels[:, :128].mean()
    flat = figures.heat_picture(RED, torch.ones(4, 4))  # a constant map does not divide by zero
    assert all(low == high for low, high in flat.getextrema())


def test_heats_share_one_scale_with_a_color_bar():
    figure = figures.heats(RED, [LEFT, LEFT * 0.25], titles=["a", "b"])
    strong, weak, bar = tiles(figure).values()
    assert "attention: 0.000 <img" in figure.html and "> 1.000</p>" in figure.html
    assert strong[192, 40].sum() > weak[192, 40].sum() and bar[0, -1].sum() > 2 * bar[0, 0].sum()


def test_a_contour_hides_nothing_and_a_flat_map_has_none():
    pixels = np.asarray(figures.contour_picture(BLUE, LEFT))
    orange = (pixels == [255, 140, 0]).all(-1)
    assert orange.any() and orange[:, 160:224].sum() == orange.sum(), "the line follows the map's edge"
    assert (pixels[~orange] == [0, 0, 255]).all()
    assert np.array_equal(np.asarray(figures.contour_picture(BLUE, torch.ones(4, 4))).min((0, 1)), [0, 0, 255])


def test_outlines_mark_mask_and_truth():
    pixels = np.asarray(figures.outline_picture(RED, LEFT, LEFT.T))
    assert list(tiles(figures.outlines(RED, [LEFT], ["left"], truth=LEFT.T))) == ["left"]
    assert (pixels.reshape(-1, 3) == [255, 140, 0]).all(1).any(), "the mask's edge"
    assert (pixels.reshape(-1, 3) == 255).all(1).any(), "the truth's edge"
    assert pixels[300, 40, 0] == 255 and pixels[300, 300, 0] < 130  # the outside is dimmed
    assert pixels[300, 0].tolist() == [255, 0, 0]  # the picture's border is no edge


def test_curves_draw_values_smoothed_and_with_a_band():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    raw, smooth = figures.curves({"a": values}, smooth=2).axes[0].lines
    assert raw.get_ydata().tolist() == values.tolist() and raw.get_alpha() < 1
    assert smooth.get_ydata().tolist() == [2.0, 4.0, 6.0] and smooth.get_xdata().tolist() == [0.5, 1.5, 2.5]
    banded = figures.curves({"a": np.stack([values, values + 2]), "b": values}, x=[1, 2, 3, 4], log=True).axes[0]
    assert banded.lines[0].get_ydata().tolist() == [2.0, 4.0, 6.0, 8.0]
    assert len(banded.collections) == 1 and banded.get_yscale() == "log"
    assert [text.get_text() for text in banded.get_legend().get_texts()] == ["a", "b"]


def test_losses_are_averaged_by_noise_level():
    axes = figures.loss_by_noise_level({"a": ([0, 99, 100, 950], [1.0, 3.0, 7.0, 9.0])}, bins=10).axes[0]
    values = axes.lines[0].get_ydata()
    assert values[0] == 2.0 and values[1] == 7.0 and values[9] == 9.0 and np.isnan(values[5])
    assert axes.lines[0].get_xdata()[0] == 50


def test_bars_show_means_values_and_a_reference():
    figure = figures.bars({"original": [0.1, 0.3], "LAG": 0.5}, ylabel="identity", reference=("class", 0.25))
    axes = figure.axes[0]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([0.2, 0.5])
    assert sorted(axes.collections[0].get_offsets()[:, 1].tolist()) == pytest.approx([0.1, 0.3])
    assert {"0.200", "0.500"} <= set(labels(figure)) and axes.lines[0].get_ydata()[0] == 0.25


def test_bars_of_no_method_have_a_color_that_no_way_has():
    axes = figures.bars({"floor": 0.1, "other": 0.2, "ceiling": [0.8, 1.0]}, neutral=("floor", "ceiling")).axes[0]
    floor, other, ceiling = (to_hex(patch.get_facecolor()) for patch in axes.patches)
    assert floor == ceiling == NEUTRAL[0] and to_hex(axes.collections[0].get_facecolor()[0]) == NEUTRAL[1]
    one = figures.bars({"training 0": 0.1, "training 1": 0.2}, way="residual").axes[0]
    assert {to_hex(patch.get_facecolor()) for patch in one.patches} == {WAYS["residual"][0]}
    assert other not in NEUTRAL and not {*NEUTRAL} & {*COLORS, *(color for color, _, _ in WAYS.values())}


def test_rows_with_intervals_are_sorted_around_zero_and_a_way_keeps_its_color():
    one, two = {"mean": 0.1, "low": 0.0, "high": 0.2}, {"mean": -0.1, "low": -0.3, "high": 0.1}
    figure = figures.forest({"middle": {"disc": two, "LAG": one}, "side": {"disc": one}}, "gain")
    middle, side = figure.axes
    assert [text.get_text() for text in middle.get_yticklabels()] == ["LAG", "disc"]
    assert middle.lines[0].get_xdata()[0] == 0.0, "the line at zero"
    assert [each.get_segments()[0][:, 0].tolist() for each in middle.collections] == [[0.0, 0.2], [-0.3, 0.1]]
    assert (middle.get_title(), side.get_title()) == ("middle", "side")
    assert middle.lines[2].get_color() == side.lines[1].get_color()
    assert "<details>" in figure.below and ">-0.100 [-0.300, +0.100]</td>" in figure.below, "the numbers, folded"
    single = figures.forest({"disc": two, "LAG": one})
    assert [text.get_text() for text in single.axes[0].get_yticklabels()] == ["LAG", "disc"]


def test_ranked_means_are_pale_below_the_reference():
    axes = figures.ranked({"low": [0.1, 0.3], "high": 0.8}, xlabel="IoU", reference=("disc", 0.5)).axes[0]
    line, high, low = axes.lines
    assert [text.get_text() for text in axes.get_yticklabels()] == ["high", "low"]
    assert (low.get_xdata()[0], high.get_xdata()[0]) == pytest.approx((0.2, 0.8))
    assert low.get_alpha() < high.get_alpha() and line.get_xdata()[0] == 0.5


def test_a_tradeoff_has_lines_points_what_they_are_the_mean_of_and_intervals():
    given = {"each": {"LAG": [(0.04, 0.6), (0.06, 0.8)]}, "ranges": {"LAG": ((0.0, 0.2), (0.4, 0.7))}}
    axes = figures.tradeoff({"residual": [(0.0, 0.5), (0.1, 0.7)]}, {"LAG": (0.05, 0.68)}, "moved", **given).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0.0, 0.5], [0.1, 0.7]], [[0.05, 0.68]]]
    pale, across, up = axes.collections
    assert np.allclose(pale.get_offsets(), given["each"]["LAG"]) and pale.get_alpha() < 0.5
    assert across.get_segments()[0].tolist() == [[0.0, 0.68], [0.2, 0.68]]
    assert up.get_segments()[0].tolist() == [[0.05, 0.4], [0.05, 0.7]]


def test_a_block_has_four_parts_and_four_skips():
    figure = figures.block_diagram()
    axes = figure.axes[0]
    assert sum(patch.get_gid() == "part" for patch in axes.patches) == 4
    assert sum(line.get_gid() == "skip" for line in axes.lines) == 4
    assert {"cross-\nattention", "output\nprojection"} <= {text.get_text() for text in axes.texts}


def test_a_mosaic_shows_every_number_on_one_scale():
    (image,) = figures.mosaic([[0.0, 0.5], [1.0, 0.2]], ["down", "up"], "step", "covered", 0, 1).axes[0].images
    assert image.get_array().tolist() == [[0.0, 0.5], [1.0, 0.2]] and image.get_clim() == (0, 1)


def test_a_heat_table_is_red_below_zero_and_blue_above():
    figure = figures.heat_table({"place": {"identity": 0.02, "moved": -4.0}, "style": {"identity": -0.01}})
    found = re.findall(r"<td(?:[^>]*rgba\((\d+)[^>]*)?>([^<]*)</td>", figure.html)
    assert found == [("0", "+0.020"), ("213", "-4.000"), ("213", "-0.010"), ("", "")], "what is not known stays white"
    assert re.findall(r"<th[^>]*>([^<]+)</th>", figure.html) == ["identity", "moved", "place", "style"]


def test_a_low_rank_residual_is_drawn_to_scale():
    figure = figures.low_rank_diagram(64, 16)
    boxes = {patch.get_gid(): (patch.get_width(), patch.get_height()) for patch in figure.axes[0].patches}
    assert boxes == {"W": (2.0, 2.0), "A": (0.5, 2.0), "B": (2.0, 0.5)}
    assert {"A\n64 × 16", "B\n16 × 64"} <= {*labels(figure)}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_diagram_has_a_bar_for_every_output_projection(kind):
    with torch.device("meta"):
        unet = tiny_unet(kind)
    number = len(find_proj_outs(unet))
    axes = figures.unet_diagram(unet).axes[0]
    drawn = [patch.get_gid() for patch in axes.patches]
    assert drawn.count("proj_out") == drawn.count("transformer") == number
    resnets = [name for name, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    assert drawn.count("resnet") == len(resnets)
    assert axes.figure.caption.startswith(f"{number} output projections: ")
    assert "8 × 8" in [text.get_text() for text in axes.texts]


def test_the_diagrams_parts_are_in_the_order_of_the_forward_pass():
    with torch.device("meta"):
        parts = unet_parts(tiny_unet("sdxl"))
    assert [part.kind for part in parts["down"][1]] == ["resnet", "transformer", "smaller"]
    assert [(part.kind, part.depth) for part in parts["mid"][0]] == [("resnet", 1), ("transformer", 2), ("resnet", 1)]
    assert [part.kind for part in parts["up"][0]] == ["resnet", "transformer"] * 2 + ["larger"]


@pytest.fixture
def record():
    made = AttentionRecord(words=["cat"], prompts=["cat"])
    for step in range(9):
        for size, block in ((8, "down_blocks.0.attentions.0.proj_out"), (4, "mid_block.attentions.0.proj_out")):
            made.maps[step, block] = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(step + size))
    return made


def test_the_still_of_the_maps_has_steps_and_blocks(record):
    found = tiles(figures.map_table(record, RED, "cat"))
    assert len(found) == 4 * 3 and {"step 0, down 0.0", "step 8, mid", "step 8, all blocks"} <= set(found)
    wanted = figures.heat_picture(RED, record.map("cat", step=8, block="mid_block.attentions.0.proj_out"))
    assert np.abs(found["step 8, mid"].astype(int) - np.asarray(wanted)).mean() < 4  # a JPEG
    scales = figures.scale_table({1.0: {"LAG": RED}, 0.0: {"LAG": BLUE}})
    assert list(tiles(scales)) == ["LAG, scale 0", "LAG, scale 1"]


def test_the_still_of_the_masks_says_each_share():
    found = tiles(figures.mask_table(RED, LEFT + torch.rand(8, 8) * 0.1))
    assert len(found) == len(RULES) and "median: 50%" in found
