"""Forward and backward of one bf16 layer: the frozen layer, which is the floor, SparseDeltaLinear,
and PEFT's layers around the same weight.

Every side computes its output, the input gradient, and the gradients of what it trains.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....nn import SparseDeltaLinear
from ...checks import close, flat
from ...harness import Saved, Work
from ...memory import saved_for_backward
from ..bounds import summation_bound
from ..problems import Spec, Workbench
from ..timing import GpuCase, GpuSide, reason, why_left_out
from .sampled_grad import exact_entries, is_goal

FROZEN = "frozen linear"
GOAL, GOAL_DENSITY = 1.10, 0.005
LORA_RANK = 16
LORA = f"PEFT LoRA r={LORA_RANK}"


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    """Have one backend serve all operations: a layer leaves the choice to the registry."""
    before = os.environ.get("SPEFT_BACKEND")
    os.environ["SPEFT_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("SPEFT_BACKEND")
        if before is not None:
            os.environ["SPEFT_BACKEND"] = before


class _One(nn.Module):
    """A model of one layer, which PEFT can adapt."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    pattern = bench.pattern_of(spec)
    dy, x = bench.operands(spec)
    x.requires_grad_()
    n, k = pattern.shape
    weight = bench.device.randn(n, k)
    exact = exact_entries(dy, x.detach(), pattern)
    bound = summation_bound(dy.shape[0], float(exact.abs().max()), dy.dtype)
    with torch.no_grad():
        # One product, rounded to bf16; adapters start by adding zeros.
        wide_y, wide_dx = x.double() @ weight.double().t(), dy.double() @ weight.double()
    eps = torch.finfo(x.dtype).eps

    def check(gradients: tuple[Tensor, ...], layer: nn.Module, ours: bool) -> None:
        for found, wanted, terms in ((layer(x), wide_y, k), (gradients[0], wide_dx, n)):
            # Of the largest result, for a vendor's product may add up parts that it has rounded.
            size = float(wanted.abs().max())
            bound_of_sum = summation_bound(terms, size, x.dtype) + 2 * eps * size
            close("y or dx", flat(found), flat(wanted), bound_of_sum)
        if ours:
            close("dv", flat(gradients[1]), exact, bound)

    def side(name: str, layer: nn.Module, ours: bool = False, **more: Any) -> GpuSide:
        trained = [p for p in layer.parameters() if p.requires_grad]

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), [x, *trained], dy)

        return GpuSide(
            name,
            run,
            ours,
            saved=_saved(layer, x),
            trained=sum(p.numel() for p in trained),
            check=partial(check, layer=layer, ours=ours),
            **more,
        )

    sides, left_out = [], {}
    goals = {FROZEN: GOAL} if is_goal(spec) and spec.density == GOAL_DENSITY else {}
    for backend in bench.backends("sampled_grad", "keep_columns", "write_delta"):
        bench.trying(backend)
        try:
            with served_by(backend):
                ours = SparseDeltaLinear.from_linear(_One(weight).linear, pattern)
                goal = {} if backend == "torch" else goals
                made = side(backend, ours, True, goals=goal, work=_work(dy, x, pattern.nnz))
            bench.device.synchronize()  # it ran forward
        except Exception as error:
            left_out[backend] = why_left_out(backend, error, bench.device)
            continue
        sides.append(_served(made, backend))
    bench.trying("")
    sides.append(side(FROZEN, _One(weight), work=_work(dy, x, 0)))
    adapters, absent = peft_layers(pattern.nnz, n, k)
    left_out.update(absent)
    for name, adapt in adapters.items():
        if not goals and "LoRA" not in name:
            continue  # their masks take seconds to draw, and they take longer than all else
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT about models that are not transformers'
                sides.append(side(name, adapt(_One(weight))))
        except Exception as error:
            left_out[name] = reason(error)
    return GpuCase("layer", bench.title(spec), sides, left_out)


def _served(side: GpuSide, backend: str) -> GpuSide:
    def run() -> object:
        with served_by(backend):
            return side.run()

    def check(output: Any) -> None:
        with served_by(backend):
            assert side.check is not None
            side.check(output)

    return replace(side, run=run, check=check)


def _saved(layer: nn.Module, x: Tensor) -> Saved:
    """Bytes kept for the backward pass; a PEFT model is a layer that contains others."""
    layer(x)  # plans
    return saved_for_backward([layer], lambda: layer(x))


def _work(dy: Tensor, x: Tensor, entries: int) -> Work:
    """The two products of the frozen layer, each reading what it multiplies and writing its
    result, and the sampled gradient.
    """
    tokens, n, k = dy.shape[0], dy.shape[1], x.shape[1]
    moved = {"x, y, dy, dx": 4 * (x.numel() + dy.numel()), "W twice": 4 * n * k}
    return Work(
        {**moved, "dv and its indices": 8 * entries},
        4 * tokens * n * k + 2 * tokens * entries,
        x.dtype,
    )


Adapters = dict[str, Callable[[nn.Module], nn.Module]]


def peft_layers(entries: int, n: int, k: int) -> tuple[Adapters, dict[str, str]]:
    """Name -> what adapts a model with a module `linear`, by PEFT's LoRA as it comes (its own
    weights in float32) and in bf16, SHiRA and Super-Tuning; the latter two with about `entries`
    trained. And name -> why it cannot be had.
    """
    names = (LORA, f"{LORA}, bf16", "PEFT SHiRA", "PEFT Super-Tuning")
    try:
        import peft
    except ImportError as error:
        return {}, dict.fromkeys(names, reason(error))
    where: dict[str, Any] = {"target_modules": ["linear"]}
    lora, rank = peft.LoraConfig(r=LORA_RANK, **where), max(1, round(entries / (n + k)))
    found: Adapters = {
        LORA: partial(_adapted, config=lora),
        f"{LORA}, bf16": partial(_adapted, config=lora, autocast_adapter_dtype=False),
    }
    absent = {}
    for name, config, settings in (
        ("PEFT SHiRA", "ShiraConfig", {"r": rank, "random_seed": 0}),
        ("PEFT Super-Tuning", "SupertuningConfig", {"sparsity": 1 - entries / (n * k)}),
    ):
        if hasattr(peft, config):
            adapter = getattr(peft, config)(**settings, **where)
            found[name] = partial(_adapted, config=adapter)
        else:
            absent[name] = f"PEFT {peft.__version__} has no {config}"
    return found, absent


def _adapted(model: nn.Module, config: Any, **settings: Any) -> nn.Module:
    import peft

    adapted: nn.Module = peft.get_peft_model(model, config, **settings)
    return adapted.eval()
