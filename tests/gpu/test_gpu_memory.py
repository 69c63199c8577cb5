"""What operations allocate on a GPU, by what their tensors ask the allocator for. The kernels are
asked; torch's own operators take the room that theirs is.
"""

import pytest
import torch
from rig import DEVICE, DRY, fast_backends, peak_growth, randn

from speft_kernels import QuantizedWeight, ops
from speft_kernels.testing import realistic_pattern

SIDE = 64 if DRY else 4096
BF16 = torch.bfloat16
W_BYTES = 2 * SIDE * SIDE


def kernels(op):
    return [name for name in fast_backends(op) if name != "torch"]


@pytest.mark.parametrize("scores", ["random", "equal"])
@pytest.mark.parametrize("backend", kernels("topk_salience"))
def test_topk_salience_makes_no_tensor_of_scores(backend, scores):
    """A byte for each score would be twice what is allowed. The indices take 12 bytes for each of
    0.5 %, what is set aside 8 for each of 2.7 %. Equal scores are more than there is room for.
    """
    make = (
        randn if scores == "random" else lambda *shape, dtype: torch.ones(*shape).to(DEVICE, dtype)
    )
    weight, grad = make(SIDE, SIDE, dtype=BF16), make(SIDE, SIDE, dtype=BF16)
    grown = peak_growth(
        lambda: ops.topk_salience([weight], [grad], 0.005, metric="snip", backend=backend)
    )
    assert grown <= SIDE * SIDE // 2


def product_growth(backend, tokens, base, twin):
    """Beyond what torch's product of these shapes takes, which may be a workspace."""
    pattern = realistic_pattern((SIDE, SIDE), 0.005).to(DEVICE)
    x, weight = randn(tokens, SIDE, dtype=BF16), randn(SIDE, SIDE, dtype=BF16)
    values = randn(pattern.nnz)
    product = ops.sparse_delta_matmul_grad_input if twin else ops.sparse_delta_matmul
    packed = weight if base is None else QuantizedWeight.quantize(weight, base)
    ours = peak_growth(lambda: product(x, packed, values, pattern, backend=backend))
    return ours - peak_growth(lambda: x @ (weight if twin else weight.t()))


@pytest.mark.parametrize("twin", [False, True], ids=["forward", "twin"])
@pytest.mark.parametrize("base", [None, 8, 4])
@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("backend", kernels("sparse_delta_matmul"))
def test_few_tokens_take_no_second_weight(backend, tokens, base, twin):
    """What splits sum up, and the used columns of x, turned: the weight in four bits would be twice
    what is allowed.
    """
    assert product_growth(backend, tokens, base, twin) <= W_BYTES // 8


@pytest.mark.parametrize("twin", [False, True], ids=["forward", "twin"])
@pytest.mark.parametrize("base", [None, 8])
@pytest.mark.parametrize("backend", kernels("sparse_delta_matmul"))
def test_many_tokens_take_one_effective_weight_at_most(backend, base, twin):
    """Triton's W + D lives for one product; the CUDA kernel adds the entries to tiles of W."""
    grown = product_growth(backend, 20 if DRY else 512, base, twin)
    one = W_BYTES if backend == "triton" and not DRY else 0
    assert one <= grown <= one + W_BYTES // 8


@pytest.mark.parametrize("backend", fast_backends("write_delta"))
def test_write_delta_takes_nothing_of_the_weights_size(backend):
    """At most what the entries themselves take: an index, their sum in float32 and rounded."""
    patterns = [realistic_pattern((SIDE, SIDE), 0.005, seed=seed).to(DEVICE) for seed in range(2)]
    weights = [randn(SIDE, SIDE, dtype=BF16) for _ in patterns]
    base, values = (
        [randn(p.nnz, dtype=dtype) for p in patterns] for dtype in (BF16, torch.float32)
    )
    grown = peak_growth(lambda: ops.write_deltas(weights, patterns, base, values, backend=backend))
    assert grown <= 32 * sum(pattern.nnz for pattern in patterns)
    assert 32 * patterns[0].nnz < W_BYTES // 8
