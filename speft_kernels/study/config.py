"""A study's configuration: tasks, methods, rates and seeds, and the grid they span."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest, shown
from ..files import path_of
from ..finetune.config import FIELDS, RunConfig
from ..finetune.options import as_kind
from ..finetune.yaml_file import one_name_each, read_yaml
from .folder import StudyFolder

_KEYS = {
    "name": "the study's name",
    "output": "its folder",
    "data": "folder that relative data paths start from; by default the working folder",
    "base": "settings of every run",
    "tasks": "task name -> its settings, data among them",
    "methods": "method label -> its settings; a list of values spans the grid",
    "lr": "learning rates to search, by default that of a single run; a method may have its own",
    "seeds": "seeds of the runs at the best rate; a method may have its own",
    "search_seeds": "how many of the seeds every rate runs with",
    "search": "'all' rates, or 'climb' from the middle one",
    "search_slack": "how far below the best validation a climb still goes on",
}
SEARCHES = ("all", "climb")
# What a study sets itself, for each run.
_OWN = ("output", "seed", "lr")
# Kept in rows and ids as the study's file has them: they say the same on another machine.
PATHS = ("train", "eval", "test")
# A list that several settings share spans billions in a few lines.
_LARGEST_GRID = 100_000
# Settings whose own values are lists: a list of them is one value, not an axis.
_LISTS = ("target_modules", "exclude_modules", "block_shape")
# Two of them and a run's rate, seed and digest are a file's name.
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class Run:
    """One run of the grid. `settings` are those of `RunConfig`, without `output`."""

    task: str
    name: str
    lr: float
    seed: int
    settings: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Names the run and its folder; another setting gives another id."""
        text = json.dumps(self.settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.task}-{self.name}-lr{self.lr:g}-s{self.seed}-{digest}"

    def config(self, folder: Path, data: Path) -> RunConfig:
        """The run's settings with its folder, and the paths of data below `data`.

        Raises ConfigError, naming the run, for settings that do not fit together.
        """
        found = {
            key: str(data / value)
            for key in PATHS
            if isinstance(value := self.settings.get(key), str) and os.path.isfile(data / value)
        }
        try:
            return RunConfig.from_dict({**self.settings, **found, "output": str(folder)})
        except ConfigError as error:
            raise ConfigError(f"run {self.id}: {error}") from error


