"""`sparse_delta_matmul`: multiply by `W + D` where D is sparse, without writing W.

    y[m, n]  = sum over k of x[m, k] * (W + D)[n, k] + b[n]
    dx[m, k] = sum over n of dy[m, n] * (W + D)[n, k]            (the input-gradient twin)

W is a matrix or a `QuantizedWeight`. Accumulated in float32 (float64 for float64 inputs). Most
backends add the sparse part to the vendor's GEMM, and round twice: after the one and the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _native, _triton
from ..compact import CompactIndices
from ..pattern import SparsePattern
from ..plan import plan_of
from ..quantized import PIECE_BYTES, QuantizedWeight
from . import _checks, registry
from ._library import is_plain, operation
from .sampled_grad import gradient_of_entries


def sparse_delta_matmul(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `x @ (W + D)^T + b`, differentiable in x, values, bias and a weight that is a tensor.

    Args:
        x: `[..., K]`.
        weight: `[N, K]` of x's dtype, or quantized with scales of x's dtype or float32; never
            written.
        values: `pattern.values_shape`, float32 (float64 for float64 inputs): the entries of D.
        bias: `[N]` of x's dtype.

    Returns:
        `[..., N]` of x's dtype.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes do not fit.
        BackendError: the backend that was asked for cannot serve the call.
    """
    flat = _checks.tokens_first("x", x, pattern.shape[1])
    _check(flat, "x", weight, values, pattern)
    if bias is not None:
        _checks.check_same("bias", bias, "x", flat)
        if tuple(bias.shape) != pattern.shape[:1]:
            raise ValueError(f"bias must have shape {pattern.shape[:1]}, got {tuple(bias.shape)}")
    y = _product(flat, weight, values, pattern, bias, False, backend)
    return y.reshape(*x.shape[:-1], pattern.shape[0])


def sparse_delta_matmul_grad_input(
    dy: Tensor,
    weight: Tensor | QuantizedWeight,
    values: Tensor,
    pattern: SparsePattern,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `dx = dy @ (W + D)`, the input-gradient twin; arguments and errors as
    `sparse_delta_matmul`.

    Args:
        dy: `[..., N]`.

    Returns:
        `[..., K]` of dy's dtype.
    """
    flat = _checks.tokens_first("dy", dy, pattern.shape[0])
    _check(flat, "dy", weight, values, pattern)
    dx = _product(flat, weight, values, pattern, None, True, backend)
    return dx.reshape(*dy.shape[:-1], pattern.shape[1])


def delta_matmul(
    x: Tensor, values: Tensor, pattern: SparsePattern, *, backend: str | None = None
) -> Tensor:
    """Return `x @ D^T` alone, `[..., N]` of x's dtype, for a base that is no plain matrix;
    differentiable in both.
    """
    flat = _checks.tokens_first("x", x, pattern.shape[1])
    _checks.check_float(x=x)
    y = _delta_product(flat, "x", values, pattern, False, backend)
    return y.reshape(*x.shape[:-1], pattern.shape[0])


def delta_matmul_grad_input(
    dy: Tensor, values: Tensor, pattern: SparsePattern, *, backend: str | None = None
) -> Tensor:
    """Return `dy @ D`, `[..., K]` of dy's dtype: the input-gradient twin of `delta_matmul`."""
    flat = _checks.tokens_first("dy", dy, pattern.shape[0])
    _checks.check_float(dy=dy)
    dx = _delta_product(flat, "dy", values, pattern, True, backend)
    return dx.reshape(*dy.shape[:-1], pattern.shape[1])


def _check(
    flat: Tensor,
    name: str,
    weight: Tensor | QuantizedWeight,
    values: Tensor,
    pattern: SparsePattern,
) -> None:
    _checks.check_float(**{name: flat})
    if isinstance(weight, QuantizedWeight):
        if weight.scales.dtype not in (flat.dtype, torch.float32):
            raise TypeError(
                f"the scales must be {flat.dtype} or torch.float32 beside {flat.dtype} {name}, got "
                f"{weight.scales.dtype}"
            )
        _checks.check_device("the quantized weight", weight.scales, name, flat)
    else:
        _checks.check_float(weight=weight)
        _checks.check_same(name, flat, "weight", weight)
    if tuple(weight.shape) != pattern.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, the pattern is for {pattern.shape}"
        )
    _check_values(flat, name, values, pattern)


def _check_values(flat: Tensor, name: str, values: Tensor, pattern: SparsePattern) -> None:
    if tuple(values.shape) != pattern.values_shape:
        raise ValueError(
            f"values must have shape {pattern.values_shape}, got {tuple(values.shape)}"
        )
    dtype = _checks.accumulator_dtype(flat.dtype)
    if values.dtype != dtype:
        raise TypeError(f"values must be {dtype} beside {flat.dtype} {name}, got {values.dtype}")
    _checks.check_device("values", values, name, flat)
    _checks.check_pattern_device(pattern, name, flat)


