"""The CUDA kernels as nvcc compiles them, run on a CPU by an emulator of PTX (tests/ptx).

What the backend "cuda-host" does not see is judged here: gpu.h with its inline assembly, and what
the compiler makes of the kernels.
"""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_host import BOUNDS, CSRC, Processes, missing

from speft_kernels.bench.gpu.small import OPERATIONS

# Compiling on a busy machine takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TESTS = Path(__file__).resolve().parent
# For sm_90a nvcc writes the same instructions, but for sums and products of bfloat16 pairs, which
# here are made of fma.
TARGET = "arch=compute_80,code=compute_80"

# The module is the backend "cuda" but for the runtime it is linked with, and stands for "cuda-host"
# as every module of cuda_host.py does. The script runs operations on small tensors, in several
# orders of the warps, until one of them comes out wrong.
SCRIPT = """
import ctypes, os
import torch
import speft_kernels._cuda_host as module
from speft_kernels.bench.gpu.small import Place, wrong

torch.use_deterministic_algorithms(True)  # which fills what torch.empty makes
os.environ["SPEFT_PTX"] = {ptx!r}
for seed in range({orders}):
    ctypes.CDLL(module.__file__).ptx_set_seed(ctypes.c_uint64(seed))
    found = wrong({operations}, Place("cpu", "cuda-host"))
    if found:
        raise SystemExit(f"wrong: {{found}}")
"""


@dataclass(frozen=True)
class Emulated:
    """The extension, linked with the emulator, and the PTX of the same compilation."""

    module: Path
    ptx: Path
    processes: Processes

    def run(self, *operations, ptx=None, orders=4):
        script = SCRIPT.format(ptx=str(ptx or self.ptx), operations=operations, orders=orders)
        return self.processes.run(self.module, script)


def require(reason, variable):
    if reason is not None:
        (pytest.fail if os.environ.get(variable) == "1" else pytest.skip)(reason)


def build(folder, setup, nvcc):
    """Return the module and the folder of the PTX. The optimizer is as in setup.py: its work is
    what is judged.
    """
    commands = []

    def compile_with(command, source):
        commands.append([*command, "-c", source, "-o", folder / f"{source.name}.o"])

    for source in (CSRC / "cuda").glob("*.cu"):
        (kept := folder / source.stem).mkdir()
        keep = ["--keep", "--keep-dir", kept]
        compile_with([nvcc, *setup["NVCC_FLAGS"], "-gencode", TARGET, *keep], source)
    face = ["g++", "-std=c++17", "-O0", "-fPIC", *setup["include_flags"]()]
    compile_with(face, CSRC / "cuda_module.cpp")
    # PTX's integers wrap around, and its sums and products are rounded each by itself.
    flags = ["-std=c++17", "-O1", "--compiler-options", "-fPIC,-fwrapv,-ffp-contract=off"]
    for source in (TESTS / "ptx").glob("*.cpp"):
        compile_with([nvcc, *flags], source)
    codes = [process.wait() for process in [subprocess.Popen(command) for command in commands]]
    assert not any(codes)
    (ptx := folder / "ptx").mkdir()
    for file in folder.glob("*/*.ptx"):
        shutil.move(file, ptx)
    # Our stand-in for the CUDA runtime, also where the process has loaded NVIDIA's with torch.
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *folder.glob("*.o"), "-o", module]
    subprocess.run(link, check=True)
    return module, ptx


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    setup = runpy.run_path(str(TESTS.parent / "setup.py"), run_name="speft_setup")
    nvcc = setup["find_nvcc"]()
    require("there is no nvcc" if nvcc is None else None, "SPEFT_REQUIRE_NVCC")
    require(missing(BOUNDS), "SPEFT_REQUIRE_SANITIZERS")
    folder = tmp_path_factory.mktemp("emulated")
    # The address sanitizer tells the emulator the bounds of tensors.
    processes = Processes(folder, BOUNDS)
    try:
        require(processes.start(), "SPEFT_REQUIRE_SANITIZERS")
        yield Emulated(*build(folder, setup, nvcc), processes)
    finally:
        processes.close()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_nvcc_compiles_computes_what_it_should(emulated, operation):
    done = emulated.run(operation)
    assert done.returncode == 0, done.stderr[-3000:]


MMA = r"(mma\S+ \{[^}]*\}, )"
# (name, operation, what stands in its PTX, what shall stand there, what must be reported)
FAULTS = (
    # Fragments in another order: rows 8 apart of A, and columns 8 apart of B^T.
    ("A", "block_grad", MMA + r"\{(\S+), (\S+), ", r"\1{\3, \2, ", r"wrong: \["),
    ("B", "sampled_grad", MMA + r"(\{[^}]*\}, )\{(\S+), (\S+)\}", r"\1\2{\4, \3}", r"wrong: \["),
    ("trans", "keep_columns", r"\.x4\.trans\.", ".x4.", r"wrong: \["),
    # What another lane has: here an address.
    ("shuffle", "topk_salience", r"(shfl\.sync\.idx\S*\s+\S+, \S+, )\S+,", r"\g<1>3,", "beyond"),
    # What lies beyond the tokens, in place of zeros.
    ("zeros", "sampled_grad", r"(cp\.async\.cg.*), %r\d+;", r"\1, 16;", "beyond an allocation"),
    # One group of copies is read before it has arrived.
    (
        "wait",
        "sparse_delta_matmul",
        r"(cp\.async\.wait_group )(\d+)",
        lambda found: found[1] + str(int(found[2]) + 1),
        "a race with warps",
    ),
    ("barrier", "keep_columns", r"bar\.sync\s+0;", "", "a race with warps"),
    # Blocks that wait for no other one: the sign of what they count in tells that all have come.
    (
        "grid",
        "topk_salience",
        r"(xor\.b32\s+\S+, \S+, \S+;\s*setp\.gt\.s32\s+\S+, \S+, )-1;",
        r"\g<1>2147483647;",
        r"wrong: \[|beyond|fewer indices",
    ),
    ("misaligned", "block_grad", r"(ldmatrix.*\[%r\d+)\]", r"\1+8]", "misaligned"),
    # Nothing is passed over.
    ("modifier", "write_delta", r"ld\.global\.u64", "ld.volatile.global.u64", "does not know"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{of[1]}: {of[0]}" for of in FAULTS])
def test_a_fault_planted_in_the_ptx_is_reported(emulated, fault, tmp_path):
    _, operation, sound, planted, report = fault
    ptx = shutil.copytree(emulated.ptx, tmp_path / "ptx")
    file = ptx / f"{operation}.ptx"
    text, places = re.subn(sound, planted, file.read_text())
    assert places > 0
    file.write_text(text)
    done = emulated.run(operation, ptx=ptx)
    assert done.returncode not in (0, -signal.SIGALRM)
    assert re.search(report, done.stderr), done.stderr[-3000:]
    assert operation in done.stderr


def test_a_write_beyond_a_weight_is_reported(emulated):
    done = emulated.run("planted", orders=1)
    assert re.search(r"write_batch.*st\.global.*beyond an allocation", done.stderr), done.stderr
