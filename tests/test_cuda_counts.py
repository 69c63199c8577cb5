"""What the CUDA kernels ask of the hardware is what their files say they ask, counted on a CPU.

Bytes that asynchronous copies bring, 512 bytes at a time into and out of shared memory and the
cycles they take, and products of the tensor cores. For sizes that fill their tiles the counts are
exact.
"""

import pytest
import torch

from speft_kernels import SparsePattern, SparsityPlan, _cuda_native, ops
from speft_kernels.ops.ways import cuda_ways
from speft_kernels.quantized import QuantizedWeight
from speft_kernels.testing import realistic_pattern, uniform_pattern
from speft_kernels.thin_strips import BLOCK_ROWS, GROUP, STRIP_ROWS, ThinStrips

pytestmark = pytest.mark.skipif(
    _cuda_native.missing("cuda-host") is not None, reason="cuda-host is not built"
)

PRODUCT = 16 * 8 * 16  # multiplications of one instruction
READ = 512  # bytes that a warp reads at once
WARPS = 16  # of a block of sampled_grad


def counted(call):
    module = _cuda_native.kernels("cuda-host")
    module.take_counts()
    call()
    found = module.take_counts()
    # No copy and no ldmatrix of any kernel meets a bank twice.
    assert found["copy_cycles"] <= 4 * found["copies"]
    assert found["matrix_cycles"] == 4 * found["matrix_reads"]
    return found


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("bits", [16, 8, 4, 0], ids=lambda bits: f"{bits} bits")
@pytest.mark.parametrize("twin", [False, True], ids=("product", "twin"))
@pytest.mark.parametrize("height", [256, 128])
def test_many_tokens_bring_each_tile_once(bits, twin, height, monkeypatch):
    tokens, rows, columns = 512, 256, 512
    # Tiles of 128 tokens where each has a multiprocessor of its own, else of 256.
    tiles = tokens // 128 * (columns if twin else rows) // 128
    enough = tiles if height == 128 else tiles - 1
    monkeypatch.setattr(_cuda_native, "multiprocessors", lambda device: enough)
    pattern = uniform_pattern((rows, columns), 0.01, seed=0)
    values, weight = torch.randn(pattern.nnz), normal(rows, columns)
    base = QuantizedWeight.quantize(weight, bits, 32) if bits in (8, 4) else weight
    operand = normal(tokens, rows if twin else columns)
    summed, outputs = operand.shape[1], columns if twin else rows
    if bits:
        product = ops.sparse_delta_matmul_grad_input if twin else ops.sparse_delta_matmul
        found = counted(lambda: product(operand, base, values, pattern, backend="cuda-host"))
    else:
        product = ops.delta_matmul_grad_input if twin else ops.delta_matmul
        found = counted(lambda: product(operand, values, pattern, backend="cuda-host"))
    products = tokens * outputs * summed // PRODUCT
    assert found["products"] == products
    # Of x for each 128 outputs, of W for each tile of tokens; words of four columns once for each.
    stored = 16 if twin and bits == 4 else bits  # bits read of W an element
    brought = 2 * tokens * summed * (outputs // 128)
    brought += rows * columns * stored // 8 * (tokens // height)
    assert found["copied_bytes"] == brought
    # A warp has 64 x 64 of a tall tile: for four products down and eight across, 8 reads. Of a
    # short one it has 64 x 32: 6 reads for four and four.
    assert found["matrix_reads"] == (products * 8 // 32 if height == 256 else products * 6 // 16)


@pytest.mark.parametrize("tokens", [40, 64, 130])
def test_tokens_that_are_not_there_are_not_multiplied_by_whole_warps(tokens):
    pattern = uniform_pattern((256, 128), 0.02, seed=0)
    values, x, weight = torch.randn(pattern.nnz), normal(tokens, 128), normal(256, 128)
    for run in cuda_ways(x, weight, values, pattern, backend="cuda-host").values():
        found = counted(run)
        assert found["products"] == -(-tokens // 64) * 64 * 256 * 128 // PRODUCT


# On 132 multiprocessors (tokens, outputs, tokens of a tile): one wave of short tiles for one of
# tall ones, two for one, two for two, as many of either, three for two.
@pytest.mark.parametrize(
    ("tokens", "rows", "height"),
    [
        *((512, 4096, 128), (513, 4096, 256), (1024, 4096, 256), (2048, 1024, 128)),
        *((384, 11008, 128), (512, 11008, 256), (100, 28672, 128), (640, 6144, 128)),
        *((768, 8192, 256),),
    ],
)
def test_tiles_are_as_high_as_waves_of_them_end_first(tokens, rows, height, monkeypatch):
    monkeypatch.setattr(_cuda_native, "multiprocessors", lambda device: 132)
    pattern = SparsePattern((rows, 32), torch.zeros(1, dtype=torch.int32))
    x, weight = torch.zeros(tokens, 32).bfloat16(), torch.zeros(rows, 32).bfloat16()
    found = counted(
        lambda: ops.sparse_delta_matmul(x, weight, torch.ones(1), pattern, backend="cuda-host")
    )
    # Each tile brings 32 columns of its tokens, zeros for those missing, and of 128 rows of W.
    tiles = -(-rows // 128) * -(-tokens // height)
    assert found["copied_bytes"] == tiles * 2 * 32 * (height + 128)


def test_few_tokens_copy_nothing():
    pattern = uniform_pattern((64, 128), 0.02, seed=0)
    values, x, weight = torch.randn(pattern.nnz), normal(16, 128), normal(64, 128)
    found = counted(
        lambda: ops.sparse_delta_matmul(x, weight, values, pattern, backend="cuda-host")
    )
    assert found == dict.fromkeys(found, 0) | {"products": 16 * 64 * 128 // PRODUCT}


@pytest.mark.parametrize("side", [16, 32, 64])
def test_block_grad_reads_both_sides_of_each_block(side):
    tokens, count = 256, 5
    pattern = SparsePattern.from_blocks((4 * side, 4 * side), (side, side), torch.arange(count))
    dy, x = normal(tokens, 4 * side), normal(tokens, 4 * side)
    found = counted(lambda: ops.block_grad(dy, x, pattern, backend="cuda-host"))
    assert found["products"] == tokens * count * side * side // PRODUCT
    assert found["copied_bytes"] == count * 2 * tokens * 2 * side
    # One read feeds two products of dy's side and one of x's; a warp has the whole block.
    blocks = count * tokens // 16
    assert found["matrix_reads"] == blocks * (side // 16 + side // 16)


@pytest.mark.parametrize("density", [0.005, 0.02])
@pytest.mark.parametrize("make", [realistic_pattern, uniform_pattern])
def test_sampled_grad_reads_what_its_strips_need(make, density):
    tokens, shape = 64, (512, 1024)
    pattern = make(shape, density, seed=0)
    plan = SparsityPlan.build(pattern)
    strips = plan.compiled(ThinStrips, False)
    tiles, groups = strips.tile_block.numel(), strips.group_rows.numel()
    dy, x = normal(tokens, shape[0]), normal(tokens, shape[1])
    found = counted(lambda: ops.sampled_grad(dy, x, pattern, plan=plan, backend="cuda-host"))
    assert found["products"] == groups * GROUP * STRIP_ROWS * tokens // PRODUCT
    lines = strips.line.numel()
    assert found["copied_bytes"] == 2 * tokens * lines + 2 * BLOCK_ROWS * tokens * tiles
    # Two bytes of each token a strip, of which a tenth at most meets a bank twice.
    assert found["vector_reads"] * READ == 2 * tokens * groups * GROUP
    assert found["vector_cycles"] <= 1.1 * 4 * found["vector_reads"]
    # 64 bytes of dy a token for each warp and each rows that its groups have; beside them, those
    # that turn x, in whole squares of 64 x 64.
    turns = 0
    for tile in range(tiles):
        rows = strips.group_rows[strips.tile_groups[tile] : strips.tile_groups[tile + 1]]
        for of_warp in rows.split(-(-len(rows) // WARPS)):
            turns += of_warp.unique_consecutive().numel()
    squares = -(-strips.columns.numel() // 64) * tokens // 64
    assert found["matrix_reads"] * READ == 64 * tokens * turns + 2 * 64 * 64 * squares


def test_keep_columns_turns_each_square_once():
    columns = torch.arange(0, 256, 2, dtype=torch.int32)
    keep = torch.ops.speft.keep_columns
    found = counted(lambda: keep(normal(128, 256), columns, 128, "cuda-host"))
    assert found["matrix_reads"] * READ == 2 * 128 * columns.numel()
