"""sparse_delta_matmul in Triton: which launches a product takes, with which settings."""

import pytest
import torch
from kernels import backends

from speft_kernels.costs import DEFAULTS
from speft_kernels.plan import plan_of
from speft_kernels.testing import uniform_pattern

# How the Triton kernels are launched. Whatever the settings, they compute the same.

needs_triton = pytest.mark.skipif(
    "triton" not in backends("sparse_delta_matmul"), reason="Triton cannot run here"
)


def launches_of(machine, tokens, out_features, in_features, dtype=torch.bfloat16, twin=False):
    """What a call would launch, whose tensors hold nothing."""
    from speft_kernels.triton_kernels.launch import MACHINES, recording
    from speft_kernels.triton_kernels.sparse_delta_matmul import sparse_delta_matmul

    plan = plan_of(uniform_pattern((64, 64), 0.1))
    nnz = plan.pattern.nnz
    x = torch.empty(tokens, out_features if twin else in_features, dtype=dtype)
    weight = torch.empty(out_features, in_features, dtype=dtype)
    with recording(MACHINES[machine]) as launched:
        sparse_delta_matmul(
            *(x, weight, None, None, torch.empty(nnz), plan.csr, *plan.csc),
            *(in_features if twin else out_features, twin, DEFAULTS["cuda"].fused_tokens),
        )
    return launched


@needs_triton
@pytest.mark.parametrize("machine", [80, 90, 100])
def test_few_tokens_take_one_launch_for_each_multiprocessor_or_so(machine):
    from speft_kernels.triton_kernels.launch import MACHINES

    for shape in ((4096, 4096), (14336, 4096), (6144, 4096), (4096, 14336)):
        for tokens in (1, 16):
            (launched,) = launches_of(machine, tokens, *shape)
            programs = torch.tensor(launched.grid).prod().item()
            assert programs >= 0.75 * MACHINES[machine].multiprocessors


@needs_triton
def test_many_tokens_take_an_effective_weight_and_the_vendors_product():
    (launched,) = launches_of(90, 200, 4096, 4096)
    assert launched.grid == (4096,)


@needs_triton
def test_default_settings_are_valid():
    import itertools
    import math

    from speft_kernels.triton_kernels._fused_settings import FusedLaunch, Shape
    from speft_kernels.triton_kernels.launch import MACHINES

    sizes = (1, 64, 1024, 4096, 14336, 128256)
    cases = itertools.product((1, 17, 33, 128), sizes, sizes, (2, 4), (0, 8, 4), (0, 32, 256))
    for tokens, outputs, columns, x_bytes, bits, group in cases:
        if group and (not bits or columns % (4 * group) or columns == group):
            continue
        for twin, full, machine in itertools.product(
            (False, True), {False, x_bytes == 4}, MACHINES.values()
        ):
            words = columns // 4 if bits == 4 else columns
            most = math.gcd(group, words) if group else 0
            shape = Shape(
                tokens=tokens,
                outputs=columns if twin else outputs,
                width=outputs if twin else words,
                columns=4 if bits == 4 and not twin else 1,
                weight_bytes={0: x_bytes, 8: 1, 4: 2}[bits],
                x_bytes=x_bytes,
                full=full,
                quantized=bits > 0,
                twin=twin,
                most=(most & -most) or 1 << 20,
            )
            settings = FusedLaunch.default(shape, machine)
            assert settings.is_valid(shape, machine), (shape, settings)
            assert settings.splits == 1 or settings.splits * settings.block_k * 4 <= shape.width
