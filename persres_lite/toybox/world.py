"""What can be in a Toybox picture, and what its caption says.

A scene is one toy, or two side by side, in one of eight places, under one light, seen by one camera. Everything
about it follows from a random generator, so a number names a picture: ``scene_by_index(7)`` is the same scene on
every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

CLASSES = ("duck", "robot", "mug", "car", "rocket", "house", "mushroom", "snowman", "cat", "teapot")

# sRGB of the paint under full light; far apart from each other, so that shade and sunlight do not turn one into
# another.
COLORS = {
    "red": (0.86, 0.08, 0.10),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.98, 0.88, 0.12),
    "green": (0.10, 0.58, 0.18),
    "blue": (0.10, 0.24, 0.86),
    "purple": (0.48, 0.14, 0.68),
    "pink": (1.00, 0.52, 0.74),
    "white": (0.97, 0.97, 0.96),
    "black": (0.07, 0.07, 0.08),
    "brown": (0.42, 0.23, 0.10),
    "cyan": (0.14, 0.80, 0.85),
    "gray": (0.52, 0.52, 0.54),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
ACCESSORIES = (None, "hat", "flag", "bow")
PLACES = (
    "on the beach",
    "in the snow",
    "on the grass",
    "in the desert",
    "on a wooden table",
    "on a checkered floor",
    "at night",
    "in front of a brick wall",
)
STYLES = (None, "in black and white", "in sepia", "in sunset light")

LONGEST = 22  # words of a caption

# Words of one token each that no caption uses: names for concepts that are learned later. `sks` is the usual one.
RARE_TOKENS = ("sks", "zwx", "ohwx", "qdv", "vlk", "wug", "blick", "dax")

# Paint jobs (class, main color, second color, pattern) kept out of pretraining. The first ten are the shipped
# concepts; the others served the search for steps, rate and rank, and stand in no table.
RESERVED = frozenset(
    {
        ("cat", "purple", "yellow", "dotted"),
        ("robot", "orange", "blue", "plain"),
        ("duck", "cyan", "pink", "plain"),
        ("teapot", "red", "white", "dotted"),
        ("car", "green", "yellow", "striped"),
        ("mushroom", "blue", "orange", "plain"),
        ("mug", "pink", "purple", "checkered"),
        ("rocket", "yellow", "red", "striped"),
        ("house", "purple", "cyan", "plain"),
        ("snowman", "green", "red", "plain"),
        ("cat", "green", "orange", "striped"),
        ("robot", "pink", "cyan", "dotted"),
        ("teapot", "blue", "yellow", "plain"),
        ("car", "purple", "white", "plain"),
    }
)


@dataclass(frozen=True)
class Toy:
    """One object: what it is (`kind` to `proportions`, its identity) and how it stands (`yaw`)."""

    kind: str
    main: str
    second: str
    pattern: str = "plain"
    accessory: str | None = None
    proportions: tuple[float, float, float] = (1.0, 1.0, 1.0)  # stretch along x (width), y (height), z (depth)
    yaw: float = 0.0  # radians; 0 faces the camera

    @property
    def paint(self) -> tuple[str, str, str, str]:
        """The combination that `RESERVED` speaks of."""
        return (self.kind, self.main, self.second, self.pattern)


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn.

    Attributes
    ----------
    toys : one toy, or two from left to right.
    place : one of `PLACES`.
    style : one of `STYLES`; None is an ordinary color photograph.
    elevation : radians of the camera above the horizon.
    fill : height of the toy (of the taller one, if two) as a fraction of the picture's height.
    shift : where the toy's middle is, in half picture widths and heights from the center; y up.
    light : direction to the sun, not normalized.
    seed : of the small variations of the place (position of the shoreline, tint of the wall).
    """

    toys: tuple[Toy, ...]
    place: str
    style: str | None = None
    elevation: float = 0.2
    fill: float = 0.58
    shift: tuple[float, float] = (0.0, 0.0)
    light: tuple[float, float, float] = (0.5, 1.2, 0.7)
    seed: int = 0


