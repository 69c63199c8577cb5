"""The settings of a run: one dataclass, from which flags, YAML keys and `config.json` follow."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import recipe
from ..errors import ConfigError, nearest, shown
from ..files import path_of, read_json
from ..recipe import CHOICES
from .options import as_declared, check_range, option
from .yaml_file import one_name_each, read_yaml

DEFAULT_MODEL = "all-MiniLM-L6-v2"
PEERS = ("lora", "pissa", "shira", "supertuning")  # those of PEFT
# Those that adapt the linear layers and leave the rest of the model alone.
ADAPTERS = ("speft", *PEERS)
METHODS = (*ADAPTERS, "full", "head")
TASKS = ("classification", "causal-lm")
# Learning rate where none is given. The sparse values, LoRA's factors and a new head start from
# zero or from noise and take large steps; the weights of a trained model do not.
DEFAULT_LR = {
    "speft": 2e-3,
    "lora": 2e-3,
    "pissa": 1e-3,
    "shira": 2e-3,
    "supertuning": 2e-3,
    "full": 5e-5,
    "head": 1e-2,
}
# Of method "speft" where the mask is drawn: its entries lie far from each other and take larger
# steps than the highest of a gradient's scores, which gather in columns that move together.
DRAWN_LR = 8e-3
# Sentences are short; prompts with their responses are not, and one that is cut never ends.
MAX_LENGTH = {"classification": 128, "causal-lm": 1024}

# AdamW divides its rate by 1 - beta1 = 0.1 in the first step, in float32.
LR_LIMIT = 1e37
# numpy's generator takes no seed above.
SEED_LIMIT = 2**32
PATHS = ("train", "eval", "test", "model", "mask", "output")
# What decides which weights train: with a ready mask there is nothing left to decide.
DECIDE_THE_MASK = (
    *("salience", "selection", "density", "lora_budget", "scope", "sample_columns"),
    *("target_modules", "exclude_modules", "block_shape", "accumulate", "accumulator_dtype"),
    *("accumulator_device", "grasp_sign", "grasp_temperature", "dynamic"),
)


@dataclass(frozen=True)
class RunConfig:
    """Settings of one fine-tuning run, checked on construction.

    Raises ConfigError naming the setting, its value and what is allowed. What only the model or the
    data can tell (module names, labels, k larger than a matrix) is checked when they are loaded.
    """

    train: str = option("", "training data: a TSV, CSV or JSONL file, or a dataset name")
    eval: str | None = option(
        None, "data that the metric and the choice of the best model are taken from"
    )
    test: str | None = option(None, "data measured once, with the best model, after training")
    validation: float = option(
        0.0, "share of the training data to split off in the place of --eval", minimum=0, below=1
    )
    output: str = option("", "folder of the run; it must not exist yet")
    model: str = option(DEFAULT_MODEL, "folder or hub id of the pre-trained model")
    task: str = option("classification", "what to train for", choices=TASKS)
    method: str = option("speft", "how to train", choices=METHODS)

    mask: str | None = option(
        None,
        "train the weights that are in this mask, from zero, and score nothing: the folder that "
        "'speft salience' wrote, or an adapter",
    )
    density: float = option(0.005, "share of the target weights that train", above=0, below=1)
    salience: str = option(
        None, f"score that chooses the weights, or a function MODULE:NAME [{recipe.SALIENCE}]"
    )
    scope: str = option(
        "layer", "rank each matrix by itself, or all together", choices=CHOICES["scope"]
    )
    selection: str = option(
        None,
        "train what scores highest, or draw with chances in proportion to the scores; top where "
        f"--salience is given, else {recipe.SELECTION}",
        choices=CHOICES["selection"],
    )
    sample_columns: float = option(
        recipe.SAMPLE_COLUMNS,
        "share of each layer's columns, those that score highest, to draw from",
        above=0,
    )
    target_modules: tuple[str, ...] | str = option(
        "all-linear", "layers to adapt: names, suffixes or regular expressions"
    )
    exclude_modules: tuple[str, ...] = option((), "layers to leave out")
    experts: str = option(
        "frozen",
        "what becomes of experts that transformers holds in parameters of three dimensions: "
        "'split' makes linear layers of them, which train like others",
        choices=("frozen", "split"),
    )
    block_shape: tuple[int, int] = option((1, 1), "train blocks of this shape, e.g. 16x16")
    mode: str = option(
        "resident",
        "where the sparse values live while training: inside the weight, or beside it",
        choices=CHOICES["mode"],
    )
    accumulate: str = option(
        "sum",
        "what becomes of the scoring batches' gradients",
        choices=CHOICES["accumulate"],
    )
    accumulator_dtype: str = option(
        "float32", "precision in which scores accumulate", choices=CHOICES["accumulator_dtype"]
    )
    accumulator_device: str = option(
        "model",
        "where scores accumulate: 'cpu' is host memory",
        choices=CHOICES["accumulator_device"],
    )
    grasp_sign: str = option(
        "paper",
        "sign of --salience grasp: -w(Hg), or +w(Hg) of the authors' code",
        choices=CHOICES["grasp_sign"],
    )
    grasp_temperature: float = option(200.0, "what --salience grasp divides the logits by", above=0)
    dynamic: str | None = option(
        None,
        "choose the mask again while training: 'merge' selects it anew and leaves the learned "
        "delta in the weights, 'rigl' drops the smallest deltas and grows by gradient",
        choices=("merge", "rigl"),
    )
    dynamic_every: int = option(1000, "steps between two choices of --dynamic", minimum=1)
    dynamic_share: float = option(
        0.3, "share of the mask that 'rigl' moves at first", above=0, below=1
    )
    dynamic_until: float = option(
        0.75, "share of the steps after which the mask moves no more", above=0, below=1
    )
    scoring_examples: int = option(512, "examples that the score is taken from", minimum=1)
    scoring_batches: int = option(32, "batches that they are divided into", minimum=1)
    head_warmup_steps: int = option(
        None,
        "steps that train the head alone, before scoring "
        f"[{recipe.HEAD_WARMUP_STEPS}; 0 where there is no head, or nothing else to train]",
        minimum=0,
    )
    lora_rank: int = option(
        8, "rank of --method lora and pissa (their alpha is twice that) and shira", minimum=1
    )
    lora_budget: int | None = option(
        None,
        "train as many weights as LoRA of this rank would, in the place of --density",
        minimum=1,
    )

    epochs: int = option(3, "passes over the training data", minimum=1)
    max_steps: int | None = option(None, "stop after this many steps", minimum=1)
    lr: float | None = option(None, "learning rate", above=0, below=LR_LIMIT)
    head_lr: float | None = option(
        None, "learning rate of the new head (default: that of the run)", above=0, below=LR_LIMIT
    )
    batch_size: int = option(32, "examples a batch", minimum=1)
    grad_accumulation: int = option(1, "batches a step", minimum=1)
    clip: float = option(1.0, "largest norm of the gradient; 0 turns clipping off", minimum=0)
    scheduler: str = option(
        "linear", "course of the learning rate", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = option(0.06, "share of the steps that warm up", minimum=0, below=1)
    weight_decay: float = option(
        0.0, "decay of dense weights (never of sparse values)", minimum=0, below=float("inf")
    )
    max_length: int = option(
        None,
        "longest input in tokens; the rest is cut off "
        f"[{MAX_LENGTH['classification']}; {MAX_LENGTH['causal-lm']} for causal-lm]",
        minimum=4,
        below=2**31,
    )
    pooling: str = option(
        "auto",
        "classification head: 'mean' of the token states, or the 'model' type's own; "
        "'auto' takes 'mean' where the model's folder says that it was trained so",
        choices=("auto", "mean", "model"),
    )
    metric: str | None = option(
        None,
        "metric reported and used to choose the best model (default: accuracy; loss for causal-lm)",
        choices=("accuracy", "f1", "matthews", "loss"),
    )
    # A whole number is what YAML makes of 0 and 1.
    positive_label: str | int | None = option(
        None, "label that f1 is of (default: the second in the dataset's order, else as sorted)"
    )
    dtype: str = option(
        "float32",
        "precision of the computation; the weights stay float32",
        choices=("float32", "bfloat16", "float16"),
    )
    eval_every: int | None = option(
        None, "steps between evaluations (default: an epoch)", minimum=1
    )
    save_every: int | None = option(
        None, "steps between checkpoints (default: an epoch)", minimum=1
    )
    seed: int = option(0, "seed of everything random", minimum=0, below=SEED_LIMIT)

    def __post_init__(self) -> None:
        salience, selection = recipe.choice(self.salience, self.selection)
        object.__setattr__(self, "salience", salience)
        object.__setattr__(self, "selection", selection)
        if self.head_warmup_steps is None:
            headed = self.task == "classification" and self.method != "head"
            steps = recipe.HEAD_WARMUP_STEPS if headed else 0
            object.__setattr__(self, "head_warmup_steps", steps)
        if self.max_length is None:
            task = "causal-lm" if self.task == "causal-lm" else "classification"
            object.__setattr__(self, "max_length", MAX_LENGTH[task])
        for spec in dataclasses.fields(self):
            value = coerce(spec.name, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
            check_range(spec, value)
        self.require("train", "output")
        for name in PATHS:
            if value := getattr(self, name):
                path_of(name, value)
        self._check_combinations()

    def require(self, *names: str) -> None:
        """Raises ConfigError when one of these settings is empty."""
        for name in names:
            if not getattr(self, name):
                other = "; --validation 0.1 splits some off the training data"
                raise ConfigError(
                    f"--{name} is missing (or the key {name!r} in the YAML file)"
                    f"{other if name == 'eval' else ''}"
                )

    def _check_combinations(self) -> None:
        allowed = ("loss",) if self.task == "causal-lm" else ("accuracy", "f1", "matthews")
        if self.metric is not None and self.metric not in allowed:
            raise ConfigError(
                f"metric {self.metric!r} does not exist for task {self.task!r}; "
                f"choose one of {', '.join(allowed)}"
            )
        if self.task == "causal-lm" and self.positive_label is not None:
            raise ConfigError("positive_label is one of a classifier's labels; causal-lm has none")
        if self.task == "causal-lm" and self.method == "head":
            raise ConfigError(
                "method 'head' trains a classification head, and causal-lm has none; "
                f"choose one of {', '.join(name for name in METHODS if name != 'head')}"
            )
        if self.task == "causal-lm" and self.head_warmup_steps:
            raise ConfigError(
                "head_warmup_steps warms up a classification head; causal-lm has none"
            )
        if self.scoring_batches > self.scoring_examples:
            raise ConfigError(
                f"scoring_batches = {self.scoring_batches} exceeds "
                f"scoring_examples = {self.scoring_examples}; a batch needs one example at least"
            )
        if self.eval and self.validation:
            raise ConfigError(
                f"eval and validation = {self.validation} exclude each other: the first is data of "
                "its own, the second a part of the training data"
            )
        if self.lora_budget and self.method not in ADAPTERS:
            raise ConfigError(
                f"lora_budget = {self.lora_budget} is for methods that adapt linear layers "
                f"({', '.join(ADAPTERS)}); method {self.method!r} has no budget"
            )
        if self.dynamic and (self.method != "speft" or self.mode != "resident"):
            raise ConfigError(
                f"dynamic = {self.dynamic!r} moves the mask of method 'speft' in mode 'resident'; "
                f"this is method {self.method!r} in mode {self.mode!r}"
            )
        if self.experts == "split" and self.method != "speft":
            raise ConfigError(
                f"experts = 'split' is for method 'speft'; method {self.method!r} leaves experts "
                "that are no linear layers frozen"
            )
        if self.mask is not None:
            self._check_mask()
        if self.method == "speft":
            self.speft()

    def _check_mask(self) -> None:
        if not self.mask:
            raise ConfigError(
                "mask is empty: name the folder that 'speft salience' wrote, or leave it out"
            )
        if self.method != "speft":
            raise ConfigError(
                f"mask = {shown(self.mask)} says which weights method 'speft' trains; this is "
                f"method {self.method!r}"
            )
        usual = {name: FIELDS[name].default for name in DECIDE_THE_MASK}
        usual["salience"], usual["selection"] = recipe.choice(None, None)
        check_alone({k: v for k, v in vars(self).items() if k in usual and v != usual[k]})

    @property
    def metric_name(self) -> str:
        return self.metric or ("loss" if self.task == "causal-lm" else "accuracy")

    @property
    def positive_name(self) -> str | None:
        return None if self.positive_label is None else str(self.positive_label)

    @property
    def higher_is_better(self) -> bool:
        return self.metric_name != "loss"

    @property
    def learning_rate(self) -> float:
        drawn = recipe.is_drawn(self.salience, self.selection)
        return self.usual_rate(drawn) if self.lr is None else self.lr

    def usual_rate(self, drawn: bool) -> float:
        """The learning rate where none is given; `drawn` says how a mask came about."""
        return DRAWN_LR if drawn and self.method == "speft" else DEFAULT_LR[self.method]

    @property
    def head_learning_rate(self) -> float:
        return self.learning_rate if self.head_lr is None else self.head_lr

    def speft(self) -> Any:
        """The `SpeftConfig` of this run (which checks the settings that belong to it).

        The head's warm-up is not in it: here it is the same for every method and comes before.
        """
        from ..config import SpeftConfig

        shared = {f.name for f in dataclasses.fields(SpeftConfig)} & vars(self).keys()
        return SpeftConfig(
            **{name: getattr(self, name) for name in shared - {"head_warmup_steps"}},
            modules_to_train=() if self.task == "causal-lm" else None,
        )

    def located(self) -> RunConfig:
        """The same settings with absolute paths, so that they mean the same in another folder."""
        absolute: dict[str, Any] = {}
        for name in PATHS:
            if not (value := getattr(self, name)):
                continue
            path = path_of(name, value)
            try:
                # A pipe, as the shell makes of <(...), is found by the name given alone.
                if name == "output" or path.is_file() or path.is_dir():
                    absolute[name] = str(path.resolve())
            except (OSError, RuntimeError) as error:  # links that lead back to themselves
                raise ConfigError(f"{name} = {shown(value)} is no path: {error}") from error
        return dataclasses.replace(self, **absolute)

    def to_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RunConfig:
        """Raises ConfigError for an unknown key, with the nearest known one."""
        check_keys(settings, "setting")
        return cls(**settings)


FIELDS = {spec.name: spec for spec in dataclasses.fields(RunConfig)}
_TYPES = typing.get_type_hints(RunConfig)


def usual_settings(task: str = "classification", method: str = "speft") -> dict[str, Any]:
    """The default of each setting. Some go with the task and the method: of these they are those of
    a run that gives nothing else.
    """
    usual = RunConfig(train="-", output="-", task=task, method=method).to_dict()
    return usual | {name: FIELDS[name].default for name in ("train", "output", "task", "method")}


def check_keys(settings: Mapping[str, Any], what: str) -> None:
    for key in settings:
        if key not in FIELDS:
            raise ConfigError(f"{what} {shown(key)} is unknown.{nearest(str(key), FIELDS)}")


def without_choice(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without those that have their defaults beside a mask and say nothing there."""
    hidden = () if settings.get("mask") is None else DECIDE_THE_MASK
    return {key: value for key, value in settings.items() if key not in hidden}


