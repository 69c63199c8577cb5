"""One call of each operation, for what all operations promise alike: the same bits every time, the
current stream, no synchronisation, CUDA graphs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rig import DEVICE, DRY, LLAMA
from torch import Tensor

from speft_kernels import QuantizedWeight, SparsePattern, ops
from speft_kernels.plan import plan_of
from speft_kernels.testing import realistic_pattern

M, N, K = LLAMA
BLOCK = (8, 8)
# Tokens of the products with a sparse delta: few take another kernel than many, and of those 1, 16
# and 64 other tiles.
TOKENS = (M, 1) if DRY else (M, 64, 16, 1)
# Columns that parts of 64 make, as groups in four bits need them.
PACKED_K = 64 if DRY else K
# Bits, and columns that share a scale.
QUANTIZED = {"int8": (8, None), "int4": (4, 16 if DRY else 128)}


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
def _pattern(device: torch.device, seed: int = 0, columns: int = K) -> SparsePattern:
    return realistic_pattern((N, columns), 0.01, seed=seed).to(device)


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


def _product(
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int = M,
    twin: bool = False,
    base: str = "",
) -> Call:
    pattern = _pattern(device, columns=PACKED_K if base else K)
    n, k = pattern.shape
    x = _randn(tokens, n if twin else k, dtype=dtype, device=device)
    weight = _randn(n, k, dtype=dtype, device=device)
    values = _randn(pattern.nnz, dtype=torch.float32, device=device)
    packed = QuantizedWeight.quantize(weight, *QUANTIZED[base]) if base else weight
    product = ops.sparse_delta_matmul_grad_input if twin else ops.sparse_delta_matmul

    def run() -> Tensor:
        return product(x, packed, values, pattern, backend=backend)

    return Call(run, [x, values] if base else [x, weight, values])


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


def _products() -> dict[str, Kind]:
    found = {}
    for base, tokens, twin in itertools.product(("", *QUANTIZED), TOKENS, (False, True)):
        if base and tokens == M:
            continue  # W + D is written out, as in 16 bits
        words = ["sparse_delta_matmul", base, f"{tokens} tokens", "twin" if twin else ""]
        make = functools.partial(_product, tokens=tokens, twin=twin, base=base)
        found[", ".join(filter(None, words))] = Kind(make, ("sparse_delta_matmul",))
    return found


CALLS = {
    "keep_columns": Kind(_keep_columns, ("keep_columns",)),
    "sampled_grad": Kind(_sampled_grad, ("sampled_grad",)),
    "keep_columns, sampled_grad": Kind(_sampled_grad_kept, ("keep_columns", "sampled_grad")),
    "block_grad": Kind(_block_grad, ("block_grad",)),
    **_products(),
    "write_delta": Kind(_write_deltas, ("write_delta",)),
    "topk_salience": Kind(_topk_salience, ("topk_salience",), reads_back=True),
}


def make(name: str, backend: str, dtype: torch.dtype, device: torch.device = DEVICE) -> Call:
    return CALLS[name].make(backend, dtype, device)
