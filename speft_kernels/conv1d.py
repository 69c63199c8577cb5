"""transformers' `Conv1D`, as GPT-2 is built of it, as an `nn.Linear` and back.

A `Conv1D` holds the transpose `[K, N]` of a linear layer's weight. Patterns, plans and kernels are
for weights `[N, K]`. So its weight is laid out anew for as long as the layer is one that scores or
trains; state dicts have it as transformers does, whoever holds it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

# What holds a module's hooks, or says of which kind they are.
HOOKS = tuple(key for key in vars(nn.Module()) if "_hook" in key)


class Conv1DLinear(nn.Linear):
    """A linear layer in the place of a `Conv1D`; see `Loan`."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        transpose_saved(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        transpose_to_load(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is a `Conv1D` of transformers."""
    kind = type(module)  # to ask for the class would import transformers
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is an `nn.Linear` as torch computes it, and nothing more."""
    return type(module) in (nn.Linear, Conv1DLinear)


def is_opaque(module: nn.Module) -> bool:
    """Return whether only an additive delta fits a linear layer: it is quantised, or the like."""
    return (
        type(module).forward is not nn.Linear.forward
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
    )


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Return `(N, K)` of a linear layer, a `Conv1D` too; None of any other module."""
    if is_conv1d(module):
        return module.nf, module.weight.shape[0]  # whose nx older versions do not keep
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return None if None in shape else (int(shape[0]), int(shape[1]))  # type: ignore[arg-type]


class Loan:
    """A `Conv1D` whose weight a linear layer has for a while.

    The weight is laid out in a parameter of the linear layer's own. The former one is not kept: it
    takes no memory unless somebody else has it, as an optimizer or another model. These have it as
    it was. The `Conv1D` computes what the linear layer does meanwhile.
    """

    def __init__(self, conv1d: Any) -> None:
        former = conv1d.weight
        out_features, in_features = former.shape[::-1]
        self.conv1d = conv1d
        self.linear = Conv1DLinear(in_features, out_features, device="meta")
        self.linear.weight, self.linear.bias = _transposed(former), conv1d.bias
        in_place_of(conv1d, self.linear)
        self._lent = self.linear.weight, self.linear.weight._version
        self._former = weakref.ref(former)
        # Hooks on a parameter cannot be handed on.
        hooked = former._backward_hooks or former._post_accumulate_grad_hooks
        self._kept = former if hooked else None
        conv1d.weight = _view(self.linear.weight)

    def give_back(self) -> None:
        """Give the `Conv1D` the parameters and hooks as they are now: its very weight, where
        somebody still has it. The linear layer computes what it does from now on.
        """
        weight, former = self.linear.weight, self._former()
        if former is None:
            former = _transposed(weight)
        else:
            lent, version = self._lent
            if weight is not lent or weight._version != version:
                with torch.no_grad():
                    former.copy_(weight.t())
            former.requires_grad_(weight.requires_grad)
            former.grad = former.grad if weight.grad is not None else None
        self.conv1d.weight, self.conv1d.bias = former, self.linear.bias
        in_place_of(self.linear, self.conv1d)
        self.linear.weight = _view(former)


def to_conv1d(linear: Conv1DLinear) -> nn.Module:
    """Return a `Conv1D` to take the place of a linear layer that is in the place of one; this
    computes what it does from now on.
    """
    from transformers.pytorch_utils import Conv1D  # no dependency of ours, but there: see above

    with torch.device("meta"):
        conv1d = Conv1D(linear.out_features, linear.in_features)
    conv1d.weight, conv1d.bias = _transposed(linear.weight), linear.bias
    linear.weight = _view(conv1d.weight)
    return in_place_of(linear, conv1d)


def transpose_saved(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Let a state dict have the weight as a `Conv1D` does; with `keep_vars` it has the parameter
    itself, which is what it is.
    """
    weight = destination.get(prefix + "weight")
    if isinstance(weight, Tensor) and not keep_vars:
        # A copy: safetensors does not write what is not contiguous.
        destination[prefix + "weight"] = weight.t().contiguous()


def transpose_to_load(state_dict: dict[str, Any], prefix: str) -> None:
    """Lay out a `Conv1D`'s weight of a state dict as that of a linear layer."""
    weight = state_dict.get(prefix + "weight")
    if isinstance(weight, Tensor) and weight.ndim == 2:
        state_dict[prefix + "weight"] = weight.t().contiguous()


def in_place_of(former: nn.Module, module: nn.Module) -> nn.Module:
    """Return `module` with the hooks and the training flag of another."""
    # Hooks stay what they were, and so do the handles that remove them: these know the dicts.
    vars(module).update({key: vars(former)[key] for key in HOOKS})
    return module.train(former.training)


@torch.inference_mode(False)
def _transposed(weight: Tensor) -> nn.Parameter:
    """A parameter of the transpose in memory of its own, with attributes and gradient of this."""
    copy = weight.detach().t().clone(memory_format=torch.contiguous_format)
    parameter = nn.Parameter(copy, weight.requires_grad)
    vars(parameter).update(vars(weight))
    if weight.grad is not None:
        parameter.grad = weight.grad.t().clone(memory_format=torch.contiguous_format)
    return parameter


@torch.inference_mode(False)
def _view(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().t(), requires_grad=False)
