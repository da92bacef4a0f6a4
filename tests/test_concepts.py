"""Concepts from folders, files and pictures, and what is said when something about them is wrong."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
from PIL import Image

from persres_lite import Concept, load_concept
from persres_lite.concepts import shipped_concepts
from persres_lite.support.paths import data_dir


@pytest.fixture
def folder(tmp_path):
    """Three pictures of different sizes with masks and a card, as the shipped concepts have them."""
    folder = tmp_path / "plum-cat"
    (folder / "masks").mkdir(parents=True)
    for number, width in ((0, 64), (1, 80), (10, 96)):
        Image.new("RGB", (width, 64), (number, 0, 0)).save(folder / f"{number}.jpg")
        mask = Image.new("L", (width, 64), 0)
        mask.paste(255, (width - 32, 16, width, 48))
        mask.save(folder / "masks" / f"{number}.png")
    card = {"name": "Plum cat", "macro_class": "cat", "token": "sks", "license": "MIT"}
    (folder / "concept.json").write_text(json.dumps(card))
    return folder


def test_a_folder_with_a_card(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its own card and masks are no files to be skipped
        concept = load_concept(folder)
    assert str(concept) == "sks cat"
    assert concept.words == ["sks", "cat"]
    assert concept.training_prompt == "a photo of a sks cat"
    assert f"a photo of a {concept} on the beach" == "a photo of a sks cat on the beach"
    assert (concept.name, concept.path, concept.info) == ("Plum cat", folder, {"license": "MIT"})
    assert [image.width for image in concept.images] == [64, 80, 96]
    assert [mask.getbbox() for mask in concept.masks] == [(w - 32, 16, w, 48) for w in (64, 80, 96)]


def test_arguments_go_before_the_card(folder):
    concept = load_concept(str(folder), macro_class=" teddy  bear ", token="zwx")
    assert str(concept) == "zwx teddy bear" and concept.words == ["zwx", "teddy bear"]


def test_pictures_without_a_card(folder):
    (folder / "concept.json").unlink()
    concept = load_concept(folder, "cat")
    assert (str(concept), concept.name) == ("sks cat", "plum-cat")
    for source in (sorted(folder.glob("*.jpg")), [Image.new("RGB", (64, 64))], folder / "0.jpg"):
        concept = load_concept(source, "cat")
        assert str(concept) == "sks cat" and concept.images and concept.masks is None and concept.path is None


def test_other_files_are_skipped_named_and_counted(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "list.csv").write_text("x")
    with pytest.warns(UserWarning, match=r"plum-cat \(2\): list.csv, notes.txt\."):
        assert len(load_concept(folder).images) == 3


def test_captions_beside_pictures_are_told_of(folder):
    """As kohya's trainers have them."""
    (folder / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"notes.txt\.$"):
        load_concept(folder)
    (folder / "10.txt").write_text("a sks cat, sitting")
    with pytest.warns(UserWarning, match='Captions are not read: .*"a photo of a sks cat"'):
        load_concept(folder)


def test_photographs_in_the_folder_inside_or_in_a_zip(folder, tmp_path):
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    packed = shutil.make_archive(f"{tmp_path}-packed", "zip", tmp_path)
    for source in (tmp_path, packed):
        concept = load_concept(source)
        assert concept.name == "Plum cat" and [image.width for image in concept.images] == [64, 80, 96]
        assert len(concept.masks) == 3 and concept.path == (folder if source == tmp_path else None)
    (folder / "concept.json").rename(tmp_path / "concept.json")
    assert load_concept(tmp_path).name == "Plum cat", "a card beside the folder of pictures"
    (tmp_path / "more").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "more" / "a.png")
    with pytest.raises(ValueError, match=r"several folders \(more, plum-cat\): give one"):
        load_concept(tmp_path)


def test_uploads_of_one_name_are_several_pictures(tmp_path):
    paths = [tmp_path / str(number) / "image.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        Image.new("RGB", (64 + number, 64)).save(path)
    assert [image.width for image in load_concept(paths, "cat").images] == [64, 65, 66]


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for source in ("~/plum-cat", ["~/plum-cat/0.jpg"]):
        assert load_concept(source, "cat").images


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda folder: (folder / "concept.json").unlink(), "plum-cat needs a macro class"),
        (lambda folder: (folder / "concept.json").write_text("{"), "concept.json is not such a JSON object"),
        (lambda folder: (folder / "concept.json").write_text("[1]"), "concept.json is not such a JSON object"),
        (lambda folder: (folder / "10.jpg").write_text("x"), "10.jpg cannot be read as a picture"),
        (lambda folder: (folder / "masks" / "10.png").unlink(), "no mask for 10: make one for every picture, or none"),
        (lambda folder: (folder / "0.jpg").rename(folder / "1.png"), "no mask for 1:"),  # which of them is 1.png's?
        (lambda folder: Image.new("L", (9, 9), 255).save(folder / "masks" / "10.png"), r"\(9, 9\).*give each its own"),
        (lambda folder: Image.new("L", (96, 64)).save(folder / "masks" / "10.png"), "10.png marks nothing: paint"),
        (lambda folder: [path.unlink() for path in folder.glob("*.jpg")], "There is no picture in .*plum-cat"),
    ],
)
def test_damaged_folders(folder, damage, sentence):
    damage(folder)
    with pytest.raises(ValueError, match=sentence):
        load_concept(folder)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"macro_class": "  "}, "The concept thing needs a macro class"),
        ({"macro_class": "cat", "token": "my cat"}, r"The token must be one word .* not 'my cat'"),
        ({"macro_class": "cat", "masks": [Image.new("L", (4, 4))]}, r"thing has masks of .* give each its own"),
    ],
)
def test_impossible_concepts(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Concept("thing", **arguments)


def test_a_wrong_path_lists_the_shipped_concepts():
    with pytest.raises(FileNotFoundError, match=rf"no folder or picture no-such-cat: .*{shipped_concepts()[0]}"):
        load_concept("no-such-cat")


def test_shipped_concepts_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = shipped_concepts()
    assert names, "the project ships concepts"
    for name in names:
        by_name, by_path = load_concept(name), load_concept(f"data/concepts/{name}")
        assert by_name.path == by_path.path == data_dir() / "concepts" / name
        assert 3 <= len(by_name.images) <= 15, "as many as the paper's concepts have"
        assert by_name.masks is not None and len(by_name.masks) == len(by_name.images)
        assert min(size for image in by_name.images for size in image.size) >= 64
        assert by_name.token == "sks"


def test_without_the_project_only_the_path_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSRES_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"There is no folder or picture plum-cat: check the path\.$"):
        load_concept("plum-cat")
    with pytest.raises(FileNotFoundError, match="set PERSRES_DATA"):
        data_dir()
