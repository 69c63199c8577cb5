"""The squared gradient of each example, summed, out of one backward pass a batch (metric "fisher").

The gradient of one example's share of the loss by a linear layer's weight is `dy_b^T x_b`, from the
rows of the layer's input and of its output's gradient that belong to the example. Autograd computes
neither this nor the batch's dense gradient: the weights stay frozen, and the activations carry the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..dtypes import accumulator_dtype
from ..errors import SalienceError
from .accumulate import (
    Consume,
    LossFn,
    PassStatistics,
    arrives_in_parts,
    count_examples,
)
from .shares import loss_and_scales

# Elements of the buffer of single examples' gradients. 1 MB of float32 stays in a core's cache: the
# squares of a 384 x 1536 layer, 16 examples of 48 tokens, took 2.0 times its dense gradient so, and
# 2.4 times with 4 MB. A GPU needs more for a launch to be worth it (not measured).
_CPU_BUFFER, _GPU_BUFFER = 2**18, 2**24


def stream_squared_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    consume: Consume,
) -> PassStatistics:
    """Run a backward pass a batch; `consume(name, squares)` gets each layer's sum over its
    examples.

    `squares` is `[N, K]`, float32 (float64 for float64 layers), and belongs to `consume`. The
    gradient of an example is that of its own mean loss, as a batch of it alone would give: a
    batch's loss is a mean over its examples or, with labels of -100 among `batch["labels"]`, over
    the others (`shares.loss_and_scales`). An example without a label adds nothing. Calls of one
    layer are added before they are squared. Besides `squares` a layer takes a buffer of 2^18
    elements (2^24 on a GPU), or one row of the weight if that is more. To be called with the model
    `borrowed`.

    The examples lie along the first dimension of the batch's first tensor. A layer's input is `[B,
    ..., K]`, or `[B * T, K]` with the rows of an example next to each other; a two-dimensional
    input in another order cannot be told from that.

    Raises:
        SalienceError: a loss is not finite, not a scalar, or depends on no layer; the examples of a
            batch cannot be counted, a layer's rows not assigned to them, or their shares of the
            loss not told.
        ConfigError: the default loss does not fit the model or the batches.
    """
    statistics = PassStatistics(
        missing="received no gradient: the loss does not depend on it, or it is never called as a "
        "module, which is what salience 'fisher' observes"
    )
    with _tapped(layers, statistics, consume) as run_batch:
        for batch in batches:
            statistics.batches += 1
            label = f"batch {statistics.batches}"
            examples = count_examples(batch)
            if not examples:
                raise SalienceError(
                    f"{label} does not tell how many examples it has: salience 'fisher' takes the "
                    "length of its first tensor along the first dimension, and there is none"
                )
            run_batch(partial(loss_and_scales, model, batch, loss_fn, label, examples))
            statistics.examples += examples
    return statistics


class _Tap(torch.autograd.Function):
    """Hand a layer's input and its output's gradient to `arrived(x, dy)` in the backward pass.

    The anchor requires grad, so the output does, even of the first layer. The input is saved by
    autograd, so that gradient checkpointing computes it again as it does everything else, and a
    later write into it is noticed. The copy lets the model write into what it gets.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, arrived: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arrived = arrived
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.arrived(x, dy)
        return dy, None, None, None


