"""What a run needs to go on where it was stopped, in one file that is replaced as a whole."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..files import replaced

_FORMAT = 3
# What reading and restoring raise where a file is not as it was written.
_DAMAGE = (
    *(OSError, EOFError, pickle.UnpicklingError, SafetensorError),
    *(RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError),
)


@dataclass
class Progress:
    """Where a run stands.

    `before` and `best` are metrics; `best_step` is the step of the best evaluation so far, 0 before
    the first. `salience` is what scoring came to. `mask_steps` are those after which a dynamic mask
    was chosen again, and `mask_moved` how many scalars began to train then.
    """

    step: int = 0
    evaluated_step: int = 0
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    salience: dict[str, Any] = field(default_factory=dict)
    mask_steps: list[int] = field(default_factory=list)
    mask_moved: list[int] = field(default_factory=list)
    mask_seconds: float = 0.0


class StoredPattern(TypedDict):
    shape: tuple[int, int]
    block_shape: tuple[int, int]
    indices: Tensor


class Facts(TypedDict):
    """What a run needs before it has a model to restore into: a digest of its data, its patterns,
    and what a dynamic mask left behind.
    """

    fingerprint: str
    patterns: dict[str, StoredPattern]
    left: dict[str, Any]


class RandomState(TypedDict):
    cpu: Tensor
    cuda: list[Tensor]


class State(TypedDict):
    """A checkpoint; `progress` is a dict of its fields."""

    format: int
    facts: Facts
    progress: Progress
    parameters: dict[str, Tensor]
    random: RandomState
    parts: dict[str, dict[str, Any]]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_tensors(path: Path, model: nn.Module) -> None:
    """Writes the parameters that train."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
    with replaced(path) as temporary:
        save_file(tensors, temporary)


@torch.no_grad()
def load_tensors(path: Path, model: nn.Module) -> None:
    """Reads what `save_tensors` wrote into the same parameters.

    Raises ConfigError for a file that is missing, damaged or of another model.
    """
    try:
        stored = load_file(path)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    for name, parameter in _paired(stored, model, path):
        parameter.copy_(stored[name])


def save_checkpoint(
    path: Path, progress: Progress, model: nn.Module, facts: dict[str, Any], **parts: Any
) -> None:
    """Writes the trained parameters, the random states and the `state_dict` of each of `parts`.

    `facts` are a `Facts`.
    """
    state = {
        "format": _FORMAT,
        "facts": facts,
        "progress": asdict(progress),
        "parameters": {name: p.detach().cpu() for name, p in trainable(model).items()},
        "random": _random_state(),
        "parts": {name: part.state_dict() for name, part in parts.items() if part is not None},
    }
    # To an open file: by its name, torch's own writer loses the system's reason for an error.
    with replaced(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a damaged file or one of another version. Nothing in it is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ConfigError(f"{path}: written by another version; start again with --overwrite")
        _check("state", state, State)
        # Each step is timed.
        if state["progress"]["step"] != len(state["progress"]["step_seconds"]):
            raise TypeError("progress.step is not the number of its steps")
    except ConfigError:
        raise
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return state


def _check(name: str, value: Any, kind: Any) -> None:
    """Raises TypeError, naming the part, for a `value` that is no `kind`."""
    if is_typeddict(kind) or is_dataclass(kind):
        members = get_type_hints(kind)
        _check(name, value, dict[str, Any])
        if value.keys() != members.keys():
            raise TypeError(f"{name} has other keys than {', '.join(members)}")
        for key, member in members.items():
            _check(f"{name}.{key}", value[key], member)
        return
    if kind is not Any and not isinstance(value, get_origin(kind) or kind):
        raise TypeError(f"{name} is a {type(value).__name__}")
    if get_origin(kind) is dict:
        for key, item in value.items():
            _check(f"a key of {name}", key, get_args(kind)[0])
            _check(f"{name}.{key}", item, get_args(kind)[1])
    elif get_origin(kind) is list:
        for item in value:
            _check(f"an item of {name}", item, get_args(kind)[0])


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: the checkpoint is damaged ({error}); start again with --overwrite")


@torch.no_grad()
def restore_checkpoint(
    state: dict[str, Any], path: Path, model: nn.Module, **parts: Any
) -> Progress:
    """Puts everything back that `save_checkpoint` took; the random states last.

    Raises ConfigError for what does not fit the model or the parts.
    """
    for name, parameter in _paired(state["parameters"], model, path):
        parameter.copy_(state["parameters"][name])
    try:
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state["parts"][name])
        _restore_random(state["random"])
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return Progress(**state["progress"])


def _paired(
    stored: dict[str, Tensor], model: nn.Module, path: Path
) -> Iterator[tuple[str, nn.Parameter]]:
    own = trainable(model)
    if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in own.items()}:
        raise ConfigError(
            f"{path}: does not fit the model (its trained parameters differ); "
            "start again with --overwrite"
        )
    yield from own.items()


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _restore_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
