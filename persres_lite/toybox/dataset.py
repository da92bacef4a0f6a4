"""The pretraining pictures: drawn once, in parallel, and cached on disk in shards.

A shard is one ``.npy`` file of a thousand rows, written whole, so an interrupted run goes on where it stopped.
Scenes are not stored: they follow from the index alone (`world.scene_by_index`, `views_by_index`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .render import draw
from .world import Scene, random_toy, random_view, scene_by_index

SHARD = 1000
SIZE = 64


def draw_scenes(start: int, stop: int, split: str = "train") -> np.ndarray:
    """Pictures `start` to `stop` of a split with their masks: (n, SIZE, SIZE, 5) uint8.

    Channels 0 to 2 are the sRGB picture, 3 and 4 the masks of the first and the second toy (zero where there is none).
    """
    out = np.zeros((stop - start, SIZE, SIZE, 5), np.uint8)
    for row, index in enumerate(range(start, stop)):
        picture = draw(scene_by_index(index, split), SIZE)
        out[row, ..., :3] = picture.image
        out[row, ..., 3 : 3 + len(picture.masks)] = np.moveaxis(picture.masks, 0, -1)
    return out


def views_by_index(index: int, split: str = "views") -> tuple[Scene, Scene]:
    """Number `index` of a split: one toy twice, in places, poses and lights of their own."""
    rng = random.Random(f"toybox-{split}-{index}")
    toy = random_toy(rng)
    return random_view(rng, (toy,)), random_view(rng, (toy,))


def draw_views(start: int, stop: int, split: str = "views") -> np.ndarray:
    """Both views of toys `start` to `stop`: (n, 2, SIZE, SIZE, 3) uint8."""
    out = np.zeros((stop - start, 2, SIZE, SIZE, 3), np.uint8)
    for row, index in enumerate(range(start, stop)):
        for view, scene in enumerate(views_by_index(index, split)):
            out[row, view] = draw(scene, SIZE).image
    return out


def _write_shard(number: int, make: Callable, folder: Path, split: str) -> None:
    path = folder / f"{split}-{number:04d}.npy"
    with open(path.with_suffix(".part"), "wb") as file:
        np.save(file, make(number * SHARD, (number + 1) * SHARD, split))
    os.replace(path.with_suffix(".part"), path)


def load_drawn(make: Callable, count: int, folder: str | Path, split: str, workers: int | None = None) -> np.ndarray:
    """The first `count` rows of `draw_scenes` or `draw_views`, drawn if they are not yet on disk.

    Parameters
    ----------
    make : `draw_scenes` or `draw_views`.
    count : number of rows; a multiple of 1000.
    folder : cache folder, made if needed.
    split : see `make`.
    workers : processes; None takes one a core.
    """
    if count % SHARD:
        raise ValueError(f"count must be a multiple of {SHARD}, not {count}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{split}-{number:04d}.npy" for number in range(count // SHARD)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            work = pool.map(partial(_write_shard, make=make, folder=folder, split=split), missing)
            list(tqdm(work, total=len(missing), desc=f"drawing {split}", unit="k", smoothing=0))
    return np.concatenate([np.load(path) for path in paths])


def to_float(pictures: np.ndarray) -> torch.Tensor:
    """(n, 64, 64, 3) uint8 to (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)
