"""Representative calls of every operation, whose launches `gpu_offline.py` compiles.

A call runs its operation's host function on tensors that hold nothing, while launches are recorded:
`torch.empty` reserves addresses and no memory. One function an operation, named as its file in
`triton_kernels/`, yields the calls: the dtypes, and every case in which the host function chooses
other settings or another kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from speft_kernels.triton_kernels.keep_columns import keep_columns as keep_columns_host
from speft_kernels.triton_kernels.launch import Launch, Machine
from speft_kernels.triton_kernels.write_delta import WriteLaunch
from speft_kernels.triton_kernels.write_delta import write_delta as write_delta_host


def _none(machine: Machine) -> Iterable[Launch]:
    return ()


@dataclass(frozen=True)
class Call:
    """A call under a name that tells its dtype and its case.

    Attributes:
        candidates: the settings that a tuning run would try in place of the default, for a machine.
    """

    name: str
    run: Callable[[], object]
    candidates: Callable[[Machine], Iterable[Launch]] = _none


CALLS: dict[str, Callable[[], Iterator[Call]]] = {}


def calls_of(function: Callable[[], Iterator[Call]]) -> Callable[[], Iterator[Call]]:
    CALLS[function.__name__] = function
    return function


SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32, **SIXTEEN_BITS}


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
        yield Call(name, lambda x=x, kept=kept: keep_columns_host(x, columns, kept))


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

    cases = [("bf16", index, size) for index in ("int32", "int64") for size in (84_000, 300_000)]
    cases += [(name, "int32", 300_000) for name in ("fp16", "fp32", "fp64")]
    for name, index, entries in cases:
        dtype = {**DTYPES, "fp64": torch.float64}[name]
        for values in (True, False):
            yield Call(
                f"{name}, {index}, {entries} x 3, {'base + values' if values else 'base'}",
                functools.partial(run, dtype, getattr(torch, index), entries, values),
                lambda machine: WriteLaunch.candidates(),
            )
