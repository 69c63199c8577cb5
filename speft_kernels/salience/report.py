"""What a selection came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerBudget:
    """One layer's share of the selection: `nnz` trained scalars of a weight `shape` = (N, K)."""

    name: str
    shape: tuple[int, int]
    nnz: int
    density: float


@dataclass(frozen=True)
class SalienceReport:
    """How entries were selected, and what that cost.

    Attributes:
        batches, examples: how much data was scored with, over all processes.
        seconds: wall time of scoring and selecting; head_warmup_seconds: of the warm-up before it.
        peak_memory_bytes: of scoring and selecting, as `peak_memory_source` measures it: "cuda
            allocator", "process high-water mark", or "process high-water mark since its start".
            None on a system that does not tell.
        accumulator_bytes: of the sums over batches, all sets of them; 0 where none are needed.
        largest_gradient_bytes: of one layer, the only dense gradient that exists at a time (metric
            "grasp" holds those of all layers besides).
        layers: one entry a target layer, in the model's order.
        notes: what scoring did that was not asked for, or left out, in sentences for people.
    """

    metric: str
    scope: str
    selection: str
    density: float
    block_shape: tuple[int, int]
    batches: int
    examples: int
    seconds: float
    head_warmup_seconds: float
    peak_memory_bytes: int | None
    peak_memory_source: str
    accumulator_bytes: int
    largest_gradient_bytes: int
    layers: tuple[LayerBudget, ...]
    notes: tuple[str, ...] = ()

    @property
    def nnz(self) -> int:
        """Number of trained scalars over all layers."""
        return sum(layer.nnz for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, with the total `nnz`."""
        fields = asdict(self)
        layers = [{**layer, "shape": list(layer["shape"])} for layer in fields.pop("layers")]
        lists = {"block_shape": list(self.block_shape), "notes": list(self.notes)}
        return {**fields, **lists, "nnz": self.nnz, "layers": layers}
