"""Checks of arguments that several operations share. Each raises a typed error that shows the
offending facts.
"""

from __future__ import annotations

from torch import Tensor

from ..pattern import SparsePattern
from .registry import FLOATS


def check_float(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            known = ", ".join(str(d) for d in FLOATS)
            raise TypeError(f"{name} must be one of {known}, got {tensor.dtype}")


def check_same(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise unless the two tensors share dtype and device."""
    if a.dtype != b.dtype:
        raise TypeError(f"{first} and {second} must have one dtype, got {a.dtype} and {b.dtype}")
    check_device(first, a, second, b)


def check_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(
            f"{first} is on {a.device} and {second} on {b.device}; they must share one device"
        )


def check_apart(first: str, out: Tensor, **read: Tensor) -> None:
    """Raise ValueError where `out`, which is written, lies within the memory of what is read."""
    begin, end = _extent(out)
    for second, tensor in read.items():
        first_byte, last = _extent(tensor)
        if begin < last and first_byte < end:
            raise ValueError(f"{first} overlaps {second} in memory; give it memory of its own")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of that behind its last."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()


def check_pattern_device(pattern: SparsePattern, name: str, tensor: Tensor) -> None:
    if pattern.device != tensor.device:
        raise ValueError(
            f"the pattern is on {pattern.device} and {name} on {tensor.device}; move it once "
            "with pattern.to(device)"
        )


def tokens_first(name: str, tensor: Tensor, width: int) -> Tensor:
    """Return `[..., width]` as `[M, width]`, without a copy wherever strides allow.

    Raises ValueError for a tensor of another width.
    """
    if tensor.dim() == 0 or tensor.shape[-1] != width:
        raise ValueError(f"{name} must have shape [..., {width}], got {tuple(tensor.shape)}")
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), width)
