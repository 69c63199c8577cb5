"""`SpeftConfig`: how a model is made sparse. Checked as a whole when it is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import ConfigError, nearest
from .salience.metrics import metric_named

ALL_LINEAR = "all-linear"
_CHOICES = {
    "scope": ("layer", "global"),
    "mode": ("resident", "additive"),
    "accumulator_dtype": ("float32", "weight"),
    "accumulator_device": ("model", "cpu"),
}


@dataclass(frozen=True)
class SpeftConfig:
    """What trains, how much of it, and how it is chosen.

    Args:
        density: share of the target weights' entries that train, in (0, 1).
        salience: key of the metric that ranks the entries (`salience.METRICS`).
        scope: "layer" gives every matrix the same density, "global" ranks the entries of all of
            them together.
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
        head_warmup_lr: learning rate of that warm-up (AdamW).
        accumulator_dtype: "float32", or "weight" for each weight's own dtype, to accumulate
            gradients in.
        accumulator_device: "model", or "cpu" to keep the accumulators in host memory.
        seed: seed of whatever is random in the warm-up and in scoring.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    density: float = 0.005
    salience: str = "gradient"
    scope: str = "layer"
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: Sequence[str] = ()
    block_shape: tuple[int, int] = (1, 1)
    mode: str = "resident"
    modules_to_train: Sequence[str] | None = None
    head_warmup_steps: int = 0
    head_warmup_lr: float = 1e-3
    accumulator_dtype: str = "float32"
    accumulator_device: str = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", _fraction("density", self.density))
        metric_named(self.salience)
        for name, choices in _CHOICES.items():
            _choice(name, getattr(self, name), choices)
        if self.target_modules != ALL_LINEAR:
            object.__setattr__(
                self, "target_modules", _names("target_modules", self.target_modules)
            )
            if not self.target_modules:
                raise ConfigError(
                    f"target_modules is empty; name a linear layer or say {ALL_LINEAR!r}"
                )
        object.__setattr__(self, "exclude_modules", _names("exclude_modules", self.exclude_modules))
        if self.modules_to_train is not None:
            names = _names("modules_to_train", self.modules_to_train)
            object.__setattr__(self, "modules_to_train", names)
        object.__setattr__(self, "block_shape", _block_shape(self.block_shape))
        for name in ("head_warmup_steps", "seed"):
            _whole(name, getattr(self, name))
        rate = _number("head_warmup_lr", self.head_warmup_lr)
        if rate <= 0:
            raise ConfigError(f"head_warmup_lr must be above 0, got {rate!r}")
        object.__setattr__(self, "head_warmup_lr", rate)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict of JSON types; `from_dict` reads it back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
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
                raise ConfigError(f"unknown setting {key!r}.{nearest(str(key), known)}")
        return cls(**settings)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _fraction(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0.0 < number < 1.0:
        raise ConfigError(f"{name} must lie in (0, 1), both ends excluded, got {value!r}")
    return number


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ConfigError(f"{name} must be a whole number of at least 0, got {value!r}")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got "
            f"{value!r}.{nearest(str(value), choices)}"
        )


def _names(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) and item for item in items):
        raise ConfigError(f"{name} must be module names (non-empty strings), got {value!r}")
    return tuple(items)


def _block_shape(value: object) -> tuple[int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ConfigError(f"block_shape must be two whole numbers, got {value!r}")
    for side in value:
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ConfigError(f"block_shape must be two whole numbers of at least 1, got {value!r}")
    return (value[0], value[1])
