"""Training with a mask that moves, for tests."""

from __future__ import annotations

import copy

import torch
from tiny_models import mlp, mlp_config, pair_batches, pair_loss

from speft_kernels.carry import carry
from speft_kernels.dynamic import MovingMask
from speft_kernels.flat import FlatValues
from speft_kernels.model import sparse_layers, sparsify

BLOCKS = ((1, 1), (2, 2))


class Training:
    """A sparse MLP trained by Adam on its flat values, with a mask that moves."""

    def __init__(self, strategy, *, block_shape=(1, 1), dtype=torch.float32, **settings):
        self.base, self.dtype = mlp(dtype=dtype).eval(), dtype
        self.model = copy.deepcopy(self.base)
        settings = {"block_shape": block_shape, "density": 0.2, **settings}
        self.config = mlp_config(**settings)
        self.batches = pair_batches(3, dtype=dtype)
        sparsify(self.model, self.config, self.batches, pair_loss)
        self.mask = MovingMask(self.model, self.config, strategy)
        self.flat = FlatValues(self.model).parameter
        self.optimizer = torch.optim.Adam([self.flat], lr=0.05)

    def steps(self, count=3):
        for batch in pair_batches(count, dtype=self.dtype, seed=7):
            pair_loss(self.model, batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def move(self, progress=0.0, seed=1):
        batches = pair_batches(3, dtype=self.dtype, seed=seed)
        move = self.mask.update(self.model, batches, pair_loss, progress=progress)
        old, self.flat = self.flat, FlatValues(self.model).parameter
        moments = self.mask.strategy == "rigl"
        carry(self.optimizer, old, self.flat, self.model, move, moments)
        return move

    def weights(self):
        """Layer -> the weight that it computes with."""
        for layer in sparse_layers(self.model).values():
            layer.sync()
        return {n: x.weight.detach().clone() for n, x in sparse_layers(self.model).items()}

    def patterns(self):
        return {name: layer.pattern for name, layer in sparse_layers(self.model).items()}
