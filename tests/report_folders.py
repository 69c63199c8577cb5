"""Study folders written by hand, for the tests of reports: rows, masks and loss curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speft_kernels.adapter import save_adapter
from speft_kernels.config import SpeftConfig
from speft_kernels.model import sparsify
from speft_kernels.study.rows import Row, write_rows

METHODS: dict[str, dict[str, Any]] = {
    "head": {"method": "head"},
    "lora": {"method": "lora"},
    "magnitude": {"method": "speft", "salience": "magnitude", "density": 0.05},
    "gradient": {"method": "speft", "salience": "snip", "density": 0.05},
    "gradient, sparser": {"method": "speft", "salience": "snip", "density": 0.01},
    "full": {"method": "full"},
}
SHARES = {"head": 0.0, "lora": 0.07, "full": 1.0}
VERSIONS = json.dumps({"python": "3.11.2", "torch": "2.13.0"})


def row(**given: Any) -> Row:
    """A row with plausible values for what is not given."""
    values: dict[str, Any] = {
        **{"id": "run", "task": "sst2", "name": "lora", "method": "lora"},
        **{"salience": "", "scope": "", "dynamic": "", "density": 0.07},
        **{"trainable_parameters_without_head": 1000, "head_parameters": 66},
        **{"lr": 1e-3, "head_lr": 1e-3, "seed": 0, "epochs": 2, "steps": 60},
        **{"metric": "accuracy", "validation": 0.8, "score": 0.79, "best_step": 40},
        **{"salience_seconds": 0.0, "salience_peak_memory_bytes": None, "train_seconds": 95.5},
        **{"step_ms_median": 12.5, "peak_memory_bytes": 700 * 2**20, "device": "cpu"},
        **{"threads": 2, "processor": "a processor", "versions": VERSIONS, "commit": "abc1234"},
        "settings": json.dumps({"method": "lora", "epochs": 2}),
    }
    return Row(**{**values, **given})


def write_study(
    folder: Path,
    *,
    tasks: tuple[str, ...] = ("cola", "mrpc", "sst2"),
    methods: dict[str, dict[str, Any]] = METHODS,
    name: str = "a small study",
    runs: bool = True,
    layers: int = 4,
) -> Path:
    """A study of two rates, two seeds at the better one, with adapters of a toy transformer."""
    folder.mkdir(parents=True)
    study = {"name": name, "tasks": {task: {"train": f"{task}.tsv"} for task in tasks}}
    (folder / "study.json").write_text(json.dumps({**study, "methods": methods}))
    rows = []
    for place, task in enumerate(tasks):
        for index, (label, settings) in enumerate(methods.items()):
            for lr, seed in ((1e-3, 0), (1e-2, 0), (1e-2, 1)):
                quality = 0.6 + 0.05 * place + 0.03 * index + 0.01 * seed + lr
                sparse = settings["method"] == "speft"
                made = row(
                    id=f"{place}-{index}-{lr:g}-{seed}",
                    **{"task": task, "name": label, "method": settings["method"], "seed": seed},
                    **{"lr": lr, "head_lr": lr, "validation": quality, "score": quality - 0.02},
                    salience=settings.get("salience", ""),
                    scope="layer" if sparse else "",
                    density=settings.get("density", SHARES.get(settings["method"], 0.05)),
                    salience_seconds=3.0 * sparse,
                    salience_peak_memory_bytes=900 * 2**20 if sparse else None,
                    peak_memory_bytes=(600 + 90 * index) * 2**20,
                    settings=json.dumps(settings),
                )
                rows.append(made)
                if runs:
                    write_run(folder / "runs" / made.id, made, layers)
    write_rows(folder / "runs.csv", rows)
    return folder


def write_run(folder: Path, made: Row, layers: int = 4) -> None:
    """What a report reads of a run: its metrics and, for a sparse one, its adapter."""
    folder.mkdir(parents=True)
    steps = [
        {
            "step": n,
            "epoch": n / 30,
            "loss": 0.7 * math.exp(-n / 25) + 0.02 * math.sin(n),
        }
        for n in range(1, 61)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({**step, "lr": made.lr, "seconds": step["step"]}) + "\n" for step in steps
        )
    )
    if made.method == "speft":
        torch.manual_seed(made.seed)
        model = transformer(layers)
        config = SpeftConfig(
            density=made.density,
            salience=made.salience,
            scope="global" if made.salience == "magnitude" else "layer",
            modules_to_train=(),
        )
        batches = [{"x": torch.randn(8, 32)}]
        sparsify(model, config, batches, loss_fn=lambda m, batch: m(batch["x"]).square().mean())
        save_adapter(model, folder / "adapter", config=config)


def transformer(layers: int) -> nn.Module:
    """Linear layers with the names of an encoder's, used one after the other."""
    generator = torch.Generator().manual_seed(5)

    def linear(scale: float) -> nn.Linear:
        made = nn.Linear(32, 32)
        with torch.no_grad():
            made.weight.normal_(0, scale, generator=generator)
        return made

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList(
                nn.ModuleDict(
                    {
                        "attention": nn.ModuleDict(
                            {n: linear(0.1 + 0.02 * i) for n in ("query", "key", "value")}
                        ),
                        "dense": linear(0.15),
                    }
                )
                for i in range(layers)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layer:
                for part in (*layer["attention"].values(), layer["dense"]):
                    x = x + torch.tanh(part(x))
            return x

    return Encoder()