def random_toy(rng: random.Random, kind: str | None = None) -> Toy:
    """A toy with every attribute drawn at random; never one of the `RESERVED` paint jobs."""

    def stretch() -> float:
        return round(rng.uniform(0.86, 1.16), 3)

    while True:
        toy = Toy(
            kind=kind or rng.choice(CLASSES),
            main=(main := rng.choice(list(COLORS))),
            second=rng.choice([color for color in COLORS if color != main]),
            pattern=rng.choices(PATTERNS, (0.52, 0.16, 0.16, 0.16))[0],
            accessory=rng.choices(ACCESSORIES, (0.7, 0.1, 0.1, 0.1))[0],
            proportions=(stretch(), stretch(), stretch()),
            yaw=rng.uniform(-0.8, 0.8),
        )
        if toy.paint not in RESERVED:
            return toy


def random_view(rng: random.Random, toys: tuple[Toy, ...], place: str | None = None, style: str | None = None) -> Scene:
    """The given toys, posed, lit and photographed at random; `place` is drawn too where it is not given."""
    pair = len(toys) == 2
    return Scene(
        toys=tuple(replace(toy, yaw=rng.uniform(-0.8, 0.8)) for toy in toys),
        place=place or rng.choice(PLACES),
        style=style,
        elevation=rng.uniform(0.10, 0.30),
        fill=rng.uniform(0.38, 0.46) if pair else rng.uniform(0.50, 0.66),
        shift=(rng.uniform(-0.05, 0.05), rng.uniform(-0.15, 0.05))
        if pair
        else (rng.uniform(-0.28, 0.28), rng.uniform(-0.2, 0.1)),
        light=(rng.uniform(-0.9, 0.9), rng.uniform(0.9, 1.4), rng.uniform(0.4, 1.0)),
        seed=rng.randrange(2**31),
    )


def random_scene(rng: random.Random) -> Scene:
    """A scene of the pretraining set: one toy (four fifths) or two; a style on about an eighth of them."""
    toys = tuple(random_toy(rng) for _ in range(2 if rng.random() < 0.2 else 1))
    while len(toys) == 2 and toys[0].kind == toys[1].kind:
        toys = (toys[0], random_toy(rng))
    return random_view(rng, toys, style=rng.choices(STYLES, (0.88, 0.04, 0.04, 0.04))[0])


def scene_by_index(index: int, split: str = "train") -> Scene:
    """Scene number `index` of a split: "train" for pretraining, any other name for pictures never trained on."""
    return random_scene(random.Random(f"toybox-{split}-{index}"))


def with_article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(toy: Toy, rng: random.Random, colors: bool = True, brief: bool = False) -> str:
    """A noun phrase that names some of the toy's attributes: "a red and blue striped duck with a flag"."""
    words = []
    chance = rng.random()
    if colors and chance < (0.75 if brief else 0.85):
        words.append(toy.main)
        if not brief and chance < 0.4:
            words += ["and", toy.second]
    if toy.pattern != "plain" and rng.random() < (0.3 if brief else 0.65):
        words.append(toy.pattern)
    phrase = with_article(" ".join([*words, toy.kind]))
    if toy.accessory and not brief and rng.random() < 0.6:
        phrase += f" with a {toy.accessory}"
    return phrase


def caption(scene: Scene, rng: random.Random) -> str:
    """What a caption could say of a scene: more or less of what is there, in one of several wordings.

    Colors are not named where the style hides them. At most `LONGEST` words.
    """
    colors = scene.style not in ("in black and white", "in sepia")
    if len(scene.toys) == 1:
        subject = describe(scene.toys[0], rng, colors)
    else:
        left, right = (describe(toy, rng, colors, brief=True) for toy in scene.toys)
        wordings = ["{l} and {r}", "{l} next to {r}"]
        if not scene.style:
            wordings += ["{l} on the left and {r} on the right", "{l} to the left of {r}"]
        subject = rng.choice(wordings).format(l=left, r=right)
    opening = rng.choice(("a photo of ", "a photo of ", "a photo of ", "a picture of ", "an image of ", ""))
    place = f" {scene.place}" if rng.random() < 0.88 else ""
    style = f" {scene.style}" if scene.style and rng.random() < 0.95 else ""
    if len(f"{opening}{subject}{place}{style}".split()) > LONGEST:
        opening = ""
    return f"{opening}{subject}{place}{style}"


def vocabulary() -> list[str]:
    """Every word that a caption can use, and no other, in alphabetical order."""
    words = set(CLASSES) | set(COLORS) | set(PATTERNS)
    words |= {word for accessory in ACCESSORIES if accessory for word in accessory.split()}
    words |= {word for phrase in (*PLACES, *(style for style in STYLES if style)) for word in phrase.split()}
    words |= set("a an and photo picture image of with on in the left right next to".split())
    return sorted(words)
