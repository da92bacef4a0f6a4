"""Every kind of figure that the notebooks draw, in one style. Functions return the figure; none opens a window or keeps
a state.

Each is a piece of HTML: pictures and plots with words for those who do not see them, the caption, which says what to
see, below as text. A folder and not one file: `style` (what shows itself, and its look), `pictures` (tables of
pictures, maps and masks over them, films), `plots` (curves, bars, dots with whiskers), `diagram`
(a U-Net drawn from its own structure, a low-rank residual to scale), `stills` (what an explorer shows, for readers who
cannot move its sliders).
"""

from persres_lite.course.figures.diagram import *  # noqa: F403
from persres_lite.course.figures.pictures import *  # noqa: F403
from persres_lite.course.figures.plots import *  # noqa: F403
from persres_lite.course.figures.stills import *  # noqa: F403
from persres_lite.course.figures.style import *  # noqa: F403
