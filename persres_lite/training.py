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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from persres_lite.residuals import LARGEST, Residuals, largest_change, refuse_compiled, refuse_offloaded, unet_of
from persres_lite.support.checkpoint import Keeper, State
from persres_lite.support.images import square_crops
from persres_lite.support.memory import advising, out_of_memory
from persres_lite.support.notices import tell
from persres_lite.support.rare_token import rare_token_embeddings

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a base may have been trained to predict."""

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
        Whether the set's ``weights`` are to say where the object is.

    Raises
    ------
    ValueError
        If there are no pictures, or masks are asked for and missing.
    """
    if not concept.images:
        raise ValueError(f"The concept {concept.name} has no pictures: give three to five.")
    if masks and concept.masks is None:
        raise ValueError(f"{concept.name} has no masks: put them into its folder's masks/, or take another loss.")
    images, marked = square_crops(concept.images, settings_of(base).size, concept.masks)
    data = TrainingSet(*encode_images(base, images), None)
    if masks:
        weights = torch.from_numpy(np.stack([np.asarray(mask, dtype=np.float32) for mask in marked]) / 255)
        weights = resize(weights, data.mean.shape[-2:])[:, None]  # (n, 1, h, w)
        data.weights = torch.stack([weights, weights.flip(-1)])
    return data


@torch.no_grad()
def attended(base: Any, concept: Concept, data: TrainingSet, times: tuple[float, ...] = (0.2, 0.4, 0.6)) -> Tensor:
    """Where the frozen model itself sees the concept's class in its pictures: masks M (2, n, 1, h, w) of 0 and 1.

    The noised references are shown to the model with the training prompt; the class word's maps, averaged over all
    blocks and noises, are cut by Otsu's rule. The mask is a cell wider than that: what sticks out, a flag or a handle,
    is attended less, and the border must be learned, too.

    Parameters
    ----------
    base : pipeline
        The pipeline from ``load_base``, with nothing attached.
    concept : Concept
        Whose pictures these are.
    data : TrainingSet
        From `training_set`.
    times : tuple of float
        How far into the noise, as shares of all timesteps.
    """
    scheduler, size = training_scheduler(base), settings_of(base).size
    latents = data.mean.flatten(0, 1)  # (2 n, c, h, w)
    condition = _expanded(encode_prompt(base, concept.training_prompt, size), len(latents))
    generator = torch.Generator().manual_seed(0)
    prompts, word = [concept.training_prompt] * len(latents), concept.macro_class
    with record_attention(base, prompts, [word]) as record:
        for time in times:
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
    unet, scheduler, condition, frozen
        As for `diffusion_loss`.
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
    if not math.isfinite(value):
        raise FloatingPointError(f"The loss became {value}")
    if state.scaler.is_enabled():  # a step whose gradients overflow fp16 is left out, and the scale is halved
        overflowing = state.scaler.get_scale() < 1
    else:
        gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
        overflowing = not torch.stack([g.isfinite().all() for g in gradients]).all()
    if overflowing:
        raise FloatingPointError("The gradient became infinite or NaN")
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.losses.append(value)
    return value


