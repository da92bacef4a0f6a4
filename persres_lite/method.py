"""Page one: personalized residuals (Ham et al., CVPR 2024, arXiv 2405.12978), the whole method.

A frozen text-to-image model learns one new thing from a few pictures of it. What learns is a low-rank matrix beside the
output projection W_i of each transformer block i; while a picture is drawn, it acts only where the block's own
cross-attention finds the words of the concept. Three parts follow: the residual, its training, its sampling.

The names are the paper's. V* is the word that will mean the new thing, a rare one such as "sks"; C are the positions in
the prompt of V* and its class. Shapes: b pictures, m channels of a block, r << m, n = height x width of its map, T
tokens. x is what enters a projection, f what leaves it; M (b, n) is 1 on the half of the map that looks most at C, and
0 elsewhere.

Nothing is checked here and hardly anything can be chosen: that is what the other modules are for, and the tests hold
them against this page. With a Stable Diffusion 1.x or 2.x pipeline `pipe`, its DDIM or DDPM `scheduler`, and `latents`
(2, k, c, h, w) in float32, the autoencoder's (times its scaling factor) of k pictures and then of their mirror images:

    with torch.no_grad():  # (1, T, width); the text encoder is not trained, and V* keeps the meaning it had for it
        text = pipe.encode_prompt("a photo of a sks cat", pipe.device, 1, do_classifier_free_guidance=False)[0]
    A, B = new_factors(pipe.unet)
    train(pipe.unet, scheduler, A, B, latents, text)
    with lag(pipe.unet, A, B, C=[5, 6]):  # "sks" and "cat" in the prompt below; position 0 is the start token
        pipe("a photo of a sks cat on the beach")
"""

import math
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F

# 1. The residual: W'_i = W_i + A_i B_i, with A_i (m x r), B_i (r x m) and r = 0.05 m.


def blocks_of(unet):
    """The transformer blocks, as they run: 16 in Stable Diffusion 1.x. Each is one of diffusers' `Transformer2DModel`s,
    whose inner `transformer_blocks` hold the attention, and whose last layer is the projection `proj_out`.
    """
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    modules = [module for part in parts for module in part.modules()]
    return [module for module in modules if hasattr(module, "transformer_blocks") and hasattr(module, "proj_out")]


def new_factors(unet, fraction=0.05):
    """What learns: A and B of every block, as in LoRA with the letters exchanged. A is zero, so that at the start
    W' = W, the model as it is. B is random: were both zero, neither would ever get a gradient.
    """
    A, B = [], []
    for block in blocks_of(unet):
        m = block.proj_out.weight.shape[0]
        r = max(1, round(fraction * m))
        A.append(torch.zeros(m, r, device=unet.device, requires_grad=True))
        B.append((torch.empty(r, m, device=unet.device).uniform_(-1, 1) / math.sqrt(m)).requires_grad_())
    return A, B


@contextmanager
def attached(unet, A, B, masks=None):
    """While this is open, each block adds M_i A_i B_i x to the W_i x of the frozen model. Without masks M_i is 1."""

    def add(i):
        def hook(proj_out, inputs, f):  # f = W x + bias, which the frozen layer has just computed
            x = inputs[0]  # (b, n, m), or (b, m, h, w) where the projection is a 1x1 convolution, as in SD 1.x
            rows = x.flatten(2).mT if x.ndim == 4 else x  # (b, n, m), a row for each position
            delta = rows @ B[i].to(x).mT @ A[i].to(x).mT  # (A B x)^T = x^T B^T A^T, through only r numbers a row
            if masks is not None:
                delta = masks[i][..., None] * delta  # (b, n, 1) * (b, n, m)
            return f + (delta.mT.reshape(f.shape) if x.ndim == 4 else delta)  # f^ = W x + M A B x

        return hook

    with ExitStack() as stack:  # hooked now, unhooked on leaving
        for i, block in enumerate(blocks_of(unet)):
            stack.callback(block.proj_out.register_forward_hook(add(i)).remove)
        yield


# 2. Training: min over A, B of E || eps - eps_theta(z_t, t, text) ||^2, the loss that the model itself came from.


def loss_of(unet, scheduler, z, text, eps, t):
    """The loss for latents z and noise eps (b, c, h, w), timesteps t (b,) and one text (1, T, width)."""
    z_t = scheduler.add_noise(z, eps, t).to(unet.dtype)  # sqrt(a_t) z + sqrt(1 - a_t) eps, where a_t is alpha-bar of t
    predicted = unet(z_t, t, encoder_hidden_states=text.expand(len(z), -1, -1)).sample
    if scheduler.config.prediction_type == "v_prediction":  # some models, SD 2.1 for one, predict another mixture:
        return F.mse_loss(predicted.float(), scheduler.get_velocity(z, eps, t))  # sqrt(a_t) eps - sqrt(1 - a_t) z
    return F.mse_loss(predicted.float(), eps)


def train(unet, scheduler, A, B, latents, text, steps=150, batch=4, lr=1e-3, seed=0):
    """Learn A and B, and nothing else, by the paper's recipe. Returns the loss of each step."""
    unet.requires_grad_(False)  # frozen
    optimizer = torch.optim.Adam(A + B, lr=lr)
    generator, losses = torch.Generator().manual_seed(seed), []
    with attached(unet, A, B):
        for _ in range(steps):
            chosen = torch.randperm(latents.shape[1], generator=generator)[:batch]
            mirrored = torch.randint(0, 2, (len(chosen),), generator=generator)
            z = latents[mirrored, chosen]  # (b, c, h, w)
            eps = torch.randn(z.shape, generator=generator)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(z),), generator=generator)
            loss = loss_of(unet, scheduler, z.to(unet.device), text, eps.to(unet.device), t.to(unet.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


# 3. Localized attention-guided sampling (LAG): f^_i = (1 - M_i) W_i x + M_i W'_i x = W_i x + M_i A_i B_i x, and that is
#    what `attached` computes. M_i is made anew by every block at every step.


def attention(attn, x, text):
    """softmax(Q K^T / sqrt(d)), the mean over heads: (b, n, T), how much each position looks at each token."""
    Q = attn.to_q(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (b, heads, n, d)
    K = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (b, heads, T, d)
    return (Q.float() @ K.float().mT / math.sqrt(Q.shape[-1])).softmax(-1).mean(1)


@contextmanager
def lag(unet, A, B, C):
    """While this is open, the residual acts where the tokens C are looked at. Guidance must be on: then the rows of a
    batch are [negative prompts, prompts], and M is made of those of the prompts. Yields the masks, by block.
    """
    masks = [None] * len(A)  # attn2 fills in masks[i], and proj_out, which runs later in the same block, reads it

    def look(i):
        def hook(attn, inputs, keywords, output):  # returns nothing: what attn2 computes stays as it is
            looked = attention(attn, inputs[0], keywords["encoder_hidden_states"])[..., C].sum(-1)  # A_{i,C}
            looked = looked[len(looked) // 2 :]  # (b, n), the prompts'
            M = (looked > looked.median(-1, keepdim=True).values).to(output.dtype)  # 1 above the median
            masks[i] = torch.cat([M, M])  # the paper leaves the negative half open; here it follows the other

        return hook

    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(unet)):
            attn = block.transformer_blocks[-1].attn2  # the only one, except in SDXL
            stack.callback(attn.register_forward_hook(look(i), with_kwargs=True).remove)
        stack.enter_context(attached(unet, A, B, masks))
        yield masks
