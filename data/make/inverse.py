"""The renderer as judge: in which view a toy explains a picture best, and which paint explains it best in that view.

Nothing here is trained, and nothing is shared with the model that is judged. The body of the toy is known; every pose
is drawn without paint, and each of all paints (pattern, main and second color) is then tried on it: its error is the
sum of what two colors leave unexplained, each in the region that the pattern gives it. The view is the one in which
the best paint, whichever it is, beats the colors of the empty place by most: first of coarse templates slid over the
picture, then by steps downhill on pictures of reduced size. So the search favors no paint; only at its end are the
toy's own and its near misses compared, all in the same view.

>>> reading = read(image, toy, "on the beach")
>>> reading.rank, reading.toy.pattern, draw(reading.scene).image
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from persres_lite.toybox import render
from persres_lite.toybox.render import DARK, FOCAL, GLOSS, MAIN, SECOND, Part, _outline, _styled, _turn, build
from persres_lite.toybox.world import ACCESSORIES, COLORS, PATTERNS, Scene, Toy, near_misses

COARSE, MIDDLE, FINE = 32, 48, 96  # pixels along each side of the pictures that are compared
UNEXPLAINED = 0.3  # squared distance of colors beyond which a pixel counts as explained by nothing
UNLIKELY = 0.03  # what a pixel left to the place costs at least: a place has many colors, so to match one says little
NOON = 1.15  # height of the sun in its direction (x, NOON, z)
_RGB = np.array(list(COLORS.values()), np.float32)
_FIXED = render._palette(Toy("cat", "white", "black"))  # of any toy: only its dark and white parts are asked for

# A pose: yaw, the camera's elevation (radians), the logarithm of its distance, where the toy's middle stands in the
# picture (right and up, in half pictures), and the sun's x and z.
_STEP = np.array([0.15, 0.05, 0.07, 0.04, 0.04, 0.35, 0.25])
_LEAST = np.array([-1.0, 0.05, 0.9, -0.9, -0.9, -0.9, 0.4])
_MOST = np.array([1.0, 0.36, 2.6, 0.9, 0.9, 0.9, 1.0])


class Reading(NamedTuple):
    """What a picture shows of a toy."""

    rank: int  # place of the toy's own paint among its near misses, 1 the best; equal errors count against it
    toy: Toy  # with the paint and the accessory that explain the picture best, of all there are
    scene: Scene  # that toy in the view that was found: `render.draw` shows it
    error: float  # root of the mean squared difference of colors in [0, 1] over the toy's pixels, in the best paint


class _Body(NamedTuple):
    """A toy without paint, in its own coordinates."""

    toy: Toy
    larger: float  # how much larger than usual its accessory is
    parts: list[Part]
    outline: np.ndarray  # (P, 3)
    middle: np.ndarray  # what the camera looks at, the same whatever the toy wears


class _Look(NamedTuple):
    """A picture at one size, and how badly the empty place explains each of its pixels."""

    pixels: np.ndarray  # (size, size, 3)
    cost: np.ndarray  # (size, size)
    size: int
    style: str | None
    brightness: float


class _Seen(NamedTuple):
    """The pixels of a toy in several poses, one pose after another: R rays through the middles of pixels."""

    ends: np.ndarray  # (poses + 1,): pose i has the rays from ends[i] to ends[i + 1]
    row: np.ndarray  # (R,)
    column: np.ndarray  # (R,)
    paint: np.ndarray  # (R,) MAIN to WHITE
    regions: np.ndarray  # (patterns, 2, R) bool: where main and second color are seen
    shade: np.ndarray  # (R,)
    gloss: np.ndarray  # (R,)


@functools.lru_cache(maxsize=16)
def _body(toy: Toy, larger: float = 1.0) -> _Body:
    """Of a toy that has no paint of its own."""
    bare, parts = (_outline(build(replace(toy, accessory=None))), build(toy, larger))
    return _Body(toy, larger, parts, _outline(parts), np.array((0, bare[:, 1].max() / 2, 0)))


def _camera(body: _Body, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origin and axes (rows: right, up, forward) of a camera that walks around the toy instead of the toy turning."""
    yaw, tilt, distance = pose[0], pose[1], np.exp(pose[2])
    cos, sin = np.cos(tilt), np.sin(tilt)
    axes = np.array([[1, 0, 0], [0, cos, -sin], [0, -sin, -cos]]) @ _turn(1, -yaw)
    return body.middle - distance * axes[2], axes


