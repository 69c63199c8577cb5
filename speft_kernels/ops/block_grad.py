"""`block_grad`: the gradient of a weight, computed only in the blocks of a pattern.

    dV[b] = dy[:, rows_b]^T @ x[:, cols_b]

Accumulated in float32 (float64 for float64 inputs), into an existing buffer across micro-batches
where asked.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _cuda_native, _native, _triton
from ..dtypes import accumulator_dtype
from ..pattern import SparsePattern
from ..plan import SparsityPlan
from . import _checks, registry, wide
from ._library import operation, refuse_tangents
from .keep_columns import unpack

# Elements that the torch backend gathers at a time, of dy and of x together: 64 MB in float32.
GATHER_ELEMENTS = 1 << 24


def block_grad(
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
    """Return `dV [num_blocks, bh, bw]`: `dy^T @ x` in the blocks of `pattern`.

    Args:
        dy: `[..., N]`, the gradient of the layer's output.
        x: `[..., K]`, the layer's input, of dy's dtype; or what `keep_columns(x, plan)` kept of it.
        plan: the compiled pattern; by default the one cached with the pattern.
        packed: x comes from `keep_columns` with this plan.
        out: `[num_blocks, bh, bw]` of the accumulator's dtype, written in place and returned.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        `[num_blocks, bh, bw]` float32 (float64 for float64 inputs). Blocks of (1, 1) are served
        too.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes do not fit.
        BackendError: the backend that was asked for cannot serve the call.
    """
    refuse_tangents("block_grad", dy, x)
    dy, plan = _checks.gradient_operands(dy, x, pattern, plan)
    if packed and x.dim() == 3 and not pattern.is_block:
        x = unpack(x, dy.shape[0])  # of single entries columns are kept as lines
    x = _checks.tokens_of_both(dy, x, plan.kept_width if packed else pattern.shape[1])
    bh, bw = pattern.block_shape
    cols = plan.kept_block_cols if packed else pattern.block_cols
    where = (pattern.block_rows, cols)
    if out is None and not accumulate:
        return torch.ops.speft.block_grad(dy, x, *where, bh, bw, backend)
    out = _checks.gradient_out(out, (pattern.num_blocks, bh, bw), dy, x)
    torch.ops.speft.block_grad_(dy, x, *where, out, accumulate, backend)
    return out


def _blocks(tensor: Tensor, size: int, which: Tensor) -> Tensor:
    """`[M, width]` -> `[M, b, size]`: the named groups of `size` neighbouring columns."""
    return tensor.reshape(tensor.shape[0], tensor.shape[1] // size, size).index_select(1, which)


@registry.implement("block_grad", "reference")
def _reference(
    dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, out: Tensor, accumulate: bool
) -> None:
    dense = dy.to(out.dtype).t() @ x.to(out.dtype)
    bh, bw = out.shape[1:]
    tiles = dense.reshape(dense.shape[0] // bh, bh, dense.shape[1] // bw, bw)
    values = tiles[rows.long(), :, cols.long(), :]
    out.copy_(out + values if accumulate else values)


@registry.implement("block_grad", "torch")
def _torch(
    dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, out: Tensor, accumulate: bool
) -> None:
    bh, bw = out.shape[1:]
    step = max(1, GATHER_ELEMENTS // max(1, dy.shape[0] * (bh + bw)))
    for start in range(0, out.shape[0], step):
        part = slice(start, start + step)
        product = _product(_blocks(dy, bh, rows[part]), _blocks(x, bw, cols[part]), out.dtype)
        if accumulate:
            out[part] += product
        else:
            out[part] = product


def _product(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[M, b, bh]` and `[M, b, bw]` -> `[b, bh, bw]` of `dtype`; on a CPU for blocks of one row or
    column as a pairwise sum, see sampled_grad.
    """
    if not wide.served(dy):
        dy, x = dy.to(dtype), x.to(dtype)
        if 1 in (dy.shape[2], x.shape[2]):
            return (dy.unsqueeze(3) * x.unsqueeze(2)).sum(0)
    return wide.bmm(dy.permute(1, 2, 0), x.transpose(0, 1), dtype)


@registry.implement("block_grad", "cpu")
def _cpu(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, out: Tensor, accumulate: bool) -> None:
    dy, x = _native.rows_contiguous(dy), _native.rows_contiguous(x)
    _native.kernels().block_grad(
        *(dy.data_ptr(), dy.stride(0), dy.shape[1], x.data_ptr(), x.stride(0), x.shape[1]),
        *(dy.shape[0], rows.data_ptr(), cols.data_ptr(), rows.numel()),
        *(out.shape[1], out.shape[2], out.data_ptr(), accumulate),
        *(_native.dtype_code(dy), torch.get_num_threads()),
    )


