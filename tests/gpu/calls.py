"""One call of each operation, for what all operations promise alike: the same bits every time, the
current stream, no synchronisation, CUDA graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rig import DEVICE, LLAMA
from torch import Tensor

from speft_kernels import SparsePattern, ops
from speft_kernels.plan import plan_of
from speft_kernels.testing import realistic_pattern

M, N, K = LLAMA
BLOCK = (8, 8)


@dataclass
class Call:
    """A call on tensors that stay where they are.

    Attributes:
        inputs: what `renew` fills with other numbers.
    """

    run: Callable[[], Tensor | list[Tensor]]
    inputs: list[Tensor] = field(default_factory=list)

    def outputs(self) -> list[Tensor]:
        found = self.run()
        return [found] if isinstance(found, Tensor) else found

    def renew(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.inputs:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))


@dataclass(frozen=True)
class Kind:
    """How to make a call of an operation.

    Attributes:
        needs: the operations that a backend must serve.
        reads_back: whether the operation has to read back from the device.
    """

    make: Callable[[str, torch.dtype, torch.device], Call]
    needs: tuple[str, ...]
    reads_back: bool = False


@functools.cache
def _pattern(device: torch.device, seed: int = 0) -> SparsePattern:
    return realistic_pattern((N, K), 0.01, seed=seed).to(device)


def _blocks(device: torch.device) -> SparsePattern:
    grid = (N // BLOCK[0]) * (K // BLOCK[1])
    chosen = torch.randperm(grid, generator=torch.Generator().manual_seed(0))
    return SparsePattern.from_blocks((N, K), BLOCK, chosen[: max(2, grid // 50)]).to(device)


def _randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _keep_columns(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    plan, x = plan_of(_pattern(device)), _randn(M, K, dtype=dtype, device=device)
    assert plan.kept_columns is not None
    return Call(lambda: ops.keep_columns(x, plan, backend=backend), [x])


def _sampled_grad(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    pattern = _pattern(device)
    dy, x = (_randn(M, size, dtype=dtype, device=device) for size in (N, K))
    return Call(lambda: ops.sampled_grad(dy, x, pattern, backend=backend), [dy, x])


def _sampled_grad_kept(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    pattern = _pattern(device)
    dy, x = (_randn(M, size, dtype=dtype, device=device) for size in (N, K))

    def run() -> Tensor:
        kept = ops.keep_columns(x, plan_of(pattern), backend=backend)
        return ops.sampled_grad(dy, kept, pattern, packed=True, backend=backend)

    return Call(run, [dy, x])


def _block_grad(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    pattern = _blocks(device)
    dy, x = (_randn(M, size, dtype=dtype, device=device) for size in (N, K))
    return Call(lambda: ops.block_grad(dy, x, pattern, backend=backend), [dy, x])


def _sparse_delta_matmul(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    pattern = _pattern(device)
    x, weight = (_randn(size, K, dtype=dtype, device=device) for size in (M, N))
    values = _randn(pattern.nnz, dtype=torch.float32, device=device)

    def run() -> Tensor:
        return ops.sparse_delta_matmul(x, weight, values, pattern, backend=backend)

    return Call(run, [x, weight, values])


def _twin(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    pattern = _pattern(device)
    dy = _randn(M, N, dtype=dtype, device=device)
    weight = _randn(N, K, dtype=dtype, device=device)
    values = _randn(pattern.nnz, dtype=torch.float32, device=device)

    def run() -> Tensor:
        return ops.sparse_delta_matmul_grad_input(dy, weight, values, pattern, backend=backend)

    return Call(run, [dy, weight, values])


def _write_deltas(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    patterns = [_pattern(device, seed) for seed in range(3)]
    weights = [_randn(N, K, dtype=dtype, device=device) for _ in patterns]
    base = [_randn(p.nnz, dtype=dtype, device=device) for p in patterns]
    values = [_randn(p.nnz, dtype=torch.float32, device=device) for p in patterns]

    def run() -> list[Tensor]:
        ops.write_deltas(weights, patterns, base, values, backend=backend)
        return weights

    return Call(run, values)


def _topk_salience(backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    weights = [_randn(N, K, dtype=dtype, device=device) for _ in range(2)]
    grads = [_randn(N, K, dtype=dtype, device=device) for _ in range(2)]

    def run() -> list[Tensor]:
        return ops.topk_salience(
            weights, grads, 0.01, metric="snip", scope="global", backend=backend
        )

    return Call(run, [*weights, *grads])


CALLS = {
    "keep_columns": Kind(_keep_columns, ("keep_columns",)),
    "sampled_grad": Kind(_sampled_grad, ("sampled_grad",)),
    "keep_columns, sampled_grad": Kind(_sampled_grad_kept, ("keep_columns", "sampled_grad")),
    "block_grad": Kind(_block_grad, ("block_grad",)),
    "sparse_delta_matmul": Kind(_sparse_delta_matmul, ("sparse_delta_matmul",)),
    "sparse_delta_matmul, twin": Kind(_twin, ("sparse_delta_matmul",)),
    "write_delta": Kind(_write_deltas, ("write_delta",)),
    "topk_salience": Kind(_topk_salience, ("topk_salience",), reads_back=True),
}


def make(name: str, backend: str, dtype: torch.dtype, device: torch.device = DEVICE) -> Call:
    return CALLS[name].make(backend, dtype, device)
