"""`MovingMask`: a mask that is chosen again while the model trains.

Two strategies. `merge` is the paper's (arXiv 2412.13488): the whole mask is selected again on the
model as it has become; what was learned stays in the weight, also where it trains no longer.
`rigl` moves a share of the mask (Evci et al., "Rigging the Lottery", arXiv 1911.11134): the trained
entries of the smallest delta go back to their base values, and as many others begin to train where
the gradient is largest.

In both the base weight stays known to the bit: `W = W0 + delta` over every entry that holds a delta
now, and `save` writes just these, as an adapter for the original base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .adapter import StoredLayer, fingerprint, write_adapter
from .config import SpeftConfig
from .dtypes import accumulator_dtype
from .errors import ConfigError, SalienceError
from .family import sync, to_linears
from .install import flags_of, restore_flags, swap_modules
from .model import apply_patterns, score_and_select, sparse_layers
from .nn import SparseDeltaLinear
from .overview import unwrapped
from .pattern import SparsePattern
from .salience import LossFn, SalienceReport, processes
from .salience.accumulate import (
    GradientSums,
    PassStatistics,
    evaluate_loss,
    stream_gradients,
)
from .salience.borrow import borrowed
from .targets import find_targets, refuse_hooks

STRATEGIES = ("merge", "rigl")


@dataclass(frozen=True)
class Delta:
    """Entries (or blocks) of one weight, their base, and what they hold beyond it.

    `values` and `base_values` have the pattern's `values_shape`.
    """

    pattern: SparsePattern
    values: Tensor
    base_values: Tensor

    @classmethod
    def of(cls, layer: SparseDeltaLinear) -> Delta:
        return cls(layer.pattern, layer.values.detach().clone(), layer.base_values.clone())

    def where(self, kept: Tensor) -> Delta:
        """The part at which `kept` (bool, one for each index of the pattern) holds."""
        return Delta(
            _like(self.pattern, self.pattern.indices[kept]),
            self.values[kept],
            self.base_values[kept],
        )

    def joined(self, other: Delta) -> Delta:
        """Both; they must not share an entry."""
        indices = torch.cat([self.pattern.indices, other.pattern.indices])
        order = indices.argsort()
        return Delta(
            _like(self.pattern, indices[order]),
            torch.cat([self.values, other.values])[order],
            torch.cat([self.base_values, other.base_values])[order],
        )

    def state(self) -> dict[str, Any]:
        return {
            "shape": self.pattern.shape,
            "block_shape": self.pattern.block_shape,
            "indices": self.pattern.indices.cpu(),
            "values": self.values.cpu(),
            "base_values": self.base_values.cpu(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Delta:
        pattern = SparsePattern(
            tuple(state["shape"]), state["indices"], tuple(state["block_shape"])
        )
        values, base = state["values"].to(device), state["base_values"].to(device)
        return cls(pattern.to(device), values, base)


@dataclass(frozen=True)
class Move:
    """What an update did.

    Attributes:
        origins: for each layer, for each index of its new pattern, its place in the old one, or -1
            where it starts anew: it did not train before, or "rigl" dropped it and grew it again;
            int64.
        old_units: for each layer, how many indices its old pattern had; 0 where its values are
            frozen, and so no part of the flat ones.
        moved: scalars that train now and did not before.
        report: of the selection; None for "rigl", which selects only what grows.
        squares: for each layer with values, of their shape, the square of the gradient of each,
            the mean over the batches; None for "merge", and where nothing starts anew.
    """

    origins: dict[str, Tensor]
    old_units: dict[str, int]
    moved: int
    report: SalienceReport | None
    squares: dict[str, Tensor] | None = None


class MovingMask:
    """Moves the mask of a sparse model, and knows every entry that holds a delta.

    Args:
        model: made sparse with `config`, its values still those of the base (zero).
        config: as for `sparsify`; `salience` and `scope` select under "merge", under "rigl" the
            scope says whether each layer keeps its number of entries, or all of them together.
        strategy: "merge" or "rigl".
        share: of the mask that "rigl" moves at first.

    Raises:
        ConfigError: an unknown strategy, a share outside (0, 1), mode "additive" (the base then
            belongs to others too, and selection writes the delta into it), or no sparse layers.
    """

    def __init__(
        self, model: nn.Module, config: SpeftConfig, strategy: str, *, share: float = 0.3
    ) -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
        if not 0 < share < 1:
            raise ConfigError(f"share must lie in (0, 1), got {share!r}")
        if config.mode != "resident":
            raise ConfigError('a mask that moves needs mode="resident"')
        layers = sparse_layers(model)
        if not layers:
            raise ConfigError("the model has no sparse layers: sparsify(model, config) comes first")
        self.config, self.strategy, self.share = config, strategy, share
        self._bases = {name: fingerprint(layer) for name, layer in layers.items()}
        # Deltas of entries that train no longer: in the weight, beside what the layers hold.
        self._left = {name: _nothing(layer) for name, layer in layers.items()}

    @property
    def left_behind(self) -> int:
        """Trained scalars that stay behind in the weights without training any more."""
        return sum(delta.pattern.nnz for delta in self._left.values())

    def update(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        *,
        progress: float,
    ) -> Move:
        """Choose the mask again; the sparse layers are replaced, their values carried over.

        A `FlatValues` of the model, and an optimizer's hold on the values, are void afterwards: see
        `carry`. Where torch.distributed is initialised all processes call this together, each with
        batches of its own: gradients are summed, so models that were equal stay so.

        Args:
            batches: "rigl" goes over them twice, and keeps an iterator as a list.
            progress: share of the training, in [0, 1], by which the share that "rigl" moves falls
                from `share` to 0 along a cosine.

        Raises:
            ConfigError: a layer has hooks, which would be lost.
            SalienceError: as for `sparsify`; or there were no batches the second time. On any
                error, one out of `loss_fn` among them, the model is as it was, and a `FlatValues`
                and an optimizer of it go on.
        """
        model = unwrapped(model)
        layers = sparse_layers(model)
        refuse_hooks(layers)
        trained = {name: Delta.of(layer) for name, layer in layers.items()}
        touched = {name: delta.joined(self._left[name]) for name, delta in trained.items()}
        # Before anything is changed: the model may have been cast since.
        ops.check_deltas(*_operands(model, touched))
        families = [(layer, layer.family) for layer in layers.values()]
        plain = to_linears(layers.values(), keep_delta=True)  # W = W0 + everything touched
        with ExitStack() as undo:
            for layer, family in families:
                undo.callback(setattr, layer, "family", family)
            undo.callback(self._put_back, model, layers, touched, self._left)
            swap_modules(model, plain)
            report, kept = None, touched
            if self.strategy == "merge":
                # What is drawn by chance is drawn anew: the progress tells the updates apart.
                seed = (self.config.seed + round(progress * 2**32)) % 2**63  # of a config
                # The head is warm: it trains along, and warming it up would move the model.
                config = dataclasses.replace(self.config, seed=seed, head_warmup_steps=0)
                patterns, report = score_and_select(model, config, batches, loss_fn)
            else:
                kept, patterns, batches = self._regrown(model, trained, batches, loss_fn, progress)
            _erase(model, touched)
            frozen = [n for n, x in layers.items() if is_frozen(x)]
            self._install(model, patterns, kept, frozen)
            origins, moved = {}, 0
            for name, pattern in patterns.items():
                origin = places(pattern.indices, trained[name].pattern.indices)
                moved += int((origin < 0).sum()) * math.prod(pattern.block_shape)
                stayed = places(pattern.indices, kept[name].pattern.indices) >= 0
                origins[name] = origin.where(stayed, -1)
            old_units = {n: 0 if n in frozen else x.pattern.num_blocks for n, x in trained.items()}
            anew = any(bool((origin < 0).any()) for origin in origins.values())
            squares = None
            if self.strategy == "rigl" and anew:
                squares = self._squares(model, batches, loss_fn)
            undo.pop_all()
        return Move(origins, old_units, moved, report, squares)

    def _put_back(
        self,
        model: nn.Module,
        layers: Mapping[str, SparseDeltaLinear],
        touched: Mapping[str, Delta],
        left: dict[str, Delta],
    ) -> None:
        """Put the layers back that an update replaces, and into the weights what they held."""
        swap_modules(model, to_linears(sparse_layers(model).values(), keep_delta=False))
        _erase(model, touched)
        swap_modules(model, {model.get_submodule(name): layer for name, layer in layers.items()})
        self._left = left
        _put(model, left)
        sync(layers.values())

    def save(self, model: nn.Module, folder: Path, **arguments: Any) -> None:
        """Write the adapter of everything that holds a delta: it loads on the original base.

        `arguments` and errors as for `save_adapter`.
        """
        stored = {}
        for name, layer in sparse_layers(model).items():
            delta = Delta.of(layer).joined(self._left[name])
            held = delta.pattern, delta.values, delta.base_values
            stored[name] = StoredLayer(*held, self._bases[name])
        write_adapter(model, stored, folder, **arguments)

    def release(self, model: nn.Module) -> None:
        """Take what was left behind out of the weights, whose other entries stay as they are.

        Before the model is given an adapter, which says again what the weights hold.
        """
        _erase(model, self._left)
        self._left = {name: _nothing(layer) for name, layer in sparse_layers(model).items()}

    def state_dict(self) -> dict[str, Any]:
        """What was left behind, as plain data and tensors on the CPU."""
        return {name: delta.state() for name, delta in self._left.items()}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned, in a model whose layers have the same patterns.

        Raises ValueError, or what reading such a state raises, for another one's; nothing is
        changed then.
        """
        found = {}
        for name, layer in sparse_layers(model).items():
            left = Delta.from_state(state[name], layer.weight.device)
            there, own = left.pattern, layer.pattern
            if (there.shape, there.block_shape) != (own.shape, own.block_shape):
                raise ValueError(f"layer {name!r} has another shape than what it left behind")
            if not left.values.shape == left.base_values.shape == there.values_shape:
                raise ValueError(f"layer {name!r} left other values behind than entries")
            if bool((places(there.indices, own.indices) >= 0).any()):
                raise ValueError(f"layer {name!r} trains entries that it left behind")
            found[name] = left
        _put(model, found)
        self._left = found

    def _install(
        self,
        model: nn.Module,
        patterns: Mapping[str, SparsePattern],
        kept: Mapping[str, Delta],
        frozen: Iterable[str],
    ) -> None:
        """Make plain layers that hold W0 sparse, with the deltas `kept` in or beside `patterns`.
        What trained beside them, as a bias, trains on; the values of those in `frozen` do not.
        """
        flags = flags_of(model)
        apply_patterns(model, patterns, self.config)
        restore_flags(flags)
        layers = sparse_layers(model)
        for name in frozen:
            layers[name].values.requires_grad_(False)
        self._left = {}
        for name, layer in layers.items():
            delta = kept[name]
            found = places(layer.pattern.indices, delta.pattern.indices)
            known = found >= 0
            with torch.no_grad():
                layer.values[known] = delta.values[found[known]]
            beside = places(delta.pattern.indices, layer.pattern.indices) < 0
            self._left[name] = delta.where(beside)
        _put(model, self._left)
        sync(layers.values())

    def _regrown(
        self,
        model: nn.Module,
        trained: Mapping[str, Delta],
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        progress: float,
    ) -> tuple[dict[str, Delta], dict[str, SparsePattern], Iterable[Any]]:
        """What stays, the patterns with what grows in the place of what goes, and the batches to be
        gone over once more.
        """
        share = self.share / 2 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        kept = {
            name: trained[name].where(stays)
            for name, stays in _survivors(trained, share, self.config.scope).items()
        }
        _erase(model, trained)
        _put(model, kept)
        layers: dict[str, Any] = find_targets(model, self.config).layers
        sums = GradientSums(
            layers, self.config.accumulator_dtype, self.config.accumulator_device, "sum"
        )
        again = batches

        def run() -> PassStatistics:
            nonlocal again
            # Inside the pass, so that an error of the iterator ends it in every process.
            again = list(batches) if isinstance(batches, Iterator) else batches
            return stream_gradients(model, layers, again, loss_fn, sums.add)

        with borrowed(model, self.config.seed):
            statistics = processes.together(run, layers, sums)
        statistics.check(layers)
        scores = {name: _growth(sums.sums.pop(name), kept[name].pattern) for name in trained}
        groups = [[name] for name in trained]
        if self.config.scope == "global":
            groups = [list(trained)]
        patterns = {}
        for group in groups:
            count = sum(trained[n].pattern.num_blocks - kept[n].pattern.num_blocks for n in group)
            grown = (
                ops.topk_salience(
                    [None] * len(group),
                    [scores[name] for name in group],
                    count,
                    metric="raw",
                    scope="global",
                    names=[f"layer {name!r}" for name in group],
                )
                if count
                else [scores[name].new_empty(0, dtype=torch.int64) for name in group]
            )
            for name, indices in zip(group, grown, strict=True):
                stays = kept[name].pattern
                new = torch.cat([stays.indices.long(), indices.to(stays.device).long()])
                patterns[name] = _like(stays, new.sort().values)
        return kept, patterns, again

    def _squares(
        self, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None
    ) -> dict[str, Tensor]:
        """The mean over the batches of the square of each value's gradient."""
        layers = {n: x for n, x in sparse_layers(model).items() if x.values.numel()}
        sums = {
            name: torch.zeros_like(layer.values, dtype=accumulator_dtype(layer.values.dtype))
            for name, layer in layers.items()
        }

        def run() -> int:
            for layer in layers.values():
                layer.values.requires_grad_(True)
            count = 0
            for batch in batches:
                count += 1
                evaluate_loss(model, batch, loss_fn, f"batch {count}").backward()
                for name, layer in layers.items():
                    if layer.values.grad is not None:
                        sums[name] += layer.values.grad.to(sums[name].dtype).square()
                        layer.values.grad = None
            return count

        with borrowed(model, self.config.seed):
            count = processes.summed(run, sums.values())
        if not count:
            raise SalienceError(
                "'rigl' goes over the batches twice, and the second time there were none: pass a "
                "list"
            )
        return {name: total.detach() / count for name, total in sums.items()}


