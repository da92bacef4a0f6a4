"""Localized attention-guided sampling (LAG): the residuals where the concept is, the original model elsewhere.

f^_i = (1 - M_i) W_i x + M_i W'_i x for each transformer block i, where M_i is made of the cross-attention map of the
concept's words in the same block and the same forward pass (Ham et al., CVPR 2024). Since W' = W + A B, this is
W x + M A B x: the frozen projection runs as ever, and no extra model evaluation is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from persres_lite.lag import Lag, Run
from persres_lite.lora import adapter_layers
from persres_lite.masks import Rule, find_rule, read_mask
from persres_lite.projections import add_low_rank, find_proj_outs, unet_of
from persres_lite.prompts import watch_prompts
from persres_lite.residuals import Residuals
from persres_lite.support.rare_token import rare_token_attached
from persres_lite.watch import watch_attention


@contextmanager
def localized(
    base: Any,
    residuals: Residuals | str | Sequence[tuple[Residuals | str, Any]],
    concept: Any = None,
    *,
    mask: str | Rule = "median",
    scale: float = 1.0,
    unconditional: Literal["same", "own", "residual", "original"] = "same",
    window: tuple[float, float] = (0.0, 1.0),
    outside: Literal["original", "residual"] = "original",
    fixed_mask: Any = None,
    aggregate: Literal["blocks", "steps", "both"] | None = None,
    refine: int = 0,
    prompts: str | Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Lag]:
    """f^ = (1 - M) W x + M W' x for every pipeline call inside the context.

    Prompts are read from the pipeline call, by wrapping `encode_prompt` while the context is open
    (`prompts.watch_prompts` says why there); each row of a batch has its own positions of the concept's words.

    Parameters
    ----------
    base : pipeline
        Any scheduler, batch, `num_images_per_prompt`, callback or attention processor; called as usual.
    residuals : Residuals, str or list of pairs
        The name of an adapter stands for a LoRA on `proj_out` that the pipeline has loaded. A list of (residuals,
        concept) pairs localizes several at once; where masks overlap they are divided by their sum, so that weights
        sum to at most one.
    concept : Concept, str or list of str
        Whose attention makes the mask: str(concept) is looked for as a phrase ("sks cat"), else word by word.
    mask : str or callable
        A rule of `masks.RULES`, with its `options`, or a function of maps (B, h, w).
    scale : float
        Strength of the residual inside the mask.
    unconditional : 'same', 'own', 'residual' or 'original'
        What the negative half does under guidance, whose prompt lacks the concept; the paper does not say. 'same'
        (default) uses the positive half's mask, so that a mask of ones is the plain residual; 'own' makes a mask of the
        attention to the same token positions in the negative prompt; 'residual' is M = 1, 'original' is M = 0.
    window : (float, float)
        The share of steps at which masks are made: (0, 0.5) is the first half. A step is one U-Net evaluation.
    outside : 'original' or 'residual'
        What the other steps use: M = 0 or M = 1.
    fixed_mask : picture, array or tensor, or a list with one for each pair, optional
        A mask drawn by hand, (h, w) or one for each image (images, h, w), in [0, 1] (pictures and bytes: 0 to 255);
        resized to each block. Then no attention is looked at, and no words are needed.
    aggregate : 'blocks', 'steps' or 'both', optional
        Make each mask of an average of maps instead of one block's at one step (the paper's way): over all blocks (for
        those that have not yet run in this pass, their last map), over all steps so far, or over both.
    refine : int
        How many times to spread each map along self-attention first.
    prompts : str or list of str, optional
        Needed only if the pipeline is called with `prompt_embeds`, or its U-Net directly.
    **options
        Of the mask rule, for instance q=0.8 for 'quantile'.

    Yields
    ------
    Lag
        Its `masks` are what was used, by (step, block).

    Raises
    ------
    ValueError
        At once if an argument is unknown or the residuals do not fit; from the pipeline call if a prompt lacks the
        concept's words.
    """
    pairs = [(residuals, concept)] if isinstance(residuals, (Residuals, str)) else list(residuals)
    if not pairs:
        raise ValueError("No residuals were given: pass residuals and a concept, or a list of such pairs.")
    _check(unconditional=unconditional, outside=outside, aggregate=aggregate, window=window)
    drawn = None
    if fixed_mask is not None:
        each = fixed_mask if isinstance(fixed_mask, (list, tuple)) and len(pairs) > 1 else [fixed_mask] * len(pairs)
        if len(each) != len(pairs):
            raise ValueError(f"Got {len(each)} fixed masks for {len(pairs)} pairs of residuals and concept.")
        drawn = [read_mask(one) for one in each]
    else:
        for _, which in pairs:
            if which is None:
                raise ValueError("No concept was given: its words tell where to look (or pass `fixed_mask`).")
    run = Run(
        base=base,
        concepts=[which if isinstance(which, (list, tuple)) else str(which) for _, which in pairs],
        drawn=drawn,
        rule=find_rule(mask, **options),
        unconditional=unconditional,
        window=window,
        outside=outside,
        aggregate=aggregate,
        lag=Lag(parts=[{} for _ in pairs]),
    )
    with ExitStack() as stack:
        for index, (which, _) in enumerate(pairs):
            for handle in _apply_hooks(base, which, run, index, scale):
                stack.callback(handle.remove)
            if isinstance(which, Residuals) and scale != 0:
                stack.enter_context(rare_token_attached(base, which.metadata.get("token", ""), which.rows))
        stack.enter_context(watch_prompts(base, run.note, prompts, needed=drawn is None))
        stack.callback(unet_of(base).register_forward_pre_hook(run.begin, with_kwargs=True).remove)
        if drawn is None:
            stack.enter_context(watch_attention(base, run.ask, run.tell, refine=refine))
        else:
            for name in find_proj_outs(unet_of(base)):
                transformer = unet_of(base).get_submodule(name.removesuffix(".proj_out"))
                hook = partial(run.draw, name=name)
                stack.callback(transformer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield run.lag


def _check(**arguments: Any) -> None:
    """Refuse unknown choices at once, not at the first step."""
    choices = {
        "unconditional": ("same", "own", "residual", "original"),
        "outside": ("original", "residual"),
        "aggregate": (None, "blocks", "steps", "both"),
    }
    for name, allowed in choices.items():
        if arguments[name] not in allowed:
            raise ValueError(f"Unknown {name} {arguments[name]!r}: choose one of {', '.join(map(repr, allowed))}.")
    start, end = arguments["window"]
    if not 0 <= start < end <= 1:
        raise ValueError(f"The window {arguments['window']} is not a range of shares: give (start, end) within (0, 1).")


def _apply_hooks(base: Any, which: Residuals | str, run: Run, concept: int, scale: float) -> list[Any]:
    """Hooks that add, or for a loaded LoRA weaken, one concept's residual in every block."""

    def add(module: nn.Module, inputs: tuple, output: torch.Tensor, *, name: str, A, B) -> torch.Tensor:
        weight = run.weight(name, concept)
        if scale == 0 or isinstance(weight, float) and weight == 0:
            return output
        return add_low_rank(output, inputs[0], A, B, None if isinstance(weight, float) else weight, scale)

    def weaken(module: nn.Module, inputs: tuple, output: torch.Tensor, *, name: str) -> torch.Tensor:
        weight = run.weight(name, concept)
        if isinstance(weight, float):
            return output * (scale * weight)
        weight = weight.unsqueeze(1) if output.ndim == 4 else weight.flatten(1).unsqueeze(2)
        return output * (scale * weight).to(output.dtype)

    if isinstance(which, str):
        layers = adapter_layers(base, which).items()
        return [layer.register_forward_hook(partial(weaken, name=name)) for name, layer in layers]
    return [
        module.register_forward_hook(partial(add, name=name, A=which.A[name], B=which.B[name]))
        for name, module in which.layers_in(base).items()
    ]
