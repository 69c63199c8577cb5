"""`carry`: an optimizer goes on with the values of a mask that has moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .dynamic import Move, is_frozen
from .model import sparse_layers
from .nn import SparseDeltaLinear


def carry(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    model: nn.Module,
    move: Move,
    moments: bool,
) -> None:
    """Let `optimizer` train `new` in the place of `old`, both flat values of `model`'s layers.

    Args:
        moments: False forgets them, as the paper does under "merge". Otherwise those of the entries
            that have an origin go along and the others' start from zero, but for the second moment
            of Adam and its kin. The count of the steps is one number for all and goes along, so
            nothing corrects a second moment that starts late: from zero, the first steps would be
            up to 6.6 times the learning rate. It starts where the mean squared gradient of
            `move.squares` says, times what the moments of the others are to theirs: batches of
            another size, clipping and dropout are in that ratio.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None or not moments:
        return
    optimizer.state[new] = found = {
        key: _moved(value, new, model, move)
        if isinstance(value, Tensor) and value.shape == old.shape
        else value
        for key, value in state.items()
    }
    if move.squares is not None and isinstance(found.get("exp_avg_sq"), Tensor):
        known = torch.cat([_values(move.origins[n] >= 0, x) for n, x in _with_values(model)])
        squares = torch.cat([move.squares[n].reshape(-1) for n, _ in _with_values(model)])
        expected = squares * _ratio(found["exp_avg_sq"][known], squares[known])
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if isinstance(found.get(key), Tensor):
                found[key][~known] = expected[~known].to(found[key].dtype)


def _with_values(model: nn.Module) -> list[tuple[str, SparseDeltaLinear]]:
    layers = sparse_layers(model).items()
    return [
        (name, layer) for name, layer in layers if layer.values.numel() and not is_frozen(layer)
    ]


def _values(units: Tensor, layer: SparseDeltaLinear) -> Tensor:
    """What is said of each entry or block, of each of its values."""
    return units.repeat_interleave(math.prod(layer.pattern.block_shape))


def _ratio(moments: Tensor, squares: Tensor) -> Tensor:
    """Sum over sum; 1 where either is zero, as of a mask of which nothing stayed."""
    above, below = moments.to(squares.dtype).sum(), squares.sum()
    return torch.where((above > 0) & (below > 0), above / below, 1.0)


def _moved(moments: Tensor, new: nn.Parameter, model: nn.Module, move: Move) -> Tensor:
    found = torch.zeros_like(new, dtype=moments.dtype)
    start, taken = 0, 0
    for name, layer in sparse_layers(model).items():
        if is_frozen(layer):
            continue
        origin = move.origins[name]
        size = math.prod(layer.pattern.block_shape)
        old_units = move.old_units[name]
        before = moments[start : start + old_units * size].view(old_units, size)
        part = found[taken : taken + layer.values.numel()].view(-1, size)
        known = origin >= 0
        part[known] = before[origin[known]]
        start, taken = start + before.numel(), taken + part.numel()
    return found
