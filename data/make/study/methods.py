"""What is compared: each method trained as its authors train it, on the same loss, data and noise, and undone again.

All of them end in one form, `Learned`, whose context applies what was learned at any strength; strength 0 is the frozen
model. Contexts nest, so that two concepts can stand in one picture. After `Bench.clear` the base is what it was, bit
for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from persres_lite import training
from persres_lite.bases import encode_prompt, settings_of
from persres_lite.concepts import Concept
from persres_lite.evaluation import draw
from persres_lite.residuals import Residuals
from persres_lite.support.rare_token import rare_token_attached, rare_token_embeddings
from persres_lite.toybox.world import CLASSES

QUICK_STEPS = 12  # of sampling
PRIOR_SEED = 1_000_000  # of the class's pictures: far from those of the study
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Recipe:
    """Adam at a constant rate; each step also sees a batch of `prior` pictures of the class, by the frozen model."""

    steps: int
    batch_size: int
    lr: float
    prior: int = 0


@dataclass(frozen=True)
class Method:
    """A line of `METHODS`.

    Attributes
    ----------
    kind : str
        "frozen", or a key of `LEARNERS`.
    options : dict
        Of `personalize`, for residuals; `steps` as a share of the recipe's.
    toybox, paper : Recipe, optional
        Of rivals: on Toybox as many steps as the residual's, at the best of three rates on concepts of a search of
        their own (data/results/evaluation-recipes.json); elsewhere as the methods' authors, or the scripts of diffusers
        that users run, set them up for Stable Diffusion 1.x.
    word : str, optional
        In place of the class; "another" for another class.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    toybox: Recipe | None = None
    paper: Recipe | None = None
    word: str | None = None


def _rival(kind: str, toybox: tuple, *paper: Any) -> Method:
    return Method(kind, toybox=Recipe(100, 4, *toybox), paper=Recipe(*paper))


RESIDUAL, PROJ_OUT = "residual", "proj_out LoRA"
ATTENDED = "residual, outside held, attention's masks, twice the steps"
FROZEN, CLASS_WORD, DESCRIBED = "frozen", "frozen, class word", "frozen, full description"
METHODS: dict[str, Method] = {
    FROZEN: Method("frozen"),
    CLASS_WORD: Method("frozen"),
    DESCRIBED: Method("frozen"),
    RESIDUAL: Method("residual"),
    "residual, masked loss": Method("residual", {"loss": "masked"}),
    "residual, outside held": Method("residual", {"loss": "outside"}),
    ATTENDED: Method("residual", {"loss": "outside", "steps": 2.0}),
    "residual, V* learns": Method("residual", {"train_token": True}),
    "textual inversion": _rival("token", (0.03,), 3000, 4, 5e-4),
    "DreamBooth": _rival("weights", (1e-4,), 400, 1, 5e-6),
    "DreamBooth, prior": _rival("weights", (1e-4, 8), 800, 1, 5e-6, 200),
    "Custom Diffusion": _rival("weights", (1e-3, 8), 250, 2, 2e-5, 200),
    "attention LoRA, rank 4": _rival("adapter", (0.003,), 500, 1, 1e-4),
    "attention LoRA, equal parameters": _rival("adapter", (0.003,), 500, 1, 1e-4),
    PROJ_OUT: _rival("adapter", (0.01,), 150, 4, 1e-3),
    **{f"residual, rank {rank}": Method("residual", {"rank": rank}) for rank in (1, 0.05, 0.5)},
    "residual, random start": Method("residual", {"init": "random"}),
    "residual, half the steps": Method("residual", {"steps": 0.5}),
    "residual, twice the steps": Method("residual", {"steps": 2.0}),
    "residual, wrong class": Method("residual", word="another"),
    'residual, class "picture"': Method("residual", word="picture"),
}


@dataclass
class Learned:
    """What a method has learned of one concept.

    Attributes
    ----------
    attached : callable
        Of a strength: a context in which the base draws with it.
    parameters, seconds : int and float
        How many numbers were learned, and how long that took.
    local : Residuals, optional
        What can be localized: also a LoRA on `proj_out`, which is the same thing.
    """

    attached: Callable[[float], AbstractContextManager]
    parameters: int
    seconds: float = 0.0
    local: Residuals | None = None


