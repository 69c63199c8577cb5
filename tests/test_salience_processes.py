"""Several processes that score together select what one would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    mlp,
    mlp_config,
    pair_batches,
    pair_loss,
)
from torch import Tensor, nn

from speft_kernels.model import score_and_select

_WORKER = """
import json
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tiny_models import mlp, pair_batches, pair_loss
from speft_kernels.model import SpeftConfig, score_and_select

rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)


def run(batches, warmup=0, nan_in=None, **settings):
    def loss_fn(model, batch):
        if batch is None:
            return model(torch.ones(1, 6))
        loss = pair_loss(model, batch)
        return loss * float("nan") if rank == nan_in else loss

    config = SpeftConfig(
        density=0.1, target_modules=("first", "second"), modules_to_train=("head",),
        head_warmup_steps=warmup, **settings,
    )
    model = mlp()
    try:
        patterns, report = score_and_select(model, config, pair_batches(batches)[rank::2], loss_fn)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return {
        "indices": [pattern.indices.tolist() for pattern in patterns.values()],
        "counts": [report.batches, report.examples],
        "head": model.head.weight.tolist(),
    }


print(json.dumps({
    "several": run(4), "one each": run(2), "uneven": run(3), "one without": run(1),
    "warmup": run(4, warmup=3), "nan": run(4, nan_in=1), "after nan": run(4),
    "nan grasp": run(4, nan_in=1, salience="grasp"),
    **{
        f"{metric} {scope} {count}": run(
            count, salience=metric, scope=scope, accumulator_dtype="weight",
            accumulator_device="cpu",
        )
        for metric in ("fisher", "grasp", "synflow", "random")
        for scope in ("layer", "global") for count in (4, 1)
    },
    **{fold: run(3, salience="snip", accumulate=fold) for fold in ("absolute", "square")},
}))
dist.destroy_process_group()  # its threads end a process that leaves without it
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes with half of the batches each came to, in a few situations."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(_WORKER)
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                folder / "worker.py",
                Path(__file__).parent,
                folder / "meeting",
                str(rank),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.parametrize(
    ("situation", "count"),
    [("several", 4), ("one each", 2), ("uneven", 3), ("one without", 1), ("after nan", 4)],
)
def test_processes_select_what_one_would(
    two_processes: list[dict[str, Any]], situation: str, count: int
) -> None:
    patterns, report = score_and_select(mlp(), mlp_config(), pair_batches(count), pair_loss)
    for process in two_processes:
        found = process[situation]
        assert found["indices"] == [pattern.indices.tolist() for pattern in patterns.values()]
        assert found["counts"] == [report.batches, report.examples]


def whole_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(torch.ones(1, 6)) if batch is None else pair_loss(model, batch)


@pytest.mark.parametrize("metric", ["fisher", "grasp", "synflow", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("count", [4, 1])
def test_every_metric_selects_in_processes_what_it_does_in_one(
    two_processes: list[dict[str, Any]], metric: str, scope: str, count: int
) -> None:
    config = mlp_config(salience=metric, scope=scope)
    patterns, report = score_and_select(mlp(), config, pair_batches(count), whole_loss)
    for process in two_processes:
        found = process[f"{metric} {scope} {count}"]
        assert found["indices"] == [pattern.indices.tolist() for pattern in patterns.values()]
        assert found["counts"] == [report.batches, report.examples]


@pytest.mark.parametrize("accumulate", ["absolute", "square"])
def test_processes_fold_each_batch(two_processes: list[dict[str, Any]], accumulate: str) -> None:
    config = mlp_config(salience="snip", accumulate=accumulate)
    patterns, _ = score_and_select(mlp(), config, pair_batches(3), pair_loss)
    for process in two_processes:
        assert process[accumulate]["indices"] == [p.indices.tolist() for p in patterns.values()]


def test_processes_warm_the_same_head_up(two_processes: list[dict[str, Any]]) -> None:
    first, second = (process["warmup"] for process in two_processes)
    assert first == second
    assert first["head"] != mlp().head.weight.tolist()


def test_an_error_in_one_process_ends_all(two_processes: list[dict[str, Any]]) -> None:
    for situation in ("nan", "nan grasp"):
        first, second = (process[situation] for process in two_processes)
        assert "SalienceError: scoring failed in another process" in first
        assert "SalienceError: the loss of batch 1 is nan" in second
