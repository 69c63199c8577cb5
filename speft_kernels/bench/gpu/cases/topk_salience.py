"""`topk_salience` over (w, g) against `torch.topk` over a materialised score, and against reading w
and g once.

A call of ours ends with numbers that the host waits for, and with what it does with them. Its time
until then, which is that of the selecting kernels alone, is what the goals judge.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .... import ops
from ....ops.ways import topk_ways
from ...checks import close
from ...harness import Work, WrongResultError
from ..problems import Spec, Workbench
from ..timing import Floor, GpuCase, GpuSide

TOPK = "(w*g).abs().topk(k)"
# Of torch.topk's time, and of reading both operands once; for one matrix in bf16.
TOPK_GOAL, READING_GOALS = 0.1, {"triton": 3.0, "cuda": 2.2}
GOAL_CASE = ("bfloat16", 0.005)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    """`spec.projection` is the dtype of one large square matrix; or "launches", the same in bf16,
    of which both ways of CUDA are timed; or "layer": the seven projections of a decoder layer in
    bf16, ranked all together.
    """
    side, shapes = bench.scale.square, [(bench.scale.square, bench.scale.square)]
    dtype, together = DTYPES.get(spec.projection, torch.bfloat16), spec.projection == "layer"
    if together:
        of = bench.scale.projections
        shapes = [of[name] for name in ("q", "k", "k", "q", "gate", "gate", "down")]
    weights = [bench.device.randn(*shape, dtype=dtype) for shape in shapes]
    grads = [bench.device.randn(*shape, dtype=dtype) for shape in shapes]
    total = sum(weight.numel() for weight in weights)
    k = max(1, round(spec.density * total))

    def scores(cast: torch.dtype) -> Tensor:
        pairs = zip(weights, grads, strict=True)
        parts = [(w.to(cast) * g.to(cast)).abs().flatten() for w, g in pairs]
        return torch.cat(parts) if together else parts[0]

    def check(found: list[Tensor]) -> None:
        # Equal scores may be told apart in any way, so the selected scores are compared.
        score = scores(torch.float32)
        starts = torch.tensor([0, *(w.numel() for w in weights)]).cumsum(0).tolist()
        chosen = torch.cat([i.long() + start for i, start in zip(found, starts, strict=False)])
        if chosen.unique().numel() != k or chosen.numel() != k:
            raise WrongResultError(
                f"{chosen.numel()} entries were selected, expected {k} different"
            )
        best = score.topk(k).values
        close("selected", score[chosen].sort(descending=True).values.double(), best.double(), 0.0)

    operands = 2 * total * weights[0].element_size()
    # For each entry a product and a comparison.
    work = Work({"w and g": operands, "indices": 4 * k}, 2 * total, dtype)
    sides, reading = [], "reading w and g once"
    backends = bench.backends("topk_salience", dtype=dtype)
    if spec.projection == "launches" and "cuda" in backends:
        backends.remove("cuda")
        sides = [
            GpuSide(
                *(f"cuda, {way}", select, True, work),
                check=check,
                floors=[Floor(reading, operands, None)],
                waits=True,
            )
            for way, select in topk_ways(weights, grads, [k], True).items()
        ]
    for backend in backends:
        goal = backend in READING_GOALS and (spec.projection, spec.density) == GOAL_CASE
        select = partial(ops.topk_salience, metric="snip", scope="global", backend=backend)
        sides.append(
            GpuSide(
                backend,
                partial(select, weights, grads, k),
                True,
                work,
                {TOPK: TOPK_GOAL} if goal else {},
                check=check,
                floors=[Floor(reading, operands, READING_GOALS[backend] if goal else None)],
                waits=True,
            )
        )
    # Not sorted, which nobody asks for here and which takes longer. In bf16 its scores are rounded
    # and may choose others, so only their number is checked.
    peer = GpuSide(TOPK, lambda: scores(dtype).topk(k, sorted=False).indices, check=_counted(k))
    what = "a decoder layer's matrices together" if together else f"{side} x {side} {dtype}"
    name = f"{what.replace('torch.', '')}, {100 * spec.density:g}%"
    return GpuCase("topk_salience", name, [*sides, peer])


def _counted(k: int):  # type: ignore[no-untyped-def]
    def check(indices: Tensor) -> None:
        if indices.numel() != k:
            raise WrongResultError(f"{indices.numel()} entries were selected, expected {k}")

    return check
