"""The loop that every stage of pretraining shares: a budget of minutes, a progress bar, checkpoints, going on after a
kill, half precision where it is faster, and several processes that learn as one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from persres_lite.support.files import whole_file

from .muon import faster_type, optimizers_of


@dataclass(frozen=True)
class Run:
    """What one run of pretraining works with.

    Attributes
    ----------
    folder : Path
        Of the pictures, and of each stage's checkpoint ``<stage>.pt``, which is loaded without executing anything.
    base : Path
        Where the finished models go.
    minutes : dict
        Budget of each stage.
    device : device
        Where everything learns.
    pictures, views : int
        How many training pictures there are, and pictures of toys that are seen twice; multiples of 1000.
    layers, widths : int, (int, int)
        Of the U-Net, see `make_unet`.
    every : float
        Seconds between two checkpoints.
    """

    folder: Path
    base: Path
    minutes: dict[str, float]
    device: torch.device = torch.device("cpu")
    pictures: int = 24_000
    views: int = 16_000
    layers: int = 2
    widths: tuple[int, int] = (64, 128)
    every: float = 120.0

    def faster_precision(self) -> torch.autocast:
        """A context that computes in bfloat16 where that is faster."""
        kind = faster_type(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=kind is torch.bfloat16)


def _begin(rank: int, processes: int, meeting: str, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    work(*arguments)
    dist.destroy_process_group()


def data_parallel(work: Callable, processes: int, *arguments) -> None:
    """Run ``work(*arguments)`` in several processes of one thread each, whose `train` learns as one.

    Most operations here are too small for several threads to share. `work` and `arguments` must be picklable.
    """
    if processes == 1:
        return work(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        torch.multiprocessing.spawn(_begin, (processes, meeting, work, arguments), nprocs=processes)


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _share(gradients: list[torch.Tensor], seconds: float) -> float:
    """Put the mean over the processes into gradients, in place; returns that of the seconds."""
    size = rank_and_size()[1]
    if size == 1:
        return seconds
    flat = torch.cat([torch.tensor([seconds]), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    seconds, *means = (flat / size).split([1, *(gradient.numel() for gradient in gradients)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(seconds)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a stage has left: "module", "average", how many steps, seconds and pictures it took."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def trained(name: str, module: nn.Module, folder: Path, optional: bool = False) -> Any:
    """`module` as stage `name` has left it, averages where it has them, frozen; or as it is, if `optional`.

    Raises
    ------
    FileNotFoundError
        If the stage has not begun.
    """
    path = folder / f"{name}.pt"
    if not (path.exists() or optional):
        raise FileNotFoundError(f"Stage {name} has left nothing in {folder}: train it first, with --stage {name}.")
    if path.exists():
        state = read_checkpoint(path)
        module.load_state_dict(state.get("average") or state["module"])
    return module.eval().requires_grad_(False)


def begin_from(name: str, module: nn.Module, folder: Path) -> None:
    """Let stage `name`, if it has not begun, begin from what `module` holds."""
    path = folder / f"{name}.pt"
    if not path.exists():
        with whole_file(path) as new:
            torch.save({"step": 0, "seconds": 0.0, "pictures": 0, "module": module.state_dict()}, new)


def still_valid(made: Path, name: str, folder: Path) -> bool:
    """Whether a file made with what stage `name` had learned is there, and the stage has not learned since."""
    source = folder / f"{name}.pt"
    return made.exists() and source.exists() and made.stat().st_mtime >= source.stat().st_mtime


def only_learning(module: nn.Module, *parts: nn.Module) -> None:
    """Let these parts of a module learn, and no other."""
    module.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


class Learner:
    """What learns in a stage and how far it has come; it goes on from the stage's checkpoint.

    Attributes
    ----------
    module, average : Module
        With the last weights, and with their moving average if there is one: it forgets fast at the start.
    step, seconds, pictures : int, float, int
        What the stage took so far, over all runs.
    """

    def __init__(self, path: Path, module: nn.Module, device: torch.device, lr: float, muon: bool, ema: float | None):
        state = read_checkpoint(path) if path.exists() else {}
        if state:
            module.load_state_dict(state["module"])
        self.path, self.module = path, module.to(device).train()
        self.step, self.seconds, self.pictures = (state.get(key, 0) for key in ("step", "seconds", "pictures"))
        self.optimizers = optimizers_of(module, lr, muon)
        self.average = cast(Any, AveragedModel(module, multi_avg_fn=self._follow) if ema else module)
        self.decay = ema or 0.0
        if self.step:
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            if ema:
                self.average.module.load_state_dict(state["average"])
                self.average.n_averaged.fill_(self.step)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.learning = [parameter for group in self.groups for parameter in group["params"]]
        for parameter in self.learning:
            parameter.grad = torch.zeros_like(parameter)  # also where a process has nothing to say of it

    @torch.no_grad()
    def _follow(self, averages: Any, parameters: Any, count: Any) -> None:
        torch._foreach_lerp_(averages, parameters, 1 - min(self.decay, (1 + self.step) / (10 + self.step)))

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        kept = {"step": self.step, "seconds": self.seconds, "pictures": self.pictures}
        kept |= {"module": self.module.state_dict(), "optimizers": [one.state_dict() for one in self.optimizers]}
        if self.decay:
            kept["average"] = self.average.module.state_dict()
        with whole_file(self.path) as new:
            torch.save(kept, new)

    def learn(self, share: float) -> None:
        """One step from the gradients that are there, at this share of the highest rate."""
        nn.utils.clip_grad_norm_(self.learning, 1.0)
        for group in self.groups:
            group["lr"] = group["peak"] * share
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if self.decay:
            self.average.update_parameters(self.module)
        self.step += 1


def train(
    name: str,
    module: nn.Module,
    step: Callable[[int], dict[str, torch.Tensor]],
    run: Run,
    *,
    lr: float,
    batch: int,
    muon: bool = False,
    ema: float | None = None,
    on_save: Callable[[nn.Module], None] | None = None,
) -> None:
    """Train `module` in place for its budget of minutes, or go on with what is left of it.

    The learning rate rises over 100 steps, stays, and falls to zero over the last 40 % of the budget. Time is
    counted over all runs; a checkpoint is written every `Run.every` seconds, so a kill loses no more than that.
    Under `data_parallel` every process takes its own pictures and all take the mean gradient.

    Parameters
    ----------
    name : str
        Of the stage.
    module : Module
        Everything that learns.
    step : callable
        Given the step number, returns the losses by name; their sum is minimized. Torch's generator, seeded anew
        for every step and process, makes all its random choices.
    run : Run
        Says for how long, and where the checkpoint is.
    lr : float
        Of the optimizer.
    batch : int
        How many pictures a step looks at.
    muon : bool, optional
        Whether matrices learn by Muon (`muon`) rather than by AdamW.
    ema : float, optional
        Decay of the moving average that `module` ends with; by default it ends with its last weights.
    on_save : callable, optional
        Called after each checkpoint with the averaged module.
    """
    budget, (rank, size) = 60 * run.minutes[name], rank_and_size()
    learner = Learner(run.folder / f"{name}.pt", module, run.device, lr, muon, ema)
    saved, last = learner.seconds, time.perf_counter()
    bar = tqdm(total=round(budget), initial=round(saved), desc=name, unit="s", disable=rank > 0)
    while learner.seconds < budget:
        torch.manual_seed(learner.step * size + rank)
        share = min(1, (learner.step + 1) / 100) * min(1, (1 - learner.seconds / budget) / 0.4)
        losses = step(learner.step)
        torch.stack(list(losses.values())).sum().backward()
        before, last = last, time.perf_counter()
        learner.seconds += _share([parameter.grad for parameter in learner.learning], last - before)
        learner.learn(share)
        learner.pictures += batch * size
        bar.update(round(learner.seconds) - bar.n)
        if learner.step % 20 == 0:
            bar.set_postfix(step=learner.step, **{key: f"{value.item():.4f}" for key, value in losses.items()})
        if rank == 0 and (learner.seconds - saved > run.every or learner.seconds >= budget):
            saved = learner.seconds
            learner.save()
            if on_save:
                on_save(learner.average.module if ema else module)
    bar.close()
    if ema:
        module.load_state_dict(learner.average.module.state_dict())
    module.eval()
