"""The loss curve of a tiny model through the kernels equals the one through the reference."""

import pytest
import tiny_models
import torch
from kernels import backends

from speft_kernels.model import SpeftConfig, sparsify

# Triton's interpreter takes a second a step.
STEPS = {"cpu": 50, "torch": 50, "triton": 6}
MODELS_AND_BACKENDS = [
    (model, backend)
    for backend in backends("sampled_grad")
    if backend in STEPS
    for model in (("llama",) if backend == "triton" else ("bert", "llama"))
]


def loss_curve(make_model, config, batches, steps):
    """Steps of AdamW from the same seed: scoring, selection and training all on one backend."""
    model = make_model()
    sparsify(model, config, batches[:2])
    model.eval()  # dropout draws would still be equal, but say nothing about the kernels
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


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
@pytest.mark.parametrize(("model", "backend"), MODELS_AND_BACKENDS)
def test_loss_curves_agree(monkeypatch, model, settings, backend):
    causal = model == "llama"
    make_model = tiny_models.llama if causal else tiny_models.bert_classifier
    batches = tiny_models.token_batches(4, causal=causal)
    config = SpeftConfig(**settings)
    curves = {}
    for name in ("reference", backend):
        monkeypatch.setenv("SPEFT_BACKEND", name)
        curves[name] = loss_curve(make_model, config, batches, STEPS[backend])
    if STEPS[backend] >= 50:
        assert curves["reference"][-4:].mean() < 0.98 * curves["reference"][:4].mean()
    # float32 sums in two orders, amplified by 50 steps of training: 1e-5 relative is the promise.
    torch.testing.assert_close(curves[backend], curves["reference"], rtol=1e-5, atol=0)
