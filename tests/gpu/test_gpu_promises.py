"""What every operation promises on a GPU: the same bits every time, the current stream and device,
no synchronisation, capture in a CUDA graph. Whatever backend is declared is held to it.
"""

import pytest
import torch
from calls import CALLS, K, M, N, make
from rig import (
    DEVICE,
    DRY,
    assert_one_product,
    captured,
    fast_backends,
    no_synchronisation,
    spin,
)

DTYPES = (torch.bfloat16, torch.float32)
EVERY = [
    pytest.param(name, backend, dtype, id=f"{name}-{backend}-{str(dtype)[6:]}")
    for dtype in DTYPES
    for name, kind in CALLS.items()
    for backend in fast_backends(*kind.needs, dtype=dtype)
]
ASYNCHRONOUS = [case for case in EVERY if not CALLS[case.values[0]].reads_back]


def clones(call):
    return [output.clone() for output in call.outputs()]


def clear(outputs):
    for output in outputs:
        output.zero_()


def assert_same_bits(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b), (int((a != b).sum()), a.numel())


@pytest.mark.parametrize(("name", "backend", "dtype"), EVERY)
def test_the_same_bits_every_time(name, backend, dtype):
    call = make(name, backend, dtype)
    wanted = clones(call)
    assert any(bool(output.any()) for output in wanted)
    for _ in range(2 if DRY else 5):
        assert_same_bits(call.outputs(), wanted)
    if DRY:
        return
    # Beside a stream that takes multiprocessors away and turns the cache over, programs start and
    # end in another order: a sum whose order is not fixed shows it.
    other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    for _ in range(5):
        with torch.cuda.stream(other):
            for _ in range(4):
                busy @ busy
        assert_same_bits(call.outputs(), wanted)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("name", "backend", "dtype"), EVERY)
def test_the_current_stream(name, backend, dtype):
    """Inputs that arrive late on another stream: a launch on the default stream would not wait."""
    if DRY:
        pytest.skip("the CPU has no streams")
    call = make(name, backend, dtype)
    call.outputs()
    late = [tensor.clone() for tensor in call.inputs]
    call.renew(1)
    wanted = clones(call)
    right = [tensor.clone() for tensor in call.inputs]
    for tensor, other in zip(call.inputs, late, strict=True):
        tensor.copy_(other)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        spin()
        for tensor, new in zip(call.inputs, right, strict=True):
            tensor.copy_(new)
        found = clones(call)
    torch.cuda.synchronize()
    assert_same_bits(found, wanted)


@pytest.mark.parametrize(("name", "backend", "dtype"), ASYNCHRONOUS)
def test_the_host_never_waits(name, backend, dtype):
    call = make(name, backend, dtype)
    call.outputs()  # plans are made and kernels compiled by the first call
    call.outputs()
    with no_synchronisation():
        call.outputs()


@pytest.mark.parametrize(("name", "backend", "dtype"), ASYNCHRONOUS)
def test_a_graph_computes_with_what_is_there_when_it_is_replayed(name, backend, dtype):
    call = make(name, backend, dtype)
    outputs, replay = captured(call.outputs)
    # Triton's W + D is written out for many tokens, and cuBLAS multiplies it.
    by_vendor = backend == "torch" or (backend == "triton" and f"{M} tokens" in name)
    for seed in (1, 2):
        call.renew(seed)
        clear(outputs)  # of write_delta, whose results are the weights, what it does not write
        wanted = clones(call)
        clear(outputs)
        replay()
        if not by_vendor:
            assert_same_bits(outputs, wanted)
            continue
        for one, other in zip(outputs, wanted, strict=True):
            assert_one_product(one, other, terms=max(M, N, K), operands=dtype)
        found = [output.clone() for output in outputs]
        clear(outputs)
        replay()
        assert_same_bits(outputs, found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")
@pytest.mark.parametrize(("name", "backend", "dtype"), EVERY)
def test_a_device_that_is_not_the_current_one(name, backend, dtype):
    first, second = (make(name, backend, dtype, torch.device("cuda", i)) for i in range(2))
    for call in (first, second):
        call.renew(1)
    found = clones(second)
    assert all(output.device.index == 1 for output in found)
    if name != "write_delta":  # which leaves most of a weight as it was
        assert_same_bits([output.to("cuda:0") for output in found], clones(first))
