"""Registration with torch.library, the same for every operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def operation(
    name: str, mutates: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], torch._library.custom_ops.CustomOpDef]:
    """Register the decorated body as the operation `name`.

    Autocast is off inside: it would change the dtype of a product between the checks and the
    kernels, which trust what was checked.
    """

    def register(body: Callable[..., Any]) -> torch._library.custom_ops.CustomOpDef:
        @functools.wraps(body)
        def exact(*args: Any) -> Any:
            with torch.autocast(_device_type(args), enabled=False):
                return body(*args)

        return torch.library.custom_op(name, exact, mutates_args=tuple(mutates))

    return register


def _device_type(args: Iterable[Any]) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, list) and arg:
            return _device_type(arg)
    raise TypeError("an operation needs at least one tensor")
