"""Examples from local files (TSV, CSV, JSON) or from the `datasets` library.

Every fault of a file is refused with a DataError that names the file, the line and the remedy.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, nearest, reason_of, shown
from . import chat

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json")
# Columns of a task's text, in the order they are looked for.
TEXT_COLUMNS = {
    "classification": (
        *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
        *(("question", "sentence"), ("sentence",), ("text",)),
    ),
    "causal-lm": (
        *(("prompt", "response"), ("query", "response"), ("question", "answer")),
        *(("instruction", "input", "output"), ("instruction", "output"), ("messages",), ("text",)),
    ),
}
# How files begin that are no UTF-8 text: what they are, and what to do about it.
_NO_TEXT = {
    b"\xff\xfe": ("UTF-16 text", "convert it with iconv -f utf-16 -t utf-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it with iconv -f utf-16 -t utf-8"),
    b"\x1f\x8b": ("compressed with gzip", "unpack it with gzip -dc"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or export a table of it"),
    b"PAR1\x15": ("a Parquet file", "export it as JSON lines"),
}
_MOST_NAMES = 20  # of columns or labels in a message
# What stands before each element of an array, and before its end.
_BETWEEN = re.compile(r"\s*[\[,]?\s*")
_WHOLE_NUMBER = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class Example:
    """One row: its texts, for classification the label, and where the row stands.

    A conversation is one text, its messages as JSON.
    """

    texts: tuple[str, ...]
    label: str | None
    line: int


@dataclass(frozen=True)
class Examples:
    """The rows of one source; `source` is the file or the dataset's name.

    `label_names` are the labels by their numbers, of a dataset that numbers them.
    """

    source: str
    columns: tuple[str, ...]
    rows: tuple[Example, ...]
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 over the rows: a resumed run must see the same data."""
        digest = hashlib.sha256()
        if self.label_names:
            digest.update(json.dumps(self.label_names).encode())
        for row in self.rows:
            digest.update(json.dumps([row.texts, row.label]).encode())
        return digest.hexdigest()


def read_examples(source: str, task: str, *, default_split: str = "train") -> Examples:
    """The examples of a file, or of the dataset `NAME[@CONFIG][:SPLIT]` if there is no such file.

    Raises DataError for whatever makes the source unusable.
    """
    path = Path(source)
    try:
        if path.is_file():
            return _to_examples(str(path), _parse(path), task)
        if path.is_dir():
            raise DataError(f"{path} is a folder; name a file in it ({_listing(path)})")
        if path.exists():  # of <(...) in a shell, for one
            raise DataError(
                f"{path} is a pipe or a device, and data are read more than once; write them to a "
                "file and name that"
            )
        if is_local(source):
            raise DataError(f"{path}: no such file.{_neighbour(path)}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    names, located = _from_hub(source, default_split)
    return _to_examples(source, located, task, names)


def is_local(source: str) -> bool:
    """Whether it is not the name of a dataset of the hub: then it has to be readable here."""
    path = Path(source)
    return path.exists() or path.suffix.lower() in SUFFIXES or source.startswith(("/", ".", "~"))


def split_off(train: Examples, share: float) -> tuple[Examples, Examples]:
    """`train` without, and only, a random `share` of its rows; the same rows in every run.

    Raises DataError when either part would be empty.
    """
    count = round(share * len(train))
    if not 0 < count < len(train):
        raise DataError(
            f"{train.source}: validation = {share} of its {len(train)} rows leaves one side empty"
        )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train), generator=generator, device="cpu").tolist()
    held_out = set(order[:count])
    parts = [
        tuple(row for i, row in enumerate(train.rows) if (i in held_out) == side)
        for side in (False, True)
    ]
    kept, split = (replace(train, rows=rows) for rows in parts)
    return kept, split


def label_ids(train: Examples) -> dict[str, int]:
    """Class number of each label of the training data: in the order that the dataset gives them;
    where it gives none sorted, as numbers where all of them are.

    Raises DataError when there is nothing to tell apart.
    """
    labels = {row.label or "" for row in train.rows}
    if len(labels) == 1:
        raise DataError(
            f"{train.source}: every row has the label {shown(next(iter(labels)))}; "
            "a classifier needs two labels at least"
        )
    numeric = all(_WHOLE_NUMBER.fullmatch(label) for label in labels)
    # A dataset's order says which label is the positive one: MRPC's "equivalent" has the number 1
    # and sorts first. By their text too: "1" and "01" are one number and two classes.
    known = {name: number for number, name in enumerate(train.label_names)}
    ordered = sorted(
        labels,
        key=lambda label: (known.get(label, len(known)), int(label) if numeric else 0, label),
    )
    return {label: number for number, label in enumerate(ordered)}


