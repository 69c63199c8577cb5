"""From scores to patterns: the top entries or blocks, of each layer or of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..pattern import SparsePattern
from ..peak_memory import PeakMemory
from . import processes
from .accumulate import GradientSums, LossFn, PassStatistics, folded, stream_gradients
from .hessian import hessian_gradients
from .metrics import Metric, metric_named
from .ranking import choose
from .report import LayerBudget, SalienceReport
from .squared import stream_squared_gradients
from .synflow import stream_synaptic_flow

if TYPE_CHECKING:
    from ..config import SpeftConfig

_MOST_NAMES = 5  # of layers in a note


def select_patterns(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    config: SpeftConfig,
    batches: Iterable[Any] | None,  # None only for a metric that needs no data
    loss_fn: LossFn | None,
    *,
    head_warmup_seconds: float,
) -> tuple[dict[str, SparsePattern], SalienceReport]:
    """Score the weights of `layers` and select what trains. To be called with the model `borrowed`.

    Per-layer selection from a single batch keeps no accumulators: each layer is selected the moment
    its gradient arrives.

    Raises:
        SalienceError: see `stream_gradients`; also a gradient or weight that is not finite, naming
            the layer.
    """
    metric = metric_named(config.salience)
    devices = {layer.weight.device for layer in layers.values()}
    start, peak = time.perf_counter(), PeakMemory(devices)
    zeros: dict[str, tuple[int, int]] = {}
    chosen, statistics, accumulator_bytes = _select(
        metric, model, layers, config, batches, loss_fn, zeros
    )
    patterns = {
        name: SparsePattern(
            (layer.out_features, layer.in_features),
            chosen[name].to(layer.weight.device),
            config.block_shape,
        )
        for name, layer in layers.items()
    }
    report = SalienceReport(
        metric=metric.key,
        scope=config.scope,
        selection=config.selection,
        density=config.density,
        block_shape=config.block_shape,
        batches=statistics.batches,
        examples=statistics.examples,
        seconds=time.perf_counter() - start,
        head_warmup_seconds=head_warmup_seconds,
        peak_memory_bytes=peak.bytes(),
        peak_memory_source=peak.source,
        accumulator_bytes=accumulator_bytes,
        largest_gradient_bytes=statistics.largest_gradient_bytes,
        layers=tuple(
            LayerBudget(name, pattern.shape, pattern.nnz, pattern.density)
            for name, pattern in patterns.items()
        ),
        notes=(*statistics.notes, *_note_of(zeros, config)),
    )
    return patterns, report


def _select(
    metric: Metric,
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    config: SpeftConfig,
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    zeros: dict[str, tuple[int, int]],  # filled by `choose`
) -> tuple[dict[str, Tensor], PassStatistics, int]:
    """Return each layer's indices, what the pass saw, and the bytes of the accumulators."""
    if metric.statistic == "none":
        return choose(metric, config, layers, {}, zeros), PassStatistics(), 0
    if not metric.needs_data:
        single, batches = True, ()
    else:
        assert batches is not None
        if metric.statistic == "hessian_gradient":
            statistics, products, nbytes = hessian_gradients(
                model, layers, config, batches, loss_fn
            )
            return choose(metric, config, layers, products, zeros), statistics, nbytes
        single, batches = _is_single(batches)

    chosen = {}
    sums = GradientSums(
        layers, config.accumulator_dtype, config.accumulator_device, config.accumulate
    )
    at_once = single and config.scope == "layer" and processes.count() == 1
    stream = _STREAMS[metric.statistic]
    if stream is stream_gradients:
        stream = partial(stream, whole=at_once or config.accumulate != "sum")

    def choose_now(name: str, statistic: Tensor) -> None:
        statistic = folded(statistic, config.accumulate)
        chosen.update(choose(metric, config, {name: layers[name]}, {name: statistic}, zeros))

    consume = choose_now if at_once else sums.add
    statistics = processes.together(
        lambda: stream(model, layers, batches, loss_fn, consume), layers, sums
    )
    statistics.check(layers, metric.needs_data)
    nbytes = sums.nbytes
    chosen = chosen or choose(metric, config, layers, sums.sums, zeros)
    return chosen, statistics, nbytes


def _note_of(zeros: Mapping[str, tuple[int, int]], config: SpeftConfig) -> list[str]:
    """Return what is to be said of the layers that `choose` found, from the most zeros on."""
    if not zeros:
        return []
    what = "entries" if config.block_shape == (1, 1) else "blocks"
    worst = sorted(zeros.items(), key=lambda item: -item[1][0])
    listed = [f"{n!r} ({count:,} of {total:,})" for n, (count, total) in worst[:_MOST_NAMES]]
    more = f" and {len(zeros) - _MOST_NAMES} more" if len(zeros) > _MOST_NAMES else ""
    return [
        f"fewer {what} score above zero than are to train; the first of those that score zero make "
        f"up the number, in the layers {', '.join(listed)}{more}"
    ]


_STREAMS: dict[str, Callable[..., PassStatistics]] = {
    "gradient": stream_gradients,
    "squared_gradient": stream_squared_gradients,
    "synaptic_flow": stream_synaptic_flow,
}


def _is_single(batches: Iterable[Any]) -> tuple[bool, Iterator[Any]]:
    iterator = iter(batches)
    ahead = list(islice(iterator, 2))
    return len(ahead) == 1, chain(ahead, iterator)
