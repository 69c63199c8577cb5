"""`write_deltas` in bf16: the deltas of all projections of some decoder layers in one call, against
a write by torch for each.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .... import ops
from ...checks import close
from ...harness import Work
from ..problems import Spec, Workbench, rotated
from ..timing import GpuCase, GpuSide

LAYERS = 4  # 56 tensors' addresses, and entries enough to fill a GPU


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    of = bench.scale.projections
    shapes = [of[name] for name in ("q", "k", "k", "q", "gate", "gate", "down")] * LAYERS
    patterns = [
        rotated(bench.pattern(shape, spec.mask, spec.density), number)
        for number, shape in enumerate(shapes)
    ]
    weights = [bench.device.randn(*shape) for shape in shapes]
    places = [pattern.entry_indices.long() for pattern in patterns]
    base = [w.view(-1)[place] for w, place in zip(weights, places, strict=True)]
    values = [bench.device.randn(p.nnz, dtype=torch.float32) for p in patterns]
    wanted = [
        (b.double() + v.double()).float().bfloat16() for b, v in zip(base, values, strict=True)
    ]
    outside = [_outside(*some) for some in zip(weights, places, strict=True)]

    def by_torch() -> None:
        for weight, place, taken, value in zip(weights, places, base, values, strict=True):
            weight.view(-1).index_copy_(0, place, (taken.float() + value).bfloat16())

    def check(_: object) -> None:
        # Exact: one float32 sum, rounded once, and nothing else touched. Then the entries are
        # spoilt, or the next side could do nothing and pass.
        for some in zip(weights, places, wanted, outside, strict=True):
            weight, place, want, rest = some
            close("entries", weight.view(-1)[place].double(), want.double(), 0.0)
            close("the rest", _outside(weight, place), rest, 0.0)
            weight.view(-1)[place] = 0

    entries = sum(pattern.nnz for pattern in patterns)
    # The entries of the weight are written, never read. bfloat16: 2 bytes; values float32.
    moved = {"base": 2 * entries, "values": 4 * entries, "weights": 2 * entries}
    work = Work({**moved, "indices": 4 * entries}, entries, torch.bfloat16)
    sides = [
        GpuSide(
            backend,
            partial(ops.write_deltas, weights, patterns, base, values, backend=backend),
            True,
            work,
            check=check,
        )
        for backend in bench.backends("write_delta")
    ]
    peer = GpuSide("index_copy_ each", by_torch, check=check)
    name = f"{len(shapes)} projections of {LAYERS} layers, {spec.mask} {100 * spec.density:g}%"
    return GpuCase("write_delta", f"{name}, {entries} entries", [*sides, peer])


def _outside(weight: Tensor, places: Tensor) -> Tensor:
    """A sum of the bits of all entries but those at `places`, exact in int64."""
    bits = weight.view(torch.int16).view(-1).long()
    return (bits.sum() - bits[places].sum()).double().view(1)
