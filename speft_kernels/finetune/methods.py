"""The ways to train: which parameters of a model learn, and how the result is saved.

All of them treat the classification head alike: it trains densely, after the same steps alone, and
at the same rate where `head_lr` is given, so that what is compared is the rest of the model.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..adapter import save_adapter
from ..adapter_file import CONFIG_FILE, TENSORS_FILE
from ..atomic import new_folder
from ..config import SpeftConfig
from ..dynamic import MovingMask
from ..errors import AdapterError, ConfigError, shown
from ..files import read_json, write_json
from ..install import linear_for_conv1d
from ..model import apply_patterns, score_and_select, sparse_layers
from ..pattern import SparsePattern
from ..salience.accumulate import LossFn
from ..salience.borrow import borrowed
from ..salience.metrics import metric_named
from ..salience.report import SalienceReport
from ..salience.warmup import warm_up
from ..targets import Targets, find_dense_modules, find_targets, is_below
from . import baselines
from .checkpoint import trainable
from .config import ADAPTERS, PEERS, RunConfig
from .mask import Mask, targets_of
from .tasks import Task

# What goes along with what other libraries save.
ABOUT = "speft.json"


@dataclass
class Prepared:
    """A model ready to train.

    Attributes:
        model: holds the parameters that train, and only they require a gradient.
        head_modules: names of the head's modules in `model`.
        adapted: number of trained scalars outside the head.
        head: number of trained scalars of the head.
        target_elements: number of scalars of the matrices that are adapted.
        report: what scoring came to (method "speft" only, and not in a resumed run).
        moving: moves the mask, in a run with a dynamic one.
    """

    model: nn.Module
    head_modules: tuple[str, ...]
    adapted: int
    head: int
    target_elements: int
    report: SalienceReport | None = None
    moving: MovingMask | None = None

    @property
    def density(self) -> float:
        """Trained scalars outside the head as a share of the adapted matrices."""
        return self.adapted / self.target_elements if self.target_elements else 0.0

    def train_mode(self) -> None:
        """Switches dropout on where something learns: a frozen model's features come without."""
        self.model.train(self.adapted > 0)
        for name in self.head_modules:
            self.model.get_submodule(name).train()

    @property
    def salience(self) -> dict[str, Any]:
        """Figures of the scoring pass; empty where there was none."""
        if self.report is None:
            return {}
        figures = self.report.to_dict()
        del figures["layers"]
        return figures

    def describe(self) -> str:
        notes = "".join(f"{note}\n" for note in self.report.notes) if self.report else ""
        scored = f"scored in {self.report.seconds:.1f} s; " if self.report else ""
        return (
            f"{notes}{scored}training {self.adapted:,} parameters ({self.density:.3%} of the "
            f"adapted weights) + {self.head:,} in the head"
        )


def mean_loss(task: Task, accelerator: Accelerator) -> LossFn:
    """The loss of one batch for scoring: the mean over its items, in the run's precision; for
    float16 see `_scoring_dtype`.
    """

    def precision() -> AbstractContextManager[Any]:
        if accelerator.mixed_precision != "fp16":
            return accelerator.autocast()
        wide = _scoring_dtype(accelerator.device)
        return torch.autocast(accelerator.device.type, wide, enabled=wide != torch.float32)

    def loss_fn(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        with precision():
            total, _ = task.loss(model, inputs)
        return total / task.count(inputs)

    return loss_fn


def _scoring_dtype(device: torch.device) -> torch.dtype:
    """In which precision a run in float16 scores, and warms its head up.

    Small gradients are zero in float16. Training scales the loss for that, by a factor that it
    finds by trial and takes back in its optimizer. Scores go past the optimizer, and a callable of
    the user's is promised the gradient itself. bfloat16 has the range of float32 in the memory of
    float16; where a GPU does not compute in it, float32 does.
    """
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def find(model: nn.Module, config: RunConfig, mask: Mask | None) -> Targets:
    """The layers to adapt and the head.

    Raises ConfigError for names the model does not have, and for what scoring or adapting will need
    and cannot get; for a ready mask see `targets_of`.
    """
    if mask is not None:
        return targets_of(mask, model, config)
    if config.method in ADAPTERS:
        if config.method == "speft":
            metric_named(config.salience)
        else:
            baselines.library(config.method)
        return find_targets(model, config.speft())
    return Targets({}, find_dense_modules(model, () if config.task == "causal-lm" else None))


def budgeted(config: RunConfig, targets: Targets) -> RunConfig:
    """`config` with the density and the rank at which `lora_budget` is met, if there is one.

    LoRA of rank r trains r (N + K) scalars of a layer [N, K]. Raises ConfigError for more than the
    layers hold.
    """
    rank = config.lora_budget
    if rank is None:
        return config
    shapes = targets.shapes.values()
    density = rank * sum(n + k for n, k in shapes) / sum(n * k for n, k in shapes)
    if density >= 1:
        raise ConfigError(
            f"lora_budget = {rank} is too much: LoRA's factors would be {density:.0%} of the "
            "adapted weights"
        )
    return dataclasses.replace(config, lora_rank=rank, density=density)


def warm_up_head(
    model: nn.Module,
    config: RunConfig,
    targets: Targets,
    batches: Iterable[Mapping[str, Any]],
    loss_fn: LossFn,
) -> float:
    """Trains the head alone for `config.head_warmup_steps` steps; returns the seconds it took."""
    head = [p for name in targets.dense_modules for p in model.get_submodule(name).parameters()]
    if not config.head_warmup_steps or not head:
        return 0.0
    start = time.perf_counter()
    with borrowed(model, config.seed):
        warm_up(
            model,
            head,
            batches,
            loss_fn,
            steps=config.head_warmup_steps,
            lr=config.head_learning_rate,
        )
    return time.perf_counter() - start


def prepare(
    model: nn.Module,
    config: RunConfig,
    targets: Targets,
    batches: Iterable[Mapping[str, Any]],
    loss_fn: LossFn,
    patterns: dict[str, SparsePattern] | None = None,
) -> Prepared:
    """Makes `model` train by `config.method`; `patterns` are those of a ready mask, or of the run
    that is resumed.
    """
    report = moving = None
    elements = sum(n * k for n, k in targets.shapes.values())
    if config.method == "speft":
        with linear_for_conv1d(model, targets.layers):  # once for both
            if patterns is None:
                patterns, report = score_and_select(model, config.speft(), batches, loss_fn)
            apply_patterns(model, patterns, config.speft())
        if report and config.dtype == "float16" and report.batches:
            dtype = str(_scoring_dtype(next(model.parameters()).device)).removeprefix("torch.")
            note = f"scored in {dtype}: small gradients would be zero in float16"
            report = dataclasses.replace(report, notes=(*report.notes, note))
        if config.dynamic:
            moving = MovingMask(model, config.speft(), config.dynamic, share=config.dynamic_share)
    elif config.method in PEERS:
        model = baselines.adapt(model, config, targets)
    else:
        model.requires_grad_(config.method == "full")
        for name in targets.dense_modules:
            model.get_submodule(name).requires_grad_(True)
        if config.method == "full":
            elements = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for name, p in trainable(model).items() if in_head(name, targets, config))
    adapted = sum(p.numel() for p in trainable(model).values()) - head
    if config.method == "full":
        elements -= head
    heads = () if config.method in PEERS else targets.dense_modules
    return Prepared(model, heads, adapted, head, elements, report, moving)