def places(wanted: Tensor, among: Tensor) -> Tensor:
    """The place of each index of `wanted` in the sorted `among`, or -1; int64."""
    wanted, among = wanted.long(), among.long()
    if not among.numel():
        return torch.full_like(wanted, -1)
    at = torch.searchsorted(among, wanted).clamp_(max=among.numel() - 1)
    return torch.where(among[at] == wanted, at, -1)


def _survivors(trained: Mapping[str, Delta], share: float, scope: str) -> dict[str, Tensor]:
    """For each layer, which of its entries or blocks stay: all but those of the smallest delta."""
    sizes = {
        name: delta.values.abs().reshape(-1, math.prod(delta.pattern.block_shape)).sum(1)
        for name, delta in trained.items()
    }
    groups = [[name] for name in sizes] if scope == "layer" else [list(sizes)]
    stays = {}
    for group in groups:
        size = torch.cat([sizes[name].cpu() for name in group])
        keep = torch.ones(len(size), dtype=torch.bool, device=size.device)
        # A stable order: of equal deltas the first go, whatever the device.
        keep[size.argsort(stable=True)[: round(share * len(size))]] = False
        parts = keep.split([len(sizes[name]) for name in group])
        stays.update({n: part.to(sizes[n].device) for n, part in zip(group, parts, strict=True)})
    return stays


