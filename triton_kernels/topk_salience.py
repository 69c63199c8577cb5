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
Llama-3-8B (7.0 G entries, S = 16384, c = 0.9 %) are read in 6.5 ms, what is set aside in 0.5 ms, in
0.8 GB. A matrix of 4096 x 4096 (S = 4096, c = 1.4 %) is read in 16 us, and the rest takes 2 us and
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

from .launch import Launch, Machine, is_recording, launch, machine

# What `METRIC` is in the kernels.
_METRICS = {"magnitude": 0, "gradient": 1, "snip": 2, "taylor_fo": 2, "force": 3, "raw": 4}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_LEVELS = 4  # digits of a key
_BINS = tl.constexpr(256)
# Columns of the tables of matrices and of segments, and of what the kernels tell of a segment.
_MATRIX = tl.constexpr(5)
_SEGMENT = tl.constexpr(8)
_STATE = tl.constexpr(2 * (4 + 1))
# No finite score has the lowest key: it stands for "no entry".
_NONE = tl.constexpr(-(2**31))


@dataclass(frozen=True)
class SampleLaunch(Launch):
    """`samples` of a segment, held by one program."""

    num_warps: int = 16
    num_stages: int = 1
    samples: int = 4096

    @property
    def is_valid(self) -> bool:
        """Whether a thread's samples, with an address of two registers each, leave it room."""
        return 1 <= self.samples // (32 * self.num_warps) <= 32

    @classmethod
    def candidates(cls) -> Iterator[SampleLaunch]:
        """All that is worth trying."""
        for samples in (2048, 4096, 8192, 16384):
            for num_warps in (8, 16, 32):
                settings = cls(num_warps, 1, samples)
                if settings.is_valid:
                    yield settings

    @classmethod
    def default(cls, total: int) -> SampleLaunch:
        """A multiprocessor fetches about one sector a nanosecond, so 4096 samples of two operands
        take it 8 us. Where everything takes a millisecond, four times as many pay: they set fewer
        entries aside (0.9 % in place of 1.3 % for k of 0.5 %).
        """
        return cls(samples=16384 if total >= 1 << 29 else 4096)


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


@dataclass(frozen=True)
class DigitLaunch(Launch):
    """Of the histograms over what was set aside: `block` keys a step."""

    num_stages: int = 1
    block: int = 2048

    @property
    def is_valid(self) -> bool:
        """Whether a thread has 4 to 16 keys, each of which it counts in 60 instructions or so."""
        return 4 <= self.block // (32 * self.num_warps) <= 16

    @classmethod
    def candidates(cls) -> Iterator[DigitLaunch]:
        """All that is worth trying."""
        for block in (512, 1024, 2048, 4096):
            for num_warps in (2, 4, 8):
                settings = cls(num_warps, 1, block)
                if settings.is_valid:
                    yield settings

    @classmethod
    def default(cls) -> DigitLaunch:
        """16 keys a thread: reads enough under way, and few steps."""
        return cls()


@dataclass(frozen=True)
class RunLaunch(Launch):
    """Of the kernels that go through what a chunk has set aside, `block` entries a step."""

    num_warps: int = 1
    num_stages: int = 1
    block: int = 128

    @property
    def is_valid(self) -> bool:
        """Whether a thread has 1 to 8 entries, of which it holds the key and the place."""
        return 1 <= self.block // (32 * self.num_warps) <= 8

    @classmethod
    def candidates(cls) -> Iterator[RunLaunch]:
        """All that is worth trying."""
        for block in (64, 128, 256, 512, 1024):
            for num_warps in (1, 2, 4):
                settings = cls(num_warps, 1, block)
                if settings.is_valid:
                    yield settings

    @classmethod
    def default(cls, expected: float) -> RunLaunch:
        """The entries expected of a chunk in one step, or in some where they are many: of 4096
        entries about 40 are set aside for k of 0.5 %.
        """
        if expected <= 128:
            return cls()
        return cls(2, 1, 256) if expected <= 512 else cls(4, 1, 1024)


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
    selection = _Selection(weights, grads, ks, together, metric)
    selection.quickly()
    if is_recording():
        selection.over_data()
        return selection.indices, [0] * selection.matrices, -1
    bad, counts, found = selection.status()
    if any(bad):
        return selection.indices, counts, bad.index(1)
    plans = zip(found, ks, selection.capacities, strict=True)
    if not all(k <= number <= capacity for number, k, capacity in plans):
        selection.over_data()
        _, counts, _ = selection.status()
    return selection.indices, counts, -1


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


