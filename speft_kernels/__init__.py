"""Sparse parameter-efficient fine-tuning at the price of the frozen model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import ops
    from .adapter import load_adapter, read_adapter, save_adapter
    from .experts import join_experts, split_experts
    from .flat import FlatValues
    from .model import (
        SpeftConfig,
        apply_patterns,
        desparsify,
        merge,
        score_and_select,
        sparse_layers,
        sparsify,
        summary,
        trainable_parameters,
        unmerge,
    )
    from .nn import SparseDeltaLinear
    from .pattern import SparsePattern
    from .plan import SparsityPlan
    from .quantized import QuantizedWeight
    from .salience import SalienceReport

# Loaded on first use: `speft --help` must not wait for torch.
_HOME = {
    "adapter": ("load_adapter", "read_adapter", "save_adapter"),
    "experts": ("join_experts", "split_experts"),
    "flat": ("FlatValues",),
    "model": (
        *("SpeftConfig", "apply_patterns", "desparsify", "merge", "score_and_select"),
        *("sparse_layers", "sparsify", "summary", "trainable_parameters", "unmerge"),
    ),
    "nn": ("SparseDeltaLinear",),
    "pattern": ("SparsePattern",),
    "plan": ("SparsityPlan",),
    "quantized": ("QuantizedWeight",),
    "salience": ("SalienceReport",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "FlatValues",
    "QuantizedWeight",
    "SalienceReport",
    "SparseDeltaLinear",
    "SparsePattern",
    "SparsityPlan",
    "SpeftConfig",
    "__version__",
    "apply_patterns",
    "desparsify",
    "join_experts",
    "load_adapter",
    "merge",
    "ops",
    "read_adapter",
    "save_adapter",
    "score_and_select",
    "sparse_layers",
    "sparsify",
    "split_experts",
    "summary",
    "trainable_parameters",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module(".ops", __name__)
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
