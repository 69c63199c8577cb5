"""Calls past torch's dispatcher: what would see them there, such as a tracer, still sees them."""

import pytest
import torch
from kernels import make_pattern
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from speft_kernels import SparseDeltaLinear, SparsePattern, SparsityPlan, ops

N, K, TOKENS = 48, 64, 20
PATTERN = make_pattern("realistic", N, K)
BLOCKS = SparsePattern.from_blocks((N, K), (4, 4), torch.tensor([0, 3, 7]))
PLAN = SparsityPlan.build(PATTERN, keep=PATTERN.used_cols)
W, VALUES, DY = torch.randn(N, K), torch.randn(PATTERN.nnz), torch.randn(TOKENS, N)
ADDITIVE = SparseDeltaLinear.from_linear(torch.nn.Linear(K, N), PATTERN, "additive")
CALLS = {
    "sparse_delta_matmul": lambda x: ops.sparse_delta_matmul(x, W, VALUES, PATTERN),
    "delta_matmul": lambda x: ops.delta_matmul(x, VALUES, PATTERN),
    "sampled_grad": lambda x: ops.sampled_grad(DY, x, PATTERN),
    "block_grad": lambda x: ops.block_grad(DY, x, BLOCKS),
    "keep_columns": lambda x: ops.keep_columns(x, PLAN),
    "an additive layer": ADDITIVE,
}


@pytest.fixture
def x():
    with torch.no_grad():
        ADDITIVE.values.normal_()
    return torch.randn(TOKENS, K)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    "tracer", [lambda f, x: torch.jit.trace(f, (x,)), lambda f, x: make_fx(f)(x)]
)
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_a_trace_computes_what_the_call_computes(name, tracer, x):
    call = CALLS[name]
    call(x)  # what a plan compiles at its first call is no part of the trace
    traced = tracer(call, x)
    torch.testing.assert_close(traced(x + 1), call(x + 1))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "keep_columns"])  # it detaches
def test_a_forward_mode_derivative_is_not_lost_in_silence(name, grad, x):
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        wanted = CALLS[name](x)  # without a tangent it is served
        assert torch.isfinite(wanted).all()
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            CALLS[name](forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "keep_columns"])
def test_functorch_is_served_rightly_or_refused(name, x):
    call = CALLS[name]
    with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    both = torch.stack([x, x + 1])
    with torch.no_grad():
        try:
            found = torch.vmap(call)(both)
        except RuntimeError as error:
            assert "Batching rule not implemented" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(found, torch.stack([call(one) for one in both]))
