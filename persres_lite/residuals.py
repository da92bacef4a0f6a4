"""Lesson 02, `notebooks/02_residual_injection.ipynb`: dW_i = A_i B_i on the output projection of every block i.

The factors are named as in the paper (Ham et al., CVPR 2024): A is (m x r), B is (r x m). PEFT and diffusers name
them the other way round: their lora_A is our B, their lora_B is our A.

Forward hooks carry the residual, so the frozen model keeps its own parameters, names and state dict.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from persres_lite.support.files import read_tensors, write_tensors
from persres_lite.support.memory import advising_smaller
from persres_lite.support.rare_token import ENCODERS, rare_token_attached

FORMAT = "personalized-residuals"
VERSION = 2  # 1 called the losses "history" and the token embeddings "rows"; it is still read


def unet_of(base: Any) -> Any:
    """The U-Net of a diffusers pipeline; a module is returned as it is, and a compiled one as the one inside."""
    unet = getattr(base, "unet", getattr(base, "transformer", base))
    return getattr(unet, "_orig_mod", unet)


def refuse_compiling(base: Any) -> RemovableHandle:
    """Refuse a U-Net that would not call what is attached to it: compiled code knows the hooks of its first call only.

    It is asked now and at every call of the U-Net, until the hook that is returned is removed.

    Raises
    ------
    ValueError
        If it or a part of it was compiled (pytorch #117758).
    """

    def ask(*_: Any) -> None:
        parts = [getattr(base, "unet", base)]
        for part in parts:  # grows below; asked at every call, and `modules()` takes ten times as long
            own = vars(part)  # compiling leaves its traces here: `compile()`, torch.compile(module), or of its forward
            compiled = own.get("_compiled_call_impl") or "_orig_mod" in own["_modules"]
            if compiled or hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
                raise ValueError(
                    "This U-Net was compiled by torch.compile, and compiled code does not call what is attached to its "
                    "layers: merge the residuals into its weights (`residuals.merge(base)`), or load it uncompiled."
                )
            parts += filter(None, own["_modules"].values())

    ask()
    return unet_of(base).register_forward_pre_hook(ask)


def refuse_offloaded(base: Any) -> None:
    """Refuse a U-Net whose weights are there for each of its calls only.

    Raises
    ------
    ValueError
        If accelerate moves it or its parts.
    """
    if hasattr(unet_of(base), "_hf_hook"):
        raise ValueError(
            "The weights of this U-Net are offloaded and come to the device for each call only: load the base without "
            "offloading (no `enable_model_cpu_offload`), or call `remove_all_hooks()` and `to(device)` first."
        )


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
        If there are none, as in a diffusion transformer.
    """
    found: dict[str, Any] = {
        f"{name}.proj_out": module.proj_out
        for name, module in unet.named_modules()
        if name and hasattr(module, "proj_out") and hasattr(module, "transformer_blocks")
    }
    if not found:
        raise ValueError(
            f"{type(unet).__name__} has no transformer blocks that end in a `proj_out`, and a diffusion transformer's "
            "is another layer: take the U-Net of a Stable Diffusion pipeline."
        )
    # Down, mid, up: named_modules lists the mid block last.
    order = {"down": 0, "mid": 1, "up": 2}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split("_")[0], 3)))


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
    output: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor | None = None, scale: float = 1.0
) -> Tensor:
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


