"""The lessons that look into a layer or make noise by hand run on the other kinds of bases, too."""

from __future__ import annotations

import pytest

from notebooks.tools import notebooks
from tests.notebook_example import run_on

BF16 = """
import functools, torch, persres_lite
persres_lite.load_base = functools.partial(persres_lite.load_base, dtype=torch.bfloat16)
"""

FEWER_PICTURES = {"[:24]": "[:8]", "[:12]": "[:4]"}
"""In the sources of lesson 04, whose many pictures serve its scores and not what is tried here."""

# XL: two text encoders, an empty prompt of zeros, several layers under one projection, another sampler's noise.
# SD 2 in half precision: linear projections, prediction of v.
RUNS = [(number, "sdxl", "") for number in ("01", "02", "03", "04", "05")]
RUNS += [(number, "sd2", BF16) for number in ("02", "04")]


@pytest.mark.parametrize(("number", "kind", "first"), RUNS, ids=[f"{number}-{kind}" for number, kind, _ in RUNS])
def test_it_runs_on_other_layouts(number, kind, first, tmp_path):
    (path,) = notebooks.notebook_paths(names=[number])
    book = notebooks.read(path)
    for cell in book.cells:
        for many, few in FEWER_PICTURES.items():
            cell.source = cell.source.replace(many, few)
    run_on(kind, book, tmp_path, first)
