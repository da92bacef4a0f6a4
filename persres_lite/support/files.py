"""Safetensors files, read with plain words for what is wrong and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name in the same folder; what was written there takes the place of `path` if nothing went wrong.

    The folder is made if it is not there. Readers see the old file or the whole new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # the same ending, by which libraries choose a format
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Write one safetensors file: first under a temporary name in the same folder, then renamed in one step.

    Parameters
    ----------
    path : path
        Where to write; the folder is made if it is not there.
    tensors : dict of name to tensor
        Any shapes; copied to the CPU.
    metadata : dict of str to str
        Travels inside the file, where loaders of other tools ignore it.

    Returns
    -------
    Path
        The written file.
    """
    with whole_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
    return Path(path)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors (on the CPU) and the metadata of one safetensors file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a whole safetensors file, or if a tensor holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was cut off or is of another kind; fetch it again."
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path} holds NaN or infinity in {name!r}: the training that wrote it had diverged.")
    return tensors, metadata
