"""The renderer as judge: the view of a toy that explains a picture best, and which paint explains it best in that view.

Nothing here is trained. The world's own renderer is asked what a toy of given shape would look like in every pose; a
paint's color enters a pixel linearly, so one trace of the rays serves all paints. The search for the pose leaves the
colors free (each paint may have any color, whatever makes the picture most likely), and so favors none of them; only
then are the toy's paint and its near misses compared, all in the same view.

>>> reading = read(image, toy, place="on the beach")
>>> reading.rank, reading.pattern, draw(reading.scene).image

What it needs to know is the toy's kind, proportions and, to begin with, accessory. Pictures in the styles "in black
and white", "in sepia" and "in sunset light" hide or change colors and are not for this judge.
"""

from __future__ import annotations

import functools
import math
import os
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from .render import (
    DARK,
    FOCAL,
    GLOSS,
    MAIN,
    SECOND,
    Part,
    _blocked,
    _distance,
    _frame,
    _light,
    _marked,
    _normal,
    _outline,
    _palette,
    _place,
    _turn,
    build,
)
from .world import ACCESSORIES, COLORS, PATTERNS, PLACES, Scene, Toy, near_misses

COARSE, FINE = 32, 48  # pixels along each side of the pictures that are compared
UNEXPLAINED = float(os.environ.get("UN","0.3"))  # squared distance of colors from which on a pixel counts as nothing that the place can show
UNLIKELY,LEASTK = map(float,os.environ.get("KK","0,0.03").split(','))  # what each pixel left to the place costs: a place has many colors, so a match of one says little
RIDGE = 0.02  # pull of free colors toward middle gray, as a share of the toy's pixels
NOON = 1.15  # height of the sun in its direction (x, NOON, z)
GAIN = 0.2  # by how much a picture may be brighter or darker than the renderer would have it
FOUND = 0.4  # of `Reading.fit`, from which on a toy of this shape is said to be there

# What is searched: yaw and elevation (radians), fill, shift right and up, and the sun's x and z.
_STEP = np.array([0.13, 0.05, 0.045, 0.03, 0.03, 0.3, 0.2])
_LEAST = np.array([-1.0, 0.05, 0.30, -0.9, -0.9, -0.9, 0.4])
_MOST = np.array([1.0, 0.36, 0.92, 0.9, 0.9, 0.9, 1.0])
_SUN = (0.0, 0.7)


@dataclass(frozen=True)
class Reading:
    """What a picture shows of a toy.

    Attributes
    ----------
    rank : place of the toy's own paint among its near misses by distance, 1 the nearest. Equal distances count against
        the toy, and where no toy is found the rank is the last one.
    distances : mean absolute difference of colors in [0, 1] over the toy's pixels, the toy's own paint first, then
        `world.near_misses` in their order.
    scene : the view that explains the picture best, with the paint and accessory read; `render.draw` shows it.
    main, second, pattern, accessory : what is read, each of all there are; None where no toy is found (which is also
        the word for no accessory: ask `found`).
    fit : the share of the variance of colors inside the toy's outline that the drawn toy explains; at most 1, and 0 or
        less where an even color would do as well.
    iou : overlap of the toy's outline with the mask that was given, intersection over union; None without a mask.
    """

    rank: int
    distances: tuple[float, ...]
    scene: Scene
    main: str | None
    second: str | None
    pattern: str | None
    accessory: str | None
    fit: float
    iou: float | None = None

    @property
    def found(self) -> bool:
        """Whether a toy of this shape is there at all."""
        return self.fit >= FOUND


class _Camera(NamedTuple):
    """As `render._frame` has it, but turned with the toy, which itself looks along +z."""

    origin: np.ndarray
    axes: np.ndarray
    shift: np.ndarray
    turn: np.ndarray  # from the toy's coordinates to the world's


class _Hits(NamedTuple):
    """Rays that meet the toy, of one view after another. R rays in all; coordinates are the camera's."""

    view: np.ndarray  # (R,) which view
    pixel: np.ndarray  # (R,) row * size + column
    paint: np.ndarray  # (R,) MAIN to WHITE
    surface: np.ndarray  # (R, 3)
    normal: np.ndarray  # (R, 3)
    direction: np.ndarray  # (R, 3)


