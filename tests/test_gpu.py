"""`make gpu`, on a base of Stable Diffusion's shape: what it compares, keeps, measures and reports, also after a
failure.
"""

from __future__ import annotations

import json

import nbformat
import pytest
from nbformat import v4

from data.make import runs
from notebooks.tools import gpu, notebooks
from tests.tiny import tiny_pipeline

BF16 = """
import torch

from persres_lite import bases

bases._usual_dtype = lambda *_: torch.bfloat16  # as on a GPU
"""


def book(path, *sources, saved=()):
    """A notebook of two texts and code cells c0, c1, …, with what they are said to have printed."""
    spec = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [v4.new_markdown_cell(text, id=text) for text in "xy"]
    for number, source in enumerate(sources):
        cells.append(v4.new_code_cell(source, id=f"c{number}", execution_count=1))
        cells[-1].outputs = [v4.new_output("stream", text=text) for text in saved[number : number + 1]]
    nbformat.write(v4.new_notebook(cells=cells, metadata=spec), path)
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Two notebooks: in the first a cell fails, and a checked output is another one than was saved."""
    folder = tmp_path_factory.mktemp("gpu")
    sources = ["print(1 + 1)", "print('Toybox only')", "print(3)", "1 / 0", "print('after it')"]
    one = book(folder / "05_one.ipynb", *sources, saved=["2\n", "something else\n", "4\n"])
    two = book(folder / "06_two.ipynb", sources[0], saved=["2\n"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "EVERY_BASE", {"05": ("c0", "c2")})
        return folder, gpu.run([one, two], "toybox", folder / "build")


def test_it_goes_on_after_a_failure_and_says_what_failed(ran):
    folder, results = ran
    one, two = results["notebooks"]["05_one"], results["notebooks"]["06_two"]
    assert [name for name, _ in one["failed"]] == ["c2", "c3"] and two["failed"] == []
    assert one["failed"][1][1] == "ZeroDivisionError: division by zero"
    assert (one["cells"], one["compared"]) == (5, 2) and (two["cells"], two["compared"]) == (1, 0)
    report = (folder / "build" / "results.md").read_text()
    assert "- **failed**, cell c3: ZeroDivisionError" in report and "\nToybox only\n" in report


def test_it_keeps_the_executed_notebooks_what_they_printed_and_their_memory(ran):
    folder, results = ran
    one = results["notebooks"]["05_one"]
    assert one["printed"] == {"c0": "2\n", "c1": "Toybox only\n", "c2": "3\n", "c4": "after it\n"}
    assert 0.01 < one["peak_gb"] < 20
    executed = notebooks.read(folder / "build" / "05_one.ipynb")
    assert [each.id for each in executed.cells[2:]] == ["c0", "c1", "c2", "c3", "c4"], "the measuring cell is gone"
    assert json.loads((folder / "build" / "results.json").read_text()) == results


def test_what_holds_on_every_base_is_checked_on_toybox_too():
    paths = {path.name[:2]: path for path in notebooks.notebook_paths()}
    for number, compared in gpu.EVERY_BASE.items():
        cells = {each.id: each for each in notebooks.read(paths[number]).cells}
        assert all("nbval-check-output" in cells[name].metadata.tags for name in compared), f"{number}: renamed?"


# test_notebooks.py runs the series on this layout. Here what there is to compare, in half precision as on a GPU.
def test_a_lesson_on_stable_diffusions_layout_in_half_precision(tmp_path):
    tiny_pipeline("sd1").save_pretrained(tmp_path / "sd-1.4-shaped")
    few = "from persres_lite.bases import BASES\nBASES['sd-1.4'].recipe['steps'] = 2\n"
    few += "BASES['sd-1.4'].sampling['num_inference_steps'] = 2\n"
    paths = notebooks.notebook_paths(names=["02"])
    env = {"HF_HUB_OFFLINE": "1"}
    results = gpu.run(paths, str(tmp_path / "sd-1.4-shaped"), tmp_path / "build", few + BF16, env)
    (found,) = results["notebooks"].values()
    assert results["base"] == "sd-1.4-shaped"
    assert found["failed"] == [] and found["compared"] == len(gpu.EVERY_BASE["02"]) > 0


def test_without_a_gpu_it_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["run"]) == 1
    assert capsys.readouterr().out.strip().startswith("make gpu needs a GPU that torch can use")


def test_the_readmes_column(ran, tmp_path):
    folder, results = ran
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("<!-- notebooks: begin -->\n<!-- notebooks: end -->\n")
    opening = v4.new_markdown_cell("# 06 · Two\n\n**Aim:** see.")
    measured = {"persres": {"seconds": 30, "peak_gb": 0.5, "machine": "a box"}}
    nbformat.write(v4.new_notebook(cells=[opening], metadata=measured), tmp_path / "notebooks" / "06_two.ipynb")
    with pytest.raises(ValueError, match="05_one, 06_two"):
        gpu.take_over(folder / "build" / "results.json", tmp_path)
    results = {**results, "notebooks": {"06_two": results["notebooks"]["06_two"] | {"gpu_gb": 3.5, "minutes": 4.2}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    gpu.take_over(tmp_path / "results.json", tmp_path)
    table = (tmp_path / "README.md").read_text().splitlines()
    assert table[1].endswith("| memory | toybox on a GPU |") and table[2].count("---") == 5
    assert table[3].endswith("| 0.5 | 0.5 GB | 4.2 minutes, 3.5 GB |")
    assert f"the last column on {results['machine']}" in table[5]
    assert "printed" not in (tmp_path / runs.GPU_RESULTS).read_text()


def test_minutes_on_a_t4_are_counted(tmp_path):
    source = (
        "import torch\nfrom persres_lite import load_base\nbase = load_base(BASE)\n"
        "base('a cat', num_inference_steps=3, guidance_scale=7.5)\n"
        "text = torch.zeros(4, 77, base.unet.config.cross_attention_dim)\n"
        "base.unet(torch.zeros(2, 4, 8, 8), 5, text[:2])\n"  # by hand: nothing in it learns
        "base.unet(torch.zeros(4, 4, 8, 8), 5, text.requires_grad_())"
    )
    home = (
        f"import os, sys\nfrom pathlib import Path\nBASE, HOME = os.environ['PERSRES_BASE'], Path({str(runs.ROOT)!r})"
    )
    found = gpu.estimate([book(tmp_path / "05_one.ipynb", f"{home}\nsys.path[:0] = [str(HOME)]", source)], tmp_path)
    assert found == {"05_one": {"sampling": 8, "training": 4, "minutes": 0.0}}
    assert "| 05_one | 8 | 4 | 0.0 |" in gpu.estimate_table(found)
