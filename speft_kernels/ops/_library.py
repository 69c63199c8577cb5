"""Registration with torch.library, the same for every operation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Kernels are put straight into the dispatcher. `torch.library.custom_op` wraps each call in Python
# of its own: 54 to 100 us a call on the Intel of docs/measurements.md, where this takes 18, and a
# training step of a small model makes a hundred calls.
_LIBRARY = torch.library.Library("speft", "FRAGMENT")


class Operation:
    """A registered operation, to which its fake and its gradient are added."""

    def __init__(self, name: str) -> None:
        self.name = name

    def register_fake(self, fake: Callable[..., Any]) -> None:
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]
    ) -> None:
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=_LIBRARY
        )


def operation(
    name: str, mutates: Iterable[str] = (), tags: Iterable[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], Operation]:
    """Register the decorated body as the operation `name`, on every device.

    Autocast is off inside: it would change the dtype of a product between the checks and the
    kernels, which trust what was checked. The versions of the arguments that `mutates` names are
    raised, so that autograd sees what was written.
    """

    def register(body: Callable[..., Any]) -> Operation:
        parameters = list(inspect.signature(body).parameters)
        mutated = [parameters.index(argument) for argument in mutates]

        @functools.wraps(body)
        def exact(*args: Any) -> Any:
            refuse_tangents(name, *args)
            device = _device_type(args)
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    result = body(*args)
            else:
                result = body(*args)
            for index in mutated:
                torch.autograd.graph.increment_version(args[index])
            return result

        schema = torch.library.infer_schema(body, mutates_args=tuple(mutates))
        short = name.removeprefix("speft::")
        _LIBRARY.define(short + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(short, exact, "CompositeExplicitAutograd")
        return Operation(name)

    return register


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may be called past the dispatcher, which costs more than a small kernel:
    nothing traces, counts, casts, differentiates forward or stands in for the tensor.
    """
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and holds_its_numbers(tensor)
        and not torch.is_autocast_enabled(tensor.device.type)
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._is_tracing()
    )


def holds_its_numbers(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are in its memory as they are. The dispatcher writes out those of
    a lazy negation (the imaginary part of a conjugate) and of autograd's zeros without memory.
    """
    return not (tensor.is_neg() or tensor._is_zerotensor())


def refuse_tangents(name: str, *args: Any) -> None:
    """Raise where an argument has a forward-mode derivative, which would be lost in silence. Asked
    before the dispatcher as well: within it, functorch has taken its tangents off.
    """
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative; use backward() or torch.autograd.grad"
            )


def _device_type(args: Iterable[Any]) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, list) and arg:
            return _device_type(arg)
    raise TypeError("an operation needs at least one tensor")