@registry.implement("block_grad", "triton", _triton.DTYPES)
def _in_triton(
    dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, out: Tensor, accumulate: bool
) -> None:
    dy, x = _native.rows_contiguous(dy), _native.rows_contiguous(x)
    _triton.kernels("block_grad").block_grad(dy, x, rows, cols, out, accumulate)


# Tokens that the kernel brings to shared memory at a time, and the sides of the tiles that it cuts
# blocks into (csrc/cuda/block_grad.cu).
_STRETCH = 64
_TILE = 64


def _in_cuda(
    backend: str,
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    cols: Tensor,
    out: Tensor,
    accumulate: bool,
) -> None:
    dy, x = _native.rows_contiguous(dy), _native.rows_contiguous(x)
    bh, bw = out.shape[1:]
    tiles = rows.numel() * -(-bh // _TILE) * -(-bw // _TILE)
    # Whole tiles have registers for two. Of smaller ones four ask for all that L2 gives.
    resident = 4 if min(bh, bw) <= 16 or max(bh, bw) <= 32 else 2
    splits = _cuda_native.splits(tiles, dy.shape[0], _STRETCH, out.numel(), dy.device, resident)
    scratch = out.new_empty(splits, *out.shape) if splits > 1 else None
    _cuda_native.launch(
        *(backend, "block_grad", dy),
        *(dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0)),
        *(dy.shape[0], rows.data_ptr(), cols.data_ptr(), rows.numel()),
        *(bh, bw, out.data_ptr(), accumulate),
        *(0 if scratch is None else scratch.data_ptr(), splits),
        _native.dtype_code(dy),
    )


for _backend in _cuda_native.MODULES:
    registry.implement("block_grad", _backend, _cuda_native.DTYPES)(partial(_in_cuda, _backend))


@operation("speft::block_grad_", mutates=["out"])
def _block_grad_out(
    dy: Tensor,
    x: Tensor,
    rows: Tensor,
    cols: Tensor,
    out: Tensor,
    accumulate: bool,
    backend: str | None,
) -> None:
    serve = registry.resolve("block_grad", dy.device, dy.dtype, backend).function
    serve(dy, x, rows, cols, out, accumulate)


@_block_grad_out.register_fake
def _(dy, x, rows, cols, out, accumulate, backend):  # type: ignore[no-untyped-def]
    return None


def _allocate(dy: Tensor, rows: Tensor, bh: int, bw: int) -> Tensor:
    return dy.new_empty((rows.shape[0], bh, bw), dtype=accumulator_dtype(dy.dtype))


@operation("speft::block_grad")
def _block_grad(
    dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, bh: int, bw: int, backend: str | None
) -> Tensor:
    out = _allocate(dy, rows, bh, bw)
    serve = registry.resolve("block_grad", dy.device, dy.dtype, backend).function
    serve(dy, x, rows, cols, out, False)
    return out


@_block_grad.register_fake
def _(dy, x, rows, cols, bh, bw, backend):  # type: ignore[no-untyped-def]
    return _allocate(dy, rows, bh, bw)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dy, x, rows, cols, ctx.bh, ctx.bw, _ = inputs
    ctx.save_for_backward(dy, x, rows, cols)


def _spread(blocks: Tensor, size: int, which: Tensor, like: Tensor) -> Tensor:
    """Add `[M, b, size]` into the groups of columns they were taken from: the inverse of
    `_blocks`.
    """
    total = blocks.new_zeros(like.shape[0], like.shape[1] // size, size)
    return total.index_add(1, which.long(), blocks).reshape(like.shape).to(like.dtype)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    dy, x, rows, cols = ctx.saved_tensors
    d_dy = d_x = None
    if ctx.needs_input_grad[0]:
        x_blocks = _blocks(x, ctx.bw, cols).to(grad.dtype)
        d_dy = _spread(torch.einsum("mbj,bij->mbi", x_blocks, grad), ctx.bh, rows, dy)
    if ctx.needs_input_grad[1]:
        dy_blocks = _blocks(dy, ctx.bh, rows).to(grad.dtype)
        d_x = _spread(torch.einsum("mbi,bij->mbj", dy_blocks, grad), ctx.bw, cols, x)
    return d_dy, d_x, None, None, None, None, None


_block_grad.register_autograd(_backward, setup_context=_save)
