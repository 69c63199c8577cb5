"""Tiny models with random weights, their batches, and what it means that a model was left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speft_kernels.config import SpeftConfig
from speft_kernels.model import sparse_layers

VOCABULARY = 50
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def bert_classifier(seed: int = 0) -> nn.Module:
    """A two-layer BERT with a classifier and dropout 0.1."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_SIZES))


def llama(seed: int = 0, **settings: Any) -> nn.Module:
    """A two-layer Llama that predicts tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=1, **settings)
    return transformers.LlamaForCausalLM(config)


def gpt2(seed: int = 0, **settings: Any) -> nn.Module:
    """A two-layer GPT-2, whose layers are transformers' `Conv1D`, without dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    own = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
    own |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    own |= {"bos_token_id": 0, "eos_token_id": 1, "loss_type": "ForCausalLM"}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**own | settings))


def mixtral(seed: int = 0, experts: int = 4, **settings: Any) -> nn.Module:
    """A two-layer mixture of experts, two of them for each token, that predicts tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    own = {"num_key_value_heads": 1, "num_local_experts": experts}
    config = transformers.MixtralConfig(**{**_SIZES, **own, **settings})
    return transformers.MixtralForCausalLM(config)


def gpt_oss(seed: int = 0, **settings: Any) -> nn.Module:
    """A two-layer gpt-oss: a mixture whose experts have biases and hold transposed weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    own = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 3}
    config = transformers.GptOssConfig(**{**_SIZES, **own, "head_dim": 8, **settings})
    model = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # of the experts, zeros at first
            nn.init.normal_(parameter, std=0.1)
    return model


def opt(seed: int = 0, **settings: Any) -> nn.Module:
    """A two-layer OPT that predicts tokens; unlike Llama's, its norms keep to the model's dtype."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.OPTConfig(
        **_SIZES,
        ffn_dim=24,
        word_embed_proj_dim=16,
        pad_token_id=0,
        tie_word_embeddings=False,
        **settings,
    )
    return transformers.OPTForCausalLM(config)


def token_batches(count: int, *, causal: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of 4 sequences of 8 tokens with labels for a classifier, or for a causal model."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, VOCABULARY, (4, 8), generator=generator)
        labels = tokens if causal else torch.randint(0, 2, (4,), generator=generator)
        batches.append({"input_ids": tokens, "labels": labels})
    return batches


def padded_batches(count: int, *, causal: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """`token_batches` cut to 8, 5, 8 and 3 tokens, padded on the right.

    The third sequence's first half, a prompt, has no labels, and the last sequence has none at all;
    of a classifier's, the last one.
    """
    batches = token_batches(count, causal=causal, seed=seed)
    for batch in batches:
        mask = torch.arange(8) < torch.tensor([8, 5, 8, 3])[:, None]
        batch["input_ids"] = batch["input_ids"].masked_fill(~mask, 0)
        batch["attention_mask"] = mask.long()
        if causal:
            batch["labels"] = batch["labels"].masked_fill(~mask, -100)
            batch["labels"][2, :4] = -100
        batch["labels"][3] = -100
    return batches


class Mlp(nn.Module):
    """Three linear layers of different shapes with dropout and batch norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(10, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.head(torch.tanh(self.second(x)))


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> Mlp:
    torch.manual_seed(seed)
    return Mlp().to(dtype)


MLP_LAYERS = ("first", "second")


def mlp_config(**settings: Any) -> SpeftConfig:
    """A config for the MLP: two sparse layers and a dense head."""
    defaults = {"density": 0.1, "target_modules": MLP_LAYERS, "modules_to_train": ("head",)}
    return SpeftConfig(**{**defaults, **settings})


def pair_batches(
    count: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Batches `(x [5, 6], y [5])` for the MLP."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(5, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (5,), generator=generator),
        )
        for _ in range(count)
    ]


def pair_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def drawn(model: nn.Module, seed: int = 1) -> nn.Module:
    """`model` with random values in every sparse layer, as training would give them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.values.copy_(torch.randn(layer.values.shape, generator=generator))
    return model


class Int8Linear(nn.Module):
    """A quantised linear layer in miniature: int8 codes with a scale a row, an own forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes * self.scale).t()


class Twins(nn.Module):
    """Two linear layers over one weight, a third that is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight
        self.once = nn.Linear(6, 6)
        self.again = nn.ModuleList([self.once])

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x) + self.once(x) * self.again[0](x)


class Snapshot:
    """Everything about a model that a failed or temporary operation must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.tensors = {
            name: tensor.clone() if isinstance(tensor, Tensor) else tensor
            for name, tensor in model.state_dict().items()
        }
        self.parameters = {
            name: (p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        self.training = {name: module.training for name, module in model.named_modules()}
        self.hooks = _hooks(model)
        self.attributes = {
            name: set(vars(module)) for name, module in model.named_modules(remove_duplicate=False)
        }

    def assert_untouched(self) -> None:
        model = self.model
        modules = dict(model.named_modules())
        assert list(modules) == list(self.modules)
        assert all(modules[name] is module for name, module in self.modules.items())
        assert {n: m.training for n, m in modules.items()} == self.training
        tensors = model.state_dict()
        assert list(tensors) == list(self.tensors)
        for name, tensor in self.tensors.items():
            assert torch.equal(tensors[name], tensor), name
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert list(parameters) == list(self.parameters)
        for name, (parameter, requires_grad, grad, contents) in self.parameters.items():
            assert parameters[name] is parameter, name
            assert parameter.requires_grad == requires_grad, name
            assert parameter.grad is grad, name
            assert grad is None or torch.equal(grad, contents), name
        assert _hooks(model) == self.hooks
        assert {
            name: set(vars(module)) for name, module in model.named_modules(remove_duplicate=False)
        } == self.attributes


def _hooks(model: nn.Module) -> int:
    on_modules = sum(
        len(hooks)
        for module in model.modules()
        for key, hooks in vars(module).items()
        if key.endswith("_hooks") and hooks
    )
    on_parameters = sum(
        len(hooks or ())
        for parameter in model.parameters()
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    )
    return on_modules + on_parameters
