"""The CUDA kernels' sources on a CPU, in every order of their threads.

That they compute what they should is tested with the other backends (test_block_grad.py and so
on, backend "cuda-host"). Here: that the order of the threads changes nothing, and that a fault that
a GPU would only show at times does show.
"""

import contextlib
import os
import signal

import pytest
import torch
from cuda_host import Processes, build, instead, readers, script

from speft_kernels import SparsePattern, _cuda_native, ops

# `make test` builds it: then one that cannot be loaded is a fault, and no reason to skip anything.
MISSING = _cuda_native.missing("cuda-host")
if MISSING is not None and os.environ.get("SPEFT_BUILD_CUDA_HOST") == "1":
    pytest.fail(MISSING, pytrace=False)
pytestmark = pytest.mark.skipif(MISSING is not None, reason="cuda-host is not built")


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
        module.block_grad(0, 4, 0, 4, 8, 0, 0, 1, 4, 4, 0, False, 0, 1, 0, 0)


def test_the_splits_of_the_tokens_fill_waves_and_stay_within_the_scratch(monkeypatch):
    monkeypatch.setattr(_cuda_native, "multiprocessors", lambda device: 132)

    def splits(blocks, tokens=8192, stretch=32, entries=1, resident=1):
        return _cuda_native.splits(blocks, tokens, stretch, entries, torch.device("cpu"), resident)

    assert splits(66) == 2  # one wave, filled
    assert splits(67) > 2  # a second wave for two blocks alone would be waste
    assert splits(132) == splits(10_000) == 1  # cutting gains nothing
    assert splits(1) == splits(0) == 8192 // (8 * 32)  # eight stretches at least
    assert splits(1, tokens=255) == splits(1, tokens=0) == 1
    assert splits(66, resident=4) == 8
    for entries in (1 << 20, (1 << 20) + 1, 1 << 24):
        found = splits(1, entries=entries)
        assert found == (2 if entries == 1 << 20 else 1)
    for blocks in range(5, 300):
        found = splits(blocks)
        waves = -(-blocks * found // 132)
        assert blocks * found / (132 * waves) > 0.8


def test_the_sums_of_the_splits_of_large_blocks_stay_within_the_scratch(monkeypatch):
    """A block of many tiles keeps the device busy by itself, and its sums are large."""
    calls = []
    monkeypatch.setattr(_cuda_native, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_cuda_native, "launch", lambda *call: calls.append(call))
    for side, wanted in ((16, 16), (512, 4), (1024, 1), (4096, 1)):
        pattern = SparsePattern.from_blocks((side, side), (side, side), torch.tensor([0]))
        dy = x = torch.empty(1, 1, dtype=torch.bfloat16).expand(8192, side)
        ops.block_grad(dy, x, pattern, backend="cuda-host")
        *_, scratch, splits, _ = calls[-1]
        assert splits == wanted
        assert (scratch != 0) == (splits > 1)


def test_of_few_tokens_no_other_launch_sorts_the_values(monkeypatch):
    calls = []
    monkeypatch.setattr(_cuda_native, "launch", lambda *call: calls.append(call))
    pattern = SparsePattern.from_mask(torch.rand(64, 96) < 0.05)
    values, weight = torch.randn(pattern.nnz), torch.randn(64, 96).bfloat16()
    for tokens in (32, 33):
        x = torch.randn(tokens, 96).bfloat16()
        ops.sparse_delta_matmul(x, weight, values, pattern, backend="cuda-host")
    for call, few in zip(calls, (True, False), strict=True):
        *_, order, found, _, _, _, _, _ = call
        assert (order != 0) == (found == values.data_ptr()) == few


# (name, file, within, what stands there, what shall stand there)
FAULTS = (
    # Barriers (test_cuda_sanitizers.py removes each there is): where a tile's entries are in it,
    # where a stage is whole and another one free, and where a run's place is known.
    ("patched", "multiply_many.h", "sync_block();  // the next", "sync_block()", "void(0)"),
    ("barrier", "block_grad.cu", "sync_block();  // everyone's", "sync_block()", "void(0)"),
    ("run", "topk_kernels.h", "sync_block();  // the run has", "sync_block()", "void(0)"),
    # Of the grid: one that half of the blocks never reach, and one of blocks that need not run
    # together.
    (
        "half",
        "topk_kernels.h",
        "sync_grid();  // what reaches",
        "sync_grid()",
        "blockIdx.x == 0 ? sync_grid() : void(0)",
    ),
    ("alone", "topk_kept.h", "sync_block();  // each tile", "sync_block()", "sync_grid()"),
    # One group of copies too few is waited for.
    ("wait", "block_grad.cu", *("cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()")),
    ("late", "multiply_many.h", *("cp_async_wait<kStages - 3>()", "cp_async_wait<kStages - 2>()")),
    ("wait", "sampled_grad.cu", *("cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()")),
    # Rows that start between two multiples of 16 bytes, which only a GPU refuses.
    ("misaligned", "sampled_grad.cu", "* kPitch + column;", "kPitch", "kPitch - 4"),
    # A key equal to the k-th too few; more set aside than there is room for.
    ("tie", "topk_kept.h", "tie++ >= ties", "tie++ >= ties - 1"),
    ("room", "topk_work.h", "found <= uint64_t(segment.capacity)", "true"),
    # A token beyond the end of a part is added, and counts twice.
    ("off by one", "tokens.h", "? begin + size :", "begin + size", "begin + size + 1"),
    # The last of 64 entries is added twice.
    ("twice", "multiply_many.h", "next.begin + kAdding; at", "kAdding", "kAdding - 1"),
    # Values in the order of the entries, where the tiles have another.
    ("order", "multiply_few.h", "places[at], product.order[at]", "product.order[at]", "at"),
    # A warp whose tokens are real, if few, multiplies nothing.
    ("idle", "multiply_many.h", "warp_token < tokens ?", "warp_token", "warp_token + 2"),
    # The tokens of dy in another order than those of x.
    (
        "order",
        "sampled_grad.cu",
        "place_of_token(token) * kPitch",
        "place_of_token(token)",
        "token",
    ),
    # The next stretch goes where one is that is still to be read.
    ("stage", "sampled_grad.cu", "        free = stage;", "stage", "kStageBytes"),
    # The last group of a warp is left out, the first one reads its strips' neighbours, and groups
    # of other rows are multiplied by those before.
    ("group", "sampled_grad.cu", "if (j + 1 >= own) break;", "j + 1", "j + 2"),
    ("off by one", "sampled_grad.cu", "+ lane_id() / 4]", "lane_id()", "lane_id() + 4"),
    ("rows", "sampled_grad.cu", "if (!there || of != before)", "of != before", "false"),
    # What test_cuda_counts.py finds nowhere: rows that are not swizzled.
    ("plain", "bring.h", "^ (row / kOfBanks % kTurns)", "row / kOfBanks % kTurns", "0"),
)
PLAIN = FAULTS[-1]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Runs a script with one of the faults, or none."""
    folder = tmp_path_factory.mktemp("planted")
    processes = Processes(folder)
    try:
        assert processes.start() is None
        module = build(folder, faults=[instead(*fault[1:]) for fault in FAULTS])

        def run(script, fault=None):
            number = 0 if fault is None else 1 + FAULTS.index(fault)
            return processes.run(module, script, number)

        done = run(script())
        assert done.returncode == 0, done.stdout + done.stderr
        yield run
    finally:
        processes.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", FAULTS[:-1], ids=[f"{file}: {name}" for name, file, *_ in FAULTS[:-1]]
)
def test_a_planted_fault_shows(planted, fault):
    operations = readers(fault[1])
    for operation in operations:
        done = planted(script(operation), fault)
        # 1 where the script finds it, or lanes of a warp part over what they read; some lead to
        # addresses that the system refuses.
        assert done.returncode != 0, operation
        named = f"('{operation}'" in done.stderr or f"{operation} (" in done.stderr
        # Not one that is ended because it hangs.
        killed = done.returncode < 0 and done.returncode != -signal.SIGALRM
        assert killed or named, done.stderr
    assert operations


@pytest.mark.slow
def test_rows_that_are_not_swizzled_are_counted_as_meeting_in_the_banks(planted):
    counts = "found = module.take_counts()\nprint(found['matrix_cycles'] / found['matrix_reads'])"
    done = planted(f"{script('block_grad', orders=1)}{counts}", PLAIN)
    # Rows of 32, 64 or 128 bytes: two, four or eight of eight meet.
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 8


@pytest.mark.parametrize("backend", ["cuda-host", "triton"])
def test_kernels_are_called_where_the_tensors_are(monkeypatch, backend):
    # On a machine with several GPUs a launch goes to the current one, whatever its pointers are of.
    pytest.importorskip("triton")
    within, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        within.append(tensor.data_ptr())
        yield
        within.pop()

    class Spy:
        def __getattr__(self, name):
            seen.append(tuple(within))
            return lambda *_, **__: None

        def __getitem__(self, grid):
            return self.launched

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    here = torch.zeros(4)
    if backend == "triton":
        from speft_kernels.triton_kernels import launch

        launch.launch(Spy(), (1,), launch.Launch(), count=4, pointer=here)
    else:
        monkeypatch.setattr(_cuda_native, "kernels", lambda backend: Spy())
        _cuda_native.launch(backend, "write_delta", here, 1, 2)
    assert seen == [(here.data_ptr(),)]
    assert not within
