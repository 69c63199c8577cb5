"""GraSP's statistic: the product of the loss's Hessian with its gradient, in two passes.

After Wang et al., "Picking winning tickets before training by preserving gradient flow" (arXiv
2002.07376): the first pass sums the gradient g over the batches, the second differentiates each
batch's gradient along it. Both loss and g are sums over all batches, so the result is H g of the
sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import SalienceError
from . import processes
from .accumulate import (
    Consume,
    GradientSums,
    LossFn,
    PassStatistics,
    evaluate_loss,
    stream_gradients,
    streaming_leaves,
)

if TYPE_CHECKING:
    from ..config import SpeftConfig

# What autograd says of an operation that has a gradient but no gradient of it.
_NO_SECOND_DERIVATIVE = (
    *("is not implemented", "once_differentiable", "differentiate twice", "double backward"),
    "not compatible with .grad()",
)


def hessian_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    config: SpeftConfig,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
) -> tuple[PassStatistics, dict[str, Tensor], int]:
    """Return what the first pass saw, each layer's `[N, K]`, and the bytes of both accumulators.

    It is H g, or -H g for `grasp_sign="code"`: ranked by -w times it either way. To be called with
    the model `borrowed`. An iterator is kept as a list, since the batches are gone over twice.

    Raises:
        SalienceError: as `stream_gradients`; or an operation of the model has no second derivative,
            or the two passes saw different numbers of batches.
    """
    kept: list[Iterable[Any]] = []

    def first_pass() -> PassStatistics:
        # Inside the pass, so that an error of the iterator ends it in every process.
        kept.append(list(batches) if isinstance(batches, Iterator) else batches)
        return stream_gradients(model, layers, kept[0], loss_fn, gradients.add)

    def second_pass() -> PassStatistics:
        return _stream_products(model, layers, kept[0], loss_fn, gradients.sums, products.add)

    gradients = GradientSums(layers, config.accumulator_dtype, config.accumulator_device)
    products = GradientSums(layers, config.accumulator_dtype, config.accumulator_device)
    with _Observed(config.grasp_temperature) as observed:
        statistics = processes.together(first_pass, layers, gradients)
        statistics.check(layers)
        second = processes.together(second_pass, layers, products)
    if (second.batches, second.examples) != (statistics.batches, statistics.examples):
        raise SalienceError(
            "salience 'grasp' goes over the batches twice and must see the same ones: first there "
            f"were {statistics.batches} batches of {statistics.examples} examples, then "
            f"{second.batches} of {second.examples}. Pass a list"
        )
    second.check(layers)
    for name, layer in layers.items():
        if name not in products.sums:  # no batch's gradient depends on this weight
            products.add(name, torch.zeros_like(layer.weight))
        if config.grasp_sign == "code":
            products.sums[name].neg_()
    if observed.attention:
        statistics.notes.append(
            "attention ran on its mathematical kernel (SDPBackend.MATH) in the second pass: the "
            "fused ones have no second derivative"
        )
    if config.grasp_temperature != 1 and not observed.cross_entropy:
        statistics.notes.append(
            f"grasp_temperature={config.grasp_temperature:g} had no effect: the loss never goes "
            "through torch.nn.functional.cross_entropy"
        )
    largest = max(statistics.largest_gradient_bytes, second.largest_gradient_bytes)
    statistics.largest_gradient_bytes = largest
    return statistics, products.sums, gradients.nbytes + products.nbytes


def _stream_products(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    along: Mapping[str, Tensor],
    consume: Consume,
) -> PassStatistics:
    """Differentiate each batch's gradients along `along`; products stream as gradients do."""
    # `arrived` are the layers with a gradient: its derivative may well be missing, and is 0 then.
    statistics = PassStatistics(
        missing="has a gradient that autograd cannot differentiate: reentrant gradient "
        "checkpointing hides it"
    )

    def arrived(name: str, product: Tensor) -> None:
        statistics.measure(product)
        consume(name, product.detach())

    with sdpa_kernel(SDPBackend.MATH), streaming_leaves(layers, arrived) as leaves:
        for batch in batches:
            statistics.batches += 1
            loss = evaluate_loss(model, batch, loss_fn, f"batch {statistics.batches}")
            with _explained():
                statistics.arrived |= _differentiate_twice(loss, leaves, along)
            statistics.count(batch)
    return statistics


def _differentiate_twice(
    loss: Tensor, leaves: Mapping[str, Tensor], along: Mapping[str, Tensor]
) -> set[str]:
    """Leave H along `along` in the leaves' hooks; return the names that have a gradient."""
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), create_graph=True, allow_unused=True
    )
    # Where a loss is linear in all weights, its gradient depends on none.
    roots = [
        (gradient, along[name].to(gradient.device, gradient.dtype))
        for name, gradient in zip(leaves, gradients, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if roots:
        torch.autograd.backward([gradient for gradient, _ in roots], [g for _, g in roots])
    return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SalienceError) or not any(
            text in str(error) for text in _NO_SECOND_DERIVATIVE
        ):
            raise
        raise SalienceError(
            "salience 'grasp' needs second derivatives, and an operation of the model has none: "
            f"{error} (attn_implementation='eager' has them, and gradient checkpointing with "
            "use_reentrant=False)"
        ) from error


class _Observed(TorchFunctionMode):
    """Divide the logits of every `cross_entropy` by a temperature; note what the model calls."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.cross_entropy = self.attention = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            self.attention = True
        elif func is functional.multi_head_attention_forward:  # a mode sees no call inside it
            self.attention |= not kwargs.get("need_weights", True)
        elif func is functional.cross_entropy:
            self.cross_entropy = True
            if args:
                args = (args[0] / self.temperature, *args[1:])
            else:
                kwargs["input"] = kwargs["input"] / self.temperature
        return func(*args, **kwargs)
