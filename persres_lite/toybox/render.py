"""How a Toybox scene looks: a small ray tracer in numpy, with the exact mask of each toy.

Toys are unions of ellipsoids, boxes and cones, each a unit solid under an affine map, so every ray meets every part
in closed form: no marching, exact edges, exact masks. One picture of 128 x 128 takes about a
fortieth of a second.

Coordinates: y is up, the ground is y = 0, the camera looks along -z. Lengths are in toy units; a toy is about 1.4 high.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from .world import COLORS, Scene, Toy

SIZE = 128  # pixels along each side of a picture
FOCAL = 2.6  # of the camera, in half picture heights
GLOSS = 0.22  # how bright a mirrored sun is
MAIN, SECOND, DARK, WHITE = range(4)  # what a part is painted with

# Stripes, dots or two checks per unit of length: about three or more over the height of the largest part that has the
# main paint (2.4 for the car), so that a flat body shows a pattern, too; over the height of a whole toy three to eight.
# Dots are balls on a lattice: a box shows them where its faces lie near the lattice, hence the car's and the house's.
REPEATS = {
    "duck": 3.8, "robot": 4.7, "mug": 2.7, "car": 5.0, "rocket": 2.7,
    "house": 4.3, "mushroom": 3.6, "snowman": 3.4, "cat": 3.4, "teapot": 2.9,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A unit solid ("ball", "box", or "cone": a frustum along y with radius 1 below and `top` above) under an
    affine map.
    """

    solid: str
    matrix: np.ndarray  # (3, 3)
    center: np.ndarray  # (3,)
    paint: int
    top: float = 1.0


@dataclass(frozen=True)
class Picture:
    """A drawn scene: `image` (size, size, 3) uint8 and `masks` (toys, size, size) uint8, 255 where a pixel is all
    toy.
    """

    image: np.ndarray
    masks: np.ndarray


def _turn(axis: int, angle: float) -> np.ndarray:
    a, b = [k for k in range(3) if k != axis]
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def _ball(center, radii, paint=MAIN):
    return Part("ball", np.diag(np.broadcast_to(np.asarray(radii, float), 3)), np.array(center, float), paint)


def _box(center, half, paint=MAIN, turn=None):
    turn = np.eye(3) if turn is None else turn
    return Part("box", turn @ np.diag(np.array(half, float)), np.array(center, float), paint)


def _cone(start, end, radius, top=1.0, paint=MAIN):
    """A frustum from `start` to `end`, `radius` at the start and `top` times that at the end."""
    start, end = np.array(start, float), np.array(end, float)
    axis = (end - start) / 2
    up = axis / np.linalg.norm(axis)
    side = np.cross(up, (1.0, 0.0, 0.0) if abs(up[0]) < 0.9 else (0.0, 0.0, 1.0))
    side /= np.linalg.norm(side)
    matrix = np.stack([side * radius, axis, np.cross(side, up) * radius], axis=1)
    return Part("cone", matrix, (start + end) / 2, paint, top)


def _pair(part_of, x: float) -> list[Part]:
    """The same part on both sides of the toy."""
    return [part_of(x), part_of(-x)]


def _ring(center, radius, thickness, paint, start, stop, pieces=6):
    """An arc in the xy plane, as a chain of short cylinders."""
    angles = np.linspace(start, stop, pieces + 1)
    points = [np.array(center) + radius * np.array([math.cos(a), math.sin(a), 0.0]) for a in angles]
    return [_cone(p, q, thickness, paint=paint) for p, q in zip(points, points[1:], strict=False)]


