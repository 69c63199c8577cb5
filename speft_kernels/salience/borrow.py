"""Using a model for a while and giving it back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import SalienceError


@contextmanager
def borrowed(model: nn.Module, seed: int) -> Iterator[None]:
    """Hold `model` in evaluation mode with every parameter frozen; put everything back at the end.

    Everything is the training flags, chances of dropout, `requires_grad`, existing `.grad` tensors
    and the random generators, which are seeded with `seed` inside. Gradients are on inside,
    whatever the caller's grad mode.

    Evaluation mode, although the model will be trained with dropout: a score should depend on the
    data and not on which units a dropout mask happened to hit. A module that checkpoints
    activations stays in training mode, with its own chances of dropout at 0.
    """
    training = {module: module.training for module in model.modules()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chances = [
        (owner, name, value)
        for module in training
        if _works_in_training_only(module)
        for owner in (module, getattr(module, "config", None))
        for name, value in _chances_of_dropout(owner)
    ]
    try:
        for module in training:
            module.training = _works_in_training_only(module)
        for owner, name, _ in chances:
            vars(owner)[name] = 0.0
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        with torch.inference_mode(False), torch.enable_grad(), seeded(model, seed):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for owner, name, value in reversed(chances):  # modules share a config, listed with each
            vars(owner)[name] = value
        for parameter, flag, gradient in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _works_in_training_only(module: nn.Module) -> bool:
    # Transformers checkpoints activations in training mode only: scoring must not need more memory
    # than training will. cuDNN's recurrent layers have a backward pass in training mode only.
    return bool(getattr(module, "gradient_checkpointing", False)) or isinstance(module, nn.RNNBase)


def _chances_of_dropout(owner: object) -> list[tuple[str, float]]:
    """What a module hands to `F.dropout` with its own training flag, or skips a layer by (OPT,
    BART), and where it keeps that in its config (wav2vec 2.0).
    """
    return [
        (name, value)
        for name, value in getattr(owner, "__dict__", {}).items()
        if isinstance(value, float) and ("dropout" in name or "layerdrop" in name)
    ]


@contextmanager
def scoring_leaves(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Parameter]]:
    """Lend each layer a weight of its own that requires grad and shares the real one's memory.

    So the gradient that arrives is of this layer alone even where its weight is tied, no hook is
    ever put on a parameter of the model, and the original parameters come back untouched.

    Raises:
        SalienceError: a gradient arrives at a layer that was not called. Its owner reads the weight
            past the layer, so a sparse one in its place would never train.
    """
    originals = {name: layer._parameters["weight"] for name, layer in layers.items()}
    leaves = {name: nn.Parameter(layer.weight.detach()) for name, layer in layers.items()}
    idle = set(layers)

    def check(name: str) -> None:
        if name in idle:
            others = [other for other in layers if other in idle and other != name]
            raise SalienceError(
                f"layer {name!r} cannot train sparsely: its owner reads its weight without calling "
                "it, so no gradient would reach the values. Name it in exclude_modules"
                + (f" (not called either: {', '.join(map(repr, others))})" if others else "")
            )

    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: idle.discard(name))
        for name, layer in layers.items()
    ]
    for name, leaf in leaves.items():
        leaf.register_hook(lambda gradient, name=name: check(name))
    try:
        for name, layer in layers.items():
            layer._parameters["weight"] = leaves[name]
        yield leaves
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer._parameters["weight"] = originals[name]


@contextmanager
def undone_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Write the present contents of `tensors` back if the block is left by an exception."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, contents in saved:
                tensor.copy_(contents)
        raise


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of the model's GPUs; give their states back at the end."""
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield
