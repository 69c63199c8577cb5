"""Which modules of a model a config means: those that train sparsely, those that train densely."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from .config import ALL_LINEAR, SpeftConfig
from .conv1d import HOOKS, is_conv1d, is_opaque, is_plain_linear, linear_shape
from .errors import ConfigError, nearest
from .family import refuse_sharded

# A smaller share of the weights is left out of many a model: a patch embedding, a convolution.
_MUCH = 0.2
_LAYER = re.compile(r".*\.\d+\.")
_ELSEWHERE = (
    'a mask that was chosen elsewhere trains in it through apply_patterns and mode="additive"'
)
_HOOKED = "it has hooks, which would be lost: remove them, and register them again afterwards"


@dataclass(frozen=True)
class Targets:
    """The modules of one model that a config means.

    Attributes:
        layers: name -> the linear layer (or `Conv1D`) that trains sparsely, in the model's order.
        dense_modules: names of the modules that train densely.
    """

    layers: dict[str, nn.Module]
    dense_modules: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> `(N, K)` of each layer's weight."""
        found = {name: linear_shape(layer) for name, layer in self.layers.items()}
        return {name: shape for name, shape in found.items() if shape is not None}


def find_targets(model: nn.Module, config: SpeftConfig) -> Targets:
    """Find the modules that `config` means in `model`; nothing is changed.

    Raises:
        ConfigError: a name matches nothing (the message gives the nearest), a layer cannot train
            sparsely, a target's weight is shared in resident mode, the blocks do not tile a weight,
            or no layer is left.
    """
    _refuse_unready(model)
    dense = find_dense_modules(model, config.modules_to_train)
    closed = [*dense, *_named_below(model, config.exclude_modules, "exclude_modules")]
    if config.target_modules == ALL_LINEAR:
        wanted = _all_linear(model, closed)
    else:
        wanted = _listed(model, config.target_modules, closed)
    for name, layer in wanted.items():
        reason = _not_served(layer)
        if reason is not None:
            remedy = f"; {_ELSEWHERE}" if is_opaque(layer) else ""
            raise ConfigError(f"layer {name!r} cannot train sparsely: {reason}{remedy}")
    check_layers(model, wanted, config.mode)
    bh, bw = config.block_shape
    targets = Targets(wanted, dense)
    for name, (rows, columns) in targets.shapes.items():
        if rows % bh or columns % bw:
            raise ConfigError(
                f"blocks of {(bh, bw)} do not tile layer {name!r} of shape {(rows, columns)}: "
                "choose a block_shape that divides it, or name the layer in exclude_modules"
            )
    return targets


def find_dense_modules(model: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the topmost modules that `names` mean; None means a transformers model's task head.

    Raises:
        ConfigError: a name matches no module, or only modules without parameters.
    """
    if names is None:
        return tuple(_task_head(model))
    found = _named_below(model, names, "modules_to_train")
    for name in found:
        if next(model.get_submodule(name).parameters(), None) is None:
            raise ConfigError(f"modules_to_train: module {name!r} has no parameters to train")
    return tuple(name for name in found if not is_below(name, [n for n in found if n != name]))


def is_below(name: str, roots: Iterable[str]) -> bool:
    """Return whether a module or parameter name is one of `roots` or lies below one."""
    return any(name == root or name.startswith(root + ".") for root in roots)


def refuse_dense(names: Iterable[str], dense: Sequence[str]) -> None:
    """Raise ConfigError where one of these layers belongs to the modules that train densely."""
    for name in names:
        if is_below(name, dense):
            raise ConfigError(
                f"layer {name!r} belongs to modules_to_train: it trains densely already"
            )


def tensors_below(model: nn.Module, roots: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of modules, named as in `state_dict()`."""
    stored = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in stored.items()
        if isinstance(tensor, torch.Tensor) and is_below(name, roots)
    }


