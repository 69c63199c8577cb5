"""`topk_salience`: the indices of the k largest salience scores, over one matrix or over all of
them.

The score is computed on the fly from `(w, g)`, entry by entry, in float32 (float64 for float64
inputs):

    magnitude |w|      gradient |g|      snip |w*g|      force -w*g      taylor_fo (w*g)^2      raw
    g

Exact; ties go to the lowest index (in global scope: the first matrix, then the lowest index), so
the result is the same on every backend and for any number of threads. `taylor_fo` is ranked by
|w*g|, which has the same order and neither underflows nor overflows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _cuda_native, _native, _triton
from ..dtypes import accumulator_dtype, index_dtype
from ..errors import SalienceError, nearest
from . import _checks, registry
from ._library import operation

# metric -> (code in csrc/cpu/topk_salience.cpp, needs the weight, needs the gradient)
_METRICS = {
    "magnitude": (0, True, False),
    "gradient": (1, False, True),
    "snip": (2, True, True),
    "force": (3, True, True),
    "taylor_fo": (2, True, True),
    "raw": (4, False, True),
}
METRICS = tuple(_METRICS)


def topk_salience(
    weights: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    k: int | float,
    *,
    metric: str = "gradient",
    scope: str = "layer",
    backend: str | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Return the flat row-major indices of the `k` entries with the highest score, sorted, a tensor
    a matrix.

    Args:
        weights: matrices `[N_i, K_i]`, ragged; entries may be None for a metric that reads no
            weight.
        grads: matrices of the same shapes; entries may be None for a metric that reads no gradient.
            For `raw` they are the scores themselves.
        k: a number of entries, or a density in (0, 1). Per matrix in scope "layer" (a density keeps
            at least one entry of each), in all in scope "global".
        names: how errors call the matrices; by default "matrix i".

    Returns:
        A list as long as the input: int32 indices (int64 for a matrix of 2^31 entries or more). In
        scope "global" some may be empty.

    Raises:
        SalienceError: a score is NaN or infinite; the message names the matrix. (Also a
            ValueError.)
        ValueError: an unknown metric or scope, a density outside (0, 1), k larger than a matrix or
            than all of them, shapes that do not fit.
        TypeError: dtypes that are not floating point or do not fit.
        BackendError: the backend that was asked for cannot serve the call.
    """
    if metric not in _METRICS:
        raise ValueError(
            f"unknown metric {metric!r}.{nearest(metric, METRICS)} Known: {', '.join(METRICS)}"
        )
    if scope not in ("layer", "global"):
        raise ValueError(
            f"unknown scope {scope!r}.{nearest(scope, ('layer', 'global'))} Known: layer, global"
        )
    pairs = _operands(weights, grads, metric, names)
    if not pairs:
        return []
    labels = list(names) if names is not None else [f"matrix {i}" for i in range(len(pairs))]
    if len(labels) != len(pairs):
        raise ValueError(f"{len(labels)} names for {len(pairs)} matrices")
    matrices = [_first(pair) for pair in pairs]
    together = scope == "global"
    if together:
        _check_alike(matrices)
        ks = [_budget(k, sum(m.numel() for m in matrices), scope, labels[0])]
        groups = [list(range(len(pairs)))]
    else:
        ks = [_budget(k, m.numel(), scope, name) for m, name in zip(matrices, labels, strict=True)]
        groups = _alike(matrices)
    chosen: dict[int, Tensor] = {}
    bad: list[int] = []
    for group in groups:
        members = [pairs[i] for i in group]
        try:
            indices, counts = torch.ops.speft.topk_salience(
                [w for w, _ in members if w is not None],
                [g for _, g in members if g is not None],
                *(ks if together else [ks[i] for i in group], together, metric, backend),
            )
        except NonFiniteScoreError as error:
            bad.append(group[error.matrix])
            continue
        chosen.update(zip(group, indices.split(counts.tolist()), strict=True))
    if bad:
        raise SalienceError(
            f"the {metric} score of {labels[min(bad)]} has NaN or infinite entries: its weight or "
            "gradient is not finite, or their product is out of range"
        )
    # Each in memory of its own, so that none keeps the others' alive.
    return [chosen[i].to(index_dtype(m.numel()), copy=True) for i, m in enumerate(matrices)]


