"""Personalized residuals for text-to-image models (Ham et al., CVPR 2024, arXiv 2405.12978), small enough to read.

The names below stand in the order of the lessons that teach them; the last three are for files of other tools. They are
imported on first use, so that `import persres_lite` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from persres_lite.support.notices import without_torchvision

if TYPE_CHECKING:
    from persres_lite.attention import record_attention as record_attention
    from persres_lite.bases import load_base as load_base
    from persres_lite.bases import settings_of as settings_of
    from persres_lite.beyond import localized_lora as localized_lora
    from persres_lite.concepts import Concept as Concept
    from persres_lite.concepts import load_concept as load_concept
    from persres_lite.evaluation import compare as compare
    from persres_lite.evaluation import load_judges as load_judges
    from persres_lite.localize import localized as localized
    from persres_lite.lora import export_lora as export_lora
    from persres_lite.lora import import_lora as import_lora
    from persres_lite.masks import make_mask as make_mask
    from persres_lite.residuals import Residuals as Residuals
    from persres_lite.training import personalize as personalize

__version__ = "0.1.0"

#: By name: the module that has it.
_MODULES = {
    "load_base": "bases",  # lesson 01
    "settings_of": "bases",
    "Residuals": "residuals",  # lesson 02
    "Concept": "concepts",  # lesson 03
    "load_concept": "concepts",
    "personalize": "training",
    "record_attention": "attention",  # lesson 04
    "make_mask": "masks",  # lesson 05
    "localized": "localize",
    "compare": "evaluation",  # lesson 06
    "load_judges": "evaluation",
    "export_lora": "lora",  # for and from other tools
    "import_lora": "lora",
    "localized_lora": "beyond",
}

__all__ = list(_MODULES)

without_torchvision()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