def check_labels(examples: Examples, known: dict[str, int]) -> None:
    """Raises DataError when a label of `examples` does not occur in the training data."""
    for row in examples.rows:
        if row.label not in known:
            raise DataError(
                f"{examples.source}, line {row.line}: label {shown(row.label)} does not occur in "
                f"the training data (its labels: {_quoted(list(known))})."
                f"{nearest(str(row.label), known)}"
            )


def check_columns(examples: Examples, train: Examples) -> None:
    """Raises DataError when two sources differ in their text columns."""
    if examples.columns != train.columns:
        raise DataError(
            f"{examples.source} has the text columns {_quoted(examples.columns)}, but "
            f"{train.source} has {_quoted(train.columns)}; rename them so that they agree"
        )


Located = tuple[int, dict[str, Any]]


def _parse(path: Path) -> Iterator[Located]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: files of type {suffix or '(none)'} are not read; save it as one of "
            f"{', '.join(SUFFIXES)}"
        )
    text = _decode(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty; the first line must name the columns")
    if suffix == ".json" and text.lstrip().startswith("["):
        return _objects(path, _json_array(path, text))
    if suffix in (".jsonl", ".json"):
        return _objects(path, _json_lines(path, text))
    return _table(path, _tsv(text) if suffix == ".tsv" else _csv(path, text))


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    for start, (what, remedy) in _NO_TEXT.items():
        if raw.startswith(start):
            raise DataError(f"{path} is {what}, and data are read as UTF-8 text: {remedy}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not "
            f"UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8 {path.name}"
        ) from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Only a newline ends a line; where there is none, the carriage return of an old Mac does."""
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), start=1):
        yield number, line.removesuffix("\r")


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    """Quotes in TSV are ordinary characters (as in GLUE's files)."""
    return ((number, line.split("\t")) for number, line in _lines(text))


def _csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    previous = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        while True:
            start = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            yield start, row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: broken CSV ({error}); put a text that holds commas "
            'or quotes into "...", with inner quotes doubled'
        ) from error
    finally:
        csv.field_size_limit(previous)


def _table(path: Path, lines: Iterable[tuple[int, list[str]]]) -> Iterator[Located]:
    header: list[str] | None = None
    for number, fields in lines:
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            header = [name.strip() for name in fields]
            repeated = [name for name, count in Counter(header).items() if count > 1]
            if repeated:
                raise DataError(f"{path}: the header names {_quoted(repeated)} twice; rename one")
            yield number, dict.fromkeys(header)
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(fields)} field(s) where the header names "
                f"{len(header)} ({_quoted(header)}); look for a stray or missing separator"
            )
        yield number, dict(zip(header, fields, strict=True))


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(text):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason: object = error
            if isinstance(error, json.JSONDecodeError):  # whose line would be the first one always
                reason = f"{error.msg}, column {error.colno}"
            raise DataError(
                f"{path}, line {number}: not valid JSON ({reason}); each line must hold one object"
            ) from error
        yield number, record


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The elements of the one array that a file holds, each with the line that it begins in."""
    try:
        json.loads(text)  # so that what follows meets nothing but elements, commas and the end
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    decoder, at, number = json.JSONDecoder(), 0, 1
    while True:
        begin = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # also of nothing
        number += text.count("\n", at, begin)
        if text[begin] == "]":
            return
        record, at = decoder.raw_decode(text, begin)
        yield number, record
        number += text.count("\n", begin, at)


def _objects(path: Path, located: Iterator[tuple[int, Any]]) -> Iterator[Located]:
    keys: dict[str, None] | None = None
    for number, record in located:
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number}: holds a {type(record).__name__} where an object must be, "
                'such as {"sentence": "...", "label": "..."}'
            )
        if keys is None:
            keys = dict.fromkeys(record)
            yield 0, dict(keys)
        yield number, record


def _from_hub(source: str, default_split: str) -> tuple[tuple[str, ...], Iterator[Located]]:
    """The names of the labels by their numbers, if the dataset numbers them, and the rows."""
    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is no file here, and reading it as a dataset needs the library "
            "'datasets': pip install 'speft-kernels[finetune]'"
        ) from error
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or default_split)
    except Exception as error:  # the library lets through errors of every layer below it
        raise DataError(
            f"{source!r} is neither a file here nor a dataset that could be fetched "
            f"({type(error).__name__}: {reason_of(error)}); give the path of a TSV, CSV or JSONL "
            "file, or NAME[@CONFIG][:SPLIT] of a dataset that this machine can reach"
        ) from error
    names = tuple(getattr(loaded.features.get("label"), "names", None) or ())
    return tuple(name.strip() for name in names), _records(loaded, names)


def _records(loaded: Any, names: Sequence[str]) -> Iterator[Located]:
    yield 0, dict.fromkeys(loaded.column_names)
    for number, record in enumerate(loaded, start=1):
        if names and isinstance(record["label"], int) and record["label"] >= 0:
            record = {**record, "label": names[record["label"]]}
        yield number, record


def _to_examples(
    source: str, located: Iterator[Located], task: str, label_names: tuple[str, ...] = ()
) -> Examples:
    """`located` yields the columns first (as the keys of a dict), then the rows."""
    _, header = next(located, (0, {}))
    columns = _choose_columns(source, tuple(header), task)
    labelled = task == "classification"
    rows = []
    for line, record in located:
        texts = tuple(_text(source, line, record, column) for column in columns)
        label = _label(source, line, record) if labelled else None
        rows.append(Example(texts, label, line))
    if not rows:
        raise DataError(f"{source}: has a header but no rows; add examples below it")
    for position, column in enumerate(columns):
        if not any(row.texts[position].strip() for row in rows):
            raise DataError(f"{source}: the column {column!r} is empty in every row")
    return Examples(source, columns, tuple(rows), label_names if labelled else ())


def _choose_columns(source: str, found: tuple[str, ...], task: str) -> tuple[str, ...]:
    accepted = TEXT_COLUMNS[task]
    chosen = next((names for names in accepted if set(names) <= set(found)), None)
    labelled = task != "classification" or "label" in found
    if chosen is not None and labelled:
        return chosen
    needed, wanted = [], []
    if not labelled:
        needed.append("the column 'label'")
        wanted.append("label")
    if chosen is None:
        texts = "; ".join(" and ".join(map(repr, names)) for names in accepted)
        needed.append(f"one of these: {texts}")
        wanted += [name for names in accepted for name in names]
    hints = (
        f" Column {shown(name)}:{hint}"
        for name in found[:_MOST_NAMES]
        if name not in {*wanted, "label"} and (hint := nearest(name, wanted))
    )
    raise DataError(
        f"{source}: task {task} needs {', and '.join(needed)}. Found: {_quoted(found)}."
        f"{_other_separator(found) or ''.join(hints)}"
    )


def _other_separator(found: tuple[str, ...]) -> str:
    """What to do where the columns of a table came as one."""
    if len(found) == 1 and (other := next((c for c in ";\t|" if c in found[0]), None)):
        return (
            f" The columns look parted by {other!r}; they must be by commas in a .csv, by tabs in "
            "a .tsv"
        )
    return ""


def _text(source: str, line: int, record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if column == "messages" and column in record:
        try:
            value = chat.as_text(value)
        except ValueError as error:
            raise DataError(f"{source}, line {line}: 'messages' {error}") from error
    if not isinstance(value, str):
        what = "is missing" if column not in record else f"is {shown(value)}, not text"
        raise DataError(f"{source}, line {line}: {column!r} {what}")
    return _whole(source, line, column, value)


def _label(source: str, line: int, record: dict[str, Any]) -> str:
    value = record.get("label")
    if isinstance(value, int):
        value = str(value).lower()
    if not isinstance(value, str):
        raise DataError(
            f"{source}, line {line}: 'label' is {shown(value)}, not a name or whole number"
        )
    if not value.strip():
        raise DataError(f"{source}, line {line}: the label is empty; fill it in or drop the row")
    return _whole(source, line, "label", value.strip())


def _whole(source: str, line: int, column: str, text: str) -> str:
    """`text`, which UTF-8 has to be able to hold."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{source}, line {line}: {column!r} holds half of a surrogate pair")
    return text


def _quoted(names: Sequence[str]) -> str:
    """The names in a list that does not grow with the file they come from."""
    more = len(names) - _MOST_NAMES
    listed = ", ".join(map(shown, names[:_MOST_NAMES]))
    return (listed + (f" and {more} more" if more > 0 else "")) or "none"


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    return _quoted(names[:5]) if names else f"it holds no {', '.join(SUFFIXES)}"


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either"
    return nearest(path.name, (p.name for p in path.parent.iterdir() if p.is_file()))
