"""The commands that keep the notebooks whole: stamping, running in place, the exercises, the table, the links."""

from __future__ import annotations

import nbformat
import pytest

from data.make import runs
from notebooks.tools import exercises, links, notebooks
from tests.notebook_example import ADDRESS, NAME, WRONG, example


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The example, run for saving in a fresh kernel, with a progress bar, a widget, and two prints in one cell."""
    made = example(first_cell="print('a')\nprint('b')\nprint('0%|   | 0/2\\r100%|###| 2/2', file=sys.stderr)")
    cell = nbformat.v4.new_code_cell(
        "from PIL import Image\nfrom persres_lite.course import explorers, figures\n"
        "pictures = {0.0: {'LAG': Image.new('RGB', (64, 64))}, 1.0: {'LAG': Image.new('RGB', (64, 64), 'red')}}\n"
        "explorers.compare(pictures)"
    )
    still = nbformat.v4.new_code_cell("figures.scale_table(pictures)")
    made.cells[7:7] = [cell, still]
    made.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    return runs.run(made, tmp_path_factory.mktemp("notebooks"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_run_saves_outputs_in_order_and_measures(ran):
    assert [cell.execution_count for cell in code_cells(ran)] == list(range(1, len(code_cells(ran)) + 1))
    measured = ran.metadata["persres"]
    assert 0 < measured["seconds"] < 300 and 0.05 < measured["peak_gb"] < 20
    assert "cores of" in measured["machine"]
    opening = next(cell.source for cell in ran.cells if runs.TIME_LINE in cell.source)
    assert f"{runs.TIME_LINE} {runs.time_and_memory(ran)}." in opening
    assert "not measured" not in opening


def test_run_tidies_outputs(ran):
    first = code_cells(ran)[0].outputs
    assert [(output.name, output.text) for output in first] == [
        ("stdout", "a\nb\n")
    ]  # joined, the progress bar is gone
    widget, still = code_cells(ran)[-4].outputs, code_cells(ran)[-3].outputs
    assert "widgets" not in ran.metadata
    assert list(widget[0].data) == ["text/plain"] and "a widget" in widget[0].data["text/plain"]
    assert "image/png" in still[0].data


def test_run_leaves_its_argument_alone(tmp_path):
    made = example(first_cell="1 + 1")
    before = nbformat.writes(made)
    runs.execute(made, tmp_path)
    assert nbformat.writes(made) == before


def test_other_pictures_and_large_files_are_refused():
    made = example()
    output = nbformat.v4.new_output("display_data", data={"image/svg+xml": "<svg/>"})
    code_cells(made)[0].outputs = [output]
    with pytest.raises(ValueError, match="only PNG and JPEG"):
        runs.refuse(made)
    output.data = {"image/png": "A" * 1_000_001}
    with pytest.raises(ValueError, match="the largest output .* is that of cell 2"):
        runs.refuse(made)


def test_exercises_are_found_with_all_their_parts():
    (found,) = exercises.exercises(example())
    assert (found.number, found.check) == ("4.1", "check.merge(merge)")
    assert found.solution == "def merge(W, A, B, scale):\n    return W + scale * (A @ B)[:, :, None, None]"
    assert found.wrong == ((WRONG, ""),) and found.right == ()
    assert exercises.unproven(found) == [
        "exercise 4.1 needs 3 more wrong answers with the sentence that refuses them",
        "exercise 4.1 needs 2 more right answers",
    ]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("**Difficulty:** ●○○", "", "Difficulty"),
        ("<summary>Hint</summary>", "", "hint"),
        ("```python", "```", "folded solution"),
        ("### Exercise 4.1", "### Exercise 4.1", None),
    ],
)
def test_an_exercise_without_one_of_its_parts_is_refused(old, new, sentence):
    made = example()
    cell = next(cell for cell in made.cells if cell.source.startswith("### Exercise"))
    cell.source = cell.source.replace(old, new)
    if sentence is None:
        assert exercises.exercises(made)
        return
    with pytest.raises(ValueError, match=f"4.1.*{sentence}"):
        exercises.exercises(made)


def test_an_exercise_needs_its_cell_its_check_and_a_wrong_answer():
    for change, sentence in (
        (lambda cell: cell.metadata.tags.clear(), "tag 'exercise'"),
        (lambda cell: cell.metadata.persres.wrong.clear(), "wrong answer"),
        (lambda cell: cell.update(source="merge = ..."), "check"),
    ):
        made = example()
        change(next(cell for cell in made.cells if "exercise" in cell.metadata.get("tags", [])))
        with pytest.raises(ValueError, match=sentence):
            exercises.exercises(made)


def test_solutions_pass_and_wrong_answers_are_refused(tmp_path):
    proved = exercises.with_solutions(example(first_cell="pass"))
    done = runs.execute(proved, tmp_path)
    assert exercises.unproved(done) == []
    printed = [output.text for cell in code_cells(done) for output in cell.outputs]
    assert any(text.startswith("Refused: ") and "the scale is missing" in text for text in printed)


def test_an_accepted_wrong_answer_and_a_failing_solution_are_found():
    """Without a kernel: the cells are plain Python."""
    made = example(first_cell="pass")
    stub = next(cell for cell in made.cells if "exercise" in cell.metadata.get("tags", []))
    stub.metadata.persres.wrong = ["def merge(W, A, B, scale):\n    return W + (scale * A @ B)[:, :, None, None]"]
    refusing, solving = code_cells(exercises.with_solutions(made))[-2:]
    names: dict = {}
    exec("from persres_lite.course import check", names)
    with pytest.raises(RuntimeError, match="exercise 4.1: wrong answer 1 was accepted"):
        exec(refusing.source, names)
    silent = nbformat.v4.new_notebook(cells=[stub, solving])
    assert [problem.split(" does")[0] for problem in exercises.unproved(silent)] == [
        "the exercise cell 'def merge(W, A, B, scale):'",
        "the solution of exercise 4.1",
    ]


def test_stamping_is_complete_and_settles():
    made = example()
    assert made.cells[0].source == notebooks.badge(ADDRESS, NAME)
    assert (
        "colab.research.google.com/github/persres-lite/persres-lite/blob/main/notebooks/04_example.ipynb"
        in made.cells[0].source
    )
    assert code_cells(made)[0].source == notebooks.first_cell(ADDRESS)
    assert notebooks.stamped(made, NAME, ADDRESS) == made
    forked = notebooks.stamped(made, NAME, "https://github.com/someone/fork")
    assert "persres-lite/persres-lite" not in nbformat.writes(forked)
    assert len(forked.cells) == len(made.cells)


def test_restamping_a_text_replaces_the_address_everywhere():
    text = (
        "git clone https://github.com/persres-lite/persres-lite\ncd persres-lite\n"
        "[a](https://colab.research.google.com/github/persres-lite/persres-lite/blob/main/notebooks/00.ipynb)\n"
        "[b](https://github.com/persres-lite/persres-lite/issues) https://github.com/persres-lite/persres-lite-extra"
    )
    new = notebooks.restamp(text, "https://github.com/someone/fork")
    assert new.count("someone/fork") == 3
    assert "persres-lite/persres-lite-extra" in new and "cd persres-lite\n" in new
    assert notebooks.restamp("no clone line", ADDRESS) == "no clone line"


def test_the_public_address_is_read_from_pyproject(tmp_path):
    assert notebooks.public_address().startswith("https://github.com/")
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/a/b.git"\n')
    assert notebooks.public_address(tmp_path) == "https://github.com/a/b"
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://example.org/a/b"\n')
    with pytest.raises(ValueError, match="Repository"):
        notebooks.public_address(tmp_path)


def test_the_table_is_made_from_the_notebooks(ran, tmp_path):
    rows = runs.table([(tmp_path / NAME, ran)]).splitlines()
    measured = ran.metadata["persres"]
    minutes = f"{measured['seconds'] / 60:.1f}"
    assert (
        rows[2]
        == f"| [04 · An example](notebooks/{NAME}) | see that the tools work. | {minutes} | {measured['peak_gb']} GB |"
    )
    assert measured["machine"] in rows[-1]
    assert "not run" in runs.table([(tmp_path / NAME, example())])
    text = "before\n<!-- it: begin -->\nold\n<!-- it: end -->\nafter"
    assert runs.between(text, "it", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="one line <!-- notebooks: begin -->"):
        runs.between("nothing", "notebooks", "new")


def test_links_are_checked_offline(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "notebooks" / "glossary.md").write_text("# Glossary\n\n### latent space\n\n<a id='eps'></a>\n")
    nbformat.write(example(), tmp_path / "notebooks" / NAME)
    good = (
        "[a](notebooks/glossary.md#latent-space) [b](notebooks/glossary.md#eps) ![c](picture.png) [d](#own-heading)\n"
        f"[![badge](picture.png)]({ADDRESS}/blob/main/notebooks/{NAME}) [e](https://example.org) `[f](nothing.md)`\n"
        "```\n[g](nothing.md)\n```\n## Own heading\n"
    )
    (tmp_path / "README.md").write_text(good)
    assert links.broken(tmp_path, ADDRESS) == []
    badge = f"[![c](gone.png)]({ADDRESS}/blob/main/notebooks/99.ipynb)"
    bad = f"[a](nothing.md) [b](notebooks/glossary.md#other) {badge} <img src='x.png'>"
    (tmp_path / "README.md").write_text(bad)
    assert links.broken(tmp_path, ADDRESS) == [
        "README.md: nothing.md does not exist",
        "README.md: notebooks/glossary.md#other has no such anchor",
        "README.md: gone.png does not exist",
        f"README.md: {ADDRESS}/blob/main/notebooks/99.ipynb is not a file of this project",
        "README.md: x.png does not exist",
    ]


def test_the_commands_write_files_and_say_what_is_wrong(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/someone/fork"\n')
    (tmp_path / "README.md").write_text(f"git clone {ADDRESS}\n<!-- notebooks: begin -->\n<!-- notebooks: end -->\n")
    (tmp_path / "notebooks" / "glossary.md").write_text("# Glossary")
    nbformat.write(example(), tmp_path / "notebooks" / NAME)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    assert notebooks.main(["check"]) == 1
    assert f"notebooks/{NAME}: run stamp" in capsys.readouterr().out
    assert notebooks.main(["stamp"]) == 0
    assert notebooks.main(["table"]) == 0
    assert notebooks.main([]) == 0
    assert "someone/fork" in (tmp_path / "README.md").read_text()
    assert "04 · An example" in (tmp_path / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="No notebook begins with '07'"):
        notebooks.main(["run", "07"])
