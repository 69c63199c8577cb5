"""Making a whole model sparse, and plain again. What wraps it, as `torch.compile` does, is looked
through (`overview.unwrapped`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from .config import SpeftConfig
from .conv1d import Conv1DLinear
from .errors import ConfigError
from .family import refuse_sharded, set_modes, to_linears
from .install import conv1d_for_linear, forget, install, linear_for_conv1d, swap_modules
from .nn import SparseDeltaLinear
from .overview import (
    Summary,
    SummaryRow,
    sparse_layers,
    summary,
    trainable_parameters,
    unwrapped,
)
from .pattern import SparsePattern
from .salience import METRICS, LossFn, SalienceReport, metric_named
from .salience.borrow import borrowed, undone_on_error
from .salience.select import select_patterns
from .salience.warmup import warm_up
from .targets import (
    Targets,
    find_dense_modules,
    find_targets,
    note_of_left_out,
    refuse_dense,
    shared_weights,
    tensors_below,
)

__all__ = [
    "SpeftConfig",
    "Summary",
    "SummaryRow",
    "apply_patterns",
    "desparsify",
    "merge",
    "score_and_select",
    "sparse_layers",
    "sparsify",
    "summary",
    "trainable_parameters",
    "unmerge",
]


def sparsify(
    model: nn.Module,
    config: SpeftConfig,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
) -> SalienceReport:
    """Score, select what trains, replace the linear layers and freeze the rest; in place.

    Afterwards only the layers' `values` and `config.modules_to_train` require grad.

    Args:
        batches: what to score with, moved to the model's device batch by batch. An iterable of
            dicts of tensors, or of whatever `loss_fn` takes. Metrics "magnitude", "synflow" and
            "random" need none; "grasp" goes over them twice and keeps an iterator as a list.
        loss_fn: `loss_fn(model, batch)` returns a scalar; by default `model(**batch).loss`. For
            "synflow" see `salience.synflow.stream_synaptic_flow`.

    Returns:
        How the selection was made and what it cost.

    Raises:
        ConfigError: the config does not fit the model (see `targets.find_targets`), the model has
            sparse layers already, or batches are needed and missing.
        SalienceError: a loss or gradient is not finite, or a layer received no gradient.
        On any error, also one out of `loss_fn`, the model is as it was.
    """
    model = unwrapped(model)
    targets = _targets_to_score(model, config, batches)
    with undone_on_error(_head(model, config, targets)), linear_for_conv1d(model, targets.layers):
        patterns, report = _score(model, config, targets, batches, loss_fn)
        apply_patterns(model, patterns, config)
    return report


def score_and_select(
    model: nn.Module,
    config: SpeftConfig,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
) -> tuple[dict[str, SparsePattern], SalienceReport]:
    """Return layer name -> pattern, and the report: `sparsify` without replacing the layers.

    With `head_warmup_steps` the task head stays warmed up. Arguments and errors as for `sparsify`.
    """
    model = unwrapped(model)
    targets = _targets_to_score(model, config, batches)
    with undone_on_error(_head(model, config, targets)), linear_for_conv1d(model, targets.layers):
        return _score(model, config, targets, batches, loss_fn)


def apply_patterns(
    model: nn.Module, patterns: Mapping[str, SparsePattern], config: SpeftConfig
) -> None:
    """Replace the linear layers that `patterns` names by sparse ones, and freeze the rest.

    `config` says the mode and the `modules_to_train`. Gradients of frozen parameters are dropped.

    Raises:
        ConfigError: a name is not a layer of the model or cannot train sparsely, a pattern is for
            another shape, or the model has sparse layers already. The model is as it was.
    """
    model = unwrapped(model)
    _refuse_sparse(model)
    dense = find_dense_modules(model, config.modules_to_train)
    refuse_dense(patterns, dense)
    tensors = tensors_below(model, dense)
    with ExitStack() as undo:
        install(model, patterns, config.mode, tensors, undo)
        undo.pop_all()


def merge(model: nn.Module) -> None:
    """Write every layer's delta into its weight (mode "resident"); the model computes the same.

    One write for all layers of a dtype and a device. On any error nothing is changed.

    Raises:
        ConfigError: no sparse layers, or one whose weight is shared or cannot hold a delta.
    """
    model = unwrapped(model)
    layers = _require_sparse(model)
    refuse_delta_in_shared(model, layers)
    set_modes(dict.fromkeys(layers.values(), "resident"))


def unmerge(model: nn.Module) -> None:
    """Restore every base weight, bit for bit (mode "additive"); the model computes the same.

    One write for all layers of a dtype and a device. On any error nothing is changed.

    Raises:
        ConfigError: no sparse layers.
    """
    set_modes(dict.fromkeys(_require_sparse(model).values(), "additive"))


def desparsify(model: nn.Module, keep_delta: bool = True) -> None:
    """Put plain layers back, `nn.Linear` or transformers' `Conv1D`, whichever they were: with base
    plus delta, or without `keep_delta` exactly the base.

    Parameters keep their `requires_grad`, so the layers' weights stay frozen; hooks go along.

    Raises:
        ConfigError: no sparse layers, or the model is one itself; with `keep_delta`, one whose
            weight is shared or cannot hold a delta. Nothing is changed.
    """
    model = unwrapped(model)
    if isinstance(model, SparseDeltaLinear):
        raise ConfigError(
            "the model itself is a sparse layer, in whose place nothing can be put: use what its "
            "to_linear() returns"
        )
    if not any(isinstance(module, Conv1DLinear) for module in model.modules()):
        # Else a former call was cut short, as by a want of memory: this one goes on from there.
        _require_sparse(model)
    layers = sparse_layers(model)
    if keep_delta:
        refuse_delta_in_shared(model, layers)
    swap_modules(model, to_linears(layers.values(), keep_delta))
    conv1d_for_linear(model)
    forget(model)


def _refuse_sparse(model: nn.Module) -> None:
    present = sparse_layers(model)
    if present:
        raise ConfigError(
            f"the model has sparse layers already, such as {next(iter(present))!r}: call "
            "desparsify(model) first"
        )


def _require_sparse(model: nn.Module) -> dict[str, SparseDeltaLinear]:
    refuse_sharded(model.named_parameters())
    layers = sparse_layers(model)
    if not layers:
        raise ConfigError(
            "the model has no sparse layers: call sparsify(model, config) or load an adapter first"
        )
    return layers


def refuse_delta_in_shared(model: nn.Module, layers: Mapping[str, SparseDeltaLinear]) -> None:
    """Raise ConfigError where a layer's weight is shared or cannot hold a delta."""
    shared = shared_weights(model)
    for name, layer in layers.items():
        if layer.pattern.is_empty:
            continue
        if layer.base is not None:
            raise ConfigError(
                f"the base of layer {name!r} is a {type(layer.base).__name__}, which cannot hold a "
                "delta; it stays additive"
            )
        other = shared.get(f"{name}.weight")
        if other is not None:
            raise ConfigError(
                f"layer {name!r} shares its weight with {other!r}, so writing its delta would "
                "change both: give the layer a weight of its own first, or keep the delta additive"
            )


