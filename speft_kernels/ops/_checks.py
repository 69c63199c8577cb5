"""Checks of arguments that several operations share. Each raises a typed error that shows the
offending facts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import accumulator_dtype
from ..pattern import SparsePattern
from ..plan import SparsityPlan, plan_of
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


def gradient_operands(
    dy: Tensor, x: Tensor, pattern: SparsePattern, plan: SparsityPlan | None
) -> tuple[Tensor, SparsityPlan]:
    """Check what the gradient of the entries of `pattern` is computed from, whatever form x is in;
    return dy as `[M, N]` and the plan, by default the one cached with the pattern.
    """
    check_float(dy=dy, x=x)
    check_same("dy", dy, "x", x)
    check_pattern_device(pattern, "dy", dy)
    plan = plan_of(pattern) if plan is None else plan
    if plan.pattern is not pattern:
        if plan.pattern != pattern:
            raise ValueError(
                f"the plan was built for another pattern: {plan.pattern}, not {pattern}"
            )
        check_device("the plan", plan.pattern.indices, "dy", dy)
    return tokens_first("dy", dy, pattern.shape[0]), plan


def tokens_of_both(dy: Tensor, x: Tensor, width: int) -> Tensor:
    """Return x as `[M, width]`, with as many tokens as `dy [M, N]`."""
    x = tokens_first("x", x, width)
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy has {dy.shape[0]} tokens and x has {x.shape[0]}")
    return x


def gradient_out(out: Tensor | None, shape: tuple[int, ...], dy: Tensor, x: Tensor) -> Tensor:
    """Return `out`, to which the gradient can be written; raise where it cannot."""
    if out is None:
        raise ValueError("accumulate=True needs the buffer to accumulate into: pass out=")
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
        raise ValueError("out= cannot carry a gradient, and dy or x requires one: leave it out")
    dtype = accumulator_dtype(dy.dtype)
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {dtype} tensor of shape {shape}, got {out.dtype} of shape "
            f"{tuple(out.shape)}"
        )
    check_device("out", out, "dy", dy)
    if not torch.compiler.is_compiling():
        check_apart("out", out, dy=dy, x=x)
    return out


def tokens_first(name: str, tensor: Tensor, width: int) -> Tensor:
    """Return `[..., width]` as `[M, width]`, without a copy wherever strides allow.

    Raises ValueError for a tensor of another width.
    """
    if tensor.dim() == 0 or tensor.shape[-1] != width:
        raise ValueError(f"{name} must have shape [..., {width}], got {tuple(tensor.shape)}")
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), width)


def tokens_as_in(like: Tensor, tensor: Tensor) -> Tensor:
    """Return `[M, W]` as `[..., W]`, with the dimensions that `tokens_first` took from `like`. No
    view where there were two: torch lets nobody write into one that a checkpoint returns.
    """
    return tensor if like.dim() == 2 else tensor.reshape(*like.shape[:-1], tensor.shape[1])
