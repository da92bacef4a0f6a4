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
SIDES = ("on the left", "on the right")  # of the picture, where a single toy stands far enough from its middle
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

# Width over height of each kind in a picture, the mean over views: it says how far to a side a toy can stand.
ASPECT = {
    "duck": 0.80, "robot": 0.70, "mug": 1.00, "car": 1.35, "rocket": 0.55,
    "house": 0.90, "mushroom": 0.95, "snowman": 0.65, "cat": 0.65, "teapot": 1.40,
}  # fmt: skip

LONGEST = 22  # words of a caption

# Words of one token each that no caption uses: names for concepts that are learned later. `sks` is the usual one.
RARE_TOKENS = ("sks", "zwx", "ohwx", "qdv", "vlk", "wug", "blick", "dax")

# Invented words that do stand in captions, each the name of one toy that is seen in many views ("a bafo cat"). They
# teach the text encoder and the U-Net that a word before the class can mean one particular look; without them a rare
# token had no more effect on a picture than a comma.
NAMES = tuple(f"{onset}{middle}" for onset in ("ba", "de", "fi", "go", "ku", "lo", "mi", "ne", "pa", "ru")
              for middle in ("fo", "gim", "lak", "nup", "rol", "sib", "tuv", "vash", "xi", "zon"))  # fmt: skip

