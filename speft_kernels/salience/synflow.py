"""SynFlow's statistic: how much each weight carries through the model of absolute values.

After Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
flow" (arXiv 2006.05467), in one step. No data: every parameter is replaced by its absolute value,
activations return their input, one all-ones embedding goes in, and R is the sum of the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import accumulator_dtype
from ..errors import ConfigError, SalienceError
from .accumulate import Consume, LossFn, PassStatistics, first_non_finite, streaming_leaves
from .linearise import linear_activations

_PIECE = 2**20  # parameters whose sign bits are packed at a time: some 10 MB of temporaries
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stream_synaptic_flow(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    consume: Consume,
) -> PassStatistics:
    """Run one backward pass of R; dR/d|w| `[N, K]` of each layer goes to `consume(name, flow)`.

    While `consume` runs, the layers' weights are absolute values. Afterwards every parameter is bit
    for bit what it was, also after an error. One bit a parameter is kept for that. To be called
    with the model `borrowed`.

    Args:
        batches: not read.
        loss_fn: for a model that is neither a transformers model of tokens nor an `nn.Sequential`
            that begins with a linear layer: `loss_fn(model, None)` returns R, or logits to sum up.

    Raises:
        ConfigError: the model is of another kind and `loss_fn` is missing or cannot do without a
            batch.
        SalienceError: R is not finite; the message names the layer.
    """
    statistics = PassStatistics(missing="received no synaptic flow: the logits do not depend on it")

    def arrived(name: str, flow: Tensor) -> None:
        statistics.note(name, flow)
        consume(name, flow)

    for module in model.modules():
        # Nothing to save with one token; and a checkpoint's second forward pass may run in another
        # thread, where activations would not be linear.
        if getattr(module, "gradient_checkpointing", False):
            module.training = False
    with absolute_parameters(model), linear_activations(model), streaming_leaves(layers, arrived):
        flow = _flow(model, loss_fn)
        if not bool(torch.isfinite(flow.detach())):
            origin = first_non_finite(model, lambda: _flow(model, loss_fn))
            where = f"; layer {origin!r} is the first whose output is not finite" if origin else ""
            raise SalienceError(
                f"the synaptic flow is {flow.item()}{where}: products of absolute weights outgrow "
                "the model's dtype, or a weight is not finite. Score in a wider dtype, or with "
                "another metric"
            )
        if flow.requires_grad:  # otherwise no layer arrives, which the caller reports
            flow.backward()
    return statistics


def _flow(model: nn.Module, loss_fn: LossFn | None) -> Tensor:
    """Return R, a scalar in float32 or float64."""
    embeddings = _token_embeddings(model)
    if embeddings is not None:
        output = _call_transformer(model, embeddings)
    elif isinstance(model, nn.Sequential) and len(model) and isinstance(model[0], nn.Linear):
        weight = model[0].weight
        output = model(torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    elif loss_fn is not None:
        output = _call_user(model, loss_fn)
    else:
        raise ConfigError(
            "salience 'synflow' sends an all-ones embedding through a transformers model of "
            "tokens, or an all-ones input through an nn.Sequential that begins with a linear "
            f"layer; a {type(model).__name__} is neither: pass a loss_fn whose "
            "loss_fn(model, None) returns the model's output for an all-ones input, or use "
            "another metric"
        )
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        output = output[0] if logits is None else logits
    return output.to(accumulator_dtype(output.dtype)).sum()


def _call_user(model: nn.Module, loss_fn: LossFn) -> Tensor:
    try:
        return loss_fn(model, None)
    except Exception as error:
        raise ConfigError(
            "salience 'synflow' reads no data and calls loss_fn(model, None), which raised "
            f"{type(error).__name__}: {error}. Let it return the model's output for an all-ones "
            "input then, or use another metric"
        ) from error


def _token_embeddings(model: Any) -> nn.Embedding | None:
    """Return the token embeddings of a transformers model that takes tokens, or None."""
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        return None
    embeddings = model.get_input_embeddings()
    accepted = inspect.signature(model.forward).parameters
    takes_tokens = "inputs_embeds" in accepted or "input_ids" in accepted
    return embeddings if takes_tokens and isinstance(embeddings, nn.Embedding) else None


def _call_transformer(model: nn.Module, embeddings: nn.Embedding) -> Any:
    weight = embeddings.weight
    ones = torch.ones(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    accepted = inspect.signature(model.forward).parameters
    if "inputs_embeds" in accepted:
        inputs = {"inputs_embeds": ones}
        if "decoder_inputs_embeds" in accepted:
            inputs["decoder_inputs_embeds"] = ones
        return model(**inputs)
    # A wrapper that takes tokens alone: what they are embedded to is replaced.
    hook = embeddings.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    try:
        return model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=weight.device))
    finally:
        hook.remove()


@contextmanager
def absolute_parameters(model: nn.Module) -> Iterator[None]:
    """Replace each parameter by its absolute value, in place; put the signs back at the end.

    Sign bits are cleared and set as bits, so -0.0 and NaN come back as they were. A parameter that
    shares memory with another is positive when its turn comes and has no bits to put back.
    """
    signs: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            # Through .data: a write that is undone is no new version of the parameter.
            bits = parameter.data.view(_INTEGERS[parameter.element_size()])
            for piece in _pieces(bits):
                signs.append((piece, _pack(piece < 0)))
                piece.bitwise_and_(torch.iinfo(piece.dtype).max)
        yield
    finally:
        for piece, packed in signs:
            negative = _unpack(packed, piece.numel()).reshape(piece.shape)
            piece.bitwise_or_(negative.to(piece.dtype) * torch.iinfo(piece.dtype).min)


def _pieces(tensor: Tensor) -> list[Tensor]:
    if tensor.dim() == 0 or tensor.numel() <= _PIECE:
        return [tensor]
    return list(tensor.split(max(1, _PIECE * len(tensor) // tensor.numel())))


def _pack(flags: Tensor) -> Tensor:
    """Return uint8 of eight flags each."""
    flat = nn.functional.pad(flags.flatten().to(torch.uint8), (0, -flags.numel() % 8))
    eight = flat.reshape(-1, 8)
    packed = eight[:, 0].clone()
    for bit in range(1, 8):
        packed |= eight[:, bit] << bit
    return packed


def _unpack(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` flags as booleans."""
    flags = torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=1)
    return flags.flatten()[:count].bool()
