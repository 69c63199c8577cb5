"""The exceptions of this package, all under `SpeftError`.

Each one also derives from the built-in error a caller would expect, so `except ValueError` keeps
working. The command line turns a `SpeftError` into one line on standard error and exit code 2.
Operations that are called with wrong tensors raise plain ValueErrors and TypeErrors.
"""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable


class SpeftError(Exception):
    """Base class of what can be wrong with settings, files, masks, models and backends."""


class ConfigError(SpeftError, ValueError):
    """A setting is out of range, unknown, or does not fit the model."""


class PatternError(SpeftError, ValueError):
    """Indices, a mask or a block shape do not describe a sparse pattern."""


class DataError(SpeftError, ValueError):
    """A data file cannot be used as it is."""


class AdapterError(SpeftError, ValueError):
    """An adapter file is damaged, hostile, or made for another model."""


class SalienceError(SpeftError, ValueError):
    """A salience score cannot be computed or ranked."""


class OutputError(SpeftError, OSError):
    """A file or folder cannot be written: the disk is full, the folder is write-protected."""


class BackendError(SpeftError, RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


class StaleWeightError(SpeftError, RuntimeError):
    """`values` changed between a forward pass and its backward pass."""


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict, _REPR.maxset = 2, 6, 6, 6, 6
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


def shown(value: object) -> str:
    """Return a repr of bounded length, for messages: a name may be as long as the file it is in,
    and in YAML a list of lists may have far more entries than the file has bytes.
    """
    try:
        text = _REPR.repr(value)
    except ValueError:  # of an integer of more digits than Python writes out
        text = f"<{type(value).__name__} of thousands of digits>"
    return text if len(text) <= 120 else text[:117] + "..."


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says, for a message around it; with the second where
    the first ends in a colon. The error's type where it says nothing.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])


def plain(value: object) -> str:
    """`value` as text that every encoding and every parser takes.

    Control characters, halves of surrogate pairs and marks that turn the direction of the text
    around become U+FFFD: they would hide what a name really is, or not be allowed in the page.
    """
    text = value if isinstance(value, str) else str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join("\ufffd" if _is_unsafe(letter) else letter for letter in text)


def _is_unsafe(letter: str) -> bool:
    if letter in "\n\t":
        return False
    # Zl and Zp end a line of a script; Cf holds the marks of direction and of no width.
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name[:120], list(known), n=1, cutoff=0.5)
    return f" Did you mean {shown(matches[0])}?" if matches else ""
