"""Each GPU kernel on small tensors, against the reference.

What runs first on a GPU and under compute-sanitizer (sanitize.py), and in many orders of the
threads on a CPU (CUDA's, as backend "cuda-host"). The tensors end where they end, so that what
reads beyond them is seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ... import _cuda_native, _native, _triton, ops
from ...ops.ways import cuda_ways, topk_ways
from ...pattern import SparsePattern
from ...quantized import QuantizedWeight
from .stages import MISSING


@dataclass(frozen=True)
class Place:
    """Where the kernels run."""

    device: str
    backend: str

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape).to(self.device, dtype)

    def pattern(self, rows: int, columns: int, density: float) -> SparsePattern:
        return SparsePattern.from_mask(torch.rand(rows, columns) < density).to(self.device)


def block_grad(at: Place) -> Iterator[object]:
    # In another order, float32 sums of 1100 products of some 1 are off by 1e-4 at most.
    for block, shape in (((16, 16), (48, 64)), ((1, 64), (5, 128)), ((40, 24), (80, 48))):
        count = (shape[0] // block[0]) * (shape[1] // block[1])
        pattern = SparsePattern.from_blocks(shape, block, torch.arange(0, count, 2)).to(at.device)
        for tokens in (67, 300, 1100):
            dy, x = at.normal(tokens, shape[0]), at.normal(tokens, shape[1])
            ours, exact = (
                ops.block_grad(dy, x, pattern, backend=name) for name in (at.backend, "reference")
            )
            if not torch.allclose(ours, exact, rtol=1e-4, atol=1e-3):
                yield block, tokens


def sampled_grad(at: Place) -> Iterator[object]:
    # Patterns of one tile and of several, by strips and by lines; rows of whole vectors or not. 127
    # tokens end in the stage whose place the sums take.
    for (rows, columns), density in (((40, 33), 0.3), ((301, 40), 0.9), ((264, 500), 0.016)):
        pattern = at.pattern(rows, columns, density)
        for tokens in (127, 600) if rows == 40 else (127,):
            dy = at.normal(tokens, rows, dtype=torch.float16)
            x = at.normal(tokens, columns, dtype=torch.float16)
            ours, exact = (
                ops.sampled_grad(dy, x, pattern, backend=name) for name in (at.backend, "reference")
            )
            if not torch.allclose(ours, exact, rtol=1e-4, atol=1e-3):
                yield rows, tokens


def keep_columns(at: Place) -> Iterator[object]:
    x = at.normal(77, 150)
    columns = torch.arange(0, 150, 2, dtype=torch.int32, device=at.device)
    kept = torch.ops.speft.keep_columns(x, columns, 80, at.backend)
    if not torch.equal(kept[0, :, :77], x[:, ::2].t()) or bool(kept[0, :, 77:].any()):
        yield "turned"


def sparse_delta_matmul(at: Place) -> Iterator[object]:
    # Many tokens, in tiles of either height, and few; W in 16, 8 and 4 bits, and none. 200 columns
    # are as many turns as come back to the first stage.
    for tokens, columns, bits in (
        *((130, 200, 16), (40, 128, 8), (40, 128, 4), (40, 128, 0)),
        *((19, 136, 16), (19, 128, 8), (19, 128, 4), (19, 128, 0)),
    ):
        pattern = at.pattern(72, columns, 0.08)
        values = at.normal(pattern.nnz, dtype=torch.float32)
        weight = at.normal(72, columns)
        base = QuantizedWeight.quantize(weight, bits, 32) if bits in (8, 4) else weight
        magnitude = weight.float() if isinstance(base, Tensor) else base.dequantize(torch.float32)
        magnitude = magnitude.abs() if bits else torch.zeros_like(magnitude)
        magnitude.view(-1)[pattern.entry_indices.long()] += values.abs()
        x, dy = at.normal(tokens, columns), at.normal(tokens, 72)
        for operand, twin in ((x, False), (dy, True)):
            arguments = (operand, base if bits else None, values, pattern, twin)
            exact = _product(*arguments, "reference").float()
            if at.backend in _cuda_native.MODULES and tokens > 32:
                ways = cuda_ways(*arguments, at.backend)
            else:
                ways = {at.backend: partial(_product, *arguments, at.backend)}
            # Ours rounds W + D and then y, the reference x @ W and x @ D, of which no more than the
            # terms' magnitudes is rounded, and then their sum: four times 2^-8 of these magnitudes,
            # as bfloat16 has 8 bits. Of a quantized W both multiply the same rounded numbers.
            spread = operand.float().abs() @ (magnitude if twin else magnitude.t())
            for way, ours in ways.items():
                if bool(((ours().float() - exact).abs() > 4 * 2.0**-8 * spread).any()):
                    yield tokens, bits, twin, way


def _product(
    operand: Tensor,
    base: Tensor | QuantizedWeight | None,
    values: Tensor,
    pattern: SparsePattern,
    twin: bool,
    backend: str,
) -> Tensor:
    if base is None:
        alone = ops.delta_matmul_grad_input if twin else ops.delta_matmul
        return alone(operand, values, pattern, backend=backend)
    product = ops.sparse_delta_matmul_grad_input if twin else ops.sparse_delta_matmul
    return product(operand, base, values, pattern, backend=backend)


def topk_salience(at: Place) -> Iterator[object]:
    # Several tiles, one of them whole; equal scores beyond what is set aside; an odd address; a
    # list for several blocks, of tiles that are listed in turns, and a k-th score that is far
    # beyond its bound.
    apart = [at.normal(*shape) for shape in ((83, 401), (5, 9), (1, 2500))]
    odd = at.normal(32943)[1:].view(181, 182)
    one = torch.ones(60, 100, device=at.device, dtype=torch.bfloat16)
    long, beyond = at.normal(200, 200), 1 + at.normal(200, 200).abs()
    beyond[:17] *= 2.0**20
    for weights, grads, k, scope in (
        (apart, [a.flip(0) for a in apart], 0.01, "layer"),
        (apart, [a.flip(1) for a in apart], 700, "global"),
        ([odd, one], [odd, one], 300, "layer"),
        ([long, beyond], [long, torch.ones_like(beyond)], 3000, "layer"),
    ):
        call = partial(ops.topk_salience, weights, grads, k, metric="snip", scope=scope)
        exact = call(backend="reference")
        ways: dict[str, Callable[[], list[Tensor]]] = {
            at.backend: partial(call, backend=at.backend)
        }
        if at.backend in _cuda_native.MODULES:
            each = [indices.numel() for indices in exact]
            together = scope == "global"
            ks = [sum(each)] if together else each
            ways = topk_ways(weights, grads, ks, together, at.backend)
        for way, ours in ways.items():
            if not all(torch.equal(a.int(), b) for a, b in zip(ours(), exact, strict=True)):
                yield k, scope, way


def write_delta(at: Place) -> Iterator[object]:
    for dtype in (torch.float32, torch.bfloat16):
        pattern = at.pattern(70, 90, 0.3)
        weight, values = at.normal(70, 90, dtype=dtype), at.normal(pattern.nnz, dtype=torch.float32)
        places = pattern.entry_indices.long()
        base = weight.view(-1)[places].clone()
        ops.write_delta(weight, pattern, base, values, backend=at.backend)
        if not torch.equal(weight.view(-1)[places], (base.float() + values).to(dtype)):
            yield dtype


def planted(at: Place) -> Iterator[object]:
    """Write one number beyond a weight, for a memory checker to find. Nowhere else."""
    weight, number = at.normal(64, dtype=torch.float32), at.normal(1, dtype=torch.float32)
    index = torch.tensor([64], dtype=torch.int32, device=at.device)
    if at.backend == "triton":
        _triton.kernels("write_delta").write_delta([weight], [index], [number], [number])
        return
    addresses = ([tensor.data_ptr()] for tensor in (weight, index))
    _cuda_native.launch(
        *(at.backend, "write_delta", weight),
        *(*addresses, [False], [1], [number.data_ptr()], []),
        _native.dtype_code(weight),
    )
    yield from ()


OPERATIONS: dict[str, Callable[[Place], Iterator[object]]] = {
    function.__name__: function
    for function in (
        *(sparse_delta_matmul, sampled_grad, keep_columns),
        *(block_grad, topk_salience, write_delta),
    )
}


PLANTED = {"planted": planted}


def wrong(names: Sequence[str], at: Place) -> list[tuple[str, object]]:
    """Run some operations; return the cases whose result is not the reference's."""
    torch.manual_seed(0)
    return [(name, case) for name in names for case in {**OPERATIONS, **PLANTED}[name](at)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m speft_kernels.bench.gpu.small")
    parser.add_argument("operations", nargs="+", choices=(*OPERATIONS, *PLANTED))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    options = parser.parse_args()
    missing = (
        _triton.missing() if options.backend == "triton" else _cuda_native.missing(options.backend)
    )
    if missing is not None:
        print(missing)
        return MISSING
    found = wrong(options.operations, Place(options.device, options.backend))
    for name, case in found:
        print(f"wrong: {name} {case}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
