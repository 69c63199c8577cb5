"""Patterns for tests and benchmarks: uniform ones, and ones clustered as real masks are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pattern import SparsePattern


@dataclass(frozen=True)
class Clustering:
    """How a mask clusters. All are shares in (0, 1]; "top" means the fullest 5 % of all lines."""

    used_columns: float
    used_rows: float
    top_columns_hold: float
    top_rows_hold: float


# Measured: all-MiniLM-L6-v2 on SST-2, scored on 512 examples, 36 linear layers (docs/design.md).
# Keyed by (metric, density).
MEASURED = {
    ("gradient", 0.005): Clustering(0.24, 0.62, 0.80, 0.42),
    ("gradient", 0.001): Clustering(0.046, 0.27, 0.97, 0.45),
    ("snip", 0.005): Clustering(0.46, 0.55, 0.52, 0.39),
    ("snip", 0.001): Clustering(0.14, 0.23, 0.78, 0.50),
    ("magnitude", 0.005): Clustering(0.66, 0.60, 0.27, 0.32),
    ("magnitude", 0.001): Clustering(0.26, 0.23, 0.41, 0.54),
}

TOP_SHARE = 0.05
FITTING_ROUNDS = 4


def uniform_pattern(shape: tuple[int, int], density: float, *, seed: int = 0) -> SparsePattern:
    """Return a pattern of `round(density * N * K)` entries drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    total = shape[0] * shape[1]
    chosen = torch.randperm(total, generator=generator)[: round(density * total)]
    return SparsePattern.from_indices(shape, chosen)


def realistic_pattern(
    shape: tuple[int, int], density: float = 0.005, metric: str = "gradient", *, seed: int = 0
) -> SparsePattern:
    """Return a pattern that clusters in rows and columns as the measured masks of `metric` do.

    A density between or beyond the measured ones takes the clustering of the nearest.

    Raises:
        KeyError: the metric was not measured.
    """
    measured = [key for key in MEASURED if key[0] == metric]
    if not measured:
        raise KeyError(f"no measured mask for metric {metric!r}; known: gradient, snip, magnitude")
    like = MEASURED[min(measured, key=lambda key: abs(key[1] - density))]
    target = like
    for _ in range(FITTING_ROUNDS):
        pattern = _clustered(shape, density, like, seed)
        found = clustering_of(pattern)
        # Covering every used line and dropping duplicates both take from the hot lines: ask for
        # more there, by what is missing.
        like = replace(
            like,
            top_columns_hold=_share(
                like.top_columns_hold, target.top_columns_hold, found.top_columns_hold
            ),
            top_rows_hold=_share(like.top_rows_hold, target.top_rows_hold, found.top_rows_hold),
        )
    return pattern


def _share(asked: float, wanted: float, found: float) -> float:
    return min(0.999, max(0.001, asked + wanted - found))


def _clustered(
    shape: tuple[int, int], density: float, like: Clustering, seed: int
) -> SparsePattern:
    generator = torch.Generator().manual_seed(seed)
    rows, row_weights = _lines(shape[0], like.used_rows, like.top_rows_hold, generator)
    cols, col_weights = _lines(shape[1], like.used_columns, like.top_columns_hold, generator)
    count = min(round(density * shape[0] * shape[1]), rows.numel() * cols.numel())

    # The largest log(weight) + Gumbel noise are a weighted draw without replacement. One entry on
    # each used line comes first, so that the share of used lines is met exactly; its partner is
    # drawn by weight, too.
    weights = torch.outer(row_weights, col_weights)
    score = weights.log() - torch.empty_like(weights).exponential_(generator=generator).log()
    score[torch.arange(rows.numel()), score.argmax(1)] = torch.inf
    score[score.argmax(0), torch.arange(cols.numel())] = torch.inf
    best = score.flatten().topk(count).indices
    return SparsePattern.from_indices(
        shape, rows[best // cols.numel()] * shape[1] + cols[best % cols.numel()]
    )


def _lines(
    size: int, used: float, top_holds: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the used lines, and the probability of each: a few hot ones hold `top_holds`."""
    count = max(1, round(used * size))
    lines = torch.randperm(size, generator=generator)[:count]
    hot = min(count, max(1, round(TOP_SHARE * size)))
    weights = torch.full((count,), (1 - top_holds) / max(1, count - hot))
    weights[:hot] = top_holds / hot
    return lines, weights


def clustering_of(pattern: SparsePattern) -> Clustering:
    """Measure how a pattern clusters, in the terms of the table in docs/design.md."""

    def of(lines: Tensor, size: int) -> tuple[float, float]:
        counts = torch.bincount(lines.long(), minlength=size).sort(descending=True).values
        top = counts[: max(1, round(TOP_SHARE * size))].sum() / max(1, pattern.nnz)
        return float((counts > 0).float().mean()), float(top)

    used_rows, top_rows = of(pattern.rows, pattern.shape[0])
    used_columns, top_columns = of(pattern.cols, pattern.shape[1])
    return Clustering(used_columns, used_rows, top_columns, top_rows)