@dataclass
class Bench:
    """A base (in fp32) on which methods are tried in turn.

    Attributes
    ----------
    quick : bool
        Whether rivals learn for a tenth of their steps, residuals for a third, and pictures take twelve.
    """

    base: Any
    quick: bool = False
    classes: dict[str, list[Image.Image]] = field(default_factory=dict)  # what the frozen model drew of each
    active: dict[str, float] = field(default_factory=dict)  # adapters in force, with their strengths

    @property
    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for a call of the pipeline."""
        return settings_of(self.base).sampling | ({"num_inference_steps": QUICK_STEPS} if self.quick else {})

    def pictures_of(self, macro_class: str, count: int) -> list[Image.Image]:
        """`count` pictures of a class by the frozen model, drawn once."""
        known = self.classes.setdefault(macro_class, [])
        while len(known) < count:
            seeds = range(PRIOR_SEED + len(known), PRIOR_SEED + min(count, len(known) + 8))
            noise = [torch.Generator().manual_seed(seed) for seed in seeds]
            prompts = [f"a photo of a {macro_class}"] * len(noise)
            known += draw(self.base, prompts, generator=noise, **self.sampling)
        return known[:count]

    @contextmanager
    def adapter(self, name: str, scale: float) -> Iterator[None]:
        """A LoRA in force at some strength, beside those of outer contexts."""
        self.active[name] = scale
        self._use()
        try:
            yield
        finally:
            del self.active[name]
            self._use()

    def _use(self) -> None:
        if self.active:
            self.base.unet.enable_adapters()
            self.base.unet.set_adapters(list(self.active), list(self.active.values()))
        else:
            self.base.unet.disable_adapters()

    def clear(self) -> None:
        """Take all adapters away again."""
        if getattr(self.base.unet, "peft_config", None):
            self.base.unet.unload_lora()

    def recipe(self, method: str) -> Recipe:
        """Of a rival of the residuals."""
        one = METHODS[method]
        found = one.toybox if settings_of(self.base).name == "toybox" else one.paper
        assert found is not None
        return replace(found, steps=max(1, found.steps // 10), prior=min(2, found.prior)) if self.quick else found


def named(method: str, concept: Concept) -> Concept:
    """The concept as a method calls it."""
    word = METHODS[method].word
    if word == "another":
        kinds = [*CLASSES, CLASSES[0]]
        word = kinds[kinds.index(concept.macro_class) + 1] if concept.macro_class in kinds else "car"
    return replace(concept, macro_class=word) if word else concept


def learn(bench: Bench, method: str, concept: Concept, seed: int) -> Learned:
    """Learn one concept by one of `METHODS`."""
    begun = time.perf_counter()
    learned = LEARNERS[METHODS[method].kind](bench, method, named(method, concept), seed)
    learned.seconds = time.perf_counter() - begun
    return learned


def _residual(bench: Bench, method: str, concept: Concept, seed: int) -> Learned:
    options, steps = dict(METHODS[method].options), settings_of(bench.base).recipe["steps"]
    concept = replace(concept, masks=None) if method == ATTENDED else concept
    options["steps"] = max(1, int(steps * options.get("steps", 1) * (0.3 if bench.quick else 1)))
    residuals = training.personalize(bench.base, concept, seed=seed, progress=False, **options)
    return Learned(
        attached=lambda scale: residuals.attached(bench.base, scale=scale),
        parameters=residuals.num_parameters(),
        local=residuals,
    )


def fit(
    base: Any,
    concept: Concept,
    learned: list[nn.Parameter],
    recipe: Recipe,
    seed: int,
    prior: list[Image.Image] | None = None,
    text_learns: bool = False,
) -> None:
    """Adam on the diffusion loss of the references and, with pictures of the class, on theirs as well.

    Without `prior` this is the loop of `persres_lite.personalize`, draw by draw.
    """
    unet, scheduler, size = base.unet, training.training_scheduler(base), settings_of(base).size
    parts = [(concept, concept.training_prompt, seed)]
    if prior:
        parts.append((replace(concept, images=prior, masks=None), f"a photo of a {concept.macro_class}", ~seed))
    sets = [
        (training.training_set(base, each), prompt, torch.Generator().manual_seed(number % 2**32))
        for each, prompt, number in parts
    ]
    with torch.no_grad():
        fixed = {prompt: encode_prompt(base, prompt, size) for _, prompt, _ in sets}
    optimizer = torch.optim.Adam(learned, lr=recipe.lr)
    with torch.enable_grad():
        for _ in range(recipe.steps):
            optimizer.zero_grad()
            for data, prompt, draws in sets:
                text = encode_prompt(base, prompt, size) if text_learns else fixed[prompt]
                latents, _ = data.draw(recipe.batch_size, draws)
                noise = torch.randn(latents.shape, generator=draws)
                times = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), generator=draws)
                latents, noise, times = (each.to(unet.device) for each in (latents, noise, times))
                training.diffusion_loss(unet, scheduler, latents, text, noise, times).backward()
            optimizer.step()
    optimizer.zero_grad()


def _token(bench: Bench, method: str, concept: Concept, seed: int) -> Learned:
    """Textual inversion: the word's embedding alone, from that of the class word on."""
    rows = _Rows(bench.base, concept)
    with rare_token_attached(bench.base, concept.token, rows.learned):
        fit(bench.base, concept, list(rows.learned.values()), bench.recipe(method), seed, text_learns=True)
    return Learned(rows.attached, rows.count)


