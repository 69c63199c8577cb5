"""`sparse_delta_matmul`: multiply by `W + D` where D is sparse, without writing W.

    y[m, n]  = sum over k of x[m, k] * (W + D)[n, k] + b[n]
    dx[m, k] = sum over n of dy[m, n] * (W + D)[n, k]            (the input-gradient twin)

W is a matrix or a `QuantizedWeight`. Accumulated in float32 (float64 for float64 inputs). The CPU's
kernel adds the sparse part to the vendor's GEMM, and rounds twice: after the one and the other. The
other backends do so with few tokens, or add it to unrounded sums; many are multiplied by W + D
rounded to x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _cuda_native, _native, _triton
from ..compact import CompactIndices
from ..costs import costs_of
from ..dtypes import accumulator_dtype
from ..pattern import SparsePattern
from ..plan import plan_of
from ..quantized import QuantizedWeight
from ..thin_strips import ThinStrips
from ..tiles import Tiles
from . import _checks, registry
from ._library import holds_its_numbers, is_plain, operation, refuse_tangents
from .dense_pieces import add_delta, by_effective_weight, quantized_product
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
    return _checks.tokens_as_in(x, y)


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
    return _checks.tokens_as_in(dy, dx)


def delta_matmul(
    x: Tensor, values: Tensor, pattern: SparsePattern, *, backend: str | None = None
) -> Tensor:
    """Return `x @ D^T` alone, `[..., N]` of x's dtype, for a base that is no plain matrix;
    differentiable in both.
    """
    flat = _checks.tokens_first("x", x, pattern.shape[1])
    _check(flat, "x", None, values, pattern)
    y = _product(flat, None, values, pattern, None, False, backend)
    return _checks.tokens_as_in(x, y)


def delta_matmul_grad_input(
    dy: Tensor, values: Tensor, pattern: SparsePattern, *, backend: str | None = None
) -> Tensor:
    """Return `dy @ D`, `[..., K]` of dy's dtype: the input-gradient twin of `delta_matmul`."""
    flat = _checks.tokens_first("dy", dy, pattern.shape[0])
    _check(flat, "dy", None, values, pattern)
    dx = _product(flat, None, values, pattern, None, True, backend)
    return _checks.tokens_as_in(dy, dx)


def _check(flat: Tensor, name: str, weight: Base, values: Tensor, pattern: SparsePattern) -> None:
    _checks.check_float(**{name: flat})
    if isinstance(weight, QuantizedWeight):
        if weight.scales.dtype not in (flat.dtype, torch.float32):
            raise TypeError(
                f"the scales must be {flat.dtype} or torch.float32 beside {flat.dtype} {name}, got "
                f"{weight.scales.dtype}"
            )
        _checks.check_device("the quantized weight", weight.scales, name, flat)
    elif weight is not None:
        _checks.check_float(weight=weight)
        _checks.check_same(name, flat, "weight", weight)
    if weight is not None and tuple(weight.shape) != pattern.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, the pattern is for {pattern.shape}"
        )
    if tuple(values.shape) != pattern.values_shape:
        raise ValueError(
            f"values must have shape {pattern.values_shape}, got {tuple(values.shape)}"
        )
    dtype = accumulator_dtype(flat.dtype)
    if values.dtype != dtype:
        raise TypeError(f"values must be {dtype} beside {flat.dtype} {name}, got {values.dtype}")
    _checks.check_device("values", values, name, flat)
    _checks.check_pattern_device(pattern, name, flat)


# Tokens up to which the torch backend multiplies D by itself, in float32: on an H200 the products
# take less time than writing W + D does.
TORCH_FEW_TOKENS = 128

# The entries of D as an operation takes them: by row; by column, with the permutation; by tile,
# empty where the backend reads no tiles; and by thin strip, for the gradient of the values, empty
# where none is asked for or the backend reads none.
Indices = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def delta_arguments(
    values: Tensor, pattern: SparsePattern, x: Tensor, base: Base, backend: str | None
) -> tuple[Tensor, Indices]:
    """Return the values sorted by (row, column), and the indices, as the operations of this backend
    take them.
    """
    plan = plan_of(pattern)
    by_column, order = plan.csc
    values = values.reshape(-1)
    if plan.row_order is not None:
        # Advanced indexing takes three times as long.
        values = values.index_select(0, plan.row_order)
    tiles: list[Tensor] = []
    if registry.resolve("sparse_delta_matmul", x.device, x.dtype, backend).form is Tiles:
        quarters = isinstance(base, QuantizedWeight) and base.bits == 4
        tiles = list(plan.tiles_of_quarters if quarters else plan.tiles)
    strips: list[Tensor] = []
    if torch.is_grad_enabled() and values.requires_grad and _reads_thin_strips(x, backend):
        strips = list(plan.thin_strips_by_row)
    return values, (list(plan.csr), [*by_column, order], tiles, strips)


def _reads_thin_strips(x: Tensor, backend: str | None) -> bool:
    return registry.resolve("sampled_grad", x.device, x.dtype, backend).form is ThinStrips


