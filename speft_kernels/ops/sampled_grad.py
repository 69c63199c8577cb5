"""`sampled_grad`: the gradient of a weight, computed only at the entries of a pattern (an SDDMM).

    dv[e] = sum over m of dy[m, row_e] * x[m, col_e]

Accumulated in float32 (float64 for float64 inputs). No buffer of `N * K` elements exists at any
density: the compiled kernel keeps one block of tokens of the used rows and columns, the torch
backend one panel of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..pattern import SparsePattern
from ..plan import CompactIndices, SparsityPlan, plan_of
from . import _checks, registry
from ._library import operation


def sampled_grad(
    dy: Tensor,
    x: Tensor,
    pattern: SparsePattern,
    *,
    plan: SparsityPlan | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return `dv [nnz]`: `dy^T @ x` at the entries of `pattern`.

    Args:
        dy: `[..., N]`, the gradient of the layer's output.
        x: `[..., K]`, the layer's input, of dy's dtype; or `[..., plan.kept_width]`, what
            `plan.keep` kept of it.
        plan: the compiled pattern; by default the one cached with the pattern.
        out: `[nnz]` of the accumulator's dtype, written in place and returned.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        `[nnz]` float32 (float64 for float64 inputs), in the pattern's order.

    Raises:
        ValueError: shapes or devices do not fit; the pattern is made of blocks (use `block_grad`).
        TypeError: dtypes do not fit.
        BackendError: the backend that was asked for cannot serve the call.
    """
    if pattern.is_block:
        raise ValueError(
            f"the pattern has blocks of {pattern.block_shape}; sampled_grad serves single "
            "entries, use block_grad"
        )
    _checks.check_float(dy=dy, x=x)
    _checks.check_same("dy", dy, "x", x)
    _checks.check_pattern_device(pattern, "dy", dy)
    plan = plan_of(pattern) if plan is None else plan
    if plan.pattern is not pattern and plan.pattern != pattern:
        raise ValueError(f"the plan was built for another pattern: {plan.pattern}, not {pattern}")
    dy = _checks.tokens_first("dy", dy, pattern.shape[0])
    kept = x.shape[-1:] == (plan.kept_width,)
    x = _checks.tokens_first("x", x, plan.kept_width if kept else pattern.shape[1])
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy has {dy.shape[0]} tokens and x has {x.shape[0]}")
    csr = list(plan.kept_csr if kept else plan.csr)
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs the buffer to accumulate into: pass out=")
        return torch.ops.speft.sampled_grad(dy, x, csr, backend)
    _check_out(out, (pattern.nnz,), dy, x)
    torch.ops.speft.sampled_grad_(dy, x, csr, out, accumulate, backend)
    return out


def _check_out(out: Tensor, shape: tuple[int, ...], dy: Tensor, x: Tensor) -> None:
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
        raise ValueError("out= cannot carry a gradient, and dy or x requires one: leave it out")
    dtype = _checks.accumulator_dtype(dy.dtype)
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {dtype} tensor of shape {shape}, got {out.dtype} of shape "
            f"{tuple(out.shape)}"
        )
    _checks.check_device("out", out, "dy", dy)


@registry.implement("sampled_grad", "reference")
def _reference(dy: Tensor, x: Tensor, csr: CompactIndices, out: Tensor, accumulate: bool) -> None:
    acc = out.dtype
    dense = dy.to(acc).t() @ x.to(acc)
    values = dense[csr.entry_rows, csr.entry_cols]
    out.copy_(out + values if accumulate else values)


@registry.implement("sampled_grad", "torch")
def _torch(dy: Tensor, x: Tensor, csr: CompactIndices, out: Tensor, accumulate: bool) -> None:
    # Products accumulate in float32 inside the GEMM, but its result has the operands' dtype: widen
    # them first, on the used rows and columns alone.
    x_used = x.index_select(1, csr.cols).to(out.dtype)
    for rows, entries, row in csr.row_panels():
        product = _product(dy.index_select(1, rows).to(out.dtype), x_used)
        values = product[row, csr.local[entries].long()]
        if accumulate:
            out[entries] += values
        else:
            out[entries] = values


def _product(dy: Tensor, x: Tensor) -> Tensor:
    """`dy^T @ x`. Products of one column go to BLAS's gemv or dot, which may sum the tokens one
    after the other in float32; torch's own sum is pairwise and an order of magnitude closer.
    """
    if 1 in (dy.shape[1], x.shape[1]):
        return (dy.unsqueeze(2) * x.unsqueeze(1)).sum(0)
    return dy.t() @ x


@registry.implement("sampled_grad", "cpu")
def _cpu(dy: Tensor, x: Tensor, csr: CompactIndices, out: Tensor, accumulate: bool) -> None:
    dy, x = _native.rows_contiguous(dy), _native.rows_contiguous(x)
    _native.kernels().sampled_grad(
        *(dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), dy.shape[0]),
        *(csr.rows.data_ptr(), csr.crow.data_ptr(), csr.rows.numel()),
        *(csr.cols.data_ptr(), csr.local.data_ptr(), csr.cols.numel()),
        *(out.data_ptr(), accumulate, _native.dtype_code(dy), torch.get_num_threads()),
    )


@operation("speft::sampled_grad_", mutates=["out"])
def _sampled_grad_out(
    dy: Tensor, x: Tensor, csr: list[Tensor], out: Tensor, accumulate: bool, backend: str | None
) -> None:
    serve = registry.resolve("sampled_grad", dy.device, dy.dtype, backend).function
    serve(dy, x, CompactIndices(*csr), out, accumulate)


@_sampled_grad_out.register_fake
def _(dy, x, csr, out, accumulate, backend):  # type: ignore[no-untyped-def]
    return None


def _allocate(dy: Tensor, csr: list[Tensor]) -> Tensor:
    return dy.new_empty(csr[3].shape, dtype=_checks.accumulator_dtype(dy.dtype))


@operation("speft::sampled_grad")
def _sampled_grad(dy: Tensor, x: Tensor, csr: list[Tensor], backend: str | None) -> Tensor:
    out = _allocate(dy, csr)
    serve = registry.resolve("sampled_grad", dy.device, dy.dtype, backend).function
    serve(dy, x, CompactIndices(*csr), out, False)
    return out


@_sampled_grad.register_fake
def _(dy, x, csr, backend):  # type: ignore[no-untyped-def]
    return _allocate(dy, csr)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dy, x, csr, ctx.backend = inputs
    ctx.save_for_backward(dy, x, *csr)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    # dv is bilinear: its gradient to dy is x times the sparse matrix of `grad`, and to x the twin.
    dy, x, *csr = ctx.saved_tensors
    sparse = CompactIndices(*csr)
    by_column, order = sparse.transpose()
    product = torch.ops.speft.delta_matmul
    d_dy = d_x = None
    if ctx.needs_input_grad[0]:
        d_dy = product(x, grad, list(sparse), [*by_column, order], dy.shape[1], ctx.backend)
    if ctx.needs_input_grad[1]:
        back = torch.argsort(order)
        d_x = product(dy, grad[order], list(by_column), [*sparse, back], x.shape[1], ctx.backend)
    return d_dy, d_x, [None] * len(csr), None


_sampled_grad.register_autograd(_backward, setup_context=_save)
