"""`topk_salience` against `torch.topk` over a materialised score: |w * g|, 0.5 %."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import ops
from ..checks import close
from ..harness import Case, Side, Work, WrongResultError

SIZE, DENSITY = 4096, 0.005
LAYERS, LAYER_SIZE = 36, 384


def setup(name: str, size: int, layers: int, dtype: torch.dtype, goal: float | None = None) -> Case:
    """Select among `layers` square matrices of `size`, ranked all together."""
    torch.manual_seed(0)
    weights = [torch.randn(size, size).to(dtype) for _ in range(layers)]
    grads = [torch.randn(size, size).to(dtype) for _ in range(layers)]
    total = layers * size * size
    k = round(DENSITY * total)

    def ours() -> list[Tensor]:
        return ops.topk_salience(weights, grads, k, metric="snip", scope="global")

    def materialised() -> Tensor:
        pairs = zip(weights, grads, strict=True)
        scores = [(weight * grad).abs().flatten() for weight, grad in pairs]
        return (torch.cat(scores) if layers > 1 else scores[0]).topk(k).indices

    def check() -> None:
        # Equal scores may be told apart in any way, so the selected scores are compared. They are
        # float32 products of the operands; the peer's are rounded to bfloat16 and choose others.
        pairs = zip(weights, grads, strict=True)
        score = torch.cat([(w.float() * g.float()).abs().flatten() for w, g in pairs])
        found = torch.cat([i.long() + n * size * size for n, i in enumerate(ours())])
        if found.unique().numel() != found.numel():
            raise WrongResultError("ours: an entry was selected twice")
        best = score.topk(k).values.double()
        close("ours", score[found].sort(descending=True).values.double(), best, 0.0)
        if dtype == torch.float32:
            close("torch", score[materialised()].double(), best, 0.0)

    operands = 2 * total * weights[0].element_size()
    # For each entry a product and a comparison. The score is what the other way adds.
    work = Work({"w and g": operands, "indices": 4 * k}, 2 * total)
    peer_work = Work({"w and g": operands, "score": operands, "indices": 8 * k}, 2 * total)
    peer = "(w*g).abs().topk(k)" if layers == 1 else "cat of |w*g|, topk(k)"
    goals = {} if goal is None else {peer: goal}
    sides = [Side("ours", ours, True, work, goals), Side(peer, materialised, False, peer_work)]
    return Case("topk_salience", name, sides, check, rounds=5)


_LARGE = f"{SIZE * SIZE / 1e6:.1f} M"
CASES = {
    "float32": partial(setup, f"{_LARGE} float32, {DENSITY:.1%}", SIZE, 1, torch.float32, 0.125),
    "bfloat16": partial(setup, f"{_LARGE} bfloat16, {DENSITY:.1%}", SIZE, 1, torch.bfloat16),
    "global": partial(
        setup,
        f"{LAYERS} matrices of {LAYER_SIZE} x {LAYER_SIZE} float32 together, {DENSITY:.1%}",
        *(LAYER_SIZE, LAYERS, torch.float32),
    ),
}
QUICK = ("global",)
