"""The CUDA kernels' sources on a CPU: in every order of their threads, and under sanitizers.

That they compute what they should is tested with the other backends (test_block_grad.py and so
on, backend "cuda-host"). Here: that the order of the threads changes nothing, and that a fault that
a GPU would only show at times does show.
"""

import re

import pytest
import torch
from cuda_host import build, build_with_fault, run_with, sanitizers

from speft_kernels import SparsePattern, _cuda_native, ops

pytestmark = pytest.mark.skipif(
    _cuda_native.missing("cuda-host") is not None, reason="cuda-host is not built"
)

# What a process with a module of its own runs: the operations that are named, or all, on tensors
# that end where they end, each in several orders of the threads, against torch.
SCRIPT = """
import torch
from speft_kernels import QuantizedWeight, SparsePattern, ops
import speft_kernels._cuda_host as module

def block_grad():
    for block, shape in (((16, 16), (48, 64)), ((1, 64), (5, 128)), ((40, 24), (80, 48))):
        count = (shape[0] // block[0]) * (shape[1] // block[1])
        pattern = SparsePattern.from_blocks(shape, block, torch.arange(0, count, 2))
        for tokens in (67, 300, 1100):
            dy = torch.randn(tokens, shape[0]).bfloat16()
            x = torch.randn(tokens, shape[1]).bfloat16()
            ours = ops.block_grad(dy, x, pattern, backend="cuda-host")
            theirs = ops.block_grad(dy, x, pattern, backend="reference")
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3):
                yield block, tokens

def sampled_grad():
    # Patterns of one tile and of several, by strips and by lines; rows of whole vectors or not.
    for (n, k), density in (((40, 33), 0.3), ((301, 40), 0.9), ((264, 500), 0.016)):
        pattern = SparsePattern.from_mask(torch.rand(n, k) < density)
        for tokens in (67, 600) if n == 40 else (67,):
            dy, x = torch.randn(tokens, n).half(), torch.randn(tokens, k).half()
            ours = ops.sampled_grad(dy, x, pattern, backend="cuda-host")
            theirs = ops.sampled_grad(dy, x, pattern, backend="reference")
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3):
                yield n, tokens

def keep_columns():
    x = torch.randn(77, 150).bfloat16()
    columns = torch.arange(0, 150, 2, dtype=torch.int32)
    kept = torch.ops.speft.keep_columns(x, columns, 80, "cuda-host")
    if not torch.equal(kept[0, :, :77], x[:, ::2].T) or kept[0, :, 77:].any():
        yield "turned"

def write_delta():
    for dtype in (torch.float32, torch.bfloat16):
        mask = torch.rand(70, 90) < 0.3
        pattern = SparsePattern.from_mask(mask)
        weight = torch.randn(70, 90).to(dtype)
        base = weight[mask].clone()
        values = torch.randn(pattern.nnz)
        ops.write_delta(weight, pattern, base, values, backend="cuda-host")
        if not torch.equal(weight[mask], (base.float() + values).to(dtype)):
            yield dtype

def topk_salience():
    # Several tiles, one of them whole; equal scores beyond what is set aside; an odd address.
    apart = [torch.randn(shape).bfloat16() for shape in ((43, 401), (5, 9), (1, 2500))]
    odd = torch.randn(16402).bfloat16()[1:].view(77, 213)
    one = torch.ones(60, 100).bfloat16()
    for weights, grads, k, scope in (
        (apart, [a.flip(0) for a in apart], 0.01, "layer"),
        (apart, [a.flip(1) for a in apart], 700, "global"),
        ([odd, one], [odd, one], 300, "layer"),
    ):
        ours, theirs = (
            ops.topk_salience(weights, grads, k, metric="snip", scope=scope, backend=backend)
            for backend in ("cuda-host", "reference")
        )
        if not all(map(torch.equal, ours, theirs)):
            yield k, scope

def sparse_delta_matmul():
    for tokens, cols, bits in ((130, 136, None), (40, 128, 8), (40, 128, 4), (40, 128, 0),
                               (19, 136, None), (19, 128, 8), (19, 128, 4), (19, 128, 0)):
        pattern = SparsePattern.from_mask(torch.rand(72, cols) < 0.08)
        weight = torch.randn(72, cols).bfloat16()
        if bits:
            weight = QuantizedWeight.quantize(weight, bits, 32)
        values = torch.randn(pattern.nnz)
        x, dy = torch.randn(tokens, cols).bfloat16(), torch.randn(tokens, 72).bfloat16()
        for operand, form in ((x, ""), (dy, "_grad_input")):
            function = getattr(ops, ("delta_matmul" if bits == 0 else "sparse_delta_matmul") + form)
            rest = (values, pattern) if bits == 0 else (weight, values, pattern)
            ours = function(operand, *rest, backend="cuda-host").float()
            theirs = function(operand, *rest, backend="reference").float()
            if not torch.allclose(ours, theirs, rtol=2e-2, atol=0.3):
                yield form, tokens, bits

ORDERS = 4

def check(seed):
    module.set_seed(seed)
    torch.manual_seed(0)
    return [(f.__name__, wrong) for f in NAMED for wrong in f()]

found = next((wrong for wrong in map(check, range(ORDERS)) if wrong), [])
print("wrong:", found)
raise SystemExit(bool(found))
"""


