"""Muon, for weights of any number of dimensions: a matrix moves by its momentum with all singular values near 1.

Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon), scaled as in Liu et al., 2025 (arXiv 2502.16982), so
that the rate is about AdamW's. ``torch.optim.Muon`` takes matrices alone; on those the two agree, and a test holds
them together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, from Jordan et al.


def orthogonalized(updates: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (n, rows, columns) with their singular values pushed toward 1 by a Newton-Schulz iteration.

    It runs in bfloat16, as its authors run it: it converges to nothing exact anyway.
    """
    a, b, c = COEFFICIENTS
    x = updates.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(updates.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; a convolution's weight counts as the matrix (out, in x height x width).

    Parameters
    ----------
    parameters : iterable of Parameter
        Each of two or more dimensions.
    lr : float
        Learning rate, as for AdamW.
    momentum : float, optional
        Of the moving average of the gradients.
    weight_decay : float, optional
        Decoupled, as AdamW's.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step. Weights of one shape are worked on together: there are many small ones."""
        for group in self.param_groups:
            alike: dict[tuple, list] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                alike[tuple(update.shape)].append((parameter, update))
            for shape, pairs in alike.items():
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                moves = orthogonalized(torch.stack([update for _, update in pairs]))
                for (parameter, _), update in zip(pairs, moves, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.view(parameter.shape), alpha=rate)


def optimizers_of(module: nn.Module, lr: float, weight_decay: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for what learns in `module`; with `muon`, Muon for the weights between its first and its last layer.

    Vectors, token embeddings and layers with fewer than four channels on a side stay with AdamW, at half the rate and
    at most 2e-3; vectors and embeddings do not decay.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "outer": [], "vectors": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            outer = parameter.ndim > 1 and (min(parameter.shape[:2]) < 4 or "conv_in" in name or "conv_out" in name)
            vector = parameter.ndim < 2 or id(parameter) in embeddings
            groups["vectors" if vector else "outer" if outer or not muon else "matrices"].append(parameter)
    own = min(lr / 2, 2e-3) if muon else lr
    rest = [
        {"params": groups["outer"], "weight_decay": weight_decay},
        {"params": groups["vectors"], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([group for group in rest if group["params"]], lr=own, betas=(0.9, 0.99))
    return [adamw, *([Muon(groups["matrices"], lr, weight_decay=weight_decay)] if groups["matrices"] else [])]
