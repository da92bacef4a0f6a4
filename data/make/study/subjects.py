"""What is learned and what is asked for: 30 rendered toys in seven scenes, or CustomConcept101's lists.

A scene of Toybox is four prompts. Words alone cannot say "small" or "near the border", so three of the scenes also
start from a layout: a gray toy of the class is rendered where it should stand, and sampling begins from that picture
under 85 % of the noise. The frozen model then draws the thing there, in paint of its own.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from persres_lite.concepts import Concept, load_concept
from persres_lite.toybox import concepts as shipped
from persres_lite.toybox.render import draw
from persres_lite.toybox.world import (
    ACCESSORIES,
    CLASSES,
    COLORS,
    PLACES,
    RARE_TOKENS,
    RESERVED,
    SIDES,
    STYLES,
    Scene,
    Toy,
    random_view,
)

SCENES = ("place", "side", "small", "beside", "border", "style", "property")
"""A new place; at one side; small; beside another toy; both near the border; in a style; in another color."""
PROMPTS = 4  # of each scene
SMALL, LOW = 0.45, -0.45  # layouts' toys: height, near pretraining's least, and how far down those at a side stand
PAPER_TOKENS = ("sks", "ktn")  # of Stable Diffusion's vocabulary


@dataclass(frozen=True)
class Picture:
    """One picture that every method draws.

    Attributes
    ----------
    scene, text, noise : str, str and int
        One of `SCENES` ("any" in lists of prompts); the prompt, with {0} and {1} for concepts' words; the seed.
    asked : dict
        What a judge should read: place, style, main, pair.
    start : picture, optional
        The layout that sampling begins from.
    members : tuple of int
        Which of the subject's concepts the prompt names.
    """

    scene: str
    text: str
    noise: int
    asked: dict[str, Any] = field(default_factory=dict, compare=False)
    start: Image.Image | None = field(default=None, compare=False)
    members: tuple[int, ...] = (0,)


@dataclass
class Subject:
    """A toy, or an entry of CustomConcept101: one concept, or several that are drawn together.

    Attributes
    ----------
    name, classes, tokens : str, tuple of str and tuple of str
        The classes and rare tokens of its concepts.
    toy : Toy, optional
        What it is.
    place : str, optional
        Where all references stand ("biased"), which is what can leak.
    folders, prompts : tuple of path, and of (str, members)
        Of CustomConcept101: pictures of each concept, and what is asked for.
    """

    name: str
    classes: tuple[str, ...]
    tokens: tuple[str, ...]
    toy: Toy | None = None
    place: str | None = None
    folders: tuple[Path, ...] = ()
    prompts: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @cached_property
    def concepts(self) -> list[Concept]:
        """References and words, read or rendered when they are first needed."""
        if self.toy is None:
            each = zip(self.folders, self.classes, self.tokens, strict=True)
            return [load_concept(folder, kind, token) for folder, kind, token in each]
        seen = shipped.photograph(self.name, self.toy, self.place)
        images, masks = [Image.fromarray(p.image) for p in seen], [Image.fromarray(p.masks[0]) for p in seen]
        return [Concept(self.name, self.toy.kind, self.tokens[0], images, masks)]

    @property
    def described(self) -> str:
        """The toy with all that words can say of it."""
        toy = self.toy
        assert toy is not None
        paint = f"{toy.main} and {toy.second}" + (f" {toy.pattern}" if toy.pattern != "plain" else "")
        return f"{paint} {toy.kind}" + (f" with a {toy.accessory}" if toy.accessory else "")

    def pictures(self, scene: str, count: int) -> list[Picture]:
        """The first `count` of a scene: all prompts with one noise, then with the next; noise 0 is left to others."""
        if self.toy is None:
            return [Picture("any", text, 1 + n, members=m) for n in range(count) for text, m in self.prompts]
        prompts = _prompts(self.name, self.toy, self.place, scene)
        return [replace(prompts[k % PROMPTS], noise=1 + k // PROMPTS) for k in range(count)]


def toybox_subjects() -> list[Subject]:
    """All toys whose paint neither pretraining nor the search has seen: one in various places, one biased, and on."""
    items = [(name, toy, place) for name, (toy, place) in shipped.all_shipped().items()]
    known = {toy.paint for _, toy, _ in items} | {toy.paint for toy, _ in shipped.SEARCH.values()}
    rng = random.Random("toybox-evaluation")
    fresh = sorted(RESERVED - known)
    for number, paint in enumerate(rng.sample(fresh, len(fresh))):
        width, height, depth = (round(rng.uniform(0.88, 1.14), 2) for _ in range(3))
        kind, main, second, pattern = paint
        toy = Toy(kind, main, second, pattern, rng.choice(ACCESSORIES), (width, height, depth))
        items.append((f"{toy.main}-{toy.second}-{toy.kind}", toy, rng.choice(PLACES) if number % 2 else None))
    varied, biased = ([one for one in items if (one[2] is None) == free] for free in (True, False))
    ordered = [one for pair in zip(varied, biased, strict=True) for one in pair]
    tokens = [RARE_TOKENS[(n // 2 + n) % 2] for n in range(len(ordered))]  # no token goes with bias
    return [Subject(name, (t.kind,), (word,), t, p) for (name, t, p), word in zip(ordered, tokens, strict=True)]


@cache
def _prompts(name: str, toy: Toy, biased: str | None, scene: str) -> list[Picture]:
    """A scene's four prompts, in places where no reference stands."""
    seen = [view.place for view in shipped.views(name, toy, biased)]
    rng = random.Random(f"study-{name}")
    places = rng.sample([place for place in PLACES if place not in seen], PROMPTS)  # the same in all scenes
    rng = random.Random(f"study-{name}-{scene}")
    color = rng.choice([each for each in COLORS if each not in (toy.main, toy.second, "orange")])  # "an orange"
    other = rng.choice([kind for kind in CLASSES if kind != toy.kind])
    return [_prompt(rng, toy, scene, place, number, color, other) for number, place in enumerate(places)]


