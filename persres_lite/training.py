"""Lesson 03, `notebooks/03_training_loop.ipynb`: learn a concept's residuals from a few pictures and one word.

What is computed once: the pictures' latents, as they are and mirrored, and the prompt's text features. What is left
for each step is one pass of the U-Net forward and one backward, and the backward is cheap twice over: frozen weights
ask for no gradient, and below the first residual there is no graph at all. Adam, no weight decay, a constant rate,
pictures mirrored at random: the paper names the loss, the rate, the batch and the steps, and leaves the rest open.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from persres_lite.bases import encode_images, encode_prompt, settings_of
from persres_lite.concepts import Concept
from persres_lite.cost import fitting, room
from persres_lite.prompts import find_words
from persres_lite.residuals import Residuals, refuse_compiled, refuse_offloaded, unet_of
from persres_lite.support.checkpoint import Snapshot, State, read_checkpoint, restore, snapshot, write_checkpoint
from persres_lite.support.images import square_crops
from persres_lite.support.memory import advising
from persres_lite.support.notices import tell
from persres_lite.support.rare_token import rare_token_embeddings

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a base may have been trained to predict."""

HALF: dict[str | None, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
CHECKPOINT_EVERY = 25  # steps; the file is a few megabytes, and at most this much work is lost


@dataclass
class TrainingSet:
    """A concept's pictures as latents; first index 0 as they are, 1 mirrored; n pictures, latents (c, h, w)."""

    mean: Tensor  # (2, n, c, h, w), already scaled as the U-Net expects
    std: Tensor | None  # the same shape for an autoencoder that is a distribution, drawn anew at each step
    weights: Tensor | None  # (2, n, 1, h, w), the object's share of each position, for the masked loss

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
    return _prepare(base, concept, settings_of(base).size, masks)[0]


def diffusion_loss(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    condition: dict[str, Any],
    noise: Tensor,
    timesteps: Tensor,
    weights: Tensor | None = None,
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
        The loss becomes the weighted mean over positions.

    Returns
    -------
    Tensor
        One number, in fp32.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps).to(unet.dtype)
    batch = _expanded(condition, len(latents))
    predicted = unet(noisy, timesteps, return_dict=False, **batch)[0].float()
    kind = scheduler.config.get("prediction_type")
    if kind not in PREDICTIONS:
        raise ValueError(
            f"The target {kind!r} is not one of DDPM's ({', '.join(PREDICTIONS)}): take another scheduler."
        )
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = {"epsilon": noise, "sample": latents}[kind]
    if weights is None:
        return F.mse_loss(predicted, target)
    return (weights * (predicted - target).square()).mean() / weights.mean().clamp(min=1e-6)


def _expanded(condition: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """A condition for one picture, repeated for a batch without copying."""
    return {
        name: _expanded(value, batch_size) if isinstance(value, dict) else value.expand(batch_size, *value.shape[1:])
        for name, value in condition.items()
    }


class Diverged(RuntimeError):
    """The loss or a gradient is no longer finite. `residuals` holds the last good state."""

    def __init__(self, message: str, residuals: Residuals):
        super().__init__(message)
        self.residuals = residuals


@contextmanager
def _usual_state() -> Iterator[None]:
    """Gradients and fp32, whatever switches of torch the caller has turned."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@_usual_state()
def personalize(
    base: Any,
    concept: Concept,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    rank: float | None = None,
    seed: int = 0,
    init: str = "lora",
    on_step: Callable[[int, float, Residuals], None] | None = None,
    checkpoint: str | Path | None = None,
    sample_every: int | None = None,
    train_token: bool = False,
    masked_loss: bool = False,
    gradient_checkpointing: bool | None = None,
    at_once: int | None = None,
    mixed_precision: str | None = None,
    progress: bool = True,
) -> Residuals:
    """Learn the residuals of a concept: min over A, B of E || target - model(z_t, t, "a photo of a V* class") ||^2.

    Only A and B learn. Every parameter of the base stays what it is, and its modules, hooks and switches are afterwards
    what they were. On a CPU the same arguments give the same tensors, bit for bit.

    Parameters
    ----------
    base : pipeline
        The pipeline from ``load_base``.
    concept : Concept
        The reference pictures and their words; no further pictures of the class are used.
    steps, batch_size, lr, rank : int, int, float and float or int, optional
        None takes the base's recipe: for Stable Diffusion the paper's 150, 4, 1e-3 and 0.05. `rank` is a fraction of
        each layer's width, or a whole number.
    seed : int
        Of the initialization and of every random draw.
    init : str
        "lora": dW(0) = 0. "random": both factors random, see ``Residuals``.
    on_step : callable, optional
        Called as ``on_step(step, loss, residuals)`` after each step, counted from 1, with the residuals attached.
    checkpoint : path, optional
        A file. Every 25 steps, when interrupted and at the end, the state is written there; the same call with the same
        file goes on from it and ends in the same tensors. With larger `steps` a finished training goes on.
    sample_every : int, optional
        Every so many steps a picture of the training prompt is made, always from the noise of `seed`, and kept in the
        result's ``samples`` (a dict, by step).
    train_token : bool
        V*'s embedding learns too, in every text encoder, at the same rate. Slower: the text is encoded at each step.
    masked_loss : bool
        Only the object counts; needs the concept's masks.
    gradient_checkpointing : bool, optional
        Less memory for about a third more time (diffusers' non-reentrant kind).
    at_once : int, optional
        How many pictures of a step go through the U-Net together; the gradients of its parts are added up, so the step
        stays the same within rounding, and needs less memory. If neither this nor `gradient_checkpointing` is given, a
        step is taken whole, or, where a GPU is estimated to be too small for that, by single pictures with
        checkpointing.
    mixed_precision : str, optional
        "fp16" or "bf16": autocast. A, B and Adam stay in fp32, whatever the base's precision; fp16 scales the loss.
    progress : bool
        Show a bar with the loss.

    Returns
    -------
    Residuals
        With ``losses``, one a step, and in ``metadata`` the base, token and macro class.

    Raises
    ------
    ValueError
        If an argument is out of range, masks are asked for and missing, `checkpoint` belongs to another training, the
        concept's words are too many for the tokenizer, the base is compiled or offloaded, or it is none that learns
        from pictures and words alone by DDPM's noise (models for inpainting and editing, XL's refiner, distilled ones,
        EDM, flow matching).
    Diverged
        If the loss or a gradient is no longer finite. The last good state is in the error, and in `checkpoint`.
    OSError
        If `checkpoint` cannot be written before the first step; later on that is a warning.
    MemoryError or RuntimeError
        If memory runs out (on a GPU a torch.cuda.OutOfMemoryError), with what to try.
    KeyboardInterrupt
        Passed on, after the state is written to `checkpoint` if given.

    Warns
    -----
    UserWarning
        If pictures have to be enlarged, or the loss ends far above where it began.
    """
    _refuse_untrainable(base, sample_every)
    scheduler = _training_scheduler(base)
    known = settings_of(base)
    given = {"steps": steps, "batch_size": batch_size, "lr": lr, "rank": rank}
    recipe = known.recipe | {name: value for name, value in given.items() if value is not None}
    _check(recipe, sample_every, mixed_precision, at_once)
    find_words(base, [concept.training_prompt], concept.words)  # beyond the tokenizer's limit nobody would find them
    residuals = Residuals(base, rank=recipe["rank"], init=init, seed=seed)
    residuals.metadata.update(base=known.name, token=concept.token, macro_class=concept.macro_class)
    if train_token:
        residuals.token_embeddings = rare_token_embeddings(base, concept.token)
    data, digest = _prepare(base, concept, known.size, masked_loss)
    settings = {
        **{name: recipe[name] for name in ("batch_size", "lr", "rank")},
        "base": known.name,
        "pictures": digest,
        "words": str(concept),
        "seed": seed,
        "init": init,
        "train_token": train_token,
        "masked_loss": masked_loss,
        "mixed_precision": mixed_precision,
    }
    unet = base.unet
    plan: dict[str, Any] = {
        "at_once": at_once or recipe["batch_size"],
        "gradient_checkpointing": bool(gradient_checkpointing),
    }
    if at_once is None and gradient_checkpointing is None:
        plan = fitting(base, recipe["batch_size"], room() if unet.device.type == "cuda" else None)
        if plan["gradient_checkpointing"]:
            tell("A whole step needs more memory than this GPU has free: it is taken by single pictures, checkpointed.")
    learned = residuals.named_parameters()
    state = State(
        parameters=learned,
        optimizer=torch.optim.Adam(learned.values(), lr=recipe["lr"]),
        generator=torch.Generator().manual_seed(seed),
        scaler=torch.amp.GradScaler(unet.device.type, enabled=torch.float16 in (unet.dtype, HALF.get(mixed_precision))),
        losses=residuals.losses,
    )
    if checkpoint is not None and Path(checkpoint).exists():
        restore(state, read_checkpoint(checkpoint, settings))
        if len(state.losses) > recipe["steps"]:
            raise ValueError(f"{checkpoint} already has {len(state.losses)} steps: ask for at least as many.")
    done, title = len(state.losses), f"personalize {concept}"
    bar = tqdm(total=recipe["steps"], initial=done, desc=title, unit="step", disable=not progress)
    good = snapshot(state)
    if checkpoint is not None:
        write_checkpoint(checkpoint, good, settings)  # a place that cannot be written to is better known now
    encode = partial(encode_prompt, base, concept.training_prompt, known.size)
    with torch.no_grad():
        text = encode()
    smaller = ["try gradient_checkpointing=True"] * (not plan["gradient_checkpointing"])
    smaller += ["try at_once=1"] * (plan["at_once"] > 1)
    with bar, _ready(unet, plan["gradient_checkpointing"]), residuals.attached(base), advising(*smaller):
        try:
            while len(state.losses) < recipe["steps"]:
                condition = encode() if train_token else text
                batch, autocast = recipe["batch_size"], HALF.get(mixed_precision)
                loss = _step(unet, scheduler, data, condition, state, batch, autocast, plan["at_once"])
                good = snapshot(state)
                step = len(state.losses)
                if checkpoint is not None and step % CHECKPOINT_EVERY == 0:
                    _keep_state(checkpoint, good, settings)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if sample_every and step % sample_every == 0:
                    residuals.samples[step] = _sample(base, concept.training_prompt, known.sampling, seed)
                if on_step is not None:
                    on_step(step, loss, residuals)
        except FloatingPointError as error:
            where = "this error's .residuals" if checkpoint is None else f"{checkpoint} and this error's .residuals"
            raise Diverged(
                f"{error} at step {len(state.losses) + 1}: try a rate below {recipe['lr']:g}; "
                f"the last good state is in {where}.",
                residuals,
            ) from None
        finally:  # the end, an error, or an interruption in the middle of a step: what counts is the last whole step
            state.optimizer.zero_grad()
            restore(state, good)
            if checkpoint is not None:
                _keep_state(checkpoint, good, settings)
    _tell_of_worse(residuals.losses, recipe["lr"])
    return residuals


def _check(
    recipe: dict[str, Any], sample_every: int | None, mixed_precision: str | None, at_once: int | None = None
) -> None:
    for name, value in {**{name: recipe[name] for name in ("steps", "batch_size")}, "at_once": at_once}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    if not 0 < recipe["lr"] < math.inf:
        raise ValueError(f"lr must be a positive number, not {recipe['lr']}: the paper's is 1e-3.")
    if sample_every is not None and sample_every < 1:
        raise ValueError(f"sample_every must be at least 1, not {sample_every}; None makes no samples.")
    if mixed_precision is not None and mixed_precision not in HALF:
        raise ValueError(f"Unknown mixed_precision {mixed_precision!r}: choose 'fp16', 'bf16' or None.")


def _refuse_untrainable(base: Any, sample_every: int | None) -> None:
    """Many pipelines hold a U-Net of the right kind that needs more than a noisy picture and words."""
    refuse_compiled(base)
    refuse_offloaded(base, also_whole=True)
    unet: Any = unet_of(base).config
    channels = getattr(getattr(getattr(base, "vae", None), "config", None), "latent_channels", None)
    more = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
    asked = [name for name in more if unet.get(name) is not None]
    if channels is None:
        reason = f"{type(base).__name__} has no autoencoder for latents"
    elif (unet.in_channels, unet.out_channels) != (channels, channels):
        reason = (
            f"its U-Net takes {unet.in_channels} channels and gives {unet.out_channels}, where latents have "
            f"{channels}, as in models for inpainting and editing"
        )
    elif asked:
        reason = f"its U-Net asks for more ({asked[0]} is {unet[asked[0]]!r}), as distilled or conditioned models do"
    elif unet.addition_embed_type not in (None, "text_time"):
        reason = f"its U-Net asks for more (addition_embed_type is {unet.addition_embed_type!r})"
    elif unet.addition_embed_type and unet.projection_class_embeddings_input_dim != (
        base.text_encoder_2.config.projection_dim + 6 * unet.addition_time_embed_dim
    ):
        reason = "its U-Net is told other things than two sizes and a corner, as XL's refiner is"
    elif getattr(base, "tokenizer", None) is None:
        reason = f"{type(base).__name__} has no tokenizer for them"
    else:
        if sample_every and "image" in inspect.signature(base.__call__).parameters:
            raise ValueError(
                f"sample_every draws from words alone, and {type(base).__name__} wants a picture too: leave it out, or "
                "pass the text-to-image pipeline of these models."
            )
        return
    raise ValueError(
        f"This base cannot learn from pictures and words alone, since {reason}: personalize the text-to-image model "
        "that it was made from."
    )


def _training_scheduler(base: Any) -> DDPMScheduler:
    """The noise that the base was trained with, as the scheduler that trains, whatever samples.

    Raises
    ------
    ValueError
        If the base's scheduler stands for another process, or for other noise than the one that the model came with.
    """
    kind, scheduler = type(base.scheduler).__name__, _as_ddpm(base.scheduler)
    if scheduler is None:
        raise ValueError(
            f"{kind} stands for another process than DDPM's noise, in which residuals are trained here: put the "
            "model's own scheduler back, or choose a Stable Diffusion base."
        )
    try:
        config = DDPMScheduler.load_config(base.name_or_path, subfolder="scheduler", local_files_only=True)
        own = _as_ddpm(getattr(diffusers, config["_class_name"]).from_config(config))
    except (OSError, ValueError):  # made in memory, or no longer on this machine
        return scheduler
    if own is None or not _alike(own, scheduler) or own.config.prediction_type != scheduler.config.prediction_type:
        raise ValueError(
            f"The scheduler that is set, {kind}, has other noise or another target than the {config['_class_name']} "
            f"that the model came with: make it from that one's configuration, as in {kind}.from_config(…)."
        )
    return scheduler


def _as_ddpm(scheduler: Any) -> DDPMScheduler | None:
    """The same noise levels and target as a DDPM scheduler; None for another process (EDM, flow matching, …)."""
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    other = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if other or not hasattr(scheduler, "alphas_cumprod") or config.get("prediction_type", "epsilon") not in PREDICTIONS:
        return None
    try:
        ddpm = DDPMScheduler.from_config(config)
    except NotImplementedError:  # a schedule that DDPM does not know
        return None
    return ddpm if _alike(ddpm, scheduler) else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two schedulers have the same noise levels; some put a tiny number in the place of a last zero."""
    a, b = one.alphas_cumprod.float().cpu(), other.alphas_cumprod.float().cpu()
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def _keep_state(checkpoint: str | Path, good: Snapshot, settings: dict[str, Any]) -> None:
    """Write the checkpoint; a disk that has filled up meanwhile does not end a training, whose result is in memory."""
    try:
        write_checkpoint(checkpoint, good, settings)
    except OSError as error:
        tell(f"{error} The training goes on, and could not be taken up again from here.")


def _tell_of_worse(losses: list[float], lr: float) -> None:
    """A rate can be too high without ever leaving the finite numbers."""
    end = float(np.median(losses[-max(1, len(losses) // 5) :]))
    # Five times the first loss is beyond the noise of a batch; twice 1 is worse than to predict nothing at all.
    if end > min(5 * losses[0], 2 * max(1, losses[0])):
        tell(
            f"The loss ended at {end:.3g}, far above {losses[0]:.3g} where it began: the residuals are of no use; "
            f"try a rate below {lr:g}."
        )


def _prepare(base: Any, concept: Concept, size: int, masked_loss: bool) -> tuple[TrainingSet, str]:
    """The concept's latents, and a digest by which a checkpoint knows its pictures."""
    if not concept.images:
        raise ValueError(f"The concept {concept.name} has no pictures: give three to five.")
    if masked_loss and concept.masks is None:
        raise ValueError(f"masked_loss needs masks, and {concept.name} has none: put them into its folder's masks/.")
    images, masks = square_crops(concept.images, size, concept.masks)  # around the object, where that is known
    mean, std = encode_images(base, images)
    weights = None
    if masked_loss:
        marked = torch.from_numpy(np.stack([np.asarray(mask, dtype=np.float32) for mask in masks]) / 255)[:, None]
        marked = F.interpolate(marked, size=mean.shape[-2:], mode="area")  # (n, 1, h, w)
        weights = torch.stack([marked, marked.flip(-1)])
    digest = hashlib.sha256()
    for picture in (*images, *(masks if masked_loss else ())):
        digest.update(picture.tobytes())
    return TrainingSet(mean, std, weights), digest.hexdigest()[:16]


def _step(
    unet: Any,
    scheduler: Any,
    data: TrainingSet,
    condition: dict[str, Any],
    state: State,
    batch_size: int,
    autocast: torch.dtype | None,
    at_once: int | None = None,
) -> float:
    """One step of Adam on one batch; returns the loss. Raises FloatingPointError before it would spoil what learns.

    Gradients add up over parts of `at_once` pictures, each with its share of the batch's loss.
    """
    device, generator = unet.device, state.generator
    latents, weights = data.draw(batch_size, generator)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
    latents, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
    weights = None if weights is None else weights.to(device)
    state.optimizer.zero_grad()
    value = 0.0
    for start in range(0, batch_size, at_once or batch_size):
        part = slice(start, start + (at_once or batch_size))
        share = len(timesteps[part]) / batch_size
        marked = None if weights is None else weights[part]
        if weights is not None and marked is not None:  # the loss is a mean over what is marked in the whole batch
            share *= float(marked.mean().clamp(min=1e-6) / weights.mean().clamp(min=1e-6))
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = diffusion_loss(unet, scheduler, latents[part], condition, noise[part], timesteps[part], marked)
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


@contextmanager
def _ready(unet: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Frozen and in evaluation mode for the duration, then again whatever it was."""
    training, learning = unet.training, [p for p in unet.parameters() if p.requires_grad]
    switched = gradient_checkpointing and not unet.is_gradient_checkpointing
    unet.eval().requires_grad_(False)
    if switched:
        unet.enable_gradient_checkpointing()  # non-reentrant: with the other kind A and B would get no gradient
    try:
        yield
    finally:
        if switched:
            unet.disable_gradient_checkpointing()
        for parameter in learning:
            parameter.requires_grad_(True)
        unet.train(training)


def _sample(base: Any, prompt: str, sampling: dict[str, Any], seed: int) -> Image.Image:
    quiet = dict(getattr(base, "_progress_bar_config", {}))
    base.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        return base(prompt, generator=torch.Generator().manual_seed(seed), **sampling).images[0]
    finally:
        base.set_progress_bar_config(**quiet)
