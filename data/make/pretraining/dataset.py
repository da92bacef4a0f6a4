"""The pretraining pictures: drawn once, in parallel, and cached on disk in shards.

A shard is one ``.npy`` file of a thousand rows, written whole, so an interrupted run goes on where it stopped.
Scenes are not stored: they follow from the index alone (`scenes_of`).
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from persres_lite.support.files import whole_file
from persres_lite.toybox.render import SIZE, draw
from persres_lite.toybox.world import Scene, random_toy, random_view, scene_by_index

SHARD = 1000
ACCESSORIES = 4 / 3  # hats, flags and bows that much larger than the first base saw them: it often left them out


def scenes_of(split: str, start: int, stop: int) -> list[Scene]:
    """Scenes `start` to `stop` of a split: "train", or any other name for those that nothing is trained on.

    In a split whose name ends in "views" each toy stands in two scenes one after the other, in places, poses and lights
    of their own.
    """
    if not split.endswith("views"):
        return [scene_by_index(index, split) for index in range(start, stop)]
    scenes = []
    for toy_index in range(start // 2, (stop + 1) // 2):
        rng = random.Random(f"toybox-{split}-{toy_index}")
        toy = random_toy(rng)
        scenes += [random_view(rng, (toy,)), random_view(rng, (toy,))]
    return scenes[start % 2 :][: stop - start]


def draw_scenes(split: str, start: int, stop: int, accessories: float = ACCESSORIES) -> np.ndarray:
    """Pictures of `scenes_of` with their masks: (n, SIZE, SIZE, 4) uint8.

    Channels 0 to 2 are the sRGB picture, 3 is 255 where any toy is.
    """
    out = np.zeros((stop - start, SIZE, SIZE, 4), np.uint8)
    for row, scene in enumerate(scenes_of(split, start, stop)):
        picture = draw(scene, accessories=accessories)
        out[row, ..., :3], out[row, ..., 3] = picture.image, picture.masks.max(0)
    return out


class Shards:
    """Rows of several ``.npy`` files as one array that is read as it is needed: they are larger than the memory that
    every process could have for itself.
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


def _write_shard(path: Path, split: str, start: int, stop: int) -> None:
    with whole_file(path) as new:
        np.save(new, draw_scenes(split, start, stop))


def load_drawn(folder: Path, split: str, count: int) -> Shards:
    """The first `count` pictures of a split, and those that fill the last shard: drawn if they are not yet in `folder`,
    in one process a core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {start: folder / f"{split}-{start // SHARD:04d}.npy" for start in range(0, count, SHARD)}
    missing = {start: path for start, path in paths.items() if not path.exists()}
    if missing:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            work = [pool.submit(_write_shard, path, split, n, n + SHARD) for n, path in missing.items()]
            for job in tqdm(work, desc=f"drawing {split}", unit="k", smoothing=0):
                job.result()
    return Shards(list(paths.values()))


def to_float(pictures: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(n, size, size, 3) uint8 to (n, 3, size, size) in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2)
    return x.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
