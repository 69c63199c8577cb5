"""PEFT's sparse methods are ours with another mask: on one and the same mask they train alike."""

import copy

import pytest
import torch
from tiny_models import bert_classifier, token_batches

from speft_kernels.config import SpeftConfig
from speft_kernels.finetune.baselines import adapt
from speft_kernels.finetune.config import RunConfig
from speft_kernels.model import apply_patterns, score_and_select
from speft_kernels.pattern import SparsePattern
from speft_kernels.targets import find_targets


def adapted(model, method):
    config = RunConfig(
        train="x", output="y", method=method, density=0.1, lora_rank=1, target_modules=("query",)
    )
    targets = find_targets(model, config.speft())
    return targets, adapt(model, config, targets)


def losses(model, parameters, batches):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    curve = []
    model.eval()  # no dropout
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's call
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("method", ["shira", "supertuning"])
def test_the_loss_curve_is_that_of_our_layers_on_the_same_mask(method):
    base = bert_classifier()
    ours = copy.deepcopy(base)
    targets, theirs = adapted(base, method)
    patterns = {}
    for name, layer in targets.layers.items():
        wrapped = theirs.base_model.model.get_submodule(name)
        if method == "shira":
            rows, cols = wrapped.shira_indices["default"].long()
            flat = rows * layer.in_features + cols
        else:
            flat = wrapped.supertuning_indices["default"].long()
        shape = (layer.out_features, layer.in_features)
        patterns[name] = SparsePattern(shape, flat.sort().values)
    apply_patterns(ours, patterns, SpeftConfig())
    batches = token_batches(12)
    their_curve = losses(theirs, [p for p in theirs.parameters() if p.requires_grad], batches)
    our_curve = losses(ours, [p for p in ours.parameters() if p.requires_grad], batches)
    # The same arithmetic in another order, over 12 steps of Adam.
    assert our_curve == pytest.approx(their_curve, rel=1e-4)
    assert max(their_curve) - min(their_curve) > 1e-2  # something was learned


def test_super_tunings_mask_is_that_of_magnitude():
    base = bert_classifier()
    config = SpeftConfig(density=0.1, salience="magnitude", target_modules=("query",))
    patterns, _ = score_and_select(base, config)
    _, theirs = adapted(base, "supertuning")
    for name, pattern in patterns.items():
        indices = theirs.base_model.model.get_submodule(name).supertuning_indices["default"]
        # PEFT truncates k where we round it.
        shared = set(indices.tolist()) & set(pattern.indices.tolist())
        assert len(shared) >= min(len(indices), pattern.nnz) > 0