class _Rows:
    """V*'s embedding, which learns from the class word's on, and the one from which strengths are counted."""

    def __init__(self, base: Any, concept: Concept) -> None:
        self.base, self.token = base, concept.token
        self.original, self.learned = (rare_token_embeddings(base, concept.token) for _ in range(2))
        of_class = rare_token_embeddings(base, concept.macro_class)
        with torch.no_grad():
            for name, row in self.learned.items():
                row.copy_(of_class[name].mean(0).expand_as(row))
        self.count = sum(row.numel() for row in self.learned.values())

    def attached(self, scale: float) -> AbstractContextManager:
        """The embedding moved by a share of what it learned."""
        if scale == 0:
            return nullcontext()
        rows = {name: self.original[name] + scale * (row - self.original[name]) for name, row in self.learned.items()}
        return rare_token_attached(self.base, self.token, {name: row.detach() for name, row in rows.items()})


def _weights(bench: Bench, method: str, concept: Concept, seed: int) -> Learned:
    """DreamBooth: the whole U-Net. Custom Diffusion: keys and values of cross-attention, and the word."""
    base, recipe, custom = bench.base, bench.recipe(method), method == "Custom Diffusion"
    prior = bench.pictures_of(concept.macro_class, recipe.prior) if recipe.prior else None
    chosen = {
        name: parameter
        for name, parameter in base.unet.named_parameters()
        if not custom or ".attn2.to_k." in name or ".attn2.to_v." in name
    }
    rows = _Rows(base, concept) if custom else None
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    try:
        with rare_token_attached(base, concept.token, rows.learned if rows else {}):
            for parameter in chosen.values():
                parameter.requires_grad_(True)
            fit(
                base, concept, [*chosen.values(), *(rows.learned.values() if rows else ())], recipe, seed, prior, custom
            )
        changes = {name: parameter.detach() - before[name] for name, parameter in chosen.items()}
    finally:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.requires_grad_(False).copy_(before[name])
                parameter.grad = None

    @contextmanager
    def attached(scale: float) -> Iterator[None]:
        with ExitStack() as stack, torch.no_grad():
            if rows:
                stack.enter_context(rows.attached(scale))
            kept = {name: parameter.detach().clone() for name, parameter in chosen.items()}
            try:
                for name, parameter in chosen.items() if scale else ():
                    parameter.add_(changes[name], alpha=scale)
                yield
            finally:
                for name, parameter in chosen.items():
                    parameter.copy_(kept[name])

    return Learned(attached, sum(p.numel() for p in chosen.values()) + (rows.count if rows else 0))


def _adapter(bench: Bench, method: str, concept: Concept, seed: int) -> Learned:
    """PEFT's LoRA: on attention, as diffusers' script has it, or on `proj_out` with the residuals' ranks."""
    from peft import LoraConfig

    base, unet = bench.base, bench.base.unet
    residuals = Residuals(base, rank=settings_of(base).recipe["rank"])
    name = f"lora-{concept.token}"
    if method == PROJ_OUT:
        ranks = residuals.ranks
        options: dict[str, Any] = {"target_modules": list(ranks), "rank_pattern": ranks, "alpha_pattern": ranks}
    else:
        rank = _equal_rank(unet, residuals.num_parameters()) if "equal" in method else 4
        options = {"target_modules": list(ATTENTION), "r": rank, "lora_alpha": rank}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(**options, init_lora_weights="gaussian"), adapter_name=name)
    learned = [parameter for key, parameter in unet.named_parameters() if f".{name}." in key]
    with bench.adapter(name, 1.0):
        for parameter in learned:
            parameter.requires_grad_(True)
        fit(base, concept, learned, bench.recipe(method), seed)
    for parameter in learned:
        parameter.requires_grad_(False)
    if method == PROJ_OUT:  # alpha is the rank: the product as it is
        for place in ranks:
            layer = unet.get_submodule(place)
            residuals.A[place].data = layer.lora_B[name].weight.flatten(1)
            residuals.B[place].data = layer.lora_A[name].weight.flatten(1)
    return Learned(
        attached=lambda scale: bench.adapter(name, scale),
        parameters=sum(parameter.numel() for parameter in learned),
        local=residuals if method == PROJ_OUT else None,
    )


def _equal_rank(unet: Any, parameters: int) -> int:
    """The rank with which a LoRA on all of attention has about so many parameters."""
    layers = [module for name, module in unet.named_modules() if name.endswith(ATTENTION)]
    of_one = sum(sum(getattr(layer, "base_layer", layer).weight.shape[:2]) for layer in layers)
    return max(1, round(parameters / of_one))


LEARNERS: dict[str, Callable[[Bench, str, Concept, int], Learned]] = {
    "residual": _residual,
    "token": _token,
    "weights": _weights,
    "adapter": _adapter,
}
