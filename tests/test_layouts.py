"""The lessons run on the layouts of Stable Diffusion 1, 2 and XL with random weights, and their exercises are proved.

Two run with every other test. The rest, half an hour of work, is for `make rehearse`.
"""

from __future__ import annotations

import pytest

from notebooks.tools import exercises, gpu, notebooks, runs
from tests.notebook_example import run_on

BF16 = """
import torch
from persres_lite import bases
bases._usual_dtype = lambda *_: torch.bfloat16  # as on a GPU
"""

FEWER_PICTURES = {"[:24]": "[:8]", "[:12]": "[:4]"}
"""In the sources of lesson 04, whose many pictures serve its scores and not what is tried here."""

# XL: two text encoders, an empty prompt of zeros, several layers under one projection, another sampler's noise.
# SD 2 in half precision: linear projections, prediction of v.
RUNS = [(path.name[:2], "sd1", "") for path in notebooks.notebook_paths()]
RUNS += [(number, "sdxl", "") for number in ("01", "02", "03", "04", "05")]
RUNS += [("02", "sd1", BF16), ("02", "sd2", BF16), ("04", "sd2", BF16)]
QUICK = [("01", "sd1", ""), ("01", "sdxl", "")]


def named(number, kind, first):
    mark = [] if (number, kind, first) in QUICK else [pytest.mark.slow]
    return pytest.param(number, kind, first, marks=mark, id=f"{number}-{kind}{'-bf16' * bool(first)}")


@pytest.mark.parametrize(("number", "kind", "first"), [named(*run) for run in RUNS])
def test_it_runs_prints_what_holds_on_every_base_and_its_exercises_prove_themselves(number, kind, first, tmp_path):
    """On SD 1 each exercise is followed by its wrong answers, which must be refused, and by its solutions."""
    (path,) = notebooks.notebook_paths(names=[number])
    saved = notebooks.read(path)
    book = exercises.with_solutions(saved) if (kind, first) == ("sd1", "") else notebooks.read(path)
    for cell in book.cells:
        for many, few in FEWER_PICTURES.items():
            cell.source = cell.source.replace(many, few)
    done = run_on(kind, book, tmp_path, first)
    assert exercises.unproved(done) == []
    assert gpu.failures(saved, done, gpu.EVERY_BASE.get(number, ())) == []
    assert f"Base: {kind}" in runs.printed(runs.code_cells(done)[0])
