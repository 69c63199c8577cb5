"""`SparseDeltaLinear`: a linear layer whose weight is frozen but for a sparse set of trained
entries.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import compiled, conv1d, family, ops, stepping
from .autograd import Sink, SparseLinear
from .conv1d import is_conv1d, is_opaque, is_plain_linear, linear_shape
from .dtypes import accumulator_dtype
from .errors import ConfigError, PatternError, nearest
from .pattern import SparsePattern
from .plan import SparsityPlan, plan_of
from .recipe import CHOICES
from .shared_input import SharedInput
from .values import UNKNOWN, State, is_as_it_was, state_of, watch

MODES = CHOICES["mode"]


class SparseDeltaLinear(nn.Module):
    """`y = x @ (W0 + D)^T + b` with W0 and b frozen and D, non-zero on a static pattern, trained as
    `values`.

    Build it with `SparseDeltaLinear.from_linear`. Two modes, equal in what they compute:

    - `resident`: D is written into the weight, so a step costs what the frozen layer costs plus the
      sampled gradient. The write happens on the first forward after `values` changed. Changes are
      seen by the tensor's version, which every in-place operation and every optimizer raises, and
      by its `.data` having been taken.
    - `additive`: the base is never written; D is a second, sparse product. For a base that is
      quantised or shared.

    Parameters: `weight` `[N, K]` and `bias` `[N]`, frozen; `values`, float32 (float64 for a float64
    weight), `[nnz]` or `[num_blocks, bh, bw]`, trained. Buffers: `indices`, and `base_values` (W0
    at the trained entries).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    values: nn.Parameter
    indices: Tensor
    base_values: Tensor
    base: nn.Module | None
    plain_type: type[nn.Linear] = nn.Linear  # what the layer is once it is plain again

    def __init__(self, linear: nn.Module, pattern: SparsePattern, mode: str = "resident") -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(
                f"unknown mode {mode!r}.{nearest(mode, MODES)} Known: {', '.join(MODES)}"
            )
        shape = None if is_conv1d(linear) else linear_shape(linear)
        if shape is None:
            raise ConfigError(
                f"a {type(linear).__name__} has no in_features and out_features: it is no linear "
                "layer (a Conv1D becomes one by sparsify or apply_patterns of its model)"
            )
        self.out_features, self.in_features = shape
        if pattern.shape != shape:
            raise PatternError(
                f"the pattern is for a weight of shape {pattern.shape}, the layer's is {shape}"
            )
        if is_plain_linear(linear):
            self._take_plain(cast(nn.Linear, linear), pattern, mode)
        elif mode == "additive" and is_opaque(linear):
            self._take_opaque(linear, pattern)
        else:
            raise ConfigError(
                f"a {type(linear).__name__} is not a plain nn.Linear, so its weight cannot hold "
                "the delta; "
                + (
                    'use mode="additive"'
                    if is_opaque(linear)
                    else "its owner reads the weight without calling it, so no gradient would "
                    "reach the values"
                )
            )
        self.mode = mode
        if mode == "resident":
            watch(self.values)  # now: once there is a graph, it would be made anew
        # What the weight's trained entries were written for; None where they hold W0.
        self._written_for: State | None = None
        self._start()

    def _start(self) -> None:
        """What belongs to this object alone, not to a copy of it."""
        self._keep_of_input()
        # For the package's own use, as is what `family` asks of a layer.
        self.family: family.Family | None = None
        self.sink: Sink | None = None
        self.number = stepping.register(self)

    def _keep_of_input(self) -> None:
        """Settle what the backward pass keeps of the input, anew for each pattern."""
        self._input = SharedInput(self._pattern)
        # Found now, as it cannot be where a graph is made.
        self.kept_columns = compiled.columns_to_keep(self._pattern)

    def _take_plain(self, linear: nn.Linear, pattern: SparsePattern, mode: str) -> None:
        weight = linear.weight
        if not weight.is_floating_point():
            raise ConfigError(f"the weight must be floating point, got {weight.dtype}")
        if not weight.is_contiguous():
            raise ConfigError(f"the weight must be contiguous, got strides {weight.stride()}")
        if mode == "resident":
            family.refuse_read_only(weight)
        pattern = pattern.to(weight.device)
        weight.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(False)
        self.base = None
        self.plain_type = type(linear)
        self.weight = cast(nn.Parameter, weight)
        self.bias = cast("nn.Parameter | None", linear.bias)
        with torch.inference_mode(False):
            taken = weight.detach().view(-1)[pattern.entry_indices.long()]
        self.register_buffer("base_values", taken.reshape(pattern.values_shape))
        self._add_values(pattern, weight.dtype, weight.device)

    def _take_opaque(self, base: nn.Module, pattern: SparsePattern) -> None:
        tensors = [*base.parameters(), *base.buffers()]
        device = tensors[0].device if tensors else pattern.device
        self.base = base.requires_grad_(False)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_buffer("base_values", None)
        self._add_values(pattern.to(device), torch.float32, device)

    def _add_values(self, pattern: SparsePattern, dtype: torch.dtype, device: torch.device) -> None:
        self._pattern = pattern
        self.register_buffer("indices", pattern.indices)
        # Made in inference mode they would have no version, and could never train.
        with torch.inference_mode(False):
            zeros = torch.zeros(pattern.values_shape, dtype=accumulator_dtype(dtype), device=device)
        self.values = nn.Parameter(zeros, requires_grad=not pattern.is_empty)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, pattern: SparsePattern, mode: str = "resident"
    ) -> SparseDeltaLinear:
        """Wrap `linear`, sharing its weight and bias (no copy) and freezing them; `values` starts
        at zero.

        Args:
            linear: an `nn.Linear`; in mode "additive" also any module with `in_features` and
                `out_features` that maps `[..., K]` to `[..., N]`, such as a quantised linear layer.

        Raises:
            PatternError: the pattern is for another shape.
            ConfigError: an unknown mode; a layer whose weight cannot hold the delta, or cannot be
                written to.
        """
        return cls(linear, pattern, mode)

    @property
    def plan(self) -> SparsityPlan:
        """The compiled pattern that the next pass follows, with the columns that it keeps for the
        layers that read the same input.
        """
        return self._input.group().plan(self._pattern)

    @property
    def pattern(self) -> SparsePattern:
        return self._pattern

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ (W0 + D)^T + b`, `[..., N]`.

        Args:
            x: `[..., K]`, of the weight's dtype, or of any that autocast turns into its own. The
                backward pass keeps the columns of it that the pattern reads, one copy for all
                layers that are given this very tensor.

        Raises:
            ConfigError: `requires_grad` was set on the weight, or it is computed from others.
            StaleWeightError: in the backward pass, where `values` changed since this one.
            NotImplementedError: in a backward pass that is to be differentiated itself.
        """
        if torch.compiler.is_dynamo_compiling():
            return compiled.forward(self, x, _untraced)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        if self.base is not None:
            return self._forward_over_base(x)
        device, source = x.device.type, x
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        if autocast:
            x = x.to(torch.get_autocast_dtype(device))
        # Straight from the dictionary: a step asks each layer, and finds none of this in a cache.
        parameters = self._parameters
        try:
            values, weight = parameters["values"], parameters["weight"]
        except KeyError as name:
            raise ConfigError(
                f"{name} of a SparseDeltaLinear is computed (parametrised, pruned, weight-normed), "
                "so nothing could train it: remove that first"
            ) from None
        bias = parameters.get("bias")
        if bias is None:
            bias = self.bias  # none, or one that is computed
        self.sync_if_changed()
        assert values is not None
        assert weight is not None
        needs_grad = torch.is_grad_enabled()
        if needs_grad and weight.requires_grad:
            raise ConfigError(
                "the weight of a SparseDeltaLinear is frozen, but requires_grad was set on it; it "
                "would receive no gradient. Set it on `values` alone, or desparsify the layer"
            )
        if self.mode == "resident" or self._pattern.is_empty:
            if not (needs_grad and values.requires_grad):
                return F.linear(x, weight, bias)
            kept, plan = self._keep(source, x)
            y: Tensor = SparseLinear.apply(x, values, weight, bias, kept, plan, self.sink, True)
            return y
        # FSDP2's mixed precision hands out the values in the dtype of the weight.
        values = values.to(accumulator_dtype(x.dtype))  # type: ignore[assignment]
        sink = self.sink if values is parameters["values"] else None
        weight = weight.detach()  # type: ignore[assignment]
        if autocast:
            weight = weight.to(x.dtype)  # type: ignore[assignment]
            bias = None if bias is None else bias.to(x.dtype)  # type: ignore[assignment]
        if needs_grad and (values.requires_grad or x.requires_grad):
            kept, plan = self._keep(source, x)
            return SparseLinear.apply(x, values, weight, bias, kept, plan, sink, False)
        return ops.sparse_delta_matmul(x, weight, values, self._pattern, bias)

    def _keep(self, source: Tensor, x: Tensor) -> tuple[Tensor | None, SparsityPlan]:
        """What the backward pass needs of the input, which is `source` as the caller knows it, and
        `x` as the product reads it; None where nothing trains.
        """
        values = self._parameters["values"]
        if values is None or not values.requires_grad:
            return None, plan_of(self._pattern)
        self._input = self._input.group()
        return self._input.keep(source, x, self._pattern)

    def _forward_over_base(self, x: Tensor) -> Tensor:
        assert self.base is not None
        y: Tensor = self.base(x)
        if self._pattern.is_empty:
            return y
        source, x = x, x.to(y.dtype)
        values = self.values.to(accumulator_dtype(y.dtype))
        if not (torch.is_grad_enabled() and (values.requires_grad or x.requires_grad)):
            return y + ops.delta_matmul(x, values, self._pattern)
        kept, plan = self._keep(source, x)
        sink = self.sink if values is self.values else None
        return y + SparseLinear.apply(x, values, None, None, kept, plan, sink, False)

    @property
    def is_written(self) -> bool:
        """Whether the weight may hold anything but W0 at the trained entries."""
        return self._written_for is not None

    def doubt_written(self) -> None:
        """Have the next forward pass write the weight again, whatever is seen of it."""
        self._written_for = UNKNOWN

    def note_written(self) -> None:
        """Take note that the weight holds now what the mode says."""
        if self.mode == "resident":
            watch(self.values)  # torch puts plain ones where it loads or casts
            self._written_for = self._current_state()
        else:
            self._written_for = None

    def _current_state(self) -> State:
        values, weight = self._parameters["values"], self._parameters["weight"]
        assert values is not None
        assert weight is not None
        return state_of(values, weight, self.sink)

    def sync(self) -> None:
        """Make the weight hold what the mode says: W0 + D (resident) or W0 (additive).

        A forward pass does so by itself. Call it after writing past the version of `weight`, or
        into memory of `values` that was taken before the last pass (`data = layer.values.data`),
        which cannot be seen.
        """
        family.sync([self])

    def sync_if_changed(self) -> None:
        """Have the weight hold what the mode says, where it does not; the base must be plain."""
        if self._is_stale():
            # An optimizer changes the values of all: one call writes them all.
            family.write([layer for layer in self._siblings() if layer._is_stale()])

    def _is_stale(self) -> bool:
        """Whether the weight does not hold what the mode says."""
        if self.mode == "additive":
            return self.is_written
        if self._pattern.is_empty:
            return False
        if self.values.is_inference():  # which does not count its writes
            return True
        return not is_as_it_was(self._written_for, self._current_state())

    def _siblings(self) -> list[SparseDeltaLinear]:
        """This layer, and those of its family that are written like it."""
        if self.family is None:
            return [self]
        like = (self.weight.device, self.weight.dtype)
        return [
            layer
            for layer in self.family.layers()
            if layer.base is None and (layer.weight.device, layer.weight.dtype) == like
        ]

    def _restore(self) -> None:
        if self.is_written:
            with torch.no_grad():
                ops.write_delta(self.weight, self._pattern, self.base_values, None)
            self._written_for = None

    def merge(self) -> None:
        """Write D into the weight: mode "resident". What the layer computes stays the same.

        On an error the layer stays as it was. `model.merge` does so for a whole model at once.

        Raises:
            ConfigError: the base is not a plain `nn.Linear`.
        """
        family.set_modes({self: "resident"})

    def unmerge(self) -> None:
        """Put W0 back into the weight, bit for bit: mode "additive". What the layer computes stays
        the same.

        On an error the layer stays as it was. `model.unmerge` does so for a whole model at once.
        """
        family.set_modes({self: "additive"})

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return `W0 + D` as a new tensor `[N, K]` of the weight's dtype.

        Raises:
            ConfigError: the base is not a plain `nn.Linear`.
        """
        weight = self.base_weight()
        if not self._pattern.is_empty:
            ops.write_delta(weight, self._pattern, self.base_values, self.values)
        return weight

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """Return W0 as a new tensor `[N, K]`, bit for bit as it was.

        Raises:
            ConfigError: the base is not a plain `nn.Linear`.
        """
        if self.base is not None:
            raise ConfigError(
                f"the base is a {type(self.base).__name__}: it has no plain weight to read"
            )
        weight = self.weight.detach().clone()
        # By torch: a copy is a new address each time, for which Triton's kernel would make and keep
        # a table in the place of one that training needs.
        weight.view(-1)[self._pattern.entry_indices.long()] = self.base_values.reshape(-1)
        return weight

    def to_linear(self, keep_delta: bool = True) -> nn.Module:
        """Return the plain layer, sharing the weight: it holds W0 + D, or exactly W0 without the
        delta. Of what was a `Conv1D` in a model, an `nn.Linear` whose state dict is a `Conv1D`'s.

        This module must not be used afterwards: it no longer owns the weight.

        Raises:
            ConfigError: the base is not a plain `nn.Linear` and `keep_delta` is set.
        """
        return family.to_linears([self], keep_delta)[self]

    def _apply(self, fn: Any, recurse: bool = True) -> SparseDeltaLinear:
        values = self.values.detach()
        if self.is_written:
            # The memory is new, though its address may be an old one. And torch swaps no tensors
            # that are referred to, as a state does (set_swap_module_params_on_conversion).
            self.doubt_written()
        super()._apply(fn, recurse)
        # `.to(bfloat16)` is about the frozen weight; the trained values stay unrounded.
        self._widen_values(values)
        if self.indices.device.type != "meta":
            self._pattern = self._pattern.to(self.indices.device)
            self.indices = self._pattern.indices
            self._keep_of_input()
        return self

    def _widen_values(self, values: Tensor) -> None:
        """Let the trained values have the accumulator's dtype, whatever the weight's has become;
        `values` are the same where they were not rounded.
        """
        dtype = accumulator_dtype(self.weight.dtype if self.weight is not None else torch.float32)
        if self.values.dtype != dtype:
            grad = self.values.grad
            self.values.grad = None
            self.values.data = values.to(self.values.device, dtype)
            self.values.grad = None if grad is None else grad.to(dtype)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.sync_if_changed()  # or `weight` would be one optimizer step behind `values`
        # Averaging a model with its buffers (AveragedModel) truncates what it makes of integers.
        # What the layer computes follows the pattern, and so must what is loaded from this.
        self.indices = self._pattern.indices
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.plain_type is conv1d.Conv1DLinear:
            conv1d.transpose_saved(destination, prefix, keep_vars)
        if self.sink is not None and not keep_vars:
            # Of tensors that share a storage safetensors' `save_model`, say, keeps a single one.
            destination[prefix + "values"] = self.values.detach().clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        errors: list[str] = args[-1]
        if self.plain_type is conv1d.Conv1DLinear:
            conv1d.transpose_to_load(state_dict, prefix)

        def comes(name: str) -> bool:
            own, stored = getattr(self, name), state_dict.get(prefix + name)
            return isinstance(stored, Tensor) and own is not None and stored.shape == own.shape

        if comes("indices"):
            try:
                # As from any other source, indices become a pattern only by its validation.
                pattern = SparsePattern(
                    self._pattern.shape, state_dict[prefix + "indices"], self._pattern.block_shape
                )
            except PatternError as error:
                errors.append(f"{prefix}indices: {error}")
                return
            if pattern != self._pattern:
                others = (
                    ("values",) if self.base is not None else ("values", "base_values", "weight")
                )
                missing = [name for name in others if not comes(name)]
                if missing:
                    errors.append(
                        f"{prefix}indices name other entries than this layer trains, and "
                        f"{', '.join(missing)} of the same layer do not come with them"
                    )
                    return
                self._restore()
                self._pattern = pattern.to(self.indices.device)
                self.indices = self._pattern.indices
                self._keep_of_input()
        if self.is_written:
            self.doubt_written()  # as in `_apply`
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True tensors may come in other dtypes.
        self._widen_values(self.values.detach())
        if self.base is None and not self._pattern.is_empty:
            self._settle(comes("weight"), comes("base_values"))

    @torch.no_grad()
    def _settle(self, new_weight: bool, new_base_values: bool) -> None:
        """Make weight and base values agree after either was loaded, and the weight hold W0."""
        if new_base_values:
            # Whatever delta the weight held when it was saved goes; the next forward writes ours.
            ops.write_delta(self.weight, self._pattern, self.base_values, None)
        elif new_weight:
            taken = self.weight.detach().view(-1)[self._pattern.entry_indices.long()]
            self.base_values = taken.reshape(self.base_values.shape)
        if new_weight or new_base_values:
            self._written_for = None

    def __getstate__(self) -> dict[str, Any]:
        # Addresses mean nothing in a copy.
        own = ("_input", "kept_columns", "family", "sink", "number")
        state = {key: value for key, value in self.__dict__.items() if key not in own}
        return {**state, "_written_for": UNKNOWN if self.is_written else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def extra_repr(self) -> str:
        pattern = self._pattern
        block = f", block_shape={pattern.block_shape}" if pattern.is_block else ""
        has_bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, "
            f"nnz={pattern.nnz}, density={pattern.density:.4%}{block}, mode={self.mode}"
        )


_untraced = stepping.untraced(SparseDeltaLinear._compute)
