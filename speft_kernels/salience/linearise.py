"""A model without its non-linearities: activations that return what they are given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Modules of these files are activations as a whole; many of transformers' are formulas, not calls.
_ACTIVATION_FILES = ("torch.nn.modules.activation", "transformers.activations")
_OTHERS = (nn.MultiheadAttention, nn.GLU)  # in the same file, made of functions named below

_NAMES = (
    *("relu", "relu6", "rrelu", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu"),
    *("mish", "hardswish", "hardtanh", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink"),
    *("threshold", "sigmoid", "logsigmoid", "tanh", "softsign", "softplus", "expit"),
    *("softmax", "softmin", "log_softmax"),
)
_FUNCTIONS = {
    function
    for holder in (functional, torch, torch.special, Tensor)
    for name in _NAMES
    for function in (getattr(holder, name, None), getattr(holder, f"{name}_", None))
    if function is not None
}


class _Linear(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            x = args[0] if args else kwargs["input"]
            dtype = kwargs.get("dtype")
            return x if dtype is None else x.to(dtype)
        if func is functional.glu:
            return _glu(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with _linear_inside():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _linear_inside() -> Iterator[None]:
    """For a function of `torch.nn.functional` that calls others there: a mode sees the first call
    alone.
    """
    softmax, attention = functional.softmax, functional.scaled_dot_product_attention
    functional.softmax = _weights  # type: ignore[assignment]
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.softmax = softmax
        functional.scaled_dot_product_attention = attention


def _weights(scores: Tensor, dim: int | None = None) -> Tensor:
    """The scores themselves in the place of their softmax, and 0 where a mask forbids."""
    return scores.masked_fill(scores == -math.inf, 0)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    first, gate = input.chunk(2, dim)
    return first * gate


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention whose weights are the scores themselves, as with `softmax` written out, and 0 where
    a mask forbids.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = query @ key.transpose(-2, -1) * factor
    if is_causal:
        weights = weights.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attn_mask, 0)
    elif attn_mask is not None:
        forbidden = attn_mask <= torch.finfo(attn_mask.dtype).min / 2
        weights = (weights + attn_mask).masked_fill(forbidden, 0)
    return weights @ value


@contextmanager
def linear_activations(model: nn.Module) -> Iterator[None]:
    """Let every activation of `model` return its input.

    That is the modules of `torch.nn` and `transformers.activations`, and the functions of torch.
    The softmax of an attention is one of them, also inside `scaled_dot_product_attention`. A
    formula that the model writes out itself is not found.
    """
    hooks = [
        module.register_forward_hook(lambda module, args, output: args[0])
        for module in model.modules()
        if not isinstance(module, _OTHERS)
        and any(base.__module__ in _ACTIVATION_FILES for base in type(module).__mro__)
    ]
    try:
        with _Linear():
            yield
    finally:
        for hook in hooks:
            hook.remove()
