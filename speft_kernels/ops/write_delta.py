"""`write_delta`: put trained values into the weight they belong to, or take them out again.

    W[idx] = cast(base + values)        values given
    W[idx] = base                       values None

Idempotent and exact: `base` is what the entries held before the first write, so taking the values
out restores the weight bit for bit. The sum is computed in float32 (float64 for a float64 weight)
and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import _cuda_native, _native, _triton
from ..dtypes import accumulator_dtype
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
    write_deltas(
        [weight], [pattern], [base_values], None if values is None else [values], backend=backend
    )


def write_deltas(
    weights: Sequence[Tensor],
    patterns: Sequence[SparsePattern],
    base_values: Sequence[Tensor],
    values: Sequence[Tensor | None] | None,
    *,
    backend: str | None = None,
) -> None:
    """`write_delta` for several weights: a whole model's layers. One call for all weights of a
    dtype and a device whose values go in, one for those without `values`, whose base comes back.

    Nothing is written where an argument, or the backend for any of the calls, is refused.

    Args:
        values: as many as weights, each a tensor or None; None in all stands for as many.

    Raises:
        ValueError: the sequences differ in length; and as `write_delta`, for any of them.
    """
    calls = _calls(weights, patterns, base_values, values)
    if len(calls) > 1:  # a single call refuses its backend itself
        _check_backend(calls, weights, backend)
    for chosen in calls:
        taken = [] if values is None else [values[i] for i in chosen]
        torch.ops.speft.write_delta(
            [weights[i].detach() for i in chosen],
            [patterns[i].entry_indices for i in chosen],
            [base_values[i].reshape(-1) for i in chosen],
            [value.detach().reshape(-1) for value in taken if value is not None],
            backend,
        )


def check_deltas(
    weights: Sequence[Tensor],
    patterns: Sequence[SparsePattern],
    base_values: Sequence[Tensor],
    values: Sequence[Tensor | None] | None,
    *,
    backend: str | None = None,
) -> None:
    """Raise what `write_deltas` would refuse with; nothing is written."""
    _check_backend(_calls(weights, patterns, base_values, values), weights, backend)


def _calls(
    weights: Sequence[Tensor],
    patterns: Sequence[SparsePattern],
    base_values: Sequence[Tensor],
    values: Sequence[Tensor | None] | None,
) -> list[list[int]]:
    """Check the arguments, and return which weights each call takes."""
    lengths = {len(weights), len(patterns), len(base_values)}
    if values is not None:
        lengths.add(len(values))
    if len(lengths) != 1:
        raise ValueError(f"the sequences must have one length, got {sorted(lengths)}")
    calls: dict[tuple[torch.dtype, torch.device, bool], list[int]] = {}
    for i, (weight, pattern, base) in enumerate(zip(weights, patterns, base_values, strict=True)):
        value = None if values is None else values[i]
        _check(weight, pattern, base, value)
        calls.setdefault((weight.dtype, weight.device, value is None), []).append(i)
    return list(calls.values())


def _check_backend(calls: list[list[int]], weights: Sequence[Tensor], backend: str | None) -> None:
    """Refuse a backend that cannot serve one of the calls."""
    for chosen in calls:
        first = weights[chosen[0]]
        registry.resolve("write_delta", first.device, first.dtype, backend)


def _check(weight: Tensor, pattern: SparsePattern, base: Tensor, values: Tensor | None) -> None:
    _checks.check_float(weight=weight)
    if tuple(weight.shape) != pattern.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, the pattern is for {pattern.shape}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()}")
    _checks.check_same("base_values", base, "weight", weight)
    _checks.check_pattern_device(pattern, "weight", weight)
    for name, tensor in (("base_values", base), ("values", values)):
        if tensor is not None and tuple(tensor.shape) != pattern.values_shape:
            raise ValueError(
                f"{name} must have shape {pattern.values_shape}, got {tuple(tensor.shape)}"
            )
    if values is not None:
        dtype = accumulator_dtype(weight.dtype)
        if values.dtype != dtype:
            raise TypeError(
                f"values must be {dtype} beside a {weight.dtype} weight, got {values.dtype}"
            )
        _checks.check_device("values", values, "weight", weight)


# An implementation is called with lists of weights, indices, base values and values (empty: the
# base values alone), all of one length.


def _totals(base: list[Tensor], values: list[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for i, taken in enumerate(base):
        yield (taken.to(values[i].dtype) + values[i]).to(dtype) if values else taken


@registry.implement("write_delta", "reference")
def _reference(
    weights: list[Tensor], indices: list[Tensor], base: list[Tensor], values: list[Tensor]
) -> None:
    totals = _totals(base, values, weights[0].dtype)
    for weight, where, total in zip(weights, indices, totals, strict=True):
        weight.view(-1)[where.long()] = total


@registry.implement("write_delta", "torch")
def _torch(
    weights: list[Tensor], indices: list[Tensor], base: list[Tensor], values: list[Tensor]
) -> None:
    totals = _totals(base, values, weights[0].dtype)
    for weight, where, total in zip(weights, indices, totals, strict=True):
        weight.view(-1).index_copy_(0, where.long(), total)


@registry.implement("write_delta", "cpu")
def _cpu(
    weights: list[Tensor], indices: list[Tensor], base: list[Tensor], values: list[Tensor]
) -> None:
    base, values = [b.contiguous() for b in base], [v.contiguous() for v in values]
    _native.kernels().write_delta(
        [w.data_ptr() for w in weights],
        [i.data_ptr() for i in indices],
        [i.dtype == torch.int64 for i in indices],
        [i.numel() for i in indices],
        [b.data_ptr() for b in base],
        [v.data_ptr() for v in values],
        *(_native.dtype_code(weights[0]), torch.get_num_threads()),
    )


@registry.implement("write_delta", "triton")
def _in_triton(
    weights: list[Tensor], indices: list[Tensor], base: list[Tensor], values: list[Tensor]
) -> None:
    base, values = [b.contiguous() for b in base], [v.contiguous() for v in values]
    _triton.kernels("write_delta").write_delta(weights, indices, base, values)


def _in_cuda(
    backend: str,
    weights: list[Tensor],
    indices: list[Tensor],
    base: list[Tensor],
    values: list[Tensor],
) -> None:
    base, values = [b.contiguous() for b in base], [v.contiguous() for v in values]
    _cuda_native.launch(
        *(backend, "write_delta", weights[0]),
        [w.data_ptr() for w in weights],
        [i.data_ptr() for i in indices],
        [i.dtype == torch.int64 for i in indices],
        [i.numel() for i in indices],
        [b.data_ptr() for b in base],
        [v.data_ptr() for v in values],
        _native.dtype_code(weights[0]),
    )


for _backend in _cuda_native.MODULES:
    registry.implement("write_delta", _backend)(partial(_in_cuda, _backend))


@operation("speft::write_delta", mutates=["weights"])
def _write_delta(
    weights: list[Tensor],
    indices: list[Tensor],
    base: list[Tensor],
    values: list[Tensor],
    backend: str | None,
) -> None:
    first = weights[0]
    serve = registry.resolve("write_delta", first.device, first.dtype, backend).function
    serve(weights, indices, base, values)


@_write_delta.register_fake
def _(weights, indices, base, values, backend):  # type: ignore[no-untyped-def]
    return None