def note_of_left_out(model: nn.Module, targets: Targets, config: SpeftConfig) -> tuple[str, ...]:
    """Return a sentence where "all-linear" leaves out much of the model that nobody excluded.

    As with mixtures of experts, whose experts transformers holds in parameters of three dimensions.
    Embeddings and the output head are not counted.
    """
    if config.target_modules != ALL_LINEAR:
        return ()
    closed = [*targets.dense_modules, *_named_below(model, config.exclude_modules, "")]
    head = _output_embeddings(model)
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name in targets.layers or module is head or isinstance(module, nn.Embedding):
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            if parameter.ndim > 1 and not is_below(key, closed):
                sizes[_LAYER.sub("", key)] += parameter.numel()
    left = sizes.total()
    total = left + sum(n * k for n, k in targets.shapes.values())
    if left <= _MUCH * total:
        return ()
    listed = ", ".join(key for key, _ in sizes.most_common(3)) + (", ..." if len(sizes) > 3 else "")
    note = (
        f"{ALL_LINEAR!r} leaves out {left / total:.0%} of the weights, which are in no nn.Linear "
        f"that can train sparsely: {listed} stay frozen"
    )
    if any(map(can_be_split, model.modules())):
        note += "; experts that are split train: split_experts(model), or --experts split"
    return (note,)


def can_be_split(module: nn.Module) -> bool:
    """Return whether a module holds experts that `experts.split_experts` serves."""
    # `_apply_gate` marks what transformers' decorator says can be computed by other means than the
    # module's own forward pass.
    if not hasattr(module, "_apply_gate") or getattr(module, "_is_expert_parallel", False):
        return False
    wanted = {(name, 3) for name in expert_weights(module)}
    if getattr(module, "has_bias", False):
        wanted |= {(expert_bias(name), 2) for name in expert_weights(module)}
    own = dict(module.named_parameters(recurse=False))
    return {(name, parameter.ndim) for name, parameter in own.items()} == wanted and all(
        parameter.is_floating_point() for parameter in own.values()
    )


