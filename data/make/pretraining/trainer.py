"""The loop that every stage of pretraining shares: a budget of minutes, a progress bar, checkpoints, going on after a
kill, half precision where it is faster, and several processes that learn as one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from .muon import optimizers_of

CPU = torch.device("cpu")


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `module`, with a short memory at the start."""

    @torch.no_grad()
    def update(averages, parameters, count):
        torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + float(count)) / (10 + float(count))))

    return AveragedModel(module, multi_avg_fn=update)


def faster_precision(device: torch.device = CPU) -> torch.autocast:
    """A context that computes in bfloat16 on a GPU and where the processor has instructions for it.

    Elsewhere bfloat16 is slower than single precision, not faster.
    """
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported())
    able: dict = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have no such function
    fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def compile_inside_ddp(module: nn.Module) -> None:
    """Let torch compile what `module` computes: its many small operations, joined, train faster.

    Its weights keep their names. Where there is no C++ compiler it computes as it did. Compiled whole: cut up, as is
    usual below `DistributedDataParallel`, gradients could be sent earlier, but a step here is too short to gain by it.
    """
    if shutil.which("g++") or shutil.which("clang++"):
        torch._dynamo.config.optimize_ddp = False
        module.compile()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: killed, it cannot say so, and nobody else would stop what it began."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _begin(rank: int, processes: int, meeting: str, work: Callable, arguments: tuple) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
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


def _mean(value: float) -> float:
    """The mean of a number over the processes."""
    if rank_and_size()[1] == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(shared)
    return (shared / rank_and_size()[1]).item()


class _Losses(nn.Module):
    """A stage's step as the forward pass of a module, which is what `DistributedDataParallel` wraps."""

    def __init__(self, module: nn.Module, step: Callable[[int], dict[str, torch.Tensor]]):
        super().__init__()
        self.module, self.step = module, step

    def forward(self, number: int) -> dict[str, torch.Tensor]:
        return self.step(number)


