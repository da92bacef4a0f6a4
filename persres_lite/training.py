"""Lesson 03, `notebooks/03_training_loop.ipynb`: learn a concept's residuals from a few pictures and one word.

What is computed once: the pictures' latents, as they are and mirrored, and the prompt's text features. What is left
for each step is one pass of the U-Net forward and one backward, and the backward is cheap twice over: frozen weights
ask for no gradient, and below the first residual there is no graph at all. Adam, no weight decay, a constant rate,
pictures mirrored at random: the paper names the loss, the rate, the batch and the steps, and leaves the rest open.

`persres_lite/method.py` has the same loop in twenty lines. Here it can be interrupted, says when it goes wrong, and
knows two more losses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor
from tqdm.auto import tqdm

from persres_lite.attention import record_attention
from persres_lite.bases import encode_images, encode_prompt, settings_of
from persres_lite.concepts import Concept
from persres_lite.masks import otsu, resize
from persres_lite.prompts import find_words
from persres_lite.residuals import Residuals, refuse_offloaded
from persres_lite.support.checkpoint import Keeper, State
from persres_lite.support.images import square_crops
from persres_lite.support.memory import advising, out_of_memory
from persres_lite.support.notices import tell
from persres_lite.support.rare_token import rare_token_embeddings

TIMES = (0.2, 0.4, 0.6)
"""How far into the noise the frozen model looks for the object, as shares of all timesteps."""

Loss = Literal["paper", "masked", "outside"]


@dataclass
class TrainingSet:
    """A concept's pictures as latents; first index 0 as they are, 1 mirrored; n pictures, latents (c, h, w)."""

    mean: Tensor  # (2, n, c, h, w), already scaled as the U-Net expects
    std: Tensor | None  # the same shape for an autoencoder that is a distribution, drawn anew at each step
    weights: Tensor | None  # (2, n, 1, h, w), M: the object's share of each position

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Latents (b, c, h, w) of pictures in random order, each as often as the others, and their weights."""
        count = self.mean.shape[1]
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-batch_size // count))])
        which = torch.randint(0, 2, (batch_size,), generator=generator), order[:batch_size]
        latents = self.mean[which]
        if self.std is not None:
            latents = latents + self.std[which] * torch.randn(latents.shape, generator=generator)
        return latents, None if self.weights is None else self.weights[which]


def training_set(base: Any, concept: Concept, masks: bool = False) -> TrainingSet:
    """A concept's pictures cut to squares and encoded, once: what `personalize` draws its batches from.

    Parameters
    ----------
    base : pipeline
        The pipeline from ``load_base``.
    concept : Concept
        The pictures; for prior preservation also those of a class, under another prompt.
    masks : bool
        Whether the set's ``weights`` are to say where the object is: by the concept's own masks, or else by what the
        frozen model attends to (`attended`).
    """
    images, marked = square_crops(concept.images, settings_of(base).size, concept.masks)
    data = TrainingSet(*encode_images(base, images), None)
    if masks and marked:
        weights = torch.from_numpy(np.stack([np.asarray(mask, dtype=np.float32) for mask in marked]) / 255)
        weights = resize(weights, data.mean.shape[-2:])[:, None]  # (n, 1, h, w)
        data.weights = torch.stack([weights, weights.flip(-1)])
    elif masks:
        data.weights = attended(base, concept, data)
    return data


@torch.no_grad()
def attended(base: Any, concept: Concept, data: TrainingSet) -> Tensor:
    """Where the frozen model itself sees the concept's class in its pictures: masks M (2, n, 1, h, w) of 0 and 1.

    The noised references are shown to the model with the training prompt; the class word's maps, averaged over all
    blocks and noises, are cut by Otsu's rule. The mask is a cell wider than that, since what sticks out, a flag or a
    handle, is attended less, and what is missing would not be learned: over six toys of Toybox 94 % of the object are
    inside before and 99 % after, at an IoU of .57 and .43.

    Parameters
    ----------
    base : pipeline
        The pipeline from ``load_base``, with nothing attached.
    concept : Concept
        Whose pictures these are.
    data : TrainingSet
        From `training_set`.
    """
    scheduler, size = training_scheduler(base), settings_of(base).size
    latents = data.mean.flatten(0, 1)  # (2 n, c, h, w)
    condition = _expanded(encode_prompt(base, concept.training_prompt, size), len(latents))
    generator = torch.Generator().manual_seed(0)
    prompts, word = [concept.training_prompt] * len(latents), concept.macro_class
    with record_attention(base, prompts, [word]) as record:
        for time in TIMES:
            timesteps = torch.full((len(latents),), int(time * scheduler.config.num_train_timesteps))
            noisy = scheduler.add_noise(latents, torch.randn(latents.shape, generator=generator), timesteps)
            base.unet(noisy.to(base.unet.device, base.unet.dtype), timesteps.to(base.unet.device), **condition)
    inside = otsu(torch.stack([record.map(word, image=image) for image in range(len(latents))]))
    grown = F.max_pool2d(inside[:, None], 3, stride=1, padding=1)[:, 0]
    return resize(grown, latents.shape[-2:]).round().view(*data.mean.shape[:2], 1, *latents.shape[-2:])


def diffusion_loss(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    condition: dict[str, Any],
    noise: Tensor,
    timesteps: Tensor,
    weights: Tensor | None = None,
    frozen: Callable[[], AbstractContextManager] | None = None,
) -> Tensor:
    """The plain latent-diffusion loss, E || target - model(z_t, t, text) ||^2.

    Parameters
    ----------
    unet : Module
        The U-Net, with residuals attached or not.
    scheduler : scheduler
        Gives z_t and the target; its ``prediction_type`` is "epsilon" (the noise), "v_prediction" or "sample".
    latents, noise : tensor (b, c, h, w)
        In fp32.
    condition : dict
        From `encode_prompt`; broadcast over the batch.
    timesteps : tensor (b,)
        Whole numbers.
    weights : tensor (b, 1, h, w), optional
        M. By itself it makes the loss the weighted mean over positions.
    frozen : callable, optional
        Opens a context in which the U-Net is the frozen model (``Residuals.muted``). Outside of M the frozen model's
        own prediction is then the target: mean of M (target - prediction)^2 + (1 - M) (frozen - prediction)^2. It
        costs one more forward pass, without gradient.

    Returns
    -------
    Tensor
        One number, in fp32.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps).to(unet.dtype)
    batch = _expanded(condition, len(latents))
    predicted = unet(noisy, timesteps, return_dict=False, **batch)[0].float()
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(latents, noise, timesteps),
        "sample": lambda: latents,
    }[scheduler.config.prediction_type]()
    if weights is None:
        return F.mse_loss(predicted, target)
    inside = weights * (target - predicted).square()
    if frozen is None:
        return inside.mean() / weights.mean().clamp(min=1e-6)
    with torch.no_grad(), frozen():
        prior = unet(noisy, timesteps, return_dict=False, **batch)[0].float()
    return (inside + (1 - weights) * (prior - predicted).square()).mean()


