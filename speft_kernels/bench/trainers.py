"""The sides of the step benchmark: a copy of the model each, prepared by one method."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import SpeftConfig
from ..flat import FlatValues
from ..model import apply_patterns, sparse_layers
from ..pattern import SparsePattern
from .masks import Batch

LR = 1e-4
HEAD = "classifier"
LORA_RANK = 8

# Prepares a model in place and returns what to call for the loss.
Prepare = Callable[[nn.Module], nn.Module]


class Trainer:
    """A prepared copy of a model, its optimizer, and batches that come round and round.

    Every side computes the input gradient through all layers, as in a model whose first layers are
    not the only ones that train, and every side has the same fused AdamW.

    Args:
        share: the copy has the model's own parameters, not copies: for a model so large that the
            sides have room for one. A side must then leave its frozen weights as good as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Prepare,
        batches: Sequence[Batch],
        *,
        share: bool = False,
    ) -> None:
        kept = {id(p): p for p in model.parameters()} if share else {}
        self.core = copy.deepcopy(model, kept)
        self.core.get_input_embeddings().register_forward_hook(_with_gradient)  # type: ignore[operator]
        self.model = prepare(self.core)
        self.masked = [m for m in self.core.modules() if isinstance(m, DenseMaskLinear)]
        deltas = {id(layer.delta) for layer in self.masked}
        trained = [p for p in self.model.parameters() if p.requires_grad and id(p) not in deltas]
        self.entries = sum(p.numel() for p in trained)
        sparse = {id(layer.values) for layer in sparse_layers(self.core).values()}
        if sparse:
            flat = FlatValues(self.core).parameter
            trained = [flat, *(p for p in trained if id(p) not in sparse)]
        # The floor of a model without a head trains nothing.
        self.optimizer = torch.optim.AdamW(trained, lr=LR, fused=True) if trained else None
        self._first, self._batches = batches[0], itertools.cycle(batches)

    def loss(self, batch: Batch | None = None) -> Tensor:
        """The loss of a batch, by default always the same one."""
        loss: Tensor = self.model(**(batch or self._first)).loss
        return loss

    def backward(self, batch: Batch | None = None) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        for layer in self.masked:
            layer.gather()
        return loss.detach()

    def step(self) -> None:
        self.backward(next(self._batches))
        if self.optimizer is not None:
            self.optimizer.step()
        for layer in self.masked:
            layer.scatter()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def gradients(self, patterns: Mapping[str, SparsePattern]) -> dict[str, Tensor]:
        """Layer's name -> gradient of its entries in `patterns`, of the first batch.

        For sides that train these entries, or all of them.
        """
        self.backward()
        found = {}
        for name, pattern in patterns.items():
            layer: Any = self.core.get_submodule(name)
            trained = layer.values if hasattr(layer, "values") else layer.weight
            grad = trained.grad.detach().clone().view(-1)
            found[name] = grad if hasattr(layer, "values") else grad[pattern.entry_indices.long()]
        self.forget_gradients()
        return found


def _with_gradient(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


class DenseMaskLinear(nn.Module):
    """The delta as a dense tensor under a mask: `y = x @ (W0 + mask * delta)^T + b`.

    Autograd computes the whole dense gradient; the optimizer holds the masked entries alone,
    `values`, which `gather` gives their gradient and `scatter` writes back.
    """

    def __init__(self, linear: nn.Linear, pattern: SparsePattern) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.delta = nn.Parameter(torch.zeros_like(linear.weight))
        self.values = nn.Parameter(torch.zeros(pattern.nnz))
        self.mask: Tensor
        self.register_buffer("mask", pattern.mask().to(linear.weight.dtype))
        self._flat = pattern.entry_indices.long()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.mask * self.delta, self.bias)

    def gather(self) -> None:
        assert self.delta.grad is not None
        self.values.grad = self.delta.grad.view(-1)[self._flat]
        self.delta.grad = None

    def scatter(self) -> None:
        with torch.no_grad():
            self.delta.view(-1)[self._flat] = self.values


def frozen(model: nn.Module) -> nn.Module:
    """Everything but the head; the floor."""
    model.requires_grad_(False)
    model.get_submodule(HEAD).requires_grad_(True)
    return model


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def speft(patterns: Mapping[str, SparsePattern]) -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        apply_patterns(model, patterns, SpeftConfig())
        return model

    return prepare


def compiled(prepare: Prepare) -> Prepare:
    """The same, compiled by torch's default compiler, Inductor."""

    def prepare_and_compile(model: nn.Module) -> nn.Module:
        found: nn.Module = torch.compile(prepare(model))  # type: ignore[assignment]
        return found

    return prepare_and_compile


def dense_mask(patterns: Mapping[str, SparsePattern]) -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        frozen(model)
        for name, pattern in patterns.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, DenseMaskLinear(layer, pattern))
        return model

    return prepare


def peft_methods(patterns: Mapping[str, SparsePattern]) -> dict[str, Prepare]:
    """PEFT's LoRA, SHiRA and Super-Tuning on the layers of `patterns`; the latter two at as nearly
    the number of entries of `patterns` as their settings allow.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    import peft

    entries = sum(pattern.nnz for pattern in patterns.values())
    size = sum(n * k for n, k in _shapes(patterns))
    # SHiRA trains r (N + K) entries of each layer, r being whole.
    rank = max(1, round(entries / sum(n + k for n, k in _shapes(patterns))))
    where: dict[str, Any] = {"target_modules": list(patterns), "modules_to_save": [HEAD]}
    configs: dict[str, Any] = {
        f"PEFT LoRA r={LORA_RANK}": peft.LoraConfig(r=LORA_RANK, **where),
        f"PEFT SHiRA r={rank}": peft.ShiraConfig(r=rank, random_seed=0, **where),
    }
    if hasattr(peft, "SupertuningConfig"):  # not in the oldest PEFT that this package supports
        sparsity = 1 - entries / size
        configs["PEFT Super-Tuning"] = peft.SupertuningConfig(sparsity=sparsity, **where)

    def preparing(config: Any) -> Prepare:
        def prepare(model: nn.Module) -> nn.Module:
            adapted: nn.Module = peft.get_peft_model(model, config)
            return adapted.eval()

        return prepare

    return {name: preparing(config) for name, config in configs.items()}


def _shapes(patterns: Mapping[str, SparsePattern]) -> Iterable[tuple[int, int]]:
    return (pattern.shape for pattern in patterns.values())
