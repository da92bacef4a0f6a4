"""What is compared: each method trained as its authors train it, on the same loss, data and noise, and undone again.

All of them end in one form, `Trained`, whose context applies what was learned at any strength; strength 0 is the frozen
model. Contexts nest, so two concepts can stand in one picture whatever the method. After `Bench.clear` the base is what
it was, bit for bit.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from data.make.bench_runs import reset_peak, resident_peak
from persres_lite.bases import encode_prompt, settings_of
from persres_lite.concepts import Concept
from persres_lite.evaluation import draw
from persres_lite.residuals import Residuals
from persres_lite.support.files import whole_file
from persres_lite.support.rare_token import rare_token_attached, rare_token_embeddings
from persres_lite.training import TrainingSet, diffusion_loss, training_scheduler, training_set

PRIOR_SEED = 1_000_000  # of the class's pictures: far from those of the evaluation
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS: dict[str, str] = {
    "proj_out": r".*\.proj_out",
    "keys and values of cross-attention": r".*\.attn2\.(to_k|to_v)",
    "all of attention": r".*\.(to_q|to_k|to_v|to_out\.0)",
    "attention, feed-forward and proj_out": r".*\.(to_q|to_k|to_v|to_out\.0|proj|ff\.net\.2|proj_out)",
}
"""Where a LoRA may be, as a pattern of module names."""


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes
    ----------
    steps, batch_size, lr : int, int and float
        Of Adam, at a constant rate.
    prior : int
        How many pictures of the class, drawn by the frozen model, are kept in mind; 0 for none. Each step then sees a
        batch of them as well, with the same weight.
    """

    steps: int
    batch_size: int
    lr: float
    prior: int = 0


RESIDUALS = "residuals"
METHODS = (
    "textual inversion",
    "DreamBooth",
    "DreamBooth, prior",
    "Custom Diffusion",
    "attention LoRA, rank 4",
    "attention LoRA, equal parameters",
    "attention LoRA, rank 4, prior",
    RESIDUALS,
    "residuals, prior",
    "proj_out LoRA",
)

# As the methods' authors, or the scripts of diffusers that users run, set them up for Stable Diffusion 1.x.
PAPER_RECIPES = {
    "textual inversion": Recipe(3000, 4, 5e-4),
    "DreamBooth": Recipe(400, 1, 5e-6),
    "DreamBooth, prior": Recipe(800, 1, 5e-6, prior=200),
    "Custom Diffusion": Recipe(250, 2, 2e-5, prior=200),
    "attention LoRA, rank 4": Recipe(500, 1, 1e-4),
    "attention LoRA, equal parameters": Recipe(500, 1, 1e-4),
    "attention LoRA, rank 4, prior": Recipe(500, 1, 1e-4, prior=200),
    RESIDUALS: Recipe(150, 4, 1e-3),
    "residuals, prior": Recipe(150, 4, 1e-3, prior=200),
    "proj_out LoRA": Recipe(150, 4, 1e-3),
}


@dataclass
class Trained:
    """What a method has learned of one concept.

    Attributes
    ----------
    attached : callable
        Of a strength: a context in which the base draws with it.
    parameters : int
        How many numbers were learned.
    seconds : float
        Of the training, without what is drawn once for a class.
    peak : float
        Bytes of memory that the training took beyond what was there before.
    residuals : Residuals or str, optional
        What can be localized: residuals, or the name of a LoRA on `proj_out`.
    """

    attached: Callable[[float], AbstractContextManager]
    parameters: int
    seconds: float = 0.0
    peak: float = 0.0
    residuals: Residuals | str | None = None


@dataclass
class Bench:
    """A base on which methods are tried one after the other.

    Attributes
    ----------
    base : pipeline
        In fp32, so that weights can learn.
    classes : dict of str to list of picture
        What the frozen model drew of each class, once.
    active : dict of str to float
        The adapters in force, with their strengths.
    """

    base: Any
    classes: dict[str, list[Image.Image]] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)

    def pictures_of(self, macro_class: str, count: int) -> list[Image.Image]:
        """`count` pictures of a class by the frozen model, for prior preservation; drawn once."""
        known = self.classes.setdefault(macro_class, [])
        settings = settings_of(self.base)
        while len(known) < count:
            size = min(count - len(known), 8)
            seeds = range(PRIOR_SEED + len(known), PRIOR_SEED + len(known) + size)
            noise = [torch.Generator().manual_seed(seed) for seed in seeds]
            known += draw(self.base, [f"a photo of a {macro_class}"] * size, generator=noise, **settings.sampling)
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
        unet = self.base.unet
        if self.active:
            unet.enable_adapters()
            unet.set_adapters(list(self.active), list(self.active.values()))
        else:
            unet.disable_adapters()

    def clear(self) -> None:
        """Take all adapters away again."""
        if getattr(self.base.unet, "peft_config", None):
            self.base.unet.unload_lora()