def _expanded(condition: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """A condition for one picture, repeated for a batch without copying."""
    return {
        name: _expanded(value, batch_size) if isinstance(value, dict) else value.expand(batch_size, *value.shape[1:])
        for name, value in condition.items()
    }


def step(
    unet: Any,
    scheduler: Any,
    data: TrainingSet,
    condition: dict[str, Any],
    state: State,
    batch_size: int,
    at_once: int | None = None,
    frozen: Callable[[], AbstractContextManager] | None = None,
) -> float:
    """One step of Adam on one batch; returns the loss.

    Parameters
    ----------
    unet, scheduler, condition, frozen : as for `diffusion_loss`
        What the loss is of.
    data : TrainingSet
        What the batch is drawn from.
    state : State
        What learns, its optimizer and the generator of all draws; the loss is added to its ``losses``.
    batch_size : int
        Pictures of the step.
    at_once : int, optional
        Pictures that go through the U-Net together; the gradients of the parts are added up. All by default.

    Raises
    ------
    FloatingPointError
        If the loss or a gradient is not finite, before it would spoil what learns.
    """
    device, generator, at_once = unet.device, state.generator, at_once or batch_size
    latents, weights = data.draw(batch_size, generator)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
    state.optimizer.zero_grad()
    value = 0.0
    for start in range(0, batch_size, at_once):
        part = slice(start, start + at_once)
        z, eps, t = (each[part].to(device) for each in (latents, noise, timesteps))
        share, inside = len(t) / batch_size, None
        if weights is not None:
            inside = weights[part].to(device)
            if frozen is None:  # that loss is a mean over what is marked in the whole batch
                share *= float(weights[part].mean().clamp(min=1e-6) / weights.mean().clamp(min=1e-6))
        loss = diffusion_loss(unet, scheduler, z, condition, eps, t, inside, frozen)
        state.scaler.scale(loss * share).backward()
        value += share * loss.item()
    finite = torch.stack([p.grad.isfinite().all() for p in state.parameters.values() if p.grad is not None]).all()
    halving = state.scaler.is_enabled() and state.scaler.get_scale() >= 1  # it leaves a step out that overflows fp16
    if not (math.isfinite(value) and (finite or halving)):
        raise FloatingPointError(f"The loss ({value:.3g}) or its gradient is not finite")
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.losses.append(value)
    return value


class Diverged(RuntimeError):
    """The loss is no longer finite. `residuals` holds the last good state."""

    def __init__(self, message: str, residuals: Residuals):
        super().__init__(message)
        self.residuals = residuals


@torch.enable_grad()
def personalize(
    base: Any,
    concept: Concept,
    *,
    seed: int = 0,
    init: str = "lora",
    loss: Loss = "paper",
    train_token: bool = False,
    on_step: Callable[[int, float, Residuals], None] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **recipe: Any,
) -> Residuals:
    """Learn the residuals of a concept: min over A, B of E || target - model(z_t, t, "a photo of a V* class") ||^2.

    Only A and B learn. Every parameter of the base stays what it is; its U-Net is frozen and put into evaluation mode,
    as from ``load_base``. On a CPU the same arguments give the same tensors, bit for bit.

    Where memory runs out, a step is taken in smaller pieces, at last by single pictures with checkpointed gradients,
    which the U-Net then keeps; it stays the same within rounding.

    Parameters
    ----------
    base : pipeline
        The pipeline from ``load_base``.
    concept : Concept
        The reference pictures and their words; no further pictures of the class are used.
    seed : int
        Of the initialization and of every random draw.
    init : str
        "lora": dW(0) = 0. "random": both factors random, see ``Residuals``.
    loss : str
        What it looks at. "paper": the whole picture. "masked": the object alone. "outside": inside the object's mask M
        the paper's loss, outside it the frozen model's own prediction is the target, so that the concept leaves places
        and other things to the frozen model; about 1.4 to 1.7 times the seconds of the paper's loss. M is the concept's
        own masks, or else what the frozen model attends to (`attended`).
    train_token : bool
        V*'s embedding learns too, in every text encoder, at the same rate. Slower: the text is encoded at each step.
    on_step : callable, optional
        Called as ``on_step(step, loss, residuals)`` after each step, counted from 1, with the residuals attached.
        `samples_every` makes one that draws pictures.
    checkpoint : path, optional
        A file. Every 25 steps, when interrupted and at the end, the state is written there; the same call with the same
        file goes on from it and ends in the same tensors. With larger `steps` a finished training goes on.
    progress : bool
        Show a bar with the loss.
    **recipe
        In place of the base's own recipe: ``steps``, ``batch_size``, ``lr`` and ``rank`` (for Stable Diffusion the
        paper's 150, 4, 1e-3 and 0.05). `rank` is a fraction of each layer's width, or a whole number. None is as if
        left out.

    Returns
    -------
    Residuals
        With ``losses``, one a step, and in ``metadata`` the base, token and macro class.

    Raises
    ------
    ValueError
        If `checkpoint` belongs to another training, the concept's words are too many for the tokenizer, the base is
        compiled or offloaded, or it is none that learns from pictures and words alone by DDPM's noise (models for
        inpainting and editing, XL's refiner, distilled ones, EDM).
    Diverged
        If the loss or a gradient is no longer finite; the last good state is in the error, and in `checkpoint`.
    OSError
        If `checkpoint` cannot be written before the first step; later on that is a warning.
    MemoryError or RuntimeError
        If memory runs out for a single picture, too (on a GPU a torch.cuda.OutOfMemoryError).
    KeyboardInterrupt
        Passed on, after the state is written to `checkpoint` if given.

    Warns
    -----
    UserWarning
        If pictures have to be enlarged, memory runs out, or what was learned at the end would drown the model.
    """
    _refuse_untrainable(base)
    scheduler, known, unet = training_scheduler(base), settings_of(base), base.unet.eval().requires_grad_(False)
    recipe = _recipe(known.recipe, recipe)
    find_words(base, [concept.training_prompt], concept.words)  # beyond the tokenizer's limit nobody would find them
    residuals = Residuals(base, rank=recipe["rank"], init=init, seed=seed)
    residuals.metadata.update(base=known.name, token=concept.token, macro_class=concept.macro_class)
    if train_token:
        residuals.token_embeddings = rare_token_embeddings(base, concept.token)
    data = training_set(base, concept, masks={"paper": False, "masked": True, "outside": True}[loss])
    encode = partial(encode_prompt, base, concept.training_prompt, known.size)
    text = torch.no_grad()(encode)()
    state = _state(unet, residuals, recipe["lr"], seed)
    keeper = Keeper(state, checkpoint, _settings(residuals, concept, recipe, loss=loss, train_token=train_token))
    shown = {"desc": f"personalize {concept}", "unit": "step", "disable": not progress}
    bar, at_once = tqdm(total=recipe["steps"], initial=len(state.losses), **shown), recipe["batch_size"]
    frozen = residuals.muted if loss == "outside" else None
    with bar, residuals.attached(base):
        try:
            while len(state.losses) < recipe["steps"]:
                condition = encode() if train_token else text
                one = partial(step, unet, scheduler, data, condition, state, recipe["batch_size"], frozen=frozen)
                at_once = _fitting(one, at_once, unet, keeper)
                keeper.keep()
                bar.update()
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}")
                if on_step is not None:
                    on_step(len(state.losses), state.losses[-1], residuals)
        except FloatingPointError as error:
            said = f"{error} at step {len(state.losses) + 1}: try a rate below {recipe['lr']:g}"
            raise Diverged(f"{said}; the last good state is in this error's .residuals.", residuals) from None
        finally:
            keeper.back()
            keeper.write()
    _doubt(residuals)
    return residuals


