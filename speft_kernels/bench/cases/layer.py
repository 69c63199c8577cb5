"""Forward and backward of one layer with a mask of 25 %, beside a frozen and a dense one: what a
crowded mask costs in memory.

The memory is the growth of the process's high-water mark in a second pass, ours less a frozen
layer's, over the bytes of the dense gradient that is never built. It is taken in a process of its
own whose heap gives back at once what is freed, after the kernels have freed what they keep from
call to call: a peak could hide in either.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from ... import _native
from ...nn import SparseDeltaLinear
from ...peak_memory import PeakMemory
from ...testing import uniform_pattern
from ..checks import agree, rounding_bound
from ..harness import Case, Saved, Side
from ..heap import release_heap

SIZE, DENSITY, TOKENS = 3072, 0.25, 64
# Beside the gradient of the values: sums, for each thread a chunk of dy and a block of x's columns,
# and one panel; from csrc/cpu/sampled_grad.cpp and parts.py.
SUMS, OF_A_THREAD, PANEL = 8 << 20, 768 << 10, 4 << 20


class Passes:
    """The same layer frozen, with sparse values, and trained whole, on the same operands."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.pattern = uniform_pattern((SIZE, SIZE), DENSITY)
        self.dense = nn.Linear(SIZE, SIZE, bias=False)
        self.frozen = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
        self.frozen.load_state_dict(self.dense.state_dict())
        self.ours = SparseDeltaLinear.from_linear(self.frozen, self.pattern)
        self.x = torch.randn(TOKENS, SIZE, requires_grad=True)
        self.dy = torch.randn(TOKENS, SIZE)

    def run(self, layer: nn.Module) -> Tensor:
        """The gradient of the input."""
        self.forget()
        layer(self.x).backward(self.dy)
        assert self.x.grad is not None
        return self.x.grad

    def forget(self) -> None:
        for tensor in (self.x, self.dense.weight, self.ours.values):
            tensor.grad = None


def extra_peaks(threads: int) -> tuple[int, int] | None:
    """Bytes over a frozen layer's: with sparse values, and trained whole. None where the process's
    mark cannot be reset or the heap keeps what is freed.
    """
    if not release_heap():
        return None
    torch.set_num_threads(threads)
    passes = Passes()
    layers = passes.frozen, passes.ours, passes.dense
    frozen, ours, dense = (_grown(passes, layer) for layer in layers)
    if frozen is None or ours is None or dense is None:
        return None
    return ours - frozen, dense - frozen


def _grown(passes: Passes, layer: nn.Module) -> int | None:
    passes.run(layer)  # builds plans and starts threads
    passes.forget()
    _native.release_scratch()
    peak = PeakMemory([torch.device("cpu")])
    before = peak.bytes()
    passes.run(layer)
    after = peak.bytes()
    if "since its start" in peak.source or before is None or after is None:
        return None
    return after - before


def setup() -> Case:
    passes, threads = Passes(), torch.get_num_threads()
    whole = 4 * SIZE * SIZE
    goal = (4 * passes.pattern.nnz + SUMS + threads * OF_A_THREAD + PANEL) / whole
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        peaks = process.submit(extra_peaks, threads).result()
    saved = None
    if peaks is not None:
        what = "extra memory (high-water mark) of its backward over a frozen one"
        saved = Saved(peaks[0], whole, round(goal, 3), what, "bytes of a dense gradient")

    def check() -> None:
        x, dy, weight = passes.x.detach(), passes.dy, passes.dense.weight.detach()
        exact = (dy.double() @ weight.double()).view(-1)
        bound = rounding_bound(SIZE, dy.double().abs() @ weight.double().abs())
        agree(sides, exact, bound.view(-1))
        passes.run(passes.ours)
        flat = passes.pattern.entry_indices.long()
        exact = (dy.double().t() @ x.double()).view(-1)[flat]
        bound = rounding_bound(TOKENS, dy.double().abs().t() @ x.double().abs())
        values = passes.ours.values.grad
        assert values is not None
        agree([Side("gradient of the values", lambda: values)], exact, bound.view(-1)[flat])

    sides = [
        Side(f"{DENSITY:.0%}-dense layer", lambda: passes.run(passes.ours), True, saved=saved),
        Side("frozen layer", lambda: passes.run(passes.frozen)),
        Side("dense layer", lambda: passes.run(passes.dense)),
    ]
    name = f"forward and backward, {SIZE} x {SIZE}, {TOKENS} tokens, uniform {DENSITY:.0%}"
    return Case("layer", name, sides, check)


CASES = {"crowded": setup}
QUICK = ("crowded",)
