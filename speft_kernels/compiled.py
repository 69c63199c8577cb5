"""A sparse layer within the graphs of `torch.compile`: operations that the compiler does not look
into.

A graph keeps what was so when it was made, and a layer goes by what is so when it is called: its
pattern, its mode, and whether its weight was written for its values. So at each call the operations
ask the layer: in the forward pass the one that holds the tensors they are given, which they know by
the addresses, and in the backward pass the one that the forward pass found.

The layer may write into its weight then, as it does outside of a graph. The schema does not speak
of it: declared, a compiler might copy the weight instead. What a graph could do with a tensor that
it takes for constant does no harm here, as nothing but these operations reads the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops, stepping
from .autograd import input_gradient, product, refuse_a_graph, refuse_changed_values, version_of
from .dtypes import accumulator_dtype
from .ops._library import operation, refuse_tangents
from .pattern import SparsePattern
from .row_panels import KEEP_COLUMNS_SHARE

if TYPE_CHECKING:
    from .nn import SparseDeltaLinear


def columns_to_keep(pattern: SparsePattern) -> Tensor | None:
    """int32 `[C]`, sorted: the columns of its input that a compiled layer keeps for the backward
    pass; None for all of it.
    """
    if pattern.device.type == "meta":
        return None
    used = pattern.used_cols
    return used if used.numel() <= KEEP_COLUMNS_SHARE * pattern.shape[1] else None


def forward(
    layer: SparseDeltaLinear, x: Tensor, untraced: Callable[[SparseDeltaLinear, Tensor], Tensor]
) -> Tensor:
    """A layer's forward pass as a graph is made of it. What cannot be a part of one, or is to be
    refused, runs `untraced`, as it does without a graph.
    """
    parameters = layer._parameters
    values, weight = parameters.get("values"), parameters.get("weight")
    # `functional_call` has other tensors in their place.
    own = isinstance(values, nn.Parameter) and isinstance(weight, (nn.Parameter, type(None)))
    if not own:
        return untraced(layer, x)
    assert values is not None
    if layer.base is not None:
        y: Tensor = layer.base(x)
        if layer.pattern.is_empty:
            return y
        return y + _traced(layer, x.to(y.dtype), values, None, None)
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    trains = torch.is_grad_enabled() and weight is not None and weight.requires_grad
    if weight is None or trains or (weight.dtype != x.dtype and not cast):
        return untraced(layer, x)
    if layer.pattern.is_empty:
        return F.linear(x, weight, layer.bias)
    if cast:
        x = x.to(torch.get_autocast_dtype(device))
    return _traced(layer, x, values, weight, layer.bias)


def _traced(
    layer: SparseDeltaLinear,
    x: Tensor,
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`autograd.SparseLinear` of a layer's own tensors. x is of another dtype than the weight only
    where autocast has made it so.
    """
    refuse_tangents("speft::sparse_linear", x)  # as for the other operations, before the dispatcher
    y: Tensor = torch.ops.speft.sparse_linear(
        x, values, weight, bias, layer.kept_columns, layer.out_features
    )[0]
    return y


# The layers that were called, by the addresses of their values.
_known: dict[int, weakref.ref[SparseDeltaLinear]] = {}


def _layer_of(values: Tensor, weight: Tensor | None) -> SparseDeltaLinear:
    """The layer that holds these very tensors."""
    wanted = values.data_ptr(), _address(weight)

    def holds(layer: SparseDeltaLinear | None) -> bool:
        if layer is None:
            return False
        # Any layer may be asked, also one whose values are computed, so that it holds none.
        held = layer._parameters
        return wanted == (_address(held.get("values")), _address(held.get("weight")))

    known = _known.get(wanted[0])
    layer = None if known is None else known()
    if not holds(layer):
        # Called for the first time, moved, or gone.
        layer = next(filter(holds, stepping.alive()), None)
        if layer is None:
            raise RuntimeError(
                "a compiled SparseDeltaLinear was given tensors that no layer holds, such as those "
                "of another model by functional_call, or of a program that torch.export saved: "
                "call it without torch.compile, or desparsify the model before it is exported"
            )
        for address, ref in list(_known.items()):
            if ref() in (None, layer):
                _known.pop(address, None)
        _known[wanted[0]] = weakref.ref(layer)
    assert layer is not None
    return layer


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


