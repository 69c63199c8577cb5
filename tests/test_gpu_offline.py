"""`make gpu-offline`: what it reads out of machine code, what it refuses, and that it compiles what
Triton's JIT would compile.

The kernels of this suite are interpreted; these are compiled, so they run in a process of their
own, once for all tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

KERNELS = '''
import triton
import triton.language as tl


@triton.jit
def copy(from_ptr, to_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + i, tl.load(from_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def product(
    a_ptr, b_ptr, out_ptr,
    BATCH: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr, HOW: tl.constexpr,
):
    """`out[z] = a[z] @ b[z]`, `[SIDE, INNER] @ [INNER, SIDE]`."""
    i, j = tl.arange(0, SIDE), tl.arange(0, INNER)
    a, b, out = i[:, None] * INNER + j, j[:, None] * SIDE + i, i[:, None] * SIDE + i
    if BATCH > 1:
        z = tl.arange(0, BATCH)[:, None, None] * SIDE
        a, b, out = z * INNER + a[None], z * INNER + b[None], z * SIDE + out[None]
    tl.store(out_ptr + out, tl.dot(tl.load(a_ptr + a), tl.load(b_ptr + b), input_precision=HOW))


@triton.jit
def everything(
    ptr, odd_ptr, none, one, sixteen, seventeen, large, aligned_large, negative, yes, real,
    flag: tl.constexpr, BLOCK: tl.constexpr,
):
    tl.store(ptr, 0.0)
'''

WORKER = '''
import dataclasses
import json

import gpu_offline
import kernels
import torch
import triton
from gpu_calls import CALLS, Call
from gpu_variant import Report, compile_variant, disassemble, dots, specialise
from speft_kernels.triton_kernels.launch import Launch, launch
from triton.backends.compiler import GPUTarget


def copy():
    x = torch.empty(1 << 20, dtype=torch.bfloat16)
    launch(kernels.copy, (1024,), Launch(), from_ptr=x, to_ptr=x, n=x.numel(), BLOCK=1024)


def product(dtype, side, inner, how, warps=4, batch=1):
    a = torch.empty(batch, side, inner, dtype=dtype)
    out = torch.empty(batch, side, side)
    constants = {"BATCH": batch, "SIDE": side, "INNER": inner, "HOW": how}
    launch(kernels.product, (1, 65536), Launch(warps), a_ptr=a, b_ptr=a, out_ptr=out, **constants)


half, single = torch.float16, torch.float32
CASES = {
    "copy": copy,
    "half": lambda: product(half, 64, 64, "ieee"),
    "tf32": lambda: product(single, 64, 32, "tf32"),
    "full": lambda: product(single, 64, 16, "ieee"),
    "batched": lambda: product(half, 64, 16, "ieee", batch=2),
    "spilling": lambda: product(half, 128, 16, "ieee", warps=1),
    "shared": lambda: product(half, 64, 1024, "ieee", warps=16),
    "refused": lambda: product(half, 64, 2, "ieee"),
}
CALLS.clear()
CALLS["kernels"] = lambda: (Call(name, run) for name, run in CASES.items())
variants, problems = gpu_offline.collect(CALLS, [80, 90, 100])
wanted = [v for v in variants if v.arch == 90 or v.calls[0] in ("kernels copy", "kernels half")]
told = {"grids": problems, "table": [], "reports": {}}
reports = [compile_variant(variant) for variant in wanted]
for report in reports:
    name = report.variant.calls[0].removeprefix("kernels ")
    told["reports"][f"{name} {report.variant.arch}"] = gpu_offline.record(report)
told["table"] = list(gpu_offline.table(reports))
of_half = next(report for report in reports if report.matrix)
told["doctored"] = [
    dataclasses.replace(of_half, **change).problems()
    for change in ({"matrix": {}}, {"tensor_memory": 513}, {"stack": 8}, {"tensor_memory": 512})
]


def everything(**changes):
    x = torch.empty(64)
    arguments = dict(
        ptr=x, odd_ptr=x[1:], none=None, one=1, sixteen=16, seventeen=17, large=2**31 + 1,
        aligned_large=2**40, negative=-32, yes=True, real=0.5, flag=torch.float32, BLOCK=16,
    )
    return {**arguments, **changes}


class Driver:
    """A GPU for the JIT to compile for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def jits(kernel, settings, arguments):
    asked = []

    def take(key, signature, device, constexprs, options, attrs, warmup):
        asked.append([signature, constexprs, attrs])

    kernel._do_compile = take
    kernel[(1,)](**arguments, num_warps=settings.num_warps, num_stages=settings.num_stages)
    return asked[0]


