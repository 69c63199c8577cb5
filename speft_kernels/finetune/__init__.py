"""Fine-tuning on accelerate: settings, data, the loop, its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import RunConfig

if TYPE_CHECKING:
    from .models import MeanPoolClassifier, load_causal_lm, load_classifier, load_tokenizer
    from .run import finetune

__all__ = [
    "MeanPoolClassifier",
    "RunConfig",
    "finetune",
    "load_causal_lm",
    "load_classifier",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    """Loads transformers and accelerate with the first name that needs them."""
    import importlib

    if name in __all__:
        module = importlib.import_module(".run" if name == "finetune" else ".models", __name__)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
