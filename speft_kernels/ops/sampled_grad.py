"""`sampled_grad`: the gradient of a weight, computed only at the entries of a pattern (an SDDMM).

    dv[e] = sum over m of dy[m, row_e] * x[m, col_e]

Accumulated in float32 (float64 for float64 inputs). No buffer of `N * K` elements exists at any
density up to 25 %: the compiled kernel keeps a block of tokens of the used rows and columns, and
what a panel or the torch backend makes dense is a bounded piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import _cuda_native, _native, _triton
from ..compact import CompactIndices
from ..dtypes import accumulator_dtype
from ..parts import Parts, gathered
from ..pattern import SparsePattern
from ..plan import TOKEN_STEP, SparsityPlan, most_tokens
from ..row_panels import RowPanels
from ..strips import Strips, gathered_strips
from ..thin_strips import ThinStrips, build_thin_strips
from ..tiles import Tiles
from . import _checks, registry, wide
from ._library import is_plain, operation, refuse_tangents
from .keep_columns import in_cuda as keep_columns_in_cuda
from .keep_columns import unpack
from .panels import add_panels, columns_of

# Elements that the torch backend copies of used columns at a time, and of either operand widens:
# 64 and 16 MB in float32.
USED_COPY_ELEMENTS, WIDENED_ELEMENTS = 1 << 24, 1 << 22


def sampled_grad(
    dy: Tensor,
    x: Tensor,
    pattern: SparsePattern,
    *,
    plan: SparsityPlan | None = None,
    packed: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return `dv [nnz]`: `dy^T @ x` at the entries of `pattern`, differentiable in dy and x unless
    x is packed.

    Args:
        dy: `[..., N]`, the gradient of the layer's output.
        x: `[..., K]`, the layer's input, of dy's dtype; or what `keep_columns(x, plan)` kept of it.
        plan: the compiled pattern; by default the one cached with the pattern.
        packed: x comes from `keep_columns` with this plan.
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
    refuse_tangents("sampled_grad", dy, x)
    dy, plan = _checks.gradient_operands(dy, x, pattern, plan)
    width = plan.block_tokens(dy.shape[0])
    packed = packed and plan.kept_columns is not None
    if packed:
        _check_packed(x, dy.shape[0], plan)
    else:
        x = _checks.tokens_of_both(dy, x, pattern.shape[1])
    serve = registry.resolve("sampled_grad", dy.device, dy.dtype, backend)
    parts = plan.compiled(serve.form, packed)
    needs_grad = torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad)
    if out is None and not needs_grad and is_plain(dy) and is_plain(x) and not accumulate:
        out = _allocate(dy, pattern.nnz)
        serve.function(dy, x, parts, width, out, False)
        return out
    if out is None and not accumulate:
        return torch.ops.speft.sampled_grad(dy, x, list(parts), pattern.nnz, width, backend)
    out = _checks.gradient_out(out, (pattern.nnz,), dy, x)
    torch.ops.speft.sampled_grad_(dy, x, list(parts), width, out, accumulate, backend)
    return out


def add_sampled_grad(
    dy: Tensor, x: Tensor, plan: SparsityPlan, out: Tensor, accumulate: bool
) -> None:
    """`sampled_grad` into `out` for a caller that has made its arguments itself: dy `[M, N]`, and x
    as `keep_columns(x, plan)` gave it. Carries no gradient.

    Raises:
        ValueError, TypeError: x is not what was kept: hooks on saved tensors may return anything.
    """
    _checks.check_same("dy", dy, "the kept activations", x)
    if plan.kept_columns is None:
        x = _checks.tokens_of_both(dy, x, plan.pattern.shape[1])
    else:
        _check_packed(x, dy.shape[0], plan)
    serve = registry.resolve("sampled_grad", dy.device, dy.dtype)
    parts = plan.compiled(serve.form, x.dim() == 3)
    width = plan.block_tokens(dy.shape[0])
    if is_plain(dy) and is_plain(x):
        serve.function(dy, x, parts, width, out, accumulate)
    else:
        torch.ops.speft.sampled_grad_(dy, x, list(parts), width, out, accumulate, None)


def _check_packed(x: Tensor, tokens: int, plan: SparsityPlan) -> None:
    width = plan.block_tokens(tokens)
    shape = (-(-tokens // width), plan.kept_width, width)
    if tuple(x.shape) != shape:
        raise ValueError(
            f"the packed x of {tokens} tokens must have shape {shape}, got {tuple(x.shape)}"
        )


def gradient_of_entries(
    dy: Tensor, x: Tensor, csr: list[Tensor], strips: list[Tensor], backend: str | None
) -> Tensor:
    """`dy^T @ x` at the entries of a CompactIndices, in its order: for gradients of products with a
    sparse matrix.

    Args:
        strips: the tensors of the entries' ThinStrips for a backend that reads those, from a plan;
            empty, they are made here, for which the device is asked how many there are.
    """
    form = registry.resolve("sampled_grad", dy.device, dy.dtype, backend).form
    compact = CompactIndices(*csr)
    nnz = compact.local.shape[0]
    if form is RowPanels:
        strips = list(RowPanels.build(compact, x.shape[1]))
    elif form is not ThinStrips:
        strips = list((gathered_strips if form is Strips else gathered)(compact))
    elif not strips:
        rows, cols = compact.entry_rows, compact.entry_cols
        strips = list(build_thin_strips(rows, cols, None, x.shape[1], None))
    width = most_tokens(compact.cols.numel())
    return torch.ops.speft.sampled_grad(dy, x, strips, nnz, width, backend)


# An implementation is called with dy [M, N]; x [M, K], or packed [B, C, T]; the entries in its form
# for the one or the other; the tokens of a block; out [nnz]; and whether to add to it.


@registry.implement("sampled_grad", "reference", form=Parts)
def _reference(
    dy: Tensor, x: Tensor, parts: Parts, width: int, out: Tensor, accumulate: bool
) -> None:
    operand = unpack(x, dy.shape[0]) if x.dim() == 3 else x
    dense = dy.to(out.dtype).t() @ operand.to(out.dtype)
    if not accumulate:
        out.zero_()
    for row, position, slot in parts.each_entry(*dense.shape):
        out[slot] += dense[row, position]


@registry.implement("sampled_grad", "torch", form=RowPanels)
def _torch(
    dy: Tensor, x: Tensor, panels: RowPanels, width: int, out: Tensor, accumulate: bool
) -> None:
    if not accumulate:
        out.zero_()
    for some, used in _used_columns(x, panels, dy.shape[0]):
        for first, last, begin, end in panels.panels.tolist():
            if begin < end:
                rows = dy[some, first:last]
                if panels.rows.numel():
                    rows = dy[some].index_select(1, panels.rows[first:last])
                product = _product(rows, used, out.dtype)
                out[begin:end] += product.view(-1).index_select(0, panels.at[begin:end])


def _used_columns(x: Tensor, panels: RowPanels, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield tokens, and `[C, tokens]`, what is multiplied of them of x `[M, K]` or of its packed
    columns `[B, C, T]`: all at once, but where that or the rows of dy are copied.
    """
    positions, rows = panels.positions, panels.rows.numel()
    every = positions.numel() == 0
    if every and not rows and (x.dim() == 2 or x.shape[0] == 1):
        yield slice(0, tokens), x.t() if x.dim() == 2 else x[0, :, :tokens]
        return
    step = max(1, USED_COPY_ELEMENTS // max(rows, x.shape[1] if every else positions.numel(), 1))
    for start in range(0, tokens, step):
        some = slice(start, min(start + step, tokens))
        yield some, columns_of(x, None if every else positions, some)


def _product(dy: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """`dy^T @ used^T` `[R, C]` in `dtype`, for dy `[M, R]` and used `[C, M]`."""
    rows, columns = dy.shape[1], used.shape[0]
    # Products of one line go to BLAS's gemv or dot on a CPU, which may sum the tokens one after the
    # other in float32; torch's own sum is pairwise and an order of magnitude closer.
    thin = 1 in (rows, columns)
    if wide.served(dy) or (dy.dtype == dtype and not thin):
        return wide.mm(dy.t(), used.t(), dtype)
    product = dy.new_zeros(rows, columns, dtype=dtype)
    step = max(1, WIDENED_ELEMENTS // max(rows, columns))
    for left, right in zip(dy.split(step), used.split(step, 1), strict=True):
        left, right = left.to(dtype), right.to(dtype)
        if thin:
            product += (left.unsqueeze(2) * right.t().unsqueeze(1)).sum(0)
        else:
            product.addmm_(left.t(), right.t())
    return product


@registry.implement("sampled_grad", "cpu", form=Parts)
def _cpu(dy: Tensor, x: Tensor, parts: Parts, width: int, out: Tensor, accumulate: bool) -> None:
    if parts.has_panels:
        if not accumulate:
            out.zero_()
            accumulate = True
        add_panels(dy, x, parts, out)
    dy, x = _native.rows_contiguous(dy), _contiguous(x)
    _native.kernels().sampled_grad(
        *(dy.data_ptr(), dy.stride(0), dy.shape[1], x.data_ptr(), x.stride(0), x.shape[1]),
        *(x.dim() == 3, dy.shape[0], width, parts.native, out.data_ptr(), accumulate),
        *(_native.dtype_code(dy), torch.get_num_threads()),
    )


def _contiguous(x: Tensor) -> Tensor:
    """Whole activations with contiguous rows, or packed ones as `keep_columns` laid them out."""
    return x.contiguous() if x.dim() == 3 else _native.rows_contiguous(x)


@registry.implement("sampled_grad", "triton", _triton.DTYPES, form=Strips)
def _in_triton(
    dy: Tensor, x: Tensor, strips: Strips, width: int, out: Tensor, accumulate: bool
) -> None:
    dy, x = _native.rows_contiguous(dy), _contiguous(x)
    _triton.kernels("sampled_grad").sampled_grad(dy, x, strips, out, accumulate)


# Tokens that the kernel takes at a time (csrc/cuda/sampled_grad.cu).
_STRETCH = 32
# Elements of packed x, 64 GB, which it counts eight at a time in 32 bits.
_MOST = 1 << 35


def _in_cuda(
    backend: str,
    dy: Tensor,
    x: Tensor,
    strips: ThinStrips,
    width: int,
    out: Tensor,
    accumulate: bool,
) -> None:
    dy, nnz, tiles = _native.rows_contiguous(dy), out.numel(), strips.tile_block.numel()
    if x.dim() == 2:
        tokens = -(-x.shape[0] // TOKEN_STEP) * TOKEN_STEP
        packed = x.new_empty(1, strips.columns.numel(), tokens)
        keep_columns_in_cuda(backend, x, strips.columns, packed)
        x = packed
    lines = _lines(x)
    if lines.numel() > _MOST:
        raise ValueError(f"packed x of {lines.numel()} elements: the kernel takes {_MOST} at most")
    splits = _cuda_native.splits(tiles, dy.shape[0], _STRETCH, nnz, dy.device)
    scratch = out.new_empty(splits, nnz) if splits > 1 else None
    _cuda_native.launch(
        *(backend, "sampled_grad", dy),
        *(dy.data_ptr(), dy.stride(0), dy.shape[1], lines.data_ptr(), lines.stride(0)),
        *(dy.shape[0], strips.tile_block.data_ptr(), strips.tile_lines.data_ptr()),
        *(strips.tile_groups.data_ptr(), strips.tile_entries.data_ptr(), tiles),
        *(strips.line.data_ptr(), strips.group_rows.data_ptr(), strips.strip_line.data_ptr()),
        *(strips.at.data_ptr(), strips.slot.data_ptr(), nnz),
        *(out.data_ptr(), accumulate, 0 if scratch is None else scratch.data_ptr(), splits),
        _native.dtype_code(dy),
    )


def _lines(packed: Tensor) -> Tensor:
    """`[B, C, T]` as lines over all tokens, read 16 bytes at a time; a plan made for a GPU has them
    in one block.
    """
    lines = packed[0] if packed.shape[0] == 1 else packed.transpose(0, 1).flatten(1)
    whole = lines.is_contiguous() and lines.data_ptr() % 16 == 0
    return lines if whole else lines.clone(memory_format=torch.contiguous_format)


for _backend in _cuda_native.MODULES:
    registry.implement("sampled_grad", _backend, _cuda_native.DTYPES, form=ThinStrips)(
        partial(_in_cuda, _backend)
    )


@operation("speft::sampled_grad_", mutates=["out"])
def _sampled_grad_out(
    dy: Tensor,
    x: Tensor,
    parts: list[Tensor],
    width: int,
    out: Tensor,
    accumulate: bool,
    backend: str | None,
) -> None:
    serve = registry.resolve("sampled_grad", dy.device, dy.dtype, backend)
    serve.function(dy, x, serve.form(*parts), width, out, accumulate)


@_sampled_grad_out.register_fake
def _(dy, x, parts, width, out, accumulate, backend):  # type: ignore[no-untyped-def]
    return None


def _allocate(dy: Tensor, nnz: int) -> Tensor:
    return dy.new_empty(nnz, dtype=accumulator_dtype(dy.dtype))


@operation("speft::sampled_grad")
def _sampled_grad(
    dy: Tensor, x: Tensor, parts: list[Tensor], nnz: int, width: int, backend: str | None
) -> Tensor:
    out = _allocate(dy, nnz)
    serve = registry.resolve("sampled_grad", dy.device, dy.dtype, backend)
    serve.function(dy, x, serve.form(*parts), width, out, False)
    return out


@_sampled_grad.register_fake
def _(dy, x, parts, nnz, width, backend):  # type: ignore[no-untyped-def]
    return _allocate(dy, nnz)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dy, x, parts, _, _, ctx.backend = inputs
    ctx.save_for_backward(dy, x, *parts)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    # dv is bilinear: its gradient to dy is x times the sparse matrix of `grad`, and to x the twin.
    dy, x, *parts = ctx.saved_tensors
    if x.dim() == 3:
        raise RuntimeError("sampled_grad is not differentiable where x is packed: pass x whole")
    form = registry.resolve("sampled_grad", dy.device, dy.dtype, ctx.backend).form
    rows, cols, slots = (
        torch.cat(some)
        for some in zip(*form(*parts).each_entry(dy.shape[1], x.shape[1]), strict=True)
    )
    order = torch.argsort(slots)
    sparse = CompactIndices.build(rows[order], cols[order], dy.shape[1])
    by_column, order = sparse.transpose(x.shape[1])
    multiply = registry.resolve("sparse_delta_matmul", dy.device, dy.dtype, ctx.backend)
    tiles = list(Tiles.build(sparse, x.shape[1])) if multiply.form is Tiles else []
    # Whole activations and values sorted by row: the strips that this call was given serve, too.
    indices = list(sparse), [*by_column, order], tiles, parts if form is ThinStrips else []
    product = torch.ops.speft.sparse_delta_matmul
    d_dy = d_x = None
    if ctx.needs_input_grad[0]:
        d_dy = product(x, None, None, grad, None, *indices, dy.shape[1], False, ctx.backend)
    if ctx.needs_input_grad[1]:
        d_x = product(dy, None, None, grad, None, *indices, x.shape[1], True, ctx.backend)
    return d_dy, d_x, [None] * len(parts), None, None, None


_sampled_grad.register_autograd(_backward, setup_context=_save)