def _recipe(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The base's recipe with what was asked for in its place."""
    if unknown := given.keys() - known.keys():
        raise TypeError(f"personalize() has no argument {min(unknown)!r}: a recipe is made of {', '.join(known)}.")
    return known | {name: value for name, value in given.items() if value is not None}


def _settings(residuals: Residuals, concept: Concept, recipe: dict[str, Any], **others: Any) -> dict[str, Any]:
    """What a checkpoint must have in common with the training that goes on with it: all but the number of steps."""
    pictures = b"".join(picture.tobytes() for picture in [*concept.images, *(concept.masks or [])])
    chosen = {"batch_size": recipe["batch_size"], "lr": recipe["lr"], **others}
    return residuals.metadata | chosen | {"pictures": hashlib.sha256(pictures).hexdigest()}


def _state(unet: Any, residuals: Residuals, lr: float, seed: int) -> State:
    """Before the first step."""
    return State(
        parameters=residuals.named_parameters(),
        optimizer=torch.optim.Adam(residuals.parameters(), lr=lr),
        generator=torch.Generator().manual_seed(seed),
        scaler=torch.amp.GradScaler(unet.device.type, enabled=unet.dtype == torch.float16),
        losses=residuals.losses,
    )


def _doubt(residuals: Residuals) -> None:
    """Say so where a rate was too high without ever leaving the finite numbers."""
    first, end = residuals.losses[0], float(np.median(residuals.losses[-max(1, len(residuals.losses) // 5) :]))
    change = max(residuals.delta(name).abs().max().item() for name in residuals.A)
    # Five times the first loss is beyond the noise of a batch; twice 1 is worse than to predict nothing at all. But
    # where layers normalize, the loss says little, and the weights themselves stay below 10.
    if end > min(5 * first, 2 * max(1, first)) or change > 1e3:
        said = f"The loss began at {first:.3g} and ended at {end:.3g}, weights have changed by up to {change:.0e}"
        tell(f"{said}: these residuals will hardly draw anything, so try a lower rate.")


def samples_every(every: int, base: Any, concept: Concept, seed: int = 0) -> Callable[[int, float, Residuals], None]:
    """For `personalize(..., on_step=...)`: a picture of the training prompt every so many steps.

    It is always drawn from the noise of `seed`, and kept in the residuals' ``samples`` (a dict, by step).
    """

    def draw(step: int, loss: float, residuals: Residuals) -> None:
        if step % every == 0:
            noise, options = torch.Generator().manual_seed(seed), settings_of(base).sampling
            residuals.samples[step] = base(concept.training_prompt, generator=noise, **options).images[0]

    return draw


def _fitting(one_step: Callable[..., float], at_once: int, unet: Any, keeper: Keeper) -> int:
    """One step, again in smaller pieces for as long as memory runs out; returns how many pictures went together."""
    while True:
        try:
            one_step(at_once=at_once)
            return at_once
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if at_once == 1 and unet.is_gradient_checkpointing:
                with advising("load the base in half precision"):
                    raise
        keeper.back()  # and the same pictures and noises once more
        torch.cuda.empty_cache()
        if at_once == 1:
            unet.enable_gradient_checkpointing()  # non-reentrant: with the other kind A and B would get no gradient
        at_once = max(1, at_once // 2)
        tell("The memory did not suffice for a whole step of training: from here on it is taken in smaller pieces.")


def _refuse_untrainable(base: Any) -> None:
    """Many pipelines hold a U-Net of the right kind that needs more than a noisy picture and words."""
    refuse_offloaded(base)
    config, channels = base.unet.config, base.vae.config.latent_channels
    for_pictures = (config.in_channels, config.out_channels) != (channels, channels)
    distilled = config.get("time_cond_proj_dim") is not None
    if for_pictures or distilled or base.text_encoder is None:
        raise ValueError(
            "This base cannot learn from pictures and words alone, as models for inpainting and editing, distilled "
            "ones and XL's refiner cannot: personalize the text-to-image model that it was made from."
        )


def training_scheduler(base: Any) -> DDPMScheduler:
    """The noise that the base was trained with, as the scheduler that trains, whatever samples.

    Raises
    ------
    ValueError
        If the base's scheduler stands for another process than DDPM's (EDM, flow matching).
    """
    if not hasattr(base.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(base.scheduler).__name__} stands for another process than DDPM's noise, in which residuals are "
            "trained: put the model's own scheduler back, or choose a Stable Diffusion base."
        )
    config = {name: value for name, value in base.scheduler.config.items() if name != "_use_default_values"}
    return DDPMScheduler.from_config(config)
