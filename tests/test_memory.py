"""What training costs in memory, by counting: what backward keeps, and what is never built."""

import copy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from kernels import LargestTensor, peak_of_tensors, uniform_blocks
from layers import MODES, make_layer
from plans import plan_with
from torch import nn

from speft_kernels import SparsePattern, SparsityPlan, SpeftConfig, apply_patterns, ops
from speft_kernels.bench import masks
from speft_kernels.bench.cases import layer as crowded
from speft_kernels.bench.memory import saved_for_backward
from speft_kernels.costs import DEFAULTS
from speft_kernels.parts import Parts
from speft_kernels.plan import plan_of
from speft_kernels.testing import realistic_pattern, uniform_pattern


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [(1, 1), (16, 16), (1, 64), (64, 1)])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_a_layer_keeps_the_used_columns_alone(needs_dx, blocks, mode):
    if blocks == (1, 1):
        pattern = realistic_pattern((256, 512), 0.005)
    else:
        rows, width = 256 // blocks[0], 512 // blocks[1]
        cols = torch.randperm(width)[: width // 4]  # as real masks cluster
        chosen = torch.unique(torch.arange(rows) * width + cols[torch.arange(rows) % len(cols)])
        pattern = SparsePattern.from_blocks((256, 512), blocks, chosen)
    layer, x = make_layer(pattern, mode), torch.randn(640, 512, requires_grad=needs_dx)
    used = pattern.used_cols.numel()
    assert used < 512 // 2
    found = saved_for_backward([layer], lambda: layer(x))
    # 640 tokens are five whole blocks of 128: nothing is padding.
    assert found.bytes == 640 * used * 4
    assert found.inputs == 640 * 512 * 4
    dense = nn.Linear(512, 256)
    assert saved_for_backward([dense], lambda: dense(x)).bytes == found.inputs


def test_bytes_saved_with_a_real_mask():
    text = masks.text()
    patterns = masks.real_masks(0.005, "layer")
    model = copy.deepcopy(text.model)
    apply_patterns(model, patterns, SpeftConfig(density=0.005))
    layers = [model.get_submodule(name) for name in patterns]

    def step():
        return model(**text.steps[0]).loss

    first = saved_for_backward(layers, step)
    shared = saved_for_backward(layers, step)
    # From the second pass on queries, keys and values share one copy.
    assert shared.bytes < first.bytes
    assert shared.share <= 0.30, shared


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "density"),
    [
        ("realistic", 0.001),
        ("realistic", 0.005),
        ("uniform", 0.05),
        ("uniform", 0.25),
        ("blocks", 0.005),
        ("blocks", 0.25),
    ],
)
def test_no_tensor_of_the_weights_shape_in_forward_or_backward(kind, density, mode):
    n, k, tokens = 1024, 768, 64
    if kind == "blocks":
        pattern = uniform_blocks((n, k), (16, 16), density)
    else:
        make = {"realistic": realistic_pattern, "uniform": uniform_pattern}[kind]
        pattern = make((n, k), density)
    layer = make_layer(pattern, mode)
    x = torch.randn(tokens, k, requires_grad=True)
    layer(x).sum().backward()  # plans are built by the first pass
    with LargestTensor() as seen:
        layer(x).sum().backward()
    assert 0 < seen.numel < n * k // 2
    dense = nn.Linear(k, n)
    with LargestTensor() as seen:
        dense(x).sum().backward()
    assert seen.numel == n * k  # the check sees what it is there for


