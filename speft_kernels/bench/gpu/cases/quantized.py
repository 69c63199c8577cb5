"""`sparse_delta_matmul` over a weight of eight or four bits, for few tokens: beside the product
with the same weight in bf16, and reading the weight once as it is stored.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .... import ops
from ....quantized import QuantizedWeight
from ...checks import close, flat
from ...harness import Work
from ..bounds import summation_bound
from ..problems import Spec, Workbench
from ..timing import Floor, GpuCase, GpuSide

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
    # As `sparse_delta_matmul`, whose W is rounded in some entries only: here in all of them, each
    # by half an eps at most, which adds up as roundings do.
    largest = max(float(plain.abs().max()), float(exact.abs().max()))
    bound = summation_bound(k, largest, x.dtype) + 2 * torch.finfo(x.dtype).eps * largest

    def check(output: Tensor, wanted: Tensor) -> None:
        close("y", flat(output), flat(wanted), bound)

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
            check=partial(check, wanted=exact),
            floors=[Floor("reading W once", base.nbytes)],
        )
        for backend in bench.backends("sparse_delta_matmul")
    ]
    peer = GpuSide(
        DENSE,
        lambda: F.linear(x, dense),
        work=Work({**beside, "W": dense.nbytes}, products, x.dtype),
        check=partial(check, wanted=plain),
    )
    mask = f"{spec.mask} {100 * spec.density:g}%"
    name = f"{PROJECTION} {n} x {k} in {spec.projection}, {tokens} tokens, {mask}"
    return GpuCase("sparse_delta_matmul", name, [*sides, peer])
