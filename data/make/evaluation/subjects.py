"""What is learned and what is asked for: rendered toys with prompts of six types, or CustomConcept101's lists."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    Toy,
    random_toy,
    random_view,
    with_article,
)

KINDS = ("place", "second object", "style", "changed property", "off center", "two concepts")
BESIDE = ("second object", "two concepts")
"""Of `KINDS`: the concept stands in the left half, beside something else."""
REFERENCES, HELD_OUT, OTHERS = 4, 2, 4
PAPER_TOKENS = ("sks", "ktn")  # of Stable Diffusion's vocabulary


@dataclass(frozen=True)
class Prompt:
    """One prompt and what it asks for.

    Attributes
    ----------
    kind : str
        One of `KINDS`, or "any" where nobody has sorted them.
    text : str
        With {0} for the concept's words, and {1} for those of its partner.
    asked : dict
        What a judge should read: place, style, main, pair, side; under "partner" the partner's class.
    """

    kind: str
    text: str
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> bool:
        """Whether the concept stands in the left half, beside something else."""
        return self.kind in BESIDE and "{0} on the left" in self.text


@dataclass(frozen=True)
class Subject:
    """A concept with what a fair score needs.

    Attributes
    ----------
    concept : Concept
        The references for training, with their true masks where they are known.
    prompts : list of Prompt
        The same for every method.
    held_out, others : Concept, optional
        Pictures of the same thing that no training sees, and of other things of the class: ceiling and floor.
    described, briefly : str, optional
        Its class with all that words can say of it, and with its main color alone, for where it is the partner.
    toy : Toy, optional
        What it is.
    biased : bool
        Whether all references stand in one place.
    yaws : tuple of float
        How the toy is turned in each reference, in radians.
    drift : list of Prompt
        Prompts without the concept's words, which learning it should not touch: of its class, and of other things.
    """

    concept: Concept
    prompts: list[Prompt]
    held_out: Concept | None = None
    others: Concept | None = None
    described: str | None = None
    briefly: str | None = None
    toy: Toy | None = None
    biased: bool = False
    yaws: tuple[float, ...] = ()
    drift: list[Prompt] = field(default_factory=list)


Item = tuple[str, Toy, str | None]
"""A toy's name, the toy, and the place it is always in, or None."""

Pair = tuple[Subject, ...]
"""One subject, or two that also stand together in prompts; trained in one piece of work."""


def toybox_toys() -> list[tuple[Item, Item]]:
    """Every toy whose paint pretraining never showed and no search has used, half of them always in one place."""
    known = {toy.paint: (name, toy, place) for name, (toy, place) in shipped.all_shipped().items()}
    searched = {toy.paint for toy, _ in shipped.SEARCH.values()}
    fresh = [paint for paint in sorted(RESERVED) if paint not in known and paint not in searched]
    rng = random.Random("toybox-evaluation")
    made: list[Item] = list(known.values())
    for number, paint in enumerate(rng.sample(fresh, len(fresh))):
        width, height, depth = (round(rng.uniform(0.88, 1.14), 2) for _ in range(3))
        toy = Toy(*paint, accessory=rng.choice(ACCESSORIES), proportions=(width, height, depth))
        made.append((f"{toy.main}-{toy.second}-{toy.kind}", toy, rng.choice(PLACES) if number % 2 else None))
    varied = [each for each in made if each[2] is None]
    biased = [each for each in made if each[2] is not None]
    pairs = []
    for one in varied:
        other = next((each for each in biased if each[1].kind != one[1].kind), None)
        if other is not None:
            biased.remove(other)
            pairs.append((one, other))
    return pairs


