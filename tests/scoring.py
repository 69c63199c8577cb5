"""What scoring passes must come to, by definition, and what they came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speft_kernels.model import SpeftConfig
from speft_kernels.salience.borrow import borrowed
from speft_kernels.salience.hessian import hessian_gradients
from speft_kernels.salience.squared import stream_squared_gradients
from speft_kernels.salience.synflow import stream_synaptic_flow

# Sums in float64 in another order: thousands of terms of relative error 1e-16.
CLOSE = {"rtol": 1e-9, "atol": 1e-14}
Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).loss


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """That of a causal model, which computes its own in float32 whatever its dtype."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:])


def linear_layers(model: nn.Module, *heads: str) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in heads
    }


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def squares(model: nn.Module, layers: Mapping[str, nn.Linear], batches: Any, loss: Loss) -> Any:
    found: dict[str, Tensor] = {}

    def add(name: str, part: Tensor) -> None:
        found[name] = found[name] + part if name in found else part

    with borrowed(model, 0):
        stream_squared_gradients(model, layers, batches, loss, add)
    return found


def alone(batch: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Example i of a batch without the batch's padding."""
    mask = batch.get("attention_mask")
    length = None if mask is None else int(mask[i].sum())
    return {
        key: v[i : i + 1, :length] if v.dim() == 2 else v[i : i + 1] for key, v in batch.items()
    }


def one_backward_an_example(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Any, loss: Loss
) -> dict[str, Tensor]:
    model.eval()
    weights = [layer.weight for layer in layers.values()]
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        values = batch.values() if isinstance(batch, dict) else batch
        for i in range(len(next(iter(values)))):
            if isinstance(batch, dict):
                single = alone(batch, i)
                if (single["labels"] == -100).all():
                    continue
            else:
                single = tuple(value[i : i + 1] for value in batch)
            for out, g in zip(
                total, torch.autograd.grad(loss(model, single), weights), strict=True
            ):
                out += g.square()
    return dict(zip(layers, total, strict=True))


def hessian_product(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Any,
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """H g of the summed loss over the layers' weights, by torch's own hvp."""
    model.eval()
    names = [f"{name}.weight" for name in layers]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return sum(loss(self.model, batch) for batch in batches)

    wrapped = Wrapped()

    def total(*weights: Tensor) -> Tensor:
        given = {f"model.{name}": w for name, w in zip(names, weights, strict=True)}
        return torch.func.functional_call(wrapped, given)

    at = tuple(layer.weight.detach() for layer in layers.values())
    g = torch.autograd.functional.jacobian(total, at)
    return dict(zip(layers, torch.autograd.functional.hvp(total, at, g)[1], strict=True))


def grasp(model: nn.Module, layers: Any, config: SpeftConfig, batches: Any, loss: Any) -> Any:
    with borrowed(model, 0):
        return hessian_gradients(model, layers, config, batches, loss)


def flow(model: nn.Module, layers: Mapping[str, nn.Linear], forward: Any = None) -> Any:
    found: dict[str, Tensor] = {}
    with borrowed(model, 0):
        stream_synaptic_flow(model, layers, None, forward, found.__setitem__)
    return found


def best(scores: list[Tensor], density: float, scope: str) -> list[list[int]]:
    """Sorted flat indices of the top scores; ties go to the lowest index."""
    flat = [score.reshape(-1) for score in scores]
    if scope == "layer":
        return [
            sorted(
                score.argsort(descending=True, stable=True)[: max(1, round(density * len(score)))]
                .tolist()
            )
            for score in flat
        ]  # fmt: skip
    sizes = [len(score) for score in flat]
    everything = torch.cat(flat)
    count = max(1, round(density * len(everything)))
    chosen = everything.argsort(descending=True, stable=True)[:count].sort().values
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        [int(i) - start for i in chosen if start <= int(i) < start + size]
        for start, size in zip(starts, sizes, strict=True)
    ]


def block_sums(entries: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """The sum of each block of scores, in the order of the blocks."""
    (rows, cols), (bh, bw) = entries.shape, block_shape
    blocks = [
        entries[i : i + bh, j : j + bw].sum()
        for i in range(0, rows, bh)
        for j in range(0, cols, bw)
    ]
    return torch.stack(blocks)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 10)).double()


def chain_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(7, 10, dtype=torch.float64, generator=generator),
            torch.randint(0, 10, (7,), generator=generator),
        )
        for _ in range(count)
    ]
