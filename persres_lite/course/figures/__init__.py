"""Every kind of figure that the notebooks draw, in one style. Functions return the figure; none opens a window or keeps
a state.

Figures are made for half a page's width: few words, large letters; the caption, which says what to see, stands below as
text. A folder and not one file: `style` (the figure and its look), `pictures` (tables of pictures, maps and masks over
them), `plots` (curves, bars, rows with intervals), `diagram` (a U-Net drawn from its own structure, a low-rank residual
to scale), `stills` (what an explorer shows, for readers who cannot move its sliders).
"""

from persres_lite.course.figures.diagram import block_diagram, low_rank_diagram, unet_diagram
from persres_lite.course.figures.pictures import *  # noqa: F403
from persres_lite.course.figures.plots import *  # noqa: F403
from persres_lite.course.figures.stills import map_table, mask_table, scale_table
from persres_lite.course.figures.style import Drawing

__all__ = ["Drawing", "block_diagram", "low_rank_diagram", "map_table", "mask_table", "scale_table", "unet_diagram"]