def _product(
    flat: Tensor,
    weight: Base,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None,
    twin: bool,
    backend: str | None,
) -> Tensor:
    refuse_tangents("sparse_delta_matmul", flat, weight, values, bias)
    values, indices = delta_arguments(values, pattern, flat, weight, backend)
    data, scales = (
        (weight.data, weight.scales) if isinstance(weight, QuantizedWeight) else (weight, None)
    )
    out_features = pattern.shape[1 if twin else 0]
    if _past_the_dispatcher(flat, data, values, bias):
        return _serve(flat, data, scales, values, bias, *indices[:3], out_features, twin, backend)
    return torch.ops.speft.sparse_delta_matmul(
        flat, data, scales, values, bias, *indices, out_features, twin, backend
    )


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
            and holds_its_numbers(other)
            and not (torch.is_grad_enabled() and other.requires_grad)
        )
        for other in others
    )


class CompiledDelta(NamedTuple):
    """D, as an implementation reads it."""

    values: Tensor  # [nnz], sorted by (row, column)
    by_row: CompactIndices
    by_column: CompactIndices
    order: Tensor  # int64 [nnz]: values[order] are sorted by (column, row)
    tiles: Tiles | None = None  # for an implementation whose form they are

    def sorted_by_column(self) -> Tensor:
        return self.values.index_select(0, self.order)


def delta_of(
    values: Tensor, csr: list[Tensor], csc: list[Tensor], tiles: list[Tensor]
) -> CompiledDelta:
    """The delta of index tensors as `delta_arguments` lists them."""
    by_tile = Tiles(*tiles) if tiles else None
    return CompiledDelta(values, CompactIndices(*csr), CompactIndices(*csc[:-1]), csc[-1], by_tile)


Base = Tensor | QuantizedWeight | None

# An implementation is called with x [M, K]; W [N, K], a QuantizedWeight, or None for the product
# with D alone; the delta; b or None; the features of the result; and whether it is the twin, with x
# [M, N]. It returns the product.
Serve = Callable[[Tensor, Base, CompiledDelta, Tensor | None, int, bool], Tensor]


def _beside_torchs_product(
    add: Callable[[Tensor, Tensor, Tensor, CompactIndices], None],
) -> Serve:
    """Make an implementation of a function that adds `x @ D^T` to a fresh, row-contiguous y."""

    @wraps(add)
    def serve(
        x: Tensor,
        base: Base,
        delta: CompiledDelta,
        bias: Tensor | None,
        out_features: int,
        twin: bool,
    ) -> Tensor:
        if base is None:
            y = x.new_zeros(x.shape[0], out_features)
        elif isinstance(base, QuantizedWeight):
            y = quantized_product(x, base, bias, out_features, twin)
        else:
            y = x @ base if twin else F.linear(x, base, bias)
        if twin:
            add(y, x, delta.sorted_by_column(), delta.by_column)
        else:
            add(y, x, delta.values, delta.by_row)
        return y

    return serve


@registry.implement("sparse_delta_matmul", "reference")
@_beside_torchs_product
def _reference(y: Tensor, x: Tensor, values: Tensor, sparse: CompactIndices) -> None:
    dense = values.new_zeros(y.shape[1], x.shape[1])
    dense[sparse.entry_rows, sparse.entry_cols] = values
    y += (x.to(values.dtype) @ dense.t()).to(y.dtype)


_of_few_tokens = _beside_torchs_product(add_delta)


@registry.implement("sparse_delta_matmul", "torch")
def _torch(
    x: Tensor, base: Base, delta: CompiledDelta, bias: Tensor | None, out_features: int, twin: bool
) -> Tensor:
    if x.shape[0] <= TORCH_FEW_TOKENS:
        return _of_few_tokens(x, base, delta, bias, out_features, twin)
    entries = delta.by_column if twin else delta.by_row
    values = delta.sorted_by_column() if twin else delta.values
    return by_effective_weight(x, base, values, entries, bias, twin)


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
def in_triton(
    x: Tensor,
    base: Base,
    delta: CompiledDelta,
    bias: Tensor | None,
    out_features: int,
    twin: bool,
    fused_tokens: int | None = None,
) -> Tensor:
    if fused_tokens is None:
        fused_tokens = costs_of(x.device).fused_tokens
    weight, scales = (base.data, base.scales) if isinstance(base, QuantizedWeight) else (base, None)
    return _triton.kernels("sparse_delta_matmul").sparse_delta_matmul(
        *(_native.rows_contiguous(x), weight, scales, bias, delta.values.contiguous()),
        *(delta.by_row, delta.by_column, delta.order, out_features, twin, fused_tokens),
    )


# csrc/cuda/kernels.h
_BASES = {torch.int8: 2, torch.int16: 3}
_FEW_TOKENS = 32


