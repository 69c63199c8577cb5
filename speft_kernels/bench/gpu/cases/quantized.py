"""`sparse_delta_matmul` over a weight of eight or four bits, for few tokens: beside the product
with the same weight in bf16, and reading the weight once as it is stored.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from .... import ops
from ....quantized import QuantizedWeight
from ...harness import Work
from ..problems import Spec, Workbench
from ..timing import Floor, GpuCase, GpuSide
from .sparse_delta_matmul import checks_of_products

DENSE = "x @ W in bf16"
# Bits, and columns that share a scale: what is usual of either.
FORMS = {"int8": (8, None), "int4": (4, 128)}
# The largest of a layer: in four bits a smaller one is read faster than a kernel starts.
PROJECTION = "gate"


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    """`spec.projection` is a key of FORMS."""
    n, k = bench.scale.projections[PROJECTION]
    tokens, device = bench.tokens(spec), bench.device
    pattern = bench.pattern((n, k), spec.mask, spec.density)
    base = QuantizedWeight.quantize(device.randn(n, k), *FORMS[spec.projection])
    dense, x = base.dequantize(torch.bfloat16), device.randn(tokens, k)
    values = device.randn(pattern.nnz, dtype=torch.float32)

    plain = x.double() @ dense.double().t()
    wide = base.dequantize(torch.float64)
    wide.view(-1)[pattern.entry_indices.long()] += values.double()
    exact = x.double() @ wide.t()
    del wide
    check, check_plain = checks_of_products(k, x.dtype, exact, plain)

    beside = {"x": 2 * x.numel(), "y": 2 * tokens * n}
    products = 2 * tokens * n * k
    work = Work(
        {**beside, "W": base.nbytes, "values and indices": 8 * pattern.nnz},
        products + 2 * tokens * pattern.nnz,
        x.dtype,
    )
    sides = [
        GpuSide(
            backend,
            partial(ops.sparse_delta_matmul, x, base, values, pattern, backend=backend),
            True,
            work,
            check=check,
            floors=[Floor("reading W once", base.nbytes)],
        )
        for backend in bench.backends("sparse_delta_matmul")
    ]
    peer = GpuSide(
        DENSE,
        lambda: F.linear(x, dense),
        work=Work({**beside, "W": dense.nbytes}, products, x.dtype),
        check=check_plain,
    )
    mask = f"{spec.mask} {100 * spec.density:g}%"
    name = f"{PROJECTION} {n} x {k} in {spec.projection}, {tokens} tokens, {mask}"
    return GpuCase("sparse_delta_matmul", name, [*sides, peer])
