"""Sparse parameter-efficient fine-tuning at the price of the frozen model."""

from . import ops
from ._version import __version__
from .adapter import load_adapter, read_adapter, save_adapter
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
from .salience import SalienceReport

__all__ = [
    "SalienceReport",
    "SparseDeltaLinear",
    "SparsePattern",
    "SparsityPlan",
    "SpeftConfig",
    "__version__",
    "apply_patterns",
    "desparsify",
    "load_adapter",
    "merge",
    "ops",
    "read_adapter",
    "save_adapter",
    "score_and_select",
    "sparse_layers",
    "sparsify",
    "summary",
    "trainable_parameters",
    "unmerge",
]
