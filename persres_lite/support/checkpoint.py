"""The state of an unfinished training in one safetensors file, replaced whole: a kill at any moment leaves a good one.

The tensors are what learns, Adam's moments of it and the state of the random generator; the losses so far, the loss
scale and the settings that a resumed run must share are JSON in the file's metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persres_lite.support.files import read_tensors, write_tensors
from persres_lite.support.notices import tell

KEY = "persres_lite_checkpoint"
EVERY = 25  # steps; the file is a few megabytes, and at most this much work is lost

Snapshot = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and what JSON can hold


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
    """Put a `snapshot` back, in place."""
    tensors, rest = saved
    state.generator.set_state(tensors["generator"])
    state.scaler.load_state_dict(rest["scaler"])
    state.losses[:] = rest["losses"]
    state.optimizer.zero_grad()
    state.optimizer.state.clear()
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "value":
            state.parameters[name].copy_(value)
        elif name:  # a moment; Adam keeps the number of its step on the CPU
            parameter = state.parameters[name]
            state.optimizer.state[parameter][kind] = value.to("cpu" if kind == "step" else parameter.device, copy=True)


class Keeper:
    """A training's last whole step, to which it can go back: in memory, and every 25 steps in a file, if one is named.

    Parameters
    ----------
    state : State
        What is kept; put where the file left it, if there is one.
    path : path, optional
        The file. An older one is replaced whole or not at all.
    settings : dict
        Everything that the final tensors depend on, except the number of steps; must be JSON's types.

    Raises
    ------
    ValueError
        If the file is no checkpoint, or of a training with other settings (the first one is named).
    OSError
        If it cannot be written.
    """

    def __init__(self, state: State, path: str | os.PathLike | None, settings: dict[str, Any]) -> None:
        self.state, self.path, self.settings = state, path, settings
        if path is not None and Path(path).exists():
            tensors, metadata = read_tensors(path)
            if KEY not in metadata:
                raise ValueError(f"{path} is no checkpoint of a training: delete it, or name another file.")
            rest = json.loads(metadata[KEY])
            for name, value in settings.items():
                if (other := rest["settings"].get(name)) != value:
                    raise ValueError(
                        f"The checkpoint {path} belongs to a training with {name} = {str(other)[:40]}, not "
                        f"{str(value)[:40]}: give the same arguments, or name another file to begin anew."
                    )
            restore(state, (tensors, rest))
        self.good = snapshot(state)
        self._write()  # a place that cannot be written to is better known now

    def keep(self) -> None:
        """A step is done."""
        self.good = snapshot(self.state)
        if len(self.state.losses) % EVERY == 0:
            self.write()

    def back(self) -> None:
        """To the last whole step."""
        restore(self.state, self.good)

    def write(self) -> None:
        """The last whole step. A disk that has filled up meanwhile does not end a training: its result is in memory."""
        try:
            self._write()
        except OSError as error:
            tell(f"{error} The training goes on, and could not be taken up again from here.")

    def _write(self) -> None:
        if self.path is not None:
            tensors, rest = self.good
            write_tensors(self.path, tensors, {KEY: json.dumps(rest | {"settings": self.settings})})
