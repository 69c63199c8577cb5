"""The demo's data: docstrings of Python's own standard library, labelled with their package.

Everything is read from the interpreter the demo runs on (`ast` over its source files, no module is
imported), so there is nothing to download and nothing to ship. The set is built to be honest rather
than easy:

- a class is an import package (a folder with `__init__.py`); the regression test suite `test` is
  left out, because its docstrings speak about every other package;
- a package's own name is removed from its texts, dotted module names included, so that the label
  cannot be read off;
- a text that occurs in two packages has no right answer and is dropped;
- near-duplicates (overloads, copied wrappers) stay on one side of the split, and the side comes
  from a stable hash, so every machine with the same Python version trains on the same examples.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import DataError

NUM_PACKAGES = 16
MIN_WORDS = 3
MIN_EXAMPLES = 10
EVAL_SHARE = 0.1
TEST_SHARE = 0.2
SAME_SHINGLES = 0.5  # Jaccard similarity of word pairs from which two texts are near-duplicates
SKIPPED = ("test", "site-packages", "dist-packages", "lib-dynload", "__pycache__")

_WORD = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Docstring:
    """First paragraph of a docstring (``text``) and the package it was found in (``label``)."""

    text: str
    label: str


@dataclass(frozen=True)
class DemoData:
    """The three sides of the split; ``labels`` from the largest package to the smallest."""

    train: tuple[Docstring, ...]
    eval: tuple[Docstring, ...]
    test: tuple[Docstring, ...]
    labels: tuple[str, ...]


def collect(stdlib: Path | None = None, num_packages: int = NUM_PACKAGES) -> DemoData:
    """Gathers, cleans and splits the docstrings of the ``num_packages`` largest packages.

    Raises DataError when the standard library's source is not there (some minimal installations
    ship bytecode only).
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    found = {package.name: list(_docstrings(package)) for package in _packages(root)}
    examples = _unambiguous(found)
    sizes = Counter(example.label for example in examples)
    labels = tuple(
        name
        for name, count in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
        if count >= MIN_EXAMPLES
    )[:num_packages]
    if len(labels) < 2:
        raise DataError(
            f"{root}: no two packages with {MIN_EXAMPLES} docstrings each; the demo reads the "
            "source of Python's standard library, which this interpreter does not carry. Use "
            "another Python, or give your own data with --train and --eval"
        )
    kept = [example for example in examples if example.label in set(labels)]
    train, held_out, test = (tuple(side) for side in split(kept))
    return DemoData(train, held_out, test, labels)


def _packages(root: Path) -> list[Path]:
    return [
        entry
        for entry in sorted(root.iterdir())
        if entry.name not in SKIPPED and (entry / "__init__.py").is_file()
    ]


def _docstrings(package: Path) -> Iterator[Docstring]:
    for path in sorted(package.rglob("*.py")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the library's own source
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # deliberately broken sources that lib2to3 and others carry as test input
        for node in ast.walk(tree):
            if not isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                continue
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                text = clean(docstring, package.name)
                if len(text.split()) >= MIN_WORDS:
                    yield Docstring(text, package.name)


def clean(docstring: str, package: str) -> str:
    """First paragraph in one line, without the package's name and dotted names that start so."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    own_name = re.compile(rf"(?<![A-Za-z0-9]){re.escape(package)}(\.\w+)*(?![A-Za-z0-9])", re.I)
    return " ".join(own_name.sub(" ", paragraph).split())


def _unambiguous(found: dict[str, list[Docstring]]) -> list[Docstring]:
    owners = defaultdict(set)
    for label, docstrings in found.items():
        for docstring in docstrings:
            owners[_words(docstring.text)].add(label)
    kept: dict[tuple[str, ...], Docstring] = {}
    for docstrings in found.values():
        for docstring in docstrings:
            words = _words(docstring.text)
            if len(owners[words]) == 1 and len(words) >= MIN_WORDS:
                kept.setdefault(words, docstring)
    return list(kept.values())


def split(
    examples: Sequence[Docstring],
) -> tuple[list[Docstring], list[Docstring], list[Docstring]]:
    """Train, eval and test sides. A group of near-duplicates goes to one side as a whole.

    The side is a function of the group's texts alone (SHA-256 of the first in sorted order).
    """
    sides: tuple[list[Docstring], list[Docstring], list[Docstring]] = ([], [], [])
    for group in near_duplicate_groups([example.text for example in examples]):
        key = min(" ".join(_words(examples[index].text)) for index in group)
        position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        side = 2 if position < TEST_SHARE else 1 if position < TEST_SHARE + EVAL_SHARE else 0
        sides[side].extend(examples[index] for index in group)
    return sides


def near_duplicate_groups(texts: Sequence[str]) -> list[list[int]]:
    """Groups the positions of ``texts``: whatever is linked by similar texts is one group.

    Two texts are similar when the Jaccard index of their word pairs reaches ``SAME_SHINGLES``.
    Only texts that share a word pair are compared.
    """
    shingles = [shingle_set(text) for text in texts]
    owners: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    parent = list(range(len(texts)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for index, own in enumerate(shingles):
        shared: Counter[int] = Counter()
        for shingle in own:
            shared.update(owners[shingle])
            owners[shingle].append(index)
        for other, common in shared.items():
            if common >= SAME_SHINGLES * (len(own) + len(shingles[other]) - common):
                parent[find(index)] = find(other)
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(len(texts)):
        groups[find(index)].append(index)
    return list(groups.values())


def shingle_set(text: str) -> frozenset[tuple[str, str]]:
    """The pairs of neighbouring words of a text, with its ends marked; case and marks ignored."""
    return frozenset(pairwise(("", *_words(text), "")))


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))
