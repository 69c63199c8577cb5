"""Building the CUDA kernels for the CPU, with faults planted or under sanitizers, and running them.

Compiling and importing torch under a sanitizer are what takes time. So one module has all faults
of a file's tests, of which each process chooses at most one; and processes are forked from one that
has imported torch.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pybind11

from speft_kernels.bench.gpu.small import OPERATIONS

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-Wno-psabi", "-DSPEFT_ON_HOST"]
FLAGS += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


@dataclass(frozen=True)
class Sanitizer:
    """What a module is compiled with, and what its process has to load first."""

    # Of debugging information lines and functions are enough for a report.
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    # Flags that the fibers go without, because they are what the sanitizer must not look into.
    not_for_fibers: tuple[str, ...] = ()
    # Those of the pybind11 face, which is no kernel and of all files the slowest to compile.
    of_face: tuple[str, ...] = ("-O0",)

    def environment(self) -> dict[str, str]:
        found = (
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in self.libraries
        )
        return {"LD_PRELOAD": ":".join(found), **dict(self.options)}


NOTHING = Sanitizer(flags=("-O1",), libraries=(), options=())
BOUNDS = Sanitizer(
    # -Og compiles its many checks in half the time of -O1.
    flags=("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    libraries=("libasan.so", "libubsan.so"),
    options=(
        ("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0"),
        ("UBSAN_OPTIONS", "halt_on_error=1"),
    ),
    of_face=("-O0", "-fsanitize=address"),
)
RACES = Sanitizer(
    flags=("-O1", "-g1", "-DSPEFT_TSAN", "-fsanitize=thread"),
    libraries=("libtsan.so",),
    # Python and torch are not compiled for it: what it sees of them is no finding. The history
    # names the earlier of two accesses.
    options=(("TSAN_OPTIONS", "halt_on_error=1:ignore_noninstrumented_modules=1:history_size=5"),),
    not_for_fibers=("-fsanitize=thread",),
)


@dataclass(frozen=True)
class Fault:
    """An expression of a file of csrc/cuda, and the one that takes its place."""

    file: str
    start: int
    end: int
    planted: str


def instead(file: str, *texts: str) -> Fault:
    """The texts are what stands once in the file, an expression that stands once in it, and what
    shall stand there; or only the two last of them.
    """
    within, sound, planted = texts if len(texts) == 3 else (texts[0], *texts)
    text = (CSRC / "cuda" / file).read_text()
    assert text.count(within) == within.count(sound) == 1, within
    start = text.index(within) + within.index(sound)
    return Fault(file, start, start + len(sound), planted)


def without(file: str, call: re.Match) -> Fault:
    return Fault(file, call.start(), call.end(), "void(0)")


# Every file of a module includes it. A process chooses before it loads the module; 0 is none.
CHOICE = """#pragma once
#include <cstdlib>
inline const int speft_fault = [] {
    const char* const chosen = std::getenv("SPEFT_FAULT");
    return chosen ? std::atoi(chosen) : 0;
}();
"""


def build(folder: Path, sanitizer: Sanitizer = NOTHING, faults: Sequence[Fault] = ()) -> Path:
    """A `_cuda_host` module in `folder`, in which a process may choose a fault by its number: the
    first is 1.
    """
    shutil.copytree(CSRC, folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    # From the last to the first, so that places before stay what they are.
    for number, fault in sorted(enumerate(faults, 1), key=lambda of: of[1].start, reverse=True):
        text = (cuda / fault.file).read_text()
        before, sound, after = text[: fault.start], text[fault.start : fault.end], text[fault.end :]
        either = f"(speft_fault == {number} ? ({fault.planted}) : ({sound}))"
        (cuda / fault.file).write_text(f"{before}{either}{after}")
    (folder / "choice.h").write_text(CHOICE)
    sources = [folder / "csrc" / "cuda_module.cpp", *cuda.glob("*.cu"), *cuda.glob("host/*.cpp")]
    running = [_compile(source, folder, sanitizer) for source in sources]
    codes = [process.wait() for process in running]
    assert not any(codes)
    module = folder / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["g++", "-shared", *sanitizer.flags, *map(str, folder.glob("*.o"))]
    subprocess.run([*command, "-o", str(module)], check=True)
    return module


def _compile(source: Path, folder: Path, sanitizer: Sanitizer) -> subprocess.Popen:
    flags: Sequence[str] = sanitizer.flags
    if source.name == "cuda_module.cpp":
        flags = sanitizer.of_face
    elif source.parent.name == "host":
        flags = [flag for flag in flags if flag not in sanitizer.not_for_fibers]
    command = ["g++", *FLAGS, *flags, "-include", str(folder / "choice.h")]
    return subprocess.Popen(
        [*command, "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    )


def readers(file: str) -> list[str]:
    """The operations whose file in csrc/cuda is this one or includes it, or what includes it."""
    if file.endswith(".cu"):
        return [file.removesuffix(".cu")]
    files = [f for f in (CSRC / "cuda").iterdir() if f.is_file()]
    including = [f.name for f in files if f'#include "{file}"' in f.read_text()]
    return sorted({operation for name in including for operation in readers(name)})


# What a process with a module of its own runs: each operation on small tensors, in several orders
# of the threads, until one of them comes out wrong.
SCRIPT = """
import torch
import speft_kernels._cuda_host as module
from speft_kernels.bench.gpu.small import Place, wrong

