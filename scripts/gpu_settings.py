"""Which settings the kernels' `default` functions choose, over a grid of problems: `gpu_offline.py`
fails where it has not compiled one of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from gpu_calls import DTYPES, Product, tf32
from speft_kernels.triton_kernels._fused_settings import FusedLaunch
from speft_kernels.triton_kernels._topk_select import DigitLaunch, RunLaunch
from speft_kernels.triton_kernels.block_grad import AddLaunch, EntryLaunch, TileLaunch, uses_dot
from speft_kernels.triton_kernels.effective_weight import RowLaunch
from speft_kernels.triton_kernels.keep_columns import PackLaunch
from speft_kernels.triton_kernels.launch import MACHINES, Launch, Machine
from speft_kernels.triton_kernels.sampled_grad import GatherLaunch, StripLaunch
from speft_kernels.triton_kernels.topk_salience import ChunkLaunch, SampleLaunch
from speft_kernels.triton_kernels.write_delta import WriteLaunch

from speft_kernels.costs import DEFAULTS

# Layers of models from 22 M to 405 B parameters, and small ones; (out_features, in_features).
LAYERS = (
    *((384, 384), (1536, 384), (384, 1536), (896, 896), (128, 896), (4864, 896), (896, 4864)),
    *((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (128256, 2048)),
    *((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (16384, 53248), (1, 1), (7, 5)),
)
TOKENS = (1, 2, 16, 17, 32, 33, 64, 65, DEFAULTS["cuda"].fused_tokens)
BLOCK_SIDES = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 100, 128, 4096)
BASES = ((0, None), (None, None), *((bits, g) for bits in (8, 4) for g in (None, 32, 64, 128)))
SIZES = tuple(1 << power for power in range(8, 34))  # of a matrix, or of all, in entries

Outcome = tuple[Launch, str]  # settings, and the problem that they are chosen for


def compiled_as(settings: Launch) -> Launch:
    """What tells compiled kernels apart: the number of splits is a divisor and nothing else."""
    return replace(settings, splits=1) if isinstance(settings, FusedLaunch) else settings


def missing(compiled: Iterable[tuple[int, Launch]]) -> list[str]:
    """Name each outcome on each GPU of `compiled` that is not among them, with a problem for it.

    Args:
        compiled: arch and settings of each launch that was compiled.
    """
    known = {(arch, compiled_as(settings)) for arch, settings in compiled}
    problems: dict[tuple[int, Launch], str] = {}
    for arch in sorted({arch for arch, _ in known}):
        for settings, problem in outcomes(MACHINES[arch]):
            key = arch, compiled_as(settings)
            if key not in known:
                problems.setdefault(key, problem)
    return [
        f"no call in gpu_calls.py is launched on sm_{arch} with {settings}, as {problem} is"
        for (arch, settings), problem in problems.items()
    ]


def outcomes(machine: Machine) -> Iterator[Outcome]:
    """All that the default functions choose on the machine."""
    yield from _fused(machine)
    for block in itertools.product(BLOCK_SIDES, repeat=2):
        for size, tensor_cores in ((2, True), (4, True), (4, False)):
            # In 32 bits of squares and lines.
            usual = size == 2 or block[0] == block[1] or 1 in block
            if usual and uses_dot(block, tensor_cores):
                settings = TileLaunch.default(block, size, tensor_cores)
                yield settings, f"a block of {block} of {size} bytes"
    for splits in range(2, 65):
        yield AddLaunch.default(splits), f"block_grad in {splits} splits"
    yield EntryLaunch.default(), "an entry of block_grad"
    for size, fast in ((2, True), (4, True), (4, False)):
        for groups, aligned in itertools.product((0.5, 1, 1.5, 2, 2.5, 4, 9, 40), (True, False)):
            settings = StripLaunch.default(size, size == 4 and fast, groups, aligned, machine)
            rows = "aligned rows" if aligned else "rows"
            yield settings, f"{rows} of {size} bytes with {groups} groups a block"
        yield GatherLaunch.default(size), f"a gathered entry of {size} bytes"
    for (_, columns), (bits, _) in itertools.product(LAYERS, BASES):
        width = columns // 4 if bits == 4 else columns
        yield RowLaunch.default(width, bool(bits)), f"W of {bits} bits with {columns} columns"
    yield PackLaunch.default(), "keep_columns"
    yield DigitLaunch.default(), "topk_salience"
    for size in SIZES:
        yield WriteLaunch.default(size, machine), f"write_delta of {size} entries"
        yield SampleLaunch.default(size), f"topk_salience of {size} entries"
        yield ChunkLaunch.default(size, machine), f"topk_salience of {size} entries"
    for expected in (10.0, 128.0, 129.0, 512.0, 513.0, 4096.0):
        yield RunLaunch.default(expected), f"topk_salience with {expected} entries of a chunk"


def _fused(machine: Machine) -> Iterator[Outcome]:
    kinds = itertools.product(TOKENS, LAYERS, DTYPES.values(), BASES, (False, True))
    for tokens, (rows, columns), dtype, (bits, group), twin in kinds:
        if bits and columns % (group or 16):
            continue  # such a weight is not quantized
        if group and dtype == torch.float32:
            continue  # groups go with 16 bits
        product = Product(dtype, tokens, bits, group, twin, rows, columns)
        for fast in (False, True) if dtype == torch.float32 else (False,):
            with tf32() if fast else contextlib.nullcontext():
                settings = FusedLaunch.default(product.shape(), machine)
            yield settings, f"{product}{' in tf32' if fast else ''}"