class Diverged(RuntimeError):
    """The training is no longer of use. `residuals` holds the last good state, or what came out in the end."""

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

    Only A and B learn. Every parameter of the base stays what it is, and its modules, hooks and switches are afterwards
    what they were. On a CPU the same arguments give the same tensors, bit for bit.

    Where memory runs out, a step is taken in smaller pieces, at last by single pictures with checkpointed gradients;
    it stays the same within rounding.

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
        What it looks at. "paper": the whole picture. "masked": the object alone; needs the concept's masks. "outside":
        inside the object's mask M the paper's loss, outside it the frozen model's own prediction is the target, so that
        the concept leaves places and other things to the frozen model. M is the concept's own masks, or else what the
        frozen model attends to (`attended`); a step takes about a third longer.
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
        If masks are asked for and missing, `checkpoint` belongs to another training, the concept's words are too many
        for the tokenizer, the base is compiled or offloaded, or it is none that learns from pictures and words alone by
        DDPM's noise (models for inpainting and editing, XL's refiner, distilled ones, EDM, flow matching).
    Diverged
        If the loss or a gradient is no longer finite (the last good state is in the error, and in `checkpoint`), or if
        what was learned at the end would drown the model.
    OSError
        If `checkpoint` cannot be written before the first step; later on that is a warning.
    MemoryError or RuntimeError
        If memory runs out for a single picture, too (on a GPU a torch.cuda.OutOfMemoryError).
    KeyboardInterrupt
        Passed on, after the state is written to `checkpoint` if given.

    Warns
    -----
    UserWarning
        If pictures have to be enlarged, memory runs out, or the loss ends far above where it began.
    """
    _refuse_untrainable(base)
    scheduler, known, unet = training_scheduler(base), settings_of(base), base.unet
    recipe = _recipe(known.recipe, recipe)
    find_words(base, [concept.training_prompt], concept.words)  # beyond the tokenizer's limit nobody would find them
    residuals = Residuals(base, rank=recipe["rank"], init=init, seed=seed)
    residuals.metadata.update(base=known.name, token=concept.token, macro_class=concept.macro_class)
    if train_token:
        residuals.token_embeddings = rare_token_embeddings(base, concept.token)
    masks = {"paper": False, "masked": True, "outside": concept.masks is not None}[loss]
    data = training_set(base, concept, masks)
    if loss == "outside" and not masks:
        data.weights = attended(base, concept, data)
    encode = partial(encode_prompt, base, concept.training_prompt, known.size)
    with torch.no_grad():
        text = encode()
    state = _state(unet, residuals, recipe["lr"], seed)
    settings = {"seed": seed, "init": init, "loss": loss, "train_token": train_token, "base": known.name}
    settings |= {name: value for name, value in recipe.items() if name != "steps"} | {"words": str(concept)}
    settings |= {"pictures": _digest_of_pictures(concept, masks), "weights": _digest_of_weights(unet)}
    keeper = Keeper(state, checkpoint, settings)
    if len(state.losses) > recipe["steps"]:
        raise ValueError(f"{checkpoint} already has {len(state.losses)} steps: ask for at least as many.")
    shown = {"desc": f"personalize {concept}", "unit": "step", "disable": not progress}
    bar, at_once = tqdm(total=recipe["steps"], initial=len(state.losses), **shown), recipe["batch_size"]
    frozen = residuals.muted if loss == "outside" else None
    with bar, _ready(unet), residuals.attached(base), _saying_why(residuals, recipe["lr"]), keeper:
        while len(state.losses) < recipe["steps"]:
            condition = encode() if train_token else text
            one = partial(step, unet, scheduler, data, condition, state, recipe["batch_size"], frozen=frozen)
            at_once = _fitting(one, at_once, unet, keeper)
            keeper.keep()
            bar.update()
            bar.set_postfix(loss=f"{state.losses[-1]:.3f}")
            if on_step is not None:
                on_step(len(state.losses), state.losses[-1], residuals)
    _refuse_useless(residuals, recipe["lr"])
    return residuals


def _recipe(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The base's recipe with what was asked for in its place."""
    for name in given.keys() - known.keys():
        raise TypeError(f"personalize() has no argument {name!r}: a recipe is made of {', '.join(known)}.")
    return known | {name: value for name, value in given.items() if value is not None}


def _state(unet: Any, residuals: Residuals, lr: float, seed: int) -> State:
    """Before the first step."""
    learned = residuals.named_parameters()
    return State(
        parameters=learned,
        optimizer=torch.optim.Adam(learned.values(), lr=lr),
        generator=torch.Generator().manual_seed(seed),
        scaler=torch.amp.GradScaler(unet.device.type, enabled=unet.dtype == torch.float16),
        losses=residuals.losses,
    )


@contextmanager
def _saying_why(residuals: Residuals, lr: float) -> Iterator[None]:
    """A step whose numbers are not finite ends the training with advice and what was learned before."""
    try:
        yield
    except FloatingPointError as error:
        where = f"at step {len(residuals.losses) + 1}: try a rate below {lr:g}"
        raise Diverged(f"{error} {where}; the last good state is in this error's .residuals.", residuals) from None


def samples_every(every: int, base: Any, concept: Concept, seed: int = 0) -> Callable[[int, float, Residuals], None]:
    """For `personalize(..., on_step=...)`: a picture of the training prompt every so many steps.

    It is always drawn from the noise of `seed`, and kept in the residuals' ``samples`` (a dict, by step).
    """

    def draw(step: int, loss: float, residuals: Residuals) -> None:
        if step % every == 0:
            before = dict(getattr(base, "_progress_bar_config", {}))
            base.set_progress_bar_config(**before | {"disable": True})
            noise = torch.Generator().manual_seed(seed)
            residuals.samples[step] = base(
                concept.training_prompt, generator=noise, **settings_of(base).sampling
            ).images[0]
            base.set_progress_bar_config(**before)

    return draw


