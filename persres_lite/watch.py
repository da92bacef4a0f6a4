"""Cross-attention maps of chosen tokens in every forward pass, while the model goes on using its fused attention.

The map of a set C of tokens is one column of values: with e (tokens x 1) = 1 on C, the fused kernel gives
SDPA(q, k, e) = sum over j in C of softmax(q k^T / sqrt(d))_j exactly (the idea is in diffusers #4413), and no
positions x tokens matrix ever exists. The column is not appended to the model's own values, although that would save a
second call: wider values select another kernel, whose rounding differs, and the picture would no longer be the
original model's bit for bit. The second call is small, since there are at most 77 keys.

Queries and keys are read by forward hooks on `to_q` and `to_k`. So no attention processor is replaced, and whichever is
there (sliced attention, IP-Adapter, fused projections, a LoRA) goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from persres_lite.projections import find_proj_outs, unet_of

Ask = Callable[[int, torch.Tensor | None], Any]
Tell = Callable[[str, torch.Tensor], None]


def attend(
    attn: Any, q: torch.Tensor, k: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) @ columns by the fused kernel, averaged over heads (the paper does not say how).

    Parameters
    ----------
    attn : Attention
        The diffusers layer: its number of heads, and its norms of queries and keys if it has them.
    q, k : tensor (B, HW, heads * d) and (B, T, heads * d)
        What its `to_q` and `to_k` gave.
    columns : tensor (B, T, W)
        Values: for instance 1 at the tokens of word w.
    bias : tensor (B, 1, T), optional
        Added to the scores, as the U-Net's `encoder_attention_mask` is.

    Returns
    -------
    tensor (B, HW, W), float32
    """
    q = q.reshape(*q.shape[:2], attn.heads, -1).transpose(1, 2)  # (B, heads, HW, d)
    k = k.reshape(*k.shape[:2], attn.heads, -1).transpose(1, 2)  # (B, heads, T, d)
    if getattr(attn, "norm_q", None) is not None:
        q = attn.norm_q(q)
    if getattr(attn, "norm_k", None) is not None:
        k = attn.norm_k(k)
    width = q.shape[-1]
    bias = None if bias is None else bias.unsqueeze(1).to(q.dtype)  # (B, 1, 1, T)
    parts = []
    for part in columns.to(q.dtype).split(width, dim=-1):
        # Padded to d columns: on a CPU and in flash attention the fused kernel needs values as wide as the keys.
        values = F.pad(part, (0, width - part.shape[-1])).unsqueeze(1).expand(-1, attn.heads, -1, -1)
        attended = F.scaled_dot_product_attention(q, k, values, attn_mask=bias)[..., : part.shape[-1]]
        parts.append(attended.float().mean(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def indicator(positions: Sequence[Sequence[Sequence[int]]], tokens: int) -> torch.Tensor:
    """The columns e: tensor (rows, tokens, words), 1 at the given positions of each row's words and 0 elsewhere."""
    columns = torch.zeros(len(positions), tokens, len(positions[0]))
    for row, words in enumerate(positions):
        for word, places in enumerate(words):
            columns[row, list(places), word] = 1
    return columns


class _Watcher:
    """The hooks of one transformer: gathers the maps of its `attn2` layers until its `proj_out` is about to run."""

    def __init__(self, name: str, ask: Ask, tell: Tell, refine: int) -> None:
        self.name, self.ask, self.tell, self.refine = name, ask, tell, refine
        self.rows = 0
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        self.maps: list[torch.Tensor] = []

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.batch, self.size = len(hidden), tuple(hidden.shape[-2:])
        self.rows = self.ask(self.batch, None)
        self.seen, self.maps = {}, []

    def keep(self, module: nn.Module, args: tuple, output: torch.Tensor, *, layer: nn.Module, part: str) -> None:
        if self.rows:
            self.seen[id(layer), part] = output.detach()

    @torch.no_grad()
    def look(
        self, module: nn.Module, args: tuple, kwargs: dict, output: Any, *, self_attention: nn.Module | None
    ) -> None:
        if not self.rows:
            return
        q, k = self._queries_and_keys(module)
        bias = kwargs.get("attention_mask")
        bias = None if bias is None else bias[-self.rows :]
        maps = attend(module, q, k, self.ask(self.batch, k), bias)  # (rows, HW, words)
        if self_attention is not None:
            q, k = self._queries_and_keys(self_attention)
            for _ in range(self.refine):
                maps = attend(self_attention, q, k, maps)
        self.maps.append(maps)
        self.seen = {}

    def _queries_and_keys(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.seen.get((id(layer), "to_q")), self.seen.get((id(layer), "to_k"))
        if (id(layer), "to_kv") in self.seen:  # after `fuse_qkv_projections`
            k = self.seen[id(layer), "to_kv"].chunk(2, dim=-1)[0]
        if (id(layer), "to_qkv") in self.seen:
            q, k, _ = self.seen[id(layer), "to_qkv"].chunk(3, dim=-1)
        if q is None or k is None:
            raise RuntimeError(
                f"An attention layer before {self.name!r} did not call its `to_q` and `to_k`: its processor "
                f"{type(layer.processor).__name__} brings projections of its own, or projections were fused or unfused "
                "while this context was open; do that before opening it."
            )
        return q[-self.rows :], k[-self.rows :]

    def finish(self, module: nn.Module, args: tuple) -> None:
        if self.maps:
            mean = self.maps[0] if len(self.maps) == 1 else torch.stack(self.maps).mean(0)
            self.tell(self.name, mean.transpose(1, 2).reshape(*mean.shape[::2], *self.size))
            self.maps = []


@contextmanager
def watch_attention(
    base: Any,
    ask: Ask,
    tell: Tell,
    blocks: Sequence[str] | None = None,
    refine: int = 0,
) -> Iterator[None]:
    """Compute maps of chosen tokens in every forward pass inside the context, each one before its `proj_out` runs.

    Nothing is kept here but the queries and keys of the layer at work. No gradient flows through a map.

    Parameters
    ----------
    base : pipeline or Module
        Where to look.
    ask : callable (batch, keys)
        With keys None: how many of the last rows of this U-Net call are asked for, 0 for none. With the keys
        (rows, T, C) of these rows: the columns (rows, T, W) for them, on the same device.
    tell : callable (name, maps)
        Gets the name of the `proj_out` and its maps (rows, W, h, w), the mean of the heads and of all `attn2` layers
        under it (2 or 10 in SDXL, of which the paper does not speak).
    blocks : list of str, optional
        Names of the `proj_out` modules to watch; all by default.
    refine : int
        How many times to spread each map along the self-attention of its own layer, also by the fused kernel.

    Raises
    ------
    ValueError
        If a block is unknown.
    """
    unet = unet_of(base)
    projections = find_proj_outs(unet)
    for name in blocks or ():
        if name not in projections:
            raise ValueError(f"Unknown block {name!r}: the U-Net has {', '.join(projections)}.")
    with ExitStack() as hooks:
        for name, proj_out in projections.items():
            if blocks is not None and name not in blocks:
                continue
            transformer: Any = unet.get_submodule(name.removesuffix(".proj_out"))
            watcher = _Watcher(name, ask, tell, refine)
            handles = [transformer.register_forward_pre_hook(watcher.begin, with_kwargs=True)]
            for layer in transformer.transformer_blocks:
                for attn in (layer.attn1, layer.attn2) if refine else (layer.attn2,):
                    for part in ("to_q", "to_k", "to_kv", "to_qkv"):
                        if isinstance(getattr(attn, part, None), nn.Module):
                            keep = partial(watcher.keep, layer=attn, part=part)
                            handles.append(getattr(attn, part).register_forward_hook(keep))
                look = partial(watcher.look, self_attention=layer.attn1 if refine else None)
                handles.append(layer.attn2.register_forward_hook(look, with_kwargs=True))
            handles.append(proj_out.register_forward_pre_hook(watcher.finish))
            for handle in handles:
                hooks.callback(handle.remove)
        yield
