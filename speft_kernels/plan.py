"""`SparsityPlan`: a static pattern compiled into the form that the kernels read.

The pattern never changes during training, so everything that depends on it alone is computed once:
which method serves which entry, the indices in the order in which each method reads them, and which
columns of the activations a backward pass has to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from .compact import CompactIndices, places_in
from .costs import Costs, costs_of
from .errors import PatternError
from .parts import TILE, HotLines, Parts, build_parts, choose_hot_lines
from .pattern import SparsePattern, lazy_tensor
from .row_panels import KEEP_COLUMNS_SHARE, RowPanels
from .strips import Strips, build_strips
from .thin_strips import ThinStrips, build_thin_strips
from .tiles import QUARTERS, Tiles

# What a backend reads of a plan: the CPU's kernels parts, torch's own operators panels of rows,
# Triton's kernels strips, CUDA's thin ones.
Form = type[Parts] | type[RowPanels] | type[Strips] | type[ThinStrips]
F = TypeVar("F", Parts, RowPanels, Strips, ThinStrips)

# Tokens for which parts are weighed where the caller gives no hint.
DEFAULT_TOKENS = 2048

# Tokens of a packed block on the CPU: 128 ran fastest (real masks, 64 to 256 tried), and the packed
# columns of one block are to stay in the L2 cache, beside a chunk of dy.
BLOCK_TOKENS = 128
BLOCK_BYTES = 512 << 10
TOKEN_STEP = 16  # csrc/cpu/panel.h


@dataclass(frozen=True)
class SparsityPlan:
    """A pattern compiled for one device. Build it with `SparsityPlan.build`; it is data and never
    changes.

    Attributes:
        pattern: on the plan's device.
        kept_columns: int32 `[C]`, the columns of x that the backward pass keeps, hot ones first;
            None keeps x whole.
        costs: what the parts were weighed with.
        tokens: for how many tokens they were weighed.
    """

    pattern: SparsePattern
    kept_columns: Tensor | None
    costs: Costs
    tokens: int

    @classmethod
    def build(
        cls,
        pattern: SparsePattern,
        device: torch.device | str | None = None,
        tokens_hint: int | None = None,
        *,
        keep: Tensor | None = None,
        costs: Costs | None = None,
    ) -> SparsityPlan:
        """Compile `pattern` for `device` (the pattern's own by default).

        Args:
            tokens_hint: tokens of a typical call, 2048 where left out; any number is served.
            keep: int32, unique: keep these columns of x, which hold all that the pattern uses,
                because other layers read them too.
            costs: what to weigh the parts with, in place of this machine's costs.

        Raises:
            ValueError: the hint is not positive.
            PatternError: `keep` leaves out a column that the pattern uses, or names one twice or
                one that is not there, or, for a block pattern, a part of a block's width.
        """
        pattern = pattern.to(device) if device is not None else pattern
        tokens = DEFAULT_TOKENS if tokens_hint is None else tokens_hint
        if tokens < 1:
            raise ValueError(f"tokens_hint must be at least 1, got {tokens}")
        costs = costs_of(pattern.device) if costs is None else costs
        used = pattern.used_cols
        if keep is not None:
            _check_kept(keep, used, pattern)
            keep = keep.contiguous()
        plan = cls(pattern, used if keep is None else keep, costs, tokens)
        if plan.kept_width > KEEP_COLUMNS_SHARE * pattern.shape[1]:
            return cls(pattern, None, costs, tokens)
        if keep is None and not pattern.is_block:
            hot = torch.isin(used.long(), plan.hot_lines.cols)
            return cls(pattern, torch.cat([used[hot], used[~hot]]), costs, tokens)
        return plan

    @property
    def kept_width(self) -> int:
        """Number of activation columns kept for the backward pass."""
        return self.pattern.shape[1] if self.kept_columns is None else self.kept_columns.numel()

    def block_tokens(self, tokens: int) -> int:
        """Tokens of one block of the packed columns, a multiple of 16: all on a GPU, as many as the
        cache holds on a CPU, and blocks of one size so that little is padding.
        """
        most = max(self._most_tokens or tokens, 1)
        blocks = max(1, -(-tokens // most))
        return max(1, -(-tokens // (blocks * TOKEN_STEP))) * TOKEN_STEP

    @cached_property
    def _most_tokens(self) -> int | None:
        """Tokens of a block at most; None where a block holds all."""
        if self.pattern.device.type != "cpu":
            return None
        kept = self.kept_columns
        return most_tokens((self.pattern.used_cols if kept is None else kept).numel())

    @lazy_tensor
    def row_order(self) -> Tensor | None:
        """int64 `[nnz]`: sorts `values.reshape(-1)` by (row, column); None where they are sorted
        already.
        """
        return torch.argsort(self.pattern.entry_indices) if self.pattern.is_block else None

    @property
    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """int64 row and column of each entry, sorted by (row, column)."""
        rows, cols = self.pattern.rows.long(), self.pattern.cols.long()
        if self.row_order is not None:
            rows, cols = rows[self.row_order], cols[self.row_order]
        return rows, cols

    @lazy_tensor
    def csr(self) -> CompactIndices:
        """Entries by row, columns as in the weight."""
        return CompactIndices.build(*self._coordinates, self.pattern.shape[0])

    @lazy_tensor
    def csc(self) -> tuple[CompactIndices, Tensor]:
        """Entries by column, for the input-gradient twin, and the permutation of values sorted by
        row.
        """
        return self.csr.transpose(self.pattern.shape[1])

    @lazy_tensor
    def tiles(self) -> Tiles:
        """Entries by tile of the weight, for products that add them to its tiles."""
        return Tiles.build(self.csr, self.pattern.shape[1])

    @lazy_tensor
    def tiles_of_quarters(self) -> Tiles:
        """The same for a weight whose columns are stored in quarters."""
        return Tiles.build(self.csr, self.pattern.shape[1], QUARTERS)

    @lazy_tensor
    def hot_lines(self) -> HotLines:
        """The columns and rows that panels serve."""
        shape, width = self.pattern.shape, self.kept_width
        return choose_hot_lines(*self._coordinates, shape, width, self.costs, self.tokens)

    @lazy_tensor
    def thin_strips_by_row(self) -> ThinStrips:
        """Those of whole activations, for values sorted by (row, column)."""
        if self.row_order is None:
            return self.compiled(ThinStrips, False)
        return build_thin_strips(*self._coordinates, None, self.pattern.shape[1], None)

    @cached_property
    def _compiled(self) -> dict[tuple[Form, bool], Any]:
        return {}

    def compiled(self, form: type[F], packed: bool) -> F:
        """The entries in the form that a backend reads, for packed activations (positions are those
        of `kept_columns`) or whole ones (columns of x); made once.
        """
        found = self._compiled.get((form, packed))
        if found is None:
            with torch.inference_mode(False):
                found = self._compiled[form, packed] = self._compile(form, packed)
        return found

    def _compile(self, form: Form, packed: bool) -> Any:
        operand = self.kept_columns if packed else None
        if form is RowPanels:
            return RowPanels.build(self.csr, self.pattern.shape[1], operand, self.costs)
        entries, shape = (*self._coordinates, self.row_order), self.pattern.shape
        if form is ThinStrips:
            return build_thin_strips(*entries, shape[1], operand)
        if form is Strips:
            return build_strips(*entries, shape, self.costs, operand, self.tokens)
        return build_parts(*entries, shape, self.hot_lines, self.costs, operand)

    @lazy_tensor
    def kept_block_cols(self) -> Tensor:
        """int32 `[num_blocks]`: for a block pattern, the group of kept columns of each block."""
        width = self.pattern.block_shape[1]
        if self.kept_columns is None:
            return self.pattern.block_cols
        groups = torch.div(self.kept_columns[::width], width, rounding_mode="floor")
        return places_in(groups, self.pattern.shape[1] // width)[self.pattern.block_cols.long()]

    @property
    def _parts(self) -> Parts:
        return self.compiled(Parts, self.kept_columns is not None)

    @property
    def _in_panels(self) -> bool:
        """Whether torch's own operators serve the device, as they do all but CPUs by default."""
        return self.pattern.device.type != "cpu"

    def shares(self) -> dict[str, float]:
        """Return which share of the entries each part serves, by default: on a CPU columns, rows,
        tiles, gather; elsewhere panels of rows serve all; and blocks those of a block pattern.
        """
        total = max(self.pattern.nnz, 1)
        if self.pattern.is_block or self._in_panels:
            return {"blocks" if self.pattern.is_block else "panels": self.pattern.nnz / total}
        parts = self._parts
        counts = {
            "columns": parts.hot_col_at.numel(),
            "rows": parts.hot_row_at.numel(),
            "tiles": int((parts.tile_slot >= 0).sum()),
            "gather": parts.entry_row.numel(),
        }
        return {name: count / total for name, count in counts.items()}

    def predicted_seconds(self, tokens: int | None = None) -> dict[str, float]:
        """Return the time that the cost model gives each part of a backward pass, packing and the
        forward pass's copy (keep) beside.
        """
        tokens = self.tokens if tokens is None else tokens
        costs, out_features = self.costs, self.pattern.shape[0]
        if self.pattern.is_block:
            return {"blocks": self.pattern.nnz * costs.tile * tokens}
        whole = self.kept_columns is None
        width = self.kept_width
        keep = {"keep": 0.0 if whole else width * costs.pack * tokens}
        if self._in_panels:
            panels = self.compiled(RowPanels, not whole)
            first, last, begin, end = panels.panels.t()
            taken = begin < end
            columns = panels.positions.numel() or width
            rows = int((last - first)[taken].sum())
            picked = (out_features + rows) / 2 if panels.rows.numel() else 0
            token = rows * columns * costs.panel + picked * costs.pack
            return {"panels": token * tokens + int(taken.sum()) * costs.call, **keep}
        parts = self._parts
        lines = parts.rows.numel() + (parts.cols.numel() if whole else 0)

        def panel(hot: Tensor, length: int) -> float:
            if hot.numel() == 0:
                return 0.0
            return length * (hot.numel() * costs.panel + costs.read) * tokens + costs.call

        return {
            "columns": panel(parts.hot_cols, out_features),
            "rows": panel(parts.hot_rows, width),
            "tiles": parts.tile_row.numel() * TILE * TILE * costs.tile * tokens,
            "gather": parts.entry_row.numel() * costs.gather * tokens,
            "pack": lines * costs.pack * tokens,
            **keep,
        }

    def summary(self, tokens: int | None = None) -> str:
        """Return a table: what serves which share of the entries, and the predicted time of each
        part for `tokens` tokens (by default those of the hint).
        """
        tokens = self.tokens if tokens is None else tokens
        pattern, shares = self.pattern, self.shares()
        seconds = self.predicted_seconds(tokens)
        kept = (
            "x whole"
            if self.kept_columns is None
            else f"{self.kept_width} of {pattern.shape[1]} columns of x"
        )
        lines = [f"{pattern!r} on {pattern.device}, {tokens} tokens; kept: {kept}"]
        for name, value in seconds.items():
            share = f"{shares[name]:8.1%} of the entries" if name in shares else " " * 23
            lines.append(f"  {name:8} {share}  {value * 1e6:10.1f} us predicted")
        lines.append(f"  {'all':8} {'':23}  {sum(seconds.values()) * 1e6:10.1f} us predicted")
        return "\n".join(lines)


def most_tokens(columns: int) -> int:
    """Tokens of a block of so many packed columns at most, for a CPU's cache to hold it."""
    fit = BLOCK_BYTES // 4 // max(columns, 1)
    return max(TOKEN_STEP, min(BLOCK_TOKENS, fit // TOKEN_STEP * TOKEN_STEP))


def _check_kept(keep: Tensor, used: Tensor, pattern: SparsePattern) -> None:
    if keep.dtype != torch.int32 or keep.dim() != 1 or keep.device != pattern.device:
        raise PatternError(
            f"keep must be 1-D int32 on {pattern.device}, got {keep.dtype} of shape "
            f"{tuple(keep.shape)} on {keep.device}"
        )
    if torch.unique(keep).numel() != keep.numel():
        raise PatternError("keep names a column twice")
    if keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < pattern.shape[1]:
        raise PatternError(f"keep names a column that is not among the {pattern.shape[1]}")
    missing = used[~torch.isin(used, keep)]
    if missing.numel():
        raise PatternError(f"keep leaves out column {int(missing[0])}, which the pattern uses")
    width = pattern.block_shape[1]
    first, side = keep[::width, None], torch.arange(width, device=keep.device)
    whole = keep.numel() % width == 0 and bool((first % width == 0).all())
    if not (whole and torch.equal((first + side).flatten(), keep.long())):
        raise PatternError(f"keep must name whole groups of {width} columns, as the blocks are")


def plan_of(pattern: SparsePattern) -> SparsityPlan:
    """Return the pattern's plan, built on the first call and kept with the pattern, which never
    changes.
    """
    plan: SparsityPlan | None = pattern.__dict__.get("_plan")
    if plan is None:
        plan = pattern.__dict__["_plan"] = SparsityPlan.build(pattern)
    return plan
