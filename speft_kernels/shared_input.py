"""`SharedInput`: one copy of the kept activation columns for the layers that read the same input.

Queries, keys and values read one tensor, as do gate and up projections. Which layers are siblings
is not guessed from their names: it is seen in the forward pass, by the identity of the input. From
the next pass on, the first sibling keeps the columns that any of them uses and the others keep the
same copy. A wrong guess costs columns, never correctness: a copy is shared only with a layer that
is given the very tensor, unchanged, that it was made of.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor

from . import ops
from .pattern import SparsePattern
from .plan import SparsityPlan, plan_of


class _Copy(NamedTuple):
    """The last copy made: of which tensor, at which version, and by which layer, whose pattern it
    is.
    """

    source: weakref.ref[Tensor]
    version: int
    kept: weakref.ref[Tensor]
    maker: SparsePattern


class _Last(threading.local):
    """The tensor last read by a layer of this thread, and the group of that layer."""

    source: weakref.ref[Tensor] | None = None
    group: weakref.ref[SharedInput] | None = None


_last = _Last()
# What a group is, which columns it keeps and whose copy it has change together: other threads may
# read the same layers. Held while a plan is built, not while a copy is made.
_lock = threading.RLock()


def _in_checkpoint() -> bool:
    """Whether a checkpoint (the kind that is not reentrant) takes what is saved, to throw it away
    or, when it computes a part again, to compare it with what it threw away.
    """
    # torch has no public way to ask. Where it no longer has this one, nothing is shared.
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if ask is None:
        return True
    hooks = ask(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


class SharedInput:
    """The layers that read one input, by their patterns; at first a layer of its own."""

    def __init__(self, pattern: SparsePattern) -> None:
        self._merged_into: SharedInput | None = None
        self._columns: Tensor | None = None  # None: those of the one pattern
        self._patterns = [pattern]
        self._plans: dict[int, SparsityPlan] = {}
        self._copy: _Copy | None = None

    def group(self) -> SharedInput:
        """The group that this one has become part of, or itself."""
        found = self
        while found._merged_into is not None:
            found = found._merged_into
        return found

    def plan(self, pattern: SparsePattern) -> SparsityPlan:
        """The plan of a layer of this group, which keeps the columns of all of it."""
        with _lock:
            if self._columns is None:
                return plan_of(pattern)
            plan = self._plans.get(id(pattern))
            if plan is None or plan.pattern is not pattern:
                plan = SparsityPlan.build(pattern, keep=self._columns)
                self._plans[id(pattern)] = plan
            return plan

    def keep(
        self, source: Tensor, x: Tensor, pattern: SparsePattern
    ) -> tuple[Tensor, SparsityPlan]:
        """Return what the backward pass of the layer with `pattern` keeps of its input, and the
        plan that reads it. `source` is the input as the caller knows it, x the same in the dtype of
        the product.
        """
        # What is kept must not depend on the passes before where a checkpoint compares it with
        # what it computed the first time; and a tensor without a version may change unseen.
        alone = source.is_inference() or _in_checkpoint()
        # Merged just now: the sibling before has kept its own columns alone.
        if alone or self._note(source, pattern) is not self:
            return _own_columns(x, pattern)
        with _lock:
            plan, copy, columns = self.plan(pattern), self._copy, self._columns
        if copy is not None and copy.source() is source and copy.version == source._version:
            kept = copy.kept()
            if kept is not None and kept.dtype == x.dtype:
                return kept, plan
            # Its maker is here again: a new pass over the same tensor, which needs a new copy. Any
            # other finds that someone took the copy away (a hook on saved tensors that moves them)
            # and keeps its own columns alone.
            if copy.maker is not pattern:
                return _own_columns(x, pattern)
        kept = ops.keep_columns(x, plan)
        if plan.kept_columns is not None:
            with _lock:
                # Where another thread has merged the group meanwhile, its plans read other columns.
                if len(self._patterns) > 1 and self._columns is columns:
                    found = weakref.ref(source), source._version, weakref.ref(kept)
                    self._copy = _Copy(*found, pattern)
        return kept, plan

    def _note(self, source: Tensor, pattern: SparsePattern) -> SharedInput:
        """Merge with the group of the layer that has just read the same tensor; return it."""
        last, other = _last.source, None if _last.group is None else _last.group()
        group: SharedInput = self
        if last is not None and other is not None and last() is source:
            with _lock:
                other = other.group()
                # Neither has become part of another one meanwhile.
                if other is not self and self._merged_into is None and other._fits(pattern):
                    other._take(self)
                    group = other
        _last.source, _last.group = weakref.ref(source), weakref.ref(group)
        return group

    def _fits(self, pattern: SparsePattern) -> bool:
        first = self._patterns[0]
        return (
            first.shape[1] == pattern.shape[1]
            and first.block_shape == pattern.block_shape
            and first.device == pattern.device
        )

    def _take(self, other: SharedInput) -> None:
        other._merged_into = self
        self._patterns += other._patterns
        columns = [pattern.used_cols for pattern in self._patterns]
        with torch.inference_mode(False):
            self._columns = torch.unique(torch.cat(columns)).int()
        self._plans.clear()
        self._copy = None


def _own_columns(x: Tensor, pattern: SparsePattern) -> tuple[Tensor, SparsityPlan]:
    """What `SharedInput.keep` returns of a layer that shares nothing."""
    plan = plan_of(pattern)
    return ops.keep_columns(x, plan), plan
