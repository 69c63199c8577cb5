"""Several processes that score together select what one would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    mlp,
    mlp_config,
    pair_batches,
    pair_loss,
)

from speft_kernels.model import score_and_select

_WORKER = """
import json
import sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tiny_models import mlp, pair_batches, pair_loss
from speft_kernels.model import SpeftConfig, score_and_select

rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)


def run(batches, warmup=0, nan_in=None):
    def loss_fn(model, batch):
        loss = pair_loss(model, batch)
        return loss * float("nan") if rank == nan_in else loss

    config = SpeftConfig(
        density=0.1, target_modules=("first", "second"), modules_to_train=("head",),
        head_warmup_steps=warmup,
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
}))
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


def test_processes_warm_the_same_head_up(two_processes: list[dict[str, Any]]) -> None:
    first, second = (process["warmup"] for process in two_processes)
    assert first == second
    assert first["head"] != mlp().head.weight.tolist()


def test_an_error_in_one_process_ends_all(two_processes: list[dict[str, Any]]) -> None:
    first, second = (process["nan"] for process in two_processes)
    assert "SalienceError: scoring failed in another process" in first
    assert "SalienceError: the loss of batch 1 is nan" in second
