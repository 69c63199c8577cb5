"""From scores to patterns: the top entries or blocks, of each layer or of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import SalienceError
from ..pattern import SparsePattern
from . import processes
from .accumulate import GradientSums, LossFn, PassStatistics, stream_gradients
from .memory import PeakMemory
from .metrics import Metric, metric_named
from .report import LayerBudget, SalienceReport

if TYPE_CHECKING:
    from ..config import SpeftConfig


def select_patterns(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    config: SpeftConfig,
    batches: Iterable[Any] | None,  # None only for a metric that needs no gradient
    loss_fn: LossFn | None,
    *,
    head_warmup_seconds: float = 0.0,
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
    sums = GradientSums(config.accumulator_dtype, config.accumulator_device)
    statistics = PassStatistics()
    chosen: dict[str, Tensor] = {}
    accumulator_bytes = 0

    if not metric.needs_gradient:
        chosen = _choose(metric, config, layers, {})
    else:
        assert batches is not None
        single, batches = _is_single(batches)
        if single and config.scope == "layer" and processes.count() == 1:

            def choose_now(name: str, gradient: Tensor) -> None:
                if name in chosen:
                    raise SalienceError(
                        f"the gradient of layer {name!r} arrives in parts, as reentrant "
                        "checkpointing of a shared layer makes it: use use_reentrant=False, or "
                        "more than one batch"
                    )
                chosen.update(_choose(metric, config, {name: layers[name]}, {name: gradient}))

            statistics = stream_gradients(model, layers, batches, loss_fn, choose_now)
            statistics.check(layers)
        else:
            statistics = _sum_gradients(model, layers, batches, loss_fn, sums)
            accumulator_bytes = sums.nbytes
            chosen = _choose(metric, config, layers, sums.sums)

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
    )
    return patterns, report


def _is_single(batches: Iterable[Any]) -> tuple[bool, Iterator[Any]]:
    iterator = iter(batches)
    ahead = list(islice(iterator, 2))
    return len(ahead) == 1, chain(ahead, iterator)


def _sum_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    sums: GradientSums,
) -> PassStatistics:
    if processes.count() == 1:
        statistics = stream_gradients(model, layers, batches, loss_fn, sums.add)
    else:
        statistics, error = PassStatistics(), None
        try:
            statistics = stream_gradients(model, layers, batches, loss_fn, sums.add)
        except Exception as raised:  # agree() raises it again once the other processes know
            error = raised
        processes.agree(error, next(iter(layers.values())).weight.device)
        processes.reduce_sums(layers, sums, statistics)
    statistics.check(layers)
    return statistics


def _choose(
    metric: Metric,
    config: SpeftConfig,
    layers: Mapping[str, nn.Linear],
    gradients: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return each layer's sorted flat indices of the entries (or blocks) that score highest.

    `gradients` is emptied on the way: each one goes as soon as it is not needed any more.
    """
    groups = [[name] for name in layers] if config.scope == "layer" else [list(layers)]
    chosen: dict[str, Tensor] = {}
    for group in groups:
        pairs = {name: _operands(metric, layers[name], gradients.get(name)) for name in group}
        if config.block_shape == (1, 1) and _uniform(pairs.values()):
            ranked_by = metric.key
        else:
            # The top-k reads scores instead. Each takes the place of its layer's gradient, so one
            # layer's worth of memory comes on top: a copy of all weights in the gradients' dtype
            # would be as large as these.
            ranked_by = "raw"
            dtype, device = _common(pairs.values())
            for name in group:
                score = _block_scores(metric, pairs[name], config.block_shape, dtype)
                pairs[name] = (None, score.to(device))
                gradients.pop(name, None)
        places = sum((g if g is not None else _present(w)).numel() for w, g in pairs.values())
        selected = ops.topk_salience(
            [weight for weight, _ in pairs.values()],
            [gradient for _, gradient in pairs.values()],
            max(1, round(config.density * places)),
            metric=ranked_by,
            scope="global",
            names=[f"layer {name!r}" for name in group],
        )
        chosen.update(zip(group, selected, strict=True))
        for name in group:
            gradients.pop(name, None)
    return chosen


# (weight, gradient); None where the metric does not read it
Pair = tuple[Tensor | None, Tensor | None]


def _operands(metric: Metric, layer: nn.Linear, gradient: Tensor | None) -> Pair:
    weight = layer.weight.detach() if metric.needs_weight else None
    return weight, gradient if metric.needs_gradient else None


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # a metric reads the weight, the gradient or both
    return tensor


def _tensors(pairs: Iterable[Pair]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def _uniform(pairs: Iterable[Pair]) -> bool:
    return len({(tensor.dtype, tensor.device) for tensor in _tensors(pairs)}) == 1


def _common(pairs: Iterable[Pair]) -> tuple[torch.dtype, torch.device]:
    """Return float32, or float64 where any tensor is; and the device to rank on."""
    tensors = _tensors(pairs)
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    first = next((gradient for _, gradient in pairs if gradient is not None), tensors[0])
    return torch.float64 if double else torch.float32, first.device


def _block_scores(
    metric: Metric, pair: Pair, block_shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return `[N / bh, K / bw]`: the entries' scores summed over each block."""
    weight, gradient = pair
    where = (gradient if gradient is not None else _present(weight)).device
    unread = torch.empty(0)  # in the place of an operand that the metric does not read
    score = metric.score(*(unread if t is None else t.to(where, dtype) for t in pair))
    (rows, cols), (bh, bw) = score.shape, block_shape
    if block_shape == (1, 1):
        return score
    return score.reshape(rows // bh, bh, cols // bw, bw).sum(dim=(1, 3))
