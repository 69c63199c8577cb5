"""SparseDeltaLinear on a GPU: gradients, synchronisation, CUDA graphs, torch.compile, memory."""

import copy

import pytest
import torch
from kernels import make_pattern
from rig import (
    DEVICE,
    DRY,
    LLAMA,
    WARM_UP,
    assert_one_product,
    captured,
    fast_backends,
    fast_backends_and_dtypes,
    largest,
    no_synchronisation,
    peak_growth,
    randn,
    requested_bytes,
)
from torch import nn

from speft_kernels import (
    FlatValues,
    SparseDeltaLinear,
    SparsePattern,
    SpeftConfig,
    apply_patterns,
    merge,
    unmerge,
)
from speft_kernels.bench.gpu.bounds import summation_bound
from speft_kernels.bench.memory import saved_for_backward
from speft_kernels.testing import realistic_pattern, uniform_pattern

RESIDENT = ("keep_columns", "sampled_grad", "write_delta")
ADDITIVE = ("keep_columns", "sampled_grad", "sparse_delta_matmul")
SERVING = [("resident", backend) for backend in fast_backends(*RESIDENT)]
SERVING += [("additive", backend) for backend in fast_backends(*ADDITIVE)]
M, N, K = LLAMA


def make_layer(pattern, mode="resident", dtype=torch.bfloat16, bias=True):
    linear = nn.Linear(pattern.shape[1], pattern.shape[0], bias=bias, device=DEVICE, dtype=dtype)
    layer = SparseDeltaLinear.from_linear(linear, pattern.to(DEVICE), mode)
    with torch.no_grad():
        layer.values.normal_(std=0.02)
    return layer


def passes(layer, x, dy):
    """Forward and backward: y, dx, and the gradient of the values."""
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.values), dy)]


@pytest.fixture
def backend(request, monkeypatch):
    monkeypatch.setenv("SPEFT_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize(
    ("mode", "backend", "dtype"),
    [
        (mode, *served)
        for mode, ops in (("resident", RESIDENT), ("additive", ADDITIVE))
        for served in fast_backends_and_dtypes(*ops)
    ],
    indirect=["backend"],
)
def test_a_layer_is_its_dense_twin(mode, backend, dtype):
    layer = make_layer(realistic_pattern((N, K), 0.05), mode, dtype)
    x, dy = randn(M, K, dtype=dtype).requires_grad_(), randn(M, N, dtype=dtype)
    y, dx, dv = passes(layer, x, dy)
    weight = layer.base_weight().double()
    places = layer.pattern.entry_indices.long()
    weight.view(-1)[places] += layer.values.detach().double()
    exact_y = x.detach().double() @ weight.t() + layer.bias.double()
    exact_dx, exact_dw = dy.double() @ weight, dy.double().t() @ x.detach().double()
    eps = torch.finfo(dtype).eps
    # Each result is rounded once; where the delta is inside the weight, that was rounded to its
    # dtype, half an eps of each of the sum's terms, which adds up as roundings do; where it is not,
    # the sum of the two products was.
    for found, exact, terms in ((y, exact_y, K), (dx, exact_dx, N)):
        bound = summation_bound(terms, largest(exact), dtype) + 2 * eps * largest(exact)
        assert largest(found.double() - exact) <= bound
    assert dv.dtype == torch.float32
    bound = 2 * summation_bound(M, largest(exact_dw), dtype)
    assert largest(dv.double() - exact_dw.view(-1)[places]) <= bound


@pytest.mark.parametrize(("mode", "backend"), SERVING, indirect=["backend"])
def test_forward_and_backward_never_wait(mode, backend):
    layer = make_layer(realistic_pattern((N, K), 0.01), mode)
    x = randn(M, K, dtype=torch.bfloat16).requires_grad_()
    dy = randn(M, N, dtype=torch.bfloat16)
    for _ in range(2):
        passes(layer, x, dy)
    with no_synchronisation():
        with torch.no_grad():
            layer.values.mul_(0.5)  # as an optimizer does: the delta is written anew
        passes(layer, x, dy)


