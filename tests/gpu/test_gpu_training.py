"""The loss curve of a tiny Llama on a GPU: through every backend as through the reference."""

import copy

import pytest
import tiny_models
import torch
from rig import DEVICE, DRY, fast_backends_and_dtypes

from speft_kernels import FlatValues, SpeftConfig, apply_patterns
from speft_kernels.model import score_and_select

STEPS = 4 if DRY else 30
BATCHES = 4
RESIDENT = ("keep_columns", "sampled_grad", "write_delta")


def loss_curve(model, patterns, batches):
    model = copy.deepcopy(model)
    apply_patterns(model, patterns, SpeftConfig(density=0.25))
    optimizer = torch.optim.AdamW([FlatValues(model).parameter], lr=1e-2, fused=True)
    losses = []
    for step in range(STEPS):
        loss = model(**batches[step % BATCHES]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double()


@pytest.mark.parametrize("block_shape", [(1, 1), (4, 4)], ids=["entries", "blocks"])
@pytest.mark.parametrize(("backend", "dtype"), fast_backends_and_dtypes(*RESIDENT, "block_grad"))
def test_loss_curves_agree(monkeypatch, backend, dtype, block_shape):
    monkeypatch.setenv("SPEFT_BACKEND", "reference")
    model = tiny_models.llama().to(DEVICE, dtype).eval()
    batches = [
        {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        for batch in tiny_models.token_batches(BATCHES, causal=True)
    ]
    config = SpeftConfig(density=0.25, block_shape=block_shape)
    patterns, _ = score_and_select(model, config, batches)
    reference = loss_curve(model, patterns, batches)
    turned = [{name: tensor.flip(0) for name, tensor in batch.items()} for batch in batches]
    reordered = loss_curve(model, patterns, turned)
    monkeypatch.setenv("SPEFT_BACKEND", backend)
    ours = loss_curve(model, patterns, batches)
    assert reference[-BATCHES:].mean() < reference[:BATCHES].mean() or DRY
    # The same sequences in another order are the same sums in another order, in all that training
    # does: as far as that takes the reference, another backend's order may take it. Ten times as
    # far is allowed, since one draw of a rounding error is no bound; and some roundings of the
    # float32 loss, and one in the weights' dtype of how far training moved it.
    noise = (reordered - reference).abs().max()
    rounding = 4 * torch.finfo(torch.float32).eps * reference.max()
    rounding += torch.finfo(dtype).eps * (reference[0] - reference[-1]).abs()
    assert (ours - reference).abs().max() <= 10 * noise + rounding