def toybox_pairs(count: int | None = None) -> list[Pair]:
    """The toys of `toybox_toys`, photographed.

    Parameters
    ----------
    count : int, optional
        How many concepts; the order is fixed, so that fewer are the first ones.
    """
    pairs = toybox_toys()[: None if count is None else -(-count // 2)]
    tokens = [RARE_TOKENS[:2] if number % 2 else RARE_TOKENS[1::-1] for number in range(len(pairs))]
    return first([_toybox_pair(pair, words) for pair, words in zip(pairs, tokens, strict=True)], count)


def search_pairs() -> list[Pair]:
    """The concepts that recipes are sought on; in no table."""
    items = [(name, toy, place) for name, (toy, place) in shipped.SEARCH.items()]
    return [_toybox_pair((item,), RARE_TOKENS[:1]) for item in items]


def _toybox_pair(items: Sequence[Item], tokens: Sequence[str]) -> Pair:
    made = []
    for index, ((name, toy, place), token) in enumerate(zip(items, tokens, strict=False)):
        partner = items[1 - index][1] if len(items) == 2 else None
        made.append(_toybox_subject(name, toy, place, token, partner, first=index == 0))
    return tuple(made)


def _toybox_subject(name: str, toy: Toy, place: str | None, token: str, partner: Toy | None, first: bool) -> Subject:
    rng = random.Random(f"toybox-evaluation-{name}")
    count = REFERENCES + HELD_OUT
    places = [place] * count if place else rng.sample(PLACES, count)
    views = [random_view(rng, (toy,), place=where) for where in places]
    seen = [draw(view, shipped.SIZE, 2) for view in views]
    others = [draw(random_view(rng, (random_toy(rng, toy.kind),)), shipped.SIZE, 2) for _ in range(OTHERS)]

    def concept(pictures: list, what: str) -> Concept:
        images = [Image.fromarray(picture.image) for picture in pictures]
        masks = [Image.fromarray(picture.masks[0]) for picture in pictures]
        return Concept(f"{name}{what}", toy.kind, token, images, masks)

    unseen = [each for each in PLACES if each not in places[:REFERENCES]]
    paint = f"{toy.main} and {toy.second}" + (f" {toy.pattern}" if toy.pattern != "plain" else "")
    return Subject(
        concept=concept(seen[:REFERENCES], ""),
        prompts=_toybox_prompts(rng, toy, unseen, partner if first else None),
        held_out=concept(seen[REFERENCES:], ", held out"),
        others=concept(others, ", others of its class"),
        described=f"{paint} {toy.kind}" + (f" with a {toy.accessory}" if toy.accessory else ""),
        briefly=f"{toy.main} {toy.kind}",
        toy=toy,
        biased=place is not None,
        yaws=tuple(view.toys[0].yaw for view in views[:REFERENCES]),
        drift=_drift_prompts(name, toy),
    )


def _toybox_prompts(rng: random.Random, toy: Toy, places: list[str], partner: Toy | None) -> list[Prompt]:
    """Four places that no reference shows, both sides of the picture in two of them, and one prompt of each other type;
    of a pair the first has the last one.
    """
    prompts = [Prompt("place", f"a photo of a {{0}} {place}", {"place": place}) for place in rng.sample(places, 4)]
    place = rng.choice(places)
    other = rng.choice([kind for kind in CLASSES if kind != toy.kind])
    color = rng.choice([name for name in COLORS if name not in (toy.main, toy.second, "orange")])  # "an orange"
    style = rng.choice([name for name in STYLES if name])
    beside = f"a {{0}} on the left and a {color} {other} on the right"  # no place: a description must fit in, too
    prompts.append(Prompt("second object", beside, {"pair": sorted((toy.kind, other))}))
    prompts.append(Prompt("style", f"a photo of a {{0}} {place} {style}", {"style": style}))
    prompts.append(Prompt("changed property", f"a photo of a {color} {{0}} {place}", {"main": color, "place": place}))
    for side, where in zip(SIDES, rng.sample(places, 2), strict=True):
        prompts.append(Prompt("off center", f"a photo of a {{0}} {side} {where}", {"place": where, "side": side}))
    if partner is not None:
        both = "a {0} on the left and a {1} on the right"
        asked = {"pair": sorted((toy.kind, partner.kind)), "partner": partner.kind}
        prompts.append(Prompt("two concepts", both, asked))
    return prompts


def _drift_prompts(name: str, toy: Toy) -> list[Prompt]:
    """Two of the plain class, and two of other toys."""
    rng = random.Random(f"toybox-drift-{name}")
    prompts = [Prompt("class word", f"a photo of {with_article(toy.kind)} {place}") for place in rng.sample(PLACES, 2)]
    for kind in rng.sample([each for each in CLASSES if each != toy.kind], 2):
        thing = with_article(f"{rng.choice(list(COLORS))} {kind}")
        prompts.append(Prompt("unrelated", f"a photo of {thing} {rng.choice(PLACES)}"))
    return prompts


def custom101_pairs(path: str | Path, count: int | None = None) -> list[Pair]:
    """Read CustomConcept101's dataset.json, or its dataset_multiconcept.json, whose pairs have prompts for both.

    Parameters
    ----------
    path : path
        The file. What it names lies beside it: `instance_data_dir` with the pictures, `prompt_filename` with one prompt
        a line. Its own images of classes are not read: they are drawn by the base, as it describes.
    count : int, optional
        How many concepts, the first ones.

    Raises
    ------
    ValueError
        If the file is not such a list.
    FileNotFoundError
        If pictures or prompts are missing.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        groups = [each if isinstance(each, list) else [each] for each in entries]
        if isinstance(entries, dict) or not all(any("instance_data_dir" in one for one in each) for each in groups):
            raise KeyError("instance_data_dir")
        pairs = [_custom101_pair(path.parent, each) for each in groups]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no list of concepts as CustomConcept101 has it ({error}): give its dataset.json."
        ) from None
    return first(pairs, count)


def _custom101_pair(folder: Path, entry: list[dict[str, str]]) -> Pair:
    both = next((each["prompt_filename_compose"] for each in entry if "prompt_filename_compose" in each), None)
    made = []
    members = [one for one in entry if "instance_data_dir" in one]
    for index, each in enumerate(members):
        concept = load_concept(folder / each["instance_data_dir"], each["class_prompt"], PAPER_TOKENS[index])
        prompts = [Prompt("any", text) for text in _lines(folder / each["prompt_filename"])]
        if both and index == 0:
            asked = {"partner": members[1]["class_prompt"]}
            prompts += [Prompt("two concepts", text, asked) for text in _lines(folder / both)]
        made.append(Subject(replace(concept, name=Path(each["instance_data_dir"]).name), prompts))
    return tuple(made)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There are no prompts {path}: take the folder `prompts` of CustomConcept101, too.")
    # A pair of braces without a number counts up, which is what "{}" means in files for one concept.
    return [line.strip().replace("{}", "{0}") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def first(pairs: list[Pair], count: int | None) -> list[Pair]:
    """The first so many concepts; None takes all. One that is left without its partner has no prompt for both."""
    if count is None:
        return pairs
    chosen: list[Pair] = []
    for pair in pairs:
        left = count - sum(map(len, chosen))
        if left > 0:
            kept = pair[:left]
            if len(kept) < len(pair):
                kept = tuple(
                    replace(each, prompts=[prompt for prompt in each.prompts if prompt.kind != "two concepts"])
                    for each in kept
                )
            chosen.append(kept)
    return chosen