class _Shape(NamedTuple):
    """A toy without its paint."""

    parts: list[Part]
    outlines: list[np.ndarray]  # of each part, (P, 3)
    outline: np.ndarray  # the points of all that can be at the edge of the toy, (P, 3)
    proportions: np.ndarray


@functools.lru_cache(maxsize=16)
def _shape(kind: str, accessory: str | None, proportions: tuple[float, float, float]) -> _Shape:
    toy = Toy(kind, "black", "black", "plain", accessory, proportions)
    parts = build(toy)
    outlines = [_outline([part]) for part in parts]
    points = np.concatenate(outlines)
    # The camera asks for the extremes alone, so points that are outermost in no direction only cost time.
    height, angle = np.meshgrid(np.linspace(-1, 1, 15), np.linspace(0, 2 * math.pi, 40, endpoint=False))
    around = np.sqrt(1 - height**2)
    directions = np.stack([around * np.cos(angle), height, around * np.sin(angle)], -1).reshape(-1, 3)
    outermost = np.unique((points @ directions.T).argmax(0))
    return _Shape(parts, outlines, points[outermost], np.array(proportions, np.float32))


def _camera(outline: np.ndarray, pose) -> _Camera:
    yaw, elevation, fill, x, y = map(float, pose[:5])
    turn = _turn(1, -yaw)
    origin, axes, shift = _frame(outline @ turn.T, Scene((), "", elevation=elevation, fill=fill, shift=(x, y)))
    return _Camera(turn.T @ origin, axes @ turn, shift, turn)


def _screen(points: np.ndarray, camera: _Camera) -> np.ndarray:
    """Where points (P, 3) appear, (P, 2), in half picture heights from the center, y up."""
    view = (points - camera.origin) @ camera.axes.T
    return FOCAL * view[:, :2] / view[:, 2:] - camera.shift


def _settled(outline: np.ndarray, camera: _Camera, pose) -> np.ndarray:
    """The pose whose fill and shift are those that `outline` really has before this camera.

    The frame's edges hold back a toy that is asked to be larger or farther out, and there the search would find no
    slope.
    """
    screen = _screen(outline, camera)
    low, high = screen.min(0), screen.max(0)
    pose = np.array(pose, float)
    pose[2:5] = (high[1] - low[1]) / 2, *((low + high) / 2)
    return pose


