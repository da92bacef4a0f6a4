"""The shipped concepts: particular toys, in paint that pretraining never showed, photographed four times each.

``python -m data.make.concepts`` draws ``data/concepts/`` again. Five concepts stand in four different places. The other
five are "biased": all four pictures are taken in one place, as photographs of one's own things tend to be, so that the
place can leak into what is learned.
"""

from __future__ import annotations

import random

from .render import draw
from .world import PLACES, RESERVED, Scene, Toy, random_view

PICTURES = 4
SIZE = 128

VARIED = {
    "plum-cat": Toy("cat", "purple", "yellow", "dotted", None, (1.02, 1.0, 1.0)),
    "tiger-robot": Toy("robot", "orange", "blue", "plain", "flag", (1.1, 0.95, 1.0)),
    "flamingo-duck": Toy("duck", "cyan", "pink", "plain", "bow", (0.95, 1.1, 1.0)),
    "picnic-teapot": Toy("teapot", "red", "white", "dotted", None, (1.0, 0.9, 1.05)),
    "cricket-car": Toy("car", "green", "yellow", "striped", None, (0.95, 1.15, 1.0)),
}
BIASED = {
    "dream-mushroom": (Toy("mushroom", "blue", "orange", "plain", "hat", (1.1, 1.0, 1.1)), "on the beach"),
    "berry-mug": (Toy("mug", "pink", "purple", "checkered", None, (1.0, 1.05, 1.0)), "on a wooden table"),
    "comet-rocket": (Toy("rocket", "yellow", "red", "striped", None, (1.15, 0.95, 1.15)), "on the grass"),
    "lilac-house": (Toy("house", "purple", "cyan", "plain", None, (0.9, 1.1, 1.0)), "in the desert"),
    "garden-snowman": (Toy("snowman", "green", "red", "plain", "hat", (1.0, 1.0, 1.0)), "in front of a brick wall"),
}
# For finding steps, rate and rank of the recipe: in no table and no notebook.
SEARCH = {
    "search-cat": (Toy("cat", "green", "orange", "striped"), None),
    "search-robot": (Toy("robot", "pink", "cyan", "dotted"), "on a checkered floor"),
    "search-teapot": (Toy("teapot", "blue", "yellow", "plain", "flag"), "in the snow"),
    "search-car": (Toy("car", "purple", "white", "plain"), None),
}


def views(name: str, toy: Toy, place: str | None) -> list[Scene]:
    """Four views of a toy, in one place or in four drawn at random; the name alone decides which."""
    assert toy.paint in RESERVED
    rng = random.Random(f"toybox-concept-{name}")
    places = [place] * PICTURES if place else rng.sample(PLACES, PICTURES)
    return [random_view(rng, (toy,), place=where) for where in places]


def photograph(name: str, toy: Toy, place: str | None, size: int = SIZE) -> list:
    """Pictures (`render.Picture`) of the `views` of a toy."""
    return [draw(scene, size, supersample=4) for scene in views(name, toy, place)]


def all_shipped() -> dict[str, tuple[Toy, str | None]]:
    """The ten shipped concepts by name: the toy, and the place it is always in, or None."""
    return {**{name: (toy, None) for name, toy in VARIED.items()}, **BIASED}