def train(bench: Bench, method: str, concept: Concept, seed: int, recipe: Recipe) -> Trained:
    """Learn one concept by one of `METHODS`.

    Raises
    ------
    ValueError
        If there is no such method, or weights would have to learn in half precision.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if bench.base.unet.dtype != torch.float32:
        raise ValueError("Weights cannot learn in half precision: load the base with dtype=torch.float32.")
    prior = bench.pictures_of(concept.macro_class, recipe.prior) if recipe.prior else None
    cuda = bench.base.unet.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = float(torch.cuda.memory_allocated()) if cuda else reset_peak()
    begun = time.perf_counter()
    trained = _learner(method)(bench, method, concept, seed, recipe, prior)
    trained.seconds = time.perf_counter() - begun
    trained.peak = max(0.0, (torch.cuda.max_memory_allocated() if cuda else resident_peak()) - before)
    return trained


def step_seconds(bench: Bench, concept: Concept, recipes: dict[str, Recipe], path: Path) -> dict[str, float]:
    """What a step of each method takes, by five steps beyond one.

    Of two tries the faster one counts, since other work on the machine only adds to it. All is measured once and kept
    in `path`, so that a run that is taken up again does the same; methods may be added later.
    """
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for method, recipe in recipes.items():
        if method in found:
            continue
        fastest = {1: math.inf, 6: math.inf}
        for steps in (*fastest, *fastest):
            seconds = train(bench, method, concept, 0, replace(recipe, steps=steps)).seconds
            fastest[steps] = min(fastest[steps], seconds)
            bench.clear()  # a LoRA of the same name could not be added again
        found[method] = max((fastest[6] - fastest[1]) / 5, 1e-6)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write_text(json.dumps(found) + "\n")
    return found


def as_long(recipe: Recipe, seconds: float, of_one: float) -> Recipe:
    """The recipe with as many steps as fit into so many seconds, at least one."""
    return replace(recipe, steps=max(1, int(seconds / of_one + 1e-6)))


def _learner(method: str) -> Callable[..., Trained]:
    if method.startswith("residuals"):
        return _residuals
    if method == "textual inversion":
        return _textual_inversion
    return _adapter if "LoRA" in method else _weights


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
    size, unet, scheduler = settings_of(base).size, base.unet, training_scheduler(base)
    generator = torch.Generator().manual_seed(seed)
    parts = [(concept, concept.training_prompt, generator)]
    if prior:
        of_class = replace(concept, images=prior, masks=None)
        parts.append(
            (of_class, f"a photo of a {concept.macro_class}", torch.Generator().manual_seed(PRIOR_SEED + seed))
        )
    sets: list[tuple[TrainingSet, str, torch.Generator]] = [
        (training_set(base, each), prompt, draws) for each, prompt, draws in parts
    ]
    with torch.no_grad():
        fixed = {prompt: encode_prompt(base, prompt, size) for _, prompt, _ in sets}
    optimizer = torch.optim.Adam(learned, lr=recipe.lr)
    with torch.enable_grad():
        for _ in range(recipe.steps):
            optimizer.zero_grad()
            for data, prompt, draws in sets:
                text = encode_prompt(base, prompt, size) if text_learns else fixed[prompt]
                _loss(unet, scheduler, data, text, recipe.batch_size, draws).backward()
            optimizer.step()
    optimizer.zero_grad()


def _loss(unet: Any, scheduler: Any, data: TrainingSet, text: dict, batch: int, generator: torch.Generator) -> Tensor:
    latents, _ = data.draw(batch, generator)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), generator=generator)
    latents, noise, timesteps = (each.to(unet.device) for each in (latents, noise, timesteps))
    return diffusion_loss(unet, scheduler, latents, text, noise, timesteps)


def _residuals(bench: Bench, method: str, concept: Concept, seed: int, recipe: Recipe, prior: Any) -> Trained:
    base = bench.base
    residuals = Residuals(base, rank=settings_of(base).recipe["rank"], seed=seed)
    residuals.metadata.update(token=concept.token, macro_class=concept.macro_class)
    with residuals.attached(base):
        fit(base, concept, list(residuals.parameters()), recipe, seed, prior)
    return Trained(
        attached=lambda scale: residuals.attached(base, scale=scale),
        parameters=residuals.num_parameters(),
        residuals=residuals,
    )


def _textual_inversion(bench: Bench, method: str, concept: Concept, seed: int, recipe: Recipe, prior: Any) -> Trained:
    """The word's embedding alone, from that of the class word on."""
    rows = _token_rows(bench.base, concept)
    with rare_token_attached(bench.base, concept.token, rows.learned):
        fit(bench.base, concept, list(rows.learned.values()), recipe, seed, prior, text_learns=True)
    return Trained(attached=rows.attached, parameters=rows.count)


@dataclass
class _Rows:
    """An embedding that learns, and the one from which strengths are counted."""

    base: Any
    token: str
    original: dict[str, nn.Parameter]
    learned: dict[str, nn.Parameter]

    @property
    def count(self) -> int:
        return sum(row.numel() for row in self.learned.values())

    def attached(self, scale: float) -> AbstractContextManager:
        if scale == 0:
            return nullcontext()
        rows = {name: self.original[name] + scale * (row - self.original[name]) for name, row in self.learned.items()}
        return rare_token_attached(self.base, self.token, {name: row.detach() for name, row in rows.items()})


