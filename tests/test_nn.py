"""SparseDeltaLinear: what it computes, what it saves, and that the base is never lost."""

import pytest
import torch
from kernels import make_pattern
from layers import BLOCKS, MODES, at_entries, dense_twin, make_layer
from tiny_models import Int8Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from speft_kernels import SparseDeltaLinear, SparsePattern, ops
from speft_kernels.autograd import SparseLinear
from speft_kernels.bench.memory import saved_for_backward
from speft_kernels.errors import ConfigError, PatternError, StaleWeightError
from speft_kernels.plan import plan_of
from speft_kernels.testing import uniform_pattern


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "pattern", [make_pattern("realistic", 32, 48), make_pattern("full", 32, 48), BLOCKS]
)
def test_output_and_gradients_equal_the_dense_layers(pattern, mode, bias):
    layer = make_layer(pattern, mode, torch.float64, bias)
    twin = dense_twin(layer)
    x = torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    y, y_twin = layer(x), twin(x_twin)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_twin.backward(dy)
    # float64, sums of at most 48 products of unit normals in another order.
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(y, y_twin, **close)
    torch.testing.assert_close(x.grad, x_twin.grad, **close)
    torch.testing.assert_close(layer.values.grad, at_entries(twin.weight.grad, layer), **close)
    assert layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None


@pytest.mark.parametrize("function", ["resident", "additive", "delta"])
@pytest.mark.parametrize("blocks", [False, True])
def test_gradcheck_of_the_autograd_functions(function, blocks):
    pattern = (
        SparsePattern.from_blocks((6, 6), (2, 3), torch.tensor([0, 3]))
        if blocks
        else make_pattern("row", 6, 6)
    )
    plan = plan_of(pattern)
    base, bias = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def call(x, values):
        kept = ops.keep_columns(x, plan)
        if function == "delta":
            return SparseLinear.apply(x, values, None, None, kept, plan, None, False)
        if function == "additive":
            return SparseLinear.apply(x, values, base, bias, kept, plan, None, False)
        weight = base.clone()
        weight.view(-1)[pattern.entry_indices.long()] += values.detach().flatten()
        return SparseLinear.apply(x, values, weight, bias, kept, plan, None, True)

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.values_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, values))


def test_the_weight_is_written_only_when_values_changed(monkeypatch):
    writes = []
    real = ops.write_deltas
    monkeypatch.setattr(ops, "write_deltas", lambda *a, **k: (writes.append(a[3]), real(*a, **k)))
    layer = make_layer()
    x = torch.randn(3, 48)
    for _ in range(3):
        layer(x)
    assert len(writes) == 1
    with torch.no_grad():
        layer.values.add_(1.0)
    layer(x), layer(x)
    assert len(writes) == 2
    # Someone else wrote to the weight, as a sharded gather does: the delta is put back.
    layer.weight.data = layer.weight.data.clone()
    layer(x)
    assert len(writes) == 3
    torch.testing.assert_close(layer(x), dense_twin(layer)(x))