def check_alone(given: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting beside a mask that would decide what is in it."""
    for name in DECIDE_THE_MASK:
        if given.get(name) is not None:
            raise ConfigError(
                f"mask and {name} = {shown(given[name])} exclude each other: the mask says "
                f"already which weights train; leave {name} out, in a YAML file too (a study's "
                f"method undoes its base by '{name}: {json.dumps(FIELDS[name].default)}')"
            )


def load_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, with `-` and `_` alike in the keys.

    Raises ConfigError for a missing file, broken YAML, and unknown keys.
    """
    loaded = read_yaml(path)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must hold keys and values such as 'train: data.tsv'")
    settings = one_name_each(str(path), loaded)
    check_keys(settings, f"{path}: key")
    return {key: coerce(key, value) for key, value in settings.items()}


def load_json(path: Path) -> dict[str, Any]:
    """The settings that an earlier run wrote to its `config.json`. Raises ConfigError for a file
    that is missing or damaged.
    """
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: no such file, so there is no run to resume there")
    settings = read_json(path).get("settings")
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: not the config.json of a run: it holds no settings")
    check_keys(settings, f"{path}: key")
    return {key: coerce(key, value) for key, value in settings.items()}


def coerce(name: str, value: Any) -> Any:
    """`value` as the type of the setting `name`, from a flag's text or what YAML made of it.

    YAML reads `1e-4` as text and `3` as an integer where a float is meant; both are accepted. A
    value that would lose information (`epochs: 2.5`) is not. None is, where it is the default.
    """
    if value is None and FIELDS[name].default is None:
        return None
    return as_declared(name, _TYPES[name], value)
