"""The salience metrics: what each one needs, and its score.

One entry of `METRICS` is one metric. Single entries are ranked by the fused top-k under the same
key; `score` is the metric written out, for scores that are first summed over blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError, nearest


@dataclass(frozen=True)
class Metric:
    """A score `s(w, g)` of each entry of a weight; g is summed over the scoring batches.

    Attributes:
        key: its name here, in configs and on the command line.
        paper_name: its name in "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language
            Models".
        description: its formula, for people.
        needs_weight: whether w enters the score.
        needs_gradient: whether g does; without it no data is needed.
        score: `(w, g) -> s`, all `[N, K]` and of one floating dtype.
    """

    key: str
    paper_name: str
    description: str
    needs_weight: bool
    needs_gradient: bool
    score: Callable[[Tensor, Tensor], Tensor]


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("magnitude", "Magnitude", "|w|", True, False, lambda w, g: w.abs()),
        Metric("gradient", "Gradient", "|g|", False, True, lambda w, g: g.abs()),
        Metric("snip", "SNIP", "|w g|", True, True, lambda w, g: (w * g).abs()),
        Metric("force", "FORCE", "-w g, signed", True, True, lambda w, g: -(w * g)),
        Metric("taylor_fo", "Taylor-FO", "(w g)^2", True, True, lambda w, g: (w * g).square()),
    )
}


def metric_named(key: str) -> Metric:
    """Return the metric of that key.

    Raises:
        ConfigError: there is none; the message lists the known ones and the nearest.
    """
    if not isinstance(key, str) or key not in METRICS:
        raise ConfigError(
            f"unknown salience metric {key!r}; known: "
            f"{', '.join(METRICS)}.{nearest(str(key), METRICS)}"
        )
    return METRICS[key]
