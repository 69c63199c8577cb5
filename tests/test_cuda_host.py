"""The CUDA kernels' sources on a CPU: in every order of their threads, and under sanitizers.

That they compute what they should is tested with the other backends (test_block_grad.py and so
on, backend "cuda-host"). Here: that the order of the threads changes nothing, and that a fault that
a GPU would only show at times does show.
"""

import pytest
import torch
from cuda_host import build, build_with_fault, run_with, sanitizers

from speft_kernels import SparsePattern, _cuda_native, ops

pytestmark = pytest.mark.skipif(
    _cuda_native.missing("cuda-host") is not None, reason="cuda-host is not built"
)

# What a process with a module of its own runs: operations on tensors that end where they end, each
# in several orders of the threads, against torch.
SCRIPT = """
import torch
from speft_kernels import SparsePattern, ops
import speft_kernels._cuda_host as module

def check(seed):
    module.set_seed(seed)
    torch.manual_seed(0)
    wrong = []
    for block, shape in (((16, 16), (48, 64)), ((1, 64), (5, 128)), ((40, 24), (80, 48))):
        count = (shape[0] // block[0]) * (shape[1] // block[1])
        pattern = SparsePattern.from_blocks(shape, block, torch.arange(0, count, 2))
        for tokens in (67, 300, 1100):
            dy = torch.randn(tokens, shape[0]).bfloat16()
            x = torch.randn(tokens, shape[1]).bfloat16()
            ours = ops.block_grad(dy, x, pattern, backend="cuda-host")
            theirs = ops.block_grad(dy, x, pattern, backend="reference")
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3):
                wrong.append(("block_grad", block, tokens))
    # Patterns of one tile and of several, by strips and by lines; rows of whole vectors or not.
    for (n, k), density in (((40, 33), 0.3), ((301, 40), 0.9), ((264, 500), 0.016)):
        pattern = SparsePattern.from_mask(torch.rand(n, k) < density)
        for tokens in (67, 600) if n == 40 else (67,):
            dy, x = torch.randn(tokens, n).half(), torch.randn(tokens, k).half()
            ours = ops.sampled_grad(dy, x, pattern, backend="cuda-host")
            theirs = ops.sampled_grad(dy, x, pattern, backend="reference")
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3):
                wrong.append(("sampled_grad", n, tokens))
    x = torch.randn(77, 150).bfloat16()
    columns = torch.arange(0, 150, 2, dtype=torch.int32)
    kept = torch.ops.speft.keep_columns(x, columns, 80, "cuda-host")
    if not torch.equal(kept[0, :, :77], x[:, ::2].T) or kept[0, :, 77:].any():
        wrong.append(("keep_columns",))
    for dtype in (torch.float32, torch.bfloat16):
        mask = torch.rand(70, 90) < 0.3
        pattern = SparsePattern.from_mask(mask)
        weight = torch.randn(70, 90).to(dtype)
        base = weight[mask].clone()
        values = torch.randn(pattern.nnz)
        ops.write_delta(weight, pattern, base, values, backend="cuda-host")
        if not torch.equal(weight[mask], (base.float() + values).to(dtype)):
            wrong.append(("write_delta", dtype))
    return wrong

found = [check(seed) for seed in range(4)]
print("wrong:", found)
raise SystemExit(any(found))
"""


def test_the_order_of_the_threads_changes_no_bit():
    module = _cuda_native.kernels("cuda-host")
    blocks = SparsePattern.from_blocks((64, 96), (32, 32), torch.tensor([0, 3, 4]))
    entries = SparsePattern.from_mask(torch.rand(64, 96) < 0.05)
    dy, x = torch.randn(700, 64).bfloat16(), torch.randn(700, 96).bfloat16()
    for operation, pattern in ((ops.block_grad, blocks), (ops.sampled_grad, entries)):
        results = []
        try:
            for seed in range(5):
                module.set_seed(seed)
                results.append(operation(dy, x, pattern, backend="cuda-host"))
        finally:
            module.set_seed(0)
        assert all(torch.equal(result, results[0]) for result in results)


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
    assert run_with(build(folder), SCRIPT).returncode == 0
    return folder


# (name, file, what stands there, what shall stand there)
FAULTS = (
    # The barrier after which a stage is whole and another one free.
    ("barrier", "block_grad.cu", "        sync_block();  // everyone's", "        // everyone's"),
    # The barrier between the warps that add their sums one after the other.
    ("turns", "block_grad.cu", "        sync_block();  // the stages", "        // the stages"),
    # One group of copies too few is waited for.
    ("wait", "block_grad.cu", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    # A token beyond the end of a part is added, and counts twice.
    ("off by one", "block_grad.cu", "if (from.vectors) {\n", "++end;\n    if (from.vectors) {\n"),
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
    done = run_with(build_with_fault(tmp_path / "planted", sound, *fault[1:]), SCRIPT)
    assert done.returncode == 1, done.stderr
    # As a wrong result, or because lanes of a warp part over what they read.
    assert fault[1].removesuffix(".cu") in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(len(sanitizers()) < 2, reason="g++ has no libasan or no libubsan here")
def test_sanitizers_find_nothing_but_what_is_planted(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    done = run_with(build(tmp_path / "sound", flags), SCRIPT, sanitized=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    beyond = ("write_delta.cu", "if (e >= delta.nnz) continue;", "if (e > delta.nnz) continue;")
    planted = build_with_fault(tmp_path / "planted", tmp_path / "sound", *beyond, flags)
    done = run_with(planted, SCRIPT, sanitized=True)
    assert "heap-buffer-overflow" in done.stderr
    assert "write_delta" in done.stderr  # the kernel, by its name
