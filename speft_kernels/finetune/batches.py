"""Batches of examples of similar length, in an order that only the seed and the epoch decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Batches sorted by length together: more saves padding, fewer keeps the order closer to random.
_POOL = 32


@dataclass(frozen=True)
class Batch:
    """Model inputs (`[batch, tokens]`, labels included) and their sizes, known without a device.

    `count` is the number of items the loss averages over (examples, or target tokens), `tokens` the
    number of real tokens, padding left out.
    """

    inputs: dict[str, Tensor]
    count: int
    tokens: int

    def to(self, device: torch.device) -> Batch:
        moved = {key: tensor.to(device, non_blocking=True) for key, tensor in self.inputs.items()}
        return Batch(moved, self.count, self.tokens)


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Positions of the examples of each batch of one epoch; every example occurs once.

    Shuffled, sorted by length within pools of some batches, cut into batches, and the batches
    shuffled again. A function of its arguments alone, so a resumed run finds its place.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator, device="cpu").tolist()
    pool = batch_size * _POOL
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches += [
            by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)
        ]
    shuffled = torch.randperm(len(batches), generator=generator, device="cpu").tolist()
    return [batches[i] for i in shuffled]


def length_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches for evaluation: sorted by length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
