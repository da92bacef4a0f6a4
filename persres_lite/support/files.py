"""Safetensors files, read with plain words for what is wrong and written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

ROOM = 1 << 23  # bytes: more than a file of residuals or a sheet of pictures usually has


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name in the same folder; what was written there takes the place of `path` if nothing went wrong.

    The folder is made if it is not there. Readers see the old file or the whole new one, never a part.

    Raises
    ------
    OSError
        If it cannot be written, of the system's own kind, with a sentence that names `path`.
    """
    path = Path(path).expanduser()
    # A name that nobody can foresee, and put a link in its place; libraries choose a format by the ending.
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    with _naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)  # the umask says who reads it
            yield temporary
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def check_place(path: str | os.PathLike) -> None:
    """Find out whether a file can be written, before the work that it is for: by writing one and taking it away again.

    No folder is made; where some are missing, the nearest one that is there is tried.

    Parameters
    ----------
    path : path
        The file to be written.

    Raises
    ------
    OSError
        As `whole_file`.
    """
    path = Path(path).expanduser()
    with _naming(path):
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if shutil.disk_usage(folder).free < ROOM:
            raise OSError("no space left")
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise type(error)(f"{path} cannot be written ({why}): make room or name another place.") from error


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

    Raises
    ------
    OSError
        As `whole_file`.
    """
    # Not save_file: it makes files that only their owner may read, and a full disk is no OSError to it.
    whole = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
    with whole_file(path) as temporary:
        temporary.write_bytes(whole)
    return Path(path).expanduser()


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all tensors (on the CPU) and the metadata of one safetensors file.

    Raises
    ------
    OSError
        If there is no such file, or it may not be read.
    ValueError
        If it is not a whole safetensors file, or if a tensor holds NaN or infinity.
    """
    path = Path(path).expanduser()
    if not path.is_file():  # of a pipe one would wait for its end
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        diverged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    except OSError:  # no permission is no damage
        raise
    except Exception as error:  # its parser's own error, and torch's about kinds of numbers that it does not know
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was cut off or is of another kind; fetch it again."
        ) from error
    if diverged:
        raise ValueError(f"{path} holds NaN or infinity in {diverged[0]!r}: the training that wrote it had diverged.")
    return tensors, metadata