torch.use_deterministic_algorithms(True)  # which fills what torch.empty makes
for seed in range({orders}):
    module.set_seed(seed)
    found = wrong({operations}, Place("cpu", "cuda-host"))
    if found:
        raise SystemExit(f"wrong: {{found}}")
"""


def script(*operations: str, orders: int = 4) -> str:
    return SCRIPT.format(operations=operations or tuple(OPERATIONS), orders=orders)


# Runs what it is told line by line, each in a fork: before that it runs no kernel, for the thread
# sanitizer sees nothing in a fork of a process that has more threads than one.
SERVER = """
import importlib.util, json, os, pathlib, signal, sys, traceback
from speft_kernels.bench.gpu import small

def run(module, script, fault, output, errors):
    signal.alarm(280)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ["SPEFT_FAULT"] = str(fault)
    name = pathlib.Path(module).name.split(".")[0]
    spec = importlib.util.spec_from_file_location(name, module)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    sys.modules["speft_kernels._cuda_host"] = found
    exec(script, {})

print(flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        code = 1
        try:
            run(*json.loads(line))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Processes:
    """Runs scripts under a sanitizer, each in a process whose backend "cuda-host" is a module that
    `build` has made with it. Close it.
    """

    def __init__(self, folder: Path, sanitizer: Sanitizer = NOTHING) -> None:
        self.folder = folder
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **sanitizer.environment()}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "server.txt").open("w"),
            text=True,
            env=environment,
        )

    def start(self) -> str | None:
        """Wait until it has imported torch; return why it cannot, or None.

        The thread sanitizer, for one, refuses some layouts of the address space.
        """
        return None if self._read() else f"it does not start: {self._log()[-300:]}"

    def run(self, module: Path, script: str, fault: int = 0) -> subprocess.CompletedProcess:
        assert self._server.stdin is not None
        output, errors = self.folder / "stdout.txt", self.folder / "stderr.txt"
        request = json.dumps([str(module), script, fault, str(output), str(errors)])
        self._server.stdin.write(request + "\n")
        self._server.stdin.flush()
        code = self._read()
        assert code, self._log()
        return subprocess.CompletedProcess(
            script, int(code), output.read_text(), errors.read_text(errors="replace")
        )

    def close(self) -> None:
        self._server.communicate()

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def _log(self) -> str:
        return (self.folder / "server.txt").read_text()


def missing(sanitizer: Sanitizer) -> str | None:
    """Why the compiler does not have it; None if it does."""
    if shutil.which("g++") is None:
        return "there is no g++"
    paths = sanitizer.environment()["LD_PRELOAD"].split(":")
    if not all(Path(path).is_file() for path in paths):
        return f"g++ has no {' or no '.join(sanitizer.libraries)}"
    return None
