"""The commands that keep the notebooks whole: stamping, running in place, the exercises, the table, the links."""

from __future__ import annotations

import signal

import nbformat
import pytest

from notebooks.tools import exercises, links, notebooks, runs
from tests.notebook_example import ADDRESS, NAME, SAYS, WRONG, example

FORK = "https://github.com/someone/fork"


def exercise_cell(made):
    return next(cell for cell in made.cells if "exercise" in cell.metadata.get("tags", []))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The example, run for saving in a fresh kernel, with a progress bar, a widget, and two prints in one cell."""
    made = example(first_cell="print('a')\nprint('b')\nprint('0%|   | 0/2\\r100%|###| 2/2', file=sys.stderr)")
    cell = nbformat.v4.new_code_cell(
        "from PIL import Image\nfrom persres_lite.course import explorers, figures\n"
        "pictures = {k: {'LAG': Image.new('RGB', (64, 64))} for k in (0.0, 1.0)}\n"
        "display(figures.scale_table(pictures))\nexplorers.compare(pictures)"
    )
    made.cells.insert(7, cell)
    made.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    before = nbformat.writes(made)
    done = runs.run_for_saving(made, tmp_path_factory.mktemp("notebooks"))
    assert nbformat.writes(made) == before, "its argument is left alone"
    return done


def test_run_saves_tidy_outputs_in_order_and_measures(ran):
    cells = runs.code_cells(ran)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    measured = ran.metadata["persres"]
    assert measured["seconds"] > 0 and 0.05 < measured["peak_gb"] < 20 and "cores of" in measured["machine"]
    opening = next(cell.source for cell in ran.cells if runs.TIME_LINE in cell.source)
    assert f"{runs.TIME_LINE} {runs.time_and_memory(ran)}." in opening and "not measured" not in opening
    assert [(output.name, output.text) for output in cells[0].outputs] == [("stdout", "a\nb\n")]  # and no progress bar
    still, widget = cells[-3].outputs
    assert "widgets" not in ran.metadata and "<img" in still.data["text/html"]
    assert list(widget.data) == ["text/plain"] and "a widget" in widget.data["text/plain"]


def test_other_pictures_and_large_files_are_refused():
    made = example()
    output = nbformat.v4.new_output("display_data", data={"image/svg+xml": "<svg/>"})
    runs.code_cells(made)[0].outputs = [output]
    with pytest.raises(ValueError, match="only PNG and JPEG"):
        runs.refuse(made)
    output.data = {"image/png": "A" * 3_000_001}
    with pytest.raises(ValueError, match="the largest output .* is that of cell 2"):
        runs.refuse(made)


def test_exercises_are_found_with_all_their_parts():
    (found,) = exercises.exercises(example())
    assert (found.number, found.check) == ("4.1", "check.merge(merge)")
    assert found.solution == "def merge(W, A, B, scale):\n    return W + scale * (A @ B)[:, :, None, None]"
    assert found.wrong == ((WRONG, SAYS),) and found.right == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda text, cell: text.update(source=text.source.replace("**Difficulty:** ●○○", "")),
        lambda text, cell: text.update(source=text.source.replace("<summary>Hint</summary>", "")),
        lambda text, cell: text.update(source=text.source.replace("```python", "```")),
        lambda text, cell: cell.metadata.tags.clear(),
        lambda text, cell: cell.metadata.persres.wrong.clear(),
        lambda text, cell: cell.update(source="merge = ..."),
    ],
)
def test_an_exercise_without_one_of_its_parts_is_refused(change):
    made = example()
    change(next(cell for cell in made.cells if cell.source.startswith("### Exercise")), exercise_cell(made))
    with pytest.raises(ValueError, match="Exercise 4.1: .* needs .*hint.*solution.*wrong answers"):
        exercises.exercises(made)


def test_an_accepted_wrong_answer_and_a_failing_solution_are_found():
    """Without a kernel: the cells are plain Python. That right ones pass, the lessons themselves show."""
    made = example(first_cell="pass")
    stub = exercise_cell(made)
    stub.metadata.persres.wrong[0]["code"] = WRONG.replace("(A @ B)", "(scale * A @ B)")
    refusing, solving = runs.code_cells(exercises.with_solutions(made))[-2:]
    names: dict = {}
    exec("from persres_lite.course import check", names)
    with pytest.raises(RuntimeError, match="exercise 4.1: wrong answer 1 was accepted"):
        exec(refusing.source, names)
    found = exercises.unproved(nbformat.v4.new_notebook(cells=[stub, solving]))
    assert ["exercise cell" in found[0], "solution of exercise 4.1" in found[1]] == [True, True]


def test_stamping_is_complete_and_settles():
    made = example()
    assert made.cells[0].source == notebooks.badge(ADDRESS, NAME)
    assert f"/github/persres-lite/persres-lite/blob/main/notebooks/{NAME}" in made.cells[0].source
    assert runs.code_cells(made)[0].source == notebooks.first_cell(ADDRESS) and ADDRESS in notebooks.first_cell(ADDRESS)
    assert notebooks.stamped(made, NAME, ADDRESS) == made
    forked = notebooks.stamped(made, NAME, FORK)
    assert "persres-lite/persres-lite" not in nbformat.writes(forked) and len(forked.cells) == len(made.cells)


def test_restamping_a_text_replaces_the_address_everywhere():
    text = (
        f"git clone --depth 1 {ADDRESS}\ncd persres-lite\n[b]({ADDRESS}/issues) {ADDRESS}-extra\n"
        "[a](https://colab.research.google.com/github/persres-lite/persres-lite/blob/main/notebooks/00.ipynb)\n"
    )
    new = notebooks.restamp(text, FORK)
    assert new.count("someone/fork") == 3 and "persres-lite/persres-lite-extra" in new and "cd persres-lite\n" in new
    assert notebooks.restamp("no clone line", ADDRESS) == "no clone line"


def test_a_signal_ends_a_run_and_is_not_said_to_be_a_dead_kernel(tmp_path):
    ending = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(ending)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt, match="ended by a signal"):
            runs.execute(book, tmp_path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_table_is_made_from_the_notebooks(ran, tmp_path):
    rows = notebooks.table([(tmp_path / NAME, ran)]).splitlines()
    measured = ran.metadata["persres"]
    about = f"{measured['seconds'] / 60:.1f} | {measured['peak_gb']} GB"
    assert rows[2] == f"| [04 · An example](notebooks/{NAME}) | see that the tools work. | {about} |"
    assert measured["machine"] in rows[-1]
    text = "before\n<!-- it: begin -->\nold\n<!-- it: end -->\nafter"
    assert notebooks.between(text, "it", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="one line <!-- notebooks: begin -->"):
        notebooks.between("nothing", "notebooks", "new")


@pytest.fixture
def project(tmp_path):
    """A folder with one notebook, a glossary and a picture."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "notebooks" / "glossary.md").write_text("# Glossary\n\n### latent space\n\n<a id='eps'></a>\n")
    nbformat.write(example(), tmp_path / "notebooks" / NAME)
    return tmp_path