OPERATIONS = tuple(re.findall(r"^def (\w+)\(\):", SCRIPT, re.MULTILINE))


def script(*operations, orders=4):
    """The script for some of the operations, or all."""
    named = f"NAMED = [{', '.join(operations or OPERATIONS)}]\n"
    return SCRIPT.replace("ORDERS = 4\n", f"ORDERS = {orders}\n{named}")


def test_the_order_of_the_threads_changes_no_bit():
    module = _cuda_native.kernels("cuda-host")
    blocks = SparsePattern.from_blocks((64, 96), (32, 32), torch.tensor([0, 3, 4]))
    entries = SparsePattern.from_mask(torch.rand(64, 96) < 0.05)
    dy, x = torch.randn(700, 64).bfloat16(), torch.randn(700, 96).bfloat16()
    scores = [torch.randn(90, 200), torch.randn(300, 70).round()]
    results = []
    try:
        for seed in range(5):
            module.set_seed(seed)
            sums = [
                operation(dy, x, pattern, backend="cuda-host")
                for operation, pattern in ((ops.block_grad, blocks), (ops.sampled_grad, entries))
            ]
            chosen = ops.topk_salience(
                [None] * 2, scores, 0.02, metric="raw", scope="global", backend="cuda-host"
            )
            results.append((*sums, *chosen))
    finally:
        module.set_seed(0)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_launcher_that_cannot_serve_says_which_operation_and_sizes():
    module = _cuda_native.kernels("cuda-host")
    with pytest.raises(
        RuntimeError,
        match=r"block_grad \(tokens 8, blocks 1, height 4, width 4\) failed: no kernel",
    ):
        # float32, which the tensor cores do not multiply: refused one floor up, too.
        module.block_grad(0, 4, 0, 4, 8, 0, 0, 1, 4, 4, 0, False, 0, 1, 0, 0, 0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The folder of a module without a fault."""
    folder = tmp_path_factory.mktemp("sound")
    done = run_with(build(folder), script())
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


# (name, file, what stands there, what shall stand there)
FAULTS = (
    # A warp's sum is read before it is there, a run's place before it is known; bits are set before
    # they are cleared, and read before they are set.
    ("sums", "topk_salience.cu", "    sync_block();  // the warps'", "    // the warps'"),
    ("run", "topk_salience.cu", "    sync_block();  // the run has", "    // the run has"),
    ("clearing", "topk_salience.cu", "    sync_block();  // no bit is", "    // no bit is"),
    ("bits", "topk_salience.cu", "    sync_block();  // every bit", "    // every bit"),
    # A key equal to the k-th too few; more set aside than there is room for.
    ("tie", "topk_salience.cu", "tie++ >= ties)", "tie++ >= ties - 1)"),
    ("room", "topk_salience.cu", "state.found <= uint64_t(segment.capacity)", "true"),
    # The barrier after which a stage is whole and another one free.
    ("barrier", "block_grad.cu", "        sync_block();  // everyone's", "        // everyone's"),
    # The barrier between the warps that add their sums one after the other.
    ("turns", "block_grad.cu", "        sync_block();  // the stages", "        // the stages"),
    # One group of copies too few is waited for.
    ("wait", "block_grad.cu", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    # A token beyond the end of a part is added, and counts twice.
    ("off by one", "block_grad.cu", "? begin + part :", "? begin + part + 1 :"),
    # The barrier between a tile's entries and those who multiply it.
    (
        "patched",
        "sparse_delta_matmul.cu",
        "        sync_block();  // the next",
        "        // the next",
    ),
    # That between a tile made of eight or four bits and the entries.
    ("widened", "sparse_delta_matmul.cu", "sync_block();  // the tile is", "// the tile is"),
    # That between the warps' sums and those who add them.
    ("sums", "sparse_delta_matmul.cu", "    sync_block();  // the sums", "    // the sums"),
    (
        "late",
        "sparse_delta_matmul.cu",
        "cp_async_wait<kStages - 3>()",
        "cp_async_wait<kStages - 2>()",
    ),
    # The last of 32 entries is added twice.
    ("twice", "sparse_delta_matmul.cu", "next.begin + kWarp; at", "next.begin + kWarp - 1; at"),
    # As above: where a stage is whole, and after the last one, whose place the sums take.
    ("barrier", "sampled_grad.cu", "        sync_block();  // everyone's", "        // everyone's"),
    ("end", "sampled_grad.cu", "    sync_block();  // the stages", "    // the stages"),
    ("sums", "sampled_grad.cu", "    sync_block();\n    const int last", "    const int last"),
    ("wait", "sampled_grad.cu", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    # The tokens of dy in another order than those of x.
    ("order", "sampled_grad.cu", "place_of_token(token) * kPitch", "token * kPitch"),
    # The last group of each warp is left out, and the first one reads its strips' neighbours.
    ("group", "sampled_grad.cu", "if (j >= own) break;", "if (j + 1 >= own) break;"),
    ("off by one", "sampled_grad.cu", "+ lane / 4];", "+ (lane + 4) / 4];"),
    ("barrier", "keep_columns.cu", "    sync_block();\n", ""),
)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=[f"{file}: {name}" for name, file, *_ in FAULTS])
def test_a_planted_fault_shows(sound, tmp_path, fault):
    operation = fault[1].removesuffix(".cu")
    done = run_with(build_with_fault(tmp_path / "planted", sound, *fault[1:]), script(operation))
    # 1 where the script finds it, or lanes of a warp part over what they read; some lead to
    # addresses that the system refuses.
    assert done.returncode != 0, done.stderr
    assert done.returncode < 0 or operation in done.stdout + done.stderr


SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

sanitized = pytest.mark.skipif(
    len(sanitizers()) < 2, reason="g++ has no libasan or no libubsan here"
)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder of a module under sanitizers."""
    folder = tmp_path_factory.mktemp("watched")
    build(folder, SANITIZE)
    return folder


@pytest.mark.slow
@sanitized
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sanitizers_find_nothing(watched, operation):
    # A module compiled so is slow, and what it finds does not depend on the order of the threads.
    module = next(watched.glob("_cuda_host*"))
    done = run_with(module, script(operation, orders=1), sanitized=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


BEYOND = (
    ("write_delta.cu", "if (e >= delta.nnz) continue;", "if (e > delta.nnz) continue;"),
    ("topk_salience.cu", "tie++ >= ties)", "tie++ > ties)"),
)


@pytest.mark.slow
@sanitized
@pytest.mark.parametrize("beyond", BEYOND, ids=[beyond[0] for beyond in BEYOND])
def test_sanitizers_find_what_is_planted(watched, tmp_path, beyond):
    planted = build_with_fault(tmp_path / "planted", watched, *beyond, SANITIZE)
    operation = beyond[0].removesuffix(".cu")
    done = run_with(planted, script(operation, orders=1), sanitized=True)
    assert "heap-buffer-overflow" in done.stderr
    assert beyond[0].removesuffix(".cu") in done.stderr  # the kernel's file
