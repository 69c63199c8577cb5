"""`SpeftConfig`: how a model is made sparse. Checked as a whole when it is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Any

from . import recipe
from .errors import ConfigError, nearest, shown
from .salience.custom import Score, name_of
from .salience.metrics import METRICS, check_salience

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class SpeftConfig:
    """What trains, how much of it, and how it is chosen.

    Args:
        density: share of the target weights' entries that train, in (0, 1).
        salience: key of the metric that ranks the entries (`salience.METRICS`); or a callable
            `score(w, g) -> s` of a weight and its gradient, all `[N, K]`, or the name of one,
            "package.module:function", which is imported when scoring starts. None is "snip".
        scope: "layer" gives every matrix the same density, "global" ranks the entries of all of
            them together.
        selection: "top" takes the entries that score highest; "sample" draws without replacement,
            each time with a chance in proportion to the score: between "top" and `random`. None is
            "top" for a salience that is named, and "sample" where that is None, too.
        sample_columns: share of each weight's columns that "sample" draws from, those whose scores
            sum highest; a layer keeps as many of its input's for the backward pass.
        target_modules: "all-linear", or names of linear layers: full names, dotted suffixes
            ("query", "attention.self.query") or regular expressions that match the full name.
            "all-linear" is every `nn.Linear` but the output head.
        exclude_modules: modules, named in the same way, that stay frozen with everything below
            them.
        block_shape: `(bh, bw)`: train whole blocks of each weight; `(1, 1)` trains single entries.
        mode: "resident" keeps the delta inside the base weight, "additive" leaves the weight
            untouched.
        modules_to_train: modules that train densely. None finds the task head of a transformers
            model by itself; `()` trains none.
        head_warmup_steps: optimiser steps on `modules_to_train` alone before scoring: the gradients
            behind a freshly initialised head are noise.
        head_warmup_lr: learning rate of that warm-up (AdamW), by default that of `docs/study.md`.
        accumulate: what becomes of the batches' gradients, for metrics of the plain gradient: "sum"
            scores the summed gradient, "absolute" the sum of |g| of each batch, "square" that of
            g^2.
        accumulator_dtype: "float32", or "weight" for each weight's own dtype, to accumulate
            in.
        accumulator_device: "model", or "cpu" to keep the accumulators in host memory.
        grasp_sign: "paper" ranks by -w (H g), "code" by +w (H g) as the paper's authors' code does.
        grasp_temperature: metric "grasp" divides the logits by it, wherever the loss goes through
            `torch.nn.functional.cross_entropy`; 1 leaves them. 200 is the authors' code's.
        seed: seed of whatever is random in the warm-up, in scoring and in drawing.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    density: float = 0.005
    salience: str | Score = None  # type: ignore[assignment]  # none is left once it is built
    scope: str = "layer"
    selection: str = None  # type: ignore[assignment]
    sample_columns: float = recipe.SAMPLE_COLUMNS
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: Sequence[str] = ()
    block_shape: tuple[int, int] = (1, 1)
    mode: str = "resident"
    modules_to_train: Sequence[str] | None = None
    head_warmup_steps: int = 0
    head_warmup_lr: float = 5e-3
    accumulate: str = "sum"
    accumulator_dtype: str = "float32"
    accumulator_device: str = "model"
    grasp_sign: str = "paper"
    grasp_temperature: float = 200.0
    seed: int = 0

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        put("density", _fraction("density", self.density))
        columns = _number("sample_columns", self.sample_columns)
        if not 0.0 < columns <= 1.0:
            raise ConfigError(f"sample_columns must lie in (0, 1], got {self.sample_columns!r}")
        put("sample_columns", columns)
        salience, selection = recipe.choice(self.salience, self.selection)
        put("salience", salience)
        put("selection", selection)
        statistic = check_salience(salience)
        for name, choices in recipe.CHOICES.items():
            _choice(name, getattr(self, name), choices)
        if self.accumulate != "sum" and statistic != "gradient":
            raise ConfigError(
                f"accumulate={self.accumulate!r} is for metrics of the plain gradient; salience "
                f"{self.salience!r} has nothing of the kind to accumulate"
            )
        known = METRICS.get(self.salience) if isinstance(self.salience, str) else None
        if self.selection == "sample" and known is not None and known.signed:
            raise ConfigError(
                "selection='sample' takes scores as chances, so none may be below zero; those of "
                f"salience {self.salience!r} are signed"
            )
        if self.target_modules != ALL_LINEAR:
            put("target_modules", _names("target_modules", self.target_modules))
            if not self.target_modules:
                raise ConfigError(
                    f"target_modules is empty; name a linear layer or say {ALL_LINEAR!r}"
                )
        put("exclude_modules", _names("exclude_modules", self.exclude_modules))
        if self.modules_to_train is not None:
            put("modules_to_train", _names("modules_to_train", self.modules_to_train))
        put("block_shape", _block_shape(self.block_shape))
        for name in ("head_warmup_steps", "seed"):
            put(name, _whole(name, getattr(self, name)))
        for name in ("head_warmup_lr", "grasp_temperature"):
            number = _number(name, getattr(self, name))
            if number <= 0:
                raise ConfigError(f"{name} must be above 0, got {number!r}")
            put(name, number)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict of JSON types; `from_dict` reads it back.

        A callable becomes its name, "module:qualname". `from_dict` takes any such name; scoring
        with it refuses one that cannot be imported, as a lambda's cannot.
        """
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        if not isinstance(self.salience, str):
            settings["salience"] = name_of(self.salience)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in settings.items()
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SpeftConfig:
        """Build a config from `to_dict`'s result, or from part of it.

        Raises:
            ConfigError: a key is unknown or a value is refused.
        """
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise ConfigError(f"unknown setting {shown(key)}.{nearest(str(key), known)}")
        return cls(**settings)


def _number(name: str, value: object) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, Real):  # numpy's scalars, too
            number = float(value)
            if math.isfinite(number):
                return number
    except OverflowError:  # of an integer beyond float64
        pass
    raise ConfigError(f"{name} must be a finite number, got {shown(value)}")


def _fraction(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0.0 < number < 1.0:
        raise ConfigError(f"{name} must lie in (0, 1), both ends excluded, got {shown(value)}")
    return number


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**63:
        raise ConfigError(f"{name} must be a whole number from 0 to 2^63 - 1, got {shown(value)}")
    return int(value)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got "
            f"{shown(value)}.{nearest(str(value), choices)}"
        )


def _names(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) and item for item in items):
        raise ConfigError(f"{name} must be module names (non-empty strings), got {shown(value)}")
    return tuple(items)


def _block_shape(value: object) -> tuple[int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ConfigError(f"block_shape must be two whole numbers, got {shown(value)}")
    for side in value:
        if isinstance(side, bool) or not isinstance(side, Integral) or side < 1:
            raise ConfigError(
                f"block_shape must be two whole numbers of at least 1, got {shown(value)}"
            )
    return (int(value[0]), int(value[1]))