def _sorted_by_row(
    values: Tensor, pattern: SparsePattern
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    plan = plan_of(pattern)
    by_column, order = plan.csc
    values = values.reshape(-1)
    if plan.row_order is not None:
        values = values[plan.row_order]
    return values, list(plan.csr), [*by_column, order]


def _product(
    flat: Tensor,
    weight: Tensor | QuantizedWeight,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None,
    twin: bool,
    backend: str | None,
) -> Tensor:
    values, csr, csc = _sorted_by_row(values, pattern)
    if isinstance(weight, QuantizedWeight):
        data, scales = weight.data, weight.scales
    else:
        data, scales = weight, None
    out_features = pattern.shape[1 if twin else 0]
    if _past_the_dispatcher(flat, data, values, bias):
        return _serve(flat, data, scales, values, bias, csr, csc, out_features, twin, backend)
    return torch.ops.speft.sparse_delta_matmul(
        flat, data, scales, values, bias, csr, csc, twin, backend
    )


def _delta_product(
    flat: Tensor, name: str, values: Tensor, pattern: SparsePattern, twin: bool, backend: str | None
) -> Tensor:
    _check_values(flat, name, values, pattern)
    values, csr, csc = _sorted_by_row(values, pattern)
    out_features = pattern.shape[1 if twin else 0]
    if _past_the_dispatcher(flat, values):
        return _serve(flat, None, None, values, None, csr, csc, out_features, twin, backend)
    if twin:
        values, csr, csc = _turned(values, csr, csc)
    return torch.ops.speft.delta_matmul(flat, values, csr, csc, out_features, backend)


def _turned(
    values: Tensor, csr: list[Tensor], csc: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """D^T: its values sorted by its rows, and its `csr` and `csc`."""
    *by_column, order = csc
    return values[order], by_column, [*csr, torch.argsort(order)]


def _past_the_dispatcher(flat: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing would see the call in the dispatcher, which takes longer than a product of
    one token.
    """
    if not is_plain(flat) or (torch.is_grad_enabled() and flat.requires_grad):
        return False
    return all(
        other is None
        or (
            type(other) in (Tensor, nn.Parameter)
            and not (torch.is_grad_enabled() and other.requires_grad)
        )
        for other in others
    )


class Delta(NamedTuple):
    """D, as an implementation reads it."""

    values: Tensor  # [nnz], sorted by (row, column)
    by_row: CompactIndices
    by_column: CompactIndices
    order: Tensor  # int64 [nnz]: values[order] are sorted by (column, row)


Base = Tensor | QuantizedWeight | None

# An implementation is called with x [M, K]; W [N, K], a QuantizedWeight, or None for the product
# with D alone; the delta; b or None; the features of the result; and whether it is the twin, with x
# [M, N]. It returns the product.
Serve = Callable[[Tensor, Base, Delta, Tensor | None, int, bool], Tensor]


def _beside_torchs_product(
    add: Callable[[Tensor, Tensor, Tensor, CompactIndices], None],
) -> Serve:
    """Make an implementation of a function that adds `x @ D^T` to a fresh, row-contiguous y."""

    @functools.wraps(add)
    def serve(
        x: Tensor, base: Base, delta: Delta, bias: Tensor | None, out_features: int, twin: bool
    ) -> Tensor:
        if base is None:
            y = x.new_zeros(x.shape[0], out_features)
        elif isinstance(base, QuantizedWeight):
            y = _in_pieces(x, base, bias, out_features, twin)
        else:
            y = x @ base if twin else F.linear(x, base, bias)
        if twin:
            add(y, x, delta.values[delta.order], delta.by_column)
        else:
            add(y, x, delta.values, delta.by_row)
        return y

    return serve


def _in_pieces(
    x: Tensor, base: QuantizedWeight, bias: Tensor | None, out_features: int, twin: bool
) -> Tensor:
    """The base's product, some outputs at a time: what is widened of it stays small, and each sum
    is torch's own.
    """
    y = x.new_empty(x.shape[0], out_features)
    step = max(1, PIECE_BYTES // max(1, x.shape[1] * x.element_size()))
    for start in range(0, out_features, step):
        some = slice(start, min(start + step, out_features))
        if twin:
            y[:, some] = x @ base.columns(some, x.dtype)
        else:
            y[:, some] = F.linear(x, base.rows(some, x.dtype), None if bias is None else bias[some])
    return y


@registry.implement("sparse_delta_matmul", "reference")
@_beside_torchs_product
def _reference(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    dense = values.new_zeros(y.shape[1], x.shape[1])
    dense[sparse.entry_rows, sparse.entry_cols] = values
    y += (x.to(values.dtype) @ dense.t()).to(y.dtype)


@registry.implement("sparse_delta_matmul", "torch")
@_beside_torchs_product
def _torch(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    x_used = x.index_select(1, sparse.cols).to(values.dtype)
    for rows, entries, row in sparse.row_panels():
        dense = values.new_zeros(rows.numel(), sparse.cols.numel())
        dense[row, sparse.local[entries].long()] = values[entries]
        update = (x_used @ dense.t()).add_(y.index_select(1, rows))
        y.index_copy_(1, rows.long(), update.to(y.dtype))


@registry.implement("sparse_delta_matmul", "cpu")
@_beside_torchs_product
def _cpu(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    x = _native.rows_contiguous(x)
    values = values.contiguous()
    _native.kernels().sparse_delta_matmul(
        *(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1], x.shape[0]),
        *(sparse.rows.data_ptr(), sparse.crow.data_ptr(), sparse.rows.numel()),
        *(sparse.cols.data_ptr(), sparse.local.data_ptr(), sparse.cols.numel()),
        *(values.data_ptr(), _native.dtype_code(x), torch.get_num_threads()),
    )


@registry.implement("sparse_delta_matmul", "triton", _triton.DTYPES)
def _in_triton(
    x: Tensor, base: Base, delta: Delta, bias: Tensor | None, out_features: int, twin: bool
) -> Tensor:
    weight, scales = (base.data, base.scales) if isinstance(base, QuantizedWeight) else (base, None)
    return _triton.kernels("sparse_delta_matmul").sparse_delta_matmul(
        *(_native.rows_contiguous(x), weight, scales, bias, delta.values.contiguous()),
        *(delta.by_row, delta.by_column, delta.order, out_features, twin),
    )


def _serve(
    x: Tensor,
    weight: Tensor | None,
    scales: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    csr: list[Tensor],
    csc: list[Tensor],
    out_features: int,
    twin: bool,
    backend: str | None,
) -> Tensor:
    base = weight if weight is None or scales is None else QuantizedWeight(weight, scales)
    delta = Delta(values, CompactIndices(*csr), CompactIndices(*csc[:-1]), csc[-1])
    serve = registry.resolve("sparse_delta_matmul", x.device, x.dtype, backend).function
    return serve(x, base, delta, bias, out_features, twin)


def _split(indices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Part the saved index tensors into `csr` and `csc`, which has the permutation beside."""
    size = len(CompactIndices._fields)
    return indices[:size], indices[size:]


@operation("speft::delta_matmul")
def _delta_matmul(
    x: Tensor,
    values: Tensor,
    csr: list[Tensor],
    csc: list[Tensor],
    out_features: int,
    backend: str | None,
) -> Tensor:
    return _serve(x, None, None, values, None, csr, csc, out_features, False, backend)


@_delta_matmul.register_fake
def _(x, values, csr, csc, out_features, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features)


def _save_delta(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, values, csr, csc, _, ctx.backend = inputs
    needs, ctx.in_features = ctx.needs_input_grad, x.shape[1]
    ctx.save_for_backward(x if needs[1] else None, values if needs[0] else None, *csr, *csc)


def _delta_backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, values, *indices = ctx.saved_tensors
    csr, csc = _split(indices)
    dx = d_values = None
    if ctx.needs_input_grad[0]:
        turned = _turned(values, csr, csc)
        dx = torch.ops.speft.delta_matmul(dy, *turned, ctx.in_features, ctx.backend)
    if ctx.needs_input_grad[1]:
        d_values = gradient_of_entries(dy, x, csr, ctx.backend)
    return dx, d_values, [None] * len(csr), [None] * len(csc), None, None


_delta_matmul.register_autograd(_delta_backward, setup_context=_save_delta)


@operation("speft::sparse_delta_matmul")
def _sparse_delta_matmul(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    csr: list[Tensor],
    csc: list[Tensor],
    twin: bool,
    backend: str | None,
) -> Tensor:
    out_features = _out_features(weight, scales, twin)
    return _serve(x, weight, scales, values, bias, csr, csc, out_features, twin, backend)


def _out_features(weight: Tensor, scales: Tensor | None, twin: bool) -> int:
    shape = weight.shape if scales is None else QuantizedWeight(weight, scales).shape
    return shape[1 if twin else 0]


@_sparse_delta_matmul.register_fake
def _(x, weight, scales, values, bias, csr, csc, twin, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], _out_features(weight, scales, twin))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, scales, values, _, csr, csc, ctx.twin, ctx.backend = inputs
    needs = ctx.needs_input_grad
    # A frozen layer below needs neither gradient of x nor weight: keep only what a gradient will
    # read.
    keep_x = needs[1] or needs[3]
    kept = (weight, scales, values) if needs[0] else (None, None, None)
    ctx.save_for_backward(x if keep_x else None, *kept, *csr, *csc)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, scales, values, *indices = ctx.saved_tensors
    csr, csc = _split(indices)
    dx = d_weight = d_values = d_bias = None
    needs = ctx.needs_input_grad
    if needs[0]:
        dx = torch.ops.speft.sparse_delta_matmul(
            dy, weight, scales, values, None, csr, csc, not ctx.twin, ctx.backend
        )
    # The forward twin maps [M, N] to [M, K], so the roles of its operands are exchanged.
    rows_side, cols_side = (x, dy) if ctx.twin else (dy, x)
    if needs[1]:
        d_weight = rows_side.t() @ cols_side
    if needs[3]:
        d_values = gradient_of_entries(rows_side, cols_side, csr, ctx.backend)
    if needs[4]:
        d_bias = dy.sum(0)
    no_indices = [None] * len(csr), [None] * len(csc)
    return dx, d_weight, None, d_values, d_bias, *no_indices, None, None


_sparse_delta_matmul.register_autograd(_backward, setup_context=_save)
