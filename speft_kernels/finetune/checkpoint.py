"""What a run needs to go on where it was stopped, in one file that is replaced as a whole."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
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

_FORMAT = 4
_MOST_PARTS = 10**7  # each step is one, its time
# What reading and restoring raise where a file is not as it was written.
_DAMAGE = (
    *(OSError, EOFError, pickle.UnpicklingError, SafetensorError, zipfile.BadZipFile),
    *(RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError),
    OverflowError,
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
    """What a run needs before it has a model to restore into: a digest of its data, its settings
    but for paths, its patterns, and what a dynamic mask left behind.
    """

    fingerprint: str
    settings: dict[str, Any]
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
    with undamaged(path):
        stored = load_file(path)
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
    with undamaged(path):
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_size(state)
        if state["format"] != _FORMAT:
            raise ConfigError(f"{path}: written by another version; start again with --overwrite")
        _check("state", state, State)
        # Each step is timed.
        if state["progress"]["step"] != len(state["progress"]["step_seconds"]):
            raise TypeError("progress.step is not the number of its steps")
        # A run's result.json tells of the one; settings with a tensor in them equal nothing.
        json.dumps([state["progress"], state["facts"]["settings"]])
    return state


def _check_archive(path: Path) -> None:
    """Raises TypeError for what would unpack to more than the file: torch.save compresses nothing,
    and torch.load makes a gigabyte of a compressed megabyte.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise TypeError("it is compressed")


def _check_size(state: Any) -> None:
    """Raises TypeError for what is larger than the file: tensors that repeat what they hold, and
    lists that stand in each other many times over.
    """
    parts, count = [state], 0
    while parts:
        value, count = parts.pop(), count + 1
        if count > _MOST_PARTS:
            raise TypeError("it has parts without end")
        if isinstance(value, dict):
            parts += value.values()
        elif isinstance(value, list | tuple):
            parts += value
        elif isinstance(value, Tensor):
            whole = value.layout == torch.strided and value.device.type == "cpu"
            if not whole or value.nbytes > value.untyped_storage().nbytes():
                raise TypeError("a tensor is not as large as it says")


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


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Raises ConfigError, which names the file, where what is read out of it turns out damaged."""
    try:
        yield
    except ConfigError:
        raise
    except _DAMAGE as error:
        raise ConfigError(
            f"{path}: the checkpoint is damaged ({error}); start again with --overwrite"
        ) from error


@torch.no_grad()
def restore_checkpoint(
    state: dict[str, Any], path: Path, model: nn.Module, **parts: Any
) -> Progress:
    """Puts everything back that `save_checkpoint` took; the random states last.

    Raises ConfigError for what does not fit the model or the parts.
    """
    for name, parameter in _paired(state["parameters"], model, path):
        parameter.copy_(state["parameters"][name])
    with undamaged(path):
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(_fitting(name, state["parts"][name], part))
        _restore_random(state["random"])
    return Progress(**state["progress"])


def _fitting(name: str, stored: Any, part: Any) -> Any:
    """`stored` as a state for `part`, whose own `load_state_dict` takes nearly anything.

    Raises one of `_DAMAGE` where it has another form.
    """
    if isinstance(part, torch.optim.Optimizer):
        return _optimizer_state(stored, part)
    _check_alike(name, stored, part.state_dict())
    return stored


def _optimizer_state(stored: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """AdamW's moments and rates out of `stored`; its other settings are those of `optimizer`."""
    own = optimizer.state_dict()["param_groups"]
    groups = [
        {**group, "lr": float(kept["lr"])}
        for group, kept in zip(own, stored["param_groups"], strict=True)
    ]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = {}
    for number, kept in stored["state"].items():
        if kept.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise TypeError("the optimizer's state is not AdamW's")
        moments[number] = {
            "step": torch.tensor(float(kept["step"])),
            **{key: _moment(kept[key], parameters[number]) for key in ("exp_avg", "exp_avg_sq")},
        }
    return {"state": moments, "param_groups": groups}


def _moment(stored: Tensor, parameter: nn.Parameter) -> Tensor:
    # The fused AdamW trusts sizes and strides, and writes past the end of what is smaller than it
    # says: another shape is refused, and what comes in is memory of its own.
    if stored.shape != parameter.shape:
        raise TypeError(f"a moment has shape {tuple(stored.shape)}, not {tuple(parameter.shape)}")
    return torch.empty_like(parameter).copy_(stored)


def _check_alike(name: str, stored: Any, own: Any) -> None:
    """Raises TypeError or KeyError, naming the part, for what `own` has not or has of another type.

    A key may be missing: libraries give their objects new attributes from version to version.
    """
    kind: Any = (int, float) if type(own) is float else type(own)
    if not isinstance(stored, kind):
        raise TypeError(f"{name} is a {type(stored).__name__}")
    if isinstance(own, dict):
        for key, value in stored.items():
            _check_alike(f"{name}.{key}", value, own[key])
    elif isinstance(own, list | tuple):
        if len(stored) != len(own):
            raise TypeError(f"{name} has {len(stored)} items, not {len(own)}")
        for value, other in zip(stored, own, strict=True):
            _check_alike(f"an item of {name}", value, other)


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
