"""Files that a command writes at its end."""

from __future__ import annotations

from pathlib import Path

from ..atomic import check_creatable
from ..errors import ConfigError
from ..files import path_of


def output_file(flag: str, value: str | None) -> Path | None:
    """The file that `flag` names; None where it is not given.

    Raises ConfigError where it cannot be written: before the work, not after.
    """
    if value is None:
        return None
    path = path_of(flag, value)
    try:
        if not path.parent.is_dir():
            raise ConfigError(f"--{flag} {value}: the folder {path.parent} does not exist")
        if path.exists() and not path.is_file():  # a device would be replaced by a file, too
            raise ConfigError(f"--{flag} {value} is a folder or a device; name a file")
        check_creatable(path)
    except OSError as error:
        raise ConfigError(
            f"--{flag} {value} cannot be written: {error.strerror or error}"
        ) from error
    return path