triton.runtime.driver.set_active(Driver())
told["specialised"] = []
for arguments in (
    everything(),
    everything(one=0, sixteen=-1, yes=False, large=2**63, flag=None),
    everything(
        ptr=torch.empty(4, dtype=torch.int64), odd_ptr=torch.empty(9, dtype=torch.int16)[4:]
    ),
):
    settings = Launch(8, 3)
    recorded = gpu_offline.record_launches(
        lambda: launch(kernels.everything, (1,), settings, **arguments), 90
    )
    ours = specialise(recorded[0], 90)
    theirs = jits(kernels.everything, settings, arguments)
    assert (ours.num_warps, ours.num_stages) == (8, 3)
    told["specialised"].append(
        [repr([ours.signature, ours.constexprs, ours.attrs]), repr(theirs)]
    )
json.dump(told, open("told.json", "w"))
'''


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    paths = [str(SCRIPTS), str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.py").write_text(KERNELS)
    done = run(folder, WORKER)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "told.json").read_text())


def problems(told, case):
    return told["reports"][case]["problems"]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_instructions_are_read_out_of_machine_code(told, arch):
    copied = told["reports"][f"copy {arch}"]
    # 1024 elements of 2 bytes for 128 threads: one instruction of 16 bytes.
    assert copied["loads"] == {"LDG": {"128": 1}}
    assert copied["stores"] == {"STG": {"128": 1}}
    assert copied["matrix"] == {}
    assert copied["dots"] == []
    assert 0 < copied["registers"] < 64
    assert copied["stack"] == copied["spills"] == copied["shared"] == 0
    product = told["reports"][f"half {arch}"]
    instruction = {80: "HMMA.16816", 90: "HGMMA.64x64x16", 100: "UTCHMMA"}[arch]
    assert all(name.startswith(instruction) for name in product["matrix"])
    assert product["dots"] == [{"shape": [64, 64], "dtype": "f16", "precision": "ieee"}]
    assert product["shared"] >= 2 * 64 * 64 * 2
    assert problems(told, f"copy {arch}") == problems(told, f"half {arch}") == []


def test_tensor_cores_are_asked_for_where_operands_allow_them(told):
    assert all("HGMMA" in name for name in told["reports"]["tf32 90"]["matrix"])
    assert told["reports"]["full 90"]["matrix"] == {}
    assert problems(told, "tf32 90") == problems(told, "full 90") == []


def test_a_product_past_the_tensor_cores_is_refused(told):
    """Triton multiplies batches with the instruction of the older GPUs."""
    (problem,) = problems(told, "batched 90")
    assert problem == "multiplies 2x64x16 f16 (ieee) without HGMMA"


def test_spills_are_refused(told):
    """A product of 128 x 128 in one warp: 512 sums a thread, which has 255 registers."""
    (problem,) = [p for p in problems(told, "spilling 90") if p.startswith("spills")]
    report = told["reports"]["spilling 90"]
    assert report["spills"] > 0
    assert f"{report['stack']} bytes of stack" in problem


def test_too_much_shared_memory_is_refused(told):
    """Two operands of 64 x 1024 in 16 bits are 256 KiB, of 227."""
    assert "takes 262144 bytes of shared memory, the GPU has 232448" in problems(told, "shared 90")


def test_what_no_kernel_here_does_is_refused(told):
    """Reports of a product of 64 x 64, changed."""
    plain, memory, stack, fits = told["doctored"]
    assert plain == ["multiplies 64x64 f16 (ieee) without tensor cores"]
    assert memory == ["takes 513 columns of tensor memory, the GPU has 512"]
    assert stack == ["spills: 8 bytes of stack, 0 accesses to local memory"]
    assert fits == []


def test_what_does_not_compile_is_refused(told):
    (problem,) = problems(told, "refused 90")
    assert problem.startswith("does not compile: ")


def test_grids_beyond_the_limits_are_refused(told):
    """All products are launched over 65536 blocks along the second axis."""
    assert "(1, 65536) is too large" in told["grids"][0]
    assert not any("copy" in problem for problem in told["grids"])


def test_the_table_shows_each_variant(told):
    assert len(told["table"]) == 2 + len(told["reports"])
    (row,) = [row for row in told["table"] if "copy" in row and "| 80 |" in row]
    assert "LDG 128b x1 | STG 128b x1" in row


def test_arguments_are_specialised_as_the_jit_does(told):
    for ours, theirs in told["specialised"]:
        assert ours == theirs
    first, second, _ = (ours for ours, _ in told["specialised"])
    for fact in ("'one': 'constexpr'", "'large': 'i64'", "tt.divisibility", "'yes': 'u1'"):
        assert fact in first
    assert "'one': 'i32'" in second


def test_problems_fail_the_command_and_missing_calls_are_named(tmp_path):
    script = """
        import sys, gpu_calls, gpu_offline
        from gpu_variant import Report
        print(gpu_offline.unreached(list(gpu_calls.CALLS), []))
        gpu_offline.compile_all = lambda variants, jobs: [Report(v, stack=8) for v in variants]
        del gpu_calls.CALLS["write_delta"]
        sys.argv = ["gpu_offline", "--only", "keep_columns", "--archs", "80"]
        sys.exit(gpu_offline.main())
    """
    done = run(tmp_path, textwrap.dedent(script))
    assert done.returncode == 1
    for missing in (
        "keep_columns: no call in gpu_calls.py launches _pack",
        "_topk_select: no call",
    ):
        assert missing in done.stdout
    assert "spills: 8 bytes of stack" in done.stderr
    assert "write_delta: gpu_calls.py has no calls of it" in done.stderr


def test_settings_that_no_call_reaches_are_named(tmp_path):
    """Those of calls that set aside many entries, taken out."""
    script = """
        import gpu_offline, gpu_settings
        from gpu_calls import CALLS
        chosen = set()
        gpu_offline.collect(CALLS, [80, 90, 100], chosen=chosen)
        print(len(gpu_settings.missing(chosen)))
        fewer = {one for one in chosen if getattr(one[1], "block", 0) != 1024 or one[0] != 90}
        print(*gpu_settings.missing(fewer), sep="\\n")
    """
    done = run(tmp_path, textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    none, *named = done.stdout.splitlines()
    assert none == "0"
    assert {line.split("(")[0].rsplit(" ", 1)[1] for line in named} == {
        "RunLaunch",
        "WriteLaunch",
        "RowLaunch",
    }
    assert all("on sm_90 with" in line and "block=1024" in line for line in named)


def test_the_report_has_the_most_that_any_variant_takes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from offline_report import Compiled, write_report

    rows = [
        Compiled("multiply", "90a", 128, 0, None, frozenset({"HMMA"}), 64),
        Compiled("multiply", "90a", 96, 8, None, frozenset({"LDSM"}), 128),
        Compiled("multiply", "80", 255, 0, 4096, frozenset(), 0),
    ]
    write_report(tmp_path / "report.md", "Title", "a compiler", rows)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title\n\n3 variants of commit ")
    assert text.splitlines()[-2:] == [
        "| `multiply` | 80 | 1 | 255 | 0 | 4,096 |  |  |",
        "| `multiply` | 90a | 2 | 128 | 8 |  | HMMA LDSM | 128 |",
    ]
