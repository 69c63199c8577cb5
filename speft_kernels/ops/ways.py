"""The ways in which a kernel may go, each by itself: for those who measure or test them.

What a call would take is left out here: it follows the number of tokens and the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..pattern import SparsePattern
from .sparse_delta_matmul import Base, delta_arguments, delta_of, in_cuda, in_triton
from .topk_salience import Pair, select_in_cuda

Ways = dict[str, Callable[[], Tensor]]


def triton_ways(x: Tensor, weight: Tensor, values: Tensor, pattern: SparsePattern) -> Ways:
    """Those of `x @ (W + D)^T` in Triton; few tokens are faster in the one, many in the other."""
    values, (csr, csc, tiles, _) = delta_arguments(values, pattern, x, weight, "triton")
    delta = delta_of(values, csr, csc, tiles)
    run = partial(in_triton, x, weight, delta, None, pattern.shape[0], False)
    return {
        "W read once": partial(run, fused_tokens=x.shape[0]),
        "W + D written": partial(run, fused_tokens=0),
    }


def cuda_ways(
    x: Tensor,
    weight: Base,
    values: Tensor,
    pattern: SparsePattern,
    twin: bool = False,
    backend: str = "cuda",
) -> Ways:
    """Those of `x @ (W + D)^T` or its twin in CUDA, for more tokens than 32: the heights of its
    tiles.
    """
    values, (csr, csc, tiles, _) = delta_arguments(values, pattern, x, weight, backend)
    delta = delta_of(values, csr, csc, tiles)
    run = partial(in_cuda, backend, x, weight, delta, None, pattern.shape[int(twin)], twin)
    return {f"tiles of {tokens} tokens": partial(run, tile_tokens=tokens) for tokens in (256, 128)}


def topk_ways(
    weights: list[Tensor], grads: list[Tensor], ks: list[int], together: bool, backend: str = "cuda"
) -> dict[str, Callable[[], list[Tensor]]]:
    """Those of the k largest |w g| in CUDA, int64 indices of each matrix: five launches of which
    each has what the one before found out, or one of blocks that wait for each other.

    Args:
        ks: as many as there are matrices, or one for all `together`.
    """
    pairs: list[Pair] = list(zip(weights, grads, strict=True))

    def run(resident: bool) -> list[Tensor]:
        found, counts = select_in_cuda(backend, pairs, ks, together, "snip", resident)
        return list(found.split(counts.tolist()))

    return {"five launches": partial(run, False), "one launch": partial(run, True)}