def in_head(name: str, targets: Targets, config: RunConfig) -> bool:
    """Whether the trained parameter `name` belongs to the classification head."""
    if config.method in PEERS:
        return ".modules_to_save." in name
    return is_below(name, targets.dense_modules)


def parameter_groups(model: nn.Module, config: RunConfig, targets: Targets) -> list[dict[str, Any]]:
    """Groups for the optimizer: adapted and head, each with and without weight decay.

    Decay belongs to dense matrices. Sparse values are differences from the base, and biases and
    norms are no matrices: neither decays.
    """
    undecayed = {id(layer.values) for layer in sparse_layers(model).values()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        decays = parameter.ndim > 1 and id(parameter) not in undecayed
        groups.setdefault((in_head(name, targets, config), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.head_learning_rate if head else config.learning_rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (head, decays), parameters in groups.items()
    ]


def patterns_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The patterns of a sparse model as plain data, for a checkpoint."""
    return {
        name: {
            "shape": layer.pattern.shape,
            "block_shape": layer.pattern.block_shape,
            "indices": layer.pattern.indices.cpu(),
        }
        for name, layer in sparse_layers(model).items()
    }


def patterns_from(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, SparsePattern]:
    """The inverse of `patterns_of`; raises PatternError for damaged indices."""
    return {
        name: SparsePattern(
            tuple(entry["shape"]), entry["indices"], block_shape=tuple(entry["block_shape"])
        )
        for name, entry in stored.items()
    }


def save_trained(
    prepared: Prepared,
    config: RunConfig,
    recipe: SpeftConfig | None,
    folder: Path,
    about: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes what was trained, replacing what an earlier call wrote there. Raises AdapterError
    where there is more than that.

    Methods "speft" and "head" give an adapter of this package, those of PEFT one of theirs, and
    "full" a whole model with its tokenizer. `recipe` goes along with what "speft" trained, `about`
    with everything, in the last two cases as `speft.json`, which names the files beside it.
    """
    model = prepared.model
    if prepared.moving is not None:
        prepared.moving.save(model, folder, config=recipe, extra=about, overwrite=True)
        return
    if config.method in ("speft", "head"):
        save_adapter(model, folder, config=recipe, extra=about, overwrite=True)
        return
    if folder.exists() and (others := {path.name for path in folder.iterdir()} - files_of(folder)):
        raise AdapterError(
            f"the folder {str(folder)!r} holds what no run has written ({shown(min(others))}), "
            "which would be lost with the rest: move it elsewhere"
        )
    with new_folder(folder) as draft:
        if config.method == "full":
            model.save_pretrained(draft)  # type: ignore[operator]
            tokenizer.save_pretrained(draft)
        else:
            baselines.save(model, config, draft)
        files = sorted(path.name for path in draft.iterdir())
        write_json(draft / ABOUT, {**about, "files": files})


def files_of(folder: Path) -> set[str]:
    """The names of what `save_trained` wrote into a folder, as far as the folder tells."""
    if not (folder / ABOUT).is_file():
        return {CONFIG_FILE, TENSORS_FILE}
    try:
        return {ABOUT, *read_json(folder / ABOUT)["files"]}
    except (ConfigError, LookupError, TypeError):
        return {ABOUT}