def _screen(body: _Body, pose: np.ndarray) -> np.ndarray:
    """Where the outline appears, (P, 2), in half pictures from the center, y up."""
    origin, axes = _camera(body, pose)
    view = (body.outline - origin) @ axes.T
    return FOCAL * view[:, :2] / view[:, 2:] + pose[3:5]


def _see(body: _Body, poses: np.ndarray, size: int, shadows: bool = False) -> _Seen:
    """Draw a toy without paint, in one pose after another; with `shadows` also those that it throws on itself."""
    grids = []
    for index, values in enumerate(poses):
        seen = _screen(body, values)
        left, bottom = np.clip(np.floor((1 + seen.min(0) * (1, -1)) / 2 * size).astype(int) + (-1, 2), 0, size)
        right, top = np.clip(np.floor((1 + seen.max(0) * (1, -1)) / 2 * size).astype(int) + (2, -1), 0, size)
        rows, columns = (a.ravel() for a in np.mgrid[top:bottom, left:right])
        start, axes = _camera(body, values)
        x, y = (columns + 0.5) / size * 2 - 1 - values[3], 1 - (rows + 0.5) / size * 2 - values[4]
        rays = np.stack([x, y, np.full_like(x, FOCAL)], -1) @ axes
        rays = (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).astype(np.float32)
        origins = np.broadcast_to(start.astype(np.float32), rays.shape)
        grids.append((np.full(len(rows), index), rows, columns, origins, rays))
    pose, row, column, origin, direction = (np.concatenate(arrays) for arrays in zip(*grids, strict=True))

    with np.errstate(divide="ignore"):
        nearest = np.where(direction[:, 1] < -1e-3, -origin[:, 1] / direction[:, 1], np.inf)  # the ground
    which = np.full(len(nearest), -1)
    for index, part in enumerate(body.parts):
        distance = render._distance(part, origin, direction)
        nearer = distance < nearest
        nearest[nearer], which[nearer] = distance[nearer], index
    hit = which >= 0
    pose, row, column, which, direction = pose[hit], row[hit], column[hit], which[hit], direction[hit]
    surface = origin[hit] + direction * nearest[hit][:, None].astype(np.float32)
    normal = np.empty_like(surface)
    for index in np.unique(which):
        normal[which == index] = render._normal(body.parts[index], surface[which == index])

    ends = np.searchsorted(pose, np.arange(len(poses) + 1))
    shade, gloss = np.empty(len(which), np.float32), np.empty(len(which), np.float32)
    for values, start, end in zip(poses, ends, ends[1:], strict=False):
        mine = slice(start, end)
        sun = _turn(1, values[0]) @ (values[5], NOON, values[6])
        sun = (sun / np.linalg.norm(sun)).astype(np.float32)
        shaded = (
            render._blocked(body.parts, surface[mine] + normal[mine] * 0.02, sun) if shadows else np.zeros(end - start)
        )
        lit = 1 - shaded.astype(np.float32)
        shade[mine], gloss[mine] = render._light(normal[mine], direction[mine], sun, lit)
    paint = np.array([part.paint for part in body.parts])[which]
    points = surface / np.array(body.toy.proportions, np.float32)
    marked = np.stack([render._marked(replace(body.toy, pattern=pattern), points) for pattern in PATTERNS])
    marked &= paint == MAIN
    regions = np.stack([(paint == MAIN) & ~marked, (paint == SECOND) | marked], 1)
    return _Seen(ends, row, column, paint, regions, shade, GLOSS * gloss)


