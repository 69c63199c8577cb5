"""The scoring pass: gradients streamed layer by layer out of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import accumulator_dtype
from ..errors import ConfigError, SalienceError
from .borrow import scoring_leaves

LossFn = Callable[[nn.Module, Any], Tensor]
Consume = Callable[[str, Tensor], None]

# For a loss that is not finite on weights as they were given.
REMEDY = "look at that batch and the weights of that layer, or score in a wider dtype"
# Sizes of batches that differ by more are said in the report.
_UNEVEN = 1.5


@dataclass
class PassStatistics:
    """What a scoring pass saw: `arrived` are the layers that it came to a statistic of."""

    batches: int = 0
    examples: int = 0
    largest_gradient_bytes: int = 0
    arrived: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    missing: str = "received no gradient: the loss does not depend on it"
    sizes: set[int] = field(default_factory=set)

    def note(self, name: str, statistic: Tensor) -> None:
        """Count a layer as arrived, and what came."""
        self.arrived.add(name)
        self.measure(statistic)

    def measure(self, statistic: Tensor) -> None:
        self.largest_gradient_bytes = max(self.largest_gradient_bytes, statistic.nbytes)

    def count(self, batch: Any) -> None:
        """Count the examples of a batch."""
        examples = count_examples(batch)
        self.examples += examples
        if examples:
            self.sizes.add(examples)

    def compare_sizes(self) -> None:
        """Note that batches of different sizes were added, of this process."""
        smallest, largest = min(self.sizes, default=1), max(self.sizes, default=1)
        if largest > _UNEVEN * smallest:
            self.notes.append(
                f"the batches hold {smallest} to {largest} examples, and their gradients are "
                "added: where the loss is a mean over its batch, an example counts the more the "
                "smaller its batch is"
            )

    def check(self, layers: Iterable[str], needs_data: bool = True) -> None:
        """Raise a SalienceError if there was no batch, or one of `layers` received no gradient."""
        if needs_data and not self.batches:
            raise SalienceError("there is no batch to score with: batches is empty")
        missing = [name for name in layers if name not in self.arrived]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SalienceError(
                f"layer {missing[0]!r}{more} {self.missing}. "
                "Name it in exclude_modules (with reentrant gradient checkpointing, "
                "use_reentrant=False helps)"
            )


class GradientSums:
    """A statistic of each layer, such as its gradient, summed over batches.

    Args:
        layers: name -> layer; their weights' dtypes decide the sums'.
        dtype: "float32" (float64 for a float64 weight), or "weight" for the weight's own.
        device: "model", or "cpu" to keep the sums in host memory.
        fold: "sum", "absolute" or "square": what is summed of each part.
    """

    def __init__(
        self, layers: Mapping[str, nn.Linear], dtype: str, device: str, fold: str = "sum"
    ) -> None:
        self._device, self._fold = device, fold
        self._dtypes = {
            name: weight.dtype if dtype == "weight" else accumulator_dtype(weight.dtype)
            for name, weight in ((name, layer.weight) for name, layer in layers.items())
        }
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, part: Tensor) -> None:
        """Fold a part in. It may be kept: the caller must not write into it afterwards."""
        part = folded(part, self._fold)
        if name in self.sums:
            total = self.sums[name]
            total.add_(part.to(total.device))
        else:
            device = part.device if self._device == "model" else torch.device("cpu")
            self.sums[name] = part.to(dtype=self._dtypes[name], device=device)

    @property
    def nbytes(self) -> int:
        return sum(total.nbytes for total in self.sums.values())


def folded(gradient: Tensor, fold: str) -> Tensor:
    """Return what `SpeftConfig.accumulate` makes of one batch's gradient, which is consumed."""
    if fold == "absolute":
        return gradient.abs_()
    if fold == "square":
        # A half's square is out of its range.
        return gradient.to(accumulator_dtype(gradient.dtype)).square_()
    return gradient


def arrives_in_parts(name: str) -> SalienceError:
    return SalienceError(
        f"the gradient of layer {name!r} arrives in parts, as reentrant checkpointing of a shared "
        "layer makes it, and this way of scoring needs the whole: use use_reentrant=False"
    )