def _rays(camera: _Camera, rows: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """Unit directions through the middles of pixels, (R, 3)."""
    screen = np.stack([(columns + 0.5) / size * 2 - 1, 1 - (rows + 0.5) / size * 2], -1) + camera.shift
    direction = (screen @ camera.axes[:2] + FOCAL * camera.axes[2]).astype(np.float32)
    return direction / np.sqrt((direction**2).sum(-1, keepdims=True))


def _trace(shape: _Shape, cameras: list[_Camera], size: int) -> _Hits:
    """The toy from every camera, one ray through the middle of each pixel of size x size."""
    ends = np.cumsum([0, *(len(outline) for outline in shape.outlines)])[:-1]
    outline, boxes, rays = np.concatenate(shape.outlines), [], []
    for index, camera in enumerate(cameras):
        seen = _screen(outline, camera)
        low, high = np.minimum.reduceat(seen, ends), np.maximum.reduceat(seen, ends)
        margin = 0.02 + 0.05 * (high - low)  # an outline is of points, with a little of the part between them
        left, bottom = np.floor((1 + (low - margin) * (1, -1)) / 2 * size + (0, 1)).astype(int).clip(0, size).T
        right, top = np.floor((1 + (high + margin) * (1, -1)) / 2 * size + (1, 0)).astype(int).clip(0, size).T
        first, start = top.min(), left.min()
        rows, columns = (a.ravel() for a in np.mgrid[first : bottom.max(), start : right.max()])
        boxes.append((top - first, bottom - first, left - start, right - start, np.full(len(top), right.max() - start)))
        rays.append((np.full(len(rows), index), rows * size + columns, _rays(camera, rows, columns, size)))
    view, pixel, direction = (np.concatenate(column) for column in zip(*rays, strict=True))
    offset = np.searchsorted(view, np.arange(len(cameras)))
    origin = np.array([camera.origin for camera in cameras], np.float32)
    with np.errstate(divide="ignore"):
        nearest = np.where(direction[:, 1] < -1e-3, -origin[view, 1] / direction[:, 1], np.inf)  # the ground
    which = np.full(len(view), -1)
    for index, (part, box) in enumerate(zip(shape.parts, np.array(boxes).transpose(2, 1, 0), strict=True)):
        top, bottom, left, right, width = box  # (views,) each: only rays in the part's own rectangle can meet it
        wide = right - left
        count = (bottom - top) * wide
        of = np.repeat(np.arange(len(cameras)), count)
        row, column = np.divmod(np.arange(len(of)) - np.repeat(count.cumsum() - count, count), np.maximum(wide, 1)[of])
        rays = (offset + top * width + left)[of] + row * width[of] + column
        distance = _distance(part, origin[of], direction[rays])
        nearer = distance < nearest[rays]
        nearest[rays[nearer]], which[rays[nearer]] = distance[nearer], index
    hit = np.flatnonzero(which >= 0)
    which, view, direction = which[hit], view[hit], direction[hit]
    surface = origin[view] + direction * nearest[hit][:, None].astype(np.float32)
    normal = np.empty_like(surface)
    for index in np.unique(which):
        normal[which == index] = _normal(shape.parts[index], surface[which == index])
    return _Hits(view, pixel[hit], np.array([part.paint for part in shape.parts])[which], surface, normal, direction)


def _shaded(hits: _Hits, cameras: list[_Camera], suns, shape: _Shape | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What `render._light` says of every ray, (R,) and (R,), and with `shape` the toy's shadows on itself."""
    shade, gloss = np.empty(len(hits.view), np.float32), np.empty(len(hits.view), np.float32)
    ends = np.searchsorted(hits.view, np.arange(len(cameras) + 1))
    for camera, (x, z), start, end in zip(cameras, suns, ends, ends[1:], strict=False):
        mine = slice(start, end)
        sun = camera.turn.T @ np.array((x, NOON, z))
        sun = (sun / np.linalg.norm(sun)).astype(np.float32)
        lit = 1.0
        if shape:
            lit = 1 - _blocked(shape.parts, hits.surface[mine] + hits.normal[mine] * 0.02, sun).astype(np.float32)
        shade[mine], gloss[mine] = _light(hits.normal[mine], hits.direction[mine], sun, lit)
    return shade, GLOSS * gloss


def _regions(hits: _Hits, shape: _Shape) -> np.ndarray:
    """Which rays see the main color and which the second, by pattern: (patterns, 2, R) bool."""
    main, second, points = hits.paint == MAIN, hits.paint == SECOND, hits.surface / shape.proportions
    marked = np.stack([_marked(pattern, points) for pattern in PATTERNS])
    return np.stack([main & ~marked, second | (main & marked)], 1)


def _fixed(hits: _Hits, shade: np.ndarray, gloss: np.ndarray) -> np.ndarray:
    """The part of each ray's color that no paint changes, (R, 3): dark and white parts, and gloss."""
    palette = _palette(Toy("cat", "black", "black"))
    palette[:DARK] = 0
    return palette[hits.paint] * shade[:, None] + gloss[:, None]


def _small(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX), np.float32) / 255


@functools.lru_cache(maxsize=None)
def _place_colors(place: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Colors that the empty place shows at this size, (C, 3), which of them its ground has, (C,), and how bright its
    light is.
    """
    rng = random.Random(f"inverse-{place}")
    toy = _shape("snowman", None, (1.0, 1.0, 1.0)).outline
    rows, columns = (a.ravel() for a in np.mgrid[:64, :64])
    seen = []
    for _ in range(8):
        pose = (0.0, rng.uniform(0.1, 0.3), rng.uniform(0.45, 0.8), 0.0, rng.uniform(-0.3, 0.3))
        camera = _camera(toy, pose)
        scene = Scene((), place, seed=rng.randrange(2**31))
        color, ground, brightness = _place(scene, camera.origin.astype(np.float32), _rays(camera, rows, columns, 64))
        color = color.reshape(32, 2, 32, 2, 3).mean((1, 3)).reshape(-1, 3)
        ground = np.isfinite(ground).reshape(32, 2, 32, 2).all((1, 3)).reshape(-1, 1)
        seen.append(np.concatenate([color, ground], 1))
    kinds = np.unique(np.round(np.concatenate(seen) * (16, 16, 16, 1)), axis=0).astype(np.float32)
    return kinds[:, :3] / 16, kinds[:, 3] > 0, brightness


def _place_cost(pixels: np.ndarray, place: str) -> np.ndarray:
    """How badly the empty place explains each pixel, (size, size): squared distance to the nearest color that its sky
    or wall has above the horizon and its ground below, in sun or shade. The horizon is where it serves best.
    """
    colors, ground, brightness = _place_colors(place)
    flat = pixels.reshape(-1, 3)
    cross, square = flat @ colors.T, (colors**2).sum(-1)
    shadow = np.clip(cross / np.maximum(square, 1e-6), np.where(ground, 0.38, 1.0), 1.0).astype(np.float32)
    distance = (flat**2).sum(-1, keepdims=True) - 2 * shadow * cross + shadow**2 * square
    # Units of the place's own light, so that the night's small differences count as much as the day's.
    distance = distance / brightness**2 + 0.02 * (1 - shadow)
    above, below = (
        np.minimum(distance[:, kind].min(1), UNEXPLAINED).reshape(pixels.shape[:2]) for kind in (~ground, ground)
    )
    total = np.append(0, above.sum(1).cumsum()) + np.append(below.sum(1)[::-1].cumsum()[::-1], 0)
    horizon = int(total.argmin())
    unlikely = UNLIKELY * (flat**2).sum(-1).reshape(pixels.shape[:2]) / brightness**2 + LEASTK
    return np.concatenate([above[:horizon], below[horizon:]]) + unlikely


class _View(NamedTuple):
    """A picture at one size, in units of the place's light, and what each pixel costs if it is not the toy's."""

    pixels: np.ndarray  # (size, size, 3)
    cost: np.ndarray  # (size, size)
    size: int


def _look(image: Image.Image, size: int, place: str, mask: np.ndarray | None) -> _View:
    pixels = _small(image, size)
    if mask is None:
        cost = _place_cost(pixels, place)
    else:
        share = Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
        cost = UNEXPLAINED * (2 * np.asarray(share) - 1)
    return _View(pixels / _place_colors(place)[2], cost, size)


class _Templates(NamedTuple):
    """A shape in T coarse poses, in the middle of the picture; `paint`, `fixed` and `mask` as conjugate spectra."""

    poses: list[tuple[float, ...]]
    paint: np.ndarray  # (T, patterns, 2, size, size // 2 + 1)
    fixed: np.ndarray  # (T, 3, ...)
    mask: np.ndarray  # (T, ...)
    power: np.ndarray  # (T, patterns, 2): squared shade over the pixels of each paint
    gloss: np.ndarray  # (T, patterns, 2): shade times gloss over the pixels of each paint
    constant: np.ndarray  # (T,): squared fixed colors
    area: np.ndarray  # (T,) pixels
    valid: np.ndarray  # (T, size, size): the shifts that leave the toy whole


@functools.lru_cache(maxsize=8)
def _templates(kind: str, accessory: str | None, proportions: tuple[float, float, float]) -> _Templates:
    shape = _shape(kind, accessory, proportions)
    outline = shape.outline
    poses = [(yaw, 0.2, fill) for yaw in np.linspace(-0.8, 0.8, 7) for fill in (0.42, 0.50, 0.59, 0.70, 0.82)]
    cameras = [_camera(outline, (*pose, 0, 0)) for pose in poses]
    hits = _trace(shape, cameras, COARSE)
    shade, gloss = _shaded(hits, cameras, [_SUN] * len(poses))
    cell, cells = hits.view * COARSE**2 + hits.pixel, (len(poses), COARSE, COARSE)

    def plane(values):
        return np.bincount(cell, values, math.prod(cells)).reshape(cells)

    paint = np.stack([[plane(shade * region) for region in pair] for pair in _regions(hits, shape)])
    paint = np.moveaxis(paint, 2, 0)
    fixed = np.stack([plane(channel) for channel in _fixed(hits, shade, gloss).T], 1)
    mask = plane(np.ones(len(cell)))
    shifts = np.fft.fftfreq(COARSE, 1 / COARSE)  # 0, 1, ..., -1: as the correlation by spectra orders them
    valid = np.ones(cells, bool)
    for axis, across in ((1, mask.any(2)), (2, mask.any(1))):
        first, last = across.argmax(1), COARSE - 1 - across[:, ::-1].argmax(1)
        fits = (shifts > -first[:, None]) & (shifts < COARSE - 1 - last[:, None])
        valid &= np.expand_dims(fits, 3 - axis)

    def spectrum(values):
        return np.conj(np.fft.rfft2(values)).astype(np.complex64)

    return _Templates(
        poses,
        spectrum(paint),
        spectrum(fixed),
        spectrum(mask),
        (paint**2).sum((-2, -1)),
        (paint * plane(gloss)[:, None, None]).sum((-2, -1)),
        (fixed**2).sum((1, 2, 3)),
        mask.sum((1, 2)),
        valid,
    )


def _coarse(view: _View, toy: Toy, each: int) -> tuple[float, list[np.ndarray]]:
    """Every coarse pose at every place in the picture, by correlation: the least cost (see `_cost`), and the best
    poses, `each` for every yaw.
    """
    t = _templates(toy.kind, toy.accessory, toy.proportions)
    seen = np.fft.rfft2(np.moveaxis(view.pixels, -1, 0)).astype(np.complex64)

    def correlated(spectrum):
        return np.fft.irfft2(spectrum, s=(COARSE, COARSE))

    own = correlated(t.mask * np.fft.rfft2((view.pixels**2).sum(-1) - view.cost))
    own += t.constant[:, None, None] - 2 * correlated((t.fixed * seen).sum(1))
    ridge = RIDGE * t.area[:, None, None, None, None, None]
    lit = correlated(t.paint[:, :, :, None] * seen) - t.gloss[..., None, None, None]
    gain = (lit + 0.5 * ridge) ** 2 / (t.power[..., None, None, None] + ridge)
    cost = own + 1.5 * ridge[..., 0, 0, 0] - gain.sum((2, 3)).max(1)
    cost = np.where(t.valid, cost, np.inf).reshape(len(t.poses), -1)
    best, shift = cost.min(1), cost.argmin(1)
    chosen, count = [], {}
    for index in best.argsort():
        yaw = t.poses[index][0]
        count[yaw] = count.get(yaw, 0) + 1
        if count[yaw] <= each:
            down, right = ((s + COARSE // 2) % COARSE - COARSE // 2 for s in divmod(int(shift[index]), COARSE))
            chosen.append(np.array([*t.poses[index], right * 2 / COARSE, -down * 2 / COARSE, *_SUN]))
    return float(best.min()), chosen


def _cost(view: _View, hits: _Hits, regions: np.ndarray, shade: np.ndarray, fixed: np.ndarray, views: int) -> np.ndarray:
    """How much worse than the place a toy in the best of all colors explains its pixels, (views,); negative where it
    explains them better.

    With the shade s of each ray and a free color c for each of the two paints, the squared error |I - s c|^2 summed
    over a paint's rays is least at c = sum(s I) / sum(s^2); the best pattern counts.
    """
    pixels = view.pixels.reshape(-1, 3)[hits.pixel] - fixed

    def total(values):
        return np.bincount(hits.view, values, views)

    ridge = RIDGE * total(np.ones(len(shade)))
    painted = hits.paint < DARK
    seen, power = (pixels * shade[:, None]).T * painted, shade * shade * painted
    gains = []
    for pair in regions:
        gain = np.zeros(views)
        for region in pair:
            below = total(power * region) + ridge
            gain += sum((total(channel * region) + 0.5 * ridge) ** 2 / below for channel in seen)
        gains.append(gain)
    own = total((pixels**2).sum(-1) - view.cost.ravel()[hits.pixel])
    return (own + 1.5 * ridge - np.max(gains, 0)) * (COARSE / view.size) ** 2


def _refined(view: _View, shape: _Shape, poses: list[np.ndarray], rounds: int, scale: float):
    """Poses moved downhill together, best first, and their costs.

    Each round tries every coordinate a step to both sides, then the joint step to the vertices of the seven parabolas,
    takes the best and shortens the steps.
    """
    outline = shape.outline

    def costs(batch):
        cameras = [_camera(outline, pose) for pose in batch]
        hits = _trace(shape, cameras, view.size)
        shade, gloss = _shaded(hits, cameras, [pose[5:] for pose in batch])
        return _cost(view, hits, _regions(hits, shape), shade, _fixed(hits, shade, gloss), len(batch))

    cross = np.concatenate([np.zeros((1, 7)), np.eye(7), -np.eye(7)])
    poses = np.array([_settled(outline, _camera(outline, pose), pose) for pose in poses])
    for _ in range(rounds):
        step = scale * _STEP
        tried = np.clip(poses[:, None] + cross * step, _LEAST, _MOST)  # (poses, 15, 7)
        cost = costs(tried.reshape(-1, 7)).reshape(len(poses), 15)
        middle, up, down = cost[:, :1], cost[:, 1:8], cost[:, 8:]
        bend = up + down - 2 * middle
        vertex = np.where(bend > 1e-9, 0.5 * (down - up) / np.maximum(bend, 1e-9), np.sign(down - up))
        joint = np.clip(poses + np.clip(vertex, -1, 1) * step, _LEAST, _MOST)
        tried = np.concatenate([tried, joint[:, None]], 1)
        cost = np.concatenate([cost, costs(joint)[:, None]], 1)
        best = cost.argmin(1)
        poses, least = tried[np.arange(len(poses)), best], cost.min(1)
        poses = np.array([_settled(outline, _camera(outline, pose), pose) for pose in poses])
        scale *= 0.6
    order = least.argsort()
    return poses[order], least[order]


def _paint_table(view: _View, shape: _Shape, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every paint in one view, drawn as the renderer draws but without its ground.

    Returns
    -------
    distance : (patterns, colors, colors) mean absolute difference from the picture by pattern, main and second color;
        inf where both are the same.
    error : the same of squared differences, as a share of the picture's variance over the same pixels.
    mask : (size, size) bool, the pixels that are more toy than place.
    """
    size, rays = view.size, 2  # rays per pixel along each side
    camera = _camera(shape.outline, pose)
    hits = _trace(shape, [camera], size * rays)
    shade, gloss = _shaded(hits, [camera], [pose[5:]], shape)
    row, column = np.divmod(hits.pixel, size * rays)
    cell = row // rays * size + column // rays
    count = np.bincount(cell, minlength=size * size)
    on = np.flatnonzero(count > rays * rays / 2)

    def mean(values):
        return (np.bincount(cell, values, size * size)[on] / count[on]).astype(np.float32)

    pixels, weight = view.pixels.reshape(-1, 3)[on], count[on] / max(count[on].sum(), 1)
    fixed = np.stack([mean(channel) for channel in _fixed(hits, shade, gloss).T], -1)
    colors = np.array(list(COLORS.values()), np.float32)[:, None]
    spread = (((pixels - weight @ pixels) ** 2).sum(-1) * weight).sum()
    tables = []
    for main, second in _regions(hits, shape):
        drawn = (colors * mean(shade * main)[:, None])[:, None] + colors * mean(shade * second)[:, None] + fixed
        drawn = np.minimum(drawn, 1)  # (main, second, pixels, 3)
        gain = (drawn * pixels).sum((-2, -1)) / np.maximum((drawn**2).sum((-2, -1)), 1e-9)
        difference = drawn * np.clip(gain, 1 - GAIN, 1 + GAIN)[..., None, None] - pixels
        tables.append((np.abs(difference).mean(-1) @ weight, (difference**2).sum(-1) @ weight / max(spread, 1e-6)))
    distance, error = (np.stack(table) for table in zip(*tables, strict=True))
    distance[:, np.eye(len(COLORS), dtype=bool)] = np.inf
    mask = np.zeros(size * size, bool)
    mask[on] = True
    return distance, error, mask.reshape(size, size)


def read(image: Image.Image, toy: Toy, place: str | None = None, mask: np.ndarray | None = None) -> Reading:
    """Find a toy in a picture, rank its paint among its near misses, and read its attributes.

    Parameters
    ----------
    image : a square picture with one toy of about the world's proportions; any size, any mode.
    toy : what to look for. Its colors and pattern play no part before the ranking; its pose plays none at all.
    place : one of `PLACES`; found from the picture where it is not given.
    mask : (H, W) in [0, 1] or bool, where the toy is; only how this looks is then explained, not what is around it.

    Raises
    ------
    ValueError : the place is none of `PLACES`.
    """
    if place is not None and place not in PLACES:
        raise ValueError(f"unknown place {place!r}: the places are {', '.join(PLACES)}.")
    if place is None:
        rough = {name: _place_cost(_small(image, COARSE), name).sum() for name in PLACES}
        likely = sorted(rough, key=rough.get)[:2]
        looks = {name: _look(image, COARSE, name, mask) for name in likely}
        found = {name: _coarse(look, toy, int(os.environ.get('EACH','2'))) for name, look in looks.items()}
        place = min(likely, key=lambda name: rough[name] + found[name][0])
        coarse, poses = looks[place], found[place][1]
    else:
        coarse = _look(image, COARSE, place, mask)
        poses = _coarse(coarse, toy, int(os.environ.get('EACH','2')))[1]
    fine, shape = _look(image, FINE, place, mask), _shape(toy.kind, toy.accessory, toy.proportions)
    poses, _ = _refined(coarse, shape, poses, 1, 1.0)
    poses, _ = _refined(coarse, shape, poses[:int(os.environ.get('KEEP','6'))], 2, 0.8)
    poses, _ = _refined(fine, shape, poses[:2], 3, 0.5)
    poses, _ = _refined(fine, shape, poses[:1], 4, 0.3)

    # The same body with every accessory before the same camera, each moved a little where that serves it.
    camera, worn = _camera(shape.outline, poses[0]), []
    for accessory in ACCESSORIES:
        other = _shape(toy.kind, accessory, toy.proportions)
        found, cost = _refined(fine, other, [_settled(other.outline, camera, poses[0])], 2, 0.3)
        worn.append((cost[0], accessory, other, found[0]))
    _, accessory, shape, pose = min(worn, key=lambda option: option[0])

    table, error, silhouette = _paint_table(fine, shape, pose)
    names = list(COLORS)
    candidates = [toy, *near_misses(toy, 11)]
    distances = [
        float(table[PATTERNS.index(other.pattern), names.index(other.main), names.index(other.second)])
        for other in candidates
    ]
    best = np.unravel_index(table.argmin(), table.shape)
    fit = float(1 - error[best])
    pattern, main, second = PATTERNS[best[0]], names[best[1]], names[best[2]]
    yaw, elevation, fill, x, y, *sun = map(float, pose)
    seen = replace(toy, main=main, second=second, pattern=pattern, accessory=accessory, yaw=yaw, name=None)
    iou = None
    if mask is not None:
        inside = np.asarray(Image.fromarray(np.asarray(mask, np.float32)).resize((FINE, FINE), Image.Resampling.BOX)) > 0.5
        iou = float((inside & silhouette).sum() / max((inside | silhouette).sum(), 1))
    found = fit >= FOUND
    return Reading(
        rank=sum(other <= distances[0] for other in distances) if found else len(candidates),
        distances=tuple(distances),
        scene=Scene((seen,), place, None, elevation, fill, (x, y), (sun[0], NOON, sun[1])),
        main=main if found else None,
        second=second if found else None,
        pattern=pattern if found else None,
        accessory=accessory if found else None,
        fit=fit,
        iou=iou,
    )
