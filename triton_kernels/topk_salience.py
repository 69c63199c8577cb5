"""`topk_salience` in Triton: radix select over scores that exist in registers alone.

One call serves any number of matrices with the same launches. The quick way:

    _sample    some thousand keys of each segment (what is ranked together) give a bound that leaves
               clearly more than k entries at or above it
    _collect   the one read of all data: entries whose key reaches the bound are set aside
    _digits    four times: the k-th largest of them, by histograms of 8 bits
    _count     how many each chunk keeps, and how many equal the k-th; torch sums them up
    _write     the indices, in order

The host reads once, at the end. Where it reads that a bound has left too few entries, or more than
there is room for (all scores equal, say), `_digits`, `_count` and `_write` run again over the data
themselves, which are then read six times more: exact whatever the data are.

Bytes, for N entries with operands of b bytes: b N; 8 bytes written and 26 read for each of the c N
entries set aside; 8 k of indices. c = (s + 6 sqrt(s) + 8) / S where s = k S / N of S samples are
expected to be selected. Memory: 8 bytes for each entry that there is room for, see
`_rank_and_capacity`. Operations: 10 an entry, where a histogram of 8 bits of each would be 60.

Arithmetic for an H200 (4.3 TB/s, 30 T operations/s), |w g| in bf16, 0.5 %: all linear layers of
Llama-3-8B (7.0 G entries, S = 8192, c = 1.1 %) are read in 6.5 ms, what is set aside in 0.6 ms, in
1.0 GB. A matrix of 4096 x 4096 (S = 4096, c = 1.4 %) is read in 16 us, and the rest takes 2 us and
the latency of its 8 launches; what bounds it is the host, which takes 10 to 20 us for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._topk_keys import (
    BINS,
    LEVELS,
    MATRIX,
    NONE,
    SEGMENT,
    STATE,
    chunk_bits,
    chunk_pointers,
    ordered,
    score_bits,
    some_bits,
    unsigned,
)
from ._topk_select import DigitLaunch, RunLaunch, select
from .launch import Launch, Machine, is_recording, launch, machine

# What `METRIC` is in the kernels.
_METRICS = {"magnitude": 0, "gradient": 1, "snip": 2, "taylor_fo": 2, "force": 3, "raw": 4}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class SampleLaunch(Launch):
    """`samples` of a segment, held by one program."""

    num_warps: int = 16
    num_stages: int = 1
    samples: int = 4096

    @property
    def is_valid(self) -> bool:
        """Whether a thread has registers for its samples: each has a matrix, a place, an address
        and the bounds of a search, in eight registers or so.
        """
        of_thread = self.samples // (32 * self.num_warps)
        return of_thread >= 1 and 8 * of_thread <= 65536 // (32 * self.num_warps)

    @classmethod
    def candidates(cls) -> Iterator[SampleLaunch]:
        """All that is worth trying."""
        for samples in (2048, 4096, 8192):
            for num_warps in (8, 16, 32):
                settings = cls(num_warps, 1, samples)
                if settings.is_valid:
                    yield settings

    @classmethod
    def default(cls, total: int) -> SampleLaunch:
        """A multiprocessor fetches about one sector a nanosecond, so 4096 samples of two operands
        take it 8 us. Where everything takes a millisecond, twice as many pay: they set fewer
        entries aside (1.1 % in place of 1.4 % for k of 0.5 %).
        """
        return cls(samples=8192 if total >= 1 << 29 else 4096)


@dataclass(frozen=True)
class ChunkLaunch(Launch):
    """Of the kernels that read the data: `chunk` entries of a matrix a step; of those set aside,
    `groups` of 16 bytes a step.
    """

    num_stages: int = 1
    chunk: int = 4096
    groups: int = 64

    @property
    def is_valid(self) -> bool:
        """Whether a thread has 8 to 32 entries: 16 bytes of them at a time, and registers for all.
        Places in a chunk are kept in 16 bits.
        """
        return 8 <= self.chunk // (32 * self.num_warps) <= 32 and self.chunk <= 1 << 15

    @classmethod
    def candidates(cls) -> Iterator[ChunkLaunch]:
        """All that is worth trying."""
        for chunk in (1024, 2048, 4096, 8192):
            for num_warps in (1, 2, 4, 8):
                settings = cls(num_warps, 1, chunk)
                if settings.is_valid:
                    yield settings

    @classmethod
    def default(cls, total: int, machine: Machine) -> ChunkLaunch:
        """32 entries a thread; 8 where a multiprocessor would get less than eight chunks."""
        return cls(chunk=4096 if total >= 8 * 4096 * machine.multiprocessors else 1024)


def topk_salience(
    weights: list[Tensor], grads: list[Tensor], ks: list[int], together: bool, metric: str
) -> tuple[Tensor, list[int], int]:
    """Select the highest scores of each matrix, or of all `together`.

    The host waits for the result once, or twice where the quick way has failed.

    Args:
        weights: contiguous, of one dtype and device; [] for a metric that reads none.
        grads: likewise; of the same shapes.
        ks: one for each matrix, at least 1 and at most its size; `together`: one for all.

    Returns:
        Indices within their matrix, int64 [sum of ks], sorted, matrix after matrix; how many each
        matrix has; and the first matrix with a NaN or infinite score, or -1: then the indices mean
        nothing.
    """
    call = Call(weights, grads, ks, together, metric)
    call.quickly()
    if is_recording():
        call.over_data()
        return call.indices, [0] * call.matrices, -1
    bad, counts, found = call.status()
    if any(bad):
        return call.indices, counts, bad.index(1)
    plans = zip(found, ks, call.capacities, strict=True)
    if not all(k <= number <= capacity for number, k, capacity in plans):
        call.over_data()
        _, counts, _ = call.status()
    return call.indices, counts, -1


def _rank_and_capacity(k: int, size: int, samples: int) -> tuple[int, int]:
    """Return which of the sampled keys, from the largest, is the bound, and for how many entries at
    or above it there is room.

    Of the k largest about s = k samples / size are sampled, with a standard deviation of sqrt(s) or
    less: six of them on, fewer than k entries lie above the bound about once in 1e9 calls. The room
    is for six standard deviations more.
    """
    if size <= samples:  # all are sampled
        return k, size
    expected = k * samples / size
    rank = math.ceil(expected + 6 * math.sqrt(expected) + 8)
    most = math.ceil(size * (rank + 6 * math.sqrt(rank) + 8) / samples)
    return rank, min(size, most)


class Call:
    """One call: its tables on the device, its buffers, and its launches."""

    def __init__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        ks: list[int],
        together: bool,
        metric: str,
    ) -> None:
        present = weights or grads
        self.device, self.together = present[0].device, together
        self.itemsize = present[0].element_size()
        here = machine(self.device)
        sizes = [t.numel() for t in present]
        self.matrices, self.segments = len(sizes), len(ks)
        total = sum(sizes)
        self.sample = SampleLaunch.default(total)
        self.reading = ChunkLaunch.default(total, here)
        chunks = [triton.cdiv(size, self.reading.chunk) for size in sizes]
        self.chunks = sum(chunks)
        segment_sizes = [total] if together else sizes
        plans = [
            _rank_and_capacity(k, size, self.sample.samples)
            for k, size in zip(ks, segment_sizes, strict=True)
        ]
        self.capacities = [capacity for _, capacity in plans]
        room = sum(self.capacities)
        self.digits = DigitLaunch.default()
        self.runs = RunLaunch.default(self.reading.chunk * room / (2 * total))
        # Programs of a segment: with work enough for each, and as many as fill the machine twice.
        most = max(1, 16 * here.multiprocessors // self.segments)
        self.parts = min(most, triton.cdiv(max(self.capacities), 2 * self.digits.block))
        segment_chunks = [self.chunks] if together else chunks
        self.data_parts = min(most, triton.cdiv(max(segment_chunks), 2))

        # int64 throughout, in one copy; the addresses stay valid for as long as the caller's
        # tensors, to which everything here is ordered by the stream.
        addresses = [[t.data_ptr() for t in of] or [0] * self.matrices for of in (weights, grads)]
        first_chunks = _before(chunks)
        matrices = [
            *(*addresses, sizes, first_chunks),
            _before(sizes) if together else [0] * self.matrices,
        ]
        segments = [
            *(ks, segment_sizes, [0] if together else first_chunks, segment_chunks),
            *([rank for rank, _ in plans], self.capacities, _before(self.capacities), _before(ks)),
        ]
        columns = [torch.tensor(table).t().flatten() for table in (matrices, segments)]
        tables = _to(self.device, torch.cat([*columns, torch.tensor(chunks)]))
        ends = (self.matrices * MATRIX.value, self.segments * SEGMENT.value, self.matrices)
        matrix_table, segment_table, chunk_counts = tables.split(ends)
        self.tables = {"matrices_ptr": matrix_table, "segments_ptr": segment_table}
        self.of_chunks = {
            "chunk_matrix_ptr": torch.repeat_interleave(
                torch.arange(self.matrices, dtype=torch.int32, device=self.device),
                chunk_counts,
                output_size=self.chunks,
            )
        }
        self.constants = {
            "TOGETHER": together,
            "METRIC": _METRICS[metric],
            "DTYPE": _TYPES[present[0].dtype],
            "ALIGNED": all(address % 16 == 0 for of in addresses for address in of),
            "CHUNK": self.reading.chunk,
        }
        self._allocate(sum(ks))

    def _allocate(self, k: int) -> None:
        new = {"device": self.device}
        told = 2 * self.matrices + self.segments
        parts = (told, self.segments * STATE.value, self.segments * LEVELS * BINS.value)
        # Zeroed by one fill: what the host reads, the boundaries found, the histograms.
        self.zeroed = torch.zeros(sum(parts), dtype=torch.int64, **new)
        self.told, self.state, self.histograms = self.zeroed.split(parts)
        self.bad, self.counts, self.found = self.told.split(
            (self.matrices, self.matrices, self.segments)
        )
        self.bounds = torch.empty(self.segments, dtype=torch.int32, **new)
        room = sum(self.capacities)
        self.groups = torch.empty(room, dtype=torch.int16, **new)
        self.keys = torch.empty(room, dtype=torch.int32, **new)
        self.places = torch.empty(room, dtype=torch.int16, **new)
        self.run_start = torch.empty(self.chunks, dtype=torch.int64, **new)
        self.run_length = torch.empty(self.chunks, dtype=torch.int32, **new)
        self.kept = torch.empty(2 * self.chunks, dtype=torch.int32, **new)
        self.indices = torch.empty(k, dtype=torch.int64, **new)

    def status(self) -> tuple[list[int], list[int], list[int]]:
        """Wait for the device; return the matrices' flags and counts, and how many entries each
        segment has at or above its bound.
        """
        told = self.told.tolist()
        return (
            told[: self.matrices],
            told[self.matrices : 2 * self.matrices],
            told[2 * self.matrices :],
        )

    def quickly(self) -> None:
        constants = {name: self.constants[name] for name in ("TOGETHER", "METRIC", "DTYPE")}
        launch(
            _sample,
            (self.segments,),
            self.sample,
            **self.tables,
            bounds_ptr=self.bounds,
            matrices=self.matrices,
            steps=(self.matrices - 1).bit_length() if self.together else 0,
            **constants,
            SAMPLES=self.sample.samples,
        )
        launch(
            _collect,
            (self.chunks,),
            self.reading,
            **self.tables,
            **self.of_chunks,
            bounds_ptr=self.bounds,
            found_ptr=self.found,
            bad_ptr=self.bad,
            groups_ptr=self.groups,
            keys_ptr=self.keys,
            places_ptr=self.places,
            run_start_ptr=self.run_start,
            run_length_ptr=self.run_length,
            **self.constants,
            VECTOR=16 // self.itemsize,
            BLOCK=self.reading.groups,
        )
        select(self, data=False)

    def over_data(self) -> None:
        self.counts.zero_()
        self.histograms.zero_()
        select(self, data=True)


def _before(numbers: list[int]) -> list[int]:
    """For each number the sum of those before it."""
    sums, total = [], 0
    for number in numbers:
        sums.append(total)
        total += number
    return sums


def _to(device: torch.device, table: Tensor) -> Tensor:
    if device.type == "cuda":
        # From pinned memory the copy waits for nothing, and nothing waits for it but the stream.
        return table.pin_memory().to(device, non_blocking=True)
    return table


@triton.jit
def _sample(
    matrices_ptr,
    segments_ptr,
    bounds_ptr,
    matrices, steps,
    TOGETHER: tl.constexpr, METRIC: tl.constexpr, DTYPE: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """`bounds[s]`: the key of the rank asked for among some of segment s; the lowest of all where
    so many are not sampled.

    One entry, at a place that is as good as random, is taken out of each of SAMPLES equal parts; a
    segment of no more entries is taken whole. `steps` halvings find the matrix of a place.

    Grid: segments.
    """
    segment = tl.program_id(0)
    segment_row = segments_ptr + segment * SEGMENT
    size = tl.load(segment_row + 1)
    rank = tl.load(segment_row + 4)
    j = tl.arange(0, SAMPLES)
    mixed = j.to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA6B
    mixed = mixed ^ (mixed >> 13)
    start = j.to(tl.int64) * size // SAMPLES
    width = (j + 1).to(tl.int64) * size // SAMPLES - start
    at = start + ((mixed.to(tl.int64) * width) >> 32)
    if size <= SAMPLES:
        at = j.to(tl.int64)
    exists = at < size
    if TOGETHER:
        low = tl.zeros((SAMPLES,), tl.int32)
        high = low + (matrices - 1)
        for _ in range(steps):
            middle = (low + high + 1) // 2
            after = tl.load(matrices_ptr + middle * MATRIX + 4) <= at
            low = tl.where(after, middle, low)
            high = tl.where(after, high, middle - 1)
        matrix_rows = matrices_ptr + low * MATRIX
        at -= tl.load(matrix_rows + 4)
    else:
        matrix_rows = matrices_ptr + segment * MATRIX + tl.zeros((SAMPLES,), tl.int32)
    w_ptrs = tl.load(matrix_rows + (1 if METRIC == 1 or METRIC == 4 else 0))
    w = tl.load(w_ptrs.to(tl.pointer_type(DTYPE)) + at, mask=exists, other=0.0)
    g = w
    if METRIC == 2 or METRIC == 3:
        g_ptrs = tl.load(matrix_rows + 1)
        g = tl.load(g_ptrs.to(tl.pointer_type(DTYPE)) + at, mask=exists, other=0.0)
    key = unsigned(tl.where(exists, ordered(score_bits(w, g, METRIC), METRIC), NONE))
    # Bit by bit, the largest bound with `rank` keys at or above it.
    bound = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = bound | bit
        bound = tl.where(tl.sum((key >= trial).to(tl.int32)) >= rank, trial, bound)
        bit = bit >> 1
    bound = tl.maximum(bound.to(tl.int32, bitcast=True) ^ (-2147483648), -2147483647)
    tl.store(bounds_ptr + segment, bound)


@triton.jit
def _collect(
    matrices_ptr,
    segments_ptr,
    chunk_matrix_ptr,
    bounds_ptr,
    found_ptr,
    bad_ptr,
    groups_ptr,
    keys_ptr,
    places_ptr,
    run_start_ptr,
    run_length_ptr,
    TOGETHER: tl.constexpr, METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set aside the entries of a chunk whose key reaches the bound, in order, as one run.

    About one entry in a hundred does, so what costs more than a comparison is done for few: groups
    of VECTOR neighbours, 16 bytes that one thread reads, are listed where one of theirs does, and
    entries are placed in these groups alone, read again out of the L1 cache.

    Where runs lie depends on who comes first, but nothing else does. A run past the capacity is
    counted in `found` and not written.

    Grid: chunks.
    """
    GROUPS: tl.constexpr = CHUNK // VECTOR
    chunk = tl.program_id(0)
    matrix = tl.load(chunk_matrix_ptr + chunk)
    segment = 0 if TOGETHER else matrix
    bound = tl.load(bounds_ptr + segment)
    w_ptr, g_ptr, size = chunk_pointers(
        matrices_ptr + matrix * MATRIX, chunk, METRIC, DTYPE, ALIGNED, CHUNK
    )
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, VECTOR)
    i = group[:, None] * VECTOR + member[None, :]
    bits = chunk_bits(w_ptr, g_ptr, size, i, METRIC, CHUNK)
    if tl.max(tl.max(bits & 0x7FFFFFFF, 1), 0) >= 0x7F800000:
        tl.store(bad_ptr + matrix, 1)
    key = ordered(bits, METRIC)
    if size < CHUNK:
        key = tl.where(i < size, key, NONE)
    counts = tl.sum((key >= bound).to(tl.int32), 1)
    number = tl.sum(counts)
    start = tl.zeros((), tl.int64)
    if number > 0:
        segment_row = segments_ptr + segment * SEGMENT
        start = tl.atomic_add(found_ptr + segment, number.to(tl.int64), sem="relaxed")
        if start + number <= tl.load(segment_row + 5):
            start += tl.load(segment_row + 6)
            listed = counts > 0
            rank = tl.cumsum(listed.to(tl.int32), 0)
            tl.store(groups_ptr + start + rank - 1, group.to(tl.int16), mask=listed)
            tl.debug_barrier()  # the list is read by other threads than have written it
            length = tl.sum(listed.to(tl.int32))
            placed = tl.zeros((), tl.int32)
            for at in range(0, length, BLOCK):
                e = at + tl.arange(0, BLOCK)
                near = tl.load(groups_ptr + start + e, mask=e < length, other=GROUPS).to(tl.int32)
                place = (near[:, None] * VECTOR + member[None, :]).reshape(BLOCK * VECTOR)
                exists = place < size
                near_key = ordered(some_bits(w_ptr, g_ptr, place, exists, METRIC), METRIC)
                reaches = exists & (near_key >= bound)
                to = placed + tl.cumsum(reaches.to(tl.int32), 0) - 1
                tl.store(keys_ptr + start + to, near_key, mask=reaches)
                tl.store(places_ptr + start + to, place.to(tl.int16), mask=reaches)
                placed += tl.sum(reaches.to(tl.int32))
        else:
            number = 0
    tl.store(run_start_ptr + chunk, start)
    tl.store(run_length_ptr + chunk, number)
