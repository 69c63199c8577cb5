"""Fine-tuning on accelerate: settings, data, the loop, its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import RunConfig

if TYPE_CHECKING:
    from .models import MeanPoolClassifier, load_causal_lm, load_classifier, load_tokenizer
    from .run import finetune
    from .trained import Trained, load_trained

_MODULE_OF = {
    **dict.fromkeys(
        ("MeanPoolClassifier", "load_causal_lm", "load_classifier", "load_tokenizer"), "models"
    ),
    "finetune": "run",
    **dict.fromkeys(("Trained", "load_trained"), "trained"),
}
__all__ = [
    "MeanPoolClassifier",
    "RunConfig",
    "Trained",
    "finetune",
    "load_causal_lm",
    "load_classifier",
    "load_tokenizer",
    "load_trained",
]


def __getattr__(name: str) -> Any:
    """Loads transformers and accelerate with the first name that needs them."""
    import importlib

    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
