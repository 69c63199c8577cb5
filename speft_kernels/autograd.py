"""Thin autograd Functions: they save the least, call an operation, and compute nothing
themselves.

Each is given `kept`, what the backward pass needs of x (`ops.keep_columns`), or None where `values`
does not train; and `sink`, which takes the gradient of `values` in place of autograd, or None.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .dtypes import accumulator_dtype
from .errors import StaleWeightError
from .ops.sampled_grad import add_sampled_grad
from .pattern import SparsePattern
from .plan import SparsityPlan


class Sink(Protocol):
    """Where the gradients of values go that are accumulated in place (`flat.FlatValues`)."""

    @property
    def parameter(self) -> Tensor:
        """What an optimizer changes in place of the values."""

    def place(self, values: Tensor) -> tuple[Tensor, bool]:
        """The buffer for the gradient of `values`, and whether it holds one already."""

    def settle(self) -> None:
        """Called before an optimizer changes the parameter."""


def accumulates(leaf: Any) -> bool | None:
    """Whether the backward pass that is running adds to the `.grad` of a leaf, given by its node.
    False where it is for others alone (`autograd.grad`, `backward(inputs=...)`); None where it
    returns the leaf's gradient.
    """
    try:
        # torch has no public way to ask.
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        return None  # `autograd.grad` asks for this very leaf


def _values_gradient(ctx: Any, dy: Tensor, kept: Tensor) -> Tensor | None:
    plan, pattern = ctx.plan, ctx.plan.pattern
    if dy.dim() != 2:
        dy = dy.reshape(-1, dy.shape[-1])
    into_sink = accumulates(ctx.next_functions[1][0]) if ctx.sink is not None else None
    if into_sink is False:
        return None
    if into_sink:
        out, accumulate = ctx.sink.place(ctx.values)
    else:
        dtype = accumulator_dtype(dy.dtype)
        out, accumulate = dy.new_empty(pattern.values_shape, dtype=dtype), False
    if pattern.is_block:
        ops.block_grad(dy, kept, pattern, plan=plan, packed=True, out=out, accumulate=accumulate)
    else:
        add_sampled_grad(dy, kept, plan, out, accumulate)
    return None if into_sink else out


def version_of(tensor: Tensor, sink: Sink | None = None) -> int:
    """Return how often a tensor has been written to, by itself or as a part of a sink's parameter.
    Tensors of the inference mode do not count it.
    """
    own: int = 0 if tensor.is_inference() else tensor._version
    return own if sink is None else own + sink.parameter._version


def refuse_changed_values(values: Tensor, sink: Sink | None, version: int | None) -> None:
    """Raise StaleWeightError unless `version` is still that of the values. None is of no values."""
    if version_of(values, sink) != version:
        raise StaleWeightError(
            "the values of a SparseDeltaLinear changed between its forward and its backward pass, "
            "so the weight no longer matches this graph; call backward() before optimizer.step(), "
            "and run a new forward after it"
        )


def refuse_a_graph() -> None:
    """Raise NotImplementedError in a backward pass that is to be differentiated itself."""
    # Torch's `once_differentiable` raises only where a later pass runs through what it returned.
    # `autograd.grad`, and all of `autograd.functional`, take a path that ends there for a zero.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "a SparseDeltaLinear has no second derivative, and create_graph=True asks for one; "
            "desparsify the model first"
        )


def product(
    x: Tensor,
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pattern: SparsePattern,
    resident: bool,
) -> Tensor:
    """What `SparseLinear` computes, without a gradient."""
    if resident:
        # Under autocast x arrives in the lower precision, and the product casts the weight.
        assert weight is not None
        y = F.linear(x, weight, bias)
    elif weight is None:
        y = ops.delta_matmul(x, values, pattern)
    else:
        y = ops.sparse_delta_matmul(x, weight, values, pattern, bias)
    # Torch lets nobody write into a view that a Function returns, as `relu_` and `+=` do; and
    # products of more than two dimensions are views.
    return y.detach() if y._is_view() else y


def input_gradient(
    dy: Tensor, values: Tensor, weight: Tensor | None, pattern: SparsePattern, resident: bool
) -> Tensor:
    """The gradient of `product` to x."""
    if resident:
        assert weight is not None
        return dy @ weight.to(dy.dtype)
    if weight is None:
        return ops.delta_matmul_grad_input(dy, values, pattern)
    return ops.sparse_delta_matmul_grad_input(dy, weight, values, pattern)


class SparseLinear(torch.autograd.Function):
    """`y = x @ (W + D)^T + b`. `resident`: the weight holds `base + values` already, so forward and
    input gradient are the frozen layer's own two GEMMs; else it is never written, and None stands
    for `y = x @ D^T` alone.

    Saved for the backward pass: `kept`; a reference to `weight`, where `x` needs a gradient.

    Shapes: x `[..., K]`, values `plan.pattern.values_shape`, weight `[N, K]`, bias `[N]` or None; y
        `[..., N]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        kept: Tensor | None,
        plan: SparsityPlan,
        sink: Sink | None,
        resident: bool,
    ) -> Tensor:
        ctx.plan, ctx.sink, ctx.values, ctx.resident = plan, sink, values, resident
        ctx.version = version_of(values, sink)
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None)
        return product(x, values, weight, bias, plan.pattern, resident)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_a_graph()
        refuse_changed_values(ctx.values, ctx.sink, ctx.version)
        kept, weight = ctx.saved_tensors
        d_values = None if kept is None else _values_gradient(ctx, dy, kept)
        dx = None
        if ctx.needs_input_grad[0]:
            values = ctx.values.detach()
            dx = input_gradient(dy, values, weight, ctx.plan.pattern, ctx.resident)
        d_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return dx, d_values, None, d_bias, None, None, None, None
