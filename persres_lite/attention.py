"""Lesson 04, `notebooks/04_cross_attention.ipynb`: where words look, while the model goes on with fused attention.

The map of a set C of tokens is one column of values: with e (tokens x 1) = 1 on C, the fused kernel gives
SDPA(q, k, e) = sum over j in C of softmax(q k^T / sqrt(d))_j exactly (the idea is in diffusers #4413), and no
positions x tokens matrix ever exists. The column is not appended to the model's own values, although that would save a
second call: wider values select another kernel, whose rounding differs, and the picture would no longer be the
original model's bit for bit. The second call is small, since there are at most 77 keys.

Queries and keys are read by forward hooks on `to_q` and `to_k`. So no attention processor is replaced, and whichever is
there (sliced attention, IP-Adapter, fused projections, a LoRA) goes on working.

From bottom to top: `attend` is the map of one layer, `watch_attention` the hooks that compute it in every block,
`record_attention` keeps the maps of a pipeline call in an `AttentionRecord`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from persres_lite.masks import average
from persres_lite.prompts import Call, find_words, watch_prompts, words_of
from persres_lite.residuals import advising_smaller, find_proj_outs, refuse_compiling, unet_of

Rows = Callable[[int], "slice | None"]
Columns = Callable[[torch.Tensor], torch.Tensor]
Tell = Callable[[str, torch.Tensor], None]
Reduce = Callable[[torch.Tensor], torch.Tensor]

REDUCTIONS: dict[str, Reduce] = {
    "mean": lambda maps: maps.mean(1),
    "max": lambda maps: maps.amax(1),
    "first": lambda maps: maps[:, 0],
    "last": lambda maps: maps[:, -1],
}
"""What makes one map of several, (B, several, HW, W) to (B, HW, W): those of heads, or of layers."""


def attend(
    attn: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None = None,
    heads: Reduce = REDUCTIONS["mean"],
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) @ columns by the fused kernel, made one map of its heads (the paper does not say how).

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
    heads : callable
        Makes one map of those of the heads, (B, heads, HW, W), in place of the mean.

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
        parts.append(heads(attended.float()))
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

    def __init__(
        self, name: str, rows: Rows, columns: Columns, tell: Tell, refine: int, heads: Reduce, layers: Reduce
    ) -> None:
        self.name, self.asked, self.columns, self.tell, self.refine = name, rows, columns, tell, refine
        self.heads, self.layers = heads, layers
        self.rows: slice | None = None
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        self.maps: list[torch.Tensor] = []

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The transformer begins: whose maps are asked for, and of what size?"""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.rows, self.size = self.asked(len(hidden)), tuple(hidden.shape[-2:])
        self.seen, self.maps = {}, []

    def keep(self, module: nn.Module, args: tuple, output: torch.Tensor, *, layer: nn.Module, part: str) -> None:
        """A projection ran: its queries or keys are needed in a moment."""
        if self.rows is not None:
            self.seen[id(layer), part] = output.detach()

    @torch.no_grad()
    def look(
        self, module: nn.Module, args: tuple, kwargs: dict, output: Any, *, self_attention: nn.Module | None
    ) -> None:
        """An `attn2` layer is done: its map from its own queries and keys, the kernel's output untouched."""
        if self.rows is None:
            return
        q, k = self._queries_and_keys(module)
        bias = kwargs.get("attention_mask")
        bias = None if bias is None else bias[self.rows]
        maps = attend(module, q, k, self.columns(k), bias, self.heads)  # (rows, HW, words)
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
        return q[self.rows], k[self.rows]

    def finish(self, module: nn.Module, args: tuple) -> None:
        """`proj_out` is about to run: one map of those of the transformer's layers is told."""
        if self.maps:
            one = self.maps[0] if len(self.maps) == 1 else self.layers(torch.stack(self.maps, 1))
            self.tell(self.name, one.transpose(1, 2).reshape(*one.shape[::2], *self.size))
            self.maps = []


