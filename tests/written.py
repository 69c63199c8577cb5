"""Weights to write a delta into, for the tests of write_delta."""

from typing import NamedTuple

import torch
from kernels import accumulator, make_pattern
from torch import Tensor

from speft_kernels import SparsePattern


def take(weight, pattern):
    return weight.view(-1)[pattern.entry_indices.long()].reshape(pattern.values_shape)


class Weights(NamedTuple):
    weights: list[Tensor]
    patterns: list[SparsePattern]
    base: list[Tensor]
    values: list[Tensor]


def make_weights(dtype, shapes=((33, 17), (1, 5), (64, 48), (0, 3), (20, 20))):
    """Weights of several shapes with patterns of every kind, blocks and none among them."""
    kinds = ("uniform", "empty", "full", "realistic", "row", "single")
    patterns = [make_pattern(kinds[i % 6], *shape) for i, shape in enumerate(shapes) if all(shape)]
    patterns += [SparsePattern(shape, torch.arange(0)) for shape in shapes if not all(shape)]
    patterns.append(SparsePattern.from_blocks((12, 8), (3, 2), torch.tensor([1, 6, 9])))
    patterns.append(make_pattern("empty", 7, 7))
    weights = [torch.randn(pattern.shape).to(dtype) for pattern in patterns]
    base = [take(w, p).clone() for w, p in zip(weights, patterns, strict=True)]
    values = [torch.randn(p.values_shape, dtype=accumulator(dtype)) for p in patterns]
    return Weights(weights, patterns, base, values)
