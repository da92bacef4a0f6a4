"""The lessons run on the layouts of Stable Diffusion 1, 2 and XL with random weights, in whole and half precision, and
their exercises are proved.

Two run with every other test. The rest, most of an hour of work, is for `make rehearse`.
"""

from __future__ import annotations

import pytest

from notebooks.tools import exercises, gpu, notebooks, runs
from tests.notebook_example import run_on

HALF = """
import torch
from persres_lite import bases
bases._usual_dtype = lambda *_: torch.{}  # as on a GPU
"""

FEWER_PICTURES = {"[:24]": "[:8]", "[:12]": "[:4]"}
"""In the sources of lesson 04, whose many pictures serve its scores and not what is tried here."""

# XL: two text encoders, an empty prompt of zeros, several layers under one projection, another sampler's noise.
# SD 2 in half precision: linear projections, prediction of v.
LESSONS = [path.name[:2] for path in notebooks.notebook_paths()]
RUNS = [(number, "sd1", kind) for kind in ("", "bfloat16", "float16") for number in LESSONS]
RUNS += [(number, "sdxl", "") for number in ("01", "02", "03", "04", "05")]
RUNS += [("02", "sd2", "bfloat16"), ("04", "sd2", "bfloat16")]
QUICK = [("01", "sd1", ""), ("01", "sdxl", "")]


def named(*run):
    return pytest.param(*run, marks=[] if run in QUICK else [pytest.mark.slow], id="-".join(filter(None, run)))


@pytest.mark.parametrize(("number", "kind", "precision"), [named(*run) for run in RUNS])
def test_it_runs_prints_what_holds_on_every_base_and_its_exercises_prove_themselves(number, kind, precision, tmp_path):
    """On SD 1 each exercise is followed by its wrong answers, which must be refused, and by its solutions."""
    (path,) = notebooks.notebook_paths(names=[number])
    saved = notebooks.read(path)
    book = exercises.with_solutions(saved) if (kind, precision) == ("sd1", "") else notebooks.read(path)
    for cell in book.cells:
        for many, few in FEWER_PICTURES.items():
            cell.source = cell.source.replace(many, few)
    done = run_on(kind, book, tmp_path, precision and HALF.format(precision))
    assert exercises.unproved(done) == []
    assert gpu.failures(saved, done, gpu.EVERY_BASE.get(number, ())) == []
    assert f"Base: {kind}" in runs.printed(runs.code_cells(done)[0])
