"""The loop that every stage of pretraining shares: a budget of minutes, a progress bar, checkpoints, going on after a
kill, half precision where it is faster, and several processes that learn as one.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm


class MovingAverage:
    """Exponential moving average of parameters, with a short memory at the start."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters: list[torch.Tensor] = list(parameters)
        self.decay, self.updates = decay, 0
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their averages; a second call puts them back."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def faster_precision() -> torch.autocast:
    """A context that computes in bfloat16 where the processor has instructions for it, and as usual elsewhere.

    Elsewhere bfloat16 is slower than single precision, not faster.
    """
    able: dict = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have no such function
    fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


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


def side_by_side(work: Callable, processes: int, *arguments) -> None:
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


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` over the processes."""
    size = rank_and_size()[1]
    if size > 1:
        dist.all_reduce(values)
    return values / size


@torch.no_grad()
def _share_gradients(parameters: list[nn.Parameter]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = _mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _write(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_trained(name: str, module: nn.Module, folder: Path) -> bool:
    """Put what stage `name` has learned so far into `module`, averages where it has them; False if it has not begun."""
    path = folder / f"{name}.pt"
    if not path.exists():
        return False
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    if "average" in state:
        with torch.no_grad():
            for parameter, average in zip(_learning(module), state["average"], strict=True):
                parameter.copy_(average)
    module.eval()
    return True


def trained(name: str, module: nn.Module, folder: Path) -> Any:
    """`module` as stage `name` has left it."""
    if not load_trained(name, module, folder):
        raise FileNotFoundError(
            f"Stage {name} has left nothing in {folder}: run `make pretrain`, or --stage {name} first."
        )
    return module.requires_grad_(False)


def begin_from(name: str, module: nn.Module, folder: Path) -> None:
    """Let stage `name`, if it has not begun, begin from what `module` holds."""
    path = folder / f"{name}.pt"
    if not path.exists():
        _write({"step": 0, "seconds": 0.0, "pictures": 0, "module": module.state_dict()}, path)


def still_valid(made: Path, name: str, folder: Path) -> bool:
    """Whether a file made with what stage `name` had learned is there, and the stage has not learned since."""
    source = folder / f"{name}.pt"
    return made.exists() and source.exists() and made.stat().st_mtime >= source.stat().st_mtime


def only_learning(module: nn.Module, *parts: nn.Module) -> None:
    """Let these parts of a module learn, and no other."""
    module.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def train(
    name: str,
    module: nn.Module,
    step: Callable[[int], dict[str, torch.Tensor]],
    *,
    minutes: float,
    lr: float,
    pictures: int,
    folder: Path,
    weight_decay: float = 0.01,
    ema: float | None = None,
    save_every: float = 90.0,
    on_publish: Callable[[], None] | None = None,
    publish_every: float = 600.0,
) -> None:
    """Train `module` in place for a budget of minutes, or go on with what is left of it.

    The learning rate rises over 100 steps, stays, and falls to zero over the last 40 % of the budget. Time is
    counted over all runs; a checkpoint is written every `save_every` seconds, so a kill loses no more than that.
    Under `side_by_side` every process takes its own pictures and all take the mean gradient.

    Parameters
    ----------
    name : of the stage: its checkpoint is ``<folder>/<name>.pt``, loaded without executing anything.
    module : everything that learns.
    step : given the step number, returns the losses by name; their sum is minimized. Torch's generator, seeded anew
        for every step and process, makes all its random choices.
    minutes : budget.
    lr, weight_decay : of AdamW.
    pictures : how many a step looks at, counted for the model card.
    ema : decay of the moving average that `module` ends with; None for none.
    on_publish : called every `publish_every` seconds, with the averages swapped in.
    """
    path = folder / f"{name}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = _learning(module)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = MovingAverage(parameters, ema) if ema else None
    rank, size = rank_and_size()
    number, spent, seen = 0, 0.0, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        number, spent, seen = state["step"], state["seconds"], state["pictures"]
        module.load_state_dict(state["module"])
        if average:
            kept = state.get("average", parameters)
            average.average, average.updates = [p.detach().clone() for p in kept], number
        if number:
            optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        state = {"step": number, "seconds": spent, "pictures": seen, "module": module.state_dict()}
        state["optimizer"] = optimizer.state_dict()
        if average:
            state["average"] = average.average
        _write(state, path)

    def publish(send: Callable[[], None]) -> None:
        if average:
            average.swap()
        send()
        if average:
            average.swap()

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
    module.train()
    while spent < minutes * 60:
        start = time.perf_counter()
        torch.manual_seed(number * size + rank)
        done = spent / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (number + 1) / 100) * min(1, (1 - done) / 0.4)
        losses = step(number)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        if size > 1:
            _share_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average:
            average.update()
        number, seen = number + 1, seen + pictures * size
        spent = _mean(torch.tensor(spent + time.perf_counter() - start, dtype=torch.float64)).item()
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
            publish(on_publish)
    if rank == 0 and (saved < spent or not path.exists()):
        save()
    bar.close()
    if average:
        average.swap()
    module.eval()
