"""The training loop: steps, evaluations, checkpoints, the best model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from ..adapter import load_adapter
from ..carry import carry
from ..errors import ConfigError, SpeftError
from ..files import replaced, writing
from ..flat import FlatValues
from ..overview import sparse_layers
from .batches import Batch, epoch_order, length_order
from .checkpoint import (
    Progress,
    load_tensors,
    restore_checkpoint,
    save_checkpoint,
    save_tensors,
    undamaged,
)
from .config import PATHS, RunConfig
from .display import Display
from .folder import RunFolder
from .inputs import Inputs
from .mask import recipe_of
from .methods import Prepared, parameter_groups, patterns_of, save_trained
from .signals import Interrupted, StopSignals
from .tasks import Encoded, Task


class TrainingError(SpeftError, RuntimeError):
    """Training cannot go on: the loss or the gradient is no longer a number."""


def steps_per_epoch(config: RunConfig, rows: int) -> int:
    """Optimizer steps of one pass over `rows` training examples."""
    return math.ceil(math.ceil(rows / config.batch_size) / config.grad_accumulation)


def steps_of(config: RunConfig, rows: int) -> int:
    """Optimizer steps of the whole run."""
    steps = steps_per_epoch(config, rows) * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


def check_moves(config: RunConfig, rows: int) -> None:
    """Raises ConfigError when a dynamic mask would never move."""
    steps = steps_of(config, rows)
    if config.dynamic and config.dynamic_every > config.dynamic_until * steps:
        raise ConfigError(
            f"dynamic_every = {config.dynamic_every}: the mask would never move, as the run has "
            f"{steps} steps and dynamic_until = {config.dynamic_until:g}; lower dynamic_every"
        )


class Loop:
    """Trains what is `prepared` of a run's model, with one optimizer, and keeps the best of it.

    A step is `grad_accumulation` batches. Its loss is the mean over all their items, whatever the
    sizes of the batches, so accumulation changes the memory and not the mathematics.
    """

    def __init__(
        self,
        inputs: Inputs,
        prepared: Prepared,
        accelerator: Accelerator,
        folder: RunFolder,
        display: Display,
        stop: StopSignals,
    ) -> None:
        self.inputs, self.task, self.config = inputs, inputs.task, inputs.config
        self.train, self.held_out = inputs.train, inputs.eval
        self.prepared, self.model = prepared, prepared.model
        self.accelerator, self.folder = accelerator, folder
        self.display, self.stop = display, stop
        self.progress, config = Progress(), inputs.config
        self.steps_per_epoch = steps_per_epoch(config, len(self.train))
        self.total_steps = steps_of(config, len(self.train))
        groups = parameter_groups(self.model, config, inputs.targets)
        groups, self._values = _flat(groups, self.model)
        fused = accelerator.device.type in ("cpu", "cuda")
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
        self.scheduler = get_scheduler(
            "constant_with_warmup" if config.scheduler == "constant" else config.scheduler,
            optimizer,
            num_warmup_steps=round(config.warmup_ratio * self.total_steps),
            num_training_steps=self.total_steps,
        )
        self.optimizer = accelerator.prepare(optimizer)
        self._lengths = [item.length for item in self.train]

    def resume(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint that `read_checkpoint` returned."""
        progress = self.progress = restore_checkpoint(
            state, self.folder.state, self.model, **self._stateful_parts()
        )
        with undamaged(self.folder.state):
            if progress.step > self.total_steps:
                raise ValueError(f"step {progress.step} of {self.total_steps}")
            for metrics in (progress.before, progress.best or progress.before):
                _ = metrics[self.config.metric_name]
            if self.prepared.moving is not None:
                self.prepared.moving.load_state_dict(self.model, state["facts"]["left"])
        self._drop_later_metrics()

    def run(self) -> Progress:
        """Trains to the last step; afterwards the model holds the best parameters.

        Raises TrainingError when the loss is no longer finite; OutputError when the disk is full;
        Interrupted, after a checkpoint, when a signal arrived.
        """
        windows = self._windows(self.progress.step)
        self.display.start(self.total_steps, self.progress.step)
        try:
            while True:
                if self._due(self.config.eval_every) and not self._is_evaluated():
                    self._evaluate()
                if self._mask_due():
                    self._move_mask()
                if self._due(self.config.save_every):
                    self.save()
                if self.progress.step == self.total_steps:
                    break
                self.stop.check()
                self._step(next(windows))
        except Interrupted:
            self.save()
            raise
        finally:
            self.display.stop()
        self._note_untrained()  # of the last step: the best may be the first, whose rate is zero
        self._load_best()
        return self.progress

    def save(self) -> None:
        """Writes the checkpoint that `resume` continues from."""
        with writing(self.folder.checkpoint):
            self.folder.checkpoint.mkdir(exist_ok=True)
        save_checkpoint(
            self.folder.state, self.progress, self.model, self._facts(), **self._stateful_parts()
        )

    def evaluate(self, encoded: Sequence[Encoded]) -> dict[str, float]:
        """Metrics on `encoded`. Raises Interrupted when a signal arrives meanwhile."""
        return evaluate(
            self.model, self.task, encoded, self.config.batch_size, self.accelerator, self.stop
        )[0]

    def _facts(self) -> dict[str, Any]:
        """The checkpoint's `Facts`."""
        moving = self.prepared.moving
        return {
            "fingerprint": self.inputs.fingerprint,
            "settings": {k: v for k, v in self.config.to_dict().items() if k not in PATHS},
            "patterns": patterns_of(self.model),
            "left": {} if moving is None else moving.state_dict(),
        }

    def _stateful_parts(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.accelerator.scaler,
        }

    def _windows(self, first_step: int) -> Iterator[list[Batch]]:
        """The batches of each step from `first_step` on."""
        accumulation = self.config.grad_accumulation
        for epoch in range(first_step // self.steps_per_epoch, self.config.epochs):
            order = epoch_order(self._lengths, self.config.batch_size, self.config.seed, epoch)
            skipped = max(0, first_step - epoch * self.steps_per_epoch) * accumulation
            for start in range(skipped, len(order), accumulation):
                yield [
                    self.task.collate([self.train[i] for i in batch])
                    for batch in order[start : start + accumulation]
                ]

    def _due(self, every: int | None) -> bool:
        step = self.progress.step
        return step > 0 and (
            step % (every or self.steps_per_epoch) == 0 or step == self.total_steps
        )

    def _mask_due(self) -> bool:
        """Whether the mask is to be chosen again before the next step."""
        step, every = self.progress.step, self.config.dynamic_every
        return (
            self.prepared.moving is not None
            and 0 < step <= self.config.dynamic_until * self.total_steps
            and step % every == 0
            and step not in self.progress.mask_steps
        )

    def _move_mask(self) -> None:
        """Chooses the mask again, and lets the optimizer train the new values."""
        started, progress = time.perf_counter(), self.progress
        moving, old = self.prepared.moving, self._values
        assert moving is not None
        assert old is not None
        scoring = self.inputs.scoring(self.accelerator, self.stop, len(progress.mask_steps) + 1)
        end = self.config.dynamic_until * self.total_steps
        move = moving.update(self.model, *scoring, progress=progress.step / end)
        new = self._values = FlatValues(self.model).parameter
        carry(self.optimizer.optimizer, old, new, self.model, move, self.config.dynamic == "rigl")
        self._parameters = [new if p is old else p for p in self._parameters]
        progress.mask_steps.append(progress.step)
        progress.mask_moved.append(move.moved)
        progress.mask_seconds += time.perf_counter() - started
        self._log(mask_moved=move.moved)
        self.display.note(f"step {progress.step}: {move.moved:,} other weights train now")

    def _save_adapter(self) -> None:
        inputs, folder = self.inputs, self.folder.adapter
        recipe, about = recipe_of(self.config, inputs.mask), inputs.about()
        with writing(folder):
            save_trained(self.prepared, self.config, recipe, folder, about, inputs.tokenizer)

    def _load_best(self) -> None:
        moving = self.prepared.moving
        if moving is None:
            load_tensors(self.folder.best, self.model)
        else:  # the best model may have had another mask
            moving.release(self.model)
            load_adapter(self.model, self.folder.adapter)

    def _note_untrained(self) -> None:
        """Says which sparse layers no gradient has reached: AdamW moves each value that has one."""
        layers = sparse_layers(self.model).items()
        still = [name for name, x in layers if x.values.numel() and not x.values.any()]
        if still:
            self.display.note(
                f"of {len(still)} layers not a weight has changed, {still[0]!r} among them: no "
                "gradient reached them, as where a model reads the weight of a layer without "
                "calling it; --exclude-modules leaves them out"
            )

    def _is_evaluated(self) -> bool:
        return self.progress.evaluated_step == self.progress.step

    def _step(self, window: list[Batch]) -> None:
        started = time.perf_counter()
        self.prepared.train_mode()
        count = sum(batch.count for batch in window)
        total = 0.0
        for batch in window:
            inputs = batch.to(self.accelerator.device).inputs
            with self.accelerator.autocast():
                loss, _ = self.task.loss(self.model, inputs)
            self.accelerator.backward(loss / count)
            total += loss.item()
        loss_value = total / count
        if not math.isfinite(loss_value):
            raise TrainingError(
                f"the loss became {loss_value} at step {self.progress.step + 1}; lower --lr or "
                "--head-lr, or use --clip or --dtype float32. The best model so far, if any, is in "
                f"{self.folder.adapter}"
            )
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self._parameters, self.config.clip)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._account(window, loss_value, learning_rate, time.perf_counter() - started)

    def _account(self, window: list[Batch], loss: float, lr: float, seconds: float) -> None:
        progress = self.progress
        progress.step += 1
        progress.tokens += sum(batch.tokens for batch in window)
        progress.step_seconds.append(seconds)
        progress.train_seconds += seconds
        self._log(loss=loss, lr=lr, seconds=round(progress.train_seconds, 4))
        self.display.step(progress.step, loss, progress.tokens / progress.train_seconds)

    def _evaluate(self) -> None:
        metrics = self.evaluate(self.held_out)
        progress, name = self.progress, self.config.metric_name
        sign = 1 if self.config.higher_is_better else -1
        check_finite(metrics, f"after step {progress.step}", "lower --lr or --head-lr")
        best = not progress.best or sign * metrics[name] > sign * progress.best[name]
        if best:
            progress.best, progress.best_step = metrics, progress.step
            if self.prepared.moving is None:
                save_tensors(self.folder.best, self.model)
            self._save_adapter()
        progress.evaluated_step = progress.step
        self._log(eval=metrics, best=best)
        self.display.evaluated(progress.step, metrics, best)

    def _log(self, **entry: Any) -> None:
        epoch = self.progress.step / self.steps_per_epoch
        line = json.dumps({"step": self.progress.step, "epoch": round(epoch, 4), **entry})
        metrics = self.folder.metrics
        with writing(metrics), open(metrics, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _drop_later_metrics(self) -> None:
        """Steps after the checkpoint happen again; so do evaluations that it does not know of."""
        if not self.folder.metrics.exists():
            return
        kept = []
        text = self.folder.metrics.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                last = self.progress.evaluated_step if "eval" in entry else self.progress.step
                if int(entry["step"]) <= last:
                    kept.append(line + "\n")
            except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
                break  # the process was killed while it wrote this line
        with replaced(self.folder.metrics) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _flat(
    groups: list[dict[str, Any]], model: nn.Module
) -> tuple[list[dict[str, Any]], nn.Parameter | None]:
    """The groups with the sparse layers' values replaced by the one parameter that holds them, and
    that parameter.
    """
    layers = [layer for layer in sparse_layers(model).values() if layer.values.numel()]
    if not layers:
        return groups, None
    values = {id(layer.values) for layer in layers}
    parameter = FlatValues(model).parameter
    flat = [parameter]
    parted = []
    for group in groups:
        others = [p for p in group["params"] if id(p) not in values]
        if len(others) < len(group["params"]):
            others, flat = flat + others, []
        parted.append({**group, "params": others})
    return [group for group in parted if group["params"]], parameter


def check_finite(metrics: Mapping[str, float], when: str, remedy: str) -> None:
    """Raises TrainingError when a metric is no number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(f"the evaluation's {name} is {value} {when}; {remedy}")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    encoded: Sequence[Encoded],
    batch_size: int,
    accelerator: Accelerator,
    stop: StopSignals,
) -> tuple[dict[str, float], list[int]]:
    """Metrics of `model` on `encoded`, in evaluation mode, and the class number that it gives each
    example; none of a language model.
    """
    model.eval()
    total, count = 0.0, 0
    order: list[int] = []
    predicted: list[int] = []
    true: list[int] = []
    for positions in length_order([item.length for item in encoded], batch_size):
        stop.check()
        batch = task.collate([encoded[i] for i in positions]).to(accelerator.device)
        with accelerator.autocast():
            loss, predictions = task.loss(model, batch.inputs)
        total += loss.item()
        count += batch.count
        if predictions is not None:
            order += positions
            predicted += predictions.tolist()
            true += batch.inputs["labels"].tolist()
    metrics = task.metrics(total, count, predicted, true)
    return metrics, [number for _, number in sorted(zip(order, predicted, strict=True))]
