"""Page one: personalized residuals (Ham et al., CVPR 2024, arXiv 2405.12978), the whole method.

A frozen text-to-image model learns one new thing from a few pictures of it. What learns is a small matrix beside the
output projection W_i of each transformer block i; while a picture is drawn, it acts only where the block's own
cross-attention finds the words of the concept. Three parts follow: the residual, its training, its sampling.

The names are the paper's. Shapes: b pictures, m channels of a block, r << m, n = height x width of its map, T tokens.
Nothing here is checked and hardly anything can be chosen: that is what the other modules are for, and the tests hold
them against this page. With a Stable Diffusion pipeline `pipe` and latents (2, k, c, h, w) of k pictures, as they are
and mirrored:

    text = pipe.encode_prompt("a photo of a sks cat", pipe.device, 1, False)[0]
    A, B = factors(pipe.unet)
    train(pipe.unet, pipe.scheduler, A, B, latents, text)
    with lag(pipe.unet, A, B, C=[5, 6]):  # where "sks" and "cat" stand among the prompt's tokens; the start is 0
        pipe("a photo of a sks cat on the beach")
"""

import math
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F

# 1. The residual: W'_i = W_i + A_i B_i, with A_i (m x r), B_i (r x m) and r = 0.05 m.


def blocks_of(unet):
    """The transformer blocks of a U-Net, as they run: 16 in Stable Diffusion 1.x. Each ends in its layer `proj_out`."""
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    modules = [module for part in parts for module in part.modules()]
    return [module for module in modules if hasattr(module, "transformer_blocks") and hasattr(module, "proj_out")]


def factors(unet, rank=0.05):
    """What learns: A and B of every block. A is zero, so at the start W' = W, the model as it is."""
    A, B = [], []
    for block in blocks_of(unet):
        m = block.proj_out.weight.shape[0]
        r = max(1, round(rank * m))
        A.append(torch.zeros(m, r, device=unet.device, requires_grad=True))
        B.append((torch.empty(r, m, device=unet.device).uniform_(-1, 1) / math.sqrt(m)).requires_grad_())
    return A, B


@contextmanager
def attached(unet, A, B, masks=None):
    """While this is open, each block adds M_i A_i B_i x to the W_i x of the frozen model. Without masks M_i is 1."""

    def add(i):
        def hook(proj_out, inputs, f):
            x = inputs[0]  # (b, n, m), or (b, m, h, w) where the projection is a 1x1 convolution, as in SD 1.x
            tokens = x.flatten(2).mT if x.ndim == 4 else x  # (b, n, m)
            delta = tokens @ B[i].to(x).mT @ A[i].to(x).mT  # A B x, through only r numbers: (b, n, m)
            if masks is not None:
                delta = masks[i][..., None] * delta  # M (b, n, 1)
            return f + (delta.mT.reshape(f.shape) if x.ndim == 4 else delta)  # f^ = W x + M A B x

        return hook

    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(unet)):
            stack.callback(block.proj_out.register_forward_hook(add(i)).remove)
        yield


# 2. Training: min over A, B of E || eps - eps_theta(z_t, t, text) ||^2, the loss that the model itself came from.


def loss_of(unet, scheduler, z, text, eps, t):
    """The loss for latents z and noise eps (b, c, h, w), times t (b,), one text (1, T, width)."""
    z_t = scheduler.add_noise(z, eps, t).to(unet.dtype)  # sqrt(a_t) z + sqrt(1 - a_t) eps
    predicted = unet(z_t, t, encoder_hidden_states=text.expand(len(z), -1, -1)).sample
    predicts_v = scheduler.config.prediction_type == "v_prediction"  # sqrt(a_t) eps - sqrt(1 - a_t) z
    return F.mse_loss(predicted.float(), scheduler.get_velocity(z, eps, t) if predicts_v else eps)


def train(unet, scheduler, A, B, latents, text, steps=150, batch=4, lr=1e-3, seed=0):
    """Learn A and B, and nothing else, from latents (2, k, c, h, w) of k pictures, as they are and mirrored."""
    unet.requires_grad_(False)  # frozen
    optimizer = torch.optim.Adam(A + B, lr=lr)
    generator, losses = torch.Generator().manual_seed(seed), []
    with attached(unet, A, B):
        for _ in range(steps):
            k = torch.randperm(latents.shape[1], generator=generator)[:batch]
            mirrored = torch.randint(0, 2, (len(k),), generator=generator)
            z = latents[mirrored, k]  # (b, c, h, w)
            eps = torch.randn(z.shape, generator=generator)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(k),), generator=generator)
            loss = loss_of(unet, scheduler, z.to(unet.device), text, eps.to(unet.device), t.to(unet.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


# 3. Localized attention-guided sampling (LAG): f^_i = (1 - M_i) W_i x + M_i W'_i x.


def attention(attn, x, text):
    """softmax(Q K^T / sqrt(d)), the mean over heads: (b, n, T), how much each position looks at each token."""
    Q = attn.to_q(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (b, heads, n, d)
    K = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (b, heads, T, d)
    return (Q @ K.mT / math.sqrt(Q.shape[-1])).softmax(-1).mean(1)


@contextmanager
def lag(unet, A, B, C):
    """Sample with the residual where the tokens C, those of V* and its class, are looked at. Guidance is expected: the
    rows of a batch are [negative prompts, prompts].
    """
    masks = [None] * len(A)

    def look(i):
        def hook(attn, inputs, keywords, output):
            A_C = attention(attn, inputs[0], keywords["encoder_hidden_states"])[..., C].sum(-1)  # (b, n)
            A_C = A_C[len(A_C) // 2 :]  # of the prompts alone: in the negative ones there is no concept
            M = (A_C > A_C.median(-1, keepdim=True).values).to(A_C.dtype)  # 1 above the median
            masks[i] = torch.cat([M, M])  # and both halves follow it

        return hook

    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(unet)):
            attn = block.transformer_blocks[-1].attn2  # its only one, but in SDXL
            stack.callback(attn.register_forward_hook(look(i), with_kwargs=True).remove)
        stack.enter_context(attached(unet, A, B, masks))  # proj_out runs after attn2: the mask is there in time
        yield masks
