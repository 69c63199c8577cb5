"""Tiny runs of fine-tuning: their data, their settings, and what they leave."""

import json
import os
import signal

from rich.console import Console
from tiny_text import save_bert, sentences, write_tsv

from speft_kernels.finetune import RunConfig
from speft_kernels.finetune.display import Display
from speft_kernels.finetune.run import finetune

PEFT = ("lora", "pissa", "shira", "supertuning")
DYNAMIC = ("merge", "rigl")  # method "speft" with a mask that moves
METHODS = ("speft", *DYNAMIC, *PEFT, "full", "head")
LR = {"full": 2e-3, "head": 5e-2}


class Silent(Display):
    """Shows nothing; at step `at`, does `act`."""

    def __init__(self, at=None, act=None):
        super().__init__(Console(file=open(os.devnull, "w"), force_terminal=False))  # noqa: SIM115
        self.at, self.act = at, act

    def step(self, step, loss, tokens_per_second):
        if step == self.at:
            self.act()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def make_place(folder, rows=96, others=40):
    """A folder with a model, `rows` to train on and others."""
    train = sentences(rows, seed=1)
    write_tsv(folder / "train.tsv", train)
    write_tsv(folder / "eval.tsv", sentences(others, seed=2))
    save_bert(folder / "model", [text for text, _ in train])
    return folder


def settings(place, output, method="speft", **others):
    lr = LR.get(method, 2e-2)
    if method in DYNAMIC:
        others = {"dynamic": method, "dynamic_every": 4, **others}
        method = "speft"
    return {
        "model": str(place / "model"),
        "train": str(place / "train.tsv"),
        "eval": str(place / "eval.tsv"),
        "output": str(output),
        "method": method,
        "pooling": "mean",
        "density": 0.05,
        "lora_rank": 2,
        "scoring_examples": 32,
        "scoring_batches": 2,
        "lr": lr,
        "epochs": 3,
        "batch_size": 8,
        **others,
    }


def run(place, output, method="speft", *, display=None, resume=False, overwrite=False, **others):
    config = RunConfig.from_dict(settings(place, output, method, **others))
    return finetune(config, display=display or Silent(), resume=resume, overwrite=overwrite)


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def tensors(output):
    """Every tensor in the adapter folder."""
    from safetensors.torch import load_file

    return {
        k: v
        for path in (output / "adapter").glob("*.safetensors")
        for k, v in load_file(path).items()
    }
