"""The state of an unfinished training in one safetensors file, replaced whole: a kill at any moment leaves a good one.

The tensors are what learns, Adam's moments of it and the state of the random generator; the losses so far, the loss
scale and the settings that a resumed run must share are JSON in the file's metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persres_lite.support.files import read_tensors, write_tensors

KEY = "persres_lite_checkpoint"

Snapshot = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and what JSON can hold."""


@dataclass
class State:
    """Everything that a training step changes."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Adam
    generator: torch.Generator  # a CPU generator, of all random draws
    scaler: torch.amp.GradScaler
    losses: list[float]


def snapshot(state: State) -> Snapshot:
    """A copy of the state, to be taken between two steps."""
    tensors = {"generator": state.generator.get_state()}
    for name, parameter in state.parameters.items():
        tensors[f"value/{name}"] = parameter.detach().clone()
        for moment, value in state.optimizer.state.get(parameter, {}).items():  # step, exp_avg, exp_avg_sq
            tensors[f"{moment}/{name}"] = value.clone()
    return tensors, {"losses": list(state.losses), "scaler": state.scaler.state_dict()}


@torch.no_grad()
def restore(state: State, saved: Snapshot) -> None:
    """Put a :func:`snapshot` back, in place.

    Raises
    ------
    ValueError
        If it is not one of this state.
    """
    try:
        _restore(state, *saved)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # from a file that someone has changed
        raise ValueError(f"The checkpoint is damaged ({error!r}): delete it, or name another file.") from error


def _restore(state: State, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    state.generator.set_state(tensors["generator"])
    state.scaler.load_state_dict(rest["scaler"])
    state.losses[:] = rest["losses"]
    state.optimizer.state.clear()
    for name, parameter in state.parameters.items():
        parameter.copy_(tensors[f"value/{name}"])
        if f"step/{name}" in tensors:  # not before the first step
            state.optimizer.state[parameter] = {
                "step": tensors[f"step/{name}"].clone(),  # which Adam keeps on the CPU
                "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device, copy=True),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device, copy=True),
            }


def write_checkpoint(path: str | Path, saved: Snapshot, settings: dict[str, Any]) -> None:
    """Write a :func:`snapshot`; an older file at `path` is replaced at once or not at all.

    Parameters
    ----------
    path : str or Path
        The file.
    saved : Snapshot
        From :func:`snapshot`.
    settings : dict of str to object
        Everything that the final tensors depend on, except the number of steps; must be JSON's types.
    """
    tensors, rest = saved
    write_tensors(path, tensors, {KEY: json.dumps(rest | {"settings": settings})})


def read_checkpoint(path: str | Path, settings: dict[str, Any]) -> Snapshot:
    """Read what :func:`write_checkpoint` wrote, if it belongs to a training with these settings.

    Raises
    ------
    ValueError
        If the file is damaged or no checkpoint, or belongs to a training with other settings (the first one is named).
    """
    tensors, metadata = read_tensors(path)
    if KEY not in metadata:
        raise ValueError(f"{path} is no checkpoint of a training: delete it, or name another file.")
    try:
        rest = json.loads(metadata[KEY])
        theirs = dict(rest.pop("settings"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"The checkpoint {path} is damaged: delete it, or name another file.") from None
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"The checkpoint {path} belongs to a training with {name} = {theirs.get(name)!r}, not {value!r}: "
                "give the same arguments to go on with it, or name another file to begin anew."
            )
    return tensors, rest
