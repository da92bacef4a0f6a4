"""V*'s embedding as a second thing to learn: optional, off by default, since the paper does not say that it does.

The frozen table of embeddings stays what it is; a forward hook puts the learned rows in the place of V*'s own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def rare_token_embeddings(base: Any, token: str) -> dict[str, nn.Parameter]:
    """Copies of V*'s embedding in each text encoder of a pipeline, ready to learn.

    Returns
    -------
    dict of str to Parameter
        By the text encoder's name: (pieces, width) in fp32; a rare word may be split into several pieces.
    """
    tables = {encoder: getattr(base, encoder).get_input_embeddings().weight for encoder, _ in _encoders(base)}
    pieces = {encoder: _pieces(getattr(base, tokenizer), token) for encoder, tokenizer in _encoders(base)}
    return {name: nn.Parameter(table[pieces[name]].detach().float().clone()) for name, table in tables.items()}


@contextmanager
def rare_token_attached(base: Any, token: str, rows: Mapping[str, Tensor]) -> Iterator[None]:
    """V* is embedded by `rows` for as long as the context is open; gradients reach them.

    Parameters
    ----------
    base : pipeline
        The pipeline.
    token : str
        V*.
    rows : dict of str to tensor
        As from `rare_token_embeddings`; empty for nothing to do.
    """
    with ExitStack() as hooks:
        for encoder, tokenizer in _encoders(base):
            if encoder in rows:
                table = getattr(base, encoder).get_input_embeddings()
                pieces = torch.tensor(_pieces(getattr(base, tokenizer), token), device=table.weight.device)
                hook = partial(_replace_rows, pieces=pieces, rows=rows[encoder])
                hooks.callback(table.register_forward_hook(hook).remove)
        yield


def _encoders(base: Any) -> list[tuple[str, str]]:
    return [names for names in ENCODERS.items() if getattr(base, names[0], None) is not None]


def _pieces(tokenizer: Any, token: str) -> list[int]:
    return tokenizer(token, add_special_tokens=False).input_ids


def _replace_rows(module: nn.Module, inputs: tuple[Tensor], output: Tensor, *, pieces: Tensor, rows: Tensor) -> Tensor:
    """Forward hook of an embedding table: ids (b, n) in, vectors (b, n, width) out."""
    ids, count = inputs[0], len(pieces)
    start = (ids.unfold(-1, count, 1) == pieces).all(-1)  # (b, n - count + 1): V* begins here
    for k in range(count):
        here = nn.functional.pad(start, (k, count - 1 - k))
        output = torch.where(here[..., None], rows[k].to(output.dtype), output)
    return output
