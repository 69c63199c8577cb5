"""The k-th largest key and the indices that come with it: the second half of `topk_salience`, over
what was set aside or over the data themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from ._topk_keys import BINS, LEVELS, MATRIX, SEGMENT, STATE, chunk_keys, unsigned
from .launch import Launch, launch


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


def select(call: Any, data: bool) -> None:
    """Write the indices, and how many each matrix has, of a `topk_salience.Call`.

    Args:
        data: over all entries, in place of those set aside.
    """
    digits = call.reading if data else call.digits
    # Two sums along a chunk, and 64-bit addresses to write to: half of the entries for a thread.
    runs = replace(digits, num_warps=2 * digits.num_warps) if data else call.runs
    shared = {
        **call.tables,
        **call.of_chunks,
        "keys_ptr": call.keys,
        "state_ptr": call.state,
        **call.constants,
        "DATA": data,
    }
    for level in range(LEVELS):
        launch(
            _digits,
            (call.segments, call.data_parts if data else call.parts),
            digits,
            **shared,
            histograms_ptr=call.histograms,
            found_ptr=call.found,
            LEVEL=level,
            BLOCK=call.reading.chunk if data else call.digits.block,
        )
    shared |= {
        "run_start_ptr": call.run_start,
        "run_length_ptr": call.run_length,
        "chunks": call.chunks,
        "BLOCK": call.reading.chunk if data else call.runs.block,
    }
    launch(
        _count,
        (call.chunks,),
        runs,
        **shared,
        histograms_ptr=call.histograms,
        kept_ptr=call.kept,
    )
    launch(
        _write,
        (call.chunks,),
        runs,
        **shared,
        kept_ptr=call.kept.cumsum(0),
        places_ptr=call.places,
        indices_ptr=call.indices,
        counts_ptr=call.counts,
    )


@triton.jit
def _boundary(histogram_ptr, digits, rank):
    """Add a digit, by its histogram, to the first ones of the key of `rank`: the largest digit with
    `rank` keys at or above it. Return them, and the rank among the keys that have them too.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins)
    above = tl.cumsum(counts, 0, reverse=True)
    digit = tl.maximum(tl.sum((above >= rank).to(tl.int32)) - 1, 0)
    above = tl.sum(tl.where(bins == digit, above - counts, 0))
    return digits * BINS + digit, rank - above


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
    segment_row = segments_ptr + segment * SEGMENT
    digits = tl.zeros((), tl.int64)
    rank = tl.load(segment_row)
    state = state_ptr + segment * STATE + LEVEL * 2
    row = histograms_ptr + (segment.to(tl.int64) * 4 + LEVEL) * BINS
    if LEVEL > 0:
        digits, rank = _boundary(row - BINS, tl.load(state - 2), tl.load(state - 1))
    if part == 0:
        tl.store(state, digits)
        tl.store(state + 1, rank)
    i = tl.arange(0, BLOCK)
    counts = tl.zeros((BINS,), tl.int32)
    if DATA:
        first = tl.load(segment_row + 2)
        steps = tl.load(segment_row + 3)
    else:
        first = tl.load(segment_row + 6)
        entries = tl.minimum(tl.load(found_ptr + segment), tl.load(segment_row + 5))
        steps = (entries + BLOCK - 1) // BLOCK
    for step in range(part, steps, parts):  # int64, as `steps` is
        if DATA:
            key, counted = chunk_keys(
                matrices_ptr, chunk_matrix_ptr, first + step, METRIC, DTYPE, ALIGNED, CHUNK
            )
        else:
            counted = i < entries - step * BLOCK
            key = tl.load(keys_ptr + first + step * BLOCK + i, mask=counted, other=0)
        key = unsigned(key)
        if LEVEL > 0:
            counted = counted & ((key >> (32 - 8 * LEVEL)).to(tl.int64) == digits)
        digit = (key >> (24 - 8 * LEVEL)) & 0xFF
        counts += tl.histogram(digit.to(tl.int32), BINS, mask=counted)
    to = row + tl.arange(0, BINS)
    tl.atomic_add(to, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _run_keys(
    matrices_ptr, chunk_matrix_ptr, keys_ptr, chunk, start, length, at,
    METRIC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    DATA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys of a chunk from place `at` on, of all its entries or of those set aside, as uint32."""
    if DATA:
        key, exists = chunk_keys(
            matrices_ptr, chunk_matrix_ptr, chunk, METRIC, DTYPE, ALIGNED, CHUNK
        )
    else:
        i = at + tl.arange(0, BLOCK)
        exists = i < length
        key = tl.load(keys_ptr + start + i, mask=exists, other=0)
    return unsigned(key).to(tl.int64), exists


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
    state = state_ptr + segment * STATE + 6
    row = histograms_ptr + (segment * 4 + 3) * BINS
    threshold, rank = _boundary(row, tl.load(state), tl.load(state + 1))
    if chunk == tl.load(segments_ptr + segment * SEGMENT + 2):
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
    segment_row = segments_ptr + segment * SEGMENT
    state = state_ptr + segment * STATE + 8
    threshold = tl.load(state)
    ties = tl.load(state + 1)  # keys equal to the k-th that are kept, the first ones
    head = tl.load(segment_row + 2)
    to = tl.load(segment_row + 7)
    end = to + tl.load(segment_row)
    above = tl.load(kept_ptr - 1 + chunk, mask=chunk > 0, other=0)  # of the chunks before
    number = tl.load(kept_ptr + chunk) - above
    to += above - tl.load(kept_ptr - 1 + head, mask=head > 0, other=0)
    equal_ptr = kept_ptr + chunks - 1
    head = tl.load(equal_ptr + head)
    before = tl.load(equal_ptr + chunk) - head
    after = tl.load(equal_ptr + 1 + chunk) - head
    to += tl.minimum(before, ties)
    number += tl.minimum(after, ties) - tl.minimum(before, ties)
    first = (chunk - tl.load(matrices_ptr + matrix * MATRIX + 3)) * CHUNK
    start = tl.load(run_start_ptr + chunk)
    length = CHUNK if DATA else tl.load(run_length_ptr + chunk)
    length = tl.where(number > 0, length, 0)  # most chunks keep none where ties are many
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
    if number > 0:
        tl.atomic_add(counts_ptr + matrix, number, sem="relaxed")