def is_experts_part(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Return whether `name` is what a layer is called once the experts above it are split."""
    stacked, _, expert = name.rpartition(".")
    above, _, weight = stacked.rpartition(".")
    module = modules.get(above)
    return (
        module is not None
        and can_be_split(module)
        and weight in expert_weights(module)
        and expert.isdecimal()
    )


def remedy_for_missing(modules: Mapping[str, nn.Module], name: str) -> str:
    """What to say to someone who names a module that is not among those of a model."""
    if is_experts_part(modules, name):
        return " Split the model's experts first: split_experts(model), or --experts split"
    return nearest(name, modules)


def expert_weights(module: nn.Module) -> tuple[str, str]:
    """The names of the two weights of experts, in the order of the products."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def expert_bias(weight: str) -> str:
    """The name of the bias that goes with a weight of experts."""
    return f"{weight}_bias"


def check_layers(model: nn.Module, layers: Mapping[str, nn.Module], mode: str) -> None:
    """Check that each of `layers` can be replaced by a sparse layer in `mode`.

    Raises:
        ConfigError: one cannot; the message names it, the reason and the remedy.
    """
    _refuse_unready(model)
    laid_out = any(map(is_conv1d, layers.values()))
    shared = shared_weights(model) if mode == "resident" or laid_out else {}
    for name, layer in layers.items():
        if name == "":
            raise ConfigError(
                "the model itself is a linear layer, which cannot replace itself: wrap it in an "
                "nn.Sequential, or use SparseDeltaLinear.from_linear"
            )
        opaque = mode == "additive" and is_opaque(layer)
        reason = (None if opaque else _not_served(layer)) or _not_ready(layer)
        if reason is not None:
            remedy = '; use mode="additive"' if is_opaque(layer) and not opaque else ""
            raise ConfigError(f"layer {name!r} cannot train sparsely: {reason}{remedy}")
        other = shared.get(f"{name}.weight")
        if other is not None and is_conv1d(layer):
            raise ConfigError(
                f"layer {name!r} is a Conv1D, whose weight is laid out anew to train, and shares "
                f"it with {other!r}: name the layer in exclude_modules"
            )
        if other is not None and mode == "resident":
            raise ConfigError(
                f"layer {name!r} shares its weight with {other!r}, so a delta inside the weight "
                "would change both: "
                'use mode="additive", or name the layer in exclude_modules'
            )


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Return name -> another name for each parameter or buffer that shares memory with another.

    A module that is registered twice has one name, its first: it is one layer, and what it learns
    is meant for both places.
    """
    spans: list[tuple[int, int, str]] = []
    for name, tensor in _named_tensors(model):
        if tensor.numel() and not tensor.is_meta and tensor.layout == torch.strided:
            reach = sum(
                (size - 1) * stride
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            spans.append((start, start + (reach + 1) * tensor.element_size(), name))
    shared: dict[str, str] = {}
    furthest: tuple[int, int, str] | None = None
    for span in sorted(spans):
        if furthest is not None and span[0] < furthest[1]:
            shared[span[2]] = furthest[2]
            shared.setdefault(furthest[2], span[2])
        if furthest is None or span[1] > furthest[1]:
            furthest = span
    return shared


def _refuse_unready(model: nn.Module) -> None:
    """Raise ConfigError where a parameter or buffer of `model` is sharded, or has no shape yet."""
    refuse_sharded(model.named_parameters())
    for name, tensor in _named_tensors(model):
        if is_lazy(tensor):
            raise ConfigError(
                f"{name!r} belongs to a lazy module and has no shape yet: run the model on a batch "
                "first"
            )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        owner = f"{prefix}." if prefix else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield owner + name, tensor


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith("." + pattern) or _regex(pattern, name)


def _regex(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, RecursionError) as error:
        raise ConfigError(
            f"{pattern!r} is neither a module's name nor a regular expression: {error}"
        ) from error


def _no_match(setting: str, pattern: str, names: Iterable[str], kind: str) -> ConfigError:
    known = dict.fromkeys(part for name in names for part in (name, name.rpartition(".")[2]))
    hint = nearest(pattern, known)
    return ConfigError(f"{setting}: {pattern!r} matches no {kind} of the model.{hint}")


def _named_below(model: nn.Module, patterns: Sequence[str], setting: str) -> list[str]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = [name for name in names if _matches(pattern, name)]
        if not matched:
            raise _no_match(setting, pattern, names, "module")
        found.update(dict.fromkeys(matched))
    return list(found)


def _all_linear(model: nn.Module, closed: list[str]) -> dict[str, nn.Module]:
    skipped: dict[str, str] = {}  # reason -> the first such layer
    layers: dict[str, nn.Module] = {}
    head = _output_embeddings(model)
    for name, module in model.named_modules():
        opaque = is_opaque(module)
        if not (_is_linear(module) or opaque):
            continue
        if module is head or is_below(name, closed):
            continue
        reason = _not_served(module)
        if _is_linear(module) and reason is None:
            layers[name] = module
        else:
            skipped.setdefault(f"{reason}; {_ELSEWHERE}" if opaque else str(reason), name)
    if not layers:
        reasons = "".join(f"; {name!r}: {reason}" for reason, name in list(skipped.items())[:3])
        raise ConfigError(
            f"{ALL_LINEAR!r} found no linear layer to train in {type(model).__name__} besides its "
            f"output head and the excluded modules{reasons}"
        )
    return layers


def _listed(model: nn.Module, patterns: Sequence[str], closed: list[str]) -> dict[str, nn.Module]:
    # A module registered under several names is listed under the first of them, whichever one was
    # matched.
    canonical = {id(module): name for name, module in model.named_modules()}
    modules = list(model.named_modules(remove_duplicate=False))
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matched = [(name, module) for name, module in modules if _matches(pattern, name)]
        linear = {canonical[id(m)]: m for _, m in matched if _is_linear(m)}
        if not linear:
            if matched:
                name, module = matched[0]
                remedy = "name the linear layers in it"
                if is_opaque(module):
                    remedy = _ELSEWHERE
                elif not any(map(_is_linear, module.modules())):
                    remedy = "there is none in it"
                raise ConfigError(
                    f"target_modules: {pattern!r} matches {name!r}, which is a "
                    f"{_kind(module)}; sparse training serves nn.Linear: {remedy}"
                )
            known = [name for name, module in modules if _is_linear(module)]
            raise _no_match("target_modules", pattern, known, "linear layer")
        left = {name: module for name, module in linear.items() if not is_below(name, closed)}
        if not left:
            raise ConfigError(
                f"target_modules: {pattern!r} matches only layers that exclude_modules or "
                f"modules_to_train already name, such as {next(iter(linear))!r}"
            )
        chosen.update(left)
    return {name: chosen[name] for name, _ in model.named_modules() if name in chosen}


def _not_served(module: nn.Module) -> str | None:
    """Why the weight of this kind of module cannot be scored and written to; None where it can."""
    if not _is_linear(module):
        return f"it is a {_kind(module)}, not an nn.Linear"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return (
            "its weight is computed (parametrised, weight-normed): remove the parametrisation first"
        )
    if not (is_plain_linear(module) or is_conv1d(module)) or "forward" in vars(module):
        return (
            f"it ({type(module).__name__}) computes in a way of its own, not as a plain nn.Linear"
        )
    if is_conv1d(module) and not isinstance(module._parameters.get("bias"), nn.Parameter):
        return "it is a Conv1D whose bias is computed (parametrised, pruned): remove that first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _kind(module: nn.Module) -> str:
    """The name of a module's class; in full where others are called Linear, too."""
    kind = type(module)
    return f"{kind.__module__}.Linear" if kind.__name__ == "Linear" else kind.__name__


def refuse_hooks(layers: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError where one of `layers`, which are to be replaced, has hooks."""
    for name, layer in layers.items():
        if _hooks(layer):
            raise ConfigError(f"layer {name!r} cannot be replaced: {_HOOKED}")


def _hooks(module: nn.Module) -> list[str]:
    """Which kinds of hooks a module has; the flag among `HOOKS` outlives those that it is of."""
    held = {key: getattr(module, key) for key in HOOKS}
    return [key for key, hooks in held.items() if isinstance(hooks, Mapping) and hooks]


def _not_ready(module: nn.Module) -> str | None:
    """Why this layer cannot be replaced as it is now; None where it can."""
    opaque = is_opaque(module)
    # An opaque layer is kept within the sparse one, where it is saved and loaded by hooks that its
    # class may give it, as bitsandbytes' do.
    if any(not (opaque and "state_dict" in kind) for kind in _hooks(module)):
        return _HOOKED
    weight = module._parameters.get("weight")
    if weight is None or opaque:
        return None
    if weight.is_meta:
        return "its weight is on the meta device: load the weights first"
    if weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(weight.shape)}: name it in exclude_modules"
    if not (weight.is_contiguous() or is_conv1d(module)):
        return (
            f"its weight is not contiguous (strides {weight.stride()}): give it a contiguous copy"
        )
    return None


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _task_head(model: nn.Module) -> Iterator[str]:
    """Yield the topmost modules outside a transformers model's backbone that own parameters.

    A model with output embeddings predicts tokens: its head is part of what was pre-trained, and
    stays frozen.
    """
    backbone = getattr(model, "base_model", None)
    if not getattr(model, "base_model_prefix", "") or not isinstance(backbone, nn.Module):
        return
    if backbone is model or _output_embeddings(model) is not None:
        return
    inside = {id(parameter) for parameter in backbone.parameters()}
    pending = list(model.named_children())
    while pending:
        name, module = pending.pop(0)
        if any(below is backbone for below in module.modules()):
            if module is not backbone:
                pending.extend(
                    (f"{name}.{child}", below) for child, below in module.named_children()
                )
        elif any(id(parameter) not in inside for parameter in module.parameters()):
            yield name
