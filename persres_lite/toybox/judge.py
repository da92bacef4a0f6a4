"""How Toybox pictures are scored: linear probes read what is in them, and their own accuracy stands beside every score.

Two ordinary transformers folders are shipped: ``data/toybox-clip`` (a `CLIPModel`) and ``data/toybox-dino`` (a
`ResNetModel` trained to tell one toy from another of its class). The probes are linear layers on the features of the
second, in one safetensors file beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetModel

from .render import SIZE
from .world import ACCESSORIES, CLASSES, COLORS, PATTERNS, PLACES, STYLES, Scene

PROBES = {
    "class": CLASSES,
    "main": tuple(COLORS),
    "second": tuple(COLORS),
    "pattern": PATTERNS,
    "accessory": ACCESSORIES,
    "place": PLACES,
    "style": STYLES,
    "left": CLASSES,
    "right": CLASSES,
}


def labels_of(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """What the probes should say of scenes.

    Returns
    -------
    dict of str to tensor (n,)
        For each name in `PROBES` indices, -1 where the scene does not settle it (attributes of one toy where there are
        two, sides where there is one, colors under a style that hides them).
    """
    rows = []
    for scene in scenes:
        first, last = scene.toys[0], scene.toys[-1]
        settled = {"place": scene.place, "style": scene.style}
        if len(scene.toys) == 2:
            settled |= {"left": first.kind, "right": last.kind}
        else:
            settled |= {"class": first.kind, "pattern": first.pattern, "accessory": first.accessory}
            if scene.style not in ("in black and white", "in sepia"):
                settled |= {"main": first.main, "second": first.second}
        rows.append({name: PROBES[name].index(value) for name, value in settled.items()})
    return {name: torch.tensor([row.get(name, -1) for row in rows]) for name in PROBES}


def summary_of(hidden: list[torch.Tensor]) -> torch.Tensor:
    """(n, 2 x 592): the maps of all stages, averaged over the left half of the picture and over the right one."""
    halves = zip(*(stage.chunk(2, 3) for stage in hidden), strict=True)
    return torch.cat([stage.mean((2, 3)) for half in halves for stage in half], 1)


class LinearProbes(nn.Module):
    """Linear probes on the identity encoder's features.

    Features are the maps after each stage: averaged over each half of the picture for what is in it, and resized to
    16 x 16 for where the toys are.
    """

    def __init__(self, config):
        super().__init__()
        self.width = width = config.embedding_size + sum(config.hidden_sizes)
        self.linear = nn.ModuleDict({name: nn.Linear(2 * width, len(values)) for name, values in PROBES.items()})
        self.where = nn.Conv2d(width, 1, 1)
        self.scale = nn.BatchNorm1d(2 * width, affine=False)

    def forward(self, hidden: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Logits by name, (n, values), and "mask", (n, 16, 16), from the encoder's hidden states."""
        out = self.named(self.scale(summary_of(hidden)))
        maps = torch.cat([F.interpolate(h, size=(16, 16), mode="bilinear") for h in hidden], 1)
        out["mask"] = self.where(maps)[:, 0]
        return out

    def named(self, summary: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits by name from summaries with mean 0 and deviation 1, (n, 2 x 592)."""
        return {name: layer(summary) for name, layer in self.linear.items()}


class Judge:
    """Reads Toybox pictures: what is in them, where the toy is, and whether two show the same one.

    Parameters
    ----------
    data : path
        The project's data folder, with ``toybox-dino`` in it.

    Raises
    ------
    FileNotFoundError
        If there is no judge in it.
    """

    def __init__(self, data: str | Path = "data"):
        folder = Path(data) / "toybox-dino"
        if not (folder / "probes.safetensors").is_file():
            raise FileNotFoundError(f"{folder} holds no judge: run `make pretrain`, or take the project's data folder.")
        self.encoder = ResNetModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.probes = LinearProbes(self.encoder.config).eval().requires_grad_(False)
        state = load_file(folder / "probes.safetensors")
        self.probes.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        )

    def _hidden(self, images: list[Image.Image]) -> list[torch.Tensor]:
        arrays = [np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)) for image in images]
        x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return self.encoder(x, output_hidden_states=True).hidden_states

    @torch.no_grad()
    def read(self, images: list[Image.Image]) -> list[dict]:
        """For each picture, the most likely value by every probe; under "pair" the classes of both sides, a set."""
        logits = self.probes(self._hidden(images))
        rows = []
        for i in range(len(images)):
            row = {name: values[logits[name][i].argmax()] for name, values in PROBES.items()}
            row["pair"] = {row["left"], row["right"]}
            rows.append(row)
        return rows

    @torch.no_grad()
    def where(self, images: list[Image.Image]) -> torch.Tensor:
        """Probability that each sixteenth of a side is toy: (n, 16, 16)."""
        return self.probes(self._hidden(images))["mask"].sigmoid()

    @torch.no_grad()
    def identity(self, images: list[Image.Image]) -> torch.Tensor:
        """(n, 256) unit vectors, nearer for two views of one toy than for two toys of one class."""
        return F.normalize(self._hidden(images)[-1].mean((2, 3)), dim=-1)
