"""Beyond the paper: LAG for a LoRA that somebody else trained, and several concepts whose masks overlap.

A personalized residual lives on `proj_out` alone, where LAG is one product: W x + M A B x. The LoRAs that people share
live on any layers, so for each one it has to be said what "only where the concept is" means there:

- **position**: tokens of the picture, or a map of it, go in and come out (proj_in, self-attention's q, k, v and out,
  feed-forward layers, proj_out, the convolutions of residual and sampling blocks). The LoRA's own contribution is
  multiplied by M; what the frozen layer gives is left as it is.
- **query**: all layers of an attention to the text. Its keys and values belong to words, which have no position. But
  each position asks on its own: (1 - M) attention without the LoRA + M attention with it, by the position that asks,
  is exactly "with the LoRA where M = 1". This attention then runs once more for each adapter.
- **everywhere**: what has no position at all, since one vector serves the whole picture (time embeddings, the text
  encoders). It is in force everywhere or not at all; no mask reaches it, and what it changes leaks.

Masks are made by the rules of `localized`, of the map of the same block where that is known in time: for the blend of
its last attention to the text, the feed-forward layer after it and `proj_out`. All other layers take the latest map
there is, resized: of the block before, or of the last block of the step before. Until the first map of a pipeline call
M is 0. Masks drawn by hand are known from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from persres_lite.localize import Lag, Localizer
from persres_lite.masks import resize
from persres_lite.residuals import find_proj_outs, plain_layer, unet_of

PARTS = ("unet", "text_encoder", "text_encoder_2")


def strongest(masks: torch.Tensor, maps: torch.Tensor, *, sharpness: float = 8.0) -> torch.Tensor:
    """Where masks overlap, the concept with the stronger map wins: softmax over the concepts' maps.

    For `localized(..., overlap=strongest)`. Maps are compared as standard scores, (map - mean) / std, since one word
    draws more attention than another all over the picture. The order of the concepts does not matter, and what only
    one mask covers stays that concept's.

    Parameters
    ----------
    masks, maps : tensor (concepts, images, h, w)
        Masks in [0, 1], and the attention maps that they were made of.
    sharpness : float
        At 0 masks are divided by their sum, as without this; at infinity the winner takes all.

    Returns
    -------
    tensor (concepts, images, h, w)
        Masks whose sum is that of the masks, but at most 1.
    """
    spread, mean = torch.std_mean(maps, dim=(-2, -1), keepdim=True, correction=0)
    scores = sharpness * (maps - mean) / spread.clamp(min=torch.finfo(maps.dtype).tiny)
    shares = (scores + masks.log()).softmax(0).nan_to_num(0)  # log 0 is -inf; where all masks are 0, NaN
    return shares * masks.sum(0).clamp(max=1)


def by_position(output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a layer adds, multiplied by M at each position.

    Parameters
    ----------
    output : tensor (B, C, h, w) or (B, h w, C)
        Of the layer.
    weight : tensor (B, h, w)
        M, 1 where it is to act.
    """
    weight = weight.unsqueeze(1) if output.ndim == 4 else weight.flatten(1).unsqueeze(2)
    return output * weight.to(output.dtype)


def layers_of(base: Any, adapter: str) -> dict[str, str]:
    """Which layers a LoRA touches, and how `localized_lora` keeps each of them where the concept is.

    Parameters
    ----------
    base : pipeline
        Into which it was loaded.
    adapter : str
        The name that it was given.

    Returns
    -------
    dict of str to str
        By name, such as 'unet.mid_block.attentions.0.proj_in': 'position', 'query' or 'everywhere'.

    Raises
    ------
    ValueError
        If there is no such adapter, if it is switched off or fused into the weights, or is a DoRA.
    """
    found = {}
    for part in PARTS:
        model: Any = unet_of(base) if part == "unet" else getattr(base, part, None)
        for name, module in model.named_modules() if model is not None else ():
            if adapter in getattr(module, "lora_B", ()):
                _refuse_unfit(module, adapter)
                found[f"{part}.{name}"] = _kind(model, name) if part == "unet" else "everywhere"
    if not found:
        raise ValueError(
            f'There is no LoRA {adapter!r} in this pipeline: load it by `load_lora_weights(file, adapter_name="...")`; '
            f"those that are loaded are {base.get_list_adapters()}."
        )
    return found


def _refuse_unfit(module: Any, adapter: str) -> None:
    """What adds nothing of its own that could be masked."""
    if adapter in module.merged_adapters or adapter not in module.active_adapters or module.disable_adapters:
        raise ValueError(
            f"The LoRA {adapter!r} is fused into the weights or switched off, so nothing of it can be kept to a place: "
            "call `unfuse_lora()` or `set_adapters(...)` first."
        )
    if adapter in module.lora_variant:
        raise ValueError(f"{adapter!r} is no plain LoRA (a DoRA, perhaps): what it adds is not all in its factors.")


def _kind(unet: Any, name: str) -> str:
    """The kind of one layer of the U-Net, seen from what it is part of."""
    if _text_attention(unet, name) is not None:
        return "query"
    inside = any(hasattr(module, "transformer_blocks") and hasattr(module, "proj_out") for module in _above(unet, name))
    return "position" if inside or isinstance(plain_layer(unet.get_submodule(name)), nn.Conv2d) else "everywhere"


def _above(unet: Any, name: str) -> list[Any]:
    """The modules that a layer is part of."""
    return [unet.get_submodule(name[:end]) for end, letter in enumerate(name) if letter == "."]


def _text_attention(unet: Any, name: str) -> Any:
    """The attention to the text that a layer is part of, or None."""
    return next((module for module in _above(unet, name) if getattr(module, "is_cross_attention", False)), None)


