"""`sparse_delta_matmul`: multiply by `W + D` where D is sparse, without writing W or building `W +
D`.

    y[m, n]  = sum over k of x[m, k] * (W + D)[n, k] + b[n]
    dx[m, k] = sum over n of dy[m, n] * (W + D)[n, k]            (the input-gradient twin)

The dense part is one vendor GEMM; the sparse part is added to its result. Accumulated in float32
(float64 for float64 inputs). The sum is rounded to the input's dtype twice: after the GEMM and
after the addition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _native
from ..compact import CompactIndices
from ..pattern import SparsePattern
from ..plan import plan_of
from . import _checks, registry
from ._library import operation
from .sampled_grad import gradient_of_entries


def sparse_delta_matmul(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `x @ (W + D)^T + b`, differentiable in x, values, weight and bias.

    Args:
        x: `[..., K]`.
        weight: `[N, K]` of x's dtype; never written.
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
        _checks.check_same("bias", bias, "weight", weight)
        if tuple(bias.shape) != pattern.shape[:1]:
            raise ValueError(f"bias must have shape {pattern.shape[:1]}, got {tuple(bias.shape)}")
    y = _product(flat, weight, values, pattern, bias, False, backend)
    return y.reshape(*x.shape[:-1], pattern.shape[0])


def sparse_delta_matmul_grad_input(
    dy: Tensor,
    weight: Tensor,
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
    _check_values(flat, "x", values, pattern)
    values, csr, csc = _sorted_by_row(values, pattern)
    y = torch.ops.speft.delta_matmul(flat, values, csr, csc, pattern.shape[0], backend)
    return y.reshape(*x.shape[:-1], pattern.shape[0])


def delta_matmul_grad_input(
    dy: Tensor, values: Tensor, pattern: SparsePattern, *, backend: str | None = None
) -> Tensor:
    """Return `dy @ D`, `[..., K]` of dy's dtype: the input-gradient twin of `delta_matmul`."""
    flat = _checks.tokens_first("dy", dy, pattern.shape[0])
    _checks.check_float(dy=dy)
    _check_values(flat, "dy", values, pattern)
    values, csr, (*by_column, order) = _sorted_by_row(values, pattern)
    back = torch.argsort(order)
    dx = torch.ops.speft.delta_matmul(
        flat, values[order], by_column, [*csr, back], pattern.shape[1], backend
    )
    return dx.reshape(*dy.shape[:-1], pattern.shape[1])


def _check(flat: Tensor, name: str, weight: Tensor, values: Tensor, pattern: SparsePattern) -> None:
    _checks.check_float(**{name: flat, "weight": weight})
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
    weight: Tensor,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None,
    twin: bool,
    backend: str | None,
) -> Tensor:
    values, csr, csc = _sorted_by_row(values, pattern)
    return torch.ops.speft.sparse_delta_matmul(flat, weight, values, bias, csr, csc, twin, backend)


@registry.implement("sparse_delta_matmul", "reference")
def _reference(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    dense = values.new_zeros(y.shape[1], x.shape[1])
    dense[sparse.entry_rows, sparse.entry_cols] = values
    y += (x.to(values.dtype) @ dense.t()).to(y.dtype)


@registry.implement("sparse_delta_matmul", "torch")
def _torch(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    x_used = x.index_select(1, sparse.cols).to(values.dtype)
    for rows, entries, row in sparse.row_panels():
        dense = values.new_zeros(rows.numel(), sparse.cols.numel())
        dense[row, sparse.local[entries].long()] = values[entries]
        update = (x_used @ dense.t()).add_(y.index_select(1, rows))
        y.index_copy_(1, rows.long(), update.to(y.dtype))


@registry.implement("sparse_delta_matmul", "cpu")
def _cpu(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    x = _native.rows_contiguous(x)
    values = values.contiguous()
    _native.kernels().sparse_delta_matmul(
        *(y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1], x.shape[0]),
        *(sparse.rows.data_ptr(), sparse.crow.data_ptr(), sparse.rows.numel()),
        *(sparse.cols.data_ptr(), sparse.local.data_ptr(), sparse.cols.numel()),
        *(values.data_ptr(), _native.dtype_code(x), torch.get_num_threads()),
    )


def _add_delta(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    csr: list[Tensor],
    csc: list[Tensor],
    twin: bool,
    backend: str | None,
) -> Tensor:
    """Add the sparse product to the fresh, row-contiguous `y`; for the twin, by column and with the
    values so sorted.
    """
    serve = registry.resolve("sparse_delta_matmul", x.device, x.dtype, backend).function
    if twin:
        serve(y, x, values[csc[-1]], CompactIndices(*csc[:-1]))
    else:
        serve(y, x, values, CompactIndices(*csr))
    return y


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
    return _add_delta(x.new_zeros(x.shape[0], out_features), x, values, csr, csc, False, backend)


@_delta_matmul.register_fake
def _(x, values, csr, csc, out_features, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features)


def _save_delta(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, values, csr, csc, _, ctx.backend = inputs
    ctx.save_for_backward(x, values, *csr, *csc)


def _delta_backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, values, *indices = ctx.saved_tensors
    csr, csc = _split(indices)
    dx = d_values = None
    if ctx.needs_input_grad[0]:
        back = torch.argsort(csc[-1])
        dx = torch.ops.speft.delta_matmul(
            dy, values[csc[-1]], csc[:-1], [*csr, back], x.shape[1], ctx.backend
        )
    if ctx.needs_input_grad[1]:
        d_values = gradient_of_entries(dy, x, csr, ctx.backend)
    return dx, d_values, [None] * len(csr), [None] * len(csc), None, None


_delta_matmul.register_autograd(_delta_backward, setup_context=_save_delta)


@operation("speft::sparse_delta_matmul")
def _sparse_delta_matmul(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    csr: list[Tensor],
    csc: list[Tensor],
    twin: bool,
    backend: str | None,
) -> Tensor:
    base = x @ weight if twin else F.linear(x, weight, bias)
    return _add_delta(base, x, values, csr, csc, twin, backend)


@_sparse_delta_matmul.register_fake
def _(x, weight, values, bias, csr, csc, twin, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[1] if twin else weight.shape[0])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, values, _, csr, csc, ctx.twin, ctx.backend = inputs
    needs = ctx.needs_input_grad
    # A frozen layer below needs neither gradient of x nor weight: keep only what a gradient will
    # read.
    keep_x = needs[1] or needs[2]
    keep_weight = needs[0]
    ctx.save_for_backward(
        x if keep_x else None, weight if keep_weight else None, values, *csr, *csc
    )


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, values, *indices = ctx.saved_tensors
    csr, csc = _split(indices)
    dx = d_weight = d_values = d_bias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.speft.sparse_delta_matmul(
            dy, weight, values, None, csr, csc, not ctx.twin, ctx.backend
        )
    # The forward twin maps [M, N] to [M, K], so the roles of its operands are exchanged.
    rows_side, cols_side = (x, dy) if ctx.twin else (dy, x)
    if ctx.needs_input_grad[1]:
        d_weight = rows_side.t() @ cols_side
    if ctx.needs_input_grad[2]:
        d_values = gradient_of_entries(rows_side, cols_side, csr, ctx.backend)
    if ctx.needs_input_grad[3]:
        d_bias = dy.sum(0)
    return dx, d_weight, d_values, d_bias, [None] * len(csr), [None] * len(csc), None, None


_sparse_delta_matmul.register_autograd(_backward, setup_context=_save)