def _token_rows(base: Any, concept: Concept) -> _Rows:
    learned = rare_token_embeddings(base, concept.token)
    of_class = rare_token_embeddings(base, concept.macro_class)
    with torch.no_grad():
        for name, row in learned.items():
            row.copy_(of_class[name].mean(0).expand_as(row))
    return _Rows(base, concept.token, rare_token_embeddings(base, concept.token), learned)


def _weights(bench: Bench, method: str, concept: Concept, seed: int, recipe: Recipe, prior: Any) -> Trained:
    """DreamBooth: the whole U-Net. Custom Diffusion: keys and values of cross-attention, and the word."""
    base, unet = bench.base, bench.base.unet
    custom = method == "Custom Diffusion"
    chosen = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if not custom or ".attn2.to_k." in name or ".attn2.to_v." in name
    }
    rows = _token_rows(base, concept) if custom else None
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    try:
        with rare_token_attached(base, concept.token, rows.learned if rows else {}):
            for parameter in chosen.values():
                parameter.requires_grad_(True)
            learned = [*chosen.values(), *(rows.learned.values() if rows else ())]
            fit(base, concept, learned, recipe, seed, prior, text_learns=custom)
        changes = {name: parameter.detach() - before[name] for name, parameter in chosen.items()}
    finally:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.requires_grad_(False).copy_(before[name])
                parameter.grad = None

    @contextmanager
    def attached(scale: float) -> Iterator[None]:
        kept = {name: parameter.detach().clone() for name, parameter in chosen.items()}
        with ExitStack() as stack:
            if rows:
                stack.enter_context(rows.attached(scale))
            try:
                with torch.no_grad():
                    for name, parameter in chosen.items() if scale else ():
                        parameter.add_(changes[name], alpha=scale)
                yield
            finally:
                with torch.no_grad():
                    for name, parameter in chosen.items():
                        parameter.copy_(kept[name])

    count = sum(parameter.numel() for parameter in chosen.values())
    return Trained(attached=attached, parameters=count + (rows.count if rows else 0))


def _adapter(bench: Bench, method: str, concept: Concept, seed: int, recipe: Recipe, prior: Any) -> Trained:
    """PEFT's LoRA: on attention, as diffusers' script has it, or on `proj_out` with the residuals' ranks."""
    from peft import LoraConfig

    base, unet = bench.base, bench.base.unet
    residuals = Residuals(base, rank=settings_of(base).recipe["rank"])
    name = f"{method.replace(' ', '-').replace(',', '')}-{concept.token}"
    if method == "proj_out LoRA":
        options: dict[str, Any] = {"target_modules": list(residuals.ranks), "rank_pattern": residuals.ranks}
        options["alpha_pattern"] = residuals.ranks
    else:
        rank = _equal_rank(unet, residuals.num_parameters()) if "equal" in method else 4
        options = {"target_modules": list(ATTENTION), "r": rank, "lora_alpha": rank}
    config = LoraConfig(**options, init_lora_weights="gaussian")
    trained = _with_lora(bench, config, name, concept, seed, recipe, prior)
    trained.residuals = name if method == "proj_out LoRA" else None
    return trained


def _with_lora(
    bench: Bench, config: Any, name: str, concept: Concept, seed: int, recipe: Recipe, prior: Any
) -> Trained:
    base, unet = bench.base, bench.base.unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=name)
    learned = [p for key, p in unet.named_parameters() if f".{name}." in key]
    with bench.adapter(name, 1.0):
        for parameter in learned:
            parameter.requires_grad_(True)
        fit(base, concept, learned, recipe, seed, prior)
    for parameter in learned:
        parameter.requires_grad_(False)
    return Trained(
        attached=lambda scale: bench.adapter(name, scale),
        parameters=sum(parameter.numel() for parameter in learned),
    )


def train_layers(bench: Bench, layers: str, concept: Concept, seed: int, recipe: Recipe) -> Trained:
    """A PEFT LoRA on one of `LAYERS`, with about as many parameters as the residuals of the base's recipe."""
    from peft import LoraConfig

    unet, pattern = bench.base.unet, LAYERS[layers]
    count = Residuals(bench.base, rank=settings_of(bench.base).recipe["rank"]).num_parameters()
    rank = _equal_rank(unet, count, lambda name: re.fullmatch(pattern, name) is not None)
    config = LoraConfig(target_modules=pattern, r=rank, lora_alpha=rank, init_lora_weights="gaussian")
    return _with_lora(bench, config, f"layers-{concept.token}", concept, seed, recipe, None)


def _equal_rank(
    unet: Any, parameters: int, chosen: Callable[[str], bool] = lambda name: name.endswith(ATTENTION)
) -> int:
    """The rank with which a LoRA on the chosen layers, all of attention's, has about so many parameters."""
    layers = [module for name, module in unet.named_modules() if chosen(name)]
    of_one = sum(sum(getattr(layer, "base_layer", layer).weight.shape[:2]) for layer in layers)
    return max(1, round(parameters / of_one))