def _targets_to_score(
    model: nn.Module, config: SpeftConfig, batches: Iterable[Any] | None
) -> Targets:
    _refuse_sparse(model)
    if isinstance(batches, Mapping):
        raise ConfigError("batches must be many, and this is one: pass [batch]")
    targets = find_targets(model, config)
    if config.head_warmup_steps and not targets.dense_modules:
        raise ConfigError("head_warmup_steps: no head to warm up; name it in modules_to_train")
    if batches is None and config.head_warmup_steps:
        raise ConfigError("head_warmup_steps needs batches")
    metric = metric_named(config.salience)
    if batches is None and metric.needs_data:
        dataless = ", ".join(key for key, known in METRICS.items() if not known.needs_data)
        raise ConfigError(
            f"salience {metric.key!r} needs batches to score with; metrics that need none: "
            f"{dataless}"
        )
    return targets


def _head(model: nn.Module, config: SpeftConfig, targets: Targets) -> list[Tensor]:
    """Return the tensors that the head warm-up writes to."""
    if not config.head_warmup_steps:
        return []
    return list(tensors_below(model, targets.dense_modules).values())


def _score(
    model: nn.Module,
    config: SpeftConfig,
    targets: Targets,
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
) -> tuple[dict[str, SparsePattern], SalienceReport]:
    start = time.perf_counter()
    if config.head_warmup_steps and batches is not None:
        if iter(batches) is batches:
            batches = list(batches)  # an iterator passes once, and the scoring comes after
        head = [
            parameter
            for name in targets.dense_modules
            for parameter in model.get_submodule(name).parameters()
            if parameter.is_floating_point()
        ]
        with borrowed(model, config.seed):
            warm_up(
                model,
                list(dict.fromkeys(head)),
                batches,
                loss_fn,
                steps=config.head_warmup_steps,
                lr=config.head_warmup_lr,
            )
    warmed = time.perf_counter() - start
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets.layers}
    with borrowed(model, config.seed):
        patterns, report = select_patterns(
            model,
            layers,
            config,
            batches,
            loss_fn,
            head_warmup_seconds=warmed if config.head_warmup_steps else 0.0,
        )
    notes = (*report.notes, *note_of_left_out(model, targets, config))
    return patterns, dataclasses.replace(report, notes=notes)
