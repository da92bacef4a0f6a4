"""LoRAs on `proj_out` that a pipeline has loaded: anyone's is a personalized residual by another name."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from persres_lite.projections import find_proj_outs, unet_of


def adapter_layers(base: Any, adapter: str) -> dict[str, nn.Module]:
    """The last layers (PEFT's lora_B, the paper's A) of one loaded adapter, by the name of their `proj_out`.

    A hook that multiplies what such a layer gives by M makes (1 - M) W x + M W' x of the LoRA.

    Parameters
    ----------
    base : pipeline or Module
        With the adapter loaded (`load_lora_weights`) and active.
    adapter : str
        Its name.

    Returns
    -------
    dict of str to Module

    Raises
    ------
    ValueError
        If the adapter is not loaded, not active, fused, not a plain LoRA (DoRA), or not on any `proj_out`.

    Warns
    -----
    UserWarning
        If it also changes other layers of the U-Net, where it stays in force everywhere.
    """
    unet = unet_of(base)
    loaded: dict[str, list[str]] = {}
    for name, module in unet.named_modules():
        for known in getattr(module, "lora_B", None) or ():
            loaded.setdefault(known, []).append(name)
    if adapter not in loaded:
        raise ValueError(
            f"No LoRA named {adapter!r} is loaded in the U-Net: it has {', '.join(map(repr, loaded)) or 'none'} (one "
            "that was fused and unloaded is a part of the weights and cannot be localized)."
        )
    layers: dict[str, Any] = {name: module for name, module in find_proj_outs(unet).items() if name in loaded[adapter]}
    if not layers:
        raise ValueError(
            f"The LoRA {adapter!r} changes {len(loaded[adapter])} layers but no `proj_out`, so there is nothing to "
            "localize: train it with target_modules=['proj_out']."
        )
    for layer in layers.values():
        if layer.merged:
            raise ValueError(f"The LoRA {adapter!r} is fused into the weights: call `unfuse_lora()` first.")
        if layer.disable_adapters or adapter not in layer.active_adapters:
            raise ValueError(f"The LoRA {adapter!r} is loaded but not active: call `set_adapters({adapter!r})` first.")
        if adapter in getattr(layer, "lora_variant", ()):
            raise ValueError(f"The LoRA {adapter!r} is of a variant (such as DoRA) that does not simply add A B x.")
    others = len(loaded[adapter]) - len(layers)
    if others:
        warnings.warn(
            f"The LoRA {adapter!r} changes {others} other layers too, where it stays in force everywhere: only its "
            f"part on {len(layers)} `proj_out` layers is localized.",
            stacklevel=2,
        )
    return {name: layer.lora_B[adapter] for name, layer in layers.items()}