def _growth(gradient: Tensor, stays: SparsePattern) -> Tensor:
    """`[N / bh, K / bw]`: the sum of |g| of each block; -1 where one trains already."""
    (rows, cols), (bh, bw) = gradient.shape, stays.block_shape
    scores = gradient.abs().to(accumulator_dtype(gradient.dtype))
    if stays.is_block:
        scores = scores.reshape(rows // bh, bh, cols // bw, bw).sum(dim=(1, 3))
    scores.view(-1)[stays.indices.to(scores.device).long()] = -1
    return scores


def is_frozen(layer: SparseDeltaLinear) -> bool:
    return bool(layer.values.numel()) and not layer.values.requires_grad


def _like(pattern: SparsePattern, indices: Tensor) -> SparsePattern:
    return SparsePattern(pattern.shape, indices, pattern.block_shape)


def _nothing(layer: SparseDeltaLinear) -> Delta:
    none = torch.zeros(layer.pattern.num_blocks, dtype=torch.bool, device=layer.weight.device)
    return Delta.of(layer).where(none)


def _put(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Write base and values of the deltas into the model's weights, all at once."""
    ops.write_deltas(*_operands(model, deltas))


def _erase(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Write the base of the deltas into the model's weights, all at once."""
    weights, patterns, base_values, _ = _operands(model, deltas)
    ops.write_deltas(weights, patterns, base_values, None)


def _operands(
    model: nn.Module, deltas: Mapping[str, Delta]
) -> tuple[list[Any], list[SparsePattern], list[Tensor], list[Tensor]]:
    """What `ops.write_deltas` takes, of the weights that hold an entry of a delta."""
    held = {name: delta for name, delta in deltas.items() if not delta.pattern.is_empty}
    return (
        [unwrapped(model).get_submodule(name).weight for name in held],
        [delta.pattern for delta in held.values()],
        [delta.base_values for delta in held.values()],
        [delta.values for delta in held.values()],
    )
