"""When memory runs out: one sentence that says what to do, with the library's own behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

SIGNS = ("out of memory", "can't allocate memory", "not enough memory")
SAID = "The memory did not suffice (out of memory): "


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; on a GPU it has a class of its own, elsewhere only its words."""
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    return said or isinstance(error, MemoryError)


@contextmanager
def advising(*tries: str) -> Iterator[None]:
    """An error of memory that leaves this context says what to try, the best first. Of nested contexts the innermost
    speaks, with an error of the class that was raised inside (on a GPU torch.cuda.OutOfMemoryError).
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or str(error).startswith(SAID):
            raise
        also = f" ({error})" if str(error) else ""
        raise type(error)(f"{SAID}{', or '.join([*tries, 'close what else uses it'])}{also}.") from error


def advising_smaller() -> AbstractContextManager[None]:
    """A context in which a pipeline that runs out of memory says what to try."""
    return advising(
        "draw fewer pictures at once (num_images_per_prompt) or smaller ones (height, width)",
        "call the pipeline's `vae.enable_slicing()`",
        "on a GPU its `enable_model_cpu_offload()`",
    )
