"""Scores of the user's own: a callable `score(w, g) -> s`, in the code or by its name.

A name, "package.module:function", is imported when something is scored, never when a config is
read: configs come with adapters, and reading a stranger's adapter must run none of their code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import ConfigError, SalienceError

Score = Callable[[Tensor, Tensor], Tensor]

# A part in angle brackets is what Python, or `name_of`, calls something that has no name to import.
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:(<[^<>]+>|[^\W\d]\w*)(\.(<[^<>]+>|[^\W\d]\w*))*")


def check_name(name: str) -> None:
    """Check the form of a callable's name.

    Raises:
        ConfigError: it is not "package.module:function".
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"salience {name!r} is not the name of a callable: write 'package.module:function'"
        )


def name_of(score: Score) -> str:
    """Return "module:qualname"; with a part in angle brackets where that cannot be imported."""
    module = getattr(score, "__module__", None) or type(score).__module__
    qualname = getattr(score, "__qualname__", None)
    if qualname is None:  # an object with __call__, a functools.partial
        return f"{type(score).__module__}:<{type(score).__qualname__}>"
    found: object = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is score or "<" in qualname:
        return f"{module}:{qualname}"
    return f"{module}:<{qualname}>"  # a bound method: its name would import the unbound one


def import_score(name: str) -> Score:
    """Import what `name` names, from the working folder too where no other place has the module.

    Raises:
        ConfigError: it cannot be imported, or cannot be called.
    """
    check_name(name)
    module, _, qualname = name.partition(":")
    if "<" in qualname:
        raise ConfigError(
            f"salience {name!r} cannot be imported: a lambda, a local function, a bound method or "
            "an object has no name of its own. Pass the callable itself, or define a function in a "
            "module"
        )
    try:
        with _working_folder_searched():
            found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        fact = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"salience {name!r} cannot be imported: {fact}") from error
    for part in qualname.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"salience {name!r} cannot be imported: {module} has no {qualname}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"salience {name!r} is a {type(found).__name__}; it must be a callable score(w, g)"
        )
    return found


def source_of(name: str) -> bytes:
    """Return the content of the file whose module `name` is in, without importing it; empty where
    there is no such file.
    """
    try:
        with _working_folder_searched():
            spec = importlib.util.find_spec(name.partition(":")[0])  # imports the packages above
        return Path(spec.origin).read_bytes() if spec and spec.origin else b""
    except Exception:  # whatever a package raises; what cannot be imported, `import_score` says
        return b""


@contextmanager
def _working_folder_searched() -> Iterator[None]:
    """Python searches it for a script's or a shell's imports, not for an installed command's."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def check_score(score: object, weight: Tensor, label: str) -> Tensor:
    """Return a callable's result in the dtype and on the device of `weight`.

    Raises:
        SalienceError: it is no floating-point tensor of the weight's shape.
    """
    if not isinstance(score, Tensor):
        raise SalienceError(f"{label} returned a {type(score).__name__}; it must return a tensor")
    if score.shape != weight.shape:
        raise SalienceError(
            f"{label} returned shape {tuple(score.shape)} for a weight of shape "
            f"{tuple(weight.shape)}; it must return a score for each entry"
        )
    if not score.is_floating_point():
        raise SalienceError(f"{label} returned {score.dtype}; it must return floating-point scores")
    return score.detach().to(weight)
