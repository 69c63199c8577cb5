"""A trained adapter to load, tamper with and save again."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import (
    mlp,
)
from torch import Tensor, nn

from speft_kernels.adapter import save_adapter
from speft_kernels.model import (
    SpeftConfig,
    sparse_layers,
    sparsify,
)

CONFIG = SpeftConfig(
    density=0.1,
    salience="magnitude",
    target_modules=("first", "second"),
    modules_to_train=("head",),
)
TENSORS, JSON = "adapter.safetensors", "adapter_config.json"


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give everything that trains random contents, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise)
        for layer in sparse_layers(model).values():
            layer.sync()
    return model


def trained_mlp(config: SpeftConfig = CONFIG, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = mlp(dtype=dtype)
    sparsify(model, config)
    return filled(model)


def save_trained(folder: Path) -> Path:
    """Save the adapter of `trained_mlp()` as `folder`."""
    save_adapter(trained_mlp(), folder, config=CONFIG, extra={"note": "für später"})
    return folder


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_contents(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