@contextmanager
def watch_attention(
    base: Any,
    rows: Rows,
    columns: Columns,
    tell: Tell,
    blocks: Sequence[str] | None = None,
    refine: int = 0,
    heads: Reduce = REDUCTIONS["mean"],
    layers: Reduce = REDUCTIONS["mean"],
) -> Iterator[None]:
    """Compute maps of chosen tokens in every forward pass inside the context, each one before its `proj_out` runs.

    Nothing is kept here but the queries and keys of the layer at work. No gradient flows through a map.

    Parameters
    ----------
    base : pipeline or Module
        Where to look.
    rows : callable (batch)
        Gets the number of rows of the U-Net call, and gives the slice of them whose maps are asked for, or None.
    columns : callable (keys)
        Gets the keys (rows, T, C) of these rows, and gives their columns (rows, T, W) on the same device.
    tell : callable (name, maps)
        Gets the name of the `proj_out` and its maps (rows, W, h, w).
    blocks : list of str, optional
        Names of the `proj_out` modules to watch; all by default.
    refine : int
        How many times to spread each map along the self-attention of its own layer, also by the fused kernel.
    heads, layers : callable
        Make one map of those of a layer's heads, and of those of all `attn2` layers under one `proj_out` (2 or 10 in
        SDXL, of which the paper does not speak): the mean, or another of `REDUCTIONS`.

    Raises
    ------
    ValueError
        If a block is unknown, or the U-Net is compiled, now or when it is called.
    RuntimeError
        From the U-Net call, if an attention layer does not use its `to_q` and `to_k`.
    """
    unet = unet_of(base)
    projections = find_proj_outs(unet)
    for name in blocks or ():
        if name not in projections:
            raise ValueError(f"Unknown block {name!r}: the U-Net has {', '.join(projections)}.")
    with ExitStack() as hooks:
        hooks.callback(refuse_compiling(base).remove)
        for name, proj_out in projections.items():
            if blocks is not None and name not in blocks:
                continue
            transformer: Any = unet.get_submodule(name.removesuffix(".proj_out"))
            watcher = _Watcher(name, rows, columns, tell, refine, heads, layers)
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


