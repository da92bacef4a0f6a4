"""Safetensors files, read with plain words for what is wrong and written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

TRIAL = 1 << 24  # bytes that are written to try a place: quotas do not show in the room that a disk says it has


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name in the same folder; what was written there takes the place of `path` if nothing went wrong.

    The folder is made if it is not there. Readers see the old file or the whole new one, never a part.

    Raises
    ------
    OSError
        If it cannot be written, of the system's own kind, with a sentence that names `path`.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_file(path.parent, path.suffix)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _new_file(folder: Path, suffix: str) -> Path:
    """An empty file of a name that nobody can foresee, and put a link in the place of; the umask says who reads it."""
    path = folder / f".{secrets.token_hex(8)}{suffix}"  # the same ending, by which libraries choose a format
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def check_place(path: str | os.PathLike, room: int = 1) -> None:
    """Find out whether a file can be written, before the work that it is for: by writing one and taking it away again.

    No folder is made; where some are missing, the nearest one that is there is tried.

    Parameters
    ----------
    path : path
        The file to be written.
    room : int
        How many bytes it will have.

    Raises
    ------
    OSError
        As `whole_file`.
    """
    path, trial = Path(path), None
    try:
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        trial = _new_file(folder, path.suffix)
        if shutil.disk_usage(folder).free < room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(trial, "wb") as file:
            file.write(bytes(min(room, TRIAL)))
            file.flush()
            os.fsync(file.fileno())  # some systems tell only now that there is no room
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if trial is not None:
            with suppress(OSError):
                trial.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> OSError:
    kind = NotADirectoryError if isinstance(error, FileExistsError) else type(error)  # a file where a folder should be
    reason = (error.strerror or str(error)).lower()
    return kind(f"{path} cannot be written ({reason}): make room or name another place.")


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
        raise FileNotFoundError(f"{path} is a folder, not a file." if path.is_dir() else f"There is no file {path}.")
    with open(path, "rb"):  # no permission is no damage
        pass
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # its parser's own error, and torch's about kinds of numbers that it does not know
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was cut off or is of another kind; fetch it again."
        ) from error
    for name, tensor in tensors.items():
        try:
            finite = _is_finite(tensor)
        except (NotImplementedError, RuntimeError) as error:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path} holds {name!r} as {kind}, which cannot be read here: save it as fp16.") from error
        if not finite:
            raise ValueError(f"{path} holds NaN or infinity in {name!r}: the training that wrote it had diverged.")
    return tensors, metadata


def _is_finite(tensor: torch.Tensor) -> bool:
    values = tensor.flatten()  # of any number of dimensions
    if values.is_floating_point() and values.element_size() == 1:
        values = values.float()  # torch asks this of no float8
    return bool(torch.isfinite(values).all())
