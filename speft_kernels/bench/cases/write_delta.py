"""`write_delta` against the same write by torch: 4096 x 4096, bfloat16, realistic 0.5 %."""

from __future__ import annotations

import torch

from ... import ops
from ...testing import realistic_pattern
from ..checks import close, flat
from ..harness import Case, Side, Work

SIZE, DENSITY = 4096, 0.005


def setup() -> Case:
    torch.manual_seed(0)
    pattern = realistic_pattern((SIZE, SIZE), DENSITY)
    weight = torch.randn(SIZE, SIZE).bfloat16()
    indices = pattern.indices.long()
    base, values = weight.view(-1)[indices], torch.randn(pattern.nnz)

    def ours() -> None:
        ops.write_delta(weight, pattern, base, values)

    def by_torch() -> None:
        weight.view(-1).index_copy_(0, indices, (base.float() + values).bfloat16())

    def check() -> None:
        # Exact: one float32 sum, rounded once. Between the sides the entries are spoilt, or the
        # second could do nothing and pass.
        expected = weight.clone()
        expected.view(-1)[indices] = (base.double() + values.double()).float().bfloat16()
        for side in sides:
            weight.view(-1)[indices] = 0
            side.run()
            close(side.name, flat(weight), flat(expected), 0.0)

    # The entries of the weight are written, never read. bfloat16: 2 bytes; values float32.
    moved = {"base": 2 * pattern.nnz, "values": 4 * pattern.nnz, "weight": 2 * pattern.nnz}
    work = Work({**moved, "indices": 4 * pattern.nnz}, pattern.nnz)
    peer_work = Work({**moved, "indices": 8 * pattern.nnz}, pattern.nnz)
    sides = [Side("ours", ours, True, work), Side("index_copy_", by_torch, False, peer_work)]
    entries = f"{pattern.nnz / 1e3:.0f} k entries of {SIZE} x {SIZE} bfloat16"
    return Case("write_delta", entries, sides, check)


CASES = {"bfloat16": setup}
QUICK = ("bfloat16",)
