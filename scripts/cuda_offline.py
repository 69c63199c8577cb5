"""Compile every CUDA C++ kernel for GPUs that are not here, warnings as errors, and say what came
out: registers, stack, and the matrix and memory instructions of the machine code.

Exits with 1 where a file does not compile, a kernel uses local memory, or lacks the instructions it
is written for.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from gpu_variant import instructions, matrix_instructions, widths
from offline_report import Compiled, write_report

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"
ARCHS = ("80", "90a", "100a")
_LOADS = {"LDG": "LDG", "LDGSTS": "LDGSTS"}

# A kernel's code in a disassembly: its label, and everything up to the next section.
_SECTION = r"^\.text\.(\S+):\s*$(.*?)(?=^\s*\.section|\Z)"

# What the machine code of a kernel must contain, by a pattern of its name. A kernel that is not
# named here needs nothing but registers.
WANTED = {
    # 16 bytes at a time to shared memory, fragments by the matrix load, and the tensor cores.
    r"multiply<": (r"LDGSTS\.[\w.]*128", r"LDSM\.[\w.]*MT88\.4", r"HMMA\.16816"),
    **dict.fromkeys(
        (r"multiply_many<.*256>", r"multiply_many<.*128>"),  # tokens of a tile
        (r"LDGSTS\.[\w.]*128", r"LDSM\.[\w.]*M88\.4", r"HMMA\.16816"),
    ),
    r"multiply_many<.*true": (r"LDSM\.[\w.]*MT88\.4",),  # W turned
    # Straight to registers: 16 bytes of 16-bit numbers and of words, 8 of bytes.
    r"multiply_few<\w+, Base[13]": (r"LDG\.[\w.]*128", r"HMMA\.16816"),
    r"multiply_few<\w+, Base2": (r"LDG\.[\w.]*64", r"HMMA\.16816"),
    # 16 bytes at a time from global memory; comparisons that give floats; increments that a warp's
    # lanes may share.
    r"collect<": (r"LDG\.E\.128", r"FSET\.BF"),
    r"count_digit<": (r"LDG\.E\.128", r"ATOMS\.POPC\.INC"),
    # As the first, and a strip's tokens in one read.
    r"multiply_strips<": (
        r"LDGSTS\.[\w.]*128",
        r"LDSM\.[\w.]*MT88\.4",
        r"LDS\.[\w.]*128",
        r"HMMA\.16816",
    ),
    # Columns are turned by the matrix load, and written 16 bytes at a time.
    r"turn_columns": (r"LDSM\.[\w.]*MT88\.4", r"STG\.[\w.]*128"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a file, as compiled for one target."""

    file: str
    name: str
    arch: str
    registers: int
    stack: int
    sass: str

    def problems(self) -> Iterator[str]:
        found = instructions(self.sass)
        local = sum(n for name, n in found.items() if name.split(".")[0] in ("LDL", "STL"))
        if self.stack or local:
            yield f"uses local memory: {self.stack} bytes of stack, {local} accesses"
        wanted = (p for name, some in WANTED.items() if re.match(name, self.name) for p in some)
        for pattern in wanted:
            if not any(re.match(pattern, name) for name in found):
                yield f"has no instruction like {pattern}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), metavar="ARCH")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--report", type=Path, help="write a summary by kernel to this file")
    options = parser.parse_args()
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="speft_setup")
    nvcc = setup["find_nvcc"]()
    if nvcc is None:
        print("there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda): no CUDA kernel is compiled")
        return 1 if os.environ.get("SPEFT_REQUIRE_NVCC") == "1" else 0
    began = time.monotonic()
    work = [(file, arch) for file in sorted(KERNELS.glob("*.cu")) for arch in options.archs]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda one: compiled(nvcc, *one, Path(folder)), work))
    problems = []
    print("| kernel | file | sm | registers | stack | matrix | loads | stores |")
    print("|" + "---|" * 8)
    count, seen = 0, set()
    for result in results:
        if isinstance(result, str):
            problems.append(result)
            continue
        for kernel in result:
            count += 1
            seen |= {name for name in WANTED if re.match(name, kernel.name)}
            print(row(kernel))
            title = f"{kernel.name} ({kernel.file}) on sm_{kernel.arch}"
            problems += [f"{title}: {problem}" for problem in kernel.problems()]
    if not problems:
        problems = [f"{name}: no file has a kernel like that" for name in WANTED.keys() - seen]
    if options.report:
        kernels = [kernel for some in results if not isinstance(some, str) for kernel in some]
        rows = [short(kernel) for kernel in kernels if not kernel.name.startswith("cub::")]
        version = re.search(r"release ([\d.]+)", _output(nvcc, "--version"))
        compiler = f"nvcc {version[1]}" if version else "nvcc"
        write_report(options.report, "The CUDA kernels' machine code", compiler, rows)
    seconds = time.monotonic() - began
    print(f"\n{count} CUDA kernels in {seconds:.0f} s, {len(problems)} problems")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def compiled(nvcc: str, file: Path, arch: str, folder: Path) -> list[Kernel] | str:
    """The kernels of a file for one target, or what is wrong."""
    cubin = folder / f"{file.stem}.{arch}.cubin"
    command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-cubin", f"-arch=sm_{arch}"]
    done = subprocess.run([*command, str(file), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        return f"{file.name} for sm_{arch} does not compile:\n{done.stdout}{done.stderr}"
    if not cubin.exists() or not cubin.stat().st_size:
        return []
    tools = triton.knobs.nvidia
    usage = _output(tools.cuobjdump.path, "--dump-resource-usage", str(cubin))
    sass = _output(tools.nvdisasm.path, "--print-code", "--no-dataflow", str(cubin))
    code = dict(re.findall(_SECTION, sass, re.MULTILINE | re.DOTALL))
    kernels = []
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        stack = found["STACK"] + found.get("LOCAL", 0)
        kernels.append(
            Kernel(file.name, demangled(name), arch, found["REG"], stack, code.get(name, ""))
        )
    return kernels


def demangled(name: str) -> str:
    """The kernel as the source calls it, its template arguments with it."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    text = _output(tool, name).strip() if tool else name
    text = re.sub(r"\(anonymous namespace\)::|speft::cuda::|speft::", "", text)
    text = re.sub(r"\((\w+)\)(\d)", r"\1\2", text)  # an enumerator among the arguments
    return text.removeprefix("void ").split("(")[0]


def short(kernel: Kernel) -> Compiled:
    found = instructions(kernel.sass)
    loads = [bits for by in widths(found, _LOADS).values() for bits in by]
    return Compiled(
        *(kernel.name.split("<")[0], kernel.arch, kernel.registers, kernel.stack, None),
        *(frozenset(matrix_instructions(found)), max(loads, default=0)),
    )


def row(kernel: Kernel) -> str:
    found = instructions(kernel.sass)
    matrix = " ".join(f"{n} x{c}" for n, c in sorted(matrix_instructions(found).items()))
    moved = [
        "; ".join(
            f"{name} " + " ".join(f"{bits}b x{n}" for bits, n in sorted(by.items()))
            for name, by in sorted(widths(found, names).items())
        )
        for names in (_LOADS, {"STG": "STG"})
    ]
    cells = (kernel.name, kernel.file, kernel.arch, kernel.registers, kernel.stack, matrix, *moved)
    return "| " + " | ".join(map(str, cells)) + " |"


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
