"""CSV files whose rows are objects of a dataclass, a column for each field.

Fields are of type str, int or float. An empty cell is None where a field may be that.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import DataError, shown
from .files import replaced

Row = TypeVar("Row")


def write_table(path: Path, kind: Any, rows: Iterable[Any]) -> None:
    """Replace `path` by these rows, as a whole."""
    with (
        replaced(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        names = [field.name for field in dataclasses.fields(kind)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells_of(row) for row in rows)


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file, which may lack the columns of fields that have a default.

    Raises:
        DataError: the file is no such table, which it names with the line.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise DataError(f"{path}: not a file")
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, kind, list(reader.fieldnames or ()))
            return [row_of(kind, cells, f"{path}, line {reader.line_num}") for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error


def cells_of(row: Any) -> dict[str, str]:
    """The row by its columns, as a file holds it."""
    return {name: "" if value is None else str(value) for name, value in vars(row).items()}


def row_of(kind: type[Row], cells: Mapping[str, str | None], where: str) -> Row:
    """The row of these cells. Raises DataError, which begins with `where`."""
    if None in cells:
        raise DataError(f"{where}: the line has more fields than there are columns")
    types = _types(kind)  # type: ignore[arg-type]  # mypy takes a class for unhashable
    values: dict[str, Any] = {}
    for name, text in cells.items():
        parse, *others = typing.get_args(types[name]) or (types[name],)
        if text is None:
            raise DataError(f"{where}: the line ends before column {name!r}")
        try:
            text.encode()  # halves of surrogate pairs cannot be written
            values[name] = None if others and not text else parse(text)
        except ValueError as error:
            what = "text" if parse is str else "number"
            raise DataError(f"{where}: {name} = {shown(text)} is no {what}") from error
    try:
        return kind(**values)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


_types = functools.cache(typing.get_type_hints)


def _check_columns(path: Path, kind: Any, found: list[str]) -> None:
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    # What is unknown would be lost where the table is written again.
    for what, names in (
        ("no", [name for name in needed if name not in found]),
        ("an unknown", [name for name in found if name not in known]),
        ("a second", [name for name, count in Counter(found).items() if count > 1]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(f"{path}: {what} column {', '.join(map(shown, names[:3]))}{more}")