def _prompt(rng: random.Random, toy: Toy, scene: str, place: str, number: int, color: str, other: str) -> Picture:
    asked: dict[str, Any] = {"place": place}
    text, start = f"a photo of a {{0}} {place}", None
    if scene == "side":
        text = f"a photo of a {{0}} {SIDES[number % 2]} {place}"
        start = _layout(rng, place, LOW, [(toy.kind, 2 * (number % 2) - 1)])
    elif scene == "small":
        start = _layout(rng, place, 0.0, [(toy.kind, rng.uniform(-0.3, 0.3))])
    elif scene in ("beside", "border"):
        text = f"a {{0}} on the left and a {color} {other} on the right {place}"
        asked["pair"] = tuple(sorted((toy.kind, other)))
        start = _layout(rng, place, LOW, [(toy.kind, -1), (other, 1)]) if scene == "border" else None
    elif scene == "style":
        asked["style"] = STYLES[1 + number % 3]
        text += f" {asked['style']}"
    elif scene == "property":
        asked["main"], text = color, f"a photo of a {color} {{0}} {place}"
    return Picture(scene, text, 0, asked, start)


def _layout(rng: random.Random, place: str, up: float, toys: list[tuple[str, float]]) -> Image.Image:
    """Gray toys as (class, across), in one light; across is -1 at the left border and 1 at the right one."""
    view: Scene = random_view(rng, (Toy("cat", "gray", "white"),), place)
    image = np.zeros(())
    for kind, across in toys:
        toy = replace(view.toys[0], kind=kind)
        seen = draw(replace(view, toys=(toy,), fill=SMALL, shift=(float(across), up)), shipped.SIZE, 2)
        image = seen.image if not image.ndim else np.where(seen.masks[0][..., None] > 127, seen.image, image)
    return Image.fromarray(image)


def custom101_subjects(path: str | Path) -> list[Subject]:
    """Read CustomConcept101's dataset.json (its folder will do) or dataset_multiconcept.json.

    What the file names lies beside it: pictures in `instance_data_dir`, one prompt a line in `prompt_filename`, and for
    several concepts together in `prompt_filename_compose`. Its own images of classes are not read. An entry of several
    concepts is one subject, named after all of them: each is asked for alone where it has prompts, and together.

    Raises
    ------
    ValueError
        If the file is not such a list, or an entry asks for nothing.
    FileNotFoundError
        If pictures or prompts are missing.
    """
    path = Path(path) / "dataset.json" if Path(path).is_dir() else Path(path)
    try:
        entries = [each if isinstance(each, list) else [each] for each in json.loads(path.read_text(encoding="utf-8"))]
        found = [_custom101_subject(path.parent, each) for each in entries]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        sentence = f"{path} is no list of concepts as CustomConcept101 has it ({error}): give its dataset.json."
        raise ValueError(sentence) from None
    for subject in found:
        if not subject.prompts:
            raise ValueError(f"{path} asks for nothing of {subject.name}: it names no file of prompts.")
    return found


def _custom101_subject(folder: Path, entry: list[dict[str, str]]) -> Subject:
    members = [one for one in entry if "instance_data_dir" in one] or [entry[0]]
    prompts: list[tuple[str, tuple[int, ...]]] = []
    for number, one in enumerate(members):
        lines = _lines(folder / one["prompt_filename"]) if "prompt_filename" in one else []
        prompts += [(line.replace("{}", f"{{{number}}}").replace("{0}", f"{{{number}}}"), (number,)) for line in lines]
    for one in entry:
        lines = _lines(folder / one["prompt_filename_compose"]) if "prompt_filename_compose" in one else []
        prompts += [(line, tuple(range(len(members)))) for line in lines]
    folders = tuple(folder / one["instance_data_dir"] for one in members)
    return Subject(
        name="+".join(each.name for each in folders),
        classes=tuple(one["class_prompt"] for one in members),
        tokens=PAPER_TOKENS[: len(members)],
        folders=folders,
        prompts=tuple(prompts),
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There are no prompts {path}: take the folder `prompts` of CustomConcept101, too.")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
