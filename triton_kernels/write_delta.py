"""`write_delta` in Triton: the deltas of all weights of a model in one launch.

Bytes of an entry, for weights of s bytes and indices of i: i + s + 4 are read in order, and the
32-byte sector of the weight that holds the entry is read and written, at most once an entry.
Llama-3-8B, all linear layers (7.0 G weights), 0.5 %, bf16: 35 M entries, 0.35 GB in order and
2.2 GB of sectors at most, 0.6 ms at 4.3 TB/s (arithmetic for an H200). One addition an entry.

The tensors are found by a table of addresses on the device, which is kept from call to call: a
training step writes the same tensors each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETING, Launch, Machine, launch, machine

# Tables kept: of the call that writes and the one that takes out, for some models and streams.
TABLES = 16

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


@dataclass(frozen=True)
class WriteLaunch(Launch):
    """`block`: entries of a program."""

    num_stages: int = 1
    block: int = 1024

    @property
    def is_valid(self) -> bool:
        """Whether a thread has one to eight entries, whose index, base and value it holds at a time
        in at most four registers each.
        """
        return 1 <= self.block // (32 * self.num_warps) <= 8

    @classmethod
    def candidates(cls) -> Iterator[WriteLaunch]:
        """All that is worth trying."""
        for block in (128, 256, 512, 1024, 2048):
            for num_warps in (1, 2, 4, 8):
                settings = cls(num_warps, 1, block)
                if settings.is_valid:
                    yield settings

    @classmethod
    def default(cls, entries: int, machine: Machine) -> WriteLaunch:
        """Eight entries a thread, so that 24 reads of it are under way at a time; one where that
        leaves a multiprocessor less than four programs.
        """
        block = 1024 if entries >= 4 * 1024 * machine.multiprocessors else 128
        return cls(block=block)


def write_delta(
    weights: list[Tensor], indices: list[Tensor], base: list[Tensor], values: list[Tensor]
) -> None:
    """Write `weights[i].view(-1)[indices[i]] = base[i] + values[i]`, or `base[i]` where `values` is
    empty. One launch, or one for int32 and one for int64 indices.

    Args:
        weights: contiguous, of one dtype and device.
        indices: int32 or int64, contiguous, each index once.
        base: as many, of weights' dtype, contiguous.
        values: as many, float32 (float64 for float64 weights), contiguous.
    """
    for dtype in (torch.int32, torch.int64):
        chosen = [i for i, index in enumerate(indices) if index.dtype == dtype]
        if chosen:
            _write_all(
                [weights[i] for i in chosen],
                [indices[i] for i in chosen],
                [base[i] for i in chosen],
                [values[i] for i in chosen] if values else [],
            )


def _write_all(
    weights: list[Tensor], indices: list[Tensor], base: list[Tensor], values: list[Tensor]
) -> None:
    weight, index = weights[0], indices[0]
    sizes = tuple(i.numel() for i in indices)
    settings = WriteLaunch.default(sum(sizes), machine(weight.device))
    operands = (weights, indices, base, values or base)  # without values their column is not read
    addresses = tuple(tuple(t.data_ptr() for t in of) for of in operands)
    steps = (0, *(of[0].element_size() for of in operands[1:]))
    table = _table(addresses, sizes, steps, settings.block, weight.device)
    launch(
        _write,
        (table.shape[0],),
        settings,
        table_ptr=table,
        DTYPE=_TYPES[weight.dtype],
        INDEX=_TYPES[index.dtype],
        ACCUMULATOR=_TYPES[values[0].dtype] if values else None,
        BLOCK=settings.block,
    )


_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
# Those that CUDA graphs read, by address: a replay finds them where they were.
_captured: dict[int, Tensor] = {}


def _table(
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    block: int,
    device: torch.device,
) -> Tensor:
    """Return the table `[programs, 5]` on the device: for each program the addresses of its weight
    and of its first index, base and value, and how many entries there are from there on.

    A kept table cannot be stale: all that it holds is made from its key. The stream is part of the
    key, because the copy to the device, the launches that read it and the reuse of its memory once
    it is dropped happen in the order of one stream. A CUDA graph, whose stream is its own, takes a
    table that any stream has made before; it is then kept for good.
    """
    content = (addresses, sizes, steps, block, device)
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _for_capture(content)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (*content, stream)
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = _to(device, _build(addresses, sizes, steps, block))
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    return table


def _for_capture(content: tuple[object, ...]) -> Tensor:
    for key, table in reversed(_tables.items()):
        if key[:-1] == content:
            _captured[table.data_ptr()] = table
            return table
    raise RuntimeError(
        "write_delta must have run once with these very tensors before a CUDA graph captures it: "
        "the table of their addresses cannot be copied to the device during the capture"
    )


def _build(
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    block: int,
) -> Tensor:
    host = torch.device("cpu")  # whatever the default device is
    starts = torch.tensor([*addresses, sizes], device=host).t()
    programs = torch.tensor([triton.cdiv(size, block) for size in sizes], device=host)
    before = (programs.cumsum(0) - programs).repeat_interleave(programs)
    first = (torch.arange(before.numel(), device=host) - before) * block
    strides = torch.tensor([*steps, -1], device=host)
    return starts.repeat_interleave(programs, 0) + first[:, None] * strides


def _to(device: torch.device, table: Tensor) -> Tensor:
    if device.type == "cuda":
        # From pinned memory the copy waits for nothing, and nothing waits for it but the stream.
        return table.pin_memory().to(device, non_blocking=True)
    return table


@triton.jit
def _write(
    table_ptr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`weight[index[e]] = base[e] + value[e]`, rounded once; `base[e]` as it is without values.

    | argument    | shape               | |
    |-------------|---------------------|-|
    | table_ptr   | int64 [programs, 5] | addresses of weight, index, base, value; entries left |
    | DTYPE       |                     | of weight and base |
    | INDEX       |                     | int32 or int64 |
    | ACCUMULATOR |                     | of values and of the sum; None: there are no values |

    Grid: programs. Neighbouring threads take neighbouring entries: sorted as they are, those that
    share a sector are then written by one instruction. Wider loads would give a thread neighbours
    and part them; a value of a layer within one flat buffer is not aligned to 16 bytes either.
    """
    row = table_ptr + tl.program_id(0).to(tl.int64) * 5
    weight_ptr = tl.load(row).to(tl.pointer_type(DTYPE))
    index_ptr = tl.load(row + 1).to(tl.pointer_type(INDEX))
    base_ptr = tl.load(row + 2).to(tl.pointer_type(DTYPE))
    e = tl.arange(0, BLOCK)
    mask = e < tl.load(row + 4)
    index = tl.load(index_ptr + e, mask=mask, other=0)
    total = tl.load(base_ptr + e, mask=mask, other=0.0)
    if ACCUMULATOR is not None:
        value_ptr = tl.load(row + 3).to(tl.pointer_type(ACCUMULATOR))
        value = tl.load(value_ptr + e, mask=mask, other=0.0)
        total = _rounded(total.to(ACCUMULATOR) + value, DTYPE)
    tl.store(weight_ptr + index, total, mask=mask)


@triton.jit
def _rounded(total, DTYPE: tl.constexpr):
    """`total` in DTYPE, to nearest, ties to even."""
    if INTERPRETING and tl.bfloat16 == DTYPE:  # the interpreter cuts the low half off
        bits = total.to(tl.uint32, bitcast=True)
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        high = tl.where(total == total, high, 0x7FC0)
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return total.to(DTYPE)