def _fitting(one_step: Callable[..., float], at_once: int, unet: Any, keeper: Keeper) -> int:
    """One step, again in smaller pieces for as long as memory runs out; returns how many pictures went together."""
    while True:
        smallest = at_once == 1 and unet.is_gradient_checkpointing
        try:
            with advising("load the base in half precision") if smallest else nullcontext():
                one_step(at_once=at_once)
            return at_once
        except (MemoryError, RuntimeError) as error:
            if smallest or not out_of_memory(error):
                raise
        keeper.back()  # and the same pictures and noises once more
        torch.cuda.empty_cache()
        if at_once == 1:
            unet.enable_gradient_checkpointing()  # non-reentrant: with the other kind A and B would get no gradient
        at_once = max(1, at_once // 2)
        tell("The memory did not suffice for a whole step of training: from here on it is taken in smaller pieces.")


@contextmanager
def _ready(unet: Any) -> Iterator[None]:
    """Frozen and in evaluation mode for the duration, then again whatever it was."""
    training, checkpointing = unet.training, unet.is_gradient_checkpointing
    learning = [p for p in unet.parameters() if p.requires_grad]
    unet.eval().requires_grad_(False)
    try:
        yield
    finally:
        if unet.is_gradient_checkpointing and not checkpointing:
            unet.disable_gradient_checkpointing()
        for parameter in learning:
            parameter.requires_grad_(True)
        unet.train(training)


def _refuse_useless(residuals: Residuals, lr: float) -> None:
    """A rate can be too high without ever leaving the finite numbers."""
    losses = residuals.losses
    end = float(np.median(losses[-max(1, len(losses) // 5) :]))
    largest = max(largest_change(residuals.A[name], residuals.B[name]) for name in residuals.A)
    if largest > LARGEST:  # such a file would be refused where it is to be used
        raise Diverged(
            f"After {len(losses)} steps the residuals would change weights, which are about 1, by up to {largest:.0e}: "
            f"try a rate below {lr:g}; they are in this error's .residuals.",
            residuals,
        )
    # Five times the first loss is beyond the noise of a batch; twice 1 is worse than to predict nothing at all.
    if end > min(5 * losses[0], 2 * max(1, losses[0])):
        tell(
            f"The loss ended at {end:.3g}, far above {losses[0]:.3g} where it began: the residuals are of no use; "
            f"try a rate below {lr:g}."
        )


def _digest_of_pictures(concept: Concept, masks: bool) -> str:
    """By which a checkpoint knows its pictures."""
    pictures = [*concept.images, *(concept.masks or [] if masks else [])]
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()[:16]


def _digest_of_weights(unet: Any) -> str:
    """By which a checkpoint knows its base: some 64 numbers of each parameter."""
    some = (p.detach().flatten()[:: max(1, p.numel() // 64)] for p in unet.parameters())
    return hashlib.sha256(b"".join(each.float().cpu().numpy().tobytes() for each in some)).hexdigest()[:16]


def _refuse_untrainable(base: Any) -> None:
    """Many pipelines hold a U-Net of the right kind that needs more than a noisy picture and words."""
    refuse_compiled(base)
    refuse_offloaded(base, also_whole=True)
    unet: Any = unet_of(base).config
    channels = base.vae.config.latent_channels
    more = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    asked = [name for name in more if unet.get(name) is not None]
    asked += ["addition_embed_type"] * (unet.get("addition_embed_type") not in (None, "text_time"))
    if unet.get("addition_embed_type") == "text_time":  # two sizes and a corner; the refiner is told a score, too
        told = base.text_encoder_2.config.projection_dim + 6 * unet.addition_time_embed_dim
        asked += ["projection_class_embeddings_input_dim"] * (unet.projection_class_embeddings_input_dim != told)
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        reason = (
            f"takes {unet.in_channels} channels and gives {unet.out_channels}, where latents have {channels}, as in "
            "models for inpainting and editing"
        )
    elif asked:
        reason = f"asks for more ({asked[0]} is {unet[asked[0]]!r}), as distilled models and XL's refiner do"
    else:
        return
    raise ValueError(
        f"This base cannot learn from pictures and words alone, since its U-Net {reason}: personalize the "
        "text-to-image model that it was made from."
    )


def training_scheduler(base: Any) -> DDPMScheduler:
    """The noise that the base was trained with, as the scheduler that trains, whatever samples.

    Raises
    ------
    ValueError
        If the base's scheduler stands for another process than DDPM's (EDM, flow matching, ...).
    """
    scheduler = base.scheduler
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    other = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if not other and config.get("prediction_type", "epsilon") in PREDICTIONS and hasattr(scheduler, "alphas_cumprod"):
        try:
            ddpm = DDPMScheduler.from_config(config)
            a, b = ddpm.alphas_cumprod, scheduler.alphas_cumprod.float().cpu()
            if a.shape == b.shape and torch.allclose(a, b, atol=1e-4):  # some put a tiny number for a last zero
                return ddpm
        except NotImplementedError:  # a schedule that DDPM does not know
            pass
    raise ValueError(
        f"{type(scheduler).__name__} stands for another process than DDPM's noise, in which residuals are trained: put "
        "the model's own scheduler back, or choose a Stable Diffusion base."
    )
