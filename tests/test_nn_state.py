"""SparseDeltaLinear saved, loaded, copied and cast: nothing is lost and nothing goes stale."""

import copy
import pickle

import pytest
import torch
from kernels import make_pattern
from layers import BLOCKS, MODES, make_layer
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from speft_kernels import SparseDeltaLinear, SparsePattern


def test_the_state_dict_is_up_to_date_after_a_step():
    layer = make_layer(fill=False)
    layer(torch.randn(3, 48)).sum().backward()
    torch.optim.SGD([layer.values], lr=0.1).step()
    assert torch.equal(layer.state_dict()["weight"], layer.effective_weight())


@pytest.mark.parametrize("pattern", [make_pattern("realistic", 32, 48), BLOCKS])
@pytest.mark.parametrize("mode", MODES)
def test_state_dict_round_trip(pattern, mode):
    layer = make_layer(pattern, mode)
    x = torch.randn(3, 48)
    expected = layer(x)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    assert set(state) == {"weight", "bias", "values", "indices", "base_values"}

    # Another base and another pattern of the same size: all of it comes from the state.
    other = SparsePattern(pattern.shape, torch.arange(pattern.num_blocks), pattern.block_shape)
    fresh = make_layer(other, mode)
    fresh(x)
    fresh.load_state_dict(state)
    assert fresh.pattern == layer.pattern
    assert torch.equal(fresh(x), expected)
    fresh.unmerge(), layer.unmerge()
    assert torch.equal(fresh.weight, layer.weight)


def test_a_partial_state_dict_loses_nothing():
    layer = make_layer()
    layer(torch.randn(3, 48))
    base, values = layer.base_weight(), layer.values.detach().clone()
    other = torch.arange(layer.pattern.nnz, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="values, base_values, weight of the same layer do not"):
        layer.load_state_dict({"indices": other})
    assert torch.equal(layer.base_weight(), base)
    assert torch.equal(layer.values, values)
    # A plain checkpoint of another base: the trained entries lie on that base from now on.
    fresh = nn.Linear(48, 32)
    layer.load_state_dict(fresh.state_dict(), strict=False)
    assert torch.equal(layer.base_weight(), fresh.weight)
    assert torch.equal(layer.values, values)
    torch.testing.assert_close(layer(torch.eye(48)).t() - fresh.bias[:, None], layer.weight)
    assert torch.equal(layer.weight, layer.effective_weight())


def test_a_state_dict_with_bad_indices_is_refused():
    layer = make_layer()
    state = layer.state_dict()
    state["indices"] = state["indices"].flip(0)
    with pytest.raises(RuntimeError, match="indices: indices must be strictly increasing"):
        make_layer().load_state_dict(state)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copier):
    layer = make_layer()
    x = torch.randn(3, 48)
    before = layer(x)
    twin = copier(layer)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.values.add_(1.0)
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)
    twin.unmerge()
    layer.unmerge()
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype_keeps_values_unrounded(dtype):
    layer = make_layer()
    original, values = layer.base_weight(), layer.values.detach().clone()
    layer(torch.randn(2, 48)).sum().backward()
    layer.to(dtype)
    layer.sync()
    assert torch.equal(layer.weight, layer.effective_weight())
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.values.dtype == layer.values.grad.dtype == wanted
    assert torch.equal(layer.values.detach().float(), values)
    x = torch.randn(2, 48, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    layer.unmerge()
    assert torch.equal(layer.weight, original.to(dtype))


def test_casting_there_and_back_leaves_no_stale_weight():
    for _ in range(20):  # the allocator likes to hand the same address out again
        layer = make_layer(make_pattern("uniform", 512, 512))
        layer(torch.randn(2, 512))
        layer.to(torch.bfloat16).to(torch.float32)
        layer(torch.randn(2, 512))
        assert torch.equal(layer.weight, layer.effective_weight())


def test_values_of_ones_own_are_told_apart_by_more_than_their_address():
    # Each draw is a new tensor of version 0, and the allocator likes to give it the same memory.
    pattern = make_pattern("realistic", 64, 64)
    layer, twin = make_layer(pattern), make_layer(pattern, "additive")
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(5, 64)
    with torch.no_grad():
        for _ in range(20):
            values = torch.randn_like(layer.values)
            y, expected = (functional_call(one, {"values": values}, (x,)) for one in (layer, twin))
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-3)
            del values


def test_an_average_of_all_buffers_is_saved_with_the_entries_that_it_computes_with():
    layer = make_layer()
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(5):
        with torch.no_grad():
            layer.values.normal_()
        average.update_parameters(layer)
    x = torch.randn(3, 48)
    fresh = make_layer(fill=False)
    fresh.load_state_dict(average.module.state_dict())
    assert fresh.pattern == layer.pattern
    torch.testing.assert_close(fresh(x), average(x), rtol=0, atol=1e-5)
    assert torch.equal(fresh.base_weight(), layer.base_weight())


def test_a_layer_made_in_inference_mode_serves_and_trains():
    linear, x = nn.Linear(48, 32), torch.randn(3, 48)
    with torch.inference_mode():
        layer = SparseDeltaLinear.from_linear(linear, make_pattern("realistic", 32, 48))
        layer.values.fill_(0.5)
        inside = layer(x)
        twin = copy.deepcopy(layer)
        twin.values.mul_(2)
        doubled = twin(x)
        twin.values.mul_(0.5)
        assert torch.equal(twin(x), inside)
        assert not torch.equal(doubled, inside)
    assert torch.equal(layer(x), inside)
    layer(x).sum().backward()
    assert layer.values.grad is not None


def test_conversions_may_swap_tensors():
    layer, fresh, x = make_layer(), make_layer(), torch.randn(3, 48)
    layer(x).sum().backward()
    expected = fresh(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict({k: v.clone() for k, v in fresh.state_dict().items()})
        assert torch.equal(layer(x), expected)
        values = layer.values.detach().clone()
        layer.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    layer(x.bfloat16())
    assert torch.equal(layer.values, values)
    assert torch.equal(layer.weight, layer.effective_weight())


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_tensors_of_another_dtype_may_be_assigned(mode, partial):
    layer, x = make_layer(mode=mode), torch.randn(3, 48).bfloat16()
    layer(x.float())
    state = {k: v.clone() for k, v in layer.state_dict().items() if not partial or k != "values"}
    if partial:
        del state["base_values"], state["indices"]
    lower = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    layer.load_state_dict(lower, strict=not partial, assign=True)
    layer(x).sum().backward()
    assert layer.values.dtype == layer.values.grad.dtype == torch.float32
    assert layer.weight.dtype == layer.base_values.dtype == torch.bfloat16
    layer.merge()
    assert torch.equal(layer.weight, layer.effective_weight())
