"""`write_delta`: put trained values into the weight they belong to, or take them out again.

    W[idx] = cast(base + values)        values given
    W[idx] = base                       values None

Idempotent and exact: `base` is what the entries held before the first write, so taking the values
out restores the weight bit for bit. The sum is computed in float32 (float64 for a float64 weight)
and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..pattern import SparsePattern
from . import _checks, registry
from ._library import operation


def write_delta(
    weight: Tensor,
    pattern: SparsePattern,
    base_values: Tensor,
    values: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """Write `base_values + values` into the entries of `weight` that `pattern` names; only `nnz`
    elements are touched.

    Args:
        weight: `[N, K]`, contiguous; written in place.
        base_values: `pattern.values_shape` of weight's dtype: the entries without the delta.
        values: `pattern.values_shape`, float32 (float64 for a float64 weight); None writes
            `base_values` back.

    Raises:
        ValueError: shapes or devices do not fit, or the weight is not contiguous.
        TypeError: dtypes do not fit.
        BackendError: the backend that was asked for cannot serve the call.
    """
    _checks.check_float(weight=weight)
    if tuple(weight.shape) != pattern.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, the pattern is for {pattern.shape}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()}")
    _checks.check_same("base_values", base_values, "weight", weight)
    _checks.check_pattern_device(pattern, "weight", weight)
    for name, tensor in (("base_values", base_values), ("values", values)):
        if tensor is not None and tuple(tensor.shape) != pattern.values_shape:
            raise ValueError(
                f"{name} must have shape {pattern.values_shape}, got {tuple(tensor.shape)}"
            )
    if values is not None:
        dtype = _checks.accumulator_dtype(weight.dtype)
        if values.dtype != dtype:
            raise TypeError(
                f"values must be {dtype} beside a {weight.dtype} weight, got {values.dtype}"
            )
        _checks.check_device("values", values, "weight", weight)
        values = values.detach().reshape(-1)
    torch.ops.speft.write_delta(
        weight.detach(), pattern.entry_indices, base_values.reshape(-1), values, backend
    )


@registry.implement("write_delta", "reference")
def _reference(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> None:
    total = base if values is None else (base.to(values.dtype) + values).to(weight.dtype)
    weight.view(-1)[indices.long()] = total


@registry.implement("write_delta", "torch")
def _torch(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> None:
    total = base if values is None else (base.to(values.dtype) + values).to(weight.dtype)
    weight.view(-1).index_copy_(0, indices.long(), total)


@registry.implement("write_delta", "cpu")
def _cpu(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None) -> None:
    base = base.contiguous()
    values = None if values is None else values.contiguous()
    _native.kernels().write_delta(
        *(weight.data_ptr(), indices.data_ptr(), indices.dtype == torch.int64, indices.numel()),
        *(base.data_ptr(), 0 if values is None else values.data_ptr()),
        *(_native.dtype_code(weight), torch.get_num_threads()),
    )


@operation("speft::write_delta", mutates=["weight"])
def _write_delta(
    weight: Tensor, indices: Tensor, base: Tensor, values: Tensor | None, backend: str | None
) -> None:
    serve = registry.resolve("write_delta", weight.device, weight.dtype, backend).function
    serve(weight, indices, base, values)


@_write_delta.register_fake
def _(weight, indices, base, values, backend):  # type: ignore[no-untyped-def]
    return None
