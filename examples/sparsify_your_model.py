"""Sparse fine-tuning of any PyTorch model, in your own training loop."""

import torch
from torch import nn

from speft_kernels.adapter import load_adapter, save_adapter
from speft_kernels.model import SpeftConfig, sparsify, summary

torch.manual_seed(0)


def make_model() -> nn.Module:
    torch.manual_seed(1)  # stands for loading the same pre-trained weights
    hidden = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(256, 8))


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


x = torch.randn(2048, 64)
batches = [{"x": part, "y": part[:, :8].sin()} for part in x.split(64)]

model = make_model()
sparsify(model, SpeftConfig(density=0.02, salience="snip"), batches[:8], loss_fn)
print(summary(model))

values = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(values, lr=5e-3, weight_decay=0.0)
for epoch in range(5):
    total = 0.0
    for batch in batches:
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(batches):.4f}")

save_adapter(model, "runs/my-adapter", overwrite=True)  # 15 kB

again = make_model()
load_adapter(again, "runs/my-adapter")
torch.testing.assert_close(again(x), model(x))
