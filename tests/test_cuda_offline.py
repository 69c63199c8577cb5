"""Judging CUDA kernels by their machine code: what is wrong with one is found and named."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton")

SPILLS = """
__global__ void fine(float* out) { out[threadIdx.x] = 1; }
__global__ void spills(float* out, const int* at) {
    float local[32] = {};
    for (int i = 0; i < 100; ++i) local[at[i]] += out[i];
    out[0] = local[at[0]];
}
"""


@pytest.fixture(scope="module")
def offline():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return runpy.run_path(str(ROOT / "scripts" / "cuda_offline.py"), run_name="cuda_offline")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def nvcc():
    found = runpy.run_path(str(ROOT / "setup.py"), run_name="speft_setup")["find_nvcc"]()
    if found is None:
        pytest.skip("there is no nvcc")
    return found


def test_local_memory_is_found_and_only_where_it_is(offline, nvcc, tmp_path):
    (tmp_path / "kernels.cu").write_text(SPILLS)
    kernels = offline["compiled"](nvcc, tmp_path / "kernels.cu", "80", tmp_path)
    problems = {kernel.name: list(kernel.problems()) for kernel in kernels}
    assert problems["fine"] == []
    assert "uses local memory" in problems["spills"][0]


def test_warnings_are_errors_and_missing_instructions_are_named(offline, nvcc, tmp_path):
    (tmp_path / "warns.cu").write_text("__global__ void f() { int unused = 1; }")
    result = offline["compiled"](nvcc, tmp_path / "warns.cu", "80", tmp_path)
    assert "warns.cu for sm_80 does not compile" in result
    (tmp_path / "plain.cu").write_text(
        "namespace speft { namespace cuda { namespace { template <class T>"
        "__global__ void multiply(T* out) { *out = 1; } }"
        "void run() { multiply<float><<<1, 1>>>(nullptr); } } }"
    )
    (kernel,) = offline["compiled"](nvcc, tmp_path / "plain.cu", "90a", tmp_path)
    assert kernel.name == "multiply<float>"
    assert [p for p in kernel.problems() if "LDGSTS" in p]
    assert [p for p in kernel.problems() if "HMMA" in p]


def test_without_nvcc_it_says_so_and_fails_only_where_it_must_not(offline, monkeypatch, capsys):
    setup = {"find_nvcc": lambda: None}
    monkeypatch.setattr(runpy, "run_path", lambda *a, **k: setup)
    monkeypatch.setattr(sys, "argv", ["cuda_offline.py"])
    monkeypatch.delenv("SPEFT_REQUIRE_NVCC", raising=False)
    assert offline["main"]() == 0
    assert "no CUDA kernel is compiled" in capsys.readouterr().out
    monkeypatch.setenv("SPEFT_REQUIRE_NVCC", "1")
    assert offline["main"]() == 1