def stream_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    consume: Consume,
    *,
    whole: bool = False,
) -> PassStatistics:
    """Run a backward pass a batch; each gradient goes to `consume(name, gradient)` on arrival.

    A batch counts by its loss. Where that is a mean, examples of batches of different sizes count
    differently, which the statistics note from a factor of 1.5 on: an example of a last batch of
    one counts as a whole batch of the others.

    The gradient `[N, K]` is released from the graph before the call and belongs to `consume`, so at
    no time does more than one layer's gradient exist besides what `consume` keeps. To be called
    with the model `borrowed`.

    Args:
        whole: refuse a gradient that arrives in parts within one batch.

    Raises:
        SalienceError: a loss is not finite, not a scalar, or depends on no layer.
        ConfigError: the default loss does not fit the model or the batches.
    """
    statistics = PassStatistics()
    of_this_batch: set[str] = set()

    def arrived(name: str, gradient: Tensor) -> None:
        if whole and name in of_this_batch:
            raise arrives_in_parts(name)
        of_this_batch.add(name)
        statistics.note(name, gradient)
        consume(name, gradient)

    with streaming_leaves(layers, arrived):
        for batch in batches:
            statistics.batches += 1
            of_this_batch.clear()
            evaluate_loss(model, batch, loss_fn, f"batch {statistics.batches}").backward()
            statistics.count(batch)
    statistics.compare_sizes()
    return statistics


@contextmanager
def streaming_leaves(
    layers: Mapping[str, nn.Linear], consume: Consume
) -> Iterator[dict[str, nn.Parameter]]:
    """`scoring_leaves` whose gradients go to `consume(name, gradient)` on arrival, without autograd
    and released from the leaf before.
    """

    def release(name: str, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        with torch.no_grad():
            consume(name, gradient)

    with scoring_leaves(layers) as leaves:
        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: release(name, leaf))
        yield leaves


def evaluate_loss(
    model: nn.Module, batch: Any, loss_fn: LossFn | None, label: str, *, remedy: str = REMEDY
) -> Tensor:
    """Return the loss of one batch: a finite scalar that requires grad.

    Args:
        batch: its tensors are moved to the model's device first.
        loss_fn: `loss_fn(model, batch)`; None means `model(**batch).loss`.
        label: how errors call the batch.
        remedy: what to do about a loss that is not finite.

    Raises:
        SalienceError: the loss is no scalar, not finite, or requires no grad.
        ConfigError: the default loss does not fit the model or the batch.
    """
    batch = to_device(batch, next(model.parameters()).device)

    def run() -> Tensor:
        return loss_fn(model, batch) if loss_fn is not None else _default_loss(model, batch, label)

    loss = run()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise SalienceError(f"the loss of {label} must be a scalar tensor, got {found}")
    if not bool(torch.isfinite(loss.detach()).all()):
        origin = first_non_finite(model, run)
        where = f"; layer {origin!r} is the first whose output is not finite" if origin else ""
        raise SalienceError(f"the loss of {label} is {loss.item()}{where}: {remedy}")
    if not loss.requires_grad:
        raise SalienceError(
            f"the loss of {label} does not depend on any layer that is to train: loss_fn must not "
            "detach, nor run under no_grad; reentrant gradient checkpointing of a frozen model "
            "detaches too: use_reentrant=False does not"
        )
    return loss


def first_non_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Return the name of the first module without children that returns a NaN or an infinity."""
    found: list[str] = []

    def look(name: str, output: object) -> None:
        tensors = output if isinstance(output, (list, tuple)) else (output,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(name)

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    hooks = [
        module.register_forward_hook(lambda m, args, output, name=name: look(name, output))
        for name, module in leaves
        if name
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _default_loss(model: nn.Module, batch: Any, label: str) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"{label} is a {type(batch).__name__}; the default loss, model(**batch).loss, needs "
            "dicts: pass loss_fn"
        )
    output = model(**batch)
    if not hasattr(output, "loss"):
        raise ConfigError(
            f"{type(model).__name__} returns a {type(output).__name__} without a loss: pass loss_fn"
        )
    if output.loss is None:
        raise ConfigError(
            f"{type(model).__name__} returned no loss for {label}: add labels to the batches (they "
            f"have {', '.join(map(str, batch))}), or pass loss_fn"
        )
    loss: Tensor = output.loss
    return loss


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with its tensors on `device`, rebuilding dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def count_examples(batch: Any) -> int:
    """Return the length of the first tensor in `batch` along its first dimension, or 0."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 0
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    return next((count for count in map(count_examples, values) if count), 0)