class Residuals:
    """The low-rank residuals of one concept: f' = W'x with W' = W + A B for each output projection.

    A plain object that holds fp32 tensors, whatever the precision of the base ("Attempting to unscale FP16
    gradients" is what half-precision ones lead to: diffusers #9628, #6119). It does not keep the model.

    Parameters
    ----------
    unet : Module or pipeline
        Where the residuals will be attached; its shapes, its device and a fingerprint of its weights are read.
    rank : float, int or dict
        A fraction of each layer's width (0.05 is the paper's: 16, 32, 64 for widths 320, 640, 1280), a whole number
        for all layers, or a number by module name.
    init : 'lora' or 'random'
        'random' fills both factors as PyTorch fills a fresh layer, which is how the paper's "randomly initialized"
        reads; then dW(0) has 0.58 of the spread of a fresh layer's weight, and training does not start at the original
        model. 'lora' (default) does the same with B and sets A to zero: dW(0) = 0.
    seed : int
        For the random factors; drawn on the CPU, so the same everywhere.

    Attributes
    ----------
    A, B : dict of str to Parameter
        By module name: A (m, r), B (r, m).
    metadata : dict of str to str
        What the file will say: format, version, structure, rank, init, seed; training adds base, token, macro_class.
    token_embeddings : dict of str to Parameter
        V*'s learned embedding by text encoder, (pieces, width). Empty unless training was asked for it.
    losses : list of float
        The loss of each training step.
    samples : dict of int to picture
        What training drew on request, by step; not saved.

    Raises
    ------
    ValueError
        If a rank is not positive or exceeds the width.
    """

    def __init__(
        self, unet: Any, rank: float | int | Mapping[str, int] = 0.05, init: str = "lora", seed: int = 0
    ) -> None:
        scheduler = getattr(unet, "scheduler", None)
        unet = unet_of(unet)
        generator = torch.Generator().manual_seed(seed)
        self.A: dict[str, nn.Parameter] = {}
        self.B: dict[str, nn.Parameter] = {}
        for name, module in find_proj_outs(unet).items():
            weight = plain_layer(module).weight
            width, device = len(weight), "cpu" if weight.is_meta else weight.device
            r = rank[name] if isinstance(rank, Mapping) else rank
            r = max(1, round(r * width)) if isinstance(r, float) else r
            if not 1 <= r <= width:
                raise ValueError(
                    f"Rank {rank} does not fit {name!r} of width {width}: give a fraction (0.05) or a whole number."
                )
            # U(-1/sqrt(inputs), 1/sqrt(inputs)), PyTorch's default for a layer's weight
            A = (torch.rand(width, r, generator=generator, dtype=torch.float32) * 2 - 1) / math.sqrt(r)
            B = (torch.rand(r, width, generator=generator, dtype=torch.float32) * 2 - 1) / math.sqrt(width)
            self.A[name] = nn.Parameter({"lora": torch.zeros_like(A), "random": A}[init].to(device))
            self.B[name] = nn.Parameter(B.to(device))
        self.metadata: dict[str, str] = {
            "format": FORMAT,
            "version": str(VERSION),
            "structure": structure(unet),
            "rank": "by layer" if isinstance(rank, Mapping) else str(rank),
            "init": init,
            "seed": str(seed),
            "fingerprint": fingerprint(unet),
        }
        if scheduler is not None:
            self.metadata["prediction_type"] = str(scheduler.config.get("prediction_type", "epsilon"))
        self.token_embeddings: dict[str, nn.Parameter] = {}
        self.losses: list[float] = []
        self.samples: dict[int, Any] = {}
        self._muted = False
        self._merged: list[tuple[nn.Parameter, Tensor]] = []  # weights, and what they were

    @property
    def ranks(self) -> dict[str, int]:
        """The rank r of each layer, by module name."""
        return {name: B.shape[0] for name, B in self.B.items()}

    def num_parameters(self) -> int:
        """How many numbers are learned: the sum of 2 m r (1,239,040 for SD 1.x and 2.x, 1,187,840 for SDXL at 5 %)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All A and B, layer by layer, and V*'s embeddings where they learn, named as in the file."""
        named = {f"{name}.{factor}": p for name in self.A for factor, p in (("A", self.A[name]), ("B", self.B[name]))}
        return named | {f"{encoder}.token_embedding": rows for encoder, rows in self.token_embeddings.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The values of `named_parameters`, for an optimizer."""
        yield from self.named_parameters().values()

    def delta(self, name: str) -> Tensor:
        """dW_i = A_i B_i of one layer, (m, m)."""
        return self.A[name] @ self.B[name]

    def layers_in(self, base: Any) -> dict[str, nn.Module]:
        """The projections of `base` that these residuals belong to; moves the factors to their device.

        Raises
        ------
        ValueError
            If its layers or weights are others than those they were made for, or if they are merged into it.
        """
        unet = unet_of(base)
        refuse_other_base("These residuals", self.metadata, unet)
        modules = find_proj_outs(unet)
        weights = [plain_layer(module).weight for module in modules.values()]
        if any(weight is merged for weight in weights for merged, _ in self._merged):
            raise ValueError("These residuals are merged into this model already: call `unmerge()` first.")
        for parameter in self.parameters():  # in place, so that an optimizer keeps its hold on them
            parameter.data = parameter.data.to("cpu" if weights[0].is_meta else weights[0].device)
        return modules

    @contextmanager
    def attached(self, base: Any, scale: float = 1.0) -> Iterator[Residuals]:
        """f' = W x + scale * A B x everywhere, for as long as the context is open.

        Contexts nest and add up, each restores the model exactly when left, also through an exception. Gradients
        reach A and B.

        Parameters
        ----------
        base : pipeline or Module
            The frozen model.
        scale : float
            0 is the original model bit for bit, 1 the trained strength; values between interpolate.

        Raises
        ------
        ValueError
            If the residuals do not fit, or the U-Net was compiled; from the U-Net call, if it was compiled meanwhile.
        """
        with ExitStack() as hooks:
            hooks.callback(refuse_compiling(base).remove)
            for name, module in self.layers_in(base).items():
                hooks.callback(module.register_forward_hook(partial(self._add, name, scale)).remove)
            if scale != 0:
                hooks.enter_context(self.token_attached(base))
            hooks.enter_context(advising_smaller())
            yield self

    def _add(self, name: str, scale: float, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Forward hook of `attached`."""
        if scale == 0 or self._muted:
            return output
        return add_low_rank(output, inputs[0], self.A[name], self.B[name], scale=scale)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Inside `attached`, the frozen model again for as long as this is open: what is attached adds nothing."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def token_attached(self, base: Any) -> AbstractContextManager[None]:
        """A context in which the text encoders read V* as it was learned, if it was (`train_token`)."""
        return rare_token_attached(base, self.metadata.get("token", ""), self.token_embeddings)

    @torch.no_grad()
    def merge(self, base: Any, scale: float = 1.0) -> None:
        """W <- W + scale * A B, in place: the model costs what it did before. `unmerge()` puts the old W back.

        Raises
        ------
        ValueError
            If these residuals are merged already, or do not fit the model, or its weights are offloaded or quantized.
        """
        refuse_offloaded(base)
        weights = {name: plain_layer(module).weight for name, module in self.layers_in(base).items()}
        for weight in weights.values():  # of a quantized layer it is codes, or a class of its own
            if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() == 1:
                raise ValueError(
                    "The weights of this U-Net are quantized, and a residual would be lost in their rounding: use "
                    "`attached`, or load the base in half precision."
                )
        for name, weight in weights.items():
            self._merged.append((weight, weight.detach().clone()))
            weight.copy_((weight.float() + scale * self.delta(name).view_as(weight)).to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weights from before `merge`, bit for bit; several merges are undone in reverse order."""
        for weight, before in self._merged:
            weight.copy_(before)
        self._merged = []

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file, tensors named as in `named_parameters`, with the metadata; returns its path."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        metadata = {key: str(value) for key, value in self.metadata.items()}
        return write_tensors(path, tensors, metadata | {"losses": json.dumps(self.losses)})

    @classmethod
    def load(cls, path: str | os.PathLike, base: Any) -> Residuals:
        """Read what `save` wrote, for this base, onto its device.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated, holds NaN, is of another kind or a newer version, was made for another base, or
            lacks a tensor or has one too many: one sentence that names the difference.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} does not hold personalized residuals; a LoRA file must be imported first.")
        if int(metadata["version"]) > VERSION:
            raise ValueError(f"{path} is of version {metadata['version']}, newer than {VERSION}: update the package.")
        refuse_other_base(f"The residuals of {path}", metadata, unet_of(base))
        try:
            residuals = cls(base, rank={name[:-2]: len(B) for name, B in tensors.items() if name.endswith(".B")})
            for name, parameter in residuals.named_parameters().items():
                parameter.data.copy_(tensors[name].view_as(parameter))
            losses = json.loads(metadata.pop("losses", metadata.pop("history", "[]")))  # version 1 had "history"
            residuals.losses = [float(loss) for loss in losses]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is damaged: it does not hold what was learned of each layer ({error})."
            ) from error
        for encoder in ENCODERS:
            rows = tensors.get(f"{encoder}.token_embedding", tensors.get(f"{encoder}.rows"))  # as in version 1
            if rows is not None:
                residuals.token_embeddings[encoder] = nn.Parameter(rows.float())
        residuals.metadata = metadata | {"version": str(VERSION)}
        return residuals


