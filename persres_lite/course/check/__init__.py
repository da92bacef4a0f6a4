"""Checks of the reader's answers: ``check.iou(my_function)`` says what is wrong, or prints ``Correct``.

One for each exercise. Nearly all are a right answer under a decorator that lists what it is tried on and the well-known
mistakes; the check takes the reader's function and compares. A wrong answer raises `Refused`, an AssertionError of one
sentence, which a notebook shows without a traceback; an answer that is still ``...`` is only remarked upon.

A folder and not one file, because a lesson's checks are read beside the lesson: `diffusion` (notebooks 00, 01),
`residuals` (02, 03), `maps` (04, 05), `scores` (06), `own` (07), and `answers`, the mechanism.
"""

from persres_lite.course.check.diffusion import *  # noqa: F403
from persres_lite.course.check.maps import *  # noqa: F403
from persres_lite.course.check.own import *  # noqa: F403
from persres_lite.course.check.residuals import *  # noqa: F403
from persres_lite.course.check.scores import *  # noqa: F403
