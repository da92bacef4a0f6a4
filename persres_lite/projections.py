"""The output projections of a U-Net's transformer blocks: find them, tell bases apart, add to what they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unet_of(base: Any) -> nn.Module:
    """The U-Net of a diffusers pipeline; a module is returned as it is."""
    if isinstance(base, nn.Module):
        return base
    if isinstance(getattr(base, "unet", None), nn.Module):
        return base.unet
    if getattr(base, "transformer", None) is not None:
        _refuse_transformer(base.transformer)
    raise TypeError(f"{type(base).__name__} has no U-Net: pass a Stable Diffusion pipeline or its `unet`.")


def find_proj_outs(unet: nn.Module) -> dict[str, nn.Module]:
    """The output projections of a U-Net's transformer blocks, by module name, in the order of the forward pass.

    They are found by structure (a module that has `proj_out` and `transformer_blocks`), because hooks that went by
    class name broke at every renaming (daam #31, #39; prompt-to-prompt #57).

    Returns
    -------
    dict of str to Module
        16 1x1 convolutions for Stable Diffusion 1.x, 16 linear layers for 2.x, 11 for XL, each m to m.

    Raises
    ------
    ValueError
        If nothing is found, if `unet` is a diffusion transformer, or if a projection changes the width.
    """
    found: dict[str, nn.Module] = {}
    for name, module in unet.named_modules():
        if isinstance(getattr(module, "proj_out", None), nn.Module) and hasattr(module, "transformer_blocks"):
            if name == "" or getattr(getattr(module, "config", None), "patch_size", None) is not None:
                _refuse_transformer(module)
            found[f"{name}.proj_out"] = module.proj_out
    if not found:
        raise ValueError(
            f"Found 0 output projections in {type(unet).__name__}: it has no module with both `proj_out` and "
            "`transformer_blocks`; pass a Stable Diffusion U-Net."
        )
    for name, module in found.items():
        weight = plain_layer(module).weight
        if weight.shape[0] != weight.shape[1] or weight[0, 0].numel() != 1:
            raise ValueError(f"{name} has a weight of shape {tuple(weight.shape)}, where m x m (x 1 x 1) was expected.")
    # Down, mid, up: named_modules lists the mid block last.
    order = {"down": 0, "mid": 1, "up": 2}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split("_")[0], 3)))


def _refuse_transformer(module: nn.Module) -> None:
    raise ValueError(
        f"{type(module).__name__} is a diffusion transformer: its `proj_out` is the final unpatchify layer, not the "
        "output projection of a block; personalized residuals need a U-Net."
    )


def plain_layer(module: Any) -> Any:
    """The layer itself, or the one inside if PEFT has wrapped it for a LoRA."""
    return getattr(module, "base_layer", module)


def structure(unet: Any) -> str:
    """One line that tells bases apart, for example '16 convolutions 320x5 640x5 1280x6, text width 768'."""
    modules = find_proj_outs(unet)
    layers = [plain_layer(module) for module in modules.values()]
    kind = "convolutions" if layers[0].weight.ndim == 4 else "linear layers"
    widths = [layer.weight.shape[0] for layer in layers]
    counted = " ".join(f"{width}x{widths.count(width)}" for width in sorted(set(widths)))
    block = unet.get_submodule(next(iter(modules)).removesuffix(".proj_out")).transformer_blocks[0]
    return f"{len(layers)} {kind} {counted}, text width {plain_layer(block.attn2.to_k).weight.shape[1]}"


def add_low_rank(
    output: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    weight: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """output + scale * M * A(Bx), with the mask applied to the r channels of Bx: A(M * Bx) = M * A(Bx).

    Exact zeros are added wherever M is zero, so the output keeps its bits there.

    Parameters
    ----------
    output, x : tensor (B, C, H, W) or (B, HW, C)
        What the frozen projection gave and what it was given.
    A, B : tensor (C, r) and (r, C)
        The factors; brought to the device and dtype of `x` (CPU offload moves layers about between calls).
    weight : tensor (B, H, W), optional
        The mask M in [0, 1]; everywhere 1 if not given.
    scale : float
        Strength of the residual.

    Returns
    -------
    tensor of the shape of `output`
    """
    A, B = A.to(x.device, x.dtype), B.to(x.device, x.dtype)
    if x.ndim == 4:
        reduced = torch.bmm(B.expand(len(x), -1, -1), x.flatten(2))  # (B, r, HW)
        if weight is not None:
            reduced = reduced * weight.flatten(1).unsqueeze(1).to(reduced.dtype)
        # baddbmm adds in the same kernel: no (B, C, H, W) tensor beside the output
        return torch.baddbmm(output.flatten(2), A.expand(len(x), -1, -1), reduced, alpha=scale).view_as(output)
    reduced = nn.functional.linear(x, B)  # (B, HW, r)
    if weight is not None:
        reduced = reduced * weight.flatten(1).unsqueeze(2).to(reduced.dtype)
    return torch.addmm(output.flatten(0, -2), reduced.flatten(0, -2), A.t(), alpha=scale).view_as(output)
