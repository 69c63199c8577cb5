"""Bytes that layers keep for their backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .harness import Saved


class _Kept:
    """Storages that autograd saves, each once, but for those that belong to modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._owned = {
            tensor.untyped_storage().data_ptr()
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def scope(self) -> torch.autograd.graph.saved_tensors_hooks:
        """What is saved within it counts."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        coordinates = tensor.layout == torch.sparse_coo
        for part in (tensor._indices(), tensor._values()) if coordinates else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self._owned:
                # Held, so that no other one gets its address.
                self._storages[storage.data_ptr()] = storage
        # Siblings find a shared copy as long as the object lives, so it is kept as it is; an output
        # of its own graph would hold that graph in a circle.
        return tensor if tensor.grad_fn is None else tensor.detach()


def saved_for_backward(
    layers: Iterable[nn.Module], forward: Callable[[], object], at_most: float | None = None
) -> Saved:
    """Run `forward` and count what `layers` keep in it, over the bytes of their inputs.

    Counted is the storage of every tensor that is saved for backward while one of the layers runs,
    each storage once; parameters and buffers of the layers are not counted, they are there anyway.
    Inputs are counted once where several layers read the same tensor.
    """
    inputs: dict[tuple[Any, ...], Tensor] = {}
    hooks: list[Any] = []
    open_scopes: list[torch.autograd.graph.saved_tensors_hooks] = []
    layers = list(layers)
    kept = _Kept(layers)

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        inputs[x.data_ptr(), tuple(x.shape)] = x
        open_scopes.append(kept.scope())
        open_scopes[-1].__enter__()

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        open_scopes.pop().__exit__()

    try:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(enter))
            hooks.append(layer.register_forward_hook(leave))
        forward()
    finally:
        while open_scopes:
            open_scopes.pop().__exit__()
        for hook in hooks:
            hook.remove()
    total = sum(x.numel() * x.element_size() for x in inputs.values())
    return Saved(kept.bytes, total, at_most)


def saved_by(model: nn.Module, forward: Callable[[], object]) -> int:
    """Run `forward` and count the bytes that all of it keeps, but for the model's parameters and
    buffers.
    """
    kept = _Kept([model])
    with kept.scope():
        forward()
    return kept.bytes