@pytest.mark.parametrize(("mode", "backend"), SERVING, indirect=["backend"])
def test_a_graph_of_forward_and_backward(mode, backend):
    layer = make_layer(realistic_pattern((N, K), 0.01), mode)
    x = randn(M, K, dtype=torch.bfloat16).requires_grad_()
    dy = randn(M, N, dtype=torch.bfloat16)
    outputs, replay = captured(lambda: passes(layer, x, dy))
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
            dy.normal_()
        wanted = passes(layer, x, dy)
        with torch.no_grad():
            for output in outputs:
                output.zero_()
        replay()
        for found, expected in zip(outputs, wanted, strict=True):
            assert_one_product(found, expected, terms=max(M, N, K), operands=torch.bfloat16)


class Tiny(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(32, width), nn.Linear(width, 32)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


def tiny_sparse(dtype=torch.float32):
    torch.manual_seed(3)
    model = Tiny(48).to(DEVICE, dtype)
    patterns = {
        "first": uniform_pattern((48, 32), 0.2),
        "second": realistic_pattern((32, 48), 0.1),
    }
    apply_patterns(model, {k: p.to(DEVICE) for k, p in patterns.items()}, SpeftConfig())
    return model


@pytest.mark.parametrize("written", ["inside", "between"])
@pytest.mark.parametrize(
    ("backend", "dtype"), fast_backends_and_dtypes(*RESIDENT), indirect=["backend"]
)
def test_a_graph_of_a_training_step(backend, dtype, written):
    """Forward, backward and the optimizer's step over the one buffer of all values; the deltas are
    written inside the graph, or by hand between its replays.
    """
    lr, steps = 1e-2, 6
    x, target = randn(64, 32, dtype=dtype), randn(64, 32, dtype=dtype)
    eps = torch.finfo(dtype).eps

    def training(model):
        flat = FlatValues(model)
        fused = {"fused": True} if DRY else {"fused": True, "capturable": True}
        optimizer = torch.optim.AdamW([flat.parameter], lr=lr, **fused)

        def step():
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return flat.parameter, step

    model = tiny_sparse(dtype)
    values, step = training(model)
    twin_values, twin_step = training(tiny_sparse(dtype))
    step()  # makes the optimizer's state, which a graph must find there
    twin_step()

    def write():
        if written == "between":
            model.first.sync()
            model.second.sync()

    loss, replay = captured(step, write)
    for _ in range(WARM_UP + DRY):  # what has run by now; a dry run captures by running
        twin_step()
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(x.shape, generator=generator))
        write()
        replay()
        expected = twin_step()
        # A step moves a value by about lr, in a direction that a rounding of its gradient does not
        # change but for gradients of nothing: a thousandth of the way, and a rounding of what the
        # gradient is made of, are far below one step with old data. The loss is rounded as well.
        moved = (1e-3 + eps) * lr * (seed + WARM_UP + 2)
        torch.testing.assert_close(values, twin_values, rtol=0, atol=moved)
        torch.testing.assert_close(loss, expected, rtol=1e-3 + 2 * eps, atol=0)
    assert largest(values) > 2 * lr  # it trained


