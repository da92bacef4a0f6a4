"""Where words look: recording cross-attention maps while a pipeline is called.

`watch` has the hooks that compute maps from the fused kernel, `prompts` finds the words, `record` keeps the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from persres_lite.projections import unet_of
from persres_lite.prompts import count_conditional, find_words, token_positions, watch_prompts, words_of
from persres_lite.record import AttentionRecord
from persres_lite.watch import indicator, watch_attention

__all__ = ["AttentionRecord", "record_attention", "token_positions", "watch_attention"]


def _positions(base: Any, prompt: str, word: str, needed: bool) -> list[int]:
    """Where a word stands; nowhere, if it is not needed and not there."""
    try:
        return find_words(base, [prompt], word)[0]
    except ValueError:
        if needed:
            raise
        return []


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
        If a half or block is unknown; inside, if a prompt lacks one of the given words.
    """
    for half in halves:
        if half not in ("cond", "uncond"):
            raise ValueError(f"Unknown half {half!r}: choose 'cond' or 'uncond'.")
    wanted = None if words is None else [str(word) for word in ([words] if isinstance(words, str) else words)]
    record = AttentionRecord()
    state: dict[str, Any] = {"step": -1, "guided": None, "positions": []}

    def note(prompts: list[str], guided: bool | None) -> None:
        asked = wanted or list(dict.fromkeys(word for text in prompts for word in words_of(text)))
        where = [[_positions(base, text, word, needed=wanted is not None) for word in asked] for text in prompts]
        record.words, record.prompts, record.maps = asked, prompts, {}
        state.update(step=-1, guided=guided, positions=where)

    def count(module: nn.Module, args: tuple) -> None:
        state["step"] += 1

    def ask(batch: int, keys: torch.Tensor | None) -> Any:
        if steps is not None and state["step"] not in steps:
            return 0
        if not state["positions"]:
            raise ValueError("No prompt is known yet: call the pipeline itself, or pass `prompt`.")
        images = count_conditional(batch, len(state["positions"]), state["guided"])
        both = "uncond" in halves and batch == 2 * images
        if keys is None:
            return batch if both else images
        return indicator(state["positions"] * (2 if both else 1), keys.shape[1]).to(keys.device)

    def tell(name: str, maps: torch.Tensor) -> None:
        images = len(state["positions"])
        parts = {"cond": maps[-images:]} | ({"uncond": maps[:images]} if len(maps) > images else {})
        for half in halves:
            if half in parts:
                record.maps[state["step"], name, half] = parts[half].cpu()

    with ExitStack() as stack:
        stack.enter_context(watch_prompts(base, note, prompt))
        stack.callback(unet_of(base).register_forward_pre_hook(count).remove)
        stack.enter_context(watch_attention(base, ask, tell, blocks, refine))
        yield record
