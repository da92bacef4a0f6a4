"""`make gpu`: what it compares, keeps, measures and reports, also after a failure."""

from __future__ import annotations

import json

import nbformat
import pytest
from nbformat import v4

from notebooks.tools import gpu, notebooks


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


def test_it_goes_on_after_a_failure_says_what_failed_and_keeps_the_rest(ran):
    folder, results = ran
    one, two = results["notebooks"]["05_one"], results["notebooks"]["06_two"]
    assert [name for name, _ in one["failed"]] == ["c2", "c3"] and two["failed"] == []
    assert one["failed"][1][1] == "ZeroDivisionError: division by zero"
    executed = notebooks.read(folder / "build" / "05_one.ipynb")
    assert [each.id for each in executed.cells[2:]] == ["c0", "c1", "c2", "c3", "c4"], "the measuring cell is gone"
    assert executed.cells[-1].outputs[0].text == "after it\n"
    assert json.loads((folder / "build" / "results.json").read_text()) == json.loads(json.dumps(results))


def test_what_holds_on_every_base_is_checked_on_toybox_too():
    paths = {path.name[:2]: path for path in notebooks.notebook_paths()}
    for number, compared in gpu.EVERY_BASE.items():
        cells = {each.id: each for each in notebooks.read(paths[number]).cells}
        assert all("nbval-check-output" in cells[name].metadata.tags for name in compared), f"{number}: renamed?"


def test_without_a_gpu_it_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    assert capsys.readouterr().out.strip().startswith("make gpu needs a GPU that torch can use")