@contextmanager
def localized_lora(
    base: Any,
    adapters: Mapping[str, Any],
    *,
    everywhere: bool = True,
    prompts: str | Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Lag]:
    """LoRAs of other tools act where their concepts are, and the model without them acts elsewhere.

        pipe.load_lora_weights("cat.safetensors", adapter_name="cat")  # diffusers', PEFT's or kohya's
        with localized_lora(pipe, {"cat": "sks cat"}):
            pipe("a photo of a sks cat on the beach")

    The beginning of this module says what that means layer by layer. Adapters that are not named go on acting
    everywhere, with their own strength, and so a style can be combined with a thing. Masks of ones give the picture
    without this context, and masks of zeros with `everywhere=False` the one without the adapter, bit for bit.

    Parameters
    ----------
    base : pipeline
        Stable Diffusion 1.x, 2.x or XL, called as usual; strengths are those of `base.set_adapters`.
    adapters : dict of str to Concept, str or list of str
        By the adapter's name: whose attention makes its mask. None will do where masks are drawn.
    everywhere : bool
        Whether what has no position acts, everywhere; if False, it does not act at all. `layers_of` lists it.
    prompts : str or list of str, optional
        As for `localized`.
    **options
        `mask` with its own options, `window`, `fixed_mask`, `aggregate` and `overlap` of `localized`. What kohya's
        tools call a regional LoRA is a `fixed_mask`, or a list with one for each adapter.

    Yields
    ------
    Lag
        The masks of each adapter by (step, block), in the order in which they were given.

    Raises
    ------
    ValueError
        As `layers_of` and `localized` say.
    """
    layers = {adapter: layers_of(base, adapter) for adapter in adapters}
    localizer = Localizer(base, list(adapters.values()), **options)
    weigher = _Weigher(localizer)
    with ExitStack() as stack:
        for index, (adapter, kinds) in enumerate(layers.items()):
            for name, kind in kinds.items():
                part, _, path = name.partition(".")
                model = unet_of(base) if part == "unet" else getattr(base, part)
                if kind == "query":
                    weigher.reached.setdefault(_text_attention(model, path), set()).add(index)
                if kind != "everywhere" or not everywhere:
                    weigh = partial(getattr(weigher, kind), index)
                    up = model.get_submodule(path).lora_B[adapter]
                    stack.callback(up.register_forward_hook(weigh).remove)
        stack.enter_context(localizer.watching(prompts))  # its hooks come first: a map is there when it is asked for
        unet = unet_of(base)
        stack.callback(unet.register_forward_pre_hook(weigher.begin, with_kwargs=True).remove)
        for name in find_proj_outs(unet):
            block = unet.get_submodule(name.removesuffix(".proj_out"))
            stack.callback(block.register_forward_pre_hook(weigher.enter, with_kwargs=True).remove)
        for attn in weigher.reached:
            stack.callback(attn.register_forward_pre_hook(weigher.ask_each, with_kwargs=True).remove)
            stack.callback(attn.register_forward_hook(weigher.blend).remove)
        yield localizer.lag


class _Weigher:
    """One open context. The methods stand in the order in which they are called, those for a kind of layer last."""

    def __init__(self, localizer: Localizer) -> None:
        self.localizer = localizer
        self.reached: dict[nn.Module, set[int]] = {}  # attentions to the text, and which adapters are in them
        self.answers: dict[int, torch.Tensor] = {}  # of the attention at work, with each of its adapters
        self.alone: int | None = None  # the adapter that acts there

    def begin(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """The U-Net begins: masks that were drawn take the size and the rows of what it was given."""
        sample = args[0] if args else kwargs["sample"]
        self.drawn = None
        if self.localizer.drawn and not isinstance(self.localizer.drawn[0], Mapping):
            size = sample.shape[-2:]
            each = [resize(mask, size).reshape(-1, *size) for mask in self.localizer.drawn]
            masks = torch.stack([mask.repeat(len(sample) // len(mask), 1, 1) for mask in each]).to(sample.device)
            self.drawn = masks / masks.sum(0).clamp(min=1)

    def enter(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """A transformer begins: its tokens are the positions of a map of this size."""
        self.size = (args[0] if args else kwargs["hidden_states"]).shape[-2:]

    def weights(self, size: Sequence[int]) -> torch.Tensor | None:
        """(adapters, batch, h, w) for a layer of this size; None where no adapter acts."""
        if not self.localizer.inside():
            return None
        latest = self.drawn if self.drawn is not None else next(reversed(self.localizer.weights.values()), None)
        return None if latest is None else resize(latest, size)

    def ask_each(self, attn: Any, args: tuple, kwargs: dict) -> None:
        """An attention to the text begins: it runs with each adapter alone now, and then as ever, without them.

        In this order, since whoever reads its queries and keys reads those of the last run.
        """
        for index in self.reached[attn]:
            self.alone = index
            self.answers[index] = attn.forward(*args, **kwargs)
        self.alone = None

    def blend(self, attn: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """It is done: each position takes the answer of the adapter that is in force there."""
        answers, self.answers = self.answers, {}
        weights = self.weights(self.size)
        if weights is None:
            return output
        blended = by_position(output, 1 - weights[list(answers)].sum(0))
        for index, answer in answers.items():
            blended = blended + by_position(answer, weights[index])
        return blended

    def position(self, index: int, up: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """What an adapter adds to a layer of the picture."""
        weights = self.weights(output.shape[-2:] if output.ndim == 4 else self.size)
        return torch.zeros_like(output) if weights is None else by_position(output, weights[index])

    def query(self, index: int, up: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """What it adds within an attention to the text."""
        return output if self.alone == index else torch.zeros_like(output)

    def everywhere(self, index: int, up: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """What it adds to a layer that knows no position, if it is not to act there."""
        return torch.zeros_like(output)
