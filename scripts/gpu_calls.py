"""Representative calls of every operation, whose launches `gpu_offline.py` compiles.

A call runs its operation's host function on tensors that hold nothing, while launches are recorded:
`torch.empty` reserves addresses and no memory. One function an operation, named as its file in
`triton_kernels/`, yields the calls: the dtypes, and every case in which the host function chooses
other settings or another kernel.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from speft_kernels.triton_kernels._fused_settings import FusedLaunch, Shape, shape_of
from speft_kernels.triton_kernels._topk_select import DigitLaunch, RunLaunch
from speft_kernels.triton_kernels.block_grad import EntryLaunch, TileLaunch, uses_dot
from speft_kernels.triton_kernels.block_grad import block_grad as block_grad_host
from speft_kernels.triton_kernels.effective_weight import RowLaunch
from speft_kernels.triton_kernels.keep_columns import PackLaunch
from speft_kernels.triton_kernels.keep_columns import keep_columns as keep_columns_host
from speft_kernels.triton_kernels.launch import MACHINES, Launch, Machine
from speft_kernels.triton_kernels.sampled_grad import StripLaunch
from speft_kernels.triton_kernels.sampled_grad import sampled_grad as sampled_grad_host
from speft_kernels.triton_kernels.sparse_delta_matmul import (
    sparse_delta_matmul as sparse_delta_matmul_host,
)
from speft_kernels.triton_kernels.topk_salience import ChunkLaunch, SampleLaunch
from speft_kernels.triton_kernels.topk_salience import topk_salience as topk_salience_host
from speft_kernels.triton_kernels.write_delta import WriteLaunch
from speft_kernels.triton_kernels.write_delta import write_delta as write_delta_host

from speft_kernels.costs import DEFAULTS
from speft_kernels.strips import GROUP_STRIPS, STRIP_ROWS, TILE_WIDTHS, Strips


def _none(machine: Machine) -> Iterable[Launch]:
    return ()


@dataclass(frozen=True)
class Call:
    """A call under a name that tells its dtype and its case.

    Attributes:
        candidates: the settings that a tuning run would try in place of the default, for a machine.
        archs: the GPUs that it is compiled for: one, where an address or a metric makes the
            difference, and none of the settings.
    """

    name: str
    run: Callable[[], object]
    candidates: Callable[[Machine], Iterable[Launch]] = _none
    archs: tuple[int, ...] = tuple(MACHINES)


CALLS: dict[str, Callable[[], Iterator[Call]]] = {}


def calls_of(function: Callable[[], Iterator[Call]]) -> Callable[[], Iterator[Call]]:
    CALLS[function.__name__] = function
    return function


SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, **SIXTEEN_BITS}
# For calls that differ in their addresses or metric from others, and in no settings.
ONE_GPU = {"archs": (90,)}


def odd(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As a slice that begins one element into longer rows of an odd length."""
    length = shape[-1] + 2 - shape[-1] % 2
    return torch.empty(*shape[:-1], length + 1, dtype=dtype)[..., 1 : 1 + shape[-1]]


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """As for a user who lets float32 products use tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_tf32(run: Callable[[], object]) -> Callable[[], object]:
    def wrapped() -> object:
        with tf32():
            return run()

    return wrapped


@calls_of
def keep_columns() -> Iterator[Call]:
    columns = torch.empty(983, dtype=torch.int32)
    for name, dtype in DTYPES.items():
        x = torch.empty(8192, 4096, dtype=dtype)
        kept = torch.empty(1, 983, 8192, dtype=dtype)
        yield Call(
            name,
            lambda x=x, kept=kept: keep_columns_host(x, columns, kept),
            lambda machine: PackLaunch.candidates(),
        )
    kept = torch.empty(3, 983, 77, dtype=torch.bfloat16)
    yield Call("bf16, odd", lambda: keep_columns_host(odd(200, 4096), columns, kept), **ONE_GPU)


@calls_of
def write_delta() -> Iterator[Call]:
    """Of layers with few and with many entries; the addresses are read from a table, so that shapes
    decide nothing else.
    """

    def run(dtype: torch.dtype, index: torch.dtype, entries: int, values: bool) -> None:
        layers = [torch.empty(entries, dtype=dtype) for _ in range(3)]
        indices = [torch.empty(entries, dtype=index) for _ in layers]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        deltas = [torch.empty(entries, dtype=wide) for _ in layers] if values else []
        write_delta_host(layers, indices, layers, deltas)

    cases = [("bf16", "int32", size, has) for size in (84_000, 300_000) for has in (True, False)]
    cases += [(name, "int32", 300_000, True) for name in ("fp16", "fp32", "fp64")]
    cases += [("bf16", "int64", 300_000, True)]
    for name, index, entries, values in cases:
        dtype = {**DTYPES, "fp64": torch.float64}[name]
        yield Call(
            f"{name}, {index}, {entries} x 3, {'base + values' if values else 'base'}",
            functools.partial(run, dtype, getattr(torch, index), entries, values),
            lambda machine: WriteLaunch.candidates(),
        )


@calls_of
def sampled_grad() -> Iterator[Call]:
    """Blocks of few, of some and of many strips, alone and beside gathered entries; whole and kept
    activations; one split and many; entries that end with a row, and that do not.
    """

    def run(
        dtype: torch.dtype,
        groups: float,
        entries: tuple[int, int],
        kept: bool = True,
        tokens: int = 8192,
        rows: int = 4096,
        new: Callable[..., torch.Tensor] = torch.empty,
    ) -> None:
        blocks, (inside, gathered) = rows // STRIP_ROWS, entries
        strips = Strips(
            columns=torch.empty(0 if kept else 983, dtype=torch.int32),
            block_groups=torch.empty(blocks + 1, dtype=torch.int32),
            group_cols=torch.empty(round(groups * blocks), GROUP_STRIPS, dtype=torch.int32),
            group_entries=torch.empty(round(groups * blocks) + 1, dtype=torch.int32),
            most_groups=torch.tensor([math.ceil(groups) + 1]),
            tiles=torch.tensor([blocks * math.ceil(groups / wide) for wide in TILE_WIDTHS]),
            entry_at=torch.empty(inside, dtype=torch.int16),
            rows=torch.empty(300, dtype=torch.int32),
            entry_row=torch.empty(gathered, dtype=torch.int32),
            entry_col=torch.empty(gathered, dtype=torch.int32),
            slot=torch.empty(sum(entries), dtype=torch.int32),
        )
        x = torch.empty(1, 983, tokens, dtype=dtype) if kept else new(tokens, 4096, dtype=dtype)
        dy = new(tokens, rows, dtype=dtype)
        sampled_grad_host(dy, x, strips, torch.empty(sum(entries)), True)

    def candidates(machine: Machine, size: int) -> Iterable[Launch]:
        return StripLaunch.candidates(STRIP_ROWS, GROUP_STRIPS, size, machine)

    cases = [("bf16", groups, (84_000, 0), {}) for groups in (1, 2, 9)]
    cases += [("bf16", 9, (84_000, 1600), {"kept": False}), ("bf16", 0, (0, 84_000), {})]
    cases += [("bf16", 2, (801, 80), {"rows": 256}), ("bf16", 9, (84_000, 1600), {"tokens": 512})]
    cases += [("fp16", 9, (84_000, 1600), {})]
    cases += [(name, groups, (84_000, 1600), {}) for name in ("fp32", "tf32") for groups in (1, 9)]
    for name, groups, entries, more in cases:
        dtype = {**DTYPES, "tf32": torch.float32}[name]
        call = functools.partial(run, dtype, groups, entries, **more)
        told = "".join(f", {key}={value}" for key, value in more.items())
        yield Call(
            f"{name}, {groups} groups a block, {entries[0]} + {entries[1]} entries{told}",
            in_tf32(call) if name == "tf32" else call,
            functools.partial(candidates, size=dtype.itemsize),
        )
    # Rows of dy at odd addresses have settings of their own.
    for tokens, archs in ((8192, tuple(MACHINES)), (1001, (90,))):
        call = functools.partial(run, torch.bfloat16, 9, (84_000, 1600), False, tokens, new=odd)
        yield Call(f"bf16, odd, {tokens} tokens", call, archs=archs)


@calls_of
def block_grad() -> Iterator[Call]:
    """Square, thin, tiny, odd and large blocks; whole and kept activations; one split and many."""

    def run(
        dtype: torch.dtype,
        block: tuple[int, int],
        blocks: int,
        tokens: int = 8192,
        width: int = 4096,
        kept: int = 4096,
    ) -> None:
        dy, x = torch.empty(tokens, width, dtype=dtype), torch.empty(tokens, kept, dtype=dtype)
        where = torch.empty(blocks, dtype=torch.int32)
        block_grad_host(dy, x, where, where, torch.empty(blocks, *block), True)

    def candidates(machine: Machine, block: tuple[int, int], size: int, tensor_cores: bool):
        if uses_dot(block, tensor_cores):
            return TileLaunch.candidates(block, size, machine)
        return EntryLaunch.candidates()

    sides = ((4, 4), (5, 3), (16, 16), (32, 32), (64, 64), (128, 4096), (1, 64), (64, 1))
    cases = [("bf16", block) for block in sides] + [("fp16", (128, 128))]
    parts = (16, 32, 128)
    cases += [("bf16", block) for block in itertools.product(parts, parts)]
    cases += [("bf16", block) for block in ((32, 64), (64, 32), (64, 128), (128, 64))]
    cases += [("fp32", (32, 32)), ("tf32", (32, 32))]
    cases += [("tf32", block) for block in ((1, 32), (1, 128), (32, 1), (64, 1), (128, 1))]
    cases = list(dict.fromkeys(cases))
    cases += [("fp32", block) for block in ((1, 64), (16, 16), (64, 64))]
    cases += [("tf32", block) for block in ((1, 64), (16, 16), (128, 128))]
    for name, block in cases:
        dtype = {**DTYPES, "tf32": torch.float32}[name]
        # Half a percent of the weight or more, in direct sums; a single block, in splits.
        many = max(4096 * 4096 // 200 // (block[0] * block[1]), 1000)
        for blocks in (many, 1) if (name, block) == ("bf16", (16, 16)) else (many,):
            call = functools.partial(run, dtype, block, blocks)
            tried = functools.partial(
                candidates, block=block, size=dtype.itemsize, tensor_cores=name != "fp32"
            )
            named = f"{name}, {blocks} of {block[0]} x {block[1]}"
            yield Call(named, in_tf32(call) if name == "tf32" else call, tried)
    grouped = functools.partial(run, torch.bfloat16, (8, 8), 1000, kept=8 * 101)
    yield Call("bf16, 1000 of 8 x 8, x kept in 101 groups", grouped)
    # Splits decide how many sums the second stage adds at a time.
    for tokens in (4096, 16384, 32768):
        split = functools.partial(run, torch.bfloat16, (16, 16), 1, tokens)
        yield Call(f"bf16, 1 of 16 x 16, {tokens} tokens", split)
    # The JIT makes a constant of an argument that is 1.
    for block in ((8, 8), (1, 1)):
        one = functools.partial(run, torch.bfloat16, block, 1, 1, *block)
        yield Call(f"bf16, 1 of {block[0]} x {block[1]}, one token", one)


@dataclass(frozen=True)
class Product:
    """A call of `sparse_delta_matmul` over a base of `bits` (0: of x's dtype; None: no base)."""

    dtype: torch.dtype
    tokens: int
    bits: int | None = 0
    group: int | None = None
    twin: bool = False
    out_features: int = 4096
    in_features: int = 4096
    bias: bool = False
    odd: bool = False

    def __str__(self) -> str:
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        base = {None: "no base", 0: "W"}.get(self.bits, f"W of {self.bits} bits")
        groups = f" in groups of {self.group}" if self.group else ""
        shape = f"{self.out_features} x {self.in_features}"
        rest = "".join(f" {name}" for name in ("twin", "bias", "odd") if getattr(self, name))
        return f"{dtype}, {self.tokens} tokens, {base}{groups}, {shape}{rest}"

    @property
    def new(self) -> Callable[..., torch.Tensor]:
        return odd if self.odd else torch.empty

    def base(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rows, columns = self.out_features, self.in_features
        if self.bits is None:
            return None, None
        if self.bits == 0:
            return self.new(rows, columns, dtype=self.dtype), None
        width, integer = (columns, torch.int8) if self.bits == 8 else (columns // 4, torch.int16)
        kept = torch.float32 if self.dtype == torch.float16 else self.dtype
        scales = torch.empty(rows, columns // (self.group or columns), dtype=kept)
        return torch.empty(rows, width, dtype=integer), scales

    def arguments(self) -> tuple[torch.Tensor, int]:
        sides = (self.out_features, self.in_features)
        inside, outside = sides if self.twin else sides[::-1]
        return self.new(self.tokens, inside, dtype=self.dtype), outside

    def run(self) -> None:
        (x, out), (weight, scales) = self.arguments(), self.base()
        nnz = max(1, self.out_features * self.in_features // 200)
        bias = torch.empty(out, dtype=self.dtype) if self.bias else None

        def lines(rows: int) -> SimpleNamespace:
            index = torch.empty(nnz, dtype=torch.int32)
            starts, cols = torch.empty(rows + 1, dtype=torch.int32), index[: min(nnz, 983)]
            return SimpleNamespace(cols=cols, local=index, starts=starts, columns=index)

        sparse_delta_matmul_host(
            *(x, weight, scales, bias, torch.empty(nnz)),
            *(lines(self.out_features), lines(self.in_features)),
            *(torch.empty(nnz, dtype=torch.int64), out, self.twin, DEFAULTS["cuda"].fused_tokens),
        )

    def shape(self) -> Shape:
        """What its settings are chosen for."""
        (x, out), (weight, scales) = self.arguments(), self.base()
        return shape_of(x, weight, scales, out, self.twin)

    def candidates(self, machine: Machine) -> Iterable[Launch]:
        return FusedLaunch.candidates(self.shape(), machine)


def _candidates_in_tf32(product: Product, machine: Machine) -> Iterable[Launch]:
    with tf32():
        return list(product.candidates(machine))


SPLIT = {"out_features": 1024}  # few outputs, whose sums are split


@calls_of
def sparse_delta_matmul() -> Iterator[Call]:
    """Tokens that make a tile of 16, 32 and 64; programs without and with splits; all bases."""
    some, half = functools.partial(Product, torch.bfloat16), torch.float16
    products = [Product(d, tokens) for d in DTYPES.values() for tokens in (1, 32, 64)]
    products += [Product(dtype, 16, twin=True) for dtype in DTYPES.values()]
    products += [some(16, bias=True), some(16, out_features=14336), some(64, twin=True)]
    products += [some(16, out_features=1024), some(3, out_features=5, in_features=7)]
    products += [some(1, out_features=1, in_features=1), some(1, out_features=1, twin=True)]
    products += [Product(dtype, tokens, None) for dtype in DTYPES.values() for tokens in (16, 64)]
    for bits in (8, 4):
        products += [some(tokens, bits, group) for tokens in (16, 64) for group in (None, 128)]
        products += [some(16, bits, 128, twin=True), some(64, bits, twin=True)]
        products += [some(16, bits, out_features=14336), Product(half, 16, bits, 32)]
        products += [Product(half, 64, bits, 128), Product(torch.float32, 16, bits, 32)]
        products += [some(32, bits)]
    products += [some(16, 8, 32, out_features=8192, in_features=2048), some(32, 8, twin=True)]
    products += [some(tokens, 8, 32, twin=True) for tokens in (32, 64)]
    for product in products:
        yield Call(str(product), product.run, product.candidates)
    for product in (some(1, odd=True), some(16, odd=True, twin=True), some(16, bias=True, **SPLIT)):
        yield Call(str(product), product.run, product.candidates, **ONE_GPU)
    wide = functools.partial(Product, torch.float32)
    products = [wide(tokens, twin=twin) for tokens in (16, 32, 64) for twin in (0, 1)]
    products += [wide(tokens, 8) for tokens in (16, 32, 64)]
    products += [wide(tokens, 4) for tokens in (16, 32, 64)]
    products += [wide(16, out_features=8192, in_features=2048)]
    products += [wide(tokens, 8, twin=True) for tokens in (16, 32, 64)]
    for product in products:
        tried = functools.partial(_candidates_in_tf32, product)
        # Settings of their own have the twins of a quantized weight on the oldest GPU alone.
        archs = (80,) if product.bits and product.twin else tuple(MACHINES)
        yield Call(f"{product} in tf32", in_tf32(product.run), tried, archs)


@calls_of
def effective_weight() -> Iterator[Call]:
    """Of a weight in each form, and of the delta alone. The number of rows decides nothing, and
    torch multiplies by what is written: few.
    """
    some = functools.partial(Product, tokens=200, out_features=16)
    products = [some(dtype, bits=bits) for dtype in DTYPES.values() for bits in (0, None)]
    for bits in (8, 4):
        products += [some(torch.bfloat16, bits=bits, group=group) for group in (None, 128)]
    products += [some(torch.bfloat16, bits=None, twin=True), some(torch.bfloat16, in_features=7)]
    products += [some(torch.bfloat16, bits=4, in_features=columns) for columns in (384, 896)]
    for product in products:
        yield Call(str(product), product.run, lambda machine: RowLaunch.candidates())


@calls_of
def topk_salience() -> Iterator[Call]:
    """Many entries and few, ranked together and apart; scores that are signed and not, of one
    operand and of both; few, some and many entries of a chunk that are set aside.
    """

    def run(
        dtype: torch.dtype,
        metric: str,
        rows: int,
        matrices: int,
        together: bool,
        density: float = 0.005,
        aligned: bool = True,
    ) -> None:
        sizes = rows * 4096
        flat = [torch.empty(sizes + 1, dtype=dtype)[not aligned :] for _ in range(matrices)]
        weights = [one[:sizes].view(rows, 4096) for one in flat]
        k = int(rows * 4096 * density)
        ks = [k * matrices] if together else [k] * matrices
        topk_salience_host(weights, weights, ks, together, metric)

    for name, metric, rows, matrices, together in (
        ("bf16", "snip", 1 << 15, 4, True),
        ("fp32", "force", 256, 2, False),
    ):
        call = functools.partial(run, DTYPES[name], metric, rows, matrices, together)
        how = "together" if together else "apart"
        yield Call(
            f"{name}, {metric}, {matrices} of {rows} x 4096 {how}",
            call,
            lambda machine: itertools.chain(
                *(SampleLaunch.candidates(), ChunkLaunch.candidates()),
                *(DigitLaunch.candidates(), RunLaunch.candidates()),
            ),
        )
    # More entries of a chunk are set aside, which the two kernels that go through them see alone.
    for density in (0.05, 0.3):
        many = functools.partial(run, torch.bfloat16, "snip", 1 << 15, 4, True, density)
        yield Call(f"bf16, snip, {density:.0%} of 4 of {1 << 15} x 4096 together", many)
    for name, metric, rows, together in (
        ("fp16", "raw", 2048, False),
        ("bf16", "gradient", 2048, True),
        ("fp32", "magnitude", 256, True),
    ):
        aligned = name != "fp16"
        other = functools.partial(run, DTYPES[name], metric, rows, 2, together, aligned=aligned)
        how = "together" if together else "apart"
        where = "" if aligned else ", odd addresses"
        yield Call(f"{name}, {metric}, 2 of {rows} x 4096 {how}{where}", other, **ONE_GPU)