@functools.cache
def _place_colors(place: str, style: str | None) -> tuple[np.ndarray, np.ndarray, float]:
    """Colors of the empty place, (C, 3) each: of its sky or wall, and of its ground in the sun and in a toy's shadow.
    Then how bright its light is.
    """
    rng = random.Random(f"inverse-{place}")
    x, y = (a.ravel() for a in np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48)))
    above, below = [], []
    for _ in range(8):
        tilt, distance = rng.uniform(0.1, 0.3), rng.uniform(2.5, 5.5)
        up, forward = np.array((0, np.cos(tilt), -np.sin(tilt))), np.array((0, -np.sin(tilt), -np.cos(tilt)))
        rays = x[:, None] * (1, 0, 0) + (y + rng.uniform(-0.4, 0.4))[:, None] * up + FOCAL * forward
        rays = (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).astype(np.float32)
        origin = (np.array((0, 0.7, 0)) - distance * forward).astype(np.float32)
        color, ground, brightness = render._place(Scene((), place, seed=rng.randrange(2**31)), origin, rays)
        above.append(color[np.isinf(ground)])
        below += [color[np.isfinite(ground)] * shadow for shadow in (1, 0.8, 0.6, 0.45)]

    def few(colors):
        seen = _styled(np.clip(np.concatenate(colors), 0, 1), style)
        return np.unique(np.round(seen * 20), axis=0).astype(np.float32) / 20

    return few(above), few(below), brightness


def _look(image: Image.Image, size: int, place: str, style: str | None) -> _Look:
    """A picture made small. Its ground begins at the row where the empty place then explains most of it."""
    small = image.convert("RGB").resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float32) / 255
    *kinds, brightness = _place_colors(place, style)

    def unexplained(colors):
        apart = (pixels**2).sum(-1) + ((colors**2).sum(-1) - 2 * pixels @ colors.T).min(-1)
        return np.minimum(apart, UNEXPLAINED)

    above, below = map(unexplained, kinds)
    total = np.append(0, above.sum(1).cumsum()) + np.append(below.sum(1)[::-1].cumsum()[::-1], 0)
    horizon = total.argmin()
    cost = np.concatenate([above[:horizon], below[horizon:]]) + UNLIKELY
    return _Look(pixels, cost, size, style, brightness)