def _write(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_trained(name: str, module: nn.Module, folder: Path) -> bool:
    """Put what stage `name` has learned so far into `module`, averages where it has them; False if it has not begun."""
    path = folder / f"{name}.pt"
    if not path.exists():
        return False
    state = _read(path)
    module.load_state_dict(state.get("average") or state["module"])
    module.eval()
    return True


def trained(name: str, module: nn.Module, folder: Path) -> Any:
    """`module` as stage `name` has left it.

    Raises
    ------
    FileNotFoundError
        If the stage has not begun.
    """
    if not load_trained(name, module, folder):
        raise FileNotFoundError(f"Stage {name} has left nothing in {folder}: train it first, with --stage {name}.")
    return module.requires_grad_(False)


def begin_from(name: str, module: nn.Module, folder: Path) -> None:
    """Let stage `name`, if it has not begun, begin from what `module` holds."""
    path = folder / f"{name}.pt"
    if not path.exists():
        _write({"step": 0, "seconds": 0.0, "pictures": 0, "module": module.state_dict(), "needed": {}}, path)


def learned(names: Iterable[str], folder: Path) -> dict[str, int]:
    """How many steps each of these stages has taken, 0 where it has not begun."""
    paths = {name: folder / f"{name}.pt" for name in names}
    return {name: _read(path)["step"] if path.exists() else 0 for name, path in paths.items()}


def still_valid(made: Path, name: str, folder: Path) -> bool:
    """Whether a file made with what stage `name` had learned is there, and the stage has not learned since."""
    source = folder / f"{name}.pt"
    return made.exists() and source.exists() and made.stat().st_mtime >= source.stat().st_mtime


def only_learning(module: nn.Module, *parts: nn.Module) -> None:
    """Let these parts of a module learn, and no other."""
    module.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def train(
    name: str,
    module: nn.Module,
    step: Callable[[int], dict[str, torch.Tensor]],
    *,
    minutes: float,
    lr: float,
    pictures: int,
    folder: Path,
    needs: tuple[str, ...] = (),
    weight_decay: float = 0.01,
    muon: bool = False,
    ema: float | None = None,
    save_every: float = 90.0,
    on_publish: Callable[[nn.Module], None] | None = None,
    publish_every: float = 600.0,
    device: torch.device = CPU,
) -> None:
    """Train `module` in place for a budget of minutes, or go on with what is left of it.

    The learning rate rises over 100 steps, stays, and falls to zero over the last 40 % of the budget. Time is
    counted over all runs; a checkpoint is written every `save_every` seconds, so a kill loses no more than that.
    Under `data_parallel` every process takes its own pictures and all take the mean gradient. Where a stage that
    this one `needs` has learned since, this one has its whole budget again, and begins with what it knows.

    Parameters
    ----------
    name : str
        Of the stage: its checkpoint is ``<folder>/<name>.pt``, loaded without executing anything.
    module : Module
        Everything that learns.
    step : callable
        Given the step number, returns the losses by name; their sum is minimized. Torch's generator, seeded anew
        for every step and process, makes all its random choices.
    minutes : float
        Budget.
    lr, weight_decay : float
        Of the optimizer.
    pictures : int
        How many a step looks at, counted for the model card.
    folder : Path
        Of the checkpoints.
    needs : tuple of str, optional
        Stages whose result this one learns from.
    muon : bool, optional
        Whether matrices learn by Muon (`muon`) rather than by AdamW.
    ema : float, optional
        Decay of the moving average that `module` ends with; by default it ends with its last weights.
    save_every, publish_every : float, optional
        Seconds.
    on_publish : callable, optional
        Called every `publish_every` seconds with the averaged module.
    device : torch.device, optional
        Where `module` learns; `step` puts what it feeds it there. It ends there, too.
    """
    module.to(device)
    path = folder / f"{name}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizers = optimizers_of(module, lr, weight_decay, muon)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    rank, size = rank_and_size()
    number, spent, seen, needed = 0, 0.0, 0, learned(needs, folder)
    state = _read(path) if path.exists() else {}
    if state:
        module.load_state_dict(state["module"])
    average = averaged(module, ema) if ema else None
    if state.get("step") and state["needed"] == needed:
        number, spent, seen = state["step"], state["seconds"], state["pictures"]
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        if average:
            average.module.load_state_dict(state["average"])
            average.n_averaged.fill_(number)

    def save() -> None:
        kept = {"step": number, "seconds": spent, "pictures": seen, "needed": needed, "module": module.state_dict()}
        kept["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        if average:
            kept["average"] = average.module.state_dict()
        _write(kept, path)

    shown: dict[str, float] = {}
    saved = published = spent
    bar = tqdm(
        total=round(minutes * 60),
        initial=round(spent),
        desc=name,
        unit="s",
        bar_format="{l_bar}{bar}| {n}/{total} s {postfix}",
        disable=rank > 0,
    )
    losses_of: nn.Module = _Losses(module, step)
    if size > 1:
        losses_of = DistributedDataParallel(losses_of, broadcast_buffers=False)
    module.train()
    while spent < minutes * 60:
        start = time.perf_counter()
        torch.manual_seed(number * size + rank)
        share = min(1, (number + 1) / 100) * min(1, (1 - spent / (minutes * 60)) / 0.4)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
        losses = losses_of(number)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if average:
            average.update_parameters(module)
        number, seen = number + 1, seen + pictures * size
        spent = _mean(spent + time.perf_counter() - start)
        for key, value in losses.items():
            shown[key] = 0.98 * shown.get(key, value.item()) + 0.02 * value.item()
        if number % 20 == 0:
            bar.set_postfix(step=number, **{key: f"{value:.4f}" for key, value in shown.items()})
            bar.update(round(spent) - bar.n)
        if rank > 0:
            continue
        if spent - saved > save_every:
            saved = spent
            save()
        if on_publish and spent - published > publish_every:
            published = spent
            on_publish(average.module if average else module)
    if rank == 0 and (saved < spent or not path.exists()):
        save()
    bar.close()
    if average:
        module.load_state_dict(average.module.state_dict())
    module.eval()
