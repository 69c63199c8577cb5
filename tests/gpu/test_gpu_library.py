"""The contract with torch.library on a GPU, for every operation that a public call comes to."""

import pytest
import torch
from kernels import make_pattern
from rig import DEVICE, backends, randn

from speft_kernels import SparsePattern, ops
from speft_kernels.plan import plan_of


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the package's operations and what they are given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "speft":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def keep_columns(backend):
    ops.keep_columns(randn(20, 40), plan_of(entries()), backend=backend)


def sampled_grad(backend):
    pattern, (dy, x) = entries(), (randn(20, 30), randn(20, 40))
    ops.sampled_grad(dy, x, pattern, backend=backend)
    out = torch.zeros(pattern.nnz, device=DEVICE)
    ops.sampled_grad(dy, x, pattern, out=out, accumulate=True, backend=backend)
    kept = ops.keep_columns(x, plan_of(pattern))
    ops.sampled_grad(dy, kept, pattern, packed=True, backend=backend)


def block_grad(backend):
    pattern = SparsePattern.from_blocks((30, 40), (3, 4), torch.tensor([1, 7, 20, 33])).to(DEVICE)
    dy, x = randn(20, 30), randn(20, 40)
    ops.block_grad(dy, x, pattern, backend=backend)
    out = torch.zeros(pattern.values_shape, device=DEVICE)
    ops.block_grad(dy, x, pattern, out=out, accumulate=True, backend=backend)


def sparse_delta_matmul(backend):
    pattern, weight = entries(), randn(30, 40)
    values = randn(pattern.nnz)
    ops.sparse_delta_matmul(randn(20, 40), weight, values, pattern, randn(30), backend=backend)
    ops.sparse_delta_matmul_grad_input(randn(20, 30), weight, values, pattern, backend=backend)
    ops.delta_matmul(randn(20, 40), values, pattern, backend=backend)


def write_delta(backend):
    patterns = [entries(), make_pattern("row", 6, 5).to(DEVICE)]
    weights = [randn(*pattern.shape) for pattern in patterns]
    base, values = ([randn(pattern.nnz) for pattern in patterns] for _ in range(2))
    ops.write_deltas(weights, patterns, base, values, backend=backend)
    ops.write_deltas(weights, patterns, base, None, backend=backend)


def topk_salience(backend):
    weights, grads = ([randn(6, 5), randn(2, 3)] for _ in range(2))
    for scope in ("layer", "global"):
        ops.topk_salience(weights, grads, 3, metric="snip", scope=scope, backend=backend)


def entries():
    mask = make_pattern("uniform", 30, 40).mask()
    mask[:, 10:20] = False  # so that packing is worth it
    return SparsePattern.from_mask(mask).to(DEVICE)


CALLS = (keep_columns, sampled_grad, block_grad, sparse_delta_matmul, write_delta, topk_salience)
EVERY = [(call, backend) for call in CALLS for backend in backends(call.__name__)]


@pytest.mark.parametrize(
    ("call", "backend"), EVERY, ids=[f"{call.__name__}-{backend}" for call, backend in EVERY]
)
def test_operations_are_what_torch_takes_them_for(call, backend):
    """Under autocast nothing is called past the dispatcher."""
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), Seen() as seen:
        call(backend)
    assert {func for func, _ in seen.calls}
    for func, arguments in seen.calls:
        torch.library.opcheck(func, arguments)
