"""The experts of a mixture as linear layers, which can train sparsely, and back.

transformers holds the experts of a layer in parameters of three dimensions, `gate_up_proj`
`[E, 2 I, H]` and `down_proj` `[E, H, I]`, and has them multiplied past any module. Split, each
expert has an `nn.Linear` for either. Its weight is a part of the parameter's memory, not a copy;
where a model holds the transposes (gpt-oss, Aria), of the parameter laid out anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .family import refuse_sharded
from .install import swap_modules
from .overview import unwrapped
from .targets import can_be_split, expert_bias, expert_weights, is_experts_part, refuse_hooks


def split_experts(model: nn.Module) -> list[str]:
    """Put an `nn.Linear` in the place of each expert's part of transformers' mixtures, in place.

    Call it before `sparsify`, `apply_patterns` or `load_adapter`, for which the layers are called
    as in `model.layers.0.mlp.experts.gate_up_proj.3`. The model computes the same; the experts that
    a batch reaches are computed one after the other, and each mixture waits once for the device to
    know which. `join_experts` restores the parameters, which `save_pretrained` needs.

    Returns:
        The names of the modules that hold experts.

    Raises:
        ConfigError: there are no experts that can be split (those of Llama 4 or spread over
            processes stay as they are), or their module has hooks. The model is as it was. Where
            memory runs out, the modules before stay split.
    """
    model = unwrapped(model)
    refuse_sharded(model.named_parameters())
    found = {name: module for name, module in model.named_modules() if can_be_split(module)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts that can be split: none in parameters of three "
            "dimensions that transformers' own experts' implementations multiply"
        )
    _refuse_itself(found)
    refuse_hooks(found)
    for module in found.values():  # one by one, so that no more than one is there twice
        swap_modules(model, {module: SplitExperts(module)})
    return list(found)


def join_experts(model: nn.Module) -> None:
    """Undo `split_experts`: put the experts' weights back into parameters of three dimensions,
    without a copy where they still lie side by side and are not to be transposed.

    Raises:
        ConfigError: no experts are split, or some are sparse: call `desparsify` first. The model is
            as it was. Where memory runs out, the modules before stay joined.
    """
    model = unwrapped(model)
    found = {n: module for n, module in model.named_modules() if isinstance(module, SplitExperts)}
    if not found:
        raise ConfigError("the model has no split experts")
    for name, module in found.items():
        for below, layer in module.linears():
            if type(layer) is not nn.Linear:
                raise ConfigError(
                    f"expert {f'{name}.{below}'!r} is a {type(layer).__name__}: call "
                    "desparsify(model) first"
                )
    _refuse_itself(found)
    refuse_hooks(found)
    for module in found.values():
        swap_modules(model, {module: module.joined()})


def _refuse_itself(found: Mapping[str, nn.Module]) -> None:
    if "" in found:
        raise ConfigError(
            "the model itself is the module of experts, which cannot replace itself: wrap it in an "
            "nn.Sequential"
        )


def names_experts(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether one of `names` is a layer that is there once the model's experts are split."""
    modules = dict(unwrapped(model).named_modules())
    return any(is_experts_part(modules, name) for name in names)


