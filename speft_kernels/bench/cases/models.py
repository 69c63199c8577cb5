"""A training step of whole language models: forward, backward, optimizer.

Random weights, 8 x 256 tokens, float32. The floor is the frozen model as transformers computes it;
the input gradient goes through all layers, on every side.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...config import SpeftConfig
from ...experts import split_experts
from ...install import put_linear_for_conv1d
from ...model import apply_patterns, score_and_select
from ...pattern import SparsePattern
from ..harness import Case, Saved, Side
from ..memory import saved_by
from ..trainers import LORA_RANK, Prepare, Trainer
from .step import DENSITY, check_gradients, check_losses

OURS, FLOOR, SPLIT = "SPEFT", "frozen floor", "frozen, experts split"
BATCH, LENGTH, BATCHES = 8, 256, 2
# Of a model: the time of ours over the floor's, and the bytes saved for backward over those of the
# floor. What was measured at first, with room for noise: what gets worse is to be seen.
MIXTURE_GOALS = 1.08, 1.30  # 1.07 and 1.25
GPT2_GOALS = 1.08, 1.15  # 1.03 and 1.12
EXPERTS, CHOSEN = 16, 2
MIXTURE: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "moe_intermediate_size": 384,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "use_cache": False,
}
# The smallest GPT-2 with fewer layers, which are alike, and fewer tokens, whose rows do not train.
GPT2: dict[str, Any] = {
    "n_layer": 3,
    "vocab_size": 1000,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "loss_type": "ForCausalLM",
    "use_cache": False,
}


def setup_mixture() -> Case:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE)).eval()
    batches = _batches(MIXTURE["vocab_size"])
    patterns = _patterns(_split(copy.deepcopy(model)), batches)
    prepares: dict[str, Prepare] = {
        OURS: lambda model: _sparse(_split(model), patterns),
        FLOOR: _frozen,
        SPLIT: lambda model: _frozen(_split(model)),
    }
    name = f"Qwen3-MoE, {EXPERTS} experts"
    return _case(name, model, batches, prepares, _split, patterns, MIXTURE_GOALS)


def setup_gpt2() -> Case:
    """GPT-2, whose `Conv1D`s hold transposed weights, which are laid out anew to train sparsely."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    batches = _batches(GPT2["vocab_size"])
    patterns = _patterns(copy.deepcopy(model), batches)
    prepares: dict[str, Prepare] = {
        OURS: lambda model: _sparse(model, patterns),
        FLOOR: _frozen,
        f"PEFT LoRA r={LORA_RANK}": lambda model: _lora(model, patterns),
    }
    name = f"GPT-2, {GPT2['n_layer']} layers"

    def full(model: nn.Module) -> nn.Module:
        put_linear_for_conv1d(model, patterns)  # whose gradients are [N, K], as those of patterns
        return model

    return _case(name, model, batches, prepares, full, patterns, GPT2_GOALS)


def _case(
    name: str,
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    prepares: Mapping[str, Prepare],
    full: Prepare,
    patterns: Mapping[str, SparsePattern],
    goals: tuple[float, float],
) -> Case:
    trainers = {side: Trainer(model, prepare, batches) for side, prepare in prepares.items()}
    reference = Trainer(model, full, batches)

    def check() -> None:
        check_losses(trainers)  # of no more than 36 products one after the other
        check_gradients(OURS, trainers[OURS], reference, patterns, BATCH * LENGTH)

    for trainer in trainers.values():
        trainer.loss()  # the first pass finds out which layers read the same input
    saved = {side: saved_by(trainer.core, trainer.loss) for side, trainer in trainers.items()}
    what = "bytes saved for backward by the model", f"{FLOOR}, the same"
    time_goal, saved_goal = goals
    sides = [
        Side(
            side,
            trainer.step,
            side == OURS,
            None,
            {FLOOR: time_goal} if side == OURS else {},
            Saved(saved[side], saved[FLOOR], saved_goal if side == OURS else None, *what),
            trainer.entries,
        )
        for side, trainer in trainers.items()
    ]
    density = sum(p.nnz for p in patterns.values()) / sum(
        n * k for n, k in (p.shape for p in patterns.values())
    )
    full_name = f"{name}, {BATCH} x {LENGTH} tokens, masks {density:.1%}"
    return Case("models", full_name, sides, check, rounds=12, calls=2)


def _batches(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    drawn = [torch.randint(0, vocabulary, (BATCH, LENGTH)) for _ in range(BATCHES)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def _patterns(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, SparsePattern]:
    """The gradient's masks of all linear layers."""
    config = SpeftConfig(density=DENSITY, salience="gradient", selection="top", modules_to_train=[])
    patterns, _ = score_and_select(model, config, batches[:1])
    return patterns


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _sparse(model: nn.Module, patterns: Mapping[str, SparsePattern]) -> nn.Module:
    apply_patterns(model, patterns, SpeftConfig(modules_to_train=[]))
    return model


def _split(model: nn.Module) -> nn.Module:
    split_experts(model)
    return model


def _lora(model: nn.Module, patterns: Mapping[str, SparsePattern]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=LORA_RANK, target_modules=list(patterns), fan_in_fan_out=True)
    adapted: nn.Module = get_peft_model(model, settings)
    return adapted.eval()


CASES = {"Qwen3-MoE": setup_mixture, "GPT-2": setup_gpt2}
QUICK = ("Qwen3-MoE",)