class PastTheVersion(torch.optim.Optimizer):
    """Writes as foreign fused optimizers do: autograd does not see it."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        lambda p: PastTheVersion(p, {}),
    ],
    ids=["plain", "fused adamw", "fused sgd", "foreign"],
)
def test_steps_of_every_optimizer_reach_the_weight(make):
    layer = make_layer(fill=False)
    optimizer = make([layer.values])
    x = torch.randn(3, 48)
    first = layer(x)
    stale = layer(x).sum()
    first.square().sum().backward()
    optimizer.step()
    assert int(layer.values.count_nonzero()) == layer.pattern.nnz
    torch.testing.assert_close(layer(x), dense_twin(layer)(x))
    assert not torch.equal(layer(x), first)
    with pytest.raises(StaleWeightError, match="call backward\\(\\) before optimizer.step"):
        stale.backward()
    layer(x).sum().backward()


def test_writes_that_cannot_be_seen_need_sync():
    layer = make_layer(fill=False)
    layer.sync()
    layer.values.data.add_(1.0)
    layer.sync()
    assert torch.equal(layer.weight, layer.effective_weight())
    layer.weight.data.copy_(layer.base_weight())
    layer.sync()
    assert torch.equal(layer.weight, layer.effective_weight())


@pytest.mark.parametrize("mode", MODES)
def test_inference_mode_before_training(mode):
    layer = make_layer(mode=mode)
    x = torch.randn(3, 48)
    with torch.inference_mode():
        before = layer(x)
    y = layer(x)
    torch.testing.assert_close(y, before.clone())
    y.sum().backward()
    assert layer.values.grad is not None


def test_layers_that_are_made_during_a_step_do_not_disturb_it():
    """As another thread makes them, while it is seen what the optimizer holds."""

    class Busy(SparseDeltaLinear):
        @property
        def sink(self):
            made.append(make_layer())

        @sink.setter
        def sink(self, value):
            pass

    made = []
    layers = [Busy(nn.Linear(48, 32), make_pattern("realistic", 32, 48)) for _ in range(3)]
    linear = nn.Linear(4, 4)
    linear(torch.randn(2, 4)).sum().backward()
    made.clear()
    torch.optim.SGD(linear.parameters(), lr=0.1).step()
    assert len(made) >= len(layers)


def test_other_models_are_left_alone():
    make_layer()
    linear = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, fused=True)
    linear(torch.randn(2, 4)).sum().backward()
    before = linear.weight._version
    optimizer.step()
    assert linear.weight._version == before


def test_an_input_of_another_dtype_is_refused_as_by_a_frozen_layer():
    for mode in MODES:
        layer, x = make_layer(mode=mode), torch.randn(3, 48).bfloat16()
        with pytest.raises((RuntimeError, TypeError), match="dtype"):
            layer(x)
        with torch.no_grad(), pytest.raises((RuntimeError, TypeError), match="dtype"):
            layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge_are_exact_and_change_no_output(dtype):
    linear = nn.Linear(48, 32, dtype=dtype)
    original = linear.weight.detach().clone()
    layer = SparseDeltaLinear.from_linear(linear, make_pattern("realistic", 32, 48))
    x = torch.randn(5, 48, dtype=dtype)
    torch.nn.init.normal_(layer.values)
    resident = layer(x)
    assert not torch.equal(layer.weight, original)
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    assert layer.mode == "additive"
    # The additive path rounds after the base product and again after the sum; the resident one
    # rounds W + D. Each is half a unit in the last place of a result of up to 8.
    tolerance = 3 * 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), resident, rtol=0, atol=tolerance)
    assert torch.equal(layer.weight, original)
    layer.merge()
    assert torch.equal(layer(x), resident)
    assert torch.equal(layer.base_weight(), original)
    assert torch.equal(layer.to_linear(keep_delta=False).weight, original)


def test_to_linear_shares_the_weight():
    layer = make_layer()
    merged = layer.effective_weight()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert linear.weight is layer.weight
    assert torch.equal(linear.weight, merged)


def test_from_linear_copies_nothing_and_freezes():
    linear = nn.Linear(48, 32)
    layer = SparseDeltaLinear.from_linear(linear, make_pattern("uniform", 32, 48))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    trains = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trains == ["values"]
    assert layer.values.dtype == torch.float32
    assert int(layer.values.count_nonzero()) == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_pattern_is_a_frozen_linear(mode):
    layer = make_layer(make_pattern("empty", 32, 48), mode)
    x = torch.randn(3, 48, requires_grad=True)
    assert saved_for_backward([layer], lambda: layer(x)).bytes == 0
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 48))
    assert not layer.values.requires_grad


def test_without_gradients_nothing_is_saved_or_copied():
    layer = make_layer()
    x = torch.randn(512, 48)
    with torch.no_grad():
        assert saved_for_backward([layer], lambda: layer(x)).bytes == 0
    layer.values.requires_grad_(False)
    assert saved_for_backward([layer], lambda: layer(x)).bytes == 0


@pytest.mark.parametrize("density", [0.005, 0.25])
def test_no_memory_of_the_weights_size_in_forward_or_backward(memory_high_water, density):
    pattern = uniform_pattern((4096, 4096), density)
    layer = SparseDeltaLinear.from_linear(nn.Linear(4096, 4096), pattern)
    x = torch.randn(16, 4096, requires_grad=True)

    def step():
        layer.values.grad = None
        layer(x).sum().backward()

    # The weight has 64 MiB. The gradient of the values is nnz * 4 bytes, and a kernel's panels of
    # 16 tokens and its sums are below 2 MB.
    assert memory_high_water(step) < pattern.nnz * 4 + (16 << 20)


@pytest.mark.parametrize("pattern", [make_pattern("realistic", 32, 48), BLOCKS])
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode, pattern):
    layer = make_layer(pattern, mode)
    x = torch.randn(6, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.values.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    reference = dense_twin(layer)
    x2 = x.detach().clone().requires_grad_()
    reference(x2).square().sum().backward()
    # bfloat16 keeps 8 bits: dy, x and W are each off by 2^-9, sums of 6 to 32 terms average it.
    scale = reference.weight.grad.abs().max()
    error = (layer.values.grad - at_entries(reference.weight.grad, layer)).abs().max()
    assert error <= 4 * 2**-9 * scale


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    layer = make_layer()
    x = torch.randn(6, 48, requires_grad=True)
    layer(x).square().sum().backward()
    plain, dx = layer.values.grad.clone(), x.grad.clone()
    layer.values.grad = x.grad = None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(layer.values.grad, plain)
    assert torch.equal(x.grad, dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_opaque_base_keeps_its_own_autocast(dtype):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 48, 32
            self.inner = nn.Linear(48, 32, dtype=dtype)

        def forward(self, x):
            return self.inner(x)

    base = Wrapped()
    layer = SparseDeltaLinear.from_linear(base, make_pattern("uniform", 32, 48), mode="additive")
    nn.init.normal_(layer.values)
    x = torch.randn(3, 48, dtype=dtype)
    plain = layer(x)
    plain.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = layer(x)
        assert lower.dtype == base(x).dtype
    # x, W, the base's product and the sum with D's round to 8 bits each: to 2^-9 of what is added.
    added = base.inner.weight.abs() + layer.pattern.mask() * layer.values.abs().max()
    limit = (4 * 2**-9 * x.abs() @ added.to(dtype).t()).max().item()
    torch.testing.assert_close(lower.to(dtype), plain, rtol=0, atol=limit)


def test_a_quantised_base_is_additive():
    base = Int8Linear(nn.Linear(48, 32))
    stored = base.codes.clone()
    pattern = make_pattern("realistic", 32, 48)
    with pytest.raises(ConfigError, match='Int8Linear is not a plain nn.Linear.*mode="additive"'):
        SparseDeltaLinear.from_linear(base, pattern)
    layer = SparseDeltaLinear.from_linear(base, pattern, mode="additive")
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.values)
    delta = torch.zeros(32, 48)
    delta.view(-1)[pattern.indices.long()] = layer.values.detach()
    torch.testing.assert_close(layer(x), base(x) + x @ delta.t())
    layer(x).sum().backward()
    assert layer.values.grad is not None
    assert torch.equal(base.codes, stored)
    with pytest.raises(ConfigError, match="cannot hold the delta"):
        layer.merge()
    with pytest.raises(ConfigError, match="cannot hold the delta"):
        layer.to_linear()
    assert layer.to_linear(keep_delta=False) is base


def test_wrong_layers_patterns_and_modes_are_refused():
    pattern = make_pattern("uniform", 32, 48)
    with pytest.raises(PatternError, match=r"\(32, 48\), the layer's is \(48, 32\)"):
        SparseDeltaLinear.from_linear(nn.Linear(32, 48), pattern)
    with pytest.raises(ConfigError, match="unknown mode 'residant'. Did you mean 'resident'"):
        SparseDeltaLinear.from_linear(nn.Linear(48, 32), pattern, mode="residant")
    with pytest.raises(ConfigError, match="a ReLU has no in_features"):
        SparseDeltaLinear.from_linear(nn.ReLU(), pattern)
    attention = nn.MultiheadAttention(48, 2)
    with pytest.raises(ConfigError, match="no gradient would reach the values"):
        SparseDeltaLinear.from_linear(attention.out_proj, make_pattern("uniform", 48, 48))
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 48\], got \(3, 47\)"):
        make_layer()(torch.randn(3, 47))


def test_repr_says_what_trains():
    text = repr(make_layer(BLOCKS))
    assert "nnz=128" in text
    assert "block_shape=(4, 8)" in text
    assert "mode=resident" in text


def test_training_lowers_a_loss_that_only_the_entries_can():
    torch.manual_seed(0)
    pattern = make_pattern("uniform", 32, 48)
    linear = nn.Linear(48, 32)
    target = linear.weight.detach().clone()
    target.view(-1)[pattern.indices.long()] += 1.0
    layer = SparseDeltaLinear.from_linear(linear, pattern)
    optimizer = torch.optim.Adam([layer.values], lr=0.05)
    x = torch.randn(256, 48)
    wanted = x @ target.t() + linear.bias
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3
    torch.testing.assert_close(layer.values.detach(), torch.ones(pattern.nnz), rtol=0, atol=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_that_is_made_to_train_trains(mode):
    layer = make_layer(mode=mode, dtype=torch.float64)
    layer.bias.requires_grad_()
    twin = dense_twin(layer)
    twin.bias.requires_grad_()
    x, dy = (torch.randn(2, 7, size, dtype=torch.float64) for size in (48, 32))
    layer(x).backward(dy)
    twin(x).backward(dy)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_that_is_made_to_train_is_refused(mode):
    layer = make_layer(mode=mode)
    layer.weight.requires_grad_()
    with pytest.raises(ConfigError, match="frozen, but requires_grad was set"):
        layer(torch.randn(3, 48))
    with torch.no_grad():
        layer(torch.randn(3, 48))


def test_a_layer_that_an_optimizer_passes_over_is_not_stale():
    one, other = make_layer(), make_layer()
    optimizer = torch.optim.SGD([one.values, other.values], lr=0.1)
    x = torch.randn(3, 48)
    later = other(x).sum()
    one(x).sum().backward()
    optimizer.step()
    later.backward()
    assert other.values.grad is not None
