"""Building variants of the CUDA kernels for the CPU: with a fault planted, or under sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pybind11

from speft_kernels.bench.gpu.small import OPERATIONS

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-Wno-psabi", "-DSPEFT_ON_HOST"]
FLAGS += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


@dataclass(frozen=True)
class Sanitizer:
    """What a module is compiled with, and what its process has to load first."""

    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    # Flags that the fibers go without, because they are what the sanitizer must not look into.
    not_for_fibers: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        found = (
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in self.libraries
        )
        return {"LD_PRELOAD": ":".join(found), **dict(self.options)}


@cache
def missing(sanitizer: Sanitizer) -> str | None:
    """Why it cannot be used here; None if it can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    environment = sanitizer.environment()
    if not all(Path(path).is_file() for path in environment["LD_PRELOAD"].split(":")):
        return f"g++ has no {' or no '.join(sanitizer.libraries)}"
    command = [sys.executable, "-c", "import torch"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # The thread sanitizer, for one, refuses some layouts of the address space.
    return None if done.returncode == 0 else f"it does not start: {done.stderr[-300:]}"


Change = Callable[[str], str]

NOTHING = Sanitizer(flags=("-O1",), libraries=(), options=())
BOUNDS = Sanitizer(
    flags=("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    libraries=("libasan.so", "libubsan.so"),
    options=(
        ("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0"),
        ("UBSAN_OPTIONS", "halt_on_error=1"),
    ),
)
RACES = Sanitizer(
    flags=("-O1", "-g", "-DSPEFT_TSAN", "-fsanitize=thread"),
    libraries=("libtsan.so",),
    # Python and torch are not compiled for it: what it sees of them is no finding. The history
    # names the earlier of two accesses.
    options=(("TSAN_OPTIONS", "halt_on_error=1:ignore_noninstrumented_modules=1:history_size=5"),),
    not_for_fibers=("-fsanitize=thread",),
)


def build(folder: Path, sanitizer: Sanitizer = NOTHING) -> Path:
    """A `_cuda_host` module in `folder`, with its objects beside it."""
    shutil.copytree(CSRC, folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    sources = [folder / "csrc" / "cuda_module.cpp", *cuda.glob("*.cu"), *cuda.glob("host/*.cpp")]
    _compile(sources, folder, sanitizer)
    return _link(folder, sorted(folder.glob("*.o")), sanitizer)


def build_with_fault(
    folder: Path, sound: Path, file: str, change: Change, sanitizer: Sanitizer = NOTHING
) -> Path:
    """The module of the folder `sound` with one file of csrc/cuda changed, in `folder`."""
    shutil.copytree(sound / "csrc", folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    (cuda / file).write_text(change((cuda / file).read_text()))
    anew = readers(file)
    _compile([cuda / f"{name}.cu" for name in anew], folder, sanitizer)
    others = [path for path in sound.glob("*.o") if path.stem not in anew]
    return _link(folder, [*(folder / f"{name}.o" for name in anew), *others], sanitizer)


def instead(old: str, new: str) -> Change:
    """What stands in a file once, and what shall stand there."""

    def change(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return change


def without(place: re.Match) -> Change:
    return lambda text: text[: place.start()] + text[place.end() :]


def readers(file: str) -> list[str]:
    """The operations whose file in csrc/cuda is this one or includes it, or what includes it."""
    if file.endswith(".cu"):
        return [file.removesuffix(".cu")]
    files = [f for f in (CSRC / "cuda").iterdir() if f.is_file()]
    including = [f.name for f in files if f'#include "{file}"' in f.read_text()]
    return sorted({operation for name in including for operation in readers(name)})


def _compile(sources: list[Path], folder: Path, sanitizer: Sanitizer) -> None:
    running = []
    for source in sources:
        without = sanitizer.not_for_fibers if source.parent.name == "host" else ()
        flags = [*FLAGS, *(flag for flag in sanitizer.flags if flag not in without)]
        command = ["g++", *flags, "-x", "c++", "-c", str(source)]
        running.append(subprocess.Popen([*command, "-o", str(folder / f"{source.stem}.o")]))
    assert all(process.wait() == 0 for process in running)


def _link(folder: Path, objects: list[Path], sanitizer: Sanitizer) -> Path:
    module = folder / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["g++", "-shared", *sanitizer.flags, *map(str, objects)]
    subprocess.run([*command, "-o", str(module)], check=True)
    return module


# What a process with a module of its own runs: each operation on small tensors, in several orders
# of the threads, until one of them comes out wrong.
SCRIPT = """
import speft_kernels._cuda_host as module
from speft_kernels.bench.gpu.small import Place, wrong

for seed in range({orders}):
    module.set_seed(seed)
    found = wrong({operations}, Place("cpu", "cuda-host"))
    if found:
        raise SystemExit(f"wrong: {{found}}")
"""


def script(*operations: str, orders: int = 4) -> str:
    return SCRIPT.format(operations=operations or tuple(OPERATIONS), orders=orders)


def run_with(
    module: Path, script: str, sanitizer: Sanitizer | None = None
) -> subprocess.CompletedProcess:
    """Runs `script` in a process whose backend "cuda-host" is `module`."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cuda_host', {str(module)!r})\n"
        "found = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(found)\n"
        "sys.modules['speft_kernels._cuda_host'] = found\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    if sanitizer is not None:
        environment |= sanitizer.environment()
    return subprocess.run(
        [sys.executable, "-c", load + script],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
