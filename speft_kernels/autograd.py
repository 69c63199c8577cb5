"""Thin autograd Functions: they save the least, call an operation, and compute nothing
themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import ops
from .errors import StaleWeightError
from .plan import SparsityPlan


class ResidentLinear(torch.autograd.Function):
    """`y = x @ W^T + b` for a weight that already holds `base + values` at its trained entries.

    Forward and input gradient are the frozen layer's own two GEMMs. Saved for the backward pass:
    the activation columns that the plan keeps (for a block pattern all of them), where `values`
    trains; a reference to `weight`, where `x` needs a gradient.

    Shapes: x `[M, K]`, values `plan.pattern.values_shape`, weight `[N, K]`, bias `[N]` or None; y
        `[M, N]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, plan: SparsityPlan
    ) -> Tensor:
        needs_x, needs_values, *_ = ctx.needs_input_grad
        ctx.plan, ctx.values, ctx.version = plan, values, values._version
        pattern = plan.pattern
        kept = None
        if needs_values:
            kept = x if pattern.is_block else plan.keep(x)
        ctx.save_for_backward(kept, weight if needs_x else None)
        # Under autocast x arrives in the lower precision, and the product casts the weight.
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.values._version != ctx.version:
            raise StaleWeightError(
                "the values of a SparseDeltaLinear changed between its forward and its backward "
                "pass, so the weight "
                "no longer matches this graph; call backward() before optimizer.step(), and run "
                "a new forward after it"
            )
        kept, weight = ctx.saved_tensors
        pattern = ctx.plan.pattern
        dx = d_values = None
        if weight is not None:
            dx = dy @ weight.to(dy.dtype)
        if kept is not None:
            d_values = (
                ops.block_grad(dy, kept, pattern)
                if pattern.is_block
                else ops.sampled_grad(dy, kept, pattern, plan=ctx.plan)
            )
        return dx, d_values, None, None, None
