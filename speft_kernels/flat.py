"""`FlatValues`: the values of all sparse layers of a model as one parameter with one gradient.

An optimizer then takes one step over one tensor, whatever the number of layers, and the gradients
of micro-batches are summed where they belong: a layer's backward pass adds to its part of the one
buffer, and no gradient of a layer is ever allocated.
"""

from __future__ import annotations

import weakref
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .autograd import accumulates
from .errors import ConfigError
from .overview import sparse_layers
from .values import Values


class FlatValues:
    """One buffer for the values of a model's sparse layers, and one for their gradients.

    Build it when the model is where it trains, and give `parameter` to the optimizer in place of
    the layers' `values`, which become views of it; values that do not require grad are left out.
    Everything else stays as it was: each layer has its `values` and their `.grad`, in state dicts
    (which hold copies of them), adapters and gradient clipping alike. DDP finds
    the layers' values, not `parameter`, and reduces them in buckets: the first closes at 1 MB, the
    others at 25 MB, while one of all values is made by
    `DistributedDataParallel(model, bucket_cap_mb=...)` with more megabytes than the trained
    parameters have.

    Where a backward pass accumulates the gradient of `values`, it is added to the buffer, past
    autograd: hooks on `values` see none, and it is there on the stream that the forward pass ran
    on, which another stream must wait for. `torch.autograd.grad` and `backward(inputs=...)` do what
    they do without a buffer, of the layers' `values`: autograd does not know `parameter`. A layer
    without a gradient in a step counts as one whose gradient is zero.

    Attributes:
        parameter: `[total]`, of the values' dtype and device; requires grad. Its `.grad` is the
            buffer, from the first backward pass after `zero_grad` on.

    Raises:
        ConfigError: the model has no sparse layer with entries that train, its values are of
            several dtypes or on several devices, they have hooks, or they are flat already.
            Likewise on copying or pickling it.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [
            layer
            for layer in sparse_layers(model).values()
            if layer.values.numel() and layer.values.requires_grad
        ]
        if not layers:
            raise ConfigError("the model has no sparse layer with values to train")
        kinds = {(layer.values.dtype, layer.values.device) for layer in layers}
        if len(kinds) > 1:
            raise ConfigError(
                f"the values are of several kinds ({', '.join(sorted(map(str, kinds)))}); they "
                "cannot share one buffer"
            )
        if any(layer.sink is not None for layer in layers):
            raise ConfigError("the values are flat already; release() the other FlatValues first")
        if any(_has_hooks(layer.values) for layer in layers):
            raise ConfigError(
                "a layer's values have hooks, which would see no gradient: remove them, or give "
                "the optimizer the layers' values"
            )
        self._layers = layers
        flat = torch.cat([layer.values.detach().reshape(-1) for layer in layers])
        self.parameter: nn.Parameter = Values(flat)
        start = 0
        for layer in layers:
            part = flat[start : start + layer.values.numel()].view_as(layer.values)
            layer.values.grad = None
            layer.values.data = part
            layer.sink = self
            start += part.numel()
        self._held: set[int] = set()  # of the values whose parts hold a gradient
        self._take(torch.zeros_like(flat))
        trained = [self.parameter, *(layer.values for layer in layers)]
        self._hooks = [_hooked(tensor, weakref.ref(self)) for tensor in trained]

    def __reduce__(self) -> NoReturn:
        # Also for the copy module: the layers that it would hold are copied without their sink.
        raise ConfigError(
            "a copy of FlatValues would train no layer: copy the model, and build FlatValues of "
            "that"
        )

    def _take(self, grad: Tensor) -> None:
        """Make `grad` the gradients' buffer."""
        self._grad = grad
        self._places: dict[int, tuple[int, Tensor]] = {}
        start = 0
        for layer in self._layers:
            values = layer.values
            part = grad[start : start + values.numel()].view_as(values)
            address = self.parameter.data_ptr() + start * self.parameter.element_size()
            self._places[id(values)] = address, part
            start += part.numel()

    def place(self, values: Tensor) -> tuple[Tensor, bool]:
        """Return the part of the gradient's buffer for a layer's `values`, and whether it holds a
        sum to be added to. Called by the layer's backward pass.

        Raises:
            ConfigError: the values are no longer in the buffer: the model was moved or cast.
        """
        grad = self.parameter.grad
        if grad is not self._grad:
            self._begin(grad)
        address, part = self._places.get(id(values), (None, values))
        if values.data_ptr() != address:
            raise ConfigError(
                "the values have left the one buffer of FlatValues (the model was moved or cast "
                "after it was built, or given other values): release() it and build it again"
            )
        accumulate = values.grad is not None
        self._hold(values, part)
        return part, accumulate

    def receive(self, target: Tensor) -> None:
        """Make ready for a gradient that autograd itself is about to add to a layer's `values`, or
        to `parameter`.
        """
        every = [layer.values for layer in self._layers]
        for values in every if target is self.parameter else [target]:
            part, accumulate = self.place(values)
            if not accumulate:
                part.zero_()

    def settle(self) -> None:
        """Make the buffer what the layers' `.grad` say, where someone has changed those alone, as
        `model.zero_grad()` does. Called before a step of the optimizer.
        """
        if self.parameter.grad is None:
            # What is no part of the buffer was put there since, by hand.
            parts = {id(part) for _, part in self._places.values()}
            found = [(layer.values, layer.values.grad) for layer in self._layers]
            found = [(v, grad) for v, grad in found if grad is not None and id(grad) not in parts]
            if not found:
                return
            self._begin(None)
            for values, grad in found:
                values.grad = grad
        elif self.parameter.grad is not self._grad:  # replaced: nothing is of the layers
            return
        for layer in self._layers:
            values = layer.values
            _, part = self._places.get(id(values), (None, None))
            if part is None:
                continue  # other values than those in the buffer
            if values.grad is not None:
                self._hold(values, part)
            elif id(values) in self._held:
                part.zero_()
                self._held.discard(id(values))

    def _hold(self, values: Tensor, part: Tensor) -> None:
        """Make `part` the gradient of `values`, with what was put in its place."""
        if values.grad is part:
            return
        if values.grad is not None:
            part.copy_(values.grad)
        values.grad = part
        self._held.add(id(values))

    def _begin(self, grad: Tensor | None) -> None:
        """Take up the gradient as it was left: None by zero_grad(), or replaced by another."""
        if grad is None:
            self._grad.zero_()
            self.parameter.grad = self._grad
            for layer in self._layers:
                layer.values.grad = None
            self._held.clear()
            return
        self._take(grad)
        for layer in self._layers:
            values = layer.values
            # None of one that took part: dropped. Of another the sum is what the new buffer says.
            if values.grad is not None or id(values) not in self._held:
                _, values.grad = self._places[id(values)]
                self._held.add(id(values))

    def release(self) -> None:
        """Give each layer values of its own again; `parameter` trains nothing afterwards."""
        for layer in self._layers:
            layer.values.data = layer.values.detach().clone()
            layer.values.grad = None
            layer.sink = None
        for hook in self._hooks:
            hook.remove()
        self._layers = []


def _hooked(target: Tensor, owner: weakref.ref[FlatValues]) -> RemovableHandle:
    """Tell the owner of each gradient that autograd is about to add to `target` itself."""
    tensor = weakref.ref(target)

    def receive(gradient: Tensor | None) -> None:
        # Of layers whose gradient went into the buffer there is none.
        flat, leaf = owner(), tensor()
        if gradient is None or flat is None or leaf is None:
            return
        if accumulates(get_gradient_edge(leaf).node):
            flat.receive(leaf)

    handle: RemovableHandle = target.register_hook(receive)
    return handle


def _has_hooks(values: Tensor) -> bool:
    # torch has no public way to ask.
    return any(
        getattr(values, hooks, None) for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks")
    )