# Paint jobs (class, main color, second color, pattern) kept out of pretraining: first the ten shipped concepts; then
# four that served the search for steps, rate and rank, and stand in no table; then twenty for the evaluation, two of
# each class.
RESERVED = frozenset(
    tuple(paint.split())
    for paint in """
    cat purple yellow dotted; robot orange blue plain; duck cyan pink plain;
    teapot red white dotted; car green yellow striped; mushroom blue orange plain;
    mug pink purple checkered; rocket yellow red striped; house purple cyan plain;
    snowman green red plain; cat green orange striped; robot pink cyan dotted;
    teapot blue yellow plain; car purple white plain; duck purple green striped;
    duck red blue dotted; robot green white checkered; robot yellow purple plain;
    mug orange cyan striped; mug blue white dotted; car pink blue checkered;
    car cyan red plain; rocket blue pink plain; rocket white green dotted;
    house yellow brown striped; house red gray checkered; mushroom purple white dotted;
    mushroom green pink striped; snowman orange purple plain; snowman cyan black striped;
    cat pink brown checkered; cat blue red plain; teapot green orange striped;
    teapot purple yellow plain
""".split(";")
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
    name: str | None = None  # one of `NAMES`, of the toys that have one

    @property
    def paint(self) -> tuple[str, str, str, str]:
        """The combination that `RESERVED` speaks of."""
        return (self.kind, self.main, self.second, self.pattern)


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn.

    Attributes
    ----------
    toys : tuple of Toy
        One, or two from left to right.
    place : str
        One of `PLACES`.
    style : str, optional
        One of `STYLES`; None is an ordinary color photograph.
    elevation : float
        Radians of the camera above the horizon.
    fill : float
        Height of the toy (of the taller one, if two) as a fraction of the picture's height.
    shift : (float, float)
        Where the toy's middle is, in half picture widths and heights from the center; y up.
    light : (float, float, float)
        Direction to the sun, not normalized.
    seed : int
        Of the small variations of the place (position of the shoreline, tint of the wall).
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


def named_toy(name: str) -> Toy:
    """The one toy that bears a name of `NAMES`; the name alone decides how it looks."""
    return replace(random_toy(random.Random(f"toybox-name-{name}")), name=name)


def near_misses(toy: Toy, count: int = 11) -> list[Toy]:
    """Toys that differ from `toy` in paint alone, the nearest ones first: a gallery in which to find it.

    Two have another main color, two another second color, one has both exchanged, one each of the other patterns; the
    rest are painted at random. The toy's paint and kind decide which they are.
    """
    rng = random.Random("near-misses-" + "-".join(toy.paint))
    others = [color for color in COLORS if color not in (toy.main, toy.second)]
    found = [replace(toy, main=color) for color in rng.sample(others, 2)]
    found += [replace(toy, second=color) for color in rng.sample(others, 2)]
    found += [replace(toy, main=toy.second, second=toy.main)]
    found += [replace(toy, pattern=pattern) for pattern in PATTERNS if pattern != toy.pattern]
    while len(found) < count:
        main, second = rng.sample(list(COLORS), 2)
        other = replace(toy, main=main, second=second, pattern=rng.choice(PATTERNS))
        if other != toy and other not in found:
            found.append(other)
    return found[:count]


def random_view(rng: random.Random, toys: tuple[Toy, ...], place: str | None = None, style: str | None = None) -> Scene:
    """The given toys, posed, lit and photographed at random; `place` is drawn too where it is not given.

    One toy fills 0.45 to 0.8 of the height and stands anywhere that leaves it whole, more often small than large and
    near the border than in the middle: a disc in the middle shall be no answer to where it is. Two stand near the
    middle.
    """
    pair = len(toys) == 2
    fill = rng.uniform(0.42, 0.52) if pair else 0.45 + 0.35 * rng.random() ** 1.5
    room = 0.05 if pair else max(0.96 - fill * ASPECT[toys[0].kind], 0.0)
    across = rng.uniform(-1, 1)
    across *= 1 if pair else abs(across) ** -0.5
    return Scene(
        toys=tuple(replace(toy, yaw=rng.uniform(-0.8, 0.8)) for toy in toys),
        place=place or rng.choice(PLACES),
        style=style,
        elevation=rng.uniform(0.10, 0.30),
        fill=fill,
        shift=(room * across, rng.uniform(-0.15, 0.05) if pair else (0.96 - fill) * rng.uniform(-1, 0.6)),
        light=(rng.uniform(-0.9, 0.9), rng.uniform(0.9, 1.4), rng.uniform(0.4, 1.0)),
        seed=rng.randrange(2**31),
    )


def side_of(scene: Scene) -> str | None:
    """Where a single toy stands, as `SIDES` says it; None near the middle and for pairs."""
    if len(scene.toys) == 2 or abs(scene.shift[0]) < 0.25:
        return None
    return SIDES[scene.shift[0] > 0]


def random_scene(rng: random.Random) -> Scene:
    """A scene of the pretraining set: one toy (four fifths, some of them one of those with a name) or two; a style on
    about an eighth of them.
    """
    toys = tuple(random_toy(rng) for _ in range(2 if rng.random() < 0.2 else 1))
    if len(toys) == 1 and rng.random() < 0.15:
        toys = (named_toy(rng.choice(NAMES)),)
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
    """A noun phrase that names some of the toy's attributes: "a red and blue striped duck with a flag".

    A toy with a name is mostly called by it, "a bafo duck", and nothing more.
    """
    if toy.name and rng.random() < 0.7:
        return with_article(f"{toy.name} {toy.kind}")
    words = []
    chance = rng.random()
    if colors and chance < (0.85 if brief else 0.92):
        words.append(toy.main)
        if not brief and chance < 0.65:
            words += ["and", toy.second]
    if toy.pattern != "plain" and rng.random() < (0.3 if brief else 0.85):
        words.append(toy.pattern)
    phrase = with_article(" ".join([*words, toy.kind]))
    if toy.accessory and not brief and rng.random() < 0.8:
        phrase += f" with a {toy.accessory}"
    return phrase


def caption(scene: Scene, rng: random.Random) -> str:
    """What a caption could say of a scene: more or less of what is there, in one of several wordings.

    Colors are not named where the style hides them. At most `LONGEST` words.
    """
    colors = scene.style not in ("in black and white", "in sepia")
    if len(scene.toys) == 1:
        subject = describe(scene.toys[0], rng, colors)
        if (side := side_of(scene)) and rng.random() < 0.6:
            subject += f" {side}"
    else:
        left, right = (describe(toy, rng, colors, brief=True) for toy in scene.toys)
        wordings = ["{l} and {r}", "{l} next to {r}"]
        if not scene.style:
            wordings += ["{l} on the left and {r} on the right", "{l} to the left of {r}"]
        subject = rng.choice(wordings).format(l=left, r=right)
    opening = rng.choice(("a photo of ", "a photo of ", "a photo of ", "a picture of ", "an image of ", ""))
    place = f" {scene.place}" if rng.random() < 0.92 else ""
    style = f" {scene.style}" if scene.style and rng.random() < 0.95 else ""
    if len(f"{opening}{subject}{place}{style}".split()) > LONGEST:
        opening = ""
    return f"{opening}{subject}{place}{style}"


def vocabulary() -> list[str]:
    """Every word that a caption can use, and no other, in alphabetical order."""
    words = set(CLASSES) | set(COLORS) | set(PATTERNS) | set(NAMES)
    words |= {word for accessory in ACCESSORIES if accessory for word in accessory.split()}
    words |= {word for phrase in (*PLACES, *(style for style in STYLES if style)) for word in phrase.split()}
    words |= set("a an and photo picture image of with on in the left right next to".split())
    return sorted(words)
