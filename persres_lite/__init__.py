"""Personalized residuals for text-to-image models (Ham et al., CVPR 2024, arXiv 2405.12978), small enough to read.

The names below are imported on first use, so that `import persres_lite` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persres_lite.attention import record_attention
    from persres_lite.bases import load_base
    from persres_lite.concepts import Concept, load_concept
    from persres_lite.localize import localized
    from persres_lite.masks import make_mask
    from persres_lite.residuals import Residuals
    from persres_lite.training import personalize

__version__ = "0.1.0"

_ROOMS = {
    "load_base": "bases",
    "load_concept": "concepts",
    "Concept": "concepts",
    "Residuals": "residuals",
    "personalize": "training",
    "localized": "localize",
    "record_attention": "attention",
    "make_mask": "masks",
}

__all__ = [
    "Concept",
    "Residuals",
    "load_base",
    "load_concept",
    "localized",
    "make_mask",
    "personalize",
    "record_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