@pytest.mark.parametrize(
    ("layers", "graphs"),
    [(merge, False), (merge, True), (unmerge, False)],
    ids=["resident", "replayed", "additive"],
)
@pytest.mark.parametrize("backend", fast_backends(*RESIDENT, *ADDITIVE), indirect=True)
def test_a_compiled_model_computes_the_same(backend, layers, graphs):
    """As one graph of the compiler, with and without CUDA graphs of what lies between the layers;
    after a change of the values, which no replay must miss.
    """
    torch._dynamo.reset()
    dtype = torch.bfloat16
    model = tiny_sparse(dtype)
    layers(model)
    trained = [model.first.values, model.second.values]
    settings = {} if DRY or not graphs else {"mode": "reduce-overhead"}
    compiler = "aot_eager" if DRY else "inductor"
    compiled = torch.compile(model, backend=compiler, fullgraph=True, **settings)

    def run(what):
        if graphs and not DRY:
            torch.compiler.cudagraph_mark_step_begin()
        y = what(x)
        gradients = torch.autograd.grad(y, trained, dy)
        return [tensor.detach().clone() for tensor in (y, *gradients)]

    for _ in range(4):
        x, dy = randn(50, 32, dtype=dtype), randn(50, 32, dtype=dtype)
        with torch.no_grad():
            for values in trained:
                values.normal_(std=0.1)
        wanted, found, again = run(model), run(compiled), run(compiled)
        # Compiled code need not round gelu and its gradient to the dtype in between: half an eps of
        # each of the 48 terms of a sum at most, in two layers.
        for a, b, c in zip(found, wanted, again, strict=True):
            assert largest(a - b) <= 2 * 48**0.5 * torch.finfo(dtype).eps * largest(b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("backend", fast_backends(*RESIDENT), indirect=True)
@pytest.mark.parametrize(
    ("kind", "density"), [("realistic", 0.005), ("realistic", 0.05), ("uniform", 0.25)]
)
def test_backward_builds_nothing_of_the_weights_size(backend, kind, density):
    """Beside the gradient of the values: sums of at most 8 MB, a panel of at most 4 MB, and dy and
    x once more, widened to float32 or packed. A dense gradient would be 64 MB in float32.
    """
    n = k = 96 if DRY else 4096
    tokens = 8 if DRY else 256
    pattern = {"realistic": realistic_pattern, "uniform": uniform_pattern}[kind]((n, k), density)
    layer = make_layer(pattern)
    frozen = nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    x = randn(tokens, k, dtype=torch.bfloat16).requires_grad_()
    dy = randn(tokens, n, dtype=torch.bfloat16)

    def backward(y, *trained):
        return peak_growth(lambda: torch.autograd.grad(y, (x, *trained), dy, retain_graph=True))

    floor = backward(frozen(x))
    ours = backward(layer(x), layer.values)
    allowed = 4 * pattern.nnz + (12 << 20) + 4 * tokens * (n + k)
    assert allowed - 4 * pattern.nnz < 4 * n * k or DRY
    assert ours - floor <= allowed


@pytest.mark.parametrize(("mode", "backend"), SERVING, indirect=["backend"])
def test_a_layer_keeps_the_used_columns_alone(mode, backend):
    pattern = realistic_pattern((N, K), 0.005)
    layer = make_layer(pattern, mode)
    x = randn(M, K, dtype=torch.bfloat16).requires_grad_()
    layer(x)
    used = layer.pattern.used_cols.numel()
    assert used < K // 2
    padded = -(-M // 16) * 16  # one block of all tokens
    saved = saved_for_backward([layer], lambda: layer(x))
    assert saved.bytes == 2 * used * padded
    if DRY:
        return
    # By the allocator: y, what is kept, and little else.
    del saved
    torch.cuda.synchronize()
    before = requested_bytes()
    y = layer(x)
    grown = requested_bytes() - before
    assert y.nbytes + 2 * used * padded <= grown <= y.nbytes + 2 * used * padded + 4096


@pytest.mark.parametrize("backend", fast_backends(*RESIDENT), indirect=True)
def test_an_empty_layer_costs_what_a_frozen_one_does(backend):
    layer = make_layer(make_pattern("empty", 64, 48))
    x = randn(32, 48, dtype=torch.bfloat16).requires_grad_()
    assert saved_for_backward([layer], lambda: layer(x)).bytes == 0
    layer(x).sum().backward()
    twin = nn.Linear(48, 64, device=DEVICE, dtype=torch.bfloat16)
    twin.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    other = x.detach().clone().requires_grad_()
    twin(other).sum().backward()
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("backend", fast_backends("block_grad", "write_delta"), indirect=True)
def test_a_layer_of_blocks_never_waits_and_is_right(backend):
    chosen = torch.randperm((N // 8) * (K // 8))[: (N // 8) * (K // 8) // 50 + 2]
    pattern = SparsePattern.from_blocks((N, K), (8, 8), chosen)
    layer = make_layer(pattern)
    x = randn(M, K, dtype=torch.bfloat16).requires_grad_()
    dy = randn(M, N, dtype=torch.bfloat16)
    for _ in range(2):
        _, _, dv = passes(layer, x, dy)
    with no_synchronisation():
        passes(layer, x, dy)
    exact = (dy.double().t() @ x.detach().double()).view(-1)
    wanted = exact[layer.pattern.entry_indices.long()].reshape(dv.shape)
    bound = 2 * summation_bound(M, largest(exact), torch.bfloat16)
    assert largest(dv.double() - wanted) <= bound


@pytest.mark.parametrize("backend", fast_backends(*RESIDENT), indirect=True)
def test_what_was_trained_is_taken_out_bit_for_bit(backend):
    layer = make_layer(realistic_pattern((N, K), 0.01))
    before = copy.deepcopy(layer).base_weight()
    x = randn(M, K, dtype=torch.bfloat16)
    for _ in range(3):
        with torch.no_grad():
            layer.values.add_(torch.randn_like(layer.values))
        layer(x)
    assert not torch.equal(layer.weight, before)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