# A graph on a GPU that is replayed without Python would write no weight.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@operation("speft::sparse_linear", tags=_TAGS)
def _sparse_linear(
    x: Tensor,
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """Return y; and int64 `[3]`, which layer it is of, which values, and which version of them."""
    layer = _layer_of(values, weight)
    if weight is not None:
        layer.sync_if_changed()
    version = version_of(layer.values, layer.sink)
    used = torch.tensor([layer.number, id(layer.values), version])
    values = values.to(accumulator_dtype(x.dtype))
    weight, bias = _cast(weight, x.dtype), _cast(bias, x.dtype)
    with torch.no_grad():
        y = product(x, values, weight, bias, layer.pattern, layer.mode == "resident")
    return y.contiguous(), used  # as the fake has it


@_sparse_linear.register_fake
def _(x, values, weight, bias, columns, out_features):  # type: ignore[no-untyped-def]
    used = torch.empty(3, dtype=torch.int64, device="cpu")
    return x.new_empty(*x.shape[:-1], out_features), used


@operation("speft::sparse_linear_grad_input", tags=_TAGS)
def _grad_input(
    dy: Tensor, values: Tensor, weight: Tensor | None, used: Tensor, in_features: int
) -> Tensor:
    layer = _unchanged(used)
    values, weight = values.to(accumulator_dtype(dy.dtype)), _cast(weight, dy.dtype)
    with torch.no_grad():
        dx = input_gradient(dy, values, weight, layer.pattern, layer.mode == "resident")
    return dx.contiguous()  # as the fake has it


@_grad_input.register_fake
def _(dy, values, weight, used, in_features):  # type: ignore[no-untyped-def]
    return dy.new_empty(*dy.shape[:-1], in_features)


@operation("speft::sparse_linear_grad_values", tags=_TAGS)
def _grad_values(dy: Tensor, kept: Tensor, values: Tensor, used: Tensor) -> Tensor:
    pattern = _unchanged(used).pattern
    if kept.shape[-1] != pattern.shape[1]:
        pattern = _within_used_columns(pattern)
    gradient = ops.block_grad if pattern.is_block else ops.sampled_grad
    with torch.no_grad():
        return gradient(dy, kept, pattern).to(values.dtype)


@_grad_values.register_fake
def _(dy, kept, values, used):  # type: ignore[no-untyped-def]
    return torch.empty_like(values)


def _unchanged(used: Tensor) -> SparseDeltaLinear:
    """The layer, if its values still are those of the forward pass. Not by the addresses of what
    was saved: a hook on saved tensors gives others back, as `save_on_cpu` does.
    """
    number, held, version = used.tolist()
    layer = stepping.by_number(number)
    if layer is None:
        raise RuntimeError(
            "a compiled SparseDeltaLinear no longer exists when its backward pass runs: keep the "
            "model until then"
        )
    # Others, as `load_state_dict(assign=True)` puts there, may have the version of the former ones.
    version = version if id(layer.values) == held else None
    refuse_changed_values(layer.values, layer.sink, version)
    return layer


def _within_used_columns(pattern: SparsePattern) -> SparsePattern:
    """The pattern of a weight that has no other columns, made once for each."""
    found: SparsePattern | None = vars(pattern).get("_within_used_columns")
    if found is None:
        groups, place = torch.unique(pattern.block_cols, return_inverse=True)
        indices = pattern.block_rows.long() * groups.numel() + place
        shape = pattern.shape[0], pattern.used_cols.numel()
        found = SparsePattern(shape, indices, pattern.block_shape)
        vars(pattern)["_within_used_columns"] = found
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, weight, _, columns, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.set_materialize_grads(False)
    kept = None
    if ctx.needs_input_grad[1]:
        # By an operation that the compiler knows: it makes that a part of what computes x, and
        # weighs whether to keep x itself, for all layers that read it.
        kept = x if columns is None else x.detach().index_select(-1, columns)
    # Nothing else of the layer: autograd would refuse to go on where buffers were written to, as
    # data-parallel training does at each pass.
    weight = weight if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(kept, values, weight, output[1])


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_a_graph()
    kept, values, weight, used = ctx.saved_tensors
    dx = d_values = d_bias = None
    if dy is not None:
        if ctx.needs_input_grad[0]:
            dx = torch.ops.speft.sparse_linear_grad_input(dy, values, weight, used, ctx.in_features)
        if ctx.needs_input_grad[1]:
            d_values = torch.ops.speft.sparse_linear_grad_values(dy, kept, values, used)
        if ctx.needs_input_grad[3]:
            d_bias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, d_values, None, d_bias, None, None


_sparse_linear.register_autograd(_backward, setup_context=_save)
