"""SST-2 at an equal number of trainable parameters: SPEFT (gradient, SNIP) against LoRA r = 1.

Each method runs at every learning rate of one list with every seed, in the same loop; the table
gives the mean over the seeds of the best dev accuracy at each method's best learning rate.

    python benchmarks/sst2_equal_budget.py SST2_FOLDER OUTPUT_FOLDER

A run that is already in OUTPUT_FOLDER is not repeated, so that seeds can run side by side.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import statistics
import sys
from pathlib import Path

from speft_kernels.finetune import RunConfig
from speft_kernels.finetune.run import finetune

METHODS = {
    "lora": {
        "method": "lora",
        "lora_rank": 1,
        "head_warmup_steps": 30,
    },  # first: its size is the budget of the others
    "gradient": {"method": "speft", "salience": "gradient", "head_warmup_steps": 30},
    "snip": {"method": "speft", "salience": "snip", "head_warmup_steps": 30},
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1)
EPOCHS, MAX_LENGTH = 1, 64
COLUMNS = (
    *("method", "lr", "seed", "accuracy", "trainable_parameters_without_head", "head_parameters"),
    *("density", "steps", "step_ms_median", "salience_seconds", "train_seconds"),
    *("device", "threads", "processor", "python", "torch", "speft_kernels"),
)


def run(name: str, lr: float, seed: int, data: Path, output: Path, density: float | None) -> dict:
    folder = output / f"{name}-{lr:g}-{seed}"
    if not (folder / "result.json").exists():
        settings = {
            "train": str(data / "train.tsv"),
            "eval": str(data / "dev.tsv"),
            "output": str(folder),
            "epochs": EPOCHS,
            "max_length": MAX_LENGTH,
            "lr": lr,
            "seed": seed,
            **METHODS[name],
        }
        if density is not None:
            settings["density"] = density
        finetune(RunConfig.from_dict(settings))
    result = json.loads((folder / "result.json").read_text())
    facts = {**result, **result["versions"], "processor": processor()}
    return {**facts, "method": name, "lr": lr, "seed": seed, "accuracy": result["after"]}


def processor() -> str:
    """The name of this machine's processor, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def table(rows: list[dict]) -> list[str]:
    lines = ["| method | trained without head | best lr | dev accuracy, mean of seeds | by seed |"]
    lines.append("|---|---|---|---|---|")
    for name in METHODS:
        by_lr = {
            lr: [r["accuracy"] for r in rows if (r["method"], r["lr"]) == (name, lr)]
            for lr in LEARNING_RATES
        }
        best = max(by_lr, key=lambda lr: statistics.mean(by_lr[lr]))
        count = next(r["trainable_parameters_without_head"] for r in rows if r["method"] == name)
        seeds = ", ".join(f"{a:.4f}" for a in by_lr[best])
        mean = statistics.mean(by_lr[best])
        lines.append(f"| {name} | {count:,} | {best:g} | {mean:.4f} | {seeds} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed, lr, name in itertools.product(arguments.seeds, LEARNING_RATES, METHODS):
        budget = None if name == "lora" else rows[0]["density"]
        rows.append(run(name, lr, seed, arguments.data, arguments.output, budget))
        print(f"{name} lr {lr:g} seed {seed}: {rows[-1]['accuracy']:.4f}", flush=True)
        with open(arguments.output / "runs.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