FINS = [_turn(1, a) for a in (math.pi / 2, math.pi / 2 + 2.094, math.pi / 2 - 2.094)]  # of the rocket
PARTS = {
    "duck": [
        _ball((0, 0.42, -0.05), (0.42, 0.40, 0.52)),
        _ball((0, 1.0, 0.22), 0.34),
        _ball((0, 0.93, 0.60), (0.19, 0.08, 0.20), SECOND),
        *_pair(lambda x: _ball((x, 0.50, -0.08), (0.12, 0.22, 0.34), SECOND), 0.40),
        *_pair(lambda x: _ball((x, 1.10, 0.50), 0.065, DARK), 0.16),
        _cone((0, 0.55, -0.42), (0, 0.80, -0.72), 0.18, 0.2),
    ],
    "robot": [
        _box((0, 0.60, 0), (0.34, 0.32, 0.24)),
        _box((0, 1.16, 0), (0.27, 0.22, 0.22), SECOND),
        *_pair(lambda x: _box((x, 0.14, 0.03), (0.12, 0.14, 0.18), DARK), 0.19),
        *_pair(lambda x: _cone((x, 0.84, 0), (x * 1.25, 0.36, 0.12), 0.10, 1.0, SECOND), 0.42),
        *_pair(lambda x: _ball((x, 1.19, 0.22), 0.075, WHITE), 0.12),
        _cone((0, 1.36, 0), (0, 1.52, 0), 0.035, 1.0, DARK),
        _ball((0, 1.56, 0), 0.085),
    ],
    "mug": [
        _cone((0, 0, 0), (0, 1.15, 0), 0.48, 1.06),
        _cone((0, 1.10, 0), (0, 1.20, 0), 0.53, 1.0, SECOND),
        _cone((0, 1.15, 0), (0, 1.215, 0), 0.44, 1.0, DARK),
        *_ring((0.46, 0.58, 0), 0.32, 0.10, SECOND, -1.6, 1.6),
    ],
    "car": [
        _box((0, 0.44, 0), (0.78, 0.24, 0.40)),
        _box((-0.08, 0.86, 0), (0.46, 0.22, 0.34), SECOND),
        _box((-0.08, 0.87, 0.33), (0.36, 0.13, 0.03), WHITE),
        *[_cone((x, 0.22, z), (x, 0.22, z * 1.3), 0.22, 1.0, DARK) for x in (-0.45, 0.45) for z in (0.33, -0.33)],
        *_pair(lambda x: _cone((x, 0.22, 0.42), (x, 0.22, 0.45), 0.10, 1.0, WHITE), 0.45),
        _ball((0.77, 0.48, 0.24), 0.08, WHITE),
    ],
    "rocket": [
        _ball((0, 0.82, 0), (0.34, 0.80, 0.34)),
        _cone((0, 1.24, 0), (0, 1.70, 0), 0.285, 0.05, SECOND),
        *[_box(turn @ np.array([0.40, 0.26, 0.0]), (0.20, 0.26, 0.05), SECOND, turn) for turn in FINS],
        _ball((0, 0.98, 0.26), (0.15, 0.15, 0.12), WHITE),
        _ball((0, 0.98, 0.32), (0.10, 0.10, 0.08), DARK),
    ],
    "house": [
        _box((0, 0.45, 0), (0.52, 0.45, 0.42)),
        _box((0, 0.90, 0), (0.44, 0.44, 0.50), SECOND, np.diag([1.0, 0.78, 1.0]) @ _turn(2, math.pi / 4)),
        _box((0, 0.28, 0.41), (0.13, 0.28, 0.04), DARK),
        *_pair(lambda x: _box((x, 0.58, 0.41), (0.11, 0.12, 0.03), WHITE), 0.33),
        _box((0.32, 1.25, -0.1), (0.09, 0.22, 0.09), DARK),
    ],
    "mushroom": [
        _ball((0, 0.88, 0), (0.66, 0.42, 0.66)),
        _cone((0, 0, 0), (0, 0.80, 0), 0.28, 0.75, SECOND),
        _cone((0, 0.60, 0), (0, 0.66, 0), 0.40, 1.0, WHITE),
    ],
    "snowman": [
        _ball((0, 0.40, 0), 0.44),
        _ball((0, 0.95, 0), 0.33),
        _ball((0, 1.38, 0), 0.25),
        _cone((0, 1.13, 0), (0, 1.24, 0), 0.27, 0.95, SECOND),
        _box((0.14, 1.02, 0.30), (0.07, 0.16, 0.04), SECOND),
        _cone((0, 1.38, 0.20), (0, 1.35, 0.48), 0.075, 0.1, SECOND),
        *_pair(lambda x: _ball((x, 1.46, 0.20), 0.05, DARK), 0.10),
        *_pair(lambda x: _cone((x, 1.0, 0), (x * 2.1, 1.25, 0.05), 0.045, 0.6, DARK), 0.28),
    ],
    "cat": [
        _ball((0, 0.42, -0.02), (0.36, 0.44, 0.34)),
        _ball((0, 1.02, 0.06), (0.38, 0.32, 0.32)),
        *_pair(lambda x: _cone((x, 1.20, 0.04), (x * 1.25, 1.52, 0.04), 0.15, 0.05, SECOND), 0.22),
        *_pair(lambda x: _ball((x, 1.07, 0.33), (0.075, 0.085, 0.05), WHITE), 0.15),
        *_pair(lambda x: _ball((x, 1.07, 0.37), 0.04, DARK), 0.15),
        _ball((0, 0.92, 0.36), (0.13, 0.09, 0.07), SECOND),
        *_pair(lambda x: _ball((x, 0.10, 0.28), (0.13, 0.11, 0.17), SECOND), 0.17),
        *_ring((0.30, 0.38, -0.15), 0.30, 0.075, SECOND, -1.2, 1.3, 5),
    ],
    "teapot": [
        _ball((0, 0.54, 0), (0.56, 0.52, 0.54)),
        _cone((0, 0.94, 0), (0, 1.06, 0), 0.30, 0.7, SECOND),
        _ball((0, 1.14, 0), 0.11, SECOND),
        _cone((0.46, 0.40, 0), (0.92, 0.98, 0), 0.17, 0.5, SECOND),
        *_ring((-0.50, 0.58, 0), 0.34, 0.085, SECOND, 1.4, 4.9),
    ],
}

