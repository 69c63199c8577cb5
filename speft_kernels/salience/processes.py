"""Scoring in several processes: gradients are summed, so all of them select the same entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import SalienceError
from .accumulate import GradientSums, PassStatistics

Result = TypeVar("Result")


def count() -> int:
    """Return how many processes score together: 1 without an initialised torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _agreed(run: Callable[[], Result], device: torch.device) -> Result:
    """What `run` returns, once it has in every process; raises in all of them when one failed, so
    that none waits for it forever. `device`: of the flag that the processes exchange.
    """
    result, error = None, None
    try:
        result = run()
    except Exception as raised:  # raised again once the other processes know
        error = raised
    failed = torch.tensor([float(error is not None)], device=device)
    dist.all_reduce(failed)
    if error is not None:
        raise error
    if failed.item():
        raise SalienceError("scoring failed in another process; its own message says why")
    return cast(Result, result)


def together(
    run: Callable[[], PassStatistics], layers: Mapping[str, nn.Linear], sums: GradientSums
) -> PassStatistics:
    """Run a pass that adds to `sums`; the sums and counts of all processes come out in each.

    Raises:
        SalienceError: the pass failed in another process. An error of this one comes out as it is.
    """
    if count() == 1:
        return run()
    statistics = _agreed(run, next(iter(layers.values())).weight.device)
    _reduce(layers, sums, statistics)
    return statistics


def summed(run: Callable[[], int], sums: Iterable[Tensor]) -> int:
    """Run a pass that adds to `sums` and returns a count; those of all processes come out in each.

    Raises:
        SalienceError: the pass failed in another process. An error of this one comes out as it is.
    """
    if count() == 1:
        return run()
    sums = list(sums)
    device = sums[0].device
    counted = torch.tensor([float(_agreed(run, device))], device=device)
    for total in sums:
        dist.all_reduce(total)
    dist.all_reduce(counted)
    return int(counted.item())


def _reduce(
    layers: Mapping[str, nn.Linear], sums: GradientSums, statistics: PassStatistics
) -> None:
    """Sum gradients and counts over the processes, in place; no gradient here counts as zero."""
    device = next(iter(layers.values())).weight.device
    counts = torch.tensor(
        [statistics.batches, statistics.examples, *(name in statistics.arrived for name in layers)],
        dtype=torch.float64 if device.type != "mps" else torch.float32,
        device=device,
    )
    dist.all_reduce(counts)
    batches, examples, *arrived = (int(value) for value in counts.tolist())
    statistics.batches, statistics.examples = batches, examples
    for (name, layer), seen in zip(layers.items(), arrived, strict=True):
        if not seen:
            continue
        statistics.arrived.add(name)
        if name not in sums.sums:
            sums.add(name, torch.zeros_like(layer.weight))
        # One layer at a time on its device: the collective may not reach host memory.
        total = sums.sums[name].to(layer.weight.device)
        dist.all_reduce(total)
        sums.sums[name].copy_(total)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= count()