def in_cuda(
    backend: str,
    x: Tensor,
    base: Base,
    delta: CompiledDelta,
    bias: Tensor | None,
    out_features: int,
    twin: bool,
    tile_tokens: int = 0,
) -> Tensor:
    tiles = delta.tiles
    assert tiles is not None  # the form that is registered
    x, values, order = _native.rows_contiguous(x), delta.values.contiguous(), tiles.order
    if x.shape[0] <= _FEW_TOKENS:
        # Sorting the values beforehand would take a third as long as the product itself.
        order_at = order.data_ptr()
    else:
        values, order_at = values.index_select(0, order), 0
    y = x.new_empty(x.shape[0], out_features)
    weight, scales = (base.data, base.scales) if isinstance(base, QuantizedWeight) else (base, None)
    weight = None if weight is None else _native.rows_contiguous(weight)
    shape = (x.shape[1], out_features) if twin else (out_features, x.shape[1])
    code = 0 if weight is None else 1 if scales is None else _BASES[weight.dtype]
    _cuda_native.launch(
        *(backend, "sparse_delta_matmul", x),
        *(x.data_ptr(), x.stride(0), x.shape[0]),
        *(0, 0) if weight is None else (weight.data_ptr(), weight.stride(0)),
        *(*shape, code),
        *(0, False, 1)
        if scales is None
        else (scales.data_ptr(), scales.dtype == torch.float32, shape[1] // scales.shape[1]),
        0 if bias is None else bias.data_ptr(),
        *(tiles.starts.data_ptr(), tiles.places.data_ptr(), order_at, values.data_ptr()),
        *(y.data_ptr(), twin, _cuda_native.multiprocessors(x.device), tile_tokens),
        _native.dtype_code(x),
    )
    return y


for _backend in _cuda_native.MODULES:
    registry.implement("sparse_delta_matmul", _backend, _cuda_native.DTYPES, form=Tiles)(
        partial(in_cuda, _backend)
    )


def _serve(
    x: Tensor,
    weight: Tensor | None,
    scales: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    csr: list[Tensor],
    csc: list[Tensor],
    tiles: list[Tensor],
    out_features: int,
    twin: bool,
    backend: str | None,
) -> Tensor:
    base = weight if weight is None or scales is None else QuantizedWeight(weight, scales)
    delta = delta_of(values, csr, csc, tiles)
    bias = None if bias is None else bias.contiguous()
    serve = registry.resolve("sparse_delta_matmul", x.device, x.dtype, backend).function
    return serve(x, base, delta, bias, out_features, twin)


def _saved(ctx, indices: Iterable[list[Tensor]]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The index tensors to save, of which `_loaded` makes lists again."""
    lists = list(indices)
    ctx.sizes = [len(some) for some in lists]
    return [tensor for some in lists for tensor in some]


def _loaded(ctx, saved: Sequence[Tensor]) -> list[list[Tensor]]:  # type: ignore[no-untyped-def]
    left = iter(saved)
    return [list(islice(left, size)) for size in ctx.sizes]


def _no_gradients(indices: Iterable[list[Tensor]]) -> tuple[list[None], ...]:
    return tuple([None] * len(some) for some in indices)


@operation("speft::sparse_delta_matmul")
def _sparse_delta_matmul(
    x: Tensor,
    weight: Tensor | None,
    scales: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    csr: list[Tensor],
    csc: list[Tensor],
    tiles: list[Tensor],
    strips: list[Tensor],
    out_features: int,
    twin: bool,
    backend: str | None,
) -> Tensor:
    return _serve(x, weight, scales, values, bias, csr, csc, tiles, out_features, twin, backend)


@_sparse_delta_matmul.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, scales, values, bias, csr, csc, tiles, strips, out_features, twin, backend
):
    return x.new_empty(x.shape[0], out_features)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, scales, values, _, *indices, _, ctx.twin, ctx.backend = inputs
    needs, ctx.in_features = ctx.needs_input_grad, x.shape[1]
    # A frozen layer below needs neither gradient of x nor weight: keep only what a gradient will
    # read.
    keep_x = needs[1] or needs[3]
    kept = (weight, scales, values) if needs[0] else (None, None, None)
    every = _saved(ctx, indices)
    ctx.save_for_backward(x if keep_x else None, *kept, *every)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, scales, values, *saved = ctx.saved_tensors
    indices = _loaded(ctx, saved)
    dx = d_weight = d_values = d_bias = None
    needs = ctx.needs_input_grad
    if needs[0]:
        dx = torch.ops.speft.sparse_delta_matmul(
            dy, weight, scales, values, None, *indices, ctx.in_features, not ctx.twin, ctx.backend
        )
    # The forward twin maps [M, N] to [M, K], so the roles of its operands are exchanged.
    rows_side, cols_side = (x, dy) if ctx.twin else (dy, x)
    if needs[1]:
        d_weight = rows_side.t() @ cols_side
    if needs[3]:
        d_values = gradient_of_entries(rows_side, cols_side, indices[0], indices[3], ctx.backend)
    if needs[4]:
        d_bias = dy.sum(0)
    return dx, d_weight, None, d_values, d_bias, *_no_gradients(indices), None, None, None


_sparse_delta_matmul.register_autograd(_backward, setup_context=_save)
