"""Building variants of the CUDA kernels for the CPU: with a fault planted, or under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-Wno-psabi", "-DSPEFT_ON_HOST"]
FLAGS += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


def build(folder: Path, flags: tuple[str, ...] = ("-O1",)) -> Path:
    """A `_cuda_host` module in `folder`, with its objects beside it."""
    shutil.copytree(CSRC, folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    sources = [folder / "csrc" / "cuda_module.cpp", *cuda.glob("*.cu"), *cuda.glob("host/*.cpp")]
    running = [_compile(source, folder, flags) for source in sources]
    assert all(process.wait() == 0 for process in running)
    return _link(folder, sorted(folder.glob("*.o")), flags)


def build_with_fault(
    folder: Path, sound: Path, file: str, old: str, new: str, flags: tuple[str, ...] = ("-O1",)
) -> Path:
    """The module of the folder `sound` with one file of csrc/cuda changed, in `folder`.

    Args:
        old, new: what stands in the file once, and what shall stand there.
    """
    shutil.copytree(sound / "csrc", folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    text = (cuda / file).read_text()
    assert text.count(old) == 1, old
    (cuda / file).write_text(text.replace(old, new))
    anew = readers(file)
    running = [_compile(cuda / f"{name}.cu", folder, flags) for name in anew]
    assert all(process.wait() == 0 for process in running)
    others = [path for path in sound.glob("*.o") if path.stem not in anew]
    return _link(folder, [*(folder / f"{name}.o" for name in anew), *others], flags)


def readers(file: str) -> list[str]:
    """The operations whose file in csrc/cuda is this one or includes it, or what includes it."""
    if file.endswith(".cu"):
        return [file.removesuffix(".cu")]
    files = [f for f in (CSRC / "cuda").iterdir() if f.is_file()]
    including = [f.name for f in files if f'#include "{file}"' in f.read_text()]
    return sorted({operation for name in including for operation in readers(name)})


def sanitizers() -> list[Path]:
    """The compiler's sanitizer libraries, those that are installed."""
    if shutil.which("g++") is None:
        return []
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return [Path(path) for path in found if Path(path).is_file()]


def _compile(source: Path, folder: Path, flags: tuple[str, ...]) -> subprocess.Popen:
    to = folder / f"{source.stem}.o"
    return subprocess.Popen(["g++", *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(to)])


def _link(folder: Path, objects: list[Path], flags: tuple[str, ...]) -> Path:
    module = folder / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *flags, *map(str, objects), "-o", str(module)], check=True)
    return module


def run_with(module: Path, script: str, *, sanitized: bool = False) -> subprocess.CompletedProcess:
    """Runs `script` in a process whose backend "cuda-host" is `module`."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cuda_host', {str(module)!r})\n"
        "found = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(found)\n"
        "sys.modules['speft_kernels._cuda_host'] = found\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    if sanitized:
        environment |= {
            "LD_PRELOAD": ":".join(map(str, sanitizers())),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "halt_on_error=1",
        }
    return subprocess.run(
        [sys.executable, "-c", load + script],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
