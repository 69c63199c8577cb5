"""Sparse parameter-efficient fine-tuning at the price of the frozen model."""

from . import ops
from ._version import __version__
from .nn import SparseDeltaLinear
from .pattern import SparsePattern
from .plan import SparsityPlan

__all__ = ["SparseDeltaLinear", "SparsePattern", "SparsityPlan", "__version__", "ops"]
