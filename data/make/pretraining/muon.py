"""Muon, for weights of any number of dimensions: a matrix moves by its momentum with all singular values near 1.

Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon), scaled as in Liu et al., 2025 (arXiv 2502.16982), so
that the rate is about AdamW's. ``torch.optim.Muon`` takes matrices alone; on those the two agree, and a test holds
them together.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, from Jordan et al.


def faster_type(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and where the processor has instructions for it. Elsewhere it is slower than single precision:
    a step of Muon takes eleven times as long.
    """
    able: dict = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have no such function
    on_cpu = able.get("avx512_bf16") or able.get("amx_bf16")
    fast = on_cpu if device.type == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def orthogonalized(updates: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (n, rows, columns) with their singular values pushed toward 1 by a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = updates.shape[1] > updates.shape[2]
    x = updates.mT if tall else updates
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(faster_type(updates.device))
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(updates.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; a convolution's weight counts as the matrix (out, in x height x width).

    Parameters
    ----------
    parameters : iterable
        Of parameters or groups of them, each of two or more dimensions.
    lr : float
        Learning rate, as for AdamW.
    momentum : float, optional
        Of the moving average of the gradients.
    weight_decay : float, optional
        Decoupled, as AdamW's.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step. Weights of one shape are worked on together: there are many small ones."""
        for group in self.param_groups:
            alike: dict[torch.Size, list] = defaultdict(list)
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                alike[update.shape].append((parameter, update))
            for shape, pairs in alike.items():
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                moves = orthogonalized(torch.stack([update for _, update in pairs]))
                for (parameter, _), move in zip(pairs, moves, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(move.view(parameter.shape), alpha=rate)


def optimizers_of(module: nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for what learns in `module`; with `muon`, Muon for the weights between its first and its last layer.

    Vectors, token embeddings and layers with fewer than four channels on a side stay with AdamW, at half the rate and
    at most 2e-3; vectors and embeddings do not decay. Each group of parameters keeps its highest rate as "peak".
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices, outer, vectors = [], [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            if parameter.ndim < 2 or id(parameter) in embeddings:
                vectors.append(parameter)
            elif not muon or min(parameter.shape[:2]) < 4 or "conv_in" in name or "conv_out" in name:
                outer.append(parameter)
            else:
                matrices.append(parameter)
    decay, own = (1e-3, min(lr / 2, 2e-3)) if muon else (0.05, lr)
    groups = [{"params": outer, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=own, betas=(0.9, 0.99))]
    if matrices:
        optimizers.append(Muon(matrices, lr, weight_decay=decay))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers
