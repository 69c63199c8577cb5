"""The build: what is compiled, how, and what the compiled module drags into a process."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """The functions of setup.py, without running setup."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="speft_setup")


@pytest.fixture
def python_in(tmp_path: Path) -> Callable[[str], str]:
    """Runs a script in a fresh interpreter outside the repository; returns what it prints."""

    def run(script: str) -> str:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_triton_kernels_lives_inside_the_package(python_in: Callable[[str], str]) -> None:
    script = (
        "import importlib.util, speft_kernels.triton_kernels as inside\n"
        "top = importlib.util.find_spec('triton_kernels')  # Triton's own, where it is installed\n"
        "print(inside.__name__, top is not None and top.origin == inside.__file__)"
    )
    assert python_in(script) == "speft_kernels.triton_kernels False"


def load_compiled_module() -> str:
    """A script that loads `_C` by its path, and so without the package, which imports torch."""
    from speft_kernels import _C

    return (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )


@linux_only
def test_compiled_module_needs_no_torch(python_in: Callable[[str], str]) -> None:
    script = load_compiled_module() + (
        "import sys\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('torch' in sys.modules, 'libtorch' in maps, 'libc10' in maps)"
    )
    assert python_in(script) == "False False False"


@linux_only
@pytest.mark.parametrize("torch_first", [True, False])
def test_one_openmp_runtime_serves_torch_and_the_kernels(
    python_in: Callable[[str], str], torch_first: bool
) -> None:
    loads = ["import torch\n", load_compiled_module()]
    script = "".join(loads if torch_first else reversed(loads)) + (
        "import re\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(len(set(re.findall(r'\\S*/lib(?:gomp|omp|iomp5)\\b\\S*', maps))))"
    )
    assert python_in(script) == "1"


def test_kernels_include_no_torch_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md"]
    assert sources
    header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    assert [path.name for path in sources if header.search(path.read_text())] == []


def test_flags_fit_any_machine_and_keep_ieee(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    text = build["ninja_file"]({"_C.so": [ROOT / "csrc/module.cpp"]}, build["include_flags"]())
    assert "-std=c++17 -O3" in text
    assert not re.search(r"-march=|-mcpu=|-mtune=|-ffast-math|-Ofast|torch", text)


def test_only_what_changed_is_rebuilt(build: dict[str, Any], tmp_path: Path) -> None:
    sources = tmp_path / "with space $HOME: and more"
    sources.mkdir()
    (sources / "value.h").write_text("#define VALUE 1\n")
    (sources / "reader.cpp").write_text('#include "value.h"\nint value() { return VALUE; }\n')
    (sources / "other.cpp").write_text("int other() { return 0; }\n")
    text = build["ninja_file"]({"lib.so": [sources / "reader.cpp", sources / "other.cpp"]}, [])
    objects = tmp_path / "objects"

    def built() -> dict[str, int]:
        build["run_ninja"](text, objects)
        outputs = [*objects.rglob("*.o"), objects / "lib.so"]
        return {path.name: path.stat().st_mtime_ns for path in outputs}

    first = built()
    assert set(first) == {"reader.cpp.o", "other.cpp.o", "lib.so"}
    assert built() == first
    later = (sources / "value.h").stat().st_mtime_ns + 10**9
    (sources / "value.h").write_text("#define VALUE 2\n")
    os.utime(sources / "value.h", ns=(later, later))
    second = built()
    assert {name for name in first if second[name] != first[name]} == {"reader.cpp.o", "lib.so"}


def test_compile_error_shows_the_compilers_message(
    build: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.cpp").write_text("int f() { return undeclared_name; }\n")
    text = build["ninja_file"]({"lib.so": [tmp_path / "broken.cpp"]}, [])
    with pytest.raises(build["CompileError"], match="did not compile.*above$"):
        build["run_ninja"](text, tmp_path / "objects")
    assert "undeclared_name" in capfd.readouterr().out
    (tmp_path / "broken.cu").write_text("int f() { return undeclared_name; }\n")
    text = build["ninja_file"]({"lib.so": [tmp_path / "broken.cu"]}, [])
    with pytest.raises(build["CompileError"], match="SPEFT_BUILD_CUDA=0 leaves the CUDA kernels"):
        build["run_ninja"](text, tmp_path / "cuda")


def test_missing_compiler_names_the_remedy(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build["PlatformError"], match=r"no C\+\+17 compiler.*apt install g\+\+"):
        build["find_cxx"]()


def test_forced_cuda_build_without_nvcc_names_the_remedy(
    build: dict[str, Any], monkeypatch
) -> None:
    monkeypatch.setenv("SPEFT_BUILD_CUDA", "1")
    monkeypatch.setitem(build["find_extensions"].__globals__, "find_nvcc", lambda: None)
    with pytest.raises(build["PlatformError"], match="nvcc.*CUDA_HOME"):
        build["find_extensions"]()


def test_a_home_without_nvcc_does_not_hide_the_one_on_path(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = [tmp_path / "bin", tmp_path / "home" / "bin"]
    for folder in homes:
        folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(homes[0]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for folder in homes:
        (folder / "nvcc").touch(mode=0o755)
        assert build["find_nvcc"]() == str(folder / "nvcc")


def test_cuda_targets(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEFT_CUDA_ARCHS", "80;90+PTX")
    assert build["cuda_arch_flags"]("nvcc") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90,code=sm_90"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_default_cuda_targets_are_ones_that_nvcc_knows(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPEFT_CUDA_ARCHS", raising=False)
    nvcc = shutil.which("nvcc")
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, *build["cuda_arch_flags"](nvcc)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_host_module_gets_the_cuda_files_from_the_cpp_compiler(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEFT_BUILD_CUDA", "0")
    monkeypatch.setenv("SPEFT_BUILD_CUDA_HOST", "1")
    names = [extension.name for extension in build["find_extensions"]()]
    assert names == ["speft_kernels._C", "speft_kernels._cuda_host"]
    files = {
        "_cuda_host.so": [ROOT / "csrc/cuda/block_grad.cu"],
        "_C.so": [ROOT / "csrc/module.cpp"],
    }
    text = build["ninja_file"](files, [])
    assert re.search(r"build _cuda_host/cuda/block_grad.cu.o: host ", text)
    assert re.search(r"build _C/csrc/module.cpp.o: cpp ", text)
    assert "nvcc" not in text


def test_the_gpus_that_are_present_are_the_targets(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(*arguments: Any, **settings: Any) -> Any:
        return subprocess.CompletedProcess(arguments, 0, "9.0\n8.0\n9.0\n", "")

    module = build["present_archs"].__globals__["subprocess"]
    monkeypatch.setattr(module, "run", listing)
    monkeypatch.delenv("SPEFT_CUDA_ARCHS", raising=False)
    assert build["present_archs"]() == ["80", "90a"]
    assert build["cuda_arch_flags"]("nvcc") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
    ]
    monkeypatch.setenv("SPEFT_CUDA_ARCHS", "100a")  # what is asked for comes first
    assert build["cuda_arch_flags"]("nvcc") == ["-gencode", "arch=compute_100a,code=sm_100a"]