@contextmanager
def _tapped(
    layers: Mapping[str, nn.Linear], statistics: PassStatistics, consume: Consume
) -> Iterator[Callable[[Callable[[], tuple[Tensor, list[float]]]], None]]:
    """Watch `layers`; yield a function that runs a batch's forward and backward pass, given what
    returns its loss and the scales of its examples.
    """
    expected: dict[str, int] = {}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    done: set[str] = set()
    scales: list[float] = []
    backward = False

    def finish(name: str) -> None:
        done.add(name)
        squares = square_sums(calls.pop(name), scales, f"layer {name!r}")
        statistics.note(name, squares)
        consume(name, squares)

    def arrived(name: str, x: Tensor, dy: Tensor) -> None:
        if name in done:
            raise arrives_in_parts(name)
        calls.setdefault(name, []).append((x, dy))
        # Reentrant checkpointing runs without autograd first: such a call is expected by nobody.
        if len(calls[name]) >= expected.get(name, 0):
            finish(name)

    def observe(name: str, anchor: Tensor, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not backward:  # a checkpoint's second forward pass is the same call
            expected[name] = expected.get(name, 0) + 1
        x = args[0] if args else kwargs["input"]
        watched: Tensor = _Tap.apply(output, x.detach(), anchor, lambda x, dy: arrived(name, x, dy))
        return watched

    def run_batch(loss: Callable[[], tuple[Tensor, list[float]]]) -> None:
        nonlocal scales, backward
        backward = False
        for kept in (expected, calls, done):
            kept.clear()
        total, scales = loss()
        backward = True
        total.backward()
        with torch.no_grad():
            for name in list(calls):  # the loss depends on some of the calls only
                finish(name)

    hooks = []
    try:
        for name, layer in layers.items():
            anchor = torch.zeros((), device=layer.weight.device, requires_grad=True)
            hooks.append(
                layer.register_forward_hook(
                    lambda m, args, kwargs, output, name=name, anchor=anchor: observe(
                        name, anchor, args, kwargs, output
                    ),
                    with_kwargs=True,
                )
            )
        yield run_batch
    finally:
        for hook in hooks:
            hook.remove()


def square_sums(calls: list[tuple[Tensor, Tensor]], scales: Sequence[float], label: str) -> Tensor:
    """Return `[N, K]`: the squares of the examples' gradients, each times its scale, summed.

    Args:
        calls: `(x, dy)` of each call of the layer; their gradients are added before squaring.
        scales: one for each example.

    Raises:
        SalienceError: see `stream_squared_gradients`.
    """
    examples = len(scales)
    inputs = [_by_example(x, examples, label) for x, _ in calls]
    outputs = [_by_example(dy, examples, label) for _, dy in calls]
    x = inputs[0] if len(calls) == 1 else torch.cat(inputs, dim=1)
    dy = outputs[0] if len(calls) == 1 else torch.cat(outputs, dim=1)
    dtype = torch.promote_types(x.dtype, dy.dtype)
    (_, steps, k), n = x.shape, dy.shape[2]
    wide = accumulator_dtype(dtype)
    if steps == 1:
        scaled_dy = dy[:, 0].to(wide) * dy.new_tensor(scales, dtype=wide)[:, None]
        return scaled_dy.square_().t() @ x[:, 0].to(wide).square()
    x, dy = x.to(dtype), dy.to(dtype).transpose(1, 2)
    total = torch.zeros(n, k, dtype=wide, device=x.device)
    buffer = _CPU_BUFFER if x.device.type == "cpu" else _GPU_BUFFER
    rows = min(n, max(1, buffer // k))
    at_once = max(1, buffer // (n * k))
    for start in range(0, n, rows):
        part = total[start : start + rows]
        for first in range(0, examples, at_once):
            chunk = slice(first, first + at_once)
            gradients = torch.bmm(dy[chunk, start : start + rows], x[chunk])
            for gradient, scale in zip(gradients, scales[chunk], strict=True):
                gradient = gradient.to(total.dtype)
                part.addcmul_(gradient, gradient, value=scale**2)
    return total


def _by_example(rows: Tensor, examples: int, label: str) -> Tensor:
    """Return a view `[B, T, features]` of a layer's input or output gradient."""
    flat = rows.dim() == 2 and rows.shape[0] % examples == 0
    if not flat and (rows.dim() < 2 or rows.shape[0] != examples):
        raise SalienceError(
            f"salience 'fisher' cannot tell which rows of {label} belong to which of the "
            f"{examples} examples of the batch: its tensor has shape {tuple(rows.shape)}, where "
            f"({examples}, ..., {rows.shape[-1]}) or (a multiple of {examples}, "
            f"{rows.shape[-1]}) was expected. Name it in exclude_modules"
        )
    return rows.reshape(examples, -1, rows.shape[-1])
