"""How the identity encoder and its linear probes are trained, and what they make of every training picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from data.make.pretraining.models import make_identity_encoder
from persres_lite.toybox.judge import PROBES, LinearProbes, labels_of, summary_of
from persres_lite.toybox.world import CLASSES, scene_by_index

from .dataset import Shards, draw_views, load_drawn, to_float, views_by_index
from .trainer import CPU, faster_precision, only_learning, still_valid, train, trained

VIEWS = 10_000  # toys seen twice, if nothing else is asked for


def judge_parts() -> nn.ModuleDict:
    """The identity encoder and its linear probes."""
    encoder = make_identity_encoder()
    return nn.ModuleDict({"encoder": encoder, "probes": LinearProbes(encoder.config)})


def misread(named: dict[str, torch.Tensor], answers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the probes, summed over those that any picture of the batch settles."""
    settled = [name for name in PROBES if (answers[name] >= 0).any()]
    return torch.stack([F.cross_entropy(named[name], answers[name], ignore_index=-1) for name in settled]).sum()


def train_judge(folder: Path, pictures: Shards, minutes: float, toys_twice: int, device: torch.device = CPU) -> None:
    """The identity encoder, contrastively on two views of each toy, and the linear probes on its features."""
    torch.manual_seed(1)
    both = judge_parts()
    encoder, probes = both["encoder"], both["probes"]
    scenes = [scene_by_index(i) for i in range(len(pictures))]
    labels = labels_of(scenes)
    views = load_drawn(draw_views, toys_twice, folder / "pictures", "views")
    viewed = [scene for i in range(toys_twice) for scene in views_by_index(i)]
    view_labels = labels_of(viewed)
    kinds = view_labels["class"][::2].numpy()
    by_kind = [np.flatnonzero(kinds == kind) for kind in range(len(CLASSES))]
    pairs = torch.tensor([i for i, scene in enumerate(scenes) if len(scene.toys) == 2])
    batch, toys = 64, min(32, *(len(some) for some in by_kind))

    def step(number: int) -> dict[str, torch.Tensor]:
        # A third of the pictures shows two toys: which is where is the hardest thing to read, and rarer than that.
        chosen = torch.randint(0, len(pictures), (batch,))
        chosen[: batch // 6] = pairs[torch.randint(0, len(pairs), (batch // 6,))]
        drawn = pictures[chosen]
        kind = number % len(by_kind)  # telling toys of one class apart is the task, so a batch holds one class
        pair = np.random.default_rng(torch.initial_seed()).choice(by_kind[kind], toys, replace=False)
        both_views = torch.from_numpy(np.stack([2 * pair, 2 * pair + 1], 1).ravel())
        seen_twice = views[pair].reshape(-1, *drawn.shape[1:])
        images = torch.cat([to_float(drawn[..., :3]), to_float(seen_twice[..., :3])]).to(device)
        light, shift = torch.randn(2, len(images), 1, 1, 1, device=device)
        images = images * (1 + 0.1 * light) + 0.05 * shift
        with faster_precision(device):
            images = images.contiguous(memory_format=torch.channels_last)
            hidden = [h.float() for h in encoder(images, output_hidden_states=True).hidden_states]
        named = probes(hidden)
        # The views are of one class, which they would teach by rote: it is read from the mixed pictures alone.
        answers = {name: torch.cat([labels[name][chosen], view_labels[name][both_views]]) for name in PROBES}
        answers["class"][batch:] = -1
        answers = {name: answer.to(device) for name, answer in answers.items()}
        masks = np.concatenate([drawn[..., 3], seen_twice[..., 3]])
        covered = F.avg_pool2d(torch.from_numpy(masks).to(device).float()[:, None] / 255, masks.shape[-1] // 16)[:, 0]
        losses = {
            "probes": misread(named, answers),
            "mask": F.binary_cross_entropy_with_logits(named["mask"], covered) * 2,
        }
        seen = F.normalize(hidden[-1][batch:].mean((2, 3)), dim=-1)
        similarity = seen[0::2] @ seen[1::2].T / 0.07
        target = torch.arange(toys, device=device)
        losses["identity"] = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        return losses

    train(
        "judge",
        both,
        step,
        minutes=minutes,
        lr=1.5e-3,
        weight_decay=0.05,
        ema=0.998,
        pictures=batch + 2 * toys,
        folder=folder,
        device=device,
    )


def look(encoder: Any, images: np.ndarray) -> dict[str, torch.Tensor]:
    """What the identity encoder makes of pictures: "summary" (n, 2 x 592), and the maps after its second and its third
    stage, "fine" (n, 96, 8, 8) and "coarse" (n, 160, 4, 4).
    """
    x = to_float(images, encoder.device)
    hidden = encoder(x, output_hidden_states=True).hidden_states
    return {"summary": summary_of(hidden), "fine": hidden[2], "coarse": hidden[3]}


def by_channel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel."""
    dims = [0, *range(2, x.dim())]
    return x.mean(dims, keepdim=True), x.std(dims, keepdim=True) + 1e-6


@torch.no_grad()
def seen_by_judge(pictures: Shards, folder: Path, device: torch.device = CPU) -> dict[str, np.ndarray]:
    """`look` at every picture: computed once, each channel with mean 0 and deviation 1 on the first 2,000, kept on disk
    in half precision and opened without being read; made again when the encoder has learned since.
    """
    paths = {name: folder / f"judged-{name}.npy" for name in ("summary", "fine", "coarse")}
    if not all(still_valid(path, "judge", folder) for path in paths.values()):
        encoder = trained("judge", judge_parts(), folder)["encoder"].to(device)
        scales = {name: by_channel(x) for name, x in look(encoder, pictures[:2000][..., :3]).items()}
        kept: dict[str, list[np.ndarray]] = {name: [] for name in paths}
        for start in tqdm(range(0, len(pictures), 200), desc="judging"):
            for name, x in look(encoder, pictures[start : start + 200][..., :3]).items():
                mean, deviation = scales[name]
                kept[name].append(((x - mean) / deviation).half().contiguous().cpu().numpy())
        for name, path in paths.items():
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, np.concatenate(kept[name]))
            os.replace(path.with_suffix(".part"), path)
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def train_probes(folder: Path, pictures: Shards, minutes: float, device: torch.device = CPU) -> None:
    """The probes alone, on what the finished encoder sees: a linear layer has soon learned all that it can."""
    torch.manual_seed(6)
    parts = trained("judge", judge_parts(), folder).to(device)
    probes: Any = parts["probes"]
    with torch.no_grad():
        mean, deviation = by_channel(look(parts["encoder"], pictures[:2000][..., :3])["summary"])
    probes.scale.running_mean.copy_(mean[0])
    probes.scale.running_var.copy_(deviation[0].square())
    only_learning(parts, probes.linear)
    scenes = [scene_by_index(i) for i in range(len(pictures))]
    labels = {name: answers.to(device) for name, answers in labels_of(scenes).items()}
    summary = torch.from_numpy(np.array(seen_by_judge(pictures, folder, device)["summary"])).to(device)
    batch = 512

    def step(number: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(0, len(pictures), (batch,)).to(device)
        named = probes.named(F.dropout(summary[chosen].float(), 0.1))
        return {"probes": misread(named, {name: labels[name][chosen] for name in PROBES})}

    train(
        "probes", parts, step, minutes=minutes, lr=1e-3, weight_decay=0.05, pictures=batch, folder=folder,
        needs=("judge",), device=device,
    )  # fmt: skip
