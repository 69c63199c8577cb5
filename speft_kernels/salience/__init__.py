"""Which entries train: metrics, the scoring pass, and the selection of the mask."""

from .accumulate import LossFn
from .metrics import METRICS, Metric, metric_named
from .report import LayerBudget, SalienceReport

__all__ = ["METRICS", "LayerBudget", "LossFn", "Metric", "SalienceReport", "metric_named"]
