"""Every kind of figure that the notebooks draw, in one style. Functions return the figure; none opens a window or keeps
a state.

Figures are made for half a page's width: few words, large letters, a caption that says what to see. A folder and not
one file: `style` (the figure and its look), `pictures` (tables of pictures, maps and masks over them), `plots` (curves,
bars, singular values), `diagram` (a U-Net drawn from its own structure, a low-rank residual to scale), `stills` (what
an explorer shows, for readers who cannot move its sliders).
"""

from persres_lite.course.figures.diagram import block_diagram, low_rank_diagram, unet_diagram
from persres_lite.course.figures.pictures import (
    contour_picture,
    enlarge,
    grid,
    heat_picture,
    heats,
    outline_picture,
    outlines,
)
from persres_lite.course.figures.plots import (
    bars,
    curves,
    gains,
    heat_table,
    loss_by_noise_level,
    mosaic,
    ranked,
    singular_values,
    tradeoff,
)
from persres_lite.course.figures.stills import map_table, mask_table, scale_table
from persres_lite.course.figures.style import Drawing

__all__ = [
    "Drawing",
    "bars",
    "block_diagram",
    "contour_picture",
    "curves",
    "enlarge",
    "gains",
    "grid",
    "heat_picture",
    "heat_table",
    "heats",
    "loss_by_noise_level",
    "low_rank_diagram",
    "map_table",
    "mask_table",
    "mosaic",
    "outline_picture",
    "outlines",
    "ranked",
    "scale_table",
    "singular_values",
    "tradeoff",
    "unet_diagram",
]
