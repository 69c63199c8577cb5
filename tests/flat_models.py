"""A small sparse model for the tests of FlatValues."""

from __future__ import annotations

import torch
from torch import nn

from speft_kernels import SparsePattern, SpeftConfig, apply_patterns
from speft_kernels.testing import realistic_pattern

NAMES = ("q", "k", "v", "o")


class Model(nn.Module):
    """Three layers that read one input, and one with blocks above them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, 64) for _ in "qkv")
        self.o = nn.Linear(64, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x)))


def patterns():
    some = {n: realistic_pattern((64, 48), 0.05, seed=i) for i, n in enumerate("qkv")}
    return {**some, "o": SparsePattern.from_blocks((32, 64), (4, 8), torch.tensor([1, 5, 30]))}


def sparse_model(mode="resident", seed=1):
    torch.manual_seed(seed)
    model = Model()
    config = SpeftConfig(density=0.05, mode=mode, modules_to_train=["head"])
    apply_patterns(model, patterns(), config)
    return model


def values(model):
    return [model.get_submodule(name).values for name in NAMES]