# Where an accessory sits: top of the head, and its front.
_HEAD = {
    "duck": (0, 1.30, 0.22), "robot": (0.14, 1.36, 0), "mug": (0, 1.18, 0.30), "car": (-0.08, 1.06, 0),
    "rocket": (0, 1.62, 0), "house": (0, 1.34, 0), "mushroom": (0, 1.26, 0), "snowman": (0, 1.58, 0),
    "cat": (0, 1.30, 0.05), "teapot": (0, 1.18, 0),
}  # fmt: skip


def _accessory(toy: Toy) -> list[Part]:
    x, y, z = _HEAD[toy.kind]
    if toy.accessory == "hat":
        return [
            _cone((x, y - 0.03, z), (x, y + 0.05, z), 0.42, 1.0, DARK),
            _cone((x, y, z), (x, y + 0.42, z), 0.27, 1.0, SECOND),
        ]
    if toy.accessory == "flag":
        return [
            _cone((x, y - 0.1, z), (x, y + 0.62, z), 0.045, 1.0, DARK),
            _box((x + 0.30, y + 0.42, z), (0.28, 0.19, 0.03), SECOND),
        ]
    if toy.accessory == "bow":
        loops = _pair(lambda dx: _ball((x + dx, y + 0.10, z + 0.08), (0.25, 0.20, 0.12), SECOND), 0.24)
        return [*loops, _ball((x, y + 0.10, z + 0.15), 0.12, DARK)]
    return []


def build(toy: Toy, accessories: float = 1.0) -> list[Part]:
    """The parts of a toy in its own coordinates, standing on the ground at the origin, stretched but not turned.

    What it wears is `accessories` times as large as usual.
    """
    stretch, head = np.diag(toy.proportions), np.array(_HEAD[toy.kind])
    worn = [
        Part(p.solid, accessories * p.matrix, p.center + (accessories - 1) * (p.center - head), p.paint, p.top)
        for p in _accessory(toy)
    ]
    parts = PARTS[toy.kind] + worn
    return [Part(p.solid, stretch @ p.matrix, stretch @ p.center, p.paint, p.top) for p in parts]


def _placed(parts: list[Part], yaw: float, x: float) -> list[Part]:
    turn = _turn(1, -yaw)
    return [Part(p.solid, turn @ p.matrix, turn @ p.center + (x, 0, 0), p.paint, p.top) for p in parts]