@dataclass
class AttentionRecord:
    """Maps of words, by step and block: asked for a word, it answers with a map.

    Attributes
    ----------
    words : list of str
        What was asked for.
    prompts : list of str
        One for each image of the batch.
    maps : dict of (step, block, half) to tensor (images, words, h, w), float32, on the CPU
        The share of attention that each position gives to each word: over all tokens it sums to 1.
    """

    words: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    maps: dict[tuple[int, str, str], torch.Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Recorded steps, in order."""
        return sorted({step for step, _, _ in self.maps})

    @property
    def blocks(self) -> list[str]:
        """Recorded blocks, in the order of the forward pass."""
        return list(dict.fromkeys(block for _, block, _ in self.maps))

    def map(
        self,
        word: str | Sequence[str],
        step: int | slice | None = None,
        block: str | None = None,
        half: str = "cond",
        image: int = 0,
    ) -> torch.Tensor:
        """Where a word looked: the mean over all steps and blocks that are not named.

        Parameters
        ----------
        word : str or list of str
            One of `words`; of several the maps are added (paper: A_{i,C}).
        step : int or slice, optional
            One step, counted from 0 (negative from the end), or a range such as slice(0, 10).
        block : str, optional
            The name of one `proj_out`.
        half : 'cond' or 'uncond'
            Which half under guidance.
        image : int
            Which image of the batch.

        Returns
        -------
        tensor (h, w)
            At the finest resolution among the maps that are averaged.

        Raises
        ------
        ValueError
            If nothing was recorded for this word, step, block, half or image.
        """
        asked = [str(word)] if not isinstance(word, (list, tuple)) else [str(each) for each in word]
        for each in asked:
            if each not in self.words:
                raise ValueError(f"No map of {each!r} was recorded: the words are {', '.join(map(repr, self.words))}.")
        if not 0 <= image < len(self.prompts):
            raise ValueError(f"There is no image {image}: the batch had {len(self.prompts)}.")
        if step is None:
            steps = self.steps
        elif isinstance(step, slice):
            steps = list(range(*step.indices(max(self.steps, default=-1) + 1)))
        else:
            steps = [step if step >= 0 else max(self.steps, default=-1) + 1 + step]
        chosen = [
            maps[image, [self.words.index(each) for each in asked]].sum(0)
            for (at, name, which), maps in self.maps.items()
            if at in steps and block in (None, name) and which == half
        ]
        if not chosen:
            raise ValueError(
                f"Nothing was recorded at step {step}, block {block!r}, half {half!r}: there are steps {self.steps} "
                f"and blocks {', '.join(self.blocks) or 'none'}."
            )
        return average([each[None] for each in chosen])[0]


@contextmanager
def record_attention(
    base: Any,
    prompt: str | Sequence[str] | None = None,
    words: Sequence[str] | None = None,
    *,
    halves: Sequence[str] = ("cond",),
    steps: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    refine: int = 0,
) -> Iterator[AttentionRecord]:
    """Record where words look while the pipeline is called inside the context.

    Parameters
    ----------
    base : pipeline
        Called as usual inside the context, with any batch and resolution; the picture is the same bit for bit.
    prompt : str or list of str, optional
        One prompt, or one for each row. By default read from the pipeline call; needed if the U-Net is called directly
        or the pipeline with `prompt_embeds`.
    words : list of str, optional
        Words or phrases ("sks cat"), each the sum over all its tokens. By default every word of the prompts; where a
        prompt lacks a word, or is cut off before it, its map is zero.
    halves : tuple of 'cond' and 'uncond'
        Under guidance the batch is [negative, positive]. 'uncond' records the same token positions in the negative
        half, whose prompt lacks the words.
    steps, blocks : list, optional
        Keep only these steps (counted from 0) and these `proj_out` names; all by default. What is not asked for is
        not computed.
    refine : int
        How many times to spread each map along self-attention.

    Yields
    ------
    AttentionRecord
        Emptied when the next pipeline call begins: it holds the latest.

    Raises
    ------
    ValueError
        If a half or block is unknown; inside, if a prompt lacks one of the given words, or the U-Net is called for
        other prompts (see `prompts.Call.next`).
    """
    for half in halves:
        if half not in ("cond", "uncond"):
            raise ValueError(f"Unknown half {half!r}: choose 'cond' or 'uncond'.")
    wanted = None if words is None else [str(word) for word in ([words] if isinstance(words, str) else words)]
    recorder = _Recorder(base, wanted, halves, steps)
    with ExitStack() as stack:
        stack.enter_context(watch_prompts(base, recorder.begin, prompt))
        stack.enter_context(watch_attention(base, recorder.rows, recorder.columns, recorder.tell, blocks, refine))
        stack.enter_context(advising_smaller())
        yield recorder.record


class _Recorder:
    """What `record_attention` does on the way from a prompt to its maps."""

    def __init__(self, base: Any, wanted: list[str] | None, halves: Sequence[str], steps: Sequence[int] | None) -> None:
        self.base, self.wanted, self.halves, self.steps = base, wanted, halves, steps
        self.record = AttentionRecord()

    def begin(self, call: Call) -> None:
        """A pipeline call: where do the words stand in its prompts?"""
        words = self.wanted or list(dict.fromkeys(word for text in call.prompts for word in words_of(text)))
        self.call = call
        self.positions = [[self._find(text, word) for word in words] for text in call.prompts]
        self.record.words, self.record.prompts, self.record.maps = words, call.prompts, {}

    def _find(self, prompt: str, word: str) -> list[int]:
        """Positions of a word; none, if nobody asked for it by name and it is not there."""
        try:
            return find_words(self.base, [prompt], word)[0]
        except ValueError:
            if self.wanted is not None:
                raise
            return []

    def _asked(self) -> dict[str, slice]:
        """Rows of the U-Net call by half, of the halves that are recorded."""
        found = {"cond": self.call.halves.conditional, "uncond": self.call.halves.unconditional}
        return {half: rows for half, rows in found.items() if half in self.halves and rows is not None}

    def rows(self, batch: int) -> slice | None:
        """A block attends: whose maps are asked for?"""
        asked = list(self._asked().values())
        if not asked or self.steps is not None and self.call.step not in self.steps:
            return None
        return asked[0] if len(asked) == 1 else slice(0, batch)

    def columns(self, keys: torch.Tensor) -> torch.Tensor:
        """And of which tokens?"""
        return indicator(self.positions * len(self._asked()), keys.shape[1]).to(keys.device)

    def tell(self, name: str, maps: torch.Tensor) -> None:
        """The block's maps, kept."""
        asked = self._asked()
        for half, rows in asked.items():
            self.record.maps[self.call.step, name, half] = (maps if len(asked) == 1 else maps[rows]).cpu()
