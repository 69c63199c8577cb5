"""The salience metrics: what each one needs, and its score.

One entry of `METRICS` is one metric. Single entries are ranked by the fused top-k of (w, statistic)
under the key `ranked_as`, so no score tensor exists; `score` is the metric written out, for scores
that are first summed over blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, nearest
from .custom import Score, check_name, import_score, name_of

# What a scoring pass hands to the ranking, for each layer [N, K]:
#   none               nothing
#   gradient           the gradient of the loss, folded over the batches (`SpeftConfig.accumulate`)
#   squared_gradient   the sum over the examples of the squared gradient of each
#   hessian_gradient   H g of the summed loss, or its negative (`SpeftConfig.grasp_sign`)
#   synaptic_flow      dR/d|w| of the linearised model of absolute values, without data
_WITH_DATA = ("gradient", "squared_gradient", "hessian_gradient")


@dataclass(frozen=True)
class Metric:
    """A score `s(w, t)` of each entry of a weight w; t is the statistic of the scoring pass.

    Attributes:
        key: its name here, in configs and on the command line.
        statistic: what the scoring pass collects: "none", "gradient", "squared_gradient",
            "hessian_gradient" or "synaptic_flow".
        ranked_as: key of `ops.topk_salience` that ranks (w, t) in the same order; None where the
            score has to be computed first.
        needs_weight: whether w enters the score.
        score: `(w, t) -> s`, all `[N, K]` and of one floating dtype; None draws at random.
    """

    key: str
    statistic: str
    ranked_as: str | None
    needs_weight: bool
    score: Score | None

    @property
    def needs_statistic(self) -> bool:
        """Whether a statistic has to be collected."""
        return self.statistic != "none"

    @property
    def signed(self) -> bool:
        """Whether scores fall below zero, by design of the metric."""
        return self.ranked_as == "force"

    @property
    def needs_data(self) -> bool:
        """Whether collecting it takes batches."""
        return self.statistic in _WITH_DATA


def _gradient_metric(key: str, needs_weight: bool, score: Score) -> Metric:
    return Metric(key, "gradient", key, needs_weight, score)


# With the names in "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models"
# (arXiv 2412.13488).
METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("magnitude", "none", "magnitude", True, lambda w, t: w.abs()),  # Magnitude
        _gradient_metric("gradient", False, lambda w, g: g.abs()),  # Gradient
        _gradient_metric("snip", True, lambda w, g: (w * g).abs()),  # SNIP
        _gradient_metric("force", True, lambda w, g: -(w * g)),  # FORCE
        _gradient_metric("taylor_fo", True, lambda w, g: (w * g).square()),  # Taylor-FO
        # Fisher-Info. A sum of squares ranks as its mean does, and as its absolute value.
        Metric("fisher", "squared_gradient", "gradient", False, lambda w, f: f.abs()),
        # SynFlow, without data.
        Metric("synflow", "synaptic_flow", "snip", True, lambda w, r: (w * r).abs()),
        # GraSP. The statistic carries the sign of `SpeftConfig.grasp_sign`.
        Metric("grasp", "hessian_gradient", "force", True, lambda w, h: -(w * h)),
        Metric("random", "none", None, False, None),  # Random
    )
}


def metric_named(salience: str | Score) -> Metric:
    """Return the metric of that key, or the metric whose score is a callable.

    Args:
        salience: a key of `METRICS`, a callable `score(w, g) -> s`, or the name of one,
            "package.module:function", which is imported here.

    Raises:
        ConfigError: there is none; the message lists the known ones and the nearest. Or the name
            cannot be imported, or is of nothing that can be called.
    """
    check_salience(salience)
    if isinstance(salience, str) and salience in METRICS:
        return METRICS[salience]
    if isinstance(salience, str):
        return _custom(salience, import_score(salience))
    return _custom(name_of(salience), salience)


def check_salience(salience: object) -> str:
    """Return the statistic that `salience` needs, importing nothing.

    Raises:
        ConfigError: it is neither a metric's key, nor a callable, nor the form of a callable's
            name.
    """
    if isinstance(salience, str) and salience in METRICS:
        return METRICS[salience].statistic
    if isinstance(salience, str) and ":" in salience:
        check_name(salience)
    elif isinstance(salience, str) or not callable(salience):
        raise ConfigError(
            f"unknown salience metric {salience!r}; known: {', '.join(METRICS)}, or a callable "
            f"score(w, g) or its name 'package.module:function'.{nearest(str(salience), METRICS)}"
        )
    return "gradient"


def _custom(key: str, score: Score) -> Metric:
    return Metric(key, "gradient", None, True, score)
