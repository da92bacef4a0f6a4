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

from persres_lite.toybox.render import SIZE, draw
from persres_lite.toybox.world import Scene, random_toy, random_view, scene_by_index

SHARD = 1000


def draw_scenes(start: int, stop: int, split: str = "train") -> np.ndarray:
    """Pictures `start` to `stop` of a split with their masks: (n, SIZE, SIZE, 4) uint8.

    Channels 0 to 2 are the sRGB picture, 3 is 255 where any toy is.
    """
    out = np.zeros((stop - start, SIZE, SIZE, 4), np.uint8)
    for row, index in enumerate(range(start, stop)):
        picture = draw(scene_by_index(index, split))
        out[row, ..., :3], out[row, ..., 3] = picture.image, picture.masks.max(0)
    return out


def views_by_index(index: int, split: str = "views") -> tuple[Scene, Scene]:
    """Number `index` of a split: one toy twice, in places, poses and lights of their own."""
    rng = random.Random(f"toybox-{split}-{index}")
    toy = random_toy(rng)
    return random_view(rng, (toy,)), random_view(rng, (toy,))


def draw_views(start: int, stop: int, split: str = "views") -> np.ndarray:
    """Both views of toys `start` to `stop`, as `draw_scenes` draws: (n, 2, SIZE, SIZE, 4) uint8."""
    out = np.zeros((stop - start, 2, SIZE, SIZE, 4), np.uint8)
    for row, index in enumerate(range(start, stop)):
        for view, scene in enumerate(views_by_index(index, split)):
            picture = draw(scene)
            out[row, view, ..., :3], out[row, view, ..., 3] = picture.image, picture.masks[0]
    return out


class Shards:
    """Rows of several ``.npy`` files as one array that is read as it is needed: they are larger than the memory that
    every process could have for itself.

    Parameters
    ----------
    paths : list of Path
        The files, each of `SHARD` rows.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.files = [np.load(path, mmap_mode="r") for path in paths]
        self.size = len(self.files[0])

    def __reduce__(self):
        return Shards, (self.paths,)  # another process opens the files, and is not sent what is in them

    def __len__(self) -> int:
        return self.size * len(self.files)

    def __getitem__(self, rows) -> np.ndarray:
        """The rows of a slice, or of a sequence of indices, in its order."""
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        return np.stack([self.files[row // self.size][row % self.size] for row in map(int, rows)])


def _write_shard(number: int, make: Callable, folder: Path, split: str) -> None:
    path = folder / f"{split}-{number:04d}.npy"
    with open(path.with_suffix(".part"), "wb") as file:
        np.save(file, make(number * SHARD, (number + 1) * SHARD, split))
    os.replace(path.with_suffix(".part"), path)


def load_drawn(make: Callable, count: int, folder: Path, split: str, workers: int | None = None) -> Shards:
    """The first `count` rows of `draw_scenes` or `draw_views`, drawn if they are not yet on disk.

    Parameters
    ----------
    make : callable
        `draw_scenes` or `draw_views`.
    count : int
        Number of rows; a multiple of 1000.
    folder : Path
        Cache folder, made if needed.
    split : str
        See `make`.
    workers : int, optional
        Processes; by default one a core.

    Raises
    ------
    ValueError
        If `count` is not a multiple of the size of a shard.
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
    return Shards(paths)


def to_float(pictures: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
    """(n, size, size, 3) uint8 to (n, 3, size, size) in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2)
    return x.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
