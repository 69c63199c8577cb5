"""Putting sparse layers into a model, and remembering what that changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .conv1d import Conv1DLinear, Loan, is_conv1d, to_conv1d
from .errors import ConfigError, PatternError
from .family import Family
from .nn import SparseDeltaLinear
from .overview import sparse_layers, unwrapped
from .pattern import SparsePattern
from .targets import check_layers, remedy_for_missing

_STATE = "_speft_state"


@dataclass
class SparseState:
    """What a sparse model remembers about itself.

    Attributes:
        dense_tensors: names of the parameters and buffers that train densely, as in `state_dict()`.
        switched_off: (module, attribute, former value) of the fused paths that would read weights
            past the layers.
    """

    dense_tensors: tuple[str, ...] = ()
    switched_off: list[tuple[nn.Module, str, Any]] = field(default_factory=list)


def sparse_state(model: nn.Module) -> SparseState:
    """Return what `model` remembers; an empty state where it was not made sparse here."""
    state: SparseState = vars(model).get(_STATE, SparseState())
    return state


def is_sparse(model: nn.Module) -> bool:
    """Return whether `model` has sparse layers, or was prepared for an adapter without any."""
    return _STATE in vars(unwrapped(model)) or bool(sparse_layers(model))


def install(
    model: nn.Module,
    patterns: Mapping[str, SparsePattern],
    mode: str,
    dense_tensors: Iterable[str],
    undo: ExitStack,
) -> None:
    """Replace the layers, freeze the rest, and remember what is to be saved.

    Each step pushes its reversal on `undo`; the caller unwinds it on an error.

    Raises:
        ConfigError: see `apply_patterns`.
    """
    modules = dict(model.named_modules())
    for name in patterns:
        if name not in modules:
            remedy = remedy_for_missing(modules, name)
            raise ConfigError(f"the model has no module {name!r}.{remedy}")
    check_layers(model, {name: modules[name] for name in patterns}, mode)
    loans: list[Loan] = []
    undo.callback(_give_back, model, loans)
    put_linear_for_conv1d(model, patterns, loans)
    modules = dict(model.named_modules())

    tensors = model.state_dict(keep_vars=True)  # of sparse layers it would write the weights
    undo.callback(restore_flags, flags_of(model))
    dense_tensors = tuple(dense_tensors)
    dense = {id(tensors[name]): name for name in dense_tensors}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, pattern in patterns.items():
        try:
            sparse = SparseDeltaLinear.from_linear(modules[name], pattern, mode)
        except (ConfigError, PatternError) as error:
            raise ConfigError(f"layer {name!r}: {error}") from error
        if id(sparse.weight) in dense:
            raise ConfigError(
                f"layer {name!r} shares its weight with {dense[id(sparse.weight)]!r}, which trains "
                "densely: name the layer in exclude_modules"
            )
        replacements[modules[name]] = sparse.train(modules[name].training)
    undo.callback(swap_modules, model, {new: old for old, new in replacements.items()})
    swap_modules(model, replacements)
    layers = list(sparse_layers(model).values())
    family = Family(layers)
    for layer in layers:
        layer.family = family

    fused = _fused_paths(model)
    for module, attribute, value in fused:
        undo.callback(setattr, module, attribute, value)
        setattr(module, attribute, False)
    # Layers that replace sparse ones find the fused paths above them switched off already.
    state = SparseState(dense_tensors, [*sparse_state(model).switched_off, *fused])
    undo.callback(_restore_state, model, vars(model).get(_STATE))
    setattr(model, _STATE, state)

    trained = {id(layer.values) for layer in layers}
    trained |= {id(tensors[name]) for name in state.dense_tensors}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
        elif parameter.is_floating_point() and parameter.numel():
            parameter.requires_grad_(True)


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they are registered in `model`."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


@contextmanager
def linear_for_conv1d(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Have a linear layer in the place of each `Conv1D` of these names inside. At the end those
    that have become sparse stay so, and the others are what they were.

    `check_layers` knows whether it can be.
    """
    loans: list[Loan] = []
    try:
        put_linear_for_conv1d(model, names, loans)
        yield
    finally:
        _give_back(model, loans)


def put_linear_for_conv1d(
    model: nn.Module, names: Iterable[str], loans: list[Loan] | None = None
) -> None:
    """Put a linear layer in the place of each `Conv1D` of these names, and note it in `loans`."""
    modules = dict(model.named_modules())
    loans = [] if loans is None else loans
    for name in names:
        module = modules.get(name)
        if module is not None and is_conv1d(module):
            loans.append(Loan(module))
    swap_modules(model, {loan.conv1d: loan.linear for loan in loans})


def _give_back(model: nn.Module, loans: Iterable[Loan]) -> None:
    present = set(model.modules())
    ended = [loan for loan in loans if loan.linear in present or loan.conv1d in present]
    for loan in ended:
        loan.give_back()
    swap_modules(model, {loan.linear: loan.conv1d for loan in ended})


def conv1d_for_linear(model: nn.Module) -> None:
    """Put a new `Conv1D` in the place of each linear layer that came in the place of one."""
    made: dict[nn.Module, nn.Module] = {}
    try:
        for module in model.modules():
            if isinstance(module, Conv1DLinear):
                made[module] = to_conv1d(module)
    finally:
        swap_modules(model, made)


Flags = list[tuple[nn.Parameter, bool, Any]]


def flags_of(model: nn.Module) -> Flags:
    """Return which parameters of `model` train, and their gradients."""
    return [(p, p.requires_grad, p.grad) for p in model.parameters()]


def restore_flags(flags: Flags) -> None:
    for parameter, flag, gradient in flags:
        parameter.requires_grad_(flag)
        parameter.grad = gradient


def _restore_state(model: nn.Module, state: SparseState | None) -> None:
    vars(model).pop(_STATE, None)
    if state is not None:
        setattr(model, _STATE, state)


def _fused_paths(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Find the inference paths of nn.TransformerEncoder that read `linear1.weight` themselves.

    They never call the layers: an additive delta would be left out, a resident one be as old as the
    last call.
    """
    paths: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            name = (
                "use_nested_tensor"
                if isinstance(module, nn.TransformerEncoder)
                else "activation_relu_or_gelu"
            )
            if sparse_layers(module) and getattr(module, name, False):
                paths.append((module, name, getattr(module, name)))
    return paths


def forget(model: nn.Module) -> None:
    """Switch the fused paths on again and drop the state of a model without sparse layers."""
    for module, attribute, value in sparse_state(model).switched_off:
        setattr(module, attribute, value)
    vars(model).pop(_STATE, None)
