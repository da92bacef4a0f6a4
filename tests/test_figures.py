"""Figures show what they are given: pictures, values, words; and a reader can tell what is what."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from matplotlib.colors import to_hex
from PIL import Image

from persres_lite.attention import AttentionRecord
from persres_lite.course import figures
from persres_lite.course.figures.diagram import unet_parts
from persres_lite.course.figures.stills import short_name, spread
from persres_lite.course.figures.style import COLORS, NEUTRAL, WAYS
from persres_lite.masks import RULES
from persres_lite.residuals import find_proj_outs
from tests.tiny import tiny_unet

RED = Image.new("RGB", (64, 64), "red")
BLUE = Image.new("RGB", (64, 64), "blue")
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1.0


def drawn_bytes(figure):
    data, metadata = figure._repr_png_() or figure._repr_jpeg_()
    assert metadata == ({"alt": figure.caption} if figure.caption else {})
    return data


def shown(axes):
    return np.asarray(axes.images[0].get_array())


def labels(figure):
    return [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title, axes.yaxis.label)]


def test_a_figure_shows_itself_as_png_without_pyplot():
    from matplotlib import pyplot

    figure = figures.grid([RED], caption="What to see.")
    image = Image.open(io.BytesIO(drawn_bytes(figure)))
    assert image.format == "PNG" and image.width > 150
    assert (image.convert("RGB").getpixel((image.width // 2, image.height // 3))) == (255, 0, 0)
    assert figure.caption == "What to see." and figure._supxlabel.get_text() == "What to see."
    assert pyplot.get_fignums() == []


def test_a_figure_full_of_pictures_is_a_jpeg_without_bands():
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    figure = figures.grid([Image.fromarray(noise)] * 8, caption="Noise.")
    assert figure._repr_png_() is None and Image.open(io.BytesIO(drawn_bytes(figure))).format == "JPEG"
    assert figures.grid([RED])._repr_jpeg_() is None


def test_a_way_of_sampling_looks_the_same_in_every_figure():
    lines = figures.curves({"LAG": [1, 2], "residual": [2, 1], "something": [0, 0]}).axes[0].lines
    other = figures.tradeoff({"residual": [(0, 1), (1, 0)]}, {"LAG, median": (1, 1)}).axes[0].lines
    assert [line.get_color() for line in lines[:2]] == [line.get_color() for line in reversed(other)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3


def test_variants_of_a_way_share_its_color_and_differ_otherwise():
    figure = figures.tradeoff({}, dict.fromkeys(("disc, half", "disc, quarter", "LAG", "LAG, Otsu"), (0, 0)))
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert looks[0][0] == looks[1][0] and looks[2][0] == looks[3][0] and len(set(looks)) == 4


def test_small_pictures_are_enlarged_by_a_whole_factor_and_keep_their_colors():
    half = Image.new("RGB", (64, 64), "red")
    half.paste((0, 0, 255), (32, 0, 64, 64))
    large = figures.enlarge(half, 192)
    assert large.size == (192, 192)
    assert large.getpixel((40, 96)) == (255, 0, 0) and large.getpixel((150, 96)) == (0, 0, 255)
    row = np.asarray(large)[96, :, 0].astype(int)
    assert ((row > 25) & (row < 230)).sum() <= 3  # the edge stays an edge
    assert figures.enlarge(Image.new("RGB", (500, 300)), 192).size == (500, 300)


def test_grid_places_pictures_and_words():
    figure = figures.grid([[RED, BLUE], [BLUE, None]], rows=["beach", "snow"], columns=["original", "LAG"])
    assert [shown(axes)[0, 0].tolist() if axes.images else None for axes in figure.axes] == [
        [255, 0, 0],
        [0, 0, 255],
        [0, 0, 255],
        None,
    ]
    assert {"beach", "snow", "original", "LAG"} <= set(labels(figure))
    assert len(figures.grid([RED, BLUE, RED]).axes) == 3


@pytest.mark.parametrize("wrong", [{"rows": ["a", "b"]}, {"columns": ["a"]}])
def test_words_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="give one for each"):
        figures.grid([RED, BLUE], **wrong)


def test_heat_is_bright_where_the_map_is_high():
    pixels = np.asarray(figures.heat_picture(RED, LEFT)).astype(int).sum(-1)
    assert pixels[:, :64].mean() > 2 * pixels[:, 128:].mean()
    weak = np.asarray(figures.heat_picture(RED, LEFT, low=0.0, high=4.0)).astype(int).sum(-1)
    assert weak[:, :64].mean() < pixels[:, :64].mean()
    flat = figures.heat_picture(RED, torch.ones(4, 4))  # a constant map does not divide by zero
    assert len(np.unique(np.asarray(flat).reshape(-1, 3), axis=0)) == 1


def test_heats_share_one_scale_with_a_color_bar():
    figure = figures.heats(RED, [LEFT, LEFT * 0.25], titles=["a", "b"])
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "attention" and bar.get_ylim() == (0.0, 1.0)
    assert shown(figure.axes[0])[96, 20].sum() > shown(figure.axes[1])[96, 20].sum()


def test_a_contour_hides_nothing_and_a_flat_map_has_none():
    pixels = np.asarray(figures.contour_picture(BLUE, LEFT))
    orange = (pixels == [255, 140, 0]).all(-1)
    assert orange.any() and orange[:, 80:112].sum() == orange.sum(), "the line follows the map's edge"
    assert (pixels[~orange] == [0, 0, 255]).all()
    assert np.array_equal(np.asarray(figures.contour_picture(BLUE, torch.ones(4, 4))).min((0, 1)), [0, 0, 255])


def test_outlines_mark_mask_and_truth():
    figure = figures.outlines(RED, [LEFT], truth=LEFT.T)
    pixels = shown(figure.axes[0])
    assert (pixels.reshape(-1, 3) == [255, 140, 0]).all(1).any(), "the mask's edge"
    assert (pixels.reshape(-1, 3) == 255).all(1).any(), "the truth's edge"
    assert pixels[150, 20, 0] == 255 and pixels[150, 150, 0] < 130  # the outside is dimmed
    assert pixels[150, 0].tolist() == [255, 0, 0]  # the picture's border is no edge


def test_curves_draw_values_smoothed_and_with_a_band():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    axes = figures.curves({"a": values}, xlabel="step", ylabel="loss").axes[0]
    assert axes.lines[0].get_ydata().tolist() == values.tolist()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    raw, smooth = figures.curves({"a": values}, smooth=2).axes[0].lines
    assert smooth.get_ydata().tolist() == [2.0, 4.0, 6.0] and smooth.get_xdata().tolist() == [0.5, 1.5, 2.5]
    assert raw.get_alpha() < 1
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


def test_repeats_of_one_way_share_its_color():
    figure = figures.bars({"training 0": 0.1, "training 1": 0.2}, way="residual")
    assert {to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches} == {WAYS["residual"][0]}


def test_bars_of_no_method_have_a_color_that_no_way_has():
    axes = figures.bars({"floor": 0.1, "other": 0.2, "ceiling": [0.8, 1.0]}, neutral=("floor", "ceiling")).axes[0]
    floor, other, ceiling = (to_hex(patch.get_facecolor()) for patch in axes.patches)
    assert floor == ceiling == NEUTRAL[0] and to_hex(axes.collections[0].get_facecolor()[0]) == NEUTRAL[1]
    assert other not in NEUTRAL and not {*NEUTRAL} & {*COLORS, *(color for color, _, _ in WAYS.values())}


def test_ranked_bars_are_sorted_and_pale_below_the_reference():
    figure = figures.ranked({"low": [0.1, 0.3], "high": 0.8}, xlabel="IoU", reference=("disc", 0.5))
    axes = figure.axes[0]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([0.2, 0.8])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low", "high"]
    assert axes.patches[0].get_alpha() < axes.patches[1].get_alpha()
    assert axes.lines[0].get_xdata()[0] == 0.5


def test_a_tradeoff_has_lines_and_points():
    figure = figures.tradeoff({"residual": [(0.0, 0.5), (0.1, 0.7)]}, {"LAG": (0.05, 0.68)}, "moved", "identity")
    line, point = figure.axes[0].lines
    assert np.array_equal(line.get_xydata(), [[0.0, 0.5], [0.1, 0.7]])
    assert np.array_equal(point.get_xydata(), [[0.05, 0.68]])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["residual", "LAG"]


def test_a_block_has_four_parts_and_four_skips():
    figure = figures.block_diagram()
    axes = figure.axes[0]
    assert sum(patch.get_gid() == "part" for patch in axes.patches) == 4
    assert sum(line.get_gid() == "skip" for line in axes.lines) == 4
    assert {"cross-\nattention", "output\nprojection"} <= {text.get_text() for text in axes.texts}
    assert "skip" in figure.caption


def test_a_tradeoff_shows_pale_what_a_point_is_the_mean_of():
    each = {"LAG": [(0.04, 0.6), (0.06, 0.8)]}
    figure = figures.tradeoff({"residual": [(0.0, 0.5), (0.1, 0.7)]}, {"LAG": (0.05, 0.7)}, each=each)
    (pale,) = figure.axes[0].collections
    assert np.allclose(pale.get_offsets(), each["LAG"]) and pale.get_alpha() < 0.5


def test_a_tradeoff_shows_intervals_and_many_names_beside_the_axes():
    points = {name: (0.1 * number, 0.5) for number, name in enumerate("abcdef")}
    figure = figures.tradeoff({"residual": [(0, 0), (1, 1)]}, points, ranges={"b": ((0.0, 0.2), (0.4, 0.7))})
    drawn = [each.get_segments()[0].tolist() for each in figure.axes[0].collections]
    assert drawn == [[[0.0, 0.5], [0.2, 0.5]], [[0.1, 0.4], [0.1, 0.7]]]
    assert len(figure.axes[0].get_legend().get_texts()) == 7


def test_gains_stand_in_one_row_a_name_with_their_interval():
    one, two = {"mean": 0.1, "low": 0.0, "high": 0.2}, {"mean": -0.1, "low": -0.3, "high": 0.1}
    figure = figures.gains({"middle": {"LAG": one, "disc": two}, "side": {"disc": one}}, "identity gained")
    middle, side = figure.axes
    assert [text.get_text() for text in middle.get_yticklabels()] == ["LAG", "disc"]
    assert [each.get_segments()[0].tolist() for each in side.collections] == [[[0.0, 1.0], [0.2, 1.0]]]
    assert (middle.get_title(), side.get_title()) == ("middle", "side")
    assert middle.lines[2].get_color() == side.lines[1].get_color(), "a way keeps its color"


def test_a_mosaic_shows_every_number_on_one_scale():
    figure = figures.mosaic([[0.0, 0.5], [1.0, 0.2]], ["down", "up"], "step", "covered", 0, 1)
    assert shown(figure.axes[0]).tolist() == [[0.0, 0.5], [1.0, 0.2]]
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    with pytest.raises(ValueError, match="3 rows are given for 2"):
        figures.mosaic([[0.0], [1.0]], ["a", "b", "c"])


def test_a_heat_table_is_red_below_zero_and_blue_above():
    figure = figures.heat_table({"place": {"identity": 0.02, "moved": -4.0}, "style": {"identity": -0.01}})
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["+0.020", "-4.000", "-0.010"]
    colors = axes.images[0].cmap(axes.images[0].norm(axes.images[0].get_array()))
    assert colors[0, 0, 2] > colors[0, 0, 0] and colors[1, 0, 0] > colors[1, 0, 2]
    assert colors[1, 1, :3].min() > 0.9, "what is not known stays white"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["place", "style"]


def test_a_low_rank_residual_is_drawn_to_scale():
    figure = figures.low_rank_diagram(64, 16)
    boxes = {patch.get_gid(): (patch.get_width(), patch.get_height()) for patch in figure.axes[0].patches}
    assert boxes == {"W": (2.0, 2.0), "A": (0.5, 2.0), "B": (2.0, 0.5)}
    assert {"A\n64 × 16", "B\n16 × 64"} <= {*labels(figure)} and "rank 16" in figure.caption


def test_singular_values_end_at_the_rank():
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(12, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    axes = figures.singular_values({"A B": product, "conv": torch.eye(12)[:, :, None, None]}, rank=3).axes[0]
    values = axes.lines[0].get_ydata()
    assert values[0] == 1.0 and values[2] > 1e-3 and (values[3:] < 1e-5).all()
    assert axes.lines[1].get_ydata().tolist() == [1.0] * 12
    assert axes.lines[2].get_xdata()[0] == 3.5


def _toybox_like():
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        **kinds,
    )


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "toybox"])
def test_the_diagram_has_a_bar_for_every_output_projection(kind):
    with torch.device("meta"):
        unet = _toybox_like() if kind == "toybox" else tiny_unet(kind)
    number = len(find_proj_outs(unet))
    axes = figures.unet_diagram(unet).axes[0]
    drawn = [patch.get_gid() for patch in axes.patches]
    assert drawn.count("proj_out") == drawn.count("transformer") == number
    resnets = [name for name, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    assert drawn.count("resnet") == len(resnets)
    assert axes.figure.caption.startswith(f"{number} output projections: ")
    assert "16 × 16" in [text.get_text() for text in axes.texts]


def test_the_diagrams_parts_are_in_the_order_of_the_forward_pass():
    with torch.device("meta"):
        parts = unet_parts(tiny_unet("sdxl"))
    assert [[part.kind for part in block] for block in parts["down"]] == [
        ["resnet", "resnet", "smaller"],
        ["resnet", "transformer", "resnet", "transformer", "smaller"],
        ["resnet", "transformer", "resnet", "transformer"],
    ]
    assert [(part.kind, part.depth) for part in parts["mid"][0]] == [("resnet", 1), ("transformer", 3), ("resnet", 1)]
    assert [part.kind for part in parts["up"][0]] == ["resnet", "transformer"] * 3 + ["larger"]


@pytest.fixture
def record():
    made = AttentionRecord(words=["cat"], prompts=["cat"])
    for step in range(9):
        for size, block in ((8, "down_blocks.0.attentions.0.proj_out"), (4, "mid_block.attentions.0.proj_out")):
            made.maps[step, block] = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(step + size))
    return made


def test_the_still_of_the_maps_has_steps_and_blocks(record):
    figure = figures.map_table(record, RED, "cat")
    assert len(figure.axes) == 4 * 3
    assert {"step 0", "step 8", "down 0.0", "mid", "all blocks"} <= set(labels(figure))
    wanted = figures.heat_picture(RED, record.map("cat", step=8, block="mid_block.attentions.0.proj_out"))
    assert np.array_equal(shown(figure.axes[10]), np.asarray(wanted))


def test_the_still_of_the_masks_says_each_share():
    figure = figures.mask_table(RED, LEFT + torch.rand(8, 8) * 0.1)
    assert len([axes for axes in figure.axes if axes.images]) == len(RULES)
    assert "median: 50%" in labels(figure)
    chosen = figures.mask_table(RED, LEFT, rules={"threshold": {"level": 0.5}, "median": {}})
    assert {"threshold: 50%"} <= set(labels(chosen))


def test_the_still_of_the_scales_is_a_table():
    figure = figures.scale_table({1.0: {"residual": RED, "LAG": BLUE}, 0.0: {"residual": BLUE, "LAG": BLUE}})
    assert {"scale 0", "scale 1", "residual", "LAG"} <= set(labels(figure))
    assert shown(figure.axes[1])[0, 0].tolist() == [255, 0, 0]


def test_names_and_steps_are_shortened():
    assert short_name("up_blocks.2.attentions.1.proj_out") == "up 2.1"
    assert short_name("mid_block.attentions.0.proj_out") == "mid"
    assert short_name("something.else") == "something.else"
    assert spread(range(25), 4) == [0, 8, 16, 24] and spread([1, 2], 4) == [1, 2]
