"""`keep_columns`: the activations that a backward pass will read, packed as `sampled_grad` reads
them.

    kept[b, c, t] = x[b * T + t, columns[c]]        zero where there is no such token

Transposed, so that sums over tokens run along contiguous memory, and in blocks of T tokens, so that
the columns of one block stay in a cache.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _cuda_native, _native, _triton
from ..plan import SparsityPlan
from . import _checks, registry
from ._library import is_plain, operation


def keep_columns(x: Tensor, plan: SparsityPlan, *, backend: str | None = None) -> Tensor:
    """Return what the backward pass needs of the activations; it carries no gradient.

    Args:
        x: `[..., K]`.

    Returns:
        x as `[M, K]` where the plan keeps it whole; `[B, C, T]` of x's dtype, the packed columns
        `plan.kept_columns`; for a block pattern `[M, C]`, the columns as they are, which torch's
        own operators take out on every backend.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes do not fit.
        BackendError: the backend that was asked for cannot serve the call.
    """
    pattern = plan.pattern
    _checks.check_float(x=x)
    _checks.check_pattern_device(pattern, "x", x)
    x = _checks.tokens_first("x", x.detach(), pattern.shape[1])
    columns = plan.kept_columns
    if backend is not None:  # refused also where nothing is packed
        registry.resolve("keep_columns", x.device, x.dtype, backend)
    if columns is None:
        return x
    if pattern.is_block:
        width = pattern.block_shape[1]
        groups = torch.div(columns[::width], width, rounding_mode="floor")
        parted = x.reshape(x.shape[0], pattern.shape[1] // width, width)
        return parted.index_select(1, groups).reshape(x.shape[0], columns.numel())
    width = plan.block_tokens(x.shape[0])
    if is_plain(x):
        return _packed(x, columns, width, backend)
    return torch.ops.speft.keep_columns(x, columns, width, backend)


def unpack(kept: Tensor, tokens: int) -> Tensor:
    """Return packed columns `[B, C, T]` as `[M, C]`."""
    return kept.transpose(1, 2).flatten(0, 1)[:tokens]


@registry.implement("keep_columns", "reference")
def _reference(x: Tensor, columns: Tensor, kept: Tensor) -> None:
    blocks, _, width = kept.shape
    some = x.new_zeros(blocks * width, columns.numel())
    some[: x.shape[0]] = x[:, columns.long()]
    kept.copy_(some.reshape(blocks, width, columns.numel()).transpose(1, 2))


@registry.implement("keep_columns", "torch")
def _torch(x: Tensor, columns: Tensor, kept: Tensor) -> None:
    blocks, _, width = kept.shape
    some = x.index_select(1, columns)
    whole = x.shape[0] // width
    kept[:whole] = some[: whole * width].reshape(whole, width, columns.numel()).transpose(1, 2)
    if whole < blocks:
        rest = x.shape[0] - whole * width
        kept[whole, :, :rest] = some[whole * width :].t()
        kept[whole, :, rest:] = 0


@registry.implement("keep_columns", "cpu")
def _cpu(x: Tensor, columns: Tensor, kept: Tensor) -> None:
    x = _native.rows_contiguous(x)
    _native.kernels().keep_columns(
        *(x.data_ptr(), x.stride(0), x.shape[1], x.shape[0]),
        *(columns.data_ptr(), columns.numel(), kept.shape[2], kept.data_ptr()),
        *(_native.dtype_code(x), torch.get_num_threads()),
    )


@registry.implement("keep_columns", "triton")
def _in_triton(x: Tensor, columns: Tensor, kept: Tensor) -> None:
    x = _native.rows_contiguous(x)
    _triton.kernels("keep_columns").keep_columns(x, columns, kept)


def in_cuda(backend: str, x: Tensor, columns: Tensor, kept: Tensor) -> None:
    """As the registered implementations are called; also by `sampled_grad`, which packs what comes
    whole.
    """
    x = _native.rows_contiguous(x)
    _cuda_native.launch(
        *(backend, "keep_columns", x),
        *(x.data_ptr(), x.stride(0), x.shape[0], columns.data_ptr(), columns.numel()),
        *(kept.shape[2], kept.shape[0], kept.data_ptr()),
    )


for _backend in _cuda_native.MODULES:
    registry.implement("keep_columns", _backend, _cuda_native.DTYPES)(partial(in_cuda, _backend))


def _allocate(x: Tensor, columns: Tensor, width: int) -> Tensor:
    return x.new_empty((x.shape[0] + width - 1) // width, columns.shape[0], width)


@operation("speft::keep_columns")
def _keep_columns(x: Tensor, columns: Tensor, width: int, backend: str | None) -> Tensor:
    return _packed(x, columns, width, backend)


def _packed(x: Tensor, columns: Tensor, width: int, backend: str | None) -> Tensor:
    kept = _allocate(x, columns, width)
    serve = registry.resolve("keep_columns", x.device, x.dtype, backend).function
    serve(x, columns, kept)
    return kept


@_keep_columns.register_fake
def _(x, columns, width, backend):  # type: ignore[no-untyped-def]
    return _allocate(x, columns, width)