def fingerprint(unet: Any) -> str:
    """The signs of 64 weights of each projection, as hexadecimal digits: the same in every precision.

    Training moves a model's weights too little to turn many signs, and so does merging a residual in; two models that
    were trained apart agree in half of them. Empty for a model without numbers (built without weights, or offloaded).
    """
    signs = []
    for module in find_proj_outs(unet).values():
        weight = plain_layer(module).weight.detach()
        if weight.is_meta:
            return ""
        at = torch.linspace(0, weight.numel() - 1, 64, dtype=torch.float64).long().to(weight.device)
        chosen = weight[at // weight.shape[1], at % weight.shape[1]]
        signs.append(chosen.flatten().float().cpu() > 0)
    return np.packbits(torch.cat(signs).numpy()).tobytes().hex()


def refuse_other_base(whose: str, metadata: Mapping[str, str], unet: Any) -> None:
    """Residuals go on the model that they were trained on, or on one that was fine-tuned from it.

    Parameters
    ----------
    whose : str
        The beginning of the sentence.
    metadata : dict of str to str
        Of the residuals. Those of older files have no fingerprint, and go anywhere where their shapes fit.
    unet : Module
        Where they are to go.

    Raises
    ------
    ValueError
        If the layers differ, or the fingerprints have less than two thirds in common.
    """
    made, here = metadata.get("base", "another base"), structure(unet)
    if metadata.get("structure", here) != here:
        raise ValueError(f"{whose} were made for a U-Net with {metadata['structure']} ({made}); this one has {here}.")
    stored, signs = metadata.get("fingerprint"), fingerprint(unet)
    if stored and signs and (int(stored, 16) ^ int(signs, 16)).bit_count() > 4 * len(signs) / 3:
        raise ValueError(
            f"{whose} were trained on other weights than those of this model, though of the same shapes: load {made}, "
            "or a model that was fine-tuned from it."
        )