class _Selection:
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
        ends = (self.matrices * _MATRIX.value, self.segments * _SEGMENT.value, self.matrices)
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
        parts = (told, self.segments * _STATE.value, self.segments * _LEVELS * _BINS.value)
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
        self._select(self.parts, self.digits, self.digits.block, self.runs, self.runs.block, False)

    def over_data(self) -> None:
        self.counts.zero_()
        self.histograms.zero_()
        reading = self.reading
        self._select(self.data_parts, reading, reading.chunk, reading, reading.chunk, True)

    def _select(
        self, parts: int, digits: Launch, block: int, runs: Launch, run_block: int, data: bool
    ) -> None:
        shared = {
            **self.tables,
            **self.of_chunks,
            "keys_ptr": self.keys,
            "state_ptr": self.state,
            "histograms_ptr": self.histograms,
            **self.constants,
        }
        for level in range(_LEVELS):
            launch(
                _digits,
                (self.segments, parts),
                digits,
                **shared,
                found_ptr=self.found,
                DATA=data,
                LEVEL=level,
                BLOCK=block,
            )
        of_runs = {
            "run_start_ptr": self.run_start,
            "run_length_ptr": self.run_length,
            "kept_ptr": self.kept,
            "chunks": self.chunks,
            "DATA": data,
            "BLOCK": run_block,
        }
        launch(_count, (self.chunks,), runs, **shared, **of_runs)
        shared.pop("histograms_ptr")
        of_runs["kept_ptr"] = self.kept.cumsum(0)
        launch(
            _write,
            (self.chunks,),
            runs,
            **shared,
            **of_runs,
            places_ptr=self.places,
            indices_ptr=self.indices,
            counts_ptr=self.counts,
        )


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


# The kernels' tables and buffers, int64 where no other type is given:
#
# | matrices_ptr     | [n, 5]        | address of w, of g (0 where it is not read), entries, first
# |                  |               | chunk, entries before it in its segment
# | segments_ptr     | [s, 8]        | k, entries, first chunk, chunks, rank of the bound in the
# |                  |               | sample, capacity, first place in keys, first place in indices
# | chunk_matrix_ptr | int32 [c]     | matrix of each chunk
# | bounds_ptr       | int32 [s]     | the key at and above which entries are set aside
# | found_ptr        | [s]           | how many those are
# | bad_ptr          | [n]           | 1 where a score is NaN or infinite
# | groups_ptr       | int16         | groups of a chunk with an entry that is set aside, at its run
# | keys_ptr         | int32         | keys set aside, segment after segment
# | places_ptr       | int16         | beside each its place in its chunk
# | run_start_ptr    | [c]           | where what a chunk has set aside begins
# | run_length_ptr   | int32 [c]     | how many those are
# | histograms_ptr   | [s, 4, 256]   | of each digit, over keys whose digits before are the k-th's
# | state_ptr        | [s, 5, 2]     | of each level the digits known of the k-th largest key, and
# |                  |               | how many of the keys with these digits are selected
#
# A key is the score's float32 bits, mapped to int32 of the same order; digits are those of the key
# with its sign bit turned, as uint32. Segment and matrix are one unless TOGETHER, when there is one
# segment.


@triton.jit
def _wide(x):
    """float32 of the same value. bfloat16 by its bits: the interpreter mistakes its subnormals."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _key(bits, METRIC: tl.constexpr):
    """The key of a score or of its negative, given as its bits. Zeros of both signs have one."""
    if METRIC <= 2:
        return bits & 0x7FFFFFFF
    if METRIC == 3:
        bits = bits ^ (-2147483648)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def _bits(w, g, METRIC: tl.constexpr):
    """The bits of what the score is made of: w, g or their product."""
    if METRIC == 0:
        score = _wide(w)
    elif METRIC == 2 or METRIC == 3:
        score = _wide(w) * _wide(g)
    else:
        score = _wide(g)
    return score.to(tl.int32, bitcast=True)


@triton.jit
def _unsigned(key):
    return (key ^ (-2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _pointer(address_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _chunk_pointers(
    matrix_row, chunk,
    METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Where a chunk of w and of g begins, and how many entries it has.

    Where a metric reads one operand, both are that one.
    """
    first = (chunk - tl.load(matrix_row + 3)) * CHUNK
    size = tl.minimum(tl.load(matrix_row + 2) - first, CHUNK).to(tl.int32)
    w_ptr = _pointer(matrix_row + (1 if METRIC == 1 or METRIC == 4 else 0), DTYPE, ALIGNED) + first
    g_ptr = _pointer(matrix_row + (0 if METRIC == 0 else 1), DTYPE, ALIGNED) + first
    return w_ptr, g_ptr, size