def test_backward_of_a_dense_layer_needs_one_panel():
    """25 % of a weight of 36 MB: beside the gradient of the values, 9 MB, nothing of its size.

    Stated in csrc/cpu/token_sum.h and parts.py: sums of at most 8 MiB, for each of two threads
    a chunk of dy (256 KiB) and the columns of one block of x (512 KiB), and a panel of at most
    4 MiB. The layer that trains whole shows that a gradient of 36 MB would be seen.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        grown = process.submit(crowded.extra_peaks, 2).result()
    if grown is None:
        pytest.skip("this system does not let a process reset its peak memory")
    ours, dense = grown
    gradient = 4 * round(crowded.DENSITY * crowded.SIZE**2)
    assert 0.9 * gradient <= ours <= gradient + (8 << 20) + 2 * (768 << 10) + (4 << 20)
    assert dense >= 0.9 * 4 * crowded.SIZE**2  # all but what the heap had free


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("blocks", [(16, 16), (4, 4), (1, 64), (64, 1)])
@pytest.mark.parametrize("density", [0.005, 0.25])
def test_scratch_of_block_grad_is_bounded(memory_high_water, density, blocks, packed):
    """For a weight of 16 MB."""
    torch.set_num_threads(2)
    n = k = 2048
    pattern = uniform_blocks((n, k), blocks, density)
    dy, x = torch.randn(1024, n), torch.randn(1024, k)
    plan = plan_of(pattern)
    kept = ops.keep_columns(x, plan) if packed else x
    out = torch.empty(pattern.values_shape)
    settings = {"plan": plan, "packed": packed, "out": out, "backend": "cpu"}
    grown = memory_high_water(lambda: ops.block_grad(dy, kept, pattern, **settings))
    # Stated in csrc/cpu/token_sum.h, panel.h and block_grad.cpp: sums of at most 8 MiB, for each of
    # two threads 1 MiB of used columns, 16 bytes a block, and 1 MiB for the allocator.
    assert grown <= (8 << 20) + 2 * (1 << 20) + 16 * pattern.num_blocks + (1 << 20)


def test_the_high_water_mark_sees_what_a_call_frees_again(memory_high_water):
    for size in (1 << 20, 8 << 20):
        grown = memory_high_water(lambda size=size: torch.zeros(size, dtype=torch.uint8))
        assert 0.9 * size <= grown <= size + (1 << 20)


@pytest.mark.parametrize("part", ["tiles", "gather", "blocks"])
@pytest.mark.parametrize("density", [0.12, 0.25])
def test_the_sums_of_a_small_weight_stay_below_its_size(memory_high_water, density, part):
    """For a weight of 4 MB, of which 8 MB of sums would be twice as many elements."""
    torch.set_num_threads(2)
    n = k = 1024
    if part == "blocks":
        plan = plan_of(uniform_blocks((n, k), (16, 16), density))
    else:
        plan = plan_with(part, uniform_pattern((n, k), density))
    pattern = plan.pattern
    dy, x, out = torch.randn(2048, n), torch.randn(2048, k), torch.empty(pattern.values_shape)
    compute = ops.block_grad if pattern.is_block else ops.sampled_grad
    settings = {"plan": plan, "out": out, "backend": "cpu"}
    compute(dy, x, pattern, **settings)  # builds the parts
    grown = memory_high_water(lambda: compute(dy, x, pattern, **settings))
    # Stated in csrc/cpu/token_sum.h; beside the sums, for each of two threads, a chunk of dy
    # (256 KiB) and a block of x (512 KiB), or 1 MiB of used columns; 1 MiB for the allocator.
    assert grown <= 4 * n * k + 2 * (1 << 20) + (1 << 20)


def full_lines(side, n, k):
    """A quarter of the columns or of the rows, full."""
    mask = torch.zeros(n, k, dtype=torch.bool)
    if side == "columns":
        mask[:, torch.randperm(k)[: k // 4]] = True
    else:
        mask[torch.randperm(n)[: n // 4]] = True
    return SparsePattern.from_mask(mask)


def scratch_of_sampled_grad(plan, tokens, packed, backend, dtype=torch.float32):
    """The most bytes that a call has in tensors at a time, its result allocated beforehand."""
    n, k = plan.pattern.shape
    dy, x = torch.randn(tokens, n).to(dtype), torch.randn(tokens, k).to(dtype)
    kept = ops.keep_columns(x, plan) if packed else x
    assert (kept.dim() == 3) == packed
    out = torch.empty(plan.pattern.nnz)
    settings = {"plan": plan, "packed": packed, "out": out, "backend": backend}
    ops.sampled_grad(dy, kept, plan.pattern, **settings)  # builds the parts
    return peak_of_tensors(lambda: ops.sampled_grad(dy, kept, plan.pattern, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_scratch_of_panels_does_not_grow_with_tokens(side, packed, dtype):
    """25 % in full lines, and 16,384 tokens: the hot lines of all of them would be 16 MB."""
    n = k = 1024
    pattern = full_lines(side, n, k)
    keep = pattern.used_cols
    if packed and side == "rows":  # as the layers that share a copy keep what one of them reads
        mask = pattern.mask()
        mask[:, k // 2 :] = False
        pattern, keep = SparsePattern.from_mask(mask), torch.arange(5 * k // 8, dtype=torch.int32)
    plan = SparsityPlan.build(pattern, costs=DEFAULTS["cpu"], keep=keep if packed else None)
    parts = plan.compiled(Parts, packed)
    assert parts.has_panels
    assert parts.entry_row.numel() == 0  # they serve all
    grown = scratch_of_sampled_grad(plan, 16384, packed, "cpu", dtype)
    # Stated in ops/panels.py: a panel of 256 x 1024 products, 1 MiB, and beside it its entries with
    # their places, 3 MiB, or, of the hot lines, as many elements, for which a stretch of 192 tokens
    # is widened.
    assert grown <= (1 << 20) + (3 << 20)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_panels_of_a_small_weight_stay_below_its_size(side):
    n = k = 256
    plan = plan_with(side, full_lines(side, n, k))
    grown = scratch_of_sampled_grad(plan, 16384, False, "cpu")
    # A panel of a quarter of the weight, and beside it three as large at most, of hot lines; or its
    # entries, with places of twice their size.
    assert grown <= 4 * n * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_scratch_of_the_torch_backend_does_not_grow_with_tokens(packed, dtype):
    n, k, tokens = 256, 1024, 1 << 16
    mask = uniform_pattern((n, k), 0.25).mask()
    mask[:, -k // 8 :] = False  # or x would be kept whole
    plan = plan_with("gather", SparsePattern.from_mask(mask))
    grown = scratch_of_sampled_grad(plan, tokens, packed, "torch", dtype)
    # Stated in ops/sampled_grad.py: 2^24 elements of copied columns, beside those whose turn is
    # over, and of either operand 2^22 that are widened; 4 MiB are for products, entries, places. Of
    # all tokens the used columns would have 224 MiB in float32, and the widened ones as much.
    size = dtype.itemsize
    assert grown <= 2 * (size << 24) + (0 if size == 4 else 2 * (16 << 20)) + (4 << 20)
