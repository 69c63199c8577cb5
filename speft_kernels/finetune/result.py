"""What a finished run reports."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from .._version import __version__
from ..errors import shown
from ..machine import commit, installed, processor
from ..overview import sparse_layers
from ..peak_memory import PeakMemory
from .checkpoint import Progress
from .display import duration
from .inputs import Inputs
from .methods import Prepared
from .tasks import majority_scores

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy")


def result_of(
    inputs: Inputs,
    prepared: Prepared,
    progress: Progress,
    peak: PeakMemory,
    device: torch.device,
) -> dict[str, Any]:
    """The contents of `result.json`.

    `before` and `after` are the metric on the eval data, of the model before anything was trained
    and of the best one, `majority` that of always answering the label that is the most frequent in
    training; `positive_label` is the label of two that F1 is of. `mask` is the ready mask of a run
    that has one, `dynamic` what became of one that moves. Times are in seconds or ms and exclude
    evaluations; `peak_memory_bytes` is that of training.
    """
    config, name = inputs.config, inputs.config.metric_name
    result = {
        "method": config.method,
        "task": config.task,
        "model": config.model,
        "metric": name,
        "before": progress.before[name],
        "after": progress.best[name],
        "eval": progress.best,
        "best_step": progress.best_step,
        "trainable_parameters": prepared.adapted + prepared.head,
        "trainable_parameters_without_head": prepared.adapted,
        "head_parameters": prepared.head,
        "density": prepared.density,
        "steps": progress.step,
        "step_ms_median": 1000 * statistics.median(progress.step_seconds),
        "tokens_per_second": progress.tokens / progress.train_seconds,
        "peak_memory_bytes": peak.bytes(),
        "peak_memory_source": peak.source,
        "salience_seconds": progress.salience.get("seconds", 0.0),
        "salience": progress.salience,
        "train_seconds": progress.train_seconds,
        "lr": config.learning_rate,
        "head_lr": config.head_learning_rate,
        "seed": config.seed,
        "inputs": inputs.identity,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "commit": commit(),
        "versions": versions(),
    }
    if inputs.mask is not None:
        result["mask"] = {"folder": config.mask, "sha256": inputs.mask.sha256}
    if prepared.moving is not None:
        result["dynamic"] = {
            "strategy": config.dynamic,
            "steps": progress.mask_steps,
            "moved": progress.mask_moved,
            "seconds": progress.mask_seconds,
            "entries_in_adapter": sum(
                layer.pattern.nnz for layer in sparse_layers(prepared.model).values()
            ),
        }
    if config.task == "classification":
        classes = [_class(item.labels) for item in inputs.eval]
        positive = 1
        if inputs.positive_label is not None:
            result["positive_label"] = inputs.positive_label
            positive = inputs.labels.index(inputs.positive_label)
        trained = (_class(item.labels) for item in inputs.train)
        always = majority_scores(trained, classes, len(inputs.labels), positive)
        result["majority"] = always[name]
    return result


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the libraries that a result depends on."""
    found = {"python": platform.python_version(), "speft_kernels": __version__}
    return found | {name: known for name in _LIBRARIES if (known := installed(name))}


def describe(result: Mapping[str, Any], output: str) -> str:
    """The result in a few lines for people."""
    name = result["metric"]
    if name == "f1":
        name += f" of {shown(result.get('positive_label'))}"
    lines = [
        f"{name}: {result['before']:.4f} before, {result['after']:.4f} after "
        f"(step {result['best_step']} of {result['steps']})"
    ]
    if "majority" in result:
        lines[0] += f"; always the most frequent label: {result['majority']:.4f}"
    if "test" in result:
        lines.append("test: " + "  ".join(f"{k} {v:.4f}" for k, v in result["test"].items()))
    memory = result["peak_memory_bytes"]
    lines += [
        f"trained parameters: {result['trainable_parameters_without_head']:,} "
        f"({result['density']:.3%} of the adapted weights) + "
        f"{result['head_parameters']:,} in the head",
        f"training took {duration(result['train_seconds'])}, "
        f"{result['step_ms_median']:.0f} ms a step, {result['tokens_per_second']:,.0f} tokens/s"
        + (f", peak memory {memory / 2**30:.2f} GiB" if memory else ""),
        f"written to {output}",
    ]
    return "\n".join(lines)


def _class(labels: int | list[int]) -> int:
    assert isinstance(labels, int)
    return labels
