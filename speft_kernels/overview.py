"""What of a model trains: its sparse layers, counted and tabulated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .nn import SparseDeltaLinear


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within what compiles, replicates or averages it as a whole (torch.compile,
    DataParallel, DistributedDataParallel, AveragedModel). Names of layers and what a model
    remembers are of it: an adapter is for the model, wrapped or not.
    """
    wrappers = (nn.DataParallel, DistributedDataParallel, AveragedModel)
    while True:
        # By its one child: to ask for the class would import the compiler.
        inner = model.module if isinstance(model, wrappers) else model._modules.get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def sparse_layers(model: nn.Module) -> dict[str, SparseDeltaLinear]:
    """Return name -> sparse layer in the model's order; registered twice, it has its first name.
    The names are those in the model itself, also where it comes in a wrapper (`unwrapped`).
    """
    return {
        name: module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, SparseDeltaLinear)
    }


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of scalars that require grad."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class SummaryRow:
    """One sparse layer: of a weight `shape` = (N, K), `nnz` scalars train."""

    layer: str
    shape: tuple[int, int]
    nnz: int
    density: float
    used_columns: int
    used_rows: int


@dataclass(frozen=True)
class Summary:
    """The sparse layers of a model, and its parameters in all; `str()` is a table."""

    rows: tuple[SummaryRow, ...]
    sparse: int
    dense: int
    total: int

    @property
    def trainable(self) -> int:
        """Number of trained scalars: the sparse layers' values, and what trains densely."""
        return self.sparse + self.dense

    def __str__(self) -> str:
        header = ("layer", "shape", "nnz", "density", "used columns", "used rows")
        lines = [
            (
                row.layer,
                f"{row.shape[0]} x {row.shape[1]}",
                f"{row.nnz:,}",
                f"{row.density:.3%}",
                _share(row.used_columns, row.shape[1]),
                _share(row.used_rows, row.shape[0]),
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

        def aligned(cells: tuple[str, ...]) -> str:
            rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
            return "  ".join([f"{cells[0]:<{widths[0]}}", *rest])

        share = self.trainable / self.total if self.total else 0.0
        return "\n".join(
            [
                aligned(header),
                "  ".join("-" * width for width in widths),
                *map(aligned, lines),
                f"trainable {self.trainable:,} ({self.sparse:,} sparse, {self.dense:,} dense) of "
                f"{self.total:,} parameters: {share:.3%}",
            ]
        )


def _share(used: int, of: int) -> str:
    return f"{used:,} ({used / of:.1%})" if of else "0"


def summary(model: nn.Module) -> Summary:
    """Tabulate the sparse layers of `model`; `print(summary(model))` shows the table."""
    layers = sparse_layers(model)
    rows = tuple(
        SummaryRow(
            layer=name,
            shape=layer.pattern.shape,
            nnz=layer.pattern.nnz,
            density=layer.pattern.density,
            used_columns=layer.pattern.used_cols.numel(),
            used_rows=layer.pattern.used_rows.numel(),
        )
        for name, layer in layers.items()
    )
    sparse = sum(layer.values.numel() for layer in layers.values() if layer.values.requires_grad)
    return Summary(
        rows=rows,
        sparse=sparse,
        dense=trainable_parameters(model) - sparse,
        total=sum(parameter.numel() for parameter in model.parameters()),
    )