@dataclass(frozen=True)
class Study:
    """A grid of runs: every method on every task, each at every rate and some seeds.

    Every rate runs with the first `search_seeds` of the `seeds`; the rate with the best mean
    `validation` then runs with the others. So rates are searched on data split off the training
    set, and the reported data choose nothing.

    Attributes:
        methods: label -> settings; an entry with lists in the file is several here.
        rates: label -> the learning rates that are searched.
        seeds: label -> the seeds of the runs at the best rate.
        climb: search from the middle rate on, and only as far as validation improves.
        slack: a rate whose validation is so little below the best counts as the best where a climb
            looks for further rates: differences as small come from chance.
    """

    name: str
    output: Path
    data: Path
    tasks: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, tuple[float, ...]]
    seeds: Mapping[str, tuple[int, ...]]
    search_seeds: int
    climb: bool
    slack: float

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(task, method label), by methods: what a rate is searched for."""
        return [(task, name) for name in self.methods for task in self.tasks]

    def run(self, task: str, name: str, lr: float, seed: int) -> Run:
        settings = {**self.tasks[task], **self.methods[name], "lr": lr, "seed": seed}
        return Run(task, name, lr, seed, settings)

    def search(self, task: str, name: str, rates: Iterable[float] | None = None) -> list[Run]:
        """The runs of one cell at these rates, by default at all that may be searched."""
        rates = self.rates[name] if rates is None else tuple(rates)
        seeds = self.seeds[name][: self.search_seeds]
        return [self.run(task, name, lr, seed) for seed in seeds for lr in rates]

    def repeats(self, task: str, name: str, lr: float) -> list[Run]:
        """The runs of one cell at the chosen rate that its search did not make."""
        seeds = self.seeds[name][self.search_seeds :]
        return [self.run(task, name, lr, seed) for seed in seeds]

    def grid(self) -> dict[str, Run]:
        """Every run that the study may ask for, by id."""
        return {
            run.id: run
            for task, name in self.cells
            for lr in self.rates[name]
            for seed in self.seeds[name]
            for run in [self.run(task, name, lr, seed)]
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tasks": {name: dict(settings) for name, settings in self.tasks.items()},
            "methods": {name: dict(settings) for name, settings in self.methods.items()},
            "lr": {name: list(rates) for name, rates in self.rates.items()},
            "seeds": {name: list(seeds) for name, seeds in self.seeds.items()},
            "search_seeds": self.search_seeds,
            "search": "climb" if self.climb else "all",
            "search_slack": self.slack,
        }


def read_study(path: Path, *, output: str | None = None, data: str | None = None) -> Study:
    """The study of a YAML file.

    Args:
        output, data: in the place of the file's.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is refused, or the grid has
            nothing in it. Every run's settings are checked.
    """
    loaded = read_yaml(path)
    try:
        study = _study(loaded, output, data)
        for run in study.grid().values():
            config = run.config(StudyFolder(study.output).runs / run.id, study.data)
            if not config.validation and not config.eval:
                raise ConfigError(f"run {run.id}: validation (or eval) is missing")
            if not config.test:
                raise ConfigError(f"run {run.id}: test, the data to report on, is missing")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


def _study(loaded: Any, output: str | None, data: str | None) -> Study:
    if not isinstance(loaded, dict):
        raise ConfigError(f"must hold the keys {', '.join(_KEYS)}")
    for key in loaded:
        if key not in _KEYS:
            raise ConfigError(f"key {shown(key)} is unknown.{nearest(shown(key), _KEYS)}")
    base = _settings("base", loaded.get("base", {}))
    tasks = {
        _label("task", name): {**base, **_settings(f"task {name}", own)}
        for name, own in _mapping("tasks", loaded.get("tasks")).items()
    }
    methods: dict[str, dict[str, Any]] = {}
    rates: dict[str, tuple[float, ...]] = {}
    seeds: dict[str, tuple[int, ...]] = {}
    for entry, own in _mapping("methods", loaded.get("methods")).items():
        own = _settings(f"method {_label('method', entry)}", own, also=("lr", "seeds"))
        searched = _rates(own.pop("lr", loaded.get("lr")), entry)
        repeated = _seeds(own.pop("seeds", loaded.get("seeds", [0])), entry)
        for name, settings in _expanded(entry, own):
            if name in methods:
                raise ConfigError(f"two methods are called {name!r}")
            methods[name] = settings
            rates[name] = searched or (_default_rate(name, settings, tasks),)
            seeds[name] = repeated
    search = loaded.get("search_seeds", 1)
    fewest = min(map(len, seeds.values()))
    if isinstance(search, bool) or not isinstance(search, int) or not 0 < search <= fewest:
        raise ConfigError(f"search_seeds = {shown(search)} must lie between 1 and {fewest} (seeds)")
    how = loaded.get("search", SEARCHES[0])
    if how not in SEARCHES:
        raise ConfigError(f"search = {shown(how)} is not one of {', '.join(SEARCHES)}")
    slack = loaded.get("search_slack", 0.0)
    number = isinstance(slack, int | float) and not isinstance(slack, bool)
    if not number or not 0 <= slack <= sys.float_info.max:
        raise ConfigError(f"search_slack = {shown(slack)} must be a number from 0 on")
    runs = len(tasks) * sum(len(rates[name]) * len(seeds[name]) for name in methods)
    if runs > _LARGEST_GRID:
        raise ConfigError(f"the grid has {runs:,} runs; {_LARGEST_GRID:,} are the most it may have")
    where = output or loaded.get("output")
    if not where:
        raise ConfigError("output, the study's folder, is missing")
    place = _folder("output", where)
    called = loaded.get("name", place.name)
    if not isinstance(called, str | int | float):
        raise ConfigError(f"name = {shown(called)} is no text")
    start = data or loaded.get("data")
    return Study(
        name=str(called),
        output=place,
        data=_folder("data", "." if start is None else start),
        tasks=tasks,
        methods=methods,
        rates=rates,
        seeds=seeds,
        search_seeds=search,
        climb=how == "climb",
        slack=float(slack),
    )


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{key} is empty, so the grid has nothing in it: {_KEYS[key]}")
    return value


def _settings(where: str, value: Any, also: Iterable[str] = ()) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must hold settings, got {shown(value)}")
    settings = one_name_each(where, value)
    for key in settings:
        if key in _OWN and key not in also:
            raise ConfigError(f"{where}: {shown(key)} is set by the study itself, for each run")
        if key not in FIELDS and key not in also:
            raise ConfigError(f"{where}: setting {shown(key)} is unknown.{nearest(key, FIELDS)}")
        values = settings[key] if isinstance(settings[key], list) else [settings[key]]
        if not all(value is None or isinstance(value, str | int | float) for value in values):
            raise ConfigError(
                f"{where}: {key} = {shown(settings[key])} is no text, no number, nor a list of them"
            )
    return settings


def _folder(key: str, value: Any) -> Path:
    """`value` as an absolute path. Raises ConfigError where there can be no such folder."""
    if not isinstance(value, str):
        raise ConfigError(f"{key} = {shown(value)} must be the path of a folder")
    try:
        path = path_of(key, value).resolve()
        found = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise ConfigError(f"{key} = {shown(value)} cannot be a folder: {error.strerror}") from error
    if not found.is_dir():
        raise ConfigError(f"{key} = {shown(value)} cannot be a folder: {found} is a file")
    return path


def _label(kind: str, name: Any) -> str:
    if not isinstance(name, str) or not _LABEL.fullmatch(name):
        raise ConfigError(
            f"{kind} {shown(name)}: a label is made of letters, digits, and . _ + -, a hundred at "
            "most, as it names folders"
        )
    return name


def _expanded(name: str, own: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """One method for each combination of the listed values, its label followed by them."""
    axes = {k: v for k, v in own.items() if isinstance(v, list) and k not in _LISTS}
    for key, values in axes.items():
        if not values:
            raise ConfigError(f"method {name}: {key} is an empty list: nothing to run")
    if (count := math.prod(map(len, axes.values()))) > _LARGEST_GRID:
        raise ConfigError(
            f"method {name}: its lists span {count:,} methods; a grid may have {_LARGEST_GRID:,} "
            "runs at most"
        )
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        label = "-".join([name, *(_text(value) for value in combination)])
        yield _label("method", label), {**own, **chosen}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).rpartition(":")[2]


def _rates(value: Any, method: str) -> tuple[float, ...]:
    return () if value is None else _several(f"method {method}: lr", value, float)


def _default_rate(method: str, settings: Mapping[str, Any], tasks: Mapping[str, Any]) -> float:
    """What a run with these settings takes by itself."""
    rates = {}
    for task, own in tasks.items():
        try:
            config = RunConfig.from_dict({"train": "-", **own, **settings, "output": "-"})
        except ConfigError as error:
            raise ConfigError(f"method {method} on task {task}: {error}") from error
        if config.mask is not None:
            raise ConfigError(f"method {method}: lr is missing, and its default is in the mask")
        rates[task] = config.learning_rate
    if len(set(rates.values())) > 1:
        found = ", ".join(f"{lr:g} on {task}" for task, lr in rates.items())
        raise ConfigError(f"method {method}: lr is missing, and it is {found} by default")
    return next(iter(rates.values()))


def _seeds(value: Any, method: str) -> tuple[int, ...]:
    return _several(f"method {method}: seeds", value, int)


def _several(key: str, value: Any, kind: Any) -> tuple[Any, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        # YAML reads 1e-3 as text.
        found = tuple(as_kind(kind, item) for item in values)
    except OverflowError:
        raise ConfigError(f"{key} = {shown(value)} is too large a number") from None
    except (TypeError, ValueError):
        found = ()
    if not found or len(found) < len(values) or (kind is int and list(found) != values):
        raise ConfigError(f"{key} = {shown(value)} must be a list of numbers with one at least")
    if len(set(found)) < len(found):
        raise ConfigError(f"{key} = {shown(value)} names a value twice")
    return found