@triton.jit
def _some_bits(w_ptr, g_ptr, i, exists, METRIC: tl.constexpr):
    w = tl.load(w_ptr + i, mask=exists, other=0.0)
    g = tl.load(g_ptr + i, mask=exists, other=0.0) if METRIC == 2 or METRIC == 3 else w
    return _bits(w, g, METRIC)


@triton.jit
def _chunk_bits(w_ptr, g_ptr, size, i, METRIC: tl.constexpr, CHUNK: tl.constexpr):
    """The bits of a chunk's scores; 0 where there is no entry."""
    if size == CHUNK:  # a mask would make loads narrow
        w = tl.load(w_ptr + i)
        g = tl.load(g_ptr + i) if METRIC == 2 or METRIC == 3 else w
        bits = _bits(w, g, METRIC)
    else:
        bits = _some_bits(w_ptr, g_ptr, i, i < size, METRIC)
    return bits


@triton.jit
def _chunk_keys(
    matrices_ptr, chunk_matrix_ptr, chunk,
    METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The keys of a chunk, and which of its entries exist."""
    w_ptr, g_ptr, size = _chunk_pointers(
        matrices_ptr + tl.load(chunk_matrix_ptr + chunk) * _MATRIX,
        chunk, METRIC, DTYPE, ALIGNED, CHUNK,
    )  # fmt: skip
    i = tl.arange(0, CHUNK)
    return _key(_chunk_bits(w_ptr, g_ptr, size, i, METRIC, CHUNK), METRIC), i < size


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
    segment_row = segments_ptr + segment * _SEGMENT
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
            after = tl.load(matrices_ptr + middle * _MATRIX + 4) <= at
            low = tl.where(after, middle, low)
            high = tl.where(after, high, middle - 1)
        matrix_rows = matrices_ptr + low * _MATRIX
        at -= tl.load(matrix_rows + 4)
    else:
        matrix_rows = matrices_ptr + segment * _MATRIX + tl.zeros((SAMPLES,), tl.int32)
    w_ptrs = tl.load(matrix_rows + (1 if METRIC == 1 or METRIC == 4 else 0))
    w = tl.load(w_ptrs.to(tl.pointer_type(DTYPE)) + at, mask=exists, other=0.0)
    g = w
    if METRIC == 2 or METRIC == 3:
        g_ptrs = tl.load(matrix_rows + 1)
        g = tl.load(g_ptrs.to(tl.pointer_type(DTYPE)) + at, mask=exists, other=0.0)
    key = _unsigned(tl.where(exists, _key(_bits(w, g, METRIC), METRIC), _NONE))
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
    w_ptr, g_ptr, size = _chunk_pointers(
        matrices_ptr + matrix * _MATRIX, chunk, METRIC, DTYPE, ALIGNED, CHUNK
    )
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, VECTOR)
    i = group[:, None] * VECTOR + member[None, :]
    bits = _chunk_bits(w_ptr, g_ptr, size, i, METRIC, CHUNK)
    if tl.max(tl.max(bits & 0x7FFFFFFF, 1), 0) >= 0x7F800000:
        tl.store(bad_ptr + matrix, 1)
    key = _key(bits, METRIC)
    if size < CHUNK:
        key = tl.where(i < size, key, _NONE)
    counts = tl.sum((key >= bound).to(tl.int32), 1)
    number = tl.sum(counts)
    start = tl.zeros((), tl.int64)
    if number > 0:
        segment_row = segments_ptr + segment * _SEGMENT
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
                near_key = _key(_some_bits(w_ptr, g_ptr, place, exists, METRIC), METRIC)
                reaches = exists & (near_key >= bound)
                to = placed + tl.cumsum(reaches.to(tl.int32), 0) - 1
                tl.store(keys_ptr + start + to, near_key, mask=reaches)
                tl.store(places_ptr + start + to, place.to(tl.int16), mask=reaches)
                placed += tl.sum(reaches.to(tl.int32))
        else:
            number = 0
    tl.store(run_start_ptr + chunk, start)
    tl.store(run_length_ptr + chunk, number)


@triton.jit
def _boundary(histogram_ptr, digits, rank):
    """Add a digit, by its histogram, to the first ones of the key of `rank`: the largest digit with
    `rank` keys at or above it. Return them, and the rank among the keys that have them too.
    """
    bins = tl.arange(0, _BINS)
    counts = tl.load(histogram_ptr + bins)
    above = tl.cumsum(counts, 0, reverse=True)
    digit = tl.maximum(tl.sum((above >= rank).to(tl.int32)) - 1, 0)
    above = tl.sum(tl.where(bins == digit, above - counts, 0))
    return digits * _BINS + digit, rank - above


@triton.jit
def _digits(
    matrices_ptr,
    segments_ptr,
    chunk_matrix_ptr,
    keys_ptr,
    state_ptr,
    histograms_ptr,
    found_ptr,
    TOGETHER: tl.constexpr, METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    DATA: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the digit LEVEL over those keys of a segment whose digits before are the k-th key's;
    over what was set aside, or over DATA.

    Grid: segments, parts of them.
    """
    segment = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    segment_row = segments_ptr + segment * _SEGMENT
    digits = tl.zeros((), tl.int64)
    rank = tl.load(segment_row)
    state = state_ptr + segment * _STATE + LEVEL * 2
    row = histograms_ptr + (segment.to(tl.int64) * 4 + LEVEL) * _BINS
    if LEVEL > 0:
        digits, rank = _boundary(row - _BINS, tl.load(state - 2), tl.load(state - 1))
    if part == 0:
        tl.store(state, digits)
        tl.store(state + 1, rank)
    i = tl.arange(0, BLOCK)
    counts = tl.zeros((_BINS,), tl.int32)
    if DATA:
        first = tl.load(segment_row + 2)
        steps = tl.load(segment_row + 3)
    else:
        first = tl.load(segment_row + 6)
        entries = tl.minimum(tl.load(found_ptr + segment), tl.load(segment_row + 5))
        steps = (entries + BLOCK - 1) // BLOCK
    for step in range(part, steps, parts):  # int64, as `steps` is
        if DATA:
            key, counted = _chunk_keys(
                matrices_ptr, chunk_matrix_ptr, first + step, METRIC, DTYPE, ALIGNED, CHUNK
            )
        else:
            counted = i < entries - step * BLOCK
            key = tl.load(keys_ptr + first + step * BLOCK + i, mask=counted, other=0)
        key = _unsigned(key)
        if LEVEL > 0:
            counted = counted & ((key >> (32 - 8 * LEVEL)).to(tl.int64) == digits)
        digit = (key >> (24 - 8 * LEVEL)) & 0xFF
        counts += tl.histogram(digit.to(tl.int32), _BINS, mask=counted)
    to = row + tl.arange(0, _BINS)
    tl.atomic_add(to, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _run_keys(
    matrices_ptr, chunk_matrix_ptr, keys_ptr, chunk, start, length, at,
    METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    DATA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys of a chunk from place `at` on, of all its entries or of those set aside, as uint32."""
    if DATA:
        key, exists = _chunk_keys(
            matrices_ptr, chunk_matrix_ptr, chunk, METRIC, DTYPE, ALIGNED, CHUNK
        )
    else:
        i = at + tl.arange(0, BLOCK)
        exists = i < length
        key = tl.load(keys_ptr + start + i, mask=exists, other=0)
    return _unsigned(key).to(tl.int64), exists


@triton.jit
def _count(
    matrices_ptr,
    segments_ptr,
    chunk_matrix_ptr,
    keys_ptr,
    state_ptr,
    histograms_ptr,
    run_start_ptr,
    run_length_ptr,
    kept_ptr,
    chunks,
    TOGETHER: tl.constexpr, METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    DATA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`kept[c]`, int32 [2 c]: keys of the chunk above the k-th of its segment; beyond `chunks`:
    keys that equal it.

    Grid: chunks.
    """
    chunk = tl.program_id(0)
    segment = 0 if TOGETHER else tl.load(chunk_matrix_ptr + chunk)
    state = state_ptr + segment * _STATE + 6
    row = histograms_ptr + (segment * 4 + 3) * _BINS
    threshold, rank = _boundary(row, tl.load(state), tl.load(state + 1))
    if chunk == tl.load(segments_ptr + segment * _SEGMENT + 2):
        tl.store(state + 2, threshold)
        tl.store(state + 3, rank)
    start = tl.load(run_start_ptr + chunk)
    length = CHUNK if DATA else tl.load(run_length_ptr + chunk)
    above = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    for at in range(0, length, BLOCK):
        key, exists = _run_keys(
            matrices_ptr, chunk_matrix_ptr, keys_ptr, chunk, start, length, at,
            METRIC, DTYPE, ALIGNED, CHUNK, DATA, BLOCK,
        )  # fmt: skip
        above += tl.sum((exists & (key > threshold)).to(tl.int32))
        equal += tl.sum((exists & (key == threshold)).to(tl.int32))
    tl.store(kept_ptr + chunk, above)
    tl.store(kept_ptr + chunks + chunk, equal)


@triton.jit
def _write(
    matrices_ptr,
    segments_ptr,
    chunk_matrix_ptr,
    keys_ptr,
    state_ptr,
    run_start_ptr,
    run_length_ptr,
    kept_ptr,
    places_ptr,
    indices_ptr,
    counts_ptr,
    chunks,
    TOGETHER: tl.constexpr, METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    DATA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the indices that a chunk keeps, and add to how many its matrix has.

    | argument    | shape     | |
    |-------------|-----------|-|
    | kept_ptr    | [2 c]     | sums up to and including each of what `_count` has written |
    | indices_ptr | [sum of k] | within their matrix |
    | counts_ptr  | [n]       | |

    Grid: chunks.
    """
    chunk = tl.program_id(0)
    matrix = tl.load(chunk_matrix_ptr + chunk)
    segment = 0 if TOGETHER else matrix
    segment_row = segments_ptr + segment * _SEGMENT
    state = state_ptr + segment * _STATE + 8
    threshold = tl.load(state)
    ties = tl.load(state + 1)  # keys equal to the k-th that are kept, the first ones
    head = tl.load(segment_row + 2)
    to = tl.load(segment_row + 7)
    end = to + tl.load(segment_row)
    above = kept_ptr - 1  # sums before
    equal = kept_ptr + chunks - 1
    if chunk > head:
        to += tl.load(above + chunk) - tl.load(above + head, mask=head > 0, other=0)
    before = tl.load(equal + chunk) - tl.load(equal + head)
    to += tl.minimum(before, ties)
    begin = to
    first = (chunk - tl.load(matrices_ptr + matrix * _MATRIX + 3)) * CHUNK
    start = tl.load(run_start_ptr + chunk)
    length = CHUNK if DATA else tl.load(run_length_ptr + chunk)
    for at in range(0, length, BLOCK):
        key, exists = _run_keys(
            matrices_ptr, chunk_matrix_ptr, keys_ptr, chunk, start, length, at,
            METRIC, DTYPE, ALIGNED, CHUNK, DATA, BLOCK,
        )  # fmt: skip
        tie = (exists & (key == threshold)).to(tl.int32)
        rank = before + tl.cumsum(tie, 0)
        kept = exists & ((key > threshold) | ((tie > 0) & (rank <= ties)))
        i = at + tl.arange(0, BLOCK)
        if DATA:
            place = i
        else:
            place = tl.load(places_ptr + start + i, mask=kept, other=0).to(tl.int32)
        ones = kept.to(tl.int32)
        slot = to + tl.cumsum(ones, 0) - 1
        # Where the bound has failed, what is read is not what was written: nothing goes past.
        tl.store(indices_ptr + slot, first + place, mask=kept & (slot < end))
        to += tl.sum(ones)
        before += tl.sum(tie)
    if to > begin:
        tl.atomic_add(counts_ptr + matrix, to - begin, sem="relaxed")
