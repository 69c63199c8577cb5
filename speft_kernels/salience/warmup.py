"""Training the task head alone before scoring: the gradients behind a fresh head are noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import SalienceError
from . import processes
from .accumulate import REMEDY, LossFn, evaluate_loss


def warm_up(
    model: nn.Module,
    head: Sequence[nn.Parameter],
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    *,
    steps: int,
    lr: float,
) -> None:
    """Take `steps` AdamW steps without decay on the parameters `head`, cycling over `batches`.

    To be called with the model `borrowed`.

    Raises:
        SalienceError: there is no batch, or a loss is not finite or does not depend on the head.
    """
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head, lr=lr, weight_decay=0.0)
    step = 0
    while step < steps:
        before = step
        for batch in batches:
            step += 1
            remedy = REMEDY if step == 1 else f"lower the head's learning rate, {lr:g}"
            label = f"head warm-up step {step}"
            evaluate_loss(model, batch, loss_fn, label, remedy=remedy).backward()
            if processes.count() > 1:
                processes.average_gradients(head)
            optimizer.step()
            optimizer.zero_grad()
            if step == steps:
                break
        if step == before:
            raise SalienceError("there is no batch to warm the head up with: batches is empty")
    for parameter in head:
        parameter.requires_grad_(False)