def _distance(part: Part, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Distance along each ray to a part, (R,); inf where it misses. Either of `origin` and `direction` may be (3,)."""
    # In the part's own coordinates it is a unit solid, and distances along the rays stay what they were.
    inverse = np.linalg.inv(part.matrix).astype(np.float32)
    ox, oy, oz = inverse @ (origin - part.center.astype(np.float32)).T  # each (R,) or ()
    dx, dy, dz = inverse @ direction.T
    with np.errstate(divide="ignore", invalid="ignore"):
        if part.solid == "box":
            enter, leave = -np.inf, np.inf
            for o, d in ((ox, dx), (oy, dy), (oz, dz)):
                middle, reach = -o / d, 1 / np.abs(d)
                enter, leave = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
            return np.where((enter < leave) & (enter > 1e-3), enter, np.inf)
        if part.solid == "ball":
            a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
            t = (-b - np.sqrt(b * b - a * (ox * ox + oy * oy + oz * oz - 1))) / a  # not a number where the ray misses
            return np.where(t > 1e-3, t, np.inf)
        # The frustum x^2 + z^2 = (k + s y)^2 for |y| < 1, closed by two disks.
        k, s = (1 + part.top) / 2, (part.top - 1) / 2
        w, dw = k + s * oy, s * dy
        a = dx * dx + dz * dz - dw * dw
        b = ox * dx + oz * dz - w * dw
        side = (-b - np.sqrt(b * b - a * (ox * ox + oz * oz - w * w))) / a
        side = np.where((np.abs(oy + dy * side) < 1) & (side > 1e-3), side, np.inf)
        end = np.where(dy > 0, np.float32(-1), np.float32(1))
        disk = (end - oy) / dy
        inside = (ox + dx * disk) ** 2 + (oz + dz * disk) ** 2 < (k + s * end) ** 2
        return np.where(inside & (disk > 1e-3) & (disk < side), disk, side)


def _normal(part: Part, point: np.ndarray) -> np.ndarray:
    """Unit normals (R, 3) of a part at points of its surface."""
    inverse = np.linalg.inv(part.matrix).astype(np.float32)
    p = (point - part.center.astype(np.float32)) @ inverse.T
    if part.solid == "ball":
        n = p
    elif part.solid == "box":
        n = np.where(np.abs(p) >= np.abs(p).max(-1, keepdims=True), np.sign(p), 0)
    else:
        k, s = (1 + part.top) / 2, (part.top - 1) / 2
        n = np.stack([p[:, 0], -s * (k + s * p[:, 1]), p[:, 2]], -1)
        n = np.where(np.abs(p[:, 1:2]) > 0.999, np.sign(p) * np.array((0, 1, 0), np.float32), n)
    n = n @ inverse
    return n / (np.linalg.norm(n, axis=-1, keepdims=True) + 1e-9)


def _first_hit(parts: list[Part], origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest part along each ray (inf for none), and which part it is."""
    distances = np.stack([_distance(part, origin, direction) for part in parts])
    which = distances.argmin(0)
    return distances[which, np.arange(distances.shape[1])], which


def _blocked(parts: list[Part], origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Whether anything stands between each point and the sun."""
    blocked = np.zeros(len(origin), bool)
    for part in parts:
        blocked |= np.isfinite(_distance(part, origin, direction))
    return blocked


def _outline(parts: list[Part]) -> np.ndarray:
    """Points on the surface of every part, (P, 3): enough to know how large the toy will be in the picture."""
    around = np.array([(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 12, endpoint=False)])
    ball = [(x * c, y, z * c) for y, c in ((-1, 0), (-0.7, 0.71), (0, 1), (0.7, 0.71), (1, 0)) for x, z in around]
    corners = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
    points = []
    for part in parts:
        cone = [(x * r, y, z * r) for y, r in ((-1, 1.0), (1, part.top)) for x, z in around]
        local = np.array({"ball": ball, "box": corners, "cone": cone}[part.solid])
        points.append(local @ part.matrix.T + part.center)
    return np.concatenate(points)


def _frame(points: np.ndarray, scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Camera origin, its axes (rows: right, up, forward) and the shift of the picture plane that put `points`
    where the scene says.
    """
    tilt = scene.elevation
    axes = np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, -math.sin(tilt), -math.cos(tilt)]])
    target = (points.min(0) + points.max(0)) / 2
    distance = 6.0
    for _ in range(4):  # projected size goes nearly as 1 / distance, so this converges at once
        screen = _on_screen(points, target - distance * axes[2], axes)
        width, height = np.ptp(screen, axis=0) / 2  # fractions of the picture
        distance *= max(height / scene.fill, width / 0.92)
    origin = target - distance * axes[2]
    screen = _on_screen(points, origin, axes)
    middle = (screen.min(0) + screen.max(0)) / 2
    room = np.maximum(0.96 - np.ptp(screen, axis=0) / 2, 0)  # how far it may move without leaving the picture
    return origin, axes, middle - np.clip(scene.shift, -room, room)


