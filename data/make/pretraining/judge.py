"""How the identity encoder and its linear probes are trained, and what they make of every training picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from persres_lite.support.files import whole_file
from persres_lite.toybox.judge import PROBES, LinearProbes, labels_of, summary_of
from persres_lite.toybox.world import CLASSES

from .dataset import Shards, load_drawn, scenes_of, to_float
from .models import make_identity_encoder
from .trainer import Run, only_learning, still_valid, train, trained


def judge_parts() -> nn.ModuleDict:
    """The identity encoder and its linear probes."""
    encoder = make_identity_encoder()
    return nn.ModuleDict({"encoder": encoder, "probes": LinearProbes(encoder.config)})


def misread(named: dict[str, torch.Tensor], answers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the probes, summed over those that any picture of the batch settles."""
    answers = {name: answers[name].to(named[name].device) for name in PROBES}
    settled = [name for name in PROBES if (answers[name] >= 0).any()]
    return torch.stack([F.cross_entropy(named[name], answers[name], ignore_index=-1) for name in settled]).sum()


def contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, same: torch.Tensor) -> torch.Tensor:
    """The contrastive loss (Radford et al., 2021) of rows that belong together where `same` (n, n) is 1."""
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * scale
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_judge(run: Run, pictures: Shards) -> None:
    """The identity encoder, contrastively on two views of each toy, and the linear probes on its features."""
    torch.manual_seed(1)
    both = judge_parts()
    encoder, probes = both["encoder"], both["probes"]
    scenes = scenes_of("train", 0, len(pictures))
    labels = labels_of(scenes)
    views = load_drawn(run.folder / "pictures", "views", run.views)
    view_labels = labels_of(scenes_of("views", 0, len(views)))
    kinds = view_labels["class"][::2].numpy()
    by_kind = [np.flatnonzero(kinds == kind) for kind in range(len(CLASSES))]
    pairs = torch.tensor([i for i, scene in enumerate(scenes) if len(scene.toys) == 2])
    batch, toys = 64, min(32, *(len(some) for some in by_kind))

    def step(number: int) -> dict[str, torch.Tensor]:
        # A third of the pictures shows two toys: which is where is the hardest thing to read, and rarer than that.
        chosen = torch.randint(0, len(pictures), (batch,))
        chosen[: batch // 6] = pairs[torch.randint(0, len(pairs), (batch // 6,))]
        kind = number % len(by_kind)  # telling toys of one class apart is the task, so a batch holds one class
        toy = np.random.default_rng(torch.initial_seed()).choice(by_kind[kind], toys, replace=False)
        twice = torch.from_numpy(np.stack([2 * toy, 2 * toy + 1], 1).ravel())
        drawn = np.concatenate([pictures[chosen], views[twice]])
        images = to_float(drawn[..., :3], run.device)
        light, shift = torch.randn(2, len(images), 1, 1, 1, device=run.device)
        with run.faster_precision():
            images = (images * (1 + 0.1 * light) + 0.05 * shift).contiguous(memory_format=torch.channels_last)
            hidden = [h.float() for h in encoder(images, output_hidden_states=True).hidden_states]
        named = probes(hidden)
        answers = {name: torch.cat([labels[name][chosen], view_labels[name][twice]]) for name in PROBES}
        answers["class"][batch:] = -1  # the views are of one class, which they would teach by rote
        covered = torch.from_numpy(drawn[..., 3]).to(run.device).float()[:, None] / 255
        covered = F.avg_pool2d(covered, covered.shape[-1] // 16)[:, 0]
        seen = hidden[-1][batch:].mean((2, 3))
        return {
            "probes": misread(named, answers),
            "mask": F.binary_cross_entropy_with_logits(named["mask"], covered) * 2,
            "identity": contrast(seen[0::2], seen[1::2], 1 / 0.07, torch.eye(toys, device=run.device)),
        }

    train("judge", both, step, run, lr=1.5e-3, ema=0.998, batch=batch + 2 * toys)


def look(encoder: Any, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the identity encoder makes of pictures: a summary (n, 2 x 592), and the maps after its second and its third
    stage, (n, 96, 8, 8) and (n, 160, 4, 4).
    """
    hidden = encoder(to_float(images, encoder.device), output_hidden_states=True).hidden_states
    return summary_of(hidden), hidden[2], hidden[3]


def by_channel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel."""
    dims = [0, *range(2, x.dim())]
    return x.mean(dims, keepdim=True), x.std(dims, keepdim=True) + 1e-6


@torch.no_grad()
def of_every_picture(run: Run, pictures: Shards, stage: str, names: list[str], begin: Callable) -> dict[str, Any]:
    """What the function that `begin()` returns makes of all pictures, a hundred at a time: arrays by name, kept on disk
    in half precision until `stage` learns again, and opened without being read.
    """
    paths = [run.folder / f"{name}.npy" for name in names]
    if not all(still_valid(path, stage, run.folder) for path in paths):
        of = begin()
        steps = tqdm(range(0, len(pictures), 100), desc=f"pictures for {stage}")
        made = [[x.half().contiguous().cpu() for x in of(pictures[start : start + 100])] for start in steps]
        for path, parts in zip(paths, zip(*made, strict=True), strict=True):
            with whole_file(path) as new:
                np.save(new, torch.cat(parts).numpy())
    return {name: np.load(path, mmap_mode="r") for name, path in zip(names, paths, strict=True)}


def seen_by_judge(run: Run, pictures: Shards) -> dict[str, np.ndarray]:
    """`look` at every picture, each channel with mean 0 and deviation 1 on the first 2,000."""

    def begin():
        encoder = trained("judge", judge_parts(), run.folder)["encoder"].to(run.device)
        scales = [by_channel(x) for x in look(encoder, pictures[:2000][..., :3])]

        def of(some: np.ndarray):
            seen = look(encoder, some[..., :3])
            return [(x - mean) / deviation for x, (mean, deviation) in zip(seen, scales, strict=True)]

        return of

    return of_every_picture(run, pictures, "judge", ["summary", "fine", "coarse"], begin)


def train_probes(run: Run, pictures: Shards) -> None:
    """The probes alone, on what the finished encoder sees: a linear layer has soon learned all that it can."""
    torch.manual_seed(6)
    parts = trained("judge", judge_parts(), run.folder).to(run.device)
    probes: Any = parts["probes"]
    with torch.no_grad():
        mean, deviation = by_channel(look(parts["encoder"], pictures[:2000][..., :3])[0])
    probes.scale.running_mean.copy_(mean[0])
    probes.scale.running_var.copy_(deviation[0].square())
    only_learning(parts, probes.linear)
    labels = labels_of(scenes_of("train", 0, len(pictures)))
    summary, batch = seen_by_judge(run, pictures)["summary"], 512

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,))
        seen = torch.from_numpy(summary[chosen.numpy()]).to(run.device).float()
        named = probes.named(F.dropout(seen, 0.1))
        return {"probes": misread(named, {name: labels[name][chosen] for name in PROBES})}

    train("probes", parts, step, run, lr=1e-3, batch=batch)
