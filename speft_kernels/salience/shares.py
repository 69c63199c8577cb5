"""What each example of a batch counts for in the batch's loss.

A loss is a mean over labels. Where some are -100 (padding, a prompt), an example with fewer labels
has a smaller share of that mean than the others, while a batch of it alone would be a mean over its
own labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import SalienceError
from .accumulate import LossFn, evaluate_loss

IGNORED = -100  # the label that losses leave out, torch's and transformers' default


def loss_and_scales(
    model: nn.Module, batch: Any, loss_fn: LossFn | None, label: str, examples: int
) -> tuple[Tensor, list[float]]:
    """Return the batch's loss and, for each example, what makes its part of it its own mean.

    The labels are `batch["labels"]`, whole numbers `[B]` or `[B, T]`; of the B examples, example b
    has c_b labels other than -100 and the scale `sum(c) / c_b`, or 0 if it has none. Labels `[B,
    T]` are the next tokens or those of the same places: whichever leaves as many as the loss's
    `cross_entropy` averages over. Without such labels, and where all examples have as many, each
    has the scale B.

    Args:
        examples: B; the rest as for `evaluate_loss`.

    Raises:
        SalienceError: the examples have different numbers of labels, and the loss calls no
            `cross_entropy` over all of them.
        SalienceError, ConfigError: as `evaluate_loss`.
    """
    candidates = _counts(batch, examples)
    if all(len(set(counts)) == 1 for counts in candidates):
        return evaluate_loss(model, batch, loss_fn, label), [float(examples)] * examples
    with _Averaged() as averaged:
        loss = evaluate_loss(model, batch, loss_fn, label)
    for counts in candidates:
        if sum(counts) == averaged.labels:
            return loss, [sum(counts) / count if count else 0.0 for count in counts]
    raise SalienceError(
        f"the examples of {label} have different numbers of labels, and salience 'fisher' cannot "
        "tell how the loss weights them: it looks for a mean over all labels other than "
        f"{IGNORED} by torch.nn.functional.cross_entropy. Use that, or batches of one example"
    )


def _counts(batch: Any, examples: int) -> list[list[int]]:
    """Return the labels of each example, of the same places and, in `[B, T]`, of the next ones."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.dim() not in (1, 2)
        or labels.shape[0] != examples
    ):
        return []
    places = labels.reshape(examples, -1) != IGNORED
    shifts = (0,) if labels.dim() == 1 else (1, 0)
    return [places[:, shift:].sum(1).tolist() for shift in shifts]


class _Averaged(TorchFunctionMode):
    """Count the labels that calls of `cross_entropy` average, or add up, the losses of."""

    labels = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.cross_entropy and kwargs.get("reduction", "mean") != "none":
            target = args[1] if len(args) > 1 else kwargs["target"]
            ignored = kwargs.get("ignore_index", IGNORED)
            self.labels += int(torch.count_nonzero(target != ignored))
        return func(*args, **kwargs)
