"""A tiny study, and workers that write at once what a run would leave."""

import json
from multiprocessing.connection import Pipe
from pathlib import Path

from speft_kernels.study import runner

STUDY = """
name: tiny
output: {output}
base: {{model: {model}, validation: 0.25, batch_size: 8, epochs: 1, max_length: 32, density: 0.05,
       scoring_examples: 16, scoring_batches: 2}}
tasks:
  films: {{train: train.tsv, test: eval.tsv}}
methods:
  head: {{method: head}}
  sparse: {{salience: [snip, random]}}
lr: [1e-2, 3e-2]
seeds: [0, 1, 2]
"""


class FakeWorker:
    """Writes at once what a run would leave, unless `outcome` says why it fails."""

    began: list = []  # noqa: RUF012 -- reset by the fixture
    outcome = staticmethod(lambda config: None)

    def __init__(self, config, *, threads, slot):
        self.slot, self.config = slot, config
        FakeWorker.began.append(config)
        self.outcome = FakeWorker.outcome(config)
        if self.outcome is None:
            write_result(config)
        self.sentinel, other = Pipe()
        other.close()  # ready at once

    def failure(self):
        return self.outcome

    def stop(self):
        pass


def write_result(config, after=None, **others):
    folder = Path(config.output)
    folder.mkdir(parents=True)
    # The second rate is the better one for every method.
    score = config.lr * 10 + config.seed / 100 if after is None else after
    result = {
        **dict.fromkeys(("steps", "best_step", "train_seconds", "step_ms_median"), 1),
        **{"density": 0.05, "trainable_parameters_without_head": 9, "head_parameters": 2},
        **{"lr": config.lr, "head_lr": config.lr, "metric": "accuracy", "after": score},
        **{"test": {"accuracy": score}, "salience_seconds": 0.0, "salience": {}, "threads": 1},
        **{"peak_memory_bytes": None, "device": "cpu", "processor": "x", "versions": {}},
        "commit": "unknown",
        **others,
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.json").write_text(json.dumps({"settings": config.to_dict()}))


def fake_workers(monkeypatch):
    """The class that a study takes its workers from, for this test."""
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "began", [])
    monkeypatch.setattr(FakeWorker, "outcome", staticmethod(lambda config: None))
    return FakeWorker


def silent(line):
    pass