class NonFiniteScoreError(Exception):
    """A score of matrix number `matrix` is NaN or infinite. The caller knows the matrix's name."""

    def __init__(self, matrix: int) -> None:
        super().__init__(f"matrix {matrix}")
        self.matrix = matrix


Pair = tuple[Tensor | None, Tensor | None]


def _first(pair: Pair) -> Tensor:
    present = pair[0] if pair[0] is not None else pair[1]
    assert present is not None  # _operands has seen to it
    return present


def _operands(
    weights: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    metric: str,
    names: Sequence[str] | None,
) -> list[Pair]:
    """Return (w, g) for each matrix with only what the metric reads, checked and contiguous."""
    _, needs_weight, needs_grad = _METRICS[metric]
    if len(weights) != len(grads):
        raise ValueError(f"{len(weights)} weights and {len(grads)} gradients")
    pairs: list[Pair] = []
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        label = names[i] if names is not None and i < len(names) else f"matrix {i}"
        for role, tensor, needed in (
            ("weight", weight, needs_weight),
            ("gradient", grad, needs_grad),
        ):
            if needed and tensor is None:
                raise ValueError(f"metric {metric!r} needs a {role} for {label}, got None")
            if needed and tensor is not None and tensor.dim() != 2:
                raise ValueError(
                    f"the {role} of {label} must be 2-D, got shape {tuple(tensor.shape)}"
                )
            if needed and tensor is not None:
                _checks.check_float(**{f"the {role} of {label}": tensor})
        if weight is not None and grad is not None and needs_weight and needs_grad:
            if weight.shape != grad.shape:
                raise ValueError(
                    f"{label}: weight has shape {tuple(weight.shape)}, gradient {tuple(grad.shape)}"
                )
            _checks.check_device("weight", weight, "gradient", grad)
            if weight.dtype != grad.dtype:
                # A float32 accumulator beside a bf16 weight is ordinary: the score is computed in
                # float32 anyway.
                wide = torch.promote_types(weight.dtype, grad.dtype)
                weight, grad = weight.to(wide), grad.to(wide)
        pairs.append(
            (
                weight.detach().contiguous() if needs_weight and weight is not None else None,
                grad.detach().contiguous() if needs_grad and grad is not None else None,
            )
        )
    return pairs


