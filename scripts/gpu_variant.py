"""One kernel in one launch configuration: made from a recorded launch as Triton's JIT would make
it, compiled for a GPU that need not be there, and judged by its machine code.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from speft_kernels.triton_kernels.launch import MACHINES, Recorded
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

# Columns of tensor memory that a Blackwell multiprocessor has.
TENSOR_MEMORY = 512
# Blocks along the axes of a grid.
GRID_LIMITS = (2**31 - 1, 65535, 65535)

MATRIX = re.compile(r"(HMMA|HGMMA|UTC\w*MMA|[BDIQ]G?MMA)\b")
_LOADS = {"LDG": "LDG", "LDGSTS": "LDGSTS", "UTMALDG": "TMA", "UBLKCP": "TMA"}


@dataclass(frozen=True)
class Variant:
    """What `triton.compile` takes, as plain data: it travels to another process.

    Attributes:
        signature: the name and type of each argument.
        constexprs: path and value of each compile-time constant.
        attrs: path and attributes of each argument that is a multiple of 16.
        calls: which calls launch it.
    """

    module: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    calls: list[str] = field(default_factory=list, compare=False)

    @property
    def key(self) -> str:
        return repr((self.module, self.kernel, self.arch, self.num_warps, self.num_stages)) + repr(
            (self.signature, self.constexprs, self.attrs)
        )

    @property
    def settings(self) -> str:
        """The capital constants in a few words, and the warps and stages."""
        names = list(self.signature)
        named = {names[path[0]]: value for path, value in self.constexprs.items()}
        shown = [f"{name}={_short(value)}" for name, value in named.items() if name.isupper()]
        return " ".join([*shown, f"w{self.num_warps}", f"s{self.num_stages}"])


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(getattr(value, "name", value))


def specialise(recorded: Recorded, arch: int) -> Variant:
    """Return what Triton's JIT would compile for the launch on a GPU of `arch`: its own binder and
    its own reading of the arguments, asked without a driver.
    """
    kernel: JITFunction = recorded.kernel
    settings = recorded.settings
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    asked = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
    bound, specialization, options = bind(**recorded.arguments, **asked)
    _, signature, constexprs, attrs = kernel._pack_args(
        backend, {**recorded.arguments, **options}, bound, specialization, options
    )
    return Variant(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        arch,
        settings.num_warps,
        settings.num_stages,
        signature,
        constexprs,
        attrs,
    )


@dataclass(frozen=True)
class Dot:
    """A `tl.dot` of the kernel, as Triton's first intermediate form has it."""

    shape: tuple[int, ...]  # [..., M, K] of the left operand
    dtype: str
    precision: str

    @property
    def on_tensor_cores(self) -> bool:
        return self.dtype in ("f16", "bf16") or (self.dtype == "f32" and self.precision != "ieee")

    def wgmma(self, num_warps: int) -> bool:
        """Whether Hopper's instruction for four warps takes it."""
        return self.on_tensor_cores and self.shape[-2] >= 64 and num_warps % 4 == 0


_DOT = re.compile(r"tt\.dot (.*) : tensor<((?:\d+x)+)(\w+)[^>]*> \*")


def dots(ttir: str) -> list[Dot]:
    found = []
    for attributes, shape, dtype in _DOT.findall(ttir):
        precision = re.search(r"inputPrecision = (\w+)", attributes)
        sides = tuple(int(side) for side in shape.split("x")[:-1])
        found.append(Dot(sides, dtype, precision[1] if precision else "ieee"))
    return found


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def instructions(sass: str) -> Counter[str]:
    """Count the instructions of a disassembly, modifiers and all."""
    return Counter(_INSTRUCTION.findall(sass))


def matrix_instructions(found: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in found.items() if MATRIX.match(name)}


def widths(found: Counter[str], names: dict[str, str]) -> dict[str, dict[int, int]]:
    """Group instructions by what they are called here and by the bits that a thread moves."""
    grouped: dict[str, dict[int, int]] = {}
    for name, count in found.items():
        base, *modifiers = name.split(".")
        if base in names:
            bits = [int(m) for m in modifiers if m in ("64", "128", "256")]
            narrow = [int(m[1:]) for m in modifiers if m in ("U8", "S8", "U16", "S16")]
            width = (bits or narrow or [32])[-1]
            of = grouped.setdefault(names[base], {})
            of[width] = of.get(width, 0) + count
    return grouped


@dataclass(frozen=True)
class Report:
    """What one variant compiled to. `shared` and `stack` are bytes, of a block and of a thread."""

    variant: Variant
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[str, dict[int, int]] = field(default_factory=dict)
    stores: dict[str, dict[int, int]] = field(default_factory=dict)
    dots: list[Dot] = field(default_factory=list)
    error: str | None = None

    def problems(self) -> list[str]:
        """Say why the kernel must not be shipped; nothing where it may be."""
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack or self.spills:
            found.append(
                f"spills: {self.stack} bytes of stack, {self.spills} accesses to local memory"
            )
        limit = MACHINES[self.variant.arch].shared_memory
        if self.shared > limit:
            found.append(f"takes {self.shared} bytes of shared memory, the GPU has {limit}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(
                f"takes {self.tensor_memory} columns of tensor memory, the GPU has {TENSOR_MEMORY}"
            )
        wanted = [dot for dot in self.dots if dot.on_tensor_cores]
        if wanted and not self.matrix:
            found.append(f"multiplies {_dot(wanted[0])} without tensor cores")
        wide = [dot for dot in wanted if dot.wgmma(self.variant.num_warps)]
        if self.variant.arch == 90 and wide and not any("HGMMA" in m for m in self.matrix):
            found.append(f"multiplies {_dot(wide[0])} without HGMMA")
        return found


def _dot(dot: Dot) -> str:
    return f"{'x'.join(map(str, dot.shape))} {dot.dtype} ({dot.precision})"


def compile_variant(variant: Variant) -> Report:
    """Compile for the variant's GPU, and read the machine code."""
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    source = ASTSource(kernel, variant.signature, variant.constexprs, variant.attrs)
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", variant.arch, 32),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        )
    except Exception as error:  # whatever the compiler raises is the finding
        lines = str(error).strip().splitlines() or [""]
        return Report(variant, error=f"{type(error).__name__}: {lines[-1]}")
    usage, sass = disassemble(compiled.asm["cubin"])
    found = instructions(sass)
    return Report(
        variant,
        registers=_usage(usage, "REG"),
        stack=_usage(usage, "STACK") + _usage(usage, "LOCAL"),
        spills=sum(n for name, n in found.items() if name.split(".")[0] in ("LDL", "STL")),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        matrix=matrix_instructions(found),
        loads=widths(found, _LOADS),
        stores=widths(found, {"STG": "STG", "UTMASTG": "TMA"}),
        dots=dots(compiled.asm["ttir"]),
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the instructions, by the tools in Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tools = triton.knobs.nvidia
        commands = (
            [tools.cuobjdump.path, "--dump-resource-usage", str(path)],
            # Where branches lead is not asked for, and takes a third of the time.
            [tools.nvdisasm.path, "--print-code", "--no-dataflow", str(path)],
        )
        usage, sass = (
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for command in commands
        )
    return usage, sass


def _usage(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump tells no {name}: {usage!r}")
    return int(found[1])
