"""What sparse layers must do around a step of an optimizer, whatever optimizer it is."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

if TYPE_CHECKING:
    from .nn import SparseDeltaLinear

# The layers that exist, by numbers that no two ever have.
_layers: weakref.WeakValueDictionary[int, SparseDeltaLinear] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: SparseDeltaLinear) -> int:
    """Take part, for this layer, in every step of every optimizer, as long as it lives; return the
    layer's number.
    """
    number = next(_numbers)
    _layers[number] = layer
    return number


def by_number(number: int) -> SparseDeltaLinear | None:
    """The layer, if it still exists."""
    return _layers.get(number)


def alive() -> list[SparseDeltaLinear]:
    """All layers that exist."""
    # The references are taken at once: other threads make layers, and drop them, meanwhile.
    return [layer for ref in _layers.valuerefs() if (layer := ref()) is not None]


def _settle_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step of any optimizer, let the buffers that it holds be what layers' `.grad` are."""
    sinks = {id(s.parameter): s for layer in alive() if (s := layer.sink) is not None}
    if sinks:
        for group in optimizer.param_groups:
            for held in {id(p) for p in group["params"]} & sinks.keys():
                sinks[held].settle()


def _raise_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step of any optimizer, raise the version of the `values` that it holds.

    A resident layer sees by its version that `values` changed. Operations in place raise it, but
    fused optimizers, torch's own among them, write past it.
    """
    ours: dict[int, list[Tensor]] = {}
    for layer in alive():
        ours.setdefault(id(layer.values), []).append(layer.values)
        if layer.sink is not None:  # an optimizer may hold either: `model.parameters()` has values
            ours.setdefault(id(layer.sink.parameter), []).append(layer.values)
    for group in optimizer.param_groups:
        stepped = (p for p in group["params"] if p.grad is not None)
        changed = [values for p in stepped for values in ours.get(id(p), ())]
        torch.autograd.graph.increment_version(changed)


# Has a function run outside of graphs. This way of torch's own imports the compiler with the first
# call, as optimizers do; its public one at once, which takes seconds.
untraced: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)

# A graph would keep the layers that existed when a step was compiled, and raises no version.
register_optimizer_step_pre_hook(untraced(_settle_gradients))
register_optimizer_step_post_hook(untraced(_raise_versions))