def _alike(matrices: list[Tensor]) -> list[list[int]]:
    """Return the positions of the matrices, those of one dtype and device together."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((matrix.dtype, matrix.device), []).append(i)
    return list(groups.values())


def _check_alike(matrices: list[Tensor]) -> None:
    first = matrices[0]
    for matrix in matrices[1:]:
        if matrix.dtype != first.dtype or matrix.device != first.device:
            raise ValueError(
                "matrices that are ranked together must share dtype and device, got "
                f"{first.dtype} on {first.device} and {matrix.dtype} on {matrix.device}"
            )


def _budget(k: int | float, total: int, scope: str, label: str) -> int:
    where = f"{label}, which has" if scope == "layer" else "all matrices together, which have"
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise TypeError(f"k must be an int or a density as a float, got {type(k).__name__}")
    if isinstance(k, float):
        if not 0.0 < k < 1.0:
            raise ValueError(f"a density must lie in (0, 1), got {k}")
        return min(max(1, round(k * total)), total)
    if k < 0 or k > total:
        raise ValueError(f"k = {k} does not fit {where} {total} entries")
    return k


def _score(pair: Pair, metric: str) -> Tensor:
    """The flat score of one matrix; adding 0.0 makes -0.0 and 0.0 one value."""
    weight, grad = (None if t is None else t.flatten().to(accumulator_dtype(t.dtype)) for t in pair)
    if weight is None:
        assert grad is not None
        return (grad if metric == "raw" else grad.abs()) + 0.0
    if grad is None:
        return weight.abs()
    return -(weight * grad) + 0.0 if metric == "force" else (weight * grad).abs()


# The chosen indices of all matrices, one after the other, int64 [sum of ks]; and how many each
# matrix has, int64, on the CPU: whoever parts the indices needs it there.
Selection = tuple[Tensor, Tensor]


def _group_by_group(rank: Callable[[list[Pair], int, str], Selection]) -> Callable[..., Selection]:
    """An implementation out of one that ranks the matrices of a single group together."""

    @functools.wraps(rank)
    def serve(pairs: list[Pair], ks: list[int], together: bool, metric: str) -> Selection:
        if together:
            return rank(pairs, ks[0], metric)
        parts = []
        for i, (pair, k) in enumerate(zip(pairs, ks, strict=True)):
            try:
                parts.append(rank([pair], k, metric))
            except NonFiniteScoreError:
                raise NonFiniteScoreError(i) from None
        indices, counts = zip(*parts, strict=True)
        return torch.cat(indices), torch.cat(counts)

    return serve


# An implementation is called with the pairs; how many of each matrix are wanted, or of all
# `together`, then one number; and the metric.


@registry.implement("topk_salience", "reference")
@_group_by_group
def _reference(pairs: list[Pair], k: int, metric: str) -> Selection:
    scores = [_score(pair, metric) for pair in pairs]
    for i, score in enumerate(scores):
        if not bool(torch.isfinite(score).all()):
            raise NonFiniteScoreError(i)
    best = torch.argsort(torch.cat(scores), descending=True, stable=True)[:k].sort().values
    ends = torch.tensor([score.numel() for score in scores], device=best.device).cumsum(0)
    matrix = torch.searchsorted(ends, best, right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return best - starts[matrix], torch.bincount(matrix, minlength=len(pairs)).cpu()


def _ordered_bits(score: Tensor) -> Tensor:
    """Map floats to int64 >= 0 of the same order."""
    if score.dtype == torch.float64:
        bits = score.view(torch.int64)
        # Flip the magnitude of negatives; then the sign bit is handled by the first digit, see
        # _digit.
        return bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)
    bits = score.view(torch.int32).long()
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


def _digit(keys: Tensor, shift: int, width: int, top: bool) -> Tensor:
    digit = keys >> shift
    return digit + (1 << (width - 1)) if top else digit & ((1 << width) - 1)


@registry.implement("topk_salience", "torch")
@_group_by_group
def _torch(pairs: list[Pair], k: int, metric: str) -> Selection:
    """Radix select: one histogram pass a digit. The score of one matrix at a time exists, never all
    of them.
    """
    total_bits, width = (64, 16) if _first(pairs[0]).dtype == torch.float64 else (32, 16)
    prefix: int | None = None  # the high bits of the k-th largest key found so far
    above = 0  # entries whose high bits are larger
    for level, shift in enumerate(range(total_bits - width, -1, -width)):
        counts = None
        for i, pair in enumerate(pairs):
            score = _score(pair, metric)
            if level == 0 and not bool(torch.isfinite(score).all()):
                raise NonFiniteScoreError(i)
            keys = _ordered_bits(score)
            if prefix is not None:
                keys = keys[(keys >> (shift + width)) == prefix]
            histogram = torch.bincount(_digit(keys, shift, width, level == 0), minlength=1 << width)
            counts = histogram if counts is None else counts + histogram
        assert counts is not None
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < k - above).sum())  # digits wholly above the boundary
        above += int(from_top[place - 1]) if place else 0
        digit = counts.numel() - 1 - place
        digit = digit - (1 << (width - 1)) if level == 0 else digit
        prefix = digit if prefix is None else (prefix << width) | digit
    assert prefix is not None
    ties = k - above
    selected = []
    for pair in pairs:
        keys = _ordered_bits(_score(pair, metric))
        equal = (keys == prefix).nonzero().flatten()[:ties]
        ties -= equal.numel()
        selected.append(torch.cat([(keys > prefix).nonzero().flatten(), equal]).sort().values)
    return torch.cat(selected), torch.tensor([s.numel() for s in selected])


@registry.implement("topk_salience", "cpu")
@_group_by_group
def _cpu(pairs: list[Pair], k: int, metric: str) -> Selection:
    first = _first(pairs[0])
    sizes = (ctypes.c_int64 * len(pairs))(*[_first(pair).numel() for pair in pairs])
    pointers = [
        (ctypes.c_void_p * len(pairs))(*[t.data_ptr() if t is not None else None for t in side])
        for side in zip(*pairs, strict=True)
    ]
    indices = torch.empty(k, dtype=torch.int64)
    counts = torch.empty(len(pairs), dtype=torch.int64)
    bad = _native.kernels().topk_salience(
        *(ctypes.addressof(pointers[0]), ctypes.addressof(pointers[1])),
        *(ctypes.addressof(sizes), len(pairs), k, _METRICS[metric][0]),
        *(indices.data_ptr(), counts.data_ptr()),
        *(_native.dtype_code(first), torch.get_num_threads()),
    )
    if bad >= 0:
        raise NonFiniteScoreError(bad)
    return indices, counts


@registry.implement("topk_salience", "triton", _triton.DTYPES)
def _in_triton(pairs: list[Pair], ks: list[int], together: bool, metric: str) -> Selection:
    weights, grads = ([t for t in side if t is not None] for side in zip(*pairs, strict=True))
    indices, counts, bad = _triton.kernels("topk_salience").topk_salience(
        weights, grads, ks, together, metric
    )
    if bad >= 0:
        raise NonFiniteScoreError(bad)
    return indices, torch.tensor(counts)


def select_in_cuda(
    backend: str,
    pairs: list[Pair],
    ks: list[int],
    together: bool,
    metric: str,
    resident: bool = False,
) -> Selection:
    first = _first(pairs[0])
    device, dtype = first.device, _native.dtype_code(first)
    operands = [[t.data_ptr() for t in side if t is not None] for side in zip(*pairs, strict=True)]
    x, y = operands if operands[0] else reversed(operands)
    sizes = [_first(pair).numel() for pair in pairs]
    parts = _cuda_native.multiprocessors(device)
    plan = _cuda_native.kernels(backend).plan_topk(x, y, sizes, ks, together, parts, dtype)
    table = torch.frombuffer(bytearray(plan.table), dtype=torch.uint8)
    if device.type == "cuda":
        # From pinned memory the copy waits for nothing, and nothing waits for it but the stream.
        table = table.pin_memory().to(device, non_blocking=True)
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=device)
    indices = torch.empty(sum(ks), dtype=torch.int64, device=device)
    told = torch.empty(1 + len(pairs), dtype=torch.int64, device=device)
    pending = 0  # segments that are to be taken from their data
    for _ in range(2):
        _cuda_native.launch(
            *(backend, "topk_salience", first),
            *(plan, table.data_ptr(), scratch.data_ptr(), _METRICS[metric][0]),
            *(indices.data_ptr(), told.data_ptr(), resident, pending, dtype),
        )
        bad, *counts = told.tolist()  # here the host waits
        if bad >= 0:
            raise NonFiniteScoreError(bad)
        # Where the lists lacked a segment's k-th score it has no index yet.
        found = [sum(counts)] if together else counts
        pending = sum(number < k for number, k in zip(found, ks, strict=True))
        if pending == 0:
            return indices, torch.tensor(counts)
    raise RuntimeError("topk_salience found fewer indices than it was asked for")


for _backend in _cuda_native.MODULES:
    registry.implement("topk_salience", _backend, (torch.float32, *_cuda_native.DTYPES))(
        functools.partial(select_in_cuda, _backend)
    )


@operation("speft::topk_salience")
def _topk_salience(
    weights: list[Tensor],
    grads: list[Tensor],
    ks: list[int],
    together: bool,
    metric: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """`ks`: one for each matrix, or one for all that are ranked `together`."""
    _, needs_weight, needs_grad = _METRICS[metric]
    number = len(weights or grads)
    pairs: list[Pair] = [
        (weights[i] if needs_weight else None, grads[i] if needs_grad else None)
        for i in range(number)
    ]
    first = _first(pairs[0])
    # Where nothing is to be chosen nothing is read: implementations are given no k of 0.
    chosen = range(number) if together else [i for i, k in enumerate(ks) if k > 0]
    implementation = registry.resolve("topk_salience", first.device, first.dtype, backend)
    if sum(ks) == 0:
        return _allocate_selection(first, 0, number)
    members = [pairs[i] for i in chosen]
    budgets = [k for k in ks if k > 0]
    try:
        indices, counts = implementation.function(members, budgets, together, metric)
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(chosen[error.matrix]) from None
    return indices, counts if together else torch.tensor(ks)


def _allocate_selection(first: Tensor, k: int, number: int) -> Selection:
    return first.new_zeros(k, dtype=torch.int64), torch.zeros(number, dtype=torch.int64)


@_topk_salience.register_fake
def _(weights, grads, ks, together, metric, backend):  # type: ignore[no-untyped-def]
    return _allocate_selection((weights or grads)[0], sum(ks), len(weights or grads))
