"""The method once more, slowly and by hand, sharing no code with the package.

Attention is an explicit softmax over all tokens, the personalized weight is formed as W' = W + A B, both outputs
f = W x and f' = W' x are computed in full, and the median is read off a sorted list. Only diffusers' own pipeline and
U-Net are used around it.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


def explicit_probabilities(attn, hidden_states, encoder_hidden_states):
    """softmax(q k^T / sqrt(d)) and v of one attention layer: (B, heads, HW, tokens), (B, heads, tokens, d)."""
    batch = hidden_states.shape[0]

    def heads(x):
        return x.reshape(batch, x.shape[1], attn.heads, -1).permute(0, 2, 1, 3)

    q = heads(attn.to_q(hidden_states))
    k = heads(attn.to_k(encoder_hidden_states))
    v = heads(attn.to_v(encoder_hidden_states))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1), v


class ExplicitAttention:
    """An attention processor that forms all probabilities and calls `keep(probabilities averaged over heads)`."""

    def __init__(self, keep):
        self.keep = keep

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        own = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        probabilities, v = explicit_probabilities(attn, hidden_states, own)
        self.keep(probabilities.mean(dim=1).detach())
        out = torch.einsum("bhqk,bhkd->bhqd", probabilities, v).permute(0, 2, 1, 3).flatten(2)
        return attn.to_out[0](out) / attn.rescale_output_factor


def median_mask(values: torch.Tensor) -> torch.Tensor:
    """1 where a value exceeds the lower of the two middle values, for one map (HW,)."""
    ordered = sorted(values.tolist())
    middle = ordered[(len(ordered) - 1) // 2]
    return torch.tensor([1.0 if value > middle else 0.0 for value in values.tolist()])


class ExplicitProjection(nn.Module):
    """f^ = (1 - M) W x + M (W + A B) x in place of one `proj_out`; with `mask_of` None it is f' everywhere."""

    def __init__(self, original, A, B, mask_of):
        super().__init__()
        self.original, self.A, self.B, self.mask_of = original, A, B, mask_of

    def forward(self, x):
        W = self.original.weight
        personalized = W + (self.A @ self.B).reshape(W.shape)
        if x.ndim == 4:
            f, f_prime = (nn.functional.conv2d(x, w, self.original.bias) for w in (W, personalized))
        else:
            f, f_prime = (nn.functional.linear(x, w, self.original.bias) for w in (W, personalized))
        if self.mask_of is None:
            return f_prime
        M = self.mask_of(x.shape[0])  # (B, HW)
        M = M.reshape(x.shape[0], 1, *x.shape[2:]) if x.ndim == 4 else M[:, :, None]
        return (1 - M) * f + M * f_prime


@contextmanager
def reference(unet, A, B, positions=None):
    """Put the slow method into a U-Net: residuals everywhere, or localized by the attention to token `positions`.

    Parameters
    ----------
    A, B : dict of str to tensor
        The paper's factors by the name of the `proj_out`.
    positions : list of list of int, optional
        The concept's token positions in the prompt of each image; the negative half gets the positive half's mask.
    """
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in A}

    def mask_of(name):
        def mask(batch):
            images = len(positions)
            mean = torch.stack(maps[name]).mean(0)[-images:]  # over the layers under this projection; positive half
            maps[name].clear()
            rows = [median_mask(mean[i][:, positions[i]].sum(1)) for i in range(images)]
            return torch.stack(rows * (batch // images))

        return mask

    processors = dict(unet.attn_processors)
    explicit = {}
    for key, processor in processors.items():
        name = key.split(".transformer_blocks.")[0] + ".proj_out"
        explicit[key] = ExplicitAttention(maps[name].append) if ".attn2." in key else processor
    projections = {name: unet.get_submodule(name) for name in A}
    unet.set_attn_processor(explicit)
    for name, original in projections.items():
        parent = unet.get_submodule(name.removesuffix(".proj_out"))
        masked = None if positions is None else mask_of(name)
        parent.proj_out = ExplicitProjection(original, A[name], B[name], masked)
    try:
        yield
    finally:
        for name, original in projections.items():
            unet.get_submodule(name.removesuffix(".proj_out")).proj_out = original
        unet.set_attn_processor(dict(processors))


@contextmanager
def all_probabilities(unet):
    """Yield a list that fills with (block name, probabilities (B, HW, tokens)), one entry for each `attn2` call."""
    seen: list[tuple[str, torch.Tensor]] = []

    def keeper(name):
        return lambda probabilities: seen.append((name, probabilities))

    processors = dict(unet.attn_processors)
    unet.set_attn_processor(
        {
            key: ExplicitAttention(keeper(key.split(".transformer_blocks.")[0] + ".proj_out"))
            if ".attn2." in key
            else processor
            for key, processor in processors.items()
        }
    )
    try:
        yield seen
    finally:
        unet.set_attn_processor(dict(processors))
