"""The loss curve of a tiny model through the kernels equals the one through the reference."""

import pytest
import tiny_models
import torch

from speft_kernels.model import SpeftConfig, sparsify

STEPS = 50


def loss_curve(make_model, config, batches):
    """50 steps of AdamW from the same seed: scoring, selection and training all on one backend."""
    model = make_model()
    sparsify(model, config, batches[:2])
    model.eval()  # dropout draws would still be equal, but say nothing about the kernels
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.25},
        {"density": 0.25, "salience": "snip", "scope": "global"},
        {"density": 0.25, "mode": "additive"},
        {"density": 0.25, "block_shape": (4, 4)},
    ],
    ids=["layer", "global", "additive", "blocks"],
)
@pytest.mark.parametrize("causal", [False, True], ids=["bert", "llama"])
def test_loss_curves_agree(monkeypatch, causal, settings, backend):
    make_model = tiny_models.llama if causal else tiny_models.bert_classifier
    batches = tiny_models.token_batches(4, causal=causal)
    config = SpeftConfig(**settings)
    curves = {}
    for name in ("reference", backend):
        monkeypatch.setenv("SPEFT_BACKEND", name)
        curves[name] = loss_curve(make_model, config, batches)
    assert curves["reference"][-4:].mean() < 0.98 * curves["reference"][:4].mean()
    # float32 sums in two orders, amplified by 50 steps of training: 1e-5 relative is the promise.
    torch.testing.assert_close(curves[backend], curves["reference"], rtol=1e-5, atol=0)
