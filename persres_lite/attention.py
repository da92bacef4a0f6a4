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

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from persres_lite.masks import average
from persres_lite.prompts import Call, watch_prompts, words_of
from persres_lite.residuals import advising_smaller, find_proj_outs, refuse_compiling, unet_of

Ask = Callable[[], "tuple[slice, torch.Tensor] | None"]
Tell = Callable[[str, torch.Tensor], None]


def mean(maps: torch.Tensor) -> torch.Tensor:
    """One map of those of all heads of all `attn2` layers under one `proj_out`: their mean.

    There is one layer, but 2 or 10 in SDXL; the paper speaks of neither. (B, layers, heads, HW, W) to (B, HW, W).
    """
    return maps.mean(2).mean(1)


def attend(attn: Any, q: torch.Tensor, k: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) @ columns by the fused kernel.

    Parameters
    ----------
    attn : Attention
        The diffusers layer: its number of heads.
    q, k : tensor (B, HW, heads * d) and (B, T, heads * d)
        What its `to_q` and `to_k` gave.
    columns : tensor (B, T, W)
        Values: for instance 1 at the tokens of word w.

    Returns
    -------
    tensor (B, heads, HW, W), float32
    """
    q, k = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (q, k))  # (B, heads, HW or T, d)
    width = q.shape[-1]
    parts = []
    for part in columns.to(q).split(width, dim=-1):
        # Padded to d columns: on a CPU and in flash attention the fused kernel needs values as wide as the keys.
        values = F.pad(part, (0, width - part.shape[-1])).unsqueeze(1).expand(-1, attn.heads, -1, -1)
        parts.append(F.scaled_dot_product_attention(q, k, values)[..., : part.shape[-1]].float())
    return torch.cat(parts, -1)


class _Watcher:
    """The hooks of one transformer: gathers the maps of its `attn2` layers, and tells when it has all."""

    def __init__(self, name: str, layers: int, ask: Ask, tell: Tell) -> None:
        self.name, self.layers, self.ask, self.tell = name, layers, ask, tell

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The transformer begins: whose maps are asked for, and of what size?"""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.size, self.asked = hidden.shape[-2:], self.ask()
        self.seen: dict[nn.Module, torch.Tensor] = {}
        self.maps: list[torch.Tensor] = []

    def keep(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """A projection ran: its queries or keys are needed in a moment."""
        self.seen[module] = output.detach()

    @torch.no_grad()
    def look(self, attn: Any, args: tuple, output: Any) -> None:
        """An `attn2` layer is done: its map from its own queries and keys, the kernel's output untouched."""
        if self.asked:
            rows, columns = self.asked
            q, k = self.seen[attn.to_q], self.seen[attn.to_kv if attn.fused_projections else attn.to_k]
            k = k[..., : q.shape[-1]]  # fused, they are keys and values
            self.maps.append(attend(attn, q[rows], k[rows], columns[:, : k.shape[1]]))
            if len(self.maps) == self.layers:  # one map of those of all layers
                one = mean(torch.stack(self.maps, 1))  # (rows, HW, W)
                self.tell(self.name, one.transpose(1, 2).unflatten(-1, self.size))
                self.maps = []
        self.seen = {}


@contextmanager
def watch_attention(base: Any, ask: Ask, tell: Tell) -> Iterator[None]:
    """Compute maps of chosen tokens in every forward pass inside the context, each one as its last `attn2` ends.

    Nothing is kept here but the queries and keys of the layer at work. No gradient flows through a map.

    Parameters
    ----------
    base : pipeline or Module
        Where to look.
    ask : callable
        Called when a block begins. Gives the slice of rows whose maps are wanted, and for each of these rows the
        columns (rows, T, W); or None.
    tell : callable (name, maps)
        Gets the name of the `proj_out` and its maps (rows, W, h, w).

    Raises
    ------
    ValueError
        If the U-Net is compiled, now or when it is called.
    """
    unet = unet_of(base)
    with ExitStack() as hooks:
        hooks.callback(refuse_compiling(base).remove)
        for name in find_proj_outs(unet):
            transformer: Any = unet.get_submodule(name.removesuffix(".proj_out"))
            watcher = _Watcher(name, len(transformer.transformer_blocks), ask, tell)
            handles = [transformer.register_forward_pre_hook(watcher.begin, with_kwargs=True)]
            for attn in (layer.attn2 for layer in transformer.transformer_blocks):
                keys = attn.to_kv if attn.fused_projections else attn.to_k
                handles += [part.register_forward_hook(watcher.keep) for part in (attn.to_q, keys)]
                handles.append(attn.register_forward_hook(watcher.look))
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
    maps : dict of (step, block) to tensor (images, words, h, w), float32, on the CPU
        The share of attention that each position gives to each word: over all tokens it sums to 1.
    """

    words: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    maps: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Recorded steps, in order."""
        return sorted({step for step, _ in self.maps})

    @property
    def blocks(self) -> list[str]:
        """Recorded blocks, in the order of the forward pass."""
        return list(dict.fromkeys(block for _, block in self.maps))

    def map(
        self, word: str | Sequence[str], step: int | slice | None = None, block: str | None = None, image: int = 0
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
        image : int
            Which image of the batch.

        Returns
        -------
        tensor (h, w)
            At the finest resolution among the maps that are averaged.

        Raises
        ------
        ValueError
            If nothing was recorded for this word, step or block.
        """
        asked = [word] if isinstance(word, str) else list(word)
        every = range(max(self.steps, default=-1) + 1)
        steps = every if step is None else every[step] if isinstance(step, slice) else [step + len(every) * (step < 0)]
        chosen = [
            maps[image, [self.words.index(each) for each in asked]].sum(0)
            for (at, name), maps in self.maps.items()
            if at in steps and block in (None, name) and set(asked) <= set(self.words)
        ]
        if not chosen:
            raise ValueError(
                f"No map of {', '.join(asked)} was recorded at step {step} in block {block}: there are the words "
                f"{', '.join(self.words)}, steps {self.steps} and blocks {', '.join(self.blocks)}."
            )
        return average(chosen)


@contextmanager
def record_attention(
    base: Any,
    prompt: str | Sequence[str] | None = None,
    words: Sequence[str] = (),
    *,
    steps: Collection[int] | None = None,
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
        prompt lacks a word, its map is zero.
    steps : list of int, optional
        Keep only these steps, counted from 0; all by default. What is not asked for is not computed.

    Yields
    ------
    AttentionRecord
        Emptied when the next pipeline call begins: it holds the latest.

    Raises
    ------
    ValueError
        Inside, if a prompt lacks one of the given words, or the U-Net is called for other prompts (see
        `prompts.Call.next`).
    """
    record = AttentionRecord()
    latest: list[tuple[Call, torch.Tensor]] = []

    def begin(call: Call) -> None:
        record.words = list(words or dict.fromkeys(word for text in call.prompts for word in words_of(text)))
        record.prompts, record.maps = call.prompts, {}
        latest[:] = [(call, call.columns(record.words, needed=bool(words)))]

    def ask() -> tuple[slice, torch.Tensor] | None:
        call, columns = latest[0]
        return (call.rows, columns) if steps is None or call.step in steps else None

    def tell(name: str, maps: torch.Tensor) -> None:
        record.maps[latest[0][0].step, name] = maps.cpu()

    with watch_prompts(base, begin, prompt), watch_attention(base, ask, tell), advising_smaller():
        yield record