def test_links_are_checked_offline(project):
    good = (
        "[a](notebooks/glossary.md#latent-space) [b](notebooks/glossary.md#eps) ![c](picture.png) [d](#own-heading)\n"
        f"[![badge](picture.png)]({ADDRESS}/blob/main/notebooks/{NAME}) [e](https://example.org) `[f](nothing.md)`\n"
        "```\n[g](nothing.md)\n```\n## Own heading\n"
    )
    (project / "README.md").write_text(good)
    assert links.broken(project, ADDRESS) == []
    badge = f"[![c](gone.png)]({ADDRESS}/blob/main/notebooks/99.ipynb)"
    (project / "README.md").write_text(f"[a](nothing.md) [b](notebooks/glossary.md#other) {badge} <img src='x.png'>")
    assert links.broken(project, ADDRESS) == [
        "README.md: nothing.md does not exist",
        "README.md: notebooks/glossary.md#other has no such anchor",
        "README.md: gone.png does not exist",
        f"README.md: {ADDRESS}/blob/main/notebooks/99.ipynb is not a file of this project",
        "README.md: x.png does not exist",
    ]


def test_the_commands_write_files_and_say_what_is_wrong(project, monkeypatch, capsys):
    (project / "pyproject.toml").write_text('[project.urls]\nRepository = "https://example.org/a/b"\n')
    with pytest.raises(ValueError, match="Repository"):
        notebooks.public_address(project)
    (project / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{FORK}.git"\n')
    assert notebooks.public_address(project) == FORK
    (project / "README.md").write_text(f"git clone {ADDRESS}\n<!-- notebooks: begin -->\n<!-- notebooks: end -->\n")
    monkeypatch.setattr(notebooks, "ROOT", project)
    monkeypatch.setattr(notebooks, "first_cell", lambda address: f"# {address}")
    assert notebooks.main(["check"]) == 1
    assert f"notebooks/{NAME}: run stamp" in capsys.readouterr().out
    assert [notebooks.main([command]) for command in ("stamp", "table", "check")] == [0, 0, 0]
    text = (project / "README.md").read_text()
    assert "someone/fork" in text and "04 · An example" in text
    with pytest.raises(FileNotFoundError, match="No notebook begins with '07'"):
        notebooks.main(["run", "07"])