def _errors(look: _Look, seen: _Seen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What paints leave unexplained, in every pose.

    Returns
    -------
    colors : array (poses, patterns, 2, colors)
        Sum of squared errors where a pattern shows the main and the second color.
    fixed : array (poses,)
        The same over the parts that no paint changes.
    place : array (poses,)
        What the empty place leaves unexplained of the same pixels.
    """

    def wrong(colors):  # (..., 3) or (..., R, 3)
        drawn = colors * (seen.shade * look.brightness)[:, None] + (seen.gloss * look.brightness)[:, None]
        error = ((_styled(np.clip(drawn, 0, 1), look.style) - pixels) ** 2).sum(-1)
        return np.minimum(error, UNEXPLAINED)

    pixels, place = look.pixels[seen.row, seen.column], look.cost[seen.row, seen.column]
    painted, regions = wrong(_RGB[:, None]), seen.regions.reshape(-1, len(pixels))
    fixed = np.where(seen.paint >= DARK, wrong(_FIXED[seen.paint]), 0)
    rays = [slice(start, end) for start, end in zip(seen.ends, seen.ends[1:], strict=False)]
    sums = np.stack([regions[:, mine].astype(np.float32) @ painted[:, mine].T for mine in rays])
    return (
        sums.reshape(len(rays), len(PATTERNS), 2, len(COLORS)),
        np.array([fixed[mine].sum() for mine in rays]),
        np.array([place[mine].sum() for mine in rays]),
    )


def _cost(look: _Look, body: _Body, poses: np.ndarray) -> np.ndarray:
    """How much worse than the empty place the toy in its best paint explains its pixels, (poses,)."""
    colors, fixed, place = _errors(look, _see(body, poses, look.size))
    return colors.min(-1).sum(-1).min(-1) + fixed - place


@functools.lru_cache(maxsize=16)
def _templates(toy: Toy, larger: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A toy in coarse poses, each cropped to its pixels.

    Returns
    -------
    list of (array, array, array)
        For each the pose, the first row and column of the crop, and the shade (2 + 2 patterns, h, w): over the dark and
        the white parts, then over the regions of main and second color in each pattern.
    """
    body, found = _body(toy, larger), []
    height = body.outline[:, 1].max()
    for yaw in np.linspace(-0.7, 0.7, 5):
        for fill in (0.42, 0.50, 0.59, 0.69, 0.80):
            pose = np.array([yaw, 0.2, np.log(FOCAL * height / (2 * fill)), 0, 0, 0, 0.7])
            seen = _see(body, pose[None], COARSE)
            row, column = seen.row - seen.row.min(), seen.column - seen.column.min()
            regions = np.concatenate([[seen.paint == DARK, seen.paint > DARK], seen.regions.reshape(-1, len(row))])
            shades = np.zeros((len(regions), row.max() + 1, column.max() + 1), np.float32)
            shades[:, row, column] = regions * seen.shade
            found.append((pose, np.array((seen.row.min(), seen.column.min())), shades))
    return found


def _coarse(look: _Look, body: _Body, count: int) -> list[np.ndarray]:
    """The best poses of templates, each where it fits best in the picture: `count` in all and two of a yaw at most.

    With shade s and paint c the squared error is |I|^2 - 2 c . (s I) + |c|^2 s^2, summed over pixels: two sums over a
    window serve all paints. What this leaves out (gloss, and that errors have a bound) counts when templates are
    compared.
    """
    black = _styled(np.zeros((1, 3), np.float32), look.style)

    def shown(colors):
        return (_styled(colors, look.style) - black) * look.brightness

    fixed, paints, pixels = shown(_FIXED[DARK:]), shown(_RGB), look.pixels - black
    own = (pixels**2).sum(-1) - look.cost
    found = []
    for pose, corner, shades in _templates(body.toy, body.larger):
        windows = sliding_window_view(pixels, shades.shape[1:], (0, 1))  # (down, right, 3, h, w)
        seen = np.tensordot(windows, shades, ((3, 4), (1, 2))).swapaxes(2, 3)  # (down, right, regions, 3)
        power = (shades**2).sum((1, 2))
        error = np.tensordot(
            sliding_window_view(own, shades.shape[1:]), (shades[:4] > 0).any(0).astype(np.float32), ((2, 3), (0, 1))
        )
        for index, color in enumerate(fixed):
            error = error + (color**2).sum() * power[index] - 2 * seen[:, :, index] @ color
        best = ((paints**2).sum(-1) * power[2:, None] - 2 * seen[:, :, 2:] @ paints.T).min(-1)
        error = error + best.reshape(*error.shape, len(PATTERNS), 2).sum(-1).min(-1)
        down, right = np.unravel_index(error.argmin(), error.shape) - corner
        found.append(pose + np.array([0, 0, 0, 2 * right / look.size, -2 * down / look.size, 0, 0]))
    chosen: list[np.ndarray] = []
    for index in _cost(look, body, np.stack(found)).argsort():
        if sum(found[index][0] == other[0] for other in chosen) < 2:
            chosen.append(found[index])
    return chosen[:count]


def _refined(cost_of: Callable, pose: np.ndarray, rounds: int, scale: float) -> tuple[float, np.ndarray]:
    """Walk downhill: each round tries a step to both sides along every coordinate and the joint step to the lowest
    points of the seven parabolas, takes the best and shortens the steps.
    """
    cross = np.concatenate([np.zeros((1, 7)), np.eye(7), -np.eye(7)])
    for _ in range(rounds):
        step = scale * _STEP
        tried = np.clip(pose + cross * step, _LEAST, _MOST)
        cost = cost_of(tried)
        up, down = cost[1:8], cost[8:]
        bend = up + down - 2 * cost[0]
        lowest = np.where(bend > 1e-9, 0.5 * (down - up) / np.maximum(bend, 1e-9), np.sign(down - up))
        joint = np.clip(pose + np.clip(lowest, -1, 1) * step, _LEAST, _MOST)
        tried, cost = np.concatenate([tried, joint[None]]), np.append(cost, cost_of(joint[None]))
        pose, scale = tried[cost.argmin()], 0.6 * scale
    return float(cost.min()), pose


def read(image: Image.Image, toy: Toy, place: str, style: str | None = None, larger: float = 1.0) -> Reading:
    """Find a toy in a picture, rank its paint among its near misses, and read its attributes.

    Parameters
    ----------
    image : picture
        Square, of one toy; any size, any mode.
    toy : Toy
        What to look for: kind and proportions, and to begin with its accessory. Its colors and pattern play no part
        before the ranking, its pose none at all.
    place, style : str
        What the picture was asked for: one of `PLACES`, one of `STYLES` (or None).
    larger : float, optional
        How much larger than usual accessories are in the picture's world.
    """
    coarse, middle, fine = (_look(image, size, place, style) for size in (COARSE, MIDDLE, FINE))
    bare = Toy(toy.kind, "white", "black", proportions=toy.proportions)
    bodies = {accessory: _body(replace(bare, accessory=accessory), larger) for accessory in ACCESSORIES}

    def refined(look, pose, rounds, scale, accessory=toy.accessory):
        return _refined(lambda poses: _cost(look, bodies[accessory], poses), pose, rounds, scale)

    begun = _coarse(coarse, bodies[toy.accessory], 6)
    nearer = sorted((refined(coarse, pose, 2, 0.8) for pose in begun), key=itemgetter(0))
    _, pose = min((refined(middle, pose, 2, 0.5) for _, pose in nearer[:2]), key=itemgetter(0))
    _, pose = refined(middle, pose, 3, 0.3)
    worn = {accessory: refined(middle, pose, 1, 0.15, accessory) for accessory in ACCESSORIES}
    accessory = min(worn, key=lambda one: worn[one][0])
    pose, body = worn[accessory][1], bodies[accessory]

    seen = _see(body, pose[None], FINE, shadows=True)
    colors, fixed, _ = _errors(fine, seen)
    table = colors[0, :, 0, :, None] + colors[0, :, 1, None, :]  # (patterns, main, second)
    table[:, np.eye(len(COLORS), dtype=bool)] = np.inf
    names = list(COLORS)

    def error_of(other):
        return table[PATTERNS.index(other.pattern), names.index(other.main), names.index(other.second)]

    best = np.unravel_index(table.argmin(), table.shape)
    pattern, main, second = PATTERNS[best[0]], names[best[1]], names[best[2]]
    outline = _screen(body, pose)
    low, high = outline.min(0), outline.max(0)
    yaw, tilt, *_, x, z = map(float, pose)
    shown = replace(toy, main=main, second=second, pattern=pattern, accessory=accessory, yaw=yaw, name=None)
    scene = Scene((shown,), place, style, tilt, float(high[1] - low[1]) / 2, tuple((low + high) / 2), (x, NOON, z))
    rank = 1 + sum(bool(error_of(other) <= error_of(toy)) for other in near_misses(toy))
    return Reading(rank, shown, scene, float(np.sqrt((table.min() + fixed[0]) / max(len(seen.row), 1))))
