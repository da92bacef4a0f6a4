"""`make gpu`, on a base of Stable Diffusion's shape: what it compares, keeps, measures and reports, also after a
failure.
"""

from __future__ import annotations

import json

import nbformat
import pytest
import yaml
from nbformat import v4

from data.make import runs
from notebooks.tools import gpu, notebooks
from tests.tiny import tiny_pipeline

BF16 = """
import torch

from persres_lite import bases

bases._usual_dtype = lambda *_: torch.bfloat16  # as on a GPU
"""


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd-1.4-shaped"
    tiny_pipeline("sd1").save_pretrained(folder)
    return folder


def cell(source, id, saved="", tags=()):
    made = v4.new_code_cell(source, id=id, execution_count=1, metadata={"tags": list(tags)})
    made.outputs = [v4.new_output("stream", text=saved)] if saved else []
    return made


def book(*cells):
    spec = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return v4.new_notebook(cells=[*cells], metadata=spec)


CHECKED = ["nbval-check-output"]


def small(tmp_path):
    """Two notebooks: in the first a cell fails, and a checked output is another one than was saved."""
    opening = [v4.new_markdown_cell("x", id="a"), v4.new_markdown_cell("y", id="b")]
    cells = [
        cell("print(1 + 1)", "c0", "2\n", CHECKED),
        cell("print('Toybox only')", "c1", "something else\n", CHECKED),
        cell("print(3)", "c2", "4\n", CHECKED),
        cell("1 / 0", "c3"),
        cell("print('after it')", "c4"),
    ]
    for name, rest in {"05_one": cells, "06_two": cells[:1]}.items():
        nbformat.write(book(*opening, *rest), tmp_path / f"{name}.ipynb")
    return [tmp_path / "05_one.ipynb", tmp_path / "06_two.ipynb"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    before, gpu.EVERY_BASE = gpu.EVERY_BASE, {"05": ("c0", "c2")}
    try:
        return folder, gpu.run(small(folder), "toybox", folder / "build")
    finally:
        gpu.EVERY_BASE = before


def test_it_goes_on_after_a_failure_and_says_what_failed(ran):
    _, results = ran
    one, two = results["notebooks"]["05_one"], results["notebooks"]["06_two"]
    assert [name for name, _ in one["failed"]] == ["c2", "c3"] and two["failed"] == []
    assert one["failed"][1][1] == "ZeroDivisionError: division by zero"
    assert (one["cells"], one["compared"]) == (5, 2) and (two["cells"], two["compared"]) == (1, 0)


def test_it_keeps_the_executed_notebooks_what_they_printed_and_their_memory(ran):
    folder, results = ran
    one = results["notebooks"]["05_one"]
    assert one["printed"] == {"c0": "2\n", "c1": "Toybox only\n", "c2": "3\n", "c4": "after it\n"}
    assert 0.01 < one["peak_gb"] < 20
    executed = notebooks.read(folder / "build" / "05_one.ipynb")
    assert [each.id for each in executed.cells[2:]] == ["c0", "c1", "c2", "c3", "c4"], "the measuring cell is gone"
    assert executed.cells[3].outputs[0].text == "Toybox only\n"
    assert executed.cells[5].outputs[0].ename == "ZeroDivisionError"
    assert json.loads((folder / "build" / "results.json").read_text()) == results
    report = (folder / "build" / "results.md").read_text()
    assert "- **failed**, cell c3: ZeroDivisionError" in report and "\nToybox only\n" in report


def test_outputs_of_toybox_are_not_compared_and_the_others_are_there():
    paths = {path.name[:2]: path for path in notebooks.notebook_paths()}
    assert gpu.EVERY_BASE.keys() <= paths.keys()
    for number, path in paths.items():
        kept = {
            each.id
            for each in gpu.copy_for(notebooks.read(path), number).cells
            if gpu.CHECKED in each.metadata.get("tags", [])
        }
        assert kept == set(gpu.EVERY_BASE.get(number, ())), f"{number}: a cell was renamed"


# The whole series takes minutes, and test_notebooks.py runs it on this layout. Here 02, which has the most to compare.
@pytest.mark.parametrize("first", ["", BF16], ids=["fp32", "bf16"])
def test_a_lesson_on_stable_diffusions_layout(first, stable_diffusion, tmp_path):
    path = next(path for path in notebooks.notebook_paths() if path.name.startswith("02"))
    few = "from persres_lite.bases import BASES\nBASES['sd-1.4'].recipe['steps'] = 2\n"
    few += "BASES['sd-1.4'].sampling['num_inference_steps'] = 2\n"
    results = gpu.run([path], str(stable_diffusion), tmp_path, few + first, {"HF_HUB_OFFLINE": "1"})
    (found,) = results["notebooks"].values()
    assert results["base"] == "sd-1.4-shaped"
    assert found["failed"] == [] and found["compared"] == len(gpu.EVERY_BASE["02"]) > 0


def test_without_a_gpu_it_is_one_sentence(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["run"]) == 1
    assert capsys.readouterr().out.strip().startswith("make gpu needs a GPU that torch can use")


def test_the_readmes_column(ran, tmp_path):
    folder, results = ran
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- notebooks: begin -->\n<!-- notebooks: end -->\n")
    opening = v4.new_markdown_cell("# 06 · Two\n\n**Aim:** see.")
    measured = {"persres": {"seconds": 30, "peak_gb": 0.5, "machine": "a box"}}
    nbformat.write(v4.new_notebook(cells=[opening], metadata=measured), tmp_path / "notebooks" / "06_two.ipynb")
    with pytest.raises(ValueError, match="no whole run on a GPU .05_one, 06_two.: mend"):
        gpu.take_over(folder / "build" / "results.json", tmp_path)
    results = {**results, "notebooks": {"06_two": results["notebooks"]["06_two"] | {"gpu_gb": 3.5, "minutes": 4.2}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    gpu.take_over(tmp_path / "results.json", tmp_path)
    table = (tmp_path / "README.md").read_text().splitlines()
    assert table[1].endswith("| memory | toybox on a GPU |") and table[2].count("---") == 5
    assert table[3].endswith("| 0.5 | 0.5 GB | 4.2 minutes, 3.5 GB |")
    assert f"the last column on {results['machine']}" in table[5]
    assert "printed" not in (tmp_path / runs.GPU_RESULTS).read_text()


def test_the_workflow_keeps_what_a_run_left_and_runs_both_parts():
    job = yaml.safe_load((notebooks.ROOT / ".github/workflows/gpu.yml").read_text())["jobs"]["notebooks"]
    steps = job["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make gpu", ".venv/bin/python -m pytest"]
    assert steps[2]["if"] == "success() || failure()" and steps[3]["if"] == "always()"
    assert steps[3]["with"]["path"] == f"build/{job['env']['PERSRES_BASE']}"


def test_minutes_on_a_t4_are_counted(tmp_path):
    source = (
        "import torch\nfrom persres_lite import load_base\nbase = load_base(BASE)\n"
        "base('a cat', num_inference_steps=3, guidance_scale=7.5)\n"
        "text = torch.zeros(4, 77, base.unet.config.cross_attention_dim)\n"
        "base.unet(torch.zeros(2, 4, 8, 8), 5, text[:2])\n"  # by hand: nothing in it learns
        "base.unet(torch.zeros(4, 4, 8, 8), 5, text.requires_grad_())"
    )
    opening = [v4.new_markdown_cell("x", id="a"), v4.new_markdown_cell("y", id="b")]
    first = (
        f"import os\nfrom pathlib import Path\nBASE, HOME = os.environ['PERSRES_BASE'], Path({str(notebooks.ROOT)!r})"
    )
    nbformat.write(book(*opening, cell(first, "c0"), cell(source, "c1")), tmp_path / "05_one.ipynb")
    found = gpu.estimate([tmp_path / "05_one.ipynb"], tmp_path)
    assert found == {"05_one": {"sampling": 8, "training": 4, "minutes": 0.0}}
    assert "| 05_one | 8 | 4 | 0.0 |" in gpu.estimate_table(found)
