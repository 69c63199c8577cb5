"""Masks as adapters store them: how two of them overlap, and where in a model one lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..adapter_file import CONFIG_FILE, read_adapter
from ..errors import AdapterError, ConfigError
from ..finetune.folder import PEFT_FILE
from ..pattern import SparsePattern

Masks = Mapping[str, SparsePattern]


def read_masks(folder: Path) -> dict[str, SparsePattern]:
    """The pattern of each sparse layer of an adapter; none where it is no adapter of this package.

    Raises:
        ConfigError: the adapter is damaged; names its folder.
    """
    if not (folder / CONFIG_FILE).exists() or (folder / PEFT_FILE).exists():
        return {}  # there is none yet, or PEFT wrote it: that has an adapter_config.json too
    try:
        return {name: layer.pattern for name, layer in read_adapter(folder).layers.items()}
    except AdapterError as error:
        raise ConfigError(f"{folder}: the adapter cannot be read: {error}") from error


@dataclass(frozen=True)
class Overlap:
    """Entries of two masks: `first` and `second` many, `shared` in both.

    `expected` is how many two random masks would share that have as many entries in each layer.
    """

    first: int
    second: int
    shared: int
    expected: float

    @property
    def jaccard(self) -> float:
        """Shared entries over those of either mask; 1 for two empty ones."""
        union = self.first + self.second - self.shared
        return self.shared / union if union else 1.0

    @property
    def share(self) -> float:
        """Share of the first mask's entries that the second has too; 1 for an empty first."""
        return self.shared / self.first if self.first else 1.0

    @property
    def expected_share(self) -> float:
        return self.expected / self.first if self.first else 1.0


def overlap(first: Masks, second: Masks) -> Overlap:
    """Compare two masks entry by entry; a layer that only one has shares nothing.

    Raises:
        ConfigError: a layer has another shape in each, so they are of different models.
    """
    shared, expected = 0, 0.0
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        if one.shape != other.shape:
            raise ConfigError(
                f"layer {name!r} is {one.shape} in one mask and {other.shape} in the other: "
                "they are of different models"
            )
        shared += np.intersect1d(
            one.entry_indices.numpy(), other.entry_indices.numpy(), assume_unique=True
        ).size
        expected += one.density * other.nnz
    return Overlap(_nnz(first), _nnz(second), shared, expected)


def _nnz(masks: Masks) -> int:
    return sum(pattern.nnz for pattern in masks.values())


@dataclass(frozen=True)
class Grid:
    """Density by layer number (None: a name without one) and projection, in the model's order."""

    rows: tuple[int | None, ...]
    columns: tuple[str, ...]
    density: dict[tuple[int | None, str], float]

    @property
    def is_drawable(self) -> bool:
        """A thousand layers of twenty projections are; names that are all different would make as
        many columns as rows, and a page without end.
        """
        return len(self.rows) * len(self.columns) <= 20_000


_PLACE = re.compile(r"(?P<prefix>.*?)(?:^|\.)(?P<number>\d{1,9})(?:\.(?P<rest>.+))?", re.DOTALL)


def grid_of(masks: Masks) -> Grid:
    """Where a mask lies. Experts and other numbered parts of one layer count together."""
    found = {name: _PLACE.fullmatch(name) for name in masks}
    prefixes = {match["prefix"] for match in found.values() if match}
    entries: dict[tuple[int | None, str], list[int]] = {}
    for name, pattern in masks.items():
        match = found[name]
        if match is None:
            place: tuple[int | None, str] = (None, name)
        else:
            column = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", match["rest"] or "itself")
            if len(prefixes) > 1:
                column = f"{match['prefix']}: {column}"
            place = (int(match["number"]), column)
        count = entries.setdefault(place, [0, 0])
        count[0] += pattern.nnz
        count[1] += pattern.shape[0] * pattern.shape[1]
    rows = sorted({row for row, _ in entries}, key=lambda row: (row is None, row))
    columns = tuple(dict.fromkeys(column for _, column in entries))
    density = {place: nnz / numel if numel else 0.0 for place, (nnz, numel) in entries.items()}
    return Grid(tuple(rows), columns, density)