class SplitExperts(nn.Module):
    """A module of experts that are linear layers, called as transformers calls that of its own."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._first, _ = names = expert_weights(experts)
        self._transposed: bool = getattr(experts, "is_transposed", False)
        stacks = {name: self._laid_out(experts._parameters[name]) for name in names}
        # Without its parameters, for what it does between the two products and after them.
        self._between = experts
        for name, stacked in stacks.items():
            del experts._parameters[name]
            biases = experts._parameters.pop(expert_bias(name), None)
            linears = (_linear(stacked, biases, expert) for expert in range(len(stacked)))
            self.add_module(name, nn.ModuleList(linears))
        self.train(experts.training)

    def _laid_out(self, stacked: nn.Parameter) -> nn.Parameter:
        """The weights with those of each expert transposed, where transformers holds them so."""
        if not self._transposed:
            return stacked
        with torch.inference_mode(False):  # or they could never train
            transposed = stacked.detach().transpose(1, 2)
            copy = transposed.clone(memory_format=torch.contiguous_format)
            return nn.Parameter(copy, requires_grad=stacked.requires_grad)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum over each token's experts, `[T, H]`.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: `[T, k]`, which experts; `top_k_weights`, `[T, k]`, by what weights.
        """
        first, second = self._lists()
        wanted = top_k_index.reshape(-1)
        order = wanted.argsort(stable=True)
        counts = torch.bincount(wanted, minlength=len(first)).tolist()
        tokens = torch.div(order, top_k_index.shape[-1], rounding_mode="floor")
        parts = hidden_states[tokens].split(counts)
        # With gradients all take part: those that no token reaches have one of zero, as scoring and
        # data-parallel training expect.
        outputs = [
            self._finished(second[expert](self._activate(first[expert](part))))
            for expert, part in enumerate(parts)
            if part.shape[0] or torch.is_grad_enabled()
        ]
        sorted_outputs = torch.cat(outputs) if outputs else hidden_states[tokens]
        # Summed in the order of the tokens: adding by index has another order at each run of a GPU.
        weighted = sorted_outputs[order.argsort()].unflatten(0, top_k_index.shape)
        summed = (weighted * top_k_weights.unsqueeze(-1)).sum(1)
        return summed.to(hidden_states.dtype)

    def _activate(self, hidden: Tensor) -> Tensor:
        between = self._between
        activated: Tensor = (
            between._apply_gate(hidden) if self._first != "up_proj" else between.act_fn(hidden)
        )
        return activated

    def _finished(self, output: Tensor) -> Tensor:
        norm = getattr(self._between, "has_post_expert_norm", False)
        finished: Tensor = self._between.post_expert_norm(output) if norm else output
        return finished

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """The names of the experts' layers in this module, and the layers."""
        for name, layers in zip((self._first, "down_proj"), self._lists(), strict=True):
            for expert, layer in layers.named_children():
                yield f"{name}.{expert}", layer

    def _lists(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        return getattr(self, self._first), self.down_proj  # type: ignore[return-value]

    def joined(self) -> nn.Module:
        """The module that was split, with the parameters as they are now; this one is not to be
        used afterwards.
        """
        experts: nn.Module = self._between
        found = {}
        for name, layers in zip((self._first, "down_proj"), self._lists(), strict=True):
            linears: list[Any] = list(layers)
            found[name] = self._laid_out(_stacked([linear.weight for linear in linears]))
            if linears[0].bias is not None:
                found[expert_bias(name)] = _stacked([linear.bias for linear in linears])
        for name, parameter in found.items():
            experts.register_parameter(name, parameter)
        return experts.train(self.training)


@torch.inference_mode(False)
def _linear(weights: nn.Parameter, biases: nn.Parameter | None, expert: int) -> nn.Linear:
    out_features, in_features = weights[expert].shape
    linear = nn.Linear(in_features, out_features, bias=biases is not None, device="meta")
    # Of a version of its own: a write into another expert's part is none into this one.
    linear.weight = nn.Parameter(weights.data[expert], requires_grad=weights.requires_grad)
    if biases is not None:
        linear.bias = nn.Parameter(biases.data[expert], requires_grad=biases.requires_grad)
    return linear


@torch.inference_mode(False)
def _stacked(weights: Sequence[nn.Parameter]) -> nn.Parameter:
    first = weights[0]
    size = first.numel() * first.element_size()
    in_place = first.is_contiguous() and all(
        weight.is_contiguous()
        and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and weight.data_ptr() == first.data_ptr() + number * size
        for number, weight in enumerate(weights)
    )
    if in_place:
        shape = (len(weights), *first.shape)
        stacked = first.detach().as_strided(shape, (first.numel(), *first.stride()))
    else:
        stacked = torch.stack([weight.detach() for weight in weights])
    return nn.Parameter(stacked, requires_grad=first.requires_grad)
