"""A training step of all-MiniLM-L6-v2 (32 x 64 tokens, float32) against the frozen model and PEFT.

The frozen floor trains the head alone, with the input gradient computed through all layers. Masks
are real: gradient salience on docstrings of Python's standard library, the demo's data.
"""

import copy

import pytest
import torch

from speft_kernels import SpeftConfig, sparsify

BATCH, LENGTH = 32, 64


class Setup:
    def __init__(self):
        from speft_kernels.finetune import demo_data
        from speft_kernels.finetune.models import (
            load_classifier,
            load_tokenizer,
            quiet_transformers,
        )

        torch.manual_seed(0)
        data = demo_data.collect()
        labels = sorted({example.label for example in data.train})
        with quiet_transformers():
            self.tokenizer = load_tokenizer("all-MiniLM-L6-v2")
            self.model = load_classifier("all-MiniLM-L6-v2", labels)
        self.model.eval()  # dropout would cost all sides the same
        examples = sorted(data.train, key=lambda e: -len(e.text))[: 8 * BATCH]
        number = {label: i for i, label in enumerate(labels)}
        self.batches = []
        for start in range(0, len(examples), BATCH):
            part = examples[start : start + BATCH]
            encoded = self.tokenizer(
                [e.text for e in part],
                padding="max_length",
                truncation=True,
                max_length=LENGTH,
                return_tensors="pt",
            )
            targets = torch.tensor([number[e.label] for e in part])
            self.batches.append({**encoded, "labels": targets})

    def step(self, prepare):
        model = prepare(copy.deepcopy(self.model))
        # The input gradient runs through every layer on every side.
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(
            lambda module, args, output: output if output.requires_grad else output.requires_grad_()
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

        def run():
            loss = model(**self.batches[0]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run


@pytest.fixture(scope="module")
def setup():
    return Setup()


def frozen(model):
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def full(model):
    return model.requires_grad_(True)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules="all-linear", modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def shira(model):
    peft = pytest.importorskip("peft")
    config = peft.ShiraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def speft(setup, **settings):
    def prepare(model):
        sparsify(model, SpeftConfig(**settings), setup.batches)
        return model

    return prepare


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("peer", "name"),
    [(frozen, "frozen floor"), (lora, "PEFT LoRA r=8"), (shira, "PEFT SHiRA r=2"), (full, "full")],
)
def test_step(compare, setup, scope, peer, name):
    ours = setup.step(speft(setup, density=0.005, scope=scope))
    compare(f"step, SPEFT 0.5%, {scope}", ours, setup.step(peer), name, None, 5)