def _on_screen(points: np.ndarray, origin: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Where points appear in the picture plane, (P, 2)."""
    view = (points - origin) @ axes.T
    return FOCAL * view[:, :2] / view[:, 2:]


def _mix(a, b, k):
    k = np.asarray(k)[..., None]
    return np.asarray(a, np.float32) * (1 - k) + np.asarray(b, np.float32) * k


# Under the open sky: the sky low and high, the ground near and far.
OUTDOORS = {
    "on the beach": ((0.78, 0.90, 0.98), (0.36, 0.66, 0.96), (0.94, 0.84, 0.60), (0.96, 0.89, 0.70)),
    "in the snow": ((0.90, 0.93, 0.97), (0.66, 0.76, 0.90), (0.95, 0.97, 1.00), (0.88, 0.92, 0.98)),
    "on the grass": ((0.82, 0.92, 0.99), (0.38, 0.68, 0.97), (0.30, 0.62, 0.20), (0.50, 0.76, 0.40)),
    "in the desert": ((1.00, 0.90, 0.66), (0.95, 0.70, 0.42), (0.86, 0.56, 0.30), (0.93, 0.68, 0.42)),
    "at night": ((0.13, 0.13, 0.34), (0.04, 0.04, 0.15), (0.12, 0.15, 0.25), (0.10, 0.11, 0.27)),
}


def _place(scene: Scene, origin: np.ndarray, direction: np.ndarray):
    """Colors of the empty place, (R, 3), the distance to its ground (inf where there is none), and how bright its
    light is.
    """
    rng = random.Random(scene.seed)
    tint = 1 + 0.12 * (rng.random() - 0.5)
    with np.errstate(divide="ignore"):
        ground = np.where(direction[:, 1] < -1e-3, -origin[1] / direction[:, 1], np.inf)
    t = np.minimum(ground, 40.0)
    x, z = origin[0] + direction[:, 0] * t, origin[2] + direction[:, 2] * t
    if scene.place in OUTDOORS:
        color, floor = _outdoors(scene.place, rng, tint, direction, t, x, z)
        grounded = np.isfinite(ground)
    else:
        far, color, floor = _indoors(scene.place, rng, tint, origin, direction, x, z)
        grounded = ground < far
    color = np.where(grounded[:, None], floor, color).astype(np.float32)
    return color, np.where(grounded, ground, np.inf), (0.62 if scene.place == "at night" else 1.0)


def _outdoors(place: str, rng: random.Random, tint: float, direction: np.ndarray, t, x, z):
    """Colors of the sky and of the ground at x and z, a distance t away, (R, 3) each."""
    low, high, near, far = OUTDOORS[place]
    color = _mix(low, high, np.clip(direction[:, 1] * 2.2, 0, 1))
    floor = _mix(near, far, 1 - np.exp(-t * 0.06)) * tint
    if place == "on the beach":
        shore = 2.6 + 1.5 * rng.random()
        sea = z < -shore + 0.2 * np.sin(x + rng.random() * 6)
        floor[sea] = _mix((0.16, 0.62, 0.80), (0.10, 0.46, 0.74), np.clip((-z[sea] - shore) / 8, 0, 1))
    elif place == "in the desert":
        crest = 0.10 + 0.05 * np.sin(direction[:, 0] * 5 + rng.random() * 6)  # a dune on the horizon
        dune = (direction[:, 1] >= 0) & (direction[:, 1] < crest)
        color[dune] = (0.88, 0.60, 0.34)
    elif place == "at night":
        moon = np.array([rng.uniform(-0.32, 0.32), rng.uniform(0.05, 0.12), -1.0])
        close = direction @ (moon / np.linalg.norm(moon)).astype(np.float32)
        color = _mix(color, (0.96, 0.95, 0.84), np.clip((close - 0.9972) * 1500, 0, 1))
    return color, floor


def _indoors(place: str, rng: random.Random, tint: float, origin: np.ndarray, direction: np.ndarray, x, z):
    """The distance to the wall behind the toy, (R,), and the colors of wall and floor, (R, 3) each."""
    with np.errstate(divide="ignore"):
        depth = 1.5 if place == "in front of a brick wall" else 2.6
        far = np.where(direction[:, 2] < -1e-3, (-depth - origin[2]) / direction[:, 2], np.inf)
    far = np.minimum(far, 60.0)
    u, v = origin[0] + direction[:, 0] * far, origin[1] + direction[:, 1] * far
    if place == "in front of a brick wall":
        u, v = u * 1.1, v * 2.0
        joint = (((u + 0.5 * (np.floor(v) % 2)) % 1) < 0.09) | ((v % 1) < 0.16)
        mortar, brick = np.array((0.80, 0.76, 0.71), np.float32), np.array((0.64, 0.25, 0.18), np.float32)
        color = np.where(joint[:, None], mortar, brick * tint)
        floor = np.broadcast_to(np.array((0.62, 0.61, 0.59), np.float32) * tint, color.shape)
    elif place == "on a wooden table":
        color = _mix((0.86, 0.82, 0.72), (0.76, 0.71, 0.61), np.clip(v / 3, 0, 1)) * tint
        plank = ((x * 1.1 + 20) % 1) < 0.06
        grain = 1 + 0.10 * np.sin(4 * z + 2.0 * np.floor(x * 1.1))
        floor = np.array((0.56, 0.36, 0.19), np.float32) * tint * grain[:, None] * (1 - 0.35 * plank[:, None])
    else:
        color = _mix((0.62, 0.76, 0.76), (0.48, 0.63, 0.65), np.clip(v / 3, 0, 1)) * tint
        dark = (np.floor(x * 1.05 + rng.random()) + np.floor(z * 1.05 + rng.random())) % 2
        floor = _mix((0.94, 0.94, 0.92), (0.16, 0.16, 0.18), dark)
    return far, color, floor


def _palette(toy: Toy) -> np.ndarray:
    """Colors of MAIN, SECOND, DARK and WHITE, (4, 3)."""
    return np.array([COLORS[toy.main], COLORS[toy.second], (0.10, 0.10, 0.12), (0.96, 0.96, 0.94)], np.float32)


def _marked(toy: Toy, points: np.ndarray) -> np.ndarray:
    """Where a pattern puts the second color, (R,) bool. `points` (R, 3) are in the toy's own coordinates."""
    cell = points * REPEATS[toy.kind]
    if toy.pattern == "striped":
        return cell[:, 1] % 1 < 0.45
    if toy.pattern == "dotted":
        return ((cell - np.round(cell)) ** 2).sum(-1) < 0.15
    if toy.pattern == "checkered":
        return np.round(cell).sum(-1) % 2 == 0
    return np.zeros(len(points), bool)


def _light(normal: np.ndarray, direction: np.ndarray, sun: np.ndarray, lit) -> tuple[np.ndarray, np.ndarray]:
    """By Lambert's law and the sky's light from above: what share of its paint's color a surface shows, (R,), and how
    much of the sun it mirrors, (R,). `lit` (R,) is 0 in the shade.
    """
    diffuse = np.clip(normal @ sun, 0, None) * lit
    half = sun - direction
    half /= np.linalg.norm(half, axis=-1, keepdims=True)
    gloss = np.clip((normal * half).sum(-1), 0, None) ** 32 * lit
    return 0.50 + 0.10 * normal[:, 1] + 0.55 * diffuse, gloss


def _styled(image: np.ndarray, style: str | None) -> np.ndarray:
    """The picture as a whole in one of the global styles; values in [0, 1]."""
    gray = (image @ np.array((0.30, 0.59, 0.11), np.float32))[..., None]
    if style == "in black and white":
        return np.repeat(gray, 3, -1)
    if style == "in sepia":
        return np.clip(gray * np.array((1.10, 0.88, 0.60), np.float32) + np.array((0.06, 0.03, 0.0), np.float32), 0, 1)
    if style == "in sunset light":
        return np.clip(image * np.array((1.12, 0.66, 0.44), np.float32) + np.array((0.10, 0.02, 0.0), np.float32), 0, 1)
    return image


def _shade(color, ground, parts, points, sun, origin, direction, offsets) -> None:
    """Darken the ground's colors, in place: a soft shadow from five points of the sun's disk, and a little darkness
    where each toy stands.
    """
    near = np.flatnonzero(np.isfinite(ground))
    spot = origin + direction[near] * ground[near, None]
    contact = sum(np.exp(-(((spot[:, 0] - x) / 0.55) ** 2) - (spot[:, 2] / 0.55) ** 2) for x in offsets)
    color[near] *= (1 - 0.30 * np.minimum(contact, 1))[:, None]
    fall = points - points[:, 1:2] * sun / sun[1]  # where the shadow of each outline point falls
    reach = 0.2 * points[:, 1].max()
    beneath = ((spot > fall.min(0) - reach) & (spot < fall.max(0) + reach))[:, (0, 2)].all(-1)
    near, spot = near[beneath], spot[beneath] + np.array((0, 0.01, 0), np.float32)
    hidden = np.zeros(len(near), np.float32)
    for dx, dz in ((0, 0), (0.10, 0.05), (-0.10, 0.05), (0.05, -0.10), (-0.05, -0.10)):
        hidden += _blocked(parts, spot, sun + np.array((dx, 0, dz), np.float32)) / 5
    color[near] *= (1 - 0.45 * hidden)[:, None]


def draw(scene: Scene, size: int = SIZE, supersample: int = 2, accessories: float = 1.0) -> Picture:
    """Draw a scene.

    Parameters
    ----------
    scene : Scene
        What to draw.
    size : int
        Width and height in pixels.
    supersample : int
        Rays per pixel along each side.
    accessories : float
        How much larger than usual hats, flags and bows are; the next base is trained on 4/3.

    Returns
    -------
    Picture
        Its `image` (size, size, 3) and `masks` (toys, size, size).
    """
    offsets = (0.0,) if len(scene.toys) == 1 else (-0.78, 0.78)
    groups = [_placed(build(toy, accessories), toy.yaw, x) for toy, x in zip(scene.toys, offsets, strict=True)]
    parts = [part for group in groups for part in group]
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    points = _outline(parts)
    origin, axes, shift = _frame(points, scene)
    origin32 = origin.astype(np.float32)

    grid = (np.arange(size * supersample, dtype=np.float32) + 0.5) / (size * supersample) * 2 - 1
    sx, sy = (a.ravel() for a in np.meshgrid(grid + shift[0], -grid + shift[1]))
    direction = np.stack([sx, sy, np.full_like(sx, FOCAL)], -1) @ axes.astype(np.float32)
    direction = (direction / np.linalg.norm(direction, axis=-1, keepdims=True)).astype(np.float32)

    color, ground, brightness = _place(scene, origin32, direction)
    sun = np.array(scene.light, np.float32)
    sun /= np.linalg.norm(sun)

    screen = _on_screen(points, origin, axes)
    low, high = screen.min(0) - 0.05, screen.max(0) + 0.05
    rays = np.flatnonzero((sx > low[0]) & (sx < high[0]) & (sy > low[1]) & (sy < high[1]))
    t, which = _first_hit(parts, origin32, direction[rays])
    found = t < ground[rays]

    _shade(color, ground, parts, points, sun, origin32, direction, offsets)

    # Toys: paint, Lambert's law with the sky's light from above, a shadow of their own and a little gloss.
    hit, which = rays[found], which[found]
    surface = origin32 + direction[hit] * t[found][:, None]
    paint, normal = np.empty((len(hit), 3), np.float32), np.empty((len(hit), 3), np.float32)
    for index in np.unique(which):
        normal[which == index] = _normal(parts[index], surface[which == index])
    kinds = np.array([part.paint for part in parts])
    for index, (toy, x) in enumerate(zip(scene.toys, offsets, strict=True)):
        mine = owner[which] == index
        turned = (surface[mine] - np.array((x, 0, 0), np.float32)) @ _turn(1, -toy.yaw).astype(np.float32)
        local = turned / np.array(toy.proportions, np.float32)
        paints = kinds[which[mine]]
        paint[mine] = _palette(toy)[np.where((paints == MAIN) & _marked(toy, local), SECOND, paints)]
    lit = 1 - _blocked(parts, surface + normal * 0.02, sun).astype(np.float32)
    shade, gloss = _light(normal, direction[hit], sun, lit)
    color[hit] = paint * (shade * brightness)[:, None] + GLOSS * brightness * gloss[:, None]

    def shrink(values):
        return values.reshape(size, supersample, size, supersample, -1).mean((1, 3))

    image = _styled(shrink(np.clip(color, 0, 1)), scene.style)
    masks = np.zeros((len(groups), len(color)), np.float32)
    masks[owner[which], hit] = 1
    masks = np.stack([shrink(mask)[..., 0] for mask in masks])
    return Picture((image * 255 + 0.5).astype(np.uint8), (masks * 255 + 0.5).astype(np.uint8))
